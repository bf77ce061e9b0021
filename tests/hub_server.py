"""A small server on the loopback that speaks as much of the Hub's API as a download needs, and notes what it sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Log(dict[str, int]):
    """File -> bytes of it that were sent."""

    def add(self, name: str, count: int) -> None:
        self[name] = self.get(name, 0) + count


@contextmanager
def serve(repositories: dict[str, Path], without_ranges: frozenset[str] = frozenset()) -> Iterator[tuple[str, Log]]:
    """Serve folders as repositories; yield the address and a log of what was sent."""
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
                self._json({"id": match[1], "sha": COMMIT, "siblings": self._siblings(match[1])}, match[1])
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
                self._json([{"type": "file", **entry} for entry in self._siblings(match[1])], match[1])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^/]+)", path):
                self._file(match[1], match[2], body)
            else:
                self._json({"error": "not found"}, "", 404)

        def _siblings(self, repository: str) -> list[dict[str, Any]]:
            files = sorted(repositories[repository].iterdir()) if repository in repositories else []
            return [
                {"rfilename": file.name, "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]

        def _json(self, data: Any, repository: str, status: int = 200) -> None:
            if repository not in repositories:
                status = 404
            content = json.dumps(data).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _file(self, repository: str, name: str, body: bool) -> None:
            file = repositories.get(repository, Path("/nowhere")) / name
            if not file.is_file():
                self._json({"error": "no file"}, "")
                return
            content = file.read_bytes()
            start, stop = 0, len(content)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and repository not in without_ranges:
                start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                log.add(f"{repository}/{name}", stop - start)
                self.wfile.write(content[start:stop])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
