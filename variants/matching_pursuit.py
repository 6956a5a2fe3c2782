"""Matching pursuit SAE (Costa et al. 2025, "From Flat to Hierarchical: Extracting Sparse Representations …", MP-SAE).

loss = ‖x − x_hat‖²,   r_0 = x − b_dec,   i_t = argmax_i ⟨r_t, d_i⟩,   z[i_t] += ⟨r_t, d_i_t⟩,   r_{t+1} = r_t − that·d
d_i = W_dec[i], of unit norm: there is no encoder. After k steps r_k = x − x_hat. A feature may be chosen twice, so L0
is at most k; a residual that no feature points along ends the pursuit (the ReLU of SAELens).
Gradients flow through all k steps, but not through the choices. Optimiser, b_dec's beginning and learning rate are
topk's: geometric median, Adam with lr 2e-4/√(F/2¹⁴), project, clip to norm 1, step, renormalise; no auxiliary loss.
SAELens: residual_threshold = 0, max_iterations = k, stop_on_duplicate_support = False.
"""

import torch
from torch.nn import functional as F

from variants import base


class SAE(base.SAE):
    """Matching pursuit SAE. k: steps of the pursuit, the most features that a token keeps."""

    unit_norm_decoder = True
    data_parallel = True
    grad_clip = 1.0
    saelens = "matching_pursuit"

    def __init__(self, d_in, d_sae, k=32):
        k = base.feature_count("k", k, d_sae)
        super().__init__(d_in, d_sae)
        del self.W_enc, self.b_enc
        self.k = k
        self.default_lr = 2e-4 / (d_sae / 2**14) ** 0.5

    def initialise(self, x_ND):
        self.b_dec.data.copy_(base.geometric_median(x_ND))

    def pursuit(self, x_ND):
        """What the k steps add [N, K], to which features [N, K], and what they leave of x − b_dec, [N, D]."""
        r_ND, added, chosen = x_ND - self.b_dec, [], []
        match = _Matches(self.W_dec.detach(), r_ND.detach(), self.k)
        for _ in range(self.k):
            index_N = match.best(r_ND.detach())
            d_ND = F.embedding(index_N, self.W_dec)
            z_N = (r_ND * d_ND).sum(1).relu()
            r_ND = r_ND - z_N[:, None] * d_ND
            match.subtract(z_N.detach(), index_N)
            added.append(z_N)
            chosen.append(index_N)
        return torch.stack(added, 1), torch.stack(chosen, 1), r_ND

    def encode(self, x):
        z_NK, index_NK, _ = self.pursuit(x.reshape(-1, self.d_in))
        z_NF = torch.zeros(len(z_NK), self.d_sae, dtype=z_NK.dtype, device=x.device)
        return z_NF.scatter_add(1, index_NK, z_NK).reshape(*x.shape[:-1], self.d_sae)

    def loss(self, batch, progress):
        z_BK, index_BK, r_BD = self.pursuit(batch.x)
        self.note_fired_indices(z_BK, index_BK)
        reconstruction = base.reconstruction_loss(r_BD)
        return reconstruction, {"reconstruction": reconstruction}


class _Matches:
    """⟨r, d_i⟩ of the residuals with all features, to choose by; no gradient.

    On a CPU by the features' Gram matrix where that takes fewer products than k times r·W_decᵀ: at D = 576, F = 2304,
    B = 1024, k = 32 a seventh.
    """

    def __init__(self, W_dec_FD, r_ND, k):
        self.W_dec_FD, self.by_gram = W_dec_FD, False
        if r_ND.device.type == "cpu" and len(W_dec_FD) < min(k * len(r_ND) // 2, 2**14):
            self.by_gram, self.gram_FF, self.match_NF = True, W_dec_FD @ W_dec_FD.T, r_ND @ W_dec_FD.T

    def best(self, r_ND):
        match_NF = self.match_NF if self.by_gram else r_ND @ self.W_dec_FD.T
        return match_NF.argmax(1)

    def subtract(self, z_N, index_N):
        if self.by_gram:
            self.match_NF.addcmul_(self.gram_FF[index_N], z_N[:, None], value=-1)
