"""A stand-in for the Hugging Face Hub on a loopback port: enough of it for the real client to upload and download.

A repository is a list of commits, each a dict of files. It wants the token of an upload, and stores tensors and
programs as the real server does: by Git LFS.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".pt2", ".png")


@dataclass
class Repository:
    """One repository: its files by commit, the newest commit last."""

    visibility: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def add(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision: str) -> str | None:
        return list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None


class HubServer(ThreadingHTTPServer):
    """Repositories by name, and the method, path and headers of all requests. Serves until it is closed."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.status: int | None = None  # the answer to every request, if it is to fail
        self.failing: tuple[str, int] | None = None  # part of a path, and the answer to requests of it that are no HEAD
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of Git LFS, by sha256
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if self.server.status is not None:
            return self._answer(self.server.status, {"error": "no"})
        if self.server.failing is not None and self.server.failing[0] in path and self.command != "HEAD":
            return self._answer(self.server.failing[1], {"error": "no"})
        if self.command in ("POST", "PUT") and "/objects/store/" not in path and not self._is_known():
            return self._answer(401, {"error": "Invalid credentials"})
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        return self._answer(404, {"error": "no such page"})

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(wanted.get("visibility"), {})).commits or (
            self.server.repositories[name].add({".gitattributes": b""})
        )
        self._answer(409 if exists else 200, {"url": f"{self.server.url}/{name}", "error": "it exists"})

    def _validate(self, body: bytes) -> None:
        self._answer(200, {"warnings": [], "errors": []})

    def _preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/objects/store/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, sha256: str) -> None:
        assert hashlib.sha256(body).hexdigest() == sha256
        self.server.objects[sha256] = body
        self._answer(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        repository = self.server.repositories[name]
        files = dict(list(repository.commits.values())[-1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.add(files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def _info(self, body: bytes, name: str, revision: str | None) -> None:
        if (found := self._found(name, revision)) is not None:
            sha, files = found
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            self._answer(200, [_listed(path, content) for path, content in found[1].items()])

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self._found(name, revision)) is None:
            return None
        sha, files = found
        if path not in files:
            return self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        listed = _listed(path, files[path])
        etag = listed.get("lfs", {}).get("oid", listed["oid"])
        self._answer(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=sha)
        return None

    def _found(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
            return None
        sha = repository.resolve(revision or "main")
        if sha is None:
            self._answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return None
        return sha, repository.commits[sha]


def _listed(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


_NAME = r"([^/]+/[^/]+?)"
_ROUTES: dict[str, Callable[..., None]] = {
    "/api/repos/create": _Handler._create,
    "/api/validate-yaml": _Handler._validate,
    f"/api/models/{_NAME}/preupload/main": _Handler._preupload,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    "/objects/store/(.+)": _Handler._store,
    f"/api/models/{_NAME}/commit/main": _Handler._commit,
    f"/api/models/{_NAME}(?:/revision/(.+))?": _Handler._info,
    f"/api/models/{_NAME}/tree/([^/]+)": _Handler._tree,
    f"/{_NAME}/resolve/([^/]+)/(.+)": _Handler._resolve,
}
