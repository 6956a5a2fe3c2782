"""--snapshots: the SAE measured along training, which changes nothing of it."""

import json

import pytest

import evals
import experiment
from runs import folder, snapshots
from tests import small_run

pytestmark = pytest.mark.usefixtures("no_pages")

SAE = "layer_2"


def section(out):
    return json.loads((out / "final_info.json").read_text())[SAE]


@pytest.mark.pages
def test_measuring_changes_nothing(reference, cache, tmp_path, monkeypatch):
    """Fails if a run measured at four points has other weights or results than one that is not, or a row is wrong; or
    if one that was interrupted between two points has other rows."""
    out, broken = tmp_path / "run_1", tmp_path / "run_2"
    assert experiment.main(small_run.command(out, cache, "--snapshots=4")) == 0
    found, plain = section(out), section(reference)
    assert (out / "sae" / SAE / "sae_weights.safetensors").read_bytes() == (
        reference / "sae" / SAE / "sae_weights.safetensors").read_bytes()
    assert {k: v for k, v in found["means"].items() if "tokens_per_s" not in k} == plain["means"]
    rows, total = found["snapshots"], found["config"]["steps"]
    assert [row["step"] for row in rows] == [round(total * i / 4) for i in (1, 2, 3, 4)]
    assert [row["tokens"] for row in rows] == [row["step"] * 256 for row in rows]
    assert rows[-1]["means"] == {k: v for k, v in found["means"].items() if k.startswith("core.")}
    assert len({row["means"]["core.r2"] for row in rows}) == 4
    assert any(name.startswith("snapshots/step_") for name in folder.digests(out))
    page = (out / "report.html").read_text()
    assert "Along training" in page and "Along training" not in (reference / "report.html").read_text()

    small_run.fail_at_checkpoint(2, [*small_run.command(broken, cache, "--snapshots=4"), "--checkpoint_seconds=0"],
                                 monkeypatch)
    assert experiment.main([*small_run.command(broken, cache, "--snapshots=4"), "--checkpoint_seconds=0"]) == 0
    assert section(broken)["snapshots"] == rows


@pytest.mark.parametrize("flags, said", [(["--snapshots=1000"], "more than the run's 38 steps"),
                                         (["--snapshots=2", "--snapshot_evals=scr"], "'scr', which is not among"),
                                         (["--snapshots=2", "--evals=none"], "'core', which is not among --evals")])
def test_what_cannot_be_measured_is_refused(cache, tmp_path, capsys, flags, said):
    """Fails if points or evals that there are not end later than in preflight, or in other words."""
    assert experiment.main(small_run.command(tmp_path / "run_1", cache, *flags)) == 1
    told = capsys.readouterr().err
    assert said in told and told.startswith("FAILED in preflight")


def test_what_was_not_measured_is_said(cache, tmp_path, monkeypatch):
    """Fails if a crash along training costs the run, or a row that is not there, or of other settings, is not named."""
    out = tmp_path / "run_1"
    core = evals.load("core")
    real, calls = core.run, []

    def failing_once(setup, saes):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such luck")
        return real(setup, saes)

    monkeypatch.setattr(core, "run", failing_once)
    assert experiment.main(small_run.command(out, cache, "--snapshots=4", "--evals=core")) == 0
    rows = section(out)["snapshots"]
    assert "the eval core failed there" in rows[0]["problems"][0] and rows[0]["means"] == {}
    assert all(row["means"]["core.r2"] and "problems" not in row for row in rows[1:])

    chosen, final = {"core": section(out)["config"]["evals"]["core"]}, section(out)
    more = snapshots.rows(out, SAE, 3, chosen, final)
    assert [row["step"] for row in more] == [13, 25, 38] and "had passed it" in more[0]["problems"][0]
    other = snapshots.rows(out, SAE, 4, {"core": chosen["core"] | {"batch_size_prompts": 99}}, final)
    assert "other settings" in other[1]["problems"][0] and other[1]["means"] == {}


def test_points():
    """Fails if points are not evenly apart, double, or the end is measured twice."""
    assert snapshots.steps(100, 4) == {25, 50, 75} and snapshots.steps(100, 0) == snapshots.steps(100, 1) == set()
    assert snapshots.steps(3, 3) == {1, 2}
