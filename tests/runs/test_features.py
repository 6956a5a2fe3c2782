"""What a run keeps of its boards, and what it takes away."""

from types import SimpleNamespace

from evals import dashboards
from runs import features
from runs.reading import Run
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
