"""The contract of a declarative SAE variant, and the mathematics that variants share.

A variant is a file `variants/<name>.py` that defines `class SAE(base.SAE)` with

    __init__(self, d_in, d_sae, k=40, ...)   keyword arguments = hyper-parameters (`--hyper k=64`)
    encode(self, x)                          (..., d_in) -> (..., d_sae), any leading dimensions
    loss(self, batch, progress)              -> (scalar, {"term": scalar tensor, ...})

and may override `decode`, `decoder`, `initialise`, `after_step`, `parameter_groups`, `report`, `feature_groups`.

Shapes: B tokens in a batch, D = d_in, F = d_sae, K features kept per token, N any number of rows.
x_BD is the normalised activation (E‖x‖² = 1 over the stream), z_BF features, x_hat_BD the reconstruction, e_BD = x −
x_hat. Reconstruction losses are summed over D and averaged over B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.kit import ranks

# ---------------------------------------------------------------------------------------------- what a variant receives


@dataclass(frozen=True)
class Progress:
    """Where training stands when a batch is drawn; `step` counts from 0, tokens are those already trained on."""

    step: int
    total_steps: int
    tokens: int
    total_tokens: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, from 0 to just below 1."""
        return self.step / self.total_steps

    def warmup(self, steps: int, share: float) -> float:
        """Linear ramp from 0 to 1 over `steps` optimiser steps, at most `share` of the run."""
        return min(self.step / max(1.0, min(steps, share * self.total_steps)), 1.0)

    def sparsity_warmup(self) -> float:
        """The factor sp(t) on sparsity penalties: 5000 steps, at most a tenth of the run."""
        return self.warmup(5000, 0.1)

    def lr_factor(self) -> float:
        """Learning-rate factor: 1000 steps of warm-up (at most 5 % of the run), linear decay over the last fifth."""
        up = min((self.step + 1) / max(1.0, min(1000, 0.05 * self.total_steps)), 1.0)
        return up * min((self.total_steps - self.step) / max(1.0, 0.2 * self.total_steps), 1.0)


class Batch:
    """One training batch: `x` [B, D], normalised, and what the variant declared it needs.

    needs_contexts: whole contexts in their order. tokens, positions [B] (BOS, at position 0, is left out), contexts [B]
    (number of the context within the batch, ascending).
    attention_layers: attention [C, A, T, T], mean over heads, query × key position, for the C contexts and A layers.
    With an attention_threshold instead pairs [2, P], (query, key) as indices into the batch, where one of the layers
    exceeds it, and pair_attention [P, A].
    """

    def __init__(self, x: Tensor, **given: Tensor):
        self.x = x
        self.__dict__.update(given)

    @classmethod
    def of(cls, fields: dict[str, Tensor], scale: float) -> Batch:
        """A batch of raw activations and what comes with them, x divided by `scale`."""
        return cls(**{**fields, "x": fields["x"] / scale})

    def __getattr__(self, name: str):  # reached only for what was not given: say so instead of handing out a None
        raise AttributeError(f"the batch has no {name!r}: only x is given unless the variant declares it needs more\n"
                             "declare needs_contexts = True (tokens, positions, contexts) or attention_layers = (-1, "
                             "0) (attention) in the variant's class")


@dataclass(frozen=True)
class Context:
    """What a variant's `report` may look at, after training."""

    lm: object  # evals.model.language_model.LanguageModel: tokenizer, d_model, …
    layer: int
    trained: TrainedSAE  # the SAE as evals see it: raw activations, unit decoder rows
    seed: int
    # about so many held-out tokens as one training batch, normalised, in whole contexts: with tokens, positions and
    # contexts always, and with attention where the variant declared it
    held_out: Callable[[int], Batch]


# ------------------------------------------------------------------------------------------------ the base class


class SAE(nn.Module):
    """Base of every variant: tied unit-norm initialisation, linear decoder, declared training recipe, dead-feature
    counters.

    Parameters: W_enc [D, F], b_enc [F], W_dec [F, D] (rows are features), b_dec [D]. Override what the paper changes.
    """

    unit_norm_decoder = False  # project the decoder's gradient, renormalise its rows after each step
    grad_clip: float | None = None  # maximal global gradient norm
    adam_betas = (0.9, 0.999)
    default_lr = 3e-4  # learning rate where neither the user nor the profile sets one; may be a property of the widths
    needs_contexts = False  # batches of whole, ordered contexts with tokens and positions
    # attention patterns of these layers, relative to the SAE's own; implies needs_contexts
    attention_layers: tuple[int, ...] = ()
    attention_threshold: float | None = None  # only the pairs above it, as a list, instead of dense patterns
    # under torchrun: share every batch among the ranks. For losses that are means over tokens, or use ranks.mean and
    # the functions below for what is not; else one rank trains, and the others run the language model only
    data_parallel = False
    no_gradient: tuple[str, ...] = ()  # parameters and loss terms that are meant to have no gradient
    saelens: str | None = None  # SAELens architecture that computes the same features, if there is one
    batch_parts = 1  # in which a batch is worked on: more, where it did not fit the memory
    dead_on_host: int | None = None  # dead features as last counted by `look`; None: not counted
    centred = True  # the encoder takes x − b_dec (SAELens' apply_b_dec_to_input)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # not inherited
        cls.data_parallel = cls.__dict__.get("data_parallel",
                                             False) and not (cls.needs_contexts or cls.attention_layers)

    def __init__(self, d_in: int, d_sae: int, decoder_norm: float = 1.0):
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        W_dec_FD = decoder_norm * F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec = nn.Parameter(W_dec_FD)
        self.W_enc = nn.Parameter(W_dec_FD.T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        # int64: a feature's age in tokens passes 2**31 in long runs
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self._fired_F: Tensor | None = None

    # -- the model

    def pre_activations(self, x: Tensor) -> Tensor:
        """(x − b_dec)·W_enc + b_enc, shape (..., F), in the parameters' precision under autocast too."""
        return affine(x, self.W_enc, self.b_enc, self.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., F) of activations (..., D)."""
        return F.relu(self.pre_activations(x))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction (..., D) of features (..., F)."""
        return z @ self.W_dec + self.b_dec

    def decode_relu(self, z_BF: Tensor) -> Tensor:
        """`decode` in the loss of a variant with z = ReLU(…):
        cheap where few are positive, z's gradient is 0 where z is.
        """
        if type(self).decode is not SAE.decode:
            return self.decode(z_BF)
        return relu_product(z_BF, self.W_dec) + self.b_dec

    def loss(self, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of one batch and its named terms, all scalar tensors."""
        raise TypeError(f"{type(self).__module__}: the class SAE defines no loss(self, batch, progress)\n"
                        "return (scalar loss, {'term': tensor, ...})")

    @property
    def decoder(self) -> Tensor:
        """The linear decoder as evals see it, [number of features, D]."""
        return self.W_dec

    # -- hooks a variant may override

    def initialise(self, x_ND: Tensor) -> None:
        """Called once before training with normalised activations of the first block."""
        begin_at_dominant_mean(self, x_ND)

    def after_step(self, batch: Batch, progress: Progress) -> None:
        """Called after each optimiser step, without gradient."""

    def parameter_groups(self, lr: float) -> list[dict]:
        """Adam's parameter groups."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def lr_scale(self, progress: Progress) -> float:
        """Factor on the learning rate, besides the schedule's."""
        return 1.0

    def report(self, context: Context) -> tuple[dict[str, float], dict[str, bytes | str]]:
        """Own measurements ({name: number}, into final_info as `variant.<name>`) and files for the run's folder ({name:
        content}).

        Pictures (.png, .svg) among the files are shown in report.html.
        """
        return {}, {}

    def feature_groups(self) -> list[list[int]] | None:
        """Groups of features that belong together (used by unlearning), or None."""
        return None

    def holder_of(self, name: str):
        """What holds an entry of the state dict that is no parameter or buffer;
        only trainers have such (variants/kit/imperative.py).
        """
        return None

    # -- dead features

    def note_fired(self, z_BF: Tensor) -> None:
        """Remember which features this batch fired; the counters move once per step, in `count_step`."""
        self._note((z_BF.detach() > 0).flatten(0, -2).any(0))

    def note_fired_indices(self, z_BK: Tensor, index_BK: Tensor) -> None:
        """The same for the sparse form: kept values and their feature numbers."""
        fired_F = torch.zeros(self.d_sae, device=z_BK.device, dtype=z_BK.dtype)
        # amax over the kept values has no data-dependent shape, so nothing waits for the device
        fired_F.scatter_reduce_(0, index_BK.flatten(), z_BK.detach().flatten(), "amax")
        self._note(fired_F > 0)

    def _note(self, fired_F: Tensor) -> None:
        self._fired_F = fired_F if self.batch_parts == 1 or self._fired_F is None else self._fired_F | fired_F

    @torch.no_grad()
    def count_step(self, tokens: int) -> None:
        """Age every feature by a batch and reset those that fired; called by the trainer once per step."""
        if self._fired_F is not None:
            self.tokens_since_fired += tokens * ranks.sharing()
            self.tokens_since_fired.masked_fill_(ranks.any_of(self._fired_F), 0)
            self._fired_F = None

    def dead_features(self, progress: Progress) -> Tensor:
        """Mask [F] of features silent for 10 M tokens, or for a tenth of a run shorter than 100 M (VARIANTS, auxk)."""
        return self.tokens_since_fired >= min(10_000_000, progress.total_tokens // 10)

    def look(self, progress: Progress) -> None:
        """Count the dead features of a GPU on the host, every now and then and outside of a step:
        it waits for the device.
        """
        if self.tokens_since_fired.is_cuda:
            self.dead_on_host = int(self.dead_features(progress).sum())


def gradients(sae: SAE, batch: Batch, progress: Progress,
              say: Callable[[str], None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms of a batch, without graph, and the gradients in .grad; in parts from where the memory of a GPU is
    too small on.

    The mean over equal parts is exact for a loss that is a mean over tokens; what is chosen over a batch is then chosen
    over each part. torch.OutOfMemoryError where a variant is not `data_parallel`, or ranks share the batch: one cannot
    part it alone.
    """
    # whole since it was last measured: its parameters, and what zero_grad clears, would be others
    if ranks.is_sharded(sae):
        sae.reshard()
    while True:
        sae.zero_grad(set_to_none=True)
        try:
            return _accumulated(sae, batch, progress)
        except torch.OutOfMemoryError:
            if not sae.data_parallel or ranks.sharing() > 1 or 2 * sae.batch_parts > len(batch.x):
                raise
        # here, where the traceback no longer holds the tensors of the attempt
        sae.batch_parts *= 2
        sae._fired_F = None
        if batch.x.is_cuda:
            torch.cuda.empty_cache()
        say(f"out of GPU memory: going on with each batch in {sae.batch_parts} parts of "
            f"{len(batch.x) // sae.batch_parts} tokens")


def _accumulated(sae: SAE, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
    found = []
    for part in [batch] if sae.batch_parts == 1 else [Batch(x_BD) for x_BD in batch.x.chunk(sae.batch_parts)]:
        with torch.autocast("cuda", torch.bfloat16, enabled=batch.x.is_cuda):
            loss, terms = sae.loss(part, progress)
        if sae.batch_parts > 1:
            share = len(part.x) / len(batch.x)
            loss, terms = loss * share, {name: term * share for name, term in terms.items()}
        loss.backward()
        found.append((loss.detach(), {name: term.detach() for name, term in terms.items()}))
    if len(found) == 1:
        return found[0]
    return sum(loss for loss, _ in found), {name: sum(terms[name] for _, terms in found) for name in found[0][1]}


# ------------------------------------------------------------------------------------------------ shared mathematics


def reconstruction_loss(e_BD: Tensor) -> Tensor:
    """‖e‖²: summed over D, averaged over B, in fp32."""
    return e_BD.to(torch.promote_types(e_BD.dtype, torch.float32)).pow(2).sum(-1).mean()


def affine(x: Tensor, W_DF: Tensor, b_F: Tensor | float = 0.0, centre_D: Tensor | None = None,
           fine: bool = False) -> Tensor:
    """(x − centre)·W + b, shape (..., F), in W's dtype: thresholds, counts and choices are decided on it.

    Under autocast the product's factors are rounded as in any other, its result and the biases are not. For bf16, x and
    columns of norm 1: an error of .002/√D instead of .001·z. `fine`: 4e-6/√D for three times the product's work, where
    a difference of .001 counts.
    The bias is folded first, which saves the product for the centre's gradient.
    """
    kind = x.device.type
    if W_DF.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return _RoundedFactors.apply(x, W_DF, b_F, centre_D, fine, torch.get_autocast_dtype(kind))
    return F.linear(x.to(W_DF.dtype), W_DF.T, b_F if centre_D is None else b_F - centre_D @ W_DF)


class _RoundedFactors(torch.autograd.Function):
    """`affine` in fp32 with its factors, and those of its gradients, in a lower precision."""

    @staticmethod
    def forward(ctx, x, W_DF, b_F, centre_D, fine, dtype):
        with torch.autocast(x.device.type, enabled=False):
            x_ND = x.reshape(-1, len(W_DF))
            x_high_ND, W_high_DF = x_ND.to(dtype), W_DF.to(dtype)
            if fine:  # x·W = high·high + low·high + high·low, but for the product of what both lose in rounding
                x_low_ND, W_low_DF = (x_ND - x_high_ND).to(dtype), (W_DF - W_high_DF).to(dtype)
                parts_NK = torch.cat([x_high_ND, x_low_ND, x_high_ND], 1)
                z_NF = _product(parts_NK, torch.cat([W_high_DF, W_high_DF, W_low_DF]))
            else:
                z_NF = _product(x_high_ND, W_high_DF)
            z_NF += b_F if centre_D is None else b_F - centre_D @ W_DF
        ctx.save_for_backward(x, W_DF, centre_D)
        ctx.dtype = dtype
        return z_NF.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, W_DF, centre_D = ctx.saved_tensors
        grad_NF = grad.reshape(-1, W_DF.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            d_b_F, low_NF = grad_NF.sum(0), grad_NF.to(ctx.dtype)
            from_centre = x if centre_D is None else x - centre_D
            d_W_DF = _product(from_centre.reshape(-1, len(W_DF)).to(ctx.dtype).T, low_NF)
            d_centre_D = None if centre_D is None else -(W_DF @ d_b_F)
            d_x = _product(low_NF, W_DF.to(ctx.dtype).T).view_as(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        return d_x, d_W_DF, d_b_F if ctx.needs_input_grad[2] else None, d_centre_D, None, None


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a·b [M, N] in fp32 of factors in a lower precision."""
    if _multiplies_into_fp32(a_MK.device, a_MK.dtype):
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()  # the same numbers but for the order of the sums


@functools.cache
def _multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one product does so, at the speed of `dtype`: CUDA from torch 2.8 on. Tried once."""
    try:
        torch.mm(*torch.ones(2, 16, 16, device=device, dtype=dtype), out_dtype=torch.float32)
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return True


def _bags(index_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns [B·K] and beginnings of the rows [B] of a list that has K entries a row."""
    B, K = index_BK.shape
    row_n = torch.arange(B, device=index_BK.device)[:, None].expand(B, K).flatten()
    return row_n, index_BK.flatten(), torch.arange(0, B * K, K, device=index_BK.device)


def _sum_by_column(z_n: Tensor, row_n: Tensor, column_n: Tensor, x_BN: Tensor, columns: int) -> Tensor:
    """Zᵀ·x [columns, N] for the sparse Z of the entries z at (row, column):
    each column's rows of x, in their order, one sum.
    """
    column_n, order_n = column_n.sort(stable=True)
    begin_C = torch.searchsorted(column_n, torch.arange(columns, device=column_n.device))
    return F.embedding_bag(row_n[order_n], x_BN, begin_C, per_sample_weights=z_n[order_n].to(x_BN.dtype), mode="sum")


class _SparseProduct(torch.autograd.Function):
    """Z·W [B, N] for the sparse Z of the entries z [n] at (row, column), rows ascending;
    and its gradients along these entries.
    """

    @staticmethod
    def forward(ctx, z_n, W_FN, row_n, column_n, begin_B):
        with torch.enable_grad():
            ctx.z_n = z_n.detach().to(W_FN.dtype).requires_grad_()
            ctx.product_BN = F.embedding_bag(column_n, W_FN.detach(), begin_B, per_sample_weights=ctx.z_n, mode="sum")
        ctx.save_for_backward(row_n, column_n)
        ctx.features = len(W_FN)
        return ctx.product_BN.detach()

    @staticmethod
    def backward(ctx, grad_BN):
        (d_z_n,) = torch.autograd.grad(ctx.product_BN, ctx.z_n, grad_BN, retain_graph=True)  # a caller may come twice
        d_W_FN = _sum_by_column(ctx.z_n.detach(), *ctx.saved_tensors, grad_BN,
                                ctx.features) if ctx.needs_input_grad[1] else None
        return d_z_n, d_W_FN, None, None, None


class _KeptActivations(torch.autograd.Function):
    """acts_BF at index_BK, differentiable in the parameters along the kept entries alone:
    K/F of the dense gradient's work.
    """

    @staticmethod
    def forward(ctx, x_BD, W_enc_DF, b_enc_F, b_dec_D, acts_BF, index_BK):
        kept_BK = acts_BF.gather(1, index_BK)
        ctx.save_for_backward(x_BD, W_enc_DF, b_dec_D, index_BK, kept_BK > 0)
        return kept_BK

    @staticmethod
    def backward(ctx, grad_BK):
        x_BD, W_enc_DF, b_dec_D, index_BK, positive_BK = ctx.saved_tensors
        grad_BK = (grad_BK * positive_BK).to(W_enc_DF.dtype)  # ReLU
        row_n, column_n, _ = _bags(index_BK)
        d_bias_F = grad_BK.new_zeros(W_enc_DF.shape[1]).index_add_(0, column_n, grad_BK.flatten())
        # dW_encᵀ[f] = Σ over kept (b, k) of feature f of grad·(x[b] − b_dec)
        d_W_FD = _sum_by_column(grad_BK.flatten(), row_n, column_n, x_BD - b_dec_D, W_enc_DF.shape[1])
        d_x_BD = decode_sparse(grad_BK, index_BK, W_enc_DF.T) if ctx.needs_input_grad[0] else None
        return d_x_BD, d_W_FD.T, d_bias_F, -(W_enc_DF @ d_bias_F), None, None


def sparse_pays(device: torch.device, k: int, d_sae: int) -> bool:
    """Whether k features of d_sae are better handled row by row than by dense products.

    Measured on 2 cores, D = 576, B = 1024, ratio of step times sparse/dense (tests/benchmarks/sparse.py): F = 2304 .41
    (k = 16), .58 (64), .70 (128), 1.07 (256); F = 16,384 .33 (k = 16), .47 (256). On a GPU by bytes and FLOP,
    unmeasured: four products of 2·D·F at 550 TFLOP/s take as long as reading four times k rows of D fp32 numbers at 1.7
    TB/s from F = 650·k on.
    """
    return (device.type == "cpu" and 12 * k <= d_sae) or (device.type == "cuda" and 1024 * k <= d_sae)


def dense_activations(sae: SAE, x_BD: Tensor, k: int) -> Tensor:
    """ReLU(z_pre) [B, F], to choose k features a token from; where that is sparse without a graph:
    `kept_activations` has its own.
    """
    if sparse_pays(x_BD.device, k, sae.d_sae):
        with torch.no_grad():
            return sae.pre_activations(x_BD).relu_()
    return F.relu(sae.pre_activations(x_BD))


def kept_activations(sae: SAE, x_BD: Tensor, acts_BF: Tensor, index_BK: Tensor) -> Tensor:
    """The activations chosen by index_BK, [B, K],
    with the gradient of ReLU((x − b_dec)·W_enc + b_enc) at those entries.
    """
    if not acts_BF.requires_grad:
        return _KeptActivations.apply(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, acts_BF, index_BK)
    return acts_BF.gather(1, index_BK)


def auxk_loss(sae: SAE, x_BD: Tensor, e_BD: Tensor, acts_BF: Tensor, dead_F: Tensor) -> Tensor:
    """Auxiliary loss that revives dead features (Gao et al. 2024, appendix A.2).

    The D/2 largest activations *before* top-k among the dead reconstruct the residual e; the error is divided by e's
    variance. Ranking after top-k instead, where dead features are exactly 0, leaves the term without any gradient.
    Where up to a quarter of the features are dead, only their columns are worked on. A GPU is not asked how many that
    are: as many as last counted (`look`), rounded up to a power of two; should more have died since, the longest
    silent.
    """
    k_aux = min(sae.d_in // 2, sae.d_sae)
    count = int(dead_F.sum()) if dead_F.device.type == "cpu" else sae.dead_on_host
    if count == 0:
        return e_BD.new_zeros(())
    if dead_F.device.type != "cpu":
        count = sae.d_sae if count is None else max(k_aux, 1 << (count - 1).bit_length())
    if 4 * count > sae.d_sae:
        if not (acts_BF.requires_grad or sparse_pays(acts_BF.device, k_aux, sae.d_sae)):
            acts_BF = F.relu(sae.pre_activations(x_BD))  # with the graph that few features went without
        index_BK = acts_BF.detach().masked_fill(~dead_F, -1.0).topk(k_aux, dim=-1, sorted=False).indices
        # fewer dead features than k_aux: the rest is 0
        z_BK = kept_activations(sae, x_BD, acts_BF, index_BK) * dead_F[index_BK]
        return _of_variance(e_BD, decode_sparse(z_BK, index_BK, sae.W_dec)) * dead_F.any()
    index_C = torch.where(dead_F, sae.tokens_since_fired, -1).topk(count, sorted=False).indices
    if acts_BF.requires_grad:
        acts_BC = acts_BF.index_select(1, index_C)
    else:
        W_DC = sae.W_enc.index_select(1, index_C)
        acts_BC = F.relu(affine(x_BD, W_DC, sae.b_enc[index_C], sae.b_dec))
    z_BC = acts_BC * dead_F[index_C]
    if count > k_aux:
        kept_BK = z_BC.detach().topk(k_aux, sorted=False).indices
        z_BC = z_BC * torch.zeros_like(z_BC, dtype=torch.bool).scatter_(1, kept_BK, True)
    return _of_variance(e_BD, z_BC @ sae.W_dec.index_select(0, index_C).to(z_BC.dtype)) * dead_F.any()


def _of_variance(e_BD: Tensor, found_BD: Tensor) -> Tensor:
    """Squared error of what was found of the residual e, over e's variance: the share that stays unexplained.

    0, without gradient, where less than a thousandth of ‖e‖², or a millionth of E‖x‖² = 1, differs from token to token
    (one token, equal tokens, nothing left over): there is nothing that a feature could explain, as a constant is
    b_dec's, and the share is 0/0.
    """
    target_BD = e_BD.detach()
    error = reconstruction_loss(target_BD - found_BD)
    mean_D = ranks.mean(target_BD.mean(0))
    variance = ranks.mean((target_BD - mean_D).pow(2).sum(-1).mean())
    least = 1e-3 * (variance + mean_D.pow(2).sum()).clamp_min(1e-3)
    return error / torch.where(variance > least, variance, torch.inf)


def decode_sparse(z_BK: Tensor, index_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Σ_k z[b,k]·W_dec[index[b,k]], shape [B, D].

    `embedding_bag` reads only the rows used, where that pays.
    """
    if sparse_pays(z_BK.device, z_BK.shape[1], len(W_dec_FD)):
        return _SparseProduct.apply(z_BK.flatten(), W_dec_FD, *_bags(index_BK))
    z_BF = torch.zeros(z_BK.shape[0], W_dec_FD.shape[0], device=z_BK.device, dtype=z_BK.dtype)
    return z_BF.scatter(1, index_BK, z_BK) @ W_dec_FD


def few_positive(z_BF: Tensor) -> bool:
    """Whether z·W is better computed from the positive entries of z alone.

    Measured on 2 cores, D = 576, B = 1024, product and gradients, sparse/dense: F = 2304 .41 with 32 positive entries a
    row, .69 with 64, 1.09 with 128; F = 16,384 .42 with 64, .62 with 256, .90 with 512. A GPU has to be waited for to
    know, which only the long steps of a wide SAE can spare.
    """
    B, n_features, on_cpu = *z_BF.shape, z_BF.device.type == "cpu"
    if not on_cpu and not (z_BF.is_cuda and n_features >= 2**16):
        return False
    return sparse_pays(z_BF.device, (3 if on_cpu else 1) * int(z_BF.count_nonzero()) // B, n_features)


class _Positive(torch.autograd.Function):
    """The entries of z_BF at (row, column), [n]; the gradient of all others is 0, and each is listed once."""

    @staticmethod
    def forward(ctx, z_BF, row_n, column_n):
        ctx.save_for_backward(row_n, column_n)
        ctx.shape = z_BF.shape
        return z_BF[row_n, column_n]

    @staticmethod
    def backward(ctx, grad_n):
        return grad_n.new_zeros(ctx.shape).index_put_(ctx.saved_tensors, grad_n), None, None


def relu_product(z_BF: Tensor, W_FN: Tensor) -> Tensor:
    """z·W [B, N] for z = ReLU(…), cheap where few entries are positive;
    z's gradient is 0 where z is, as ReLU passes none there.
    """
    if not few_positive(z_BF):
        return z_BF @ W_FN
    row_n, column_n = z_BF.detach().nonzero(as_tuple=True)
    begin_B = torch.searchsorted(row_n, torch.arange(len(z_BF), device=z_BF.device))
    return _SparseProduct.apply(_Positive.apply(z_BF, row_n, column_n), W_FN, row_n, column_n, begin_B)


def geometric_median(x_ND: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weiszfeld's algorithm for the point with the smallest mean distance to the rows of x, shape [D]."""
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(iterations):
        weight_N = 1.0 / (x_ND - median_D).norm(dim=1).clamp_min(1e-12)
        new_D = (weight_N[:, None] * x_ND).sum(0) / weight_N.sum()
        moved, median_D = (new_D - median_D).norm(), new_D
        if moved < tolerance * median_D.norm():
            break
    return median_D.float()


# share of E‖x‖² in the mean from which on what is made for E‖x‖² = 1 costs features (variants/README.md)
DOMINANT = 0.75


def stream_scale(x_ND: Tensor) -> tuple[float, float]:
    """√E‖x‖² of raw activations [N, D], of which ranks may each hold a part, and the share that their mean holds, in
    fp64.

    Where the mean dominates, the scale is that of what is left to explain: √E‖x − mean‖².
    """
    sum_D, square = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64), 0.0
    for part in x_ND.split(2**13):
        sum_D += part.double().sum(0)
        square += part.double().pow(2).sum().item()
    n = ranks.total(len(x_ND))
    square = ranks.total(square) / n
    mean_square = (ranks.mean(sum_D) * ranks.sharing() / n).pow(2).sum().item()
    if mean_square > DOMINANT * square:
        return max(square - mean_square, 1e-12 * square) ** 0.5, mean_square / square
    return square**0.5, mean_square / max(square, 1e-300)


@torch.no_grad()
def begin_at_dominant_mean(sae: SAE, x_ND: Tensor) -> None:
    """Where the mean dominates: b_dec = geometric median, and an encoder of x begins as one of x − b_dec.
    Else nothing.
    """
    share = float(x_ND.double().mean(0).pow(2).sum() / x_ND.double().pow(2).sum(1).mean())
    own = dict(sae.named_parameters(recurse=False))
    if not share > DOMINANT or "b_dec" not in own:
        return
    own["b_dec"].copy_(geometric_median(x_ND))
    if not sae.centred and "b_enc" in own:
        own["b_enc"].sub_(own["b_dec"] @ own["W_enc"])


def fused(function: Callable[..., None]) -> Callable[..., None]:
    """A function of tensors as one compiled kernel on a GPU, where its temporaries would cost more than its work;
    else as it is.
    """
    compiled = function

    def call(*tensors: Tensor) -> None:
        nonlocal compiled
        if compiled is None or not tensors[0].is_cuda or hasattr(tensors[0], "full_tensor"):
            function(*tensors)
            return
        try:
            # here: it imports for a second
            compiled = torch.compile(function, dynamic=False) if compiled is function else compiled
            compiled(*tensors)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:  # noqa: BLE001  no compiler, no Triton: slower, and the same
            print(f"{function.__name__} is not compiled ({type(error).__name__}): going on without", flush=True)
            compiled = None
            function(*tensors)

    return call


@fused
def _project(grad_FD: Tensor, W_FD: Tensor) -> None:
    row_FD = F.normalize(W_FD, dim=1)
    grad_FD -= (grad_FD * row_FD).sum(1, keepdim=True) * row_FD


@fused
def _normalise(W_FD: Tensor) -> None:
    W_FD /= W_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def project_decoder_gradient(W_dec_FD: nn.Parameter) -> None:
    """Remove from each decoder row's gradient its part along the row (rows are features: axis 1, not 0)."""
    if W_dec_FD.grad is not None:
        _project(W_dec_FD.grad, W_dec_FD)


@torch.no_grad()
def normalise_decoder(W_dec_FD: nn.Parameter) -> None:
    """Give each decoder row unit norm, in place."""
    _normalise(W_dec_FD)


@torch.no_grad()
def update_theta(theta: Tensor, kept: Tensor, progress: Progress, decay: float | None = None) -> None:
    """Moving average of the smallest positive activation a batch kept (0-d tensors), after 1000 steps or 5 % of the
    run.

    Starts at the first value seen and not at 0, so that a short run's threshold is not biased low. `decay`:
    `theta_decay` if None.
    """
    decay = theta_decay(progress) if decay is None else decay
    if progress.step >= min(1000, 0.05 * progress.total_steps):
        smallest = ranks.smallest(torch.where(kept > 0, kept, torch.inf).amin().to(theta.dtype))
        new = torch.where(theta < 0, smallest, theta.lerp(smallest, 1 - decay))
        theta.copy_(torch.where(smallest.isfinite(), new, theta))


# --------------------------------------------------------------------------------------- a trained SAE, as evals see it


class TrainedSAE(nn.Module):
    """A trained variant that takes *raw* activations and has unit-norm decoder rows, whatever its own scales are.

    encode: (..., D) any float dtype -> (..., F) fp32, without gradient; decode: (..., F) -> (..., D) fp32,
    differentiable in z. `scale` is the factor by which the training activations were divided; features are multiplied
    by it and by their decoder row's norm.
    """

    def __init__(self, sae: SAE, scale: float):
        super().__init__()
        self.sae = sae.eval().requires_grad_(False)
        self.register_buffer("scale", torch.tensor(float(scale)))
        norm_F = sae.decoder.detach().float().norm(dim=1)
        # a row of zeros stays as it is: dividing by its norm would make NaN of a dead feature
        self.register_buffer("gain_F", scale * torch.where(norm_F > 0, norm_F, torch.ones_like(norm_F)))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x.to(self.gain_F) / self.scale).float() * self.gain_F

    def decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z.to(self.gain_F) / self.gain_F).float() * self.scale

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows of unit norm, [F, D]."""
        return self.sae.decoder.detach().float() * (self.scale / self.gain_F)[:, None]

    @property
    def W_enc(self) -> Tensor | None:
        """Encoder [D, F] on raw activations where the variant has one of that shape, else None."""
        W = getattr(self.sae, "W_enc", None)
        ok = W is not None and W.shape == (self.sae.d_in, len(self.gain_F))
        return W.detach().float() * (self.gain_F / self.scale) if ok else None

    @property
    def b_enc(self) -> Tensor | None:
        """Encoder bias [F] in raw units where the variant has one, else None."""
        b = getattr(self.sae, "b_enc", None)
        return b.detach().float() * self.gain_F if b is not None and b.shape == self.gain_F.shape else None


# ------------------------------------------------------------------------------------------------ top-k over a batch


def feature_count(name: str, value, d_sae: int, mean: bool = False) -> float:
    """A hyper-parameter that counts the features kept of each token, or as a `mean`: then it may be a fraction.
    ValueError.
    """
    whole = type(value) in (int, float) and 0 < value <= d_sae and value == int(value)
    fraction = type(value) is float and 0 < value <= d_sae
    if not (whole or (mean and fraction)):
        each = "kept of each token must be a whole number from 1 to"
        meant = "kept on average must be a number above 0, at most" if mean else each
        advice = "" if mean else "; batch_topk takes a fraction, as a mean over tokens"
        raise ValueError(f"--hyper {name} = {value!r}: the features {meant} d_sae = {d_sae}\n"
                         f"give for example --hyper {name}={max(1, d_sae // 64)}{advice}")
    return int(value) if whole else value


def batch_topk(acts_BF: Tensor, k: float) -> Tensor:
    """Mask [B, F] of exactly k·B entries, rounded: the largest of the batch, of which each rank may hold a share."""
    flat, n = acts_BF.detach().flatten(), max(1, round(k * len(acts_BF) * ranks.sharing()))
    if ranks.sharing() > 1:
        mine = flat.topk(min(n, len(flat)), sorted=False)
        values = ranks.gathered(mine.values)  # bf16 has many equal ones: chosen by index, as in one process
        chosen = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(n, sorted=False).indices, True)
        own = chosen.view(ranks.sharing(), -1)[ranks.number()]
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, mine.indices, own).view_as(acts_BF)
    index = _largest_on_cpu(flat, n) if flat.device.type == "cpu" else flat.topk(n, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, index, True).view_as(acts_BF)


def _largest_on_cpu(flat: Tensor, n: int) -> Tensor:
    """Indices of the n largest; only what exceeds a bound taken from every 17th entry is ranked
    (a sixth of topk's time).
    """
    sample = flat[::17]
    bound = sample.topk(min(len(sample), n * 5 // (17 * 4) + 1), sorted=False).values.min()
    candidates = (flat > bound).nonzero().squeeze(1)
    if len(candidates) < n:  # the sample was not typical
        return flat.topk(n, sorted=False).indices
    return candidates[flat[candidates].topk(n, sorted=False).indices]


def above_theta(acts: Tensor, theta: Tensor, k: float) -> Tensor:
    """Features (..., F) of single tokens: z·1[z > theta];
    each token's k largest, rounded, while there is no theta (< 0).
    """
    if theta < 0:
        top, index = acts.topk(max(1, round(k)), dim=-1, sorted=False)
        return torch.zeros_like(acts).scatter(-1, index, top)
    return acts * (acts > theta)


def saelens_of(theta: Tensor, k: float) -> str | None:
    """SAELens' architecture for `above_theta`: JumpReLU;
    in a run too short for a theta, TopK if k is a whole number.
    """
    if theta >= 0:
        return "jumprelu"
    return "topk" if k == int(k) else None


def theta_decay(progress: Progress) -> float:
    """Decay of theta's moving average: .999, or a window of a twentieth of a run shorter than 20,000 steps."""
    return 1 - 1 / max(1.0, min(1000, 0.05 * progress.total_steps))
