"""A small Hugging Face hub on the loopback interface: one dataset, its listing, its files by range, faults on order;
and one model, with small files.

It answers what the client asks: `/api/datasets/REPO/revision/REV`, `/api/datasets/REPO/tree/COMMIT` (in pages),
`/datasets/REPO/resolve/COMMIT/PATH` (a redirect, as the hub sends) and `/cdn/DIGEST`; of the model
`/api/models/MODEL/revision/REV`, `/api/models/MODEL/tree/COMMIT` and `/MODEL/resolve/COMMIT/PATH`.
"""

import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY, MODEL = "owner/rows", "owner/model"
PAGE = 3  # entries of a listing's page


@dataclass(frozen=True)
class Fault:
    """What happens to one request: an HTTP `status`, or a body that ends early, stalls, or has a flipped bit."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    short_by: int = 0
    """Bytes by which the body, and its Content-Length, are too short."""
    flip: int | None = None
    """Byte of the body of which a bit is flipped."""
    stall: float = 0.0
    """Seconds before which nothing is sent."""
    hang: float = 0.0
    """Seconds for which a connection is kept open after `drop_after` bytes."""
    ignore_range: bool = False


class HubServer:
    """`files` is what `main` holds; `faults` are used up in order by requests of that path ("listing": the tree)."""

    def __init__(self, files: dict[str, bytes], lfs: bool = True) -> None:
        self.lfs, self.token = lfs, ""
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[dict[str, Any]] = []
        self.commits: dict[str, dict[str, bytes]] = {}
        self.raw_entries: list[dict[str, Any]] = []  # added to every listing as they are
        self.model: dict[str, bytes] = {}
        self.update(files)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.cdn = self.endpoint

    def update(self, files: dict[str, bytes]) -> str:
        """A new commit of `main`."""
        self.head = hashlib.sha1(repr(sorted((k, digest(v)) for k, v in files.items())).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def downloads(self, path: str) -> list[dict[str, Any]]:
        """The requests for the content of a file."""
        return [each for each in self.requests if each["kind"] == "content" and each["file"] == path]

    def entries(self, commit: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = [{"type": "directory", "path": "train", "oid": "0" * 40, "size": 0}]
        for path, content in self.commits[commit].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
            if self.lfs:
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
            listed.append(entry)
        return listed + self.raw_entries

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                try:
                    self.answer()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def answer(self) -> None:
                url = urlsplit(self.path)
                parts = unquote(url.path).strip("/").split("/")
                owner = [*REPOSITORY.split("/")]
                request: dict[str, Any] = {"url": self.path, "authorization": self.headers.get("Authorization")}
                request |= {"range": self.headers.get("Range"), "kind": "other", "file": "", "host": "hub"}
                hub.requests.append(request)
                if parts[0] == "cdn":
                    path = next(p for f in hub.commits.values() for p, c in f.items() if digest(c) == parts[1])
                    request |= {"kind": "content", "file": path, "host": "cdn"}
                    content = next(f[path] for f in hub.commits.values() if digest(f.get(path, b"")) == parts[1])
                    return self.content(path, content)
                if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.send(401, b"", {"X-Error-Message": "Invalid credentials"})
                if parts[:4] == ["api", "datasets", *owner] and parts[4] == "revision":
                    request["kind"] = "revision"
                    if (fault := self.fault("revision")).status != 200:
                        return self.send(fault.status, b"", fault.headers)
                    commit = hub.commits and (parts[5] if parts[5] in hub.commits else hub.head)
                    return self.send_json({"id": REPOSITORY, "sha": commit})
                if parts[:4] == ["api", "datasets", *owner] and parts[4] == "tree":
                    request["kind"] = "tree"
                    if (fault := self.fault("listing")).status != 200:
                        return self.send(fault.status, b"", fault.headers)
                    entries, page = hub.entries(parts[5]), int(dict(cursor(url.query)).get("cursor", "0"))
                    more = {}
                    if page + PAGE < len(entries):
                        following = f"{hub.endpoint}{url.path}?recursive=true&cursor={page + PAGE}"
                        more = {"Link": f'<{following}>; rel="next"'}
                    return self.send_json(entries[page : page + PAGE], more)
                if parts[:3] == ["datasets", *owner] and parts[3] == "resolve":
                    path = "/".join(parts[5:])
                    request |= {"kind": "resolve", "file": path}
                    content = hub.commits[parts[4]].get(path)
                    if content is None:
                        return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                    return self.send(
                        302, b"", {"Location": f"{hub.cdn}/cdn/{digest(content)}?Signature=secret-signature"}
                    )
                if parts[0] == MODEL.split("/")[0] or parts[:2] == ["api", "models"]:
                    return self.model("/".join(parts))
                return self.send(404, b"")

            def model(self, path: str) -> None:
                commit = git_digest(repr(sorted(hub.model.items())).encode())
                if path == f"api/models/{MODEL}/revision/main" and hub.model:
                    return self.send_json({"id": MODEL, "sha": commit})
                if path == f"api/models/{MODEL}/tree/{commit}":
                    items = hub.model.items()
                    files = [{"type": "file", "path": k, "size": len(v), "oid": git_digest(v)} for k, v in items]
                    return self.send_json(files)
                content = hub.model.get(path.removeprefix(f"{MODEL}/resolve/{commit}/"))
                if content is None:
                    return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return self.send(200, content, {"ETag": f'"{git_digest(content)}"', "X-Repo-Commit": commit})

            def fault(self, name: str) -> Fault:
                return hub.faults[name].pop(0) if hub.faults[name] else Fault()

            def content(self, path: str, content: bytes) -> None:
                fault = self.fault(path)
                time.sleep(fault.stall)
                if fault.status != 200:
                    return self.send(fault.status, b"", fault.headers)
                begin, status, headers = 0, 200, {}
                if (wanted := self.headers.get("Range")) and not fault.ignore_range:
                    begin = int(wanted.removeprefix("bytes=").split("-")[0])
                    if begin >= len(content):
                        return self.send(416, b"")
                    status, headers = 206, {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
                body = bytearray(content[begin:])
                if fault.flip is not None:
                    body[fault.flip % len(body)] ^= 4
                del body[len(body) - fault.short_by :]
                length = len(body)
                if fault.drop_after is not None:
                    body = body[: fault.drop_after]
                self.send(status, bytes(body), headers, length)
                return time.sleep(fault.hang)

            def send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
                self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

            def send(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                if length is not None and length != len(body):
                    self.close_connection = True

        return Handler


@contextmanager
def serving(files: dict[str, bytes], **options: Any) -> Iterator[HubServer]:
    """A hub that runs within the context."""
    hub = HubServer(files, **options)
    thread = threading.Thread(target=lambda: hub.http.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def cursor(query: str) -> Iterator[list[str]]:
    return (pair.split("=", 1) for pair in query.split("&") if "=" in pair)
