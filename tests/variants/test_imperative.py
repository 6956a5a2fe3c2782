"""The imperative form: foreign trainers run as variants, as their own library would run them,
and can be interrupted and saved.
"""

import io
import json
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

import experiment
import variants
import variants.kit.saving
from tests import FIXTURES
from tests.small_run import command, start, wait_for
from tests.variants.common import GEMMA, line_of, preflight
from variants import base
from variants.kit import trainer_state, trainers
from variants.kit.hyper import hyperparameters
from variants.preflight import messages
from variants.preflight.trial import synthetic

pytestmark = pytest.mark.usefixtures("no_pages")

HABITS = sorted((FIXTURES / "imperative_variants").glob("*.py"))
BROKEN = FIXTURES / "broken_imperative_variants"
SETTING = dict(steps=60, lr=3e-3, seed=0, device="cpu", layer=3, lm_name="tiny")


def built(file, hyper=None, **setting):
    return variants.build(variants.load(str(file)), 24, 160, hyper or {}, SETTING | setting)


def steps(sae, x_SBD, first=0, last=60):
    state = trainer_state.TrainerState(sae)
    return [experiment.train_step(sae, state, base.Batch(x_SBD[i].clone()),
                                  base.Progress(i, 60, i * 56, 60 * 56))[0].item()
            for i in range(first, last)]


@pytest.fixture(scope="module")
def x_SBD():
    return synthetic(60 * 56, 24, 0).reshape(60, 56, 24)


# ------------------------------------------------------------------------------------------------ dictionary_learning


@pytest.fixture
def library(monkeypatch):
    """dictionary_learning without two packages that it imports for other purposes: reading models, a server's log."""
    for name, attribute in (("nnsight", "LanguageModel"), ("wandb", "init")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    return pytest.importorskip("dictionary_learning")


@pytest.mark.slow
@pytest.mark.parametrize("name, trainer, hyper", [
    ("standard", "StandardTrainer", {}), ("standard", "StandardTrainerAprilUpdate", {}),
    ("top_k", "TopKTrainer", dict(k=6)), ("batch_top_k", "BatchTopKTrainer", dict(k=6)),
    ("jumprelu", "JumpReluTrainer", {}), ("gdm", "GatedSAETrainer", {}),
    ("p_anneal", "PAnnealTrainer", dict(p_end=0.2, sparsity_function="Lp^p")),
    ("gated_anneal", "GatedAnnealTrainer", dict(p_end=0.2)),
    ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", dict(k=6, group_fractions=[0.25, 0.75]))])
def test_the_librarys_trainers_follow_its_own_loop(library, tmp_path, x_SBD, name, trainer, hyper):
    """Fails if a trainer gets other batches, steps or keywords than in its library, or another random state."""
    from dictionary_learning.training import trainSAE

    file = tmp_path / "mine.py"
    file.write_text(f"from dictionary_learning.trainers.{name} import {trainer} as Trainer\n")
    if not trainer.startswith("Standard"):  # the library's own file, which holds one trainer
        file = Path(library.__file__).parent / f"trainers/{name}.py"
    module = variants.load(str(file))
    assert module.SAE.trainer_class.__name__ == trainer
    given, theirs = trainers.keywords(module.SAE.trainer_class, 24, 160, SETTING, hyper), []

    def remembered(**config):
        torch.manual_seed(0)
        theirs.append(module.SAE.trainer_class(**config))
        return theirs[0]

    trainSAE(list(x_SBD.clone()), [dict(given, trainer=remembered)], steps=60, device="cpu")
    torch.manual_seed(0)
    sae = variants.build(module, 24, 160, hyper, SETTING)
    losses = steps(sae, x_SBD)
    assert losses[-1] < losses[0]
    for key, tensor in theirs[0].ae.state_dict().items():
        assert torch.equal(tensor, sae.ae.state_dict()[key]), key


# ------------------------------------------------------------------------------------------------ what people write


@pytest.mark.slow
@pytest.mark.parametrize("file", HABITS, ids=lambda p: p.stem)
def test_pasted_code_runs_to_a_finished_evaluation(file, tmp_path, tmp_path_factory):
    """Fails if code in the style of this workflow's history needs an edit to run: one habit per file."""
    cache = tmp_path_factory.getbasetemp() / "cache0"  # shared by the files
    arguments = ["--profile=tiny", "--num_tokens=8192", "--device=cpu", "--evals=core", f"--cache_dir={cache}",
                 f"--variant={file}"]
    assert experiment.main([*arguments, f"--out_dir={tmp_path / 'run'}"]) == 0
    means = json.loads((tmp_path / "run/final_info.json").read_text())["layer_2"]["means"]
    assert 0 < means["core.l0"] < 100 and means["core.frac_alive"] > 0.3 and means["core.r2"] > 0.2
    loaded = variants.kit.saving.load_sae(tmp_path / "run/sae/layer_2", trust_code=True)
    assert loaded.W_dec.shape[1] == 32
    assert torch.allclose(loaded.W_dec.norm(dim=1), torch.ones(len(loaded.W_dec)), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("file", HABITS, ids=lambda p: p.stem)
def test_a_trainer_continues_from_its_state_as_if_never_interrupted(file, x_SBD):
    """Fails if what training changes on the trainer is not in the checkpoint: tensors, counters, queues, optimisers."""
    whole = built(file)
    steps(whole, x_SBD)
    half = built(file)
    steps(half, x_SBD, 0, 31)
    kept, rng = io.BytesIO(), torch.get_rng_state()
    torch.save(dict(sae=half.state_dict(), trainer=trainer_state.TrainerState(half).state_dict()), kept)
    kept.seek(0)
    state, again = torch.load(kept, weights_only=True), built(file)
    again.load_state_dict(state["sae"])
    trainer_state.TrainerState(again).load_state_dict(state["trainer"])
    torch.set_rng_state(rng)
    steps(again, x_SBD, 31)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.slow
def test_a_killed_trainer_ends_in_the_same_bytes(tmp_path):
    """Fails if the run's checkpoint lacks the trainer: resampling counters and an optimiser's moments decide."""
    file = next(f for f in HABITS if f.stem == "resampling")
    more = [tmp_path / "cache", f"--variant={file}", "--evals=none", "--checkpoint_seconds=0"]
    process = start(tmp_path / "killed", *more)
    wait_for(tmp_path / "killed/checkpoint.pt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for name in ("whole", "killed"):
        assert experiment.main(command(tmp_path / name, *more)) == 0
    assert "continuing" in (tmp_path / "killed/log.txt").read_text()
    assert (tmp_path / "killed/final_info.json").read_bytes() == (tmp_path / "whole/final_info.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name, place, words", [
    ("two_trainers", None, ["2 classes with an update method", "in line ", "Trainer ="]),
    ("no_update", None, ["no method update", "train_step"]),
    ("no_ae", "def __init__", ["no module called ae", "self.ae = self.model"]),
    ("missing_argument", "def __init__", ["'expansion'", "--hyper expansion="]),
    ("wrong_attribute", "self.ae.W_decoder", ["no attribute 'W_decoder'", "'W_dec'"]),
    ("nan_update", "def update", ["became NaN in update"]),
    ("frozen", "def update", ["changes no parameter"]),
    ("hidden_attribute", "self.b_decoder", ["'CustomSAE' object has no attribute 'b_decoder'", "'b_dec'"]),
    ("tensor_key", "state_dict()", ["a tensor of shape [24, 160] is no key", "names or numbers"]),
    ("zeros", "nn.init.zeros_", ["no feature ever fires: W_dec and W_enc start", "rows of unit norm"]),
    ("undefined_name", "einops_reduce", ["'einops_reduce' is not defined", "import or define einops_reduce"]),
    ("missing_package", "not_installed_here import", ["No module named", "pip install not-installed-here"]),
    ("third_argument", "def update", ["wrong arguments", "needs a default"]),
    ("contexts_without_batch", "def update", ["cannot be given them", "activations, batch)"]),
    ("endless", "self.steps_done > 9", ["nothing came of it within 1 s", "a loop without an end"]),
])
def test_broken_trainer_ends_in_its_message(name, place, words, monkeypatch):
    """Fails if the mistake passes the preflight, or is reported as another one or elsewhere."""
    file = BROKEN / f"{name}.py"
    monkeypatch.setattr(messages, "SECONDS", 1.0)
    with pytest.raises(Exception) as caught:
        preflight(file, GEMMA)
    message = str(caught.value)
    lines = [i for i, line in enumerate(file.read_text().splitlines(), 1) if place and place in line]
    assert not place or any(message.startswith(f"{file.name}:{line}: ") for line in lines), message
    assert all(w in message for w in words) and len(message.split("\n")) == 2 and len(message) < 700, message
    assert "B = 56" not in message and (name != "tensor_key" or isinstance(caught.value, KeyError))


# ------------------------------------------------------------------------------------------------ the rules, one by one

PASTED = """
class CustomSAE(nn.Module):
    def __init__(self, d_in, d_sae):
        super().__init__()
        self.W_enc = nn.Parameter(t.randn(d_in, d_sae) * 0.1)
        self.W_dec = nn.Parameter(self.W_enc.data.T.clone())
    def encode(self, x):
        return F.relu(x @ self.W_enc)
    def decode(self, z):
        return z @ self.W_dec

class CustomTrainer(SAETrainer):
    def __init__(self, activation_dim, dict_size, lr, warmup_steps=400, steps=None, l1=0.01, label="x"):
        super().__init__(seed=None)
        self.seen, self.answer = dict(warmup=warmup_steps, steps=steps, lr=lr, l1=l1), RETURN
        self.ae = CustomSAE(activation_dim, dict_size)
        self.optimizer = ConstrainedAdam(self.ae.parameters(), [self.ae.W_dec], lr=lr)
    def update(self, step, activations):
        z = self.ae.encode(activations)
        loss = (activations - self.ae.decode(z)).pow(2).sum(-1).mean() + self.seen["l1"] * z.sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.answer(loss)
"""


@pytest.mark.parametrize("answer, expected", [
    ("lambda loss: None", (False, ["reconstruction"])), ("lambda loss: loss.item()", (True, [])),
    ("lambda loss: loss", (True, [])), ("lambda loss: {'loss': loss.item(), 'l1': 0.5, 'note': 'text'}",
                                        (True, ["l1"]))])
def test_update_may_return_nothing_a_number_or_a_dict(tmp_path, x_SBD, answer, expected):
    """Fails if one of the forms is refused or its numbers are lost; also for a file pasted without a single import."""
    file = tmp_path / "pasted.py"
    file.write_text(PASTED.replace("RETURN", answer))
    sae = built(file)
    loss, terms = experiment.train_step(sae, None, base.Batch(x_SBD[0]), base.Progress(0, 60, 0, 60))
    with torch.no_grad():
        z = sae.ae.encode(x_SBD[0])
    assert list(terms) == expected[1] and loss.isfinite()
    assert torch.allclose(sae.ae.W_dec.norm(dim=1), torch.ones(160), atol=1e-5)  # rows are features, not columns
    assert (z > 0).any()


def test_keywords_by_the_rule(tmp_path):
    """Fails if a keyword is passed that is not accepted, a schedule outlasts the run, or --hyper does not count."""
    file = tmp_path / "pasted.py"
    file.write_text(PASTED.replace("RETURN", "None"))
    assert built(file).trainer.seen == dict(warmup=3, steps=60, lr=3e-3, l1=0.01)
    assert built(file, steps=100_000, lr=None).trainer.seen == dict(warmup=400, steps=100_000, lr=3e-4, l1=0.01)
    assert built(file, dict(warmup_steps=50, l1=0.5)).trainer.seen == dict(warmup=50, steps=60, lr=3e-3, l1=0.5)
    assert hyperparameters(variants.load(str(file))) == dict(warmup_steps=400, l1=0.01, label="x")


def test_numbers_named_for_logging_are_reported_as_numbers(tmp_path):
    """Fails if a tensor among them reaches the run's JSON, which would end a trained run in a crash."""
    file = tmp_path / "pasted.py"
    file.write_text(PASTED.replace("RETURN", "None"))
    sae = built(file)
    vars(sae.trainer).update(logging_parameters=["aux", "dead", "note"], aux=torch.tensor(0.5), dead=3, note="text")
    numbers, files = sae.report(None)
    assert json.dumps(numbers) == '{"aux": 0.5, "dead": 3.0}' and files == {}


def test_evals_see_any_leading_dimensions_and_every_decoder():
    """Fails if encode is passed [B, ctx, d_in], or the decoder of an ae without one matrix is not what decode does."""
    sae = built(next(f for f in HABITS if f.stem == "several_decoders"))
    x = torch.randn(2, 5, 24)
    z = sae.encode(x)
    assert z.shape == (2, 5, len(sae.decoder)) and sae.decode(z).shape == x.shape
    linear = z @ sae.decoder + sae.decode(torch.zeros_like(z))
    assert torch.allclose(sae.decode(z), linear, atol=1e-5)


def test_what_hangs_on_the_ae_is_saved_and_moved(x_SBD):
    """Fails if a mask, a list of running means or a changed number on the ae is lost by saving, or not moved."""
    file = next(f for f in HABITS if f.stem == "plain_tensors")
    sae = built(file)
    steps(sae, x_SBD)
    state = sae.state_dict()
    assert state["ae.mask"].sum() == 160 and state["ae.means[0]"].any() and 0 < state["ae.threshold"] < 0.02
    again = built(file)
    again.load_state_dict(state)
    assert again.ae.threshold == pytest.approx(sae.ae.threshold) and isinstance(again.ae.threshold, float)
    assert torch.equal(again.encode(x_SBD[0]), sae.encode(x_SBD[0]))
    moved = again.to(torch.float64)
    assert moved.ae.mask.dtype == moved.ae.means[0].dtype == torch.float64


def test_lists_dicts_and_changing_numbers_come_back_from_a_file(tmp_path):
    """Fails if entries come back in the order of a file's names, under other keys, or as what stood there before."""
    from safetensors.torch import load_file, save_file

    file = tmp_path / "pasted.py"
    # a name that the runner uses, too
    file.write_text(PASTED.replace("RETURN", "None").replace("CustomSAE", "SAE").replace(
        "        self.W_enc =",
        "        self.offsets, self.shadow, self.theta, self.level, self.bound = [], {}, {}, 0, 0.0\n"
        "        self.W_enc ="))
    sae, again = built(file), built(file)
    sae.ae.offsets += [torch.full((3,), float(i)) for i in range(13)]
    sae.ae.shadow["encoder.weight"] = torch.ones(2)
    sae.ae.theta[7] = torch.ones(1)
    sae.ae.level, sae.ae.bound = 0.1, torch.arange(4.0)
    save_file({k: t.clone().contiguous() for k, t in sae.state_dict().items()}, tmp_path / "state.safetensors")
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert [float(t[0]) for t in again.ae.offsets] == list(range(13))
    assert list(again.ae.shadow) == ["encoder.weight"] and list(again.ae.theta) == [7]
    assert again.ae.level == 0.1 and torch.equal(again.ae.bound, torch.arange(4.0))


def test_numbers_that_update_returns_are_no_losses(x_SBD):
    """Fails if a counter or a mean over nothing ends the run, a log's column is overwritten, or a late loss is 0."""
    from runs import training_log
    from runs.clock import Clock

    sae = built(next(f for f in HABITS if f.stem == "plain_tensors"))
    answers = iter([None, {"loss": 0.5, "tokens": 2e9, "dead": float("nan")}, {"tokens": 3e9}])
    sae.trainer.update = lambda step, x: next(answers)
    found = [experiment.train_step(sae, None, base.Batch(x_SBD[i]), base.Progress(i, 60, 0, 60)) for i in range(3)]
    assert found[1][0] == 0.5 and found[1][1]["reconstruction"] == found[0][0] and found[2][0] == 3e9
    job = experiment.Job("layer_2", 2, {}, sae, None)
    recent = {"layer_2": [(torch.tensor(0.5), {"tokens": torch.tensor(2e9), "dead": torch.tensor(float("nan"))})]}
    row = training_log.rows([job], recent, {"layer_2": x_SBD[0]}, base.Progress(1, 60, 56, 60 * 56), 56, Clock(), 1,
                            lambda t: t)[0]
    assert row["tokens"] == 56 and row["own_tokens"] == 2e9 and row["loss"] == 0.5


def test_looking_for_the_width_changes_nothing():
    """Fails if construction runs encode on the trainer's own ae, in training mode, or with the run's random numbers."""
    file = next(f for f in HABITS if f.stem == "batch_statistics")
    torch.manual_seed(4)
    sae = built(file, dict(seed=4))
    drawn = torch.rand(3)
    assert sae.ae.last is None and sae.ae.norm.num_batches_tracked == 0 and sae.ae.training
    torch.manual_seed(4)
    sae.trainer_class(24, 160, seed=4)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.slow
def test_the_first_tensor_of_the_features_shape_is_taken_and_that_is_said():
    """Fails if a tuple's first entry is taken whatever its shape, or nothing is said of the choice."""
    file = next(f for f in HABITS if f.stem == "encode_pair")
    found = preflight(file, GEMMA)
    said = (f"encode_pair.py:{line_of(file, 'def encode')}: ae.encode returned 3 values, of which the first of shape "
            "[tokens, 160]")
    assert any(said in note for note in found.notes)


# ------------------------------------------------------------------------------------- pasted files that change nothing

TEMPLATE = PASTED.replace("RETURN", "lambda loss: None").replace("warmup_steps=400", "warmup_steps=1000").replace(
    "        self.optimizer = ConstrainedAdam(self.ae.parameters(), [self.ae.W_dec], lr=lr)\n", """\
        self.optimizer = ConstrainedAdam(self.ae.parameters(), [self.ae.W_dec], lr=lr)
        self.warm = optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: min(s / warmup_steps, 1.0))
""").replace("        self.optimizer.step()\n", "        self.optimizer.step()\n        self.warm.step()\n")
ZERO_GRAD = "        self.optimizer.zero_grad()"
EDITS = {
    "another return": ("lambda loss: None", "lambda loss: loss.item()"),
    "a term times zero": (ZERO_GRAD, f"        loss = loss + 0.0 * z.norm()\n{ZERO_GRAD}"),
    "a detached term": (ZERO_GRAD, f"        loss = loss + z.norm().detach()\n{ZERO_GRAD}"),
    "an unused parameter": ("        self.optimizer = Con",
                            "        self.gate = nn.Parameter(t.randn(dict_size))\n        self.optimizer = Con"),
    "an unused hyper-parameter": ("l1=0.01,", "l1=0.01, temperature=0.5,"),
    "a start beyond the run": (ZERO_GRAD, f"        loss = loss * (2 if step > 100_000 else 1)\n{ZERO_GRAD}"),
    "other names": ("CustomSAE", "ImprovedSAE"),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_a_pasted_file_that_changes_nothing_is_called_inert(tmp_path, edit):
    """Fails if the comparison takes what update returns, or cuts the template's schedule otherwise than the edit's."""
    template, mine = tmp_path / "template.py", tmp_path / "mine.py"
    template.write_text(TEMPLATE)
    mine.write_text(TEMPLATE.replace(*EDITS[edit]))

    def run(file, **more):
        return preflight(file, GEMMA | dict(d_in=64, d_sae=256, batch_size=128), **more)

    with pytest.raises(ValueError, match=r"mine.py:\d+: .*bit-identically to template"):
        run(mine, reference_files=[template])
    with pytest.raises(ValueError, match=r"mine.py:\d+: .*bit-identically to template"):
        run(mine, against=str(template))
    other = tmp_path / "other.py"
    other.write_text(TEMPLATE.replace("* z.sum(-1).mean()", "* z.pow(1.01).sum(-1).mean()"))
    notes = run(other, against=str(template)).notes
    assert any("trains differently from template" in note and "differ by" in note for note in notes)
