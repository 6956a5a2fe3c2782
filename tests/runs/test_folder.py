"""The manners of a run folder: what is written appears whole, and nothing that lies there is destroyed."""

import fcntl
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import filelock
import pytest

from runs import folder
from tests import PROJECT
from tests.runs.records import command


def test_json_is_strict_and_whole(tmp_path, monkeypatch):
    """Fails if NaN is written, order is changed, or a crash while writing harms the old file or leaves a new one."""
    path = tmp_path / "deep/a.json"
    folder.write_json(path, {"b": [math.nan, (math.inf, 1.5)], "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "b": [\n  null,\n  [\n   null,\n   1.5\n  ]\n ],\n "a": "ü"\n}\n'
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        folder.write_json(path, {})
    assert [p.name for p in path.parent.iterdir()] == ["a.json"] and "ü" in path.read_text(encoding="utf-8")


def claimed(out, mark):
    state, lock = folder.claim(out, mark)
    lock.release()
    return state


def test_claim_keeps_what_is_ours_and_moves_the_rest(tmp_path, capsys):
    """Fails if a folder is resumed under another fingerprint, one without results passes, or anything is lost."""
    out = tmp_path / "a/run_1"
    assert claimed(out, "m") == "new"
    (out / ".log.txt.0a1b2c3d.tmp").touch()  # what a process killed while writing leaves behind
    assert claimed(out, "m") == "new"  # killed before run_info.json was there
    folder.write_json(out / "run_info.json", {"fingerprint": "m", "status": "finished"})
    assert claimed(out, "m") == "resume"
    folder.write_json(out / "final_info.json", {"x": 1})
    assert claimed(out, "m") == "finished"
    assert claimed(out, "other") == "new" and os.listdir(out) == [".lock"]
    assert sorted(os.listdir(tmp_path / "a/run_1.previous-1")) == [".lock", "final_info.json", "run_info.json"]
    (out / "notes.txt").write_text("mine")
    (tmp_path / "a/run_1.previous-2").touch()
    assert claimed(out, "other") == "new" and (tmp_path / "a/run_1.previous-3/notes.txt").read_text() == "mine"
    assert capsys.readouterr().out.count("moved to") == 2
    assert folder.next_free(f"{tmp_path}/a/run_") == f"{tmp_path}/a/run_2"


def test_second_process_fails_at_once_and_a_kill_frees_the_folder(tmp_path):
    """Fails if the second process waits or goes on, or if kill -9 leaves the folder locked."""
    hold = ("import sys, time; from runs import folder; held = folder.claim(sys.argv[1], 'm'); "
            "print(held[0], flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run_1"], cwd=PROJECT, stdout=subprocess.PIPE,
                              text=True)
    try:
        assert holder.stdout.readline() == "new\n"
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="run_1 is in use by another running process\n"):
            folder.claim(tmp_path / "run_1", "m")
        assert time.monotonic() - start < 20  # it holds the folder for 60
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert claimed(tmp_path / "run_1", "m") == "new"


def test_a_kill_in_the_middle_of_moving_loses_nothing(tmp_path):
    """Fails if content is moved piece by piece, so that a kill splits it between two folders."""
    (tmp_path / "run_1/sub").mkdir(parents=True)
    (tmp_path / "run_1/sub/x").write_text("mine")
    (tmp_path / "run_1/y").write_text("mine too")
    dying = ("import os, sys; from runs import folder; os.link = lambda *_: os._exit(9); "
             "folder.claim(sys.argv[1], 'm')")
    killed = command("-c", dying, str(tmp_path / "run_1"))
    assert killed.returncode == 9
    assert (tmp_path / "run_1.previous-1/sub/x").exists() and (tmp_path / "run_1.previous-1/y").exists()
    assert claimed(tmp_path / "run_1", "m") == "new" and not (tmp_path / "run_1.previous-2").exists()


def test_a_lock_on_a_folder_moved_meanwhile_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    """Fails if the lock that `claim` returns is on a file that no longer lies in the folder."""
    acquire, moved = filelock.FileLock.acquire, tmp_path / "run_1.previous-1"

    def acquire_what_is_moved(lock, **options):
        acquire(lock, **options)
        if not moved.exists():  # as if the owner moved the folder between this process's open() and flock()
            os.rename(tmp_path / "run_1", moved)
            (tmp_path / "run_1").mkdir()
            (tmp_path / "run_1/.lock").touch()

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_what_is_moved)
    _, lock = folder.claim(tmp_path / "run_1", "m")
    with open(tmp_path / "run_1/.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()


def _contend(barrier, outs, number, queue):
    for out in outs:
        barrier.wait(30)
        try:
            held, said = folder.claim(out, str(number)), ""
        except Exception as error:  # noqa: BLE001  of any kind: the others wait for this process
            held, said = None, type(error).__name__
        queue.put((str(out), held[0] if held else said))
        barrier.wait(30)  # the winner holds on until all have tried
        if held:
            held[1].release()


@pytest.mark.slow
def test_of_processes_that_claim_together_one_wins(tmp_path):
    """Fails if two processes both get a folder while its old content is being moved away, or move it twice."""
    outs = [tmp_path / f"run_{i}" for i in range(30)]
    for out in outs:
        out.mkdir()
        (out / "old").touch()
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_contend, args=(barrier, outs, n, queue), daemon=True) for n in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in range(3 * len(outs))]
    for process in processes:
        process.join(30)
    for out in outs:
        assert sorted(said for name, said in results if name == str(out)) == ["InUse", "InUse", "new"]
        assert (tmp_path / f"{out.name}.previous-1/old").exists() and not (tmp_path / f"{out.name}.previous-2").exists()


def test_places_that_are_no_run_folder(tmp_path, monkeypatch):
    """Fails if a file, the working folder, the project, what contains or links to them or a mount could be moved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(PROJECT)
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"file": "is a file", ".": "current folder", tmp_path.parent: "current folder", "here": "current folder",
              PROJECT: "project's folder", PROJECT.parent: "(project's|current) folder", "link": "project's folder",
              PROJECT / "variants": "own folder variants/", PROJECT / "runs/baseline/x": "own folder runs/",
              "/proc": "mount point", "loop": "loop"}
    for out, said in places.items():
        with pytest.raises(ValueError, match=said):
            folder.claim(out, "m")
    for out in ("/proc/run_1", "file/run_1"):
        with pytest.raises(PermissionError, match="cannot write to --out_dir"):
            folder.claim(out, "m")
