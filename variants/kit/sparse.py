"""Products of activations and weights that read only the entries that are not 0, where that pays.

Shapes: as in variants/base.py; n entries of a sparse matrix, N the width of what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variants.kit import precision
from variants.kit.copies import low
from variants.kit.graphs import outside_graphs

_taken: bool | None = None  # the path that `taken` asks for


@contextmanager
def taken(sparse: bool) -> Iterator[None]:
    """Within: the sparse path, or the dense one, whatever pays."""
    global _taken
    before, _taken = _taken, sparse
    try:
        yield
    finally:
        _taken = before


def sparse_pays(device: torch.device, k: int, d_sae: int) -> bool:
    """Whether k features of d_sae are better handled row by row than by dense products.

    Measured on 2 cores, D = 576, B = 1024, ratio of step times sparse/dense (tests/benchmarks/sparse.py): F = 2304 .41
    (k = 16), .58 (64), .70 (128), 1.07 (256); F = 16,384 .33 (k = 16), .47 (256).
    On a GPU by bytes and FLOP, unmeasured: four products of 2·D·F at 550 TFLOP/s take as long as reading four times k
    rows of D fp32 numbers at 1.7 TB/s from F = 650·k on.
    """
    if _taken is not None:
        return _taken
    factor = {"cpu": 12, "cuda": 1024}.get(device.type)
    return factor is not None and factor * k <= d_sae


def few_positive(z_BF: Tensor) -> bool:
    """Whether z·W is better computed from the positive entries of z alone.

    Measured on 2 cores, D = 576, B = 1024, product and gradients, sparse/dense: F = 2304 .41 with 32 positive entries a
    row, .69 with 64, 1.09 with 128; F = 16,384 .42 with 64, .62 with 256, .90 with 512.
    A GPU has to be waited for to know, which only the long steps of a wide SAE can spare.
    """
    B, n_features, on_cpu = *z_BF.shape, z_BF.device.type == "cpu"
    if not on_cpu and not (z_BF.is_cuda and n_features >= 2**16):
        return False
    return sparse_pays(z_BF.device, (3 if on_cpu else 1) * _count(z_BF) // B, n_features)


@outside_graphs  # a number on the host ends a graph
def _count(z_BF: Tensor) -> int:
    return int(z_BF.count_nonzero())


def dense_activations(sae: nn.Module, x_BD: Tensor, k: int) -> Tensor:
    """ReLU(z_pre) [B, F] of an SAE, to choose k features a token from; without a graph where sparsity pays.

    So also on a GPU whatever k is, as the chosen's gradient takes fewer passes over [B, F] than that of all; but for
    auxk where many features are dead, which needs the graph.
    """
    plain = type(sae).pre_activations.__module__ == "variants.base"  # not a variant's own
    if plain and precision.lower(x_BD) and not sae.many_dead:
        return precision.affine(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, relu=True)
    if sparse_pays(x_BD.device, k, sae.d_sae):
        with torch.no_grad():
            return sae.pre_activations(x_BD).relu_()
    return F.relu(sae.pre_activations(x_BD))


def kept_activations(sae: nn.Module, x_BD: Tensor, acts_BF: Tensor, index_BK: Tensor) -> Tensor:
    """The activations at index_BK, [B, K], with the gradient of ReLU((x − b_dec)·W_enc + b_enc) at those entries."""
    if not acts_BF.requires_grad:
        return _KeptActivations.apply(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, acts_BF, index_BK)
    return acts_BF.gather(1, index_BK)


def decode_sparse(z_BK: Tensor, index_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Σ_k z[b,k]·W_dec[index[b,k]], shape [B, D]; `embedding_bag` reads only the rows used, where that pays."""
    if sparse_pays(z_BK.device, z_BK.shape[1], len(W_dec_FD)):
        return _SparseProduct.apply(z_BK.flatten(), W_dec_FD, *_bags(index_BK))
    dtype = precision.lower(z_BK)
    if dtype:
        return _ListedProduct.apply(z_BK, index_BK, W_dec_FD, dtype)
    z_BF = torch.zeros(z_BK.shape[0], W_dec_FD.shape[0], device=z_BK.device, dtype=z_BK.dtype)
    return z_BF.scatter(1, index_BK, z_BK) @ W_dec_FD


def relu_product(z_BF: Tensor, W_FN: Tensor) -> Tensor:
    """z·W [B, N] for z = ReLU(…), cheap where few entries are positive; z's gradient is 0 where z is, as ReLU's is."""
    if not few_positive(z_BF):
        dtype = precision.lower(z_BF)
        return _LowProduct.apply(z_BF, W_FN, dtype) if dtype else z_BF @ W_FN
    row_n, column_n = z_BF.detach().nonzero(as_tuple=True)
    begin_B = torch.searchsorted(row_n, torch.arange(len(z_BF), device=z_BF.device))
    return _SparseProduct.apply(_Positive.apply(z_BF, row_n, column_n), W_FN, row_n, column_n, begin_B)


def _bags(index_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns [B·K] and beginnings of the rows [B] of a list that has K entries a row."""
    B, K = index_BK.shape
    row_n = torch.arange(B, device=index_BK.device)[:, None].expand(B, K).flatten()
    return row_n, index_BK.flatten(), torch.arange(0, B * K, K, device=index_BK.device)


def _sum_by_column(z_n: Tensor, row_n: Tensor, column_n: Tensor, x_BN: Tensor, columns: int) -> Tensor:
    """Zᵀ·x [columns, N] for the sparse Z of the entries z at (row, column); each column's rows in order, one sum."""
    column_n, order_n = column_n.sort(stable=True)
    begin_C = torch.searchsorted(column_n, torch.arange(columns, device=column_n.device))
    return F.embedding_bag(row_n[order_n], x_BN, begin_C, per_sample_weights=z_n[order_n].to(x_BN.dtype), mode="sum")


class _SparseProduct(torch.autograd.Function):
    """Z·W [B, N] for the sparse Z of the entries z [n] at (row, column), rows ascending; gradients along these only."""

    @staticmethod
    def forward(ctx, z_n, W_FN, row_n, column_n, begin_B):
        with torch.enable_grad():
            ctx.z_n = z_n.detach().to(W_FN.dtype).requires_grad_()
            ctx.product_BN = F.embedding_bag(column_n, W_FN.detach(), begin_B, per_sample_weights=ctx.z_n, mode="sum")
        ctx.save_for_backward(row_n, column_n)
        ctx.features = len(W_FN)
        return ctx.product_BN.detach()

    @staticmethod
    def backward(ctx, grad_BN):
        (d_z_n,) = torch.autograd.grad(ctx.product_BN, ctx.z_n, grad_BN, retain_graph=True)  # a caller may come twice
        d_W_FN = None
        if ctx.needs_input_grad[1]:
            d_W_FN = _sum_by_column(ctx.z_n.detach(), *ctx.saved_tensors, grad_BN, ctx.features)
        return d_z_n, d_W_FN, None, None, None


class _ListedProduct(torch.autograd.Function):
    """Z·W [B, N] in a lower precision for the Z [B, F] that has z_BK at index_BK; W's gradient in fp32 as it comes."""

    @staticmethod
    def forward(ctx, z_BK, index_BK, W_FN, dtype):
        with torch.autocast(z_BK.device.type, enabled=False):
            z_BF = _listed(z_BK, index_BK, len(W_FN), dtype)
            W_low_FN = low(W_FN, dtype)
            ctx.save_for_backward(z_BF, index_BK, W_low_FN)
            return z_BF @ W_low_FN

    @staticmethod
    def backward(ctx, grad_BN):
        z_BF, index_BK, W_low_FN = ctx.saved_tensors
        with torch.autocast(grad_BN.device.type, enabled=False):
            grad_BN = grad_BN.to(z_BF.dtype)
            d_z_BK = (grad_BN @ W_low_FN.T).gather(1, index_BK).float()
            d_W_FN = precision.product(z_BF.T, grad_BN) if ctx.needs_input_grad[2] else None
        return d_z_BK, None, d_W_FN, None


class _LowProduct(torch.autograd.Function):
    """Z·W [B, N] in a lower precision; W's gradient in fp32 as it comes, for which autocast makes a copy."""

    @staticmethod
    def forward(ctx, z_BF, W_FN, dtype):
        with torch.autocast(z_BF.device.type, enabled=False):
            z_low_BF, W_low_FN = z_BF.to(dtype), low(W_FN, dtype)
            ctx.save_for_backward(z_low_BF, W_low_FN)
            ctx.dtype = z_BF.dtype
            return z_low_BF @ W_low_FN

    @staticmethod
    def backward(ctx, grad_BN):
        z_low_BF, W_low_FN = ctx.saved_tensors
        with torch.autocast(grad_BN.device.type, enabled=False):
            grad_BN = grad_BN.to(z_low_BF.dtype)
            d_z_BF = (grad_BN @ W_low_FN.T).to(ctx.dtype) if ctx.needs_input_grad[0] else None
            d_W_FN = precision.product(z_low_BF.T, grad_BN) if ctx.needs_input_grad[1] else None
        return d_z_BF, d_W_FN, None


def _listed(z_BK: Tensor, index_BK: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [B, columns] that has z_BK at index_BK, and 0 elsewhere."""
    z_BC = torch.zeros(len(z_BK), columns, device=z_BK.device, dtype=dtype)
    return z_BC.scatter_(1, index_BK, z_BK.to(dtype))


class _KeptActivations(torch.autograd.Function):
    """acts_BF at index_BK, differentiable along the kept entries alone: K/F of the dense gradient's work.

    On a GPU, where sparsity does not pay, by a dense product in autocast's precision.
    """

    @staticmethod
    def forward(ctx, x_BD, W_enc_DF, b_enc_F, b_dec_D, acts_BF, index_BK):
        kept_BK = acts_BF.gather(1, index_BK)
        ctx.save_for_backward(x_BD, W_enc_DF, b_dec_D, index_BK, kept_BK > 0)
        ctx.dtype = precision.lower(x_BD)
        return kept_BK

    @staticmethod
    def backward(ctx, grad_BK):
        with torch.autocast(grad_BK.device.type, enabled=False):  # which a compiled backward would run in
            return _KeptActivations._gradients(ctx, grad_BK)

    @staticmethod
    def _gradients(ctx, grad_BK):
        x_BD, W_enc_DF, b_dec_D, index_BK, positive_BK = ctx.saved_tensors
        grad_BK = (grad_BK * positive_BK).to(W_enc_DF.dtype)  # ReLU
        features, wants_x, d_x_BD = W_enc_DF.shape[1], ctx.needs_input_grad[0], None
        if ctx.dtype and not sparse_pays(grad_BK.device, grad_BK.shape[1], features):
            grad_BF = _listed(grad_BK, index_BK, features, ctx.dtype)
            d_bias_F = grad_BF.sum(0, dtype=torch.float32)
            d_W_DF = precision.product((x_BD - b_dec_D).to(ctx.dtype).T, grad_BF)
            if wants_x:
                d_x_BD = (grad_BF @ W_enc_DF.T.to(ctx.dtype)).to(x_BD.dtype)
            return d_x_BD, d_W_DF, d_bias_F, -(W_enc_DF @ d_bias_F), None, None
        row_n, column_n, _ = _bags(index_BK)
        d_bias_F = grad_BK.new_zeros(features).index_add_(0, column_n, grad_BK.flatten())
        # dW_encᵀ[f] = Σ over kept (b, k) of feature f of grad·(x[b] − b_dec)
        d_W_FD = _sum_by_column(grad_BK.flatten(), row_n, column_n, x_BD - b_dec_D, features)
        if wants_x:
            d_x_BD = decode_sparse(grad_BK, index_BK, W_enc_DF.T)
        return d_x_BD, d_W_FD.T, d_bias_F, -(W_enc_DF @ d_bias_F), None, None


class _Positive(torch.autograd.Function):
    """The entries of z_BF at (row, column), [n]; the gradient of all others is 0, and each is listed once."""

    @staticmethod
    def forward(ctx, z_BF, row_n, column_n):
        ctx.save_for_backward(row_n, column_n)
        ctx.shape = z_BF.shape
        return z_BF[row_n, column_n]

    @staticmethod
    def backward(ctx, grad_n):
        return grad_n.new_zeros(ctx.shape).index_put_(ctx.saved_tensors, grad_n), None, None
