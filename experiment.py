"""Train a sparse autoencoder (SAE) variant on a language model's residual stream, evaluate and compare it.

    python experiment.py --out_dir=run_1

No argument is needed. Read from top to bottom: settings → preflight → language model → token stream →
activation buffer → training → evals → results → main.

Shapes: B SAE batch (tokens), D = d_in = d_model, F = d_sae, R rows (contexts), T context length, N tokens of a block,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from runs.voice import VOICE, duration, is_terminal, say, steady, track

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
steady()  # before anything prints or is opened
# libraries' progress bars would push the cause of a failure out of what the client shows of stderr
if not is_terminal(sys.stderr):
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from torch import Tensor

import evals
import evals.cache
import runs.folder
import variants
from evals.common import settings as eval_settings
from evals.common import stored
from evals.model import checks as model_checks
from evals.model import language_model, memory, passes, places, synthetic
from evals.model.language_model import LanguageModel
from evals.storage import network
from evals.storage.identity import files_digest
from evals.texts import inputs
from evals.texts.blocks import FIRST, TokenStream
from evals.texts.reader import Reader, Rows
from runs import (
    checkpoint,
    compare,
    disk,
    endings,
    environment,
    failure,
    hopeless,
    identity,
    needs,
    own_report,
    pace,
    prolong,
    reading,
    report,
    training,
    training_log,
    verdict,
)
from runs import limit as limits
from runs import results as run_results
from runs import settings as checks
from runs import snapshots as run_snapshots
from runs.batches import batches
from runs.clock import phase
from runs.interrupts import Interrupts
from runs.live import LIVE
from runs.plan import block_at, block_plan, count_steps, steps_by_block
from variants import base
from variants.kit import contexts, imperative, interchange, norms, ranks, trainer_state
from variants.kit.copying import duplicate
from variants.kit.hyper import hyperparameters, parse_hyper, parse_sweep
from variants.kit.steps import forget, gradients
from variants.kit.trained import TrainedSAE
from variants.kit.update import update

# ============================================================================================================ settings


@dataclass(frozen=True)
class Settings:
    """Every setting is an optional flag; what is None is filled by the profile."""

    out_dir: str = ""  # folder of the run, taken literally; unset: the first free of run_1, run_2, ...
    variant: Optional[str] = None  # a file of variants/, by name or path; unset: topk, or that of init_from
    init_from: str = ""  # a trained SAE: folder of SAELens, dictionary_learning or a run, or SAELens' release:id
    hyper: str = ""  # the variant's own hyper-parameters: k=64,auxk_alpha=0
    sweep: str = ""  # one SAE per value, from one stream: k=20,40,80; or combination: k=20,40,auxk_alpha=0,0.03
    # fills what is unset; auto: gemma where it can run; synthetic: samples of known features, no language model
    profile: Literal["auto", "gemma", "embedded", "tiny", "synthetic"] = "auto"
    # saebench: 500 M tokens at context 1024, as its released SAEs; synth16k: SynthSAEBench-16k, 200 M samples
    preset: Literal["", "saebench", "synth16k"] = ""
    model: Optional[str] = None  # Hugging Face name or local folder of any causal language model
    layers: Optional[str] = None  # residual stream after these blocks, comma-separated: 5,12,19
    dataset: Optional[str] = None  # training text: embedded, tiny, hub data set owner/name:config:split, file, folder
    core_dataset: Optional[str] = None  # text of the core eval; the same as dataset: its held-out documents
    text_field: str = "text"  # the column that holds the text, or token ids, for hub and local datasets
    context: Optional[int] = None  # tokens per row, BOS included
    num_tokens: Optional[int] = None  # training tokens from the language model; 0 evaluates what init_from names
    passes: Optional[int] = None  # times each block of activations is passed over
    block_tokens: Optional[int] = None  # tokens shuffled together
    keep_bos: bool = False  # train on BOS positions too (as SAEBench's released SAEs did)
    max_norm_ratio: Optional[float] = None  # leave tokens of so many median norms out, in evals too; 10 is usual
    d_sae: Optional[int] = None  # features
    batch_size: Optional[int] = None  # tokens per SAE step
    lr: Optional[float] = None  # learning rate; unset: the variant's own
    lm_batch_size: Optional[str] = None  # rows per language-model pass; auto: as many as pay and fit
    evals: Optional[str] = None  # comma-separated names of evals/, or "none"
    snapshots: int = 0  # points of training, evenly apart, at which snapshot_evals measure the SAEs as they are
    snapshot_evals: Optional[str] = None  # of evals, comma-separated; unset: core, or ground_truth
    eval_config: str = ""  # overrides of the evals' settings, as JSON: {"core": {"batch_size_prompts": 8}}
    seed: int = 0  # of initialisation, shuffling and evals
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where model and SAEs live
    shard: bool = False  # under torchrun: spread every SAE over the ranks; unset, where it does not fit one
    dtype: Optional[Literal["float32", "bfloat16"]] = None  # of the language model; SAE parameters are always fp32
    log_lines: int = 50  # rows of training_log.csv per SAE
    checkpoint_seconds: float = 60.0  # between checkpoints, seconds
    activation_cache_gb: str = "auto"  # bound of the cache of LM activations, GB (1e9 bytes); auto: a tenth of the disk
    cache_dir: str = ""  # downloads, converted models, LM activations; unset: ~/.cache/sae_experiment
    data_dir: str = ""  # folder that already holds the embedded profile's wheels
    allow_identical: bool = False  # run even though the variant trains bit-identically to an existing one
    allow_dense: bool = False  # run even though the code is not sparse; the result says so
    against: str = ""  # a variant, by name or path, from which this one must differ: how far it gets is said
    headline: Optional[str] = None  # metric of the verdict; unset: core.ce_loss_score, on synthetic ground_truth.f1
    note: str = ""  # what this run tries, one line for the ledger, results.tsv
    minutes: float = 0.0  # the run ends in so many, evals included, counted from the start of its process; 0: no limit
    # end a training that comes to nothing (no feature fires, most do, no reconstruction); auto: under --minutes
    stop_hopeless: Literal["auto", "yes", "no"] = "auto"
    log: str = ""  # where the training log's rows go besides: tensorboard, wandb, or both, comma-separated
    trust_code: bool = False  # run the variant.py that init_from brings along, though it is none of variants/


# What a setting leaves open, by profile: the origin's published set-up (gemma), as measured on 2 cores (embedded).
PROFILES = {
    "gemma": dict(model="google/gemma-2-2b", layers="12", dataset="monology/pile-uncopyrighted",
                  core_dataset="Skylion007/openwebtext", context=128, num_tokens=5_000_000, passes=1,
                  block_tokens=2**19, d_sae=16384, batch_size=2048, lm_batch_size=64, evals="core,sparse_probing",
                  dtype="bfloat16"),
    "embedded": dict(model=places.EMBEDDED, layers="9", dataset="embedded", core_dataset="embedded", context=128,
                     num_tokens=160_000, passes=1, block_tokens=2**18, d_sae=2304, batch_size=1024, lr=3e-3,
                     lm_batch_size=8, evals="core,sparse_probing,sae_probes", dtype="float32"),
    "tiny": dict(model=places.TINY, layers="2", dataset="tiny", core_dataset="tiny", context=32, num_tokens=16_384,
                 passes=1, block_tokens=4096, d_sae=128, batch_size=256, lr=3e-3, lm_batch_size=32,
                 evals="core,sparse_probing,sae_probes", dtype="float32"),
    # a row is BOS, the 1,024 numbers of a draw (evals/texts/numbers.py) and BOS
    "synthetic": dict(model="synthetic", layers="0", dataset="synthetic", core_dataset="synthetic", context=1026,
                      num_tokens=524_288, passes=1, block_tokens=2**18, d_sae=256, batch_size=256, lr=2e-3,
                      lm_batch_size=8, evals="ground_truth", snapshot_evals="ground_truth", dtype="float32"),
}
PRESETS = {"saebench": dict(num_tokens=500_000_000, context=1024, lm_batch_size=16),
           "synth16k": dict(model="synth16k", num_tokens=200_000_000, block_tokens=2**20, d_sae=4096, batch_size=1024,
                          lr=3e-4)}
BUILT_IN = {*PROFILES, *places.SHAPES}
# ~ is the home folder in these
PATHS = ("out_dir", "variant", "against", "init_from", "model", "dataset", "core_dataset", "cache_dir", "data_dir")
NEVER_EMPTY = {*PATHS, "layers", "evals", "text_field"}  # given an empty value, a script's variable was not set

# Settings that change where a run lives or how often it speaks, but not what comes out of it.
NOT_IN_FINGERPRINT = {"out_dir", "checkpoint_seconds", "activation_cache_gb", "cache_dir", "data_dir",
                      "allow_identical", "allow_dense", "against", "shard", "trust_code", "headline", "note",
                      "stop_hopeless", "log"}
# And those that decide only what is measured of the trained SAEs, not how they are trained.
NOT_IN_TRAINING = {"variant", "evals", "eval_config", "snapshots", "snapshot_evals"}


def parse_settings(argv: list[str]) -> Settings:
    """Settings from the command line; an unknown flag or value ends in one line naming the nearest valid one."""
    settings, notes = checks.parse(argv, Settings, __doc__.split("\n\n")[0], NEVER_EMPTY)
    for note in notes:
        say(f"note: {note}")
    return settings


def resolve(settings: Settings) -> tuple[Settings, str]:
    """Fill what is unset from the profile; also the one line that says which profile was taken and why."""
    given = {name: getattr(settings, name) or "" for name in PATHS}
    at_home = {name: os.path.expanduser(path) for name, path in given.items() if path.startswith("~")}
    settings = dataclasses.replace(settings, **at_home)
    profile, why = choose_profile(settings)
    defaults = dict(variant="topk", snapshot_evals="core") | PROFILES[profile] | PRESETS.get(settings.preset, {})
    if settings.init_from:
        found = network.patiently(settings.init_from,
                                  lambda: interchange.settings_of(settings.init_from, settings.trust_code))
        if settings.d_sae not in (None, found["d_sae"]):
            raise ValueError(f"--d_sae={settings.d_sae}, and the SAE of --init_from has {found['d_sae']} features\n"
                             "leave --d_sae out")
        defaults |= found
    filled = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    if settings.dataset and not settings.core_dataset:
        filled["core_dataset"] = settings.dataset
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, and torch finds no CUDA GPU here\n"
                         "leave --device out, or install a CUDA build of torch")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache_dir = settings.cache_dir or os.path.join(caches, "sae_experiment")
    settings = dataclasses.replace(settings, profile=profile, device=device, cache_dir=cache_dir, **filled)
    settings = dataclasses.replace(settings, lm_batch_size=checks.rows_per_pass(str(settings.lm_batch_size)))
    checks.check_numbers(dataclasses.asdict(settings))
    checks.check_sizes(settings)
    return settings, f"profile {profile}: {why}"


def choose_profile(settings: Settings) -> tuple[str, str]:
    """The profile asked for; else `gemma` where a GPU and the gated weights are there, or `embedded`; and why.

    A silent hub is an error, and so is a preset of another profile.
    """
    profile = checks.of_preset(settings.preset, settings.profile)
    if profile != settings.profile:
        return profile, f"of --preset {settings.preset}"
    if settings.profile != "auto":
        return settings.profile, "asked for"
    if settings.device == "cpu" or not torch.cuda.is_available():
        return "embedded", "no CUDA GPU here, so the built-in SmolLM2-135M (--profile gemma asks for Gemma-2-2B)"
    name = settings.model or PROFILES["gemma"]["model"]
    try:
        places.known_identity(name, settings.cache_dir, settings.data_dir)
    except PermissionError as error:  # no other: a bad network must not turn into another model
        return "embedded", f"{error}".splitlines()[0] + ", so the built-in SmolLM2-135M"
    return "gemma", "a CUDA GPU and access to the weights"


def make_source(settings: Settings):
    """Where this run's texts come from."""
    from evals.texts.source import Source

    own = {name: None if name in BUILT_IN else name for name in (settings.dataset, settings.core_dataset)}
    return Source("hub" if settings.profile == "gemma" else settings.profile, own[settings.dataset],
                  own[settings.core_dataset], settings.text_field, Path(settings.cache_dir),
                  Path(settings.data_dir) if settings.data_dir else None)


def layers_of(settings: Settings) -> list[int]:
    """The blocks whose residual stream is taken, in order."""
    return checks.block_numbers(settings.layers)


def evals_of(settings: Settings) -> dict[str, dict]:
    """The chosen evals and their resolved settings."""
    return eval_settings.choose(settings.evals, settings.profile, settings.eval_config)


def snapshots_of(settings: Settings) -> dict[str, dict]:
    """The evals of --snapshots, of those chosen, and their resolved settings; none without."""
    return run_snapshots.choose(settings.snapshots, settings.snapshot_evals, evals_of(settings))


def hypers_of(settings: Settings, module) -> dict[str, dict]:
    """Hyper-parameters per SAE of a layer, by its name's suffix: {"": {...}} or {".k_20": {...}, ".k_40": {...}}."""
    fixed = parse_hyper(module, settings.hyper)
    if settings.init_from and not settings.sweep:
        return interchange.hypers_of(settings.init_from, module, fixed)
    fixed = synthetic.sparsity(settings.model, hyperparameters(module)) | fixed
    return {suffix: fixed | hyper for suffix, hyper in parse_sweep(module, settings.sweep).items()}


def models_of(settings: Settings) -> dict[str, str]:
    """The language models that the run reads: the one it trains on, and the one that an eval asks questions."""
    asks = any(evals.declared(name, "INSTRUCT") for name in evals_of(settings))
    found = {"model": settings.model, "instruct model": language_model.instruct_sibling(settings.model) if asks else ""}
    return {what: name for what, name in found.items() if name}


def inputs_of(settings: Settings) -> dict[str, str]:
    """What the run reads, by content. OSError for what cannot be had."""
    found = {what: places.known_identity(name, settings.cache_dir, settings.data_dir)
             for what, name in models_of(settings).items()}
    found |= inputs.identities(make_source(settings), evals_of(settings))
    files = interchange.files(settings.init_from) if settings.init_from else []
    if files:
        found["init_from"] = files_digest(files, settings.init_from)
    return found


def recognise(settings: Settings) -> tuple[dict[str, str], str, str, dict[str, str]]:
    """What the run reads, hashes of what decides its result and its training alone, and the commits it reads at."""
    read, whole, for_training = identity.recognised(settings.out_dir, lambda: inputs_of(settings),
                                                    lambda read: marks(settings, read))
    return read, whole, for_training, network.pinned()


def marks(settings: Settings, read: dict[str, str]) -> tuple[str, str]:
    """The two hashes, of a run that reads this."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_IN_FINGERPRINT}
    kept["layers"] = layers_of(settings)
    return identity.fingerprints(kept, NOT_IN_TRAINING, read, settings.variant)


# =========================================================================================================== preflight


def preflight(settings: Settings, source) -> dict:
    """Everything that can be known to fail before a weight is read; returns the facts of the run and its forecast."""
    from variants.preflight import learning, trial, ways
    from variants.preflight.report import check_report

    module = trial.imported(settings.variant).module  # a mistake in the user's own file is told first
    norms.check(settings.max_norm_ratio, ranks.count())
    hypers = hypers_of(settings, module)
    sharing = ranks.count() if module.SAE.data_parallel else 1
    if settings.batch_size % sharing:
        raise ValueError(f"--batch_size={settings.batch_size} cannot be shared equally by {sharing} processes\n"
                         f"give a multiple of {sharing}")
    shape = check_model(settings)
    findings = {}
    for suffix, hyper in hypers.items():
        findings[suffix] = check_variant(settings, hyper, shape, sharing)
        for note in findings[suffix].notes:
            say(f"note: {settings.variant}{suffix}: {note}")
    facts = dict(model=settings.model, instruct_model=language_model.instruct_sibling(settings.model),
                 profile=settings.profile, source=source.kind, device=settings.device)
    facts["dense"] = {suffix: found.active for suffix, found in findings.items() if found.active > learning.ALWAYS_ON}
    for note in eval_settings.check_requirements(evals_of(settings), settings.eval_config, facts):
        say(f"note: {note}")
    snapshots_of(settings)
    run_snapshots.check(settings.snapshots, count_steps(settings))
    facts |= needs.forecast(settings, layers_of(settings), count_steps(settings), shape, list(findings.values()),
                            bool(evals_of(settings)), sharing)
    ways.check(module, hypers, bool(settings.num_tokens) and facts["shard"], settings.init_from)
    needs.check_room(settings, models_of(settings), facts["forecast_bytes"]["saes"])
    inputs.fetch(source, evals_of(settings))  # only now: nothing of the run's own is wrong
    if settings.num_tokens:
        hyper = next(iter(hypers.values()))
        check_report(settings.variant, hyper, 32, settings.d_sae, lambda sae: tried_report(settings, sae, hyper),
                     seed=settings.seed, train_step=train_step, make_optimizer=make_optimizer)
    needs.check_texts(settings, source, shape, evals_of(settings))
    return facts


def check_model(settings: Settings) -> dict:
    """The language model's shape; ValueError where layers, rows or an SAE from elsewhere do not go with it."""
    layers = layers_of(settings)
    itemsize = getattr(torch, settings.dtype).itemsize
    shape = places.shape(settings.model, itemsize, settings.cache_dir, settings.data_dir)
    inputs.check_kind(settings, shape.get("synthetic", False))
    if not 0 <= layers[0] <= layers[-1] < shape["n_layers"]:
        raise ValueError(f"--layers={settings.layers}: {settings.model} has blocks 0 to {shape['n_layers'] - 1}\n"
                         "choose among those")
    inputs.check_positions(settings.model, shape["positions"], settings.context, evals_of(settings))
    if settings.init_from:
        interchange.check_width(settings.init_from, shape["d_model"])
    return shape


def check_variant(settings: Settings, hyper: dict, shape: dict, sharing: int):
    """What trying an SAE of the variant found; an error with the line in the user's file for what cannot be trained."""
    from variants.preflight import check, identical

    if not settings.num_tokens:  # nothing to train
        return check.untrained(settings.variant, hyper, shape["d_model"], settings.d_sae)
    layers = layers_of(settings)
    return check.run(
        settings.variant, hyper, d_in=shape["d_model"], d_sae=settings.d_sae,
        batch_size=settings.batch_size // sharing, total_steps=count_steps(settings), lr=settings.lr,
        seed=settings.seed, train_step=train_step, make_optimizer=make_optimizer,
        reference_files=identical.references(settings.variant), against=settings.against,
        allow_identical=settings.allow_identical, allow_dense=settings.allow_dense,
        accelerator=settings.device != "cpu", context=settings.context,
        room=(layers[0], shape["n_layers"] - 1 - layers[-1]), told=dict(layer=layers[0], lm_name=settings.model))


def tried_report(settings: Settings, sae: base.SAE, hyper: dict) -> tuple[dict, dict]:
    """The report of an SAE of the preflight, on the tiny profile's model and text."""
    given = Settings(profile="tiny", variant=settings.variant, seed=settings.seed, device="cpu",
                     cache_dir=settings.cache_dir)
    tiny, _ = resolve(given)
    layer = max([0, *(-offset for offset in sae.attention_layers)])
    deepest = max([layer, *(layer + offset for offset in sae.attention_layers)])
    if deepest >= places.SHAPES[tiny.model]["n_layers"]:  # it looks further than that model is deep
        return {}, {}
    with VOICE.muted():
        source = make_source(tiny)
        lm = load_language_model(dataclasses.replace(tiny, layers=str(layer)))
        job = Job(f"layer_{layer}", layer, hyper, sae, None, scale=1.0)
        job.scale = float(own_report.held_out_batch(tiny, lm, job, source, 256).x.pow(2).sum(1).mean().sqrt())
        return own_report.report_of(tiny, lm, job, source)


# ====================================================================================================== language model


def load_language_model(settings: Settings) -> LanguageModel:
    """The profile's model, or any causal LM of transformers by hub name or folder; tried before it is built on."""
    where = places.location(settings.model, settings.cache_dir, settings.data_dir)
    if synthetic.is_synthetic(where):
        digest = places.known_identity(settings.model, settings.cache_dir, settings.data_dir)
        return synthetic.load(where, settings.model, digest, getattr(torch, settings.dtype), settings.device)
    lm = language_model.load(where, settings.model, getattr(torch, settings.dtype), settings.device)
    model_checks.trial(lm, layers_of(settings))
    return lm


# ======================================================================================================== token stream


def token_stream(source, lm: LanguageModel, settings: Settings, cursor: Optional[dict] = None) -> TokenStream:
    """The run's training text as blocks of packed rows, from the beginning or where `cursor` says."""
    # compiled passes have a fixed shape and run on over the ends of blocks; several ranks each fill up their last
    pass_rows = settings.lm_batch_size if lm.compiled and ranks.count() == 1 else 1
    cursor = cursor or FIRST
    reader = Reader(source, lm.tokenizer, lm.bos, lm.vocab_size, cursor["documents"], say)
    rows = Rows(reader, settings.context, settings.keep_bos, cursor["leftover"], cursor["before"])
    return TokenStream(rows, block_plan(settings), pass_rows, cursor)


# =================================================================================================== activation buffer


def block_key(settings: Settings, lm: LanguageModel, stream: TokenStream, wanted: list, b: int) -> dict:
    """What the activations of block b depend on, by which they are kept."""
    return dict(model=lm.digest, layers=layers_of(settings), data=stream.digest, context=settings.context,
                plan=block_plan(settings)[:b + 1], keep_bos=settings.keep_bos, lm_batch_size=settings.lm_batch_size,
                attention=sorted(map(str, wanted)), **passes.kind(lm, stream.pass_rows > 1 and not wanted))


def activation_blocks(settings: Settings, lm: LanguageModel, stream: TokenStream, cache, first: int,
                      wanted: list[contexts.Attention], track=track):
    """Yield (b, block, ahead) from block `first` on, on the training device, residuals in the language model's dtype.

    A block holds x_<layer> [N, D], tokens_N, place_N (row·T + position) and what is `wanted` of attention
    (variants/kit/contexts.py). What the model gave is kept in the shared cache, for other variants on the same data.
    The next block is tokenised in the background. Passes of a fixed shape run on over the ends of blocks; there, if
    nothing is kept and memory holds two, next(ahead) is a pass of the next block. Each rank passes its share of rows.
    """
    layers, plan = layers_of(settings), block_plan(settings)
    carried = {}  # block: {layer: residuals of its first rows [r, T, D]}, from the last pass of the block before
    work, made = {}, {}  # block: what makes it, pass by pass; itself

    key = functools.partial(block_key, settings, lm, stream, wanted)

    def may_begin(b: int) -> bool:
        if stream.pass_rows == 1 or wanted or b == len(plan) or cache.holds("train", key(b)):
            return False
        size = plan[b] * len(layers) * lm.d_model * lm.dtype.itemsize
        return not cache.fits(size) and 2 * size < memory.free_memory(lm.device)  # what is kept is timed as it is made

    with ThreadPoolExecutor(1) as background:
        ahead = {}  # block: its rows, in the making

        def prefetch(b: int) -> None:
            if b < len(plan) and not ranks.number() and not cache.holds("train", key(b)):
                ahead[b] = background.submit(stream.block, b)

        def making(b: int, track):
            rows_RT, index_N, around = ranks.agreed(lambda: ahead.pop(b).result() if b in ahead else stream.block(b))
            prefetch(b + 1)
            rows, tokens, starts_W = ranks.shares(rows_RT, index_N)
            index_n = index_N[tokens] - rows.start * settings.context
            carried[b + 1] = carried.pop(b, {})
            part = yield from passes.collecting(lm, rows_RT[rows], index_n, layers, wanted, settings.lm_batch_size, say,
                                                track, f"activations {b + 1}/{len(plan)}", around, carried[b + 1])
            if ranks.sharing() > 1:
                made[b] = part | dict(starts_W=starts_W)
            else:
                made[b] = ranks.to_first(part, rows.start, tokens.start, settings.context)

        def make(b: int) -> dict[str, Tensor]:
            begun = work.pop(b, None)
            passes.finished(making(b, track) if begun is None else begun)
            return made.pop(b)

        for b in range(first, len(plan)):
            given = cache.get("train", key(b), lambda b=b: make(b), key(b + 1)) if ranks.count() == 1 else make(b)
            carried.pop(b, None)  # not wanted where the cache had the block
            if work.pop(b, None) is not None:  # which another process has stored since it was begun here
                carried.pop(b + 1, None)
            if b == 0 and lm.reads_text and not settings.keep_bos and not ranks.number():
                say(f"BOS positions are left out; with them they would hold {float(given['bos_share']):.1%} of E‖x‖²")
            block = contexts.placed(given, settings.device)  # the free memory that counts is that beside it
            if may_begin(b + 1):
                work[b + 1] = making(b + 1, lambda items, *how: items)
            yield b, block, work.get(b + 1, iter(()))


# ============================================================================================================ training


@dataclass
class Job:
    """One SAE in training."""

    name: str  # layer_12, or layer_12.k_40 in a sweep
    layer: int
    hyper: dict
    sae: base.SAE
    optimizer: torch.optim.Optimizer
    scale: float = 0.0  # √E‖x‖² of the raw activations; 0: not measured yet
    notes: list[str] = dataclasses.field(default_factory=list)  # what makes its result doubtful, found in training
    max_norm: Optional[float] = None  # norm above which tokens are left out; None: none is, or it is not measured yet
    left_out: dict[int, float] = dataclasses.field(default_factory=dict)  # share of the tokens of each block
    untrained: Optional[list[float]] = None  # L0, explained variance before the first step; None: not measured

    @property
    def attention(self) -> Optional[contexts.Attention]:
        """What its batches hold of attention, or None."""
        return contexts.Attention.of(self.sae, self.layer)


def attention_of(jobs: list[Job]) -> list[contexts.Attention]:
    """What the jobs' batches hold of attention."""
    return list(dict.fromkeys(job.attention for job in jobs if job.attention))


def make_optimizer(sae: base.SAE, lr: float):
    """Fused Adam on the variant's parameter groups; each group's own learning rate is what the schedule multiplies."""
    if isinstance(sae, imperative.Imperative):  # its trainer brings one; the trainer's state takes its place
        return trainer_state.TrainerState(sae)
    optimizer = torch.optim.Adam(sae.parameter_groups(lr), lr=lr, betas=sae.adam_betas, fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def train_step(sae: base.SAE, optimizer, batch: base.Batch, progress: base.Progress, lr: float = 0.0):
    """One step; returns the loss and its terms, still on the device: nothing here waits for it."""
    if isinstance(sae, imperative.Imperative):
        with torch.autocast("cuda", torch.bfloat16, enabled=batch.x.is_cuda):
            return sae.update(batch, progress)
    for group in optimizer.param_groups:
        group["lr"] = group.get("base_lr", lr) * progress.lr_factor() * sae.lr_scale(progress)
    loss, terms = gradients(sae, batch, progress, say)
    ranks.average_gradients(sae)
    update(sae, optimizer)
    sae.count_step(len(batch.x))
    with torch.no_grad():
        sae.after_step(batch, progress)
        sae.revive(optimizer, batch, progress)
    return loss, terms


def in_time(settings: Settings, lm: LanguageModel, source, cache, limit) -> Settings:
    """Under --minutes: as many tokens as fit beside the evals, by what a few small blocks of this run take here."""
    if not limit.on:
        return settings
    measured, kept = pace_of(settings, lm, source, cache, limit)
    saes = len(hypers_of(settings, variants.load(settings.variant)))
    return limit.plan(settings, measured, kept, evals_of(settings), lm, layers_of(settings), saes)


def pace_of(settings: Settings, lm: LanguageModel, source, cache, limit) -> tuple[pace.Pace, bool]:
    """What a token of texts and model takes, and a step of all SAEs, by a trial; whether all blocks are kept."""
    few, total = pace.trial(settings), count_steps(settings)
    jobs, seconds = make_jobs(settings, lm), []
    ranks.train_together(all(job.sae.data_parallel for job in jobs))
    now = training.Training(0, [], {job.name: [] for job in jobs})
    stream, nothing = token_stream(source, lm, few), evals.cache.Cache(Path(settings.cache_dir) / "activations", 0.0)
    with VOICE.muted():
        blocks = activation_blocks(few, lm, stream, nothing, 0, attention_of(jobs))
        for b, block, _ in pace.timed(blocks, seconds, settings.device, limit.left()):
            if block and not b:
                training.begin(few, lm, jobs, block, shard)
            for step, batch_of_job in batches(few, jobs, block, b, now.step, now.step) if block and total else ():
                progress = base.Progress(step, total, step * settings.batch_size, total * settings.batch_size)
                step_all(jobs, batch_of_job, progress, now)
    ranks.train_together(False)
    stream, blocks = token_stream(source, lm, settings), range(len(block_plan(settings)))
    kept = ranks.count() == 1 and all(cache.holds("train", block_key(settings, lm, stream, attention_of(jobs), b))
                                      for b in blocks)
    return pace.pace(seconds, few, lm, token_stream(source, lm, few).block(0)[0]), kept


def make_jobs(settings: Settings, lm: LanguageModel) -> list[Job]:
    """The SAEs to train, all from one stream; each is initialised from the seed alone, whatever its siblings are."""
    module = variants.load(settings.variant)
    jobs = []
    for layer, (suffix, hyper) in itertools.product(layers_of(settings), hypers_of(settings, module).items()):
        environment.seed_everything(settings.seed)
        setting = dict(steps=count_steps(settings), lr=settings.lr, seed=settings.seed, device=settings.device,
                       layer=layer, lm_name=settings.model)
        sae = variants.build(module, lm.d_model, settings.d_sae, hyper, setting).to(settings.device)
        name = f"layer_{layer}{suffix}"
        scale = interchange.adopt(sae, settings.init_from, name, settings.trust_code) if settings.init_from else None
        if not scale:  # an SAE that is only evaluated takes activations as they are
            scale = 0.0 if settings.num_tokens else 1.0
        jobs.append(Job(name, layer, hyper, sae, make_optimizer(sae, settings.lr or sae.default_lr), scale))
        if settings.init_from and not settings.num_tokens:
            jobs[-1].max_norm = interchange.max_norm(settings.init_from, name)
    return jobs


def train(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache, out: Path, interrupts, limit,
          ) -> tuple[training.Training, Settings]:
    """Train all jobs to the end, continuing from the checkpoint in `out` if there is one.

    Returns where it ended, and the settings with the tokens that there was time for.
    """
    ranks.train_together(all(job.sae.data_parallel for job in jobs))
    now = begun(settings, out, jobs)
    left = now.step < count_steps(settings)  # else trained, or from elsewhere and only to be evaluated
    while left:
        stream = token_stream(source, lm, settings, now.cursor)
        try:
            asked, settings = settings, train_on(settings, lm, jobs, stream, source, cache, out, now, interrupts, limit)
            left = asked != settings and now.step < count_steps(settings)
        except limits.Slow as slow:  # a block would not be made in time: a smaller one, from where it begins
            b = block_at(steps_by_block(settings), now.step)
            now.cursor = training.cursor_at(stream.cursors, b)
            settings = limit.shorter(settings, block_plan(settings)[:b], slow.token, out)
    return now, settings


def train_on(settings: Settings, lm: LanguageModel, jobs: list[Job], stream: TokenStream, source, cache, out: Path,
             now: training.Training, interrupts, limit) -> Settings:
    """Train from where `now` stands to the end; returns the settings with the tokens there was time for."""
    together, total, asked = ranks.sharing() > 1, count_steps(settings), settings
    edges = list(itertools.accumulate(steps_by_block(settings), initial=0))  # the steps at which blocks begin and end
    log_every = max(1, total // settings.log_lines)
    measured = run_snapshots.steps(total, settings.snapshots)

    def stop_if_asked(here: bool = True) -> None:
        # ranks stop at the same step: none may leave others waiting in the middle
        interrupts.deferred = together and now.step < total
        if here and ranks.any_host(interrupts.signal > 0):
            raise KeyboardInterrupt("between steps")

    b = first = block_at(steps_by_block(settings), now.step)
    stop_if_asked()
    if now.step in measured:  # interrupted there
        snapshot(settings, lm, jobs, source, cache, out, now, limit)
    try:
        # a pass of the next block for as many steps as it gives tokens: launched while the device is busy with it
        every = max(1, settings.passes * settings.lm_batch_size * (settings.context - 1) // settings.batch_size)
        watched = limit.watching(track)
        for b, block, ahead in activation_blocks(settings, lm, stream, cache, first, attention_of(jobs), watched):
            stop_if_asked()
            if not block:  # the first rank has it, and trains
                continue
            training.leave_out(settings.max_norm_ratio, jobs, block, b)
            now.clock.begin_steps(now.step, edges[b], edges[b + 1])
            if now.step == 0:
                training.begin(settings, lm, jobs, block, shard)
            for step, batch_of_job in batches(settings, jobs, block, b, edges[b], now.step):
                interrupts.deferred = True
                progress = base.Progress(step, total, step * settings.batch_size, total * settings.batch_size)
                if step % every == 0:
                    next(ahead, None)
                step_all(jobs, batch_of_job, progress, now)
                if now.step % log_every == 0 or now.step == total:
                    settings = at_row(settings, jobs, batch_of_job, progress, stream, b, out, now, limit)
                    total = count_steps(settings)
                if now.step in measured:
                    interrupts.deferred = False  # between two steps: nothing is half done
                    snapshot(settings, lm, jobs, source, cache, out, now, limit)
                stop_if_asked(not together or now.step % 8 == 0 or now.step == total)
                if now.step == total:
                    break
            now.clock.lap("sae")
            block.clear()  # before the next block but one is made: no more than two at a time on the device
            if now.step == total or asked != settings:  # the next block is shorter
                now.cursor = training.cursor_at(stream.cursors, b + 1)
                break
    except (KeyboardInterrupt, hopeless.Hopeless) as stop:
        if jobs[0].scale and (stop.args or not interrupts.deferred):  # a second signal may come in the middle of a step
            training_log.check_finite(jobs, now.recent, now.step, ranks.mean)
            training.save(out, jobs, now, dict(stream.cursors), b)
        raise
    say(f"training: {now.clock.activations:.1f} s for texts and activations, {now.clock.sae:.1f} s for SAE steps"
        f"{run_snapshots.told(now.clock.snapshots)}")
    return settings


def at_row(settings: Settings, jobs: list[Job], batch_of_job: dict[str, base.Batch], progress: base.Progress,
           stream: TokenStream, b: int, out: Path, now: training.Training, limit) -> Settings:
    """A row of the log, and a checkpoint where one is due; the settings, with fewer tokens where time has run short."""
    training.note(settings, out, jobs, batch_of_job, progress, now)
    settings = limit.looked_at(settings, block_plan(settings), now, b, out)
    if ranks.any_host(now.clock.may_save(settings.checkpoint_seconds)) or now.step == count_steps(settings):
        training.save(out, jobs, now, dict(stream.cursors), b)
    return settings


def snapshot(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache, out: Path, now, limit) -> None:
    """Measure copies of the SAEs as they are, into snapshots/step_<n>; an eval that crashes there costs that alone."""
    now.clock.lap("sae")
    place = run_snapshots.begin(out, now.step, snapshots_of(settings))
    asked = dataclasses.replace(settings, evals=",".join(limit.planned(snapshots_of(settings))) or "none")
    for layer in layers_of(settings):  # a layer at a time: copies take memory
        own = [job for job in jobs if job.layer == layer]
        try:
            copies = [dataclasses.replace(job, sae=duplicate(job.sae), optimizer=None) for job in own]
            evaluate(dataclasses.replace(asked, layers=str(layer)), lm, copies, source, cache, place, limit)
        except (MemoryError, torch.OutOfMemoryError) as error:
            say(f"snapshot after step {now.step:,}, layer {layer}: no memory for it: {network.first_line(error)}")
    now.clock.lap("snapshots")
    now.clock.count_rate(now.step)  # no time of training


def step_all(jobs: list[Job], batch_of_job: dict[str, base.Batch], progress: base.Progress, now) -> None:
    """One step of every SAE, each on its own batch."""
    for job in jobs:
        if progress.step % 64 == 0 or job.sae.dead_on_host is None:
            job.sae.look(progress)
        now.recent[job.name].append(train_step(job.sae, job.optimizer, batch_of_job[job.name], progress))
    now.step = progress.step + 1
    training.tell(progress, now)


def shard(settings: Settings, job: Job) -> None:
    """Spread an SAE over the ranks, if that was asked for or is needed, with an optimiser of its own."""
    if settings.shard and ranks.sharing() > 1:
        ranks.shard(job.sae)
        job.optimizer = make_optimizer(job.sae, settings.lr or job.sae.default_lr)


def begun(settings: Settings, out: Path, jobs: list[Job]) -> training.Training:
    """Where training begins: at its first step, or where the run's checkpoint left it."""
    now = training.begun(out, jobs, count_steps(settings), settings.shard, lambda job: shard(settings, job))
    if now.step < count_steps(settings):
        now.keep_until = prolong.keep_until(settings, jobs, block_plan(settings), out)
    return now


# =============================================================================================================== evals


def evaluate(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache, out: Path, limit,
             ) -> tuple[dict[str, BaseException], dict[str, str]]:
    """Run the chosen evals on all SAEs, a layer at a time, into out/eval_results.

    Returns the evals that crashed, and why others were left out, for want of time.
    A result is kept by the hash of what it depends on (weights, model, data, eval settings, code): continuing after a
    crash, or with one eval more, repeats none. Several ranks deal them out; the first retries what failed elsewhere.
    """
    texts = [source.digest("heldout"), source.digest("train")]
    code = identity.evals_digest()
    chosen = evals_of(settings)
    crashed, left_out = {}, {}
    asked = list(itertools.product(limit.order(chosen), layers_of(settings)))
    for name, layer in LIVE.parts(ranks.dealt(asked), len(asked)):
        trained = {job.name: TrainedSAE(job.sae, job.scale) for job in jobs if job.layer == layer}
        max_norm = next(job.max_norm for job in jobs if job.layer == layer)
        common = [name, chosen[name], layer, lm.digest, *texts, code, settings.seed, evals.outside(name), max_norm]
        depends = {sae: evals.cache.digest([*common, stored.weights_digest(t)]) for sae, t in trained.items()}
        pending = {sae: t for sae, t in trained.items() if not stored.is_done(out, name, sae, depends[sae])}
        if not pending:
            continue
        say(f"eval {name}, layer {layer}: {len(pending)} SAE{'s' if len(pending) > 1 else ''}")
        try:
            key = limits.eval_key(name, chosen[name], lm, layer, settings.d_sae)
            with LIVE.eval(name, layer), limit.measuring(name, key, len(pending)):
                found = results_of(settings, lm, name, layer, pending, source, cache, max_norm)
        except limits.OutOfTime as error:
            left_out[name] = network.first_line(error)
            say(f"note: the eval {name} is left out: {left_out[name]}")
            continue
        except Exception as error:  # noqa: BLE001  one eval's crash must not cost the others' results
            crashed[name] = error
            traceback.clear_frames(error.__traceback__)  # they hold what lies in the GPU's memory
            say(f"eval {name} failed: {type(error).__name__}: {error}")
            continue
        for sae, result in found.items():
            of_eval = chosen[name] | dict(model_name=lm.name, random_seed=settings.seed)
            of_sae = dict(d_in=lm.d_model, d_sae=len(trained[sae].W_dec), hook_name=hook_name(layer), hook_layer=layer,
                          model_name=lm.name, architecture=variants.title(settings.variant))
            path = stored.write(out, name, sae, result, of_eval, of_sae)
            runs.folder.write_json(path.with_suffix(".depends_on"), stored.note(path, depends[sae]))
    return crashed, left_out


def results_of(settings: Settings, lm: LanguageModel, name: str, layer: int, saes: dict, source, cache,
               max_norm: Optional[float]) -> dict:
    """{SAE: evals.Result} of one eval, on the model that it asks."""
    def load(model: str) -> LanguageModel:
        return load_language_model(dataclasses.replace(settings, model=model))

    wanted = language_model.instruct_sibling(lm.name) if evals.declared(name, "INSTRUCT") else lm.name
    with language_model.standing_in(lm, wanted, load) as asked:
        setup = make_setup(settings, asked, layer, evals_of(settings)[name], source, cache, max_norm)
        return evals.load(name).run(setup, saes)


def make_setup(settings: Settings, lm: LanguageModel, layer: int, config: dict, source, cache,
               max_norm: Optional[float] = None) -> evals.Setup:
    """What an eval is given besides the SAEs."""
    return evals.Setup(lm, layer, hook_name(layer), config, lambda: source.documents("heldout"),
                       source.digest("heldout"), cache, source, settings.seed, say, track,
                       layers=tuple(layers_of(settings)) if ranks.count() == 1 else (), max_norm=max_norm)


def hook_name(layer: int) -> str:
    """TransformerLens' name of the residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


# ============================================================================================================= results


def results(settings: Settings, lm: LanguageModel, jobs: list[Job], log: list[dict], out: Path, crashed: dict,
            unreported: dict, dense: dict[str, float], limit) -> dict:
    """final_info.json: a section per SAE, made for `diff`. `dense`: by suffix, the share of features always active."""
    chosen, defaults = limit.kept(evals_of(settings)), hyperparameters(variants.load(settings.variant))
    sections = {}
    for job in jobs:
        place = dict(hook_name=hook_name(job.layer), layer=job.layer, d_in=lm.d_model,
                     **norms.told(settings.max_norm_ratio, job.max_norm))
        config = run_results.config(settings, job.sae, defaults | job.hyper, place, count_steps(settings), chosen,
                                    dense.get(interchange.suffix(job.name), 0.0))
        means = training.means(log, job, block_plan(settings))
        sections[job.name] = run_results.section(out, job.name, means, chosen, crashed, unreported.get(job.name),
                                                 [*job.notes, *limit.cut_again], config, limit.problems())
        if settings.snapshots:
            sections[job.name]["snapshots"] = run_snapshots.rows(out, job.name, settings.snapshots,
                                                                 snapshots_of(settings), sections[job.name],
                                                                 bool(limit.cut_again))
    return sections


# ================================================================================================================ main


def run(settings: Settings, why: str, out: Path, info: dict, interrupts: Interrupts, limit: limits.Limit,
        ) -> dict[str, BaseException]:
    """The whole run, phase by phase; `info` (run_info.json) says at each moment which one. Returns what crashed."""
    say(why)
    source = make_source(settings)
    kept = Path(settings.cache_dir) / "activations"
    cache = evals.cache.Cache(kept, *disk.store_bounds(kept, settings.activation_cache_gb))

    with phase("preflight", info, out):
        info["facts"] = ranks.agreed(lambda: preflight(settings, source))
        info["commits"] = network.pinned()
        settings = dataclasses.replace(settings, lm_batch_size=info["facts"]["lm_batch_size"],
                                       shard=info["facts"]["shard"])
        if not ranks.number():
            runs.folder.write_bytes(out / "variant.py", variants.text(variants.path(settings.variant)))
    with phase("language model", info, out), ranks.first_before_others():
        language_model.compile_cache(Path(settings.cache_dir) / "kernels")
        lm = load_language_model(settings)
        info["model_digest"] = lm.digest
        say(f"{lm.title}, d_model {lm.d_model}, {settings.dtype} on {settings.device}")
    with phase("training", info, out):
        settings = in_time(settings, lm, source, cache, limit)
        limit.leave_out({}, out)
        info["steps"] = count_steps(settings)
        jobs = make_jobs(settings, lm)
        now, settings = train(settings, lm, jobs, source, cache, out, interrupts, limit)
        info |= dict(steps=count_steps(settings), tokens_per_s=now.tokens_per_s(settings.batch_size))
        jobs = finished(settings, lm, jobs, out)
        own = [] if ranks.number() else jobs  # the first rank saves and reports them all
        for job in own:
            run_results.save_sae(settings, job, out, hook_name(job.layer))
    with phase("report", info, out):
        unreported = own_report.reported(settings, lm, own, source, out, limit)
    with phase("evals", info, out):
        crashed, left_out = evaluate(settings, lm, jobs, source, cache, out, limit)
        limit.leave_out(left_out, out)
    if ranks.number():  # the first goes on alone
        return {}
    with phase("results", info, out):
        sections = results(settings, lm, jobs, now.log, out, crashed, unreported, info["facts"]["dense"], limit)
        runs.folder.write_json(out / "final_info.json", sections)
        LIVE.means(sections)
        mine = reading.read(out)
        looked_at = {job.name: (make_setup(settings, lm, job.layer, {}, source, cache, job.max_norm),
                                TrainedSAE(job.sae, job.scale)) for job in jobs}
        limit.if_time("feature dashboards", limit.for_pages, lambda: report.with_features(out, looked_at, say))
        limit.if_time("report", 2 * limits.LAST_WORDS,
                      lambda: report.write(out, mine, compare.stored_baselines(mine), now.log))
        for reason, n in source.skipped.items():
            say(f"texts: {n:,} rows skipped: {reason}")
        say(f"cache: {settings.cache_dir} ({cache.size() / 1e9:.2f} GB of LM activations, at most "
            f"{cache.limit / 1e9:.3g}; delete the folder to clear it)")
        info["cache"] = dict(hits=cache.hits, misses=cache.misses)
    failed = {f"eval {name}": error for name, error in crashed.items()}
    return failed | {f"report of {sae}": error for sae, error in unreported.items()}


def finished(settings: Settings, lm: LanguageModel, jobs: list[Job], out: Path) -> list[Job]:
    """The trained SAEs, whole on this rank and without what only training needs: its memory is the evals' now."""
    if ranks.through(jobs[0].sae) and settings.num_tokens:  # not whole here: from the checkpoint of the last step
        jobs.clear()
        jobs = make_jobs(settings, lm)
        begun(settings, out, jobs)
    for job in jobs:
        job.optimizer = None
        job.sae.zero_grad()
        forget(job.sae)
    return jobs


def command(argv: list[str], known: failure.Known) -> int:
    """A command line from its first word to its last; what becomes known of the run on the way is noted in `known`."""
    from variants.preflight import messages

    info = known.info
    known.settings, why = resolve(parse_settings(argv))
    ranks.join(known.settings.device)
    settings = known.settings = ranks.agreed(lambda: dataclasses.replace(
        known.settings, out_dir=known.settings.out_dir or runs.folder.next_free()))
    limit = limits.Limit.of(settings, known.began)
    info["phase"] = "preflight"
    if settings.headline:
        verdict.check_headline(settings.headline, compare.directions(), evals_of(settings))
    VOICE.silent = ranks.number() > 0
    messages.hold(settings.variant)
    variants.HELD.update(ranks.agreed(lambda: dict(variants.HELD)))  # every rank runs the same
    read, whole, for_training, commits = ranks.agreed(lambda: recognise(settings))
    network.pin(commits)  # every rank reads the same
    state = None
    if not ranks.number():
        state, known.lock = runs.folder.claim(
            settings.out_dir, whole, for_training,
            lambda folder, before: prolong.found(settings, folder, before, lambda other: marks(other, read)[1],
                                                 block_plan, hypers_of))
    out = known.out = Path(settings.out_dir).resolve()
    known.interrupts = Interrupts()
    state = ranks.agreed(lambda: state)
    if state == "finished":
        say(f"{settings.out_dir} is already finished with these settings and this code; nothing to do")
        comparisons = compare.of_run(out)
        say("\n" + compare.in_words(comparisons))
        endings.again(settings, out, runs.folder.left(out), comparisons)
        ranks.leave()
        return 0
    no_paths = {name: value for name, value in dataclasses.asdict(settings).items()
                if name not in ("out_dir", "cache_dir", "data_dir")}
    if not ranks.number():
        VOICE.listen(out / "log.txt")
    if state == "resume":
        info["seconds"] = resume(settings, out)
        limit.read(out)
    if not ranks.number():
        LIVE.open(out, no_paths, state == "resume", say)
    info |= dict(status="running", fingerprint=whole, training_fingerprint=for_training, inputs=read, commits=commits,
                 settings=no_paths, steps=count_steps(settings), seed=settings.seed, versions=environment.versions(),
                 commit=environment.git_commit(), hardware=environment.hardware(settings.device))
    with limit.within(limits.LAST_WORDS, lambda: f"in {info['phase']}"):
        crashed = run(settings, why, out, info, known.interrupts, limit)
    return 0 if ranks.number() else conclude(settings, out, info, crashed)


def resume(settings: Settings, out: Path) -> dict[str, float]:
    """Say how the run was left, and make its folder fit to go on; returns the seconds it has taken so far, by phase."""
    before = runs.folder.left(out)
    asked = dict(steps=before.get("steps", count_steps(settings)), settings=dataclasses.asdict(settings))
    remains = ", ".join(prolong.remaining(out, before | asked))
    say(f"{settings.out_dir} {failure.CONTINUES} {before.get('phase', 'unknown')!r} ({failure.left(out, before)}); "
        + (f"continuing: {remains}" if remains else "continuing"))
    if not ranks.number():
        (out / "error.json").unlink(missing_ok=True)
    ranks.agreed(lambda: checkpoint.mend(out, say))
    return failure.spent(out, before)


def conclude(settings: Settings, out: Path, info: dict, crashed: dict[str, BaseException]) -> int:
    """Mark the folder as finished, or failed where something crashed; print the comparison. Returns the exit status."""
    info["status"] = "failed" if crashed else "finished"
    if not crashed:
        info["files"] = runs.folder.digests(out)
    runs.folder.write_info(out, info)
    if not crashed:
        checkpoint.remove(out)
    comparisons = compare.of_run(out)
    say("\n" + compare.in_words(comparisons))
    say(f"{settings.out_dir}: final_info.json, report.html, sae/; {duration(sum(info['seconds'].values()))}, "
        f"{info['peak_memory_gb']['results']['host']:.1f} GB at most")
    if not crashed:
        endings.finished(settings, out, info, comparisons)
        return 0
    name, error = next(iter(crashed.items()))
    told = functools.partial(endings.failed, settings, out, info)
    return failure.report(error, name, out, variants.path(settings.variant), told=told)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 128 + signal interrupted."""
    known = failure.Known(began=pace.process_start() if argv is None else time.monotonic())
    network.forget()  # what an earlier run in this process read and heard
    variants.HELD.clear()
    try:
        return command(sys.argv[1:] if argv is None else argv, known)
    except KeyboardInterrupt as stop:
        return failure.interrupted(stop, known)
    except (Exception, SystemExit, limits.OutOfTime) as error:  # noqa: BLE001  every failure ends in the same few lines
        if isinstance(error, SystemExit) and known.info["phase"] == "settings":  # --help
            raise
        return failure.ended(error, known)
    finally:
        LIVE.close("finished" if known.info.get("status") == "finished" else "failed")
        VOICE.close()
        known.release()  # here: an error that was kept may keep this frame


if __name__ == "__main__":
    ranks.end(main())
