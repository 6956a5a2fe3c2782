"""Preflight of a variant: a few training steps on synthetic data, on the CPU, in seconds, before anything expensive.

Every failure is one exception whose message is "file.py:line: what is wrong\\nwhat to do". The trial itself is in
trial.py, the memory forecast in memory.py, the wording in messages.py; here is what is demanded.

Shapes: B tokens, D = d_in, F = number of features.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import variants
from variants import base
from variants.kit import imperative, trainer_state, trainers
from variants.kit.copying import duplicate
from variants.kit.hyper import hyperparameters
from variants.kit.sparse import taken
from variants.kit.trained import TrainedSAE
from variants.preflight import memory
from variants.preflight.memory import Sizes
from variants.preflight.messages import (
    SECONDS,
    Variant,
    assigned,
    at,
    attempting,
    computed,
    declared,
    defined,
    described,
    fail,
    limited,
    where,
    zeroed,
)
from variants.preflight.trial import (
    STEPS,
    Evidence,
    Plan,
    as_batch,
    build,
    examine,
    imported,
    initialised,
    make_plan,
    measured_losses,
    one_thread,
    pretend_dead,
    random_state,
    read,
    reseed,
    smallest,
    train,
)

ALWAYS_ON = 0.9  # share of features active on the average token that is no sparse code any more


@dataclass(frozen=True)
class Findings:
    """What the check found out, at the real sizes: bytes of memory and lines worth telling."""

    parameters: int  # number of trainable and fixed parameters
    parameter_bytes: int
    buffer_bytes: int
    # most alive at once in loss, backward and after_step, besides parameters, gradients and optimiser
    step_peak_bytes: int
    largest: tuple[int, tuple[int, ...], str]  # bytes, shape and "file.py:line" of the largest tensor of a step
    notes: list[str]
    active: float = 0.0  # share of the features that is active on the average token


def run(name: str, hyper: dict, *, d_in: int, d_sae: int, batch_size: int, total_steps: int, lr: float | None,
        seed: int, train_step: Callable, make_optimizer: Callable, reference_files: Iterable = (), against: str = "",
        allow_identical: bool = False, allow_dense: bool = False, accelerator: bool = False, context: int | None = None,
        room: tuple[int, int] = (0, 0), told: dict | None = None) -> Findings:
    """Check a variant, by name or path, for training at the given real sizes; raises on the first thing that is wrong.

    `train_step(sae, optimizer, batch, progress, lr)` and `make_optimizer(sae, lr)` are the training loop's.
    `reference_files` are variants from which this one must differ in effect, unless `allow_identical`; `against` is
    another, of which it is said how far this one gets from it. A code that is not sparse is refused unless
    `allow_dense`. With `accelerator` the memory forecast is for a GPU, where shared functions take other paths.
    `context`: tokens per row; `room`: layers below and above the SAE's; `told`: what a trainer is told of the run
    besides (layer, lm_name).
    """
    if total_steps < 1:
        raise ValueError(f"{total_steps} training steps: there are fewer tokens than one batch of {batch_size}\n"
                         "raise --num_tokens or lower --batch_size")
    if lr is not None and not lr > 0:
        raise ValueError(f"the learning rate is {lr}: nothing would be trained\n"
                         "set --lr to a positive number, such as 3e-4")
    v = read(name, hyper)
    setting = trainers.SETTING | (told or {}) | dict(steps=max(total_steps, STEPS), schedule=STEPS,
                                                       lr=Plan.learning_rate, seed=seed)
    v = dataclasses.replace(v, setting=setting)
    check_signatures(v)
    with random_state(seed), one_thread():
        sae, sizes = smallest(v, d_sae)
        check_needs(v, sae, batch_size, context, room)
        plan = make_plan(sizes, batch_size, total_steps, seed, train_step, make_optimizer)
        if v.is_trainer and total_steps < STEPS:  # a length that is a share of the steps may come to 0
            short = dataclasses.replace(v, setting=setting | dict(steps=total_steps, schedule=total_steps))
            next(train(short, initialised(short, sizes, plan), plan))
        sae = initialised(v, sizes, plan)
        check_decoder(v, sae)
        evidence = Evidence()
        look = (lambda *step: finite(v, *step)) if v.is_trainer else (lambda *step: examine(v, evidence, *step))
        zero_weights = [n for n, p in sae.named_parameters() if p.ndim > 1 and not p.any()]
        start = {n: p.detach().clone() for n, p in sae.named_parameters()}
        before = [] if v.is_trainer else measured_losses(v, sae, plan), reconstruction_error(v, sae, plan)
        for _ in train(v, sae, plan, look):
            pass
        after = [] if v.is_trainer else measured_losses(v, sae, plan), reconstruction_error(v, sae, plan)

        z_BF = check_encode(v, sae, plan)
        active, notes = check_features(v, z_BF, zero_weights, allow_dense)
        if v.is_trainer:
            finite(v, sae)
            notes += [f"{at(v, defined(v, 'encode'))}: ae.encode returned {sae.returned}"] if sae.returned else []
            notes += check_trained(v, sae, start, before[1], after[1], plan)
        else:
            notes += check_gradients(v, sae, evidence)
            check_moved(v, sae, start, evidence)
            check_falls(v, before, after, plan)
            check_silent(v, sae, plan)
        notes += check_shapes(v, sae, plan, z_BF)
        notes += check_saved(v, sae, plan, z_BF)
        check_scale(v, sae, plan)
        notes += check_identical(v, plan, reference_files, allow_identical, against)
        notes += check_resumed(v, plan) if v.is_trainer else accelerator_notes(v, sae, plan)
        figures = forecast(v, sizes, Sizes(batch_size, d_in, d_sae), plan, accelerator)
    n_bytes, shape, line = figures.largest
    place = "the backward pass" if line is None else at(v, assigned(v, line) if isinstance(line, str) else line)
    if figures.waits:
        first, *others = sorted(figures.waits)
        lines = ", ".join([at(v, first), *map(str, others)])
        notes.append(f"{lines} wait{'s' * (not others)} for the GPU in every step (.item(), float(), a condition on a "
                     "tensor, or a mask as an index)")
    return Findings(figures.parameters, figures.parameter_bytes, figures.buffer_bytes, figures.peak_bytes,
                    (n_bytes, shape, place), notes, active)


def references(name: str) -> list[Path]:
    """Variants that this one must not equal: the others here, and those stored with the baselines as they ran."""
    others = [file for file in map(variants.path, variants.names()) if file.resolve() != variants.path(name).resolve()]
    return others + sorted(Path(__file__).parents[2].glob("runs/baseline/*/*/variant.py"))


def untrained(name: str, hyper: dict, d_in: int, d_sae: int) -> Findings:
    """The figures of an SAE that is only to be evaluated."""
    v = read(name, hyper)
    with random_state(), attempting(v, f"constructing SAE({d_in}, {d_sae})"):
        sae = variants.build(v.module, d_in, d_sae, hyper)
    parameters, buffers = (sum(t.nbytes for t in tensors) for tensors in (sae.parameters(), sae.buffers()))
    return Findings(sum(p.numel() for p in sae.parameters()), parameters, buffers, 0, (0, (), ""), [])


def too_large(findings: Findings, limit_bytes: int) -> str | None:
    """The message, if parameters with gradients and Adam's moments, buffers and a step need more than `limit_bytes`."""
    need = 4 * findings.parameter_bytes + findings.buffer_bytes + findings.step_peak_bytes
    if need <= limit_bytes:
        return None
    n_bytes, shape, place = findings.largest
    largest = f"a tensor of shape {list(shape)} ({in_units(n_bytes)}) at {place} is the largest; " if n_bytes else ""
    return (f"{largest}training needs {in_units(need)}, {in_units(findings.step_peak_bytes)} of it in a step; the "
            f"machine has {in_units(limit_bytes)}\n"
            "reduce --batch_size or --d_sae, or make that tensor smaller: a sample of rows, one chunk at a time, only "
            "the pairs needed")


def in_units(n_bytes: float) -> str:
    """Bytes in the binary unit that shows something; what is left of an overdrawn machine is nothing."""
    n_bytes = max(0, n_bytes)
    unit, power = next(((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if n_bytes >= 2**p / 10), ("KiB", 10))
    return f"{n_bytes / 2**power:,.1f} {unit}"


# ------------------------------------------------------------------------------------------------ the contract


def check_signatures(v: Variant) -> None:
    """encode and loss can be called the way training and the evals call them."""
    if v.is_trainer:
        trainer = v.module.SAE.trainer_class
        signature, named = inspect.signature(trainer.update), {}
        if "batch" in list(signature.parameters)[3:]:
            named = {"batch": None}
        try:
            signature.bind(*[None] * 3, **named)
        except TypeError:
            fail(v, defined(v, "update"), f"update{signature} has the wrong arguments, it is called as update(self, "
                                          "step, activations)",
                 "write def update(self, step, activations):, and behind them batch if it needs contexts or attention; "
                 "what else it takes needs a default")
        if (getattr(trainer, "needs_contexts", False) or getattr(trainer, "attention_layers", ())) and not named:
            fail(v, defined(v, "update"), f"{trainer.__name__} declares contexts or attention, and update{signature} "
                                          "cannot be given them",
                 "write def update(self, step, activations, batch):")
        return
    if v.module.SAE.loss is base.SAE.loss:
        fail(v, defined(v, "loss"), "the class SAE defines no loss", "write def loss(self, batch, progress): … "
             "return loss, {'term': tensor, …}; see variants/topk.py")
    for method, wanted in (("encode", "(self, x)"), ("loss", "(self, batch, progress)"), ("decode", "(self, z)"),
                           ("after_step", "(self, batch, progress)"), ("initialise", "(self, x_ND)")):
        signature = inspect.signature(getattr(v.module.SAE, method))
        try:
            signature.bind(*[None] * len(wanted.split(",")))
        except TypeError:
            fail(v, defined(v, method),
                 f"{method}{signature} has the wrong arguments, it is called as {method}{wanted}",
                 f"write def {method}{wanted}:")


def check_needs(v: Variant, sae: base.SAE, batch_size: int, context: int | None, room: tuple[int, int]) -> None:
    """The contexts and layers a variant asks for exist:
    what cannot be given is refused, never passed as a silent None.
    """
    offsets, threshold = sae.attention_layers, sae.attention_threshold
    if not isinstance(offsets, (tuple, list)) or any(type(o) is not int
                                                     for o in offsets) or len(set(offsets)) < len(offsets):
        fail(v, declared(v, "attention_layers"), f"attention_layers = {offsets!r} is no tuple of different whole "
                                                 "numbers",
             "write offsets from the SAE's own layer: attention_layers = (-1, 0)")
    if beyond := [o for o in offsets if not -room[0] <= o <= room[1]]:
        fail(v, declared(v, "attention_layers"), f"attention_layers asks for layer {beyond[0]:+d} from the SAE's own, "
                                                 "and the model has "
             f"{room[0]} below and {room[1]} above", "choose offsets inside, or other --layers")
    if threshold is not None and not (offsets and 0 <= threshold < 1):
        fail(v, declared(v, "attention_threshold"), f"attention_threshold = {threshold!r} "
             + ("is no share of a token's attention" if offsets else "stands alone"),
             "give a number from 0 to below 1" if offsets else "name the layers: attention_layers = (0,)")
    if (sae.needs_contexts or offsets) and context and batch_size < context:
        fail(v, declared(v, "needs_contexts"), f"a batch of {batch_size} tokens holds no whole context of {context}",
             f"give --batch_size {context} or more, or a shorter --context")


# -------------------------------------------------------------------------------------------- what the steps have shown


def reconstruction_error(v: Variant, sae: base.SAE, plan: Plan) -> float | None:
    """‖x − x_hat‖² of the held-out batch, summed over D, averaged over B;
    None where encode does not return features.
    """
    probe = duplicate(sae).eval()
    with torch.no_grad(), random_state(plan.seed), attempting(v, "in encode and decode on [tokens, d_in]", plan.sizes):
        z_BF = probe.encode(plan.x_BD)
        return base.reconstruction_loss(plan.x_BD - probe.decode(z_BF)).item() if isinstance(z_BF, Tensor) else None


def check_features(v: Variant, z_BF: Tensor, zero_weights: list[str], allow_dense: bool) -> tuple[float, list[str]]:
    """Some features fire, and not all of them always, unless what keeps them apart was set to 0, or allowed;
    the share that is active.
    """
    line = defined(v,
                   "encode") if v.is_trainer or v.module.SAE.encode is not base.SAE.encode else defined(v, "__init__")
    if not (z_BF > 0).any():
        if zero_weights:
            names = " and ".join(name.removeprefix("ae.") for name in zero_weights)
            advice = "start from random rows of unit norm, with the encoder their transpose" if v.is_trainer else (
                "start from random rows, as base.SAE does, with W_enc = W_dec transposed")
            fail(v, zeroed(v, zero_weights[0]) or line, f"no feature ever fires: {names} "
                                                        f"start{'s' * (len(zero_weights) == 1)} as all "
                 "zeros, so no gradient flows", advice)
        fail(v, line,
             f"no feature ever fires: encode gives only zeros after {STEPS} steps (activations have E‖x‖² = 1)",
             "lower the threshold or the penalty, or check the sign of the bias and the initialisation")
    active = (z_BF != 0).float().mean().item()
    what = f"{active:.0%} of the features are active on the average token: this is no sparse code"
    if active <= ALWAYS_ON:
        return active, []
    why = "--allow_dense" if allow_dense else ", ".join(ablated(v))
    if not why:
        fail(v, line, what, "encode needs a ReLU, a top-k or a threshold, and no large positive bias in front of it; "
                            "--allow_dense runs it "
             "all the same, marked")
    return active, [f"{at(v, line)}: {what} (with {why})"]


def ablated(v: Variant) -> list[str]:
    """Hyper-parameters given as 0 or False: what then has no effect was meant to have none."""
    return [f"{key}={value}" for key, value in v.given.items() if isinstance(value, (bool, int, float)) and value == 0]


def check_gradients(v: Variant, sae: base.SAE, evidence: Evidence) -> list[str]:
    """Every parameter and every loss term takes part in training,
    unless declared in no_gradient or ablated by a zero.
    """
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
            report(line, f"the loss term {term!r} has no gradient in any of {STEPS} steps: it is detached, a constant "
                         "or a comparison",
                   f"compute it from parameters without .detach(), .item() or >; or list it: no_gradient = ({term!r},)")
        elif term not in evidence.effective:
            report(line, f"the gradient of the loss term {term!r} is exactly 0 in all of {STEPS} steps",
                   f"it has no effect on any parameter: check what it is computed from, or list it: no_gradient = "
                   f"({term!r},)")
        elif term in evidence.weighted:
            continue
        elif term in evidence.outside:
            report(line, f"the loss term {term!r} is returned but never added to the loss",
                   f"add it with its weight; or, if it is only to be logged, list it: no_gradient = ({term!r},)")
        elif term in evidence.unclear:
            notes.append(f"{at(v, line)}: the loss does not contain the tensor returned as {term!r}; if it is not "
                         "added in another form, it has no effect")
        else:
            report(line, f"the loss term {term!r} is multiplied by 0 in all of {STEPS} steps, from the start of the "
                         "run to its end",
                   "give it a weight above 0, or take it out")
    for name, parameter in sae.named_parameters():
        if parameter.requires_grad and name not in evidence.trained and name not in sae.no_gradient:
            own = assigned(v, name)
            report(own or defined(v, "loss"), f"the parameter {name} gets no gradient in any of {STEPS} steps",
                   "use it in loss" + ("" if own else f", drop it (del self.{name} in __init__)")
                   + f", or list it: no_gradient = ({name!r},)")
    return notes


def check_moved(v: Variant, sae: base.SAE, start: dict[str, Tensor], evidence: Evidence) -> None:
    """Parameters with a gradient are also given to the optimiser."""
    for name, parameter in sae.named_parameters():
        if name in evidence.trained and name not in sae.no_gradient and torch.equal(parameter, start.get(name, parameter)):
            fail(v, defined(v, "parameter_groups"), f"the parameter {name} has a gradient but never changes",
                 "return it from parameter_groups, and do not write its old value back in after_step")


def check_falls(v: Variant, before: tuple[list[float], float], after: tuple[list[float], float], plan: Plan) -> None:
    """Training lowers the loss, as the beginning, the middle or the end of the run defines it,
    and not at x_hat's expense.
    """
    advice = "check the sign of every term and of every gradient written by hand, and what is detached"
    if not any(late < early for early, late in zip(before[0], after[0])) and not learns_by_heart(v, plan):
        fail(v, defined(v, "loss"), f"the loss does not fall: {before[0][1]:.4g} before, {after[0][1]:.4g} after "
                                    f"{STEPS} steps on "
             "synthetic data", advice)
    if after[1] > max(before[1], 1.0):
        fail(v, defined(v, "loss"), f"the reconstruction gets worse while the loss falls: ‖x − x_hat‖² is "
                                    f"{before[1]:.4g} before and "
             f"{after[1]:.4g} after {STEPS} steps, where 1 is no better than x_hat = 0", advice)


def finite(v: Variant, sae: imperative.Imperative, *_) -> None:
    """No parameter of a trainer's ae has become NaN or infinite in the steps so far."""
    for name, p in sae.named_parameters():
        if not p.isfinite().all():
            became = "NaN" if p.isnan().any() else "infinite"
            fail(v, defined(v, "update"), f"the parameter {name.removeprefix('ae.')} became {became} in update",
                 "guard divisions by a count that may be 0, roots and logarithms of 0; clip the gradient")


def check_trained(v: Variant, sae: imperative.Imperative, start: dict[str, Tensor], before: float, after: float,
                  plan: Plan) -> list[str]:
    """A trainer's update changes parameters and lowers ‖x − x_hat‖²; parameters it leaves alone are noted."""
    still = [n.removeprefix("ae.") for n, p in sae.named_parameters() if n in start and torch.equal(p, start[n])]
    line = defined(v, "update")
    if len(still) == len(start):
        fail(v, line, f"update changes no parameter of ae in {STEPS} steps",
             "call backward and optimizer.step(), with the parameters of self.ae")
    if after >= before:  # schedules that count their own calls have hardly begun: a whole short run instead
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
            fail(v, line, f"the reconstruction does not get better: ‖x − x_hat‖² is {before:.4g} before and "
                          f"{after:.4g} after {n} steps on "
                 "synthetic data, where 1 is no better than x_hat = 0",
                 "check the sign of every term, what is detached, and the learning rate")
    return [f"{at(v, line)}: {', '.join(still)} did not change in {STEPS} steps"] if still else []


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


def learns_by_heart(v: Variant, plan: Plan) -> bool:
    """Whether the loss of one batch falls when that batch is all there is:
    a second chance where k is 1 or the penalty strong.
    """
    middle = plan.points[STEPS // 2]
    plan = dataclasses.replace(plan, x_SBD=plan.x_BD.expand(STEPS, -1, -1), points=[middle] * STEPS, learning_rate=1e-3,
                               dead_at=())
    losses = list(train(v, initialised(v, plan.sizes, plan), plan))
    return losses[-1] < losses[0]


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


# ------------------------------------------------------------------------------------------------ encode and decode


def check_decoder(v: Variant, sae: base.SAE) -> None:
    with attempting(v, "reading the property decoder", line=defined(v, "decoder")):
        decoder = sae.decoder
    if not (isinstance(decoder, Tensor) and decoder.ndim == 2 and decoder.shape[1] == sae.d_in):
        fail(v, defined(v, "decoder"), f"decoder is {described(decoder)}, not [number of features, d_in = {sae.d_in}]",
             "rows are features: return W_dec of shape [d_sae, d_in], several decoders concatenated along dim 0")


def matches(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; a few entries may differ where rounding changes which of two
    near-equal features is kept.
    """
    return a.shape == b.shape and ((a - b).abs() > 1e-4 * a.abs().max().clamp_min(1e-12)).float().mean().item() < 5e-4


@torch.no_grad()
def check_encode(v: Variant, sae: base.SAE, plan: Plan) -> Tensor:
    """encode on [B, D] gives a tensor [B, F], the same each time, and changes nothing; returns it."""
    probe, line = duplicate(sae).eval(), defined(v, "encode")
    with attempting(v, "in encode on [tokens, d_in]", plan.sizes):
        # once before: what follows from the weights may be stale after a step  # noqa: B018
        probe.encode(plan.x_BD), probe.decoder
        state = {k: t.clone() for k, t in probe.state_dict().items()}
        z_BF = probe.encode(plan.x_BD)
    if not isinstance(z_BF, Tensor):
        fail(v, line, f"encode returned {described(z_BF)} instead of one tensor of features",
             "return z alone; what loss needs besides belongs into another method")
    width = len(probe.decoder)
    if z_BF.shape != (plan.sizes.B, width):
        fail(v, line, f"encode gave shape {list(z_BF.shape)} for x [{plan.sizes.B}, {plan.sizes.D}]; the decoder has "
                      f"{width} rows",
             "encode must return one number per decoder row: (..., d_in) -> (..., number of features)")
    if not z_BF.isfinite().all():
        fail(v, line, "encode gives NaN or infinity", "guard divisions, roots and logarithms of 0")
    with attempting(v, "in encode on [tokens, d_in]", plan.sizes):
        again_BF = probe.encode(plan.x_BD)
    changed = [k for k, t in probe.state_dict().items() if not torch.equal(t, state[k])]
    if changed:
        advice = ("change it in update alone, or only while self.training" if v.is_trainer
                  else "move the update into loss or after_step")
        fail(v, line, f"encode changes {', '.join(changed)}: evals would alter the SAE they measure", advice)
    if not torch.equal(z_BF, again_BF):
        fail(v, line, "encode gives different features for the same x",
             "no noise or dropout in encode unless self.training")
    return z_BF


@torch.no_grad()
def check_shapes(v: Variant, sae: base.SAE, plan: Plan, z_BF: Tensor) -> list[str]:
    """encode and decode on [batch, context, ·] and in bf16 agree with [tokens, ·]."""
    B, D, _ = plan.sizes
    probe, contexts = duplicate(sae).eval(), (8, B // 8)
    advice = "training passes [tokens, d_in], evals [batch, context, d_in]: work along dim=-1 and do not unpack x.shape"
    with attempting(v, f"in encode on [batch, context, d_in] = {[*contexts, D]}; [tokens, d_in] works", plan.sizes):
        z = probe.encode(plan.x_BD.reshape(*contexts, D))
    if not isinstance(z, Tensor) or z.shape != (*contexts, z_BF.shape[1]):
        fail(v, defined(v, "encode"), f"encode gave {described(z)} for x {[*contexts, D]}", advice)
    if not matches(z_BF, z.reshape(z_BF.shape)):
        fail(v, defined(v, "encode"), f"encode gives other features for x {[*contexts, D]} than for the same tokens as "
                                      f"{[B, D]}", advice)
    with attempting(v, "in decode on [tokens, features]", plan.sizes):
        x_hat_BD = probe.decode(z_BF)
    with attempting(v, f"in decode on [batch, context, features] = {list(z.shape)}; [tokens, features] works",
                    plan.sizes):
        x_hat = probe.decode(z)
    for shape, found in (((B, D), x_hat_BD), ((*contexts, D), x_hat)):
        if not isinstance(found, Tensor) or found.shape != shape:
            fail(v, defined(v, "decode"), f"decode gave {described(found)} where {list(shape)} was due", advice)
    if not matches(x_hat_BD, x_hat.reshape(B, D)):
        fail(v, defined(v, "decode"), "decode gives another reconstruction for [batch, context, features] than for "
                                      "[tokens, features]",
             advice)
    trained = TrainedSAE(probe, 1.0)
    with attempting(v, "in encode on bf16 activations", plan.sizes):
        bf16 = trained.encode(plan.x_BD.bfloat16())
    if not torch.equal(bf16, trained.encode(plan.x_BD.bfloat16().float())):
        fail(v, defined(v, "encode"), "encode gives other features for bf16 activations than for the same numbers in "
                                      "fp32",
             "compute in the dtype of the weights")
    notes = []
    if not matches(z_BF[: B // 4], probe.encode(plan.x_BD[: B // 4])):
        notes.append(f"{at(v, defined(v, 'encode'))}: a token's features depend on the other tokens passed with it, "
                     "and evals pass others")
    if not matches(x_hat_BD - probe.decode(torch.zeros_like(z_BF)), z_BF @ probe.decoder):
        notes.append(f"{at(v, defined(v, 'decode'))}: decode(z) is not z @ decoder plus a constant; evals that use "
                     "decoder rows see other directions")
    return notes


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
    if lost := state_outside(sae, fresh, lambda model: duplicate(model).eval().encode(plan.x_BD)):
        fail(v, assigned(v, lost), f"a saved and loaded SAE gives other features: {lost} is learned, but it is no "
                                   "parameter or buffer",
             f'use self.register_buffer("{lost.split(".")[-1]}", torch.tensor(…)) and change it in place')

    def loss(model):
        with torch.enable_grad():
            return duplicate(model).loss(as_batch(model, plan.x_BD), plan.points[-1])[0].detach()

    if v.is_trainer:  # check_resumed looks at what it goes on from
        return []
    lost = state_outside(sae, fresh, loss, plan.seed)
    return [f"{at(v, assigned(v, lost))}: {lost} changes in training but is no parameter or buffer: an interrupted run "
            "cannot continue exactly"] if lost else []


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


def check_scale(v: Variant, sae: base.SAE, plan: Plan) -> None:
    """On activations three times as large, a trained SAE's features are three times as large."""
    one, three = (TrainedSAE(duplicate(sae), scale) for scale in (1.0, 3.0))
    if not matches(3 * one.encode(plan.x_BD), three.encode(3 * plan.x_BD)):
        fail(v, defined(v, "encode"), "features do not scale with the normalisation",
             "encode must depend on x, the parameters and the buffers alone")


# ----------------------------------------------------------------------------------------------- against known variants


def code(tree: ast.Module) -> str:
    """What a module computes: without comments, docstrings and the hyper-parameters' default values."""
    tree = copy.deepcopy(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value,
                                                          ast.Constant) and isinstance(first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            node.args.defaults = [ast.Constant(0)] * len(node.args.defaults)
            node.args.kw_defaults = [d and ast.Constant(0) for d in node.args.kw_defaults]
    return ast.dump(tree)


def changed_lines(mine: ast.Module, theirs: ast.Module) -> list[int]:
    """Lines of the statements of `mine` that `theirs` does not have;
    where there is none, of the functions with other arguments.
    """
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


def check_identical(v: Variant, plan: Plan, files: Iterable, allowed: bool, against: str = "") -> list[str]:
    """The variant's change has an effect: it does not train bit for bit like one of the reference files,
    or like the one asked for.
    """
    notes, seen, mine = [], set(), None
    asked = variants.path(against) if against else None
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
            defaults = hyperparameters(other.module)
            edited = [f"{k}={value}" for k, value in v.hyper.items() if defaults.get(k, value) != value]
            notes.append(f"this is {known_as} with {', '.join(edited)}" if edited
                         else f"this is the unmodified {known_as}")
            continue
        mine = mine or list(trajectory(v, plan))
        apart = distance(mine, other, plan, to_the_end=file == asked)
        if apart == 0:
            what = f"this variant trains bit-identically to {known_as}: its change has no effect"
            grouping = [groups(v), groups(other)]
            zeros = ablated(v)
            # an ablation may leave the variant it came from; groups act in evals, not in training
            if allowed or zeros or any(grouping):
                notes += [what + " on training"
                          + f" (with {', '.join(zeros)})" * bool(zeros)] * bool(allowed or zeros or grouping[0])
                continue
            lines = changed_lines(v.tree, other.tree)
            fail(v, lines[0] if lines else None, what + (f" (it differs in line{'s' if len(lines) > 1 else ''} "
                 f"{', '.join(map(str, lines[:6]))}{', …' if len(lines) > 6 else ''})" if lines else ""),
                 "make sure the new code is called and its result used; --allow_identical runs it all the same")
        if file == asked:
            how = "cannot be compared in its features" if apart is None else f"differ by {apart:.2g} of their size"
            notes.append(f"trains differently from {known_as}: after {STEPS} steps on synthetic data the "
                         f"reconstructions {how}")
    return notes


def groups(v: Variant) -> bool:
    """Whether the variant names groups of features, which act in evals alone."""
    own, none = (v.module.SAE.trainer_class, None) if v.is_trainer else (v.module.SAE, base.SAE.feature_groups)
    return getattr(own, "feature_groups", none) is not none


def like(v: Variant, other: Variant, plan: Plan) -> Variant:
    """Another variant with the hyper-parameters and schedules that this one runs with, where it knows them.
    ValueError if one is open.
    """
    mine = v.hyper
    if v.is_trainer:  # as it is constructed: a schedule is cut to the run in both or in neither
        mine = v.hyper | trainers.keywords(v.module.SAE.trainer_class, plan.sizes.D, plan.sizes.F, v.setting, v.given)
    known = hyperparameters(other.module)
    shared = {key: mine[key] for key in known if key in mine}
    if missing := [key for key, value in (known | shared).items() if value is inspect.Parameter.empty
                   and key not in trainers.SHRUNK]:
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


# --------------------------------------------------------------------------------------------- the variant's own report


def reports(v: Variant) -> bool:
    """Whether the variant measures something of its own."""
    if v.is_trainer:
        return callable(getattr(v.module.SAE.trainer_class, "report", None))
    return v.module.SAE.report is not base.SAE.report


def check_report(name: str, hyper: dict, d_in: int, d_sae: int, report: Callable, *, seed: int, train_step: Callable,
                 make_optimizer: Callable) -> None:
    """The variant's own report, tried after a few steps on `report(sae)`,
    which gives it a little text of a tiny model of `d_in`.
    """
    setting = trainers.SETTING | dict(steps=STEPS, schedule=STEPS, lr=Plan.learning_rate, seed=seed)
    v = dataclasses.replace(read(name, hyper), setting=setting)
    if not reports(v):
        return
    with random_state(seed), one_thread():
        _, small = smallest(v, d_sae)
        sizes = small._replace(D=d_in)
        plan = make_plan(sizes, sizes.B, STEPS, seed, train_step, make_optimizer)
        sae = initialised(v, sizes, plan)
        for _ in train(v, sae, plan):
            pass
        line = defined(v, "report")
        with attempting(v, "in report, tried on a little text of a tiny model",
                        line=line), limited(10 * SECONDS, "in report"):
            returned = report(sae.eval())
        form = "return {name: number}, {file name: text or bytes}"
        if not (isinstance(returned, tuple) and len(returned) == 2
                and all(isinstance(part, dict) for part in returned)):
            fail(v, line, f"report returned {described(returned)} instead of two dicts", form)
        for key, value in returned[0].items():
            if not (value is None or isinstance(value, (bool, int, float))):
                fail(v, line, f"report gives {described(value)} as the number {key!r}",
                     f"{form}: float(…) makes a number of a tensor")
        for key, value in returned[1].items():
            if not isinstance(value, (str, bytes)):
                fail(v, line, f"report gives {described(value)} as the file {key!r}", form)


# ------------------------------------------------------------------------------------------------ the real machine


def accelerator_notes(v: Variant, sae: base.SAE, plan: Plan) -> list[str]:
    """What works on the CPU in fp32 and would fail on a GPU: dtypes under bf16 autocast, tensors made on the CPU."""
    notes = []
    with random_state(plan.seed):
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, _ = duplicate(sae).loss(as_batch(sae, plan.x_BD), plan.points[-1])
            loss.backward()
        except Exception as error:  # noqa: BLE001
            place = where(error, v.file) or at(v, defined(v, "loss"))
            notes.append(f"{place} fails under bf16 autocast, as used on a GPU: {str(error).splitlines()[0][:160]}")
        try:  # the meta device computes shapes only, and like a GPU it is not where torch.zeros(n) is
            batch = as_batch(sae, plan.x_BD)
            duplicate(sae).to("meta").loss(base.Batch(**{k: t.to("meta") for k, t in vars(batch).items()}),
                                           plan.points[-1])
        except Exception as error:  # noqa: BLE001  a condition on a tensor cannot run there and says nothing
            if "device" in str(error) and "cpu" in str(error) and (place := where(error, v.file)):
                notes.append(f"{place} mixes devices, which fails on a GPU: create tensors with device=x.device, or as "
                             "buffers")
    return notes


def forecast(v: Variant, small: Sizes, real: Sizes, plan: Plan, accelerator: bool) -> memory.Forecast:
    """Memory at the real sizes, for the run's last step and for its first, when periodic work is done,
    if that differs.
    """
    def traced(sizes: Sizes, progress: base.Progress, device: str = "cpu") -> memory.Trace:
        with torch.device(device):
            sae = build(v, sizes).train()
            x_BD = torch.nn.functional.normalize(torch.randn(sizes.B, sizes.D), dim=1)
            with torch.device("cpu"):
                fields = vars(as_batch(sae, x_BD if device == "cpu" else torch.zeros(sizes.B, sizes.D)))
            batch = base.Batch(**{name: tensor.to(device) for name, tensor in fields.items()})
            with attempting(v, f"in a training step at B = {sizes.B}, d_in = {sizes.D}, d_sae = {sizes.F}", sizes,
                            defined(v, "update" if v.is_trainer else "loss")):
                if device == "cpu":
                    sae.initialise(x_BD)
                pretend_dead(sae)
                return memory.trace_step(v.module.__file__, sae, batch, progress)

    def figures(progress: base.Progress) -> memory.Forecast:
        if real.B * real.F <= 2**24 and real.D * real.F <= 2**24:  # cheap enough to be measured as it is
            return memory.measured(traced(real, progress))
        # shapes can be followed from size to size only along one path: the dense one, which needs more, and is a GPU's
        with taken(sparse=False):
            return memory.forecast(lambda sizes: traced(sizes, progress), small, real)

    first, last = plan.points[0], plan.points[-1]
    done, more = figures(last), []
    if {m[:2] for m in traced(small, first).made} - {m[:2] for m in traced(small, last).made}:
        more.append(figures(first))
    if accelerator and not v.is_trainer:
        try:  # the meta device takes the code paths of a GPU, at the real sizes, and allocates nothing
            more.append(memory.measured(traced(real, last, "meta")))
        except Exception:  # noqa: BLE001  it cannot run a condition on a tensor; the extrapolation can
            pass
    return dataclasses.replace(done, peak_bytes=max(f.peak_bytes for f in [done, *more]),
                               largest=max((f.largest for f in [done, *more]), key=lambda t: t[0]))
