"""The synthetic model and the eval that knows its features, against SAELens' own figures and by hand."""

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import experiment
import variants
from evals import Setup, ground_truth
from evals.model import synthetic
from evals.texts.numbers import BOS, DRAW, DRAWS
from tests import PROJECT
from variants import base, topk
from variants.kit import saving
from variants.kit.trained import TrainedSAE

pytestmark = pytest.mark.usefixtures("no_pages")

WORLD = dict(num_features=40, hidden_dim=12, max_prob=0.4, min_prob=0.05, total_root_nodes=4, max_depth=2, rank=3)


@pytest.fixture(scope="module")
def lm():
    with contextlib.redirect_stderr(io.StringIO()):
        return synthetic.SyntheticModel(synthetic._made(WORLD), "small", "0", torch.float32)


def setup(lm, n_samples):
    config = dict(n_samples=n_samples)
    return Setup(lm, 0, "blocks.0.hook_resid_post", config, lambda: iter(()), "", None, None, 0, print)


def flat(result):
    return {name: value for group in result.metrics.values() for name, value in group.items()}


def partly_true(lm, F=16):
    """A TopK SAE of which half of the decoder are true features, on activations divided by 3."""
    torch.manual_seed(1)
    sae = topk.SAE(lm.d_model, F, k=4)
    with torch.no_grad():
        sae.W_dec[:F // 2] = lm.features_GD[:F // 2]
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[-2:] = -100.0  # two that never fire
    return sae


def test_equals_saelens(lm, tmp_path):
    """Fails if a metric differs from eval_sae_on_synthetic_data of the saved SAE on the same samples by over 1e-6."""
    from sae_lens import SAE
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    sae, n = partly_true(lm), 6 * DRAW
    metadata = dict(model_name="small", hook_name="blocks.0.hook_resid_post")
    saving.save_sae(tmp_path / "sae", sae, 3.0, variants.path("topk"), dict(k=4), metadata)
    replayed = iter([lm.draw(draw)[1] for draw in DRAWS["heldout"][:6]])
    generator = SimpleNamespace(sample=lambda size: next(replayed))
    theirs = eval_sae_on_synthetic_data(SAE.load_from_disk(tmp_path / "sae"), lm.model.feature_dict, generator, n, DRAW)
    ours = flat(ground_truth.run(setup(lm, n), {"a": saving.load_sae(tmp_path / "sae")})["a"])
    told = dict(f1=theirs.classification.f1_score, precision=theirs.classification.precision,
                recall=theirs.classification.recall, mcc=theirs.mcc, uniqueness=theirs.uniqueness,
                shrinkage=theirs.shrinkage, r2=theirs.explained_variance, l0=theirs.sae_l0, true_l0=theirs.true_l0,
                dead_latents=theirs.dead_latents, frac_alive=1 - theirs.dead_latents / sae.d_sae)
    assert told["dead_latents"] == 2 and 0.05 < told["f1"] < 0.95
    assert ours == pytest.approx(told, abs=1e-6)


class Oracle(torch.nn.Module):
    """Looks up the true features of the samples it is given."""

    def __init__(self, lm, draws):
        super().__init__()
        self.lm = lm
        self.known = {x.numpy().tobytes(): z for draw in draws for x, z in zip(*lm.draw(draw))}

    def encode(self, x):
        return torch.stack([self.known[row.numpy().tobytes()] for row in x])

    def decode(self, z):
        return z @ self.lm.features_GD + self.lm.model.feature_dict.bias.detach()

    @property
    def W_dec(self):
        return self.lm.features_GD


def test_true_features_score_one(lm):
    """Fails if the true features are not scored as found, or a latent's numbers are not those of its feature."""
    oracle = Oracle(lm, DRAWS["heldout"][:5])
    result = ground_truth.run(setup(lm, 5 * DRAW), {"a": oracle})["a"]
    found = flat(result)
    expected = dict.fromkeys(("f1", "precision", "recall", "mcc", "uniqueness", "r2", "shrinkage", "frac_alive"), 1.0)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["l0"] == found["true_l0"] and result.unstructured["latents"]["feature"] == list(range(40))


def test_errors_are_those_of_new_samples(lm):
    """Fails if stated errors are off the spread over other samples by over a third (200 draws, 25 sets of 8)."""
    sae = TrainedSAE(partly_true(lm), 3.0)
    figures, stated = [], []
    for i in range(25):
        asked = setup(lm, 8 * DRAW)
        first = DRAWS["heldout"][8 * i]
        asked.lm.__dict__["draw"] = lambda draw, shift=first - DRAWS["heldout"][0]: type(lm).draw(lm, draw + shift)
        result = ground_truth.run(asked, {"a": sae})["a"]
        figures.append(flat(result))
        stated.append(result.stderrs)
    del lm.__dict__["draw"]
    for name in ("f1", "precision", "recall", "r2", "l0", "shrinkage", "true_l0"):
        spread = torch.tensor([values[name] for values in figures]).double().std()
        told = torch.tensor([values[name] for values in stated]).double().square().mean().sqrt()
        assert 0.66 < told / spread < 1.5, name


def test_a_number_is_always_the_same_sample(lm):
    """Fails if a sample depends on the tokens around its number or on torch's state, or if it changes that state."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    tokens_BT = torch.tensor([[BOS, 5 * DRAW + 3, 9 * DRAW], [BOS, 9 * DRAW, 5 * DRAW + 4]])
    x_BTD = lm.residual(tokens_BT, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(x_BTD[0, 1], lm.draw(5)[0][3]) and torch.equal(x_BTD[1, 2], lm.draw(5)[0][4])
    assert torch.equal(x_BTD[0, 2], x_BTD[1, 1]) and not x_BTD[:, 0].any()
    assert not torch.equal(x_BTD[0, 1], x_BTD[1, 2])


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    """A synthetic model in a folder, as SAELens writes it."""
    folder = tmp_path_factory.mktemp("world")
    lm.model.save(folder)
    return folder


def command(saved, out, cache, *more):
    small = ["--num_tokens=10240", "--block_tokens=6144", "--batch_size=512", "--d_sae=24", "--lr=0.01", "--hyper=k=4"]
    config = json.dumps({"ground_truth": {"n_samples": 5 * DRAW}})
    return ["--profile=synthetic", f"--model={saved}", *small, f"--eval_config={config}", f"--out_dir={out}",
            f"--cache_dir={cache}", "--device=cpu", *more]


def test_a_run_on_known_features(saved, tmp_path, capsys):
    """Fails if the same variant file does not train, save, score and compare on a saved synthetic model."""
    assert experiment.main(command(saved, tmp_path / "run_1", tmp_path / "cache")) == 0
    section = json.loads((tmp_path / "run_1/final_info.json").read_text())["layer_0"]
    assert section["means"]["ground_truth.l0"] == pytest.approx(4, abs=0.2) and not section["problems"]
    assert section["means"]["ground_truth.mcc"] > 0.6 and section["stderrs"]["ground_truth.f1"] > 0
    assert "ground_truth.f1" in capsys.readouterr().out


def test_a_synthetic_model_of_the_hub(saved, hub, tmp_path):
    """Fails if the benchmark's own layout on the hub does not serve, or is fetched a second time."""
    name = "decoderesearch/synth-sae-bench-16k-v2"
    hub.push("model", name, {file.name: file.read_bytes() for file in saved.iterdir()} | {"README.md": b"a card"})
    for out, asked in (("run_1", True), ("run_2", False)):
        hub.reset()
        line = [sys.executable, "experiment.py", *command(name, tmp_path / out, tmp_path / "cache")]
        done = subprocess.run(line, cwd=PROJECT, env=hub.environment(home=tmp_path / "home"), capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert any("synthetic_model.safetensors" in path for _, path, _ in hub.requests) == asked
    info = json.loads((tmp_path / "run_1/run_info.json").read_text())
    assert info["inputs"]["model"] == f"{name}@{hub.commit('model', name)}"
    assert (tmp_path / "run_1/final_info.json").read_bytes() == (tmp_path / "run_2/final_info.json").read_bytes()


@pytest.mark.parametrize("more, said", [
    (["--evals=core"], "core needs a language model"),
    (["--evals=all", "--dataset=tiny"], "draws its samples from the model alone"),
    (["--keep_bos"], "has no BOS"),
    (["--preset=saebench"], "--preset=saebench is none of the profile synthetic"),
    (["--model=tiny-gemma2"], "is no synthetic model"),
    (["--variant=attention_contrastive", "--hyper="], "layers"),
])
def test_what_needs_text_is_refused(saved, tmp_path, capsys, more, said):
    """Fails if what a synthetic model cannot serve is not refused in words before training."""
    assert experiment.main(command(saved, tmp_path / "run_1", tmp_path / "cache", *more)) == 1
    assert said in capsys.readouterr().err


def test_elsewhere_it_is_refused(tmp_path, capsys):
    """Fails if known features are asked for on a language model, or a synthetic model is given text."""
    out = [f"--out_dir={tmp_path}/run_1", f"--cache_dir={tmp_path}/cache", "--device=cpu"]
    assert experiment.main(["--profile=tiny", "--evals=ground_truth", *out]) == 1
    assert "needs known features" in capsys.readouterr().err
    assert experiment.main(["--profile=tiny", "--dataset=embedded", *out]) == 1
    assert "--dataset=embedded is the text of the profile embedded" in capsys.readouterr().err
    assert experiment.main(["--profile=tiny", "--model=synthetic", *out]) == 1
    assert "is a synthetic model, which reads no text" in capsys.readouterr().err


def test_the_model_says_how_sparse(tmp_path):
    """Fails if the L0 that a variant is not told is its own for language models, or one that is told is not taken."""
    def hypers(*flags):
        settings, _ = experiment.resolve(experiment.parse_settings(["--device=cpu", *flags]))
        return experiment.hypers_of(settings, variants.load("topk"))

    assert hypers("--profile=synthetic") == {"": {"k": synthetic.WORLDS["synthetic"]["l0"]}}
    assert hypers("--preset=synth16k") == {"": {"k": 25}}
    assert hypers("--profile=synthetic", "--hyper=k=3") == {"": {"k": 3}}
    assert hypers("--profile=synthetic", "--sweep=k=3,5") == {".k_3": {"k": 3}, ".k_5": {"k": 5}}
    assert hypers("--profile=embedded") == {"": {}}
    sae = topk.SAE(256, 32, k=16)
    metadata = dict(model_name="synthetic", hook_name="blocks.0.hook_resid_post")
    saving.save_sae(tmp_path / "sae", sae, 1.0, variants.path("topk"), dict(k=16), metadata)
    evaluated = hypers("--profile=synthetic", f"--init_from={tmp_path / 'sae'}", "--num_tokens=0")
    assert [hyper["k"] for hyper in evaluated.values()] == [16]  # it stays the SAE that it is


def test_the_large_one_is_the_published():
    """Fails if the settings of --preset synth16k are not those that SAELens' documentation gives for the benchmark."""
    settings, why = experiment.resolve(experiment.parse_settings(["--preset=synth16k", "--device=cpu"]))
    assert (settings.profile, settings.model, settings.d_sae) == ("synthetic", "synth16k", 4096)
    assert (settings.num_tokens, settings.batch_size, settings.lr) == (200_000_000, 1024, 3e-4)
    world = synthetic.WORLDS["synth16k"]
    assert (world["num_features"], world["hidden_dim"], world["total_root_nodes"]) == (16384, 768, 128)
    assert (world["max_prob"], world["min_prob"], world["max_depth"], world["rank"]) == (0.4, 5e-4, 3, 25)


def test_every_latent_dead():
    """Fails if an SAE that never fires ends in an error, or in another F1 than 0."""
    lm = SimpleNamespace(d_model=3, features_GD=torch.eye(3), draw=lambda d: (torch.eye(3).repeat(4, 1),) * 2)
    dead = base.SAE(3, 4)
    with torch.no_grad():
        dead.b_enc -= 100
    found = flat(ground_truth.run(setup(lm, 5 * DRAW), {"a": TrainedSAE(dead, 1.0)})["a"])
    assert (found["f1"], found["frac_alive"], found["l0"], found["dead_latents"]) == (0, 0, 0, 4)
