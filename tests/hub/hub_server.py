"""A hub on loopback: real HTTP, the hub's own paths and headers, and every way to misbehave a test asks for.

The client is told of it by HF_ENDPOINT and nothing else.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 1024  # files at least this long, and all safetensors, are LFS files here


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, oldest first, each a name -> bytes."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        said = json.dumps([len(self.commits), sorted((n, git_oid(d)) for n, d in files.items())])
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.commits[-1][1]
        return dict(self.commits).get(revision)


class Answer(Exception):
    """Ends a request with a status, headers and a body."""

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


Fault = Callable[["Handler"], None]


class FakeCdn(ThreadingHTTPServer):
    """Another origin, where large files really lie; a token must never reach it."""

    daemon_threads = True


class HubServer(ThreadingHTTPServer):
    """Repositories, and `faults`: what to do to a path before it is answered, in order, once each."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *, token: str | None = None, page_size: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.token = token
        self.page_size = page_size
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, str] = {}  # headers of every answer of the API
        self.resolving: dict[str, str] = {}  # headers of every answer where files are
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.seen_tokens: set[str] = set()
        self.cdn_tokens: set[str] = set()
        self.bytes_sent: Counter[str] = Counter()
        self.list_models: Callable[[dict[str, list[str]]], list[dict[str, Any]]] = self._list_models
        self.cdn = FakeCdn(("127.0.0.1", 0), CdnHandler)
        self.cdn.hub = self  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes] | Path, *, tags: tuple[str, ...] = ()) -> str:
        """Commit files, or a folder's, to a repository; returns the commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        repo = self.repos.setdefault(name, Repo())
        repo.tags = tags or repo.tags
        return repo.commit(files)

    def fault(self, path: str, *faults: Fault) -> None:
        """Faults for the next requests whose path contains `path`."""
        self.faults.setdefault(path, []).extend(faults)

    def count(self, part: str) -> int:
        return sum(part in path for path in self.requests)

    def _list_models(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        found = []
        for name, repo in self.repos.items():
            author = query.get("author", [None])[0]
            if author and not name.startswith(f"{author}/"):
                continue
            if not set(query.get("filter", [])) <= set(repo.tags):
                continue
            if (search := query.get("search", [""])[0]) and search not in name:
                continue
            found.append(
                {"_id": name, "id": name, "sha": repo.commits[-1][0], "gated": repo.gated}
                | {"tags": list(repo.tags)}
            )
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.body: Callable[[bytes], bytes] | None = None
        self.extra: dict[str, str] = {}
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.serves_ranges = True
        try:
            self.server.requests.append(self.path)
            if given := self.headers.get("Authorization"):
                self.server.seen_tokens.add(given)
            if self.headers.get("Range"):
                self.server.ranges.append(self.headers["Range"])
            for part, faults in self.server.faults.items():
                if part in self.path and faults:
                    faults.pop(0)(self)
            self._check_token()
            parts = urlsplit(self.path)
            if parts.path == "/api/models":
                self._list(parse_qs(parts.query))
            elif parts.path.startswith("/api/models/"):
                self._model(parts.path.removeprefix("/api/models/"), parse_qs(parts.query))
            elif "/resolve/" in parts.path:
                self._resolve(parts.path)
            raise Answer(404)
        except Answer as answer:
            self._send(answer)

    def _check_token(self) -> None:
        given = self.headers.get("Authorization")
        if given is not None and self.server.token and given != f"Bearer {self.server.token}":
            raise Answer(401, b'{"error": "Invalid credentials in Authorization header"}')

    def _list(self, query: dict[str, list[str]]) -> None:
        found = self.server.list_models(query)
        size = min(int(query.get("limit", ["1000"])[0]), self.server.page_size or 1000)
        start = 0
        if "cursor" in query:
            start = int(base64.b64decode(query["cursor"][0]))
        headers = {}
        if start + size < len(found):
            query["cursor"] = [base64.b64encode(str(start + size).encode()).decode()]
            flat = "&".join(f"{k}={v.replace('=', '%3D')}" for k, values in query.items() for v in values)
            headers["Link"] = f'<{self.server.url}/api/models?{flat}>; rel="next"'
        self._json(found[start : start + size], headers)

    def _model(self, path: str, query: dict[str, list[str]]) -> None:
        name, _, rest = path.partition("/revision/")
        is_tree = "/tree/" in path
        if is_tree:
            name, _, rest = path.partition("/tree/")
        repo = self.server.repos.get(name)
        if repo is None:
            raise Answer(404, X_Error_Code="RepoNotFound")
        self._check_gate(repo)
        files = repo.files(unquote(rest) or "main")
        if files is None:
            raise Answer(404, X_Error_Code="RevisionNotFound")
        sha = next(sha for sha, those in reversed(repo.commits) if those is files)
        if not is_tree:
            self._json({"id": name, "sha": sha, "siblings": [{"rfilename": n} for n in files]}, {})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "onnx", "oid": "0" * 40, "size": 0}]
        for file, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": git_oid(data)}
            if file.endswith(".safetensors") or len(data) >= LFS_BYTES:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
                entry["oid"] = git_oid(f"version https://git-lfs.github.com/spec/v1\n{sha256}".encode())
            entries.append(entry)
        start = int(query.get("cursor", ["0"])[0])
        size = 50
        link = {}
        if start + size < len(entries):
            link["Link"] = f'<{self.server.url}/api/models/{path}?cursor={start + size}>; rel="next"'
        self._json(entries[start : start + size], link)

    def _check_gate(self, repo: Repo) -> None:
        if repo.gated:
            raise Answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")

    def _resolve(self, path: str) -> None:
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.server.repos.get(name)
        if repo is None:
            raise Answer(404, X_Error_Code="RepoNotFound")
        self._check_gate(repo)
        files = repo.files(unquote(revision))
        if files is None:
            raise Answer(404, X_Error_Code="RevisionNotFound")
        data = files.get(unquote(file))
        if data is None:
            raise Answer(404, X_Error_Code="EntryNotFound")
        self.extra |= self.server.resolving
        self.extra["X-Repo-Commit"] = revision
        self.extra["ETag"] = f'"{git_oid(data)}"'
        if file.endswith(".safetensors"):
            self.extra["X-Linked-Size"] = str(len(data))
            self.extra["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            if self.body is None and self.cut_at is self.stall_at is None:
                port = self.server.cdn.server_address[1]
                raise Answer(302, Location=f"http://localhost:{port}{path}?signature=x")
        self.send_range(self.body(data) if self.body is not None else data, path)

    def send_range(self, data: bytes, path: str) -> None:
        start, last = 0, len(data) - 1
        status = 200
        if (asked := self.headers.get("Range")) is not None and self.serves_ranges:
            first, _, end = asked.removeprefix("bytes=").partition("-")
            start, last, status = int(first), min(last, int(end or last)), 206
            self.extra["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        body = data[start : last + 1]
        self.send_response(status)
        for key, value in self.extra.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop = len(body) if self.cut_at is None else self.cut_at
        if self.stall_at is not None:
            self.wfile.write(body[: self.stall_at])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body[:stop])
        hub = getattr(self.server, "hub", self.server)
        hub.bytes_sent[path.split("?")[0]] += min(stop, len(body))
        if stop < len(body):
            self.close_connection = True
        raise Sent(0)

    def _json(self, value: Any, headers: dict[str, str]) -> None:
        headers = {**self.server.always, **headers}
        raise Answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _send(self, answer: Answer) -> None:
        if isinstance(answer, Sent):
            return
        self.send_response(answer.status)
        for key, value in {**self.extra, **answer.headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)


class Sent(Answer):
    """The body is out already."""


class CdnHandler(Handler):
    def do_GET(self) -> None:
        self.body, self.extra, self.cut_at, self.stall_at = None, {}, None, None
        self.serves_ranges = True
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append(f"cdn{self.path}")
        if given := self.headers.get("Authorization"):
            hub.cdn_tokens.add(given)
        if self.headers.get("Range"):
            hub.ranges.append(self.headers["Range"])
        name, _, rest = urlsplit(self.path).path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        files = hub.repos[name].files(revision)
        assert files is not None
        try:
            self.send_range(files[file], self.path)
        except Answer as answer:
            self._send(answer)


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Answer with a status and headers."""

    def fault(handler: Handler) -> None:
        raise Answer(status, body, **headers)

    return fault


def cut(at: int) -> Fault:
    """Break the connection off after so many bytes."""

    def fault(handler: Handler) -> None:
        handler.cut_at = at

    return fault


def stall(at: int) -> Fault:
    """Send so many bytes, then nothing for a minute."""

    def fault(handler: Handler) -> None:
        handler.stall_at = at

    return fault


def swap(body: bytes) -> Fault:
    """Send other bytes."""

    def fault(handler: Handler) -> None:
        handler.body = lambda _: body

    return fault


def garble(handler: Handler) -> None:
    """Send as many bytes, and others."""
    handler.body = lambda data: bytes(byte ^ 1 for byte in data)


def hang_up(handler: Handler) -> None:
    """Close without a word."""
    handler.close_connection = True
    handler.connection.close()
    raise Sent(0)


def fine(handler: Handler) -> None:
    """Answer as usual."""


@contextmanager
def serving(server: HubServer) -> Iterator[HubServer]:
    """Run a hub and its CDN in threads."""
    for one in (server, server.cdn):
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        for one in (server, server.cdn):
            one.shutdown()
            one.server_close()
