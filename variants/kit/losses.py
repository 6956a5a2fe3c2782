"""Losses that variants share: of the reconstruction, and the one that revives dead features.

Shapes: as in variants/base.py; C columns worked on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.kit import ranks
from variants.kit.graphs import outside_graphs
from variants.kit.precision import affine
from variants.kit.sparse import decode_sparse, kept_activations, sparse_pays


def reconstruction_loss(e_BD: Tensor) -> Tensor:
    """‖e‖²: summed over D, averaged over B, in fp32."""
    return e_BD.to(torch.promote_types(e_BD.dtype, torch.float32)).pow(2).sum(-1).mean()


@outside_graphs  # it goes by how many features are dead, which a compiled loss would be compiled anew for
def auxk_loss(sae: nn.Module, x_BD: Tensor, e_BD: Tensor, acts_BF: Tensor, dead_F: Tensor) -> Tensor:
    """Auxiliary loss that revives dead features (Gao et al. 2024, appendix A.2).

    The D/2 largest activations *before* top-k among the dead reconstruct the residual e; the error is divided by e's
    variance. Ranking after top-k instead, where dead features are exactly 0, leaves the term without any gradient.
    Where up to a quarter of the features are dead, only their columns are worked on. A GPU is not asked how many that
    are: as many as last counted (`look`), rounded up to a power of two; if more have died since, the longest silent.
    Activations with a sign (abs_topk's, given with their graph) are ranked by magnitude.
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
        index_BK = acts_BF.detach().abs().masked_fill(~dead_F, -1.0).topk(k_aux, dim=-1, sorted=False).indices
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
        kept_BK = z_BC.detach().abs().topk(k_aux, sorted=False).indices
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
