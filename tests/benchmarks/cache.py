"""What keeping a block of activations costs here: python -m tests.benchmarks.cache [--gb 2.4] [--making 1.9]

Seconds and GB/s of storing a block as a training run does (device → host → disk) and of getting it back, from a disk
(its pages dropped from the page cache, as far as the system does that when asked) and from memory, beside the seconds
in which the language model makes it: a block of 2^19 tokens of Gemma-2-2B in bf16 is 2.4 GB, made in 1.9 s on an H200.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from evals import cache


def timed(device: str, what) -> tuple[float, object]:
    """Seconds of a call, with what it asked of the device, and what it gave."""
    begun = time.perf_counter()
    given = what()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, given


def drop(path: Path) -> None:
    """Ask the system to forget a file's pages."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--making", type=float, default=1.9, help="seconds in which the language model makes it")
    parser.add_argument("--folder", default="", help="on the disk to measure; unset: that of temporary files")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_ND = torch.randn(int(args.gb * 1e9 / 2 / 2304), 2304, dtype=torch.bfloat16, device=device)

    def row(what: str, seconds: float) -> None:
        print(f"| {what} | {seconds:.2f} | {args.gb / seconds:.1f} |", flush=True)

    print(f"{args.gb:g} GB, {cache.gpu() or 'CPU'}\n\n| what | s | GB/s |\n|---|--:|--:|")
    row("made by the language model (given)", args.making)
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        for turn in ("first", "again"):
            store = cache.Cache(Path(folder), 1e3)
            store.forget("x", {})
            waited, _ = timed("", lambda store=store: store.get("x", {}, lambda: {"x": x_ND}))
            row(f"stored, {turn}: the caller waits", waited)
            row(f"stored, {turn}: until it is written", waited + timed("", store.size)[0])
        path = store.path("x", {})
        row("until it is on the disk itself", timed("", lambda: drop(path))[0])
        for turn in ("cold", "warm", "cold", "warm"):
            given = None  # a page that is mapped stays
            if turn == "cold":
                drop(path)
            read, given = timed("", lambda: cache.Cache(Path(folder), 1e3).get("x", {}, dict))
            row(f"read with its checksum, {turn}", read)
            row(f"{turn}, then copied to the device", read + timed(device, partial(given["x"].to, device))[0])
        row("copied to the device, pages in memory", timed(device, lambda: given["x"].to(device))[0])
        row("checksum alone", timed("", lambda: cache.checksum(given))[0])
        if device == "cuda":
            pinned = given["x"].pin_memory()
            row("copied to the device from pinned memory", timed(device, lambda: pinned.to(device))[0])
            row("device to pageable memory", timed(device, x_ND.cpu)[0])
            row("device to new pinned memory", timed(device, lambda: x_ND.to("cpu", non_blocking=True))[0])
    assert torch.equal(given["x"][-1].to(device), x_ND[-1])


if __name__ == "__main__":
    main()
