"""A Hub on this machine that the real `huggingface_hub` talks to over HTTP: repositories of files with a history of
commits, LFS objects, private repositories and a token.

It speaks what a client without xet needs: create a repository, look at it, its tree, preupload, LFS batch and upload,
commit, and resolve with ranges, etags and the headers that name a commit.  It refuses what the Hub refuses: a content
that has not the digest it is sent as, a commit of an object that nobody uploaded, a private repository without the
token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_averyprivatetokenofsomebody"
SIGNATURE = "0123averyprivatesignature"
"""Of the URLs that objects are uploaded to."""


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Commit id and what each path is: bytes, or the sha256 of an object."""

    def add(self, files: dict[str, Any]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Any]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """What it holds, and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.on_upload: Callable[[], None] = lambda: None
        self.refusals: list[int] = []
        """Statuses that the next uploads are answered with."""
        self.on_download: Callable[[], None] = lambda: None
        self.on_commit: Callable[[dict[str, Any]], object] = lambda files: None
        self.endpoint = ""

    def files(self, repo: str) -> dict[str, bytes]:
        files = self.repos[repo].commits[-1][1]
        return {path: self.content(each) for path, each in files.items() if not path.startswith(".")}

    def content(self, each: Any) -> bytes:
        return each if isinstance(each, bytes) else self.objects[each]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for pattern, work in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {url.path}"):
                return work(self, *map(unquote, found.groups()))
        return self.send(404, {"error": f"no such route {method} {self.path}"})

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, if the one who asks may see (or write) it; else an answer is given."""
        repo = self.hub.repos.get(name)
        if repo is None or ((repo.private or write) and not self.known):
            self.send(404 if self.known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo

    def commit(self, name: str, revision: str) -> tuple[str, dict[str, Any]] | None:
        if (repo := self.repo(name)) is None:
            return None
        if (found := repo.at(revision)) is None:
            self.send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return found

    def create(self) -> None:
        asked = json.loads(self.body)
        if not self.known:
            return self.send(401, {"error": "Invalid username or password."})
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.endpoint}/datasets/{name}"
        assert asked["type"] == "dataset"
        if name in self.hub.repos:
            return self.send(409, {"error": "You already created this dataset repo", "url": url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].add({".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})
        return self.send(200, {"url": url, "name": name, "id": name})

    def info(self, name: str, revision: str = "main") -> None:
        if (commit := self.commit(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in commit[1]]
            private = self.hub.repos[name].private
            self.send(200, {"id": name, "sha": commit[0], "private": private, "siblings": siblings, "tags": []})

    def entry(self, path: str, each: Any) -> dict[str, Any]:
        data = self.hub.content(each)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
        if not isinstance(each, bytes):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{each}\nsize {len(data)}\n".encode()
            entry |= {"oid": git_sha(pointer), "lfs": {"oid": each, "size": len(data), "pointerSize": len(pointer)}}
        return entry

    def tree(self, name: str, revision: str, below: str = "") -> None:
        if (commit := self.commit(name, revision)) is None:
            return None
        prefix = f"{below}/" if below else ""
        recursive = self.query.get("recursive", ["False"])[0].lower() == "true"
        entries, folders = [], set()
        for path, each in commit[1].items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(len(parts), 2)):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                entries.append(self.entry(path, each))
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        if below and not entries:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self.send(200, entries)

    def paths_info(self, name: str, revision: str) -> None:
        if (commit := self.commit(name, revision)) is not None:
            asked = self.body.decode()
            paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
            self.send(200, [self.entry(path, commit[1][path]) for path in paths if path in commit[1]])

    def preupload(self, name: str, _revision: str) -> None:
        if (repo := self.repo(name, write=True)) is not None:
            there = repo.commits[-1][1]
            files = []
            for file in json.loads(self.body)["files"]:
                path, each = file["path"], there.get(file["path"])
                mode = "lfs" if path.endswith(".parquet") else "regular"
                oid = None if each is None else (git_sha(each) if isinstance(each, bytes) else each)
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send(200, {"files": files})

    def batch(self, name: str) -> None:
        if self.repo(name, write=True) is not None:
            objects = []
            for each in json.loads(self.body)["objects"]:
                href = f"{self.hub.endpoint}/upload/{each['oid']}?X-Amz-Signature={SIGNATURE}"
                upload = {"upload": {"href": href, "header": {}}}
                objects.append(each if each["oid"] in self.hub.objects else each | {"actions": upload})
            self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.hub.refusals:
            return self.send(self.hub.refusals.pop(0), {"error": "the signature has expired"}, Retry_After="1")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "wrong digest"})
        self.hub.objects[oid] = self.body
        self.hub.uploads.append(oid)
        self.hub.on_upload()
        return self.send(200)

    def make_commit(self, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return None
        assert revision == "main"
        head, files = repo.commits[-1][0], dict(repo.commits[-1][1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                return self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.uploads.append(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.send(400, {"error": f"no object {value['oid']}"})
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.on_commit(files)
        oid = repo.add(files)
        url = f"{self.hub.endpoint}/datasets/{name}/commit/{oid}"
        return self.send(200, {"commitUrl": url, "commitOid": oid})

    def validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (commit := self.commit(name, revision)) is None:
            return None
        oid, files = commit
        if path not in files:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        data = self.hub.content(files[path])
        etag = git_sha(data) if isinstance(files[path], bytes) else files[path]
        headers = {"ETag": f'"{etag}"', "X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data))}
        headers |= {"X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            part = data[first : last + 1]
            headers |= {"Content_Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
            return self.send(206, part, **headers)
        if self.command == "GET":
            self.hub.downloads.append(path)
            self.hub.on_download()
        return self.send(200, data, **headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/datasets/{NAME}", Handler.info),
    (rf"GET /api/datasets/{NAME}/revision/([^/]+)", Handler.info),
    (rf"GET /api/datasets/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/datasets/{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"POST /api/datasets/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (rf"POST /api/datasets/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/datasets/{NAME}/commit/([^/]+)", Handler.make_commit),
    (rf"POST /datasets/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(\w+)", Handler.upload),
    (rf"(?:GET|HEAD) /datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """In a thread of this process, so that a test sees and changes what it holds; clients are their own processes."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
