"""The data of a comparison: runs/compare.py judges and makes it; text, markdown, CSV, HTML and JSON are made of it.

Numbers are numbers here, unrounded, and None what is not known. Every run has every metric it recorded: what a table
shows of them is the table's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from runs.reading import Run, setting

# settings in which two runs may differ and still be compared, and which are then said
SETTINGS = ("variant", "hyper", "d_sae", "context", "dataset", "keep_bos", "max_norm_ratio", "dtype", "num_tokens",
            "passes", "batch_size", "lr", "seed")
# what each eval is asked first: a run is held against the frozen decoder in these, and the first measured of them may
# decide its verdict
HEADLINES = ("core.ce_loss_score", "core.r2", "sparse_probing.sae_top_1_test_accuracy",
             "sae_probes.sae_top_1_test_auc", "absorption.mean_absorption_fraction_score",
             "scr.scr_metric_threshold_10", "tpp.tpp_threshold_10_total_metric", "autointerp.autointerp_score",
             "unlearning.unlearning_score", "ravel.disentanglement_score", "ground_truth.f1", "ground_truth.mcc",
             "ground_truth.r2", "ground_truth.uniqueness")
UNSTATED = {"max_norm_ratio": "off"}  # what a record means that does not name a setting, where that is known


class Judged(NamedTuple):
    """One metric of a run against the same metric of what it is compared with."""

    difference: float | None = None  # run − baseline; None where a side lacks the metric, or it is not compared
    stderr: float | None = None  # of the difference, √(se_a² + se_b²); a lower bound where only one side states one
    verdict: str = ""  # better, worse, equal, not compared; "" without a direction or a difference
    beyond: bool | None = None  # whether the difference exceeds two standard errors; None where that is not known


UNKNOWN, NOT_COMPARED = Judged(), Judged(verdict="not compared")


class Floor(NamedTuple):
    """What a frozen random decoder reaches beside a run."""

    run: Run  # at the run's own L0, or of the nearest one within a factor; evals of other settings are left out
    at_own_l0: bool
    not_better: dict[str, Judged]  # {headline metric in which the run is not surely better: run − decoder}


class New(NamedTuple):
    """The features of a run beside those of one SAE of its baseline."""

    baseline: Run
    cosine: list[float]  # of every feature with its nearest in the baseline
    nearest: list[int]  # the index of that one
    index: list[int]  # the new ones
    of: int  # features that were looked at: those that fire, or all
    mean: float  # cosine with the nearest, over those
    fire: bool  # whether it is known which fire
    problem: str = ""  # why nothing could be counted


@dataclass(frozen=True)
class Compared:
    """One run and what it is compared with."""

    run: Run
    nearest: Run | None  # of the baseline's SAEs the one of the nearest L0
    at_l0: Run | None  # what the baseline's frontier reaches at the run's own L0; None where none lies around it
    partner: Run | None  # judged against: at_l0, in evals that its SAEs lack the nearest; else the nearest
    equal_l0: bool | None  # whether run and partner have the same L0; None where one is not known
    obstacles: list[str]  # why nothing of the run is compared
    other_settings: dict[str, dict[str, tuple]]  # {eval: {setting: (run's, partner's)}} of evals that are not compared
    differs: dict[str, tuple]  # {one of SETTINGS: (run's, partner's)}
    warnings: list[str]  # what makes the run's figures doubtful
    twin: int | None  # runs with the same number are one and the same SAE
    floor: Floor | None  # None where no frozen decoder of the run's model, layer, width and L0 is stored
    judged: Callable[[str], Judged]  # of any metric, when it is asked for: a table shows a few of a hundred
    new: Callable[[], New | None]  # its features beside the baseline's; reads both decoders when it is asked for

    def source(self, metric: str) -> Run | None:
        """The run that a metric's figure of the baseline is of: at_l0, or the nearest in what at_l0 lacks."""
        if self.at_l0 is None or self.at_l0.means.get(metric) is not None:
            return self.at_l0 or self.partner
        return self.nearest

    def at_own_l0(self, metric: str) -> Judged:
        """The verdict unless a frontier lies around the run and lacks the metric: the nearest SAE has another L0."""
        if self.at_l0 is not None and self.at_l0.means.get(metric) is None:
            return UNKNOWN
        return self.judged(metric)


@dataclass(frozen=True)
class Comparison:
    """The runs of one model, layer and hook, in the order in which they were given."""

    identity: tuple[str, int | None, str]  # model, layer, hook
    saes: list[Compared]
    references: list[Run]  # what they may be compared with; [] for want of any
    frontier: list[Run]  # of the references those of one variant and several L0 around the runs' own; or []
    stand_ins: list[Compared]  # for want of a stored baseline the references are the first runs: those, by themselves
    directions: dict[str, str]  # {metric: higher, lower or ""}: which way is better
    random: dict[str, list[Run]]  # {kind of random dictionary, see compare.RANDOM: its SAEs}, stored for this identity


def differing(run: Run, other: Run) -> dict[str, tuple]:
    """{setting: (run's, the other's)} of SETTINGS that both state and that differ."""
    def stated(config: dict, key: str):
        value = setting(config, key)
        return UNSTATED.get(key) if value is None else value

    pairs = ((key, stated(run.config, key), stated(other.config, key)) for key in SETTINGS)
    return {key: (a, b) for key, a, b in pairs if a is not None and b is not None and a != b}
