"""A block of activations as the batches of its steps, in an order that the seed, the block and the pass decide.

Shapes: B SAE batch (tokens), N tokens of a block, W ranks that share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evals.cache import digest
from variants.base import Batch
from variants.kit import contexts, norms, ranks


def batches(settings, jobs: list, block: dict[str, Tensor], b: int, begins: int, first: int):
    """Yield (step, {job's name: Batch}) of block b, whose first step is `begins`, from step `first` on.

    Each pass shuffles the block anew by (seed, block, pass) alone: its tokens, or rows where contexts are needed whole.
    """
    B, W = settings.batch_size, ranks.sharing()
    layers = sorted({job.layer for job in jobs})
    rows = int(block["place_N"][-1:].sum()) // settings.context + 1  # of a rank without tokens: 1
    n = int(block["starts_W"][-1]) if W > 1 else len(block["place_N"])
    steps = (n + int(block.get("left_out", 0))) // B  # of each pass: as many as planned
    whole = any(job.sae.needs_contexts or job.sae.attention_layers for job in jobs)
    place_of = {job.name: (job.layer, job.attention) for job in jobs}  # SAEs of one place share what is gathered
    shuffled = block

    def gathered(layer: int, attention, index: Tensor) -> dict[str, Tensor]:
        if whole:
            return contexts.gather(block, index, settings.context, layer, attention, settings.device)
        return dict(x=shuffled[f"x_{layer}"].index_select(0, index).float())

    for p in range(settings.passes):
        generator = torch.Generator().manual_seed(int(digest([settings.seed, b, p])[:15], 16))
        order = torch.randperm(rows if whole else n, generator=generator)
        if W > 1:  # this rank's share of each batch, in the order in which it is needed
            starts, order = block["starts_W"].tolist(), order[:n // B * B]
            shuffled = {f"x_{layer}": ranks.in_order(block[f"x_{layer}"], starts, order, B)
                        for layer in layers}
            order = torch.arange(n // B * B // W)
        if whole:
            order = contexts.rows_of_step(rows, steps, order)
        else:
            order = norms.repeated(order, steps * B // W).to(settings.device).split(B // W)
        for i in range(steps):
            step = begins + p * steps + i
            if step >= first:
                given = {place: gathered(*place, order[i]) for place in set(place_of.values())}
                yield step, {job.name: Batch.of(given[place_of[job.name]], job.scale) for job in jobs}
