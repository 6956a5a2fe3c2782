"""A comparison as a whole, for programs: every metric of every run in full precision, as JSON or CSV."""

from __future__ import annotations

import csv
import io
import json

from runs import stability
from runs.comparison import UNKNOWN, Compared, Comparison, Floor
from runs.frontier import Interpolated, is_between, l0_of
from runs.reading import Run, finite
from runs.wording import beyond, words

DECODERS = 24  # SAEs whose decoders are read: seconds each at a width of 16k


def as_json(comparisons: list[Comparison], left_out: list[str] | None = None, verdict: dict | None = None) -> str:
    """The same data as one strict JSON document: numbers in full precision, null for what is not known.

    "comparisons": one per model, layer and hook; "left_out": what could not be read, a line each; "verdict": one word
    on the last run against the first, or the baseline, and what it rests on, flat, as verdict.json (runs/verdict.py).
    Of a comparison:
    model, layer, hook_name, references (with means and stderrs), stand_in (the first runs are the baseline, for want
    of a stored one), frontier, same_sae (names of runs that are one and the same), saes.
    Of each of the saes: name, path, variant, l0, baseline (name, path, variant, l0, and `between` which SAEs it lies),
    equal_l0, not_compared (why nothing is, a line each), other_settings (evals that are not compared for them),
    differs, dense, problems, warnings, random (a frozen random decoder: name, path, variant, l0, at_own_l0, and
    not_better: {headline metric in which the run is not surely better: difference, its stderr}; null where none is
    stored for the run's model, layer, width and L0), metrics; see `Compared`.
    Of up to `DECODERS` SAEs new_features: baseline, baseline_l0, threshold, count, of, mean_cosine, only_firing, new
    (their numbers), problem; null without decoders.
    Of each metric: value, stderr, random, baseline, baseline_stderr, baseline_l0, interpolated, difference,
    difference_stderr, direction, verdict (better, worse, equal, not compared or null), beyond_two_stderr (null: not
    known); see `Judged`.
    """
    decoders = sum(len(c.saes) for c in comparisons) <= DECODERS
    document = {"comparisons": [_comparison(c, decoders) for c in comparisons], "left_out": left_out or [],
                "verdict": finite(verdict or {})}
    return json.dumps(document, allow_nan=False)


def _comparison(comparison: Comparison, decoders: bool) -> dict:
    model, layer, hook = comparison.identity
    twins: dict[int, list[str]] = {}
    for one in comparison.saes:
        if one.twin is not None:
            twins.setdefault(one.twin, []).append(one.run.name)
    return {"model": model, "layer": layer, "hook_name": hook,
            "references": [_named(run) | {"means": run.means, "stderrs": run.stderrs} for run in comparison.references],
            "stand_in": bool(comparison.stand_ins),
            "frontier": [_named(run) for run in comparison.frontier],
            "same_sae": list(twins.values()),
            "saes": [_compared(one, comparison.directions, decoders)
                     for one in (*comparison.stand_ins, *comparison.saes)]}


def _named(run: Run) -> dict:
    return {"name": run.name, "path": str(run.path), "variant": run.config.get("variant"), "l0": l0_of(run)}


def _compared(one: Compared, directions: dict[str, str], decoders: bool) -> dict:
    new = one.new() if decoders else None
    partner = None
    if one.partner is not None:
        between = one.partner.between if isinstance(one.partner, Interpolated) else ()
        partner = _named(one.partner) | {"between": [_named(sae) for sae in between]}
    return _named(one.run) | {
        "baseline": partner, "equal_l0": one.equal_l0, "not_compared": one.obstacles,
        "other_settings": finite(one.other_settings), "differs": finite(one.differs),
        "dense": finite(one.run.config.get("dense")), "problems": one.run.problems, "warnings": one.warnings,
        "random": _floor(one.floor),
        "new_features": None if new is None else stability.as_data(new),
        "metrics": {metric: _metric(one, metric, directions.get(metric)) for metric in one.run.means}}


def _floor(floor: Floor | None) -> dict | None:
    if floor is None:
        return None
    not_better = {metric: {"difference": judged.difference, "difference_stderr": finite(judged.stderr)}
                  for metric, judged in floor.not_better.items()}
    return _named(floor.run) | {"at_own_l0": floor.at_own_l0, "not_better": not_better}


def _metric(one: Compared, metric: str, direction: str | None) -> dict:
    judged, source = one.judged(metric), one.source(metric)
    theirs = source.means.get(metric) if source else None
    return {"value": one.run.means[metric], "stderr": one.run.stderrs.get(metric),
            "random": one.floor.run.means.get(metric) if one.floor else None,
            "baseline": theirs,
            "baseline_stderr": source.stderrs.get(metric) if source else None,
            "baseline_l0": l0_of(source) if theirs is not None else None,
            "interpolated": is_between(one.partner, metric),
            "difference": finite(judged.difference), "difference_stderr": finite(judged.stderr),
            "direction": direction or None, "verdict": judged.verdict or None, "beyond_two_stderr": judged.beyond}


def as_csv(comparisons: list[Comparison]) -> str:
    """Every metric of every run in full precision, one line each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "model", "layer", "metric", "value", "stderr", "baseline", "baseline_value",
                     "baseline_stderr", "difference", "direction", "verdict", "beyond_2_se", "l0", "baseline_l0"])
    stored = any(c.references and not c.stand_ins for c in comparisons)
    for comparison in comparisons:
        for one in comparison.saes if stored else (*comparison.stand_ins, *comparison.saes):
            _rows(writer, one, comparison.directions)
    return out.getvalue().rstrip("\n")


def _rows(writer, one: Compared, directions: dict[str, str]) -> None:
    run, partner = one.run, one.at_l0 or one.nearest
    of_run = run.name, run.config.get("model"), run.config.get("layer")
    l0s = ["" if side is None or l0_of(side) is None else str(l0_of(side)) for side in (run, partner)]
    name, means, stderrs = (partner.name, partner.means, partner.stderrs) if partner else (None, {}, {})
    for metric, value in run.means.items():
        theirs = means.get(metric)
        judged = UNKNOWN if theirs is None else one.judged(metric)
        writer.writerow([*of_run, metric, value, run.stderrs.get(metric), name, theirs, stderrs.get(metric),
                         judged.difference, directions.get(metric, ""), words(one, judged), beyond(judged), *l0s])
