"""Quality along training: the SAEs measured as they are at some points, kept in snapshots/step_<n> of the run's folder,
as rows in final_info.json and as curves in the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from evals.common import stored
from variants.kit import ranks

FOLDER = "snapshots"


def steps(total: int, number: int) -> set[int]:
    """The steps after which to measure, `number` points evenly apart but for the last: the end, where evals measure."""
    return {round(total * i / number) for i in range(1, number)} - {0}


def choose(number: int, wanted: str, evals: dict[str, dict], total: int) -> dict[str, dict]:
    """{eval: its settings} of the evals `wanted`, comma-separated, at `number` points of `total` steps; {} for none.

    ValueError for one that the run does not measure at its end, for more points than steps, or several processes, of
    which not each holds the SAEs.
    """
    if not number:
        return {}
    if number > total:
        raise ValueError(f"--snapshots={number} are more than the run's {total:,} steps\ngive fewer")
    if ranks.count() > 1:
        raise ValueError(f"--snapshots={number} with {ranks.count()} processes: one process alone can measure in "
                         "training\nleave it out, or train with one process")
    names = [name.strip() for name in wanted.split(",")]
    missing = [name for name in names if name not in evals]
    if missing:
        raise ValueError(f"--snapshots={number} measures {missing[0]}, which is not among --evals\n"
                         f"add it there, or choose with --snapshot_evals: {', '.join(evals) or 'none is chosen'}")
    return {name: evals[name] for name in names}


def folder(out: Path, step: int) -> Path:
    """Where the measurements after a step lie: eval_results/ as in a run's folder."""
    return out / FOLDER / f"step_{step}"


def rows(out: Path, sae: str, chosen: Iterable[str], batch_size: int, final: dict) -> list[dict]:
    """What was measured of an SAE along training: step, tokens, means and stderrs, in order.

    `final`: its section of final_info.json, whose means of these evals make the last row.
    """
    chosen = list(chosen)
    found = []
    for place in sorted((out / FOLDER).glob("step_*"), key=_step):
        means, stderrs, problems = stored.collected(place, chosen, sae, {})
        found.append(dict(step=_step(place), tokens=_step(place) * batch_size, means=means, stderrs=stderrs)
                     | ({"problems": problems} if problems else {}))
    total = final["config"]["steps"]
    own = tuple(f"{name}." for name in chosen)
    means = {name: value for name, value in final["means"].items() if name.startswith(own)}
    stderrs = {name: value for name, value in final["stderrs"].items() if name.startswith(own)}
    return [*found, dict(step=total, tokens=total * batch_size, means=means, stderrs=stderrs)]


def read(path: Path) -> dict[str, list[dict]]:
    """{SAE: the rows of its section} of a recorded run's final_info.json; {} for a file without any."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {name: section["snapshots"] for name, section in document.items()
            if isinstance(section, dict) and section.get("snapshots")}


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step_"))
