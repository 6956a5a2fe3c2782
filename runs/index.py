"""All runs of a folder on one page: python -m runs.index [folder] writes runs.html there.

Read are the ledger (results.tsv) and the run folders themselves, so that runs which were killed, are under way, or ran
before there was a ledger are on it too. What lies in them may be anybody's: whatever is no number is text, cut to a
length, and a folder that cannot be read has the line that the ledger has of it. The page shows what it is given;
runs/page/index.py lays it out. Needs neither torch nor numpy, and matplotlib for the still pictures alone.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import shlex
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from runs import compare, ledger, verdict
from runs.comparison import HEADLINES
from runs.frontier import L0, l0_of
from runs.page import index as pages
from runs.reading import LM_ONLY, Run, finite, json_object, read
from runs.wording import in_a_line

FILE = "runs.html"
TEXT = {"run": 200, "note": 300, "why": 1000, "hyper": 300}  # characters of a text that are shown; of others SHORT
SHORT = 100
SETTINGS = 120  # of a run
REASONS = 4000  # SAEs of sweeps whose verdicts have reasons; of more the reports have them
METRICS_SIZE = 2_000_000  # characters that the figures of all metrics together take; headline metrics come first
LARGEST = 30_000_000  # bytes of a file that is read
NO_SETTING = {"note", "out_dir", "cache_dir"}
NOT_OF_THE_SEED = {"seed", "minutes", "commit"}  # runs that agree in all else are seeds of one setting
# where a run's name leads: to the first of its files that is there, by how it ended
CAUSE = ("error.json", "log.txt", "report.html", "run_info.json")
PLACE = ("log.txt", "progress.json", "run_info.json", "report.html")
RESULT = ("report.html", "final_info.json", "log.txt", "verdict.json", "run_info.json")
LEADS = {"failed": CAUSE, "killed": PLACE, "running": PLACE}
# what verdict.json says of each of several SAEs
SAID = ("value", "stderr", "l0", "difference", "difference_stderr")

# ------------------------------------------------------------------------------------------------ values


def number(value) -> float | int | None:
    """A finite number to six digits, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):  # an integer beyond every float
        if math.isfinite(value) and abs(value) < 1e300:
            short = float(f"{value:.6g}")
            return int(short) if short.is_integer() and abs(short) < 1e15 else short
    return None


def text(value, most: int = SHORT) -> str | None:
    """A value as a line of at most so many characters, None without one."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        value = json.dumps(finite(value), ensure_ascii=False, default=str)
    line = " ".join(value.split())
    return line if len(line) <= most else line[:most - 1] + "…"


def inner(value) -> dict:
    """A part of a document that should be an object."""
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------ rows


def rows_of(folder: Path) -> tuple[list[dict], int]:
    """(the ledger's lines and the runs without one, each with `folder`: the name of the folder that it is about, or
    None; the number of lines left out, of runs that failed and were continued).
    """
    lines = [one | dict(folder=None) for one in ledger.known(folder)]
    about = {mark: one for one in lines for mark in (ledger.mark(one), ledger.mark(one | dict(hash=None)))}
    rows = list(lines)
    for one in ledger.found(folder):
        line = about.get(ledger.mark(one))
        if line is None or line["folder"] is not None:
            rows.append(one | dict(folder=one["run"]))
        else:
            line["folder"] = one["run"]
    last = {(one["run"], one["variant"], one["seed"]): str(one["time"]) for one in sorted(rows, key=_time)}
    kept = [one for one in rows if one["folder"] is not None or one["verdict"] != "failed"
            or str(one["time"]) == last[one["run"], one["variant"], one["seed"]]]
    return kept, len(rows) - len(kept)


def _time(one: dict) -> str:
    return str(one["time"])


def plain(one: dict) -> dict:
    """A line of the ledger as what it should hold: numbers, and texts of a bounded length."""
    numbers = {column: number(one.get(column)) for column in ledger.COLUMNS if column in ledger.NUMBERS}
    texts = {column: text(one.get(column), TEXT.get(column, SHORT)) for column in ledger.COLUMNS
             if column not in ledger.NUMBERS}
    found = numbers | texts
    return found | dict(folder=one["folder"], run=found["run"] or "?")


def details(out: Path) -> dict:
    """What a run's folder says beside the ledger's line: figures, costs, settings, why it failed; and whether it has a
    report inside the folder of all runs.
    """
    said, info, error = (json_object(out / name, LARGEST) for name in ("verdict.json", "run_info.json", "error.json"))
    settings = inner(info.get("settings"))
    peaks = [inner(peak) for peak in inner(info.get("peak_memory_gb")).values()]
    memory = {key: [known for known in (number(peak.get(side)) for peak in peaks) if known is not None]
              for key, side in (("peak_memory_gb", "host"), ("peak_gpu_memory_gb", "gpu"))}
    found = dict(said={"saes": inner(said.get("saes"))}, l0=number(said.get("l0")),
                 difference_stderr=number(said.get("difference_stderr")),
                 lines_changed=number(said.get("lines_changed")), why=text(said.get("why"), TEXT["why"]),
                 tokens_per_s=number(said.get("tokens_per_s") or info.get("tokens_per_s")),
                 phase=text(said.get("phase") or error.get("phase") or info.get("phase")),
                 advice=text(said.get("advice") or error.get("advice"), TEXT["why"]),
                 profile=text(settings.get("profile")), settings=_settings(settings, info), progress=None)
    for key, known in memory.items():
        value = number(said.get(key))
        found[key] = max(known, default=None) if value is None else value
    if found["why"] is None:
        found["why"] = text(error.get("message") or error.get("type"), TEXT["why"])
    if info.get("status") == "running":
        found["note"] = text(settings.get("note"), TEXT["note"])  # the ledger's adds where it was killed
        now = json_object(out / "progress.json", LARGEST)
        found["progress"] = {key: number(now.get(key)) for key in ("share", "eta_seconds")}
        found["phase"] = text(now.get("phase") or info.get("phase"))
    return found


NOTHING = dict.fromkeys(("l0", "l0_high", "difference_stderr", "lines_changed", "why", "tokens_per_s", "phase",
                         "advice", "profile", "settings", "progress", "peak_memory_gb", "peak_gpu_memory_gb", "at",
                         "shell")) | dict(saes=0, files=(), said={})


def _settings(settings: dict, info: dict) -> dict[str, str] | None:
    """Every setting of a run as text, with the commit and the machine."""
    if not settings:
        return None
    hardware = inner(info.get("hardware"))
    more = {"commit": info.get("commit"), "hardware": hardware.get("gpu") or hardware.get("device")}
    both = [*settings.items(), *more.items()][:SETTINGS]
    return {text(key) or "?": text(value) or "" for key, value in both if key not in NO_SETTING}


def leads(root: Path, place: str | None, name: str, ended: str | None) -> dict:
    """`at`, the address of a run's folder as seen from the page, and `files`, those in it that a reader may want, first
    the one that says most of how it ended; None and () where there are none, or they lie outside `root`, as those of a
    linked folder. `place`: the folder of all runs as seen from the page's, "" where it is that.
    """
    files = []
    for file in LEADS.get(ended or "", RESULT) if place is not None else ():
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            whole = root / name / file
            if whole.is_file() and whole.resolve().is_relative_to(root):
                files.append(file)
    if not files:
        return dict(at=None, files=())
    parts = [*Path(place).parts, name]
    address = "/".join("." if part == "." else quote(os.fsencode(part), safe="") for part in parts)
    return dict(at=address, files=tuple(files))


def for_a_shell(folder: Path) -> str | None:
    """A run's folder as a word of a command line, None where what it is called is nothing to be pasted."""
    path = str(folder)
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are no text
        return None
    if not path.isprintable():
        return None
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


# ------------------------------------------------------------------------------------------------ figures


def saes_of(out: Path) -> list[Run]:
    """The SAEs that a run's folder records; [] of a run without results, or whose file is no record."""
    file = out / "final_info.json"
    try:
        if file.is_file() and file.stat().st_size < LARGEST:
            return list(read(file).values())
    except Exception:  # noqa: BLE001  whatever is wrong with one file of a thousand
        pass
    return []


def hyper_of(saes: list[Run]) -> dict[str, str]:
    """{hyper.name: value} of a run's SAEs, of several all values."""
    values = defaultdict(list)
    for sae in saes:
        for key, value in inner(sae.config.get("hyper")).items():
            values[f"hyper.{text(key)}"].append(text(value) or "")
    return {key: text(", ".join(dict.fromkeys(each))) or "" for key, each in list(values.items())[:SETTINGS]}


def figures(saes: list[Run], directions: dict[str, str], first: str | None) -> tuple[dict[str, dict], int]:
    """({metric: {"way", "v": values, "e": standard errors if any is known, "i": of which SAEs unless of all}}, the
    number of metrics left out for their size), headline metrics first, then those that most SAEs have.

    What depends on the language model alone, and L0 itself, is no metric to be compared.
    """
    known: dict[str, list[int]] = defaultdict(list)
    for i, sae in enumerate(saes):
        for metric, value in sae.means.items():
            if number(value) is not None:
                known[metric].append(i)
    order = {metric: place for place, metric in enumerate((first, *HEADLINES))}
    names = [metric for metric in known if metric not in L0 and not LM_ONLY.search(metric)]
    names.sort(key=lambda metric: (order.get(metric, len(order)), -len(known[metric]), metric))
    found, size = {}, 0
    for metric in names:
        one = dict(way=directions.get(metric, ""), v=[number(saes[i].means[metric]) for i in known[metric]])
        errors = [number(saes[i].stderrs.get(metric)) for i in known[metric]]
        if any(errors):
            one["e"] = errors
        if len(known[metric]) < len(saes):
            one["i"] = known[metric]
        size_of = len(json.dumps(one, separators=(",", ":")))
        if size + size_of > METRICS_SIZE:
            continue
        size += size_of
        found[text(metric, 200)] = one
    return found, len(names) - len(found)


def places_of(saes: list[Run], metrics: Iterable[str]) -> tuple[list[dict], list[int]]:
    """([{"name", "lines": [{"name", "role", "metrics": {metric: [[L0, value, stderr], …]}}]}] per model, layer and
    hook, those of most SAEs first; of each SAE the number of its place). Lines are what is stored with the project: the
    baseline's frontier, random dictionaries.
    """
    keys = [compare.identity(sae.config) for sae in saes]
    order = [key for key, _ in Counter(keys).most_common()]
    found = []
    for key in order:
        widths = {str(sae.config.get("d_sae")): sae for sae, own in zip(saes, keys) if own == key}
        with contextlib.suppress(Exception):  # a config of somebody's own, for which nothing can be stored
            found.append(_lines(key, list(widths.values()), metrics))
            continue
        found.append([])
    places = [dict(name=_place(key), lines=lines) for key, lines in zip(order, found)]
    return places, [order.index(key) for key in keys]


def said_of(sae: Run, said: dict) -> dict | None:
    """What a run's verdict says of one of its SAEs, None where it says nothing."""
    each = inner(said.get("saes"))
    one = inner(each.get(sae.section)) or inner(each.get(sae.name))
    if not one:
        return None
    figures_of = {key: number(one.get(key)) for key in SAID}
    return figures_of | dict(verdict=text(one.get("verdict")), why=text(one.get("why"), TEXT["why"]))


def _place(key: tuple) -> str:
    """Model, layer and hook, the last unless it is what is usual at that layer."""
    model, layer, hook = key
    parts = [str(model)]
    if layer is not None:
        parts.append(f"layer {layer}")
    if hook != f"blocks.{layer}.hook_resid_post":
        parts.append(str(hook))
    return text(", ".join(parts)) or "?"


def _lines(key: tuple, members: list[Run], metrics: Iterable[str]) -> list[dict]:
    stored = [sae for sae in compare.stored_baselines(members) if compare.identity(sae.config) == key]
    sides = [("baseline", "baseline " + str(family[0].config.get("variant") or family[0].name), family)
             for family in compare.families(stored)]
    for name, saes in compare.stored_random(key, members[0].config).items():
        sides += [("random", compare.RANDOM[name], family) for family in compare.families(saes)]
    lines = []
    for role, name, family in sides:
        points = {metric: [[number(l0_of(sae)), number(sae.means[metric]), number(sae.stderrs.get(metric)) or 0]
                           for sae in sorted(family, key=lambda sae: l0_of(sae) or 0)
                           if sae.means.get(metric) is not None and (l0_of(sae) or 0) > 0] for metric in metrics}
        lines.append(dict(name=name, role=role, metrics={metric: one for metric, one in points.items() if one}))
    return lines


# ------------------------------------------------------------------------------------------------ all of it


def overview(folder: Path, by: str = "time", place: str | None = "") -> dict:
    """All that the page shows of the runs in a folder: rows by time, SAEs, metrics, places, and the order of the rows.

    `by`: a column of the table or a metric; `place`: the folder as seen from the page's, None without links.
    FileNotFoundError without such a folder or a run in it, ValueError for a `by` that is neither.
    """
    lines, continued = rows_of(folder)
    if not lines:
        raise FileNotFoundError(ledger.none_in(folder))
    directions = compare.directions()
    rows = ledger.marked([plain(one) for one in lines], directions)
    root, each = folder.resolve(), []
    for row in rows:
        row |= NOTHING
        own: list[Run] = []
        if row["folder"] is not None:
            out = folder / row["folder"]
            own = saes_of(out)
            row |= details(out) | leads(root, place, row["folder"], row["verdict"]) | dict(shell=for_a_shell(out))
            row["settings"] = (row["settings"] or {}) | hyper_of(own) or None
        each.append(own)
        row |= _l0(row, own)
    saes = [sae for own in each for sae in own]
    metrics, left_out = figures(saes, directions, by)
    if by not in pages.KEYS and by not in metrics:
        near = difflib.get_close_matches(by, [*pages.KEYS, *metrics], 1, 0)[0]
        raise ValueError(f"--by={by} is no column and no metric of these runs; the nearest is {near}")
    judged_by = by if by in metrics and _judge_all(rows, each, by, directions) else None
    places, place_of = places_of(saes, metrics)
    owners = [i for i, own in enumerate(each) for _ in own]
    _whereabouts(rows, owners, [places[where]["name"] for where in place_of])
    _mark_best(rows, directions)
    for row, group in zip(rows, _groups(rows)):
        row["group"] = group
    _count_seeds(rows)
    told = [said_of(sae, rows[i]["said"]) if rows[i]["saes"] > 1 else None for i, sae in zip(owners, saes)]
    if len(told) - told.count(None) > REASONS:
        told = [None if one is None else one | dict(why=None) for one in told]
    seen = dict(folder=str(folder), by=by, judged_by=judged_by, rows=rows, metrics=metrics,
                left_out=left_out, continued=continued, places=places,
                directions={row["metric"]: directions.get(row["metric"], "") for row in rows},
                saes=[dict(run=i, name=text(sae.section or sae.name), place=where, l0=number(l0_of(sae)), said=one)
                      for i, sae, where, one in zip(owners, saes, place_of, told)])
    seen["order"] = ordered(seen)
    return seen


def _l0(row: dict, saes: list[Run]) -> dict:
    """`l0` of a run, of several SAEs the smallest and, as `l0_high`, the largest; how many `saes` it has."""
    known = sorted(value for value in (number(l0_of(sae)) for sae in saes) if value is not None)
    if len(saes) > 1 and known:
        return dict(saes=len(saes), l0=known[0], l0_high=known[-1])
    l0 = row["l0"]
    if l0 is None and known:
        l0 = known[0]
    return dict(saes=len(saes), l0=l0)


def _judge_all(rows: list[dict], each: list[list[Run]], metric: str,
               directions: dict[str, str]) -> bool:
    """Make a metric the one that decides, of every run with results: judged as a report would (runs/verdict.py).

    False, and the rows as they were, where no eval declares which way it is better.
    """
    try:
        verdict.check_headline(metric, directions)
    except ValueError:
        return False
    stored: dict[str, list[Run]] = {}
    for row, saes in zip(rows, each):
        if row["metric"] == metric or row["verdict"] in pages.NO_RESULT:
            continue
        said: dict = dict(verdict="incomparable", why=f"{metric} of it is not known: its results are gone")
        with contextlib.suppress(Exception):  # a record of somebody else's, in which something lacks or is no number
            if saes:
                said = _judged(saes, metric, directions, stored)
        row |= {key: number(said.get(key)) for key in ("value", "stderr", "difference", "difference_stderr")}
        row |= dict(metric=metric, said=said, verdict=text(said["verdict"]), why=text(said["why"], TEXT["why"]))
    return True


def _judged(saes: list[Run], metric: str, directions: dict[str, str], stored: dict[str, list[Run]]) -> dict:
    """verdict.json's figures of one run in a metric. `stored`: baselines that were read already."""
    keys = {f"{sae.config.get('model')} {sae.config.get('d_sae')}": sae for sae in saes}
    for key, sae in keys.items():
        if key not in stored:
            stored[key] = compare.stored_baselines([sae])
    baseline = {(run.path, run.section): run for key in keys for run in stored[key]}
    return verdict.judged(compare.judged(saes, baseline, directions), metric)


def _whereabouts(rows: list[dict], owners: list[int], names: list[str]) -> None:
    """Give every row `where`: model, layer and hook of its SAEs, or as much as is known of them."""
    known: dict[int, dict[str, None]] = defaultdict(dict)
    for i, name in zip(owners, names):
        known[i][name] = None
    for i, row in enumerate(rows):
        unknown = f"{row['model']}, layer not known" if row["model"] else "model not known"
        row["where"] = text(" and ".join(known[i])) if i in known else unknown


def _mark_best(rows: list[dict], directions: dict[str, str]) -> None:
    """Mark the runs that are better than all before them at the same model, layer, hook and metric."""
    together = defaultdict(list)
    for row in rows:
        together[row["where"]].append(row)
    for members in together.values():
        ledger.marked(members, directions)


def _count_seeds(rows: list[dict]) -> None:
    """Give every row `seeds`: of how many seeds its setting has results."""
    known = defaultdict(set)
    for row in rows:
        if row["seed"] is not None and row["verdict"] not in pages.NO_RESULT:
            known[row["group"]].add(row["seed"])
    for row in rows:
        row["seeds"] = len(known[row["group"]])


def _groups(rows: list[dict]) -> list[int]:
    """A number of each row, equal for runs that differ in the seed alone."""
    numbers: dict[str, int] = {}
    found = []
    for row in rows:
        own = [row[key] for key in ("variant", "model", "hash", "hyper", "metric")]
        settings = {key: value for key, value in (row["settings"] or {}).items() if key not in NOT_OF_THE_SEED}
        found.append(numbers.setdefault(json.dumps([own, settings], sort_keys=True), len(numbers)))
    return found


def ordered(seen: dict) -> list[int]:
    """The rows' numbers in the order of the table: the newest or the best first, texts by alphabet, what lacks last.

    By a figure that tells good from bad, runs whose figures do not count come behind those that do.
    """
    rows, by = seen["rows"], "value" if seen["judged_by"] else seen["by"]
    numbers = list(range(len(rows)))
    if by == "time":
        return numbers[::-1]
    if by in pages.KEYS:
        values = [row[pages.KEYS[by]] for row in rows]
        ways = [seen["directions"].get(row["metric"]) if by in pages.QUALITY else "" for row in rows]
    else:
        known = pages.of_runs(seen, by)
        values, ways = [known.get(i) for i in numbers], [seen["metrics"][by]["way"]] * len(rows)
    apart = [0] * len(rows)
    if pages.ranked(by):
        apart = [{"comparable": 0, "failed": 2}.get(pages.kind(row["verdict"]), 1) for row in rows]
    ranks = [value if isinstance(value, str) or value is None or way == "lower" else -value
             for value, way in zip(values, ways)]
    return sorted(numbers, key=lambda i: (apart[i], ranks[i] is None, ranks[i] or 0))


# ------------------------------------------------------------------------------------------------ command line


def write(folder: Path, by: str = "time", out: Path | None = None) -> Path:
    """Write the page and return its path; FileNotFoundError, ValueError, OSError in a line or two.

    A file of that name that is no page of ours stays.
    """
    file = folder / FILE if out is None else out
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}\ngive the folder that holds the runs")
    foreign = not_ours(file)
    if foreign:
        raise ValueError(f"{file} {foreign}, and stays as it is\ngive another name with --out")
    try:
        place = os.path.relpath(folder.resolve(), file.parent.resolve())
    except ValueError:  # another drive
        place = None
    page = pages.page(overview(folder, by, "" if place == "." else place))
    _put(file, page.encode("utf-8", "replace"))
    return file


def not_ours(file: Path) -> str:
    """What is wrong with replacing a file, "" if nothing is: it does not exist, or this command wrote it."""
    if not os.path.lexists(file):
        return ""
    try:
        if not file.is_file():
            return "is no file"
        with open(file, "rb") as opened:
            return "" if pages.MARK.encode() in opened.read(4096) else "is not a page of this command"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _put(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. runs.folder, which does that too, would load torch."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as opened:
            opened.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def main(argv: list[str] | None = None) -> int:
    """The command; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m runs.index", allow_abbrev=False,
                                     description="Write a page on all runs of a folder: runs.html, inside it.")
    parser.add_argument("folder", nargs="?", default=".", help="the folder that holds the run folders")
    parser.add_argument("--by", default="time", metavar="METRIC/column",
                        help=f"order of the table: a metric, or one of {', '.join(pages.KEYS)}; time is default")
    parser.add_argument("--out", metavar="FILE", help=f"the page; default: {FILE} in the folder")
    options = parser.parse_args(argv)
    try:
        file = write(Path(options.folder), options.by, Path(options.out) if options.out else None)
    except OSError as error:
        what = in_a_line(error)
        if error.errno is not None:
            what = f"the page cannot be written: {error.strerror or error}"
        print(what, file=sys.stderr)
        return 1
    except ValueError as error:
        print(" ; ".join(str(error).split("\n")), file=sys.stderr)
        return 1
    print(file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
