"""A small hub of one repository: the endpoints that huggingface_hub's create_repo and upload_folder ask, over HTTP.

Large files go by LFS, as on the hub: first to a store by their sha256, then by name into the commit.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.http_server import answering

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

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            digest = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == digest
            self.store[digest] = body
            return 403 if self.is_full else 200, {}
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if method == "GET":
            return self.tree() if "/tree/" in path else self.info()
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        ways = {
            "/api/repos/create": self.create,
            "/api/validate-yaml": self.validate,
            f"/api/models/{self.repo}/preupload/main": self.upload_modes,
            f"/{self.repo}.git/info/lfs/objects/batch": self.batch,
        }
        return ways[path](json.loads(body))


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    with answering(hub.answer) as port:
        hub.url = f"http://127.0.0.1:{port}"
        yield hub
