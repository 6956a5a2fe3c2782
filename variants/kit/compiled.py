"""A variant's loss as torch.compile makes it, for long runs on a GPU; what does not compile runs as it is.

Casts are kept as they are written (`emulate_precision_casts`): inductor else computes on what was to be rounded, and
the loss would be another one (jumprelu's threshold had a gradient .56 off).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from variants.base import SAE, Batch, Progress
from variants.kit import copies, graphs, precision

# steps of a run from which on it pays: 3 to 6 s of compiling, .3 to 1.7 ms less a step on an H200 (RESULTS.md)
PAYS_FROM = 10_000
_losses = WeakIdKeyDictionary()  # by SAE: its compiled loss, or None where that failed


@dataclass(frozen=True)
class Ramped(Progress):
    """Progress whose warm-up is a tensor: a Python number would be compiled in, and the loss anew in each step."""

    ramp: Tensor

    def sparsity_warmup(self) -> Tensor:
        return self.ramp


def loss_of(sae: SAE, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
    """sae.loss(batch, progress), compiled where the variant allows and the run is long enough."""
    if not (sae.compiled_loss and _pays(batch, progress)):
        return sae.loss(batch, progress)
    if sae not in _losses:
        precision.learn(batch.x.device, copies.DTYPE)
        graphs.prepare()
        _losses[sae] = _compiled(sae.loss)
    if _losses[sae] is None:
        return sae.loss(batch, progress)
    given = {field.name: getattr(progress, field.name) for field in fields(Progress)}
    ramp = torch.full((), progress.sparsity_warmup(), device=batch.x.device)
    return _losses[sae](batch, Ramped(**given, ramp=ramp))


def gave_up(sae: SAE, error: Exception, say: Callable[[str], None]) -> bool:
    """Whether an error was met with a compiled loss, or its backward pass; then it is said, and not compiled again.

    If it was the variant's own, it comes again.
    """
    if not is_compiled(sae) or isinstance(error, FloatingPointError):
        return False
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    say(f"note: {type(sae).__module__}: the loss is not compiled ({why}): going on without")
    _losses[sae] = None
    return True


def forget(sae: SAE) -> None:
    """Keep no compiled loss of an SAE: it holds the SAE."""
    _losses.pop(sae, None)


def is_compiled(sae: SAE) -> bool:
    """Whether its last loss was compiled; such a one makes the weights' copies itself."""
    return _losses.get(sae) is not None


def _pays(batch: Batch, progress: Progress) -> bool:
    return batch.x.is_cuda and progress.total_steps >= PAYS_FROM


def _compiled(loss: Callable) -> Callable:
    """A bound method compiled, with code of its own: the compiler counts what it makes of each code, and six SAEs share
    one."""
    function = loss.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__,
                             function.__defaults__, function.__closure__)
    return torch.compile(types.MethodType(own, loss.__self__), dynamic=False, options={"emulate_precision_casts": True})
