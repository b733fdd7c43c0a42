"""A Hub on loopback: what huggingface_hub asks of the real one, served from memory.

It speaks enough of the Hub's API for the real client to download and upload, keeps a log of what was
asked, and misbehaves on demand. huggingface_hub reads HF_ENDPOINT when it is imported, so client
calls run in a child process: `hub.client(cache).run(resolve, model)`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ov_afm.system.child_process import ChildProcess

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".bin")


def environment(cache: Path, url: str) -> dict[str, str]:
    """A child's environment: this Hub, an empty cache and no login."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "",
    }


@dataclass
class Repo:
    """One repository: a single commit of a single branch."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    commits: int = 0

    @property
    def sha(self) -> str:
        """The commit id, which follows from the contents."""
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(self.files.items())})
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Hub:
    """State of the server.

    Attributes:
        repos: By `org/name`.
        objects: LFS objects uploaded, by sha256.
        log: `METHOD path status` of each request; a Range or a length where there was one.
        cut: File name to the bytes after which its download, or upload, breaks; `breaks` times.
        breaks: How often a cut still happens.
        corrupt: File names of which one byte is served wrong.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    corrupt: set[str] = field(default_factory=set)
    url: str = ""

    def add(self, repo: str, folder: Path, **options: Any) -> Repo:
        """A repository with the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[repo] = Repo(files, **options)
        return self.repos[repo]

    def client(self, cache: Path, **env: str) -> ChildProcess:
        """A child process whose Hub this is."""
        return ChildProcess(env={**environment(cache, self.url), **env}, timeout_s=120)

    def asked(self, pattern: str) -> list[str]:
        """Requests whose log line matches."""
        return [line for line in self.log if re.search(pattern, line)]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
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

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        self.path = unquote(urlsplit(self.path).path)
        for verb, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and method in verb:
                answer(self, *match.groups())
                return
        self._json(404, {"error": "no such endpoint"})

    def _json(self, status: int, fields: Any, **headers: str) -> None:
        self._send(status, json.dumps(fields).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, body: bytes, headers: dict[str, str], note: str = "") -> None:
        self.hub.log.append(f"{self.command} {self.path} {status} {note}".rstrip())
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _repo(self, name: str, revision: str | None = None) -> Repo | None:
        """The repository; None once an error was sent instead."""
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            self._json(401, {}, X_Error_Message="Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not known):
            self._json(404 if known else 401, {}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif repo.gated and "/api/" not in self.path:
            self._json(403, {}, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        elif revision not in (None, "main", repo.sha):
            self._json(404, {}, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name, revision)
        if repo:
            siblings = []
            for file, data in repo.files.items():
                entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                if file.endswith(LARGE):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            self._json(200, {"id": name, "modelId": name, "sha": repo.sha, "siblings": siblings, "private": False})

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        data = repo.files.get(file)
        if data is None:
            self._json(404, {}, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        digest = hashlib.sha256(data) if file.endswith(LARGE) else hashlib.sha1(data)
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        if file in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and file in self.hub.cut and self.hub.breaks:
            self.hub.breaks -= 1
            self._send_half(body, self.hub.cut[file] - start, headers, start)
            return
        self._send(206 if asked else 200, body, headers, f"from {start}, {len(body)} bytes")

    def _send_half(self, body: bytes, size: int, headers: dict[str, str], start: int) -> None:
        self.hub.log.append(f"{self.command} {self.path} cut from {start}, {size} bytes")
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: max(size, 0)])
        self.wfile.flush()
        self.close_connection = True

    def _create(self) -> None:
        fields = json.loads(self._body())
        name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json(401, {}, X_Error_Message="Invalid credentials in Authorization header")
        elif name in self.hub.repos:
            self._json(409, {"url": f"{self.hub.url}/{name}"}, X_Error_Message="You already created this model repo")
        else:
            self.hub.repos[name] = Repo(private=fields.get("visibility") == "private")
            self._json(200, {"url": f"{self.hub.url}/{name}"})

    def _preupload(self, name: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        if self._repo(name):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self._json(200, {"files": modes})

    def _batch(self, name: str) -> None:
        wanted = json.loads(self._body())["objects"]
        answers = []
        for item in wanted:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}", "header": {}}}
            answers.append(answer)
        self._json(200, {"transfer": "basic", "objects": answers}, X_Repo=name)

    def _put(self, oid: str) -> None:
        if self.hub.breaks and oid in self.hub.cut:
            self.hub.breaks -= 1
            self.rfile.read(min(self.hub.cut[oid], int(self.headers["Content-Length"])))
            self._json(403, {"error": "the upload link has expired"})
            self.close_connection = True
            return
        data = self._body()
        self.hub.objects[oid] = data
        self._send(200 if hashlib.sha256(data).hexdigest() == oid else 400, b"", {}, f"{len(data)} bytes")

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(name)
        if repo is None:
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
        repo.commits += 1
        url = f"{self.hub.url}/{name}/commit/{repo.sha}"
        self._json(200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

    def _fine(self) -> None:
        self._body()
        self._json(200, {"errors": [], "warnings": [], "name": "tester", "type": "user", "orgs": [], "auth": {}})


REPO = r"([\w.-]+/[\w.-]+?)"
ROUTES = [
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._fine),
    ("GET", r"/api/whoami-v2", _Handler._fine),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", _Handler._preupload),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", _Handler._commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/objects/(\w+)", _Handler._put),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", _Handler._info),
    ("GET", rf"/api/models/{REPO}", _Handler._info),
    ("GET HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler._file),
]
