"""What comes over a network: asked for with patience, kept by commit, and refused in words that say what to do.

Everything that reaches outside goes through `patiently`: the hub's answers about a repository, its files, texts read as
a stream, wheels of the package index.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from evals.cache import Cache

PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that say nothing against the same request a little later
# class names of httpx, requests, urllib3, aiohttp and http.client: a connection that failed or was cut
BROKEN = {"TransportError", "TimeoutException", "ConnectionError", "Timeout", "IncompleteRead", "ProtocolError",
          "ClientError", "ChunkedEncodingError"}
# nobody answered: waiting long helps little
UNREACHED = {"ConnectError", "ConnectionRefusedError", "gaierror", "NewConnectionError"}
DELAYS = (1, 2, 4, 8, 16, 32)  # seconds before another try
PATIENCE = 300.0  # seconds: the longest wait that a server's Retry-After is granted
HEARD = {"last": ""}  # of the hub in this process, at the last asking: "", "an answer", "nothing"
# the longest delay while nobody answers, by what was heard last
NOBODY = {"": DELAYS[1], "an answer": DELAYS[-1], "nothing": 0}
NO_HUB = "or use --profile=embedded, which needs no hub"
KEPT_GB = 4.0  # most of what is kept of texts
PINNED: dict[tuple[str, str], str] = {}  # (kind, repository): the commit that this run reads; see `pin`
LISTINGS: dict[tuple[str, str, str], dict[str, int | None]] = {}  # (kind, repository, commit): see `listing`
DOWNLOADED = 32 << 20  # bytes: a file up to this size costs less whole than in parts


def forget() -> None:
    """Begin a run that knows nothing of an earlier one in this process: commits it read at, answers it heard."""
    PINNED.clear()
    HEARD["last"] = ""


# ------------------------------------------------------------------------------------------------ patience


def patiently(what: str, work: Callable[[], Any]) -> Any:
    """work(), tried again while it fails for a reason that may pass (429, 5xx, time-outs, cut bodies).

    Each wait is said in one line, and a server's Retry-After is kept to. The last error is raised as it is; one that
    will not pass (404, 401, 403) at once. That nobody answers is waited for in full where somebody has answered
    before, else shortly, and where it was in vain not again.
    """
    for delay in (*DELAYS, None):
        try:
            return work()
        except Exception as error:  # noqa: BLE001  every library under the hub's raises its own
            nobody = unreached(error)
            if delay is None or not passing(error) or (nobody and delay > NOBODY[HEARD["last"]]):
                if nobody:
                    HEARD["last"] = "nothing"
                raise
            wait = max(delay, retry_after(error) or 0)
            if wait > PATIENCE:
                raise
            print(f"{what}: {first_line(error)}; trying again in {wait:.0f} s", flush=True)
            time.sleep(wait)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, to the root."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if a server gave one."""
    for e in chain(error):
        response = getattr(e, "response", None)
        code = getattr(response, "status_code", None) or getattr(e, "status", None)
        if isinstance(code, int):
            return code
    return None


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    code = status(error)
    if code is not None:
        return code in PASSING
    if any(type(e).__name__ == "OfflineModeIsEnabled" for e in chain(error)):
        return False
    return any(_is(e, BROKEN | UNREACHED) or "Consistency check failed" in str(e) or isinstance(e, EOFError)
               for e in chain(error))


def unreached(error: BaseException) -> bool:
    """Whether no server answered at all."""
    return status(error) is None and any(_is(e, UNREACHED) for e in chain(error))


def _is(error: BaseException, names: set[str]) -> bool:
    return isinstance(error, TimeoutError) or any(kind.__name__ in names for kind in type(error).__mro__)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    headers = next((e.response.headers for e in chain(error) if getattr(e, "response", None) is not None), {})
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].strip()[:200]


# ---------------------------------------------------------------------------------------------- repositories of the hub


def pin(commits: dict[str, str]) -> None:
    """Read these commits, {"model:owner/name": commit}, from now on, whatever the main branches have become."""
    PINNED.update({tuple(key.split(":", 1)): commit for key, commit in commits.items()})


def pinned() -> dict[str, str]:
    """The commits that this process has read so far, as `pin` takes them."""
    return {f"{kind}:{name}": commit for (kind, name), commit in sorted(PINNED.items())}


def commit(kind: str, name: str) -> str:
    """The commit of a repository's main branch: asked once a process, then pinned; without an answer the cache's.

    `kind`: model or dataset. PermissionError where it is gated and access is lacking, ConnectionError if there is no
    such repository, or no answer and nothing in the cache; both in words ("what\\nwhat to do").
    """
    if (kind, name) not in PINNED:
        from huggingface_hub import constants

        # as the hub's own library keeps it
        reference = Path(cache_folder(), f"{kind}s--{name.replace('/', '--')}", "refs", "main")
        try:
            found = patiently(f"hub, {name}", lambda: _asked(kind, name))
        except Exception as error:  # noqa: BLE001  the many ways of a hub to say no
            if not reference.exists() or not (constants.HF_HUB_OFFLINE or passing(error)):
                cached = "; HF_HUB_OFFLINE=1 goes on with what is in the cache" if reference.exists() else ""
                refused = _refused(error, kind, name)
                raise type(refused)(f"{refused}{cached}") from error
            PINNED[kind, name] = reference.read_text().strip()
            if not constants.HF_HUB_OFFLINE:
                print(f"hub, {name}: {first_line(error)}; going on with what is in the cache, commit "
                      f"{PINNED[kind, name][:12]}", flush=True)
            return PINNED[kind, name]
        HEARD["last"] = "an answer"
        PINNED[kind, name] = found
        with contextlib.suppress(OSError):  # a cache that may only be read serves as it is
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(found)
    return PINNED[kind, name]


def listing(kind: str, name: str, revision: str) -> dict[str, int | None]:
    """{file: bytes} of a repository at a commit; asked once a process."""
    from huggingface_hub import HfApi

    key = kind, name, revision
    if key not in LISTINGS:
        patiently(f"hub, {name}", lambda: _asked(kind, name, revision))
    if None in LISTINGS[key].values():  # mirrors may list names alone
        tree = patiently(f"hub, {name}",
                         lambda: list(HfApi().list_repo_tree(name, repo_type=kind, revision=revision, recursive=True)))
        LISTINGS[key] = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    return LISTINGS[key]


@functools.lru_cache(maxsize=64)
def content(kind: str, name: str, revision: str, file: str) -> bytes:
    """A small file of a repository at a commit, in two requests where the cache's way takes three."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    answer = get_session().get(hf_hub_url(name, file, repo_type=kind, revision=revision), headers=build_hf_headers(),
                               follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content


def nearby(url: str) -> str:
    """A data set's file, hf://datasets/owner/name@commit/path: if it is small in the local cache, else as it is."""
    from huggingface_hub import hf_hub_download

    repository, _, rest = url.removeprefix("hf://datasets/").partition("@")
    revision, _, file = rest.partition("/")
    if not url.startswith("hf://") or "::" in url:
        return url
    if listing("dataset", repository, revision).get(file, DOWNLOADED + 1) > DOWNLOADED:
        return url
    return hf_hub_download(repository, file, repo_type="dataset", revision=revision)


def _asked(kind: str, name: str, revision: str | None = None) -> str:
    """The commit of a repository, and its LISTINGS; a gated one, whose page is public, must grant one of its files."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    if info.gated:
        get_hf_file_metadata(hf_hub_url(name, info.siblings[0].rfilename, repo_type=kind, revision=info.sha))
    LISTINGS[kind, name, info.sha] = {s.rfilename: s.size for s in info.siblings}
    return info.sha


def _refused(error: BaseException, kind: str, name: str) -> OSError:
    from huggingface_hub import constants

    words = refusal(error, kind, name, offline=constants.HF_HUB_OFFLINE)
    if " gated " in words:
        return PermissionError(words)
    return ConnectionError(words)


def snapshot(kind: str, name: str, patterns: Iterable[str], ignore: Iterable[str] = ()) -> Path:
    """The local folder of a repository with all files that match, at its pinned commit (else main's, pinned then).

    Files that are there already cost no request. PermissionError where it is gated and access is lacking, else
    ConnectionError.
    """
    from huggingface_hub import snapshot_download

    # without a commit it would take what is in the cache at the first 503, and say nothing
    options = dict(repo_type=kind, revision=commit(kind, name), allow_patterns=list(patterns),
                   ignore_patterns=list(ignore))
    try:
        folder = patiently(f"hub, {name}", lambda: snapshot_download(name, **options))
    except Exception as error:  # noqa: BLE001  the many ways of a hub to say no
        raise _refused(error, kind, name) from error
    return Path(folder)


def size(kind: str, name: str, file: str) -> int:
    """Bytes of a repository's file at its pinned commit; 0 where that cannot be known."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        return get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=PINNED.get((kind, name)))).size or 0
    except Exception:  # noqa: BLE001  an estimate: what is wrong shows when the file is fetched
        return 0


def cache_folder() -> str:
    """Where the hub's files are kept."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def refusal(error: BaseException, kind: str, name: str, offline: bool = False) -> str:
    """Why the hub gives no access to a repository, as "what\\nwhat to do"."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/datasets/{name}" if kind == "dataset" else f"{constants.ENDPOINT}/{name}"
    said = " ".join(str(e) for e in chain(error))
    found = {cls for cls in (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)
             if any(isinstance(e, cls) for e in chain(error))}
    code, token = status(error), bool(os.environ.get("HF_TOKEN") or _stored_token())
    if offline:
        return (f"HF_HUB_OFFLINE is set and {name} is not in the local cache\n"
                f"unset HF_HUB_OFFLINE for one run to fetch it, {NO_HUB}")
    if "fine-grained token" in said:
        return (f"{name} is gated and this fine-grained token may not read gated repositories\n"
                f"enable \"access to public gated repositories\" in the token's settings "
                f"({constants.ENDPOINT}/settings/tokens), {NO_HUB}")
    if "Invalid credentials" in said or (code == 401 and token and GatedRepoError not in found):
        return (f"the hub takes the token for {name} for invalid or expired\n"
                f"run `hf auth login` again, or set HF_TOKEN to a valid one (or unset it), {NO_HUB}")
    if GatedRepoError in found or code == 403:
        if token:
            return (f"{name} is gated and this user has no access to it yet\n"
                    f"ask for access on {page} and wait until it is granted, {NO_HUB}")
        return (f"{name} is gated and no token is given\n"
                f"accept its licence on {page}, then run `hf auth login` or set HF_TOKEN, {NO_HUB}")
    if RevisionNotFoundError in found:
        return (f"{name} has no revision of that name any more: {first_line(error)}\n"
                "give another --out_dir to begin anew with its present state")
    if RepositoryNotFoundError in found or code in (401, 404):
        return (f"the hub has no {kind} {name}, or it is private, and there is no such folder or file here\n"
                "check the name; for a private one run `hf auth login` or set HF_TOKEN")
    if code == 429:
        return (f"the hub asks to wait before {name} is read: {first_line(error)}\n"
                f"start again later; with `hf auth login` it allows more, {NO_HUB}")
    causes = (e for e in chain(error) if _is(e, BROKEN | UNREACHED) or getattr(e, "response", None) is not None)
    cause = next(causes, error)
    proxies = [key for key in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
               if os.environ.get(key) or os.environ.get(key.lower())]
    if "Proxy" in type(cause).__name__ or (proxies and unreached(error)):
        return (f"the hub cannot be reached for {name} through the proxy: {first_line(cause)}\n"
                f"check HTTPS_PROXY, HTTP_PROXY and NO_PROXY, {NO_HUB}")
    return (f"the hub cannot be reached for {name}: {first_line(cause)}\n"
            f"check the network and proxy settings (HF_ENDPOINT for a mirror) and start again, {NO_HUB}")


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


# ------------------------------------------------------------------------------------------------ kept


@functools.cache
def _cache(folder: Path, thread: int) -> Cache:
    return Cache(folder, KEPT_GB)  # one a thread, as its books are not made for two; its files are


def kept(cache_dir: Path | None, kind: str, depends_on: dict, make: Callable[[], Any],
         repositories: Iterable[str] = ()) -> Any:
    """The JSON-able value that `make()` gives, kept in the cache by what it depends on and by repositories' commits."""
    import torch
    import zstandard

    def packed() -> dict:
        raw = json.dumps(make(), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return {"json": torch.frombuffer(bytearray(zstandard.compress(raw)), dtype=torch.uint8)}

    def unpacked(stored: dict) -> Any:
        return json.loads(zstandard.decompress(stored["json"].numpy().tobytes()).decode("utf-8", "surrogatepass"))

    if cache_dir is None:
        return json.loads(json.dumps(make()))
    commits = {"commits": {name: commit("dataset", name) for name in repositories}} if repositories else {}
    cache, key = _cache(Path(cache_dir) / "texts", threading.get_ident()), {**depends_on, **commits}
    stored = cache.get(kind, key, packed)
    try:
        return unpacked(stored)
    except (KeyError, ValueError, zstandard.ZstdError) as error:
        print(f"cache: what is kept of {kind} is damaged ({first_line(error)}); making it again", flush=True)
        cache.forget(kind, key)
        return unpacked(cache.get(kind, key, packed))
