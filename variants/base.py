"""The contract of a declarative SAE variant, and the mathematics that variants share.

A variant is a file `variants/<name>.py` that defines `class SAE(base.SAE)` with

    __init__(self, d_in, d_sae, k=40, ...)   keyword arguments = hyper-parameters (`--hyper k=64`)
    encode(self, x)                          (..., d_in) -> (..., d_sae), any leading dimensions
    loss(self, batch, progress)              -> (scalar, {"term": scalar tensor, ...})

and may override `decode`, `decoder`, `initialise`, `after_step`, `revive`, `parameter_groups`, `lr_scale`, `report`,
`feature_groups`. The loss calls `self.note_fired(z_BF)`, or `self.note_fired_indices(z_BK, index_BK)`, once a batch:
without it the variant has no dead-feature counters, and no feature ever counts as dead.
What the program does with an SAE besides lies in variants/kit/.

Shapes: B tokens in a batch, D = d_in, F = d_sae, K features kept per token, N any number of rows.
x_BD is the normalised activation (E‖x‖² = 1 over the stream), z_BF features, x_hat_BD the reconstruction,
e_BD = x − x_hat, acts_BF activations that features are chosen from, index_BK the numbers of a token's kept features.
Reconstruction losses are summed over D and averaged over B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.kit import ranks
from variants.kit.decoder import normalise_decoder, project_decoder_gradient
from variants.kit.losses import auxk_loss, reconstruction_loss
from variants.kit.precision import affine
from variants.kit.scale import begin_at_dominant_mean, geometric_median
from variants.kit.sparse import (
    decode_sparse,
    dense_activations,
    few_positive,
    kept_activations,
    relu_product,
    sparse_pays,
)
from variants.kit.topk import above_theta, batch_topk, feature_count, saelens_of, theta_decay, top_k, update_theta

# what a variant's author calls as base.<name>: the call and what it gives; where it lies, in kit/, more is said
__all__ = [
    "SAE", "Batch", "Context", "Progress",
    "reconstruction_loss",  # (e_BD) -> scalar: ‖e‖², summed over D, averaged over B
    "auxk_loss",  # (sae, x_BD, e_BD, acts_BF, dead_F) -> scalar: revives the features of the mask dead_F [F]
    "affine",  # (x, W_DF, b_F=0, centre_D=None) -> (x − centre)·W + b, shape (..., F), in W's dtype under autocast too
    "dense_activations",  # (sae, x_BD, k) -> ReLU(z_pre) [B, F] to choose k a token from; no graph, as a rule
    "kept_activations",  # (sae, x_BD, acts_BF, index_BK) -> [B, K]: the activations at index_BK, with their gradient
    "decode_sparse",  # (z_BK, index_BK, W_dec_FD) -> [B, D]: Σ_k z[b, k]·W_dec[index[b, k]], b_dec not added
    "relu_product",  # (z_BF, W_FN) -> z·W [B, N] for z = ReLU(…): cheap where few are positive
    "few_positive",  # (z_BF) -> bool: whether so few of z are positive that relu_product reads these alone
    "sparse_pays",  # (device, k, d_sae) -> bool: whether k features of d_sae are better handled row by row
    "feature_count",  # (name, value, d_sae, mean=False, most="d_sae") -> k: whole, or a mean's fraction; or ValueError
    "top_k",  # (acts_BF, k) -> index_BK: the k largest of each token, in no order, without gradient
    "batch_topk",  # (acts_BF, k) -> mask [B, F] of the k·B largest of the batch, rounded
    "above_theta",  # (acts, theta, k) -> (..., F): z·1[z > theta], the k largest of a token while theta < 0
    "saelens_of",  # (theta, k) -> "jumprelu", "topk" or None: what SAELens calls above_theta
    "update_theta",  # (theta, kept, progress, decay=None): theta follows the smallest positive entry of kept, in place
    "theta_decay",  # (progress, steps=1000) -> float: a moving average's decay, update_theta's where none is given
    "geometric_median",  # (x_ND) -> [D]: the point with the smallest mean distance to the rows
    "normalise_decoder",  # (W_dec_FD): gives each row unit norm, in place
    "project_decoder_gradient",  # (W_dec_FD): removes from each row's gradient its part along the row, in place
]

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
    attention_threshold: instead pairs [2, P], (query, key) as indices into the batch, where one of the layers exceeds
    it, and pair_attention [P, A].
    """

    def __init__(self, x: Tensor, **given: Tensor):
        self.x = x
        self.__dict__.update(given)

    def __getattr__(self, name: str):  # reached only for what was not given: say so instead of handing out a None
        raise AttributeError(f"the batch has no {name!r}: only x is given unless the variant declares it needs more\n"
                             "declare needs_contexts = True (tokens, positions, contexts) or "
                             "attention_layers = (-1, 0) (attention) in the variant's class")

    # -- used by the program, not by variants

    @classmethod
    def of(cls, fields: dict[str, Tensor], scale: float) -> Batch:
        """A batch of raw activations and what comes with them, x divided by `scale`."""
        return cls(**{**fields, "x": fields["x"] / scale})


@dataclass(frozen=True)
class Context:
    """What a variant's `report` may look at, after training."""

    lm: object  # evals.model.language_model.LanguageModel: tokenizer, d_model, …
    layer: int
    trained: nn.Module  # variants.kit.trained.TrainedSAE, the SAE as evals see it: raw activations, unit decoder rows
    seed: int
    # held_out(n): about n held-out tokens as one training batch, normalised, in whole contexts; with tokens, positions
    # and contexts always, with attention where the variant declared it
    held_out: Callable[[int], Batch]


# ------------------------------------------------------------------------------------------------ the base class


class SAE(nn.Module):
    """Base of every variant: tied unit-norm initialisation, linear decoder, declared recipe, dead-feature counters.

    Parameters: W_enc [D, F], b_enc [F], W_dec [F, D] (rows are features), b_dec [D]. Override what the paper changes.
    """

    unit_norm_decoder = False  # project the decoder's gradient, renormalise its rows after each step
    grad_clip: float | None = None  # maximal global gradient norm
    adam_betas = (0.9, 0.999)
    default_lr = 3e-4  # learning rate where neither the user nor the profile sets one; may be a property of the widths
    needs_contexts = False  # batches of whole, ordered contexts with tokens and positions
    attention_layers: tuple[int, ...] = ()  # attention of these layers, relative to its own; implies needs_contexts
    attention_threshold: float | None = None  # only the pairs above it, as a list, instead of dense patterns
    # under torchrun: share every batch among the ranks. For losses that are means over tokens, or that use ranks.mean
    # and the functions below for what is not; else one rank trains, and the others run the language model only
    data_parallel = False  # not inherited, and never with contexts
    # on a GPU a long run's loss is compiled: only tensors and progress.sparsity_warmup() change in it. Not inherited
    compiled_loss = False
    # on a GPU the weights' bf16 copies may be kept from the optimiser's step to the next loss: what else changes W_enc
    # and W_dec in between does so in place, and not through .data. Not inherited
    copied_weights = False
    no_gradient: tuple[str, ...] = ()  # parameters and loss terms that are meant to have no gradient
    saelens: str | None = None  # SAELens architecture that computes the same features, if there is one
    either_sign = False  # features fire below 0 too: a direction and its opposite are one feature
    schedules: tuple[str, ...] = ("k_start", "k_share")  # hyper-parameters that --init_from does not bring along
    own_start: tuple[str, ...] | None = None  # --init_from: this variant's SAEs alone, alike in these hyper-parameters
    centred = True  # the encoder takes x − b_dec (SAELens' apply_b_dec_to_input)
    # -- used by the program, which sets them
    batch_parts = 1  # in which a batch is worked on: more, where it did not fit the memory
    dead_on_host: int | None = None  # dead features as last counted by `look`; None: not counted
    counts_fired = False  # whether a loss has called note_fired: else no feature counts as dead, however many are
    many_dead = False  # whether these were more than a quarter; a compiled loss reads this: it has two values

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        declared = cls.__dict__.get("data_parallel", False)
        cls.data_parallel = declared and not (cls.needs_contexts or cls.attention_layers)
        cls.compiled_loss = cls.__dict__.get("compiled_loss", False)
        cls.copied_weights = cls.__dict__.get("copied_weights", False)

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
        """`decode` in a loss with z = ReLU(…): cheap where few are positive, z's gradient is 0 where z is."""
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
        """Called after each optimiser step, without gradient; .grad is then maybe not yet clipped and projected."""

    def revive(self, optimizer: torch.optim.Optimizer, batch: Batch, progress: Progress) -> None:
        """Called after `after_step`, without gradient, for what also changes Adam's moments (kit/revival.py)."""

    def parameter_groups(self, lr: float) -> list[dict]:
        """Adam's parameter groups."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def lr_scale(self, progress: Progress) -> float:
        """Factor on the learning rate, besides the schedule's."""
        return 1.0

    def report(self, context: Context) -> tuple[dict[str, float], dict[str, bytes | str]]:
        """Own measurements {name: number}, in final_info `variant.<name>`, and files for the run {name: content}.

        Pictures (.png, .svg) among the files are shown in report.html.
        """
        return {}, {}

    def feature_groups(self) -> list[list[int]] | None:
        """Groups of features that belong together (used by unlearning), or None."""
        return None

    # -- dead features

    def note_fired(self, z_BF: Tensor) -> None:
        """Remember which features this batch fired, for the counters behind `dead_features`; called by the loss."""
        self._note((z_BF.detach() != 0).flatten(0, -2).any(0))

    def note_fired_indices(self, z_BK: Tensor, index_BK: Tensor) -> None:
        """The same for the sparse form: kept values and their feature numbers."""
        if z_BK.is_cuda:  # by plain stores: of maxima a GPU takes one after the other
            place_BK = torch.where(z_BK.detach() != 0, index_BK, self.d_sae)
            fired_F = torch.zeros(self.d_sae + 1, device=z_BK.device, dtype=torch.bool)
            self._note(fired_F.scatter_(0, place_BK.flatten(), True)[:-1])
            return
        fired_F = torch.zeros(self.d_sae, device=z_BK.device, dtype=z_BK.dtype)
        # amax over the kept values has no data-dependent shape, so nothing waits for the device
        fired_F.scatter_reduce_(0, index_BK.flatten(), z_BK.detach().abs().flatten(), "amax")
        self._note(fired_F > 0)

    def _note(self, fired_F: Tensor) -> None:
        if self.batch_parts > 1 and self._fired_F is not None:
            fired_F = self._fired_F | fired_F
        self._fired_F = fired_F

    def dead_features(self, progress: Progress) -> Tensor:
        """Mask [F] of features silent for 10 M tokens (Gao et al. 2024), or for a tenth of a run shorter than 100 M."""
        return self.tokens_since_fired >= min(10_000_000, progress.total_tokens // 10)

    # -- used by the program, not by variants

    @torch.no_grad()
    def count_step(self, tokens: int) -> None:
        """Age every feature by a batch and reset those that fired; called by the trainer once per step."""
        if self._fired_F is not None:
            self.tokens_since_fired += tokens * ranks.sharing()
            self.tokens_since_fired.masked_fill_(ranks.any_of(self._fired_F), 0)
            self._fired_F, self.counts_fired = None, True

    def look(self, progress: Progress) -> None:
        """Count the dead features of a GPU on the host, now and then and outside of a step: it waits for the device."""
        if self.tokens_since_fired.is_cuda:
            self.dead_on_host = int(self.dead_features(progress).sum())
            self.many_dead = 4 * self.dead_on_host > self.d_sae

    def holder_of(self, name: str):
        """What holds a state dict's entry that is no parameter or buffer: only trainers have such."""
        return None
