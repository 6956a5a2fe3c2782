"""How a run's end is told to programs: verdict.json in its folder, the same as last lines of stdout, and the ledger.

Whatever fails in here costs a note, never the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import variants
from runs import environment, folder, ledger, verdict
from runs.comparison import Comparison
from runs.live import LIVE
from runs.reading import slug
from runs.voice import say
from variants.kit import ranks


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  the run's results are there, whatever is wrong with this
        say(f"note: no verdict: {type(error).__name__}: {error}")


def finished(settings, out: Path, info: dict, comparisons: list[Comparison]) -> None:
    """Tell the verdict on a finished run, of the comparison with its baseline, and enter it into the ledger."""
    with _harmless():
        said = _verdict(settings, out, info, comparisons)
        _tell(said, out)
        _enter(settings, out.parent, said, info)


def again(settings, out: Path, info: dict, comparisons: list[Comparison]) -> None:
    """Tell once more what a finished run's verdict is, anew where another headline is asked for: no new line."""
    if ranks.number():
        return
    with _harmless():
        metric = verdict.headline(settings.headline, _runs(comparisons), settings.evals)
        said = verdict.stored(out)
        if said.get("verdict") not in (None, "failed") and said.get("metric") == metric:
            _tell(said, None)
        else:
            _tell(_verdict(settings, out, info, comparisons), out)


def failed(settings, out: Optional[Path], info: dict, details: dict) -> None:
    """Tell that a run failed. `details`: what error.json holds; `out`: its folder, where it has one of its own."""
    with _harmless():
        what = details["message"] or details["type"]
        why = what.splitlines()[0]
        if not details["advice"]:  # an exception of somebody's own: its type is half of what it says
            why = f"{details['type']}: {why}"
        if details["where"] and details["where"] not in why:
            why += f", at {details['where']}"
        _end(settings, out, info, _failed(why, details["phase"], details["advice"]))


def refused(details: dict) -> None:
    """Tell that a command line is none, or that its folder is another process's: no run, no line of the ledger."""
    with _harmless():
        why = (details["message"] or details["type"]).splitlines()[0]
        _tell(_failed(why, details["phase"], details["advice"]), None)


def interrupted(settings, out: Path, info: dict, signal: str) -> None:
    """Tell that a signal ended a run, which the same command continues."""
    with _harmless():
        why = f"interrupted by {signal}; the same command continues"
        _end(settings, out, info, _failed(why, info["phase"], "run it again"))


def _failed(cause: str, phase: str, advice: str) -> dict:
    """What a verdict says of a run without a result: `why`, as every verdict does, which here is its cause."""
    return dict(verdict="failed", why=cause, phase=phase, cause=cause, advice=advice)


def _end(settings, out: Optional[Path], info: dict, said: dict) -> None:
    """What is told of a run that has no result."""
    facts = _facts(settings, out, info)
    said |= {key: facts[key] for key in ("minutes", "run", "variant", "model", "seed", "lines_changed")}
    if out is not None:
        _tell(said, out)
        _enter(settings, out.parent, said, info)
        return
    _tell(said, None)
    place = folder.place(settings.out_dir)
    if place is not None:
        _enter(settings, place.parent, said, info)


def _verdict(settings, out: Path, info: dict, comparisons: list[Comparison]) -> dict:
    """verdict.json of a finished run, in the order of its keys."""
    metric = verdict.headline(settings.headline, _runs(comparisons), settings.evals)
    judged = verdict.judged(comparisons, metric)
    facts = judged | _facts(settings, out, info)
    more = {"saes": judged["saes"]} if "saes" in judged else {}
    return {key: facts.get(key) for key in verdict.KEYS} | more


def _runs(comparisons: list[Comparison]) -> list:
    return [one.run for comparison in comparisons for one in comparison.saes]


def _facts(settings, out: Optional[Path], info: dict) -> dict:
    """What is known of a run besides its figures."""
    peaks = (info.get("peak_memory_gb") or {}).values()
    seconds = info.get("seconds") or {}
    changed, nearest = None, None
    with contextlib.suppress(OSError, ValueError):  # the variant's file that cannot be read is then the failure
        changed, nearest = verdict.lines_changed(variants.path(settings.variant))
    return dict(minutes=round(sum(seconds.values()) / 60, 2), tokens_per_s=info.get("tokens_per_s"),
                peak_memory_gb=max((peak["host"] for peak in peaks), default=None),
                peak_gpu_memory_gb=max((peak["gpu"] for peak in peaks if "gpu" in peak), default=None),
                lines_changed=changed, nearest_variant=nearest or None,
                run=Path(settings.out_dir).name if out is None else out.name, variant=_title(settings),
                model=slug(settings.model), seed=settings.seed)


def _title(settings) -> str:
    with contextlib.suppress(OSError, ValueError, LookupError):
        return variants.title(settings.variant)
    return Path(settings.variant).stem


def _tell(said: dict, out: Optional[Path]) -> None:
    """Write verdict.json, where there is a folder for it, and print it."""
    if out is not None and out.is_dir():
        try:
            folder.write_json(out / verdict.FILE, said)
        except OSError as error:
            say(f"note: no {verdict.FILE}: {error.strerror or error}")
    LIVE.event("verdict", **said)
    say("\n".join(verdict.lines(said)))


def _enter(settings, place: Path, said: dict, info: dict) -> None:
    """A line for the run in the ledger of the folder that holds its own."""
    if not place.is_dir():
        return
    source = None
    with contextlib.suppress(OSError, ValueError):
        source = variants.text(variants.path(settings.variant))
    commit = info["commit"] if "commit" in info else environment.git_commit()
    row = ledger.row(said, source, commit, settings.hyper, settings.sweep, settings.note)
    note = ledger.append(place, row)
    if note:
        say(f"note: {note}")
