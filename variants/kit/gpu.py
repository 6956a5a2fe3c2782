"""What a GPU runs in place of plain PyTorch: the kernels of kernels.py, where they can be built."""

from __future__ import annotations

import functools

import torch


@functools.cache
def kernels():
    """variants.kit.kernels, tried once on small tensors; None where it cannot be used, which is said."""
    try:
        from variants.kit import kernels

        _try(kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  no Triton, no compiler for it, another GPU: slower, and the same
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"training: no kernels of our own ({why}): going on without", flush=True)
        return None
    return kernels


def _try(kernels, device: str = "cuda") -> None:
    """RuntimeError where a kernel gives something else than PyTorch does."""
    x_RC = torch.linspace(-1, 1, 60, device=device).sin().view(6, 10).contiguous()
    if not x_RC.gather(1, kernels.top_k(x_RC, 3)).sum().allclose(x_RC.topk(3).values.sum()):
        raise RuntimeError("top_k ranks differently")
    if not kernels.add_relu(x_RC.clone(), x_RC[0]).equal((x_RC + x_RC[0]).relu()):
        raise RuntimeError("a bias is added differently")
    for unit in (True, False):
        mine, theirs = x_RC.clone(), torch.nn.Parameter(x_RC.clone())
        optimizer = torch.optim.Adam([theirs], lr=0.1)
        theirs.grad = x_RC.flip(0)
        if unit:
            row_RC = torch.nn.functional.normalize(x_RC, dim=1)
            theirs.grad = theirs.grad - (theirs.grad * row_RC).sum(1, keepdim=True) * row_RC
        optimizer.step()
        along_R, square_R = x_RC.new_empty(2, 6).unbind()
        moments, one = torch.zeros(2, *x_RC.shape, device=device), x_RC.new_ones(())
        kernels.sizes(mine, x_RC.flip(0), along_R, square_R)
        kernels.step(mine, x_RC.flip(0), *moments, one, along_R, unit, 1, 0.1, (0.9, 0.999), 1e-8)
        wanted = torch.nn.functional.normalize(theirs.data, dim=1) if unit else theirs.data
        if not mine.allclose(wanted, atol=1e-5):
            raise RuntimeError("a step differs from Adam's")
        if unit and not square_R.sum().allclose(theirs.grad.pow(2).sum()):
            raise RuntimeError("a gradient's norm differs")
