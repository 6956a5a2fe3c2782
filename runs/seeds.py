"""Runs of one setting with several seeds as one row: python -m runs.seeds run_1 run_2 … [--metrics core.r2,variant.x].

Runs that differ in nothing but the seed are put together: mean ± standard error over them (n − 1 in the variance), the
single value where there is only one. The difference to the first row's runs counts (*) where it exceeds twice the two
standard errors together. Standard library only.
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

from runs.reading import Run, read
from runs.tables import BY_RUN, Table, as_markdown, as_text, plain
from runs.wording import number

SETTING = ("model", "layer", "variant", "hyper", "d_sae", "num_tokens", "passes", "batch_size", "lr", "init_from")


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by setting, named by its variant and the hyper-parameters in which it differs from the first of that."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[json.dumps([run.config.get(key) for key in SETTING], sort_keys=True)].append(run)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runs.seeds", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders; the first one's setting is the reference")
    parser.add_argument("--metrics", default="", help="full names, comma-separated")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(argv)
    try:
        runs = [run for path in options.runs for run in read(Path(path)).values()]
    except (ValueError, OSError) as error:
        print(str(error).split("\n")[0], file=sys.stderr)
        return 1
    found = table(runs, [m for m in options.metrics.split(",") if m])
    print(as_markdown(found) if options.markdown else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
