"""The trial of a variant: reading its file, building it at small sizes, and training it on synthetic data.

Measuring is done on copies and under a random state that is given back, so looking changes nothing.

Shapes: B tokens, D = d_in, F = number of features, all small and all different; S training steps, A directions of the
data, N any number of rows, P parameters and T loss terms in all.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import variants
from variants import base
from variants.kit import contexts, trainers
from variants.kit.hyper import hyperparameters
from variants.preflight.memory import Sizes
from variants.preflight.messages import (
    SECONDS,
    TooSlow,
    Variant,
    attempting,
    defined,
    explained,
    fail,
    limited,
)

STEPS = 24  # training steps, spread over the whole run so that schedules and curricula are seen
# integers that are no widths
DURATION = re.compile("step|warm|every|interval|period|freq|seed|token|epoch|refresh|window")
COUNTER = re.compile("since|dead|inactive|silent")  # buffers that tell how long a feature has been silent


@dataclass(frozen=True)
class Plan:
    """The steps every variant is put through: data, progress and the training loop's own functions."""

    sizes: Sizes
    x_SBD: Tensor  # a batch per step
    x_BD: Tensor  # held out, to measure on
    points: list[base.Progress]
    train_step: Callable
    make_optimizer: Callable
    seed: int
    learning_rate: float = 3e-3  # Adam's, for problems this small
    # steps before which features are marked as dead: early, in the middle, the very last
    dead_at: tuple[int, ...] = (7, 15, 23)


# ------------------------------------------------------------------------------------------------ reading and building


def read(name: str, hyper: dict) -> Variant:
    """Import the variant's file and check the hyper-parameters: each has a value, each has a known name."""
    v = imported(name)
    known = hyperparameters(v.module)
    for key in hyper:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)
            nearest = f"; the nearest is {near[0]!r}" if near else ""
            fail(v, defined(v, "__init__"), f"there is no hyper-parameter {key!r}{nearest}",
                 f"use one of: {', '.join(f'{k}={d}' for k, d in known.items()) or 'none'}")
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in hyper and not (v.is_trainer and key in trainers.SHRUNK):
            fail(v, defined(v, "__init__"), f"the hyper-parameter {key!r} has no default and is not given",
                 f"--hyper {key}=…, or write {key}=… in def __init__")
    return Variant(v.module, v.file, v.tree, dict(hyper), {**known, **hyper})


def imported(name: str) -> Variant:
    """The variant by its name or path, its file parsed and imported; what is wrong with it is told with its line."""
    file = variants.path(name)
    try:
        tree = variants.parsed(file)
        with limited(2 * SECONDS, "when it is imported"):
            module = variants.load(name)
    except (Exception, SystemExit, TooSlow) as error:
        raise explained(error, file, "when it is imported") from error
    v = Variant(module, file, tree, {}, {})
    arguments = list(inspect.signature(module.SAE.__init__).parameters.values())[:3]
    by_place = [p for p in arguments if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not v.is_trainer and len(by_place) < 3:
        fail(v, defined(v, "__init__"),
             f"__init__{inspect.signature(module.SAE.__init__)} does not take the two widths",
             "write def __init__(self, d_in, d_sae, …), with hyper-parameters as keyword arguments behind them")
    return v


def smallest(v: Variant, d_sae: int) -> tuple[base.SAE, Sizes]:
    """An SAE at small sizes, none equal to or a multiple of another, wide enough for what counts features."""
    counts = [n for key, value in v.hyper.items() if not DURATION.search(key)
              for n in (value if isinstance(value, (tuple, list)) else [value]) if type(n) is int and n < d_sae]
    last = None
    for width in dict.fromkeys((min(d_sae, 160 * -(-4 * max([40, *counts]) // 160)), d_sae)):
        sizes = next(Sizes(B, D, width) for B, D in itertools.product((56, 72, 88), (24, 20, 26, 38)) if width % B
                     and width % D and B % D)
        try:
            return build(v, sizes), sizes
        except Exception as error:  # noqa: BLE001  perhaps group sizes that add up to the real d_sae: try that
            last = error
    raise last


def build(v: Variant, sizes: Sizes) -> base.SAE:
    what = f"constructing {'the trainer' if v.is_trainer else 'SAE'}({sizes.D}, {sizes.F})"
    with attempting(v, what, sizes, defined(v, "__init__") if v.is_trainer else None):
        return variants.build(v.module, sizes.D, sizes.F, v.given if v.is_trainer else v.hyper, v.setting)


def initialised(v: Variant, sizes: Sizes, plan: Plan) -> base.SAE:
    """A fresh SAE as it is when training starts; the same one for the same seed."""
    reseed(plan.seed)
    sae = build(v, sizes)
    with attempting(v, "in initialise", sizes):
        sae.initialise(plan.x_SBD[0])
    return sae.train()


def make_plan(sizes: Sizes, batch_size: int, total_steps: int, seed: int, train_step, make_optimizer) -> Plan:
    """Synthetic batches and points of the real run, from its first step to its last."""
    total_steps = max(total_steps, STEPS)  # a run of one step would show no schedule
    # every second point is a round number, where things done "every 500 steps" happen
    grid = max((g for g in (1000, 500, 100, 50, 10) if g * STEPS <= total_steps), default=1)
    steps = [i * (total_steps - 1) // (STEPS - 1) for i in range(STEPS)]
    steps = [s - s % grid if i % 2 == 0 else s for i, s in enumerate(steps)]
    points = [base.Progress(s, total_steps, s * batch_size, total_steps * batch_size) for s in steps]
    x_SBD = synthetic((STEPS + 1) * sizes.B, sizes.D, seed).reshape(STEPS + 1, sizes.B, sizes.D)
    return Plan(sizes, x_SBD[:STEPS], x_SBD[STEPS], points, train_step, make_optimizer, seed)


def synthetic(n: int, d_in: int, seed: int) -> Tensor:
    """Activations [n, d_in] with E‖x‖² = 1: few of 3·d_in random directions at a time, a mean, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions_AD = torch.nn.functional.normalize(torch.randn(3 * d_in, d_in, generator=generator), dim=1)
    size_NA = torch.rand(n, 3 * d_in, generator=generator)
    on_NA = torch.rand(n, 3 * d_in, generator=generator) < 4 / (3 * d_in)
    x_ND = (size_NA * on_NA) @ directions_AD + 0.5 * directions_AD[0] + 0.02 * torch.randn(n, d_in, generator=generator)
    return x_ND / x_ND.pow(2).sum(1).mean().sqrt()


def reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generator too
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def random_state(seed: int | None = None):
    """Give the generators of torch (CPU), Python and NumPy their state back afterwards; with a seed, seed them."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        if seed is not None:
            reseed(seed)
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


@contextmanager
def one_thread():
    """Tensors this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ training steps


def train(v: Variant, sae: base.SAE, plan: Plan, before: Callable | None = None) -> Iterator[float]:
    """Take the plan's steps and yield each loss; `before(sae, batch, progress)` looks at the model first."""
    with attempting(v, "in parameter_groups", plan.sizes, defined(v, "parameter_groups")):
        optimizer = plan.make_optimizer(sae, plan.learning_rate)
    for i, (x_BD, progress) in enumerate(zip(plan.x_SBD, plan.points)):
        if i in plan.dead_at:
            pretend_dead(sae)
        batch = as_batch(sae, x_BD, plan.seed)
        if before:
            with random_state():
                before(sae, batch, progress)
        with attempting(v, f"in training step {i + 1}, at {progress.fraction:.0%} of the run", plan.sizes,
                        defined(v, "loss")):
            loss, _ = plan.train_step(sae, optimizer, batch, progress, plan.learning_rate)
        yield loss.item()


def as_batch(sae: base.SAE, x_BD: Tensor, seed: int = 0) -> base.Batch:
    """Synthetic activations as the batch that the variant declared it needs: with contexts and attention made up."""
    if not (sae.needs_contexts or sae.attention_layers):
        return base.Batch(x=x_BD)
    return base.Batch(**contexts.synthetic(x_BD, sae.attention_layers, sae.attention_threshold, seed))


def pretend_dead(sae: base.SAE) -> None:
    """Mark a third of the features as silent for longer than any threshold, in base.SAE's and own counters."""
    for name, buffer in sae.named_buffers():
        if COUNTER.search(name) and buffer.ndim == 1 and len(buffer) > 2:
            buffer[: len(buffer) // 3] = {torch.bool: True, torch.int32: 2**30}.get(buffer.dtype, 2**40)
