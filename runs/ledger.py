"""What became of every run: python -m runs.ledger [folder] shows all runs of a folder, with the running best.

Each run appends a line to results.tsv beside its folder where it ends, finished or not. Runs that ended without a word
(killed) and those of before the ledger are read from their folders; --rebuild reads the folders alone. * marks a run
that is better than all before it: its difference to the baseline is, in the metric's direction.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from runs import compare, tables, verdict
from runs.reading import finite, held, json_object, read, slug
from runs.wording import in_a_line, listing, number

FILE = "results.tsv"
COLUMNS = ("time", "run", "variant", "model", "hash", "commit", "hyper", "seed", "metric", "value", "stderr",
           "difference", "verdict", "minutes", "note")
NUMBERS = {"seed", "value", "stderr", "difference", "minutes"}
BEST = {"better", "worse", "within_noise", "equal_to_baseline"}  # verdicts whose difference means something
LOCK_SECONDS = 5  # a line is written without the lock rather than never
SHOWN = {"model", "hash", "commit", "seed"}  # columns that are left out where they say nothing

# ------------------------------------------------------------------------------------------------ writing


def append(folder: Path, row: dict) -> str:
    """Add a line to results.tsv in the folder; returns "" or, in a line, why there is none. Never raises an OSError.

    One write to a file opened for appending, under a lock on it where there are locks: lines of several processes do
    not mix. A table of somebody else's by that name is left alone.
    """
    file = folder / FILE
    try:
        number_of = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            return _append(number_of, row)
        finally:
            os.close(number_of)
    except OSError as error:
        return f"{FILE} has no line of this run: {error.strerror or error}"


def _append(opened: int, row: dict) -> str:
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        return f"{FILE} is no file, so it has no line of this run"
    _lock(opened)
    header, cut = _begins(opened)
    columns, text = list(COLUMNS), ""
    if header is None:
        text = "\t".join(COLUMNS) + "\n"
    else:
        columns = header.split("\t")
        if not {"run", "verdict"} <= set(columns):
            return f"{FILE} is another program's table, so it has no line of this run"
    if cut:  # of a process that was killed, or a disk that was full
        text = "\n" + text
    text += "\t".join(_cell(row.get(column)) for column in columns) + "\n"
    data = text.encode("utf-8", "replace")
    if os.write(opened, data) < len(data):
        return f"the line of this run in {FILE} is cut off: no space left"
    return ""


def _lock(opened: int) -> None:
    """Hold the file against other processes, as long as it is open, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows: one write is all there is
        return
    until = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < until:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a disk without locks
            return


def _begins(opened: int) -> tuple[str | None, bool]:
    """(the first line, None if there is none; whether the last lacks its end)."""
    size = os.fstat(opened).st_size
    if not size:
        return None, False
    os.lseek(opened, 0, os.SEEK_SET)
    header = os.read(opened, 1 << 16).split(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
    os.lseek(opened, size - 1, os.SEEK_SET)
    return header, os.read(opened, 1) != b"\n"


def _cell(value) -> str:
    if value is None:
        return ""
    return " ".join(str(value).split()) if isinstance(value, str) else json.dumps(finite(value))


def row(said: dict, source: bytes | None, commit: str | None, hyper: str, sweep: str, note: str,
        at: float | None = None) -> dict:
    """A line of the ledger. `said`: verdict.json; `source`: the variant's file; `at`: when, in seconds since 1970."""
    when = datetime.fromtimestamp(time.time() if at is None else at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    short, changed, _ = (commit or "").partition("+")  # "+changes": the work tree was not the commit's
    given = [hyper, f"sweep {sweep}" if sweep else ""]
    known_else = dict(time=when, commit=short[:9] + changed, hyper=" ".join(filter(None, given)),
                      note=" ".join(note.split()))
    if source is not None:
        known_else["hash"] = hashlib.sha256(source).hexdigest()[:12]
    one = {column: said.get(column, known_else.get(column)) for column in COLUMNS}
    return {column: None if value == "" else value for column, value in one.items()}


# ------------------------------------------------------------------------------------------------ reading


def known(folder: Path) -> list[dict]:
    """The rows of results.tsv, {column: text or number, None if empty}; [] without one that is the runner's.

    A line that is cut off has what it has.
    """
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    columns = lines[0].rstrip("\r").split("\t")
    if not {"run", "verdict"} <= set(columns):
        return []
    rows = [dict(zip(columns, line.rstrip("\r").split("\t"))) for line in lines[1:] if "\t" in line]
    return [{column: _value(column, one.get(column, "")) for column in dict.fromkeys([*COLUMNS, *columns])}
            for one in rows]


def _value(column: str, text: str) -> str | float | None:
    if text and column in NUMBERS:
        with contextlib.suppress(ValueError):
            return finite(int(text) if re.fullmatch(r"-?\d+", text) else float(text))
    return text or None


def found(folder: Path, rows: Iterable[dict] = ()) -> list[dict]:
    """A row for each run folder in the folder that none of `rows` is about.

    A run that is under way or was killed has no line yet; one that was moved aside (run_1.previous-1) has its line
    under its former name, one that failed in preflight has no variant.py.
    """
    lines = {known_as for one in rows for known_as in (mark(one), mark(one | dict(hash=None)))}
    read_now = []
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if _is_folder(entry))
    except OSError as error:
        raise FileNotFoundError(f"no folder {folder}: {error.strerror}\ngive the folder that holds the runs") from None
    for path in map(Path, inside):
        try:
            one = _of_folder(path)
            if one is not None and mark(one) not in lines:
                read_now.append(one)
        except Exception:  # noqa: BLE001  another program's, or not ours to read; a number beyond every float, a pit
            continue
    return read_now


def none_in(folder: Path) -> str:
    """That there is no run in a folder, and which one to give."""
    if _of_folder(folder) is not None:
        return f"{folder} is a run itself\ngive the folder that holds it"
    with contextlib.suppress(OSError):
        below = sorted(entry.path for entry in os.scandir(folder) if _is_folder(entry))
        deeper = [path for path in below[:100] if found(Path(path))]
        if deeper:
            return f"no run in {folder}, but in {listing(deeper)}\ngive one of these"
    return f"no run in {folder}\ngive the folder that holds the runs"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def mark(one: dict) -> tuple:
    """What a run's line and its folder agree in, whatever the folder is called now."""
    name = re.sub(r"\.previous-\d+$", "", " ".join(str(one["run"]).split()))  # as a line has it
    live = one["verdict"] if one["verdict"] in ("killed", "running") else ""  # no line says that
    return name, one["hash"], one["seed"], one["minutes"], live


def _of_folder(out: Path) -> dict | None:
    """The row of a run folder, or None if it is none, as one that runs.publish made of a run."""
    if _published(out):
        return None
    info, said = json_object(out / "run_info.json"), json_object(out / "verdict.json")
    if not info and not said and not (out / "final_info.json").is_file():
        return None
    settings, status = info.get("settings") or {}, info.get("status")
    note, written = settings.get("note") or "", out / "verdict.json"
    if status == "running":
        locked = held(out)
        said = _bare(out, info, "running" if locked else "killed")
        note = f"{note} ({'in' if locked else 'killed in'} its phase {info.get('phase')})".strip()
        written = out / "run_info.json"
    elif not said:
        said, written = _judged_now(out, info, status), out / "run_info.json"
    source = None
    with contextlib.suppress(OSError):
        source = _bytes(out / "variant.py")
    at = next((file.stat().st_mtime for file in (written, out / "final_info.json") if file.is_file()), 0.0)
    return row(said | dict(run=out.name), source, info.get("commit"), settings.get("hyper") or "",
               settings.get("sweep") or "", note, at)


def _published(out: Path) -> bool:
    """Whether a folder is what runs/publish.py made of a run: results under a model card, without the run's record."""
    if (out / "run_info.json").is_file():
        return False
    with contextlib.suppress(OSError), open(out / "README.md", "rb") as card:
        return card.read(4) == b"---\n"
    return False


def _bare(out: Path, info: dict, word: str) -> dict:
    settings = info.get("settings") or {}
    minutes = round(sum((info.get("seconds") or {}).values()) / 60, 2)
    variant = Path(settings["variant"]).stem if settings.get("variant") else None
    model = slug(settings["model"]) if settings.get("model") else None
    return dict(verdict=word, run=out.name, variant=variant, model=model, seed=info.get("seed"), minutes=minutes)


def _judged_now(out: Path, info: dict, status: str | None) -> dict:
    """The verdict on a run of before there were any."""
    bare = _bare(out, info, "failed")
    if status in ("failed", "interrupted"):
        return bare
    try:
        runs = read(out)
        comparisons = compare.judged(runs, compare.stored_baselines(runs), compare.directions())
        first = next(iter(runs.values())).config
    except (ValueError, OSError):
        return bare
    own = dict(variant=bare["variant"] or first.get("variant"), seed=first.get("seed"),
               model=bare["model"] or slug(first.get("model") or "") or None)
    return bare | own | verdict.judged(comparisons, verdict.headline(None, runs.values()))


def _bytes(file: Path) -> bytes:
    """What a file holds; OSError of a pipe or a device, which would never end."""
    if not file.is_file():
        raise FileNotFoundError(file)
    return file.read_bytes()


# ------------------------------------------------------------------------------------------------ in order


def marked(rows: list[dict], directions: dict[str, str]) -> list[dict]:
    """The rows by time, each with `best`: whether its difference is better than all before it of model and metric."""
    ordered, best = sorted(rows, key=lambda one: str(one["time"])), {}
    for one in ordered:
        metric, difference, kind = one["metric"], one["difference"], (one["model"], one["metric"])
        one["best"] = False
        if one["verdict"] not in BEST or not isinstance(difference, (int, float)) or not directions.get(metric):
            continue
        gain = difference if directions[metric] == "higher" else -difference
        if gain > best.get(kind, float("-inf")):
            best[kind] = gain
            one["best"] = True
    return ordered


def sorted_by(rows: list[dict], column: str, directions: dict[str, str]) -> list[dict]:
    """The rows by time, or the best first by value or difference; those without a figure last."""
    if column == "time":
        return rows

    def place(one: dict) -> float:
        figure = one[column]
        if not isinstance(figure, (int, float)) or one["verdict"] not in BEST:
            return float("inf")
        return figure if directions.get(one["metric"]) == "lower" else -figure

    return sorted(rows, key=place)


def table(rows: list[dict]) -> tables.Table:
    """The rows as people read them."""
    columns = [column for column in COLUMNS if any(one[column] is not None for one in rows)]
    columns = [column for column in columns
               if column not in SHOWN or len({one[column] for one in rows}) > 1]
    texts = {column: [column, *(_shown(column, one[column]) for one in rows)] for column in columns}
    for column in texts.keys() - NUMBERS:  # words begin at the left
        texts[column] = [text.ljust(max(map(len, texts[column]))) for text in texts[column]]
    marks = ["*" if one["best"] else "" for one in rows]
    header, *cells = zip(*[["", *marks], *texts.values()])
    last = {one["run"]: str(one["verdict"]) for one in sorted(rows, key=lambda one: str(one["time"]))}
    counts = ", ".join(f"{list(last.values()).count(word)} {word}" for word in dict.fromkeys(last.values()))
    below = [f"{len(last)} runs, by their last line: {counts}", "* the best difference so far"] if rows else []
    return tables.Table([], list(header), list(map(tables.plain, cells)), below)


def _shown(column: str, value) -> str:
    if value is None:
        return ""
    if column in ("value", "stderr", "difference"):
        return number(value)
    return str(value)


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 1 with one line on stderr where there is nothing to read."""
    parser = argparse.ArgumentParser(prog="python -m runs.ledger", description=__doc__.split("\n\n")[1],
                                     allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default=".", help="the folder that holds the run folders")
    parser.add_argument("--by", choices=("time", "value", "difference"), default="time", help="order; time is default")
    parser.add_argument("--rebuild", action="store_true", help="from the run folders alone, without results.tsv")
    parser.add_argument("--json", action="store_true", help="all columns, numbers as numbers, for programs")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    rows = [] if options.rebuild else known(folder)
    try:
        rows += found(folder, rows)
        if not rows:
            raise FileNotFoundError(none_in(folder))
    except OSError as error:
        print(in_a_line(error), file=sys.stderr)
        return 1
    directions = compare.directions()
    rows = sorted_by(marked(rows, directions), options.by, directions)
    try:
        if options.json:
            print(json.dumps({"runs": finite(rows)}, ensure_ascii=False, allow_nan=False))
        else:
            print(tables.as_text(table(rows)), flush=True)
    except BrokenPipeError:  # head has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
