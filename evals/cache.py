"""A bounded, shared store of what the language model gave, addressed by the hash of everything it depends on.

Entries are safetensors files written to a temporary name and renamed, so a killed process leaves no half entry and two
processes that compute the same entry do not disturb each other. A damaged one is made again, and a store that cannot be
written, or is full, costs speed and not the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LEFT_BEHIND = 24 * 3600  # seconds after which an unfinished file is that of a process which was killed


def digest(value) -> str:
    """SHA-256 (hex) of a JSON-like value; the same for the same content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Tensors by content: `get(kind, depends_on, make)` gives what `make()` returned for these `depends_on` before."""

    def __init__(self, folder: Path, limit_gb: float):
        self.folder, self.limit = Path(folder), int(limit_gb * 1e9)
        self.used: set[Path] = set()  # entries of this process are not evicted to make room for its own next one
        self.hits: list[str] = []
        self.misses: list[str] = []

    def path(self, kind: str, depends_on: dict) -> Path:
        return self.folder / f"{kind}-{digest(depends_on)[:32]}.safetensors"

    def fits(self, n_bytes: int) -> bool:
        """Whether an entry of that size may be stored beside what this process already uses."""
        return n_bytes + sum(map(bytes_of, self.used)) <= self.limit

    def get(self, kind: str, depends_on: dict, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry, from disk (memory-mapped) or made now and stored if it fits; values are the same either way."""
        path = self.path(kind, depends_on)
        tensors = self._stored(path)
        if tensors is not None:
            self.hits.append(kind)
            return tensors
        self.misses.append(kind)
        tensors = make()
        if self.fits(sum(t.numel() * t.element_size() for t in tensors.values())):  # else it never leaves its device
            tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            self._store(path, tensors)
        return tensors

    def forget(self, kind: str, depends_on: dict) -> None:
        """Remove an entry, whatever lies there."""
        remove(self.path(kind, depends_on))

    def size(self) -> int:
        """Bytes in the store."""
        return sum(map(bytes_of, self.folder.glob("*.safetensors")))

    def _stored(self, path: Path) -> dict[str, Tensor] | None:
        from safetensors import safe_open

        if not os.path.lexists(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
                written = (file.metadata() or {}).get("checksum")
            if written and written != checksum(tensors):
                raise ValueError("its bytes are not those that were written")
        except Exception as error:  # noqa: BLE001  a damaged entry is made again, whatever is wrong with it
            print(f"cache: {path.name} is unreadable ({error}); making it again", flush=True)
            remove(path)
            return None
        with contextlib.suppress(OSError):  # in a store that may only be read
            os.utime(path)  # least recently used goes first
        self.used.add(path)
        return tensors

    def _store(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, {"checksum": checksum(tensors)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:  # a full disk costs speed, not the run
            remove(temporary)
            print(f"cache: {path.name} not stored ({error}); going on without", flush=True)
            return
        self.used.add(path)
        self._evict()

    def _evict(self) -> None:
        for left in self.folder.glob("*.tmp"):
            if time.time() - time_of(left) > LEFT_BEHIND:
                remove(left)
        entries = sorted(self.folder.glob("*.safetensors"), key=time_of)
        total = sum(map(bytes_of, entries))
        for path in entries:
            if total <= self.limit:
                return
            if path not in self.used:
                total -= bytes_of(path)
                remove(path)


def checksum(tensors: dict[str, Tensor]) -> str:
    """XXH3 of the bytes of CPU tensors: it finds a changed bit at the speed at which memory is read."""
    import xxhash  # which `datasets` brings

    total = xxhash.xxh3_64()
    for key, tensor in sorted(tensors.items()):
        total.update(key.encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def bytes_of(path: Path) -> int:
    """Size of a file; 0 where another process has just removed it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def time_of(path: Path) -> float:
    """When a file was last used; now, where another process has just removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def remove(path: Path) -> None:
    """Remove a file or a folder, if that is allowed and it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
