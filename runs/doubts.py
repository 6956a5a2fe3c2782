"""What makes a run's figures doubtful, in a line each: dead, not sparse, untrained, at chance, a copy, impossible."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict

from runs.frontier import alive_of, l0_of
from runs.reading import DOUBT, LM_ONLY, Run, setting
from runs.wording import listing, number

ACCURACY = re.compile(r"\.sae_(top_\d+_|val_selected_)?test_accuracy")
# counts over counts, which two SAEs can share by chance
COUNTED = re.compile(r"frac_alive$|freq_over_|dead_share$")
R2 = ("core.r2", "ground_truth.r2")
# what no SAE's figure can be: {metric: (least, most)}; the CE loss score alone can, and says then that ablation is no
# worse
BOUNDS = {"core.r2": (-math.inf, 1), "core.explained_variance": (-math.inf, 1), "core.cossim": (-1, 1),
          "core.frac_alive": (0, 1), "ground_truth.r2": (-math.inf, 1), "ground_truth.frac_alive": (0, 1),
          **{f"ground_truth.{share}": (0, 1) for share in ("f1", "precision", "recall", "mcc", "uniqueness")}}
# R² above that by medians: on ordinary tokens it lies below, as a few of them are reconstructed worst
FAR = 0.2
# variants whose k is the L0 that is asked for
TOP_K = ("topk", "batch_topk", "matryoshka_batch_topk", "abs_topk", "matching_pursuit", "aligned")
# how far a measured L0 may be from the one asked for, as a share of it: a k is kept exactly in training, and only theta
# or features that do not fire part the two at inference; a target_l0 is pursued, and may not have been reached
OFF_TARGET = {"k": 0.5, "target_l0": 0.2}


def warnings(run: Run, baseline: Run | None = None) -> list[str]:
    """What makes a run's figures doubtful; with a baseline also what looks like the baseline's own figures."""
    found = _activity(run)
    found += [problem.removeprefix(DOUBT) for problem in run.problems if problem.startswith(DOUBT)]
    found += _poor(run) + _off_target(run) + _at_chance(run) + _untrained(run) + _contradictions(run)
    if baseline is not None and baseline.path != run.path:
        found += _copied(run, baseline)
    return found


def twins(runs: list[Run]) -> list[int | None]:
    """A number for each run that is the same SAE as another of them, the same for all that are one; else None."""
    groups = defaultdict(list)
    for i, run in enumerate(runs):
        groups[frozenset(_telling(run.means).items())].append(i)
    numbers: list[int | None] = [None] * len(runs)
    for number_of, (metrics, members) in enumerate(groups.items()):
        if metrics and len(members) > 1:
            for i in members:
                numbers[i] = number_of
    return numbers


def _activity(run: Run) -> list[str]:
    """Too few features that fire, or too many."""
    found, l0, alive, width = [], l0_of(run), alive_of(run), run.config.get("d_sae")
    if l0 == 0:
        found.append("dead SAE: L0 = 0, no feature ever fires")
    elif alive == 0:
        found.append("dead SAE: frac_alive = 0, no feature ever fires")
    elif alive is not None and alive < 0.1:
        found.append(f"nearly dead SAE: only {alive:.1%} of its features ever fire")
    if l0 is not None and width and l0 > width / 10:
        found.append(f"not sparse: L0 = {number(l0)} is more than a tenth of its {width:,} features")
    if run.config.get("dense"):
        found.append(f"a dense code: {run.config['dense']:.0%} of its features are active on the average token; "
                     "verdicts are marked")
    return found


def _poor(run: Run) -> list[str]:
    """What says that the SAE reconstructs worse than no SAE would, and figures that cannot be."""
    found, score = [], run.means.get("core.ce_loss_score")
    for metric in R2:
        r2 = run.means.get(metric)
        if r2 is not None and r2 < 0:
            found.append(f"R² = {number(r2)} is below 0: the mean activation reconstructs better than the SAE")
    if score is not None and score < 0:
        found.append(f"CE loss score = {number(score)} is below 0: the model predicts worse with the SAE than with "
                     "zeros in its place")
    if score is not None and score > 1 + 2 * run.stderrs.get("core.ce_loss_score", 0.0):
        found.append(f"CE loss score = {number(score)} is above 1: the model predicts better with the SAE than without")
    r2, by_medians = run.means.get("core.r2"), run.means.get("core.r2_median")
    if r2 is not None and by_medians is not None and r2 > by_medians + FAR:
        found.append(f"R² = {number(r2)} is that of a few large tokens; by medians over all it is {number(by_medians)}")
    for metric, value in run.means.items():
        bounds = _bounds(metric)
        if bounds and value is not None and not bounds[0] - 1e-6 <= value <= bounds[1] + 1e-6:
            found.append(f"impossible: {metric} = {number(value)} lies outside {bounds[0]} to {bounds[1]}")
    return found


@functools.cache  # the same few hundred names in every run
def _bounds(metric: str) -> tuple[float, float] | None:
    return (0, 1) if _is_accuracy(metric) else BOUNDS.get(metric)


def _off_target(run: Run) -> list[str]:
    """A measured L0 that is not the one the variant was to reach, and for a target what brings it there."""
    key = "k" if run.config.get("variant") in TOP_K else "target_l0"
    hyper = run.config.get("hyper") or {}
    l0, wanted = l0_of(run), hyper.get(key)
    if not l0 or not isinstance(wanted, (int, float)) or wanted <= 0 or abs(l0 / wanted - 1) <= OFF_TARGET[key]:
        return []
    if run.config.get("init_from") and not run.config.get("steps"):  # evaluated only
        return []
    said = f"L0 = {number(l0)} is far from {key} = {wanted}, which was asked for"
    if key == "k":
        return [said]
    wider = f", or widen --hyper bandwidth (now {hyper['bandwidth']})" if "bandwidth" in hyper else ""
    return [f"{said} ({l0 / wanted - 1:+.0%}): thresholds move by about the learning rate a step; raise --lr or "
            f"--num_tokens{wider}"]


def _at_chance(run: Run) -> list[str]:
    accuracies = {m: v for m, v in run.means.items() if v is not None and _is_accuracy(m)}
    chance = [m for m, v in accuracies.items() if v <= 0.5 + max(0.005, 2 * run.stderrs.get(m, 0.0))]
    if not chance:
        return []
    return [f"probing at chance (.5) in {len(chance)} of {len(accuracies)} accuracies of the SAE: {listing(chance)}"]


def _untrained(run: Run) -> list[str]:
    if run.config.get("init_from"):  # trained elsewhere; how, its own record says
        return []
    steps, tokens = run.config.get("steps", run.means.get("training.steps")), setting(run.config, "num_tokens")
    if steps == 0:
        return ["untrained: 0 training steps"]
    # SAEBench's custom SAEs say -100000 even if trained
    if steps is None and isinstance(tokens, (int, float)) and tokens <= 0:
        return [f"no sign of training: {tokens} training tokens and no number of steps"]
    return []


def _contradictions(run: Run) -> list[str]:
    found = []
    for key, places in run.config.get("disagree", {}).items():
        by_value = defaultdict(list)
        for where, value in places.items():
            by_value[value].append(where)
        said = ", ".join(f"{value} ({', '.join(where)})" for value, where in by_value.items())
        found.append(f"metadata disagree on the {key}: {said}")
    return found


def _copied(run: Run, other: Run) -> list[str]:
    """Metrics of the SAE equal to the other's that can hardly be equal by chance."""
    equal = {m: v for m, v in run.means.items() if v is not None and other.means.get(m) == v}
    same = list(_telling(equal))
    if not same:
        return []
    both = sum(other.means.get(m) is not None for m in _telling(run.means))
    if len(same) == both > 1:
        return [f"all {both} SAE metrics equal those of {other.name} to the last digit: the change had no effect"]
    return [f"equal to {other.name} to the last digit: {listing(same)}"]


def _telling(means: dict[str, float | None]) -> dict[str, float]:
    """Those whose equality tells anything: of the SAE, no count, and more than the 8 significant bits of a bfloat16."""
    return {metric: value for metric, value in means.items() if isinstance(value, float) and not _by_nature(metric)
            and not (math.frexp(value)[0] * 256).is_integer()}


@functools.cache
def _by_nature(metric: str) -> bool:
    """Whether a metric is equal in two SAEs for other reasons than that they are one."""
    return bool(LM_ONLY.search(metric) or COUNTED.search(metric))


@functools.cache
def _is_accuracy(metric: str) -> bool:
    return bool(ACCURACY.search(metric))
