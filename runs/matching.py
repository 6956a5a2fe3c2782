"""Two dictionaries beside each other: features matched one to one by the cosine of decoder rows, and nearest ones.

PW-MCC, the pairwise dictionary mean correlation coefficient (arXiv 2505.20254), is the mean cosine over the one-to-one
pairs with the largest sum of cosines (Hungarian). Signs count, as in its authors' code (`MCC` of
xiangchensong/sae-feature-consistency): a feature that fires with positive values alone has a direction, and the
opposite one is another. `absolute` is for features that fire with either sign, and for what sae_lens.synthetic gives.

Up to `EVERY_PAIR` pairs (width 4,096) all are candidates, and the matching is the exact one. Else the best partners of
every feature on either side are, `CANDIDATES` a side in all: 128 each at 16,384. The mean can only be too small by it:
with 128, 64, 32 by 2e-6, 1e-5, 7e-5 between two seeds of one setting at width 2,304, by 4e-5 to 5e-4 between two
variants, by 1e-6 for random rows at 16,384. Above `HUNGARIAN` features mutual nearest neighbours are the pairs: the
mean is over those that were found, and so too favourable. Cosines exist `BLOCK` at a time, at any width.

Shapes: F and G features of the two dictionaries, D = d_in, C rows at a time, K candidates, P pairs, E edges.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

EVERY_PAIR = 2**24
CANDIDATES = 2**21
HUNGARIAN = 2**17
BLOCK = 2**26  # cosines in memory at once: 256 MiB, and as much again for their transpose
ABOVE = (0.7, 0.9)


class Edges(NamedTuple):
    """Pairs that a matching may choose from; numpy arrays of one length."""

    row_E: np.ndarray
    column_E: np.ndarray
    cosine_E: np.ndarray


def unit(decoder_FD: Tensor, device: str = "cpu") -> Tensor:
    """Rows of norm 1 in fp32; a row of zeros stays one."""
    return functional.normalize(decoder_FD.to(device, torch.float32), dim=1)


def matched(a_FD: Tensor, b_GD: Tensor, alive: tuple[Tensor, Tensor] | None = None,
            absolute: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Cosines [P] of the one-to-one pairs of two dictionaries of unit rows with the largest sum, P = min(F, G).

    alive: masks [F] and [G], on the CPU; then also the cosines of the matching among those features alone, as if there
    were no others (else None). Fewer pairs than P above `HUNGARIAN` features.
    """
    if len(a_FD) * len(b_GD) <= EVERY_PAIR:
        cosine_FG = _cosines(a_FD, b_GD, absolute).cpu()
        return _exact(cosine_FG), None if alive is None else _exact(cosine_FG[alive[0]][:, alive[1]])
    mutual = max(len(a_FD), len(b_GD)) > HUNGARIAN  # those are one to one already
    found = _edges(a_FD, b_GD, absolute, mutual)
    among = None
    if alive is not None:
        keep_F, keep_G = alive
        kept = _kept(found, keep_F.numpy(), keep_G.numpy())
        among = kept.cosine_E if mutual else _sparse(kept, a_FD[keep_F], b_GD[keep_G], absolute)
    return found.cosine_E if mutual else _sparse(found, a_FD, b_GD, absolute), among


def _cosines(a_FD: Tensor, b_GD: Tensor, absolute: bool) -> Tensor:
    cosine_FG = a_FD @ b_GD.T
    return cosine_FG.abs() if absolute else cosine_FG


def _exact(cosine_FG: Tensor) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    cosine_FG = cosine_FG.double().numpy()
    return cosine_FG[linear_sum_assignment(cosine_FG, maximize=True)]


def _edges(a_FD: Tensor, b_GD: Tensor, absolute: bool, mutual: bool) -> Edges:
    """The candidates: every feature's best partners, or if `mutual` the pairs that are each other's nearest."""
    widest = max(len(a_FD), len(b_GD))
    best = 1 if mutual else max(1, CANDIDATES // widest)
    value_FK, index_FK, value_GK, index_GK = _best(a_FD, b_GD, best, absolute)
    of_rows, of_columns = _listed(value_FK, index_FK), _listed(value_GK, index_GK)
    row_E = np.concatenate([of_rows.row_E, of_columns.column_E])
    column_E = np.concatenate([of_rows.column_E, of_columns.row_E])
    cosine_E = np.concatenate([of_rows.cosine_E, of_columns.cosine_E])
    _, first_E, count_E = np.unique(row_E * len(b_GD) + column_E, return_index=True, return_counts=True)
    if mutual:
        first_E = first_E[count_E == 2]
    return Edges(row_E[first_E], column_E[first_E], cosine_E[first_E])


def _listed(value_FK: Tensor, index_FK: Tensor) -> Edges:
    row_FK = torch.arange(len(index_FK))[:, None].expand_as(index_FK)
    return Edges(row_FK.reshape(-1).numpy(), index_FK.reshape(-1).numpy(), value_FK.reshape(-1).double().numpy())


def _kept(found: Edges, keep_F: np.ndarray, keep_G: np.ndarray) -> Edges:
    """The edges between features that take part, which are numbered anew."""
    keep_E = keep_F[found.row_E] & keep_G[found.column_E]
    row_E, column_E = (np.cumsum(keep_F) - 1)[found.row_E], (np.cumsum(keep_G) - 1)[found.column_E]
    return Edges(row_E[keep_E], column_E[keep_E], found.cosine_E[keep_E])


def _sparse(found: Edges, a_FD: Tensor, b_GD: Tensor, absolute: bool) -> np.ndarray:
    """Cosines [P] of the matching among the candidates with the largest sum."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    pairs = min(len(a_FD), len(b_GD))
    if not pairs:
        return np.empty(0)
    # so that there is a matching of all, whatever the candidates are: the i-th of one side may go with the other's
    alike_P = (a_FD[:pairs] * b_GD[:pairs]).sum(1).double().cpu().numpy()
    row_E = np.concatenate([found.row_E, np.arange(pairs)])
    column_E = np.concatenate([found.column_E, np.arange(pairs)])
    cosine_E = np.concatenate([found.cosine_E, np.abs(alike_P) if absolute else alike_P])
    key_E, first_E = np.unique(row_E * len(b_GD) + column_E, return_index=True)
    cosine_E = cosine_E[first_E]
    # costs from 1 to 3: of a sparse matrix zeros are no entries
    cost = csr_array((2 - cosine_E, (row_E[first_E], column_E[first_E])), shape=(len(a_FD), len(b_GD)))
    row_P, column_P = min_weight_full_bipartite_matching(cost)
    return cosine_E[np.searchsorted(key_E, row_P.astype(np.int64) * len(b_GD) + column_P)]


def _best(a_FD: Tensor, b_GD: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest cosines of every row of a and where they are, [F, K] each; the same of every row of b, [G, K]."""
    value_FK, index_FK = [], []
    value_GK, index_GK = torch.empty(len(b_GD), 0), torch.empty(len(b_GD), 0, dtype=torch.int64)
    size = max(1, BLOCK // len(b_GD))
    for start in range(0, len(a_FD), size):
        cosine_CG = _cosines(a_FD[start:start + size], b_GD, absolute)
        value_CK, index_CK = (t.cpu() for t in cosine_CG.topk(min(k, len(b_GD)), dim=1))
        value_FK.append(value_CK)
        index_FK.append(index_CK)
        # transposed, since along contiguous rows topk is five times as fast
        new_GK, where_GK = (t.cpu() for t in cosine_CG.T.contiguous().topk(min(k, len(cosine_CG)), dim=1))
        value_GK, order_GK = torch.cat([value_GK, new_GK], 1).topk(min(k, start + len(cosine_CG)), dim=1)
        index_GK = torch.cat([index_GK, where_GK + start], 1).gather(1, order_GK)
    return torch.cat(value_FK), torch.cat(index_FK), value_GK, index_GK


def figures(cosine_P: np.ndarray, pairs: int) -> dict[str, float]:
    """Mean cosine of matched pairs, and the shares above .7 and .9 of the `pairs` there could be."""
    shares = {f"share_above_{least}": float((cosine_P > least).sum() / pairs) for least in ABOVE}
    mean = float(cosine_P.mean()) if len(cosine_P) else 0.0  # among ties none need be mutual
    return {"mean_cosine": mean, **shares}


@functools.cache
def of_random(f: int, g: int, d: int, absolute: bool = False, device: str = "cpu") -> dict[str, float]:
    """The figures of f and g random directions of d dimensions (Gaussian rows, one seed): what chance alone gives."""
    generator = torch.Generator().manual_seed(0)
    a_FD, b_GD = (unit(torch.randn(n, d, generator=generator), device) for n in (f, g))
    return figures(matched(a_FD, b_GD, absolute=absolute)[0], min(f, g))


def nearest(a_FD: Tensor, b_GD: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """Of every row of a the largest cosine with one of b, [F], and that one's index, [F]. Unit rows."""
    size = max(1, BLOCK // len(b_GD))
    found = [_cosines(a_FD[start:start + size], b_GD, absolute).max(1) for start in range(0, len(a_FD), size)]
    return torch.cat([block.values for block in found]).cpu(), torch.cat([block.indices for block in found]).cpu()
