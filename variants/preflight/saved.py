"""Whether what is saved of a variant is all that it needs, to give the same features and to train on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from variants import base
from variants.kit import trainer_state
from variants.kit.copying import duplicate
from variants.preflight.messages import (
    Variant,
    assigned,
    at,
    defined,
    fail,
)
from variants.preflight.trial import STEPS, Plan, as_batch, build, initialised, random_state, reseed, train


@torch.no_grad()
def check_saved(v: Variant, sae: base.SAE, plan: Plan, z_BF: Tensor) -> list[str]:
    """The state dict alone, loaded into a fresh SAE, gives the same features, and the same loss to go on from."""
    reseed(plan.seed + 1)
    fresh = build(v, plan.sizes)
    try:
        fresh.load_state_dict({k: t.clone() for k, t in sorted(sae.state_dict().items())})  # in a file's order
    except RuntimeError as error:
        fail(v, defined(v, "__init__"), f"a saved SAE does not load: {' '.join(str(error).split())[:200]}",
             "create every parameter and buffer in __init__, with its final shape")
    fresh.train(sae.training)
    lost = state_outside(sae, fresh, lambda model: duplicate(model).eval().encode(plan.x_BD))
    if lost:
        fail(v, assigned(v, lost),
             f"a saved and loaded SAE gives other features: {lost} is learned, but it is no parameter or buffer",
             f'use self.register_buffer("{lost.split(".")[-1]}", torch.tensor(…)) and change it in place')

    def loss(model):
        with torch.enable_grad():
            return duplicate(model).loss(as_batch(model, plan.x_BD), plan.points[-1])[0].detach()

    if v.is_trainer:  # check_resumed looks at what it goes on from
        return []
    lost = state_outside(sae, fresh, loss, plan.seed)
    if not lost:
        return []
    return [f"{at(v, assigned(v, lost))}: {lost} changes in training but is no parameter or buffer: an interrupted run "
            "cannot continue exactly"]


def check_resumed(v: Variant, plan: Plan) -> list[str]:
    """A trainer put back from what is saved takes the same next step."""
    with random_state(plan.seed):
        first = initialised(v, plan.sizes, plan)
        steps = train(v, first, plan)
        for _ in range(STEPS // 2):
            next(steps)
        second = initialised(v, plan.sizes, plan)
        try:
            second.load_state_dict({k: t.clone() for k, t in first.state_dict().items()})
            trainer_state.TrainerState(second).load_state_dict(trainer_state.TrainerState(first).state_dict())
            results = []
            for sae in (first, second):
                reseed(plan.seed)
                plan.train_step(sae, None, as_batch(sae, plan.x_BD.clone()), plan.points[STEPS // 2])
                results.append(sae.encode(plan.x_BD))
            if torch.equal(*results):
                return []
            why = "its next step differs"
        except Exception as error:  # noqa: BLE001  whatever a foreign trainer cannot take back
            why = str(error).splitlines()[0][:160]
    return [f"{at(v, defined(v, '__init__'))}: an interrupted run cannot continue exactly ({why}): keep what training "
            "changes as tensors, numbers, lists or dicts on the trainer"]


def state_outside(sae: base.SAE, fresh: base.SAE, compute: Callable, seed: int = 0) -> str | None:
    """Which attribute, lost by saving, `compute(model)` depends on; None if nothing is lost."""
    def result(model):
        with random_state(seed):
            return compute(model)

    wanted = result(sae)
    if torch.equal(wanted, result(fresh)):
        return None
    modules = dict(fresh.named_modules())
    tried = []
    for prefix, module in sae.named_modules():
        plain = {k: value for k, value in vars(module).items() if k not in trainer_state.MODULE_INTERNALS}
        plain.update({k: module._buffers[k] for k in module._non_persistent_buffers_set})
        for name, value in plain.items():
            if prefix not in modules or same(value, getattr(modules[prefix], name, None)):
                continue
            setattr(modules[prefix], name, copy.copy(value))
            tried.append(f"{prefix}.{name}".lstrip("."))
            if torch.equal(wanted, result(fresh)):
                return tried[-1]
    return ", ".join(tried) or "something"


def same(a, b) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001  whatever cannot be compared counts as different
        return False
