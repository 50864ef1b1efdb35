"""A small HTTP server on loopback that speaks as much of OpenAI's API as a judge needs, with faults.

What each request meets is said by a function from the request's text to a `Reply`; faults are replies too.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends."""

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_at: int | None = None
    """Close the connection after this many bytes of the announced body."""


def chat(*positions: Mapping[str, float]) -> Reply:
    """A chat answer: at each position the tokens with their probabilities, the chosen one first."""
    content = []
    for tokens in positions:
        top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
        content.append({**top[0], "top_logprobs": top})
    text = "".join(next(iter(tokens)) for tokens in positions)
    choice: dict[str, Any] = {"message": {"content": text}, "logprobs": {"content": content}}
    return Reply(json.dumps({"choices": [choice]}).encode())


def completion(*positions: Mapping[str, float]) -> Reply:
    """A completions answer, in the older form."""
    tops = [{token: math.log(p) for token, p in tokens.items()} for tokens in positions]
    chosen = [next(iter(top)) for top in tops]
    logprobs = {
        "tokens": chosen,
        "token_logprobs": [top[token] for top, token in zip(tops, chosen, strict=True)],
        "top_logprobs": tops,
    }
    return Reply(json.dumps({"choices": [{"text": "".join(chosen), "logprobs": logprobs}]}).encode())


def judge_by_words(text: str, number: int, names: tuple[str, ...] = ("law", "code", "other")) -> Reply:
    """What a perfect judge answers: the shares of the domains' names among the words of the text."""
    words = text.split("=" * 20)[1].split()
    counts = {name: words.count(name) for name in names}
    total = sum(counts.values())
    if not total:
        return chat({"Sorry": 1.0})
    shares = {name: count / total for name, count in counts.items() if count}
    return chat(dict(sorted(shares.items(), key=lambda item: -item[1])))


class JudgeServer:
    """The server; use as a context manager. `url` is the API's base."""

    def __init__(self, answer: Callable[[str, int], Reply]) -> None:
        """`answer` gets the request's text and its number (from 0)."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0
        self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append({"path": self.path, **body})
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
                    self.send(answer(text, number))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up: that is what some tests are about
                finally:
                    with lock:
                        server.at_once -= 1

            def send(self, reply: Reply) -> None:
                if reply.delay_s:
                    time.sleep(reply.delay_s)
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: reply.cut_at])
                if reply.cut_at is not None:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
