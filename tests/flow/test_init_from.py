"""Runs that start from a trained SAE: evaluated as it is, or trained further."""

import json

import pytest
import torch

import experiment
import variants
import variants.kit.saving
from tests.small_run import command
from variants.kit.trained import TrainedSAE

pytestmark = pytest.mark.usefixtures("no_pages")


def means(out):
    return json.loads((out / "final_info.json").read_text())["layer_2"]["means"]


@pytest.mark.slow
def test_an_earlier_run_evaluated_again_gives_its_own_figures(reference, cache, tmp_path):
    """Fails if the weights, their scale or the layer are not the run's: width, variant and k are taken from it."""
    again = ["--profile=tiny", "--num_tokens=0", f"--init_from={reference}", "--evals=core", "--device=cpu",
             f"--cache_dir={cache}"]
    assert experiment.main([*again, f"--out_dir={tmp_path / 'again'}"]) == 0
    first, second = means(reference), means(tmp_path / "again")
    core = {k for k in first if k.startswith("core.")}
    assert core and not any(k.startswith("training.") for k in second)
    for key in core:
        assert second[key] == pytest.approx(first[key], rel=2e-4, abs=1e-5), key
    config = json.loads((tmp_path / "again/final_info.json").read_text())["layer_2"]["config"]
    assert config["init_from"] == "reference" and config["steps"] == 0 and config["hyper"]["k"] == 32
    text = (tmp_path / "again/log.txt").read_text()
    assert "untrained" not in text and "no sign of training" not in text


@pytest.mark.slow
def test_trained_further_it_begins_where_it_was(reference, cache, tmp_path):
    """Fails if the weights are in other units or initialised anew: first losses would be those of a fresh SAE."""
    further = command(tmp_path / "further", cache, f"--init_from={reference}/sae/layer_2", "--evals=none", "--lr=1e-5",
                      "--log_lines=38")
    assert experiment.main(further) == 0
    losses = {run: [float(line.split(",")[3]) for line in (run / "training_log.csv").read_text().splitlines()[1:]]
              for run in (reference, tmp_path / "further")}
    assert losses[tmp_path / "further"][0] < 1.2 * losses[reference][-1] < 0.6 * losses[reference][0]


@pytest.mark.slow
def test_a_sweep_is_taken_over_sae_by_sae(cache, tmp_path):
    """Fails if SAEs of several layers and hyper-parameters are mixed up."""
    assert experiment.main(command(tmp_path / "many", cache, "--layers=1,2", "--sweep=k=8,16", "--evals=core")) == 0
    again = ["--profile=tiny", "--num_tokens=0", f"--init_from={tmp_path / 'many'}", "--evals=core", "--device=cpu",
             f"--cache_dir={cache}"]
    assert experiment.main([*again, f"--out_dir={tmp_path / 'again'}"]) == 0
    first, second = (json.loads((tmp_path / name / "final_info.json").read_text()) for name in ("many", "again"))
    assert first.keys() == second.keys() == {f"layer_{n}.k_{k}" for n in (1, 2) for k in (8, 16)}
    for key in first:
        assert second[key]["means"]["core.r2"] == pytest.approx(first[key]["means"]["core.r2"], rel=1e-3)


@pytest.mark.slow
def test_dictionary_learnings_file_is_evaluated_and_read_by_saelens(cache, tmp_path):
    """Fails if ae.pt needs anything but --init_from, or the saved SAE's features are not its own, written out here."""
    from sae_lens import SAE as SAELens

    torch.manual_seed(0)
    state = {"encoder.weight": torch.randn(96, 32), "encoder.bias": torch.randn(96),
             "decoder.weight": torch.randn(32, 96), "bias": torch.randn(32)}
    state["decoder.weight"] /= state["decoder.weight"].norm(dim=0)
    (tmp_path / "ae").mkdir()
    torch.save(state, tmp_path / "ae/ae.pt")
    trainer = dict(dict_class="AutoEncoder", layer=2, lm_name="tiny")
    (tmp_path / "ae/config.json").write_text(json.dumps(dict(trainer=trainer)))
    run = ["--profile=tiny", "--num_tokens=0", f"--init_from={tmp_path / 'ae'}", "--evals=none", "--device=cpu",
           f"--cache_dir={cache}"]
    assert experiment.main([*run, f"--out_dir={tmp_path / 'run'}"]) == 0
    x = torch.randn(20, 32)
    expected = torch.relu((x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"])
    assert torch.allclose(SAELens.load_from_disk(tmp_path / "run/sae/layer_2").encode(x), expected, rtol=1e-4,
                          atol=1e-4)


@pytest.mark.slow
def test_what_cannot_be_started_from_is_said_before_anything_is_loaded(cache, tmp_path, capsys):
    """Fails if 0 tokens pass without an SAE, or a wrong place or width is noticed late or leaves no way out."""
    wide = variants.build(variants.load("topk"), 12, 40, dict(k=4))
    variants.kit.saving.save_sae(tmp_path / "wide", wide, 1.0, variants.path("topk"), dict(k=4), {})
    for arguments, words in ((["--num_tokens=0"], "num_tokens=0 is below 1"),
                             (["--init_from=nowhere"], "no such folder"),
                             ([f"--init_from={tmp_path / 'wide'}"], "an SAE of 12 dimensions")):
        assert experiment.main([*command(tmp_path / "run", cache), *arguments]) == 1
        assert words in capsys.readouterr().err


def test_norms_are_folded_before_a_variant_that_keeps_them_at_one_trains_further(tmp_path):
    """Fails if foreign decoder norms change the first step's features, or a top-k whose choice they decide passes."""
    from variants.kit import interchange

    torch.manual_seed(0)
    for name, hyper, possible in (("standard", {}, True), ("topk", dict(k=4), False)):
        sae = variants.build(variants.load(name), 12, 40, hyper)
        sae.W_dec.data *= torch.linspace(0.5, 2, 40)[:, None]
        x = torch.randn(30, 12)
        z, wanted = TrainedSAE(sae, 1.0).encode(x), sae.decode(sae.encode(x))
        if not possible:
            with pytest.raises(ValueError, match="norms 0.5 to 2"):
                interchange.fold_norms(sae, "there")
            continue
        interchange.fold_norms(sae, "there")
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(40)) and sae.W_dec.requires_grad
        assert torch.allclose(sae.encode(x), z, atol=1e-5)
        assert torch.allclose(sae.decode(sae.encode(x)), wanted, atol=1e-5)


def test_a_run_from_a_run_is_called_by_the_variant(tmp_path):
    """Fails if what is evaluated from a run's folder is called by its copy's name, `variant`, in results."""
    (tmp_path / "variant.py").write_text("")
    assert variants.title(str(tmp_path / "variant.py")) == "variant" and variants.title("topk") == "topk"
    (tmp_path / "run_info.json").write_text('{"settings": {"variant": "variants/mine.py"}}')
    assert variants.title(str(tmp_path / "variant.py")) == "mine"
