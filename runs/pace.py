"""How fast this machine is at a run: by a few small blocks of it, before it begins (runs/limit.py)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

TRIAL_BLOCKS = 3  # of which the first, that compiles and starts, does not count
TRIAL_PASSES, TRIAL_STEPS = 2, 4  # of the language model and of the SAEs, at least, in each
LOGITS = {"cpu": 2**26, "cuda": 2**28}  # numbers in the pass through the whole model that is timed


@dataclass
class Pace:
    """Seconds: what a run's parts take on this machine."""

    token: float  # of texts and the language model up to the last layer, per token
    step: float  # of a step of all SAEs
    whole: float = 0.0  # of the whole language model, head included, per token


def trial(settings):
    """The settings of a few small blocks: some passes of the language model in each, and some steps."""
    of_passes = TRIAL_PASSES * settings.lm_batch_size * (settings.context - 1)
    tokens = max(TRIAL_STEPS, math.ceil(of_passes / settings.batch_size)) * settings.batch_size
    return dataclasses.replace(settings, num_tokens=TRIAL_BLOCKS * tokens, block_tokens=tokens, passes=1)


def timed(blocks: Iterable, seconds: list[tuple[float, float]], device: str) -> Iterator:
    """The blocks; to `seconds` goes how long each took to make, and what was then done with it."""
    begun = settled(device)
    for block in blocks:
        made = settled(device)
        yield block
        ended = settled(device)
        seconds.append((made - begun, ended - made))
        begun = ended


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
    """Seconds per token through the whole language model and its head, by the second of two passes."""
    T = rows_RT.shape[1]
    rows = max(1, LOGITS[lm.device.type] // (T * lm.vocab_size))
    tokens_rT = rows_RT[:rows].long().to(lm.device)
    begun = 0.0
    for _ in range(2):
        begun = settled(lm.device.type)
        lm.hf(input_ids=tokens_rT, use_cache=False)
    return (settled(lm.device.type) - begun) / tokens_rT.numel()


def process_start() -> float:
    """time.monotonic() at which this process began: a client's clock runs from there."""
    import psutil

    return time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())
