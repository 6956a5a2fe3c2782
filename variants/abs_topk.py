"""AbsTopK SAE (Zhu, Khalili, Zhu 2025, "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features").

loss = ‖x − x_hat‖² + auxk_alpha·auxk,   z = the k of (x − b_dec)·W_enc + b_enc that are largest in magnitude, with sign
A feature stands for two opposite concepts, one to each sign; it fires where it is not 0.
Everything else is topk's: tied unit-norm initialisation, b_dec = geometric median of the first batch; Adam with lr
2e-4/√(F/2¹⁴); each step: project the decoder's gradient, clip to norm 1, step, renormalise. auxk takes the dead
features of the largest magnitude, with their sign, as SAELens does.
"""

import torch

from variants import base


class SAE(base.SAE):
    """AbsTopK SAE. k: features kept per token; auxk_alpha: weight of the loss that revives dead features."""

    unit_norm_decoder = True
    data_parallel = True
    compiled_loss = True
    grad_clip = 1.0
    saelens = "abstopk"
    either_sign = True

    def __init__(self, d_in, d_sae, k=32, auxk_alpha=1 / 32):
        k = base.feature_count("k", k, d_sae)
        super().__init__(d_in, d_sae)
        self.k, self.auxk_alpha = k, auxk_alpha
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def encode(self, x):
        z_pre = self.pre_activations(x)
        index = z_pre.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z_pre).scatter(-1, index, z_pre.gather(-1, index))

    def loss(self, batch, progress):
        z_pre_BF = self.pre_activations(batch.x)
        index_BK = base.top_k(z_pre_BF.abs(), self.k)
        z_BK = z_pre_BF.gather(1, index_BK)
        self.note_fired_indices(z_BK, index_BK)
        e_BD = batch.x - base.decode_sparse(z_BK, index_BK, self.W_dec) - self.b_dec
        reconstruction = base.reconstruction_loss(e_BD)
        auxk = base.auxk_loss(self, batch.x, e_BD, z_pre_BF, self.dead_features(progress))
        return reconstruction + self.auxk_alpha * auxk, {"reconstruction": reconstruction, "auxk": auxk}
