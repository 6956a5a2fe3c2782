"""Files and folders that are whole or not there, also after a power cut, and their names. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def size(n_bytes: float) -> str:
    """A number of bytes in the unit that shows something: 4 kB, 1.5 MB, 20.0 GB (powers of 1,000)."""
    for unit, factor, digits in (("TB", 1e12, 1), ("GB", 1e9, 1), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if abs(n_bytes) >= factor * (0.95 if digits else 1):
            return f"{n_bytes / factor:,.{digits}f} {unit}"
    return f"{n_bytes:,.0f} bytes"


def put(temporary: Path, path: Path) -> None:
    """Give a written file or folder its name; after a power cut the name stands for the whole content or the old one.

    A file must be synced already; of a folder all files are here.
    """
    for file in (p for p in temporary.rglob("*") if p.is_file()) if temporary.is_dir() else ():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last; where a system cannot (Windows, some network disks), nothing is promised."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)


def digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            total.update(block)
    return total.hexdigest()


def file_name(text: str, most: int = 160) -> str:
    """A text as (part of) a file's name: ASCII letters, digits, `. _ - + = ( ) ,` and spaces, `most` of them at most.

    Anything else becomes "-", the end of what is too long is left out; a digest then tells the text from its like.
    """
    plain = re.sub(r"[^A-Za-z0-9._+=(), -]", "-", text)
    if plain == text and len(text) <= most:
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: most - 9]}-{mark}"
