"""Trainings that come to nothing, told from the rows of their log: --stop_hopeless ends them early.

The judgement is of rows that the log has anyhow (512 tokens each), so it costs no step anything; what an SAE was before
its first step is measured once. In doubt it goes on: an SAE that would have learned is worth more than the time.

Shapes: N tokens, D = d_in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor

import variants
from runs import training_log
from runs.voice import say
from variants.kit import ranks
from variants.kit.hyper import hyperparameters

ROWS = 3  # of the log, in each of which it must show
FROM = 0.2  # share of the tokens before which nothing is judged: warm-ups take a tenth at most
LEAST_STEPS = 10  # and so many steps: what a handful has not moved says nothing
LOOK_BACK = 0.1  # share of the tokens over which it is seen whether L0 falls and explained variance rises
FALLS = 0.05  # L0 does by so much of itself, at least
PROGRESS = 0.01  # explained variance that an untrained SAE does not gain by chance, and share of what is unexplained
LOST = 0.9  # an L0 below so much of the untrained one's shows that the penalty is at work
# Shares of the features: practically all of them, and what is too many where x is not explained either. Half alone is
# no sign: penalties may grow over the whole run, and a narrow SAE may end there with a good reconstruction (L0 at a
# fifth, three fifths, the end, tiny profile, d_sae 128: p_anneal 92, 71, 65, jumprelu_tanh 87, 83, 67)
ALL, HALF, EXPLAINED = 0.98, 0.5, 0.5
TO_THE_END = "--stop_hopeless=no trains it to the end"


class Hopeless(RuntimeError):
    """Every SAE of the run is hopeless: what is so, and what to do."""


def is_on(settings) -> bool:
    """Whether --stop_hopeless holds; auto: where the run has a time limit."""
    return settings.stop_hopeless == "yes" or (settings.stop_hopeless == "auto" and settings.minutes > 0)


def measure_untrained(settings, job, x_ND: Tensor) -> None:
    """Note on the job what its SAE is before the first step: L0 and explained variance, as a row of the log has them.

    x_ND: raw activations of the first block, this rank's.
    """
    if not is_on(settings) or "still" in spared(settings, job):
        return
    x_ND = x_ND[:: max(1, len(x_ND) // training_log.GLANCE)][:training_log.GLANCE].float() / job.scale
    devices = [x_ND.device] if x_ND.is_cuda else []
    with torch.random.fork_rng(devices):
        seen = torch.tensor(training_log.glance(job.sae, x_ND), dtype=torch.float64, device=x_ND.device)
    job.untrained = ranks.mean(seen).tolist()


def check(settings, jobs: list, now, progress) -> None:
    """Hopeless, after a row of the log, where every SAE of the run is; a note of each that is while others learn.

    `now`: runs.training.Training. Ranks that train together stop together.
    """
    if not is_on(settings) or now.step == progress.total_steps:
        return
    found = {job.name: symptom([row for row in now.log if row["sae"] == job.name], progress.total_tokens,
                               (job.sae.d_in, len(job.sae.tokens_since_fired)), job.untrained, spared(settings, job))
             for job in jobs}
    hopeless = {name: what for name, what in found.items() if what}
    tokens = f"{now.log[-1]['tokens']:,} of {progress.total_tokens:,} tokens"
    if not ranks.any_host(len(hopeless) < len(jobs)):
        raise Hopeless(message(hopeless, tokens))
    for name in (name for name in hopeless if name not in now.hopeless):
        say(f"note: {name}: hopeless since {tokens}: {hopeless[name][1]}: goes on as others learn")
    for name in sorted(now.hopeless - hopeless.keys()):
        say(f"note: {name}: no longer hopeless after {tokens}")
    now.hopeless = set(hopeless)


def message(hopeless: dict[str, tuple[str, str]], tokens: str) -> str:
    """What is hopeless, and what helps against it: the preflight's words for the same."""
    from variants.preflight import learning

    advice = {"silent": f"{learning.IF_SILENT}, or lower --lr",
              "dense": learning.IF_DENSE,
              "worse": f"try another --lr or a weaker penalty, or {learning.IF_WORSE}",
              "still": f"raise --lr, or {learning.IF_WORSE}"}
    helps = list(dict.fromkeys(advice[kind] for kind, _ in hopeless.values()))[:2]  # a line has no room for more
    first, *others = (f"{name}: {words}" for name, (_, words) in hopeless.items())
    name, _, words = first.partition(": ")
    what = f"{name}: hopeless after {tokens}: {words}"
    if others:
        what = f"all {len(hopeless)} SAEs are hopeless after {tokens}: {'; '.join([first, *others])}"
    return f"{what}\n{'; '.join(helps)}; {TO_THE_END}"


def spared(settings, job) -> set[str]:
    """The symptoms that are not held against an SAE: asked for, or no matter of training."""
    found = set()
    if may_be_dense(settings, job.hyper):
        found |= {"dense"}
    if settings.init_from:  # trained before the first step
        found |= {"still"}
    if (hyperparameters(variants.load(settings.variant)) | job.hyper).get("k_start"):  # what is measured has the last k
        found |= {"still"}
    if not all(p.requires_grad for p in job.sae.parameters()):  # a random baseline: its figures are wanted, however bad
        found |= {"still", "worse"}
    return found


def may_be_dense(settings, hyper: dict) -> bool:
    """Whether a dense code was asked for: allowed, a penalty given as 0, or a k or target L0 of a quarter of the width.

    The quarter leaves room for what a target misses by.
    """
    from variants.preflight import learning

    if settings.allow_dense or learning.zeros(hyper):
        return True
    known = hyperparameters(variants.load(settings.variant)) | hyper
    counts = [value for name, value in known.items() if re.fullmatch(r"k(_?\d+|_start)?|.*l0", name)]
    return sum(n for n in counts if isinstance(n, (int, float)) and n >= 1) > settings.d_sae / 4


# ------------------------------------------------------------------------------------------------ of one SAE's rows


def symptom(rows: list[dict], total_tokens: int, widths: tuple[int, int], untrained: list[float] | None = None,
            spared: Collection[str] = ()) -> tuple[str, str] | None:
    """(silent, dense, worse or still; what shows it, in words) of an SAE's rows of the log so far; None: it may learn.

    widths: dimensions of x, number of features; untrained: L0 and explained variance before the first step, None: not
    measured; spared: symptoms that are none here.
    """
    last, then = rows[-ROWS:], before(rows, LOOK_BACK * total_tokens)
    if len(last) < ROWS or last[-1]["tokens"] < FROM * total_tokens or last[-1]["step"] < LEAST_STEPS:
        return None
    if silent(last):
        return "silent", f"no feature fires (L0 {values(last, 'l0', '{:.3g}')})"
    if "dense" not in spared and dense(last, then, widths, total_tokens):
        shown = values(last, "l0", "{:,.0f}")
        return "dense", f"most of the {widths[1]:,} features fire on the average token (L0 {shown})"
    if "worse" not in spared and worse(last, then, total_tokens):
        shown = f"with L0 {last[-1]['l0']:.3g} it reconstructs worse than the mean"
        few = all(row["l0"] < 1 for row in last)  # then it is the penalty or the threshold
        shown += f" (explained variance {values(last, 'explained_variance', '{:.3g}')})"
        return "silent" if few else "worse", shown
    if untrained and "still" not in spared and still(last, untrained):
        shown = values(last, "explained_variance", "{:.3f}")
        began = f"explained variance {untrained[1]:.3f} before the first step"
        return "still", f"it is no better than untrained ({began}, {shown})"
    return None


def silent(last: list[dict]) -> bool:
    """No feature fires, nor did in a tenth of training: what fires now and then, or is revived, may spread."""
    return all(row["l0"] == 0 and row["dead_share"] in (None, 1) for row in last)


def dense(last: list[dict], then: list[dict], widths: tuple[int, int], total_tokens: int) -> bool:
    """Most features fire, and L0 is not on its way down: penalties may grow over the whole run."""
    d_in, d_sae = widths
    if not then or mean(last, "l0") <= (1 - FALLS) * mean(then, "l0"):
        return False
    if all(row["l0"] > max(ALL * d_sae, d_in) for row in last):
        return True
    unexplained = all(row["explained_variance"] < EXPLAINED for row in last)
    unexplained = unexplained and not will_reach(EXPLAINED, last, then, total_tokens)
    return unexplained and all(row["l0"] > HALF * d_sae for row in last)


def worse(last: list[dict], then: list[dict], total_tokens: int) -> bool:
    """The mean of x would be the better reconstruction, to the end of the run if it goes on as it does."""
    below = all(row["explained_variance"] < 0 for row in last)
    return bool(then) and below and not will_reach(0, last, then, total_tokens)


def will_reach(goal: float, last: list[dict], then: list[dict], total_tokens: int) -> bool:
    """Whether explained variance, as it now rises, is there by the end; True where x has no variance to explain.

    Linear: learning slows down, so that few SAEs do better than that.
    """
    if not all(math.isfinite(row["explained_variance"]) for row in last + then):
        return True
    gain = mean(last, "explained_variance") - mean(then, "explained_variance")
    left = (total_tokens - last[-1]["tokens"]) / (last[-1]["tokens"] - then[-1]["tokens"])
    return mean(last, "explained_variance") + gain * left > goal


def still(last: list[dict], untrained: list[float]) -> bool:
    """Neither better nor sparser than before the first step; False where it began with a NaN."""
    l0, explained = untrained
    enough = explained + PROGRESS * min(1.0, 1 - explained)
    return all(row["explained_variance"] <= enough and row["l0"] > LOST * l0 for row in last)


def before(rows: list[dict], tokens: float) -> list[dict]:
    """The last rows, ROWS at most, of those that lie so many tokens back; [] if none does."""
    return [row for row in rows if row["tokens"] <= rows[-1]["tokens"] - tokens][-ROWS:]


def mean(rows: list[dict], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def values(rows: list[dict], column: str, form: str) -> str:
    return f"{', '.join(form.format(row[column]) for row in rows)} in the last {len(rows)} rows"
