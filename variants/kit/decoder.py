"""Unit-norm decoder rows: their gradient projected, their norm restored, as one kernel each on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fused(function: Callable[..., None]) -> Callable[..., None]:
    """A function of tensors as one compiled kernel on a GPU, where its temporaries would cost more than its work."""
    compiled = function

    def call(*tensors: Tensor) -> None:
        nonlocal compiled
        if compiled is None or not tensors[0].is_cuda or hasattr(tensors[0], "full_tensor"):
            function(*tensors)
            return
        try:
            if compiled is function:  # not before: it imports for a second
                compiled = torch.compile(function, dynamic=False)
            compiled(*tensors)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:  # noqa: BLE001  no compiler, no Triton: slower, and the same
            print(f"{function.__name__} is not compiled ({type(error).__name__}): going on without", flush=True)
            compiled = None
            function(*tensors)

    return call


@fused
def _project(grad_FD: Tensor, W_FD: Tensor) -> None:
    row_FD = F.normalize(W_FD, dim=1)
    grad_FD -= (grad_FD * row_FD).sum(1, keepdim=True) * row_FD


@fused
def _normalise(W_FD: Tensor) -> None:
    W_FD /= W_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def project_decoder_gradient(W_dec_FD: nn.Parameter) -> None:
    """Remove from each decoder row's gradient its part along the row (rows are features: axis 1, not 0)."""
    if W_dec_FD.grad is not None:
        _project(W_dec_FD.grad, W_dec_FD)


@torch.no_grad()
def normalise_decoder(W_dec_FD: nn.Parameter) -> None:
    """Give each decoder row unit norm, in place."""
    _normalise(W_dec_FD)
