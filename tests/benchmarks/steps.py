"""How long a training step of each field variant takes on a GPU, by itself: python -m tests.benchmarks.steps

Milliseconds a step of `--batch_size` tokens, the language model left out: 20 steps in turn without waiting, the median
of five such rounds. `plain`: as PyTorch does it, without kernels of our own; `kernels`: as a short run does it;
`compiled`: as a run of 10,000 steps and more does it, where the variant's loss is compiled; then seconds of compiling,
and how far loss and gradients are from the plain ones after one step on the same batch, the largest of all.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from unittest import mock

import torch

import experiment
import variants
from variants import base
from variants.kit import compiled, gpu
from variants.kit.hyper import hyperparameters
from variants.kit.steps import gradients

FIELD = ("topk", "batch_topk", "matryoshka_batch_topk", "standard", "standard_april", "p_anneal", "jumprelu", "gated")
STEPS = 20


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--variants", default=",".join(FIELD))
    parser.add_argument("--d_in", type=int, default=2304)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--k", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    print(f"d_in {args.d_in}, width {args.width:,}, batch {args.batch_size:,}, k {args.k}, {args.device}\n")
    print("| variant | plain, ms | kernels, ms | compiled, ms | compiled / plain | compiling, s | largest difference |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in args.variants.split(","):
        print("|", " | ".join([f"`{name}`", *row(args, name)]), "|", flush=True)


def row(args, name: str) -> list[str]:
    """Its cells after the first."""
    x_BD = torch.randn(args.batch_size, args.d_in, generator=torch.Generator().manual_seed(0)) / args.d_in**0.5
    batch = base.Batch(x_BD.to(args.device))
    long, short = compiled.PAYS_FROM, compiled.PAYS_FROM - 1
    with mock.patch.object(gpu, "kernels", lambda: None):
        sae, plain = timed(args, name, batch, short)
        found = differences(sae, batch, short)
    _, with_kernels = timed(args, name, batch, short)
    if not sae.compiled_loss:
        return [f"{plain:.2f}", f"{with_kernels:.2f}", "", f"{with_kernels / plain:.2f}", "", ""]
    start = time.monotonic()
    other = differences(sae, batch, long)
    took = time.monotonic() - start
    largest = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(other, found))
    _, fast = timed(args, name, batch, long)
    return [f"{plain:.2f}", f"{with_kernels:.2f}", f"{fast:.2f}", f"{fast / plain:.2f}", f"{took:.1f}",
            f"{largest:.1e}"]


def timed(args, name: str, batch: base.Batch, total: int) -> tuple[base.SAE, float]:
    """An SAE after some steps of a run of `total`, and the milliseconds of one."""
    module = variants.load(name)
    torch.manual_seed(0)
    hyper = {"k": args.k} if "k" in hyperparameters(module) else {}
    sae = variants.build(module, args.d_in, args.width, hyper).to(args.device)
    optimizer = experiment.make_optimizer(sae, 1e-4)
    sae.look(base.Progress(0, total, 0, total * args.batch_size))
    rounds = []
    for r in range(6):
        start = now(args.device)
        for step in range(r * STEPS, (r + 1) * STEPS):
            progress = base.Progress(step, total, step * args.batch_size, total * args.batch_size)
            experiment.train_step(sae, optimizer, batch, progress)
        rounds.append(now(args.device) - start)
    return sae, 1e3 * median(rounds[1:]) / STEPS  # the first warms up


def differences(sae: base.SAE, batch: base.Batch, total: int) -> list[torch.Tensor]:
    """Loss and gradients of an SAE as it is."""
    loss, _ = gradients(sae, batch, base.Progress(total // 2, total, 0, 10**9), print)
    return [loss, *(p.grad.clone() for p in sae.parameters())]


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    main()
