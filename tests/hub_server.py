"""A Hugging Face hub on this machine, as far as the library huggingface_hub asks it for files.

It answers as the real one is documented to: every file has an ETag and a commit; weights are on
another address, to which it sends on; errors have a code in X-Error-Code.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = "the list of files"
LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    root: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)  # status, code of repositories
    breaks: list[int] = field(default_factory=list)  # bytes of the next answers that break off
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, file, range

    def add(self, name: str, folder: Path) -> None:
        """A repository of the files in a folder."""
        self.repositories[name] = {file.name: file.read_bytes() for file in folder.iterdir()}

    def downloaded(self) -> list[str]:
        """The files whose content it gave."""
        return [file for method, file, _ in self.requests if method == "GET" and file != LISTING]


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        hub = self.server.hub
        if self.path.startswith("/api/models/"):
            self.list_files(*self.path.removeprefix("/api/models/").split("/"))
            return
        if self.path.count("/") < 5:  # what the library may ask besides
            self.refuse(404, "")
            return
        owner, name, action, revision, file = self.path.strip("/").split("/", 4)
        repository = f"{owner}/{name}"
        hub.requests.append((self.command, file, self.headers["Range"]))
        if action == "large":  # the other address; `revision` is the digest
            self.give(hub.repositories[repository][file])
        elif repository in hub.errors:
            self.refuse(*hub.errors[repository])
        elif repository not in hub.repositories:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif file not in hub.repositories[repository]:
            self.refuse(404, "EntryNotFound")
        else:
            content = hub.repositories[repository][file]
            digest = hashlib.sha256(content).hexdigest()
            if not file.endswith(LARGE):
                self.give(content, {"ETag": f'"{digest[:40]}"', "X-Repo-Commit": COMMIT})
                return
            self.send_response(302)
            address = f"http://localhost:{self.server.server_port}"
            self.send_header("Location", f"{address}/{repository}/large/{digest}/{file}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_GET = do_HEAD

    def list_files(self, owner: str, name: str, *revision: str) -> None:
        """As the real hub, also of a repository whose files are gated."""
        hub, repository = self.server.hub, f"{owner}/{name}"
        hub.requests.append(("GET", LISTING, None))
        status, code = hub.errors.get(repository, (200, ""))
        if status != 200 and code != "GatedRepo":
            self.refuse(status, code)
        elif repository not in hub.repositories:
            self.refuse(401, "RepoNotFound")
        elif revision and revision[-1] not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            files = [{"rfilename": file} for file in hub.repositories[repository]]
            self.give(json.dumps({"id": repository, "sha": COMMIT, "siblings": files}).encode())

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"the server's words on {code}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def give(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            breaks = self.server.hub.breaks if "/large/" in self.path else []
            end = start + breaks.pop(0) if breaks else len(content)
            with suppress(ConnectionError):
                self.wfile.write(content[start:end])

    def log_message(self, *args) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
