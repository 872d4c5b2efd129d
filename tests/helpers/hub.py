"""The hub without the hub: its cache laid out by hand, and a server that answers as it does."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(hub: Path, repo: str, source: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """Put `source` into the cache folder `hub` as a snapshot of `repo`: files link to blobs named by their hash."""
    root = hub / f"models--{repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in (p for p in source.rglob("*") if p.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = root / "snapshots" / commit / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(link.relative_to(root).parts) - 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    return root / "snapshots" / commit


def etag(file: Path) -> str:
    """What names the blob of a file in the cache."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(repos: dict[str, Path], gated: str = "") -> Iterator[tuple[str, list[str]]]:
    """A hub that holds `repos`; yields its address and the list of files that were asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/")
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo == gated:
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if repo not in repos:
                return self.answer(401, {"X-Error-Code": "RepoNotFound"})
            files = sorted(p for p in repos[repo].rglob("*") if p.is_file())
            if path.startswith("api/models/"):
                *_, revision = path.split("/")
                if "revision" in path and revision not in ("main", COMMIT):
                    return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                names = [str(f.relative_to(repos[repo])) for f in files]
                if "/tree/" in path:
                    entries = [
                        {
                            "type": "file",
                            "path": n,
                            "size": f.stat().st_size,
                            "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                        }
                        for n, f in zip(names, files, strict=True)
                    ]
                    return self.answer(200, {}, json.dumps(entries).encode())
                siblings = [{"rfilename": n} for n in names]
                body = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                return self.answer(200, {}, json.dumps(body).encode())
            _, _, _, revision, *name = path.split("/")
            if revision not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            file = repos[repo].joinpath(*name)
            if not file.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            asked.append("/".join(name))
            return self.answer(200, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes())

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


@dataclass
class Account:
    """Who uploads, and what the hub has of theirs."""

    role: str = "write"  # of the token
    public: str = ""  # a repository that is there
    full: bool = False  # no commit is taken
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by name their files
    private: dict[str, bool] = field(default_factory=dict)


TOKEN = "hf_" + "a" * 30


@contextmanager
def accept_uploads(account: Account) -> Iterator[str]:
    """A hub on which `me`, of the organisation `team`, has an account; yields its address."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status: int, body: object = None, code: str = "") -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": len(content), "Content-Type": "application/json"}.items():
                self.send_header(key, str(value))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/whoami-v2":
                access = {"accessToken": {"role": account.role}}
                return self.answer(200, {"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": access})
            repo = "/".join(self.path.removeprefix("/api/models/").split("?")[0].split("/")[:2])
            if repo not in (account.public, *account.repos):
                return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
            return self.answer(200, {"id": repo, "sha": COMMIT, "private": account.private.get(repo, False), "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            repo = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                account.repos.setdefault(repo, {})
                account.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
                return self.answer(200, {"url": f"http://127.0.0.1:{server.server_port}/{repo}"})
            if "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if "/commit/" in self.path:
                if account.full:
                    return self.answer(403, {"error": "Storage limit reached"})
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        account.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                url = f"http://127.0.0.1:{server.server_port}/{repo}/commit/{COMMIT}"
                return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
            return self.answer(200, {"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
