"""The file that holds all a resume needs, while a run trains, and the one before it.

A checkpoint is a zip archive, and torch gives every record of it a CRC-32 as it writes, which torch.load does not look
at (a flipped bit loads as another weight). `mend` does, at 2 to 3 GB/s, before a run continues; at writing it costs
nothing more. Disk: two checkpoints, three while one is written or where one was damaged, and one more where one is kept
for a longer run (runs/prolong.py); each 3 times the bytes of the parameters with Adam.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from runs import disk
from variants.kit import files

NAME, TEMPORARY = "checkpoint.pt", ".checkpoint.pt.tmp"
PREVIOUS, DAMAGED = "checkpoint.previous.pt", "checkpoint.damaged.pt"
KEPT = "checkpoint.before_decay.pt"  # outlives the run: with it a longer one goes on
NAMES = (NAME, PREVIOUS, KEPT)
PARTS = {"step", "cursor", "log", "recent", "rng", "saes"}


def write(out: Path, state: dict) -> None:
    """checkpoint.pt in the run's folder anew, whole or not at all; the one there was becomes checkpoint.previous.pt."""
    temporary = out / TEMPORARY
    try:
        with open(temporary, "wb") as file:  # opened here: what torch opens fails with no errno
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # its bytes may be what the last words need
        if isinstance(error, OSError):
            raise disk.named(error, out / NAME)  # noqa: B904  the same error
        raise
    if (out / NAME).exists():
        os.replace(out / NAME, out / PREVIOUS)
    files.put(temporary, out / NAME)


def keep(out: Path) -> None:
    """Let checkpoint.pt as it is stay under the name KEPT, instead of an earlier one: a hard link, nothing is written.

    On a disk without hard links nothing is kept.
    """
    temporary = out / f".{KEPT}.tmp"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        os.link(out / NAME, temporary)
        os.replace(temporary, out / KEPT)


def bring(source: Path, out: Path) -> None:
    """A checkpoint of another folder as checkpoint.pt of this one; it stays where it is. OSError names the file."""
    temporary = out / TEMPORARY
    try:
        os.link(source, temporary)
    except OSError:  # a disk without hard links
        try:
            shutil.copyfile(source, temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise disk.named(error, out / NAME)  # noqa: B904  the same error
    files.put(temporary, out / NAME)


def mend(out: Path, say: Callable[[str], None]) -> None:
    """Leave a sound checkpoint.pt, or none: a damaged one is put aside and said, and the one before takes its place."""
    for name in (NAME, PREVIOUS):
        file = out / name
        if not file.exists():
            continue
        wrong = damage(file)
        if not wrong:
            os.replace(file, out / NAME)
            return
        os.replace(file, out / DAMAGED)
        left = "the one before" if name == NAME and (out / PREVIOUS).exists() else "the start"
        say(f"{out.name}/{name} cannot be used ({wrong}); put aside as {DAMAGED}, going on from {left}")


def damage(file: Path) -> str:
    """What is wrong with a checkpoint, in a few words, or "".

    RuntimeError or MemoryError where it is the memory that lacks.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
        if record:
            return f"damaged: other bytes in {record} than were written"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError):
        return f"cut off or garbled: no whole archive in its {files.size(file.stat().st_size)}"
    except OSError as error:
        return f"the disk does not give it: {error.strerror or error}"
    except (RuntimeError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError) as error:
        if "allocate memory" in str(error):
            raise
        words = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return f"not readable by this version: {words}"
    lacks = sorted(PARTS - set(state)) if isinstance(state, dict) else sorted(PARTS)
    return f"not a checkpoint of this version: it lacks {', '.join(lacks)}" if lacks else ""


def part(state: dict, name: str, out: Path) -> dict:
    """What a checkpoint holds of one SAE, taken out of it; ValueError, with the file, if it holds none of that name."""
    if name not in state["saes"]:
        raise ValueError(f"{out.name}/{NAME} holds {', '.join(state['saes']) or 'no SAE'} and not {name}\n{BEGIN_ANEW}")
    return state["saes"].pop(name)


def fit(load: Callable[[dict], object], state: dict, out: Path) -> None:
    """load(state); ValueError, which names the file, where names or shapes are others."""
    try:
        load(state)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        words = " ".join(str(error).split())[:300]
        raise ValueError(f"{out.name}/{NAME} is of another run: {words}\n{BEGIN_ANEW}") from None


BEGIN_ANEW = "delete that file and checkpoint.previous.pt: the same command then trains from the start"


def remove(out: Path) -> None:
    """Delete what a finished run needs no more."""
    for name in (NAME, PREVIOUS, DAMAGED):
        (out / name).unlink(missing_ok=True)


def glance(file: Path) -> tuple[int, list[str]] | None:
    """(step, names of the SAEs) of a checkpoint, whose tensors are not read; None if there is no readable one."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return state["step"], list(state["saes"])
    except Exception:  # noqa: BLE001  `damage` tells what is wrong
        return None


def read(out: Path, device: torch.device | str, view: bool) -> dict | None:
    """The state, or None if there is no file.

    On `device`, or as a `view` of the file, of which only the recent losses are moved there.
    """
    file = out / NAME
    if not file.exists():
        return None
    state = torch.load(file, map_location="cpu" if view else device, weights_only=True, mmap=view)
    state["recent"] = {name: [(loss.to(device), {k: v.to(device) for k, v in terms.items()}) for loss, terms in rows]
                       for name, rows in state["recent"].items()}
    return state
