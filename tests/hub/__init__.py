"""An imitation of the Hugging Face hub on loopback: what its libraries ask of it, and its faults on demand.

    with serving(root) as hub:
        subprocess.run([sys.executable, "experiment.py", ...], env=hub.environment(home=tmp_path))

`root` holds {models,datasets}/OWNER/NAME/REVISION/files as `repositories.build` makes them: REVISION is a branch,
percent-quoted (main, refs%2Fconvert%2Fparquet); main~1, main~2, ... are what was pushed to main later. Beside the
revisions may lie a repo.json: {"gated": "manual", "closed": true (nobody has access), "private": true}. Everything is
read anew at each request.

Tokens: hf_good may read all that is not closed; hf_poor nothing that is gated or private; hf_fine is a fine-grained
token without the right to gated repositories; every other one is invalid. Not imitated: Xet, uploads, the dataset
viewer, names without an owner.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest

from tests.hub import repositories

TOKENS = {"hf_good": "full", "hf_poor": "poor", "hf_fine": "fine"}
# names of files that LFS keeps and the CDN sends
LARGE = (".parquet", ".zst", ".safetensors", ".bin", ".gz", ".npz", ".pt", ".tar", ".model", "tokenizer.json")
PAGE, PAGE_EXPANDED = 1000, 100  # entries of a tree listing in one answer

REPOSITORY = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
FILE = r"(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = [(re.compile(pattern), method) for pattern, method in (
    (rf"/api/{REPOSITORY}", "info"),
    (rf"/api/{REPOSITORY}/revision/(?P<revision>[^/]+)", "info"),
    (rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    (rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"/api/{REPOSITORY}/refs", "refs"),
    (rf"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/{FILE}", "resolve"),
    (rf"/api/resolve-cache/{REPOSITORY}/{FILE}", "content"),
    (rf"/cdn/{REPOSITORY}/{FILE}", "content"),
    (r"/api/whoami-v2", "whoami"),
)]

# ------------------------------------------------------------------------------------------------ repositories


class Refused(Exception):
    """An answer that is an error: its status, the hub's code and message for it, and further headers."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}


class Revision(NamedTuple):
    """A state of a repository: the branch it stands or once stood at, its commit, and its files by their paths."""

    branch: str
    commit: str
    files: dict[str, Path]


class Repository:
    """A repository's folder as it is now."""

    def __init__(self, root: Path, kind: str, name: str):
        self.kind, self.name, self.folder = kind, name, root / kind / name
        settings = self.folder / "repo.json"
        self.settings = json.loads(settings.read_text()) if settings.exists() else {}

    def folders(self) -> list[Path]:
        """The folders of all revisions, the latest of a branch last."""
        if not self.folder.is_dir():
            return []
        found = [f for f in self.folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
        return sorted(found, key=lambda f: (branch_of(f), number_of(f)))

    def branches(self) -> dict[str, Revision]:
        return {branch_of(folder): read(folder) for folder in self.folders()}

    def revision(self, wanted: str) -> Revision:
        """The revision of that branch or commit."""
        branches = self.branches()
        if wanted in branches:
            return branches[wanted]
        for folder in self.folders():
            revision = read(folder)
            if revision.commit == wanted:
                return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {wanted}")

    def new_folder(self, branch: str) -> Path:
        """Where the next revision of a branch goes."""
        taken = [number_of(f) for f in self.folders() if branch_of(f) == branch]
        suffix = f"~{max(taken) + 1}" if taken else ""
        return self.folder / (quote(branch, safe="") + suffix)


def branch_of(folder: Path) -> str:
    return unquote(re.sub(r"~\d+$", "", folder.name))


def number_of(folder: Path) -> int:
    number = re.search(r"~(\d+)$", folder.name)
    return int(number[1]) if number else 0


def read(folder: Path) -> Revision:
    """A revision's files; its commit is a hash of their paths and contents."""
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    contents = [(path, oid(file)) for path, file in files.items()]
    return Revision(branch_of(folder), sha1(json.dumps(contents)), files)


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def oid(file: Path) -> str:
    return hashes(file)[0]


def hashes(file: Path) -> tuple[str, str]:
    """(git's hash, SHA-256) of a file's content."""
    about = file.stat()
    return hashes_then(file, about.st_size, about.st_mtime_ns)


@functools.cache
def hashes_then(file: Path, size: int, changed: int) -> tuple[str, str]:
    """Hashes of a file as it was at that size and time of change: computed once."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def etag(path: str, file: Path) -> str:
    return f'"{hashes(file)[is_large(path)]}"'


# ------------------------------------------------------------------------------------------------ answers


class Handler(BaseHTTPRequestHandler):
    """One connection; a method per route."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out separately: with it every answer would wait 40 ms
    server: Hub

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(self.url.query).items()}
        self.fault = self.server.next_fault(f"{self.command} {self.path}")
        try:
            self.misbehave()
            self.route()
        except Refused as refused:
            self.send_json({"error": refused.message}, refused.status, refused.headers)
        except ConnectionError:  # a client that went away, or one to be left without an answer
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def log_message(self, *about) -> None:
        """Nothing on stderr: see Hub.requests."""

    def misbehave(self) -> None:
        """What a fault does before the request is looked at; "cut" comes with the body."""
        kind, seconds = self.fault.get("do", ""), self.fault.get("seconds")
        if kind == "slow":
            self.server.closing.wait(seconds or 1)
        elif kind == "hang":
            self.leave(wait=seconds)
        elif kind == "drop":
            self.leave()
        elif kind == "429":
            seconds = 1 if seconds is None else seconds
            headers = {"Retry-After": str(seconds), "RateLimit": f'"api";r=0;t={seconds}',
                       "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
            raise Refused(429, "", "We had to rate limit your IP.", headers)
        elif kind.isdigit():
            headers = {} if seconds is None else {"Retry-After": str(seconds)}
            raise Refused(int(kind), "", "Internal Error - We're working hard to fix this as soon as possible!",
                          headers)

    def leave(self, wait: float | None = 0) -> None:
        """Close the connection without an answer, after a while or (None) when the server ends."""
        self.server.note(self, 0)
        self.server.closing.wait(wait)
        raise ConnectionAbortedError

    def route(self) -> None:
        for pattern, method in ROUTES:
            found = pattern.fullmatch(self.url.path)
            if found:
                parts = {key: unquote(value or "") for key, value in found.groupdict().items()}
                if method != "content":  # its addresses are signed ones, which ask for no token
                    self.access()
                if "name" in parts:
                    self.repository = self.find(parts.pop("kind") or "models", parts.pop("name"), method == "content")
                return getattr(self, method)(**parts)
        raise Refused(404, "", "Sorry, we can't find the page you are looking for.")

    def access(self) -> str:
        """What the token of this request allows: full, poor, fine, or "" without one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token, "")

    def find(self, kind: str, name: str, signed: bool) -> Repository:
        repository = Repository(self.server.root, kind, name)
        hidden = repository.settings.get("private") and not signed and self.access() != "full"
        if repository.folders() and not hidden:
            return repository
        if self.access():
            raise Refused(404, "RepoNotFound", "Repository not found")
        raise Refused(401, "RepoNotFound", "Invalid username or password.")

    def check_gate(self) -> None:
        """Refuse a gated repository's files to those without access; its pages are public."""
        settings, name, access = self.repository.settings, self.repository.name, self.access()
        if not settings.get("gated") or (access == "full" and not settings.get("closed")):
            return
        if access == "fine":
            raise Refused(403, "", "Please enable access to public gated repositories in your fine-grained token "
                                   "settings to view this repository.")
        what = f"Access to {self.repository.kind[:-1]} {name} is restricted"
        if access:
            raise Refused(403, "GatedRepo", f"{what} and you are not in the authorized list. "
                                            f"Visit https://huggingface.co/{name} to ask for access.")
        raise Refused(401, "GatedRepo", f"{what}. You must have access to it and be authenticated to access it. "
                                        "Please log in.")

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self.send(json.dumps(value).encode(), status, kind | (headers or {}))

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        """An answer; its body is broken off where a fault says so, by default in the middle."""
        length, sent = len(content), b"" if self.command == "HEAD" else content
        if self.fault.get("do") == "cut":
            after = self.fault.get("after", len(sent) // 2)
            if not sent and "after" not in self.fault:
                self.leave()
            self.close_connection = after < len(sent)
            sent = sent[:after]
        self.server.note(self, status)  # before the answer: who has read it finds the request noted
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)

    # -------------------------------------------------------------------------------------------- the API

    def whoami(self) -> None:
        if not self.access():
            raise Refused(401, "", "Invalid username or password.")
        self.send_json({"type": "user", "name": "tester", "auth": {"accessToken": {"role": "read"}}})

    def info(self, revision: str = "main") -> None:
        repository, found = self.repository, self.repository.revision(revision)
        private, gated = (repository.settings.get(key, False) for key in ("private", "gated"))
        siblings = [{"rfilename": path} for path in found.files]
        if self.asked("blobs"):
            siblings = [{"rfilename": path, "size": file.stat().st_size} for path, file in found.files.items()]
        answer = {"_id": sha1(repository.name)[:24], "id": repository.name, "sha": found.commit, "private": private,
                  "gated": gated, "disabled": False, "downloads": 1, "likes": 1, "tags": [],
                  "createdAt": "2024-01-01T00:00:00.000Z", "lastModified": "2025-01-01T00:00:00.000Z",
                  "siblings": siblings}
        if repository.kind == "models":
            answer |= {"tags": ["transformers", "safetensors"], "library_name": "transformers",
                       "pipeline_tag": "text-generation"}
        self.send_json(answer)

    def refs(self) -> None:
        answer = {"branches": [], "converts": [], "tags": []}
        for branch, revision in self.repository.branches().items():
            ref = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
            side = "converts" if ref.startswith("refs/convert/") else "branches"
            answer[side].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": revision.commit})
        self.send_json(answer)

    def tree(self, revision: str, path: str = "") -> None:
        found, path = self.repository.revision(revision), path.strip("/")
        commit = {"X-Repo-Commit": found.commit}
        names = below(found.files, path, recursive=self.asked("recursive"))
        if path and not names:
            raise Refused(404, "EntryNotFound", f'{path} does not exist on "{revision}"', commit)
        first, size = int(self.query.get("cursor", 0)), PAGE_EXPANDED if self.asked("expand") else PAGE
        size = min(size, int(self.query.get("limit", size)))
        if first + size < len(names):
            after = urlencode(self.query | {"cursor": first + size})
            commit["Link"] = f'<{self.server.url}{self.url.path}?{after}>; rel="next"'
        self.send_json([entry(found, name, self.asked("expand")) for name in names[first:first + size]], headers=commit)

    def paths_info(self, revision: str) -> None:
        found = self.repository.revision(revision)
        if "json" in self.headers.get("Content-Type", ""):
            given = json.loads(self.body)
            paths, expand = given["paths"], given.get("expand")
        else:
            given = parse_qs(self.body.decode())
            paths, expand = given.get("paths", []), given.get("expand") == ["True"]
        paths = [path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)]
        known = [path for path in paths if path in found.files or below(found.files, path)]
        self.send_json([entry(found, path, expand) for path in known], headers={"X-Repo-Commit": found.commit})

    def asked(self, flag: str) -> bool:
        return self.query.get(flag, "").lower() in ("true", "1")

    # -------------------------------------------------------------------------------------------- files

    def resolve(self, revision: str, path: str) -> None:
        """Where a file's content is: at the CDN, which has another host name, or on the same host if it is small."""
        found = self.repository.revision(revision)
        self.check_gate()
        headers = {"X-Repo-Commit": found.commit, "Accept-Ranges": "bytes", "Vary": "Origin, Accept"}
        if path not in found.files:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found.commit})
        file = found.files[path]
        headers["X-Linked-Size"] = str(file.stat().st_size)
        place = f"{self.repository.kind}/{self.repository.name}/{found.commit}/{quote(path)}"
        if is_large(path):
            cdn = f"http://localhost:{self.server.server_port}/cdn/{place}?Expires={int(time.time()) + 3600}"
            self.send(b"Found", 302, {**headers, "Location": cdn, "X-Linked-Etag": etag(path, file)})
        else:
            here = {"Location": f"/api/resolve-cache/{place}", "ETag": etag(path, file)}
            self.send(b"Temporary Redirect", 307, headers | here)

    def content(self, revision: str, path: str) -> None:
        found = self.repository.revision(revision)
        if path not in found.files:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found.commit})
        content = found.files[path].read_bytes()
        headers = {"ETag": etag(path, found.files[path]), "Accept-Ranges": "bytes", "X-Repo-Commit": found.commit,
                   "Last-Modified": formatdate(usegmt=True), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(content, 200, headers)
        size = len(content)
        start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
        if start >= size:
            raise Refused(416, "", "Range Not Satisfiable", {"Content-Range": f"bytes */{size}"})
        self.send(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def below(files: dict[str, Path], folder: str, recursive: bool = False) -> list[str]:
    """Paths of the files and folders in a folder ("": all), sorted."""
    start = f"{folder}/" if folder else ""
    found = set()
    for path in files:
        if path.startswith(start):
            parts = path[len(start):].split("/")
            depths = range(1, len(parts) + 1) if recursive else [1]
            found |= {start + "/".join(parts[:depth]) for depth in depths}
    return sorted(found)


def entry(revision: Revision, path: str, expand: bool) -> dict:
    """What the API says of a file or folder."""
    last = {}
    if expand:
        last = {"lastCommit": {"id": revision.commit, "title": "Upload", "date": "2025-01-01T00:00:00.000Z"}}
    if path not in revision.files:
        return {"type": "directory", "oid": sha1(path), "size": 0, "path": path, **last}
    file = revision.files[path]
    size, (git, sha256) = file.stat().st_size, hashes(file)
    lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if is_large(path) else {}
    return {"type": "file", "oid": git, "size": size, "path": path, **lfs, **last}


# ------------------------------------------------------------------------------------------------ the server


class Hub(ThreadingHTTPServer):
    """The server, and what a test does with it.

    `requests` lists (method, path with its query, status) since the last reset; status 0: left without an answer.

    `faults` is a list of rules, of which the first whose turn it is decides:
        do       an HTTP status ("429", "500", ...); "cut": the body breaks off `after` bytes (unset: half; without a
                 body as "drop"); "drop": no answer; "slow": the answer comes after `seconds`; "hang": no answer, after
                 `seconds` or never
        match    regular expression, searched for in "METHOD path"; unset: every request
        at       only this one of the matching requests, counted from 1
        every    each so-many-th of them
        times    at most so often
        seconds  of a status: its Retry-After (429: 1 if unset)
    Rules count in themselves: rule["seen"] requests matched, rule["fired"] got the fault.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, log: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = Path(root).resolve(), f"http://127.0.0.1:{self.server_port}"
        self.log = open(log, "a", buffering=1) if log else None  # noqa: SIM115  closed with the server
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.pushed: list[Path] = []
        self.reset()

    def environment(self, *, home: Path, token: str | None = "hf_good") -> dict[str, str]:
        """This process's environment for one that asks this hub, with its own cache below `home`."""
        kept = {key: value for key, value in os.environ.items()
                if not key.upper().endswith("_PROXY") and not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        if token:
            own["HF_TOKEN"] = token
        return kept | own

    def reset(self) -> None:
        """No faults and no requests, as at the start."""
        with self.lock:
            self.requests: list[tuple[str, str, int]] = []
            self.faults: list[dict] = []

    def fault_at(self, n: int, kind: str, **rule) -> dict:
        """The n-th request from now on gets that fault, once; returns the rule."""
        rule = {"do": kind, "at": n, **rule}
        self.faults.append(rule)
        return rule

    def next_fault(self, request: str) -> dict:
        """The first rule whose turn it is; {} if none."""
        with self.lock:
            due = [rule for rule in self.faults if re.search(rule.get("match", ""), request) and self._due(rule)]
            if due:
                due[0]["fired"] = due[0].get("fired", 0) + 1
            return due[0] if due else {}

    @staticmethod
    def _due(rule: dict) -> bool:
        rule["seen"] = rule.get("seen", 0) + 1
        turn = rule["seen"] == rule["at"] if "at" in rule else rule["seen"] % rule.get("every", 1) == 0
        return turn and rule.get("fired", 0) < rule.get("times", rule["seen"])

    def note(self, handler: Handler, status: int) -> None:
        with self.lock:
            self.requests.append((handler.command, handler.path, status))
            if self.log:
                about = dict(method=handler.command, path=handler.path, status=status,
                             range=handler.headers.get("Range"), token=bool(handler.headers.get("Authorization")),
                             fault=handler.fault.get("do"), time=round(time.time(), 2))
                self.log.write(json.dumps(about) + "\n")

    def commit(self, kind: str, name: str, revision: str = "main") -> str:
        """The commit of a model's or dataset's revision."""
        return Repository(self.root, f"{kind}s", name).revision(revision).commit

    def push(self, kind: str, name: str, files: dict[str, bytes | None], revision: str = "main") -> str:
        """A new commit: main's files with these in place of their namesakes (None: gone), or a new repository of them.

        Earlier commits can still be read; what was pushed goes when the server ends.
        """
        repository = Repository(self.root, f"{kind}s", name)
        folder, branches = repository.new_folder(revision), repository.branches()
        paths = branches[revision].files if revision in branches else {}
        state = {path: file.read_bytes() for path, file in paths.items()} | files
        hidden = folder.with_name(f".{folder.name}")
        repositories.write(hidden, {path: content for path, content in state.items() if content is not None})
        hidden.rename(folder)  # from one state to the next, whatever is being read meanwhile
        self.pushed.append(folder)
        return read(folder).commit

    def handle_error(self, request, client_address) -> None:
        """A connection that broke is no news."""

    def end(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        for folder in self.pushed:
            shutil.rmtree(folder)
        if self.log:
            self.log.close()


@contextmanager
def serving(root: Path, log: Path | None = None) -> Iterator[Hub]:
    """A hub with the repositories below `root`; `log` gets a line of JSON for each request."""
    server = Hub(root, log)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.end()


# ------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory) -> Path:
    """All repositories, made once: not to be changed (Hub.push undoes itself)."""
    root = tmp_path_factory.mktemp("hub")
    repositories.build(root)
    return root


@pytest.fixture
def hub(hub_root) -> Iterator[Hub]:
    with serving(hub_root) as server:
        yield server
