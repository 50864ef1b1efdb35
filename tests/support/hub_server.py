"""A stand-in for the Hugging Face hub on loopback: as much of its protocol as an upload needs.

Large files come by Git LFS; Xet, which the hub prefers, needs a server of its own and is to be switched off.
"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """Takes repositories and commits; as a context manager it serves.

    Attributes:
        repositories: name -> `private` or `public`.
        files: path -> content of the last commit.
        tokens: that requests came with.
        refuse: answer everything with 403 and this text.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuse: str | None = None
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What the hub says to a POST or PUT."""
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization')}/{made['name']}"
            older = "private" if made.get("private") else "public"
            self.repositories[name] = made.get("visibility") or older
            return {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                    for name in named
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {**thing, "actions": {"upload": {"href": f"{self.address}/large/{thing['oid']}"}}}
                    for thing in objects
                ],
            }
        if path.startswith("/large/"):
            self._large[path.rpartition("/")[2]] = body
            return {}
        assert "/commit/" in path, path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self._large[value["oid"]]
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        return {"commitUrl": f"{self.address}/{name}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.tokens.add(self.headers.get("Authorization", ""))
                refused = server.refuse is not None and not self.path.startswith("/large/")
                answer = {"error": server.refuse} if refused else server.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(403 if refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = reply

            def do_GET(self) -> None:
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        return Handler
