"""Documents one after the other, of a data set on the hub or of local files, from any place in them that was kept.

A document is a text, or a list of token ids where the column holds those. Rows are read by `datasets`, JSON line by
line, since its own JSON reader stops at the first row of another type. What comes from the hub is kept in segments, so
that it is read once.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from evals.storage import network
from evals.storage.network import kept
from evals.texts import text_files
from evals.texts.text_files import HEAD, VERSION, Found, found, identity, local_path, on_hub, suffix_of

Document = str | list[int]

SEED = 42  # SAEBench's, for the order of shards
FIRST_ROWS, MOST_ROWS = 64, 1024  # of a segment: the first is read to see whether it can be, a long run has few of them
OF_NO_ROWS = ("BatchSize must be greater than 0, got 0", "No columns to parse from file")  # readers of a file without
LOOKED_AT = 1000  # rows that must hold a text, or the column is the wrong one
BEGIN = {"shard": 0, "rows": None}  # the state of files: which of them, and the position in it by `datasets`
# of segments: which, documents of it handed out, where its rows begin
BEGIN_SEGMENTS = {"segment": 0, "row": 0, "source": None}

# ------------------------------------------------------------------------------------------------ rows


class Rows:
    """Rows of files as `datasets` reads them, from a state on; a line that is no JSON object is None.

    Files come in the order that SAEBench's core uses, a shuffle of their numbers by seed 42, or in their own; rows keep
    their order within a file. (`IterableDataset.shuffle` cannot stand in: its buffer is lost on resuming, and since
    datasets 5 it mixes rows of several files.)
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
                if not self.of.local and isinstance(error, FileNotFoundError):  # it is listed: a request failed
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
        if "\n\n" not in _head(file, lines):
            return _reader("text", file, **lines)  # a document a line
        return _reader("text", file, **lines, sample_by="paragraph")
    if module == "json":
        by_name = suffix_of(file) != ".json" and "field" not in options
        if by_name or _is_lines(file, lines):
            return _reader("text", file, **lines)
        whole = _reader("text", file, **lines, sample_by="document")
        return whole.map(functools.partial(_items, options.get("field")), batched=True, batch_size=1)
    if module == "csv":  # a row with too many fields is left out
        tabs = {"sep": "\t"} if suffix_of(file) == ".tsv" else {}
        options = {"on_bad_lines": "skip", "encoding_errors": "replace", "keep_default_na": False, **tabs, **options}
        names = [] if {"header", "names", "column_names"} & set(options) else _header(file, options)
        # all as strings: pandas tells types part by part, and cannot join several
        if names and len(set(names)) == len(names):
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
    return _reader(module, file, **options)


def _header(file: str, options: dict) -> list[str]:
    """The columns of a table as pandas names them."""
    first = next(iter(_reader("csv", file, **options, header=None, nrows=1)), {})
    return [f"Unnamed: {i}" if name in (None, "") else str(name) for i, name in enumerate(first.values())]


def _reader(module: str, file: str, **options):
    """One file through a reader of `datasets`: load_dataset takes brackets for a pattern, and asks the hub."""
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.load import import_main_class

    # `datasets` reads on after a broken connection, but loses what a half-read buffer held: here a file is opened anew
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for wait in ("RETRY", "SERVER_UNAVAILABLE_RETRY", "RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_READ_{wait}_INTERVAL", 0)
    kind = import_main_class(f"datasets.packaged_modules.{module}.{module}")
    files = DataFilesDict({"train": DataFilesList([file], [()])})
    return kind(data_files=files, **options).as_streaming_dataset(split="train")


def _head(file: str, lines: dict) -> str:
    """About the first 1 MiB of a file, in whole lines."""
    taken, size = [], 0
    for row in _reader("text", file, **lines):
        taken.append(row["text"])
        size += len(row["text"]) + 1
        if size >= HEAD:
            break
    return "\n".join(taken).strip("\n")


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
    if _are_ids(value):
        return value, None
    if isinstance(value, list) and not value:
        return None, "empty"
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
    return list(dict.fromkeys(key for row in rows if row for key, value in row.items()
                              if isinstance(value, str) or _are_ids(value)))


def sifted(rows: Iterable[dict | None], of: Found, field: str, skipped: dict[str, int],
           check: bool) -> Iterator[Document]:
    """The documents of rows; others are counted in `skipped` by what is wrong.

    ValueError if `check` finds no text in the first 1,000.
    """
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
        return ValueError(f"{of.name} holds no JSON objects, one a line or in an array\n"
                          'write each document as {"text": "…"}')
    seen = "; ".join(f"{key}: {type(value).__name__}" for key, value in next(filter(None, rows), {}).items())
    there = columns or f"none ({seen[:200]})"
    return ValueError(f"{of.name} has no text in the column {field!r}\n"
                      f"give --text_field; columns with text: {there}")


def rows_of(segment: int) -> int:
    """Rows of the hub's texts that are kept together."""
    return min(FIRST_ROWS * 2**min(segment, 10), MOST_ROWS)


class Stream:
    """The documents of a hub data set's split, or of local files, that `keep` accepts; resumable to the document.

    `skipped` counts the rows without a document by what is wrong with them. With a `cache_dir`, what is read from the
    hub is kept. ValueError for a column that never holds text, and for a state of other texts than these.
    """

    def __init__(self, name: str, text_field: str = "text", keep: Callable[[Document], bool] | None = None,
                 state: dict | None = None, cache_dir: Path | None = None, shuffled: bool = True):
        self.name, self.text_field, self.keep = name, text_field, keep
        self.cache_dir, self.shuffled = cache_dir, shuffled
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
        read_from_files = self._rows and "segment" not in self._place
        return {"of": self.of, **(self._rows.state() if read_from_files else self._place)}

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
        """The documents of the n-th segment of rows, read from a state of the source on, or as they were kept.

        {"rows": documents, "skipped": {reason: rows}, "columns": those with text, "after": the source's state behind
        it, "end": whether all is read}
        """
        depends_on = {"texts": on_hub(self.name), "commit": self.of[1], "field": self.text_field,
                      "shuffled": self.shuffled, "segment": n, "rows": rows_of(n), "version": VERSION}
        return kept(self.cache_dir, "texts", depends_on, lambda: self._read(n, source))

    def _read(self, n: int, source: dict | None) -> dict:
        of = found(self.name, self.cache_dir)

        def work() -> dict:
            if self._next != n:
                self._rows = Rows(of, source, self.shuffled)
            self._next = None  # a source that breaks off is opened anew
            most, skipped = rows_of(n), {}
            rows = list(itertools.islice(self._rows, most))
            if n == 0 and not any(document(row, self.text_field)[0] for row in rows):  # it may begin with nothing
                most += LOOKED_AT
                rows += itertools.islice(self._rows, LOOKED_AT)
            documents = list(sifted(rows, of, self.text_field, skipped, check=n == 0))
            self._next, network.HEARD["last"] = n + 1, "an answer"
            return {"rows": documents, "skipped": skipped, "columns": columns_of(rows[:100]),
                    "after": self._rows.state(), "end": len(rows) < most}

        return text_files.asked(on_hub(self.name).repository, None, work)


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
    if of.local and of.files and not of.size:
        number = "1 file" if len(of.files) == 1 else f"{len(of.files)} files"
        raise ValueError(f"{name} is empty: 0 bytes in {number}\n"
                         "give a file with text, or copy it again")
    with text_files.patient(f"texts: looking at the first rows of {name} ({(of.size or 0) / 1e6:,.0f} MB)"):
        return _look(name, of, text_field, tokenizer_ids, cache_dir)


def _look(name: str, of: Found, text_field: str, tokenizer_ids: int | None, cache_dir: Path | None) -> Look:
    if of.local:
        for file in of.files:
            text_files.check_end(file)
        if of.module in ("text", "json", "csv"):
            text_files.check_encoding(of.files[0])
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


def enough(documents: Iterable[Document], ids_of: Callable[[list[Document]], list[list[int]]], needed: int) -> int:
    """min(needed, tokens of the documents); `ids_of` tokenises a list of them."""
    documents, count = iter(documents), 0
    while count < needed:
        batch = list(itertools.islice(documents, 64))
        if not batch:
            break
        count += sum(map(len, ids_of(batch)))
    return min(count, needed)
