"""BatchTopK SAE (Bussmann, Leask, Nanda 2024, "BatchTopK Sparse Autoencoders").

loss = ‖x − x_hat‖² + auxk_alpha·auxk,   z = the k·B (rounded) largest of ReLU((x − b_dec)·W_enc + b_enc) over the batch
Evals see single tokens: z·1[z > theta], theta = moving average of the smallest one kept, from 1000 steps or 5 % on.
Tied unit-norm initialisation, b_dec = geometric median of the first batch; Adam with lr 2e-4/√(F/2¹⁴); each step:
project the decoder's gradient, clip to norm 1, step, renormalise. auxk reconstructs the residual with dead features.
With k_start, k falls linearly from there in the first k_share of the run, as in topk; theta begins where it has
arrived. On SynthSAEBench from 60 to 25 over the whole run (k_share=1; Chanin 2026, github.com/chanind/
claude-auto-research-synthsaebench).
"""

import torch
from torch.nn import functional as F

from variants import base
from variants.kit.topk import k_now, set_annealing


class SAE(base.SAE):
    """BatchTopK SAE. k: features kept per token on average, 1.5 too; auxk_alpha: weight of auxk;
    k_start: k of the first step, 0 for the same throughout; k_share: share of the run in which it falls to k."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    grad_clip = 1.0

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32, k_start=0, k_share=0.8):
        k = base.feature_count("k", k, d_sae, mean=True)
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha = k, auxk_alpha
        set_annealing(self, k_start, k_share, mean=True)
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
        z_BF = acts_BF * base.batch_topk(acts_BF, k_now(self, progress))
        self.note_fired(z_BF)
        self._kept_BF = z_BF.detach()
        e_BD = batch.x - self.decode_relu(z_BF)
        reconstruction = base.reconstruction_loss(e_BD)
        auxk = base.auxk_loss(self, batch.x, e_BD, acts_BF, self.dead_features(progress))
        return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}

    def after_step(self, batch, progress):
        if k_now(self, progress) == self.k:
            base.update_theta(self.theta, self._kept_BF, progress)
