"""Whole runs (training, core, sparse_probing) on tiny random models of many architectures, as a table.

    python -m tests.benchmarks.architectures [NAME ...]

`evals through`: TransformerLens' bridge where it gives the plain model's residuals, else the plain model. `CE` is
core's loss without an SAE, `model's own` that of transformers' class on the same rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import experiment
from evals.texts import packing, tiny
from tests import architectures

CONFIG = {"core": {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 4}}


def line(name: str, folder: Path) -> str:
    """A row of the table: the run of one architecture, or what it says when it refuses."""
    where, said, start = architectures.save(name, folder / name), io.StringIO(), time.monotonic()
    flags = ["--profile=tiny", f"--model={where}", "--layers=1", "--device=cpu", "--num_tokens=8192",
             f"--cache_dir={folder / 'cache'}", f"--eval_config={json.dumps(CONFIG)}",
             f"--out_dir={folder / 'run'}_{name}"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = experiment.main(flags)
    if status:
        return f"| {name} | refused | {said.getvalue().strip().splitlines()[-3]} | | | |"
    means = json.loads((folder / f"run_{name}/final_info.json").read_text())["layer_1"]["means"]
    route = "the plain model" if "through the plain model" in said.getvalue() else "the bridge"
    return (f"| {name} | {route} | {means['core.ce_loss_without_sae']:.5f} | {own_loss(where):.5f} | "
            f"{means['core.r2']:.3f} | {means['sparse_probing.sae_top_1_test_accuracy']:.3f} | "
            f"{time.monotonic() - start:.1f} |")


@torch.no_grad()
def own_loss(where: Path) -> float:
    """Cross-entropy of transformers' own class on the rows that core reads."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager").eval()
    rows_RT = packing.pack(tiny.documents("heldout"), architectures.tokenizer(), 32, 0, 8)
    logits, ordinary = hf(input_ids=rows_RT, use_cache=False).logits.float(), rows_RT[:, :-1] > 1
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][ordinary], rows_RT[:, 1:][ordinary]))


if __name__ == "__main__":
    print("| architecture | evals through | CE | model's own | R² | top-1 probing | s |\n|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as temporary:
        for chosen in sys.argv[1:] or architectures.configurations():
            print(line(chosen, Path(temporary)), flush=True)
