"""A small server on the loopback that speaks as much of the Hub's API as a download needs, and notes what it sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Repository:
    """One repository: what each commit holds, the branch and the tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> dict[str, bytes]:
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        return self.commits.get(commit, {})

    def commit(self, changes: dict[str, bytes]) -> str:
        number = f"{len(self.commits) + 1:040x}"
        self.commits[number] = self.at("main") | changes
        self.head = number
        return number


@dataclass
class WritableHub:
    """A Hub that can be pushed to with one token; `cut` breaks each answer with a file after so many bytes."""

    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    cut: int | None = None


@contextmanager
def serve_writable(hub: WritableHub) -> Iterator[str]:
    """Serve as much of the Hub's API as pushing, tagging and pulling need; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, content: bytes | dict[str, Any] | list[Any], status: int = 200, code: str = "") -> None:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, method = self.path.partition("?")[0], self.command
            if match := re.fullmatch(r"/store/(\w+)", path):
                hub.objects[match[1]] = body
                return self._send(b"")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send({"error": "Invalid credentials in Authorization header"}, 401)
            for pattern, answer in ROUTES.items():
                if match := re.fullmatch(pattern, f"{method} {path}"):
                    return answer(self, body, *match.groups())
            return self._send({"error": f"no {method} {path}"}, 404)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

        def create(self, body: bytes) -> None:
            data = json.loads(body)
            assert data.get("private") or data.get("visibility") == "private"
            name = f"{data['organization']}/{data['name']}" if data.get("organization") else data["name"]
            if name in hub.repositories:
                return self._send({"error": "exists", "url": f"{address}/{name}"}, 409)
            hub.repositories[name] = Repository()
            return self._send({"url": f"{address}/{name}"})

        def models(self, _: bytes) -> None:
            self._send([{"id": name, "modelId": name} for name in hub.repositories])

        def card(self, body: bytes) -> None:
            hub.cards.append(json.loads(body)["content"])
            self._send({"errors": [], "warnings": []})

        def preupload(self, body: bytes, name: str) -> None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._send({"files": modes})

        def batch(self, body: bytes, name: str) -> None:
            wanted = json.loads(body)["objects"]
            objects = [
                {**item}
                if item["oid"] in hub.objects
                else {**item, "actions": {"upload": {"href": f"{address}/store/{item['oid']}"}}}
                for item in wanted
            ]
            self._send({"transfer": "basic", "objects": objects})

        def commit(self, body: bytes, name: str) -> None:
            changes: dict[str, bytes] = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changes[value["path"]] = hub.objects[value["oid"]]
            oid = hub.repositories[name].commit(changes)
            self._send({"success": True, "commitOid": oid, "commitUrl": f"{address}/{name}/commit/{oid}"})

        def tag(self, body: bytes, name: str, revision: str) -> None:
            wanted = json.loads(body)["tag"]
            if wanted in hub.repositories[name].tags:
                return self._send({"error": "tag exists"}, 409)
            hub.repositories[name].tags[wanted] = revision
            return self._send({})

        def untag(self, _: bytes, name: str, tag: str) -> None:
            del hub.repositories[name].tags[tag]
            self._send({})

        def refs(self, _: bytes, name: str) -> None:
            if name not in hub.repositories:
                return self._send({"error": "Repository not found"}, 404, "RepoNotFound")
            tags = hub.repositories[name].tags.items()
            found = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": commit} for t, commit in tags]
            return self._send({"branches": [], "converts": [], "tags": found})

        def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
            content = hub.repositories[name].at(revision).get(file)
            if content is None:
                return self._send({"error": "Entry not found"}, 404, "EntryNotFound")
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if file.endswith(".safetensors"):
                hub.starts.append(start)
                if hub.cut is not None:
                    self.wfile.write(content[start : start + hub.cut])
                    self.close_connection = True
                    return None
            self.wfile.write(content[start:])
            return None

    ROUTES: dict[str, Any] = {
        r"POST /api/repos/create": Handler.create,
        r"GET /api/models": Handler.models,
        r"POST /api/validate-yaml": Handler.card,
        r"POST /api/models/([^/]+/[^/]+)/preupload/main": Handler.preupload,
        r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
        r"POST /api/models/([^/]+/[^/]+)/commit/main": Handler.commit,
        r"POST /api/models/([^/]+/[^/]+)/tag/(\w+)": Handler.tag,
        r"DELETE /api/models/([^/]+/[^/]+)/tag/([^/]+)": Handler.untag,
        r"GET /api/models/([^/]+/[^/]+)/refs": Handler.refs,
        r"GET /([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)": Handler.resolve,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
