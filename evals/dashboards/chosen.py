"""Which features of an SAE get a dashboard."""

from __future__ import annotations

import math
from itertools import zip_longest

import torch
from torch import Tensor

from evals.common import probes

# {why: how many of the only SAE of a run}; several share, but for what was explained
MOST = {"densest": 60, "rarest": 40, "random": 80, "best probe": 40, "new": 60, "absorbed letter": 26}
EXPLAINED = 60
FEWEST = 40  # of an SAE, if as many fire


def choose(asked, fired_F: Tensor, seed: int, sae: str, saes: int) -> dict[int, list[str]]:
    """{feature: why}, of those that fire; kinds take turns, so that the first ones are some of each.

    `asked` as of evals.dashboards.boards; `saes`: of so many SAEs `sae` is one.
    """
    fires = fired_F.nonzero().squeeze(1)
    often = fires[fired_F[fires] > 1]
    by_density = often[fired_F[often].argsort(descending=True, stable=True)].tolist()
    rng = probes.generator(seed, "dashboards", sae)
    drawn = fires[torch.randperm(len(fires), generator=rng)].tolist()
    beside = asked.baseline
    by_kind = {
        "densest": by_density,
        "rarest": often[fired_F[often].argsort(stable=True)].tolist(),
        "random": drawn,
        "best probe": in_turn(asked.classes.values()),
        "new": sorted(beside.new or [], key=lambda f: beside.cosine[f]) if beside else [],
        "absorbed letter": in_turn(asked.letters.values()),
        "explained": sorted(asked.explanations)}
    share, able = max(1 / saes, FEWEST / sum(MOST.values())), set(fires.tolist())
    why: dict[int, list[str]] = {}
    taken = {}
    for kind, features in by_kind.items():
        most = EXPLAINED if kind == "explained" else math.ceil(MOST[kind] * share)
        taken[kind] = [feature for feature in features if feature in able][:most]
    for features in zip_longest(*taken.values()):
        for kind, feature in zip(taken, features):
            if feature is not None:
                why.setdefault(feature, []).append(kind)
    for feature in drawn:
        if len(why) < FEWEST and feature not in why:
            why[feature] = ["random"]
    return {feature: [kind for kind in by_kind if kind in kinds] for feature, kinds in why.items()}


def in_turn(lists) -> list[int]:
    """The first of each list, then the second of each, and so on, every number once."""
    turns = (feature for features in zip_longest(*lists) for feature in features if feature is not None)
    return list(dict.fromkeys(turns))
