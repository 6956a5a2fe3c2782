"""The ledger: no line lost or mixed, nobody else's table touched, the same story from the folders alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import compare, ledger
from runs.folder import write_json
from tests import PROJECT
from tests.runs.records import CE, entry, record


def line(name, word="better", difference=0.01, metric=CE, **more):
    """A verdict as the ledger takes it."""
    return dict(run=name, variant="mine", model="tiny", seed=0, metric=metric, value=0.9, stderr=0.01,
                difference=difference, verdict=word, minutes=1.5) | more


def added(folder, name, at=0.0, **more):
    return ledger.append(folder, ledger.row(line(name, **more), b"code", "0123456789abcdef+changes", "k=4", "", "why",
                                            at))


def run_folder(out, status="finished", **more):
    """A run's folder as far as the ledger reads it."""
    settings = dict(variant="/home/me/mine.py", hyper="k=4", sweep="", note="why")
    write_json(out / "run_info.json", dict(status=status, phase="training", settings=settings, seed=0,
                                           seconds={"training": 90.0}, commit="0123456789abcdef+changes"))
    (out / "variant.py").write_bytes(b"code")
    if status != "running":
        write_json(out / "verdict.json", line(out.name, **more))


def test_a_line(tmp_path):
    """Fails if a column holds other than it says, or a tab or a line's end in a value breaks the table."""
    said = line("run_1", difference=None)
    row = ledger.row(said, b"code", "0123456789abcdef", "k=4", "l=1,2", "wide\tand\nhigh", 86400.0)
    assert ledger.append(tmp_path, row) == "" == added(tmp_path, "run_2")
    header, first, second = (tmp_path / "results.tsv").read_text().splitlines()
    assert header.split("\t") == list(ledger.COLUMNS)
    # printf code | sha256sum
    assert first.split("\t") == ["1970-01-02T00:00:00Z", "run_1", "mine", "tiny", "5694d08a2e53", "012345678",
                                 "k=4 sweep l=1,2", "0", CE, "0.9", "0.01", "", "better", "1.5", "wide and high"]
    read = ledger.known(tmp_path)
    assert [one["run"] for one in read] == ["run_1", "run_2"] and read[0]["difference"] is None
    assert (read[1]["difference"], read[1]["seed"], read[1]["commit"]) == (0.01, 0, "012345678+")


WRITER = """
import sys
from pathlib import Path
from runs import ledger
for i in range(200):
    said = dict(run=f"{sys.argv[2]}_{i}", verdict="failed")
    assert ledger.append(Path(sys.argv[1]), ledger.row(said, None, None, "", "", "x" * 3000)) == ""
"""


def test_two_processes_lose_nothing(tmp_path):
    """Fails if lines of two processes mix, one is lost, or the header stands twice."""
    pair = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], cwd=PROJECT) for name in "ab"]
    assert [process.wait(60) for process in pair] == [0, 0]
    lines = (tmp_path / "results.tsv").read_text().splitlines()
    assert len(lines) == 401 and all(one.count("\t") == 14 for one in lines)
    assert {one.split("\t")[1] for one in lines[1:]} == {f"{name}_{i}" for name in "ab" for i in range(200)}


def test_what_lies_there(tmp_path):
    """Fails if a line is glued to one that was cut off, another version's columns are ignored, or another program's
    table is touched.
    """
    file = tmp_path / "results.tsv"
    added(tmp_path, "run_1")
    with open(file, "a") as opened:
        opened.write("2026\trun_2")  # killed while writing
    added(tmp_path, "run_3")
    assert [(one["run"], one["verdict"]) for one in ledger.known(tmp_path)] == [("run_1", "better"), ("run_2", None),
                                                                                ("run_3", "better")]
    file.write_text("verdict\tmood\trun\n")
    assert added(tmp_path, "run_4") == "" and file.read_text() == "verdict\tmood\trun\nbetter\t\trun_4\n"
    theirs = "commit\tval_bpb\tstatus\nabc\t0.99\tkeep"
    file.write_text(theirs)
    assert "another program's table" in added(tmp_path, "run_5") and file.read_text() == theirs
    assert ledger.known(tmp_path) == []
    file.unlink()
    file.mkdir()
    assert "has no line of this run" in added(tmp_path, "run_6") and added(tmp_path / "nowhere", "run_7")


def test_the_running_best():
    """Fails if a run is marked that is not better than all before it of its model, in its metric's direction and by a
    verdict that counts.
    """
    told = [("a", CE, 0.01, "better"), ("b", CE, 0.03, "suspect"), ("c", CE, 0.02, "within_noise"),
            ("d", "core.mse", 0.02, "worse"), ("e", CE, 0.015, "better"), ("f", "core.mse", -0.1, "better"),
            ("g", CE, None, "failed"), ("h", CE, 0.04, "incomparable"), ("i", CE, 0.001, "better")]
    rows = [dict(time=f"2026-01-0{i}", run=run, metric=metric, difference=difference, verdict=word, value=difference,
                 model="other" if run == "i" else "tiny")
            for i, (run, metric, difference, word) in enumerate(told, 1)]
    known = {CE: "higher", "core.mse": "lower"}
    marked = ledger.marked(rows[::-1], known)
    assert [one["run"] for one in marked] == list("abcdefghi")
    assert [one["run"] for one in marked if one["best"]] == ["a", "c", "d", "f", "i"]
    assert [one["run"] for one in ledger.sorted_by(marked, "difference", known)][:6] == ["f", "c", "e", "a", "i", "d"]


def shown(capsys, *arguments):
    assert ledger.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_from_the_folders(tmp_path, capsys):
    """Fails if a run that was killed is not told, one moved aside is told twice, or the folders tell another story."""
    run_folder(tmp_path / "run_1", difference=0.01)
    os.utime(tmp_path / "run_1/verdict.json", (1000, 1000))
    added(tmp_path, "run_1", at=1000, difference=0.01)
    (tmp_path / "run_1").rename(tmp_path / "run_1.previous-1")
    run_folder(tmp_path / "run_1", "running")
    record(tmp_path / "old", {"layer_3": entry({"core.l0": 20.0, CE: 0.5}, seed=7, variant="topk")})
    (tmp_path / "cache").mkdir()
    os.utime(tmp_path / "old/final_info.json", (0, 0))
    rows = shown(capsys, tmp_path)
    assert [(one["run"], one["verdict"]) for one in rows] == [("old", "incomparable"), ("run_1", "better"),
                                                              ("run_1", "killed")]
    assert rows[2]["note"] == "why (killed in its phase training)" and rows[2]["minutes"] == 1.5
    assert (rows[0]["seed"], rows[0]["value"], rows[0]["variant"]) == (7, 0.5, "topk")
    rebuilt = shown(capsys, tmp_path, "--rebuild")
    assert rebuilt[1] == rows[1] | dict(run="run_1.previous-1") and rebuilt[::2] == rows[::2]
    assert ledger.main([str(tmp_path)]) == 0
    assert "2 runs, by their last line: 1 incomparable, 1 killed" in capsys.readouterr().out
    assert ledger.main([str(tmp_path / "cache")]) == 1 and "no run in" in capsys.readouterr().err


def test_what_is_published_is_no_run(tmp_path):
    """Fails if the folder that runs.publish makes of a run counts as another one, or a README of a run's own hides it.
    """
    for name in ("run_1", "run_1_hub"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
        (tmp_path / name / "verdict.json").write_text('{"verdict": "better"}')
    (tmp_path / "run_1/run_info.json").write_text('{"status": "finished"}')
    assert [one["run"] for one in ledger.found(tmp_path)] == ["run_1"]


def test_a_run_under_way_is_not_killed(tmp_path, capsys):
    """Fails if a run whose process holds its folder counts as killed."""
    filelock = pytest.importorskip("filelock")
    run_folder(tmp_path / "run_1", "running")
    with filelock.FileLock(tmp_path / "run_1/.lock"):
        assert [one["verdict"] for one in shown(capsys, tmp_path)] == ["running"]
    assert [one["verdict"] for one in shown(capsys, tmp_path)] == ["killed"]


def test_a_thousand_runs_are_read_once_each(tmp_path, capsys, monkeypatch):
    """Fails if showing many runs judges them anew, or reads more of a folder than three small files."""
    run_folder(tmp_path / "run_0")
    for i in range(1, 1000):
        shutil.copytree(tmp_path / "run_0", tmp_path / f"run_{i}")
    count, real = [0], Path.read_bytes

    def counted(path):
        count[0] += 1
        return real(path)

    monkeypatch.setattr(compare, "judged", lambda *given: 1 / 0)
    monkeypatch.setattr(ledger.Path, "read_bytes", counted)
    own = len(compare.directions()) and count[0]  # what the metrics' directions cost is no run's
    count[0] = 0
    rows = shown(capsys, tmp_path, "--rebuild")
    assert len(rows) == 1000 and 2000 < count[0] <= 3000 + 2 * own


def test_it_starts_without_torch():
    """Fails if a table waits seconds for libraries that it does not need."""
    check = "import sys, runs.ledger, runs.verdict; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=PROJECT).returncode == 0
