"""Which files a name of texts stands for, of the hub or local ones: their split, their format, what they hold.

What a name means is told by `datasets`' own rules, from the names of files and a repository's card alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from evals.storage import network
from evals.storage.identity import file_digest, files_digest

# {suffix: the reader of `datasets`}
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
           ".arrow": "arrow", ".txt": "text"}
CODECS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4", ".zst": "zstd", ".zstd": "zstd"}
PACKAGES = {"lz4": "lz4", "zstd": "zstandard"}  # that a codec needs
# goes into the keys of what is kept: raise it when a name comes to mean other files, or rows other documents
VERSION = 1
HEAD = 1 << 20  # bytes by which the sort of a file is told
CARDS = {"README.md", "dataset_infos.json", ".huggingface.yaml"}  # that say something of a repository's other files
CONVERTED = "refs/convert/parquet"  # where the hub keeps a copy of data sets with a loading script

# ------------------------------------------------------------------------------------------------ names


class Named(NamedTuple):
    """A data set of the hub: owner/name, owner/name:config, owner/name:config:split."""

    repository: str
    config: str | None
    split: str


def local_path(name: str) -> Path | None:
    """The path that a name means; None for a name on the hub. FileNotFoundError for a path where nothing is."""
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve() if path.is_dir() else path.absolute()  # the hub's cache has links to files without suffix
    if is_path(name):
        raise FileNotFoundError(f"no file or folder {name}\n"
                                f"give an existing {', '.join(FORMATS)} file, a folder of them, "
                                "or the name of a data set on the hub")
    return None


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub's are `owner/name` or `name`."""
    repository = name.split(":")[0]
    of_windows = re.match(r"[A-Za-z]:[\\/]", name)
    return bool(name.startswith((".", "~", "/")) or of_windows or repository.count("/") > 1
                or suffix_of(repository) in FORMATS)


def on_hub(name: str) -> Named:
    """The parts of a hub name; ValueError for too many."""
    repository, config, split, *more = [*name.split(":"), "", ""]
    if any(more):
        raise ValueError(f"{name} is no name of a data set\n"
                         "write owner/name, owner/name:config or owner/name:config:split")
    return Named(repository, config or None, split or "train")


def suffix_of(file: str) -> str:
    """The suffix that tells a file's format, in lower case, without that of its compression."""
    suffixes = [s.lower() for s in PurePosixPath(file).suffixes]
    return next((s for s in reversed(suffixes) if s not in CODECS), "")


# ------------------------------------------------------------------------------------------------ files of a split


class Found(NamedTuple):
    """The files that a name stands for, and how they are read."""

    name: str
    files: list[str]  # absolute paths, or hf:// addresses at a commit
    module: str  # the reader of `datasets`: json, text, csv, parquet, …
    options: dict  # of that reader
    left_out: list[str]  # the other splits
    size: int | None  # bytes of the files as they lie there
    local: bool


def found(name: str, cache_dir: Path | None = None) -> Found:
    """The files of the train split (or the one named). OSError or ValueError in words for what is not there."""
    path = local_path(name)
    of = _on_disk(name, path) if path else _remote(name, cache_dir)
    for file in of.files:
        _check_codec(file)
    return of


def _check_codec(file: str) -> None:
    from fsspec.compression import available_compressions

    codec = CODECS.get(PurePosixPath(file).suffix.lower())
    if codec and codec not in available_compressions():
        raise ValueError(f"reading {file} needs the package {PACKAGES.get(codec, codec)}\n"
                         f"pip install {PACKAGES.get(codec, codec)}")


def check_end(file: str) -> None:
    """ValueError for a .zst file that was cut off: its reader takes what there is for the whole.

    Only the headers of frames and blocks are read (RFC 8878).
    """
    if PurePosixPath(file).suffix.lower() not in (".zst", ".zstd"):
        return
    size, at = Path(file).stat().st_size, 0
    with open(file, "rb") as stream:
        def number(n: int) -> int:
            return int.from_bytes(stream.read(n), "little")

        while at < size:
            stream.seek(at)
            magic = number(4)
            if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame to be skipped
                at += 8 + number(4)
                continue
            about = number(1)
            single, checksum = about >> 5 & 1, about >> 2 & 1
            at += 5 + (not single) + (0, 1, 2, 4)[about & 3] + (single, 2, 4, 8)[about >> 6]
            last = magic != 0xFD2FB528
            while not last and at < size:
                stream.seek(at)
                block = number(3)
                last = block & 1
                at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            at += 4 * checksum
            if not last or at > size:
                raise ValueError(f"{file} is cut off or no zstd file ({size:,} bytes)\ncopy it again")


def check_encoding(file: str) -> None:
    """ValueError for a text that is not UTF-8, by its first MiB; some stray bytes are read as �."""
    import fsspec

    codec = CODECS.get(PurePosixPath(file).suffix.lower())
    try:
        with fsspec.open(file, "rb", compression=codec) as stream:
            head = stream.read(HEAD)
    except Exception as error:  # noqa: BLE001  each codec raises its own
        what = f"damaged or no {codec} file" if codec else "not to be read"
        raise ValueError(f"{file} is {what}: {network.first_line(error)}\n"
                         "copy it again, or check its suffix") from error
    stray = head.decode("utf-8", "replace").count("\ufffd") - head.count("\ufffd".encode())
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) > len(head) // 10:
        raise ValueError(f"{file} is UTF-16 or binary, not UTF-8\nconvert it: iconv -f UTF-16 -t UTF-8")
    if stray > 2 + len(head) // 2000:
        raise ValueError(f"{file} is not UTF-8: {stray:,} bytes of its first {len(head):,} stand for nothing\n"
                         "convert it: iconv -f ISO-8859-1 -t UTF-8, or from what it is")


def local_files(name: str) -> list[Path]:
    """The files of the train split that a local path stands for, in order; [] if it can only be a hub name.

    FileNotFoundError for a path where nothing is, ValueError for a folder without readable files or with several
    formats.
    """
    path = local_path(name)
    return [Path(file) for file in _on_disk(name, path).files] if path else []


def _on_disk(name: str, path: Path) -> Found:
    if not path.is_dir():
        splits, module, options = {"train": [str(path)]}, None, {}
    elif (path / "dataset_dict.json").exists():  # written by DatasetDict.save_to_disk
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        splits, module, options = {split: _saved(path / split) for split in names}, "arrow", {}
    elif (path / "state.json").exists() and (path / "dataset_info.json").exists():
        splits, module, options = {"train": _saved(path)}, "arrow", {}
    elif _has_card(path):
        splits, module, options = _of_copy(path)
    else:
        splits, module, options = _by_name(path), None, {}
    files = _of_split(name, splits, "train", "give a folder that holds only the files to read")
    if not module:
        files = sorted(files, key=Path)
        suffixes = {suffix_of(file) for file in files}
        modules = {FORMATS.get(suffix) for suffix in suffixes}
        if len(modules) != 1 or None in modules:
            raise ValueError(f"{name} holds {', '.join(sorted(suffixes)) or 'no'} text files\n"
                             f"give one format: {', '.join(FORMATS)}")
        module = modules.pop()
    left_out = [split for split, others in splits.items() if split != "train" and others]
    _say_left_out(name, files, left_out)
    return Found(name, files, module, options, left_out, sum(Path(file).stat().st_size for file in files), True)


def _has_card(folder: Path) -> bool:
    """Whether a folder is a copy of a repository of the hub whose card says which files are which."""
    card = folder / "README.md"
    return card.exists() and "configs:" in card.read_text(encoding="utf-8", errors="replace")


def _of_copy(folder: Path) -> tuple[dict[str, list[str]], str, dict]:
    """As `_resolve`, of a copy of a repository of the hub."""
    try:
        return _resolve(str(folder), None)
    except ValueError as error:
        raise ValueError(f"{folder}: {network.first_line(error)}\n"
                         "give the folder of one configuration, or its files") from error


def _saved(folder: Path) -> list[str]:
    """The Arrow files of a folder written by Dataset.save_to_disk; others beside them are only its caches."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [str(folder / file["filename"]) for file in state["_data_files"]]


def _by_name(folder: Path) -> dict[str, list[str]]:
    """{split: files in one of FORMATS} of a folder, by what `datasets` reads from the names of files and folders."""
    from glob import escape

    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    def files(pattern: str) -> list[str]:
        try:
            return [file for file in resolve_pattern(pattern, base_path=escape(str(folder)))
                    if suffix_of(file) in FORMATS]
        except FileNotFoundError:
            return []

    try:
        patterns = get_data_patterns(escape(str(folder)))
    except EmptyDatasetError:
        patterns = {"train": []}
    splits = {str(split): list(dict.fromkeys(itertools.chain.from_iterable(map(files, of_split))))
              for split, of_split in patterns.items()}
    walked = (os.path.join(place, file) for place, _, names in os.walk(folder, followlinks=True) for file in names)
    there = sorted(file for file in walked if suffix_of(file) in FORMATS)
    taken = {os.path.realpath(file) for of_split in splits.values() for file in of_split}
    others = [file for file in there if os.path.realpath(file) not in taken and not _is_hidden(file, folder)]
    if others:
        more = ", …" if len(others) > 1 else ""
        splits[f"no split ({os.path.relpath(others[0], folder)}{more})"] = others
    return splits


def _is_hidden(file: str, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in Path(file).relative_to(folder).parts)


def _of_split(name: str, splits: dict[str, list[str]], split: str, advice: str) -> list[str]:
    if split not in splits:
        raise ValueError(f"{name} has no {split} split; its splits: {', '.join(splits)}\n{advice}")
    return splits[split]


@functools.cache
def _say(line: str) -> None:
    """Print a line once a process."""
    print(line, flush=True)


def _say_left_out(name: str, files: list[str], left_out: list[str]) -> None:
    if left_out and files:
        number = "1 file" if len(files) == 1 else f"{len(files)} files"
        _say(f"texts: {name}: {number} of the train split ({PurePosixPath(files[0]).name}…), left out: "
             f"{', '.join(left_out)}")


def _remote(name: str, cache_dir: Path | None) -> Found:
    repository, config, split = on_hub(name)
    splits, module, options, sizes = resolved(repository, config, cache_dir)
    files = _of_split(name, splits, split,
                      f"write for example {repository}:{config or ''}:{next(iter(splits), 'test')}")
    left_out = [other for other in splits if other != split]
    if split == "train":
        _say_left_out(name, files, left_out)
    size = sum(sizes.get(file, 0) for file in files) if sizes else None
    return Found(name, files, module, options, left_out, size, False)


_resolved: dict[tuple, list] = {}


def resolved(repository: str, config: str | None, cache_dir: Path | None = None) -> list:
    """[{split: files}, reader, its options, {file: bytes}] of a hub's data set at its pinned commit; asked once."""
    key = repository, config, network.commit("dataset", repository)
    if key not in _resolved:
        _resolved[key] = network.kept(cache_dir, "files", {"files": key, "version": VERSION},
                                      lambda: asked(repository, config, lambda: _resolve_on_hub(*key)))
    return _resolved[key]


def _resolve_on_hub(repository: str, config: str | None, commit: str) -> list:
    try:
        return _by_names(repository, config, commit)
    except (RuntimeError, ValueError) as error:
        if not is_script(error):
            raise
        return _by_names(repository, config, converted(repository))


def _by_names(repository: str, config: str | None, commit: str) -> list:
    """As `resolved`: what `datasets` makes of a folder with the repository's card and its other files, empty.

    Asked itself, it sends some fifteen requests for each configuration; like this it is three for the repository.
    """
    import tempfile

    listed = network.listing("dataset", repository, commit)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / PurePosixPath(repository).name
        for file in listed:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        for card in CARDS & set(listed):
            (folder / card).write_bytes(network.content("dataset", repository, commit, card))
        splits, module, options = _resolve(str(folder), config)

    def inside(file: str) -> str:
        return PurePosixPath(Path(file).relative_to(folder)).as_posix()

    base = f"hf://datasets/{repository}@{commit}/"
    return [{split: [base + inside(file) for file in files] for split, files in splits.items()}, module, options,
            {base + file: size for file, size in listed.items()}]


def is_script(error: Exception) -> bool:
    """Whether `datasets` refuses a loading script, which it runs no more; the hub keeps converted copies of these."""
    return "scripts are no longer" in str(error) or "trust_remote_code" in str(error)


def converted(repository: str) -> str:
    """The commit of the hub's converted copy of a data set, pinned as network.commit pins that of the main branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    key = "dataset", f"{repository}@{CONVERTED}"
    if key not in network.PINNED:
        try:
            network.PINNED[key] = HfApi().dataset_info(repository, revision=CONVERTED).sha
        except RevisionNotFoundError as error:
            raise Refused(f"{repository} has a loading script, which `datasets` runs no more, "
                          "and the hub no converted copy of it\n"
                          "give another data set, or its files: a local folder of them") from error
    return network.PINNED[key]


def _resolve(folder: str, config: str | None) -> tuple[dict[str, list[str]], str, dict]:
    """({split: files}, reader, its options) of a repository's copy on disk, by the rules of `datasets`."""
    import dataclasses

    import datasets

    builder = datasets.load_dataset_builder(folder, config)
    about = {"name", "version", "data_dir", "data_files", "description"}
    fields = [f for f in dataclasses.fields(builder.config) if f.name not in about]
    changed = {f.name: getattr(builder.config, f.name) for f in fields
               if getattr(builder.config, f.name) != f.default}
    options = {key: value for key, value in changed.items() if isinstance(value, str | int | float)}
    splits = {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}
    return splits, type(builder).__module__.rsplit(".", 1)[-1], options


@contextlib.contextmanager
def patient(what: str, after: float = 5.0) -> Iterator[None]:
    """Say once what is being done within, if it takes longer than `after` seconds."""
    timer = threading.Timer(after, lambda: print(what, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Refused(OSError):
    """Why a data set of the hub cannot be read, in words."""


def asked(repository: str, config: str | None, work: Callable[[], Any]) -> Any:
    """work(), with patience for what may pass; its failure in words, as `refused` has them."""
    from huggingface_hub import constants

    def attempt() -> tuple[Any, Refused | None]:
        try:
            return work(), None
        except Refused as error:  # there has been patience enough
            return None, error

    try:
        value, problem = attempt() if constants.HF_HUB_OFFLINE else network.patiently(f"hub, {repository}", attempt)
    except Exception as error:  # noqa: BLE001  many kinds of network, access and format errors
        raise refused(error, repository, config) from error
    if problem:
        raise problem
    return value


def refused(error: Exception, repository: str, config: str | None = None) -> Exception:
    """What to raise for an error of the hub's libraries, in words ("what\\nwhat to do"); a ValueError stays one."""
    from huggingface_hub import constants

    listed = re.search(r"(?:Available|available configs): \[(.*?)\]", str(error))
    if isinstance(error, ValueError) and listed:
        names = re.findall(r"'([^']*)'", listed[1])
        what = f"has no configuration {config!r}" if config else "has several configurations"
        return ValueError(f"{repository} {what}\n"
                          f"write for example {repository}:{names[0]}; there are {', '.join(names)}")
    offline = any("OfflineMode" in type(e).__name__ for e in network.chain(error))
    if offline or network.status(error) or network.passing(error):
        return Refused(network.refusal(error, "dataset", repository, offline=constants.HF_HUB_OFFLINE))
    if isinstance(error, ValueError):
        return error
    return Refused(f"cannot read the data set {repository}: {network.first_line(error)}\n"
                   f"check its name and files, {network.NO_HUB}")


def identity(name: str) -> list[str]:
    """What cache keys and cursors know of texts: the hash of local files, or a hub data set's commit (or OSError)."""
    path = local_path(name)
    if not path:
        return [name, network.commit("dataset", on_hub(name).repository)]
    of = _on_disk(name, path)
    if not of.files:
        raise ValueError(f"{name} holds no text files\ngive one format: {', '.join(FORMATS)}")
    if of.size > 4e9:
        _say(f"texts: {name}: hashing {of.size / 1e9:.0f} GB, by which a cursor knows them")
    return [of.module, files_digest(of.files, path) if path.is_dir() else file_digest(path)]


@functools.cache
def shared(one: str, other: str, cache_dir: Path | None = None) -> str:
    """How two names' texts overlap, by content: "all", "none", or the name of a file that both have."""
    if one == other:
        return "all"
    local = [bool(local_path(name)) for name in (one, other)]
    if local[0] != local[1] or not (local[0] or on_hub(one).repository == on_hub(other).repository):
        return "none"
    sides = [set(map(file_digest, local_files(name))) if local[0] else set(found(name, cache_dir).files)
             for name in (one, other)]
    if sides[0] == sides[1]:
        return "all"
    both = sides[0] & sides[1]
    if local[0]:
        return next((str(file) for file in local_files(one) if file_digest(file) in both), "none")
    return min(both, default="none")
