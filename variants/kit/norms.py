"""Tokens of huge norm left out of training (--max_norm_ratio): as BOS positions, they are not in the blocks.

The bound is a multiple of the median norm, as dictionary_learning's `max_activation_norm_multiple` (August 2025, for
Qwen's attention sinks, 10 recommended). There the median is each pass's own; here it is the first block's and then
fixed, so that evals and whoever reads the saved SAE leave out the same tokens.

Shapes: N tokens of a block, P pairs of tokens of which one attends to the other, D = d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 2**13  # tokens of which there is a copy in fp32 at once


def check(ratio: float | None, processes: int) -> None:
    """ValueError for several processes: each would know the tokens of its own share alone."""
    if ratio and processes > 1:
        raise ValueError(f"--max_norm_ratio={ratio:g} needs one process, and torchrun started {processes}\n"
                         "start one, or leave --max_norm_ratio out")


def norms(x_ND: Tensor) -> Tensor:
    """‖x‖ of each token, [N] in fp32."""
    return torch.cat([part.float().norm(dim=1) for part in x_ND.split(PART)])


def bound(x_ND: Tensor, ratio: float) -> float:
    """The largest norm that is kept: `ratio` times the median. Waits for the device."""
    return ratio * float(norms(x_ND).median())


def told(ratio: float | None, bound: float | None) -> dict[str, float]:
    """What settings and a saved SAE say of it; {} where no token is left out. No ratio: the bound is a saved SAE's."""
    found = dict(max_norm_ratio=ratio, max_norm=bound)
    return {name: value for name, value in found.items() if value}


def leave_out(block: dict[str, Tensor], most: dict[int, float | None]) -> int:
    """Take the tokens whose norm exceeds most[layer] at any of these layers out of a block (variants/kit/contexts.py),
    in place; returns how many, which the block notes as `left_out`: none where there is no bound (all None).

    Waits for the device. ValueError where none is left.
    """
    if None in most.values():
        return 0
    within_N = torch.stack([norms(block[f"x_{layer}"]) <= largest for layer, largest in most.items()]).all(0)
    within_N = within_N.cpu()
    left_out = int((~within_N).sum())
    if left_out == len(within_N):
        raise ValueError(f"--max_norm_ratio leaves out all {left_out:,} tokens of a block: none has a norm below "
                         f"{max(most.values()):.3g}\nthe text changes from block to block: give a larger ratio")
    if not left_out:
        return 0
    block["left_out"] = torch.tensor(left_out)
    kept_n = within_N.nonzero().squeeze(1)
    place_N = within_N.cumsum(0).int() - 1  # of a kept token among the kept
    for name in [name for name in block if name in ("tokens_N", "place_N") or name.startswith("x_")]:
        block[name] = block[name].index_select(0, kept_n.to(block[name].device))  # one after the other: a copy each
    for prefix in [name.removesuffix("pair_query_P") for name in block if name.endswith("pair_query_P")]:
        pairs_2P = torch.stack([block[f"{prefix}pair_query_P"].cpu(), block[f"{prefix}pair_key_P"].cpu()]).long()
        both_p = within_N[pairs_2P].all(0).nonzero().squeeze(1)
        for end, index_P in zip(("pair_query_P", "pair_key_P"), pairs_2P):
            block[prefix + end] = place_N[index_P[both_p]].to(block[prefix + end].device)
        value_PA = block[f"{prefix}pair_attention_PA"]
        block[f"{prefix}pair_attention_PA"] = value_PA.index_select(0, both_p.to(value_PA.device))
    return left_out


def repeated(order_n: Tensor, n: int) -> Tensor:
    """`order_n`; where it is shorter than n, followed by itself until it has n entries."""
    if len(order_n) >= n:
        return order_n
    return order_n.repeat(-(-n // len(order_n)))[:n]
