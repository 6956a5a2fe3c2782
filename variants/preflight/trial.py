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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import variants
from variants import base
from variants.kit import contexts, trainers
from variants.kit.copying import duplicate
from variants.kit.hyper import hyperparameters
from variants.preflight import memory
from variants.preflight.memory import Sizes
from variants.preflight.messages import (
    SECONDS,
    TooSlow,
    Variant,
    attempting,
    computed,
    defined,
    described,
    explained,
    fail,
    limited,
    returns,
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
            fail(v, defined(v, "__init__"), f"there is no hyper-parameter {key!r}"
                 + (f"; the nearest is {near[0]!r}" if near else ""), f"use one of: "
                                                                      f"{', '.join(f'{k}={d}' for k, d in known.items()) or 'none'}")
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in hyper and not (v.is_trainer and key in trainers.SHRUNK):
            fail(v, defined(v, "__init__"), f"the hyper-parameter {key!r} has no default and is not given",
                 f"--hyper {key}=…, or write {key}=… in def __init__")
    return Variant(v.module, v.file, v.tree, dict(hyper), {**known, **hyper})


def imported(name: str) -> Variant:
    """The variant by its name or path, its file parsed and imported;
    what is wrong with the file is told with its line.
    """
    file = variants.path(name)
    try:
        tree = variants.parsed(file)
        with limited(2 * SECONDS, "when it is imported"):
            module = variants.load(name)
    except (Exception, SystemExit, TooSlow) as error:
        raise explained(error, file, "when it is imported") from error
    v = Variant(module, file, tree, {}, {})
    arguments = list(inspect.signature(module.SAE.__init__).parameters.values())
    if not v.is_trainer and (len(arguments) < 3 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                                                       for p in arguments[:3])):
        fail(v, defined(v, "__init__"),
             f"__init__{inspect.signature(module.SAE.__init__)} does not take the two widths",
             "write def __init__(self, d_in, d_sae, …), with hyper-parameters as keyword arguments behind them")
    return v


def smallest(v: Variant, d_sae: int) -> tuple[base.SAE, Sizes]:
    """An SAE at small sizes, none equal to or a multiple of another,
    wide enough for the hyper-parameters that count features.
    """
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
    """Give the generators of torch (CPU), Python and NumPy their state back afterwards;
    with a seed, seed them first.
    """
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
    """Mark a third of the features as silent for longer than any threshold,
    in base.SAE's counters and in a variant's own.
    """
    for name, buffer in sae.named_buffers():
        if COUNTER.search(name) and buffer.ndim == 1 and len(buffer) > 2:
            huge = True if buffer.dtype == torch.bool else 2**30 if buffer.dtype == torch.int32 else 2**40
            buffer[: len(buffer) // 3] = huge


class Evidence:
    """What the steps have shown about the parameters and the loss terms."""

    def __init__(self):
        self.trained: set[str] = set()  # parameters with a gradient in some step
        self.differentiable: set[str] = set()  # terms that require a gradient in some step
        self.effective: set[str] = set()  # terms with a gradient that is not 0 in some step
        self.weighted: set[str] = set()  # terms on which the loss depends in some step
        self.unclear: set[str] = set()  # terms the loss may contain in another form
        self.outside: set[str] = set()  # terms that are not in the loss's graph
        self.terms: dict[str, None] = {}


def examine(v: Variant, evidence: Evidence, sae: base.SAE, batch: base.Batch, progress: base.Progress,
            when: str = "") -> None:
    """One loss on a copy: what it returns, whether it is finite, and what depends on what."""
    probe, B_D_F = duplicate(sae), Sizes(*batch.x.shape, sae.d_sae)
    when = when or f"at {progress.fraction:.0%} of the run"
    with attempting(v, f"in loss, {when}", B_D_F, defined(v, "loss")):
        out = probe.loss(batch, progress)
    loss, terms = check_returned(v, out)
    check_counters(v, probe)
    for name, value in {"the loss": loss, **{f"the loss term {n!r}": t for n, t in terms.items()}}.items():
        if not value.isfinite():
            line = not_finite_line(v, duplicate(sae), batch, progress)
            fail(v, line or defined(v, "loss"), f"{name} is {value.item()} {when}",
                 "guard what is undefined there: a logarithm or root of 0, a division by 0, an exponential that "
                 "overflows")
    parameters = {n: p for n, p in probe.named_parameters() if p.requires_grad}

    def gradient(of: Tensor) -> list[Tensor]:
        with attempting(v, "in the backward pass", B_D_F,
                        lambda: backward_line(v, duplicate(sae), batch, progress) or defined(v, "loss")):
            found = torch.autograd.grad(of, list(parameters.values()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values())]

    whole = gradient(loss)
    for name, g in zip(parameters, whole):
        if not g.isfinite().all():
            line = backward_line(v, duplicate(sae), batch, progress)
            fail(v, line or defined(v, "loss"), f"the gradient of {name} is not finite {when}, though the loss is",
                 "a root, a norm or a power below 1 has an infinite slope at 0: add 1e-8 inside, or clamp")
        if g.any():
            evidence.trained.add(name)
    weigh_terms(evidence, loss, terms, torch.cat([g.flatten() for g in whole]).double(), gradient)


def weigh_terms(evidence: Evidence, loss: Tensor, terms: dict[str, Tensor], whole_P: Tensor,
                gradient: Callable) -> None:
    """Which terms depend on parameters, and on which of them the loss depends."""
    evidence.terms.update(dict.fromkeys(terms))
    gradients = {n: torch.cat([g.flatten() for g in gradient(t)]).double() for n, t in terms.items() if t.requires_grad}
    evidence.differentiable |= set(gradients)
    gradients = {n: g_P for n, g_P in gradients.items() if g_P.any()}
    evidence.effective |= set(gradients)
    inside = {n: torch.autograd.grad(loss, terms[n], retain_graph=True, allow_unused=True)[0] for n in gradients}
    evidence.weighted |= {n for n, weight in inside.items() if weight is not None and weight != 0}
    # a copy of the whole loss among the terms would hide what the others contribute
    copies = {n for n, g_P in gradients.items() if inside[n] is None and cosine(g_P, whole_P) > 1 - 1e-9}
    evidence.weighted |= copies
    shares = contributions(whole_P, {n: g_P for n, g_P in gradients.items() if n not in copies})
    for name in (n for n, weight in inside.items() if weight is None and n not in copies):
        if shares is None:
            evidence.unclear.add(name)
        else:
            evidence.outside.add(name)
            evidence.weighted |= {name} if shares[name] > 1e-6 else set()


def cosine(a_P: Tensor, b_P: Tensor) -> float:
    return (a_P @ b_P / (a_P.norm() * b_P.norm()).clamp_min(1e-300)).item()


def contributions(whole_P: Tensor, gradients: dict[str, Tensor]) -> dict[str, float] | None:
    """How much of the loss's gradient each term explains; None where that cannot be told.

    A variant may return `l1` and add `0.1 * z.sum()` to its loss: the term is not in the graph, its gradient still is.
    """
    if not gradients or not whole_P.any():
        return None
    g_PT = torch.stack([g_P / g_P.norm() for g_P in gradients.values()], 1)
    gram_TT, whole_P = g_PT.T @ g_PT, whole_P / whole_P.norm()
    if torch.linalg.eigvalsh(gram_TT)[0] < 1e-4:  # two terms that pull the same way
        return None
    share_T = torch.linalg.solve(gram_TT, g_PT.T @ whole_P)
    if (whole_P - g_PT @ share_T).norm() > 1e-4:  # the loss has parts that are not among the terms
        return None
    return dict(zip(gradients, share_T.abs().tolist()))


def check_returned(v: Variant, out) -> tuple[Tensor, dict[str, Tensor]]:
    """loss returned (scalar tensor with a gradient, {name: scalar tensor})."""
    line, form = returns(v), "return loss, {'reconstruction': reconstruction, …}, all scalar tensors"
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        fail(v, line, f"loss returned {described(out)} instead of (scalar tensor, dict of scalar tensors)", form)
    loss, terms = out
    for name, value in {"the loss": loss, **{f"the loss term {n!r}": t for n, t in terms.items()}}.items():
        place = line if value is loss else computed(v, name.split("'")[1])
        if not isinstance(value, Tensor):
            fail(v, place, f"{name} is {described(value)}, not a tensor",
                 "no .item() or float() in loss: return the tensor itself")
        if value.ndim:
            fail(v, place, f"{name} has shape {list(value.shape)}, not a scalar",
                 "reduce it: sum over d_in or features, mean over the batch")
    if not loss.requires_grad:
        fail(v, line, "the loss has no gradient", "it was detached (.item(), .detach(), torch.no_grad()) or depends on "
                                                  "no parameter")
    return loss, terms


def check_counters(v: Variant, sae: base.SAE) -> None:
    fired_F = sae._fired_F
    if fired_F is not None and fired_F.shape != sae.tokens_since_fired.shape:
        fail(v, defined(v, "__init__"), f"loss noted {len(fired_F)} features as firing or not, but there are counters "
                                        "for "
             f"{len(sae.tokens_since_fired)}", "give super().__init__(d_in, width) the width that encode returns")


class FirstNotFinite(TorchDispatchMode):
    """Remembers the line of the first operation that makes a NaN (or else an infinity) of finite numbers."""

    def __init__(self, file: str):
        super().__init__()
        self.file, self.nan, self.infinite = file, None, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made, had = ([t for t in tree_leaves(x) if isinstance(t, Tensor) and t.is_floating_point()]
                     for x in (out, (args, kwargs)))
        constant = "fill" in func.__name__ or "full" in func.__name__ or "where" in func.__name__  # −inf on purpose
        if self.nan is None and any(t.isnan().any() for t in made) and not any(t.isnan().any() for t in had):
            self.nan = memory.variant_line(self.file)
        if self.infinite is None and not constant and any(t.isinf().any()
                                                          for t in made) and not any(t.isinf().any() for t in had):
            self.infinite = memory.variant_line(self.file)
        return out


def not_finite_line(v: Variant, sae: base.SAE, batch: base.Batch, progress: base.Progress) -> int | None:
    with FirstNotFinite(v.module.__file__) as mode:
        sae.loss(batch, progress)
    return mode.infinite if mode.nan is None or (mode.infinite or 10**9) < mode.nan else mode.nan


def backward_line(v: Variant, sae: base.SAE, batch: base.Batch, progress: base.Progress) -> int | None:
    """Line of the operation whose gradient is NaN or fails, from autograd's anomaly mode."""
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            sae.loss(batch, progress)[0].backward()
        except RuntimeError:
            pass
    lines = re.findall(f'File "{re.escape(v.module.__file__)}", line (\\d+)', "".join(str(w.message) for w in caught))
    return int(lines[-1]) if lines else None


def measured_losses(v: Variant, sae: base.SAE, plan: Plan) -> list[float]:
    """The loss of the held-out batch at the start, the middle and the end of the run, on copies."""
    values = []
    for progress in (plan.points[0], plan.points[STEPS // 2], plan.points[-1]):
        with random_state(plan.seed), attempting(v, f"in loss, at {progress.fraction:.0%} of the run", plan.sizes,
                                                 defined(v, "loss")):
            out = duplicate(sae).loss(as_batch(sae, plan.x_BD), progress)
        values.append(check_returned(v, out)[0].item())
    return values
