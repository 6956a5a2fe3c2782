"""A trainer's class: how it is found in a file, what the user may set of it, and what it is constructed with."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

from variants import base
from variants.kit import compat

# what the runner gives, under the names in use
SUPPLIED = {
    "d_in": ("activation_dim", "d_in", "input_dim", "d_model", "act_size", "n_inputs"),
    "d_sae": ("dict_size", "d_sae", "n_features", "hidden_dim", "n_latents", "num_latents", "latent_dim", "d_hidden",
              "num_features"),
    "steps": ("steps", "total_steps", "num_steps"), "lr": ("lr", "learning_rate"), "seed": ("seed",),
    "device": ("device",),
    "layer": ("layer", "hook_layer"), "lm_name": ("lm_name", "model_name"), "hook_name": ("hook_name",),
    "submodule_name": ("submodule_name",), "wandb_name": ("wandb_name", "run_name"),
}
# for an SAE that is only to be read back
SETTING = dict(steps=10_000, lr=None, seed=0, device="cpu", layer=0, lm_name="")
ONLY_IF_NEEDED = {"wandb_name", "submodule_name"}
# lengths in steps that suit long runs: (usual length, most as a share of the run)
SHRUNK = {"warmup_steps": (1000, 0.05), "sparsity_warmup_steps": (5000, 0.1), "threshold_start_step": (1000, 0.05),
          "decay_start": (None, 0.8), "anneal_start": (15_000, 0.5)}


def lent(tree: ast.Module) -> dict:
    """Names of compat that a file with a trainer uses; what it imports or defines itself replaces them later."""
    classes = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef)]
    if not any(c.name == "Trainer" or any(isinstance(f, ast.FunctionDef) and f.name == "update" for f in c.body)
               for c in classes):
        return {}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name: getattr(compat, name) for name in compat.__all__ if name in used}


def trainer_of(module: ModuleType, tree: ast.Module) -> type | None:
    """The trainer class of a module, or None; AttributeError if it has several and none is called Trainer."""
    file = Path(module.__file__).name
    if inspect.isclass(getattr(module, "Trainer", None)):
        if not callable(getattr(module.Trainer, "update", None)):
            methods = [n for n, f in vars(module.Trainer).items() if callable(f) and n[0] != "_"]
            raise AttributeError(f"the class Trainer in {file} has no method update; it has "
                                 f"{', '.join(methods) or 'none'}\nwrite def update(self, step, activations): one "
                                 "training step on activations [B, d_in]")
        return module.Trainer
    having = [c for c in vars(module).values() if inspect.isclass(c) and callable(getattr(c, "update", None))
              and not issubclass(c, (dict, set))]
    own = [c for c in having if c.__module__ == module.__name__] or having
    found = list(dict.fromkeys(c for c in own if not any(other is not c and issubclass(other, c) for other in own)))
    definitions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for is_trainer in (_derives_from_trainer, lambda c: _has_ae(c, definitions)):  # a helper may have an update, too
        if len(found) > 1:
            found = [c for c in found if is_trainer(c)] or found
    if len(found) > 1:
        places = [f"{c.__name__} in line {definitions[c.__name__].lineno}" if c.__name__ in definitions else c.__name__
                  for c in found]
        raise AttributeError(f"{file} defines {len(found)} classes with an update method ({', '.join(places)})\n"
                             f"call the one to run Trainer, or add a line: Trainer = {found[-1].__name__}")
    return found[0] if found else None


def _derives_from_trainer(c: type) -> bool:
    return any(ancestor.__name__ == "SAETrainer" for ancestor in c.__mro__[1:])


def _has_ae(c: type, definitions: dict[str, ast.ClassDef]) -> bool:
    """Whether the class, or one that it derives from, has an `ae`: as a member, or assigned to self in a method."""
    methods = [definitions[ancestor.__name__] for ancestor in c.__mro__ if ancestor.__name__ in definitions]
    stored = (node for method in methods for node in ast.walk(method) if isinstance(node, ast.Attribute))
    return hasattr(c, "ae") or any(node.attr == "ae" and isinstance(node.ctx, ast.Store) for node in stored)


def parameters_of(trainer_class: type) -> dict[str, inspect.Parameter]:
    """The named parameters of the trainer's __init__."""
    return {n: p for n, p in inspect.signature(trainer_class).parameters.items()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def hyperparameters(trainer_class: type) -> dict[str, object]:
    """Names and defaults of what the user may set with --hyper; inspect.Parameter.empty where there is no default."""
    given = {alias for aliases in SUPPLIED.values() for alias in aliases}
    plain = (bool, int, float, str, type(None), list, tuple, dict)
    return {n: p.default for n, p in parameters_of(trainer_class).items()
            if n not in given and (p.default is p.empty or isinstance(p.default, plain))}


def keywords(trainer_class: type, d_in: int, d_sae: int, setting: dict, hyper: dict) -> dict:
    """What the trainer is constructed with; TypeError names what it needs and nobody gives."""
    values = dict(d_in=d_in, d_sae=d_sae, hook_name=f"blocks.{setting['layer']}.hook_resid_post",
                  wandb_name=trainer_class.__name__, submodule_name=f"resid_post_layer_{setting['layer']}", **setting)
    accepted, given, missing = parameters_of(trainer_class), {}, []
    length = setting.get("schedule", setting["steps"])  # the preflight's few steps see schedules at their end
    for name, parameter in accepted.items():
        key = next((key for key, aliases in SUPPLIED.items() if name in aliases), None)
        needed = parameter.default is parameter.empty
        if name in hyper:
            given[name] = hyper[name]
        elif key == "lr":  # the trainer's own unless the user or the profile sets one
            if values["lr"] is not None or needed:
                given[name] = values["lr"] or base.SAE.default_lr
        elif key and (needed or key not in ONLY_IF_NEEDED):
            given[name] = values[key]
        elif name in SHRUNK:
            usual, share = SHRUNK[name]
            wanted = usual if needed or parameter.default is None else parameter.default
            if wanted is None or (isinstance(wanted, int) and wanted > share * length):
                given[name] = max(1, int(share * length))  # many divide by it
        elif needed:
            missing.append(name)
    if missing:
        raise TypeError(f"{trainer_class.__name__} needs {', '.join(missing)}, which nobody gives\n"
                        f"--hyper {','.join(f'{m}=…' for m in missing)}, or write a default")
    return given
