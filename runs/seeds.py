"""Runs of one setting with several seeds as one row: python -m runs.seeds run_1 run_2 … [--metrics core.r2,variant.x].

Runs that differ in nothing but the seed are put together: mean ± standard error over them (n − 1 in the variance), the
single value where there is only one. The difference to the first row's runs counts (*) where it exceeds twice the two
standard errors together. Where the decoders of several seeds are at hand a second table says how far their features
come back (runs/stability.py). --json: all of it in full precision. --store FILE: a baseline of means over seeds, whose
errors are the spread that the seed alone gives one SAE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from runs import stability
from runs.comparison import SETTINGS
from runs.reading import Run, code_of, read, setting
from runs.tables import BY_RUN, Table, as_markdown, as_text, plain
from runs.wording import first_line, in_a_line, number

# in what runs of one setting agree: all but the seed
SETTING = ("model", "layer", "hook_name", *(name for name in SETTINGS if name != "seed"), "init_from")
WIDE = 2**15  # features above which matching decoders takes minutes


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by setting, named by its variant and the hyper-parameters in which it differs from the first of that."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        same = [*(setting(run.config, key) for key in SETTING), code_of(run)]
        groups[json.dumps(same, sort_keys=True)].append(run)
    first: dict[str, dict] = {}
    named = {}
    for members in groups.values():
        variant, hyper = members[0].config.get("variant", members[0].name), members[0].config.get("hyper") or {}
        base = first.setdefault(variant, hyper)
        changed = [f"{key}={value}" for key, value in hyper.items() if base.get(key) != value]
        name = f"{variant} {', '.join(changed)}".strip()
        named[name if name not in named else f"{name} ({members[0].name})"] = members
    return named


def estimate(runs: list[Run], metric: str) -> tuple[float, float | None, int] | None:
    """Mean over seeds, its standard error (None for one run) and the number of runs that have the metric."""
    values = [run.means[metric] for run in runs if run.means.get(metric) is not None]
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return fmean(values), error, len(values)


def table(runs: Iterable[Run], metrics: list[str] | None = None) -> Table:
    """One row per setting; `metrics` by full name, the headline ones by default."""
    groups = grouped(runs)
    metrics = metrics or [m if "top_1" not in m else f"{m}_test_accuracy" for m in BY_RUN]
    metrics = [m for m in metrics if any(estimate(members, m) for members in groups.values())]
    reference = next(iter(groups.values()), [])
    rows = []
    for name, members in groups.items():
        cells = [name, str(len(members))]
        for metric in metrics:
            mine, theirs = estimate(members, metric), estimate(reference, metric)
            if mine is None:
                cells.append("–")
                continue
            error = f" ± {mine[1]:.2g}" if mine[1] is not None else ""
            known = theirs is not None and mine[1] is not None and theirs[1] is not None and members is not reference
            beyond = known and abs(mine[0] - theirs[0]) > 2 * math.hypot(mine[1], theirs[1])
            cells.append(number(mine[0]) + error + ("*" if beyond else ""))
        rows.append(plain(cells))
    below = []
    if rows:
        first = rows[0][0].text
        below.append(f"mean ± standard error over seeds; * differs from {first} by more than two standard errors")
    names = [m.rpartition(".")[2].replace("_test_accuracy", "") for m in metrics]
    return Table([], ["setting", "runs", *names], rows, below)


def stabilities(groups: dict[str, list[Run]]) -> dict[str, dict]:
    """{setting: how far its features come back under another seed}, of those whose decoders are at hand."""
    found = {}
    for name, members in groups.items():
        if len(members) > 1 and (members[0].config.get("d_sae") or 0) > WIDE:
            print(f"matching the decoders of {name}: minutes at this width, or --no_decoders", file=sys.stderr)
        try:
            found[name] = stability.between_seeds(members)
        # a damaged decoder, or one of code that is not in variants/: the runs' other figures stand
        except (ValueError, OSError) as error:
            print(f"decoders of {name} not matched: {first_line(error)}", file=sys.stderr)
            found[name] = None
    return {name: one for name, one in found.items() if one is not None}


def stability_table(found: dict[str, dict]) -> Table:
    """Three rows per setting: all features, those that fire, and as many random directions."""
    rows = []
    for name, one in found.items():
        kinds = {name: "all", "  those that fire": "firing", "  random directions": "random"}
        for title, kind in kinds.items():
            if one[kind] is None:
                continue
            cells = [title, f"{len(one['seeds'])}" if kind == "all" else ""]
            for estimated in one[kind].values():
                error = f" ± {estimated['stderr']:.2g}" if estimated["stderr"] and kind != "random" else ""
                cells.append(number(estimated["mean"]) + error)
            rows.append(plain(cells))
    below = ["features matched one to one between each two seeds (PW-MCC); ± jackknife over seeds, from three on"]
    if any(pair["matching"] != "one to one" for one in found.values() for pair in one["pairs"]):
        below.append("too wide for that: mutual nearest features are the pairs, the mean is over those alone")
    shares = [f"cosine {name.removeprefix('share_above_').replace('0.', '> .')}"
              for name in next(iter(found.values()))["all"] if name.startswith("share")]
    return Table([], ["decoders of", "seeds", "mean cosine", *shares], rows, below)


def as_json(groups: dict[str, list[Run]], found: dict[str, dict], metrics: list[str]) -> str:
    """Every setting's runs, {metric: {"mean", "stderr", "runs"}} of all metrics or those asked for, and stability."""
    settings = []
    for name, members in groups.items():
        estimates = {}
        for metric in metrics or dict.fromkeys(m for run in members for m in run.means):
            known = estimate(members, metric)
            if known is not None:
                estimates[metric] = dict(zip(("mean", "stderr", "runs"), known))
        settings.append({"setting": name, "seeds": [run.config.get("seed") for run in members],
                         "runs": [{"name": run.name, "path": str(run.path)} for run in members],
                         "metrics": estimates, "stability": found.get(name)})
    return json.dumps({"settings": settings}, allow_nan=False)


def averaged(members: list[Run]) -> dict:
    """A section of a stored baseline: means over runs that differ in the seed alone, with their standard deviation.

    A run that is compared with it is one draw of such a seed, so that the deviation of one, not the error of the mean,
    is what its difference must exceed. ValueError for a single run.
    """
    if len(members) < 2:
        raise ValueError(f"{members[0].name}: one seed has no spread\ngive runs of several seeds")
    common = [metric for metric, value in members[0].means.items()
              if value is not None and all(run.means.get(metric) is not None for run in members)]
    values = {metric: [run.means[metric] for run in members] for metric in common}
    seeds = sorted(run.config.get("seed", 0) for run in members)
    config = {key: value for key, value in members[0].config.items() if key != "seed"} | {"seeds": seeds}
    return dict(means={metric: fmean(found) for metric, found in values.items()},
                stderrs={metric: stdev(found) for metric, found in values.items() if stdev(found) > 0},
                config=config, problems=[])


def store(groups: dict[str, list[Run]], file: Path) -> None:
    """Write a file that runs.compare takes for a baseline: a section for each setting, named as its first run's SAE."""
    from runs.folder import write_json

    sections = [members[0].section for members in groups.values()]
    if "" in sections or len(set(sections)) < len(sections):  # runs without a sweep have SAEs of one name
        sections = list(groups)
    write_json(file, dict(zip(sections, map(averaged, groups.values()))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runs.seeds", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders; the first one's setting is the reference")
    parser.add_argument("--metrics", default="", help="full names, comma-separated")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--no_decoders", action="store_true", help="do not match the features of different seeds")
    parser.add_argument("--store", type=Path, metavar="FILE", help="write means over seeds, as a baseline")
    parser.add_argument("--json", action="store_true", help="all figures in full precision, for programs")
    options = parser.parse_args(argv)
    try:
        runs = [run for path in options.runs for run in read(Path(path)).values()]
    except (ValueError, OSError) as error:
        print(in_a_line(error), file=sys.stderr)
        return 1
    groups = grouped(runs)
    if options.store:
        return stored(groups, options.store)
    found = {} if options.no_decoders else stabilities(groups)
    metrics = [m for m in options.metrics.split(",") if m]
    if options.json:
        print(as_json(groups, found, metrics))
        return 0
    shown = [table(runs, metrics)]
    if found:
        shown.append(stability_table(found))
    print("\n\n".join(as_markdown(one) if options.markdown else as_text(one) for one in shown))
    return 0


def stored(groups: dict[str, list[Run]], file: Path) -> int:
    """`store`, and what was stored or why nothing was, in a line; the exit status."""
    try:
        store(groups, file)
    except (ValueError, OSError) as error:
        print(str(error).replace("\n", "; "), file=sys.stderr)
        return 1
    print(f"{file}: {len(groups)} settings, means over {len(next(iter(groups.values())))} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
