"""Records of runs that tests compare, and the command in a process of its own."""

import subprocess
import sys
from pathlib import Path

from runs import folder
from runs.reading import Run
from tests import PROJECT

GEMMA = PROJECT / "runs/baseline/gemma-2-2b"
CE, R2 = "core.ce_loss_score", "core.r2"
DIRECTIONS = {CE: "higher", "core.mse": "lower", "core.l0": "", "sparse_probing.sae_top_1_test_accuracy": "higher"}
TWO_ENDS = ((20.0, 0.80), (100.0, 0.92))  # (L0, CE loss score): in the middle on a log axis, at L0 44.7, .86


def entry(means, stderrs=None, **config):
    """An SAE's record as a run's final_info.json holds it."""
    base = {"model": "org/Tiny", "layer": 3, "hook_name": "blocks.3.hook_resid_post", "d_sae": 1000, "steps": 10}
    return {"means": means, "stderrs": stderrs or {}, "config": {**base, **config}, "problems": []}


def run(name, means, stderrs=None, **config):
    """The same, read."""
    return Run(name, means, stderrs or {}, entry({}, **config)["config"], [], Path(f"/nowhere/{name}/final_info.json"))


def saes_of(variant, points, **config):
    """One SAE per (L0, CE loss score), in the order given."""
    return [run(f"{variant} l_{l0:g}", {"core.l0": l0, CE: ce}, {CE: 0.002}, variant=variant, hyper={"l": l0}, **config)
            for l0, ce in points]


def record(path, sections):
    """A run's folder with those records."""
    folder.write_json(path / "final_info.json", sections)
    return path


def command(*arguments):
    """Python in a process of its own, in the project's folder."""
    return subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60)


def cells(text, metric):
    """The figures in a metric's row of a printed table."""
    return next(line for line in text.splitlines() if line.startswith(metric)).split()[1:]
