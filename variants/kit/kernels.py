"""Triton kernels for what is no matrix product in a training step, where PyTorch is far from a GPU's bandwidth.

Measured on an H200, [16384, 2304] and [2304, 16384] in fp32 (tests/benchmarks/RESULTS.md): inductor's graph of `sizes`
took four times a copy of as many bytes; torch.topk of [2048, 16384] five times its reading. Imported where there is a
CUDA GPU; ImportError without Triton.

Shapes: R rows of C columns, K chosen of each row; P rows of a parameter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a parameter that one program handles where rows mean nothing
WIDEST = 16384  # columns that a program of `top_k` holds
GROUP, GUESSES, WARPS = 128, 9, 8  # of `top_k`: columns counted together, tries before it halves only, warps at most


# ------------------------------------------------------------------------------------------------ the k largest


@triton.jit
def _key(bits):
    """Integers in the order of the floats that have these bits; its own inverse. NaN is the largest, as for torch."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    return _key(key.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _guess(low, high, count_low, count_high, K):
    """A key between two, where about K are larger if their number falls exponentially, as in a tail it does."""
    fallen = tl.log(count_low.to(tl.float32)) - tl.log(K.to(tl.float32))
    falls = tl.log(count_low.to(tl.float32)) - tl.log(tl.maximum(count_high.to(tl.float32), 0.5))
    value = _value(low) + (_value(high) - _value(low)) * fallen / falls
    return tl.minimum(tl.maximum(_key(value.to(tl.int32, bitcast=True)).to(tl.int64), low + 1), high)


@triton.jit(do_not_specialize=["K"])
def _top_k(values, index, C, K, GROUPS: tl.constexpr, GROUP: tl.constexpr, GUESSES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # in groups that lie in one warp each, so that counting within them waits for no other
    column = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    key = _key(tl.load(values + row * C + column, column < C, 0.0).to(tl.int32, bitcast=True))
    key = tl.where(column < C, key, -2147483648)  # below -inf's
    # the largest t with at least K keys from it on lies in [low, high]; done as soon as exactly K are
    low = tl.min(tl.min(tl.where(column < C, key, 2147483647), 1), 0).to(tl.int64)
    high = tl.max(tl.max(key, 1), 0).to(tl.int64)
    count_low, count_high, tries = C, 0, 0
    while low < high:
        middle = low + (high - low + 1) // 2
        if tries == 0:  # of few positive activations all are kept, and some of many zeros
            middle = tl.where((low < 1) & (high >= 1), 1, middle)
        elif (tries < GUESSES) & (tries % 3 != 0):
            middle = _guess(low, high, count_low, count_high, K)
        count = tl.sum(tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 1), 0)
        enough = count >= K
        low, count_low = tl.where(enough, middle, low), tl.where(enough, count, count_low)
        high, count_high = tl.where(enough, high, middle - 1), tl.where(enough, count_high, count)
        high = tl.where(count == K, middle, high)
        tries += 1
    threshold = low.to(tl.int32)
    above, equal = key > threshold, key == threshold
    # both counts so far in one scan: at most 2^14 of each
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    of_group = tl.sum(both, 1)
    so_far = tl.cumsum(both, 1) + (tl.cumsum(of_group, 0) - of_group)[:, None]
    n_above = tl.sum(of_group, 0) & 0xFFFF
    place = tl.where(above, (so_far & 0xFFFF) - 1, n_above + (so_far >> 16) - 1)
    tl.store(index + row * K + place, column.to(tl.int64), (above | equal) & (place < K))


def top_k(values_RC: Tensor, k: int) -> Tensor:
    """Columns [R, k] of the k largest of each row, in no order, those of equal ones from the left; fp32, contiguous.

    Rows wider than a program holds are ranked in equal parts, then the chosen of all parts.
    """
    R, C = values_RC.shape
    parts = -(-C // WIDEST)
    if parts > 1:
        part = C // parts
        index_RPK = top_k(values_RC.view(R * parts, part), k).view(R, parts, k)
        index_RN = (index_RPK + torch.arange(0, C, part, device=values_RC.device)[:, None]).view(R, -1)
        return index_RN.gather(1, top_k(values_RC.gather(1, index_RN), k))
    index_RK = torch.empty(R, k, dtype=torch.int64, device=values_RC.device)
    groups = max(1, triton.next_power_of_2(C) // GROUP)
    _top_k[(R,)](values_RC, index_RK, C, k, groups, GROUP, GUESSES, num_warps=min(WARPS, groups))
    return index_RK


def takes(values_RC: Tensor, k: int) -> bool:
    """Whether `top_k` ranks these: fp32 in parts that are equal, no wider than a program holds, and have k columns."""
    C, parts = values_RC.shape[1], -(-values_RC.shape[1] // WIDEST)
    whole = values_RC.dtype == torch.float32 and values_RC.is_contiguous() and C % parts == 0
    return whole and k <= C // parts and (parts == 1 or parts * k <= WIDEST)


# ------------------------------------------------------------------------------------------------ activations


@triton.jit
def _add_relu(values, bias, C, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    value = tl.load(values + row * C + column, inside) + tl.load(bias + column, inside)
    tl.store(values + row * C + column, tl.where(value < 0, 0.0, value), inside)


def add_relu(values_RC: Tensor, bias_C: Tensor) -> Tensor:
    """ReLU(values + bias) in place, fp32, contiguous; NaN stays, as it does with torch."""
    R, C = values_RC.shape
    _add_relu[(R, triton.cdiv(C, BLOCK))](values_RC, bias_C, C, BLOCK, num_warps=8)
    return values_RC


# ------------------------------------------------------------------------------------------------ a parameter's step


@triton.jit
def _sizes(parameter, grad, along, square, C, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, inside = row * C + column, column < C
    p, g = tl.load(parameter + place, inside, 0.0), tl.load(grad + place, inside, 0.0).to(tl.float32)
    share = tl.sum(g * p, 0) / tl.maximum(tl.sum(p * p, 0), 1e-24)
    g = g - share * p
    tl.store(along + row, share)
    tl.store(square + row, tl.sum(g * g, 0))


@triton.jit
def _step(parameter, grad, mean, square, scale, along, low, C, size, root, share1, beta2, share2, eps,
          BLOCK: tl.constexpr, UNIT: tl.constexpr, LOW: tl.constexpr):
    # of one row, or of a stretch of all C
    number, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, inside = number * BLOCK + column, number * BLOCK + column < C
    if UNIT:
        place, inside = number * C + column, column < C
    p = tl.load(parameter + place, inside, 0.0)
    g = tl.load(grad + place, inside, 0.0).to(tl.float32)
    if UNIT:
        g = g - tl.load(along + number) * p
    g = g / tl.load(scale)
    m, v = tl.load(mean + place, inside, 0.0), tl.load(square + place, inside, 0.0)
    m = m + share1 * (g - m)
    v = beta2 * v + share2 * g * g
    p = p - size * m / (tl.sqrt(v) / root + eps)
    if UNIT:
        p = p / tl.maximum(tl.sqrt(tl.sum(p * p, 0)), 1e-12)
    tl.store(mean + place, m, inside)
    tl.store(square + place, v, inside)
    tl.store(parameter + place, p, inside)
    if LOW:
        tl.store(low + place, p.to(low.dtype.element_ty), inside)


def sizes(parameter_FD: Tensor, grad_FD: Tensor, along_F: Tensor, square_F: Tensor) -> None:
    """Write each row's share in its gradient, and the sum of squares of what is left of the gradient without it.

    Contiguous tensors; the gradient fp32 or bf16.
    """
    D = parameter_FD.shape[1]
    _sizes[(len(parameter_FD),)](parameter_FD, grad_FD, along_F, square_F, D, triton.next_power_of_2(D), num_warps=8)


def step(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor, along_F: Tensor, unit: bool,
         count: int, lr: float, betas: tuple[float, float], eps: float, low: Tensor | None = None) -> None:
    """Adam's step `count` (from 1) in place, on the gradient over `scale` ().

    `unit`: on the gradient without each row's share along_F of the row, and rows have norm 1 afterwards. `low`, if
    given, is the parameter's copy in another precision, and is one again afterwards.
    """
    beta1, beta2 = betas
    size, root = lr / (1 - beta1**count), (1 - beta2**count) ** 0.5
    C, block, programs = parameter.numel(), BLOCK, triton.cdiv(parameter.numel(), BLOCK)
    if unit:
        programs, C = parameter.shape
        block = triton.next_power_of_2(C)
    copied = low is not None
    _step[(programs,)](parameter, grad, mean, square, scale, along_F, low if copied else scale, C, size, root,
                       1 - beta1, beta2, 1 - beta2, eps, block, unit, copied, num_warps=8)
