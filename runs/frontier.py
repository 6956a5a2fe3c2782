"""What a variant reaches at an L0 where it was not measured: between its SAEs of the next L0 to either side."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runs.reading import Run

SAME = 0.01  # L0 that differ by less than this share count as equal
L0 = ("core.l0", "ground_truth.l0")  # the L0 of a run is the first of these that was measured
NEAR_END = 1.5  # an L0 outside a frontier that is within this factor of its end
ALIVE = ("core.frac_alive", "ground_truth.frac_alive")  # and the share of its features that ever fire


@dataclass(frozen=True)
class Interpolated(Run):
    """No SAE of its own, but the figures between two, the one of the smaller L0 first."""

    between: tuple[Run, Run]


def at(l0: float | None, saes: list[Run]) -> Run | None:
    """The SAE of that L0 or the figures between the two around it, linear in log L0; None outside the range of `saes`.

    Standard errors are summed with the figures' weights, not in squares: all SAEs are measured on the same texts, so
    that errors of neighbours go together, and the point between them is known no better than they are.
    """
    if not l0 or not saes:
        return None
    nearest = min(saes, key=lambda sae: abs(math.log(l0_of(sae) / l0)))
    if abs(math.log(l0_of(nearest) / l0)) < SAME:
        return nearest
    below = [sae for sae in saes if l0_of(sae) < l0]
    above = [sae for sae in saes if l0_of(sae) > l0]
    if not below or not above:
        return None
    a, b = max(below, key=l0_of), min(above, key=l0_of)
    share = math.log(l0 / l0_of(a)) / math.log(l0_of(b) / l0_of(a))
    means = {m: _mix(v, b.means[m], share) for m, v in a.means.items() if v is not None and b.means.get(m) is not None}
    stderrs = {m: _mix(e, b.stderrs[m], share) for m, e in a.stderrs.items() if m in means and m in b.stderrs}
    config = {k: v for k, v in a.config.items() if k == "evals" or b.config.get(k) == v}
    return Interpolated(f"{a.config.get('variant')} at L0 {l0:.4g}", means | {l0_metric(a): l0}, stderrs, config, [],
                        a.path, (a, b))


def near(l0: float | None, saes: list[Run]) -> Run | None:
    """What `at` finds, or outside the range of `saes` the nearest of them if its L0 is within a factor NEAR_END."""
    found = at(l0, saes)
    if found is not None or not l0 or not saes:
        return found
    nearest = min(saes, key=lambda sae: abs(math.log(l0_of(sae) / l0)))
    return nearest if abs(math.log(l0_of(nearest) / l0)) < math.log(NEAR_END) else None


def spans(l0: float | None, saes: list[Run]) -> bool:
    """Whether `at` finds something at that L0."""
    if not l0 or not saes:
        return False
    least, most = (math.log(end) for end in ends(saes))
    return least - SAME < math.log(l0) < most + SAME


def is_between(run: Run | None, metric: str) -> bool:
    """Whether a figure lies between different ones of two SAEs."""
    if not isinstance(run, Interpolated):
        return False
    values = {sae.means.get(metric) for sae in run.between}
    return None not in values and len(values) > 1


def l0_of(run: Run) -> float | None:
    return run.means.get(l0_metric(run))


def l0_metric(run: Run) -> str:
    return _first_measured(run, L0)


def alive_of(run: Run) -> float | None:
    return run.means.get(_first_measured(run, ALIVE))


def _first_measured(run: Run, metrics: tuple[str, ...]) -> str:
    """The first of the metrics that the run has; the first of all where it has none."""
    return next((metric for metric in metrics if run.means.get(metric) is not None), metrics[0])


def ends(saes: list[Run]) -> tuple[float, float]:
    """The smallest and the largest L0."""
    l0s = [l0_of(sae) for sae in saes]
    return min(l0s), max(l0s)


def _mix(a: float, b: float, share: float) -> float:
    return a if a == b else (1 - share) * a + share * b
