"""Standard errors of means and ratios whose sampling units come in clusters: tokens in documents, completions in
entities.

An error is stated from five clusters on: fewer say next to nothing about their own spread, and two standard errors
would then be far from 95 %. Clusters count by their weight (Kish's effective number, (Σ w)²/Σ w²): ten documents of
which one holds nine tenths of the text are hardly more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST = 5  # clusters


def number(weights: Sequence[float] | Tensor) -> float:
    """How many clusters of equal weight these are worth, (Σ |w|)²/Σ w²."""
    weight_C = torch.as_tensor(weights, dtype=torch.float64).abs()
    return float(weight_C.sum() ** 2 / weight_C.square().sum().clamp_min(1e-300))


def enough(weights: Sequence[float] | Tensor) -> bool:
    """Whether clusters of these weights carry a standard error."""
    return number(weights) > FEWEST - 1e-9


def of_ratio(above_C: Tensor, below_C: Tensor) -> float | None:
    """Standard error of Σ above / Σ below with the clusters as the sample (delete-one influences, linearised), None
    from too few.

    √Σ (a − ratio·b)²/(1 − b/Σb): the delta method, each residual made up for what the cluster itself did to the ratio.
    Among equal clusters that is the factor n/(n − 1). A mean is a ratio to the counts.
    """
    total = below_C.sum()
    if not enough(below_C):
        return None
    share_C = below_C / total
    residual_C = above_C - above_C.sum() / total * below_C
    error = float((residual_C.square() / (1 - share_C)).sum().sqrt() / total.abs())
    return error if math.isfinite(error) else None


def of_medians(above_N: Tensor, below_N: Tensor, cluster_N: Tensor) -> tuple[float, float | None]:
    """The ratio of two medians over the same observations, median(above) / median(below), and its standard error with
    the clusters as the sample, None from too few. The medians are the lower of two middle values.

    Each observation moves the logarithm of a median by (1/2 − [it lies below])/(density · median). The density is that
    between the quantiles one standard error of the share below on either side of the middle (Woodruff 1952).
    """
    _, cluster_N = cluster_N.unique(return_inverse=True)
    size_C = cluster_N.bincount().double()

    def by_cluster(value_N: Tensor) -> Tensor:
        return torch.zeros_like(size_C).index_add(0, cluster_N, value_N.double())

    medians, influences = [], []
    for value_N in (above_N.double(), below_N.double()):
        sorted_N = value_N.sort().values
        last = len(sorted_N) - 1
        median = sorted_N[last // 2]
        below_middle_N = (value_N <= median).double()
        step = min(max(of_ratio(by_cluster(below_middle_N), size_C) or 0.0, 1 / len(sorted_N)), 0.4)
        low, high = round((0.5 - step) * last), round((0.5 + step) * last)
        slope = (sorted_N[high] - sorted_N[low]) / max((high - low) / len(sorted_N), 1e-300)  # 1 / density
        medians.append(median)
        influences.append(slope / median * (0.5 - below_middle_N))
    ratio = float(medians[0] / medians[1])
    moved_N = ratio * (influences[0] - influences[1])
    return ratio, of_ratio(by_cluster(ratio + moved_N), size_C)


def of_sum(influence_N: Tensor, *labels: Sequence) -> float | None:
    """Standard error of a statistic from what each observation adds to its deviation, clustered by one label or by two
    at once.

    Two labels (an observation has a base and a source): the variance by the first, and that by the second, less that by
    both together, which the two have in common (Cameron, Gelbach & Miller 2011). None from too few clusters of either
    kind.
    """
    numbered = [torch.unique(torch.tensor(_numbers(label)), return_inverse=True)[1] for label in labels]
    if any(not enough(torch.bincount(cluster_N)) for cluster_N in numbered):
        return None
    variances = [_variance(influence_N, cluster_N) for cluster_N in numbered]
    if len(numbered) == 1:
        return math.sqrt(variances[0])
    both_N = numbered[0] * (int(numbered[1].max()) + 1) + numbered[1]
    shared = _variance(influence_N, torch.unique(both_N, return_inverse=True)[1])
    return math.sqrt(max(sum(variances) - shared, *variances))  # rounding or chance may leave less than the larger one


def _numbers(label: Sequence) -> list[int]:
    place = {value: i for i, value in enumerate(dict.fromkeys(label))}
    return [place[value] for value in label]


def _variance(influence_N: Tensor, cluster_N: Tensor) -> float:
    sum_C = torch.zeros(int(cluster_N.max()) + 1, dtype=torch.float64).index_add(0, cluster_N, influence_N.double())
    return float(sum_C.square().sum() * len(sum_C) / max(len(sum_C) - 1, 1))
