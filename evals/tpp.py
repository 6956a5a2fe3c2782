"""Targeted probe perturbation: does ablating the features of one class hurt that class's probe and no other (SAEBench
0.6.0, `tpp`)?

A linear probe on pooled LM activations for each class against the others; a feature's effect on it is
max(0, mean over positives − mean over negatives)·(W_dec[f]·w). Ablating the n features with the largest effects on
class c costs its probe `intended` test accuracy and the other classes' probes `unintended` on average; the score is the
difference, averaged over classes, then over data sets. The texts are sparse_probing's.

Random numbers: a generator per data set, class and moment, seeded by the run seed and these names. As in SAEBench
negatives are drawn anew for each probe, effect and accuracy, but here the draws are the same for every SAE and do not
depend on the cache. Everything is fp32 (SAEBench: the LM's dtype). Corrected metrics, beside the compatible ones that
repeat SAEBench:
  *_corrected    one draw of negatives per class throughout; probes whose epoch is chosen on a fifth of the training
                 rows, not on the test rows; no ablation at masked positions; features of negative or no effect are
                 never ablated
Standard errors are over classes, as in sparse_probing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from evals import Result
from evals.common import concept_probes, pooling, probes
from evals.common.concept_probes import Ablation, Texts

EVAL_TYPE_ID = "tpp"
MASKED = True

METRICS = {
    "tpp_threshold_2_total_metric": "higher",
    "tpp_threshold_5_total_metric": "higher",
    "tpp_threshold_10_total_metric": "higher",
    "tpp_threshold_20_total_metric": "higher",
    "tpp_threshold_50_total_metric": "higher",
    "tpp_threshold_100_total_metric": "higher",
    "tpp_threshold_500_total_metric": "higher",
    "tpp_threshold_2_intended_diff_only": "higher",
    "tpp_threshold_5_intended_diff_only": "higher",
    "tpp_threshold_10_intended_diff_only": "higher",
    "tpp_threshold_20_intended_diff_only": "higher",
    "tpp_threshold_50_intended_diff_only": "higher",
    "tpp_threshold_100_intended_diff_only": "higher",
    "tpp_threshold_500_intended_diff_only": "higher",
    "tpp_threshold_2_unintended_diff_only": "lower",
    "tpp_threshold_5_unintended_diff_only": "lower",
    "tpp_threshold_10_unintended_diff_only": "lower",
    "tpp_threshold_20_unintended_diff_only": "lower",
    "tpp_threshold_50_unintended_diff_only": "lower",
    "tpp_threshold_100_unintended_diff_only": "lower",
    "tpp_threshold_500_unintended_diff_only": "lower",
    "tpp_threshold_10_total_metric_corrected": "higher",
    "tpp_threshold_20_total_metric_corrected": "higher",
}

NOTE = ("TPP is not a reliable measure of SAE quality: an audit of SAEBench (Chanin 2026, arXiv 2605.18229) finds that "
        "it fails at its usual settings and advises against it. Drawing other negatives alone moves it by ±.004, and "
        "SAEBench's own acceptance test allows .04 between two runs of one SAE: read smaller differences as none.")

# half of each set is of a class
RANGES = {"probe_train_set_size": (2, 10_000_000), "probe_test_set_size": (2, 10_000_000), "probe_lr": (1e-9, 1e3)}

# names and sizes are those of sparse_probing, whose texts and LM activations these are; SAEBench: train_set_size, ...
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
        "dataset_names": ["arxiv_field", "wikipedia_topic"],
        "probe_train_set_size": 400,
        "probe_test_set_size": 200,
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
        "probe_train_set_size": 32,
        "probe_test_set_size": 16,
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

# gemma: two sets of five classes of 2,500 texts of 128 tokens to the layer (1,240, though sparse_probing may have kept
# them) and 8 s of an H200 for probes; of an SAE 3,200,000 tokens encoded (5 s) and ablations (published: 2 minutes of
# an RTX 3090, which is 650)
COST = {"gemma": (1800, 650), "embedded": (40, 3), "tiny": (6, 3)}
COST_BY = (("probe_train_set_size", "probe_test_set_size"), ("dataset_names",), ("context_length",))

N_NAMED = (2, 5, 10, 20, 50, 100, 500)  # the n that SAEBench's schema has keys for
PARTS = ("total_metric", "intended_diff_only", "unintended_diff_only")
COMPATIBLE = [f"tpp_threshold_{n}_{part}" for part in PARTS for n in N_NAMED]
CORRECTED = [f"tpp_threshold_{n}_total_metric" for n in (10, 20)]


def repositories(config: dict, source) -> list[str]:
    """The hub data sets it reads in the gemma profile."""
    from evals.texts import hub

    return hub.repositories(config)


def read_ahead(source, config: dict, seed: int) -> None:
    """Draw the texts, which are kept: what is wrong with them shows before anything is trained."""
    source.probing(config)


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    problems = concept_probes.requirements("tpp", config, N_NAMED)
    return problems + pooling.unknown_sets("tpp", config, facts.get("source"))


def run(setup, saes: dict) -> dict[str, Result]:
    """Ablate every SAE's features for each class of every data set; {SAE name: Result}."""
    problems: dict[str, list[str]] = {name: [] for name in saes}
    # SAE -> data set -> "compatible" | "corrected" -> metric -> class -> number
    scores: dict = {name: {} for name in saes}
    try:
        sets = pooling.labelled(setup)
    except ValueError as error:  # a class has too few texts
        return {name: _result({}, {}, [f"tpp: no score: {error}".replace("\n", "; ")]) for name in saes}
    for texts in concept_probes.pooled(setup, saes, "tpp", sets, problems):
        examples = functools.partial(_examples, texts.rows)
        found = concept_probes.trained(setup, texts.key, list(texts.rows["train"]), examples, texts.x_ND)
        for name in texts.features:
            ablations = concept_probes.ablations(found, texts, name, saes[name])
            scores[name][texts.key] = {kind: _scores(setup, kind, texts, examples, ablation)
                                       for kind, ablation in ablations.items()}
    return {name: _result(sets, scores[name], problems[name]) for name in saes}


def _examples(rows: dict, name: str, rng) -> tuple:
    """A class's (train, test) draws."""
    return tuple(probes.draw(rows[split], name, rng) for split in ("train", "test"))


def _scores(setup, kind: str, texts: Texts, examples: Callable, ablation: Ablation) -> dict[str, dict[str, float]]:
    """{metric: {ablated class: number}} of one SAE on one data set."""
    names = list(texts.rows["train"])

    def draw(name: str, *moment):
        """The draws of a class: anew for each moment, or the one that the corrected probes were trained on."""
        if kind == "corrected":
            moment = ("corrected",)
        return examples(name, concept_probes.generator(setup, texts.key, name, *moment))

    contrast_PF = ablation.effects([draw(name, "effects")[0] for name in names])
    effect_PF = contrast_PF.clamp_min(0) * ablation.dot_FP.T
    if kind == "corrected":
        effect_PF = effect_PF.clamp_min(0)
    clean = {}
    for p, name in enumerate(names):
        row_M, label_M = draw(name, "clean")[1]
        clean[name] = concept_probes.accuracy(ablation.logit_NP[row_M, p], label_M)

    values: dict[str, dict[str, float]] = {}
    for ablated, effect_F in zip(names, effect_PF):
        for n in (n for n in setup.config["n_values"] if n <= len(effect_F)):
            selected_n = concept_probes.strongest(effect_F, n)
            loss = {}
            for p, name in enumerate(names):
                row_M, label_M = draw(name, ablated, n)[1]
                loss[name] = clean[name] - concept_probes.accuracy(ablation.logits(row_M, selected_n)[:, p], label_M)
            intended = loss.pop(ablated)
            unintended = sum(loss.values()) / len(loss)
            for part, value in zip(PARTS, (intended - unintended, intended, unintended)):
                values.setdefault(f"tpp_threshold_{n}_{part}", {})[ablated] = value
    return values


def _result(sets: dict, scores: dict, problems: list[str]) -> Result:
    """The Result of one SAE; a metric that a data set of `sets` lacks is None."""

    def summary(kind: str, metric: str, datasets) -> tuple[float | None, float | None]:
        values = [list(scores.get(dataset, {}).get(kind, {}).get(metric, {}).values()) for dataset in datasets]
        if not values or not all(values):
            return None, None
        return sum(sum(v) / len(v) for v in values) / len(values), probes.standard_error(values)

    compatible = {metric: summary("compatible", metric, sets) for metric in COMPATIBLE}
    corrected = {f"{metric}_corrected": summary("corrected", metric, sets) for metric in CORRECTED}
    changes = [value for by_kind in scores.values() for by_class in by_kind["corrected"].values()
               for value in by_class.values()]
    if changes and not any(changes):
        problems = [*problems, "tpp: ablating features changes no accuracy (a dead SAE: its features do not depend on "
                               "the text)"]
    return Result(
        metrics={"tpp_metrics": {metric: mean for metric, (mean, _) in compatible.items()}},
        corrected={metric: mean for metric, (mean, _) in corrected.items()},
        stderrs={metric: error for metric, (_, error) in (compatible | corrected).items() if error is not None},
        details=[{"dataset_name": f"{dataset}_tpp_results"}
                 | {metric: summary("compatible", metric, [dataset])[0] for metric in COMPATIBLE}
                 for dataset in sets],
        unstructured={dataset: _by_class(by_kind) for dataset, by_kind in scores.items()},
        problems=problems,
    )


def _by_class(by_kind: dict) -> dict[str, dict[str, float]]:
    """{class: {metric: number}}, as SAEBench has it."""
    turned: dict[str, dict[str, float]] = {}
    for kind, values in by_kind.items():
        for metric, by_class in values.items():
            for name, value in by_class.items():
                turned.setdefault(name, {})[metric if kind == "compatible" else f"{metric}_corrected"] = value
    return turned
