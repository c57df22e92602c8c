"""A Hugging Face Hub on this machine, as far as `huggingface_hub` uses one to share a model and to load it again.

    with HubServer() as hub:
        subprocess.run(["llmprune", "push", "DIR", "user/name"], env={**os.environ, **hub.env})

It keeps everything in memory: blobs by SHA-256 (the LFS store), repositories as branches of snapshots. A test reads `hub.log`
and `hub.received` to see what was asked and sent, and breaks things through `hub.drop_upload`, `hub.stay_down`, `hub.status`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "user"
TOKEN = "hf_TheTokenThatMustNeverBePrinted"
READ_TOKEN = "hf_ATokenThatMayOnlyRead"
LFS = re.compile(r"\.(safetensors|bin|gguf)$")


@dataclass
class Repository:
    """Branches and pull requests, each a list of commits from the oldest; a commit is path to content."""

    private: bool
    refs: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})
    pulls: int = 0

    def files(self, revision: str) -> dict[str, bytes] | None:
        """A snapshot by branch name or commit hash."""
        for commits in self.refs.values():
            for commit in commits:
                if commit_hash(commit) == revision:
                    return commit
        return self.refs[revision][-1] if revision in self.refs else None


def commit_hash(files: dict[str, bytes]) -> str:
    parts = [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in sorted(files.items())]
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


def blob_id(path: str, content: bytes) -> str:
    """What the Hub calls a file's content: SHA-256 for large files, git's SHA-1 for the others."""
    if LFS.search(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server; a context manager that runs it in a thread.

    Attributes:
        log: every request as "METHOD /path".
        received: SHA-256 of every large file (or part of one) that arrived whole, in order; one sent twice is here twice.
        chunk_size: above this many bytes, large files are sent in parts.
        drop_upload: the number of the large upload (from 1) during which the connection is cut.
        stay_down: after a cut, cut every connection until `drop_upload` is None again.
        status: path prefix to a status that is answered instead.
        echo_token: put the request's Authorization header into every error message.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[str] = []
        self.received: list[str] = []
        self.uploads = 0
        self.chunk_size: int | None = None
        self.drop_upload: int | None = None
        self.stay_down = False
        self.status: dict[str, int] = {}
        self.echo_token = False
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.env = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            # With hf_xet installed the client speaks to Xet's own servers and no LFS at all.
            "HF_HUB_DISABLE_XET": "1",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = url.path
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {path}")
        for prefix, status in self.hub.status.items():
            if path.startswith(prefix):
                self.body()
                return self.fail(status, "as the test wishes")
        for method, pattern, action in ROUTES:
            if method in (self.command, {"HEAD": "GET"}.get(self.command)) and (found := re.fullmatch(pattern, path)):
                return action(self, *(unquote(part) for part in found.groups() if part))
        self.body()
        return self.fail(404, "no such page")

    # Requests

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self, repo_id: str) -> bool:
        """Answer 401 or 403 where the token is not the owner's."""
        if self.token() not in (TOKEN, READ_TOKEN):
            self.fail(401, "Invalid credentials in Authorization header")
        elif self.token() == READ_TOKEN or not repo_id.startswith(f"{OWNER}/"):
            self.fail(403, f"You don't have the rights to write to {repo_id}")
        else:
            return True
        return False

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, if it exists and the token may see it; else answers as the Hub does: 401, as if there was none."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and self.token() not in (TOKEN, READ_TOKEN)):
            self.fail(404 if self.token() else 401, "Repository not found", code="RepoNotFound")
            return None
        return found

    # Answers

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def fail(self, status: int, message: str, code: str | None = None) -> None:
        if self.hub.echo_token:
            message += f" ({self.headers.get('Authorization')})"
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send_json({"error": message}, status, headers)

    # Account and repositories

    def whoami(self) -> None:
        if self.token() not in (TOKEN, READ_TOKEN):
            return self.fail(401, "Invalid credentials in Authorization header")
        return self.send_json({"name": OWNER, "type": "user", "orgs": []})

    def create_repository(self) -> None:
        asked = json.loads(self.body())
        repo_id = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not self.may_write(repo_id):
            return None
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.send_json({**answer, "error": "You already created this model repo"}, 409)
        self.hub.repositories[repo_id] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.send_json(answer)

    def validate_card(self) -> None:
        text = json.loads(self.body())["content"]
        try:
            metadata = yaml.safe_load(text.split("---\n")[1])
            errors = [] if isinstance(metadata, dict) else [{"message": "metadata is no mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_branch(self, repo_id: str, branch: str) -> None:
        self.body()
        if not self.may_write(repo_id) or (repository := self.repository(repo_id)) is None:
            return None
        if branch in repository.refs:
            return self.fail(409, "Reference already exists")
        repository.refs[branch] = list(repository.refs["main"])
        return self.send_json({})

    def refs(self, repo_id: str) -> None:
        if (repository := self.repository(repo_id)) is None:
            return
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_hash(commits[-1])}
            for name, commits in repository.refs.items()
        ]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def snapshot(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        if (repository := self.repository(repo_id)) is None:
            return None
        files = repository.files(revision)
        if files is None:
            self.fail(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return files

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        if (files := self.snapshot(repo_id, revision)) is not None:
            private = self.hub.repositories[repo_id].private
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.send_json(
                {"id": repo_id, "modelId": repo_id, "sha": commit_hash(files), "private": private, "siblings": siblings}
            )

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        if (files := self.snapshot(repo_id, revision)) is None:
            return None
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(folder):
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
                if LFS.search(path):
                    entry["lfs"] = {"oid": blob_id(path, content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
        if folder and not entries:
            return self.fail(404, f"{folder} does not exist", code="EntryNotFound")
        return self.send_json(entries)

    # Uploads

    def preupload(self, repo_id: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        if (not self.query.get("create_pr") and not self.may_write(repo_id)) or (
            files := self.snapshot(repo_id, revision)
        ) is None:
            return
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if LFS.search(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": blob_id(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in asked
                ]
            }
        )

    def lfs_batch(self, repo_id: str) -> None:
        asked = json.loads(self.body())
        # What goes into a pull request names no branch, and anybody may send it.
        if "ref" in asked and not self.may_write(repo_id):
            return
        objects = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, object] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if self.hub.chunk_size and size > self.hub.chunk_size:
                    count = -(-size // self.hub.chunk_size)
                    parts = {str(i + 1): f"{self.hub.url}/lfs/{oid}/{i + 1}" for i in range(count)}
                    upload["header"] = {"chunk_size": str(self.hub.chunk_size), **parts}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.send_json({"transfer": asked["transfers"][0], "objects": objects})

    def lfs_body(self) -> bytes | None:
        """A large file's content; None where the connection was cut as the test asked for."""
        with self.hub.lock:
            self.hub.uploads += 1
            number, cut = self.hub.uploads, self.hub.drop_upload
        if cut is not None and (number == cut or (number > cut and self.hub.stay_down)):
            self.rfile.read(min(100, int(self.headers["Content-Length"])))
            self.close_connection = True
            self.connection.close()
            return None
        return self.body()

    def lfs_put(self, oid: str) -> None:
        if (content := self.lfs_body()) is None:
            return None
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail(400, "content does not match its name")
        with self.hub.lock:
            self.hub.blobs[oid] = content
            self.hub.received.append(oid)
        return self.send(200, b"")

    def lfs_put_part(self, oid: str, number: str) -> None:
        if (content := self.lfs_body()) is not None:
            with self.hub.lock:
                self.hub.parts[oid, int(number)] = content
                self.hub.received.append(f"{oid} part {number}")
            self.send(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = sorted(part["partNumber"] for part in json.loads(self.body())["parts"])
        content = b"".join(self.hub.parts.pop((oid, number)) for number in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.fail(400, "the parts do not make up the whole")
        self.hub.blobs[oid] = content
        return self.send_json({})

    def lfs_verify(self, repo_id: str) -> None:
        asked = json.loads(self.body())
        if len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"]:
            return self.send_json({})
        return self.fail(404, "object not found")

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        pull = bool(self.query.get("create_pr"))
        if (not pull and not self.may_write(repo_id)) or (files := self.snapshot(repo_id, revision)) is None:
            return None
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.fail(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        with self.hub.lock:
            repository = self.hub.repositories[repo_id]
            if pull:
                repository.pulls += 1
                repository.refs[f"refs/pr/{repository.pulls}"] = [*repository.refs[revision], files]
            else:
                repository.refs[revision].append(files)
        oid = commit_hash(files)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{repository.pulls}"
        return self.send_json(answer)

    # Downloads

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (files := self.snapshot(repo_id, revision)) is None:
            return None
        headers = {"X-Repo-Commit": commit_hash(files)}
        if path not in files:
            message = f"{path} does not exist"
            return self.send_json({}, 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": message})
        content = files[path]
        headers |= {"ETag": f'"{blob_id(path, content)}"', "Accept-Ranges": "bytes"}
        if LFS.search(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(found[1]), int(found[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.send(206, content[start:stop], headers)
        return self.send(200, content, headers)


REPO = r"([\w.-]+/[\w.-]+)"
REVISION = r"([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repository),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", rf"/api/models/{REPO}/branch/{REVISION}", Handler.create_branch),
    ("GET", rf"/api/models/{REPO}/refs", Handler.refs),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Handler.model_info),
    ("GET", rf"/api/models/{REPO}", Handler.model_info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("PUT", r"/lfs/(\w+)/(\d+)", Handler.lfs_put_part),
    ("POST", r"/lfs/(\w+)", Handler.lfs_complete),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
]
