"""A small Hub over HTTP, in memory, as strict as the real one where the clients could tell. Faults come on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import metadata_errors

LFS_PATTERNS = (".safetensors", ".bin", ".pt", ".npz", ".png", ".gz")
LARGEST_REGULAR_FILE = 10 * 2**20


@dataclass(frozen=True)
class File:
    """What a path holds at a commit."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The git blob's name: of the content, or of the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Repository:
    """Its commits, oldest first, and the large files that were uploaded to it, committed or not."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, File]:
        """The files of the newest commit."""
        return self.commits[self.head]

    def commit(self, files: dict[str, File]) -> str:
        text = json.dumps([len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        self.status, self.message, self.code, self.more = status, message, code, more


class Hub:
    """The state of the server, and what a test does to it.

    Attributes:
        endpoint: Its address.
        users: Token -> user.
        repositories: Id -> repository.
        requests: (method, path) of every request.
        cut_after: Where set, an upload's connection is cut after so many bytes, as often as `cuts` says.
    """

    def __init__(self):
        self.users: dict[str, str] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: dict[str, int] = {}
        self.cuts = 0
        self.endpoint = ""

    def add_user(self, name: str) -> str:
        """A new user's token."""
        token = f"hf_{hashlib.sha256(name.encode()).hexdigest()[:34]}"
        self.users[token] = name
        return token

    def add_repository(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository as no client could have made it: any file name, any content."""
        repository = Repository(repo_id.split("/")[0], private)
        repository.commit({path: File(content, path.endswith(LFS_PATTERNS)) for path, content in files.items()})
        self.repositories[repo_id] = repository
        return repository

    def cut(self, where: str, after: int = 100, times: int = 10**6) -> None:
        """Cut the connection in the middle of "upload" (a large file) or "commit"."""
        self.cut_after, self.cuts = {where: after}, times

    def mend(self) -> None:
        """Cut no more."""
        self.cut_after = {}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Start a Hub, and stop it after the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    routes = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)", "upload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", "verify"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append((self.command, address.path))
        try:
            for methods, pattern, name in self.routes:
                found = re.fullmatch(pattern, address.path)
                if found and self.command in methods.split("|"):
                    # All of a body is read, since the connection is used again; and unlocked, since it may be slow.
                    self.body = self._read(name)
                    self.user = self._log_in()
                    with self.lock:
                        answer = getattr(self, name)(**{k: v and unquote(v) for k, v in found.groupdict().items()})
                    return self._answer(200, answer) if answer is not None else None
            raise Refusal(404, "Not found")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self._answer(refusal.status, {"error": refusal.message, **refusal.more}, headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _read(self, what: str) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding"):
            raise Refusal(501, "A header you provided implies functionality that is not implemented.")
        if what in self.hub.cut_after and self.hub.cuts > 0:
            self.hub.cuts -= 1
            self.rfile.read(min(self.hub.cut_after[what], length // 2))
            self.connection.close()
            raise ConnectionResetError
        return self.rfile.read(length)

    def _answer(self, status: int, body: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may do what.

    def _log_in(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _readable(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self.user != repository.owner):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo: str) -> Repository:
        repository = self._readable(repo)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != repository.owner:
            raise Refusal(403, f"Forbidden: you don't have the right to write to {repo}.")
        return repository

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self._readable(repo)
        sha = repository.head if revision in (None, "main") else revision
        if sha not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # What it answers.

    def who_am_i(self) -> dict:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": {}}

    def create(self) -> dict:
        asked = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add_repository(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return {"url": url, "name": repo_id, "id": repo_id}

    def validate_yaml(self) -> dict:
        errors, warnings = metadata_errors(json.loads(self.body)["content"])
        messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            raise Refusal(400, "Invalid metadata", **messages)
        return messages

    def preupload(self, repo: str, revision: str) -> dict:
        self._writable(repo)
        files, answers = self._at(repo, revision)[1], []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_PATTERNS) or file["size"] > LARGEST_REGULAR_FILE
            large = large or b"\0" in base64.b64decode(file["sample"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if file["path"] in files:
                answers[-1]["oid"] = files[file["path"]].oid
        return {"files": answers}

    def batch(self, repo: str) -> dict:
        uploaded, objects = self._writable(repo).uploaded, []
        for wanted in json.loads(self.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in uploaded:
                upload = f"{self.hub.endpoint}/storage/{repo}/{wanted['oid']}/{wanted['size']}"
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, repo: str, oid: str, size: str) -> dict:
        if len(self.body) != int(size) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content differs from the checksum that was announced.")
        self.hub.repositories[repo].uploaded[oid] = self.body
        return {}

    def verify(self, repo: str) -> dict:
        asked = json.loads(self.body)
        stored = self._writable(repo).uploaded.get(asked["oid"])
        if stored is None or len(stored) != asked["size"]:
            raise Refusal(404, "Object does not exist")
        return {}

    def commit(self, repo: str, revision: str) -> dict:
        """All operations or none."""
        repository = self._writable(repo)
        sha, files = self._at(repo, revision)
        if sha != repository.head:
            raise Refusal(400, "Commits go to a branch.")
        files, lines = dict(files), [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refusal(400, "The commit has no summary.")
        if lines[0]["value"].get("parentCommit") not in (None, sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            self._apply(repository, files, line["key"], line["value"])
        new = repository.commit(files)
        return {"success": True, "commitOid": new, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{new}"}

    def _apply(self, repository: Repository, files: dict[str, File], key: str, value: dict) -> None:
        path = value["path"]
        if path != posixpath.normpath(path).lstrip("/") and key != "deletedFolder" or path.startswith(("../", ".git/")):
            raise Refusal(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > LARGEST_REGULAR_FILE:
                raise Refusal(400, f"{path} is too large for a regular file.")
            if path == "README.md" and (errors := metadata_errors(content.decode())[0]):
                raise Refusal(400, f"Invalid metadata in README.md: {errors}")
            files[path] = File(content)
        elif key == "lfsFile":
            if value["oid"] not in repository.uploaded:
                raise Refusal(400, f"The LFS pointer of {path} points to a file that does not exist.")
            files[path] = File(repository.uploaded[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    def info(self, repo: str, revision: str | None) -> dict:
        sha, files = self._at(repo, revision)
        return {
            "_id": repo,
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": sha,
            "tags": [],
            "likes": 0,
            "private": self.hub.repositories[repo].private,
            "downloads": 0,
            "gated": False,
            "disabled": False,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def tree(self, repo: str, revision: str, path: str | None) -> list[dict]:
        files, prefix = self._at(repo, revision)[1], f"{path}/" if path else ""
        recursive, entries = self.query.get("recursive", ["false"])[0].lower() == "true", {}
        for name, file in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, "oid": file.oid, "size": len(file.content)}
                if file.lfs:
                    entries[name]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        if path and not entries:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self._at(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        self._answer(200, file.content, headers)
