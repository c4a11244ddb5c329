"""A small hub of one repository: the endpoints that huggingface_hub's create_repo and upload_folder ask, over HTTP.

Large files go by LFS, as on the hub: first to a store by their sha256, then by name into the commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import yaml

TOKEN = "hf_aSecretThatNobodyMayRead"
LFS_BYTES = 1000  # files from this size on
LICENSES = ("mit", "apache-2.0")


@dataclass
class Hub:
    """What the hub holds, and how it answers."""

    url: str = ""
    repo: str = ""
    private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    denies: int = 0
    """Status with which every commit is refused; 0: none."""
    is_full: bool = False
    """Whether the store takes no file."""

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if self.repo == name:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repo, self.private = name, asked.get("private") or asked.get("visibility") == "private"
        return 200, {"url": f"{self.url}/{name}"}

    def upload_modes(self, asked: dict[str, Any]) -> tuple[int, Any]:
        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["size"] >= LFS_BYTES else "regular"

        return 200, {
            "files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in asked["files"]]
        }

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        def upload(file: dict[str, Any]) -> dict[str, Any]:
            return file | {"actions": {"upload": {"href": f"{self.url}/store/{file['oid']}"}}}

        return 200, {"transfer": "basic", "objects": [upload(file) for file in asked["objects"]]}

    def validate(self, asked: dict[str, Any]) -> tuple[int, Any]:
        metadata = yaml.safe_load(asked["content"].split("---")[1])
        if metadata["license"] in LICENSES:
            return 200, {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": '"license" must be one of mit, apache-2.0'}], "warnings": []}

    def commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        if self.denies:
            return self.denies, {"error": "no"}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.commits.append(value["summary"])
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    self.files[value["path"]] = self.store[value["oid"]]
                case "deletedFile":
                    del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{self.repo}/commit/1", "commitOid": "1" * 40}

    def info(self) -> tuple[int, Any]:
        return 200, {"id": self.repo, "private": self.private, "sha": "1" * 40, "tags": [], "siblings": []}

    def tree(self) -> tuple[int, Any]:
        return 200, [{"type": "file", "path": name, "size": len(f), "oid": "1"} for name, f in self.files.items()]


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def do_GET(self) -> None:
        self.answer(self.hub.tree if "/tree/" in self.path else self.hub.info)

    def do_POST(self) -> None:
        body = self.body()
        if "/commit/" in self.path:
            self.answer(self.hub.commit, [json.loads(line) for line in body.splitlines()])
            return
        ways = {
            "/api/repos/create": self.hub.create,
            "/api/validate-yaml": self.hub.validate,
            f"/api/models/{self.hub.repo}/preupload/main": self.hub.upload_modes,
            f"/{self.hub.repo}.git/info/lfs/objects/batch": self.hub.batch,
        }
        self.answer(ways[self.path], json.loads(body))

    def do_PUT(self) -> None:
        content, digest = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.store[digest] = content
        self.send(403 if self.hub.is_full else 200, {})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, way, *asked: Any) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        else:
            self.send(*way(*asked))

    def send(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
