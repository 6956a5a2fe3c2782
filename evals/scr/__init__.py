"""Spurious correlation removal: does ablating the features of one attribute mend a probe that learned two at once
(SAEBench 0.6.0, `scr`)?

A run has two binary attributes, in SAEBench profession (the first) and gender (the second), and a linear probe on
pooled LM activations for each, on balanced texts, and one on texts where both always agree, the biased one. A feature's
effect on a probe is |(mean over positives − mean over negatives)·(W_dec[f]·w)|. Direction 1 ablates the n features with
the largest effects on the second attribute's probe and tests the biased probe on the first attribute; direction 2 the
other way round.
Score = (accuracy after − accuracy before)/(accuracy of the attribute's own probe − accuracy before), 0 if the
denominator is below .001.
scr_metric is the score of the direction in which the biased probe is worse before; averaged over runs.

Random numbers: a generator per run and probe, seeded by the run seed and these names; nothing depends on the cache or
other SAEs. Everything is fp32 (SAEBench: the LM's dtype).
Corrected metrics, beside the compatible ones that repeat SAEBench:
  *_corrected    probes whose epoch is chosen on a fifth of the training rows, not on the test rows; no ablation at
                 masked positions; the direction with the larger denominator, which no tie makes missing; each run's
                 score within −1 and 1
Standard errors: bootstrap over the test texts. The runs are the protocol's own, two or eight, and too few to be a
sample: the spread between two was up to four times off. The test texts of each combination of labels are drawn anew,
the same draw for both directions and every accuracy of a run, and the scores, the choice of a direction among them,
computed again. Probes and the features they choose are held. A score whose denominator is small has a large error, as
it should.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from evals import Result
from evals.common import concept_probes, errors, pooling
from evals.common.concept_probes import Ablation, Texts
from evals.scr import pairs

EVAL_TYPE_ID = "scr"
MASKED = True

METRICS = {
    "scr_metric_threshold_2": "higher",
    "scr_metric_threshold_5": "higher",
    "scr_metric_threshold_10": "higher",
    "scr_metric_threshold_20": "higher",
    "scr_metric_threshold_50": "higher",
    "scr_metric_threshold_100": "higher",
    "scr_metric_threshold_500": "higher",
    "scr_dir1_threshold_2": "higher",
    "scr_dir1_threshold_5": "higher",
    "scr_dir1_threshold_10": "higher",
    "scr_dir1_threshold_20": "higher",
    "scr_dir1_threshold_50": "higher",
    "scr_dir1_threshold_100": "higher",
    "scr_dir1_threshold_500": "higher",
    "scr_dir2_threshold_2": "higher",
    "scr_dir2_threshold_5": "higher",
    "scr_dir2_threshold_10": "higher",
    "scr_dir2_threshold_20": "higher",
    "scr_dir2_threshold_50": "higher",
    "scr_dir2_threshold_100": "higher",
    "scr_dir2_threshold_500": "higher",
    "scr_metric_threshold_10_corrected": "higher",
    "scr_metric_threshold_20_corrected": "higher",
}

NOTE = ("SCR is not a reliable measure of SAE quality: an audit of SAEBench (Chanin 2026, arXiv 2605.18229) finds that "
        "it fails at its usual settings and advises against it. A score is a ratio whose denominator can be small, so "
        "it has no bounds and much noise; SAEBench's own acceptance test allows .08 between two runs of one SAE: read "
        "smaller differences as none.")

# half of each set is of a class
RANGES = {"probe_train_set_size": (2, 10_000_000), "probe_test_set_size": (2, 10_000_000), "probe_lr": (1e-9, 1e3)}

# set sizes are those of one probe's set, positives and negatives together (SAEBench: train_set_size, test_set_size)
CONFIG = {
    "gemma": {
        "dataset_names": ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"],
        "probe_train_set_size": 4000,
        "probe_test_set_size": 1000,
        "context_length": 128,
        "sae_batch_size": 125,
        "llm_batch_size": 32,
        "n_values": [2, 5, 10, 20, 50, 100, 500],
        "probe_train_batch_size": 16,
        "probe_epochs": 20,
        "probe_lr": 1e-3,
        "probe_l1_penalty": 1e-3,
    },
    "embedded": {
        "dataset_names": ["reviews", "wikipedia"],
        "probe_train_set_size": 640,
        "probe_test_set_size": 320,
        "context_length": 64,
        "sae_batch_size": 125,
        "llm_batch_size": 32,
        "n_values": [2, 5, 10, 20, 50, 100, 500],
        "probe_train_batch_size": 16,
        "probe_epochs": 20,
        "probe_lr": 1e-3,
        "probe_l1_penalty": 1e-3,
    },
    "tiny": {
        "dataset_names": ["synthetic"],
        "probe_train_set_size": 64,
        "probe_test_set_size": 32,
        "context_length": 16,
        "sae_batch_size": 125,
        "llm_batch_size": 16,
        "n_values": [2, 5, 10, 20],
        "probe_train_batch_size": 16,
        "probe_epochs": 20,
        "probe_lr": 1e-2,  # of few steps
        "probe_l1_penalty": 1e-3,
    },
}

# gemma: eight pairs of 7,500 texts of 128 tokens to the layer (2,970) and 20 s of an H200 for probes; of an SAE
# 7,680,000 tokens encoded (12 s), ablations and bootstrap (published: 6 minutes of an RTX 3090 for six times the work)
COST = {"gemma": (4300, 1200), "embedded": (39, 3), "tiny": (9, 2)}
COST_BY = (("probe_train_set_size", "probe_test_set_size"), ("dataset_names",), ("context_length",))

N_NAMED = (2, 5, 10, 20, 50, 100, 500)  # the n that SAEBench's schema has keys for
COMPATIBLE = [f"scr_{part}_threshold_{n}" for part in ("metric", "dir1", "dir2") for n in N_NAMED]
CORRECTED = [f"scr_metric_threshold_{n}" for n in (10, 20)]
NO_ROOM = 0.001  # a smaller denominator is none
DRAWS = 500  # of the bootstrap: its own noise is 3 % of the error

PROBES = {  # probe: the combinations of its positives and of its negatives
    "first": (("++", "+-"), ("-+", "--")),
    "second": (("++", "-+"), ("+-", "--")),
    "biased": (("++",), ("--",)),
}
DIRECTIONS = {"dir1": ("second", "first"), "dir2": ("first", "second")}  # the attribute ablated, the attribute tested


def repositories(config: dict, source) -> list[str]:
    """The hub data sets it reads in the gemma profile."""
    from evals.texts import hub

    return hub.repositories(config)


def wheels(kind: str) -> list[str]:
    """The wheels that its texts come in."""
    return ["reviews", "wikipedia"] if kind == "embedded" else []


def read_ahead(source, config: dict, seed: int) -> None:
    """Draw the texts, which are kept: what is wrong with them shows before anything is trained."""
    pairs.Source(source).probing(config)


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    problems = concept_probes.requirements("scr", config, N_NAMED)
    for key in ("probe_train_set_size", "probe_test_set_size"):
        if config[key] % 4:
            problems.append(f"scr: {key} = {config[key]} cannot be shared out among four combinations of labels\n"
                            "set it to a multiple of 4")
    known = pairs.RUNS[facts["source"]]
    unknown = [name for name in config["dataset_names"] if name not in known]
    if unknown:
        problems.append(f"scr: no data set {unknown[0]!r}\nchoose dataset_names among {', '.join(known)}")
    return problems


def run(setup, saes: dict) -> dict[str, Result]:
    """Ablate every SAE's features for either attribute of every run; {SAE name: Result}."""
    problems: dict[str, list[str]] = {name: [] for name in saes}
    scores: dict = {name: {} for name in saes}  # SAE -> run -> metric -> number
    drawn: dict = {name: {} for name in saes}  # SAE -> run -> the scores of every draw of the bootstrap
    # SAE -> run -> "compatible" | "corrected" -> direction -> accuracies
    accuracies: dict = {name: {} for name in saes}
    try:
        sets = pooling.labelled(dataclasses.replace(setup, data=pairs.Source(setup.data)))
    except ValueError as error:  # a combination has too few texts
        return {name: _result({}, {}, {}, {}, [f"scr: no score: {error}".replace("\n", "; ")]) for name in saes}
    for texts in concept_probes.pooled(setup, saes, "scr", sets, problems):
        examples = functools.partial(_examples, texts.rows)
        found = concept_probes.trained(setup, texts.key, list(PROBES), examples, texts.x_ND)
        for name in texts.features:
            ablations = concept_probes.ablations(found, texts, name, saes[name])
            right = {kind: _right(setup, texts, ablation) for kind, ablation in ablations.items()}
            measured = {kind: {direction: _each(of, _accuracy) for direction, (_, of) in by_direction.items()}
                        for kind, by_direction in right.items()}
            accuracies[name][texts.key] = measured
            scores[name][texts.key] = _scores(measured["compatible"], measured["corrected"])
            drawn[name][texts.key] = _drawn_scores(setup, texts, right)
    return {name: _result(sets, scores[name], drawn[name], accuracies[name], problems[name]) for name in saes}


def _labelled(rows: dict[str, Tensor], probe: str) -> tuple[Tensor, Tensor]:
    """(row_M, label_M) of a probe's texts: the combinations of a side in equal parts, all of one that is alone."""
    sides = []
    for signs in PROBES[probe]:
        number = len(rows["+-"]) if len(signs) > 1 else None
        sides.append(torch.cat([rows[sign][:number] for sign in signs]))
    return torch.cat(sides), torch.cat([torch.ones(len(sides[0])), torch.zeros(len(sides[1]))]).long()


def _examples(rows: dict, name: str, rng: torch.Generator) -> tuple:
    """A probe's (train, test) sets, shuffled by two randperms each: an equal seed gives SAEBench's own order."""
    drawn = []
    for split in ("train", "test"):
        row_M, label_M = _labelled(rows[split], name)
        half = len(row_M) // 2
        row_M[half:] = row_M[half:][torch.randperm(half, generator=rng)]
        order_M = torch.randperm(len(row_M), generator=rng)
        drawn.append((row_M[order_M], label_M[order_M]))
    return tuple(drawn)


def _right(setup, texts: Texts, ablation: Ablation) -> dict[str, tuple[Tensor, dict]]:
    """{direction: (test texts row_M, {"clean", "before", "after": {n: …}})}: whether a probe is right of each, [M]."""
    names = list(PROBES)
    effect_PF = (ablation.effects([_labelled(texts.rows["train"], name) for name in names]) * ablation.dot_FP.T).abs()
    found = {}
    for direction, (ablated, tested) in DIRECTIONS.items():
        row_M, label_M = _labelled(texts.rows["test"], tested)
        logit_MP, effect_F = ablation.logit_NP[row_M], effect_PF[names.index(ablated)]
        biased_M = {n: ablation.logits(row_M, concept_probes.strongest(effect_F, n))[:, names.index("biased")]
                    for n in setup.config["n_values"] if n <= len(effect_F)}
        logits = {"clean": logit_MP[:, names.index(tested)], "before": logit_MP[:, names.index("biased")],
                  "after": biased_M}
        found[direction] = row_M, _each(logits, functools.partial(_is_right, label_M))
    return found


def _is_right(label_M: Tensor, logit_M: Tensor) -> Tensor:
    return (logit_M > 0) == (label_M == 1)


def _accuracy(right_M: Tensor) -> float:
    return right_M.float().mean().item()


def _share(times_RN: Tensor, row_M: Tensor, right_M: Tensor) -> list[float]:
    """The accuracy of every draw, in which the texts stand so many times."""
    return (times_RN[:, row_M] @ right_M.double() / len(row_M)).tolist()


def _each(found: dict, of: Callable) -> dict:
    """The same dictionary {"clean", "before", "after": {n: …}} with of(value) for every value."""
    return {"clean": of(found["clean"]), "before": of(found["before"]),
            "after": {n: of(value) for n, value in found["after"].items()}}


def _drawn_scores(setup, texts: Texts, right: dict) -> list[dict[str, float]]:
    """The scores of a run from test texts drawn anew within each combination; [] if one has too few of them."""
    mixed = len(texts.rows["test"]["+-"])
    if not errors.enough([1.0] * mixed):
        return []
    rng = concept_probes.generator(setup, texts.key, "bootstrap")
    times_RN = torch.zeros(DRAWS, len(texts.x_ND), dtype=torch.float64)
    for row_m in (texts.rows["test"][sign][:mixed] for sign in pairs.COMBINATIONS):
        times_RN.scatter_add_(1, row_m[torch.randint(mixed, (DRAWS, mixed), generator=rng)],
                              torch.ones(DRAWS, mixed).double())
    shares = {kind: {direction: _each(of, functools.partial(_share, times_RN, row_M))
                     for direction, (row_M, of) in by_direction.items()} for kind, by_direction in right.items()}

    def of_draw(kind: str, draw: int) -> dict[str, dict]:
        return {direction: _each(of, operator.itemgetter(draw)) for direction, of in shares[kind].items()}

    return [_scores(of_draw("compatible", draw), of_draw("corrected", draw)) for draw in range(DRAWS)]


def _error(metric: str, drawn: dict[str, list[dict]]) -> float | None:
    """Standard deviation over the draws of a metric's mean over the runs; None if half the draws or more have none."""
    of_draws = [[scores[metric] for scores in runs if metric in scores] for runs in zip(*drawn.values())]
    means = [statistics.fmean(values) for values in of_draws if values]
    return statistics.stdev(means) if len(means) > DRAWS / 2 else None


def _scores(compatible: dict, corrected: dict) -> dict[str, float]:
    """The metrics of one run from its accuracies; those that do not exist for it are absent."""
    values = {}
    before = {direction: found["before"] for direction, found in compatible.items()}
    chosen = None if before["dir1"] == before["dir2"] else min(before, key=before.get)
    for direction, found in compatible.items():
        room = found["clean"] - found["before"]
        for n, after in found["after"].items():
            score = (after - found["before"]) / room if room >= NO_ROOM else 0.0
            values[f"scr_{direction}_threshold_{n}"] = score
            if direction == chosen:
                values[f"scr_metric_threshold_{n}"] = score
    if _has_room(corrected):
        found = max(corrected.values(), key=lambda found: found["clean"] - found["before"])
        for n, after in found["after"].items():
            score = (after - found["before"]) / (found["clean"] - found["before"])
            values[f"scr_metric_threshold_{n}_corrected"] = max(-1.0, min(1.0, score))
    return values


def _result(sets: dict, scores: dict, drawn: dict, accuracies: dict, problems: list[str]) -> Result:
    """The Result of one SAE: means over the runs; no number if a run of `sets` could not be measured."""

    def summary(metric: str) -> tuple[float | None, float | None]:
        values = [values[metric] for values in scores.values() if metric in values]
        if not values or len(scores) < len(sets):
            return None, None
        return statistics.fmean(values), _error(metric, drawn)

    compatible = {metric: summary(metric) for metric in COMPATIBLE}
    corrected = {f"{metric}_corrected": summary(f"{metric}_corrected") for metric in CORRECTED}
    changes = [after - found["before"] for by_kind in accuracies.values() for found in by_kind["corrected"].values()
               for after in found["after"].values()]
    if changes and not any(changes):
        problems = [*problems, "scr: ablating features changes no accuracy (a dead SAE: its features do not depend on "
                               "the text)"]
    stuck = [run for run, by_kind in accuracies.items() if not _has_room(by_kind["corrected"])]
    if stuck:
        problems = [*problems, f"scr: in {len(stuck)} of {len(sets)} runs the biased probe is as good as the "
                               f"attributes' own ({', '.join(stuck)}): no corrected score of them"]
    if accuracies and all(len({found["before"] for found in by_kind["compatible"].values()}) == 1
                          for by_kind in accuracies.values()):
        problems = [*problems, "scr: in every run the biased probe is exactly as good on one attribute as on the "
                               "other: no scr_metric"]
    return Result(
        metrics={"scr_metrics": {metric: mean for metric, (mean, _) in compatible.items()}},
        corrected={metric: mean for metric, (mean, _) in corrected.items()},
        stderrs={metric: error for metric, (_, error) in (compatible | corrected).items() if error is not None},
        details=[{"dataset_name": f"{run}_results"} | {m: values.get(m) for m in COMPATIBLE}
                 for run, values in scores.items()],
        unstructured={run: {"accuracies": accuracies[run], "scores": scores[run]} for run in scores},
        problems=problems,
    )


def _has_room(measured: dict[str, dict]) -> bool:
    return any(found["clean"] - found["before"] >= NO_ROOM for found in measured.values())
