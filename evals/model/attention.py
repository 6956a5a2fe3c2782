"""Flex attention as training runs it on a GPU: with the soft-capping that fused kernels drop, and blocks that suit.

Under transformers' name NAME, as any attention of its own. Measured on an H200, 32 rows of 1024 tokens, 8 heads of 256,
bf16 (tests/benchmarks/RESULTS.md): transformers' flex attention 115 TFLOP/s, with another formula of the cap 165, with
these blocks and promises 246; an error of .0017 against fp32 with each.

Shapes: B rows, H heads (G of keys and values), T tokens, d numbers a head.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

NAME = "capped_flex"
# by head size, on a GPU of compute capability 9.0 in bf16 or fp16; inductor's own choice for 256: 64, 32, 4 warps, 3
BLOCKS = {256: dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2)}


@functools.cache
def register() -> None:
    """Make NAME known to transformers: this attention, with the masks of its flex attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flex_attention_mask

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        BLOCKS.clear()
    AttentionInterface.register(NAME, capped_attention)
    AttentionMaskInterface.register(NAME, flex_attention_mask)


def capped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float | None = None,
                     softcap: float | None = None, sliding_window: int | None = None, **others):
    """(output [B, T, H, d], None) of query [B, H, T, d], key and value [B, G, T, d]; transformers calls it."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers.integrations.flex_attention import flex_attention_forward, repeat_kv

    given = dict(scaling=scaling, softcap=softcap, sliding_window=sliding_window)
    if not softcap or not isinstance(attention_mask, BlockMask) or others.get("s_aux") is not None:
        return flex_attention_forward(module, query, key, value, attention_mask, **given, **others)
    heads, T, d = query.shape[1:]
    if heads & (heads - 1):  # as transformers does, for numbers of heads that are no power of two
        key, value = repeat_kv(key, heads // key.shape[1]), repeat_kv(value, heads // value.shape[1])
    # cap·tanh(s/cap) by one exponential, which is most of what the kernel does besides its products; scaled at once
    rate = 2 * math.log2(math.e) * (d**-0.5 if scaling is None else scaling) / softcap

    def capped(score, b, h, q, k):
        return softcap - 2 * softcap / (1 + torch.exp2(rate * score))

    # each token sees itself; blocks follow each other where no window leaves some out
    options = dict(ROWS_GUARANTEED_SAFE=True, BLOCKS_ARE_CONTIGUOUS=(sliding_window or T) >= T)
    if query.dtype.itemsize == 2:
        options |= BLOCKS.get(d, {})
    output = flex_attention(query, key, value, score_mod=capped, block_mask=attention_mask, scale=1.0,
                            enable_gqa=key.shape[1] != heads, kernel_options=options)
    return output.transpose(1, 2).contiguous(), None
