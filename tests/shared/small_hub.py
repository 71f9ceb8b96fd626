"""A Hugging Face hub of one process: what its client asks for when a folder is uploaded or read."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """``files`` are those of its one repository; a request without a token is refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, code: int = 200) -> None:
        self._answer(code, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        name = re.fullmatch(r"/.+/resolve/\w+/(.+)", self.path)
        found = self.server.files.get(name[1]) if name else None
        if self.server.private is None:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif name is None:
            self._json({"id": "org/student", "sha": "0" * 40, "siblings": []})
        elif found is None:
            self._answer(404, X_Error_Code="EntryNotFound")
        else:
            self._answer(200, found, ETag='"1"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            self._json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(sent)  # older clients say private, newer ones visibility
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            self._json({"url": f"{self.server.address}/org/student"})
        elif "/preupload/" in self.path:
            files = json.loads(sent)["files"]
            said = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": file["path"], **said} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self._json(
                {"commitUrl": f"{self.server.address}/org/student/commit/1", "commitOid": "1"}
            )
        else:
            self._json({"warnings": [], "errors": []})


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on this machine."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
