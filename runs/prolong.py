"""A run that goes on from a shorter one of the same settings and code; and what a failed run has yet to do.

A longer run's schedule equals a shorter one's only as long as nothing in it is a share of the length: warm-ups and the
age of dead features are absolute from LEAST_STEPS and LEAST_TOKENS on, and the learning rate falls in the last fifth.
So a run that long keeps its last checkpoint from before that, and is prolonged from there if its variant asks
base.Progress for nothing else, which is read from the variant's source: what cannot be judged counts as not allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

import variants
from evals.common import settings as eval_settings
from evals.common import stored
from runs import checkpoint, disk, snapshots
from runs.plan import steps_of
from runs.voice import say
from variants.base import SAE, Progress
from variants.kit import imperative, ranks, revival, topk
from variants.kit.files import size

LEAST_STEPS = 50_000  # Progress.sparsity_warmup, the longest warm-up, is 5,000 steps or a tenth of the run
LEAST_TOKENS = 100_000_000  # SAE.dead_features: 10 M tokens or a tenth of the run
HOOKS = dict(loss=2, after_step=2, revive=3, lr_scale=1, dead_features=1, look=1)  # place of progress, self being 0
ABSOLUTE = ("step", "tokens")  # of Progress: no share of the run
RELATIVE = ("fraction", "total_steps", "total_tokens")
NUMBERS = ("lr_factor", "sparsity_warmup", "warmup")  # compared at each step under both lengths
PLAIN_DECORATORS = ("torch.no_grad()", "torch.no_grad", "torch.inference_mode()", "staticmethod", "outside_graphs")
TRIED_WIDTH = 16  # d_in of an SAE that is only made to read its attributes

# ------------------------------------------------------------------------------------------------ while a run trains


def keep_until(settings, jobs: list, plan: list[int], out: Path) -> int:
    """The last step whose checkpoint is to be kept for prolonging; 0 where there is none, or no room. It is said.

    `plan`: the tokens of each block. Every 1,000th part of the steps is compared with a run twice as long.
    """
    if ranks.number() or obstacle_of_length(settings, plan):
        return 0
    total = sum(steps_of(settings, plan))
    whole = [tokens for tokens in plan if tokens == settings.block_tokens]
    last = min(_before_decay(total), sum(steps_of(settings, whole)))
    kept_bytes = 3 * sum(p.numel() * p.element_size() for job in jobs for p in job.sae.parameters())
    free = disk.room(out)[1]
    try:
        asked = {words: ask for job in jobs for words, ask in asked_of(job.sae).items()}
    except Exception:  # noqa: BLE001  it could not be prolonged, or nobody can tell
        return 0
    some = [*range(0, last, max(1, last // 1000)), last - 1]
    if last < 1 or differing(asked, total, 2 * total, some, settings.batch_size):
        return 0
    if free is None or 10 * kept_bytes > free:
        say(f"no checkpoint is kept for prolonging this run: {size(kept_bytes)} are more than a tenth of what is free")
        return 0
    say(f"{checkpoint.KEPT} ({size(kept_bytes)}) is kept up to step {last:,}: from there this run can be prolonged "
        "with more --num_tokens")
    return last


# ------------------------------------------------------------------------------------------------ when more is asked


def found(settings, out: Path, before: dict, mark: Callable, plan_of: Callable, hypers_of: Callable) -> str:
    """The name of the checkpoint in `out` with which the longer run of `settings` goes on, or ""; it is said why not.

    `before`: run_info.json of the run there. Of other settings: `mark` gives the hash that decides a training,
    `plan_of` the tokens of each block. `hypers_of(settings, module)`: hyper-parameters of each SAE of a layer.
    """
    had = before.get("settings", {}).get("num_tokens")
    if not isinstance(had, int) or not 0 < had < settings.num_tokens:
        return ""
    shorter = dataclasses.replace(settings, num_tokens=had)
    try:
        if mark(shorter) != before.get("training_fingerprint"):
            return ""  # not the same run
        name, why = _chosen(settings, shorter, out, plan_of, hypers_of)
    except Exception as error:  # noqa: BLE001  what cannot be judged is trained from the start
        name, why = "", f"it cannot be judged: {type(error).__name__}: {str(error).splitlines()[:1]}"
    if not name:
        print(f"{settings.out_dir} is not prolonged from {had:,} to {settings.num_tokens:,} tokens but trained anew: "
              f"{why}", flush=True)
    return name


def _chosen(settings, shorter, out: Path, plan_of: Callable, hypers_of: Callable) -> tuple[str, str]:
    """(name of the checkpoint, "") or ("", why there is none)."""
    plan, longer = plan_of(shorter), plan_of(settings)
    why = obstacle_of_length(shorter, plan)
    if why:
        return "", why
    module = variants.load(settings.variant)
    asked = {}
    with torch.random.fork_rng([]):
        for hyper in hypers_of(settings, module).values():
            sae = variants.build(module, TRIED_WIDTH, settings.d_sae, hyper)
            try:
                asked |= asked_of(sae)
            except ValueError as error:
                return "", str(error)
    total, new_total = sum(steps_of(settings, plan)), sum(steps_of(settings, longer))
    last = _before_decay(total)
    name, step, why = _latest(out, last)
    why = why or f"it holds no checkpoint from before its learning rate fell, after step {last:,} of {total:,}"
    if not name:
        return "", why
    why = obstacle_of_data(settings, plan, longer, step)
    words = differing(asked, total, new_total, range(step), settings.batch_size)
    if words:
        why = f"{words} is another one in the longer run, before step {step:,}"
    return (name, "") if not why else ("", why)


def _latest(out: Path, last: int) -> tuple[str, int, str]:
    """(name, step, "") of the sound checkpoint that is furthest, up to step `last`; or ("", 0, what is wrong)."""
    there = {name: checkpoint.glance(out / name) for name in checkpoint.NAMES if (out / name).exists()}
    steps = {name: found[0] if found else 0 for name, found in there.items()}
    why = ""
    for name, step in sorted(steps.items(), key=lambda item: -item[1]):
        if step > last or (there[name] and step == 0):
            continue
        wrong = checkpoint.damage(out / name)
        if not wrong:
            return name, step, ""
        why = f"its {name} cannot be used ({wrong})"
    return "", 0, why


def obstacle_of_length(settings, plan: list[int]) -> str:
    """Why a run's length alone forbids it to be prolonged, or ""."""
    total = sum(steps_of(settings, plan))
    if settings.minutes:
        return "--minutes sets its length"
    if total < LEAST_STEPS or total * settings.batch_size < LEAST_TOKENS:
        return (f"in a run of {total:,} steps warm-ups are shares of its length; they are absolute from "
                f"{LEAST_STEPS:,} steps and {LEAST_TOKENS:,} tokens on")
    return ""


def obstacle_of_data(settings, plan: list[int], longer: list[int], step: int) -> str:
    """What before `step` would have been other data or other measurements under the longer plan, or ""."""
    begins = itertools.accumulate([0, *steps_of(settings, plan)[:-1]])
    for b, begin in enumerate(begins):
        if begin < step and plan[b] != longer[b]:
            return f"its block {b + 1} was cut to {plan[b]:,} tokens and would have {longer[b]:,}"
    total = sum(steps_of(settings, longer))
    measured = [at for at in sorted(snapshots.steps(total, settings.snapshots)) if at < step]
    if measured:
        return f"--snapshots asks for a measurement after step {measured[0]:,}, which is past"
    every = max(1, total // settings.log_lines)
    if (total - 1) // every * every < step:
        return f"with --log_lines={settings.log_lines} its log's last row is a mean that begins before step {step:,}"
    return ""


def _before_decay(total: int) -> int:
    """The number of steps whose learning rate would have been the same in a run twice as long."""
    def factor(step: int, steps: int) -> float:
        return Progress(step, steps, 0, 0).lr_factor()

    done = total
    while done and factor(done - 1, total) != factor(done - 1, 2 * total):
        done -= 1
    return done


def differing(asked: dict[str, Callable], total: int, longer: int, steps: Iterable[int], batch_size: int) -> str:
    """The words of the first thing asked of Progress that is not the same in runs of `total` and `longer` steps."""
    for step in steps:
        one, other = (Progress(step, n, step * batch_size, n * batch_size) for n in (total, longer))
        for words, ask in asked.items():
            if ask(one) != ask(other):
                return words
    return ""


# ------------------------------------------------------------------------------------------------ what a variant asks


def asked_of(sae: nn.Module) -> dict[str, Callable[[Progress], object]]:
    """What an SAE's training asks of Progress, by its words, to be compared step by step.

    ValueError where it asks for a share of the run, with the line, or where that cannot be judged.
    """
    if isinstance(sae, imperative.Imperative):
        raise ValueError(f"{sae.trainer_class.__name__} is a trainer, which is told the number of steps at its start")
    asked = {"the learning rate": lambda progress: progress.lr_factor(),
             "the penalty's warm-up": lambda progress: progress.sparsity_warmup()}
    for hook, place in HOOKS.items():
        owner = next(cls for cls in type(sae).__mro__ if hook in vars(cls))
        if hook in vars(sae):
            raise ValueError(f"its {hook} is made anew for each SAE, which cannot be judged")
        _read(sae, owner, vars(owner)[hook], place, asked, set())
    return asked


def _read(sae: nn.Module, owner: type | None, function, place: int | str, asked: dict, seen: set) -> None:
    """Add to `asked` what a function asks of its argument `place`, a number or a name. ValueError as `asked_of`."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType):
        raise ValueError(f"{getattr(function, '__name__', function)} is given progress, which cannot be judged")
    if (function, place) in seen:
        return
    seen.add((function, place))
    if function is SAE.dead_features:
        asked["the age of dead features"] = _dead_age
        return
    tree, file = _tree(function)
    name = _parameter(tree, place, file)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    for node in sorted(named, key=lambda node: (node.lineno, node.col_offset)):
        where = f"{file}:{node.lineno}"
        if node.id in ("locals", "eval", "exec") or (node.id == name and not isinstance(node.ctx, ast.Load)):
            raise ValueError(f"{where} cannot be judged: {ast.unparse(parents[node])[:80]}")
        if node.id == name:
            _use(sae, owner, function, tree, node, parents, where, asked, seen)


def _use(sae, owner, function, tree, node: ast.Name, parents: dict, where: str, asked: dict, seen: set) -> None:
    """One use of progress."""
    above = parents[node]
    call = parents.get(above)
    if isinstance(above, ast.Attribute) and above.attr in ABSOLUTE:
        return
    if isinstance(above, ast.Attribute) and above.attr in RELATIVE:
        raise ValueError(f"{where} asks for progress.{above.attr}, which another length changes")
    if isinstance(above, ast.Attribute) and above.attr in NUMBERS and isinstance(call, ast.Call) and call.func is above:
        given = _literals(call.args, where)
        words = [word.arg for word in call.keywords]
        named = dict(zip(words, _literals([word.value for word in call.keywords], where)))
        asked[f"{where}: {ast.unparse(call)}"] = lambda progress: getattr(progress, above.attr)(*given, **named)
        return
    if isinstance(above, ast.Call) and node in above.args:
        call, place = above, above.args.index(node)
        starred = any(isinstance(part, ast.Starred) for part in call.args[:place])
    elif isinstance(above, ast.keyword) and above.arg:
        place, starred = above.arg, False
    else:
        raise ValueError(f"{where} cannot be judged: {ast.unparse(above)[:80]}")
    called = None if starred else _called(sae, owner, function, tree, call.func)
    if called is None:
        raise ValueError(f"{where} cannot be judged: {ast.unparse(call)[:80]}")
    theirs, other, bound = called
    if not _known(sae, other, call, where, asked):
        _read(sae, theirs, other, place + bound if isinstance(place, int) else place, asked, seen)


def _called(sae, owner, function, tree, func: ast.expr) -> tuple[type | None, object, int] | None:
    """(the class where it is defined, what is called, 1 for a method and 0 for a function), or None for who knows."""
    mro = type(sae).__mro__
    if isinstance(func, ast.Attribute) and owner is not None:
        mine = tree.args.args[0].arg if tree.args.args else ""
        if ast.unparse(func.value) == "super()":
            return _defined(mro[mro.index(owner) + 1:], func.attr)
        if ast.unparse(func.value) == mine:
            hidden = func.attr in vars(sae) or func.attr in sae._modules
            return None if hidden else _defined(mro, func.attr)
    words = ast.unparse(func).split(".")
    local = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    local |= {part.arg for part in ast.walk(tree) if isinstance(part, ast.arg)}
    local |= {part.name for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and part is not tree}
    value = None if words[0] in local else function.__globals__.get(words[0])
    for word in words[1:]:
        value = getattr(value, word, None)
    return None if value is None else (None, value, 0)


def _defined(classes: tuple[type, ...], name: str) -> tuple[type, object, int] | None:
    owner = next((cls for cls in classes if name in vars(cls)), None)
    if owner is None:
        return None
    return owner, vars(owner)[name], int(not isinstance(vars(owner)[name], staticmethod))


def _known(sae, function, call: ast.Call, where: str, asked: dict) -> bool:
    """Whether it is one of the kit's that depend on the length, if not on that alone; what is asked of it is noted."""
    if function is topk.k_now:
        if getattr(sae, "k_start", None) != 0:
            raise ValueError(f"{where}: with k_start = {getattr(sae, 'k_start', None)} k falls over a share of the run")
        return True
    if function is revival.resample:
        every = next((ast.unparse(word.value) for word in call.keywords if word.arg == "every"), "")
        every = ast.unparse(call.args[4]) if len(call.args) > 4 else every
        value = getattr(sae, every.partition(".")[2], every)
        if value not in (0, "0"):
            raise ValueError(f"{where}: with resample_steps = {value} features begin anew at shares of the run")
        return True
    if function is topk.update_theta:
        asked["the beginning of theta"] = _theta_begins
        asked["theta's decay"] = topk.theta_decay
        return True
    if function is topk.theta_decay:
        given = _literals([*call.args[1:], *(word.value for word in call.keywords if word.arg == "steps")], where)
        asked[f"{where}: {ast.unparse(call)}"] = lambda progress: topk.theta_decay(progress, *given)
        return True
    return False


def _literals(parts: list[ast.expr], where: str) -> list:
    """The values of expressions; ValueError where one is no literal."""
    try:
        return [ast.literal_eval(part) for part in parts]
    except ValueError:
        raise ValueError(f"{where} cannot be judged: {', '.join(map(ast.unparse, parts))[:80]}") from None


def _tree(function: types.FunctionType) -> tuple[ast.FunctionDef, str]:
    """A function's syntax, as it ran, and the label of its file; ValueError where that is not to be had."""
    file = Path(function.__code__.co_filename)
    parts = ast.walk(variants.parsed(file)) if file.is_file() else ()
    for part in parts:
        if isinstance(part, ast.FunctionDef) and part.name == function.__name__:
            decorators = [ast.unparse(decorator) for decorator in part.decorator_list]
            first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
            if first == function.__code__.co_firstlineno and set(decorators) <= set(PLAIN_DECORATORS):
                return part, variants.label(file.resolve())
    raise ValueError(f"{file.name}:{function.__code__.co_firstlineno}: {function.__name__} cannot be judged")


def _parameter(tree: ast.FunctionDef, place: int | str, file: str) -> str:
    """The name of a function's parameter, by its number or by its name."""
    by_number = [arg.arg for arg in [*tree.args.posonlyargs, *tree.args.args]]
    if isinstance(place, int) and place < len(by_number):
        return by_number[place]
    if place in [*by_number, *(arg.arg for arg in tree.args.kwonlyargs)]:
        return place
    raise ValueError(f"{file}:{tree.lineno}: {tree.name} cannot be judged: which of its arguments is progress?")


class _LookedAt(Exception):
    """What stands for activations was compared with something."""


class _Anything:
    """Stands for counters or activations, to learn a threshold: gives what it is compared with."""

    def __ge__(self, other):
        return other

    def __gt__(self, other):
        raise _LookedAt


SILENT = types.SimpleNamespace(tokens_since_fired=_Anything())


def _dead_age(progress: Progress):
    """Tokens after which a silent feature counts as dead."""
    return SAE.dead_features(SILENT, progress)


def _theta_begins(progress: Progress) -> bool:
    """Whether theta is updated in this step: then it looks at what was kept."""
    try:
        inspect.unwrap(topk.update_theta)(None, _Anything(), progress, decay=0.0)
    except _LookedAt:
        return True
    return False


# ------------------------------------------------------------------------------------------------ what remains


def remaining(out: Path, info: dict) -> list[str]:
    """What a run has yet to do: training from which step, evals without a result, results; [] where nothing was begun.

    `info`: its run_info.json. Of the checkpoint only the step and the names of its SAEs are read. [], too, where none
    of this can be told: it is read while a run fails.
    """
    try:
        return _remaining(out, info)
    except Exception:  # noqa: BLE001  the failure itself must be said
        return []


def _remaining(out: Path, info: dict) -> list[str]:
    state = checkpoint.glance(out / checkpoint.NAME) or checkpoint.glance(out / checkpoint.PREVIOUS)
    if "steps" not in info or (info["phase"] in ("settings", "preflight") and state is None):
        return []
    total, asked = info["steps"], info["settings"]
    step, names = state or (0, _trained(out))
    remains = []
    if step < total:
        remains.append(f"training from step {step:,} of {total:,}")
    lacking = []
    for name in eval_settings.choose(asked["evals"], asked["profile"], asked["eval_config"]):
        measured = step == total and names and all(stored.path(out, name, sae) for sae in names)
        if not measured:
            lacking.append(name)
    if lacking:
        remains.append(f"evals {', '.join(lacking)}")
    return [*remains, "results"]


def told(out: Path, remains: list[str] | None) -> str:
    """What remains as a line, with whether there is something to go on from; "" for nothing."""
    if not remains:
        return ""
    begun = any((out / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS, "eval_results"))
    continues = "; the same command continues" if begun else ""
    return f"remains: {', '.join(remains)}{continues}"


def _trained(out: Path) -> list[str]:
    """Names of the SAEs that were saved at the end of training."""
    return sorted(place.name for place in (out / "sae").glob("[!.]*") if place.is_dir())
