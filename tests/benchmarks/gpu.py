"""Every figure of RESULTS.md's "On a GPU", in one command:
python -m tests.benchmarks.gpu [--parts training,step] [--seconds 345] [--profile]

Needs torch and transformers, the peers only what --peers of tests.benchmarks.training needs. It takes under six minutes
of an H200, at Gemma-2-2B's shape with random weights and tokens; without a GPU it runs at a tiny size, which only shows
that it runs. A step that fails says so, with the error's last line, and the others go on; the exit status is then 1.
Steps not begun before `--seconds` were over are named at the end. The parts, in this order:

right     tests.flow.test_cuda, in a process of its own
machine   bytes/s of a copy, FLOP/s of the SAE's and the language model's matrix products, random numbers, best of ten
training  tables of tests.benchmarks.training, one for each shape of a pass
peers     the same command's --peers
model     the language model alone to the last layer, tokens/s, medians of five: compiled, plain, and the matrix
          products of its weights alone, one for each weight
pass      where a compiled pass' GPU time goes; attention's FLOP count half of T², what is not masked
step      where a training step's GPU time goes: one block, by the function that launched a kernel and by its name;
          --profile adds torch.profiler's own table
memory    peak of the eval `core`, two batches through the whole model and four to the layer, the model's plain pass
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import evals
import experiment
from evals.cache import Cache
from evals.common.settings import choose
from runs import environment
from tests import PROJECT
from tests.benchmarks import training
from variants import topk
from variants.kit.trained import TrainedSAE

PARTS = ("right", "machine", "training", "peers", "model", "pass", "step", "memory")
SHAPES = {"gemma-2-2b-shape": ((1024, 32), (128, 64), (128, 256)),  # (context, rows of a pass)
          "tiny": ((32, 32), (16, 16), (16, 64))}
MOST_SHAPES = 64  # that torch compiles for: a run sees one, this process several, and torch gives up after 8
TEST_SECONDS = 240
PRODUCTS = re.compile(r"nvjet|gemm|gemv|xmma|cutlass|cublas|aten::(mm|addmm|linear|matmul)\b")
KINDS = {  # of what runs in a pass, the first that its operation or kernel matches
    "gelu": re.compile(r"gelu"),
    "attention": re.compile(r"flex|attention|softmax|flash|fmha|tanh|aten::(bmm|baddbmm)\b"),
    "matrix products": PRODUCTS,
    "norms": re.compile(r"rsqrt|norm|mean"),
    "the rest": re.compile(""),
}
TOP_K = re.compile(r"topk|sort", re.IGNORECASE)


class Step(NamedTuple):
    part: str
    title: str
    work: Callable[[], None]


class Piece(NamedTuple):
    """Of a profile: what ran on the device, without what it contains."""

    part: str  # of training.Parts, whose function asked for it; "" outside them
    name: str  # operation and kernel
    ms: float


def main(argv: list[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse(argv)
    torch._dynamo.config.cache_size_limit = MOST_SHAPES
    say(f"{where(args.device)}\n{versions()}")
    failed, late = [], []
    for step in steps(args):
        start = time.perf_counter()
        if start - began > args.seconds:
            late.append(step.title)
            continue
        say(f"\n== {step.title}")
        problem = problem_of(step.work)
        if problem:
            failed.append(step.title)
            say(f"failed: {problem}")
        say(f"-- {time.perf_counter() - start:.1f} s, {time.perf_counter() - began:.0f} in all")
    if late:
        say(f"\nnot begun, {args.seconds:.0f} seconds being over: {'; '.join(late)}")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, and those of tests.benchmarks.training that follow from them."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, of the default's list")
    parser.add_argument("--seconds", type=float, default=345, help="no step begins later than that")
    parser.add_argument("--profile", action="store_true", help="torch.profiler's own table of a step")
    parser.add_argument("--model", choices=tuple(SHAPES), default="gemma-2-2b-shape" if has_gpu else "tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--cache_dir", default="", help="where models and wheels lie; nothing else is taken from it")
    parser.add_argument("--data_dir", default="")
    own = parser.parse_args(argv)
    own.parts = own.parts.split(",")
    if set(own.parts) - set(PARTS):
        parser.error(f"--parts names what is none of {', '.join(PARTS)}")
    given = [f"--{name}={getattr(own, name)}" for name in ("model", "device", "cache_dir", "data_dir")]
    return argparse.Namespace(**vars(training.parse(given)) | vars(own))


def say(text: str) -> None:
    print(text, flush=True)


def where(device: str) -> str:
    facts = environment.hardware(device)
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def versions() -> str:
    found = environment.versions() | dict(cuda=torch.version.cuda, commit=environment.git_commit())
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def problem_of(work: Callable[[], None]) -> str:
    """Why the work failed, in a line, or "" where it did not; what it held on the GPU is given back."""
    try:
        work()
        problem = ""
    except Exception as error:  # noqa: BLE001  a step's failure, of whatever kind, must not cost the others' figures
        place = traceback.extract_tb(error.__traceback__)[-1]
        last_line = traceback.format_exception_only(error)[-1].strip()
        problem = f"{last_line} ({Path(place.filename).name}:{place.lineno})"
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return problem


def steps(args) -> list[Step]:
    """What is measured, in its order."""
    width, wide = training.numbers(args.widths)[1:]
    (long, rows), *short = shapes = SHAPES[args.model]
    model = functools.cache(lambda: training.load(args))  # not before it is needed: the tests want the memory
    machine = functools.cache(lambda: training.machine_of(args.device, model()[0].dtype))

    def trained(context: int, rows: int, width: int, saes: str) -> Step:
        of_row = at(args, context, rows, widths=str(width), saes=saes, n_layers="1")
        title = f"training: context {context} × {rows} rows, width {width:,}, SAEs: {saes}"
        return Step("training", title, lambda: training.table(of_row, *model(), machine()))

    first = at(args, long, rows, widths=str(width))
    found = [
        Step("right", "right: tests.flow.test_cuda", lambda: right(args.device)),
        Step("machine", "machine: copies and matrix products", lambda: rates(args, model()[0], width, rows * long)),
        trained(long, rows, width, "1"),
        *(trained(*shape, width, "1") for shape in short),
        trained(long, rows, width, "6"),
        trained(long, rows, wide, "1"),
        Step("peers", f"peers: width {width:,}", lambda: training.beside_peers(first, *model())),
        Step("model", "model: the language model alone", lambda: alone(args, model()[0], shapes)),
        *(Step("pass", f"pass: where its time goes, context {context} × {rows} rows",
               functools.partial(of_a_pass, args, model, context, rows)) for context, rows in shapes[:2]),
        Step("step", f"step: where its time goes, width {width:,}", lambda: of_a_step(first, *model(), width)),
        Step("memory", f"memory: core on one SAE of width {width:,}", lambda: of_core(first, *model(), width)),
    ]
    return [step for step in found if step.part in args.parts]


def at(args, context: int, rows: int, **others) -> argparse.Namespace:
    """The flags of a run with passes of that shape."""
    return argparse.Namespace(**vars(args) | dict(context=context, lm_batch_size=rows) | others)


# ------------------------------------------------------------------------------------------------ right, machine


def right(device: str) -> None:
    if device == "cpu":
        say("no CUDA GPU here: nothing was tested")
        return
    # a kernel that faults takes its process' GPU with it
    command = [sys.executable, "-m", "tests.flow.test_cuda"]
    done = subprocess.run(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, timeout=TEST_SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def rates(args, lm, width: int, tokens: int) -> None:
    """Copies, the SAE's encoder at three batches, and the products of a block: each weight's, and as if weights of one
    input were one matrix.
    """
    say(f"copy: {training.copy_rate(args.device) / 1e9:,.0f} GB/s\n\n| product | tokens | TFLOP/s |\n|---|--:|--:|")
    sizes = [(lm.d_model, width, args.batch_size * n) for n in (1, 2, 4)]
    sizes += [(d_in, d_out, tokens) for d_in, d_out in sorted(products_of(lm.blocks[0]))]
    for d_in, d_out, n in sizes:
        x_ND, W_OD = (torch.randn(size, d_in, device=args.device, dtype=lm.dtype) for size in (n, d_out))
        rate = 2 * n * d_in * d_out / training.least_seconds(args.device, lambda x=x_ND, W=W_OD: F.linear(x, W))
        say(f"| {d_in} → {d_out} | {n:,} | {rate / 1e12:.4g} |")


def products_of(block: torch.nn.Module) -> set[tuple[int, int]]:
    """(d_in, d_out) of a block's matrix products, and of those with one input together."""
    found = set()
    for module in block.modules():
        inside = [child for child in module.children() if isinstance(child, torch.nn.Linear)]
        found |= {(linear.in_features, linear.out_features) for linear in inside}
        for d_in in {linear.in_features for linear in inside}:
            found.add((d_in, sum(linear.out_features for linear in inside if linear.in_features == d_in)))
    return found


# ------------------------------------------------------------------------------------------------ model, pass


def alone(args, lm, shapes) -> None:
    """A row for each shape of a pass."""
    layer = training.numbers(args.layers)[-1]
    weights = [module.weight for block in lm.blocks[:layer + 1] for module in block.modules()
               if isinstance(module, torch.nn.Linear)]
    say("| rows × context | compiled, tokens/s | plain | compiled / plain | matrix products alone |\n"
        "|---|--:|--:|--:|--:|")
    for context, rows in shapes:
        tokens_BT = random_rows(lm, rows, context)
        inputs = {W.shape[1]: torch.randn(rows * context, W.shape[1], device=lm.device, dtype=lm.dtype)
                  for W in weights}

        def products(inputs=inputs) -> None:
            for W_OD in weights:
                F.linear(inputs[W_OD.shape[1]], W_OD)

        works = (lambda t=tokens_BT: lm.training_residuals(t, [layer], len(t)),
                 lambda t=tokens_BT: lm.residuals(t, [layer]), products)
        compiled, plain, bare = (rows * context / steady_seconds(args.device, work) for work in works)
        said = f"{compiled:,.0f} | {plain:,.0f} | {compiled / plain:.2f}"
        if not lm.compiled:
            said = f"– | {plain:,.0f} | –"
        say(f"| {rows} × {context} | {said} | {bare:,.0f} |")


def random_rows(lm, rows: int, context: int) -> Tensor:
    return torch.randint(5, lm.vocab_size, (rows, context), device=lm.device)


@torch.no_grad()
def steady_seconds(device: str, work: Callable) -> float:
    """Of one call, the median of five tries of about .2 s, after what the first calls compile."""
    for _ in range(2):
        work()
    start = training.now(device)
    work()
    calls = max(1, min(50, round(0.2 / (training.now(device) - start))))
    found = []
    for _ in range(5):
        start = training.now(device)
        for _ in range(calls):
            work()
        found.append(training.now(device) - start)
    return median(found) / calls


def of_a_pass(args, model: Callable, context: int, rows: int) -> None:
    """Shares of the time of a pass, on a GPU a compiled one, by kind."""
    lm, layer = model()[0], training.numbers(args.layers)[-1]
    tokens_BT = random_rows(lm, rows, context)
    for _ in range(2):
        lm.training_residuals(tokens_BT, [layer], rows)
    training.now(args.device)
    with torch.profiler.profile(activities=training.activities(args.device)) as watcher:
        lm.training_residuals(tokens_BT, [layer], rows)
        training.now(args.device)
    taken = Counter()
    for piece in pieces(watcher, args.device):
        taken[kind_of(piece.name)] += piece.ms
    total, config = taken.total(), lm.hf.config.get_text_config()
    say(f"{total:.2f} ms in kernels, blocks {'compiled' if lm.compiled else 'not compiled'}\n\n"
        "| kind | ms | % |\n|---|--:|--:|")
    for kind in KINDS:
        say(f"| {kind} | {taken[kind]:.3f} | {100 * taken[kind] / total:.1f} |")
    # a pass' FLOP less those of a pass without attention, which is what context -1 stands for
    flop = training.lm_flop(config, layer + 1, context) - training.lm_flop(config, layer + 1, -1)
    say(f"\nattention: {flop * rows * context / max(taken['attention'], 1e-9) / 1e9:.4g} TFLOP/s")


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


# ------------------------------------------------------------------------------------------------ step, memory


class Marked(training.Parts):
    """The parts of a step, as ranges that a profiler sees."""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            yield


def of_a_step(args, lm, source, width: int) -> None:
    settings = training.settings_of(args, width)
    watcher = training.profiled(settings, lm, source, Marked(args.device))
    n_steps = settings.block_tokens // settings.batch_size
    taken, others, calls = Counter(), Counter(), Counter()
    for piece in pieces(watcher, args.device):
        kind = kind_in_step(piece)
        taken[kind] += piece.ms / n_steps
        if kind not in ("language model", "SAE products"):
            what = (piece.part or "–", piece.name)
            others[what] += piece.ms / n_steps
            calls[what] += 1 / n_steps
    say(f"{settings.batch_size:,} tokens a step, {n_steps} steps\n\n| what | ms a step | % |\n|---|--:|--:|")
    total = taken.total()
    for kind, ms in [*taken.most_common(), ("in all", total)]:
        say(f"| {kind} | {ms:.3f} | {100 * ms / total:.1f} |")
    say("\n| of these, not the language model's nor products: part | operation, kernel | calls a step | ms a step |\n"
        "|---|---|--:|--:|")
    for (part, name), ms in others.most_common(20):
        say(f"| {part} | {name[:100].replace('|', ' ')} | {calls[part, name]:.1f} | {ms:.3f} |")
    if args.profile:
        by = f"self_{args.device}_time_total"
        say(watcher.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


def kind_in_step(piece: Piece) -> str:
    if piece.part == "LM":
        return "language model"
    if PRODUCTS.search(piece.name):
        return "SAE products"
    if piece.part == "optimiser":
        return "optimiser, clipping, projection, counters"
    if TOP_K.search(piece.name):
        return "top-k"
    return "the rest"


@torch.no_grad()
def of_core(args, lm, source, width: int) -> None:
    profile = args.model if args.model in experiment.PROFILES else "gemma"
    settings = training.settings_of(args, width)
    config = choose("core", profile, "")["core"]
    config |= dict(n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=4)
    sae = TrainedSAE(topk.SAE(lm.d_model, width, k=training.k_of(settings)), 1.0).to(args.device)
    lm.__dict__["_wrapped"] = None  # the plain pass: a bridge needs another library, and memory for its own tensors
    training.forget_peak(args.device)
    try:
        with tempfile.TemporaryDirectory() as folder, training.quiet():
            setup = experiment.make_setup(settings, lm, experiment.layers_of(settings)[-1], config, source,
                                          Cache(Path(folder), 0))
            evals.load("core").run(setup, {"sae": sae})
    finally:
        del lm.__dict__["_wrapped"]
    batch, context = config["batch_size_prompts"], config["context_size"]
    peak = environment.peak_memory_gb(args.device)
    say(f"core, batches of {batch} rows of {context} tokens: peak "
        + ", ".join(f"{name} {gb:.2f} GB" for name, gb in peak.items()))


# ------------------------------------------------------------------------------------------------ what a profiler saw


def pieces(watcher: torch.profiler.profile, device: str) -> list[Piece]:
    """What ran on the device: on a GPU kernels and copies, each in the part that launched it."""
    if device == "cpu":
        ranges = [(e.time_range.start, e.time_range.end, e.name) for e in watcher.events() if e.name in Marked.NAMES]
        ran = [(e.time_range.start, e.name, e.self_cpu_time_total) for e in watcher.events()
               if e.name.startswith("aten::")]
    else:
        ranges, ran = launched(traced(watcher))
    if not ran:
        raise RuntimeError("torch.profiler saw nothing run on the device")
    return [Piece(part, name, us / 1e3) for part, (_, name, us) in zip(innermost(ranges, ran), ran)]


def traced(watcher: torch.profiler.profile) -> dict[str, list[dict]]:
    """{category: events} of a profile in Chrome's format."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        watcher.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    found = {}
    for event in events:
        if event.get("ph") == "X":
            found.setdefault(event.get("cat"), []).append(event)
    return found


def launched(trace: dict[str, list[dict]]) -> tuple[list[tuple], list[tuple]]:
    """((start, end, part) of the host's ranges, (when it was asked for, "operation kernel", µs) of what a GPU did)."""
    ranges = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in trace.get("user_annotation", ())
              if e["name"] in Marked.NAMES]
    operation = {e["args"].get("External id"): e["name"] for e in trace.get("cpu_op", ())}
    asked = {e["args"].get("correlation"): e["ts"] for category in ("cuda_runtime", "cuda_driver")
             for e in trace.get(category, ())}
    ran = []
    for event in (e for category in ("kernel", "gpu_memcpy", "gpu_memset") for e in trace.get(category, ())):
        about = event["args"]
        name = f"{operation.get(about.get('External id'), '')} {event['name']}".strip()
        ran.append((asked.get(about.get("correlation"), -1.0), name, event["dur"]))
    return ranges, ran


def innermost(ranges: list[tuple], moments: list[tuple]) -> list[str]:
    """The name of the innermost of the ranges (start, end, name) that each moment lies in, "" if in none."""
    waiting, open_ranges, found = sorted(ranges, reverse=True), [], {}
    for i in sorted(range(len(moments)), key=lambda i: moments[i][0]):
        when = moments[i][0]
        while waiting and waiting[-1][0] <= when:
            open_ranges.append(waiting.pop())
        open_ranges = [opened for opened in open_ranges if opened[1] >= when]
        found[i] = open_ranges[-1][2] if open_ranges else ""
    return [found[i] for i in range(len(moments))]


if __name__ == "__main__":
    main()
