"""Folders of many runs, made up: what the ledger and the page of all runs read, with as many figures as real ones."""

import json
import os
import random
from pathlib import Path

from runs import ledger
from runs.folder import write_json
from tests import PROJECT
from tests.runs.records import CE

RECORD = PROJECT / "runs/baseline/smollm2-135m-instruct/topk/final_info.json"
WORDS = {"better": 0.02, "worse": -0.02, "within_noise": 0.001, "suspect": 0.2, "incomparable": None, "failed": None,
         "killed": None}
BEGAN = 1_790_000_000


def many(root: Path, runs: int, seed: int = 0) -> Path:
    """So many runs of five variants in a folder, all kinds of ends among them; three of four have a line in the ledger.

    run_0 is always better, run_1 failed of a want of memory, run_2 was killed; the later ones are drawn.
    """
    draw, written = random.Random(seed), json.loads(RECORD.read_text(encoding="utf-8"))
    (section, base), *_ = written.items()
    for i in range(runs):
        out, at = root / f"run_{i}", BEGAN + 300 * i
        word = (["better", "failed", "killed"] + draw.choices(list(WORDS), k=runs))[i]
        variant, k = draw.choice(["topk", "mine", "gated", "p_anneal", "batch_topk"]), draw.choice([16, 32, 64, 128])
        note = draw.choice(["", "a wider penalty on dead features", "a longer warm-up"])
        settings = dict(variant=variant, hyper=f"k={k}", sweep="", note=note, profile="small", seed=i % 3,
                        model="HuggingFaceTB/SmolLM2-135M-Instruct", layers="9", lr=3e-3, num_tokens=160_000)
        status = {"failed": "failed", "killed": "running"}.get(word, "finished")
        write_json(out / "run_info.json", dict(status=status, phase="training", settings=settings, seed=i % 3,
                                               seconds={"training": 90.0}, commit="0123456789abcdef",
                                               peak_memory_gb={"training": {"host": 0.7}}))
        (out / "variant.py").write_text(variant)
        os.utime(out / "run_info.json", (at, at))
        if word == "killed":
            continue
        said = dict(run=out.name, variant=variant, model="smollm2-135m-instruct", seed=i % 3, metric=None, verdict=word,
                    minutes=1.5, lines_changed=i % 40)
        if word == "failed":
            said |= dict(why="out of memory: 2 GB asked for", phase="training", advice="use a smaller --batch_size")
        else:
            difference = WORDS[word]
            if difference is not None:
                difference += draw.gauss(0, 0.004)
            value, l0 = 0.9 + (difference or 0), k + draw.random()
            said |= dict(metric=CE, value=value, stderr=0.002, l0=l0, difference=difference, difference_stderr=0.003,
                         tokens_per_s=60_000, peak_memory_gb=0.7)
            means = {name: mean * (1 + draw.gauss(0, 0.02)) if isinstance(mean, float) else mean
                     for name, mean in base["means"].items()}
            config = base["config"] | dict(variant=variant, seed=i % 3, hyper=dict(k=k))
            write_json(out / "final_info.json", {section: base | dict(
                means=means | {"core.l0": l0, CE: value}, config=config)})
            (out / "report.html").write_text("<p>a report")
        write_json(out / "verdict.json", said)
        os.utime(out / "verdict.json", (at, at))
        if i % 4:
            ledger.append(root, ledger.row(said, variant.encode(), "0123456789abcdef", f"k={k}", "", note, at))
    return root
