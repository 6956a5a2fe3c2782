"""Loss and gradients of one training step, in parts where the memory of a GPU is too small for a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from variants.base import SAE, Batch, Progress
from variants.kit import compiled, copies, ranks


def gradients(sae: SAE, batch: Batch, progress: Progress,
              say: Callable[[str], None]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms of a batch, without graph, and the gradients in .grad; in parts once GPU memory was too small.

    The mean over equal parts is exact for a loss that is a mean over tokens; what is chosen over a batch is then chosen
    over each part.
    torch.OutOfMemoryError where a variant is not `data_parallel`, or ranks share the batch: one cannot part it alone.
    """
    # whole since it was last measured: its parameters, and what zero_grad clears, would be others
    if ranks.is_sharded(sae):
        sae.reshard()
    while True:
        sae.zero_grad(set_to_none=True)
        try:
            return _accumulated(sae, batch, progress)
        except torch.OutOfMemoryError:
            if not sae.data_parallel or ranks.sharing() > 1 or 2 * sae.batch_parts > len(batch.x):
                raise
        except Exception as error:
            if not compiled.gave_up(sae, error, say):
                raise
            sae._fired_F = None
            continue
        # here, where the traceback no longer holds the tensors of the attempt
        sae.batch_parts *= 2
        sae._fired_F = None
        if batch.x.is_cuda:
            torch.cuda.empty_cache()
        say(f"out of GPU memory: going on with each batch in {sae.batch_parts} parts of "
            f"{len(batch.x) // sae.batch_parts} tokens")


def _accumulated(sae: SAE, batch: Batch, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
    found, parts = [], [batch]
    if sae.batch_parts > 1:
        parts = [Batch(x_BD) for x_BD in batch.x.chunk(sae.batch_parts)]
    for part in parts:
        with torch.autocast("cuda", copies.DTYPE, enabled=batch.x.is_cuda):
            loss, terms = compiled.loss_of(sae, part, progress)
        if sae.batch_parts > 1:
            share = len(part.x) / len(batch.x)
            loss, terms = loss * share, {name: term * share for name, term in terms.items()}
        loss.backward()
        found.append((loss.detach(), {name: term.detach() for name, term in terms.items()}))
    if len(found) == 1:
        return found[0]
    return sum(loss for loss, _ in found), {name: sum(terms[name] for _, terms in found) for name in found[0][1]}


def forget(sae: SAE) -> None:
    """Keep nothing of an SAE that only its steps needed."""
    copies.forget(sae)
    compiled.forget(sae)
