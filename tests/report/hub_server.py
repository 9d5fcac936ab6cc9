"""A small Hub on the loopback: as much of its HTTP protocol as pushing and loading a model takes.

Repositories live in memory. Commits are all or nothing, large files go by LFS and are kept by hash
even where the commit never comes, and anything that is not known is answered 404 and noted in
`unknown`. `faults` makes requests fail on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

from tests.report.card_rules import faults_of

LARGE = (".safetensors", ".bin", ".png", ".spm", ".model")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Files by path, and what was committed."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    private: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub` runs it in a thread."""

    daemon_threads = True

    def __init__(self, token: str = "hf_right", user: str = "me") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        # Pattern of "METHOD path", and the status that is answered; 0: the connection is dropped.
        self.faults: dict[str, int] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


def oid(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; its routes are below."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(request)
            for pattern, status in self.server.faults.items():
                if re.search(pattern, request):
                    return self.fail(status)
            content = self.body()
            writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
            wrong = self.headers.get("Authorization") not in (None, f"Bearer {self.server.token}")
            if wrong or (writes and "Authorization" not in self.headers):
                return self.answer(401, {"error": "Invalid username or password."})
            for pattern, route in ROUTES.items():
                if found := re.fullmatch(pattern, request):
                    return route(self, content, **found.groupdict())
            self.server.unknown.append(request)
            return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def fail(self, status: int) -> None:
        self.close_connection = True
        if status:
            self.body()
            # The client waits a second more than this before it tries again.
            self.answer(status, {"error": "on purpose"}, Retry_After="0")
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    # ---- routes ------------------------------------------------------------------------------

    def repo(self, name: str) -> Repo | None:
        if name not in self.server.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.server.repos.get(name)

    def create(self, content: bytes) -> None:
        wanted = json.loads(content)
        name = f"{wanted.get('organization') or self.server.user}/{wanted['name']}"
        told = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **told})
        self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
        return self.answer(200, told)

    def whoami(self, content: bytes) -> None:
        self.answer(200, {"type": "user", "name": self.server.user, "orgs": []})

    def validate(self, content: bytes) -> None:
        card = json.loads(content)["content"]
        try:
            data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
            errors = [{"message": f"{part} is not valid"} for part in faults_of(data)]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, content: bytes, repo: str, revision: str | None = None) -> None:
        if found := self.repo(repo):
            names = [{"rfilename": path} for path in found.files]
            told = {"id": repo, "sha": found.sha, "siblings": names, "private": found.private}
            self.answer(200, {**told, "tags": []})

    def preupload(self, content: bytes, repo: str) -> None:
        if found := self.repo(repo):
            files = []
            for one in json.loads(content)["files"]:
                path = one["path"]
                known = found.files.get(path)
                files.append(
                    {
                        "path": path,
                        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": None if known is None else oid(path, known),
                    }
                )
            self.answer(200, {"files": files})

    def batch(self, content: bytes, repo: str) -> None:
        objects = []
        for one in json.loads(content)["objects"]:
            link = {"href": f"{self.server.url}/lfs/{one['oid']}"}
            verify = {"href": f"{self.server.url}/verify/{one['oid']}"}
            missing = one["oid"] not in self.server.blobs
            objects.append(
                {**one, "actions": {"upload": link, "verify": verify}} if missing else one
            )
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, content: bytes, hash: str) -> None:
        if hashlib.sha256(content).hexdigest() != hash:
            return self.answer(400, {"error": "the content has another hash"})
        self.server.blobs[hash] = content
        return self.answer(200)

    def verify(self, content: bytes, hash: str) -> None:
        size = len(self.server.blobs.get(hash, b""))
        self.answer(200 if size == json.loads(content)["size"] else 422)

    def commit(self, content: bytes, repo: str) -> None:
        if not (found := self.repo(repo)):
            return None
        files, title = dict(found.files), ""
        for line in content.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in self.server.blobs:
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                return self.answer(422, {"error": f"cannot commit {kind}"})
        found.files = files
        found.commits.append(title)
        link = f"{self.server.url}/{repo}/commit/{found.sha}"
        return self.answer(200, {"success": True, "commitOid": found.sha, "commitUrl": link})

    def tree(self, content: bytes, repo: str, folder: str | None = None) -> None:
        if found := self.repo(repo):
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": oid(path, data)}
                for path, data in found.files.items()
                if not folder or path.startswith(f"{folder}/")
            ]
            if folder and not files:
                return self.answer(404, {"error": "no folder"}, X_Error_Code="EntryNotFound")
            return self.answer(200, files)
        return None

    def resolve(self, content: bytes, repo: str, path: str) -> None:
        if found := self.repo(repo):
            known = {"X_Repo_Commit": found.sha}
            if path not in found.files:
                known["X_Error_Code"] = "EntryNotFound"
                return self.answer(404, {"error": "Entry not found"}, **known)
            data = found.files[path]
            return self.answer(200, data, ETag=f'"{oid(path, data)}"', **known)
        return None


ROUTES = {
    r"POST /api/repos/create": Handler.create,
    r"GET /api/whoami-v2": Handler.whoami,
    r"POST /api/validate-yaml": Handler.validate,
    rf"GET /api/models/{REPO}(/revision/(?P<revision>[^/]+))?": Handler.info,
    rf"POST /api/models/{REPO}/preupload/main": Handler.preupload,
    rf"POST /api/models/{REPO}/commit/main": Handler.commit,
    rf"GET /api/models/{REPO}/tree/[^/]+(/(?P<folder>.+))?": Handler.tree,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /lfs/(?P<hash>\w+)": Handler.upload,
    r"POST /verify/(?P<hash>\w+)": Handler.verify,
    rf"(GET|HEAD) /{REPO}/resolve/[^/]+/(?P<path>.+)": Handler.resolve,
}
