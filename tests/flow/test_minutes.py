"""Whole runs under --minutes."""

import json
import re
import time

import pytest

import experiment
from evals.model.language_model import LanguageModel
from runs import features, pace
from runs.limit import Limit
from tests.small_run import command, fail_at_checkpoint

pytestmark = pytest.mark.usefixtures("no_pages")

LONG = "--num_tokens=50000000"


@pytest.fixture
def slow_machine(monkeypatch):
    """A pace by which 100 minutes hold about 12,000 of the tiny profile's tokens."""
    monkeypatch.setattr(pace, "pace", lambda *about: pace.Pace(0.4, 0.1, 1e-4))


@pytest.mark.slow
def test_a_cut_run_is_the_run_of_so_many_tokens(tmp_path, cache, slow_machine, capsys):
    """Fails if measuring the pace leaves a trace in the result, or schedules are not those of the cut length."""
    assert experiment.main(command(tmp_path / "cut", cache, "--minutes=100", LONG)) == 0
    tokens = json.loads((tmp_path / "cut/time_limit.json").read_bytes())["num_tokens"]
    assert 5_000 < tokens < 20_000
    assert f"--num_tokens={tokens} without --minutes is the same" in capsys.readouterr().out
    assert experiment.main(command(tmp_path / "plain", cache, f"--num_tokens={tokens}")) == 0
    for file in ("final_info.json", "sae/layer_2/sae_weights.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.slow
def test_a_cut_run_goes_on_at_its_length(tmp_path, cache, slow_machine, monkeypatch):
    """Fails if an interrupted run is cut anew when it goes on, on a machine that is faster by then."""
    arguments = command(tmp_path / "run", cache, "--minutes=100", LONG, "--evals=none")
    fail_at_checkpoint(3, arguments, monkeypatch)
    tokens = json.loads((tmp_path / "run/time_limit.json").read_bytes())["num_tokens"]
    monkeypatch.setattr(pace, "pace", lambda *about: pace.Pace(1e-9, 1e-9, 1e-9))
    assert experiment.main(arguments) == 0
    config = json.loads((tmp_path / "run/final_info.json").read_bytes())["layer_2"]["config"]
    assert config["num_tokens"] == tokens


@pytest.mark.slow
def test_a_model_ten_times_slower_than_measured_ends_in_time_with_a_result(tmp_path, cache, monkeypatch):
    """Fails if a run that has grown slower is over its limit, leaves no result, or half of an eval's."""
    slowed, planned = [], experiment.in_time

    def in_time(*given):
        settings = planned(*given)
        slowed.append(True)
        return settings

    def slowly(method):
        def passed(*given, **named):
            begun = time.monotonic()
            result = method(*given, **named)
            if slowed:
                time.sleep(0.02 + 9 * (time.monotonic() - begun))
            return result
        return passed

    monkeypatch.setattr(experiment, "in_time", in_time)
    for name in ("training_residuals", "residual", "residual_of", "finish"):
        monkeypatch.setattr(LanguageModel, name, slowly(getattr(LanguageModel, name)))
    begun = time.monotonic()
    assert experiment.main(["--profile=tiny", f"--out_dir={tmp_path / 'run'}", f"--cache_dir={cache}", "--minutes=0.7",
                            "--device=cpu", LONG, "--block_tokens=1000000", "--activation_cache_gb=0", "--evals="
                            "core,sparse_probing,sae_probes,absorption,tpp,scr"]) == 0
    assert time.monotonic() - begun < 0.7 * 60
    section = json.loads((tmp_path / "run/final_info.json").read_bytes())["layer_2"]
    assert section["means"]["training.steps"] == section["config"]["steps"] > 0
    left_out = [line.split()[2] for line in section["problems"] if "was left out" in line]
    measured = {file.parent.name for file in tmp_path.glob("run/eval_results/*/*.json")}
    assert left_out
    assert not measured & set(left_out)
    assert {name.partition(".")[0] for name in section["means"]} - {"training"} == measured
    assert set(section["config"]["evals"]) == measured


def test_a_phase_without_end_is_ended_and_named(tmp_path, cache, monkeypatch, capsys):
    """Fails if a run that hangs waits for the client's kill instead of saying where it hung."""
    monkeypatch.setattr(experiment, "load_language_model", lambda settings: time.sleep(600))
    assert experiment.main(command(tmp_path / "run", cache, "--minutes=0.1")) == 1
    # 4 s for what comes before, which a busy machine may need, too
    assert re.search("FAILED in (language model|preflight): --minutes=0.1 are over, in (language model|preflight)",
                     capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.pages
def test_dashboards_without_end_cost_themselves_alone(tmp_path, cache, monkeypatch, capsys):
    """Fails if a run ends without its result or report because its dashboards take what is left of its time."""
    def endless(*given):
        while True:
            time.sleep(0.05)

    monkeypatch.setattr(features, "make", endless)
    monkeypatch.setattr(Limit, "for_pages", property(lambda limit: limit.left() - 1))
    assert experiment.main(command(tmp_path / "run", cache, "--minutes=5", "--evals=core")) == 0
    assert "note: no time is left for all of the feature dashboards" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/verdict.json").read_bytes())["verdict"] != "failed"
    assert (tmp_path / "run/report.html").is_file()
