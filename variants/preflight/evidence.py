"""What one loss on a copy tells: what it returns, whether and where it stops being finite, what depends on what.

Shapes: P parameters and T loss terms in all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variants import base
from variants.kit.copying import duplicate
from variants.preflight import memory
from variants.preflight.memory import Sizes
from variants.preflight.messages import (
    Variant,
    attempting,
    computed,
    defined,
    described,
    fail,
    returns,
)
from variants.preflight.trial import STEPS, Plan, as_batch, random_state


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
        fail(v, line, "the loss has no gradient",
             "it was detached (.item(), .detach(), torch.no_grad()) or depends on no parameter")
    return loss, terms


def check_counters(v: Variant, sae: base.SAE) -> None:
    fired_F = sae._fired_F
    if fired_F is not None and fired_F.shape != sae.tokens_since_fired.shape:
        fail(v, defined(v, "__init__"),
             f"loss noted {len(fired_F)} features as firing or not, but there are counters for "
             f"{len(sae.tokens_since_fired)}", "give super().__init__(d_in, width) the width that encode returns")


def measured_losses(v: Variant, sae: base.SAE, plan: Plan) -> list[float]:
    """The loss of the held-out batch at the start, the middle and the end of the run, on copies."""
    values = []
    for progress in (plan.points[0], plan.points[STEPS // 2], plan.points[-1]):
        doing = f"in loss, at {progress.fraction:.0%} of the run"
        with random_state(plan.seed), attempting(v, doing, plan.sizes, defined(v, "loss")):
            out = duplicate(sae).loss(as_batch(sae, plan.x_BD), progress)
        values.append(check_returned(v, out)[0].item())
    return values


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
        if self.nan is None and has(torch.isnan, made) and not has(torch.isnan, had):
            self.nan = memory.variant_line(self.file)
        if self.infinite is None and not constant and has(torch.isinf, made) and not has(torch.isinf, had):
            self.infinite = memory.variant_line(self.file)
        return out


def has(what: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> bool:
    """Whether one of the tensors holds such a number."""
    return any(what(t).any() for t in tensors)


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
