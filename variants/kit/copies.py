"""Weights in bf16 beside themselves, from the optimiser's step to the next loss: a GPU need not read them once more.

A copy counts as long as the weight's version is the one at which it was made, which every change in place raises but
one through `.data`. A class promises to have none of those (`copied_weights`), and its code is looked at.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

DTYPE = torch.bfloat16  # in which a GPU multiplies in a training step (steps.gradients)
BEFORE_TRAINING = {"__init__", "initialise"}  # what these change is the next step's to copy
_copies = WeakIdKeyDictionary()  # weight: (its version, the copy)


def low(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W in a lower precision: its copy, while that is one, else made now."""
    if not torch.compiler.is_compiling() and W in _copies:
        version, copy = _copies[W]
        if version == W._version and copy.dtype == dtype:
            return copy
    return W.to(dtype)


def room(W: Tensor) -> Tensor:
    """The tensor that W's copy is written to."""
    return _copies[W][1] if W in _copies else torch.empty_like(W, dtype=DTYPE)


def hold(W: Tensor, copy: Tensor) -> None:
    """Take `copy` for W from now on."""
    _copies[W] = W._version, copy


def forget(sae: nn.Module) -> None:
    """Keep no copies of an SAE's weights: they are for training, and hold memory."""
    for W in sae.parameters():
        _copies.pop(W, None)


@functools.cache
def allowed(cls: type) -> bool:
    """Whether copies may be taken for the weights of a variant: it says so, and no code of its file names `.data`."""
    if not cls.copied_weights:
        return False
    methods = [_function(value) for name, value in vars(cls).items() if name not in BEFORE_TRAINING]
    files = {f.__code__.co_filename: f.__globals__ for f in methods if f and f.__module__ == cls.__module__}
    others = [_function(value) for file in files.values() for value in file.values()]
    own = [f for f in (*methods, *others) if f and f.__code__.co_filename in files]
    return not any("data" in code.co_names for f in own for code in _codes(f.__code__))


def _function(value) -> types.FunctionType | None:
    """The function behind a method, property or decoration, if there is one."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else None
    return value if isinstance(value, types.FunctionType) else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
