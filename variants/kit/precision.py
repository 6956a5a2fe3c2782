"""Pre-activations in fp32 where a GPU works in bf16: thresholds, counts and choices are decided on them.

Shapes: as in variants/base.py; M×K times K×N in a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from variants.kit import gpu
from variants.kit.copies import low


def affine(x: Tensor, W_DF: Tensor, b_F: Tensor | float = 0.0, centre_D: Tensor | None = None,
           fine: bool = False, relu: bool = False) -> Tensor:
    """(x − centre)·W + b, shape (..., F), in W's dtype: thresholds, counts and choices are decided on it.

    Under autocast the product's factors are rounded as in any other, its result and the biases are not. For bf16, x and
    columns of norm 1: an error of .002/√D instead of .001·z.
    `fine`: 4e-6/√D for three times the product's work, where a difference of .001 counts.
    `relu`: ReLU of all that, without a graph.
    In full precision the centre is folded into the bias, which saves a product for its gradient; in a lower one it is
    taken off before x is rounded.
    """
    if relu:
        with torch.no_grad():
            return _rectified(x, W_DF, b_F, centre_D)
    kind = x.device.type
    if W_DF.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return _RoundedFactors.apply(x, W_DF, b_F, centre_D, fine, torch.get_autocast_dtype(kind))
    return F.linear(x.to(W_DF.dtype), W_DF.T, b_F if centre_D is None else b_F - centre_D @ W_DF)


def _rectified(x: Tensor, W_DF: Tensor, b_F: Tensor, centre_D: Tensor) -> Tensor:
    """ReLU(`affine`), on a GPU with bias and ReLU in one pass."""
    dtype, kernels = lower(x), None
    if dtype and not torch.compiler.is_compiling() and x.dim() == 2 and W_DF.dtype == torch.float32:
        kernels = gpu.kernels()
    if not kernels:
        return affine(x, W_DF, b_F, centre_D).relu_()
    with torch.autocast(x.device.type, enabled=False):
        return kernels.add_relu(product((x - centre_D).to(dtype), low(W_DF, dtype)), b_F)


class _RoundedFactors(torch.autograd.Function):
    """`affine` in fp32 with its factors, and those of its gradients, in a lower precision."""

    @staticmethod
    def forward(ctx, x, W_DF, b_F, centre_D, fine, dtype):
        with torch.autocast(x.device.type, enabled=False):
            x_ND = (x if centre_D is None else x - centre_D).reshape(-1, len(W_DF))
            x_high_ND, W_high_DF = x_ND.to(dtype), low(W_DF, dtype)
            if fine:  # x·W = high·high + low·high + high·low, but for the product of what both lose in rounding
                x_low_ND, W_low_DF = (x_ND - x_high_ND).to(dtype), (W_DF - W_high_DF).to(dtype)
                parts_NK = torch.cat([x_high_ND, x_low_ND, x_high_ND], 1)
                z_NF = product(parts_NK, torch.cat([W_high_DF, W_high_DF, W_low_DF]))
            else:
                z_NF = product(x_high_ND, W_high_DF)
            z_NF += b_F
        ctx.save_for_backward(x_high_ND, W_DF)
        ctx.x = x.shape, x.dtype
        return z_NF.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x_high_ND, W_DF = ctx.saved_tensors
        shape, dtype = ctx.x
        grad_NF = grad.reshape(-1, W_DF.shape[1])
        with torch.autocast(grad.device.type, enabled=False):
            d_b_F, low_NF = grad_NF.sum(0), grad_NF.to(x_high_ND.dtype)
            d_W_DF = product(x_high_ND.T, low_NF)
            d_centre_D = -(W_DF @ d_b_F) if ctx.needs_input_grad[3] else None
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = product(low_NF, W_DF.to(low_NF.dtype).T).view(shape).to(dtype)
        return d_x, d_W_DF, d_b_F if ctx.needs_input_grad[2] else None, d_centre_D, None, None


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a·b [M, N] of factors in a lower precision, in fp32."""
    if a_MK.dtype in (torch.float32, torch.float64):
        return a_MK @ b_KN
    if not torch.compiler.is_compiling():
        learn(a_MK.device, a_MK.dtype)
    if _into_fp32.get(a_MK.device.type):
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return a_MK.float() @ b_KN.float()  # the same numbers but for the order of the sums


def lower(x: Tensor) -> torch.dtype | None:
    """The precision in which a GPU multiplies now, by autocast; None on a CPU, where nothing is rounded."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.is_cuda and torch.is_autocast_enabled(kind) else None


_into_fp32: dict[str, bool] = {}  # by kind of device: whether one product takes lower factors to fp32


def learn(device: torch.device, dtype: torch.dtype) -> None:
    """Try once whether a product gives fp32 at the speed of `dtype`: CUDA from torch 2.8 on."""
    if device.type in _into_fp32:
        return
    try:
        torch.mm(*torch.ones(2, 16, 16, device=device, dtype=dtype), out_dtype=torch.float32)
        _into_fp32[device.type] = True
    except (TypeError, RuntimeError):
        _into_fp32[device.type] = False
