"""Matryoshka BatchTopK SAE (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders").

loss = Σ_i w_i·‖x − x_hat_i‖² + auxk_alpha·auxk,   x_hat_i = b_dec + the part of z·W_dec that nested prefix i decodes
A sum over prefixes (w_i = 1), as in the paper and in SAELens; the authors' code and dictionary_learning take a mean.
Prefixes end after 1/32, 1/32 + 1/16, … of the features: groups of 1/32, 1/16, 1/8, 1/4 and the rest.
z = the k·B largest of ReLU((x − b_dec)·W_enc + b_enc) over the batch; evals see z·1[z > theta] as in batch_topk.
Recipe of topk: tied unit rows, b_dec = geometric median, Adam, lr 2e-4/√(F/2¹⁴), project, clip 1, step, renormalise.
"""

import torch
from torch.nn import functional as F

from variants import base


class SAE(base.SAE):
    """Matryoshka SAE. k: features kept per token on average; auxk_alpha: weight of auxk; weights: w_i by prefix."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    grad_clip = 1.0

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, weights=(1.0, 1.0, 1.0, 1.0, 1.0)):
        k = base.feature_count("k", k, d_sae, mean=True)
        if len(weights) != 5 or min(weights) < 0 or weights[-1] <= 0:
            raise ValueError(f"matryoshka_batch_topk: weights = {weights} must be 5 numbers ≥ 0, the last, of all "
                             "features, above 0\nchange --hyper weights=…")
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha, self.weights = k, auxk_alpha, weights
        groups = [d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4]
        self.groups = [*groups, d_sae - sum(groups)]  # features in each
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5
        self.register_buffer("theta", torch.tensor(-1.0))  # < 0: none yet

    @property
    def saelens(self):
        return base.saelens_of(self.theta, self.k)

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def encode(self, x):
        return base.above_theta(F.relu(self.pre_activations(x)), self.theta, self.k)

    def loss(self, batch, progress):
        acts_BF = F.relu(self.pre_activations(batch.x))
        z_BF = acts_BF * base.batch_topk(acts_BF, self.k)
        self.note_fired(z_BF)
        self._kept_BF = z_BF.detach()
        e_BD, errors = batch.x - self.b_dec, []
        for z_group, W_group in zip(z_BF.split(self.groups, 1), self.W_dec.split(self.groups)):
            e_BD = e_BD - base.relu_product(z_group, W_group)
            errors.append(base.reconstruction_loss(e_BD))
        nested = sum(w * error for w, error in zip(self.weights, errors))
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return nested + self.auxk_alpha * auxk, {"nested": nested, "auxk": auxk}

    def after_step(self, batch, progress):
        base.update_theta(self.theta, self._kept_BF, progress)
