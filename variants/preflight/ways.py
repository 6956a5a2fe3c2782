"""Ways to run that a variant does not go with: spread over ranks, or beginning with an SAE from elsewhere."""

from __future__ import annotations

from types import ModuleType

import variants
from variants import base
from variants.kit import interchange
from variants.kit.hyper import hyperparameters


def check(module: ModuleType, hypers: dict[str, dict], shard: bool, init_from: str) -> None:
    """ValueError for a run that would fail late, or be called what it is not. `hypers`: of each SAE, by its suffix.

    `shard`: whether they are trained spread over ranks, by --shard or for the memory; `init_from`: a place, or "".
    """
    for hyper in hypers.values():
        whole = hyperparameters(module) | hyper
        if shard:
            _check_spread(module.SAE, whole)
        if init_from and module.SAE.own_start is not None:
            _check_start(module, whole, init_from)


def _check_spread(cls: type[base.SAE], hyper: dict) -> None:
    if cls.revive is base.SAE.revive or not hyper.get("resample_steps"):
        return
    raise ValueError(f"resample_steps = {hyper['resample_steps']}: features of an SAE that is spread over processes "
                     "cannot begin anew, and this one is spread: by --shard, or as it does not fit one GPU's memory\n"
                     "leave out --shard or resample_steps; where it is the memory: a smaller --d_sae, or a larger GPU")


def _check_start(module: ModuleType, hyper: dict, init_from: str) -> None:
    name = variants.title(module.__file__)
    for found in interchange.find(init_from).values():
        theirs = variants.title(found.variant)
        if theirs != name:
            raise ValueError(f"{found.place}: {name} is what it begins as, and would be a trained {theirs} here\n"
                             f"leave out --init_from, or choose --variant={theirs}")
        own = hyperparameters(module) | found.hyper
        for key in module.SAE.own_start:
            if own[key] != hyper[key]:
                raise ValueError(f"{found.place}: it has {key}={own[key]}, and with {key}={hyper[key]} it would not be "
                                 f"what {name} begins as\nleave out --init_from, or give --hyper {key}={own[key]}")
