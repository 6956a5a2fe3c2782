"""Preflight of a variant: a few training steps on synthetic data, on the CPU, in seconds, before anything expensive.

Every failure is one exception whose message is "file.py:line: what is wrong\\nwhat to do". `run` is the list of what is
checked, in that order; each demand lies in the file that is named after its subject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import variants
from variants.kit import trainers
from variants.preflight.contract import (
    check_decoder,
    check_encode,
    check_needs,
    check_scale,
    check_shapes,
    check_signatures,
)
from variants.preflight.identical import check_identical
from variants.preflight.learning import check_features, check_learned, check_short_run, trained
from variants.preflight.machine import accelerator_notes, forecast, largest_of, waiting_notes
from variants.preflight.memory import Sizes
from variants.preflight.messages import attempting
from variants.preflight.saved import check_resumed, check_saved
from variants.preflight.trial import STEPS, Plan, initialised, make_plan, one_thread, random_state, read, smallest


@dataclass(frozen=True)
class Findings:
    """What the check found out, at the real sizes: bytes of memory and lines worth telling."""

    parameters: int  # number of trainable and fixed parameters
    parameter_bytes: int
    buffer_bytes: int
    # most alive at once in loss, backward, after_step and revive, besides parameters, gradients and optimiser
    step_peak_bytes: int
    largest: tuple[int, tuple[int, ...], str]  # bytes, shape and "file.py:line" of the largest tensor of a step
    notes: list[str]
    active: float = 0.0  # share of the features that is active on the average token


def run(name: str, hyper: dict, *, d_in: int, d_sae: int, batch_size: int, total_steps: int, lr: float | None,
        seed: int, train_step: Callable, make_optimizer: Callable, reference_files: Iterable = (), against: str = "",
        allow_identical: bool = False, allow_dense: bool = False, accelerator: bool = False, context: int | None = None,
        room: tuple[int, int] = (0, 0), told: dict | None = None) -> Findings:
    """Check a variant, by name or path, for training at the given real sizes; raises on the first thing that is wrong.

    `train_step(sae, optimizer, batch, progress, lr)` and `make_optimizer(sae, lr)` are the training loop's.
    `reference_files` are variants from which this one must differ in effect, unless `allow_identical`; `against` is
    another, of which it is said how far this one gets from it. A code that is not sparse is refused unless
    `allow_dense`. With `accelerator` the memory forecast is for a GPU, where shared functions take other paths.
    `context`: tokens per row; `room`: layers below and above the SAE's; `told`: what a trainer is told of the run
    besides (layer, lm_name).
    """
    if total_steps < 1:
        raise ValueError(f"{total_steps} training steps: there are fewer tokens than one batch of {batch_size}\n"
                         "raise --num_tokens or lower --batch_size")
    if lr is not None and not lr > 0:
        raise ValueError(f"the learning rate is {lr}: nothing would be trained\n"
                         "set --lr to a positive number, such as 3e-4")
    v = read(name, hyper)
    steps = dict(steps=max(total_steps, STEPS), schedule=STEPS, lr=Plan.learning_rate, seed=seed)
    v = dataclasses.replace(v, setting=trainers.SETTING | (told or {}) | steps)
    check_signatures(v)
    with random_state(seed), one_thread():
        sae, sizes = smallest(v, d_sae)
        check_needs(v, sae, batch_size, context, room)
        plan = make_plan(sizes, batch_size, total_steps, seed, train_step, make_optimizer)
        if v.is_trainer and total_steps < STEPS:
            check_short_run(v, plan, total_steps)
        sae = initialised(v, sizes, plan)
        check_decoder(v, sae)
        shown = trained(v, sae, plan)
        z_BF = check_encode(v, sae, plan)
        active, notes = check_features(v, z_BF, shown.zero_weights, allow_dense)
        notes += check_learned(v, sae, plan, shown)
        notes += check_shapes(v, sae, plan, z_BF)
        notes += check_saved(v, sae, plan, z_BF)
        check_scale(v, sae, plan)
        notes += check_identical(v, plan, reference_files, allow_identical, against)
        notes += check_resumed(v, plan) if v.is_trainer else accelerator_notes(v, sae, plan)
        figures = forecast(v, sizes, Sizes(batch_size, d_in, d_sae), plan, accelerator)
    notes += waiting_notes(v, figures)
    return Findings(figures.parameters, figures.parameter_bytes, figures.buffer_bytes, figures.peak_bytes,
                    largest_of(v, figures), notes, active)


def untrained(name: str, hyper: dict, d_in: int, d_sae: int) -> Findings:
    """The figures of an SAE that is only to be evaluated."""
    v = read(name, hyper)
    with random_state(), attempting(v, f"constructing SAE({d_in}, {d_sae})"):
        sae = variants.build(v.module, d_in, d_sae, hyper)
    parameters, buffers = (sum(t.nbytes for t in tensors) for tensors in (sae.parameters(), sae.buffers()))
    return Findings(sum(p.numel() for p in sae.parameters()), parameters, buffers, 0, (0, (), ""), [])
