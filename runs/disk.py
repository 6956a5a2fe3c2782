"""What is wrong with a disk, in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import evals.cache
from runs import environment, settings
from variants.kit.files import size

TEXTS = {  # libraries in C++ and Rust give no errno but these words
    "No space left on device": errno.ENOSPC, "os error 28": errno.ENOSPC,
    "disk is full": errno.ENOSPC, "disk full": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT, "os error 122": errno.EDQUOT,
    "File too large": errno.EFBIG, "os error 27": errno.EFBIG,
    "Read-only file system": errno.EROFS, "os error 30": errno.EROFS,
    "Input/output error": errno.EIO, "os error 5)": errno.EIO,
    "Stale file handle": errno.ESTALE, "Too many open files": errno.EMFILE}
LEAST_GB = 2.0  # of the store of activations, where the disk has that
# torch's words where a write fails for any of these reasons
HALF_WRITTEN = r"inline_container\.cc|PytorchStreamWriter failed writing"

# ------------------------------------------------------------------------------------------------ writing


def named(error: OSError, path: str | Path) -> OSError:
    """The same error, saying which file it is about where it does not yet: a write() knows none."""
    if error.filename is None and error.errno is not None:
        error.filename = str(path)
    return error


# ------------------------------------------------------------------------------------------------ what is wrong


def reasons(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, to the root."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def code_of(error: BaseException) -> tuple[int | None, str | None]:
    """(errno, file) of the disk's part in a failure, as far as they are known; (None, None) where it has none."""
    chain = list(reasons(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in WORDS:
            return one.errno, one.filename
    for one in chain:
        for words, code in TEXTS.items():
            if words in str(one):
                return code, None
    half = any(re.search(HALF_WRITTEN, str(one)) for one in chain)
    return (0, None) if half else (None, None)


def explained(error: BaseException, folder: str | Path | None,
              places: Sequence[str | Path] = ()) -> tuple[str, str] | None:
    """(what is wrong, what to do) of a failure of a disk, with the place and what is free there; None of any other.

    `folder` is where the run writes, `places` are others; of an error without a file it is the one with the least room.
    """
    code, file = code_of(error)
    if code is None:
        return None
    place = min(map(Path, [folder, *places]), key=lambda p: room(p)[1] or 0) if folder is not None else None
    if file is not None and not isinstance(file, int):
        place = Path(os.fspath(file))
    if place is None:
        return None
    if code in (0, errno.ENOENT) and folder is not None and not Path(folder).is_dir():
        return gone(folder)
    if code == errno.ENOENT:
        return None
    there, free, entries = room(place)
    what, advice = WORDS[code]
    if code == errno.ENOSPC and entries == 0:
        what = "the disk has no file entry (inode) left"
        advice = "delete files on that disk, many small ones count most"
    limit = file_size_limit() if code == errno.EFBIG else None
    if limit is not None:
        what = f"a file grew beyond the limit of {size(limit)} that this shell sets (ulimit -f)"
    said = "" if free is None else f"; {size(free)} free on that disk"
    about = f" (while writing {place.name})" if place != there else ""
    return f"{there}: {what}{about}{said}", f"{advice}; the same command continues from the last checkpoint"


def gone(folder: str | Path) -> tuple[str, str]:
    """The same for a run's folder that somebody took away."""
    return (f"{folder}: the run's folder was deleted or moved while the run went on",
            "start the same command again, and leave the folder until it has ended")


def room(place: Path) -> tuple[Path, int | None, int | None]:
    """The nearest folder that exists, free bytes and file entries of its disk; None what the system does not say."""
    place = place.absolute()
    there = next((p for p in (place, *place.parents) if p.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        return there, None, None
    try:
        found = os.statvfs(there)
    except (AttributeError, OSError):
        return there, free, None
    return there, free, found.f_favail if found.f_files else None  # some file systems make entries as they need them


def check_room(folder: str | Path, wanted: float, name: str) -> None:
    """OSError where the disk of a folder has less than the `wanted` bytes free; `name` is what names another folder."""
    free = environment.disk_free(folder)
    if free < wanted:
        raise OSError(f"{folder}: {size(free)} free, the run writes up to {size(wanted)}\n"
                      f"free some space, or name another folder with {name}")


def store_bounds(folder: str | Path, said: str) -> tuple[float, float]:
    """Bounds of the store of activations in a folder, GB: in all, and of what it holds in host memory at once.

    `said` is the setting. auto: a tenth of what is free, with what the store holds itself, so that it does not shrink
    as it fills. At least 2, of a disk that has less than 2.2 GB nine tenths. At once 8 (a block of 2^19 tokens of
    three layers of Gemma-2-2B holds 7.2), of a host with less than 32 GB of free memory a quarter, at least 2.
    """
    given = settings.store_gb(said)
    if given is not None:
        return given, given
    held = sum(evals.cache.bytes_of(entry) for entry in Path(folder).glob("*.safetensors"))
    free = room(Path(folder))[1]
    if free is None:
        return LEAST_GB, LEAST_GB
    available = (free + held) / 1e9
    memory = environment.memory_bound("cpu")[0] / 1e9
    return max(available / 10, min(LEAST_GB, 0.9 * available)), max(LEAST_GB, min(8.0, memory / 4))


def file_size_limit() -> int | None:
    """Bytes that one file may have (ulimit -f); None for no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


FREE_SOME = "free some space, or name a folder on another disk"
WORDS = {  # errno: what is wrong, what to do
    errno.ENOSPC: ("no space left on the disk", FREE_SOME),
    errno.EDQUOT: ("the disk quota is used up",
                   "free some space (quota -s shows yours), or name a folder on another disk"),
    errno.EFBIG: ("a file grew beyond what this disk allows",
                  "raise the limit (ulimit -f unlimited), or name a folder on another disk"),
    errno.EROFS: ("the file system is read-only, or has become so after an error",
                  "name a folder on a disk that can be written to"),
    errno.EIO: ("the disk gave an input/output error",
                "check the disk (dmesg names it), or name a folder on another one"),
    errno.ESTALE: ("the network disk has lost the folder (stale file handle)",
                   "mount it again, or name a folder on another disk"),
    errno.EMFILE: ("this process has too many files open (ulimit -n)", "raise the limit: ulimit -n 4096"),
    errno.ENFILE: ("this machine has too many files open", "end what holds them"),
    errno.ENOENT: ("a file is not there", ""),
    0: ("a file could not be written whole", FREE_SOME),
}
