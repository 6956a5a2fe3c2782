"""Any metric against L0, and against tokens: the run's SAEs among the baseline's, random ones, and other seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from html import escape
from os import scandir
from pathlib import Path

from runs import seeds, snapshots
from runs.compare import RANDOM, families, identity
from runs.comparison import Comparison
from runs.frontier import l0_of
from runs.page import charts, metrics, shell
from runs.page.verdict import link_of
from runs.reading import Run, code_of, read, setting
from runs.wording import number

SECONDS = 1.0  # for looking at the run's neighbours
# settings by which run_info.json alone shows that a neighbour is no other seed of the run
TOLD_APART = ("variant", "model", "layers", "d_sae", "num_tokens", "hyper", "sweep", "dataset", "context")

# ------------------------------------------------------------------------------------------------ against L0


def part(runs: list[Run], stored: list[Run], comparisons: list[Comparison], out: Path,
         beside: tuple[list[Run], str]) -> str:
    """A chart by menu for each model, layer and hook in which there is more than one SAE to see.

    beside: what `other_seeds` returns of the run in `out`.
    """
    others, note = beside
    random = {comparison.identity: comparison.random for comparison in comparisons}
    by_place: dict[tuple, list[Run]] = {}
    for run in runs:
        by_place.setdefault(identity(run.config), []).append(run)
    html = []
    for key, members in by_place.items():
        sides = {"this run": members, "baseline": [one for one in stored if identity(one.config) == key],
                 "other seeds": [one for one in others if identity(one.config) == key]}
        floors = [(RANDOM[name], "random", family) for name, saes in random.get(key, {}).items()
                  for family in families(saes)]
        if not any(len({l0_of(sae) for sae in side} - {None}) > 1
                   for side in (*sides.values(), *(family for _, _, family in floors))) and not sides["other seeds"]:
            continue
        lines = [(f"{name} ({family[0].config.get('variant') or family[0].name})", role, family)
                 for (name, side), role in zip(sides.items(), ("run", "baseline", "seed"))
                 for family in families(side)]
        specs = {metrics.choice(metric): _spec(metric, lines + floors, out) for metric in metrics.charted(members)}
        place = f"<h3>Layer {escape(str(key[1]))}, {escape(str(key[2]))}</h3>" if len(by_place) > 1 else ""
        chart = charts.menu("metric", specs, room=charts.ROOM // len(by_place))
        html += [place, chart] if chart else []
    if not html:
        return ""
    said = "bars: one standard error, where known; a click on a point leads to its SAE"
    below = f"<p class=mut>{escape('; '.join(filter(None, (said, note))))}</p>"
    return f"<h2>Frontier</h2>{below}{''.join(html)}"


def _spec(metric: str, lines: list[tuple[str, str, list[Run]]], out: Path) -> dict:
    series = [{"name": name, "role": role, "line": role != "seed" and (role == "random" or one_line(family)),
               "points": by_l0(family, metric, out)} for name, role, family in lines]
    return {"title": metrics.title(metric), "kind": "points",
            "x": {"label": "L0, features per token (log)", "log": True},
            "y": {"label": metrics.unit(metric), "log": False}, "series": series}


def by_l0(saes: list[Run], metric: str, out: Path) -> list[list]:
    """[L0, value, standard error or 0, SAE, address] of those that have both, by L0; 0 has no place on a log axis."""
    found = [[l0_of(sae), sae.means[metric], sae.stderrs.get(metric, 0.0), sae.name, address(sae, out)]
             for sae in saes if (l0_of(sae) or 0) > 0 and sae.means.get(metric) is not None]
    return sorted(found, key=lambda point: point[:2])


def address(sae: Run, out: Path) -> str:
    """Where a click on an SAE leads: to its place in this page, or to a neighbour's report; "" where there is none."""
    folder = sae.path.parent
    if folder == out:
        return link_of(sae)
    if folder.parent == out.parent and (folder / "report.html").is_file():
        return f"../{shell.quoted(folder.name)}/report.html"
    return ""


def one_line(saes: list[Run]) -> bool:
    """Whether one hyper-parameter at most makes them differ, so that a line through them means something."""
    hyper = [sae.config.get("hyper") or {} for sae in saes]
    return sum(len({str(h.get(key)) for h in hyper}) > 1 for key in dict.fromkeys(k for h in hyper for k in h)) <= 1


# ------------------------------------------------------------------------------------------------ other seeds


def other_seeds(runs: list[Run], out: Path, info: dict) -> tuple[list[Run], str]:
    """SAEs of finished runs beside `out` that differ from one of `runs` in the seed alone; and what to say of them."""
    mine = info.get("settings") or {}
    if not mine or not runs:
        return [], ""
    wanted = {_setting(run) for run in runs}
    taken = {(_setting(run), run.config.get("seed")) for run in runs}
    found, began = [], time.monotonic()
    for number_of, folder in enumerate(_neighbours(out)):
        if time.monotonic() - began > SECONDS:
            return found, f"other seeds: only {number_of:,} of the runs beside this one were looked at"
        if not _may_be(folder, mine):
            continue
        try:
            saes = read(folder).values()
        except (OSError, ValueError):  # gone, or not ours
            continue
        for sae in saes:
            mark = (_setting(sae), sae.config.get("seed"))
            if mark[0] in wanted and mark not in taken:
                taken.add(mark)
                found.append(sae)
    runs_found = len({sae.path for sae in found})
    if not found:
        return [], ""
    return found, f"other seeds: finished runs of the same setting beside this one, {number(runs_found)}"


def _neighbours(out: Path) -> Iterable[Path]:
    try:
        return sorted(Path(entry.path) for entry in scandir(out.parent) if entry.name != out.name and entry.is_dir())
    except OSError:
        return []


def _may_be(folder: Path, mine: dict) -> bool:
    """Whether a folder holds a run that has finished, and run_info.json does not show that it is of another setting."""
    try:
        info = json.loads((folder / "run_info.json").read_bytes())
        theirs = info["settings"]
        return info["status"] == "finished" and all(theirs.get(key) == mine.get(key) for key in TOLD_APART)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _setting(run: Run) -> str:
    """In what runs of one setting agree, see runs/seeds.py."""
    same = [*(setting(run.config, key) for key in seeds.SETTING), code_of(run)]
    return json.dumps(same, sort_keys=True, default=str)


# ------------------------------------------------------------------------------------------------ against tokens


def along_training(runs: list[Run]) -> str:
    """Quality by tokens, where the run was measured along training (--snapshots)."""
    measured = {sae: rows for path in dict.fromkeys(run.path for run in runs)
                for sae, rows in snapshots.read(path).items()}
    seen = dict.fromkeys(metric for rows in measured.values() for row in rows for metric in row["means"])
    shown = [metric for metric in metrics.charted(runs) if metric in seen]
    specs = {}
    for metric in [*shown, *(metric for metric in seen if metric.endswith(".l0"))]:
        series = [{"name": sae, "role": "run", "line": True, "points": _by_tokens(rows, metric)}
                  for sae, rows in measured.items()]
        specs[metrics.choice(metric)] = {"title": metrics.title(metric), "kind": "points",
                                         "x": {"label": "training tokens", "log": False},
                                         "y": {"label": metrics.unit(metric), "log": False}, "series": series}
    chart = charts.menu("metric", specs)
    return f"<h2>Along training</h2>{chart}" if chart else ""


def _by_tokens(rows: list[dict], metric: str) -> list[list]:
    """[tokens, value, standard error or 0] of the points at which a metric was measured."""
    return [[row["tokens"], row["means"][metric], row["stderrs"].get(metric, 0.0)] for row in rows
            if row["means"].get(metric) is not None]
