"""Recorded runs in every shape there has been, and the baselines that are stored."""

import hashlib
import json

import filelock
import pytest

from runs import compare, folder
from runs.doubts import warnings
from runs.reading import read, slug
from runs.wording import in_a_line
from tests.runs.records import GEMMA


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
    said = "\n".join(warnings(core))
    assert "L0 = 0" in said and "-100000 training tokens" in said

    (probing,) = read(GEMMA / "seed_sparse_probing_layer5.json").values()
    said = "\n".join(warnings(probing))
    assert "0 training steps" in said and "chance (.5) in 7 of 7" in said
    assert "disagree on the layer: 5 (" in said and "19 (layer)" in said


def test_a_stored_gemma_baseline_holds_the_published_figures():
    """Fails if the conversion lost a section, the model, the layer or a value."""
    path = compare.baseline_for({"model": "/some/where/Gemma-2-2B"}, "topk")
    (section, stored), = read(path).items()
    assert section == "layer_12" and stored.means["sparse_probing.sae_top_1_test_accuracy"] == 0.7449374999999999
    assert (stored.config["variant"], stored.config["d_sae"]) == ("topk", 16384)
    assert compare.baseline_for({"model": "org/unheard-of"}) is None


def test_sectioned_file_of_the_ai_scientist_template(tmp_path):
    """Fails if a section is filed under the wrong eval, settings pass for metrics, or core's old shape is not known.

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
        "scr.scr_metric_threshold_10": -1.0, "tpp.tpp_threshold_10_total_metric": 0.25,
        "sparse_probing.sae_top_1_test_accuracy": 0.625,
        "sparse_probing.sae_top_100_test_accuracy": None, "unlearning.unlearning_score": 0.001,
        "training.final_loss": None}
    evals = found.config["evals"]
    assert evals["core"] == {"context_size": 128} and evals["absorption"]["max_k_value"] == 10
    assert (found.config["steps"], found.config["d_sae"], found.config["d_in"]) == (2441, 16384, 2304)
    assert warnings(found) == []

    document["training results for layer 19"] = {
        "final_info": {"training_steps": 7, "layer": 19},
        "core evaluation results": {"metrics": {"sparsity": {"l0": 3.5}}}}
    (tmp_path / "final_info.json").write_text(json.dumps(document))
    both = read(tmp_path)
    assert (both["layer_12"].means["core.l0"], both["layer_19"].means["core.l0"]) == (88.5, 3.5)


def test_own_shape_with_a_sweep_and_nan(tmp_path):
    """Fails if NaN stays a number, non-numbers become metrics, or a section's name contradicts its config unsaid."""
    text = """{"layer_3.k_4": {"means": {"core.l0": 4.0, "core.mse": NaN, "note": "x", "ok": true},
               "stderrs": {"core.l0": 0.5}, "config": {"layer": 3, "hook_name": "blocks.3.hook_resid_post"},
               "problems": ["p"]},
               "layer_3.k_8": {"means": {"absorption_first_letter.mean_full_absorption_score": 0.5},
               "config": {"layer": 4}}}"""
    (tmp_path / "x.json").write_text(text)
    four, eight = read(tmp_path / "x.json").values()
    assert four.means == {"core.l0": 4.0, "core.mse": None} and four.stderrs == {"core.l0": 0.5}
    assert four.problems == ["p", "core.mse is nan in the file"] and four.name == "x layer_3.k_4"
    assert eight.means == {"absorption.mean_full_absorption_score": 0.5}
    assert warnings(four) == [] and "disagree on the layer" in warnings(eight)[0]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"a": {"b": 1}}', '{"training_tokens": 5, "hook_name": "blocks.1.x"}',
                                  "not json"])
def test_what_records_no_run_is_refused(tmp_path, text):
    """Fails if some other JSON file, an SAE's cfg.json for one, passes for an empty run."""
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json .*\n"):
        read(tmp_path / "f.json")


def test_a_trailing_slash_is_no_part_of_a_models_name():
    """Fails if a path with one is called by nothing, so that no baseline is found for it."""
    assert slug("x/") == "x"


def test_a_failed_run_says_why(tmp_path):
    """Fails if a folder without results is not explained by its error.json."""
    folder.write_json(tmp_path / "error.json", {"phase": "preflight", "message": "NaN loss\nmore"})
    with pytest.raises(FileNotFoundError, match="failed in its phase preflight, NaN loss"):
        read(tmp_path)


def test_what_has_no_result_is_said(tmp_path):
    """Fails if a run under way, killed or interrupted, a folder of runs and one of none are told alike, or wrongly."""
    def said(path) -> str:
        with pytest.raises(FileNotFoundError) as found:
            read(path)
        text = in_a_line(found.value)
        assert text.startswith(str(path)) and "has no final_info.json" in text and "\n" not in text
        return text

    run = tmp_path / "run_1"
    assert "is no run's folder" in said(tmp_path) and "give the folder of a finished run" in said(tmp_path)
    folder.write_json(run / "run_info.json", {"status": "running", "phase": "training"})
    assert "was killed in its phase training" in said(run) and said(run).endswith("began it continues it")
    lock = filelock.FileLock(run / folder.LOCK)
    lock.acquire()
    folder.write_json(run / "progress.json", {"phase": "evaluation", "share": 0.4375})
    assert "is under way, in its phase evaluation, 44% of it done" in said(run)
    assert said(run).endswith("wait for its end")
    lock.release()
    folder.write_json(run / "run_info.json", {"status": "interrupted", "phase": "training"})
    assert "was interrupted in its phase training" in said(run)
    (run / "run_info.json").write_text("[1")
    assert "is no run's folder" in said(run)
    folder.write_json(run / "final_info.json", {"layer_1": {"means": {"core.l0": 1.0}}})
    assert said(tmp_path).endswith("give one of those in it: run_1")
