"""What metrics are called in charts and sentences."""

from __future__ import annotations

from collections.abc import Iterable

from runs.comparison import HEADLINES
from runs.frontier import L0
from runs.reading import LM_ONLY, Run

# {metric: (title, unit)}
TITLES = {"core.ce_loss_score": ("CE loss score", "share of the loss recovered"),
          "core.kl_div_score": ("KL score", "share of the divergence removed"),
          "core.r2": ("R²", "share of variance"),
          "core.frac_alive": ("Features alive", "share of features"),
          "sparse_probing.sae_top_1_test_accuracy": ("Sparse probing, top 1", "test accuracy"),
          "sae_probes.sae_top_1_test_auc": ("sae-probes, top 1", "test AUC"),
          "absorption.mean_absorption_fraction_score": ("Absorption", "mean fraction, lower is better"),
          "scr.scr_metric_threshold_10": ("SCR, 10 features", "score"),
          "tpp.tpp_threshold_10_total_metric": ("TPP, 10 features", "score"),
          "autointerp.autointerp_score": ("Autointerp", "accuracy of the judge"),
          "unlearning.unlearning_score": ("Unlearning", "score"),
          "ravel.disentanglement_score": ("RAVEL", "disentanglement"),
          "ground_truth.f1": ("F1 of the features", "mean over SAE features"),
          "ground_truth.mcc": ("MCC of the features", "mean cosine of matched directions"),
          "ground_truth.r2": ("R²", "share of variance"),
          "ground_truth.uniqueness": ("Uniqueness", "share of distinct true features")}


def title(metric: str) -> str:
    """A metric in words, its full name where it has none."""
    return TITLES[metric][0] if metric in TITLES else metric


def unit(metric: str) -> str:
    """What its axis says."""
    return TITLES[metric][1] if metric in TITLES else metric.rpartition(".")[2]


def choice(metric: str) -> str:
    """What a menu says of it."""
    return f"{title(metric)} · {metric}" if metric in TITLES else metric


def charted(runs: Iterable[Run]) -> list[str]:
    """The metrics that say something of an SAE beside its L0, of those measured; headlines first, the rest by name."""
    measured = {metric for run in runs for metric, value in run.means.items() if value is not None}
    shown = {metric for metric in measured if metric not in L0 and not LM_ONLY.search(metric)}
    first = [metric for metric in (*HEADLINES, *TITLES) if metric in shown]
    return list(dict.fromkeys([*first, *sorted(shown)]))
