"""Positions whose residuals are too large to be measured, with --max_norm_ratio: one mask for all evals.

Shapes: B rows, T positions, D = d_model.
"""

from __future__ import annotations

from torch import Tensor


def within(setup, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """mask_BT, on its device, without the positions whose norm exceeds setup.max_norm; itself where that is None."""
    if setup.max_norm is None:
        return mask_BT
    return mask_BT & (x_BTD.float().norm(dim=-1) <= setup.max_norm).to(mask_BT.device)
