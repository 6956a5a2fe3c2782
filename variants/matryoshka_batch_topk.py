"""Matryoshka BatchTopK SAE (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders").

loss = Σ_i w_i·‖x − x_hat_i‖² + auxk_alpha·auxk,   x_hat_i = b_dec + the part of z·W_dec that nested prefix i decodes
A sum over prefixes (w_i = 1), as in the paper and in SAELens; the authors' code and dictionary_learning take a mean.
Prefixes end after 1/32, 1/32 + 1/16, … of the features: groups of 1/32, 1/16, 1/8, 1/4 and the rest.
z = the k·B largest of ReLU((x − b_dec)·W_enc + b_enc) over the batch; evals see z·1[z > theta] as in batch_topk.
Recipe of topk: tied unit rows, b_dec = geometric median, Adam, lr 2e-4/√(F/2¹⁴), project, clip 1, step, renormalise.

Off by default, from Chanin 2026 (github.com/chanind/claude-auto-research-synthsaebench, with k from 60 to 25):
k_start, k_share: k falls, as in batch_topk.
detach: an inner prefix i has ‖x − sg(x_hat_{i−1}) − group i's part‖²: its error moves its own group alone, b_dec only
that of the first; all features have the whole reconstruction's.
by_frequency: the groups are those of the most frequent features, by an average of their firing over 100 steps (.99)
or a twentieth of a shorter run. Ranked anew in each step; no weight moves, so that the saved features are in no order.
Theirs ranks by the batch at hand too, here it counts from the next step on, and the first step has the index's order.
It costs a copy of z and of W_dec in each step.
"""

import torch
from torch.nn import functional as F

from variants import base
from variants.kit import ranks
from variants.kit.topk import k_now, set_annealing


class SAE(base.SAE):
    """Matryoshka SAE. k: features kept per token on average; auxk_alpha: weight of auxk; weights: w_i by prefix;
    k_start: k of the first step, 0 for the same throughout; k_share: share of the run in which it falls to k;
    detach: inner errors move their own group alone; by_frequency: groups by how often features fire."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    grad_clip = 1.0

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, weights=(1.0, 1.0, 1.0, 1.0, 1.0), k_start=0, k_share=0.8,
                 detach=False, by_frequency=False):
        k = base.feature_count("k", k, d_sae, mean=True)
        if len(weights) != 5 or min(weights) < 0 or weights[-1] <= 0:
            raise ValueError(f"matryoshka_batch_topk: weights = {weights} must be 5 numbers ≥ 0, the last, of all "
                             "features, above 0\nchange --hyper weights=…")
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha, self.weights = k, auxk_alpha, weights
        set_annealing(self, k_start, k_share, mean=True)
        groups = [d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4]
        self.groups = [*groups, d_sae - sum(groups)]  # features in each
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5
        self.register_buffer("theta", torch.tensor(-1.0))  # < 0: none yet
        self.detach, self.by_frequency = detach, by_frequency
        if by_frequency:  # moving average, from 0, which leaves the ranks as they are
            self.register_buffer("frequency_F", torch.zeros(d_sae))

    @property
    def saelens(self):
        return base.saelens_of(self.theta, self.k)

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def encode(self, x):
        return base.above_theta(F.relu(self.pre_activations(x)), self.theta, self.k)

    def errors(self, x_BD, z_BF):
        """‖x − x_hat_i‖² of each prefix, and x − x_hat [B, D] of the whole."""
        W_FD = self.W_dec
        if self.by_frequency:
            order_F = self.frequency_F.argsort(descending=True, stable=True)
            z_BF, W_FD = z_BF.index_select(1, order_F), W_FD.index_select(0, order_F)
        e_BD, errors = x_BD - self.b_dec, []
        for i, (z_group, W_group) in enumerate(zip(z_BF.split(self.groups, 1), W_FD.split(self.groups))):
            part_BD, before_BD = base.relu_product(z_group, W_group), e_BD
            e_BD = before_BD - part_BD
            inner_BD = e_BD
            if self.detach and 0 < i < len(self.groups) - 1:
                inner_BD = before_BD.detach() - part_BD
            errors.append(base.reconstruction_loss(inner_BD))
        return errors, e_BD

    def loss(self, batch, progress):
        acts_BF = F.relu(self.pre_activations(batch.x))
        z_BF = acts_BF * base.batch_topk(acts_BF, k_now(self, progress))
        self.note_fired(z_BF)
        self._kept_BF = z_BF.detach()
        errors, e_BD = self.errors(batch.x, z_BF)
        nested = sum(w * error for w, error in zip(self.weights, errors))
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return nested + self.auxk_alpha * auxk, {"nested": nested, "auxk": auxk}

    def after_step(self, batch, progress):
        if self.by_frequency:
            fired_F = (self._kept_BF > 0).to(self.frequency_F.dtype).mean(0)
            if ranks.sharing() > 1:  # the same on all to the last bit: it decides the order
                fired_F = ranks.gathered(fired_F[None]).mean(0)
            self.frequency_F.lerp_(fired_F, 1 - base.theta_decay(progress, 100))
        if k_now(self, progress) == self.k:
            base.update_theta(self.theta, self._kept_BF, progress)
