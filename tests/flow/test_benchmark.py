"""The training benchmark: its floor, by the figures published with it, and that it runs with little installed.

And the one command for a GPU: that every part of it runs, goes on after another's failure, and reads a profile right.
"""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import Gemma2Config

import experiment
from evals.model.language_model import run_block
from tests import PROJECT
from tests.benchmarks import gpu, training, variants
from tests.runs.records import R2, entry, record

REFUSED = ("simple_parsing", "datasets", "transformer_lens", "sae_lens", "psutil", "sklearn", "pandas", "plotly",
           "wandb")


def floor_of(width: int, batch_size: int) -> float:
    config = Gemma2Config(**training.GEMMA, num_hidden_layers=13)
    settings = experiment.Settings(layers="12", d_sae=width, batch_size=batch_size, context=1024, dtype="bfloat16")
    return training.floor(config, settings, 1, training.H200)


def test_floor():
    """Fails if a part is left out or counted twice: it then misses the published 3.41 µs and 192 k tokens/s."""
    config = Gemma2Config(**training.GEMMA, num_hidden_layers=13)
    assert training.lm_flop(config, 13, 1024) == pytest.approx(2.08e9, rel=0.005)
    assert training.sae_flop(2304, 16384) == pytest.approx(0.377e9, rel=0.005)
    assert floor_of(16384, 2048) == pytest.approx(3.41e-6, rel=0.01)
    assert 1 / floor_of(65536, 4096) == pytest.approx(192e3, rel=0.01)


def test_rows_that_fill_up_a_pass_are_counted(cache):
    """Fails if what fills up a pass of a fixed shape is not counted, or anything that is no pass is."""
    given = experiment.parse_settings(["--profile=tiny", "--device=cpu", f"--cache_dir={cache}"])
    lm, rows_passed = experiment.load_language_model(experiment.resolve(given)[0]), Counter()
    lm.compiled, tokens_BT = run_block, torch.randint(5, 60, (7, 16))
    lm.training_residuals(tokens_BT, [1], 8)  # the first looks at masks, and at the plain pass
    passes = training.counted(lm, rows_passed)
    lm.residuals(tokens_BT, [1])
    for rows in (8, 7, 14):
        passes(tokens_BT, [1], rows)
    assert rows_passed == dict(asked=21, passed=29) and training.padded(rows_passed) == "27.6"


@pytest.mark.slow
def test_runs_with_torch_and_transformers_alone(tmp_path):
    """Fails if our side needs another package, or if the parts overlap, so that a share is below 0 or above 100 %."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({REFUSED!r}))  # an import of these now fails
from tests.benchmarks import training
training.GEMMA.update(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                      vocab_size=512)
small = ["--device=cpu", "--threads=1", "--layers=0,1", "--widths=64", "--ks=4,2", "--saes=1,2", "--context=32",
         "--batch_size=64", "--lm_batch_size=4"]
training.main(["--model=tiny", {f"--cache_dir={tmp_path}"!r}, "--n_layers=1,2", "--tokens=768", *small])
training.main(["--model=gemma-2-2b-shape", "--n_layers=1", "--tokens=768", "--run_tokens=65536", *small])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| 64")]
    assert [row[:3] for row in rows] == [["64", saes, layers] for saes, layers in ("11", "12", "21", "22", "11", "21")]
    for row in rows:
        shares = [float(cell) for cell in row[6:12]]
        assert all(0 <= share <= 100 for share in shares) and sum(shares) == pytest.approx(100, abs=0.5)
        assert row[13] == "0.0"  # on a CPU nothing is filled up
    assert done.stdout.splitlines()[-1].count("torch ") == 1


def test_a_kernel_belongs_to_the_innermost_part_that_asked_for_it():
    """Fails if it is counted where it ran, not where it was launched, or if another thread's launches are lost."""
    def event(cat: str, name: str, ts: float, dur: float, **about) -> dict:
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, args=about)

    ranges = [event("user_annotation", name, ts, dur) for name, ts, dur in (
        ("optimiser", 0.0, 30.0), ("SAE forward", 5.0, 5.0), ("SAE backward", 12.0, 5.0), ("ProfilerStep", 0.0, 99.0))]
    asked = [event("cuda_runtime", "cudaLaunchKernel", 6.0, 1.0, correlation=1),
             event("cuda_runtime", "cudaLaunchKernel", 13.0, 1.0, correlation=2) | dict(tid=2),
             event("cuda_driver", "cuLaunchKernelEx", 20.0, 1.0, correlation=3),
             event("cuda_runtime", "cudaMemcpyAsync", 40.0, 1.0, correlation=4)]
    ran = [event("kernel", "nvjet_1", 25.0, 7.0, correlation=1, **{"External id": 9}),
           event("kernel", "backward_1", 50.0, 2.0, correlation=2),
           event("kernel", "triton_1", 52.0, 3.0, correlation=3), event("gpu_memcpy", "HtoD", 60.0, 4.0, correlation=4)]
    trace = {}
    for one in [event("cpu_op", "aten::mm", 6.0, 2.0, **{"External id": 9}), *ranges, *asked, *ran]:
        trace.setdefault(one["cat"], []).append(one)
    given, moments = gpu.launched(trace)
    assert [name for _, name, _ in moments] == ["aten::mm nvjet_1", "backward_1", "triton_1", "HtoD"]
    assert gpu.innermost(given, moments) == ["SAE forward", "SAE backward", "optimiser", ""]
    assert [us for *_, us in moments] == [7.0, 2.0, 3.0, 4.0]


def test_a_step_that_fails_costs_not_the_others(monkeypatch, capsys):
    """Fails if a failure ends the command or is not said in its status, or if a step begins after the time is over."""
    def fail():
        raise ArithmeticError("no figure")

    def steps(args):
        return [gpu.Step("machine", "first", fail), gpu.Step("model", "second", lambda: print("a figure"))]

    monkeypatch.setattr(gpu, "steps", steps)
    with pytest.raises(SystemExit, match="failed: first"):
        gpu.main(["--device=cpu", "--model=tiny"])
    said = capsys.readouterr().out
    assert "failed: ArithmeticError: no figure (test_benchmark.py:" in said and "a figure" in said
    gpu.main(["--device=cpu", "--model=tiny", "--seconds=0"])
    assert "not begun, 0 seconds being over: first; second" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_of_the_command_for_a_gpu_runs():
    """Fails if a part breaks, which would be seen on a GPU first, or gives no shares."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--device=cpu", "--model=tiny"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    headings = [line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("== ")]
    assert list(dict.fromkeys(heading.partition(":")[0] for heading in headings)) == list(gpu.PARTS)
    assert len(headings) == 13 and "failed" not in done.stdout and "not begun" not in done.stdout
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    for what, times in (("matrix products", 2), ("language model", 1)):
        shares = [float(row[2]) for row in cells if row[0] == what]
        assert len(shares) == times and all(0 < share < 100 for share in shares), what


def test_variants_side_by_side_at_one_l0(tmp_path, capsys):
    """Fails if seeds are averaged at other L0 than asked, or a fixed hyper-parameter is no row of its own."""
    def swept(name, seed, low, high, **fixed):
        points = {f"layer_0.k_{k}": entry({"core.l0": float(k), R2: r2}, variant="mine", hyper={"k": k} | fixed,
                                          seed=seed) for k, r2 in ((4, low), (16, high))}
        return str(record(tmp_path / name, points))

    folders = [swept("a", 0, 0.4, 0.8, w=1), swept("b", 1, 0.5, 0.9, w=1), swept("c", 0, 0.1, 0.3, w=2)]
    variants.main([*folders, "--l0=8", f"--metrics={R2}"])
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    # log 8 is halfway between log 4 and log 16: .6 and .7, and .2
    assert [[cell.strip() for cell in row] for row in rows] == [["`mine w=1`", "2", "0.6500 ± 0.0707"],
                                                                ["`mine w=2`", "1", "0.2000 ± 0.0000"]]
