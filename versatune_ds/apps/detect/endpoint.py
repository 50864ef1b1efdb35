"""A judge behind an OpenAI-compatible server (vLLM's, say), read by the log-probabilities of its answer.

The server is asked to answer with a domain's name and to report the most likely tokens at each position of
its answer. Names may be several tokens long and begin alike, so the answer is walked along:

    position 1    every listed token that can only begin one domain's name gives its probability to that
                  domain ("law", " Medic", "fin")
    ambiguous     the token that the server chose may begin several names ("bio"): position 2 splits its mass
    elsewhere     tokens that begin no name, and ambiguous ones off the chosen path, belong to no domain

What fell on names is scaled to sum 1. If it is less than `MIN_NAME_MASS`, the answer is no answer:
a judgement without probabilities.

A request that meets a server that is down, slow, busy (429), broken (5xx), or that sends something else than
the whole of a JSON answer, is repeated after a growing pause (or after what Retry-After asks for); when all
attempts have failed the run stops, and what was judged so far stays. Other refusals (400, 401, 404 ...) stop
it at once, as does a server without log-probabilities: every further request would end the same way.

The key is read from the environment, sent in the Authorization header, and cut out of any text that a server
sends back before it is shown.

What is not covered: batch APIs, and servers that give only text.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import httpx
import numpy as np

from versatune_ds.apps.detect.judge import PLAIN_ENDING, PROMPT_VERSION, Judgement, question
from versatune_ds.config.detection import Endpoint
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

MIN_NAME_MASS = 0.5
"""An answer whose probability on domain names is smaller is not read: it is mostly something else."""
ANSWER_TOKENS = 12
"""Longest answer asked for: names are a few tokens long."""
RETRIED = (408, 429)
"""Statuses below 500 that ask for patience: timeout, too many requests."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
"""Also the longest that Retry-After is obeyed for at a time."""
SHOWN_CHARS = 300
"""Of a server's error text."""
EDGE_CHARS = " \t\r\n\"'`*_.:#-"
"""Stand around names in answers: spaces, quotes, Markdown. (Tokenizers' own space marks are replaced.)"""


class Position(NamedTuple):
    """One position of an answer."""

    chosen: str
    """The token that the server chose."""
    tokens: dict[str, float]
    """Listed tokens (the chosen one included) -> log-probability in nats."""


class BadAnswer(Exception):
    """The server answered with something that a repeated request may set right."""


class EndpointJudge:
    """See the module docstring.

    Raises:
        ConfigError: the key's environment variable is not set, or two names differ in case only.
    """

    on_every_rank = False

    def __init__(self, names: Sequence[str], settings: Endpoint) -> None:
        self.names = tuple(names)
        self.settings = settings
        self.texts_at_once = 4 * settings.concurrency
        self.plain_names = [plain(name) for name in names]
        if len(set(self.plain_names)) < len(names) or not all(self.plain_names):
            raise ConfigError(
                f"domains.names {list(names)} cannot be told apart in an answer: they must differ in more "
                "than case and surrounding marks"
            )
        self._key = read_key(settings.api_key_env)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=settings.concurrency)
        self._client = httpx.Client(headers=headers, timeout=settings.timeout_s, limits=limits)
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.num_retries = 0
        route = "/chat/completions" if settings.api == "chat" else "/completions"
        self._url = settings.url.rstrip("/") + route

    def identity(self) -> dict[str, Any]:
        """See `DomainJudge`. The address is not in it: a server may move."""
        return {
            "kind": "endpoint",
            "model": self.settings.model,
            "api": self.settings.api,
            "top_logprobs": self.settings.top_logprobs,
            "prompt_version": PROMPT_VERSION,
        }

    def facts(self) -> dict[str, Any]:
        return {"url": self.settings.url, "repeated_requests": self.num_retries}

    def open(self) -> None:
        """Nothing to load."""

    def judge(self, texts: Sequence[tuple[int, str]]) -> Iterator[Judgement]:
        """See `DomainJudge`.

        Raises:
            VersaTuneError: the server did not answer in `retries` further attempts.
            ConfigError: it refuses the requests, or gives no log-probabilities.
        """
        problem: BaseException | None = None
        for future in as_completed([self._pool.submit(self._one, index, text) for index, text in texts]):
            error = future.exception()
            if error is None:
                yield future.result()
            elif problem is None:
                problem = error
                self._stopping.set()  # the others finish the attempt they are in
        if problem is not None:
            raise problem

    def close(self) -> None:
        """End waiting requests and close connections."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, index: int, text: str) -> Judgement:
        answer = self._ask(question(text, self.names))
        masses = read_names(answer, self.plain_names)
        total = math.fsum(masses)
        if total < MIN_NAME_MASS:
            said = "".join(position.chosen for position in answer)[:60]
            problem = f"{total:.1%} of the answer's probability is on domain names; it begins {said!r}"
            return Judgement(index, None, self._without_key(problem), total)
        return Judgement(index, np.array(masses) / total, None, total)

    def _ask(self, text: str) -> list[Position]:
        """The answer's positions; repeats the request as the module docstring says."""
        body = self._body(text)
        problem, attempt = "stopped", 0
        for attempt in range(self.settings.retries + 1):
            if self._stopping.is_set():
                break
            wished_s: float | None = None
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code == 200:
                    return self._positions(response)
                if response.status_code not in RETRIED and response.status_code < 500:
                    raise ConfigError(
                        f"{self._url} refuses the request with status {response.status_code}: "
                        f"{self._shown(response)}"
                    )
                problem = f"status {response.status_code}: {self._shown(response)}"
                wished_s = retry_after_s(response.headers.get("Retry-After"))
            except httpx.TimeoutException:
                problem = f"no answer within {self.settings.timeout_s:g} s"
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = f"{type(error).__name__}: {error}"
            except BadAnswer as error:
                problem = str(error)
            problem = self._without_key(problem)
            if attempt == self.settings.retries:
                break
            pause = pause_s(attempt, wished_s)
            with self._lock:
                self.num_retries += 1
                if self.num_retries == 1:
                    log.warning(
                        "%s: %s; trying again in %.1f s (further ones are counted)", self._url, problem, pause
                    )
            self._stopping.wait(pause)
        raise VersaTuneError(
            f"{self._url}: {problem} ({attempt + 1} attempt(s)). What was judged so far is kept: set the "
            "server right and start the same command again (detect.judge.endpoint has retries, timeout_s and "
            "concurrency)"
        )

    def _body(self, text: str) -> dict[str, Any]:
        settings = self.settings
        common = {"model": settings.model, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        if settings.api == "chat":
            messages = [{"role": "user", "content": text}]
            return {**common, "messages": messages, "logprobs": True, "top_logprobs": settings.top_logprobs}
        return {**common, "prompt": text + PLAIN_ENDING, "logprobs": settings.top_logprobs}

    def _positions(self, response: httpx.Response) -> list[Position]:
        try:
            raw = json.loads(response.content)
            choice = raw["choices"][0]
            given = choice.get("logprobs")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise BadAnswer(f"not an answer: {self._shown(response)}") from None
        try:
            positions = chat_positions(given) if self.settings.api == "chat" else plain_positions(given)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadAnswer(f"log-probabilities of an unknown form: {self._shown(response)}") from None
        if positions is None:
            raise ConfigError(
                f"{self._url} answers without log-probabilities, and probabilities are read from them; use a "
                "server that gives them (vLLM does), or detect.judge.kind model or classifier"
            )
        return positions

    def _shown(self, response: httpx.Response) -> str:
        return repr(self._without_key(response.text)[:SHOWN_CHARS])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; raises ConfigError when it is named and not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"detect.judge.endpoint.api_key_env names {variable}, which is not set in this environment"
        )
    return key


def pause_s(attempt: int, wished_s: float | None) -> float:
    """Seconds to wait after attempt `attempt` (from 0): doubling, jittered, at least what was wished."""
    doubling = FIRST_PAUSE_S * 2**attempt * random.uniform(0.75, 1.25)
    return min(LONGEST_PAUSE_S, max(doubling, wished_s or 0.0))


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None when it says nothing."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def chat_positions(given: Any) -> list[Position] | None:
    """Positions from the `logprobs` of a chat answer; None where there are none."""
    if not given or not given.get("content") or "top_logprobs" not in given["content"][0]:
        return None
    return [
        Position(
            item["token"],
            {item["token"]: float(item["logprob"])}
            | {other["token"]: float(other["logprob"]) for other in item["top_logprobs"]},
        )
        for item in given["content"]
    ]


def plain_positions(given: Any) -> list[Position] | None:
    """Positions from the `logprobs` of a completions answer; None where there are none."""
    if not given or not given.get("tokens") or not given.get("top_logprobs"):
        return None
    return [
        Position(chosen, {chosen: float(logprob)} | {t: float(value) for t, value in (top or {}).items()})
        for chosen, logprob, top in zip(
            given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
        )
    ]


def plain(text: str) -> str:
    """Text as names are compared: no case, no marks around it; tokenizers' space marks are spaces."""
    return _folded(text).strip(EDGE_CHARS)


def _folded(text: str) -> str:
    return text.replace("Ġ", " ").replace("▁", " ").casefold()


def read_names(answer: Sequence[Position], names: Sequence[str]) -> list[float]:
    """Probability that an answer gives to each name (as `plain` gives them); see the module docstring."""
    masses = [0.0] * len(names)
    path, mass = "", 1.0
    for position in answer:
        going_on = False
        for token, logprob in position.tokens.items():
            share = mass * math.exp(min(0.0, logprob))
            meant = candidates(path + token, names)
            if len(meant) == 1:
                masses[meant[0]] += share
            elif token == position.chosen:
                going_on = len(meant) > 1
        if not going_on:
            break
        mass *= math.exp(min(0.0, position.tokens[position.chosen]))
        path += position.chosen
    else:  # the answer ends while a name and a longer one that begins with it are both possible
        if path and plain(path) in names:
            masses[names.index(plain(path))] += mass
    return masses


def candidates(beginning: str, names: Sequence[str]) -> list[int]:
    """Ids of the names that an answer with this beginning can still mean; marks alone can mean any."""
    text = _folded(beginning).lstrip(EDGE_CHARS)
    meant = {i for i, name in enumerate(names) if name.startswith(text)}
    # the longest whole name that is not followed by a letter or digit: "law." but not "lawn"
    whole = [
        i for i, name in enumerate(names) if text.startswith(name) and not text[len(name) :][:1].isalnum()
    ]
    if whole:
        meant.add(max(whole, key=lambda i: len(names[i])))
    return sorted(meant)
