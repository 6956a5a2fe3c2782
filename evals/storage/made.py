"""Folders of the cache that are made once: whole or absent, checked by hashes at each use, made again if damaged."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from evals.storage.identity import file_digest

SUMS = "contents.sha256"  # in the folder, as sha256sum writes it; of a suffix that no model's digest counts
# a place is full, not to be written, or something else lies there
CLOSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
          errno.EISDIR, errno.EBUSY, errno.ENOTEMPTY}


def folder(place: Path, make: Callable[[Path], None], check: Callable[[Path], None]) -> Path:
    """`place`, where make(folder) has made a folder, now or at an earlier time.

    What is damaged is said and made again, by one process at a time. Where `place` cannot be written, the folder is
    made for this process alone. `check`: as `fault` takes it. OSError if the folder can be made nowhere.
    """
    if not fault(place, check):
        return place
    try:
        return _filled(place, make, check)
    except Exception as error:
        if not is_closed(error):
            raise
        here = own_folder() / place.name
        print(f"cache: {place.parent} cannot be written ({error}); {place.name} goes to {here.parent} for this run "
              "alone", flush=True)
    try:
        return _filled(here, make, check)
    except Exception as error:
        if not is_closed(error):
            raise
        raise OSError(f"{place.name} can be written neither to {place.parent} nor to {here.parent}: {error}\n"
                      "free some space, or name another folder with --cache_dir") from error


def fault(place: Path, check: Callable[[Path], None]) -> str:
    """What is wrong with a folder that `folder` has made: "" if nothing is, "absent" if nothing is there.

    One without hashes, of an earlier version, gets them unless check(place) raises a ValueError.
    """
    if not os.path.lexists(place):
        return "absent"
    if not place.is_dir():
        return "no folder"
    if not (place / SUMS).is_file():
        return _fault_of_earlier_version(place, check)
    try:
        listed = dict(reversed(line.split("  ", 1)) for line in (place / SUMS).read_text(encoding="utf-8").splitlines())
    except (ValueError, OSError):
        return f"{SUMS} is damaged"
    for name, found in listed.items():
        if not (place / name).is_file():
            return f"{name} is missing"
        if file_digest(place / name) != found:
            return f"{name} is damaged ({(place / name).stat().st_size:,} bytes)"
    return "" if listed else f"{SUMS} is empty"


def _fault_of_earlier_version(place: Path, check: Callable[[Path], None]) -> str:
    try:
        check(place)
        _write_sums(place)
    except ValueError as error:
        return str(error).splitlines()[0]
    except OSError:  # it may only be read, and is whole
        pass
    return ""


def _filled(place: Path, make: Callable[[Path], None], check: Callable[[Path], None]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f"{place.name}.lock"):
        found = fault(place, check)
        if not found:  # another process has made it meanwhile
            return place
        if found != "absent":
            print(f"cache: {place} is damaged: {found}; making it again", flush=True)
        with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary) / "made"
            make(made)
            _write_sums(made)
            if os.path.lexists(place):
                os.replace(place, Path(temporary) / "damaged")  # and removed with it
            os.replace(made, place)  # complete or absent, whenever the process is killed
    return place


def _write_sums(place: Path) -> None:
    files = [file for file in sorted(place.iterdir()) if file.is_file() and file.name != SUMS]
    lines = [f"{file_digest(file)}  {file.name}\n" for file in files]
    unfinished = place / f"{SUMS}.{os.getpid()}"
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, place / SUMS)


def is_closed(error: Exception) -> bool:
    """Whether an error says that a place cannot be written to."""
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return True
    return isinstance(error, OSError) and error.errno in CLOSED


@functools.cache
def own_folder() -> Path:
    """A folder of this process alone, which goes with it."""
    found = Path(tempfile.mkdtemp(prefix="sae_experiment_"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found
