"""Evals and a GPU's memory: what does not fit at once is done in parts, halved until they fit, and batches that leave a
GPU waiting for its next launch pass the language model together.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

# settings that make a row longer; how many rows are done at once needs none
LENGTHS = ("context_size", "context_length", "llm_context_size", "seq_len", "text_len", "max_tokens",
           "max_icl_examples", "words_per_prompt")
# tokens of a pass on a GPU: launching 13 blocks takes the host as long as a GPU needs for about 6,000
TOGETHER = 2**15


def by_rows(setup, what: str, work: Callable, *rows: Tensor | Sequence, most: int | None = None, each: int = 1,
            lower: tuple[str, ...] = LENGTHS):
    """work(*rows), a tensor or a tuple of them, of all rows or of `most` at once, joined along the first axis.

    Where the GPU's memory runs out the number of rows is halved; this is said and holds to the eval's end (in
    setup.fits, in units of `each`, the size of a row). A row's result may depend on no other row, so that parts change
    it by rounding at most. MemoryError, which names the eval's settings `lower`, if one row alone does not fit.
    """
    n, start, parts = len(rows[0]), 0, []
    while start < n or not parts:
        size = min(n - start, most or n, max(1, setup.fits.get(what, n * each) // each))
        try:
            parts.append(work(*(value[start : start + size] for value in rows)))
            start += size
            continue
        except torch.OutOfMemoryError as error:
            reason = ". ".join(str(error).split(". ")[:2])
        # not inside `except`: to its end the traceback keeps the tensors of the attempt
        gc.collect()
        torch.cuda.empty_cache()
        if size < 2:
            given = ", ".join(f"{key} (now {setup.config[key]})" for key in lower if setup.config.get(key))
            advice = "use a smaller --d_sae, or a GPU with more memory"
            if given:
                advice = f"lower {given} with --eval_config"
            raise MemoryError(f"out of GPU memory in {what}, which cannot be divided further: {reason}\n{advice}")
        setup.fits[what] = size // 2 * each
        half = "1 row" if size < 4 else f"{size // 2} rows"
        setup.say(f"out of GPU memory in {what}: going on with {half} at a time")
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts)))


def has_room(x: Tensor, n_bytes: int = 0) -> bool:
    """Whether half of the GPU that x lies on stays free beside so many bytes more; always on the CPU."""
    if not x.is_cuda:
        return True
    return free_memory(x.device) - n_bytes > torch.cuda.mem_get_info(x.device)[1] / 2


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that nothing holds, what torch keeps for itself included; a CPU's are not counted."""
    if device.type == "cpu":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def undivided(setup, what: str, work: Callable, *lower: str):
    """work(), whose batches are part of an eval's protocol; MemoryError that names `lower` if it does not fit."""
    return by_rows(setup, what, lambda once: work(), range(1), lower=lower)


def residual(setup, tokens_bT: Tensor) -> Tensor:
    """The residual stream [b, T, D] of token rows at setup.layer, on the LM's device."""
    return residual_of(setup, tokens_bT, [setup.layer])[setup.layer]


def residual_of(setup, tokens_bT: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """The same at several layers, from one pass: {layer: x_bTD}."""
    def work(tokens_rT: Tensor) -> Tensor | tuple[Tensor, ...]:
        tokens_rT = tokens_rT.to(setup.lm.device)
        if len(layers) == 1:
            return setup.lm.residual(tokens_rT, layers[0])
        found = setup.lm.residual_of(tokens_rT, layers)
        return tuple(found[layer] for layer in layers)

    found = by_rows(setup, "the language model", work, tokens_bT, each=tokens_bT.shape[1] * len(layers))
    return dict(zip(layers, [found] if len(layers) == 1 else found))


def batches_at_once(setup, tokens: int) -> int:
    """How many batches of so many tokens pass the language model together: one, but on a GPU."""
    if torch.device(setup.lm.device).type != "cuda":
        return 1
    return max(1, TOGETHER // tokens)


def residuals(setup, batches: list[Tensor]) -> list[Tensor]:
    """`residual` of batches of token rows [b, T], the longest first, from one pass: x_bTD of each."""
    if len(batches) == 1:
        return [residual(setup, batches[0])]
    longest = batches[0].shape[1]
    # filled up on the right, which no token sees
    rows_RT = torch.cat([functional.pad(b, (0, longest - b.shape[1]), value=setup.lm.bos) for b in batches])
    parts = residual(setup, rows_RT).split([len(b) for b in batches])
    return [x_bTD[:, :b.shape[1]] for x_bTD, b in zip(parts, batches)]
