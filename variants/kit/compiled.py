"""What torch.compile makes of functions of ours on a GPU; without a compiler they run as they are, and that is said.

Casts are kept as they are written (`emulate_precision_casts`): inductor else computes on what was to be rounded, and a
compiled loss would be another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

OPTIONS = {"emulate_precision_casts": True}
_failed: set[str] = set()


def compiled(function: Callable) -> Callable:
    """`function` compiled at its first call; None from each call once that has failed, which is said once."""
    held = []

    @functools.wraps(function)
    def call(*args):
        name = function.__qualname__
        if name in _failed:
            return None
        try:
            if not held:  # not before: the compiler is imported for a second
                held.append(torch.compile(function, dynamic=False, options=OPTIONS))
            return held[0](*args)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:  # noqa: BLE001  no compiler, no Triton: slower, and the same
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{name.strip('_')} is not compiled ({why}): going on without", flush=True)
            _failed.add(name)
            return None

    return call
