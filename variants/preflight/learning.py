"""What a variant's steps have shown: features that fire, gradients that arrive, a loss that falls.

Shapes: B tokens, F = number of features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from variants import base
from variants.kit import imperative
from variants.kit.copying import duplicate
from variants.preflight.evidence import Evidence, examine, measured_losses
from variants.preflight.messages import (
    Variant,
    assigned,
    at,
    attempting,
    computed,
    defined,
    fail,
    zeroed,
)
from variants.preflight.trial import STEPS, Plan, as_batch, initialised, random_state, train

ALWAYS_ON = 0.9  # share of features active on the average token that is no sparse code any more
# what helps where no feature fires, where most do, and where training makes the reconstruction worse; in a run, too
IF_SILENT = "lower the threshold or the penalty, or check the sign of the bias and the initialisation"
IF_DENSE = "encode needs a ReLU, a top-k or a threshold, and no large positive bias in front of it"
IF_WORSE = "check the sign of every term and of every gradient written by hand, and what is detached"


@dataclass(frozen=True)
class Shown:
    """What was looked at before, in and after the steps."""

    zero_weights: list[str]  # matrices that were all zeros at the start
    start: dict[str, Tensor]  # parameters before the first step
    evidence: Evidence
    losses: tuple[list[float], list[float]]  # before and after, at three points of the run; none of a trainer
    errors: tuple[float | None, float | None]  # ‖x − x_hat‖², before and after


def trained(v: Variant, sae: base.SAE, plan: Plan) -> Shown:
    """Train the SAE by the plan, and look at it meanwhile."""
    evidence = Evidence()
    zero_weights = [n for n, p in sae.named_parameters() if p.ndim > 1 and not p.any()]
    start = {n: p.detach().clone() for n, p in sae.named_parameters()}

    def look(*step):
        if v.is_trainer:
            finite(v, *step)
        else:
            examine(v, evidence, *step)

    def measured() -> tuple[list[float], float | None]:
        losses = [] if v.is_trainer else measured_losses(v, sae, plan)
        return losses, reconstruction_error(v, sae, plan)

    before = measured()
    for _ in train(v, sae, plan, look):
        pass
    after = measured()
    return Shown(zero_weights, start, evidence, (before[0], after[0]), (before[1], after[1]))


def check_learned(v: Variant, sae: base.SAE, plan: Plan, shown: Shown) -> list[str]:
    """Everything in the variant takes part in training, which lowers the loss; of a trainer, what shows of that."""
    if v.is_trainer:
        finite(v, sae)
        notes = [f"{at(v, defined(v, 'encode'))}: ae.encode returned {sae.returned}"] if sae.returned else []
        return notes + check_trained(v, sae, shown, plan)
    notes = check_gradients(v, sae, shown.evidence)
    check_moved(v, sae, shown)
    check_falls(v, shown, plan)
    check_silent(v, sae, plan)
    if not sae.counts_fired:
        notes.append(f"{at(v, defined(v, 'loss'))}: loss never calls self.note_fired: no feature counts as dead, and "
                     "training.dead_share is left out")
    return notes


def check_features(v: Variant, z_BF: Tensor, zero_weights: list[str], allow_dense: bool) -> tuple[float, list[str]]:
    """Some features fire, and not all of them always, unless ablated or allowed; the share that is active; notes."""
    own = v.is_trainer or v.module.SAE.encode is not base.SAE.encode
    line = defined(v, "encode" if own else "__init__")
    if not (z_BF != 0).any():
        if zero_weights:
            fail_zero_weights(v, zero_weights, line)
        fail(v, line,
             f"no feature ever fires: encode gives only zeros after {STEPS} steps (activations have E‖x‖² = 1)",
             IF_SILENT)
    active = (z_BF != 0).float().mean().item()
    what = f"{active:.0%} of the features are active on the average token: this is no sparse code"
    if active <= ALWAYS_ON:
        return active, []
    why = "--allow_dense" if allow_dense else ", ".join(ablated(v))
    if not why:
        fail(v, line, what, f"{IF_DENSE}; --allow_dense runs it all the same, marked")
    return active, [f"{at(v, line)}: {what} (with {why})"]


def fail_zero_weights(v: Variant, zero_weights: list[str], line: int | None) -> None:
    """No feature fires, and weights began as zeros: that is why."""
    names = " and ".join(name.removeprefix("ae.") for name in zero_weights)
    start = "starts" if len(zero_weights) == 1 else "start"
    advice = "start from random rows, as base.SAE does, with W_enc = W_dec transposed"
    if v.is_trainer:
        advice = "start from random rows of unit norm, with the encoder their transpose"
    fail(v, zeroed(v, zero_weights[0]) or line,
         f"no feature ever fires: {names} {start} as all zeros, so no gradient flows", advice)


def check_gradients(v: Variant, sae: base.SAE, evidence: Evidence) -> list[str]:
    """Every parameter and loss term takes part in training, unless declared in no_gradient or ablated by a zero."""
    zeros = ablated(v)
    notes = []

    def report(line, what, advice):
        if not zeros:
            fail(v, line, what, advice)
        notes.append(f"{at(v, line)}: {what} (with {', '.join(zeros)})")

    for term in evidence.terms:
        if term in sae.no_gradient:
            continue
        line = computed(v, term)
        if term not in evidence.differentiable:
            report(line,
                   f"the loss term {term!r} has no gradient in any of {STEPS} steps: it is detached, a constant or a "
                   "comparison",
                   f"compute it from parameters without .detach(), .item() or >; or list it: no_gradient = ({term!r},)")
        elif term not in evidence.effective:
            report(line, f"the gradient of the loss term {term!r} is exactly 0 in all of {STEPS} steps",
                   "it has no effect on any parameter: check what it is computed from, or list it: "
                   f"no_gradient = ({term!r},)")
        elif term in evidence.weighted:
            continue
        elif term in evidence.outside:
            report(line, f"the loss term {term!r} is returned but never added to the loss",
                   f"add it with its weight; or, if it is only to be logged, list it: no_gradient = ({term!r},)")
        elif term in evidence.unclear:
            notes.append(f"{at(v, line)}: the loss does not contain the tensor returned as {term!r}; if it is not "
                         "added in another form, it has no effect")
        else:
            report(line,
                   f"the loss term {term!r} is multiplied by 0 in all of {STEPS} steps, from the start of the run to "
                   "its end",
                   "give it a weight above 0, or take it out")
    for name, parameter in sae.named_parameters():
        if parameter.requires_grad and name not in evidence.trained and name not in sae.no_gradient:
            own = assigned(v, name)
            drop = "" if own else f", drop it (del self.{name} in __init__)"
            report(own or defined(v, "loss"), f"the parameter {name} gets no gradient in any of {STEPS} steps",
                   f"use it in loss{drop}, or list it: no_gradient = ({name!r},)")
    return notes


def check_moved(v: Variant, sae: base.SAE, shown: Shown) -> None:
    """Parameters with a gradient are also given to the optimiser."""
    for name, parameter in sae.named_parameters():
        meant = name in shown.evidence.trained and name not in sae.no_gradient
        if meant and torch.equal(parameter, shown.start.get(name, parameter)):
            fail(v, defined(v, "parameter_groups"), f"the parameter {name} has a gradient but never changes",
                 "return it from parameter_groups, and do not write its old value back in after_step")


def check_falls(v: Variant, shown: Shown, plan: Plan) -> None:
    """Training lowers the loss, as the run's beginning, middle or end defines it, and not at x_hat's expense."""
    (early, late), (before, after) = shown.losses, shown.errors
    if not any(b < a for a, b in zip(early, late)) and not learns_by_heart(v, plan):
        fail(v, defined(v, "loss"), f"the loss does not fall: {early[1]:.4g} before, {late[1]:.4g} after {STEPS} steps "
                                    "on synthetic data", IF_WORSE)
    if after > max(before, 1.0):
        fail(v, defined(v, "loss"), f"the reconstruction gets worse while the loss falls: ‖x − x_hat‖² is {before:.4g} "
                                    f"before and {after:.4g} after {STEPS} steps, where 1 is no better than x_hat = 0",
             IF_WORSE)


def check_silent(v: Variant, sae: base.SAE, plan: Plan) -> None:
    """Features that never fire and a token on which none does, both common in real training, give no NaN."""
    quiet, x_BD = duplicate(sae), plan.x_BD.clone()
    with torch.no_grad():
        if getattr(quiet, "b_enc", None) is not None:
            quiet.b_enc.clamp_(max=0)
            quiet.b_enc[: len(quiet.b_enc) // 3] = -1e3
        if getattr(quiet, "b_dec", None) is not None and quiet.b_dec.shape == x_BD[0].shape:
            x_BD[0] = quiet.b_dec
    with random_state(plan.seed):
        examine(v, Evidence(), quiet, as_batch(sae, x_BD), plan.points[-1],
                "where some features never fire and a token has none")


def check_trained(v: Variant, sae: imperative.Imperative, shown: Shown, plan: Plan) -> list[str]:
    """A trainer's update changes parameters and lowers ‖x − x_hat‖²; parameters it leaves alone are noted."""
    start, (before, after) = shown.start, shown.errors
    still = [n.removeprefix("ae.") for n, p in sae.named_parameters() if n in start and torch.equal(p, start[n])]
    line = defined(v, "update")
    if len(still) == len(start):
        fail(v, line, f"update changes no parameter of ae in {STEPS} steps",
             "call backward and optimizer.step(), with the parameters of self.ae")
    if after >= before:  # schedules that count their own calls have hardly begun
        check_whole_run(v, plan)
    return [f"{at(v, line)}: {', '.join(still)} did not change in {STEPS} steps"] if still else []


def check_short_run(v: Variant, plan: Plan, steps: int) -> None:
    """A trainer starts on a run of so few steps, too: a length that is a share of them may come to 0."""
    short = dataclasses.replace(v, setting=v.setting | dict(steps=steps, schedule=steps))
    next(train(short, initialised(short, plan.sizes, plan), plan))


def check_whole_run(v: Variant, plan: Plan) -> None:
    """A trainer's whole short run lowers ‖x − x_hat‖²."""
    n = 4 * STEPS
    again = dataclasses.replace(v, setting=v.setting | dict(steps=n, schedule=n))
    points = [base.Progress(i, n, i * plan.sizes.B, n * plan.sizes.B) for i in range(n)]
    whole = dataclasses.replace(plan, x_SBD=plan.x_SBD.repeat(4, 1, 1), points=points, dead_at=())
    fresh = initialised(again, plan.sizes, whole)
    before = reconstruction_error(again, fresh, whole)
    for _ in train(again, fresh, whole):
        pass
    after = reconstruction_error(again, fresh, whole)
    if after >= before:
        fail(v, defined(v, "update"),
             f"the reconstruction does not get better: ‖x − x_hat‖² is {before:.4g} before and {after:.4g} after {n} "
             "steps on synthetic data, where 1 is no better than x_hat = 0",
             "check the sign of every term, what is detached, and the learning rate")


def finite(v: Variant, sae: imperative.Imperative, *_) -> None:
    """No parameter of a trainer's ae has become NaN or infinite in the steps so far."""
    for name, p in sae.named_parameters():
        if not p.isfinite().all():
            became = "NaN" if p.isnan().any() else "infinite"
            fail(v, defined(v, "update"), f"the parameter {name.removeprefix('ae.')} became {became} in update",
                 "guard divisions by a count that may be 0, roots and logarithms of 0; clip the gradient")


def reconstruction_error(v: Variant, sae: base.SAE, plan: Plan) -> float | None:
    """‖x − x_hat‖² of the held-out batch, summed over D, averaged over B; None where encode returns no features."""
    probe = duplicate(sae).eval()
    with torch.no_grad(), random_state(plan.seed), attempting(v, "in encode and decode on [tokens, d_in]", plan.sizes):
        z_BF = probe.encode(plan.x_BD)
        if not isinstance(z_BF, Tensor):
            return None
        return base.reconstruction_loss(plan.x_BD - probe.decode(z_BF)).item()


def learns_by_heart(v: Variant, plan: Plan) -> bool:
    """Whether the loss of one batch falls when there is no other: a second chance for a k of 1, a strong penalty."""
    middle = plan.points[STEPS // 2]
    plan = dataclasses.replace(plan, x_SBD=plan.x_BD.expand(STEPS, -1, -1), points=[middle] * STEPS, learning_rate=1e-3,
                               dead_at=())
    losses = list(train(v, initialised(v, plan.sizes, plan), plan))
    return losses[-1] < losses[0]


def ablated(v: Variant) -> list[str]:
    """Hyper-parameters given as 0 or False: what then has no effect was meant to have none."""
    return zeros(v.given)


def zeros(hyper: dict) -> list[str]:
    """Those of the hyper-parameters that are 0 or False, as they were written."""
    return [f"{key}={value}" for key, value in hyper.items() if isinstance(value, (bool, int, float)) and value == 0]
