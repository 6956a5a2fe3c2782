"""TopK SAE (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

loss = ‖x − x_hat‖² + auxk_alpha·auxk,   z = the k largest of ReLU((x − b_dec)·W_enc + b_enc) per token
Tied unit-norm initialisation, b_dec = geometric median of the first batch; Adam with lr 2e-4/√(F/2¹⁴); each step:
project the decoder's gradient, clip to norm 1, step, renormalise. auxk reconstructs the residual with dead features.
With k_start, k falls linearly from there in the first k_share of the run (He et al. 2024, "Llama Scope"). Theta then
begins where k has arrived, and evals on the way see the k of the end.
"""

import torch
from torch.nn import functional as F

from variants import base
from variants.kit.topk import k_now, set_annealing


class SAE(base.SAE):
    """TopK SAE. k: features kept per token; auxk_alpha: weight of the loss that revives dead features;
    k_start: k of the first step, 0 for the same throughout; k_share: share of the run in which it falls to k."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    copied_weights = True
    grad_clip = 1.0
    saelens = "topk"

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, k_start=0, k_share=0.8):
        k = base.feature_count("k", k, d_sae)
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha = k, auxk_alpha
        set_annealing(self, k_start, k_share)
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5
        self.register_buffer("theta", torch.tensor(-1.0))  # smallest kept activation, moving average; < 0: none yet

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def encode(self, x):
        acts = F.relu(self.pre_activations(x))
        top, index = acts.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(acts).scatter(-1, index, top)

    def loss(self, batch, progress):
        k = round(k_now(self, progress))
        acts_BF = base.dense_activations(self, batch.x, k)
        index_BK = base.top_k(acts_BF, k)
        top_BK = base.kept_activations(self, batch.x, acts_BF, index_BK)
        self.note_fired_indices(top_BK, index_BK)
        self._kept = top_BK.detach()
        e_BD = batch.x - base.decode_sparse(top_BK, index_BK, self.W_dec) - self.b_dec
        reconstruction = base.reconstruction_loss(e_BD)
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}

    def after_step(self, batch, progress):
        if k_now(self, progress) == self.k:
            base.update_theta(self.theta, self._kept, progress)
