"""sae_probes: k-sparse probes on SAE features of a prompt's last token, on 113 data sets (SAEBench 0.6.0,
`sparse_probing_sae_probes`).

Per data set min(n − 100, 1024) balanced rows train and the rest tests. k features by mean difference of normalised
features, an L1 logistic regression on their plain values, C by validation AUC; beside it an L2 one on all LM channels.
Means over data sets.

The run's seed splits the rows, shuffles them and goes to scikit-learn, as SAEBench's random_seed does (42 there): equal
seeds and equal activations give its numbers to the last bit. The LM has the run's dtype (SAEBench: fp32). Corrected
metrics:
  *_deduplicated         without the test prompts that stand in train; accuracy is the mean of the then unequal classes
  sae_top_1_minus_llm_*  difference of these, paired by data set
  duplicated_test_share  share of test prompts that stand in train
Standard errors are over data sets, s/√n, from five on.
Shapes: N rows of a data set, U distinct prompts, M rows of a split, D = d_model, F features, k of them selected.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals import Result
from evals.common import errors, pooling, probes
from evals.model import memory
from evals.sae_probes.sets import last_tokens, names, prompts
from evals.storage.identity import code_digest

EVAL_TYPE_ID = "sparse_probing_sae_probes"

NOTE = ("Test prompts that also stand in train count in SAEBench's scores and not in the deduplicated ones, which "
        "leave out data sets with fewer than 10 other test prompts of a class. Most negatives of the three agnews sets "
        "are source code: text length tells them.")

METRICS = {
    "llm_test_accuracy": "", "llm_test_auc": "", "llm_test_f1": "", "sae_test_accuracy": "higher",
    "sae_top_1_test_accuracy": "higher", "sae_top_1_test_auc": "higher", "sae_top_1_test_f1": "higher",
    "sae_top_2_test_accuracy": "higher", "sae_top_2_test_auc": "higher", "sae_top_2_test_f1": "higher",
    "sae_top_5_test_accuracy": "higher", "sae_top_5_test_auc": "higher", "sae_top_5_test_f1": "higher",
    "sae_top_10_test_accuracy": "higher", "sae_top_10_test_auc": "higher", "sae_top_10_test_f1": "higher",
    "sae_top_20_test_accuracy": "higher", "sae_top_20_test_auc": "higher", "sae_top_20_test_f1": "higher",
    "sae_top_50_test_accuracy": "higher", "sae_top_50_test_auc": "higher", "sae_top_50_test_f1": "higher",
    "sae_top_100_test_accuracy": "higher", "sae_top_100_test_auc": "higher", "sae_top_100_test_f1": "higher",
    "llm_test_accuracy_deduplicated": "", "llm_test_auc_deduplicated": "",
    "sae_top_1_test_accuracy_deduplicated": "higher", "sae_top_1_test_auc_deduplicated": "higher",
    "sae_top_2_test_accuracy_deduplicated": "higher", "sae_top_2_test_auc_deduplicated": "higher",
    "sae_top_5_test_accuracy_deduplicated": "higher", "sae_top_5_test_auc_deduplicated": "higher",
    "sae_top_10_test_accuracy_deduplicated": "higher", "sae_top_10_test_auc_deduplicated": "higher",
    "sae_top_20_test_accuracy_deduplicated": "higher", "sae_top_20_test_auc_deduplicated": "higher",
    "sae_top_50_test_accuracy_deduplicated": "higher", "sae_top_50_test_auc_deduplicated": "higher",
    "sae_top_100_test_accuracy_deduplicated": "higher", "sae_top_100_test_auc_deduplicated": "higher",
    "sae_top_1_minus_llm_test_accuracy_deduplicated": "higher", "sae_top_1_minus_llm_test_auc_deduplicated": "higher",
    "duplicated_test_share": "",
}

CONFIG = {
    "gemma": {
        "dataset_names": [],  # all
        "ks": [1, 2, 5],
        "max_rows": 5000,
        "max_tokens": 1024,
        "llm_batch_size": 32,  # prompts of max_tokens; of shorter ones as many more
    },
    "embedded": {
        # of many kinds, few prompts repeated, few but in the last two above 64 tokens, some signal in SmolLM2-135M
        "dataset_names": [
            "125_world_country_Italy",
            "126_art_type_book",
            "21_headline_istrump",
            "26_headline_isfrontpage",
            "36_sciq_tf",
            "67_social-security",
            "92_glue_sst2",
            "105_click_bait",
            "110_aimade_humangpt3",
            "133_context_type_Causality",
            "140_news_class_Technology",
            "158_code_C",
        ],
        "ks": [1, 2, 5],
        "max_rows": 300,  # 200 train and 99 test, as many as of any set of up to 1124 rows
        "max_tokens": 64,
        "llm_batch_size": 32,
    },
    "tiny": {
        "dataset_names": [],
        "ks": [1, 2],
        "max_rows": 5000,
        "max_tokens": 32,
        "llm_batch_size": 32,
    },
}

# gemma: 19,100,000 tokens to the layer (7,400) and 113 searches on all channels (31 s of 16 cores beside an H200); of
# an SAE 3,729 fits by saga, .03 to .11 s each by those of `embedded`, now and formerly (published: 5 minutes of an RTX
# 3090, which is 1,600)
COST = {"gemma": (9400, 2000), "embedded": (24, 1.5), "tiny": (20, 9)}
COST_BY = (("dataset_names",), ("max_rows",))

K_NAMED = (1, 2, 5, 10, 20, 50, 100)  # the k that SAEBench's schema has a key for
FEWEST_ROWS = 104  # 100 rows are kept from training; a cross-validation needs 4
FEWEST_DISTINCT = 10  # test prompts of a class that do not stand in train, for a deduplicated score


def wheels(kind: str) -> list[str]:
    """The wheel that its data sets come in, in the gemma profile too."""
    return [] if kind == "tiny" else ["sae_probes"]


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    problems = []
    known = names(facts.get("source"))
    for name in config["dataset_names"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            problems.append(f"sae_probes: no data set {name!r}; the nearest is {near!r}\n"
                            f"choose among the {len(known)} of evals/sae_probes/sets.py, or leave dataset_names empty "
                            "for all")
    if not config["ks"] or not set(config["ks"]) <= set(K_NAMED):
        problems.append(f"sae_probes: ks = {config['ks']} must be some of {list(K_NAMED)}\n"
                        "SAEBench's results have no key for any other k")
    if config["max_rows"] < FEWEST_ROWS:
        problems.append(f"sae_probes: max_rows = {config['max_rows']} leaves no rows to train on\n"
                        f"set max_rows to {FEWEST_ROWS} or more")
    if config["max_tokens"] < 2:
        problems.append(f"sae_probes: max_tokens = {config['max_tokens']} leaves no token beside BOS\n"
                        "set max_tokens to 2 or more")
    return problems


class Split(NamedTuple):
    """Rows of a data set that train and test: their prompts' places among the distinct ones, and their labels."""

    train_M: Tensor
    train_label_M: Tensor
    test_M: Tensor
    test_label_M: Tensor
    new_M: Tensor  # of the test rows: True where the prompt does not stand in train


def run(setup, saes: dict) -> dict[str, Result]:
    """Probe every SAE on every data set; {SAE name: Result}."""
    depends_on, sets, rows, length_U = prompts(setup)
    x_UD = last_tokens(setup, rows, length_U)
    splits, problems = {}, {name: [] for name in (None, *saes)}  # None: what concerns them all
    for dataset, (place_N, label_N) in sets.items():
        bad = int((~x_UD[place_N].isfinite()).any(1).sum())
        try:
            if bad:
                raise ValueError(f"NaN or inf in the LM activations of {bad} of {len(place_N)} prompts")
            splits[dataset] = split(place_N, label_N, setup.seed)
        except ValueError as error:
            problems[None].append(f"{dataset}: {error}")

    jobs = {}  # (SAE, data set, k): arguments of `score`
    selected: dict = {name: {} for name in saes}  # SAE -> data set -> feature numbers
    for dataset, part in splits.items():
        for name, sae in saes.items():
            feature_k, train_Mk, test_Mk = sparse_features(setup, sae, x_UD, part)
            if not (train_Mk.isfinite().all() and test_Mk.isfinite().all()):  # scikit-learn would raise on them
                problems[name].append(f"{dataset}: NaN or inf in the features")
                continue
            selected[name][dataset] = feature_k.tolist()
            for k in setup.config["ks"]:
                jobs[name, dataset, k] = part, train_Mk[:, :k], test_Mk[:, :k], "l1", setup.seed

    threads = torch.get_num_threads()  # scikit-learn's solvers release the GIL
    with probes.one_thread(), _unconverged(), ThreadPoolExecutor(threads) as pool:
        llm = baselines(setup, depends_on, x_UD, splits, pool)
        scores: dict = {name: {} for name in saes}  # SAE -> data set -> metric -> value
        # closing: an interrupt drops the rest
        with closing(pool.map(lambda arguments: score(*arguments), jobs.values())) as fitted:
            tracked = setup.track(fitted, "sae_probes: SAE probes", len(jobs), "probe")
            for (name, dataset, k), values in zip(jobs, tracked):
                named = {f"sae_top_{k}_{metric}": value for metric, value in values.items()}
                scores[name].setdefault(dataset, {}).update(named)
    return {name: _result(setup.config["ks"], list(sets), splits, llm, scores[name], selected[name],
                          problems[None] + problems[name]) for name in saes}


# ------------------------------------------------------------------------------------------------ rows and features


def split(place_N: Tensor, label_N: Tensor, seed: int) -> Split:
    """sae_probes' split: min(n − 100, 1024) rows train, of the others all but one test, half of either positive (the
    odd one, too).

    Drawn in this order: positives and negatives to train, positives and negatives to test, a permutation of each side.
    ValueError if there are too few rows.
    """
    n_train = min(len(label_N) - 100, 1024)
    # (positives, negatives) of either side
    wanted = [(n - n // 2, n // 2) for n in (n_train, len(label_N) - n_train - 1)]
    counts = [int((label_N == label).sum()) for label in (1, 0)]
    if len(label_N) < FEWEST_ROWS or any(sum(pair) > count for pair, count in zip(zip(*wanted), counts)):
        raise ValueError(f"{counts[0]} positive and {counts[1]} negative rows; the split needs {FEWEST_ROWS} or more, "
                         "as many of either")
    rng, sides, pools = np.random.RandomState(seed), [], [np.flatnonzero(label_N.numpy() == label) for label in (1, 0)]
    for numbers in wanted:
        drawn = [rng.choice(pool, number, replace=False) for pool, number in zip(pools, numbers)]
        pools = [np.setdiff1d(pool, part) for pool, part in zip(pools, drawn)]
        sides.append(np.concatenate(drawn))
    train_M, test_M = (torch.from_numpy(rng.permutation(side)) for side in sides)
    new_M = ~torch.isin(place_N[test_M], place_N[train_M])
    return Split(place_N[train_M], label_N[train_M], place_N[test_M], label_N[test_M], new_M)


def sparse_features(setup, sae, x_UD: Tensor, part: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the max(ks) features best on the training rows, and their values on train and test rows, on the CPU.

    All features are held of the training rows only, which are at most 1024: 2²⁶ floats at a width of 65,536.
    """
    def encode(places: Tensor) -> Tensor:
        return memory.by_rows(setup, "the features of prompts", lambda x_bD: sae.encode(x_bD.to(setup.lm.device)),
                              x_UD[places])

    train_MF = encode(part.train_M)
    feature_k = by_normalised_difference(train_MF, part.train_label_M.to(train_MF.device))[: max(setup.config["ks"])]
    rows = max(1, pooling.PART_FLOATS // train_MF.shape[1])
    test_Mk = torch.cat([encode(places)[:, feature_k] for places in part.test_M.split(rows)])
    return feature_k, train_MF[:, feature_k].cpu(), test_Mk.cpu()


def by_normalised_difference(z_MF: Tensor, label_M: Tensor) -> Tensor:
    """Feature numbers by descending |mean over positives − mean over negatives| of z / its mean |z| where not 0."""
    mean_F = z_MF.abs().sum(0) / ((z_MF != 0).sum(0) + 1e-6)
    return probes.by_mean_difference(z_MF / (mean_F + 1e-6), label_M)


# ------------------------------------------------------------------------------------------------ probes


@contextmanager
def _unconverged() -> Iterator[None]:
    """Without the warnings of fits that end after 1000 iterations, which are the protocol: saga seldom converges."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def folds(label_M: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit, rows to check): up to 12 rows leave two out, below 128 six folds, else the last fifth, at most 100.

    Those that check on one class alone are left out.
    """
    from sklearn.model_selection import LeavePOut, StratifiedKFold

    n = len(label_M)
    if n >= 128:
        cut = n - min(n // 5, 100)
        return [(np.arange(cut), np.arange(cut, n))]
    splitter = LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=seed)
    return [(fit, check) for fit, check in splitter.split(label_M, label_M) if len(set(label_M[check])) == 2]


def fit(train_MF: np.ndarray, label_M: np.ndarray, penalty: str, seed: int):
    """Logistic regression, penalty "l1" (saga) or "l2" (lbfgs), C by mean validation AUC, fitted again on all rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    kind = {"max_iter": 1000, "random_state": seed}
    if penalty == "l1":
        named = getattr(LogisticRegression(), "penalty", "") == "l2"  # from scikit-learn 1.8 on l1_ratio alone says so
        kind |= {"solver": "saga"} | ({"penalty": "l1"} if named else {"l1_ratio": 1.0})

    def auc(C: float, rows: np.ndarray, check: np.ndarray) -> float:
        if len(set(label_M[rows])) < 2:
            return 0.5
        model = LogisticRegression(C=C, **kind).fit(train_MF[rows], label_M[rows])
        return roc_auc_score(label_M[check], model.predict_proba(train_MF[check])[:, 1])

    strengths, parts = np.logspace(5, -5, 10), folds(label_M, seed)
    best, chosen = -1.0, strengths[0]
    for C in strengths:
        mean = np.mean([auc(C, *part) for part in parts])
        if mean > best:
            best, chosen = mean, C
        if best == 1.0:  # no later C can be better, and the first of equals is taken
            break
    order = np.random.RandomState(seed).permutation(len(label_M))
    return LogisticRegression(C=chosen, **kind).fit(train_MF[order], label_M[order])


def score(part: Split, train_MF: Tensor, test_MF: Tensor, penalty: str, seed: int) -> dict[str, float]:
    """Test accuracy, AUC and weighted F1 of a probe, and its scores on the new prompts if each class has enough.

    In double precision, as scikit-learn chooses for the torch tensors that sae_probes passes to it.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

    train, test = train_MF.double().numpy(), test_MF.double().numpy()
    model = fit(train, part.train_label_M.numpy(), penalty, seed)
    label_M, guess_M, probability_M = part.test_label_M.numpy(), model.predict(test), model.predict_proba(test)[:, 1]
    values = {"test_accuracy": (guess_M == label_M).mean(), "test_auc": roc_auc_score(label_M, probability_M),
              "test_f1": f1_score(label_M, guess_M, average="weighted")}
    new_M = part.new_M.numpy()
    if np.bincount(label_M[new_M], minlength=2).min() >= FEWEST_DISTINCT:
        values |= {"test_accuracy_deduplicated": balanced_accuracy_score(label_M[new_M], guess_M[new_M]),
                   "test_auc_deduplicated": roc_auc_score(label_M[new_M], probability_M[new_M])}
    return {metric: float(value) for metric, value in values.items()}


def baselines(setup, depends_on: dict, x_UD: Tensor, splits: dict[str, Split],
              pool: Executor) -> dict[str, dict[str, float]]:
    """{data set: {metric: value}} of the probes on all LM channels, fitted once: no SAE enters them."""
    def make() -> dict[str, Tensor]:
        def scored(part: Split) -> dict[str, float]:  # a data set's rows become fp64 only while it is fitted
            return score(part, x_UD[part.train_M], x_UD[part.test_M], "l2", setup.seed)

        with closing(pool.map(scored, splits.values())) as fitted:
            found = list(setup.track(fitted, "sae_probes: LM probes", len(splits), "data set"))
        return {metric: torch.tensor([values.get(metric, math.nan) for values in found], dtype=torch.float64)
                for metric in sorted({metric for values in found for metric in values})}

    own = {"layer": setup.layer, "seed": setup.seed, "device": torch.device(setup.lm.device).type,
           "scored": list(splits), "versions": [torch.__version__, version("scikit-learn")],
           "probes": code_digest(__file__)}
    stored = setup.cache.get("sae_probes_llm", depends_on | own, make) if splits else {}
    return {dataset: {f"llm_{metric}": float(v[i]) for metric, v in stored.items() if not v[i].isnan()}
            for i, dataset in enumerate(splits)}


# ------------------------------------------------------------------------------------------------ results

KINDS = ("accuracy", "auc", "f1")
NAMED = {"llm": [f"llm_test_{what}" for what in KINDS],
         "sae": ["sae_test_accuracy", *(f"sae_top_{k}_test_{what}" for k in K_NAMED for what in KINDS)]}


def _result(ks: list[int], datasets: list[str], splits: dict, llm: dict, sae: dict, selected: dict,
            problems: list[str]) -> Result:
    """The Result of one SAE from {data set: {metric: value}} of the LM's channels and of its own features."""
    per_set = {}
    for dataset, part in splits.items():
        values = llm[dataset] | sae.get(dataset, {}) | {"duplicated_test_share": float((~part.new_M).double().mean())}
        for what in ("test_accuracy_deduplicated", "test_auc_deduplicated"):
            if f"sae_top_1_{what}" in values:
                values[f"sae_top_1_minus_llm_{what}"] = values[f"sae_top_1_{what}"] - values[f"llm_{what}"]
        per_set[dataset] = values

    def summary(metric: str) -> tuple[float | None, float | None]:
        """Mean over data sets and its standard error, the data sets being the sample; None unless all were scored.

        A data set's own 100 to 4000 test rows vary, too: the spread between data sets holds that already.
        """
        scored = sae if metric.startswith("sae") else llm
        found = [values[metric] for values in per_set.values() if metric in values]
        if not found or len(scored) < len(datasets):
            return None, None
        if not errors.enough([1.0] * len(found)):
            return float(np.mean(found)), None
        return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(len(found))

    corrected = [f"{side}_test_{what}_deduplicated" for side in ("llm", *(f"sae_top_{k}" for k in ks))
                 for what in ("accuracy", "auc")]
    corrected += [f"sae_top_1_minus_llm_test_{what}_deduplicated" for what in ("accuracy", "auc")] if 1 in ks else []
    corrected += ["duplicated_test_share"]
    means = {metric: summary(metric) for metric in [*NAMED["llm"], *NAMED["sae"], *corrected]}

    if problems:
        headline = ("llm_test_accuracy", f"sae_top_{ks[0]}_test_accuracy")
        lacking = ", ".join(metric for metric in headline if means[metric][0] is None)
        problems = [*problems, f"no mean over the data sets: no {lacking}"]
    elif means["llm_test_auc_deduplicated"][0] is None:
        problems = [f"no data set has {FEWEST_DISTINCT} test prompts of each class that do not stand in train: no "
                    "*_deduplicated score"]
    if sae and all(values[f"sae_top_{k}_test_auc"] == 0.5 for values in sae.values() for k in ks):
        problems = [*problems, "probing at chance: every sparse probe of the SAE has AUC .5 (a dead SAE: its features "
                               "do not depend on the text)"]
    details, unstructured = [], {}
    for dataset, values in per_set.items():
        of_ks = {k: {f"test_{what}": values[f"sae_top_{k}_test_{what}"] for what in KINDS}
                 for k in ks if dataset in sae}
        details.append({"dataset_name": dataset}
                       | {metric: values.get(metric) for metrics in NAMED.values() for metric in metrics}
                       | {"sae_metrics_by_k": of_ks})
        part = splits[dataset]
        unstructured[dataset] = {metric: values.get(metric) for metric in corrected} | {
            "sae_features": selected.get(dataset), "train_rows": len(part.train_M), "test_rows": len(part.test_M),
            "new_test_rows": int(part.new_M.sum())}
    return Result(
        metrics={side: {metric: means[metric][0] for metric in metrics} for side, metrics in NAMED.items()},
        corrected={metric: means[metric][0] for metric in corrected},
        stderrs={metric: error for metric, (_, error) in means.items() if error is not None},
        details=details,
        unstructured=unstructured,
        problems=problems,
    )
