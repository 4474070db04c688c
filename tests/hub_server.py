"""A Hub on loopback for uploads and downloads, as far as `huggingface_hub` asks. Clients need its `environ`:

with hub_server() as hub:
    subprocess.run(..., env=os.environ | hub.environ)
    hub.files["me/model"]["README.md"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {"hf_test": "write", "hf_read": "read"}
"""Tokens that it knows, and what they may do."""


@dataclass
class Hub:
    """What the Hub holds and what it was asked."""

    port: int = 0
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> name -> content; an entry is a repository that exists."""
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Contents of large files by their SHA-256, also of commits that never came."""
    sent: list[str] = field(default_factory=list)
    """SHA-256 of every large file that was sent."""
    writes: list[str] = field(default_factory=list)
    fail_commit: bool = False
    cut: int = 0
    """So many downloads of shards break off after 1000 bytes."""

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a client."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def _answer(self, body: object, code: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_file(self, repo: str, name: str) -> None:
        """The content of a file, or its headers alone."""
        content = self.hub.files.get(repo, {}).get(name)
        if content is None:
            self._answer({"error": "no"}, 404, X_Error_Code="EntryNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET" and name.endswith(".safetensors") and self.hub.cut:
            self.hub.cut -= 1
            self.wfile.write(content[:1000])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._send_file(repo, rest.partition("/")[2])
            return None
        if path == "/api/whoami-v2":
            role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if role is None:
                return self._answer({"error": "Invalid credentials"}, 401)
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            user = {"name": "me", "type": "user", "orgs": [{"name": "team"}], "auth": auth}
            return self._answer(user)
        repo = "/".join(path.split("/")[3:5])
        if repo not in self.hub.files:
            return self._answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        held = self.hub.files[repo]
        if "/tree/" in path:
            return self._answer(
                [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in held.items()]
            )
        siblings = [{"rfilename": name} for name in held]
        return self._answer(
            {"id": repo, "private": self.hub.private[repo], "sha": "c" * 40, "siblings": siblings}
        )

    def do_PUT(self) -> None:
        digest = self.path.rpartition("/")[2]
        self.hub.blobs[digest] = self._body()
        self.hub.sent.append(digest)
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked: dict[str, Any] = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.writes.append(f"create {repo}")
            private = asked.get("private") is True or asked.get("visibility") == "private"
            if repo not in self.hub.files:
                self.hub.files[repo], self.hub.private[repo] = {}, private
            return self._answer({"url": f"{self.hub.environ['HF_ENDPOINT']}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer(self._batch(json.loads(body)))
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if "/commit/" in path:
            if self.hub.fail_commit:
                return self._answer({"error": "the disk of the Hub is full"}, 400)
            self._commit(repo, body)
            url = f"{self.hub.environ['HF_ENDPOINT']}/{repo}/commit/{'d' * 40}"
            return self._answer({"commitUrl": url, "commitOid": "d" * 40, "success": True})
        return self._answer({"error": f"unknown {path}"}, 404)

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for one in asked["objects"]:
            made = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                href = f"{self.hub.environ['HF_ENDPOINT']}/blob/{one['oid']}"
                made["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(made)
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, body: bytes) -> None:
        self.hub.writes.append(f"commit {repo}")
        held = self.hub.files[repo]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                held[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del held[value["path"]]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A Hub that is there until the `with` ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
