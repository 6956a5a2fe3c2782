"""Dashboards for Neuronpedia, held against SAEDashboard's own classes and against figures counted by hand."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from evals.dashboards import passages
from runs import features, neuronpedia
from tests.evals import test_dashboards as made
from tests.pages import boards


@pytest.fixture(scope="module")
def package():
    """The folder of the installed SAEDashboard, which is not imported: most of what it needs is not there."""
    found = importlib.util.find_spec("sae_dashboard")
    if found is None:
        pytest.skip("SAEDashboard is not installed: pip install --no-deps sae-dashboard==0.8.0")
    return Path(found.submodule_search_locations[0])


def file_of(package, name):
    """A module of SAEDashboard that needs nothing of it."""
    spec = importlib.util.spec_from_file_location(f"saedashboard_{name}", package / f"neuronpedia/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encoder_of(package, classes):
    """SAEDashboard's JSON encoder, out of a file that imports more than is there."""
    import numpy as np

    tree = ast.parse((package / "neuronpedia/neuronpedia_converter.py").read_text(encoding="utf-8"))
    tree.body = [part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == "NpEncoder"]
    namespace = {"json": json, "np": np, "Any": object, "NeuronpediaDashboardBatch": classes.NeuronpediaDashboardBatch}
    exec(compile(tree, "NpEncoder", "exec"), namespace)
    return namespace["NpEncoder"]


def written(tmp_path, board):
    """The folder that a run with this board alone gives."""
    features.write(tmp_path / "run_1", board)
    assert neuronpedia.main([str(tmp_path / "run_1")]) == 0
    (folder,) = (tmp_path / "run_1_neuronpedia").iterdir()
    return folder


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def small():
    """A board of three features on 100 tokens, one of which has a dashboard, of known figures."""
    counts = [0] * 50
    counts[2], counts[7], counts[49] = 6, 3, 1  # activations of .4–.6, 1.4–1.6 and 9.8–10: 10 tokens fire
    edges = [i / 5 for i in range(51)]
    context = {"tokens": [0, 1, 0], "values": [[1, 10.0], [2, 0.5]], "peak": 1, "row": 0, "cut": [False, True]}
    groups = [{"name": "top", "from": 10.0, "to": 10.0, "contexts": [context]},
              {"name": "interval 2", "from": 1.0, "to": 2.0, "contexts": [context]},
              {"name": "interval 1", "from": 0.0, "to": 1.0, "contexts": [context]}]
    told = {"why": ["random"], "density": 0.1, "max": 10.0, "groups": groups,
            "histogram": {"edges": edges, "counts": counts},
            "logits": {"top": [["a\0", 2.5]], "bottom": [["b", -1.5]], "edges": [i - 25 for i in range(51)],
                       "counts": [1] * 50},
            "own": [], "theirs": [], "cofiring": [[0, 0.25]], "classes": [], "letters": [],
            "explanation": "names of cats", "score": 0.8}
    whole, others = boards.board(features=16384, boards=0), [0.2] * 16381
    return whole | {
        "sae": "layer_9.k_20", "variant": "my variant!", "model": "google/gemma-2-2b",
        "vocab": ["a\0", "b"], "features": {"2": told}, "text": {"dataset": "held-out", "tokens": 100, "rows": 4,
                                                                 "context": 25},
        "list": whole["list"] | {"density": [0.0, 0.2, 0.1, *others], "max": [0.0, 4.0, 10.0, *others]}}


def test_every_field_means_what_it_says(tmp_path):
    """Fails if a count, share, bound, place or name is another than by hand from the board."""
    folder = written(tmp_path, small())
    assert folder.name == "gemma-2-2b_my-variant-res-16k_blocks.9.hook_resid_post_16384_k_20"
    batch = read(folder / "batch-0.json")
    assert {key: batch[key] for key in ("model_id", "layer", "sae_set", "sae_id_suffix")} == {
        "model_id": "gemma-2-2b", "layer": 9, "sae_set": "my-variant-res-16k", "sae_id_suffix": "k_20"}
    (found,) = batch["features"]
    assert found["feature_index"] == 2 and found["frac_nonzero"] == 0.1
    assert (found["n_prompts_total"], found["n_tokens_in_prompt"], found["dataset"]) == (4, 25, "held-out")
    bins = [(one["bin_min"], one["bin_max"], round(one["bin_contains"], 9)) for one in found["activations"]]
    # 3 of 100 tokens between 1 and 2; 6 between 0 and 1, and the 90 that do not fire
    assert bins == [(-1, 10, -1), (1, 2, 0.03), (0, 1, 0.96)]
    assert found["activations"][0]["values"] == [0, 10, 0.5]
    assert found["activations"][0]["tokens"] == ["a\ufffd", "b", "a\ufffd"]
    assert found["activations"][0]["qualifying_token_index"] == 1
    assert found["freq_hist_data_bar_values"][:2] == pytest.approx([0.1, 0.3])
    assert found["freq_hist_data_bar_heights"][2] == 6 and len(found["freq_hist_data_bar_heights"]) == 50
    assert found["logits_hist_data_bar_values"][0] == -24.5 and found["logits_hist_data_bar_heights"] == [1] * 50
    assert (found["pos_str"], found["pos_values"]) == (["a\ufffd"], [2.5])
    assert (found["neg_str"], found["neg_values"]) == (["b"], [-1.5])
    assert (found["correlated_features_indices"], found["correlated_features_pearson"]) == ([0], [0.25])
    # of the live features one has no dashboard: Neuronpedia would make it a dead one, were it skipped
    assert read(folder / "skipped_indexes.json")["skipped_indexes"] == [0]
    (line,) = (folder / "explanations.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"modelId": "gemma-2-2b", "layer": "9-my-variant-res-16k__k_20", "index": "2",
                                "description": "names of cats"}


def test_activations_of_either_sign_count_by_size():
    """Fails if tokens of negative activations are missing from an interval of sizes, or a bar is counted twice."""
    assert neuronpedia.overlap(-3, -2, 2, 3) == 1 and neuronpedia.overlap(-3, -2, 0, 2) == 0
    assert neuronpedia.overlap(-1, 1, 0, 0.5) == 0.5 and neuronpedia.overlap(1, 3, 2, 6) == 0.5


def test_bins_of_negative_activations_are_counted(tmp_path, monkeypatch):
    """Fails if bins of features that fire with negative values alone are upside down, or hold another share."""
    monkeypatch.setattr(passages, "heard", lambda *about: [])
    setup, sae = made.setup_of(tmp_path), made.turned(made.trained(made.TopK))
    board, (_, acts) = made.one_board(setup, sae), made.by_hand(setup, sae)
    assert max(board["list"]["max"]) <= 0
    checked = 0
    for index in map(int, board["features"]):
        sizes = [abs(fired.get(index, 0.0)) for fired in acts.values()]
        top, *bins = {(one["bin_min"], one["bin_max"]): one["bin_contains"]
                      for one in neuronpedia.feature(board, index)["activations"]}.items()
        assert top == ((-1, pytest.approx(max(sizes), rel=1e-3)), -1)
        for (low, high), share in bins:
            number = round(10 * high / max(sizes))  # the bounds themselves have four digits
            assert (low, high) == pytest.approx((max(sizes) * (number - 1) / 10, max(sizes) * number / 10), rel=1e-3)
            within = sum(number - 1 < 10 * size / max(sizes) <= number for size in sizes)
            if number == 1:
                within += sizes.count(0.0)
            assert share == pytest.approx(within / len(sizes), abs=0.5 / len(sizes))
            checked += 1
    assert checked > 40


def types_of(value, place=""):
    """{place: type} of everything in a document, its numbers of lists left out."""
    if isinstance(value, dict):
        return {key: kind for name, part in value.items() for key, kind in types_of(part, f"{place}.{name}").items()}
    if isinstance(value, list):
        return {key: kind for part in value for key, kind in types_of(part, f"{place}[]").items()}
    return {place: type(value)}


@pytest.mark.parametrize("hostile", [False, True])
def test_saedashboard_reads_and_writes_the_same(package, tmp_path, hostile):
    """Fails if its classes lack a field of ours, have one more, would write another document, or hold other types."""
    classes = file_of(package, "neuronpedia_dashboard")
    folder = written(tmp_path, boards.board(features=300, boards=150, hostile=hostile))
    sizes = []
    for number in range(2):
        ours = read(folder / f"batch-{number}.json")
        theirs = classes.NeuronpediaDashboardBatch(**ours)
        assert theirs.to_dict() == ours
        assert json.loads(json.dumps(theirs, cls=encoder_of(package, classes))) == ours
        assert classes.NeuronpediaDashboardBatch().to_dict().keys() == ours.keys()
        assert classes.NeuronpediaDashboardFeature().to_dict().keys() == ours["features"][0].keys()
        whole = {"layer": int, "feature_index": int, "n_prompts_total": int, "n_tokens_in_prompt": int,
                 "qualifying_token_index": int, "correlated_features_indices[]": int}
        texts = {"model_id", "sae_set", "dataset", "tokens[]", "pos_str[]", "neg_str[]"}
        for place, kind in types_of(ours).items():
            name = place.rpartition(".")[2]
            if name != "sae_id_suffix":
                assert kind is (str if name in texts else whole.get(name, float)), place
        sizes.append(len(ours["features"]))
    assert sizes == [128, 22]
    config = file_of(package, "neuronpedia_runner_config")
    assert config.NeuronpediaRunnerConfig(**read(folder / "run_settings.json")).n_quantiles == 10
    assert "\0" not in "".join(json.loads(json.dumps(ours["features"][0]["activations"][0]["tokens"])))


def test_refused_in_a_line(tmp_path, capsys):
    """Fails if a run without dashboards, an unknown SAE or a folder that holds something is not refused in one line."""
    def said(*arguments):
        assert neuronpedia.main([str(argument) for argument in arguments]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    run = tmp_path / "run_1"
    assert "there is no folder" in said(run)
    run.mkdir()
    assert "is no run's folder" in said(run)
    (run / "final_info.json").touch()
    assert "has no dashboards" in said(run)
    features.write(run, boards.board(sae="layer_0", text=False))
    assert "its model reads no text" in said(run)
    features.write(run, boards.board())
    assert "there are layer_0, layer_9" in said(run, "--sae", "layer_8")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes").write_text("mine")
    assert "is not empty" in said(run, "--sae", "layer_9", "--out", out)
    assert [file.name for file in out.iterdir()] == ["notes"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "run_1"]  # no half-written folder is left
