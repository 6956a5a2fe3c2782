"""How many features a token keeps, also when that falls in the course of training, the choice of the largest
activations of a token or a whole batch, and theta.

theta is what a choice over a batch leaves for single tokens: the least activation that passes; < 0: none yet.

Shapes: as in variants/base.py; `progress` is a base.Progress.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.kit import gpu, ranks
from variants.kit.graphs import outside_graphs


def feature_count(name: str, value, d_sae: int, mean: bool = False, most: str = "d_sae") -> float:
    """A count of the features kept of each token, or a mean of them, which may be a fraction; else ValueError.

    `most` says what the number d_sae is where it is another than the SAE's width.
    """
    whole = type(value) in (int, float) and 0 < value <= d_sae and value == int(value)
    fraction = type(value) is float and 0 < value <= d_sae
    if not (whole or (mean and fraction)):
        each = "kept of each token must be a whole number from 1 to"
        meant = "kept on average must be a number above 0, at most" if mean else each
        advice = "" if mean else "; batch_topk takes a fraction, as a mean over tokens"
        raise ValueError(f"--hyper {name} = {value!r}: the features {meant} {most} = {d_sae}\n"
                         f"give for example --hyper {name}={max(1, d_sae // 64)}{advice}")
    return int(value) if whole else value


def set_annealing(sae, k_start: float, k_share: float, mean: bool = False) -> None:
    """Give an SAE what `k_now` goes by: k_start, 0 for none, else from k to d_sae (a fraction if `mean`); k_share > 0.

    ValueError for what these cannot be.
    """
    if k_start != 0:
        k_start = feature_count("k_start", k_start, sae.d_sae, mean)
        if k_start < sae.k:
            raise ValueError(f"--hyper k_start = {k_start}: k falls from there to k = {sae.k} and cannot rise\n"
                             f"give k_start above {sae.k}, or leave it out")
        if not 0 < k_share <= 1:
            raise ValueError(f"--hyper k_share = {k_share}: the share of the run in which k falls must lie in (0, 1]\n"
                             "give for example --hyper k_share=0.8")
        sae.compiled_loss = False  # a k that changes from step to step would have it compiled anew in each
    sae.k_start, sae.k_share = k_start, k_share


def k_now(sae, progress) -> float:
    """Features kept of each token in a step: from sae.k_start linearly to sae.k in the first sae.k_share of the run.

    In the last step it is sae.k, however short the run; always, where k_start is 0.
    """
    if sae.k_start == 0:
        return sae.k
    end = int(sae.k_share * (progress.total_steps - 1))
    if progress.step >= end:
        return sae.k
    return sae.k_start + (sae.k - sae.k_start) * progress.step / end


@outside_graphs
def top_k(acts_BF: Tensor, k: int) -> Tensor:
    """The features [B, k] that are the k largest of each token, in no order; no gradient. Ranked in fp32 on a GPU."""
    acts_BF, kernels = acts_BF.detach(), gpu.kernels() if acts_BF.is_cuda else None
    if kernels and kernels.takes(acts_BF, k):
        return kernels.top_k(acts_BF, k)
    return acts_BF.topk(k, dim=-1, sorted=False).indices


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


# ------------------------------------------------------------------------------------------------ theta


def above_theta(acts: Tensor, theta: Tensor, k: float) -> Tensor:
    """Features (..., F) of single tokens: z·1[z > theta]; the k largest, rounded, while there is no theta (< 0)."""
    if theta < 0:
        top, index = acts.topk(max(1, round(k)), dim=-1, sorted=False)
        return torch.zeros_like(acts).scatter(-1, index, top)
    return acts * (acts > theta)


def saelens_of(theta: Tensor, k: float) -> str | None:
    """SAELens' architecture for `above_theta`: JumpReLU; in a run too short for a theta, TopK if k is whole."""
    if theta >= 0:
        return "jumprelu"
    return "topk" if k == int(k) else None


@torch.no_grad()
def update_theta(theta: Tensor, kept: Tensor, progress, decay: float | None = None) -> None:
    """Moving average of the smallest positive activation a batch kept (0-d tensors), after 1000 steps or 5 % of a run.

    Starts at the first value seen and not at 0, so that a short run's threshold is not biased low.
    """
    decay = theta_decay(progress) if decay is None else decay
    if progress.step >= min(1000, 0.05 * progress.total_steps):
        smallest = ranks.smallest(torch.where(kept > 0, kept, torch.inf).amin().to(theta.dtype))
        new = torch.where(theta < 0, smallest, theta.lerp(smallest, 1 - decay))
        theta.copy_(torch.where(smallest.isfinite(), new, theta))


def theta_decay(progress, steps: int = 1000) -> float:
    """Decay of a moving average over 1000 steps, as theta's (.999), or `steps`, at most a twentieth of the run."""
    return 1 - 1 / max(1.0, min(steps, 0.05 * progress.total_steps))
