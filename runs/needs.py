"""What a run needs of its machine and of its texts, told before a weight is read."""

from __future__ import annotations

import torch

import evals
from evals.model import places
from evals.storage import network
from evals.texts import inputs
from runs import disk, environment
from runs.voice import duration, say


def forecast(settings, layers: list[int], steps: int, shape: dict, findings: list, measured: bool,
             sharing: int) -> dict:
    """Memory and training time, said; MemoryError with what to change for a run that does not fit.

    `findings`: of the preflight, by SAE; `measured`: whether evals follow; `sharing`: ranks that share a batch.
    """
    from variants.preflight import budget

    available, limit = environment.memory_bound(settings.device)
    rate = environment.matmul_rate(settings.device, getattr(torch, settings.dtype))
    line, plan, problem = budget.plan(settings, layers, steps, shape, findings, measured, sharing, available, rate,
                                      limit)
    say(f"forecast: {line}, about {duration(plan['forecast_training_seconds'])} of training")
    if problem:
        raise MemoryError(problem)
    return plan


def check_room(settings, models: dict[str, str], sae_bytes: float) -> None:
    """OSError for a folder without room for what the run writes there; `models`: those it fetches, by what they are."""
    fetched = sum(map(places.disk_needed, models.values()))
    disk.check_room(settings.cache_dir, 2e9 if settings.profile == "embedded" else 5e7, "--cache_dir")
    disk.check_room(settings.out_dir, 4 * sae_bytes, "--out_dir")
    disk.check_room(network.cache_folder(), 1.02 * fetched, "HF_HOME")


def check_texts(settings, source, shape: dict, chosen: dict[str, dict]) -> None:
    """A look at texts and tokenizer, where they are not built in, and at what evals read from the hub."""
    own_model = settings.model not in places.SHAPES
    if own_model or source.dataset or source.core_dataset:
        tokenizer = places.tokenizer(settings.model, settings.cache_dir, settings.data_dir)
        vocabulary = shape["vocabulary"] if own_model else None
        for note in inputs.check(source, tokenizer, settings.model, vocabulary, chosen):
            say(f"note: {note}")
    if source.kind == "hub":
        for name, config in chosen.items():
            evals.read_ahead(name, config, source, settings.seed)
