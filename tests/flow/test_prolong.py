"""A longer run goes on from a shorter one only where each step would have been the same; what a failed run has left."""

import errno
import json
import os
import re
import shutil
import types

import pytest
import torch

import experiment
import variants
from runs import checkpoint, clock, failure, folder, prolong
from tests import small_run
from variants import base
from variants.base import Progress
from variants.kit.hyper import hyperparameters

pytestmark = pytest.mark.usefixtures("no_pages")

# whole blocks: 2 passes of 8 steps each; 48 steps, of which the first 39 have the full learning rate
SHORT, LONG = "--num_tokens=6144", "--num_tokens=8192"
VARIANT = ["--variant=standard_april", "--evals=core"]


@pytest.fixture
def long_enough(monkeypatch):
    """Schedules as in a run of 50,000 steps: warm-ups of a few steps, dead after 1,500 tokens, whatever the length."""
    def lr_factor(progress):
        left = (progress.total_steps - progress.step) / (0.2 * progress.total_steps)
        return min((progress.step + 1) / 5, 1.0) * min(left, 1.0)

    monkeypatch.setattr(Progress, "warmup", lambda progress, steps, share: min(progress.step / 7, 1.0))
    monkeypatch.setattr(Progress, "lr_factor", lr_factor)
    monkeypatch.setattr(base.SAE, "dead_features", lambda sae, progress: sae.tokens_since_fired >= 1500)
    monkeypatch.setattr(prolong, "LEAST_STEPS", 10)
    monkeypatch.setattr(prolong, "LEAST_TOKENS", 1000)
    monkeypatch.setattr(clock, "SPARE", 0)  # a checkpoint after every step


def ended(out, cache, *more):
    """The exit status of a small run that writes a checkpoint whenever it may."""
    return experiment.main(small_run.command(out, cache, "--checkpoint_seconds=0", *VARIANT, *more))


def result(out):
    """The bytes that a run is about."""
    return [(out / name).read_bytes() for name in ("final_info.json", "sae/layer_2/sae_weights.safetensors")]


@pytest.mark.slow
def test_a_prolonged_run_is_the_longer_run(long_enough, cache, tmp_path, capsys):
    """Fails if a finished run's longer one trains from the start, ends in other bytes, or costs the first's results."""
    assert ended(tmp_path / "long", cache, LONG) == 0
    assert ended(tmp_path / "run", cache, SHORT) == 0
    short = result(tmp_path / "run")
    assert checkpoint.glance(tmp_path / "run" / checkpoint.KEPT) == (39, ["layer_2"])
    capsys.readouterr()
    assert ended(tmp_path / "run", cache, LONG) == 0
    said = capsys.readouterr().out
    assert "prolonged from 6,144 tokens); continuing: training from step 39 of 64, evals core, results" in said
    assert result(tmp_path / "run") == result(tmp_path / "long") != short
    assert result(tmp_path / "run.previous-1") == short
    assert ended(tmp_path / "run", cache, LONG) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unfinished_run_is_prolonged_before_its_decay(long_enough, cache, tmp_path, monkeypatch, capsys):
    """Fails if a run that ended in training begins anew for more tokens, or can no longer be ended as it was meant."""
    assert ended(tmp_path / "long", cache, LONG) == 0
    arguments = small_run.command(tmp_path / "run", cache, *VARIANT)
    small_run.fail_at_checkpoint(12, [*arguments, SHORT], monkeypatch)
    said = capsys.readouterr().err
    assert "remains: training from step 11 of 48, evals core, results; the same command continues" in said
    told = json.loads((tmp_path / "run/error.json").read_text())["remains"]
    assert told == ["training from step 11 of 48", "evals core", "results"]
    assert ended(tmp_path / "run", cache, LONG) == 0
    assert "continuing from step 11" in capsys.readouterr().out
    assert result(tmp_path / "run") == result(tmp_path / "long")
    assert checkpoint.glance(tmp_path / "run.previous-1" / checkpoint.NAME) == (11, ["layer_2"])


@pytest.mark.slow
def test_what_may_not_be_prolonged_is_trained_anew_with_the_reason(cache, tmp_path, capsys):
    """Fails if a short run keeps a checkpoint, is gone on with under another schedule, or nobody learns why not."""
    run = ["--profile=tiny", "--evals=none", f"--out_dir={tmp_path / 'run'}", f"--cache_dir={cache}", "--device=cpu"]
    assert experiment.main([*run, "--num_tokens=4096"]) == 0
    assert not list((tmp_path / "run").glob("checkpoint*"))
    capsys.readouterr()
    assert experiment.main([*run, "--num_tokens=8192"]) == 0
    said = capsys.readouterr().out
    assert "is not prolonged from 4,096 to 8,192 tokens but trained anew: in a run of 16 steps warm-ups are" in said
    assert "moved to" in said and "continuing from" not in said
    assert (tmp_path / "run.previous-1/final_info.json").exists()


MINE = """from variants import base


class SAE(base.SAE):
    def loss(self, batch, now):
        weight = WEIGHT
        loss = base.reconstruction_loss(batch.x - self.decode(self.encode(batch.x)))
        return weight * loss, {"reconstruction": loss}

    def weight_at(self, at):
        return at.step / at.total_tokens
"""
ASKED = {"now.step / 1000": "", "now.sparsity_warmup()": "", "now.warmup(2000, 0.05)": "",
         "now.fraction": "mine.py:6 asks for progress.fraction",
         "self.weight_at(now)": "mine.py:11 asks for progress.total_tokens",
         "self.weight_at(at=now)": "mine.py:11 asks for progress.total_tokens",
         "getattr(now, 'fraction')": "mine.py:6 cannot be judged: getattr(now, 'fraction')",
         "vars(now)['total_steps']": "mine.py:6 cannot be judged: vars(now)",
         "eval('now.fraction')": "mine.py:6 cannot be judged: eval('now.fraction')",
         "[now][0].fraction": "mine.py:6 cannot be judged: [now]",
         "now.warmup(self.d_sae, 0.05)": "mine.py:6 cannot be judged: self.d_sae, 0.05"}


@pytest.mark.parametrize("weight", ASKED)
def test_a_variant_is_read(tmp_path, weight):
    """Fails if a share of the run passes, however it is reached, or what has an absolute length does not."""
    (tmp_path / "mine.py").write_text(MINE.replace("WEIGHT", weight))
    sae = variants.build(variants.load(str(tmp_path / "mine.py")), 8, 16, {})
    if ASKED[weight]:
        with pytest.raises(ValueError, match=re.escape(ASKED[weight])):
            prolong.asked_of(sae)
    else:
        asked = prolong.asked_of(sae)
        assert prolong.differing(asked, 60_000, 90_000, range(0, 48_000, 7), 2048) == ""


@pytest.mark.parametrize("name, hyper, words", [
    ("topk", {}, ""), ("standard", {}, ""), ("topk", {"k_start": 64}, "k_start = 64"),
    ("gated", {"resample_steps": 9}, "resample_steps = 9"), ("jumprelu_tanh", {}, "jumprelu_tanh.py:102 asks for")])
def test_schedules_of_our_variants(name, hyper, words):
    """Fails if a variant whose schedule is a share of the run passes, or one with absolute warm-ups alone does not."""
    module = variants.load(name)
    sae = variants.build(module, 8, 128, hyperparameters(module) | hyper)
    if not words:
        assert prolong.asked_of(sae)
        return
    with pytest.raises(ValueError, match=words):
        prolong.asked_of(sae)


# 5 % of 19,000 steps are 950 and not 1,000; a tenth of 49,000 are 4,900; theta begins like the learning rate; a tenth
# of 61 M tokens are 6.1 M and not 10 M; and after four fifths of 60,000 steps, 48,000, the learning rate falls
@pytest.mark.parametrize("total, steps, batch_size, words", [
    (60_000, range(0, 48_001), 2048, ""), (60_000, [48_001], 2048, "the learning rate"),
    (19_000, [960], 16_384, "the learning rate"), (49_000, [4950], 2048, "the penalty's warm-up"),
    (61_000, [0], 1000, "the age of dead features"), (19_000, [950], 16_384, "the learning rate")])
def test_lengths_are_told_apart_where_they_differ(total, steps, batch_size, words):
    """Fails if two lengths pass for the same at a step where a warm-up, the dead age or the decay is another."""
    module = variants.load("topk")
    asked = prolong.asked_of(variants.build(module, 8, 128, {}))
    assert prolong.differing(asked, total, 2_000_000, list(steps)[::997] + list(steps)[-1:], batch_size) == words


def test_theta_begins_where_the_kit_says():
    """Fails if the start of theta's average, step 950 of 19,000 and step 1,000 of 20,000 or more, is not seen."""
    asked = prolong.asked_of(variants.build(variants.load("topk"), 8, 128, {}))
    theta = {"theta": asked["the beginning of theta"]}
    assert prolong.differing(theta, 19_000, 40_000, range(950), 1) == ""
    assert prolong.differing(theta, 19_000, 40_000, [950], 1) == "theta"
    assert prolong.differing(theta, 20_000, 40_000, range(990, 1010), 1) == ""


@pytest.mark.parametrize("step, changed, words", [
    (32, {}, ""), (33, {}, "block 3 was cut to 904 tokens and would have 2,048"),
    (32, dict(snapshots=4), "after step 16"), (16, dict(snapshots=4), ""), (32, dict(log_lines=1), "--log_lines=1")])
def test_data_and_measurements(step, changed, words):
    """Fails if a cut block, a measurement that is past or a mean over both parts of the log is taken for the same."""
    settings = types.SimpleNamespace(**dict(passes=2, batch_size=256, snapshots=0, log_lines=50) | changed)
    found = prolong.obstacle_of_data(settings, [2048, 2048, 904], [2048] * 4, step)
    assert words in found and bool(found) == bool(words)


def test_keeping_writes_nothing(tmp_path):
    """Fails if the kept checkpoint is a copy, does not follow the latest, or is lost when the run ends."""
    for step in (1, 2):
        checkpoint.write(tmp_path, dict(step=step, saes={}, weights=torch.ones(9)))
        checkpoint.keep(tmp_path)
    assert os.path.samefile(tmp_path / checkpoint.KEPT, tmp_path / checkpoint.NAME)
    checkpoint.write(tmp_path, dict(step=3, saes={}))
    checkpoint.remove(tmp_path)
    assert os.listdir(tmp_path) == [checkpoint.KEPT]
    assert checkpoint.glance(tmp_path / checkpoint.KEPT) == (2, [])


@pytest.mark.parametrize("status, no_links, full", [("finished", False, False), ("finished", True, False),
                                                    ("interrupted", False, False), ("finished", True, True)])
def test_the_checkpoint_goes_to_the_new_folder(tmp_path, monkeypatch, capsys, status, no_links, full):
    """Fails if it is lost on a disk without links or without room, or taken from a run that needs it itself."""
    out, real = tmp_path / "run", os.link
    folder.write_json(out / "run_info.json", dict(status=status, fingerprint="short", settings=dict(num_tokens=5000)))
    (out / "final_info.json").write_text('{"a": 1}')
    (out / checkpoint.KEPT).write_bytes(b"weights")

    def link(source, target):
        if no_links and str(source).endswith(".pt"):
            raise OSError(errno.EPERM, "no links")
        real(source, target)

    def no_space(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    if full:
        monkeypatch.setattr(shutil, "copyfile", no_space)
    state, lock = folder.claim(out, "long", "training", lambda folder, info: checkpoint.KEPT)
    lock.release()
    info, aside = folder.left(out), tmp_path / "run.previous-1"
    assert (state, info["fingerprint"], info["status"]) == ("resume", "long", "prolonged from 5,000 tokens")
    assert json.loads((aside / "final_info.json").read_text()) == {"a": 1}
    brought = (out / checkpoint.NAME).exists() and (out / checkpoint.NAME).read_bytes() == b"weights"
    assert brought != full and (aside / checkpoint.KEPT).exists() == (full or status != "finished")
    assert ("trained from the start" in capsys.readouterr().out) == full


def test_what_remains(tmp_path):
    """Fails if an eval with a result, or for all SAEs but one, is told wrongly, or the last words grow too long."""
    info = dict(phase="evals", steps=156, settings=dict(evals="core,sparse_probing", profile="tiny", eval_config=""))
    assert prolong.remaining(tmp_path, info | dict(phase="preflight")) == []
    assert prolong.remaining(tmp_path, info)[0] == "training from step 0 of 156"
    torch.save(dict(step=156, saes=dict(layer_1={}, layer_2={})), tmp_path / checkpoint.NAME)
    for name, sae in (("core", "layer_1"), ("core", "layer_2"), ("sparse_probing", "layer_1")):
        folder.write_json(tmp_path / f"eval_results/{name}/model_{sae}_eval_results.json", {})
    assert prolong.remaining(tmp_path, info) == ["evals sparse_probing", "results"]
    assert prolong.remaining(tmp_path, dict(phase="evals")) == []


@pytest.mark.parametrize("letters", [10, 2000])
def test_the_last_words_say_what_remains(tmp_path, capsys, letters):
    """Fails if they leave it out, or are longer than 1,200 characters where the error itself has many."""
    info = dict(phase="training", steps=156, status="failed",
                settings=dict(evals="core,sparse_probing", profile="tiny", eval_config=""))
    folder.write_json(tmp_path / "run_info.json", info)
    assert failure.report(RuntimeError("x" * letters + "\n" + "y" * letters), "training", tmp_path, None) == 1
    said = capsys.readouterr().err
    assert "\nremains: training from step 0 of 156, evals core, sparse_probing, results\n" in said
    assert len(said) <= 1200 and said.splitlines()[-1].startswith("details: ")
    assert json.loads((tmp_path / "error.json").read_text())["remains"][1] == "evals core, sparse_probing"
