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
from variants.kit import precision
from variants.kit.copies import low


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
        with torch.no_grad():
            chosen = self.chosen(x_ND)
        if not torch.is_grad_enabled():
            return chosen
        # the same steps once more with a graph: all rows at once, as the gradient of each lookup is as large as W_dec
        index_NK, r_ND, added = chosen[1], x_ND - self.b_dec, []
        for d_ND in F.embedding(index_NK, self.W_dec).unbind(1):
            z_N, r_ND = taken_off(r_ND, d_ND)
            added.append(z_N)
        return torch.stack(added, 1), index_NK, r_ND

    def chosen(self, x_ND):
        """`pursuit` without a graph."""
        r_ND, added, chosen = x_ND - self.b_dec, [], []
        match = _Matches(self.W_dec, r_ND, self.k)
        for _ in range(self.k):
            index_N = match.best(r_ND)
            z_N, r_ND = taken_off(r_ND, F.embedding(index_N, self.W_dec))
            match.subtract(z_N, index_N)
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


def taken_off(r_ND, d_ND):
    """How far the residuals point along the features' rows [N], at least 0, and what is left without that [N, D]."""
    z_N = (r_ND * d_ND).sum(1).relu()
    return z_N, r_ND - z_N[:, None] * d_ND


class _Matches:
    """⟨r, d_i⟩ of the residuals with all features, to choose by; no gradient. On a GPU in fp32, of rounded factors.

    On a CPU by the features' Gram matrix where that takes fewer products than k times r·W_decᵀ: at D = 576, F = 2304,
    B = 1024, k = 32 a seventh.
    """

    def __init__(self, W_dec_FD, r_ND, k):
        self.W_dec_FD, self.by_gram, self.dtype = W_dec_FD, False, precision.lower(r_ND)
        if self.dtype:
            self.W_dec_FD = low(W_dec_FD, self.dtype)
        if r_ND.device.type == "cpu" and len(W_dec_FD) < min(k * len(r_ND) // 2, 2**14):
            self.by_gram, self.gram_FF, self.match_NF = True, W_dec_FD @ W_dec_FD.T, r_ND @ W_dec_FD.T

    def best(self, r_ND):
        if self.by_gram:
            return self.match_NF.argmax(1)
        if not self.dtype:
            return (r_ND @ self.W_dec_FD.T).argmax(1)
        with torch.autocast(r_ND.device.type, enabled=False):
            return precision.product(r_ND.to(self.dtype), self.W_dec_FD.T).argmax(1)

    def subtract(self, z_N, index_N):
        if self.by_gram:
            self.match_NF.addcmul_(self.gram_FF[index_N], z_N[:, None], value=-1)
