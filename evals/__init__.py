"""The evals. To add one, write `evals/<name>.py`, or `evals/<name>/__init__.py` if it has files of its own, with the
names below; nothing lists it. To remove one, delete that file or folder (and tests/evals/test_<name>.py).

What several evals use lies in evals/common/, the language model in evals/model/, where texts come from in evals/texts/,
what is downloaded or kept in evals/storage/ and evals/cache.py.

An eval defines

    EVAL_TYPE_ID    SAEBench's eval_type_id (the folder under eval_results/ and the prefix of its metrics)
    METRICS         a literal {"metric": "higher" | "lower" | ""}: every metric it can return and which way is better
    CONFIG          a literal {profile: {setting: value}} for gemma, embedded, tiny; SAEBench's names where it has them
    requirements    (config, facts) -> list of problems, each "what\\nwhat to do"; empty if the eval can run
    run             (setup, saes) -> {sae name: Result}; `saes` {name: TrainedSAE}, all on setup.hook_name
and, where it applies,
    NOTE            a literal: a sentence for the readers of its numbers, shown in the report
    INSTRUCT        True if it asks questions: it is given the instruction-tuned sibling of the run's model
    repositories    (config, source) -> hub data sets (or local files) it reads with texts from the hub: access is
                    checked before the run, and what they hold is part of the run's identity
    read_ahead      (source, config, seed): reads what it takes from the hub, which is then kept, so that a data set
                    that cannot serve is known before anything is trained
    held_out        config -> (fewest, asked for): tokens of held-out text that it reads, checked at preflight
    wheels          kind of source -> keys of evals.texts.embedded.WHEELS it reads then: they are fetched at preflight
    outside         () -> what else decides its result (the address of a judge), JSON-like, never a secret
    RANGES, RECORDED  literals: what the values of its settings may be, where the type of the default does not say it
                      (evals/common/settings.py)

`facts` at preflight: model, profile, device, source ("hub", "embedded", "tiny": where labelled texts come from) and
instruct_model, the name of the instruction-tuned model that evals with INSTRUCT get, or None.
Passes of the language model and encodings go through evals.model.memory, which halves what does not fit on the GPU.
An eval never changes the language model, the SAEs or the global random state: its generators are seeded by setup.seed.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Setup:
    """What an eval is given besides the SAEs.

    `lm` offers: name, digest (identity of its weights), tokenizer, device, d_model, d_final (width of h, d_model but
    for some OPTs), vocab_size, bos (token id), special_ids (set), uniform_when_ablated (a zero residual gives equal
    logits: bias-free RMSNorm), residual(tokens_BT, layer) -> x_BTD, finish(x_BTD, layer) -> h_BTD (the blocks after
    `layer` and the final norm), unembed(h) -> logits (..., V), by the model's own head.
    """

    lm: Any
    layer: int
    hook_name: str  # as TransformerLens writes it: blocks.12.hook_resid_post
    config: dict  # the eval's settings, resolved
    texts: Callable[[], Iterable[str]]  # a fresh iterator over held-out documents, always in the same order
    texts_digest: str  # hash of what `texts` yields, for cache keys
    cache: Any  # evals.cache.Cache
    data: Any  # where labelled texts come from: evals.texts.source.Source
    seed: int
    say: Callable[[str], None]  # one progress line
    # (items, label, total, unit, size of an item = 1) -> the items, with a progress bar or now and then a line
    track: Callable = lambda items, *about: items
    # {what: how much of it the GPU held at once}, kept by evals.model.memory
    fits: dict[str, int] = field(default_factory=dict)


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


def names() -> list[str]:
    """Names of all evals: the modules of this package that define EVAL_TYPE_ID."""
    found = {place.stem for place in Path(__file__).parent.iterdir() if place.stem[0] not in "._"}
    return sorted(name for name in found if declared(name, "EVAL_TYPE_ID"))


def files(name: str) -> list[Path]:
    """The files of an eval: its own one, or all of its folder."""
    folder = Path(__file__).resolve().parent
    return [file for file in (folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))) if file.is_file()]


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


def wheels(name: str, kind: str) -> list[str]:
    """The embedded wheels that an eval reads with texts of that kind."""
    return getattr(load(name), "wheels", lambda kind: [])(kind)


def outside(name: str) -> list:
    """What decides an eval's result besides settings and code."""
    return getattr(load(name), "outside", list)()


def declared(name: str, constant: str):
    """The value of a literal module constant (METRICS, CONFIG, EVAL_TYPE_ID) of an eval, or None.

    Read from the source without importing it: `--help` and `runs.compare` need the names, not scikit-learn and torch.
    """
    own = files(name)  # the first is the module itself
    source = own[0].read_text(encoding="utf-8") if own else ""
    if constant not in source:  # parsing takes a hundred times as long as reading
        return None
    node = _constants(source).get(constant)
    return None if node is None else ast.literal_eval(node)  # a fresh value each time: it may be changed


@functools.lru_cache(64)
def _constants(source: str) -> dict[str, ast.expr]:
    """What is assigned to each name at the top level of a module's source."""
    found = [(target, node.value) for node in ast.parse(source).body if isinstance(node, ast.Assign)
             for target in node.targets]
    return {target.id: value for target, value in reversed(found) if isinstance(target, ast.Name)}
