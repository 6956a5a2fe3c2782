"""tpp: scores by hand, and runs on a language model that knows its topics."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from evals import declared, tpp
from evals.common import concept_probes
from evals.common.concept_probes import Ablation
from evals.texts import tiny
from tests.evals.topics import channels, check_independence, check_reasons, check_requirements, make_setup


def test_scores_by_hand():
    """Fails if intended and unintended are exchanged, others' losses summed, or a class's counter-feature ablated."""
    rows = {split: {name: torch.arange(8) + 8 * c + 24 * s for c, name in enumerate("abc")}
            for s, split in enumerate(("train", "test"))}
    class_N = torch.arange(48) // 8 % 3
    # a class each, and "b or c"
    z_NF = torch.cat([functional.one_hot(class_N, 3).float(), (class_N > 0).float()[:, None]], dim=1)
    # c's feature serves a's probe as well; "b or c" serves b's and speaks against a and c, stronger than a's own for a
    dot_FP = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 2.0], [-5.0, 3.0, -4.0]])
    logit_NP = 2 * z_NF[:, :3] - 1
    logit_NP[class_N == 2, 0] = 1.0  # a's probe takes the texts of c for its own, until c's feature is ablated
    setup = SimpleNamespace(seed=0, config={"n_values": [1, 4, 20]})
    texts = concept_probes.Texts("set", rows, None, None, {})
    ablation = Ablation(logit_NP, dot_FP, z_NF, torch.zeros(4), torch.zeros(48))

    values = tpp._scores(setup, "corrected", texts, lambda name, rng: tpp._examples(rows, name, rng), ablation)
    named = [f"tpp_threshold_{n}_{part}" for n in (1, 4) for part in tpp.PARTS]
    assert list(values) == named, "20 features of 4 were ablated"
    total, intended, unintended = (values[f"tpp_threshold_1_{part}"] for part in tpp.PARTS)
    assert intended == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5})
    # a quarter of a's examples are mended, none of b's
    assert unintended == pytest.approx({"a": 0.0, "b": 0.0, "c": -0.125})
    assert total == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.625})
    for part in tpp.PARTS:
        for name in "ac":  # which have one feature with a positive effect
            assert values[f"tpp_threshold_4_{part}"][name] == values[f"tpp_threshold_1_{part}"][name]


def test_it_finds_features_of_single_classes(tmp_path):
    """Fails if rows, classes, probes or features are mixed up on the way; the SAE has a feature per topic."""
    setup = make_setup(tmp_path, tpp.CONFIG["tiny"])
    result = tpp.run(setup, {"sae": channels()})["sae"]
    metrics = result.metrics["tpp_metrics"]
    assert not result.problems and {*metrics, *result.corrected} == set(declared("tpp", "METRICS"))
    assert metrics["tpp_threshold_2_intended_diff_only"] > 0.3
    assert abs(metrics["tpp_threshold_2_unintended_diff_only"]) < 0.15
    assert metrics["tpp_threshold_50_total_metric"] is None  # of 24 features
    by_hand = [result.unstructured["synthetic"][topic]["tpp_threshold_5_total_metric"] for topic in tiny.TOPICS]
    assert metrics["tpp_threshold_5_total_metric"] == pytest.approx(sum(by_hand) / 4)
    assert result.stderrs == {}  # of four classes


def test_a_score_depends_on_nothing_but_its_inputs(tmp_path):
    """Fails as topics.check_independence says."""
    check_independence(tmp_path, tpp)


def test_what_cannot_be_measured_has_no_number_but_a_reason(tmp_path, monkeypatch):
    """Fails as topics.check_reasons says."""
    check_reasons(tmp_path, tpp, monkeypatch)


def test_requirements_name_the_setting():
    """Fails as topics.check_requirements says."""
    check_requirements(tpp, "embedded", "hub", "tiny")
