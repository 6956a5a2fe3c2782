"""Functions that a compiled loss calls as they are.

torch.compiler.disable says so, but imports the compiler, for a second: too long for a command that compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_functions: list[list[Callable]] = []  # each in a list of its own, which `prepare` changes


def outside_graphs(function: Callable) -> Callable:
    """A function that is no part of a compiled graph, once `prepare` was called."""
    held = [function]
    _functions.append(held)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return held[0](*args, **kwargs)

    return call


def prepare() -> None:
    """Before the first loss is compiled."""
    while _functions:
        held = _functions.pop()
        held[0] = torch.compiler.disable(held[0])
