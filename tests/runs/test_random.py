"""The random line: what a frozen random decoder reaches at a run's L0, and in what a run is no better."""

import json

import pytest

from runs import compare, exports, report, tables
from tests.pages.reading import Page, charts, part
from tests.runs.records import CE, R2, entry, record, run

PROBING, PROBES = "sparse_probing.sae_top_1_test_accuracy", "sae_probes.sae_top_1_test_auc"
ABSORPTION = "absorption.mean_absorption_fraction_score"
KNOWN = compare.directions()
LINE = "not better than a frozen random decoder"


def reached(l0, ce, probing, probes, errors, **config):
    """An SAE's record; absorption without a standard error."""
    means = {"core.l0": l0, CE: ce, PROBING: probing, PROBES: probes, ABSORPTION: 0.1}
    evals = {"sparse_probing": {"context_length": 128}}
    return entry(means, errors, variant="frozen_decoder", hyper={"k": l0}, evals=evals, **config)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A frozen decoder at L0 20 and 80, an untrained SAE at 20: at L0 40, halfway on a log axis, .60, .72 and .65."""
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    errors = {CE: 0.004, PROBING: 0.01}
    for name, points in (("frozen_decoder", ((20.0, 0.5, 0.70, 0.62), (80.0, 0.7, 0.74, 0.68))),
                         ("untrained", ((20.0, 0.1, 0.60, 0.55),))):
        saes = {f"layer_3.k_{point[0]:g}": reached(*point, errors) for point in points}
        (record(tmp_path / "tiny" / name, saes) / "final_info.json").rename(tmp_path / "tiny" / name / "frontier.json")
    return tmp_path


def ours(l0=40.0, probing=0.73, **config):
    means = {"core.l0": l0, CE: 0.9, PROBING: probing, PROBES: 0.6, ABSORPTION: 0.05}
    return run("r", means, {CE: 0.003, PROBING: 0.01}, variant="mine", **config)


def floor_of(one):
    (comparison,) = compare.judged([one], None, KNOWN)
    return comparison.saes[0].floor


def test_what_is_not_beyond_two_standard_errors_is_named(stored):
    """Fails if .73 ± .01 passes for more than .72 ± .01, .75 for no more, or an unknown error for evidence."""
    text = " ".join(compare.compare([ours()], None, KNOWN).split())
    # √(.01² + .01²) = .014; absorption .05 is better than .1 by an unknown error: neither claimed nor named
    assert f"warning: {LINE}: sparse_probing.sae_top_1 (0.73 vs 0.72 ± 0.01), sae_probes.sae_top_1 AUC (0.6 vs 0.65)"\
        in text
    # 2 · .0141 = .0283
    for probing, better in ((0.748, False), (0.749, True), (0.5, False)):
        assert (PROBING in floor_of(ours(probing=probing)).not_better) != better
    assert floor_of(ours()).not_better.keys() == {PROBING, PROBES}


def test_the_nearest_end_stands_in_within_a_factor(stored):
    """Fails if a decoder of a far L0, another width, layer or eval setting is held against a run, or a near one not."""
    near = floor_of(ours(l0=110.0))  # 1.375 times 80
    assert (near.run.means[PROBING], near.at_own_l0) == (0.74, False)
    assert f"{LINE} (of L0 80.00, the nearest stored): " in " ".join(
        compare.compare([ours(l0=110.0)], None, KNOWN).split())
    assert floor_of(ours(l0=80.4)).at_own_l0  # within a hundredth
    for other in (ours(l0=130.0), ours(d_sae=2000), ours(layer=4, hook_name="blocks.4.hook_resid_post"),
                  ours(model="org/Else")):
        assert floor_of(other) is None
    floor = floor_of(ours(evals={"sparse_probing": {"context_length": 64}}))
    assert PROBING not in floor.run.means and floor.not_better.keys() == {PROBES}


def test_every_form_carries_it(stored, tmp_path):
    """Fails if markdown, the table's column, JSON or the page lacks the line, or the plots the random lines."""
    comparisons = compare.judged([ours()], None, KNOWN)
    (table,) = tables.laid_out(comparisons)
    assert table.header[-1] == "random"
    assert [row[-1].text for row in table.rows if row[0].text == PROBING] == ["~0.7200"]
    assert f"- warning: {LINE}: " in tables.as_markdown(table)
    (sae,) = json.loads(exports.as_json(comparisons))["comparisons"][0]["saes"]
    assert sae["random"]["l0"] == 40.0 and sae["random"]["not_better"].keys() == {PROBING, PROBES}
    assert sae["random"]["not_better"][PROBING]["difference_stderr"] == pytest.approx(0.01 * 2**0.5)
    assert sae["metrics"][CE]["random"] == pytest.approx(0.6)
    page = report.write(tmp_path, {"r": ours()}, None, []).read_text(encoding="utf-8")
    assert f"<div class=warn>{LINE}: " in page
    (menu,) = Page(part(page, "Frontier")).data
    series = next(iter(charts(menu).values()))["series"]
    assert [(one["name"], one["role"], one["line"], len(one["points"])) for one in series[1:]] == [
        ("frozen random decoder", "random", True, 2), ("untrained SAE", "random", True, 1)]


def test_several_runs_share_a_line_without_figures(stored):
    """Fails if each of many runs adds a line of its own, or the table by L0 lacks the decoder at each run's L0."""
    base = [run(f"b {l0:g}", {"core.l0": l0, CE: ce}, variant="standard", hyper={"l": l0})
            for l0, ce in ((10.0, 0.7), (100.0, 0.9))]
    (table,) = tables.laid_out(compare.judged([ours(), ours(l0=80.0)], base, KNOWN))
    assert sum(LINE in line for line in table.above) == 1
    assert table.header[-1] == "random" and [row[-1].text for row in table.rows[:2]] == ["~0.6000", "0.7000"]


def test_known_features_have_an_l0_of_their_own():
    """Fails if a run without a language model has no L0, no frontier, no warnings or no headline."""
    def sae(l0, f1, **more):
        means = {"ground_truth.l0": l0, "ground_truth.f1": f1, "ground_truth.mcc": 0.5, "ground_truth.precision": 0.6,
                 "ground_truth.r2": 0.7, "ground_truth.uniqueness": 0.9, "ground_truth.frac_alive": 0.5}
        return run("r", means | more, {"ground_truth.f1": 0.01}, variant="standard", hyper={"l": l0})

    (comparison,) = compare.judged([sae(20.0, 0.6)], [sae(10.0, 0.7), sae(40.0, 0.9)], KNOWN)
    partner = comparison.saes[0].partner
    assert partner.means["ground_truth.f1"] == pytest.approx(0.8) and partner.means["ground_truth.l0"] == 20.0
    assert "core.l0" not in partner.means
    (table,) = tables.laid_out([comparison])
    assert [row[0].text.partition(".")[2] for row in table.rows[:5]] == ["f1", "mcc", "r2", "uniqueness", "l0"]
    found = " ".join(compare.doubts.warnings(sae(0.0, 0.1, **{"ground_truth.r2": -0.1})))
    assert "dead SAE: L0 = 0" in found and "R² = -0.1000 is below 0" in found
    assert "nearly dead" in " ".join(compare.doubts.warnings(sae(20.0, 0.1, **{"ground_truth.frac_alive": 0.05})))
    assert compare.doubts.warnings(run("r", {"core.l0": 30.0, "ground_truth.l0": 0.0, R2: 0.5})) == []  # core's counts


def test_the_published_table_of_synthetic_features():
    """Fails if a figure was mistyped, or a run of the published size meets no published one by default."""
    config = {"model": "synth16k", "layer": 0, "d_sae": 4096, "variant": "mine", "num_tokens": 200_000_000}
    one = run("r", {"ground_truth.l0": 25.0, "ground_truth.f1": 0.72, "ground_truth.mcc": 0.76},
              {"ground_truth.f1": 0.002}, **config | {"hook_name": None})
    (comparison,) = compare.judged([one], compare.stored_baselines([one]), KNOWN | {"ground_truth.f1": "higher"})
    (judged,) = comparison.saes
    assert judged.nearest.means == {"ground_truth.l0": 25.0, "ground_truth.f1": 0.7316, "ground_truth.mcc": 0.7574,
                                    "ground_truth.uniqueness": 0.9837, "ground_truth.r2": 0.7923}
    assert judged.judged("ground_truth.f1").verdict == "worse"
    assert judged.judged("ground_truth.f1").beyond  # .0116 beyond 2 · √(.002² + .001²) = .0045
