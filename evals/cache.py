"""A bounded, shared store of what the language model gave, addressed by the hash of everything it depends on.

Entries are safetensors files written to a temporary name and renamed, so a killed process leaves no half entry and two
processes that compute the same entry do not disturb each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def digest(value) -> str:
    """SHA-256 (hex) of a JSON-like value; the same for the same content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Tensors by content: `get(kind, depends_on, make)` returns what `make()` returned for the same `depends_on` before."""

    def __init__(self, folder: Path, limit_gb: float):
        self.folder, self.limit = Path(folder), int(limit_gb * 1e9)
        self.used: set[Path] = set()  # entries of this process are not evicted to make room for its own next one
        self.hits: list[str] = []
        self.misses: list[str] = []

    def path(self, kind: str, depends_on: dict) -> Path:
        return self.folder / f"{kind}-{digest(depends_on)[:32]}.safetensors"

    def fits(self, n_bytes: int) -> bool:
        """Whether an entry of that size may be stored beside what this process already uses."""
        return n_bytes + sum(p.stat().st_size for p in self.used if p.exists()) <= self.limit

    def get(self, kind: str, depends_on: dict, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The entry, from disk (memory-mapped) or made now and stored if it fits; values are the same either way."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        path = self.path(kind, depends_on)
        if path.exists():
            try:
                tensors = load_file(path)
                os.utime(path)  # least recently used goes first
                self.used.add(path)
                self.hits.append(kind)
                return tensors
            except Exception as error:  # noqa: BLE001  a damaged entry is made again, whatever is wrong with it
                print(f"cache: {path.name} is unreadable ({error}); making it again", flush=True)
                path.unlink(missing_ok=True)
        self.misses.append(kind)
        tensors = make()
        if self.fits(sum(t.numel() * t.element_size() for t in tensors.values())):  # else it never leaves its device
            tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, temporary)
                os.replace(temporary, path)
                self.used.add(path)
                self._evict()
            except (OSError, SafetensorError) as error:  # a full disk costs speed, not the run
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                print(f"cache: {path.name} not stored ({error}); going on without", flush=True)
        return tensors

    def size(self) -> int:
        """Bytes in the store."""
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))

    def _evict(self) -> None:
        entries = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in entries)
        for path in entries:
            if total <= self.limit:
                return
            if path not in self.used:
                total -= path.stat().st_size
                path.unlink(missing_ok=True)
