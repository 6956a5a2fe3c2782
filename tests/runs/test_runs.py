"""Recorded runs: reading every shape, judging differences, warnings, the report, and the manners of a run folder."""

import cProfile
import dataclasses
import fcntl
import hashlib
import html.parser
import io
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from runs import compare, folder, frontier, reading, report
from runs.reading import Run, read
from tests import PROJECT

GEMMA = PROJECT / "runs/baseline/gemma-2-2b"
DIRECTIONS = {"core.ce_loss_score": "higher", "core.mse": "lower", "core.l0": "",
              "sparse_probing.sae_top_1_test_accuracy": "higher"}


def entry(means, stderrs=None, **config):
    base = {"model": "org/Tiny", "layer": 3, "hook_name": "blocks.3.hook_resid_post", "d_sae": 1000, "steps": 10}
    return {"means": means, "stderrs": stderrs or {}, "config": {**base, **config}, "problems": []}


def run(name, means, stderrs=None, **config):
    return Run(name, means, stderrs or {}, entry({}, **config)["config"], [], Path(f"/nowhere/{name}/final_info.json"))


def record(path, sections):
    folder.write_json(path / "final_info.json", sections)
    return path


# ------------------------------------------------------------------------------------------------ reading


def test_seed_files_are_the_origins_own_bytes():
    """Fails if a stored seed was edited, reformatted or re-encoded."""
    sums = {"seed_core_layer19.json": "24a0f514a5f6f977e216423d0fcc5bfc120edaa9fde3f3ea78a3b6147fcb00b6",
            "seed_sparse_probing_layer5.json": "109a9f6fc1e0547ee0fa7a2577ccc68522c1354e1f6209f4b9935fe5e53fa11a"}
    assert {name: hashlib.sha256((GEMMA / name).read_bytes()).hexdigest() for name in sums} == sums


def test_seeds_are_reported_as_dead_untrained_and_contradictory():
    """Fails if the -1 that stands for NaN passes for a cosine, or if one of the seeds' defects goes unsaid."""
    (core,) = read(GEMMA / "seed_core_layer19.json").values()
    assert core.means["core.cossim"] is None and core.means["core.ce_loss_score"] == -0.5855263157894737
    assert core.config["layer"] == 19 and "disagree" not in core.config
    said = "\n".join(compare.warnings(core))
    assert "L0 = 0" in said and "-100000 training tokens" in said

    (probing,) = read(GEMMA / "seed_sparse_probing_layer5.json").values()
    said = "\n".join(compare.warnings(probing))
    assert "0 training steps" in said and "chance (.5) in 7 of 7" in said
    assert "disagree on the layer: 5 (" in said and "19 (layer)" in said


def test_stored_gemma_baselines_hold_the_published_figures():
    """Fails if the conversion lost a section, the model, the layer or a value."""
    for name, metric, value in (("standard", "core.l0", 8895.810546875),
                                ("jumprelu", "core.ce_loss_score", 0.9950657894736842),
                                ("topk", "sparse_probing.sae_top_1_test_accuracy", 0.7449374999999999)):
        path = compare.baseline_for({"model": "/some/where/Gemma-2-2B"}, name)
        (section, stored), = read(path).items()
        assert (section, stored.config["variant"], stored.config["d_sae"],
                stored.means[metric]) == ("layer_12", name, 16384, value)
    assert compare.baseline_for({"model": "org/unheard-of"}) is None


def test_sectioned_file_of_the_ai_scientist_template(tmp_path):
    """Fails if a section is filed under the wrong eval, settings pass for metrics, or the old core shape is not
    understood.

    The eval of the instruction-tuned sibling must not look like a contradiction, nor the constant -100000 like no
    training.
    """
    sae = {"model_name": "google/gemma-2-2b", "d_in": 2304, "d_sae": 16384, "hook_layer": 12,
           "hook_name": "blocks.12.hook_resid_post", "training_tokens": -100000}
    document = {
        "training results for layer 12": {
            "config": {"trainer_class": "CustomTrainer", "dict_size": 16384, "layer": 12,
                       "lm_name": "google/gemma-2-2b"},
            "final_info": {"training_steps": 2441, "final_loss": float("nan"), "layer": 12, "dict_size": 16384}},
        "absorption evaluation results": {
            "eval_type_id": "absorption_first_letter", "eval_config": {"random_seed": 42, "max_k_value": 10},
            "datetime_epoch_millis": 1738804062497, "eval_result_metrics": {"mean": {"mean_absorption_score": 0.016}},
            "eval_result_details": [{"first_letter": "a", "absorption_rate": 0.5}], "sae_cfg_dict": sae},
        "core evaluation results": {
            "sae_set": "google/gemma-2-2b_layer_12_sae", "eval_cfg": {"context_size": 128},
            "metrics": {"sparsity": {"l0": 88.5}, "model_behavior_preservation": {"kl_div_score": -1.0}}},
        "scr and tpp evaluations results": {"eval_result_metrics": {
            "scr_metrics": {"scr_metric_threshold_10": -1.0}, "tpp_threshold_10_total_metric": 0.25}},
        "sparse probing evaluation results": {"sae": {"sae_top_1_test_accuracy": 0.625,
                                                      "sae_top_100_test_accuracy": None}},
        "unlearning evaluation results": {"eval_config": {"model_name": "google/gemma-2-2b-it"},
                                          "eval_result_metrics": {"unlearning": {"unlearning_score": 0.001}}},
    }
    (tmp_path / "final_info.json").write_text(json.dumps(document))
    (section, found), = read(tmp_path).items()
    assert section == "layer_12" and found.name == tmp_path.name
    assert found.means == {
        "absorption.mean_absorption_score": 0.016, "core.l0": 88.5, "core.kl_div_score": None,
        "scr.scr_metric_threshold_10": -1.0,
        "tpp.tpp_threshold_10_total_metric": 0.25, "sparse_probing.sae_top_1_test_accuracy": 0.625,
        "sparse_probing.sae_top_100_test_accuracy": None, "unlearning.unlearning_score": 0.001,
        "training.final_loss": None}
    assert found.config["evals"]["core"] == {"context_size": 128} and found.config["evals"]["absorption"]["max_k_value"] == 10
    assert (found.config["steps"], found.config["d_sae"], found.config["d_in"]) == (2441, 16384, 2304)
    assert compare.warnings(found) == []

    document["training results for layer 19"] = {"final_info": {"training_steps": 7, "layer": 19},
                                                 "core evaluation results":
                                                 {"metrics": {"sparsity": {"l0": 3.5}}}}
    (tmp_path / "final_info.json").write_text(json.dumps(document))
    both = read(tmp_path)
    assert (both["layer_12"].means["core.l0"], both["layer_19"].means["core.l0"]) == (88.5, 3.5)


def test_own_shape_with_a_sweep_and_nan(tmp_path):
    """Fails if NaN stays a number, non-numbers become metrics,
    or a section's name that contradicts its config is not noted.
    """
    text = """{"layer_3.k_4": {"means": {"core.l0": 4.0, "core.mse": NaN, "note": "x", "ok": true}, "stderrs": {"core.l0": 0.5},
               "config": {"layer": 3, "hook_name": "blocks.3.hook_resid_post"}, "problems": ["p"]},
               "layer_3.k_8": {"means": {"absorption_first_letter.mean_full_absorption_score": 0.5}, "config": {"layer": 4}}}"""
    (tmp_path / "x.json").write_text(text)
    four, eight = read(tmp_path / "x.json").values()
    assert four.means == {"core.l0": 4.0, "core.mse": None} and four.stderrs == {"core.l0": 0.5}
    assert four.problems == ["p", "core.mse is nan in the file"] and four.name == "x layer_3.k_4"
    assert eight.means == {"absorption.mean_full_absorption_score": 0.5}
    assert compare.warnings(four) == [] and "disagree on the layer" in compare.warnings(eight)[0]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"a": {"b": 1}}', '{"training_tokens": 5, "hook_name": "blocks.1.x"}',
                                  "not json"])
def test_what_records_no_run_is_refused(tmp_path, text):
    """Fails if some other JSON file, an SAE's cfg.json for one, passes for an empty run."""
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json .*\n"):
        read(tmp_path / "f.json")


def test_a_failed_run_says_why(tmp_path):
    """Fails if a folder without results is not explained by its error.json."""
    folder.write_json(tmp_path / "error.json", {"phase": "preflight", "message": "NaN loss\nmore"})
    with pytest.raises(FileNotFoundError, match="failed in preflight, NaN loss"):
        read(tmp_path)


# ------------------------------------------------------------------------------------------------ judging


@pytest.mark.parametrize("difference, ours, theirs, beyond", [
    (0.011, 0.003, 0.004, "yes"),  # combined .005; adding the errors would ask for .014
    (0.009, 0.003, 0.004, "no"),  # the larger error alone would ask for .008 only
    (0.011, None, None, "?"),
    (0.011, 0.003, None, "?"),  # beyond what is known, but the other side may add to it
    (0.005, 0.003, None, "no"),  # within what is known already
])
def test_twice_the_combined_standard_error(difference, ours, theirs, beyond):
    """Fails if errors are combined otherwise than by their root sum of squares, or an unknown one gives a verdict."""
    errors = [{} if e is None else {"core.mse": e} for e in (ours, theirs)]
    judged = compare.judge("core.mse", run("a", {"core.mse": 2 + difference}, errors[0]),
                           run("b", {"core.mse": 2.0}, errors[1]), "lower")
    assert (judged.verdict, judged.beyond) == ("worse", beyond)


def test_directions_come_from_the_evals():
    """Fails if a metric of core loses its direction, or if losses of different variants are ranked."""
    known = compare.directions()
    assert (known["core.ce_loss_score"], known["core.mse"], known["core.l0"],
            known["training.final_loss"]) == ("higher", "lower", "", "")


def test_what_differs_in_setting_is_not_judged():
    """Fails if another layer or model is compared at all,
    or if other settings of one eval leave its verdict standing.
    """
    means = {"core.ce_loss_score": 0.9, "sparse_probing.sae_top_1_test_accuracy": 0.8}
    base = run("standard", {k: v - 0.125 for k, v in means.items()},
               evals={"core": {"context_size": 128, "verbose": False}})
    other_eval = run("r", means, evals={"core": {"context_size": 64, "verbose": True}})
    lines = compare.compare([other_eval], [base], DIRECTIONS).splitlines()
    assert "not compared: core (context_size 64 / 128)" in lines
    assert next(line for line in lines if line.startswith("core.ce")).split()[1:] == ["0.7750", "0.9000", "–"]
    assert next(line for line in lines
                if line.startswith("sparse")).split()[1:] == ["0.6750", "0.8000", "+0.1250", "better", "?"]
    for config, said in (({"layer": 4, "hook_name": "blocks.4.hook_resid_post"}, "layer 4 / 3"),
                         ({"model": "big"}, "model big / tiny")):
        text = compare.compare([run("r", means, **config)], [base], DIRECTIONS)
        assert f"not compared: {said}" in text and "better" not in text and "difference" not in text and "0.9000" in text


def test_equal_to_the_last_digit():
    """Fails if what is equal by nature (LM figures, counts, bf16 values) is held against a run,
    or a copied result is not.
    """
    by_nature = {"core.ce_loss_without_sae": 2.8812345, "core.l0": 32.0, "core.total_tokens": 12345,
                 "core.frac_alive": 0.9987654,
                 "core.explained_variance": 0.984375, "sparse_probing.llm_top_1_test_accuracy": 0.6543217}
    base = run("standard", {**by_nature, "core.mse": 1.2345678, "core.r2": 0.7654321})
    assert compare.warnings(run("a", {**by_nature, "core.mse": 1.2345679, "core.r2": 0.75}), base) == []
    assert compare.warnings(run("a", {**by_nature, "core.mse": 1.2345678, "core.r2": 0.75123}), base) == [
        "equal to standard to the last digit: core.mse"]
    copied = run("b", base.means)
    assert "all 2 SAE metrics equal those of standard" in compare.warnings(copied, base)[0]
    text = compare.compare([copied, run("c", base.means), run("d", {"core.mse": 3.3333333})], None, DIRECTIONS)
    assert "all 2 SAE metrics equal those of b" in text


@pytest.mark.parametrize("means, config, said", [
    ({"core.l0": 0.0}, {}, "dead SAE"),
    ({"core.frac_alive": 0.05}, {}, "nearly dead"),
    ({"core.l0": 101.0}, {}, "more than a tenth"),
    ({"core.l0": 99.0}, {}, None),
    ({"sparse_probing.sae_top_1_test_accuracy": 0.503}, {}, "chance"),
    ({"sparse_probing.sae_top_1_test_accuracy": 0.52}, {}, None),
    ({"sparse_probing.llm_top_1_test_accuracy": 0.5}, {}, None),
    ({}, {"steps": 0}, "0 training steps"),
    ({}, {"steps": None, "num_tokens": -100000}, "-100000 training tokens"),
])
def test_warnings(means, config, said):
    """Fails if one of the ways to be silently wrong is missed, or a sound run is suspected."""
    found = compare.warnings(run("r", means, **config))
    assert (said is None) == (not found) and (said or "") in "\n".join(found)


def test_the_printed_table_fits(tmp_path):
    """Fails if a real run's end does not fit in 100 columns and 25 lines, or if columns are not aligned."""
    means = {m: v * 0.99 if v else v for m, v in next(iter(read(GEMMA / "standard").values())).means.items()}
    config = {"model": "google/gemma-2-2b", "layer": 12, "hook_name": "blocks.12.hook_resid_post", "d_sae": 16384,
              "variant": "topk"}
    text = compare.summary(record(tmp_path / "run_1", {"layer_12": entry(means, **config)}))
    lines = text.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("metric"))
    ends = {line.index(number) + len(number) for line in lines[start + 1 : -1] for number in line.split()[1:2]}
    assert ends == {lines[start].index("baseline") + len("baseline")}


def test_a_sweep_is_shown_as_a_frontier(tmp_path):
    """Fails if baseline and run are not interleaved by L0, or if single metrics at different L0 get verdicts."""
    record(tmp_path / "run_1", {f"layer_3.k_{k}": entry({"core.l0": float(k), "core.ce_loss_score": 0.9 + k / 1000})
                                for k in (40, 20)})
    base = run("standard", {"core.l0": 30.0, "core.ce_loss_score": 0.91})
    lines = compare.compare(read(tmp_path / "run_1"), [base], DIRECTIONS).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("SAE"))
    assert [line.split("  ")[0] for line in lines[start + 1 :]] == ["layer_3.k_20", "standard (baseline)",
                                                                    "layer_3.k_40"]
    assert lines[start + 1].split()[1:] == ["20.00", "0.9200"]


CE, R2 = "core.ce_loss_score", "core.r2"
TWO_ENDS = ((20.0, 0.80), (100.0, 0.92))  # (L0, CE loss score): in the middle on a log axis, at L0 44.7, .86


def saes_of(variant, points, **config):
    """One SAE per (L0, CE loss score), in the order given."""
    return [run(f"{variant} l_{l0:g}", {"core.l0": l0, CE: ce}, {CE: 0.002}, variant=variant, hyper={"l": l0}, **config)
            for l0, ce in points]


def test_between_two_saes_figures_are_linear_in_log_l0():
    """Fails if L0 itself is the axis (.567 at 20), errors shrink between the two (.0158 by squares),
    or far SAEs take part.
    """
    measured = ((160.0, 0.9, 0.9, {CE: 0.5}), (10.0, 0.5, None, {CE: 0.01, "core.l0": 0.1}),
                (40.0, 0.7, 0.8, {CE: 0.03}))
    saes = [run(f"l_{l0:g}", {"core.l0": l0, CE: ce, R2: r2, "core.total_tokens": 10}, errors, variant="standard")
            for l0, ce, r2, errors in measured]
    middle = frontier.at(20.0, saes)  # ln(20/10) / ln(40/10) = 1/2
    assert middle.means == {"core.l0": 20.0, CE: pytest.approx(0.6), "core.total_tokens": 10}
    assert middle.stderrs == {CE: pytest.approx(0.02)} and [sae.name for sae in middle.between] == ["l_10", "l_40"]
    quarter = frontier.at(10 * math.sqrt(2), saes)
    assert (quarter.means[CE], quarter.stderrs[CE]) == (pytest.approx(0.55), pytest.approx(0.015))
    assert frontier.at(80.0, saes).means[R2] == pytest.approx(0.85)
    assert [frontier.at(l0, saes) for l0 in (9.8, 164.0, 0.0, None)] == [None] * 4
    assert frontier.at(40.0, saes) is saes[2] and frontier.at(159.0, saes) is frontier.at(161.0, saes) is saes[0]


def test_equal_l0_reverses_the_verdict_of_the_nearest_sae():
    """Fails if a run that is better only by its larger L0 passes for better:
    alone, in a sweep, in a large sweep or in the CSV.
    """
    base = saes_of("standard", TWO_ENDS)
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    assert compare.judge(CE, ours, base[0], "higher").verdict == "better"  # the nearest, by L0: 0.05 above it
    # .8 + .12 · ln(50/20) / ln(100/20) = .8683; twice the combined error: .0072
    lines = compare.compare([ours], base, DIRECTIONS).splitlines()
    assert next(line for line in lines
                if line.startswith(CE)).split()[1:] == ["~0.8683", "0.8500", "-0.0183", "worse", "yes"]
    assert "~ between standard l_20 (L0 20.00) and standard l_100 (L0 100.0)" in " ".join(map(str.strip, lines))
    row = next(r for r in compare._csv([ours], base, DIRECTIONS).splitlines() if CE in r).split(",")
    assert row[6] == "standard at L0 50" and row[-4:] == ["worse", "yes", "50.0", "50.0"]

    sweep = [dataclasses.replace(ours, name=f"r l_{n}", means={"core.l0": 50.0 + n, CE: 0.85}) for n in range(20)]
    text = compare.compare(sweep[:2], base, DIRECTIONS)
    assert [line.split()[-4:] for line in text.splitlines() if "~0." in line] == [
        ["~0.8683", "0.8500", "-0.0183", "worse*"], ["~0.8698", "0.8500", "-0.0198", "worse*"]]
    assert "50.00          0.8500-" in compare.compare(sweep, base, DIRECTIONS)


def test_a_sweep_beside_a_frontier(tmp_path):
    """Fails if figures outside the baseline's L0 are judged, metrics mixed up, other settings compared,
    or the table grows too long.
    """
    more = dict.fromkeys([f"sparse_probing.sae_top_{k}_test_accuracy" for k in (1, 2, 5)], 0.75)
    more |= dict.fromkeys([R2, "core.kl_div_score", "core.frac_alive"], 0.75)
    evals = {"core": {"context_size": 128}, "sparse_probing": {"k_values": [1]}}
    ours = {f"layer_3.k_{k}": entry({"core.l0": float(k), CE: 0.9 + k / 1e7, **more}, {CE: 0.001}, variant="topk",
                                    evals=evals)
            for k in (90, 10, 30, 40, 50, 200)}
    base = [run(sae.name, sae.means | more, sae.stderrs, variant="standard", evals=evals
                | {"sparse_probing": {"k_values": [2]}})
            for sae in saes_of("standard", TWO_ENDS)]
    lines = compare.compare(read(record(tmp_path / "run_1", ours)), base, compare.directions()).splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("ce_loss_score"))
    table = [line.split() for line in lines[start : start + 6]]
    assert table[0] == ["ce_loss_score", "k_10", "10.00", "–",
                        "0.9000"] and table[5] == ["k_200", "200.0", "–", "0.9000"]
    assert [row[0] for row in table[1:]] == ["k_30", "k_40", "k_50", "k_90", "k_200"]
    assert table[1][2:] == ["~0.8302", "0.9000", "+0.0698", "better*"]  # .8 + .12 · ln 1.5 / ln 5
    assert table[4][2:] == ["~0.9121", "0.9000", "-0.0121", "worse*"]  # .8 + .12 · ln 4.5 / ln 5
    probing = next(i for i, line in enumerate(lines) if line.startswith("sae_top_1"))
    assert lines[probing + 1].split() == ["k_30", "30.00", "0.7500", "0.7500", "–"]
    assert "– outside the baseline's L0 20.00 to 100.0" in lines and any("k_values 1 items" in line for line in lines)


def test_what_is_no_frontier_is_not_interpolated():
    """Fails if a line is drawn between variants, widths, training budgets or eval settings,
    or a far baseline passes for a near one.
    """
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    (low,), (high,) = saes_of("standard", TWO_ENDS[:1]), saes_of("standard", TWO_ENDS[1:])
    assert compare.frontier_for([ours], [low, high]) == [low, high]
    stated = {"variant": "standard", "num_tokens": 9, "evals": {"core": {"context_size": 128}}}
    for other in ({"variant": "topk"}, {"d_sae": 500}, {"num_tokens": 7}, {"layer": 4},
                  {"evals": {"core": {"context_size": 64}}}):
        strange, first = (run(name, sae.means, **stated | own)
                          for name, sae, own in (("b", high, other), ("a", low, {})))
        assert compare.frontier_for([ours], [first, strange]) == []
    unnamed = [run(sae.name, sae.means) for sae in (low, high)]  # of variants unknown
    assert compare.frontier_for([ours], unnamed) == []
    lines = compare.compare([ours], [low, *saes_of("topk", TWO_ENDS[1:])], DIRECTIONS).splitlines()
    assert next(line for line in lines
                if line.startswith(CE)).split()[1:] == ["0.8000", "0.8500", "+0.0500", "better", "yes"]
    assert "not at equal L0: 50.00 / 20.00, a factor of 2.5" in lines
    below = run("r", {"core.l0": 10.0, CE: 0.7}, variant="mine")
    assert "not at equal L0: 10.00 / 20.00, a factor of 2, outside the baseline's L0 20.00 to 100.0" in (
        compare.compare([below], [low, high], DIRECTIONS))

    # L0 4459, 8896, unknown
    published = [sae for name in ("jumprelu", "standard", "topk") for sae in read(GEMMA / name).values()]
    config = {"model": "google/gemma-2-2b", "layer": 12, "hook_name": "blocks.12.hook_resid_post", "variant": "mine"}
    text = compare.compare([run("r", {"core.l0": 6000.0, CE: 0.9}, **config)], published, DIRECTIONS)
    assert "~" not in text and "not at equal L0: 6,000 / 4,459" in text
    text = compare.compare([run("r", {"core.l0": 40.0, CE: 0.9}, **config)], published[2:], DIRECTIONS)
    assert "not at equal L0: the baseline's is not known" in text


@pytest.mark.parametrize("files", [{"final_info.json": (0, 1)}, {"final_info.json": (0,), "frontier.json": (1,)}])
def test_a_stored_frontier_in_one_file_or_beside_the_default(tmp_path, monkeypatch, files):
    """Fails if SAEs stored in either place are not found, or two files are not one frontier."""
    monkeypatch.setattr(compare, "BASELINES", tmp_path)
    for name, which in files.items():
        sections = {f"layer_3.l_{i}": entry({"core.l0": TWO_ENDS[i][0], CE: TWO_ENDS[i][1]}, variant="standard",
                                            hyper={"l": i})
                    for i in which}
        folder.write_json(tmp_path / "tiny/standard" / name, sections)
    ours = run("r", {"core.l0": 50.0, CE: 0.85}, variant="mine")
    for asked in (None, str(tmp_path / "tiny/standard")):
        lines = compare.compare([ours], compare.stored_baselines([ours], asked), DIRECTIONS).splitlines()
        assert next(line for line in lines if line.startswith(CE)).split()[1:3] == ["~0.8683", "0.8500"]


def test_a_sweep_stands_in_for_a_missing_baseline(tmp_path):
    """Fails if only the first SAE of the first of two sweeps is compared with."""
    for name, points in (("a", TWO_ENDS), ("b", ((50.0, 0.85), (60.0, 0.95)))):
        record(tmp_path / name, {f"layer_3.l_{l0:g}": entry({"core.l0": l0, CE: ce}, variant=name, hyper={"l": l0})
                                 for l0, ce in points})
    text = compare.compare([*read(tmp_path / "a").values(), *read(tmp_path / "b").values()], None, DIRECTIONS)
    assert "a stands for it" in text and [line.split()[-1] for line in text.splitlines()
                                          if "~0." in line] == ["worse?", "better?"]


def command(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60,
                          **options)


def test_command_names_the_nearest(tmp_path):
    """Fails if a wrong run, baseline or flag gives more than one line or no valid name."""
    record(tmp_path / "run_12", {"layer_3": entry({"core.l0": 5.0})})
    for arguments, said in (([f"{tmp_path}/run_21"], "'run_12'"), ([f"{GEMMA}/topk", "--baseline", "jmprelu"],
                                                                   "'jumprelu'"),
                            ([f"{GEMMA}/topk", "--markdwn"], "--markdown"),
                            ([f"{tmp_path}/run_12", "--baseline=a/b"], "'gemma-2-2b/")):
        done = command("-m", "runs.compare", *arguments)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


@pytest.mark.slow
def test_a_thousand_runs_without_heavy_imports(tmp_path):
    """Fails if comparing needs torch or numpy, grows faster than the number of runs, or drops one of them."""
    rest = {f"core.metric_{i}": 0.123 for i in range(50)}
    for n in range(1000):
        record(tmp_path / f"run_{n}", {"layer_3": entry({**rest, "core.l0": n + 0.1, "core.ce_loss_score": 0.9
                                                         + n * 1e-5})})
    start = time.monotonic()
    done = command("-c", "import sys, runs.compare\ncode = runs.compare.main(sys.argv[1:])\n"
                         "sys.exit(code or len({'torch', 'numpy'} & set(sys.modules)))",
                   *map(str, sorted(tmp_path.iterdir())), "--csv")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # measured: 1 s
    rows = done.stdout.splitlines()
    assert len(rows) == 1 + 1000 * 52
    row = next(r for r in rows if r.startswith("run_7,") and ".ce_loss_score," in r).split(",")
    assert row[:3] + row[6:7] == ["run_7", "org/Tiny", "3", "run_0"] and math.isclose(float(row[9]), 7e-5, rel_tol=1e-6)


@pytest.mark.slow
def test_work_grows_with_the_number_of_runs_alone(tmp_path, monkeypatch, capsys):
    """Fails if comparing reads a run's file twice or does something for each pair,
    or if the end of a run looks at the runs beside it.
    """
    opened, really = [], io.open
    monkeypatch.setattr(io, "open", lambda file, *args, **options: opened.append(str(file))
                        or really(file, *args, **options))
    (stored,) = json.loads((PROJECT / "runs/baseline/smollm2-135m-instruct/topk/final_info.json").read_text()).values()

    def work(call, *arguments) -> tuple[int, list[str]]:
        """How many Python functions were called, a measure that no other process disturbs, and the files opened."""
        opened.clear()
        profile = cProfile.Profile(builtins=False)
        profile.runcall(call, *arguments)
        return sum(entry.callcount for entry in profile.getstats()), list(opened)

    folders, calls, ends = [], {}, {}
    for n in (1, 100, 1000):  # the first fills caches
        for i in range(len(folders), n):
            folders.append(tmp_path / f"run_{i}")
            folders[i].mkdir()
            means = {m: v * (1 + i * 1e-6) if isinstance(v, float) else v for m, v in stored["means"].items()}
            (folders[i] / "final_info.json").write_text(json.dumps({"layer_9": stored | {"means": means}}))
        for flags in ((), ("--csv",)):
            calls[n, flags], files = work(compare.main, [*map(str, folders), *flags])
            assert sorted(f for f in files if str(tmp_path) in f) == sorted(str(f / "final_info.json") for f in folders)
            assert len(files) < n + 60  # and once each the evals' sources and the baseline
        sections = read(folders[0])
        ends[n] = [(count, len(files)) for count, files in (
            work(compare.summary, folders[0]), work(report.write, folders[0], sections,
                                                    compare.stored_baselines(sections), []))]
    capsys.readouterr()
    assert all(calls[1000, flags] < 10 * calls[100, flags] for flags in ((), ("--csv",)))
    assert ends[1000] == ends[100]


# ------------------------------------------------------------------------------------------------ report


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href") or "url(" in (v or "")]


def test_report_is_self_contained_small_and_escaped(tmp_path):
    """Fails if text from outside becomes markup, the page loads anything, grows past 1 MB, or NaN reaches a drawing."""
    evil = "<script>alert(1)</script>\ud800\n"
    sections = {f"layer_3.{evil}{k}": run(f"r {evil}{k}", {"core.l0": k + 1.0, "core.ce_loss_score": 0.9}, variant=evil)
                for k in range(2)}
    sections["x"] = Run("x", {"core.l0": None}, {}, {}, [evil], Path("/nowhere/x.json"))
    log = [{"sae": evil + str(k), "step": s, "tokens": s * 100, "loss": math.nan if s % 2 else 1 / (s + 1), "auxk": "",
            "l0": "32.5"}
           for s in range(3000) for k in range(8)]
    context = [(evil, 1.5), (" word", 0.0), ("\"'&", math.nan)] * 43
    board = {"density": 0.01, "max_activation": 1.5, "contexts": [context] * 10, "top_logits": [(evil, 1.0)]}
    boards = [{"feature": n, **board} for n in range(300)]
    path = report.write(tmp_path, sections, [run("b", {"core.l0": 1.0})], log, boards)
    text = path.read_text(encoding="utf-8")
    page = Tags(text)
    assert "script" not in page.tags and page.loads == [] and page.tags.count("svg") >= 3
    assert path.stat().st_size < 1_000_000 and "more left out to keep the page small" in text
    drawn = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert not any("nan" in svg.lower() or "inf" in svg.lower() for svg in drawn)


def test_chart_puts_points_where_they_belong():
    """Fails if axes are swapped or flipped: the corners of a 360 × 230 chart follow from its
    margins and 5 % room in y.
    """
    svg = report.chart("t", [("a", [(0.0, 0.0), (10.0, 1.0)])], "x", "y")
    y = [230 - 42 - (value + 0.05) / 1.1 * (230 - 30 - 42) for value in (0.0, 1.0)]
    assert f'd="M58.0 {y[0]:.1f}L346.0 {y[1]:.1f}' in svg
    assert "(log)" in report.chart("t", [("a", [(0.0, 0.01), (10.0, 1.0)])], "x", "y")  # spans a factor 100


def test_the_frontier_is_drawn_by_log_l0_with_its_errors(tmp_path):
    """Fails if L0 is on a linear axis, bars are no standard errors, points of several dials are joined,
    or a baseline's line is missing.
    """
    svg = report.chart("t", [("a", [(10.0, 0.5, 0.1), (100.0, 0.6, 0.0), (1000.0, 0.9, 0.1)])], "x", "y", True, True)
    # y from .4 to 1.0 with 5 % room: .37 to 1.03 over 158 units, so that the bar of ±.1 around .5 goes from .6 to .4
    low, high = (230 - 42 - (value - 0.37) / 0.66 * 158 for value in (0.4, 0.6))
    assert "<circle cx=202.0 " in svg and svg.count("<circle") == 3  # 100 is in the middle of 10 and 1000: 58 + 288 / 2
    assert f"{low:.1f}V{high:.1f}M" in svg and ">100</text>" in svg

    points = ((20.0, 0.80), (60.0, 0.85), (100.0, 0.92))
    base, ours = saes_of("standard", points), run("r", {"core.l0": 50.0, CE: 0.85}, {CE: 0.003}, variant="mine")
    several = [run(f"p {k} {a}", {"core.l0": k, CE: 0.8 + a}, variant="mine", hyper={"k": k, "a": a})
               for k in (20.0, 40.0) for a in (0.0, 0.1)]
    for runs, dots, lines in (([ours], 4, 1), (several, 7, 1), (saes_of("mine", points), 6, 2)):
        page = report.write(tmp_path, {r.name: r for r in runs}, base, []).read_text(encoding="utf-8")
        svg = page.split("<h2>Frontier</h2>")[1].split("<svg")[1].split("</svg>")[0]
        assert (svg.count("<circle"), svg.count("stroke-linejoin")) == (dots, lines)
        assert "this run (mine)" in page and "baseline (standard)" in page
    assert "<h2>Frontier" not in report.write(tmp_path, {"r": ours}, base[:1], []).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ folders


def test_json_is_strict_and_whole(tmp_path, monkeypatch):
    """Fails if NaN is written, order is changed,
    or a crash while writing harms the old file or leaves a new one behind.
    """
    path = tmp_path / "deep/a.json"
    folder.write_json(path, {"b": [math.nan, (math.inf, 1.5)], "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "b": [\n  null,\n  [\n   null,\n   1.5\n  ]\n ],\n "a": "ü"\n}\n'
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        folder.write_json(path, {})
    assert [p.name for p in path.parent.iterdir()] == ["a.json"] and "ü" in path.read_text(encoding="utf-8")


def claimed(out, mark):
    state, lock = folder.claim(out, mark)
    lock.release()
    return state


def test_claim_keeps_what_is_ours_and_moves_the_rest(tmp_path, capsys):
    """Fails if a folder is resumed under another fingerprint, a finished one without results passes,
    or anything is lost.
    """
    out = tmp_path / "a/run_1"
    assert claimed(out, "m") == "new"
    (out / ".log.txt.0a1b2c3d.tmp").touch()  # what a process killed while writing leaves behind
    assert claimed(out, "m") == "new"  # killed before run_info.json was there
    folder.write_json(out / "run_info.json", {"fingerprint": "m", "status": "finished"})
    assert claimed(out, "m") == "resume"
    folder.write_json(out / "final_info.json", {"x": 1})
    assert claimed(out, "m") == "finished"
    assert claimed(out, "other") == "new" and os.listdir(out) == [".lock"]
    assert sorted(os.listdir(tmp_path / "a/run_1.previous-1")) == [".lock", "final_info.json", "run_info.json"]
    (out / "notes.txt").write_text("mine")
    (tmp_path / "a/run_1.previous-2").touch()
    assert claimed(out, "other") == "new" and (tmp_path / "a/run_1.previous-3/notes.txt").read_text() == "mine"
    assert capsys.readouterr().out.count("moved to") == 2
    assert folder.next_free(f"{tmp_path}/a/run_") == f"{tmp_path}/a/run_2"


HOLD = "import sys, time; from runs import folder; held = folder.claim(sys.argv[1], 'm'); print(held[0], flush=True); time.sleep(60)"


def test_second_process_fails_at_once_and_a_kill_frees_the_folder(tmp_path):
    """Fails if the second process waits or goes on, or if kill -9 leaves the folder locked."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run_1"], cwd=PROJECT, stdout=subprocess.PIPE,
                              text=True)
    try:
        assert holder.stdout.readline() == "new\n"
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="run_1 is in use by another running process\n"):
            folder.claim(tmp_path / "run_1", "m")
        assert time.monotonic() - start < 1
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert claimed(tmp_path / "run_1", "m") == "new"


def test_a_kill_in_the_middle_of_moving_loses_nothing(tmp_path):
    """Fails if content is moved piece by piece, so that a kill splits it between two folders."""
    (tmp_path / "run_1/sub").mkdir(parents=True)
    (tmp_path / "run_1/sub/x").write_text("mine")
    (tmp_path / "run_1/y").write_text("mine too")
    killed = command("-c", "import os, sys; from runs import folder; os.link = lambda *_: os._exit(9); "
                           "folder.claim(sys.argv[1], 'm')",
                     str(tmp_path / "run_1"))
    assert killed.returncode == 9
    assert (tmp_path / "run_1.previous-1/sub/x").exists() and (tmp_path / "run_1.previous-1/y").exists()
    assert claimed(tmp_path / "run_1", "m") == "new" and not (tmp_path / "run_1.previous-2").exists()


def test_a_lock_on_a_folder_moved_meanwhile_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    """Fails if the lock that `claim` returns is on a file that no longer lies in the folder."""
    acquire, moved = filelock.FileLock.acquire, tmp_path / "run_1.previous-1"

    def acquire_what_is_moved(lock, **options):
        acquire(lock, **options)
        if not moved.exists():  # as if the owner moved the folder between this process's open() and flock()
            os.rename(tmp_path / "run_1", moved)
            (tmp_path / "run_1").mkdir()
            (tmp_path / "run_1/.lock").touch()

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_what_is_moved)
    _, lock = folder.claim(tmp_path / "run_1", "m")
    with open(tmp_path / "run_1/.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()


def _contend(barrier, outs, number, queue):
    for out in outs:
        barrier.wait(30)
        try:
            held, said = folder.claim(out, str(number)), ""
        except Exception as error:  # noqa: BLE001  of any kind: the others wait for this process
            held, said = None, type(error).__name__
        queue.put((str(out), held[0] if held else said))
        barrier.wait(30)  # the winner holds on until all have tried
        if held:
            held[1].release()


@pytest.mark.slow
def test_of_processes_that_claim_together_one_wins(tmp_path):
    """Fails if two processes both get a folder while its old content is being moved away, or move it twice."""
    outs = [tmp_path / f"run_{i}" for i in range(30)]
    for out in outs:
        out.mkdir()
        (out / "old").touch()
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_contend, args=(barrier, outs, n, queue), daemon=True) for n in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in range(3 * len(outs))]
    for process in processes:
        process.join(30)
    for out in outs:
        assert sorted(said for name, said in results if name == str(out)) == ["RuntimeError", "RuntimeError", "new"]
        assert (tmp_path / f"{out.name}.previous-1/old").exists() and not (tmp_path / f"{out.name}.previous-2").exists()


def test_places_that_are_no_run_folder(tmp_path, monkeypatch):
    """Fails if a file, the working folder, the project, what contains them,
    a link to them or a mount could be moved away.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(PROJECT)
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, said in (("file", "is a file"), (".", "current folder"), (tmp_path.parent, "current folder"),
                      ("here", "current folder"), (PROJECT, "project's folder"),
                      (PROJECT.parent, "(project's|current) folder"), ("link", "project's folder"),
                      (PROJECT / "variants", "own folder variants/"), (PROJECT / "runs/baseline/x", "own folder runs/"),
                      ("/proc", "mount point"), ("loop", "loop")):
        with pytest.raises(ValueError, match=said):
            folder.claim(out, "m")
    with pytest.raises(PermissionError, match="cannot write to --out_dir"):
        folder.claim("/proc/run_1", "m")
    with pytest.raises(PermissionError, match="cannot write to --out_dir"):
        folder.claim("file/run_1", "m")
    assert reading.slug("x/") == "x"  # a trailing slash is no part of a name


# ------------------------------------------------------------------------------------------------ several seeds


def test_seeds_of_one_setting_become_one_row(tmp_path, capsys):
    """Fails if runs of different settings are averaged, the error is not std/√n,
    or a difference inside the errors is marked.
    """
    from runs import seeds

    for name, variant, hyper, seed, r2 in (("a0", "standard", {"w": 1}, 0, 0.70), ("a1", "standard", {"w": 1}, 1, 0.74),
                                           ("b0", "mine", {"w": 1}, 0, 0.90), ("b1", "mine", {"w": 1}, 1, 0.92),
                                           ("c0", "mine", {"w": 0}, 0, 0.5)):
        record = dict(means={"core.r2": r2, "core.l0": 30.0}, stderrs={}, problems=[],
                      config=dict(variant=variant, hyper=hyper, seed=seed))
        (tmp_path / name).mkdir()
        (tmp_path / name / "final_info.json").write_text(json.dumps({"layer_9": record}))
    assert seeds.main([str(tmp_path / name) for name in ("a0", "a1", "b0", "b1", "c0")] + ["--metrics=core.r2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["standard", "2", "0.7200", "±", "0.02"]  # |.74 − .70|/2 = √(2·.02²/1)/√2
    assert lines[2] == ["mine", "2", "0.9100", "±", "0.01*"] and lines[3] == ["mine", "w=0", "1", "0.5000"]


def test_evals_that_the_frontier_lacks_are_compared_with_the_nearest_sae():
    """Fails if an eval that only the baseline itself ran has no figure beside a run between two L0,
    or that figure looks interpolated.
    """
    evals = {"core": {}, "scr": {}}

    def sae(name, l0, **means):
        config = {"variant": "standard", "evals": {k: v for k, v in evals.items() if k == "core" or means}}
        return Run(name, {"core.l0": l0, "core.r2": l0 / 100} | means, {}, config, [], Path("baseline/final_info.json"))

    near, far = sae("near", 40.0, **{"scr.scr_metric_threshold_10": 0.25}), sae("far", 20.0)
    partner = compare._completed(compare.frontier.at(30.0, [near, far]), near)
    assert partner.means["scr.scr_metric_threshold_10"] == 0.25 and partner.means["core.l0"] == 30.0
    assert compare._theirs(partner, "scr.scr_metric_threshold_10") == "0.2500"
    assert compare._theirs(partner, "core.r2").startswith("~0.3")
    assert compare._described(partner).endswith("(scr) at the nearest SAE's own L0")


def test_every_eval_has_a_headline():
    """Fails if the short table leaves an eval out, or shows more of it than its headline."""
    first = [f"core.m{i}" for i in range(compare.HEADLINE_LINES)]
    rest = ["core.more", "scr.scr_metric_threshold_10", "absorption.other", "absorption.mean_absorption_fraction_score",
            "scr.scr_metric_threshold_20"]
    assert compare._headlines(first + rest) == [*first, "scr.scr_metric_threshold_10",
                                                "absorption.mean_absorption_fraction_score"]
