"""How a run's tokens are divided into blocks, and how many optimiser steps that makes."""

from __future__ import annotations

import itertools


def block_plan(settings) -> list[int]:
    """Training tokens of each block; a last block smaller than a batch is left out."""
    full, rest = divmod(settings.num_tokens, settings.block_tokens)
    plan = [settings.block_tokens] * full
    if rest >= settings.batch_size:
        plan.append(rest)
    return plan


def steps_by_block(settings) -> list[int]:
    """Optimiser steps that each block gives."""
    return steps_of(settings, block_plan(settings))


def steps_of(settings, plan: list[int]) -> list[int]:
    """Optimiser steps that each block of a plan gives."""
    return [settings.passes * (tokens // settings.batch_size) for tokens in plan]


def count_steps(settings) -> int:
    """Optimiser steps of the run."""
    return sum(steps_by_block(settings))


def block_at(steps_by_block: list[int], step: int) -> int:
    """The block in which a step lies."""
    return sum(end <= step for end in itertools.accumulate(steps_by_block))
