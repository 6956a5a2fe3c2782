"""What a run keeps of its boards, and what it takes away; boards that are made later."""

import json
import shutil
from types import SimpleNamespace

import pytest

from evals import dashboards
from runs import dashboards as later
from runs import features, report
from runs.reading import Run
from tests import small_run
from tests.evals import test_dashboards
from tests.pages import boards


def compared(out, **config):
    """A run's SAE without a baseline, as far as boards ask."""
    run = Run("run_1", {}, {}, config, [], out / "final_info.json", section="layer_9")
    return [SimpleNamespace(saes=[SimpleNamespace(run=run, new=lambda: None)])]


def test_pages_of_an_earlier_training_go(tmp_path):
    """Fails if a page outlives the board that it shows, or a file that is not ours is lost."""
    features.write(tmp_path, boards.board())
    own = tmp_path / "features/mine.html"
    for file in (own, tmp_path / "features/layer_9.html", tmp_path / "features/layer_3.html"):
        file.write_text("of before")
    features.make(tmp_path, {"layer_3": ()}, [], lambda line: None)
    assert list((tmp_path / "features").iterdir()) == [own] and features.kept(tmp_path) == []


def test_a_board_says_the_name_of_its_model(tmp_path, monkeypatch):
    """Fails if the path of a local model is in a board, where the run's results have its name."""
    lm = SimpleNamespace(name="/some/dir/mymodel", device="cpu")
    asked = {}

    def made(looked_at, about, say):
        asked.update(about)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(dashboards, "boards", made)
        out = tmp_path.resolve()
        features.make(out, {"layer_9": (SimpleNamespace(lm=lm), None)}, compared(out, model="mymodel"), print)
    assert asked["layer_9"].model == "mymodel"
    monkeypatch.setattr(dashboards.passages, "heard", lambda *about: [])
    setup = test_dashboards.setup_of(tmp_path / "cache")
    setup.lm.name = lm.name
    sae = test_dashboards.trained(test_dashboards.TopK)
    assert test_dashboards.one_board(setup, sae, asked["layer_9"])["model"] == "mymodel"


def test_a_damaged_eval_is_named(tmp_path):
    """Fails if what an eval wrote is taken for another thing, or does not say which file it is."""
    file = tmp_path / "eval_results/absorption/x_layer_9_eval_results.json"
    file.parent.mkdir(parents=True)
    for text in ("{", "{}", '{"eval_result_unstructured": {"split_features": {"s": [1]}}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="layer_9_eval_results.json is not what the eval absorption writes"):
            features.letters_of(tmp_path, "layer_9")
    file.write_text('{"eval_result_unstructured": {"split_features": {"s": {"split_features": [4]}}}}')
    assert features.letters_of(tmp_path, "layer_9") == {"s": [4]}


@pytest.mark.slow
def test_boards_made_later_are_those_of_the_run(reference, cache, tmp_path, capsys):
    """Fails if a byte of a board differs from the run's own, or one that is there is overwritten unasked."""
    out = tmp_path / reference.name
    shutil.copytree(reference, out)
    own = (out / "features/layer_2.json.gz").read_bytes()
    shutil.rmtree(out / "features")
    (out / "report.html").unlink()
    command = [str(out), f"--cache_dir={cache}"]
    assert later.main(command) == 0
    made = {file.name: file.read_bytes() for file in (out / "features").iterdir()}
    assert made["layer_2.json.gz"] == own and set(made) == {"layer_2.json.gz", "layer_2.html"}
    whole = tmp_path / "whole" / reference.name
    shutil.copytree(reference, whole)
    assert (out / "report.html").read_bytes() == report.again(whole).read_bytes()

    other = boards.board("layer_2")
    features.write(out, other)
    assert later.main(command) == 1
    assert features.read(out, "layer_2") == other
    assert "has boards of layer_2: --again makes them again\n" in capsys.readouterr().err
    info = json.loads((out / "run_info.json").read_text())
    changed = info | {"inputs": info["inputs"] | {"heldout texts": "0"}}
    (out / "run_info.json").write_text(json.dumps(changed))
    assert later.main([*command, "--again"]) == 1
    assert "the held-out text is no longer that of the run" in capsys.readouterr().err
    assert features.read(out, "layer_2") == other
    (out / "run_info.json").write_text(json.dumps(info | {"model_digest": "0"}))
    assert later.main([*command, "--again"]) == 1
    assert "boards of another model would not be the run's" in capsys.readouterr().err
    assert features.read(out, "layer_2") == other
    (out / "run_info.json").write_text(json.dumps(info))
    (out / "features/layer_2.json.gz").write_bytes(own[:-9])
    assert later.main(command) == 0 and (out / "features/layer_2.json.gz").read_bytes() == own


@pytest.mark.slow
def test_boards_that_are_lacking_are_made(cache, tmp_path, capsys):
    """Fails if a damaged board keeps a sweep's others from being made, one that is whole is made again unasked, or one
    of more text gives way to one of less.
    """
    import experiment

    out = tmp_path / "run"
    assert experiment.main(small_run.command(out, cache, "--evals=none", "--sweep", "k=4,8")) == 0
    own = {sae: features.place(out, sae).read_bytes() for sae in ("layer_2.k_4", "layer_2.k_8")}
    other = boards.board("layer_2.k_4")
    features.write(out, other)
    features.place(out, "layer_2.k_8").write_bytes(b"damaged")
    command = [str(out), f"--cache_dir={cache}"]
    assert later.main(command) == 0
    assert features.place(out, "layer_2.k_8").read_bytes() == own["layer_2.k_8"]
    assert features.read(out, "layer_2.k_4") == other
    assert later.main(command) == 1
    capsys.readouterr()
    assert other["text"]["tokens"] > features.read(out, "layer_2.k_8")["text"]["tokens"]
    assert later.main([*command, "--again"]) == 0 and features.read(out, "layer_2.k_4") == other
    assert "the board of layer_2.k_4 stays: it was made of more text" in capsys.readouterr().out
    features.place(out, "layer_2.k_4").unlink()
    assert later.main(command) == 0 and features.place(out, "layer_2.k_4").read_bytes() == own["layer_2.k_4"]


@pytest.mark.slow
def test_boards_of_a_model_without_text_are_made_later(cache, tmp_path):
    """Fails if a run on samples of known features is refused what it has itself."""
    import experiment

    out = tmp_path / "run"
    small = ("--profile=synthetic", "--num_tokens=10240", "--d_sae=64", "--hyper=k=4", "--evals=none")
    assert experiment.main([f"--out_dir={out}", f"--cache_dir={cache}", *small]) == 0
    own = features.place(out, "layer_0").read_bytes()
    shutil.rmtree(out / "features")
    assert later.main([str(out), f"--cache_dir={cache}"]) == 0
    assert features.place(out, "layer_0").read_bytes() == own


def test_nothing_to_make_boards_of(tmp_path, capsys):
    """Fails if a folder that is no run ends in more than one line."""
    assert later.main([str(tmp_path)]) == 1 and later.main([str(tmp_path / "none")]) == 1
    assert later.main([]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3
