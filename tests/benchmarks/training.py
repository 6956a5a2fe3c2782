"""How fast training goes, beside the machine and the peers:
python -m tests.benchmarks.training [--peers] [--growth] [--profile]

Needs torch and transformers. `--model`: gemma-2-2b-shape (random weights, random tokens; the default where there is a
GPU), embedded (the default elsewhere) or tiny with their own texts, or a local folder or hub name, with random tokens.
Every row is the beginning of a run of `--run_tokens` tokens as `experiment.train` makes it, TopK with as many k's as
there are SAEs, on the last of `--layers`; it is stopped after a warm-up block and three measured ones. Nothing is
cached and no checkpoint is written. Features are dead, and auxk has work on a CPU, once they were silent for a tenth of
the run (10 M tokens at most).

tokens/s   end to end (texts, language model, buffer, SAEs), tokens given to the SAEs, median of the blocks
MFU        FLOP of the models per second over the machine's rate of matrix products. A token costs the language model,
           cut after the deepest layer, blocks·(2·parameters of a block + 4·heads·head_dim·(T + 1)/2), half the
           attention being masked, and each SAE 10·D·F: encoder and decoder forward 2·D·F each, the decoder's two
           gradients 4·D·F, the encoder's weights 2·D·F. Sparse steps do less than that and are credited with it
of floor   the least time a token can take over the time it took. Least: those FLOP at the machine's rate, and at its
           bandwidth per step 32 bytes a parameter (parameter and moments read and written, gradient written and read)
           and per token four passes over F pre-activations. For an H200 790 TFLOP/s and 4.3 TB/s, else both are
           measured here
parts      of a second run, which is timed around the product's functions (on a GPU by events on its stream), in % of
           wall time: the language model; the buffer (gathering, shuffling, copies); the SAEs' loss; its gradient; the
           optimiser (projection, clipping, Adam, normalisation, counters); host: what is left (waiting for texts,
           logging, Python)
memory     peak of the GPU allocator, or of the process' resident memory
padded     rows that only fill up a language-model pass of a fixed shape, in % of the rows passed in the measured
           blocks, counted where tokens are embedded. On a GPU a block's last pass is completed from the next block,
           so that only a run's last pass is filled up; elsewhere passes have no fixed shape

On a CPU also the tokens/s of the bare transformers model, cut after the same layer and run on as many rows in turn with
the blocks, the run's tokens/s as a share of it, and the share of time that is not the language model. `--cpu_seconds`
takes the process' CPU seconds for wall time (tokenising, which runs beside, is then counted), so that one thread can be
measured on a shared machine; what other programs do to caches and shared cores remains, so only ratios within a row
mean something there.

`--peers`: one SAE at each width, every position trained on, in one process in turn with the product, k, batch and
context alike. dictionary_learning: ActivationBuffer, trainSAE and TopKTrainer with its defaults; nnsight wraps the same
plain transformers model. sae_lens: ActivationsStore, SAETrainer and TopKTrainingSAE with its defaults, dense
activations; the plain transformers model through its HookedProxyLM, which is faster than TransformerLens. Both:
language-model batches as large as the product's (or the next smaller that divides a buffer's rows: nothing is thrown
away; `padded` is the product's), a buffer of two blocks on the training device, bf16 autocast on a GPU, tokens from
memory, no log, no checkpoint; and a window of as many tokens as a block, in which each buffer is filled
once, after the fill and the first step. Nobody's features are dead.

`--growth`: seconds against tokens, width and number of SAEs, each with the ratio to the first row.
`--profile`: the operations that take most of one block's time, one SAE of each width, by torch.profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import io
import itertools
import math
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from operator import attrgetter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import experiment
from evals.cache import Cache
from evals.model import architecture, language_model, passes
from evals.texts.source import Listed
from runs import environment
from runs.limit import Limit

BLOCKS = 3  # measured, after the warm-up
GEMMA = dict(vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
             head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
             final_logit_softcapping=30.0)
DEFAULTS = {  # of the flags, by model
    "gemma-2-2b-shape": dict(layers="4,8,12", widths="4096,16384,65536", ks="80,20,40,160,320,640", tokens=3 * 2**18,
                             context=1024, batch_size=2048, lm_batch_size=32, run_tokens=500_000_000, dtype="bfloat16"),
    "embedded": dict(layers="3,6,9", widths="576,2304,9216", ks="32,8,16,64,128,256", tokens=3 * 2**12, context=128,
                     batch_size=1024, lm_batch_size=8, run_tokens=160_000, dtype="float32"),
    "tiny": dict(layers="0,1,2", widths="64,128,256", ks="4,1,2,8,16,32", tokens=3 * 2**11, context=32, batch_size=256,
                 lm_batch_size=32, run_tokens=65_536, dtype="float32"),
}
H200 = (790e12, 4.3e12)  # FLOP/s in bf16, bytes/s
clock = time.perf_counter  # or, with --cpu_seconds, time.process_time


def main(argv: list[str] | None = None) -> None:
    global clock
    args = parse(argv)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    lm, source = load(args)
    rate, bandwidth = machine = machine_of(args.device, lm.dtype)
    print(f"{environment.public_name(args.model)}: d_model {lm.d_model}, {args.dtype}, layers {args.layers}, context "
          f"{args.context}, {args.lm_batch_size} rows a pass, batch {args.batch_size}, k {args.ks}, blocks of "
          f"{block_tokens(args):,} tokens of a run of {args.run_tokens:,}; {rate / 1e12:.3g} TFLOP/s, "
          f"{bandwidth / 1e9:.3g} GB/s", end="\n\n")
    table(args, lm, source, machine)
    if args.growth:
        growth(args, lm, source)
    if args.profile:
        profile(args, lm, source)
    if args.peers:
        beside_peers(args, lm, source)
    print(provenance(args, argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="gemma-2-2b-shape, embedded, tiny, a folder or a hub name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", "--layer", help="n layers are the last n of these")
    parser.add_argument("--widths", help="features of each SAE")
    parser.add_argument("--ks", help="n SAEs have the first n of these")
    parser.add_argument("--saes", default="1,6", help="SAEs per layer")
    parser.add_argument("--n_layers", default="1,3")
    parser.add_argument("--tokens", type=int, help=f"measured tokens of a row, in {BLOCKS} blocks")
    parser.add_argument("--run_tokens", type=int, help="length of the run that the blocks begin")
    parser.add_argument("--context", type=int)
    parser.add_argument("--batch_size", type=int, help="tokens of an SAE step")
    parser.add_argument("--lm_batch_size", type=int, help="rows of a language-model pass")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--cpu_seconds", action="store_true",
                        help="of the process, not wall time: for one thread on a shared machine")
    parser.add_argument("--cache_dir", default="", help="where models and wheels lie; nothing else is taken from it")
    parser.add_argument("--data_dir", default="")
    args = parser.parse_args(argv)
    args.model = args.model or ("gemma-2-2b-shape" if args.device == "cuda" else "embedded")
    for name, value in DEFAULTS.get(args.model, DEFAULTS["gemma-2-2b-shape"]).items():
        setattr(args, name, value if getattr(args, name, None) is None else getattr(args, name))
    if args.device == "cpu" and args.model not in DEFAULTS:
        args.dtype = "float32"
    if args.run_tokens < (BLOCKS + 2) * block_tokens(args):
        raise ValueError(f"a run of --run_tokens={args.run_tokens} has no {BLOCKS + 2} blocks of {block_tokens(args)} "
                         "tokens\ngive a longer run, or fewer --tokens")
    return args


def block_tokens(args) -> int:
    return max(args.tokens // BLOCKS // args.batch_size, 2) * args.batch_size


def settings_of(args, width: int, saes: int = 1, n_layers: int = 1, **others) -> experiment.Settings:
    """The run that a row begins. ValueError where there are not as many k's or layers."""
    layers, ks = args.layers.split(","), [k for k in args.ks.split(",") if int(k) < width]
    if saes > len(ks) or n_layers > len(layers):
        raise ValueError(f"{saes} SAEs of width {width} at {n_layers} layers, with only --ks={','.join(ks)} below it "
                         f"and --layers={args.layers}\ngive more of them")
    own = args.model if args.model in experiment.PROFILES else None  # a profile's own model and texts
    given = dict(profile=own or "gemma", model=None if own else args.model, layers=",".join(layers[-n_layers:]),
                 d_sae=width, sweep="k=" + ",".join(ks[:saes]), context=args.context, batch_size=args.batch_size,
                 lm_batch_size=str(args.lm_batch_size), block_tokens=block_tokens(args), num_tokens=args.run_tokens,
                 device=args.device, dtype=args.dtype, evals="none", checkpoint_seconds=math.inf,
                 cache_dir=args.cache_dir, data_dir=args.data_dir)
    return experiment.resolve(experiment.Settings(**given | others))[0]


# ------------------------------------------------------------------------------------------------ model and texts


def load(args):
    """The language model and where its texts come from."""
    settings = settings_of(args, int(args.widths.split(",")[0]))
    if args.model == "gemma-2-2b-shape":
        lm = random_gemma(settings)
    else:
        lm = experiment.load_language_model(settings)
    if args.model in experiment.PROFILES:
        return lm, experiment.make_source(settings)
    lm.tokenizer = RandomIds(lm.vocab_size, lm.bos)
    texts = Listed([str(i) for i in range(2**20)])
    return lm, SimpleNamespace(documents=lambda split, state=None: Listed(texts.texts, state),
                               digest=lambda split: "random")


class RandomIds:
    """A tokenizer that takes a number for the seed of a text of 1,000 random tokens."""

    def __init__(self, vocab_size: int, bos: int):
        self.vocab_size, self.bos_token_id, self.eos_token_id, self.pad_token_id = vocab_size, bos, None, None

    def __call__(self, texts: list[str], **how) -> dict:
        seeded = (torch.Generator().manual_seed(int(text)) for text in texts)
        return {"input_ids": [torch.randint(3, self.vocab_size, (1000,), generator=g).tolist() for g in seeded]}


def random_gemma(settings: experiment.Settings) -> language_model.LanguageModel:
    """Gemma-2-2B's blocks up to the deepest wanted one, with random weights, on the device."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(**GEMMA, num_hidden_layers=max(experiment.layers_of(settings)) + 1)
    with torch.random.fork_rng(), torch.device(settings.device):
        torch.manual_seed(settings.seed)
        # eager, as the product loads it: fused kernels drop the soft-capping
        hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype), attn_implementation="eager")
    return language_model.LanguageModel(hf, RandomIds(config.vocab_size, 2), settings.model, "random")


# ------------------------------------------------------------------------------------------------ what a token costs


def lm_flop(config, blocks: int, context: int) -> float:
    """FLOP a token of a pass through so many blocks."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return blocks * (2 * architecture.sizes(config, "", 1)["block_parameters"] + 2 * heads * head_dim * (context + 1))


def sae_flop(d_in: int, width: int) -> float:
    """FLOP a token of a dense step: five products of D·F."""
    return 10 * d_in * width


def flop(config, settings: experiment.Settings, saes: int) -> float:
    """FLOP a token with so many SAEs in all."""
    deepest = max(experiment.layers_of(settings))
    return lm_flop(config, deepest + 1, settings.context) + saes * sae_flop(config.hidden_size, settings.d_sae)


def floor(config, settings: experiment.Settings, saes: int, machine: tuple[float, float]) -> float:
    """Seconds a token at least, with so many SAEs in all, on a machine of (FLOP/s, bytes/s)."""
    rate, bandwidth = machine
    D, F = config.hidden_size, settings.d_sae
    adam = 32 * (2 * D * F + D + F) / settings.batch_size
    activations = 4 * F * getattr(torch, settings.dtype).itemsize
    return flop(config, settings, saes) / rate + saes * (adam + activations) / bandwidth


def machine_of(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of matrix products, bytes/s of a copy), the best of ten; for an H200 those of the floor as published."""
    if device == "cuda" and "H200" in torch.cuda.get_device_name():
        return H200
    n = 8192 if device == "cuda" else 1024
    a_NN, b_NN = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / least_seconds(device, lambda: a_NN @ b_NN), copy_rate(device)


def copy_rate(device: str) -> float:
    """Bytes/s of a copy, read and written ones counted, the best of ten."""
    source, target = (torch.ones(2**26, device=device) for _ in range(2))  # 268 MB, more than caches hold
    return 2 * source.nbytes / least_seconds(device, lambda: target.copy_(source))


def least_seconds(device: str, work: Callable) -> float:
    """Of one call, the best of ten tries; on a GPU of twenty calls each."""
    calls, found = 20 if device == "cuda" else 1, []
    for _ in range(10):
        start = now(device)
        for _ in range(calls):
            work()
        found.append(now(device) - start)
    return min(found) / calls


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


# ------------------------------------------------------------------------------------------------ a run, watched


class Enough(Exception):
    """Ends a run after the blocks that are measured."""


def train(settings, lm, source, blocks: int, between: Callable[[int, int], None] = lambda b, rows: None,
          parts: Parts | None = None, rows_passed: Counter | None = None):
    """Seconds of each of `blocks` blocks of a run by `experiment.train`, after a warm-up block.

    `between(b, rows)` is called after block b, of so many rows; what it does is not counted. `rows_passed` is given
    the rows "passed" through the language model in these blocks, and how many of them were "asked" for.
    """
    rows_passed = Counter() if rows_passed is None else rows_passed
    seconds, spoken, activation_blocks = [], io.StringIO(), experiment.activation_blocks
    jobs = experiment.make_jobs(settings, lm)

    def watched(*args, **kwargs):
        with contextlib.closing(activation_blocks(*args, **kwargs)) as given:
            for b in range(1 + blocks):
                start = now(settings.device)
                _, block, _ = item = next(given)
                rows = int(block["place_N"][-1]) // settings.context + 1
                yield item  # and comes back when the block is trained on
                if b:
                    seconds.append(now(settings.device) - start)
                else:
                    rows_passed.clear()
                    if parts:
                        parts.clear()
                between(b, rows)
        raise Enough

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(spoken))
        stack.enter_context(contextlib.suppress(Enough))
        stack.enter_context(mock.patch.object(experiment, "activation_blocks", watched))
        stack.enter_context(mock.patch.object(lm, "training_residuals", counted(lm, rows_passed)))
        if parts:
            parts.put_around(stack, lm, jobs)
        experiment.train(settings, lm, jobs, source, Cache(folder / "cache", 0), folder,
                         SimpleNamespace(signal=0, deferred=False), Limit())
    for line in spoken.getvalue().splitlines():
        if line.startswith(("language model", "out of")):  # what the run had to do without
            print(line, file=sys.stderr, flush=True)
    return seconds


def counted(lm, rows_passed: Counter) -> Callable:
    """`lm.training_residuals`, which notes the rows that it is asked for, and those that it passes."""
    function, embedding = lm.training_residuals, lm.hf.get_input_embeddings()

    def note(module, args: tuple) -> None:
        rows_passed["passed"] += len(args[0])

    def run(tokens_BT: Tensor, *args):
        rows_passed["asked"] += len(tokens_BT)
        handle = embedding.register_forward_pre_hook(note)
        try:
            return function(tokens_BT, *args)
        finally:
            handle.remove()

    return run


def padded(rows_passed: Counter) -> str:
    """The cell that says which share of the rows only filled up a pass."""
    filled_up = rows_passed["passed"] - rows_passed["asked"]
    return f"{100 * filled_up / max(rows_passed['passed'], 1):.1f}"


class Parts:
    """Time by part of a step, each without the parts inside it; on a GPU between events, which nothing waits for."""

    NAMES = ("LM", "buffer", "SAE forward", "SAE backward", "optimiser")

    def __init__(self, device: str):
        self.device, self.spans, self.open = device, [], []

    def clear(self) -> None:
        self.spans.clear()

    def seconds(self) -> dict[str, float]:
        now(self.device)
        found = Counter(dict.fromkeys(self.NAMES, 0.0))
        for name, outer, start, stop in self.spans:
            taken = stop - start if self.device == "cpu" else start.elapsed_time(stop) / 1e3
            found[name] += taken
            found[outer] -= taken
        return {name: found[name] for name in self.NAMES}

    def put_around(self, stack: contextlib.ExitStack, lm, jobs: list) -> None:
        """Time the product's functions until the stack closes."""
        places = [("LM", lm, "residuals"), ("LM", lm, "training_residuals"), ("optimiser", experiment, "train_step"),
                  ("SAE backward", torch.Tensor, "backward"), *(("SAE forward", job.sae, "loss") for job in jobs)]
        for name, owner, attribute in places:
            if hasattr(owner, attribute):
                stack.enter_context(mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(experiment, "batches", self.timed_items("buffer", experiment.batches)))
        stack.enter_context(mock.patch.object(passes, "collecting", self.timed_work("buffer", passes.collecting)))

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            with self.span(name):
                return function(*args, **kwargs)
        return run

    def timed_work(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            work = function(*args, **kwargs)
            while True:
                with self.span(name):
                    try:
                        next(work)
                    except StopIteration as end:
                        return end.value
                yield
        return run

    def timed_items(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            items, end = function(*args, **kwargs), object()
            while True:
                with self.span(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item
        return run

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        outer, start = self.open[-1] if self.open else None, self.mark()
        self.open.append(name)
        try:
            yield
        finally:
            self.open.pop()
            self.spans.append((name, outer, start, self.mark()))

    def mark(self):
        if self.device == "cpu":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def bare(lm, settings: experiment.Settings) -> Callable[[int], float]:
    """Seconds of the transformers model alone, cut after the deepest layer, for so many rows of random tokens."""
    cut, blocks = copy.copy(lm.backbone), lm.blocks
    cut._modules = dict(cut._modules)  # the copy shares its weights, not the list of its blocks
    name = next(name for name, module in cut.named_children() if module is blocks)
    setattr(cut, name, blocks[:max(experiment.layers_of(settings)) + 1])

    @torch.no_grad()
    def seconds(rows: int) -> float:
        rows_RT = torch.randint(lm.vocab_size, (rows, settings.context), device=settings.device)
        start = now(settings.device)
        for tokens_BT in rows_RT.split(settings.lm_batch_size):
            cut(input_ids=tokens_BT, use_cache=False)
        return now(settings.device) - start

    return seconds


def forget_peak(device: str) -> None:
    """Begin to measure the peak memory anew, where that can be done."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------------------ tables


def table(args, lm, source, machine: tuple[float, float]) -> None:
    """One row per width, number of SAEs and number of layers."""
    cpu = args.device == "cpu"
    columns = ["width", "SAEs", "layers", "tokens/s", "MFU %", "of floor %", *(f"{name} %" for name in Parts.NAMES),
               "host %", "host GB" if cpu else "GPU GB", "padded %"]
    if cpu:
        columns += ["bare LM tokens/s", "of bare LM %", "not LM %"]
    print(f"| {' | '.join(columns)} |\n|{'--:|' * len(columns)}")
    cases = list(itertools.product(numbers(args.widths), numbers(args.saes), numbers(args.n_layers)))
    # all of them can be, before any is measured
    for case, settings in zip(cases, [settings_of(args, *case) for case in cases]):
        try:
            cells = row(settings, lm, source, machine)
        except torch.cuda.OutOfMemoryError:
            cells = ["out of GPU memory"]
        print("|", " | ".join([*(f"{n:,}" for n in case), *cells]), "|", flush=True)
    print()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def row(settings: experiment.Settings, lm, source, machine: tuple[float, float]) -> list[str]:
    """Its cells after the first three."""
    forget_peak(settings.device)
    config = lm.hf.config.get_text_config()
    n_saes = len(experiment.layers_of(settings)) * len(settings.sweep.split(","))
    alone, alone_seconds, rows_passed = bare(lm, settings), [], Counter()

    def between(b: int, rows: int) -> None:
        if settings.device == "cpu":
            alone_seconds.append(alone(rows))

    seconds = train(settings, lm, source, BLOCKS, between, rows_passed=rows_passed)
    peak = environment.peak_memory_gb(settings.device)
    parts = Parts(settings.device)
    wall = sum(train(settings, lm, source, BLOCKS - 1, parts=parts))
    shares = {name: taken / wall for name, taken in parts.seconds().items()}
    speed = settings.block_tokens / median(seconds)
    mfu = flop(config, settings, n_saes) * speed / machine[0]
    of_floor = floor(config, settings, n_saes, machine) * speed
    percent = [f"{100 * share:.1f}" for share in (mfu, of_floor, *shares.values(), 1 - sum(shares.values()))]
    cells = [f"{speed:,.0f}", *percent, f"{peak.get('gpu', peak['host']):.2f}", padded(rows_passed)]
    if alone_seconds:
        of_bare = median(one / other for one, other in zip(alone_seconds[1:], seconds))
        cells += [f"{settings.block_tokens / median(alone_seconds[1:]):,.0f}", f"{100 * of_bare:.1f}",
                  f"{100 * (1 - shares['LM']):.1f}"]
    return cells


def profile(args, lm, source) -> None:
    """The operations of a block that take most of the device's own time, for one SAE of each width."""
    for width in numbers(args.widths):
        watcher = profiled(settings_of(args, width), lm, source)
        by = f"self_{args.device}_time_total"
        print(f"width {width:,}\n{watcher.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)}",
              flush=True)


def profiled(settings: experiment.Settings, lm, source, parts: Parts | None = None) -> torch.profiler.profile:
    """A profiler that watched one block, after a warm-up."""
    watcher = torch.profiler.profile(activities=activities(settings.device))

    def between(b: int, rows: int) -> None:
        if b:
            watcher.stop()
        else:
            watcher.start()

    train(settings, lm, source, 1, between, parts)
    return watcher


def activities(device: str) -> list[ProfilerActivity]:
    """What a profiler watches there."""
    if device == "cuda":
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    return [ProfilerActivity.CPU]


def growth(args, lm, source) -> None:
    """Seconds of one to four blocks of one run; of a block with each width, with each number of SAEs."""
    widths = numbers(args.widths)

    def block(width: int, saes: int) -> float:
        forget_peak(args.device)
        return median(train(settings_of(args, width, saes), lm, source, 2))

    forget_peak(args.device)
    seconds = train(settings_of(args, widths[0]), lm, source, 4)
    by_tokens = {f"{n * block_tokens(args):,}": sum(seconds[:n]) for n in (1, 2, 4)}
    by_width = {f"{width:,}": block(width, 1) for width in widths}
    by_saes = {f"{saes}": block(widths[0], saes) for saes in (1, 2, 4)}
    for title, found in ((f"tokens, width {widths[0]:,}", by_tokens),
                         (f"width, {block_tokens(args):,} tokens", by_width),
                         (f"SAEs, width {widths[0]:,}, {block_tokens(args):,} tokens", by_saes)):
        first = next(iter(found.values()))
        print(f"| {title} | seconds | ratio |\n|--:|--:|--:|")
        print("\n".join(f"| {what} | {taken:.2f} | {taken / first:.2f} |" for what, taken in found.items()), end="\n\n",
              flush=True)


def provenance(args, argv: list[str] | None) -> str:
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    if args.cpu_seconds:
        where += ", CPU seconds"
    command = " ".join(["python -m tests.benchmarks.training", *(sys.argv[1:] if argv is None else argv)])
    return (f"{date.today()}, torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}, "
            f"Python {platform.python_version()}, {where}: `{command}`")


# ------------------------------------------------------------------------------------------------ peers


def beside_peers(args, lm, source) -> None:
    """One row per width: the product and each peer in turn on the same rows, one SAE, every position trained on."""
    peers = {}
    for name, (make, install) in PEERS.items():
        try:
            with quiet():
                peers[name] = make()
        except ImportError as error:
            print(f"{name} is left out ({error}): {install}")
    titles = [f"{name} {importlib.metadata.version(name)}" for name in peers]
    columns = ["width", "here, tokens/s", "padded %"]
    for title in titles:
        columns += [f"{title}, tokens/s", "here / there"]
    print(f"| {' | '.join(columns)} |\n|{'--:|' * len(columns)}")
    for width in numbers(args.widths):
        settings = settings_of(args, width, keep_bos=True, num_tokens=500_000_000)
        steps = settings.block_tokens // settings.batch_size
        rows_RT = torch.cat([experiment.token_stream(source, lm, settings).block(b)[0] for b in range(3)])
        with quiet():
            windows = {name: make(copied(lm), rows_RT, settings, steps) for name, make in peers.items()}
        found, rows_passed = {name: [] for name in peers}, Counter()

        def between(b: int, rows: int, windows=windows, found=found) -> None:
            for name, window in windows.items():
                with quiet():
                    found[name].append(window())

        seconds = train(settings, lm, source, BLOCKS, between, rows_passed=rows_passed)
        cells = [f"{width:,}", f"{settings.block_tokens / median(seconds):,.0f}", padded(rows_passed)]
        for name in peers:
            taken = found[name][1:]  # the first is the warm-up's
            cells += [f"{settings.block_tokens / median(taken):,.0f}",
                      f"{median(t / own for t, own in zip(taken, seconds)):.2f}"]
        print("|", " | ".join(cells), "|", flush=True)
    print()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print and warn of."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def copied(lm):
    """The transformers model in modules of its own, so that nobody's hooks slow another down; weights are shared."""
    return copy.deepcopy(lm.hf, {id(t): t for t in (*lm.hf.parameters(), *lm.hf.buffers())})


class Window:
    """An iterator over batches that notes when the second one was asked for: from there a window is timed."""

    def __init__(self, batches: Iterator[Tensor], wanted: int, device: str):
        self.batches, self.wanted, self.device, self.given, self.start = batches, wanted, device, 0, 0.0

    def __iter__(self) -> Window:
        return self

    def __next__(self) -> Tensor:
        if self.given == self.wanted:
            raise StopIteration
        if self.given == 1:
            self.start = now(self.device)
        self.given += 1
        return next(self.batches)


def dictionary_learning():
    """Its windows: (model, rows, settings, steps) -> () -> seconds of so many steps."""
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE
    from nnsight import LanguageModel

    def windows(hf, rows_RT: Tensor, settings, steps: int) -> Callable[[], float]:
        layer, device = max(experiment.layers_of(settings)), settings.device
        B, T = settings.batch_size, settings.context
        model = LanguageModel(hf, tokenizer=words(hf.config.get_text_config().vocab_size))
        path = next(name for name, module in hf.named_modules() if isinstance(module, torch.nn.ModuleList))
        # it refills at half the buffer, which is then after as many steps as a window has
        buffer = ActivationBuffer(texts(rows_RT), model, attrgetter(path)(model)[layer],
                                  hf.config.get_text_config().hidden_size, n_ctxs=2 * (steps - 1) * B // T, ctx_len=T,
                                  out_batch_size=B, device=device,
                                  refresh_batch_size=most_rows(steps * B // T, settings.lm_batch_size))
        autocast = torch.bfloat16 if device == "cuda" else torch.float32

        def window() -> float:
            trainer = dict(trainer=TopKTrainer, steps=experiment.count_steps(settings),
                           activation_dim=buffer.d_submodule, dict_size=settings.d_sae, k=k_of(settings), layer=layer,
                           lm_name=settings.model, device=device)
            batches = Window(buffer, steps + 1, device)
            trainSAE(batches, [trainer], steps=steps + 1, device=device, autocast_dtype=autocast)
            return now(device) - batches.start

        return window

    return windows


def k_of(settings) -> int:
    return int(settings.sweep.removeprefix("k="))


def most_rows(rows: int, limit: int) -> int:
    """The largest batch of at most `limit` rows that divides `rows`, so that a fill throws nothing away."""
    return max(n for n in range(1, limit + 1) if rows % n == 0)


def texts(rows_RT: Tensor) -> Iterator[str]:
    """The rows for ever, as words that are their tokens' numbers."""
    while True:
        for row_T in rows_RT.tolist():
            yield " ".join(map(str, row_T))


def words(vocab_size: int):
    """A tokenizer that gives the word "17" the number 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {str(i): i for i in range(vocab_size)} | {"<pad>": vocab_size}
    made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", padding_side="left")


def sae_lens():
    """Its windows, as those of dictionary_learning."""
    from datasets import Dataset
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    def windows(hf, rows_RT: Tensor, settings, steps: int) -> Callable[[], float]:
        layer, device = max(experiment.layers_of(settings)), settings.device
        B, T = settings.batch_size, settings.context
        path = next(name for name, module in hf.named_modules() if isinstance(module, torch.nn.ModuleList))
        hook, d_in = f"{path}.{layer}", hf.config.get_text_config().hidden_size
        store = ActivationsStore(HookedProxyLM(hf, None, hook_names=[hook]),
                                 Dataset.from_dict({"input_ids": rows_RT.tolist()}), streaming=False, hook_name=hook,
                                 hook_head_index=None, context_size=T, d_in=d_in,
                                 # contexts, in effect; half of it is served after each fill
                                 n_batches_in_buffer=2 * steps * B // T,
                                 store_batch_size_prompts=most_rows(steps * B // T, settings.lm_batch_size),
                                 dtype="float32", total_training_tokens=len(rows_RT), train_batch_size_tokens=B,
                                 prepend_bos=True, normalize_activations="none", device=torch.device(device))
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=settings.d_sae, k=k_of(settings), device=device))
        config = SAETrainerConfig(total_training_samples=(steps + 1) * B, train_batch_size_samples=B, lr_end=3e-5,
                                  device=device, autocast=device == "cuda")

        def window() -> float:
            batches = Window(store, steps + 1, device)
            SAETrainer(config, sae, batches).fit()
            return now(device) - batches.start

        return window

    return windows


PEERS = {"dictionary_learning": (dictionary_learning, 'pip install dictionary_learning==0.1.0 "nnsight<0.4"'),
         "sae_lens": (sae_lens, "pip install sae-lens")}

if __name__ == "__main__":
    main()
