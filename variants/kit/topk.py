"""How many features a token keeps, and the choice of the largest activations of a whole batch.

Shapes: as in variants/base.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.kit import ranks


def feature_count(name: str, value, d_sae: int, mean: bool = False) -> float:
    """A count of the features kept of each token, or a mean of them, which may be a fraction; else ValueError."""
    whole = type(value) in (int, float) and 0 < value <= d_sae and value == int(value)
    fraction = type(value) is float and 0 < value <= d_sae
    if not (whole or (mean and fraction)):
        each = "kept of each token must be a whole number from 1 to"
        meant = "kept on average must be a number above 0, at most" if mean else each
        advice = "" if mean else "; batch_topk takes a fraction, as a mean over tokens"
        raise ValueError(f"--hyper {name} = {value!r}: the features {meant} d_sae = {d_sae}\n"
                         f"give for example --hyper {name}={max(1, d_sae // 64)}{advice}")
    return int(value) if whole else value


def batch_topk(acts_BF: Tensor, k: float) -> Tensor:
    """Mask [B, F] of exactly k·B entries, rounded: the largest of the batch, of which each rank may hold a share."""
    flat, n = acts_BF.detach().flatten(), max(1, round(k * len(acts_BF) * ranks.sharing()))
    if ranks.sharing() > 1:
        mine = flat.topk(min(n, len(flat)), sorted=False)
        values = ranks.gathered(mine.values)  # bf16 has many equal ones: chosen by index, as in one process
        chosen = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(n, sorted=False).indices, True)
        own = chosen.view(ranks.sharing(), -1)[ranks.number()]
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, mine.indices, own).view_as(acts_BF)
    index = _largest_on_cpu(flat, n) if flat.device.type == "cpu" else flat.topk(n, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, index, True).view_as(acts_BF)


def _largest_on_cpu(flat: Tensor, n: int) -> Tensor:
    """Indices of the n largest; only what exceeds a bound from every 17th entry is ranked (a sixth of topk's time)."""
    sample = flat[::17]
    bound = sample.topk(min(len(sample), n * 5 // (17 * 4) + 1), sorted=False).values.min()
    candidates = (flat > bound).nonzero().squeeze(1)
    if len(candidates) < n:  # the sample was not typical
        return flat.topk(n, sorted=False).indices
    return candidates[flat[candidates].topk(n, sorted=False).indices]
