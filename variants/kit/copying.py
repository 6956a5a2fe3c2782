"""The one way to copy an SAE, whatever its author keeps on it."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.FunctionType,
         types.BuiltinFunctionType)


def duplicate(sae: nn.Module, device: torch.device | str | None = None, but: tuple = ()) -> nn.Module:
    """An independent copy, on `device` where one is given; what is in `but` is shared with it.

    Tensors kept with their graph, which cannot be copied, lose it; generators keep their state. Where a device is
    given, no second copy is made on the present one, which need not hold two.
    """
    memo = {id(shared): shared for shared in but}
    for leaf in leaves(sae, set(memo)):
        if isinstance(leaf, torch.Generator):
            memo[id(leaf)] = _generator(leaf)
        elif device is not None or not leaf.is_leaf:
            memo[id(leaf)] = _tensor(leaf, device)
    return copy.deepcopy(sae, memo)


def leaves(value, seen: set[int]) -> Iterator[Tensor | torch.Generator]:
    """Every tensor and generator that hangs on a module or object, each once, also in containers and helpers."""
    if isinstance(value, ATOMS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, torch.Generator)):
        yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from leaves(part, seen)


def _tensor(tensor: Tensor, device) -> Tensor:
    if device is None:
        return tensor.detach().clone()
    moved = tensor.detach().to(device, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, tensor.requires_grad)
    return moved.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _generator(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin
