"""Absorption: does a feature for "begins with S" stay silent on some words because other features took its part
(SAEBench 0.6.0)?

Per letter: the few SAE features that tell it best ("split features"); on test words that a probe on the LM finds, how
much of the activation along the probe direction comes from others instead. Mean over letters whose probe has an F1
above min_GT_probe_f1; no score if there are fewer than min_feats_for_eval. evals/common/first_letter.py holds words,
prompts and probes: what the LM gives is computed once, second prompts included (SAEBench draws and runs them anew for
every SAE).

The seed decides the split, the prompts and the probes' initialisation (SAEBench ignores its seed, so it has no
reproducible number to agree with; on equal activations and an equal generator the numbers are the same). All is fp32.
Beside SAEBench's metrics:
  num_letters         how many letters the scores are the mean of, and the sample of the standard errors
  mean_probe_f1       of the probes on the LM, over all 26 letters
  mean_k_sparse_f1    of the split features on test words, over those letters: an SAE without letter features absorbs
                      nothing either

Shapes: N words, n words of one letter, L letters, D = d_model, F features, C columns for the k-sparse probes, b rows of
a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from evals import Result
from evals.common import errors, first_letter, pooling, probes
from evals.common.first_letter import LETTERS, NoScore
from evals.model import memory

EVAL_TYPE_ID = "absorption_first_letter"

METRICS = {
    "mean_absorption_fraction_score": "lower",
    "mean_full_absorption_score": "lower",
    "mean_num_split_features": "",
    "std_dev_absorption_fraction_score": "",
    "std_dev_full_absorption_score": "",
    "std_dev_num_split_features": "",
    "num_letters": "",
    "mean_probe_f1": "",
    "mean_k_sparse_f1": "higher",
}

NOTE = ("An SAE without features for first letters absorbs nothing: read the absorption scores beside "
        "mean_k_sparse_f1, which tells how well the features taken for a letter's own find its words. With "
        "words_per_prompt above 1, prompts are longer than SAEBench's.")

RANGES = {"max_icl_examples": (0, 1000), "min_GT_probe_f1": (0.0, 1.0), "f1_jump_threshold": (0.0, 1.0)}

CONFIG = {
    "gemma": {
        "max_words": None,  # all of the vocabulary
        "max_icl_examples": 10,
        "words_per_prompt": 1,
        "llm_batch_size": 64,
        "min_GT_probe_f1": 0.6,
        "min_feats_for_eval": 20,
        "max_k_value": 10,
        "f1_jump_threshold": 0.03,
        "k_sparse_probe_l1_decay": 0.01,
        "k_sparse_probe_batch_size": 4096,
        "k_sparse_probe_num_epochs": 50,
    },
    "embedded": {
        "max_words": 9000,  # of 47,078; probes of 24 or 25 letters pass at 9000, of 22 at 3750
        "max_icl_examples": 10,
        "words_per_prompt": 30,
        "llm_batch_size": 5,
        "min_GT_probe_f1": 0.6,
        "min_feats_for_eval": 20,
        "max_k_value": 10,
        "f1_jump_threshold": 0.03,
        "k_sparse_probe_l1_decay": 0.01,
        "k_sparse_probe_batch_size": 256,  # 29 steps an epoch, as 4096 makes of Gemma's words
        "k_sparse_probe_num_epochs": 50,
    },
    "tiny": {
        "max_words": None,
        "max_icl_examples": 2,
        "words_per_prompt": 4,
        "llm_batch_size": 16,
        "min_GT_probe_f1": 0.6,
        "min_feats_for_eval": 20,
        "max_k_value": 10,
        "f1_jump_threshold": 0.03,
        "k_sparse_probe_l1_decay": 0.01,
        "k_sparse_probe_batch_size": 64,
        "k_sparse_probe_num_epochs": 5,
    },
}

# gemma: 139,585 words and the fifth that tests once more, of 88 tokens, to the layer (5,700), and 20 s of an H200 for
# the letters' probes (1,300); of an SAE 30 s, most of them fits of scikit-learn on 111,668 words
COST = {"gemma": (7000, 2000), "embedded": (41, 2.5), "tiny": (12, 1)}
COST_BY = (("max_words",),)

SILENT = 1e-8  # a feature below it does not fire
FULL_COSINE = 0.025  # least cosine with the probe of the one feature that takes all
FRACTION_COSINE = 0.1  # least cosine of those that take a part
ABSORBERS = 3  # most features that take a part
SHARE = 0.4  # least share of the word's activation along the probe that they give

# features of all train words are kept if they take no more (16k features of Gemma's words: 7.3 GB), else encoded again
KEPT_BYTES = 2**33


def requirements(config: dict, facts) -> list[str]:
    """Problems that keep the eval from running with these settings."""
    least = {"max_words": 1, "max_icl_examples": 0, "words_per_prompt": 1, "llm_batch_size": 1, "min_GT_probe_f1": 0,
             "min_feats_for_eval": 1, "max_k_value": 1, "k_sparse_probe_batch_size": 1, "k_sparse_probe_num_epochs": 1}
    problems = [f"{key} = {config[key]} is too small\nset {key} to {bound} or more"
                for key, bound in least.items() if config[key] is not None and config[key] < bound]
    if config["min_feats_for_eval"] > len(LETTERS):
        problems.append(f"min_feats_for_eval = {config['min_feats_for_eval']}, but there are 26 letters\n"
                        "set min_feats_for_eval to 26 or less")
    return problems


def run(setup, saes: dict) -> dict[str, Result]:
    """Score every SAE; {SAE name: Result}."""
    least, needed = setup.config["min_GT_probe_f1"], setup.config["min_feats_for_eval"]
    probe_f1: list[float] = []
    try:
        found = first_letter.measured(setup)
        probe_f1 = found["f1_L"].tolist()
        good = [letter for letter, value in enumerate(probe_f1) if value > least]
        if len(good) < needed:
            raise NoScore(f"only {len(good)} of {len(LETTERS)} letters have a probe with F1 > {least}, the protocol "
                          f"needs {needed}")
    except NoScore as reason:
        return {name: _result([], probe_f1, least, str(reason)) for name in saes}
    results = {}
    for name, sae in saes.items():
        setup.say(f"absorption: {name}, {len(good)} letters, {len(found['second_x'])} words")
        try:
            results[name] = _result(_letters(setup, found, good, sae), probe_f1, least)
        except NoScore as reason:
            results[name] = _result([], probe_f1, least, str(reason))
    return results


def _letters(setup, found: dict[str, Tensor], good: list[int], sae) -> list[dict]:
    """SAEBench's details of every letter in `good`, with split features and their F1; NoScore for a broken SAE."""
    config, device = setup.config, setup.lm.device
    batch = config["k_sparse_probe_batch_size"]

    def encode(x_bD: Tensor) -> Tensor:
        z_bF = memory.by_rows(setup, "the features of words", lambda x_rD: sae.encode(x_rD.to(device).float()), x_bD)
        bad = int((~z_bF.isfinite()).any(1).sum())
        if bad:
            raise NoScore(f"NaN or inf in the features of {bad} of a batch of {len(z_bF)} words")
        return z_bF

    def probed() -> tuple[Tensor, Tensor]:
        return first_letter.fit_letters(
            rows_of, found["train_letter"], rows_of(torch.arange(1)).shape[1], batch,
            config["k_sparse_probe_num_epochs"], config["k_sparse_probe_l1_decay"], weight_decay=1e-6,
            rng=probes.generator(setup.seed, "first letter", "SAE"), device=device)

    def columns_of(side: str) -> np.ndarray:
        parts = found[f"{side}_x"].split(batch)
        return torch.cat([encode(x_bD)[:, ranked_Lk.flatten()].cpu() for x_bD in parts]).numpy()

    rows_of = _features(setup, encode, found["train_x"].to(device), batch)
    W_LF, _ = memory.undivided(setup, "the letters' probes", probed, "k_sparse_probe_batch_size")
    # by signed weight: only a feature that speaks for the letter can be the letter's
    ranked_Lk = W_LF[good].argsort(dim=1, descending=True, stable=True)[:, :config["max_k_value"]]
    train_NC, test_NC = columns_of("train"), columns_of("test")

    W_dec_FD = sae.W_dec.to(device)
    details, fired = [], False
    for i, letter in enumerate(good):
        columns = slice(i * ranked_Lk.shape[1], (i + 1) * ranked_Lk.shape[1])
        k, k_f1 = split_features(train_NC[:, columns], found["train_letter"].numpy() == letter,
                                 test_NC[:, columns], found["test_letter"].numpy() == letter,
                                 config["f1_jump_threshold"])
        main = ranked_Lk[i, :k]
        direction_D = functional.normalize(found["probe_LD"][letter], dim=0).to(device)
        x_nD = found["second_x"][found["second_letter"] == letter].to(device).float()
        measure = partial(_of_words, encode, W_dec_FD @ direction_D, direction_D, main)
        fraction_n, full_n, fired_n = memory.by_rows(setup, "the absorption of words", measure, x_nD,
                                                     most=max(1, pooling.PART_FLOATS // len(W_dec_FD)))
        fired = fired or bool(fired_n.any())
        details.append({
            "first_letter": LETTERS[letter], "mean_absorption_fraction": fraction_n.mean().item(),
            "full_absorption_rate": full_n.double().mean().item(), "num_full_absorption": int(full_n.sum()),
            "num_probe_true_positives": len(full_n), "num_split_features": k,
            "k_sparse_f1": k_f1, "split_features": main.tolist()})
    if not fired:
        raise NoScore(f"no feature fires on any of {len(found['second_x'])} words")
    return details


def _of_words(encode: Callable, cosine_F: Tensor, direction_D: Tensor, main: Tensor,
              x_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each word: the fraction absorbed, whether one feature took all of it, whether any feature fires."""
    z_nF = encode(x_nD)
    return *absorbed(z_nF, cosine_F, x_nD @ direction_D, main), (z_nF != 0).any(1)


def _features(setup, encode: Callable[[Tensor], Tensor], x_ND: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """Row numbers -> features z_bF of these words, encoded once if KEPT_BYTES and the GPU allow, else each time."""
    width = encode(x_ND[:1]).shape[1]
    if len(x_ND) * width * 4 > KEPT_BYTES:
        return lambda index: encode(x_ND[index])
    try:
        z_NF = torch.empty(len(x_ND), width, device=x_ND.device)
    except torch.OutOfMemoryError:
        setup.say(f"out of GPU memory for the features of {len(x_ND)} words: encoding them whenever they are needed")
        return lambda index: encode(x_ND[index])
    for start in range(0, len(x_ND), batch):
        z_NF[start:start + batch] = encode(x_ND[start:start + batch])
    return z_NF.__getitem__


@probes.one_thread()
def split_features(train_NC: np.ndarray, train_true_N: np.ndarray, test_NC: np.ndarray, test_true_N: np.ndarray,
                   jump: float) -> tuple[int, float]:
    """(k, F1 on the test words): as many of the columns, from the left, as each raise the F1 by more than `jump`; at
    least one.

    Logistic regression with balanced classes on k columns; SAEBench also fits the k behind the first that fails, for
    nothing.
    """
    from sklearn.linear_model import LogisticRegression

    best, kept = -np.inf, 0
    for k in range(1, train_NC.shape[1] + 1):
        probe = LogisticRegression(max_iter=500, class_weight="balanced").fit(train_NC[:, :k], train_true_N)
        score_N = test_NC[:, :k] @ probe.coef_[0].astype(np.float32) + np.float32(probe.intercept_[0])
        value = first_letter.f1(torch.from_numpy(score_N > 0), torch.from_numpy(test_true_N)).item()
        if value <= best + jump:
            break
        best, kept = value, k
    return kept, best


def absorbed(z_nF: Tensor, cosine_F: Tensor, along_n: Tensor, main: Tensor) -> tuple[Tensor, Tensor]:
    """Of each word: the fraction absorbed (fp64) and whether one feature took all of it (bool).

    z_nF: features; cosine_F: of their decoder rows with the probe direction; along_n: the activation along it; main:
    numbers of the letter's own features. A word whose activation does not point along the probe has neither (SAEBench
    divides by it).
    """
    projected_nF = z_nF * cosine_F
    own_n = projected_nF[:, main].sum(1).double()
    others_F = cosine_F >= FRACTION_COSINE
    others_F[main] = False
    others_nF = projected_nF[:, others_F].clamp_min(0)
    taken_n = others_nF.topk(min(ABSORBERS, others_nF.shape[1])).values.sum(1).double()
    along_n = along_n.double()

    part_n = torch.minimum(taken_n, along_n - own_n)
    fraction_n = torch.where(own_n > 0, (part_n / (part_n + own_n)).clamp(0, 1), 1.0)
    none_n = (along_n <= 0) | (own_n >= along_n) | (taken_n / along_n < SHARE)

    top_n, feature_n = projected_nF.max(1)
    silent_n = (z_nF[:, main].abs() < SILENT).all(1)
    full_n = silent_n & (cosine_F[feature_n] >= FULL_COSINE) & (along_n > 0) & (top_n.double() / along_n >= SHARE)
    return fraction_n.masked_fill(none_n, 0.0), full_n


def _result(letters: list[dict], probe_f1: list[float], least: float, reason: str = "") -> Result:
    """The Result from the letters' details and the F1 of the 26 probes on the LM; without letters the `reason`."""
    columns = {"absorption_fraction_score": [letter["mean_absorption_fraction"] for letter in letters],
               "full_absorption_score": [letter["full_absorption_rate"] for letter in letters],
               "num_split_features": [letter["num_split_features"] for letter in letters],
               "k_sparse_f1": [letter["k_sparse_f1"] for letter in letters]}
    mean = {name: statistics.mean(values) if values else None for name, values in columns.items()}
    deviation = {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()}
    compatible = [name for name in columns if name != "k_sparse_f1"]
    ours = ("k_sparse_f1", "split_features")
    return Result(
        metrics={"mean": {f"mean_{name}": mean[name] for name in compatible}
                 | {f"std_dev_{name}": deviation[name] for name in compatible}},
        corrected={"num_letters": sum(value > least for value in probe_f1) if probe_f1 else None,
                   "mean_probe_f1": statistics.mean(probe_f1) if probe_f1 else None,
                   "mean_k_sparse_f1": mean["k_sparse_f1"]},
        # over letters: their spread holds the noise of their finite number of words
        stderrs={f"mean_{name}": value / len(letters) ** 0.5 for name, value in deviation.items()
                 if errors.enough([1.0] * len(letters))},
        details=[{key: value for key, value in letter.items() if key not in ours} for letter in letters],
        unstructured={"probe_f1": dict(zip(LETTERS, probe_f1)),
                      "split_features": {letter["first_letter"]: {key: letter[key] for key in ours}
                                         for letter in letters}},
        problems=[f"{reason}: no mean_absorption_fraction_score, no mean_full_absorption_score"] if reason else [],
    )
