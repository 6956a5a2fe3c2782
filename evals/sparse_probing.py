"""Sparse probing: how well do a few SAE features tell a labelled class from the rest (SAEBench 0.6.0,
`sparse_probing`)?

Per class a balanced one-against-rest problem on pooled features; k features by mean difference, logistic regression on
them, test accuracy; the same on LM channels; mean over classes, then over data sets.

The random numbers differ from SAEBench on purpose. There one stream runs through all probes of an SAE and LM probes are
fitted only if their cache is empty, so an equal seed scores an SAE differently on the first run and the second. Here
each probe has a generator seeded by run seed, data set, class and metric: negatives are still drawn anew for each probe
and each k, in SAEBench's order, but nothing depends on the cache, on other SAEs or on the order of data sets.
Pooling and probes are fp32 (SAEBench: the LM's dtype). Corrected metrics beside the compatible ones:
  *_top_k_test_accuracy_fixed_draw     one draw of negatives per class, for LM channels and SAE features and every k;
                                       the probe in fp64 at its optimum (SAEBench's lbfgs in fp32 stops before it,
                                       wherever rounding has it)
  *_val_selected_test_accuracy         full probe whose epoch is chosen on a fifth of the training rows
  sae_top_1_minus_llm_top_1            difference of the fixed draws, paired by class
Standard errors are over classes, those of all data sets alike, from five on (evals/common/probes.py).
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from evals import Result
from evals.common import pooling, probes
from evals.model import memory
from evals.storage.identity import code_digest

EVAL_TYPE_ID = "sparse_probing"
MASKED = True

METRICS = {
    "llm_test_accuracy": "",
    "llm_top_1_test_accuracy": "",
    "llm_top_2_test_accuracy": "",
    "llm_top_5_test_accuracy": "",
    "llm_top_10_test_accuracy": "",
    "llm_top_20_test_accuracy": "",
    "llm_top_50_test_accuracy": "",
    "llm_top_100_test_accuracy": "",
    "sae_test_accuracy": "higher",
    "sae_top_1_test_accuracy": "higher",
    "sae_top_2_test_accuracy": "higher",
    "sae_top_5_test_accuracy": "higher",
    "sae_top_10_test_accuracy": "higher",
    "sae_top_20_test_accuracy": "higher",
    "sae_top_50_test_accuracy": "higher",
    "sae_top_100_test_accuracy": "higher",
    "llm_val_selected_test_accuracy": "",
    "llm_top_1_test_accuracy_fixed_draw": "",
    "llm_top_2_test_accuracy_fixed_draw": "",
    "llm_top_5_test_accuracy_fixed_draw": "",
    "llm_top_10_test_accuracy_fixed_draw": "",
    "llm_top_20_test_accuracy_fixed_draw": "",
    "llm_top_50_test_accuracy_fixed_draw": "",
    "llm_top_100_test_accuracy_fixed_draw": "",
    "sae_val_selected_test_accuracy": "higher",
    "sae_top_1_test_accuracy_fixed_draw": "higher",
    "sae_top_2_test_accuracy_fixed_draw": "higher",
    "sae_top_5_test_accuracy_fixed_draw": "higher",
    "sae_top_10_test_accuracy_fixed_draw": "higher",
    "sae_top_20_test_accuracy_fixed_draw": "higher",
    "sae_top_50_test_accuracy_fixed_draw": "higher",
    "sae_top_100_test_accuracy_fixed_draw": "higher",
    "sae_top_1_minus_llm_top_1": "higher",
}

# half of each set is of a class
RANGES = {"probe_train_set_size": (2, 10_000_000), "probe_test_set_size": (2, 10_000_000)}

# set sizes count positives and negatives, as in SAEBench: half of them are texts of the class
CONFIG = {
    "gemma": {
        "dataset_names": [
            "LabHC/bias_in_bios_class_set1",
            "LabHC/bias_in_bios_class_set2",
            "LabHC/bias_in_bios_class_set3",
            "canrager/amazon_reviews_mcauley_1and5",
            "canrager/amazon_reviews_mcauley_1and5_sentiment",
            "codeparrot/github-code",
            "fancyzhx/ag_news",
            "Helsinki-NLP/europarl",
        ],
        "probe_train_set_size": 4000,
        "probe_test_set_size": 1000,
        "context_length": 128,
        "sae_batch_size": 125,
        "llm_batch_size": 32,
        "k_values": [1, 2, 5, 10, 20, 50],
    },
    "embedded": {
        "dataset_names": ["arxiv_field", "wikipedia_topic", "review_sentiment", "language"],
        "probe_train_set_size": 400,
        "probe_test_set_size": 200,
        "context_length": 64,
        "sae_batch_size": 125,
        "llm_batch_size": 32,
        "k_values": [1, 2, 5],
    },
    "tiny": {
        "dataset_names": ["synthetic"],
        "probe_train_set_size": 32,
        "probe_test_set_size": 16,
        "context_length": 16,
        "sae_batch_size": 125,
        "llm_batch_size": 16,
        "k_values": [1, 2],
    },
}

# gemma: 36 classes of 2,500 texts of 128 tokens to the layer (4,460), and the model's own probes (published set-up: 15
# minutes of an RTX 3090, which is 4,900); of an SAE 11,520,000 tokens encoded in fp32, 17 s of an H200 (1,100), and
# some 11 s of probes
COST = {"gemma": (4900, 1800), "embedded": (65, 6), "tiny": (35, 6)}
COST_BY = (("probe_train_set_size", "probe_test_set_size"), ("dataset_names",), ("context_length",))

K_NAMED = (1, 2, 5, 10, 20, 50, 100)  # the k that SAEBench's schema has a key for


def repositories(config: dict, source) -> list[str]:
    """The hub data sets it reads in the gemma profile."""
    from evals.texts import hub

    return hub.repositories(config)


def read_ahead(source, config: dict, seed: int) -> None:
    """Draw the texts, which are kept: what is wrong with them shows before anything is trained."""
    source.probing(config)


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    problems = []
    if not config["k_values"] or not set(config["k_values"]) <= set(K_NAMED):
        problems.append(f"sparse_probing: k_values = {config['k_values']} must be some of {list(K_NAMED)}\n"
                        "SAEBench's results have no key for any other k")
    problems += pooling.short_context("sparse_probing", config)
    return problems + pooling.unknown_sets("sparse_probing", config, facts.get("source"))


def run(setup, saes: dict) -> dict[str, Result]:
    """Probe every SAE on every data set; {SAE name: Result}."""
    encoders = {None: lambda x: x} | {name: sae.encode for name, sae in saes.items()}  # None: the LM's own channels
    accuracies: dict = {name: {} for name in encoders}  # who -> data set -> metric -> class -> accuracy
    selected: dict = {name: {} for name in saes}  # SAE -> data set -> class -> feature numbers
    problems: dict = {name: [] for name in encoders}
    for dataset, (tokens_NT, length_N, rows) in pooling.labelled(setup).items():
        setup.say(f"sparse_probing: {dataset}, {len(rows['train'])} classes, {len(tokens_NT)} texts")
        for name, x_NF in pooling.pooled(setup, tokens_NT, length_N, encoders).items():
            bad = int((~x_NF.isfinite()).any(1).sum())
            if bad:  # scikit-learn would raise on them, after the whole of training
                what = "LM activations" if name is None else "features"
                problems[name].append(f"sparse_probing: {dataset}: NaN or inf in the {what} of {bad} of "
                                      f"{len(tokens_NT)} texts")
                accuracies[name][dataset] = {}
            elif name is None:
                accuracies[name][dataset] = _llm_accuracies(setup, dataset, rows, x_NF)
            else:
                accuracies[name][dataset], selected[name][dataset] = memory.undivided(
                    setup, "the probes", partial(_accuracies, setup, "sae", dataset, rows, x_NF),
                    "probe_train_set_size")
    return {name: _result(setup.config["k_values"], accuracies[None], accuracies[name], selected[name],
                          problems[None] + problems[name]) for name in saes}


@probes.one_thread()
def _accuracies(setup, side: str, dataset: str, rows: dict, x_NF: Tensor) -> tuple[dict, dict]:
    """Test accuracies {metric: {class: accuracy}}, and {class: features of the largest k in the fixed draw}."""
    x_NF, k_values = _placed(setup, x_NF), setup.config["k_values"]
    accuracies: dict[str, dict[str, float]] = {}
    selected: dict[str, list[int]] = {}

    def examples(name: str, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        drawn = (probes.draw(rows[split], name, rng) for split in ("train", "test"))
        return [(x_NF[row_M.to(x_NF.device)].to(setup.lm.device), label_M.to(setup.lm.device))
                for row_M, label_M in drawn]

    for name in rows["train"]:
        values = {}
        metric = f"{side}_test_accuracy"
        rng = probes.generator(setup.seed, dataset, name, metric)
        values[metric] = probes.leaky_accuracy(*examples(name, rng), rng)
        for k in k_values:
            metric = f"{side}_top_{k}_test_accuracy"
            train, test = examples(name, probes.generator(setup.seed, dataset, name, metric))
            values[metric] = probes.sparse_probe_accuracy(train, test, probes.by_mean_difference(*train)[:k])

        train, test = examples(name, probes.generator(setup.seed, dataset, name))
        ranked_F = probes.by_mean_difference(*train)
        for k in k_values:
            accuracy = probes.converged_probe_accuracy(train, test, ranked_F[:k])
            values[f"{side}_top_{k}_test_accuracy_fixed_draw"] = accuracy
        rng = probes.generator(setup.seed, dataset, name, "epochs")
        values[f"{side}_val_selected_test_accuracy"] = probes.validation_selected(train, test, rng)[0]
        selected[name] = ranked_F[: max(k_values)].tolist()
        for metric, value in values.items():
            accuracies.setdefault(metric, {})[name] = value
    return accuracies, selected


def _placed(setup, x_NF: Tensor) -> Tensor:
    """The features of all texts on the LM's device; if they do not fit, each probe takes its rows from host memory."""
    what = "the features of all texts"
    if what not in setup.fits:
        try:
            return x_NF.to(setup.lm.device)
        except torch.OutOfMemoryError:
            setup.fits[what] = 0
            setup.say(f"out of GPU memory for {what}: going on with them in host memory")
    return x_NF


def _llm_accuracies(setup, dataset: str, rows: dict, x_ND: Tensor) -> dict:
    """The accuracies of LM channels, fitted once: no SAE enters them."""
    depends_on = {
        "activations": hashlib.sha256(x_ND.cpu().numpy().tobytes()).hexdigest(),
        "dataset": dataset,
        "classes": [(split, name, len(places)) for split, named in rows.items() for name, places in named.items()],
        "k_values": setup.config["k_values"],
        "seed": setup.seed,
        "device": torch.device(setup.lm.device).type,
        "code": [code_digest(file) for file in (__file__, probes.__file__)],
        "versions": [torch.__version__, version("scikit-learn")],
    }

    def make() -> dict[str, Tensor]:
        accuracies, _ = _accuracies(setup, "llm", dataset, rows, x_ND)
        return {metric: torch.tensor(list(values.values()), dtype=torch.float64)
                for metric, values in accuracies.items()}

    stored = setup.cache.get("sparse_probing_llm", depends_on, make)
    return {metric: dict(zip(rows["train"], stored[metric].tolist())) for metric in sorted(stored)}


def _result(k_values: list[int], llm: dict, sae: dict, selected: dict, problems: list[str]) -> Result:
    """The Result of one SAE from {data set: {metric: {class: accuracy}}} of LM channels and of its own features."""
    per_class = {dataset: llm[dataset] | sae[dataset] for dataset in llm}
    problems = [*problems, *_without_unconverged(per_class)]
    for values in per_class.values():
        ours, theirs = (values.get(f"{side}_top_1_test_accuracy_fixed_draw") for side in ("sae", "llm"))
        if ours and theirs:
            values["sae_top_1_minus_llm_top_1"] = {name: ours[name] - theirs[name] for name in ours}

    compatible = {side: [f"{side}_test_accuracy", *(f"{side}_top_{k}_test_accuracy" for k in K_NAMED)]
                  for side in ("llm", "sae")}
    corrected = [f"{side}_val_selected_test_accuracy" for side in compatible]
    corrected += [f"{side}_top_{k}_test_accuracy_fixed_draw" for side in compatible for k in k_values]
    corrected += ["sae_top_1_minus_llm_top_1"] if 1 in k_values else []
    summary = {metric: _summary(metric, per_class) for metric in [*compatible["llm"], *compatible["sae"], *corrected]}

    sparse = [a for values in sae.values() for metric in values if "_top_" in metric for a in values[metric].values()]
    if sparse and all(a == 0.5 for a in sparse):
        problems = [*problems, "sparse_probing: probing at chance: every sparse probe of the SAE scores exactly .5 "
                               "(a dead SAE: its features do not depend on the text)"]
    return Result(
        metrics={side: {metric: summary[metric][0] for metric in metrics} for side, metrics in compatible.items()},
        corrected={metric: summary[metric][0] for metric in corrected},
        stderrs={metric: error for metric, (_, error) in summary.items() if error is not None},
        details=[{"dataset_name": f"{dataset}_results"}
                 | {metric: _summary(metric, {dataset: values})[0] for side in compatible.values() for metric in side}
                 for dataset, values in per_class.items()],
        unstructured={f"{dataset}_results": values | {"sae_features_fixed_draw": selected.get(dataset, {})}
                      for dataset, values in per_class.items()},
        problems=problems,
    )


def _without_unconverged(per_class: dict) -> list[str]:
    """Takes out the metrics of a data set with a probe that did not converge (NaN); a line for each."""
    lines = []
    for dataset, values in per_class.items():
        for metric, by_class in list(values.items()):
            stuck = [name for name, value in by_class.items() if math.isnan(value)]
            if stuck:
                del values[metric]
                lines.append(f"sparse_probing: {dataset}: the probe did not converge for {', '.join(stuck)}: no "
                             f"{metric}")
    return lines


def _summary(metric: str, per_class: dict) -> tuple[float | None, float | None]:
    """Mean over data sets of the mean over classes, and its standard error; None where a data set lacks the metric."""
    if not all(metric in values for values in per_class.values()):
        return None, None
    values = [list(values[metric].values()) for values in per_class.values()]
    return _mean([_mean(v) for v in values]), probes.standard_error(values)


def _mean(values) -> float:
    return sum(values) / len(values)
