"""scr: scores by hand, their errors, its texts, and runs on a language model that knows its topics."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from evals import declared, scr
from evals.common import concept_probes
from evals.scr import pairs
from evals.texts.source import Source
from tests.evals.topics import D, channels, check_independence, check_reasons, check_requirements, make_setup


def measured(clean1, before1, after1, clean2, before2, after2):
    return {"dir1": {"clean": clean1, "before": before1, "after": {10: after1}},
            "dir2": {"clean": clean2, "before": before2, "after": {10: after2}}}


def test_scores_by_hand():
    """Fails for another direction, denominator, bound or treatment of ties than the protocol's or the header's."""
    def scores(*accuracies):
        return scr._scores(measured(*accuracies), measured(*accuracies))

    got = scores(0.9, 0.6, 0.75, 0.95, 0.85, 0.80)
    assert [got[f"scr_{part}_threshold_10"] for part in ("dir1", "dir2", "metric")] == pytest.approx([0.5, -0.5, 0.5])
    got = scores(0.9, 0.8, 0.9, 0.95, 0.7, 0.05)  # direction 2 is worse before; its score is −2.6
    assert got["scr_metric_threshold_10"] == pytest.approx(-2.6) and got["scr_metric_threshold_10_corrected"] == -1.0
    got = scores(0.9, 0.7, 0.8, 0.8, 0.7, 0.8)  # a tie
    assert "scr_metric_threshold_10" not in got and got["scr_metric_threshold_10_corrected"] == pytest.approx(0.5)
    got = scores(0.60, 0.60, 0.7, 0.9, 0.8, 0.85)  # worse in direction 1, where nothing can be gained
    assert got["scr_metric_threshold_10"] == 0.0 == got["scr_dir1_threshold_10"]
    assert got["scr_metric_threshold_10_corrected"] == pytest.approx(0.5)
    assert "scr_metric_threshold_10_corrected" not in scores(0.6, 0.6, 0.7, 0.7, 0.8, 0.7)


def test_it_removes_a_planted_attribute(tmp_path, monkeypatch):
    """Fails if the wrong attribute is ablated or tested; probes that lean on the adjectives are given."""
    topic_D, adjective_D = torch.eye(D)[0] - torch.eye(D)[2], torch.eye(D)[4]
    given = {"first": topic_D, "second": adjective_D, "biased": 0.3 * topic_D + adjective_D}

    def trained(setup, key, names, examples, x_ND):
        found = concept_probes.Probes(torch.stack([given[name] for name in names]), torch.zeros(3), torch.zeros(3))
        return {"compatible": found, "corrected": found}

    monkeypatch.setattr(concept_probes, "trained", trained)
    result = scr.run(make_setup(tmp_path, scr.CONFIG["tiny"]), {"sae": channels()})["sae"]
    metrics = result.metrics["scr_metrics"]
    assert not result.problems and {*metrics, *result.corrected} == set(declared("scr", "METRICS"))
    for by_direction in result.unstructured["synthetic_scr_animals_space"]["accuracies"].values():
        first, second = by_direction["dir1"], by_direction["dir2"]
        assert first["clean"] == 1.0 > 0.7 > first["before"] and second["before"] > 0.9
        assert {*first["after"].values(), *second["after"].values()} == {1.0}
    assert metrics["scr_metric_threshold_2"] == 1.0 == result.corrected["scr_metric_threshold_10_corrected"]
    assert metrics["scr_metric_threshold_100"] is None  # of 24 features
    assert result.stderrs["scr_metric_threshold_2"] == 0.0  # every text is right afterwards, whichever are drawn


def test_errors_are_the_spread_over_new_test_texts():
    """Fails if the error is that between the runs (equal here), or numerator and denominator are not drawn together."""
    setup, mixed = SimpleNamespace(seed=0, config={"n_values": [2]}), 20
    rows = {"test": {sign: torch.arange(c * 30, c * 30 + (30 if sign in ("++", "--") else mixed))
                     for c, sign in enumerate(pairs.COMBINATIONS)}}
    texts = concept_probes.Texts("run", rows, torch.zeros(120, 1), None, {})

    def right(rng):
        """Right before with .6, after with .75, by the attribute's own probe with .95; all from one draw."""
        def of(row_M):
            luck_M = torch.rand(len(row_M), generator=rng)
            return {"before": luck_M < 0.6, "after": {2: luck_M < 0.75}, "clean": luck_M < 0.95}

        rows_of = {direction: scr._labelled(rows["test"], tested)[0]
                   for direction, (_, tested) in scr.DIRECTIONS.items()}
        return {direction: (row_M, of(row_M)) for direction, row_M in rows_of.items()}

    def scored(right):
        accuracies = {d: scr._each(of, lambda r: r.double().mean().item()) for d, (_, of) in right.items()}
        return scr._scores(accuracies, accuracies)

    sampled = [right(torch.Generator().manual_seed(seed)) for seed in range(300)]
    for metric in ("scr_dir1_threshold_2", "scr_metric_threshold_2", "scr_metric_threshold_2_corrected"):
        spread = pd.Series([scored(one).get(metric) for one in sampled]).std()
        drawn = [scr._drawn_scores(setup, texts, {"compatible": one, "corrected": one}) for one in sampled[:25]]
        stated = [scr._error(metric, {"run": scores}) for scores in drawn]
        assert pd.Series(stated).mean() == pytest.approx(spread, rel=0.3), metric
    few = texts._replace(rows={"test": {sign: r[:4] for sign, r in rows["test"].items()}})
    assert scr._drawn_scores(setup, few, sampled[0]) == []


def test_a_score_depends_on_nothing_but_its_inputs(tmp_path):
    """Fails as topics.check_independence says."""
    check_independence(tmp_path, scr)


def test_what_cannot_be_measured_has_no_number_but_a_reason(tmp_path, monkeypatch):
    """Fails as topics.check_reasons says."""
    check_reasons(tmp_path, scr, monkeypatch)


def test_sets_have_the_right_combinations():
    """Fails if a set's sides are not balanced over the other attribute, or a text is in two sets that exclude it."""
    ((_, texts),) = pairs.Source(Source("tiny")).probing(scr.CONFIG["tiny"]).items()
    every = [text for splits in texts.values() for side in splits.values() for text in side]
    assert len(every) == len(set(every)) == 6 * (64 + 32) // 4
    rows, start = {}, 0
    for sign, splits in texts.items():
        rows[sign] = torch.arange(start, start + len(splits["train"]))
        start += len(splits["train"])
    assert {sign: len(r) for sign, r in rows.items()} == {"++": 32, "+-": 16, "-+": 16, "--": 32}
    sign_of = {int(row): sign for sign, r in rows.items() for row in r}
    for probe, place in (("first", 0), ("second", 1)):
        row_M, label_M = scr._labelled(rows, probe)
        counts = pd.Series([sign_of[int(row)] for row in row_M]).value_counts().to_dict()
        assert counts == {"++": 16, "+-": 16, "-+": 16, "--": 16}
        assert all((sign_of[int(row)][place] == "+") == bool(label) for row, label in zip(row_M, label_M))
    row_M, label_M = scr._labelled(rows, "biased")
    assert [sign_of[int(row)] for row in row_M] == ["++"] * 32 + ["--"] * 32 and label_M.sum() == 32


def test_hub_texts_are_the_first_of_each_combination():
    """Fails if rows are shuffled, columns exchanged, or the pure combinations are not twice the mixed ones."""
    frame = pd.DataFrame({"hard_text": [f"t{i}" for i in range(40)], "profession": [21, 13] * 20,
                          "gender": [0, 0, 1, 1] * 10})
    found = pairs.first_of_each(frame, pairs.BIOGRAPHIES, (21, 13), 16, "run")
    assert found["++"] == [f"t{i}" for i in range(0, 32, 4)] and found["--"] == [f"t{i}" for i in range(3, 32, 4)]
    assert found["+-"] == ["t2", "t6", "t10", "t14"] and found["-+"] == ["t1", "t5", "t9", "t13"]
    with pytest.raises(ValueError, match="10 texts with profession 21 and gender 0, 12 are asked for"):
        pairs.first_of_each(frame, pairs.BIOGRAPHIES, (21, 13), 24, "run")


def test_requirements_name_the_setting():
    """Fails as topics.check_requirements says, or if sets that cannot be divided or are not there are let through."""
    check_requirements(scr, "embedded", "hub", "tiny")
    config = scr.CONFIG["tiny"]
    assert "multiple of 4" in scr.requirements(config | {"probe_train_set_size": 62}, {"source": "tiny"})[0]
    assert "'gutenberg'" in scr.requirements(config | {"dataset_names": ["gutenberg"]}, {"source": "tiny"})[0]
