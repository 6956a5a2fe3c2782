"""The scale by which a run divides its activations, and where an SAE begins when their mean dominates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from variants.kit import ranks

# share of E‖x‖² in the mean from which on what is made for E‖x‖² = 1 costs features (variants/README.md; arXiv
# 2605.31518 finds the same of 454 layers). From .5 on a few die; ordinary streams, SmolLM2-135M-Instruct's after blocks
# 0 to 29 at .05 to .60 (20,000 tokens of the embedded text), stay as they were
DOMINANT = 0.65


def stream_scale(x_ND: Tensor) -> tuple[float, float]:
    """√E‖x‖² of raw activations [N, D], of which ranks may each hold a part, and the share that their mean holds.

    In fp64. Where the mean dominates, the scale is that of what is left to explain: √E‖x − mean‖².
    """
    sum_D, square = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64), 0.0
    for part in x_ND.split(2**13):
        sum_D += part.double().sum(0)
        square += part.double().pow(2).sum().item()
    n = ranks.total(len(x_ND))
    square = ranks.total(square) / n
    mean_square = (ranks.mean(sum_D) * ranks.sharing() / n).pow(2).sum().item()
    if mean_square > DOMINANT * square:
        return max(square - mean_square, 1e-12 * square) ** 0.5, mean_square / square
    return square**0.5, mean_square / max(square, 1e-300)


def dominant_mean(share: float) -> str:
    """The note on a mean that holds this share of E‖x‖²; "" where it does not dominate.

    It dominates above DOMINANT: a mean of 1.4 times the spread.
    """
    if share <= DOMINANT:
        return ""
    times = (share / max(1 - share, 1e-12)) ** 0.5
    return (f"the mean of the activations is {times:.3g} times their spread and holds {share:.1%} of E‖x‖²: they are "
            f"divided by the spread, and SAEs with a b_dec begin at the mean. The mean alone gives a cossim of "
            f"{share**0.5:.3f}: go by r2 and r2_median")


@torch.no_grad()
def begin_at_dominant_mean(sae: nn.Module, x_ND: Tensor) -> None:
    """Where the mean dominates: b_dec = geometric median, and an encoder of x begins as one of x − b_dec.

    `stream_scale` has decided it, on more tokens: x [N, D] over the spread has ‖x‖² around 1/(1 − share), 2.9 at least,
    else around 1. The median token is asked: of SmolLM2's layer 12 the few that hold most of E‖x‖² make it .43 in the
    first 8,192 tokens instead of 1, and might as well make it 2.
    """
    typical = float(x_ND.double().pow(2).sum(1).median())
    own = dict(sae.named_parameters(recurse=False))
    if not typical > (1 - DOMINANT) ** -0.5 or "b_dec" not in own:
        return
    own["b_dec"].copy_(geometric_median(x_ND))
    if not sae.centred and "b_enc" in own:
        own["b_enc"].sub_(own["b_dec"] @ own["W_enc"])


def geometric_median(x_ND: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Weiszfeld's algorithm for the point with the smallest mean distance to the rows of x, shape [D]."""
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(iterations):
        weight_N = 1.0 / (x_ND - median_D).norm(dim=1).clamp_min(1e-12)
        new_D = (weight_N[:, None] * x_ND).sum(0) / weight_N.sum()
        moved, median_D = (new_D - median_D).norm(), new_D
        if moved < tolerance * median_D.norm():
            break
    return median_D.float()
