"""A small stand-in for the Hugging Face hub on this machine: files of commits, and what is pushed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")
_ABOUT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/?]+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/?]+)/(?P<what>preupload|commit|branch)/(?P<revision>[^/?]+)")


class FakeHub:
    """repos: repository -> branch -> commit; commits: commit -> file -> bytes. asked: every request's path.

    gated, private: repositories.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.asked: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Put files on a branch, over those that are there."""
        branches = self.repos.setdefault(repo, {})
        whole = {**self.commits.get(branches.get(revision, branches.get("main", "")), {}), **files}
        name = hashlib.sha1(repr((repo, sorted(whole.items()), len(self.commits))).encode()).hexdigest()
        branches[revision], self.commits[name] = name, whole
        return name

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.repos[repo][revision]]

    def names_fetched(self) -> set[str]:
        """The files that were asked for."""
        return {match["file"] for match in map(_FILE.match, self.asked) if match is not None}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_) -> None:
        """Nothing is logged."""

    def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """A file of a commit."""
        self.hub.asked.append(self.path)
        if (about := _ABOUT.fullmatch(self.path)) is not None:
            self._json({"id": about["repo"], "private": about["repo"] in self.hub.private})
            return
        match = _FILE.match(self.path)
        if match is None or match["repo"] not in self.hub.repos:
            self._say(404 if match is None else 401, X_Error_Code="RepoNotFound")
            return
        if match["repo"] in self.hub.gated:
            self._say(403, X_Error_Code="GatedRepo")
            return
        branches = self.hub.repos[match["repo"]]
        commit = branches.get(match["revision"], match["revision"])
        if commit not in self.hub.commits:
            self._say(404, X_Error_Code="RevisionNotFound")
            return
        content = self.hub.commits[commit].get(match["file"])
        if content is None:
            self._say(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._say(200, content, ETag=etag, X_Repo_Commit=commit)

    def do_POST(self) -> None:
        """A repository made, asked about, or committed to."""
        self.hub.asked.append(self.path)
        body = self._body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo in self.hub.repos:
                self._json({"url": f"http://{self.headers['Host']}/{repo}", "error": "exists"}, 409)
            else:
                self.hub.commit(repo, {})
                self.hub.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
                self._json({"url": f"http://{self.headers['Host']}/{repo}"})
            return
        if self.path.startswith("/api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
            return
        match = _API.match(self.path)
        if match is None:
            self._say(404)
        elif match["what"] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._json({"files": modes})
        elif match["what"] == "branch":
            self.hub.commit(match["repo"], {}, match["revision"])
            self._json({})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.hub.commit(match["repo"], files, match["revision"])
            url = f"http://{self.headers['Host']}/{match['repo']}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "hookOutput": "", "success": True})

    def _json(self, content: dict, status: int = 200) -> None:
        self._say(status, json.dumps(content).encode(), Content_Type="application/json")


@contextmanager
def fake_hub(monkeypatch, cache):
    """A scope in which the hub's library asks a hub of this process, and keeps what it fetches in `cache`."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**settings, "HF_HUB_CACHE": str(cache)}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
