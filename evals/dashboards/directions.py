"""Decoder rows: which are alike, and which tokens they promote.

Shapes: F and G features of two dictionaries, C chosen ones, D = d_model, V vocabulary, K nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 2**24  # cosines at once
WIDEST_ON_A_CPU = 2**15  # features whose every pair is looked at: minutes beyond
AT_ONCE = 32  # directions whose logits are held
ENDS, BINS = 10, 50


def own_nearest(W_FD: Tensor, absolute: bool) -> tuple[list[int], list[float]] | None:
    """Of every row the other row that is most like it, and the cosine; -1 and 0 where there is none.

    None for a dictionary that is too wide for a CPU.
    """
    F = len(W_FD)
    if F > WIDEST_ON_A_CPU and not W_FD.is_cuda:
        return None
    if F == 1:
        return [-1], [0.0]
    index, cosine = [], []
    for rows_C in torch.arange(F, device=W_FD.device).split(max(1, BLOCK // F)):
        index_CK, cosine_CK = nearest(W_FD[rows_C], W_FD, 1, absolute, rows_C)
        index += index_CK[:, 0].tolist()
        cosine += cosine_CK[:, 0].tolist()
    return index, cosine


def nearest(rows_CD: Tensor, W_GD: Tensor, k: int, absolute: bool, but_C: Tensor | None = None,
            ) -> tuple[Tensor, Tensor]:
    """The K = k rows of W, or as many as there are, that are most like each of some rows, and their cosines, [C, K].

    Rows are of unit norm. absolute: the opposite direction is the same. but_C: the one that each may not be, itself.
    """
    cosine_CG = rows_CD @ W_GD.T
    if absolute:
        cosine_CG = cosine_CG.abs()
    others = cosine_CG.shape[1]
    if but_C is not None:
        cosine_CG.scatter_(1, but_C[:, None], -torch.inf)
        others -= 1
    found = cosine_CG.topk(min(k, others), dim=1)
    return found.indices, found.values


def whole(W_FD: Tensor) -> Tensor:
    """The same rows, zeros in place of one that holds a number which is none: it is like no other then."""
    return torch.where(W_FD.isfinite().all(1, keepdim=True), W_FD, 0.0)


def unit(W_FD: Tensor) -> Tensor:
    """Rows of norm 1 in fp32; a row of zeros stays one."""
    return functional.normalize(W_FD.float(), dim=1)


def encoder_cosine(sae) -> list[float] | None:
    """Of every feature the cosine of encoder and decoder; None for an encoder that is no matrix [D, F]."""
    W_enc_DF = sae.W_enc
    if W_enc_DF is None:
        return None
    return functional.cosine_similarity(W_enc_DF.T, sae.W_dec, dim=1).nan_to_num(0.0, 0.0, 0.0).tolist()


def promoted(lm, W_CD: Tensor) -> list[dict] | None:
    """The logits that directions of the residual stream give by themselves: {"top": [(token, logit)], "bottom",
    "edges", "counts"} of each, tokens by id; None where the model's head takes no such directions.
    """
    if lm.d_final != lm.d_model:
        return None
    found = []
    for rows_cD in W_CD.split(AT_ONCE):
        logits_cV = lm.unembed(rows_cD.to(lm.dtype)).detach().float().cpu().nan_to_num()
        ends = min(ENDS, logits_cV.shape[1])
        for top, bottom, logits_V in zip(*_ends(logits_cV, ends), logits_cV):
            low, high = float(logits_V.min()), float(logits_V.max())
            counts = logits_V.histc(BINS, low, high)
            edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
            found.append(dict(top=top, bottom=bottom, edges=edges.tolist(), counts=counts.long().tolist()))
    return found


def _ends(logits_cV: Tensor, n: int) -> tuple[list, list]:
    """Of each row the n largest, and the n smallest, as [(place, value)]."""
    parts = (logits_cV.topk(n, dim=1), logits_cV.topk(n, dim=1, largest=False))
    top, bottom = ([list(zip(*row)) for row in zip(part.indices.tolist(), part.values.tolist())] for part in parts)
    return top, bottom
