"""Quality along training: the SAEs measured as they are at some points, kept in snapshots/step_<n> of the run's folder,
as rows in final_info.json and as curves in the report.
"""

from __future__ import annotations

import json
from pathlib import Path

from evals.common import stored
from runs import identity
from runs.folder import write_json
from runs.reading import finite
from variants.kit import ranks

FOLDER, NOTE = "snapshots", "measured_by.json"


def steps(total: int, number: int) -> set[int]:
    """The steps after which to measure, `number` points evenly apart but for the last: the end, where evals measure."""
    return {round(total * i / number) for i in range(1, number)} - {0}


def check(number: int, total: int) -> None:
    """ValueError for more points than a run has steps."""
    if number > total:
        raise ValueError(f"--snapshots={number} are more than the run's {total:,} steps\ngive fewer")


def choose(number: int, wanted: str, evals: dict[str, dict]) -> dict[str, dict]:
    """{eval: its settings} of the evals `wanted`, comma-separated, at `number` points; {} for none.

    ValueError for one that the run does not measure at its end, or several processes, of which not each holds the SAEs.
    """
    if not number:
        return {}
    if ranks.count() > 1:
        raise ValueError(f"--snapshots={number} with {ranks.count()} processes: one process alone can measure in "
                         "training\nleave it out, or train with one process")
    names = [name.strip() for name in wanted.split(",")]
    missing = [name for name in names if name not in evals]
    if missing:
        raise ValueError(f"--snapshots={number} measures {missing[0]!r}, which is not among --evals\n"
                         f"add it there, or choose with --snapshot_evals: {', '.join(evals) or 'none is chosen'}")
    return {name: evals[name] for name in names}


def told(seconds: float) -> str:
    """What the line on training's time says of them."""
    return f", {seconds:.1f} s for snapshots" if seconds else ""


def begin(out: Path, step: int, chosen: dict[str, dict]) -> Path:
    """The folder of what is measured after a step, eval_results/ as in a run's; how it is measured is noted there."""
    place = out / FOLDER / f"step_{step}"
    write_json(place / NOTE, _how(chosen))
    return place


def rows(out: Path, sae: str, number: int, chosen: dict[str, dict], final: dict, cut: bool = False,
         ) -> list[dict]:
    """What was measured of an SAE at the points of training: step, tokens, means, stderrs; `problems` where it was not.

    `final`: its section of final_info.json, whose means of these evals make the last row. `cut`: training was cut on
    the way, so that the points are those of another length.
    """
    total, batch_size = final["config"]["steps"], final["config"]["batch_size"]
    points = _measured(out, total) if cut else steps(total, number)
    found = [_row(out / FOLDER / f"step_{step}", sae, chosen) | dict(step=step, tokens=step * batch_size)
             for step in sorted(points)]
    own = tuple(f"{name}." for name in chosen)
    last = {kind: {name: value for name, value in final[kind].items() if name.startswith(own)}
            for kind in ("means", "stderrs")}
    found.append(last | dict(step=total, tokens=total * batch_size))
    return [dict(step=row.pop("step"), tokens=row.pop("tokens"), **row) for row in found]


def _measured(out: Path, total: int) -> set[int]:
    """The steps before the end after which something was measured."""
    folders = {int(place.parent.name.removeprefix("step_")) for place in (out / FOLDER).glob(f"step_*/{NOTE}")}
    return {step for step in folders if step < total}


def _row(place: Path, sae: str, chosen: dict[str, dict]) -> dict:
    if not (place / NOTE).is_file():
        return dict(means={}, stderrs={}, problems=["not measured: asked for when training had passed it"])
    if json.loads((place / NOTE).read_bytes()) != _how(chosen):
        return dict(means={}, stderrs={}, problems=["measured with other settings of the evals, or other code"])
    means, stderrs, problems = stored.collected(place, chosen, sae, {})
    lacking = [name for name in chosen if stored.path(place, name, sae) is None]
    problems += [f"the eval {name} failed there: see log.txt" for name in lacking]
    return dict(means=means, stderrs=stderrs) | ({"problems": problems} if problems else {})


def _how(chosen: dict[str, dict]) -> dict:
    """What a measurement depends on beside the SAE, the model and the texts, of which a run has one."""
    return dict(evals=finite(chosen), code=identity.evals_digest())


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

