"""What is handed on of a run: folders that appear whole or not at all, and nothing of this machine in them.

Paths that a text names (of the run, of what it read, of the project, the home folder, …) become the names at their
ends; keys, tokens, and paths in what cannot be changed, are found and refused, also where a page has them in base64.
"""

from __future__ import annotations

import binascii
import contextlib
import getpass
import gzip
import html
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path

from runs.folder import left
from variants.kit.files import put

PROJECT = Path(__file__).resolve().parent.parent
TEXTS = {".json", ".jsonl", ".html", ".md", ".csv", ".txt"}  # may be changed; code and weights are refused instead
# what keys and tokens of well-known services look like, and credentials in an address
SECRETS = re.compile(r"(?<![\w-])(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
                     r"|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,})(?![\w-])"
                     r"|-----BEGIN [A-Z ]*PRIVATE KEY|https?://[^\s/:@\"']+:[^\s/:@\"']+@")
NAMED_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)$")  # environment variables that hold one
ABSOLUTE = re.compile(r"(?<![\w/:.<])~?(?:/[\w.@+~-]+){2,}|(?<!\w)[A-Za-z]:(?:\\+[\w.@+~ -]+){2,}")
WHOLE_PATH = re.compile(r"~[\w.-]*/|/|[A-Za-z]:[\\/]")  # how a text begins that is nothing but a path
BASE64 = re.compile(r'(?:"|;base64,)([A-Za-z0-9+/]{40,}={0,2})"')  # a board or a picture in a page
HEADER = 100_000_000  # bytes at most that are taken for the header of a file of weights


class Revealing(ValueError):
    """Something is in what would be handed on that may not be."""


# ------------------------------------------------------------------------------------------------ new folders


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` whole at the end, or leaves nothing. ValueError: `out` holds something."""
    check_free(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        check_free(out)
        if out.is_dir():
            out.rmdir()
        put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def beside(run: Path, ending: str) -> Path:
    """The folder beside a run's that is named after it: run_1 -> run_1_hub. ValueError: `run` can be no run's."""
    if not run.resolve().name:
        raise ValueError(f"{run} is no folder of a run")
    if run.name in ("", ".."):  # the run is where we are, or above it
        run = run.resolve()
    return run.with_name(run.resolve().name + ending)


def check_free(out: Path) -> None:
    """ValueError if writing a folder there would touch what lies there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is no folder: nothing is written over it; give another --out")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: nothing is written over it; give another --out")


# ------------------------------------------------------------------------------------------------ nothing of here


def places(run: Path) -> list[str]:
    """Folders of this machine that nothing handed on may name, longest first."""
    folders = {Path.home(), Path.cwd(), PROJECT, Path(tempfile.gettempdir()), run.absolute(), run.resolve(),
               run.resolve().parent, *_read_from(run)}
    folders -= {Path("/tmp")}  # of every machine, and of the texts that models are trained on
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)


def _read_from(run: Path) -> list[Path]:
    """The files and folders of this machine that a run's settings name: its model, its texts, …"""
    settings = left(run).get("settings") or {}
    named_ones = (Path(value) for value in settings.values() if isinstance(value, str))
    return [path for path in named_ones if path.is_absolute()]


def by_name(text: str, run: Path) -> str:
    """The text with the name at its end for each path into `places`."""
    return cleaner(run)(text)


def cleaner(run: Path) -> Callable[[str], str]:
    """`by_name` of one run, for many texts."""
    below = r"(?:[/\\]+[^\s\"'<>`,;:)\]]*)?"
    patterns = [re.compile(_written(place) + below) for place in places(run)]

    def clean(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(_last, text)
        return text

    return clean


def no_paths(text: str) -> str:
    """The text with the name at its end for every absolute path. Not for texts that a language model read or wrote."""
    return ABSOLUTE.sub(_last, text)


def named(text: str) -> str:
    """A setting: of a path the name at its end, whatever is in it; of another text as `no_paths`."""
    if WHOLE_PATH.match(text):
        return _end(text)
    return no_paths(text)


def in_texts(value, change: Callable[[str], str]):
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [in_texts(one, change) for one in value]
    if isinstance(value, dict):
        return {key: in_texts(one, change) for key, one in value.items()}
    return value


def _last(path: re.Match) -> str:
    return _end(path[0])


def _end(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _written(place: str) -> str:
    """A pattern of how a folder may stand in a text, in JSON and in HTML.

    `/tmp` or `/root` alone say nothing, and are tokens of some language models: only what lies below them counts.
    """
    spellings = {place, json.dumps(place)[1:-1], json.dumps(place, ensure_ascii=False)[1:-1], html.escape(place)}
    below = r"(?=[/\\]+\w)" if len(Path(place).parts) < 3 else ""
    return rf"(?<![\w.])(?:{'|'.join(map(re.escape, sorted(spellings)))})(?![\w.-]){below}"


def hand_on(source: Path, target: Path, run: Path, ours: bool = False) -> None:
    """Copy a file; of a text, paths of this machine become names, and all else stays byte for byte.

    `ours`: all its texts are a run's own words, so that every absolute path in it becomes a name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix not in TEXTS:
        shutil.copyfile(source, target)
        return
    text = by_name(source.read_bytes().decode("utf-8", "surrogateescape"), run)
    if ours:
        text = no_paths(text)
    target.write_bytes(text.encode("utf-8", "surrogateescape"))


def check_clean(folder: Path, run: Path) -> None:
    """Revealing, in a line, for the first file that holds a key, a token, or something of this machine."""
    looked_for = _revealing(run)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = _text(file)
        for what, pattern in looked_for:
            if pattern.search(text):
                raise Revealing(f"{file.relative_to(folder)} holds {what}: nothing is written\n"
                                "take it out where it came from, and start again")


def check_contexts(dashboards: dict[str, dict], board: dict, run: Path) -> None:
    """Revealing, in a line, for the first of some dashboards of a board in a context of which the tokens, joined, hold
    what `check_clean` looks for: a key is split over several tokens, and in no file as a whole.
    """
    looked_for, vocab = _revealing(run), board["vocab"]
    for feature, dashboard in dashboards.items():
        contexts = [context["tokens"] for group in dashboard["groups"] for context in group["contexts"]]
        text = "\n".join("".join(vocab[number] for number in tokens) for tokens in contexts)
        what = next((what for what, pattern in looked_for if pattern.search(text)), None)
        if what:
            raise Revealing(f"a context of feature {feature} in features/{board['sae']}.json.gz holds {what}: nothing "
                            "is written\nremove that file from the run to do without its dashboards")


def _revealing(run: Path) -> list[tuple[str, re.Pattern]]:
    """(what, how it is found) of all that may not be handed on; user and host only where they stand for one."""
    found = [("a key, token or password", SECRETS)]
    for name, value in os.environ.items():
        if NAMED_SECRET.search(name.upper()) and len(value) >= 12:
            found.append((f"the value of the environment variable {name}", re.compile(re.escape(value))))
    for place in places(run):
        found.append(("the path of a folder of this machine", re.compile(_written(place))))
    user, host = _user(), socket.gethostname()
    if user:  # a plain word may be a token of the language model: it counts in a path or an address
        found.append(("a user's name", re.compile(rf"/(?:home|Users)/{re.escape(user)}\b|\b{re.escape(user)}@")))
    if host and host != "localhost":
        plain = re.fullmatch(r"[A-Za-z]+", host)
        pattern = rf"@{re.escape(host)}\b" if plain else rf"(?<![\w-]){re.escape(host)}(?![\w-])"
        found.append(("the name of this machine", re.compile(pattern)))
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in a container
        return ""


def _text(file: Path) -> str:
    """What a file says: of weights their header, of what is compressed or in a page in base64 its content."""
    if file.suffix == ".safetensors":
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            return opened.read(min(length, HEADER)).decode("utf-8", "replace")
    data = file.read_bytes()
    if file.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode("utf-8", "replace")
    return BASE64.sub(_unpacked, text) if file.suffix == ".html" else text


def _unpacked(found: re.Match) -> str:
    try:
        data = b64decode(found[1], validate=True)
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (binascii.Error, OSError, EOFError, zlib.error):  # it only looked like it
        return found[0]
    return data.decode("utf-8", "replace")
