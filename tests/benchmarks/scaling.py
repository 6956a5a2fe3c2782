"""On paper: tokens/s, memory and hours of a run on 1, 8 and 64 GPUs, by width: python -m tests.benchmarks.scaling

Gemma-2-2B to layer 12, TopK, context 128; H200s: 790 TFLOP/s in bf16, 4.3 TB/s of memory; each GPU sends and receives
450 GB/s within a machine of eight (NVLink), 50 GB/s between machines. Seconds a token, for D = 2304, F features, B
tokens a batch, W GPUs:

    t = (2.08e9 + 10·D·F) / (e·790e12·W)     the language model and the SAE's matrix products, at the share e = .7
                                             of the rate; from F = 1,024·k on only the encoder's, 2·D·F, and four times
                                             k = 32 rows of W_dec or W_enc are read, 16·k·D / (1.7e12·W)
      + 8·F / (4.3e12·W)                     pre-activations, written and read twice in bf16
      + (64 + 40)·D·F / (4.3e12·S·B)         per step: Adam (32 bytes a parameter), projection, clipping, unit norm (20)
      + 2·(W − 1)/W · 8·D·F / (link·B)       per step: gradients averaged; spread over S = W GPUs, gathered and
                                             scattered: as much
      + 2·D·(W − 1)/W / (link·W)             per token: bf16 activations handed to the ranks that need them

S = 1: the SAE is whole on every GPU; S = W: spread over them. Nothing overlaps in this. What one H200 was measured to
reach stands beside it in README.md; several GPUs were not measured.
Memory is the forecast that a run prints itself. The share e is an assumption: `python -m tests.benchmarks.training`
measures it.
"""

from __future__ import annotations

import torch

import experiment
from variants import base
from variants.preflight import budget, check

D, K, LM_FLOP, TOKENS = 2304, 32, 2.08e9, 500e6
RATE, ACHIEVED, MEMORY = 790e12, 0.7, 4.3e12
WIDTHS = (2**14, 2**16, 2**18, 2**20)
WITHIN, BETWEEN, ROOM = 450e9, 50e9, 141e9  # bytes/s, bytes/s, bytes of an H200
GEMMA = dict(d_model=D, n_layers=26, block_parameters=77_856_768, bytes=5_230_000_000)


def tokens_per_s(F: int, B: int, W: int, S: int) -> float:
    """The formula above."""
    link = WITHIN if W <= 8 else BETWEEN
    others, sparse = (W - 1) / W, base.sparse_pays(torch.device("cuda"), K, F)
    rows = 16 * K * D / (1.7e12 * W) if sparse else 0.0
    products = (LM_FLOP + (2 if sparse else 10) * D * F) / (ACHIEVED * RATE * W)
    return 1 / (products + rows + 8 * F / (MEMORY * W) + 104 * D * F / (MEMORY * S * B)
                + 2 * others * 8 * D * F / (link * B) + 2 * D * others / (link * W))


def findings(F: int, B: int) -> check.Findings:
    """What preflight finds of a step of B tokens on a GPU."""
    return check.run("topk", {}, d_in=D, d_sae=F, batch_size=B, total_steps=int(TOKENS / B), lr=None, seed=0,
                     accelerator=True, train_step=experiment.train_step, make_optimizer=experiment.make_optimizer,
                     reference_files=[])


def cells(F: int, B: int, W: int) -> list[str]:
    """tokens/s, GB a GPU and hours, each with the SAE whole on every GPU and spread over them."""
    found, columns = findings(F, B // W), []
    for S in sorted({1, W}):
        block = 2**19 * (4 if W > 1 else 1) // W
        peak = budget.peak(budget.need(found, 1, GEMMA, block, 64 * 128, 2, True, "cuda", S))
        speed = tokens_per_s(F, B, W, S)
        fits = peak <= ROOM
        reached, hours = (f"{speed:,.0f}", f"{TOKENS / speed / 3600:.2f}") if fits else ("–", "–")
        columns.append((reached, f"{peak / 1e9:.0f}", hours))
    return [" / ".join(parts) for parts in zip(*columns)]


def main() -> None:
    print("| width | GPUs | batch | tokens/s, whole / spread | GB a GPU | hours for 500 M tokens |\n"
          "|--:|--:|--:|--:|--:|--:|")
    for F in WIDTHS:
        for W, B in ((1, 4096), (8, 4096), (8, 16384), (64, 32768)):
            print(f"| {F:,} | {W} | {B:,} | {' | '.join(cells(F, B, W))} |")


if __name__ == "__main__":
    main()
