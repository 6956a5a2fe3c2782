"""The variant's own report, tried on a little text of a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from variants import base
from variants.kit import trainers
from variants.preflight.messages import (
    SECONDS,
    Variant,
    attempting,
    defined,
    described,
    fail,
    limited,
)
from variants.preflight.trial import (
    STEPS,
    Plan,
    initialised,
    make_plan,
    one_thread,
    random_state,
    read,
    smallest,
    train,
)


def check_report(name: str, hyper: dict, d_in: int, d_sae: int, report: Callable, *, seed: int, train_step: Callable,
                 make_optimizer: Callable) -> None:
    """The variant's own report, tried after a few steps: `report(sae)` gives it a little text of a model of `d_in`."""
    setting = trainers.SETTING | dict(steps=STEPS, schedule=STEPS, lr=Plan.learning_rate, seed=seed)
    v = dataclasses.replace(read(name, hyper), setting=setting)
    if not reports(v):
        return
    with random_state(seed), one_thread():
        _, small = smallest(v, d_sae)
        sizes = small._replace(D=d_in)
        plan = make_plan(sizes, sizes.B, STEPS, seed, train_step, make_optimizer)
        sae = initialised(v, sizes, plan)
        for _ in train(v, sae, plan):
            pass
        line = defined(v, "report")
        with attempting(v, "in report, tried on a little text of a tiny model",
                        line=line), limited(10 * SECONDS, "in report"):
            returned = report(sae.eval())
        form = "return {name: number}, {file name: text or bytes}"
        if not (isinstance(returned, tuple) and len(returned) == 2
                and all(isinstance(part, dict) for part in returned)):
            fail(v, line, f"report returned {described(returned)} instead of two dicts", form)
        for key, value in returned[0].items():
            if not (value is None or isinstance(value, (bool, int, float))):
                fail(v, line, f"report gives {described(value)} as the number {key!r}",
                     f"{form}: float(…) makes a number of a tensor")
        for key, value in returned[1].items():
            if not isinstance(value, (str, bytes)):
                fail(v, line, f"report gives {described(value)} as the file {key!r}", form)


def reports(v: Variant) -> bool:
    """Whether the variant measures something of its own."""
    if v.is_trainer:
        return callable(getattr(v.module.SAE.trainer_class, "report", None))
    return v.module.SAE.report is not base.SAE.report
