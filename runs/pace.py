"""How fast this machine is at a run: by a few small blocks of it, before it begins (runs/limit.py)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from variants.kit import ranks

BLOCKS = 12  # at most, of a pass of the language model or a step each; the first compiles and starts: it does not count
SECONDS, SHARE = 3.0, 0.03  # in which the pace is known; share of the time that is left after which it must be
LOGITS = {"cpu": 2**24, "cuda": 2**28}  # numbers in the pass through the whole model that is timed


@dataclass
class Pace:
    """Seconds: what a run's parts take on this machine."""

    token: float  # of texts and the language model up to the last layer, per token
    step: float  # of a step of all SAEs
    whole: float = 0.0  # of the whole language model, head included, per token


def trial(settings):
    """The settings of a few small blocks: whole batches, of a pass of the language model or more each."""
    of_pass = settings.lm_batch_size * (settings.context - 1)
    tokens = math.ceil(of_pass / settings.batch_size) * settings.batch_size
    return dataclasses.replace(settings, num_tokens=BLOCKS * tokens, block_tokens=tokens, passes=1)


def enough(seconds: list[tuple[float, float]], left: float) -> bool:
    """Whether the pace is known by the blocks so far, or no more of the seconds that are `left` may go into it."""
    counted = sum(map(sum, seconds[1:]))
    return len(seconds) > 1 and (counted > SECONDS or sum(map(sum, seconds)) > SHARE * left)


def timed(blocks: Iterable, seconds: list[tuple[float, float]], device: str, left: float) -> Iterator:
    """The blocks, until it is `enough`; to `seconds` goes how long each took to make, and what was done with it."""
    begun = settled(device)
    for block in blocks:
        made = settled(device)
        yield block
        ended = settled(device)
        seconds.append((made - begun, ended - made))
        begun = ended
        if ranks.agreed(lambda: enough(seconds, left)):
            return


def pace(seconds: list[tuple[float, float]], few, lm, rows_RT: torch.Tensor) -> Pace:
    """The pace of a run by the seconds that the blocks of `trial`'s settings took; the first of them does not count.

    `rows_RT`: rows of its text, for a pass through the whole model.
    """
    making, steps = (sum(column) for column in zip(*seconds[1:]))
    tokens = (len(seconds) - 1) * few.block_tokens
    token = making / tokens
    whole = token
    if lm.reads_text:
        whole = whole_pace(lm, rows_RT)
    return Pace(token, steps * few.batch_size / tokens, whole)


def settled(device: str) -> float:
    """time.monotonic() when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


@torch.no_grad()
def whole_pace(lm, rows_RT: torch.Tensor) -> float:
    """Seconds per token through the whole language model and its head, by the second of two short passes."""
    T = rows_RT.shape[1]
    rows = max(1, LOGITS[lm.device.type] // (T * lm.vocab_size))
    try:
        return _seconds(lm, rows_RT[:rows]) / rows_RT[:rows].numel()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _seconds(lm, rows_RT[:1]) / T


def _seconds(lm, rows_RT: torch.Tensor) -> float:
    tokens_RT, took = rows_RT.long().to(lm.device), 0.0
    for _ in range(2):
        if took < SECONDS:
            begun = settled(lm.device.type)
            lm.hf(input_ids=tokens_RT, use_cache=False)
            took = settled(lm.device.type) - begun
    return took


def process_start() -> float:
    """time.monotonic() at which this process began: a client's clock runs from there."""
    import psutil

    return time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
