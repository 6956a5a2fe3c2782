"""The command: what a run writes, that it is the same every time, that nothing is lost, and how it fails."""

import json
import signal
import subprocess
import sys
import time

import pytest

import experiment
import variants
from evals.storage import network
from tests import PROJECT
from tests.small_run import SMALL, command, fail_at_checkpoint, start, wait_for

pytestmark = pytest.mark.usefixtures("no_pages")

# ------------------------------------------------------------------------------------------------ results


def test_a_run_writes_its_files(reference):
    """Fails if a file that the README promises is missing or the checkpoint is left behind."""
    for name in ("run_info.json", "training_log.csv", "variant.py", "report.html", "log.txt", "sae/layer_2/cfg.json",
                 "sae/layer_2/sae_weights.safetensors", "features/layer_2.html", "features/layer_2.json.gz"):
        assert (reference / name).exists(), name
    assert len(list((reference / "eval_results").glob("*/*_eval_results.json"))) == 3
    assert not (reference / "checkpoint.pt").exists()
    assert not (reference / "error.json").exists()


def test_final_info_is_what_the_client_parses(reference):
    """Fails if final_info.json is not {name: {"means": {...}}} or holds what differs between equal runs, or NaN."""
    text = (reference / "final_info.json").read_text()
    section = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in final_info.json"))["layer_2"]
    assert {"core.ce_loss_score", "core.r2", "sparse_probing.sae_top_1_test_accuracy",
            "training.final_loss"} <= set(section["means"])
    settings, _ = experiment.resolve(experiment.parse_settings(SMALL))
    assert section["config"]["steps"] == experiment.count_steps(settings) == 38
    assert str(reference.parent) not in text and "seconds" not in text
    assert list(section["means"]) == sorted(section["means"],
                                            key=lambda k: (not k.startswith(("training.", "variant.")), k))


@pytest.mark.slow
def test_same_seed_same_bytes_with_a_cold_cache_and_another_with_another_seed(reference, tmp_path):
    """Fails if anything read back from a cache differs from what was computed, or the seed is not used."""
    assert experiment.main(command(tmp_path / "cold", tmp_path / "cache")) == 0
    assert (tmp_path / "cold/final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()
    assert experiment.main(command(tmp_path / "seed", tmp_path / "cache", "--seed=1", "--evals=none")) == 0
    one, other = (json.loads((run / "final_info.json").read_text())["layer_2"]["means"]["training.final_loss"]
                  for run in (reference, tmp_path / "seed"))
    assert one != other


@pytest.mark.slow
@pytest.mark.pages
def test_several_layers_and_a_sweep_share_one_stream_and_change_nothing(reference, cache, tmp_path):
    """Fails if an SAE's result depends on its siblings, or a section or a page is missing."""
    assert experiment.main(command(tmp_path / "many", cache, "--layers=1,2", "--sweep=k=8,32", "--evals=core")) == 0
    many = json.loads((tmp_path / "many/final_info.json").read_text())
    assert set(many) == {"layer_1.k_8", "layer_1.k_32", "layer_2.k_8", "layer_2.k_32"}
    assert {page.name.removesuffix(".html") for page in tmp_path.glob("many/features/*.html")} == set(many)
    alone = json.loads((reference / "final_info.json").read_text())["layer_2"]["means"]
    together = many["layer_2.k_32"]["means"]
    measured = [name for name in alone if not name.startswith(("sparse", "sae_probes"))]
    assert {name: together[name] for name in measured} == {name: alone[name] for name in measured}
    assert many["layer_2.k_8"]["means"]["core.l0"] < 8.5


def test_a_sweep_of_two_hyper_parameters_trains_every_combination():
    """Fails if combinations are missing, values go to the wrong name, or a list without a name is let through."""
    module = variants.load("topk")
    settings = experiment.parse_settings(["--sweep=k=8,16,auxk_alpha=0,0.5", "--hyper=auxk_alpha=1"])
    every = {f".k_{k}.auxk_alpha_{a}": dict(k=k, auxk_alpha=a) for k in (8, 16) for a in (0, 0.5)}
    assert experiment.hypers_of(settings, module) == every
    with pytest.raises(ValueError, match="does not begin with a name"):
        experiment.hypers_of(experiment.parse_settings(["--sweep=8,16"]), module)


def test_the_fingerprint_covers_what_a_variant_imports(tmp_path):
    """Fails if an edit to the variant that mine derives from passes as the same code: its old result would be given."""
    file = tmp_path / "mine.py"
    file.write_text("from variants import batch_topk\n\nclass SAE(batch_topk.SAE):\n    grad_clip = 0.5\n")
    found = set(variants.sources(str(file)))
    own = PROJECT / "variants"
    assert {file, own / "batch_topk.py", own / "base.py", own / "kit/imperative.py"} <= found
    assert not {own / "topk.py", own / "gated.py"} & found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neighbours", "attention_pairs"])
def test_contexts_and_attention_are_delivered_and_resumed(cache, tmp_path, monkeypatch, name):
    """Fails if a variant that needs whole contexts or attention patterns does not continue bit for bit."""
    more = [f"--variant={PROJECT / 'tests/fixtures/good_variants'}/{name}.py", "--evals=none"]
    assert experiment.main(command(tmp_path / "whole", cache, *more)) == 0
    stopped = command(tmp_path / "stopped", cache, *more)
    fail_at_checkpoint(3, stopped, monkeypatch)
    assert experiment.main(stopped) == 0
    assert "continuing from step" in (tmp_path / "stopped/log.txt").read_text()
    assert (tmp_path / "stopped/final_info.json").read_bytes() == (tmp_path / "whole/final_info.json").read_bytes()


# ------------------------------------------------------------------------------------------------ nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize("moment, how", [("run_info.json", signal.SIGKILL), ("checkpoint.pt", signal.SIGKILL),
                                         ("checkpoint.pt", signal.SIGTERM), ("training_log.csv", signal.SIGINT),
                                         ("sae/layer_2", signal.SIGKILL), ("eval_results/core", signal.SIGKILL)])
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(reference, cache, tmp_path, moment, how):
    """Fails if a resume repeats, skips or reorders a batch, or takes over a half-written result."""
    out = tmp_path / "run"
    process = start(out, cache, "--checkpoint_seconds=0")
    wait_for(out / moment, process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == -how if how == signal.SIGKILL else process.returncode in (128 + how, 0), stderr
    assert experiment.main(command(out, cache, "--checkpoint_seconds=0")) == 0
    assert (out / "final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()
    assert not list(tmp_path.glob("run.previous*")), "the same settings and code are continued, not moved away"


@pytest.mark.slow
def test_a_finished_run_is_reported_again_and_another_one_moves_it_aside(reference, cache, tmp_path, capsys):
    """Fails if a finished run is repeated or overwritten."""
    out = tmp_path / "run"
    assert experiment.main(command(out, cache, "--evals=none")) == 0
    before, stamp = (out / "final_info.json").read_bytes(), (out / "final_info.json").stat().st_mtime_ns
    capsys.readouterr()
    assert experiment.main(command(out, cache, "--evals=none")) == 0
    assert "already finished" in capsys.readouterr().out and (out / "final_info.json").stat().st_mtime_ns == stamp
    assert experiment.main(command(out, cache, "--evals=none", "--hyper=k=8")) == 0
    aside = (tmp_path / "run.previous-1/final_info.json").read_bytes()
    assert aside == before != (out / "final_info.json").read_bytes()


def test_a_crashing_eval_costs_only_itself(cache, tmp_path, capsys, monkeypatch):
    """Fails if one eval's exception loses another's result or ends with exit status 0."""
    import evals.core

    def broken(setup, saes):
        raise ZeroDivisionError("core broke")

    monkeypatch.setattr(evals.core, "run", broken)
    assert experiment.main(command(tmp_path / "run", cache)) == 1
    section = json.loads((tmp_path / "run/final_info.json").read_text())["layer_2"]
    assert "sparse_probing.sae_top_1_test_accuracy" in section["means"] and "core.l0" not in section["means"]
    assert any("core broke" in problem for problem in section["problems"])
    assert "core broke" in capsys.readouterr().err


@pytest.mark.slow
def test_a_typo_leaves_no_heap_of_folders(cache, tmp_path):
    """Fails if runs that did nothing but fail are kept aside, or if one that trained is not."""
    for wrong in ("--evals=cor", "--layers=9", "--hyper=kk=1"):
        assert experiment.main(command(tmp_path / "run", cache, wrong)) == 1
    assert experiment.main(command(tmp_path / "run", cache, "--evals=none")) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"run", "results.tsv"}
    assert experiment.main(command(tmp_path / "run", cache, "--layers=9")) == 1
    assert (tmp_path / "run.previous-1/final_info.json").exists()


@pytest.mark.slow
def test_a_local_folder_and_a_local_file_stand_for_gemma(cache, tmp_path):
    """Fails if Gemma's path (its profile, streamed text, bf16 model, core on another data set) breaks anywhere."""
    from evals.model import built_in
    from evals.texts import tiny

    for name, split in (("train", "train"), ("core", "heldout")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny.documents(split)))
    small = {"core": dict(batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=3,
                          context_size=32)}
    assert experiment.main([
        "--profile=gemma", f"--model={built_in.tiny_folder(cache)}", f"--dataset={tmp_path / 'train.jsonl'}",
        "--layers=1", "--device=cpu", f"--core_dataset={tmp_path / 'core.jsonl'}", "--context=32", "--num_tokens=8192",
        "--block_tokens=2048", "--d_sae=128", "--batch_size=256", "--lm_batch_size=16", "--evals=core",
        f"--eval_config={json.dumps(small)}", f"--out_dir={tmp_path / 'run'}", f"--cache_dir={cache}"]) == 0
    section = json.loads((tmp_path / "run/final_info.json").read_text())["layer_1"]
    assert section["config"]["dtype"] == "bfloat16"
    assert section["config"]["model"] == built_in.tiny_folder(cache).name
    assert 0 < section["means"]["core.r2"] < 1 and section["means"]["core.total_tokens_eval_reconstruction"] == 256


# ------------------------------------------------------------------------------------------------ failures


NAN = "from variants import topk\n\nclass SAE(topk.SAE):\n    def loss(self, batch, progress):\n" \
      "        loss, terms = super().loss(batch, progress)\n        return loss / {}, terms\n"


@pytest.mark.parametrize("arguments, words", [
    (["--variant=topkk"], "nearest is 'topk'"),
    (["--evals=cor"], "nearest is 'core'"),
    (["--num_token=100"], "nearest is --num_tokens"),
    (["--hyper=kk=3"], "nearest is 'k'"),
    (["--num_tokens=100"], "0 steps"),
    (["--layers=9"], "blocks 0 to 3"),
    (["--layers=two"], "not a list"),
    (["--seed=x"], "--seed"),
    (["--profile=gema"], "gema"),
    (["--eval_config={"], "not JSON"),
    (["--hyper=k=1000"], "k = 1000"),
    pytest.param(["--model=someone/no-such-model"], "someone/no-such-model", marks=pytest.mark.slow),
    (["--variant=BROKEN"], "broken.py:6: the loss is inf"),
])
def test_each_wrong_input_ends_in_one_clear_message(tmp_path, cache, capsys, arguments, words):
    """Fails if the message loses the cause, is longer than the client shows, or comes late."""
    broken = tmp_path / "broken.py"
    broken.write_text(NAN.format("(batch.x.sum() * 0)"))
    network.HEARD["last"] = "an answer"  # an earlier run in this process had a hub
    begun, worked = time.monotonic(), time.process_time()
    given = [argument.replace("BROKEN", str(broken)) for argument in arguments]
    assert experiment.main(command(tmp_path / "run", cache, *given)) == 1
    took, worked, stderr = time.monotonic() - begun, time.process_time() - worked, capsys.readouterr().err
    assert words in stderr and len(stderr) <= 1200, stderr
    assert "Traceback" not in stderr
    assert worked < 20 and took < 100  # ten seconds on a quiet machine, more on one that others use
    if (tmp_path / "run").exists():
        assert json.loads((tmp_path / "run/error.json").read_text())["message"]


def test_an_unwritable_out_dir_is_named(tmp_path, cache, capsys):
    """Fails if a file in the place of the folder is overwritten or the message does not name it."""
    (tmp_path / "taken").write_text("mine")
    assert experiment.main(command(tmp_path / "taken", cache)) == 1
    assert "taken" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


@pytest.mark.slow
def test_an_exploding_loss_stops_with_step_term_and_checkpoint(tmp_path, cache, capsys):
    """Fails if training goes on after a loss became NaN: preflight cannot see it, it comes at one step of 312."""
    variant = tmp_path / "late.py"
    variant.write_text("from variants import topk\n\nclass SAE(topk.SAE):\n    def loss(self, batch, progress):\n"
                       "        loss, terms = super().loss(batch, progress)\n"
                       "        return loss * (float('nan') if progress.step == 97 else 1.0), terms\n")
    assert experiment.main(command(tmp_path / "run", cache, f"--variant={variant}", "--allow_identical",
                                   "--batch_size=32", "--checkpoint_seconds=0")) == 1
    stderr = capsys.readouterr().err
    assert "step 97" in stderr and "checkpoint.pt" in stderr and (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    """Fails if --help, which must answer within two seconds, pays for transformers, scikit-learn or datasets."""
    code = ("import sys, experiment\ntry: experiment.main(['--help'])\nexcept SystemExit: pass\n"
            "print({'transformers', 'sklearn', 'datasets', 'transformer_lens', 'sae_lens', 'pandas'} & "
            "set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("set()") and "--num_tokens" in done.stdout
