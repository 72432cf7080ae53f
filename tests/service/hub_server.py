"""A hub for tests: a real HTTP server that speaks the hub's API, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
REPOSITORY = "someone/tiny-model"
LARGE = (".safetensors", ".bin")
"""What the hub keeps in large file storage, whatever its size."""


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pointer(data: bytes) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n"
    return text.encode()


@dataclass
class Hub:
    """One repository at one commit; what the fields after `files` say goes wrong.

    `change_info` may change the list of files, `change_body` the bytes of a file, `cut` cuts the body of the
    first question for a file there, `redirect` replaces the place of large files, `statuses` are answered
    first to last before anything else, `slow` seconds lie between bytes, `endless` sends on without end.
    """

    port: int
    files: dict[str, bytes]
    change_info: Callable[[dict[str, Any]], Any] = lambda info: info
    change_body: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    redirect: str | None = None
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    commit_header: str = COMMIT
    ranges: bool = True
    slow: float = 0.0
    endless: bool = False
    token: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self, part: str) -> list[str]:
        return [path for path, _ in self.asked if part in path]

    def info(self) -> Any:
        siblings = []
        for name, data in sorted(self.files.items()):
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            if name.endswith(LARGE):
                entry["blobId"] = git_id(pointer(data))
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": len(pointer(data))}
            else:
                entry["blobId"] = git_id(data)
            siblings.append(entry)
        return self.change_info(
            {
                "_id": "60000000000000000000000a",
                "id": REPOSITORY,
                "modelId": REPOSITORY,
                "private": False,
                "gated": False,
                "disabled": False,
                "sha": COMMIT,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )


@contextmanager
def hub_serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1 while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            path = unquote(urlsplit(self.path).path)
            if hub.statuses:
                status, headers = hub.statuses.pop(0)
                self._answer(status, headers, b"the hub's own words")
            elif hub.token and "/cdn/" not in path and not self._is_known():
                self._error(401, "RepoNotFound")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
                self._info(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(*found.groups())
            elif (found := re.fullmatch(r"/api/resolve-cache/models/[^/]+/[^/]+/[^/]+/(.+)", path)) or (
                found := re.fullmatch(r"/cdn/[0-9a-f]+/(.+)", path)
            ):
                self._file(found[1])
            else:
                self._error(404, "RepoNotFound")

        def _is_known(self) -> bool:
            return self.headers.get("authorization") == f"Bearer {hub.token}"

        def _info(self, repository: str, revision: str) -> None:
            if repository != REPOSITORY:
                return self._error(401, "RepoNotFound")
            if revision != COMMIT:
                return self._error(404, "RevisionNotFound")
            return self._answer(200, {"Content-Type": "application/json"}, json.dumps(hub.info()).encode())

        def _resolve(self, repository: str, revision: str, name: str) -> None:
            if repository != REPOSITORY or revision != COMMIT:
                return self._error(404, "RevisionNotFound")
            if name not in hub.files:
                return self._error(404, "EntryNotFound")
            data, headers = hub.files[name], {"X-Repo-Commit": hub.commit_header}
            if name.endswith(LARGE):
                headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256(data)}"'}
                place = hub.redirect or f"{hub.url}/cdn/{sha256(data)}/{name}?X-Amz-Signature=abc&x=%2B"
                return self._answer(302, {**headers, "Location": place}, b"Found")
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{git_id(data)}"'}
            place = f"/api/resolve-cache/models/{REPOSITORY}/{COMMIT}/{name}?etag=%22{git_id(data)}%22"
            return self._answer(307, {**headers, "Location": place}, b"Temporary Redirect")

        def _file(self, name: str) -> None:
            data = hub.change_body.get(name, hub.files[name])
            etag = sha256(data) if name.endswith(LARGE) else git_id(data)
            headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "X-Repo-Commit": hub.commit_header}
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
            if wanted and hub.ranges:
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return self._answer(206, headers, data[start:], hub.cut.pop(name, None))
            if hub.endless and name.endswith(LARGE):
                return self._pour(headers)
            return self._answer(200, headers, data, hub.cut.pop(name, None))

        def _error(self, status: int, code: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": "the hub's own words"}
            self._answer(status, headers, b'{"error":"the hub\'s own words"}')

        def _answer(
            self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.slow and "/cdn/" in self.path:
                for at in range(len(body)):
                    self.wfile.write(body[at : at + 1])
                    self.wfile.flush()
                    time.sleep(hub.slow)
                return
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.close_connection = True

        def _pour(self, headers: Mapping[str, str]) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            while True:
                self.wfile.write(bytes(65536))

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    hub = Hub(server.server_address[1], dict(files))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
