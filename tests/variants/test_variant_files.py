"""The variant's file and the run: read once, named where Python cannot read it, its report apart from its training."""

import json
from pathlib import Path

import pytest

import experiment
import variants
from evals.model import checks
from runs import compare, reading
from tests import FIXTURES

pytestmark = pytest.mark.usefixtures("no_pages")

TOPK = variants.path("topk").read_text(encoding="utf-8")
LINE_OF_INIT = TOPK[:TOPK.index("def __init__")].count("\n") + 1
REPORT = '''
    def report(self, context):
        return {"width": FIRST}, {"note.txt": "text"}
'''


@pytest.fixture
def run(tmp_path, tmp_path_factory, capsys):
    """run(out_dir, *arguments) -> (status, stdout, stderr), on the tiny profile, with one cache for all."""
    cache = tmp_path_factory.getbasetemp() / "variant_files_cache"

    def call(out, *arguments):
        capsys.readouterr()
        status = experiment.main(["--profile=tiny", "--num_tokens=8192", "--device=cpu", "--evals=core",
                                  f"--cache_dir={cache}", f"--out_dir={tmp_path / out}", "--allow_identical",
                                  *arguments])
        return status, *capsys.readouterr()

    return call


def info(folder: Path) -> dict:
    return json.loads((folder / "final_info.json").read_text())["layer_2"]


# --------------------------------------------------------------------------------------- what Python cannot read or run


@pytest.mark.parametrize("content, words", [
    (TOPK.replace("def __init__(self", "def __init__((self").encode(),
     [f"mine.py:{LINE_OF_INIT}: invalid syntax", "correct that line"]),
    ('"""café"""\nfrom variants import topk\n'.encode("latin-1"), ["mine.py:1: ", "utf-8", "save the file as UTF-8"]),
    (b"x = 1\nyy\0\n", ["mine.py:2: the file holds a NUL byte", "save the file as UTF-8"]),
    (b"import sys\n\nsys.exit()\n", ["mine.py:3: the file ends the whole program", '__name__ == "__main__"']),
    ((TOPK + "\nimport argparse\nargparse.ArgumentParser().parse_args(['--x'])\n").encode(),
     ["the file ends the whole program"]),
], ids=["syntax", "latin-1", "NUL", "exit", "argparse"])
def test_a_file_that_cannot_be_run_is_named_with_its_line(run, tmp_path, content, words):
    """Fails if the mistake ends in status 0, in words without file and line, or without an error.json."""
    (tmp_path / "mine.py").write_bytes(content)
    status, _, err = run("run", f"--variant={tmp_path / 'mine.py'}")
    assert status == 1 and all(w in err for w in words), err
    assert json.loads((tmp_path / "run/error.json").read_text())["phase"] == "preflight"
    assert json.loads((tmp_path / "run/run_info.json").read_text())["status"] == "failed"


# ------------------------------------------------------------------------------------------------ edited while it runs


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["inputs_of", "preflight", "load_language_model", "evaluate"])
def test_an_edit_while_the_run_is_under_way_is_the_next_runs(run, tmp_path, monkeypatch, moment):
    """Fails if the edited file is trained, saved or written into the result of the run that began before."""
    mine, real = tmp_path / "mine.py", getattr(experiment, moment)
    mine.write_text(TOPK)

    def edited_then(*arguments):
        mine.write_text(TOPK.replace("k=32", "k=8"))
        return real(*arguments)

    monkeypatch.setattr(experiment, moment, edited_then)
    assert run("run", f"--variant={mine}")[0] == 0
    found = info(tmp_path / "run")
    assert found["config"]["hyper"]["k"] == 32 and found["means"]["core.l0"] > 25
    assert (tmp_path / "run/variant.py").read_text() == TOPK
    monkeypatch.undo()
    status, out, _ = run("run", f"--variant={mine}")
    assert status == 0 and "moved" in out and info(tmp_path / "run")["means"]["core.l0"] < 9


# --------------------------------------------------------------------------------------------- the variant's own report


@pytest.mark.slow
def test_a_report_that_fails_costs_neither_training_nor_evals(run, tmp_path, monkeypatch):
    """Fails if the run ends there, or its mending is taken for another training."""
    mine = tmp_path / "mine.py"
    mine.write_text(TOPK + REPORT.replace("FIRST", "1 / (2 - context.layer)"))  # the preflight's layer is 0
    with monkeypatch.context() as patched:
        patched.setattr(checks, "outliers", lambda *_: "few tokens hold it all")
        status, out, err = run("run", f"--variant={mine}")
    assert status == 1 and "FAILED in report of layer_2: division by zero" in err and "mine.py:" in err
    broken = info(tmp_path / "run")
    assert "core.l0" in broken["means"] and any("own report failed" in problem for problem in broken["problems"])

    mine.write_text(TOPK + REPORT.replace("FIRST", "2"))
    monkeypatch.setattr(experiment, "activation_blocks", None)  # nothing is trained again
    status, out, err = run("run", f"--variant={mine}")
    assert status == 0 and "continuing from step" in out and "eval core" not in out, out + err
    mended = info(tmp_path / "run")
    assert mended["means"] == broken["means"] | {"variant.width": 2}
    assert mended["problems"] == ["doubtful: few tokens hold it all"] and "warning: few tokens hold it all" in out
    assert (tmp_path / "run/variant.py").read_text() == mine.read_text()
    assert (tmp_path / "run/variant_report/layer_2/note.txt").read_text() == "text"


@pytest.mark.slow
def test_an_edit_of_the_training_is_another_run(run, tmp_path):
    """Fails if a failed run is continued with another loss."""
    mine = tmp_path / "mine.py"
    mine.write_text(TOPK + REPORT.replace("FIRST", "1 / (2 - context.layer)"))
    assert run("run", f"--variant={mine}")[0] == 1
    mine.write_text((TOPK + REPORT.replace("FIRST", "2")).replace("k=32", "k=31"))
    status, out, _ = run("run", f"--variant={mine}")
    assert status == 0 and "moved" in out and "continuing" not in out


@pytest.mark.slow
@pytest.mark.parametrize("report, words", [
    ("return 1 / 0", ["mine.py:", "division by zero", "in report, tried on a little text"]),
    ("return {'a': context.trained.W_dec}, {}", ["report gives a tensor of shape", "number 'a'"]),
    ("return {'a': 1.0}", ["report returned a dict instead of two dicts"]),
    ("return {}, {'a.png': context}", ["as the file 'a.png'"]),
])
def test_a_report_is_tried_before_anything_is_trained(run, tmp_path, report, words):
    """Fails if the mistake is found after training."""
    (tmp_path / "mine.py").write_text(TOPK + f"\n    def report(self, context):\n        {report}\n")
    status, out, err = run("run", f"--variant={tmp_path / 'mine.py'}")
    assert status == 1 and "FAILED in preflight" in err and all(w in err for w in words), err


@pytest.mark.slow
def test_a_dense_code_is_marked_in_result_and_verdict(run, tmp_path):
    """Fails if a run by --allow_dense cannot be told from a sparse one."""
    file = FIXTURES / "broken_variants/always_on.py"
    assert run("refused", f"--variant={file}")[0] == 1
    assert run("run", f"--variant={file}", "--allow_dense")[0] == 0 == run("sparse", "--variant=topk")[0]
    assert info(tmp_path / "run")["config"]["dense"] == 1 and "dense" not in info(tmp_path / "sparse")["config"]
    table = compare.compare(reading.read(tmp_path / "run"), reading.read(tmp_path / "sparse"), compare.directions())
    assert "a dense code: 100% of its features" in table and " (dense)" in table
