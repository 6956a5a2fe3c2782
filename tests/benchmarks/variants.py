"""Variants side by side at one L0, over seeds, from finished runs that swept their sparsity:
python -m tests.benchmarks.variants --l0 8 --metrics ground_truth.f1,ground_truth.mcc run_1 run_2 …

A run's figure at that L0 lies between its SAEs of the next L0 to either side (runs/frontier.py). Runs that differ in
nothing but the seed and the swept hyper-parameter make a row: mean ± standard deviation over them, as SynthSAEBench
tabulates them, and the number of runs.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from runs import frontier
from runs.reading import Run, read
from runs.wording import number


def by_variant(runs: list[list[Run]]) -> dict[str, list[list[Run]]]:
    """The SAEs of runs by variant, and by the hyper-parameters in which runs of one variant differ."""
    known = defaultdict(set)
    for saes in runs:
        for key, value in fixed_hyper(saes).items():
            known[saes[0].config["variant"], key].add(json.dumps(value))
    found = defaultdict(list)
    for saes in runs:
        variant = saes[0].config["variant"]
        told = [f"{key}={value}" for key, value in fixed_hyper(saes).items() if len(known[variant, key]) > 1]
        found[" ".join([variant, *told])].append(saes)
    return found


def fixed_hyper(saes: list[Run]) -> dict:
    """The hyper-parameters that all SAEs of a run share."""
    first = saes[0].config["hyper"]
    return {key: value for key, value in first.items()
            if all(json.dumps(sae.config["hyper"].get(key)) == json.dumps(value) for sae in saes)}


def rows(runs: list[list[Run]], l0: float, metrics: list[str]) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """(variant, runs, (mean, standard deviation) of each metric), the best of the first metric first."""
    found = []
    for name, members in by_variant(runs).items():
        at = [run for run in (frontier.at(l0, saes) for saes in members) if run is not None]
        values = [[run.means[metric] for run in at] for metric in metrics]
        if at:
            spreads = [stdev(of_metric) if len(of_metric) > 1 else 0.0 for of_metric in values]
            found.append((name, len(at), list(zip(map(fmean, values), spreads))))
    return sorted(found, key=lambda row: -row[2][0][0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--l0", type=float, required=True)
    parser.add_argument("--metrics", required=True, help="full names, comma-separated")
    options = parser.parse_args(argv)
    metrics = options.metrics.split(",")
    print("| variant | runs | " + " | ".join(metric.rpartition(".")[2] for metric in metrics) + " |")
    print("|---|--:|" + "--:|" * len(metrics))
    for name, n, figures in rows([list(read(path).values()) for path in options.runs], options.l0, metrics):
        print(f"| `{name}` | {n} | " + " | ".join(f"{number(mean)} ± {spread:.4f}" for mean, spread in figures) + " |")


if __name__ == "__main__":
    main()
