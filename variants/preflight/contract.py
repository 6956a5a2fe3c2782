"""What a variant's methods take and give: the shapes, dtypes and promises that training and the evals rely on.

Shapes: B tokens, D = d_in, F = number of features.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from variants import base
from variants.kit.copying import duplicate
from variants.kit.trained import TrainedSAE
from variants.preflight.messages import (
    Variant,
    at,
    attempting,
    declared,
    defined,
    described,
    fail,
)
from variants.preflight.trial import Plan


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
            fail(v, defined(v, "update"),
                 f"update{signature} has the wrong arguments, it is called as update(self, step, activations)",
                 "write def update(self, step, activations):, and behind them batch if it needs contexts or attention; "
                 "what else it takes needs a default")
        if (getattr(trainer, "needs_contexts", False) or getattr(trainer, "attention_layers", ())) and not named:
            fail(v, defined(v, "update"),
                 f"{trainer.__name__} declares contexts or attention, and update{signature} cannot be given them",
                 "write def update(self, step, activations, batch):")
        return
    if v.module.SAE.loss is base.SAE.loss:
        fail(v, defined(v, "loss"), "the class SAE defines no loss",
             "write def loss(self, batch, progress): … return loss, {'term': tensor, …}; see variants/topk.py")
    for method, wanted in (("encode", "(self, x)"), ("loss", "(self, batch, progress)"), ("decode", "(self, z)"),
                           ("after_step", "(self, batch, progress)"), ("initialise", "(self, x_ND)"),
                           ("revive", "(self, optimizer, batch, progress)")):
        signature = inspect.signature(getattr(v.module.SAE, method))
        try:
            signature.bind(*[None] * len(wanted.split(",")))
        except TypeError:
            fail(v, defined(v, method),
                 f"{method}{signature} has the wrong arguments, it is called as {method}{wanted}",
                 f"write def {method}{wanted}:")


def check_needs(v: Variant, sae: base.SAE, batch_size: int, context: int | None, room: tuple[int, int]) -> None:
    """The contexts and layers a variant asks for exist: what cannot be given is refused, never a silent None."""
    offsets, threshold = sae.attention_layers, sae.attention_threshold
    whole = isinstance(offsets, (tuple, list)) and all(type(o) is int for o in offsets)
    if not whole or len(set(offsets)) < len(offsets):
        fail(v, declared(v, "attention_layers"),
             f"attention_layers = {offsets!r} is no tuple of different whole numbers",
             "write offsets from the SAE's own layer: attention_layers = (-1, 0)")
    beyond = [o for o in offsets if not -room[0] <= o <= room[1]]
    if beyond:
        fail(v, declared(v, "attention_layers"),
             f"attention_layers asks for layer {beyond[0]:+d} from the SAE's own, and the model has {room[0]} below "
             f"and {room[1]} above", "choose offsets inside, or other --layers")
    if threshold is not None and not offsets:
        fail(v, declared(v, "attention_threshold"), f"attention_threshold = {threshold!r} stands alone",
             "name the layers: attention_layers = (0,)")
    if threshold is not None and not 0 <= threshold < 1:
        fail(v, declared(v, "attention_threshold"),
             f"attention_threshold = {threshold!r} is no share of a token's attention",
             "give a number from 0 to below 1")
    if (sae.needs_contexts or offsets) and context and batch_size < context:
        fail(v, declared(v, "needs_contexts"), f"a batch of {batch_size} tokens holds no whole context of {context}",
             f"give --batch_size {context} or more, or a shorter --context")


def check_decoder(v: Variant, sae: base.SAE) -> None:
    with attempting(v, "reading the property decoder", line=defined(v, "decoder")):
        decoder = sae.decoder
    if not (isinstance(decoder, Tensor) and decoder.ndim == 2 and decoder.shape[1] == sae.d_in):
        fail(v, defined(v, "decoder"), f"decoder is {described(decoder)}, not [number of features, d_in = {sae.d_in}]",
             "rows are features: return W_dec of shape [d_sae, d_in], several decoders concatenated along dim 0")


@torch.no_grad()
def check_encode(v: Variant, sae: base.SAE, plan: Plan) -> Tensor:
    """encode on [B, D] gives a tensor [B, F], the same each time, and changes nothing; returns it."""
    probe, line = duplicate(sae).eval(), defined(v, "encode")
    with attempting(v, "in encode on [tokens, d_in]", plan.sizes):
        probe.encode(plan.x_BD)  # once before: what follows from the weights may be stale after a step
        probe.decoder  # noqa: B018
        state = {k: t.clone() for k, t in probe.state_dict().items()}
        z_BF = probe.encode(plan.x_BD)
    if not isinstance(z_BF, Tensor):
        fail(v, line, f"encode returned {described(z_BF)} instead of one tensor of features",
             "return z alone; what loss needs besides belongs into another method")
    width = len(probe.decoder)
    if z_BF.shape != (plan.sizes.B, width):
        x_BD = f"x [{plan.sizes.B}, {plan.sizes.D}]"
        fail(v, line, f"encode gave shape {list(z_BF.shape)} for {x_BD}; the decoder has {width} rows",
             "encode must return one number per decoder row: (..., d_in) -> (..., number of features)")
    if not z_BF.isfinite().all():
        fail(v, line, "encode gives NaN or infinity", "guard divisions, roots and logarithms of 0")
    with attempting(v, "in encode on [tokens, d_in]", plan.sizes):
        again_BF = probe.encode(plan.x_BD)
    changed = [k for k, t in probe.state_dict().items() if not torch.equal(t, state[k])]
    if changed:
        advice = "move the update into loss or after_step"
        if v.is_trainer:
            advice = "change it in update alone, or only while self.training"
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
        fail(v, defined(v, "encode"),
             f"encode gives other features for x {[*contexts, D]} than for the same tokens as {[B, D]}", advice)
    with attempting(v, "in decode on [tokens, features]", plan.sizes):
        x_hat_BD = probe.decode(z_BF)
    with attempting(v, f"in decode on [batch, context, features] = {list(z.shape)}; [tokens, features] works",
                    plan.sizes):
        x_hat = probe.decode(z)
    for shape, found in (((B, D), x_hat_BD), ((*contexts, D), x_hat)):
        if not isinstance(found, Tensor) or found.shape != shape:
            fail(v, defined(v, "decode"), f"decode gave {described(found)} where {list(shape)} was due", advice)
    if not matches(x_hat_BD, x_hat.reshape(B, D)):
        fail(v, defined(v, "decode"),
             "decode gives another reconstruction for [batch, context, features] than for [tokens, features]", advice)
    trained = TrainedSAE(probe, 1.0)
    with attempting(v, "in encode on bf16 activations", plan.sizes):
        bf16 = trained.encode(plan.x_BD.bfloat16())
    if not torch.equal(bf16, trained.encode(plan.x_BD.bfloat16().float())):
        fail(v, defined(v, "encode"),
             "encode gives other features for bf16 activations than for the same numbers in fp32",
             "compute in the dtype of the weights")
    notes = []
    if not matches(z_BF[: B // 4], probe.encode(plan.x_BD[: B // 4])):
        notes.append(f"{at(v, defined(v, 'encode'))}: a token's features depend on the other tokens passed with it, "
                     "and evals pass others")
    if not matches(x_hat_BD - probe.decode(torch.zeros_like(z_BF)), z_BF @ probe.decoder):
        notes.append(f"{at(v, defined(v, 'decode'))}: decode(z) is not z @ decoder plus a constant; evals that use "
                     "decoder rows see other directions")
    return notes


def check_scale(v: Variant, sae: base.SAE, plan: Plan) -> None:
    """On activations three times as large, a trained SAE's features are three times as large."""
    one, three = (TrainedSAE(duplicate(sae), scale) for scale in (1.0, 3.0))
    if not matches(3 * one.encode(plan.x_BD), three.encode(3 * plan.x_BD)):
        fail(v, defined(v, "encode"), "features do not scale with the normalisation",
             "encode must depend on x, the parameters and the buffers alone")


def matches(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; a few may differ, where it changes which of two near-equal features is kept."""
    return a.shape == b.shape and ((a - b).abs() > 1e-4 * a.abs().max().clamp_min(1e-12)).float().mean().item() < 5e-4
