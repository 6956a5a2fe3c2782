"""Documents one after the other, of a data set on the hub or of local files; a place in them can be kept and gone back to.

A document is a text, or a list of token ids where the column holds those. Rows are read by `datasets`, JSON line by line, since its
own JSON reader stops at the first row of another type. What comes from the hub is kept in segments, so that it is read once.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from evals import network
from evals.cache import Cache
from evals.identity import file_digest, files_digest

Document = str | list[int]

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
           ".arrow": "arrow", ".txt": "text"}  # suffix: the reader of `datasets`
CODECS = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4", ".zst": "zstd", ".zstd": "zstd"}
PACKAGES = {"lz4": "lz4", "zstd": "zstandard"}  # that a codec needs
SEED = 42  # SAEBench's, for the order of shards
FIRST_ROWS, MOST_ROWS = 64, 1024  # of a segment: the first is read to see whether it can be, a long run has few of them
KEPT_GB = 4.0  # most of what is kept of the hub's texts
VERSION = 1  # goes into the keys of what is kept: raise it when rows become other documents
OF_NO_ROWS = ("BatchSize must be greater than 0, got 0", "No columns to parse from file")  # what readers say of a file without rows
LOOKED_AT = 1000  # rows that must hold a text, or the column is the wrong one
HEAD = 1 << 20  # characters by which the sort of a file is told
CARDS = {"README.md", "dataset_infos.json", ".huggingface.yaml"}  # files of a repository that say something of its others
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
        return path.resolve() if path.is_dir() else path.absolute()  # a file of the hub's cache is a link to one without a suffix
    if is_path(name):
        raise FileNotFoundError(f"no file or folder {name}\ngive an existing {', '.join(FORMATS)} file, a folder of them, "
                                "or the name of a data set on the hub")
    return None


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: the hub's are `owner/name` or `name`."""
    repository = name.split(":")[0]
    return name.startswith((".", "~", "/")) or bool(re.match(r"[A-Za-z]:[\\/]", name)) or repository.count("/") > 1 \
        or suffix_of(repository) in FORMATS


def on_hub(name: str) -> Named:
    """The parts of a hub name; ValueError for too many."""
    repository, config, split, *more = [*name.split(":"), "", ""]
    if any(more):
        raise ValueError(f"{name} is no name of a data set\nwrite owner/name, owner/name:config or owner/name:config:split")
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
        raise ValueError(f"reading {file} needs the package {PACKAGES.get(codec, codec)}\npip install {PACKAGES.get(codec, codec)}")


def _check_end(file: str) -> None:
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
            at += 5 + (not single) + (0, 1, 2, 4)[about & 3] + ((1 if single else 0), 2, 4, 8)[about >> 6]
            last = magic != 0xFD2FB528
            while not last and at < size:
                stream.seek(at)
                block = number(3)
                last = block & 1
                at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            at += 4 * checksum
            if not last or at > size:
                raise ValueError(f"{file} is cut off or no zstd file ({size:,} bytes)\ncopy it again")


def _check_encoding(file: str) -> None:
    """ValueError for a text that is not UTF-8, by its first MiB; some stray bytes are read as �."""
    import fsspec

    with fsspec.open(file, "rb", compression=CODECS.get(PurePosixPath(file).suffix.lower())) as stream:
        head = stream.read(HEAD)
    stray = head.decode("utf-8", "replace").count("\ufffd") - head.count("\ufffd".encode())
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) > len(head) // 10:
        raise ValueError(f"{file} is UTF-16 or binary, not UTF-8\nconvert it: iconv -f UTF-16 -t UTF-8")
    if stray > 2 + len(head) // 2000:
        raise ValueError(f"{file} is not UTF-8: {stray:,} bytes of its first {len(head):,} stand for nothing\n"
                         "convert it: iconv -f ISO-8859-1 -t UTF-8, or from what it is")


def local_files(name: str) -> list[Path]:
    """The files of the train split that a local path stands for, in order; [] if it can only be a hub name.

    FileNotFoundError for a path where nothing is, ValueError for a folder without readable files or with several formats.
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
    elif (path / "README.md").exists() and "configs:" in (path / "README.md").read_text(encoding="utf-8", errors="replace"):
        splits, module, options = _of_copy(path)
    else:
        splits, module, options = _by_name(path), None, {}
    files = _of_split(name, splits, "train", "give a folder that holds only the files to read")
    if not module:
        files = sorted(files, key=Path)
        suffixes = {suffix_of(file) for file in files}
        modules = {FORMATS.get(suffix) for suffix in suffixes}
        if len(modules) != 1 or None in modules:
            raise ValueError(f"{name} holds {', '.join(sorted(suffixes)) or 'no'} text files\ngive one format: {', '.join(FORMATS)}")
        module = modules.pop()
    left_out = [split for split, others in splits.items() if split != "train" and others]
    _say_left_out(name, files, left_out)
    return Found(name, files, module, options, left_out, sum(Path(file).stat().st_size for file in files), True)


def _of_copy(folder: Path) -> tuple[dict[str, list[str]], str, dict]:
    """As `_resolve`, of a copy of a repository of the hub."""
    try:
        return _resolve(str(folder), None)
    except ValueError as error:
        raise ValueError(f"{folder}: {network.first_line(error)}\ngive the folder of one configuration, or its files") from error


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
            return [file for file in resolve_pattern(pattern, base_path=escape(str(folder))) if suffix_of(file) in FORMATS]
        except FileNotFoundError:
            return []

    try:
        patterns = get_data_patterns(escape(str(folder)))
    except EmptyDatasetError:
        patterns = {"train": []}
    splits = {str(split): list(dict.fromkeys(itertools.chain.from_iterable(map(files, of_split)))) for split, of_split in patterns.items()}
    walked = (os.path.join(place, file) for place, _, names in os.walk(folder, followlinks=True) for file in names)
    there = sorted(file for file in walked if suffix_of(file) in FORMATS)
    taken = {os.path.realpath(file) for of_split in splits.values() for file in of_split}
    if others := [file for file in there if os.path.realpath(file) not in taken and not _is_hidden(file, folder)]:
        return splits | {f"no split ({os.path.relpath(others[0], folder)}{', …' if len(others) > 1 else ''})": others}
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
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        _say(f"texts: {name}: {number} of the train split ({PurePosixPath(files[0]).name}…), left out: {', '.join(left_out)}")


def _remote(name: str, cache_dir: Path | None) -> Found:
    repository, config, split = on_hub(name)
    splits, module, options, sizes = resolved(repository, config, cache_dir)
    files = _of_split(name, splits, split, f"write for example {repository}:{config or ''}:{next(iter(splits), 'test')}")
    left_out = [other for other in splits if other != split]
    if split == "train":
        _say_left_out(name, files, left_out)
    size = sum(sizes.get(file, 0) for file in files) if sizes else None
    return Found(name, files, module, options, left_out, size, False)


_resolved: dict[tuple, list] = {}


def resolved(repository: str, config: str | None, cache_dir: Path | None = None) -> list:
    """[{split: files}, reader, its options, {file: bytes}] of a data set of the hub at its pinned commit; asked once, then kept."""
    key = repository, config, network.commit("dataset", repository)

    if key not in _resolved:
        _resolved[key] = kept(cache_dir, "files", {"files": key, "version": VERSION},
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
    """As `resolved`: what `datasets` makes of a folder with the repository's card and, empty, its other files, whose names tell splits.

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
    """Whether `datasets` refuses a loading script, which it runs no more; the hub keeps a converted copy of such data sets."""
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
            raise Refused(f"{repository} has a loading script, which `datasets` runs no more, and the hub no converted copy of it\n"
                          "give another data set, or its files: a local folder of them") from error
    return network.PINNED[key]


def _resolve(folder: str, config: str | None) -> tuple[dict[str, list[str]], str, dict]:
    """({split: files}, reader, its options) of a repository's copy on disk, by the rules of `datasets`."""
    import dataclasses

    import datasets

    builder = datasets.load_dataset_builder(folder, config)
    about = {"name", "version", "data_dir", "data_files", "description"}
    options = {f.name: getattr(builder.config, f.name) for f in dataclasses.fields(builder.config) if f.name not in about}
    default = {f.name: f.default for f in dataclasses.fields(builder.config)}
    options = {key: value for key, value in options.items() if value != default[key] and isinstance(value, str | int | float)}
    return ({str(split): list(map(str, files)) for split, files in builder.config.data_files.items()},
            type(builder).__module__.rsplit(".", 1)[-1], options)


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
    """What to raise for an error of the hub's libraries, in words ("what\\nwhat to do"); one that is a ValueError stays one."""
    from huggingface_hub import constants

    said = str(error)
    if isinstance(error, ValueError) and (listed := re.search(r"(?:Available|available configs): \[(.*?)\]", said)):
        names = re.findall(r"'([^']*)'", listed[1])
        what = f"has no configuration {config!r}" if config else "has several configurations"
        return ValueError(f"{repository} {what}\nwrite for example {repository}:{names[0]}; there are {', '.join(names)}")
    if network.status(error) or network.passing(error) or any("OfflineMode" in type(e).__name__ for e in network.chain(error)):
        return Refused(network.refusal(error, "dataset", repository, offline=constants.HF_HUB_OFFLINE))
    if isinstance(error, ValueError):
        return error
    return Refused(f"cannot read the data set {repository}: {network.first_line(error)}\n"
                   f"check its name and files, {network.NO_HUB}")


def identity(name: str) -> list[str]:
    """What cache keys and cursors know of texts: the hash of local files' bytes, or a hub data set's commit; OSError if not to be had."""
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
def shared(one: str, other: str) -> str:
    """How two names' texts overlap: "all", "none", or the name of a file that both have; by content, whatever the names."""
    if one == other:
        return "all"
    if bool(local_path(one)) != bool(local_path(other)):
        return "none"
    sides = [set(map(file_digest, local_files(name))) if local_path(name) else set(found(name).files) for name in (one, other)]
    if sides[0] == sides[1]:
        return "all"
    both = sides[0] & sides[1]
    named = (file for file in map(str, local_files(one)) if file_digest(file) in both) if local_path(one) else iter(sorted(both))
    return next(named, "none")


# ------------------------------------------------------------------------------------------------ rows


BEGIN = {"shard": 0, "rows": None}  # the state of files: which of them, and the position in it by `datasets`
BEGIN_SEGMENTS = {"segment": 0, "row": 0, "source": None}  # of segments: which, documents of it handed out, where its rows begin


class Rows:
    """Rows of files as `datasets` reads them, from a state on; a line that is no JSON object is None.

    Files come in the order that SAEBench's core uses, a shuffle of their numbers by seed 42, or in their own; rows keep their order
    within a file. (`IterableDataset.shuffle` cannot stand in: its buffer is lost on resuming, and since datasets 5 it mixes rows of
    several files.)
    """

    def __init__(self, of: Found, state: dict | None = None, shuffled: bool = True):
        self.of, self._state = of, state or BEGIN
        self._open = None  # the file being read
        self._rows = self._walk(shuffled)

    def __iter__(self) -> Rows:
        return self

    def __next__(self) -> dict | None:
        return next(self._rows)

    def state(self) -> dict:
        """What follows the last row, as JSON-able values: a file's place and the position in it by `datasets`."""
        return self._state if self._open is None else {**self._state, "rows": self._open.state_dict()}

    def _walk(self, shuffled: bool) -> Iterator[dict | None]:
        import numpy as np

        order = list(range(len(self.of.files)))
        if shuffled:
            np.random.default_rng(SEED).shuffle(order)
        start, rows = self._state["shard"], self._state["rows"]
        for place in range(start, len(order)):
            file = self.of.files[order[place]]
            try:
                opened = open_file(network.nearby(file), self.of.module, self.of.options)
                if place == start and rows:
                    opened.load_state_dict(rows)
                self._state, self._open = {"shard": place, "rows": None}, opened
                for row in opened:
                    if self.of.module not in ("json", "text"):
                        yield row
                    elif not row["text"].isspace() and row["text"]:  # a blank line is no row
                        yield _parsed(row["text"]) if self.of.module == "json" else row
            except Exception as error:  # noqa: BLE001  each reader raises its own
                if any(words in str(error) for words in OF_NO_ROWS):
                    continue
                if not self.of.local and isinstance(error, FileNotFoundError):  # it stands in the list: what failed is a request
                    raise ConnectionError(f"{file} could not be opened: {network.first_line(error)}") from None
                if not self.of.local:
                    raise
                raise OSError(f"cannot read {file}: {network.first_line(error)}\ncheck that file") from error


def _parsed(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def open_file(file: str, module: str, options: dict):
    """`datasets.IterableDataset` of a file's rows; JSON and texts come as {"text": a line or a document}."""
    import datasets

    lines = {"encoding": "utf-8-sig", "encoding_errors": "replace", "chunksize": HEAD}
    if module == "text":
        return _reader("text", file, **lines, **({} if _a_document_a_line(file, lines) else {"sample_by": "paragraph"}))
    if module == "json":
        if suffix_of(file) != ".json" and "field" not in options or _is_lines(file, lines):
            return _reader("text", file, **lines)
        whole = _reader("text", file, **lines, sample_by="document")
        return whole.map(functools.partial(_items, options.get("field")), batched=True, batch_size=1)
    if module == "csv":  # a row with too many fields is left out
        tabs = {"sep": "\t"} if suffix_of(file) == ".tsv" else {}
        options = {"on_bad_lines": "skip", "encoding_errors": "replace", "keep_default_na": False, **tabs, **options}
        names = [] if {"header", "names", "column_names"} & set(options) else _header(file, options)
        if names and len(set(names)) == len(names):  # all as strings: pandas tells types part by part, and cannot join several
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
    return _reader(module, file, **options)


def _header(file: str, options: dict) -> list[str]:
    """The columns of a table as pandas names them."""
    first = next(iter(_reader("csv", file, **options, header=None, nrows=1)), {})
    return [f"Unnamed: {i}" if name in (None, "") else str(name) for i, name in enumerate(first.values())]


def _reader(module: str, file: str, **options):
    """One file through a reader of `datasets`; load_dataset itself would take brackets in its name for a pattern, and ask the hub."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.load import import_main_class

    # `datasets` reads on after a broken connection, but what a half-read buffer held is then lost: here a file is opened anew instead
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for wait in ("RETRY", "SERVER_UNAVAILABLE_RETRY", "RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_READ_{wait}_INTERVAL", 0)
    kind = import_main_class(f"datasets.packaged_modules.{module}.{module}")
    return kind(data_files=DataFilesDict({"train": DataFilesList([file], [()])}), **options).as_streaming_dataset(split="train")


def _head(file: str, lines: dict) -> str:
    """About the first 1 MiB of a file, in whole lines."""
    taken, size = [], 0
    for row in _reader("text", file, **lines):
        taken.append(row["text"])
        size += len(row["text"]) + 1
        if size >= HEAD:
            break
    return "\n".join(taken).strip("\n")


def _a_document_a_line(file: str, lines: dict) -> bool:
    return "\n\n" not in _head(file, lines)


def _is_lines(file: str, lines: dict) -> bool:
    """Whether a file holds a JSON object a line, and not one value over many lines."""
    first = _head(file, lines).lstrip().split("\n", 1)[0]
    return _parsed(first) is not None


def _items(field: str | None, batch: dict) -> dict:
    """The items of a JSON file as lines."""
    lines = []
    for text in batch["text"]:
        try:
            value = json.loads(text)
            value = value[field] if field else value
        except (ValueError, KeyError, TypeError, RecursionError):
            value = None
        lines += map(json.dumps, value if isinstance(value, list) else [value])
    return {"text": lines}


# ------------------------------------------------------------------------------------------------ documents


def document(row: dict | None, field: str) -> tuple[Document | None, str | None]:
    """A row's document, or None and why it has none."""
    if row is None:
        return None, "not JSON"
    if field not in row:
        return None, "missing"
    value = row[field]
    if value is None:
        return None, "null"
    if isinstance(value, list):
        return (value, None) if _are_ids(value) else (None, "empty" if not value else "not text")
    if not isinstance(value, str):
        return None, "not text"
    if not value or value.isspace():
        return None, "empty"
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of UTF-16, which JSON can spell
        return None, "lone surrogate"
    return value, None


def _are_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def columns_of(rows: Iterable[dict | None]) -> list[str]:
    """The columns that hold text, or token ids, in some of the rows."""
    return list(dict.fromkeys(key for row in rows if row for key, value in row.items() if isinstance(value, str) or _are_ids(value)))


def sifted(rows: Iterable[dict | None], of: Found, field: str, skipped: dict[str, int], check: bool) -> Iterator[Document]:
    """The documents of rows; others are counted in `skipped` by what is wrong. ValueError if `check` finds no text in the first 1,000."""
    seen: list | None = [] if check else None  # rows without text so far
    for row in rows:
        value, reason = document(row, field)
        if seen is not None:
            seen.append(row)
            if reason in (None, "empty", "lone surrogate"):
                seen = None
            elif len(seen) == LOOKED_AT:
                raise _no_text(of, field, seen)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            yield value
    if seen:
        raise _no_text(of, field, seen)


def _no_text(of: Found, field: str, rows: list) -> ValueError:
    columns = ", ".join(name if len(name) < 40 else f"{name[:37]}…" for name in columns_of(rows))
    if not columns and of.module == "json" and not any(rows):
        return ValueError(f"{of.name} holds no JSON objects, one a line or in an array\nwrite each document as {{\"text\": \"…\"}}")
    seen = "; ".join(f"{key}: {type(value).__name__}" for key, value in next(filter(None, rows), {}).items())
    return ValueError(f"{of.name} has no text in the column {field!r}\n"
                      f"give --text_field; columns with text: {columns or f'none ({seen[:200]})'}")


def rows_of(segment: int) -> int:
    """Rows of the hub's texts that are kept together."""
    return min(FIRST_ROWS * 2**min(segment, 10), MOST_ROWS)


class Stream:
    """The documents of a hub data set's split, or of local files, that `keep` accepts; resumable to the document.

    `skipped` counts the rows without a document by what is wrong with them. With a `cache_dir`, what is read from the hub is kept.
    ValueError for a column that never holds text, and for a state of other texts than these.
    """

    def __init__(self, name: str, text_field: str = "text", keep: Callable[[Document], bool] | None = None, state: dict | None = None,
                 cache_dir: Path | None = None, shuffled: bool = True):
        self.name, self.text_field, self.keep, self.cache_dir, self.shuffled = name, text_field, keep, cache_dir, shuffled
        self.skipped: dict[str, int] = {}
        self.of = identity(name)
        if state and state.get("of") != self.of:
            raise ValueError(f"the texts of {name} are not those that this run began with\n"
                             "give them as they were, or give another --out_dir to begin anew")
        self._rows, self._next = None, None  # the source, and the segment that follows in it
        begin, documents = (BEGIN, self._from_files) if local_path(name) else (BEGIN_SEGMENTS, self._from_segments)
        self._place = {key: state[key] for key in begin} if state else begin
        self._documents = documents()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Document:
        return next(self._documents)

    def state(self) -> dict:
        """What follows the last document handed out, as JSON-able values."""
        return {"of": self.of, **self._place} if "segment" in self._place or not self._rows else {"of": self.of, **self._rows.state()}

    def _from_files(self) -> Iterator[Document]:
        of = found(self.name)
        self._rows = Rows(of, self._place, self.shuffled)
        for value in sifted(self._rows, of, self.text_field, self.skipped, check=self._place == BEGIN):
            if self.keep is None or self.keep(value):
                yield value

    def _from_segments(self) -> Iterator[Document]:
        segment = {"end": False}
        while not segment["end"]:
            n, begin, source = self._place["segment"], self._place["row"], self._place["source"]
            segment = self.segment(n, source)
            if not begin:
                for reason, count in segment["skipped"].items():
                    self.skipped[reason] = self.skipped.get(reason, 0) + count
            for row, value in enumerate(segment["rows"][begin:], begin + 1):
                self._place = {"segment": n, "row": row, "source": source}
                if self.keep is None or self.keep(value):
                    yield value
            if not segment["end"]:
                self._place = {"segment": n + 1, "row": 0, "source": segment["after"]}

    def segment(self, n: int, source: dict | None) -> dict:
        """The documents of the n-th segment of rows, read from a state of the source on, or as they were kept:

        {"rows": documents, "skipped": {reason: rows}, "columns": those with text, "after": state of the source, "end": whether all is read}
        """
        depends_on = {"texts": on_hub(self.name), "commit": self.of[1], "field": self.text_field, "shuffled": self.shuffled,
                      "segment": n, "rows": rows_of(n), "version": VERSION}
        return kept(self.cache_dir, "texts", depends_on, lambda: self._read(n, source))

    def _read(self, n: int, source: dict | None) -> dict:
        of = found(self.name, self.cache_dir)

        def work() -> dict:
            if self._next != n:
                self._rows = Rows(of, source, self.shuffled)
            self._next = None  # a source that breaks off is opened anew
            most, skipped = rows_of(n), {}
            rows = list(itertools.islice(self._rows, most))
            if n == 0 and not any(document(row, self.text_field)[0] for row in rows):  # the column may begin with nothing
                most += LOOKED_AT
                rows += itertools.islice(self._rows, LOOKED_AT)
            documents = list(sifted(rows, of, self.text_field, skipped, check=n == 0))
            self._next = n + 1
            return {"rows": documents, "skipped": skipped, "columns": columns_of(rows[:100]), "after": self._rows.state(),
                    "end": len(rows) < most}

        return asked(on_hub(self.name).repository, None, work)


# ------------------------------------------------------------------------------------------------ kept


@functools.cache
def _cache(folder: Path, thread: int) -> Cache:
    return Cache(folder, KEPT_GB)  # one a thread, as its books are not made for two; its files are


def kept(cache_dir: Path | None, kind: str, depends_on: dict, make: Callable[[], Any], repositories: Iterable[str] = ()) -> Any:
    """The JSON-able value that `make()` gives, kept in the cache by what it depends on, the commits of the hub's data sets included."""
    import torch
    import zstandard

    def packed() -> dict:
        raw = json.dumps(make(), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return {"json": torch.frombuffer(bytearray(zstandard.compress(raw)), dtype=torch.uint8)}

    if cache_dir is None:
        return json.loads(json.dumps(make()))
    commits = {"commits": {name: network.commit("dataset", name) for name in repositories}} if repositories else {}
    stored = _cache(Path(cache_dir) / "texts", threading.get_ident()).get(kind, {**depends_on, **commits}, packed)["json"]
    return json.loads(zstandard.decompress(stored.numpy().tobytes()).decode("utf-8", "surrogatepass"))


# ------------------------------------------------------------------------------------------------ a look before the run


class Look(NamedTuple):
    """What the first rows of texts tell."""

    columns: list[str]  # with text or token ids
    pretokenised: bool
    bytes: int | None  # of the split's files as they lie there
    length: int  # of the first document: characters, or tokens where it is pretokenised


def look(name: str, text_field: str = "text", tokenizer_ids: int | None = None, cache_dir: Path | None = None) -> Look:
    """The first rows of texts; ValueError or OSError in words for what would stop a run.

    `tokenizer_ids`: how many ids the tokenizer has; one beyond them means texts tokenised by another one.
    """
    of = found(name, cache_dir)
    if of.local:
        for file in of.files:
            _check_end(file)
        if of.module in ("text", "json", "csv"):
            _check_encoding(of.files[0])
        rows = list(itertools.islice(Rows(of), LOOKED_AT))
        documents, columns = list(sifted(rows, of, text_field, {}, check=True)), columns_of(rows)
    else:
        segment = Stream(name, text_field, cache_dir=cache_dir).segment(0, None)
        documents, columns = segment["rows"], segment["columns"]
    if not documents:
        raise ValueError(f"{name} holds no text in its first rows\ncheck the data set and --text_field")
    pretokenised = isinstance(documents[0], list)
    beyond = max((max(ids) for ids in documents if isinstance(ids, list)), default=0)
    if tokenizer_ids is not None and beyond >= tokenizer_ids:
        raise ValueError(f"{name} holds the token id {beyond}, the model's tokenizer has {tokenizer_ids}\n"
                         "give texts that this tokenizer has tokenised, or a column of text: --text_field")
    return Look(columns, pretokenised, of.size, len(documents[0]))


def enough(documents: Iterable[Document], ids_of: Callable[[list[Document]], list[list[int]]], tokens_needed: int) -> int:
    """min(tokens_needed, tokens of the documents); `ids_of` tokenises a list of them."""
    documents, count = iter(documents), 0
    while count < tokens_needed and (batch := list(itertools.islice(documents, 64))):
        count += sum(map(len, ids_of(batch)))
    return min(count, tokens_needed)
