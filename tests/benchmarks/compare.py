"""How long comparing takes as a folder fills with runs: python -m tests.benchmarks.compare

Copies of a stored record of the embedded model with every eval, each with numbers of its own, in a temporary folder.
Seconds of the whole process, the start of Python included: the median of three, all forms taking turns.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from runs.compare import BASELINES

PROJECT = BASELINES.parent.parent
RECORD = BASELINES / "smollm2-135m-instruct/topk/final_info.json"
NUMBERS, TIMES = (10, 100, 1000), 3
FORMS = {"text": [], "markdown": ["--markdown"], "csv": ["--csv"], "json": ["--json"]}


def main() -> None:
    print(f"| runs | {' | '.join(f'{form}, seconds | ratio' for form in FORMS)} |")
    print(f"|--:{'|--:' * 2 * len(FORMS)}|")
    before: dict[str, float] = {}
    for n in NUMBERS:
        with tempfile.TemporaryDirectory() as folder:
            runs = fill(Path(folder), n)
            taken = [{form: seconds(runs, flags) for form, flags in FORMS.items()} for _ in range(TIMES)]
        now = {form: median(of[form] for of in taken) for form in FORMS}
        ratios = {form: f"{now[form] / before[form]:.1f}" if before else "" for form in FORMS}
        cells = (f"{now[form]:.2f} | {ratios[form]}" for form in FORMS)
        print(f"| {n:,} | {' | '.join(cells)} |", flush=True)
        before = now


def fill(folder: Path, n: int) -> list[str]:
    """Run folders run_1 to run_n, one SAE each, with every figure a little different from run to run; their paths."""
    (section, entry), = json.loads(RECORD.read_text(encoding="utf-8")).items()
    rng = random.Random(0)
    for i in range(1, n + 1):
        means = {m: v * (1 + rng.gauss(0, 0.01)) if isinstance(v, float) else v for m, v in entry["means"].items()}
        run = folder / f"run_{i}"
        run.mkdir()
        (run / "final_info.json").write_text(json.dumps({section: entry | {"means": means}}, indent=1),
                                             encoding="utf-8")
    return [str(folder / f"run_{i}") for i in range(1, n + 1)]


def seconds(runs: list[str], flags: list[str]) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "runs.compare", *runs, *flags], cwd=PROJECT, stdout=subprocess.DEVNULL,
                   check=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
