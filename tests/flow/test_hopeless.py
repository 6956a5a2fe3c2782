"""Whole runs of SAEs that learn nothing: they end early, and can be gone on with."""

import csv
import json

import pytest

import experiment
from tests import small_run

pytestmark = pytest.mark.usefixtures("no_pages")

STRONG = ["--variant=standard", "--evals=none"]


def log_of(out):
    """training_log.csv, but for the speed."""
    with open(out / "training_log.csv", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_hopeless_run_ends_early_and_can_be_gone_on_with(cache, tmp_path, capsys):
    """Fails if a penalty 10,000 times too strong is trained to the end, if the end is not a failure with reason and
    advice, or if --stop_hopeless=no on the same folder does not end as a run that was never stopped."""
    broken = [*STRONG, "--hyper=l1_penalty=1000"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert experiment.main(small_run.command(stopped, cache, *broken, "--stop_hopeless=yes")) == 1
    said = json.loads((stopped / "error.json").read_text(encoding="utf-8"))
    assert said["type"] == "Hopeless" and said["phase"] == "training"
    assert said["message"].startswith("layer_2: hopeless after ")
    assert "penalty" in said["advice"] and said["advice"].endswith("--stop_hopeless=no trains it to the end")
    steps = [int(row["step"]) for row in log_of(stopped)]
    assert 8 <= steps[-1] < 38  # of 38, the fifth is the eighth
    assert "to do: " in capsys.readouterr().err
    assert experiment.main(small_run.command(stopped, cache, *broken, "--stop_hopeless=no")) == 0
    assert f"continuing from step {steps[-1]}" in capsys.readouterr().out
    assert experiment.main(small_run.command(whole, cache, *broken)) == 0
    assert log_of(stopped) == log_of(whole)
    assert (stopped / "final_info.json").read_bytes() == (whole / "final_info.json").read_bytes()


@pytest.mark.slow
def test_one_that_learns_carries_the_others(cache, tmp_path, capsys):
    """Fails if a sweep ends while one of its SAEs learns, or if the one that does not is not said, once."""
    out = tmp_path / "sweep"
    sweep = [*STRONG, "--sweep=l1_penalty=0.1,1000", "--stop_hopeless=yes"]
    assert experiment.main(small_run.command(out, cache, *sweep)) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "hopeless since" in line]
    assert len(notes) == 1 and notes[0].startswith("note: layer_2.l1_penalty_1000: ")
    assert notes[0].endswith(": goes on as others learn")


def test_being_watched_changes_nothing(reference, cache, tmp_path):
    """Fails if looking at the untrained SAE changes a sound run, or ends it."""
    out = tmp_path / "watched"
    assert experiment.main(small_run.command(out, cache, "--stop_hopeless=yes")) == 0
    assert (out / "final_info.json").read_bytes() == (reference / "final_info.json").read_bytes()
