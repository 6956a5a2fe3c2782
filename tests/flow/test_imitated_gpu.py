"""What only shows off the CPU, on a GPU imitated in host memory: devices that do not mix, steps that wait, memory."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import evals
import experiment
from tests import PROJECT, imitated_gpu
from tests.small_run import wait_for

pytestmark = [pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has real GPUs: test_cuda.py"),
              pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")]

EVALS = [name for name in ("core", "sparse_probing", "absorption", "tpp", "scr", "ravel", "unlearning", "sae_probes")
         if name in evals.names()]


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        return imitated_gpu.build()
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ:
            pytest.fail(error.stderr)
        pytest.skip(f"not with torch {torch.__version__}: {error.stderr[:300]}")


def on_gpu(*command, **environment):
    return subprocess.Popen([sys.executable, "-m", "tests.imitated_gpu", *map(str, command)], cwd=PROJECT, text=True,
                            env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process) -> str:
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def tiny(out, cache, *more):
    return ["experiment.py", "--profile=tiny", f"--out_dir={out}", f"--cache_dir={cache}", *more]


def means(out) -> dict:
    (section,) = json.loads((out / "final_info.json").read_text()).values()
    return {name: value for name, value in section["means"].items() if value is not None}


REFUSED = """
import sys, torch
from unittest import mock
x, host = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
for what in (lambda: x + host, lambda: torch.cat([x, host]), lambda: x.index_select(0, torch.zeros(1).long()),
             lambda: host[x > 0], lambda: x.numpy(), lambda: torch.empty(2 * 10**9, device="cuda"),
             lambda: torch.randperm(3, generator=torch.Generator(), device="cuda")):
    try:
        raise SystemExit(f"done: {what()}")
    except (RuntimeError, TypeError):  # torch.OutOfMemoryError is one
        pass
assert torch.equal((x + torch.tensor(1.0))[torch.tensor([0])].cpu(), 2 * host[:1])  # these may mix
torch.cuda.set_sync_debug_mode("error")
y = (x @ x).topk(2).values.sum() * torch.tensor(5.0)
for what in (y.item, y.cpu, lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.tensor(1.0, device="cuda"),
             lambda: bool(y > 0)):
    try:
        raise SystemExit(f"did not wait: {what()}")
    except RuntimeError:
        pass
torch.cuda.set_sync_debug_mode("default")
sys.path.insert(0, ".")
from runs import environment
ones, measured = torch.ones, environment.matmul_rate.__defaults__[0]  # which runs here do without
with mock.patch.object(torch, "ones", lambda *shape, **about: ones(64, 64, **about)):
    assert measured("cuda", torch.bfloat16) > 0
"""


def test_the_imitation_refuses_what_a_gpu_refuses(tmp_path):
    """Fails if a mistake would pass unseen here."""
    (tmp_path / "refused.py").write_text(REFUSED)
    ended(on_gpu(tmp_path / "refused.py", IMITATED_GPU_BYTES="1e9"))


@pytest.mark.slow
def test_steps_on_a_gpu(tmp_path):
    """Fails if a variant mixes devices, learns something else in bf16, waits in a step, or dies of a step's memory."""
    script = tmp_path / "steps.py"
    script.write_text("""
import sys
sys.path.insert(0, ".")
from tests.flow import test_cuda
from tests.variants import test_variants
test_cuda.test_every_variant_learns_on_a_gpu_what_it_learns_on_the_cpu()
test_cuda.test_no_step_waits_for_the_gpu()
test_cuda.test_a_step_without_memory_goes_on_in_parts()
test_cuda.test_wide_saes_have_the_gradients_of_dense_products()
for every in (13, 5, 2):
    test_variants.auxk_against_its_formula("cuda", every)
""")
    ended(on_gpu(script))


@pytest.mark.slow
def test_the_benchmarks_run_on_a_gpu(tmp_path):
    """Fails if what measures training there does not: events, memory, Gemma-2-2B's shape, sparse against dense."""
    script = tmp_path / "benchmarks.py"
    script.write_text(f"""
import sys
sys.path.insert(0, ".")
import torch
torch.cuda.get_device_name = lambda *args: "H200"  # whose rates are not measured, which would take minutes here
from tests.benchmarks import sparse, training
training.main(["--layers=0,1", "--tokens=384", "--context=32", "--lm_batch_size=4", "--batch_size=64",
               "--run_tokens=20000", "--saes=2", "--n_layers=2", "--widths=256", "--growth", "--cache_dir={tmp_path}"])
sys.argv = ["sparse", "--d_in=64", "--widths=512", "--ks=8", "--batch_size=64", "--steps=2"]
sparse.main()
""")
    said = ended(on_gpu(script))
    for part in ("gemma-2-2b-shape: d_model 2304, bfloat16", "| 256 | 2 | 2 |", "| 512 | 8 |"):
        assert part in said, said


@pytest.mark.slow
def test_activations_are_kept_in_the_background_on_a_gpu(tmp_path):
    """Fails if what is written and read beside the training is not what was made, or is not there for a second run."""
    script = tmp_path / "kept.py"
    script.write_text(f"""
import sys
sys.path.insert(0, ".")
import experiment
from evals import cache
from tests import small_run
cache.LARGE = 1
small_run.leave_out_pages()
for name in ("first", "second"):
    given = ["--profile=tiny", f"--out_dir={tmp_path}/{{name}}", "--cache_dir={tmp_path}/cache", "--evals=none"]
    assert experiment.main(given) == 0
""")
    ended(on_gpu(script))
    runs = [json.loads((tmp_path / name / "run_info.json").read_text())["cache"] for name in ("first", "second")]
    assert runs[0]["misses"].count("train") == 4 and "train" in runs[1]["hits"]
    stored = sorted((tmp_path / "cache/activations").glob("train-*"))
    assert stored and all(b'"device":"imitated GPU"' in entry.read_bytes()[:4000] for entry in stored)
    for name in ("final_info.json", "sae/layer_2/sae_weights.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.slow
def test_evals_give_the_same_on_a_gpu(tmp_path, reference):
    """Fails if an eval mixes devices, draws from a generator of the device, or takes a path of another result there."""
    evaluate = [f"--init_from={reference}", "--num_tokens=0", f"--evals={','.join(EVALS)}", "--activation_cache_gb=0"]
    ended(on_gpu(*tiny(tmp_path / "gpu", tmp_path, *evaluate)))
    assert experiment.main(tiny(tmp_path / "cpu", tmp_path, *evaluate, "--device=cpu")[1:]) == 0
    here, there = means(tmp_path / "cpu"), means(tmp_path / "gpu")
    assert len(here) > 10 * len(EVALS) and there == pytest.approx(here, rel=1e-5)


@pytest.mark.slow
def test_known_features_on_a_gpu(tmp_path):
    """Fails if samples of a synthetic model, or what is counted of their features, are on no GPU where the SAE is."""
    small = ["--profile=synthetic", "--device=cuda", "--num_tokens=10240", "--d_sae=64", "--hyper=k=4"]
    config = '--eval_config={"ground_truth": {"n_samples": 5120}}'
    ended(on_gpu("experiment.py", *small, config, f"--out_dir={tmp_path}/run", f"--cache_dir={tmp_path}/cache"))
    found = means(tmp_path / "run")
    assert found["ground_truth.l0"] == pytest.approx(4, abs=0.1) and 0 < found["ground_truth.f1"] < 1


def test_a_killed_run_goes_on_on_a_gpu(tmp_path):
    """Fails if a checkpoint does not bring everything back to the device: a bf16 model, a sweep, two layers."""
    def run(name, *more):
        _, *given = tiny(tmp_path / name, tmp_path, "--num_tokens=50000", "--variant=batch_topk", "--sweep=k=4,8",
                         "--layers=1,2", "--dtype=bfloat16", "--lm_batch_size=auto", "--evals=none",
                         "--checkpoint_seconds=0.1", *more)
        return on_gpu("-m", "tests.without_pages", *given)

    whole, killed = run("whole"), run("killed")
    wait_for(tmp_path / "killed/checkpoint.pt", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed/final_info.json").exists(), "it ended before it could be killed"
    assert "continuing from step" in ended(run("killed"))
    ended(whole)
    found, expected = (json.loads((tmp_path / name / "final_info.json").read_text()) for name in ("killed", "whole"))
    assert len(expected) == 4
    for name, section in expected.items():
        assert found[name]["means"] == pytest.approx(section["means"], rel=1e-5), name


@pytest.mark.slow
def test_a_run_ends_well_with_less_memory_than_it_was_promised(tmp_path):
    """Fails if running out of memory in the language model, a step or an eval ends a run or changes its result."""
    def run(name, **environment):
        return ended(on_gpu(*tiny(tmp_path / name, tmp_path, "--activation_cache_gb=0", "--evals=core,sparse_probing",
                                  "--num_tokens=65536", "--block_tokens=65536", "--lm_batch_size=2048", "--d_sae=4096",
                                  "--batch_size=4096", '--eval_config={"core": {"batch_size_prompts": 512}}'),
                            **environment))

    assert "out of GPU memory" not in run("enough")
    said = run("little", IMITATED_GPU_LEFT="90e6")
    for part in ("a language-model batch of 1024 rows", "each batch in 2 parts", "in the features: going on",
                 "in the logits: going on"):
        assert part in said, said[-3000:]
    assert means(tmp_path / "little") == pytest.approx(means(tmp_path / "enough"), rel=0.05, abs=0.05)
