"""A hub on this machine with one model, which keeps account of what it is asked."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HUB_ID = "org/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """The model of a folder under `HUB_ID`.

    Attributes:
        token: without it, the files are not given away; None lets everybody have them.
        delay: seconds before it answers.
        requests: method, path and token of each, in order.
    """

    folder: Path
    token: str | None = None
    url: str = ""
    delay: float = 0.0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def count(self, method: str, part: str) -> int:
        """Requests of a method for a path with this in it."""
        return sum(m == method and part in path for m, path, _ in self.requests)

    def listing(self) -> list[dict[str, object]]:
        """The files as the hub's client wants to hear of them."""
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.folder.iterdir())
        ]


@contextmanager
def fake_hub(folder: Path, token: str | None = None) -> Iterator[FakeHub]:
    """Serves a folder for as long as the block lasts."""
    hub = FakeHub(folder, token)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, token))
        time.sleep(self.hub.delay)
        name = path.rpartition("/")[2]
        if path == f"/api/models/{HUB_ID}/revision/old":
            self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/models/{HUB_ID}/revision/"):
            self._send(200, json.dumps({"id": HUB_ID, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{HUB_ID}/tree/"):
            self._send(200, json.dumps(self.hub.listing()).encode())
        elif path != f"/{HUB_ID}/resolve/{COMMIT}/{name}" or not (self.hub.folder / name).exists():
            self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif self.hub.token not in (None, token):
            self._send(401 if token is None else 403, b"{}", **{"X-Error-Code": "GatedRepo"})
        else:
            content = (self.hub.folder / name).read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
