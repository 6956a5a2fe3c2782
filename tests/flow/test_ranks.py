"""Several processes under torchrun (gloo, CPU) end as one does, whoever is killed and however many continue."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import experiment
from tests import OWN_VARIANTS, PROJECT, small_run
from tests.benchmarks import scaling
from variants import base
from variants.kit import saving
from variants.kit.steps import gradients
from variants.preflight import budget

pytestmark = pytest.mark.usefixtures("no_pages")


def torchrun(*arguments, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
            *map(str, arguments)]


def run(*arguments):
    done = subprocess.run(torchrun(*arguments), cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def distance(a: Path, b: Path, sae="layer_2") -> float:
    """Largest difference between two runs' saved SAEs, relative to each tensor's norm."""
    one, other = (saving.load_sae(folder / "sae" / sae).state_dict() for folder in (a, b))
    return max(float((one[k].double() - other[k].double()).norm() / (one[k].double().norm() + 1e-12)) for k in one)


@pytest.mark.slow
def test_two_ranks_make_the_gradients_of_one(tmp_path):
    """Fails if a data-parallel variant takes over its share what is meant over the batch: top-k, theta, auxk, L0."""
    run("tests/ranks_worker.py", "gradients", tmp_path / "found.pt")
    results = torch.load(tmp_path / "found.pt", weights_only=True)
    found = {(name, together): result for name, together, result in results}
    names = {name for name, _ in found}
    assert {"topk", "batch_topk", "jumprelu", "p_anneal"} & {*OWN_VARIANTS} <= names
    for name in names:
        one, two = found[name, False], found[name, True]
        assert one.keys() == two.keys()
        for key in one:  # fp64, but for sums that are fp32 on purpose
            assert torch.allclose(two[key], one[key], rtol=1e-6, atol=1e-6 * float(one[key].abs().max())), (name, key)


@pytest.mark.slow
def test_runs_of_two_ranks_end_as_those_of_one(tmp_path, cache):
    """Fails if ranks train on other batches than one process, drift apart, write twice, or split what may not be."""
    chosen = {"shared": ["--variant=standard", "--sweep=l1_penalty=0.05,0.1"],
              "spread": ["--variant=standard", "--shard"],
              "alone": ["--variant=hierarchical"],
              "rows": ["--variant=attention_contrastive"],
              "ties": ["--variant=topk"]}

    def commands(kind):
        return {name: small_run.command(tmp_path / kind / name, cache, "--evals=none", *more)
                for name, more in chosen.items()}

    for command in commands("one").values():
        assert experiment.main(command) == 0
    said = run("tests/ranks_worker.py", "without_pages", *map(json.dumps, commands("two").values()))
    assert said.count("training: ") == len(chosen)  # by the first rank alone
    one, two = tmp_path / "one", tmp_path / "two"
    for sae in ("layer_2.l1_penalty_0.05", "layer_2.l1_penalty_0.1"):
        # Adam makes 1e-3 of a rounding error; other batches make 1
        assert 0 < distance(one / "shared", two / "shared", sae) < 0.01
    assert distance(one / "spread", two / "spread") < 0.01
    assert distance(one / "ties", two / "ties") < 0.01
    for name in ("alone", "rows"):  # the language model's rows have other neighbours in their batch, the SAE has not
        assert distance(one / name, two / name) < 1e-5
    infos = [json.loads((folder / "shared" / "final_info.json").read_text()) for folder in (one, two)]
    for sae, section in infos[0].items():
        assert section["config"] == infos[1][sae]["config"]
        for name, value in section["means"].items():
            assert infos[1][sae]["means"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_ranks_deal_out_the_evals(tmp_path, cache):
    """Fails if a rank evaluates an SAE that is another's or spread, does more than its share, or fails for all."""
    chosen = {"alone": ["--variant=hierarchical"], "spread": ["--variant=standard", "--shard"],
              "shared": ["--variant=standard"]}

    def commands(kind):
        return {name: small_run.command(tmp_path / kind / name, cache, *more, "--layers=1,2",
                                        "--evals=core,sparse_probing") for name, more in chosen.items()}

    for command in commands("one").values():
        assert experiment.main(command) == 0
    run("tests/ranks_worker.py", "runs", *map(json.dumps, commands("two").values()))
    run("tests/ranks_worker.py", "fragile", json.dumps(commands("fragile")["shared"]))

    def means(kind, name, layer):
        return json.loads((tmp_path / kind / name / "final_info.json").read_text())[f"layer_{layer}"]["means"]

    for name in chosen:
        for layer in (1, 2):
            one = means("one", name, layer)
            assert means("two", name, layer) == pytest.approx(one, rel=0.02, abs=0.02), (name, layer)
        said = (tmp_path / "two" / name / "log.txt").read_text()
        assert [line for line in said.splitlines() if line.startswith("eval ")] == [
            "eval core, layer 1: 1 SAE", "eval sparse_probing, layer 1: 1 SAE"], said  # the other rank has layer 2
    assert means("fragile", "shared", 2) == means("two", "shared", 2)
    assert "eval core, layer 2" in (tmp_path / "fragile/shared/log.txt").read_text()


LONG = ["--profile=tiny", "--variant=standard", "--num_tokens=100000", "--block_tokens=8192", "--lr=1e-4",
        "--device=cpu", "--evals=none", "--checkpoint_seconds=0"]


def start(out, cache, processes, *more):
    command = ["experiment.py", *LONG, f"--cache_dir={cache}", f"--out_dir={out}", *more]
    command = torchrun(*command, processes=processes) if processes > 1 else [sys.executable, *command]
    return subprocess.Popen(command, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(out, beyond, process):
    """Step of the first checkpoint beyond one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
        except (FileNotFoundError, RuntimeError, EOFError):
            step = -1
        if step > beyond:
            return step
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1][-3000:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("long") / "whole"
    assert experiment.main([*LONG, f"--cache_dir={cache}", f"--out_dir={out}"]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_killed_ranks_continue_in_other_numbers(tmp_path, cache, whole, shard):
    """Fails if a lost rank leaves the others hanging, or a run is bound to its number of ranks: 2, one killed, 1, 2."""
    out = tmp_path / "run"
    first = start(out, cache, 2, *shard)
    wait_for_step(out, 0, first)
    ranks = [p for p in psutil.Process(first.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    assert first.wait(120) != 0
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]  # it may have come further until it was killed
    second = start(out, cache, 1)
    step = wait_for_step(out, step, second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(120) == 128 + signal.SIGTERM
    third = start(out, cache, 2, *shard)
    said, failed = third.communicate(timeout=300)
    assert third.returncode == 0, failed[-3000:]
    assert "continuing from step" in said
    assert distance(whole, out) < 1e-3  # a lost state of Adam makes it .1


def test_an_sae_too_wide_for_a_rank_is_spread_if_that_makes_it_fit():
    """Fails if a run is refused that fits spread, or accepted where even that does not fit, or spread without need."""
    gemma = ["--profile=gemma", "--device=cpu", "--batch_size=4096"]
    settings, _ = experiment.resolve(experiment.parse_settings(gemma))
    settings = dataclasses.replace(settings, device="cuda")
    found = [scaling.findings(2**20, 4096 // 8)]
    plans = {gb: budget.plan(settings, [12], 100, scaling.GEMMA, found, True, 8, gb * 1e9, 4e14)
             for gb in (60, 110, 200)}
    assert [facts["shard"] for _, facts, _ in plans.values()] == [True, True, False]
    assert [bool(problem) for *_, problem in plans.values()] == [True, False, False]


def test_a_batch_that_does_not_fit_is_worked_on_in_parts():
    """Fails if a step after out-of-memory has other gradients, forgets what fired in one part, or is tried again."""
    import variants

    class Full(variants.load("standard").SAE):
        data_parallel = True

        def loss(self, batch, progress):
            if len(batch.x) > 16:
                raise torch.OutOfMemoryError("full")
            return super().loss(batch, progress)

    x_BD, progress, said = torch.randn(64, 16) / 4, base.Progress(50, 100, 0, 6400), []
    found = []
    for kind in (variants.load("standard").SAE, Full):
        torch.manual_seed(0)
        sae = kind(16, 96)
        loss, terms = gradients(sae, base.Batch(x_BD), progress, said.append)
        found.append(torch.cat([loss[None], terms["l1"][None], sae.W_enc.grad.flatten(), sae._fired_F.float()]))
        sae.count_step(64)
    assert len(said) == 2 and "4 parts of 16 tokens" in said[-1]
    assert torch.allclose(*found, atol=1e-6)
    gradients(sae, base.Batch(x_BD), progress, said.append)
    assert len(said) == 2  # remembered
