"""From which width on a step of few features pays, against dense products:
python -m tests.benchmarks.sparse [--device cuda]

One row per width and k: a TopK step (`variants.kit.steps.gradients`) either way in turn, median seconds of `--steps`,
and their ratio beside what `variants.kit.sparse.sparse_pays` decides: it is right where it says sparse below 1. Needs
torch alone; the defaults are Gemma-2-2B's on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch

from tests.benchmarks.training import now, numbers
from variants import base, topk
from variants.kit.sparse import taken
from variants.kit.steps import gradients


def step_seconds(sae: topk.SAE, batch: base.Batch, sparse: bool) -> float:
    """One forward and backward pass, waited for."""
    with taken(sparse):
        start = now(batch.x.device.type)
        gradients(sae, batch, base.Progress(50, 100, 0, 10**12), print)
        return now(batch.x.device.type) - start


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--d_in", type=int, default=2304 if gpu else 576)
    parser.add_argument("--widths", default="4096,16384,65536,262144" if gpu else "2304,16384")
    parser.add_argument("--ks", default="32,64,128,320" if gpu else "16,64,128,256")
    parser.add_argument("--batch_size", type=int, default=2048 if gpu else 1024)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, D = "
          f"{args.d_in}, B = {args.batch_size}\n\n| width | k | sparse, ms | dense, ms | sparse / dense | chosen |\n"
          "|--:|--:|--:|--:|--:|---|")
    for width, k in itertools.product(numbers(args.widths), numbers(args.ks)):
        torch.manual_seed(0)
        sae = topk.SAE(args.d_in, width, k=k).to(args.device)
        batch = base.Batch(torch.randn(args.batch_size, args.d_in, device=args.device) / args.d_in**0.5)
        seconds = {True: [], False: []}
        for _, sparse in itertools.product(range(args.steps + 1), (True, False)):
            seconds[sparse].append(step_seconds(sae, batch, sparse))
        found, dense = (1e3 * statistics.median(seconds[sparse][1:]) for sparse in (True, False))
        chosen = "sparse" if base.sparse_pays(batch.x.device, k, width) else "dense"
        print(f"| {width:,} | {k} | {found:.2f} | {dense:.2f} | {found / dense:.2f} | {chosen} |", flush=True)
        del sae


if __name__ == "__main__":
    main()
