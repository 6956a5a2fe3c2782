"""Whether a variant does anything else than those already there: by its code and, bit for bit, by its training.

Shapes: B tokens, D = d_in, F = number of features.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import variants
from variants import base
from variants.kit import trainers
from variants.kit.copying import duplicate
from variants.kit.hyper import hyperparameters
from variants.preflight.learning import ablated
from variants.preflight.messages import (
    Variant,
    fail,
)
from variants.preflight.trial import STEPS, Plan, imported, initialised, random_state, reseed, train


def check_identical(v: Variant, plan: Plan, files: Iterable, allowed: bool, against: str = "") -> list[str]:
    """The variant's change has an effect: it does not train bit for bit like a reference, or like `against`."""
    notes, seen, mine = [], set(), None
    asked = variants.path(against) if against else None
    alike = []
    unmodified = False  # then others that train alike are copies of it, and no reason to refuse it
    for file in [*([asked] if asked else []), *map(Path, files)]:
        try:
            other = like(v, imported(str(file)), plan)
        except Exception as error:  # noqa: BLE001  another's mistake proves nothing, unless it was asked for
            if file == asked:
                raise ValueError(f"--against {against}: {error}") from error
            continue
        known_as = file.stem if file.stem != "variant" else file.parent.name
        if code(other.tree) in seen:
            continue
        seen.add(code(other.tree))
        if code(other.tree) == code(v.tree):
            defaults = hyperparameters(other.module) | (ran_with(file) if file == asked else {})
            edited = [f"{k}={value}" for k, value in v.hyper.items() if defaults.get(k, value) != value]
            if file == asked and not edited and not allowed:
                fail(v, None, f"this is the unmodified {known_as}, from which it must differ (--against)",
                     "change what it computes or a hyper-parameter; --allow_identical runs it all the same")
            notes.append(f"this is {known_as} with {', '.join(edited)}" if edited
                         else f"this is the unmodified {known_as}")
            unmodified = True
            continue
        mine = mine or list(trajectory(v, plan))
        apart = distance(mine, other, plan, to_the_end=file == asked)
        if apart == 0:
            alike.append((other, known_as))
            continue
        if file == asked:
            how = "cannot be compared in its features" if apart is None else f"differ by {apart:.2g} of their size"
            notes.append(f"trains differently from {known_as}: after {STEPS} steps on synthetic data the "
                         f"reconstructions {how}")
    for other, known_as in alike:
        if other.file == asked or not unmodified:
            notes += check_effect(v, other, known_as, allowed)
    return notes


def check_effect(v: Variant, other: Variant, known_as: str, allowed: bool) -> list[str]:
    """What is to be said of a variant that trains bit for bit like another."""
    what = f"this variant trains bit-identically to {known_as}: its change has no effect"
    zeros, groups_here, groups_there = ablated(v), groups(v), groups(other)
    # an ablation may leave the variant it came from; groups act in evals, not in training
    if allowed or zeros or groups_here:
        ablation = f" (with {', '.join(zeros)})" if zeros else ""
        return [f"{what} on training{ablation}"]
    if groups_there:
        return []
    lines = changed_lines(v.tree, other.tree)
    shown = ", ".join(map(str, lines[:6])) + (", …" if len(lines) > 6 else "")
    if lines:
        what += f" (it differs in {'lines' if len(lines) > 1 else 'line'} {shown})"
    fail(v, lines[0] if lines else None, what,
         "make sure the new code is called and its result used; --allow_identical runs it all the same")


def references(name: str) -> list[Path]:
    """Variants that this one must not equal: the others here, and those stored with the baselines as they ran."""
    others = [file for file in map(variants.path, variants.names()) if file.resolve() != variants.path(name).resolve()]
    return others + sorted(Path(__file__).parents[2].glob("runs/baseline/*/*/variant.py"))


def ran_with(file: Path) -> dict[str, object]:
    """The hyper-parameters that a run had, given the variant.py in its folder; {} where it had several, or none yet."""
    record, found = file.with_name("final_info.json"), []
    if file.name == "variant.py" and record.is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):  # no such record: nothing is known
            sections = json.loads(record.read_text(encoding="utf-8"))
            found = [section["config"]["hyper"] or {} for section in sections.values()]
    return found[0] if found and all(hyper == found[0] for hyper in found) else {}


def code(tree: ast.Module) -> str:
    """What a module computes: without comments, docstrings and the hyper-parameters' default values."""
    tree = copy.deepcopy(imported_part(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            node.args.defaults = [ast.Constant(0)] * len(node.args.defaults)
            node.args.kw_defaults = [d and ast.Constant(0) for d in node.args.kw_defaults]
    return ast.dump(tree)


def imported_part(tree: ast.Module) -> ast.Module:
    """A module without what runs only where its file is started as a program."""
    def as_program(part: ast.stmt) -> bool:
        return isinstance(part, ast.If) and not part.orelse and ast.unparse(part.test) == "__name__ == '__main__'"

    return ast.Module([part for part in tree.body if not as_program(part)], tree.type_ignores)


def changed_lines(mine: ast.Module, theirs: ast.Module) -> list[int]:
    """Lines of the statements of `mine` that `theirs` lacks; if none, of the functions with other arguments."""
    mine, theirs = imported_part(mine), imported_part(theirs)

    def statements(tree):
        return [(ast.unparse(n), n.lineno) for n in ast.walk(tree) if isinstance(n, ast.stmt)
                and not hasattr(n, "body")]

    def headers(tree):
        return [(f"{n.name}({ast.unparse(n.args)})", n.lineno) for n in ast.walk(tree)
                if isinstance(n, ast.FunctionDef)]

    def new(parts) -> list[int]:
        known = {text for text, _ in parts(theirs)}
        return sorted(line for text, line in parts(mine) if text not in known and not text.startswith(("'", '"')))

    return new(statements) or new(headers)


def groups(v: Variant) -> bool:
    """Whether the variant names groups of features, which act in evals alone."""
    if v.is_trainer:
        return getattr(v.module.SAE.trainer_class, "feature_groups", None) is not None
    return v.module.SAE.feature_groups is not base.SAE.feature_groups


def like(v: Variant, other: Variant, plan: Plan) -> Variant:
    """Another variant with this one's hyper-parameters and schedules, if it knows them. ValueError if one is open."""
    mine = v.hyper
    if v.is_trainer:  # as it is constructed: a schedule is cut to the run in both or in neither
        mine = v.hyper | trainers.keywords(v.module.SAE.trainer_class, plan.sizes.D, plan.sizes.F, v.setting, v.given)
    known = hyperparameters(other.module)
    shared = {key: mine[key] for key in known if key in mine}
    missing = [key for key, value in (known | shared).items()
               if value is inspect.Parameter.empty and key not in trainers.SHRUNK]
    if missing:
        raise ValueError(f"its hyper-parameter {missing[0]!r} has no value")
    return Variant(other.module, other.file, other.tree, shared, known | shared, v.setting)


@dataclass(frozen=True)
class Moment:
    """What a variant is after a step: its parameters, and on held-out data its features and reconstruction."""

    parameters: dict[str, Tensor]
    z_BF: Tensor
    x_hat_BD: Tensor


def trajectory(v: Variant, plan: Plan):
    """Yield the variant after each of the plan's steps, all random numbers of a step being those of its number."""
    with random_state(plan.seed):
        sae = initialised(v, plan.sizes, plan)
        for i, _ in enumerate(train(v, sae, plan)):
            probe = duplicate(sae).eval()
            with torch.no_grad(), random_state(plan.seed):
                z_BF = probe.encode(plan.x_BD)
                yield Moment(dict(probe.named_parameters()), z_BF, probe.decode(z_BF))
            reseed(plan.seed + 1 + i)


def distance(mine: list[Moment], other: Variant, plan: Plan, to_the_end: bool = False) -> float | None:
    """0.0 where the other's features, reconstructions and shared parameters are mine to the last bit after every step.

    Else ‖x_hat − theirs‖/‖x_hat‖ after the step at which they part, or the last one; None where the other cannot run
    here.
    """
    apart = 0.0
    try:
        for moment, theirs in zip(mine, trajectory(other, plan)):
            shared = moment.parameters.keys() & theirs.parameters.keys()
            alike = (torch.equal(moment.z_BF, theirs.z_BF) and torch.equal(moment.x_hat_BD, theirs.x_hat_BD)
                     and all(torch.equal(moment.parameters[name], theirs.parameters[name]) for name in shared))
            gap = float((moment.x_hat_BD - theirs.x_hat_BD).norm() / moment.x_hat_BD.norm().clamp_min(1e-30))
            apart = 0.0 if alike else max(gap, 1e-12)
            if apart and not to_the_end:
                break
    except Exception:  # noqa: BLE001  a reference that cannot run here is not what this variant does
        return None
    return apart
