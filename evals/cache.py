"""A bounded, shared store of what the language model gave, addressed by the hash of everything it depends on.

Entries are safetensors files written to a temporary name and renamed, so a killed process leaves no half entry and two
processes that compute the same entry do not disturb each other. A damaged one is made again, and a store that cannot be
written, or is full, costs speed and not the run.

A GPU may make a large entry faster than a disk reads it: such an entry notes what making it took on which card, reads
and writes are timed, and the faster way is taken; it is written, and read ahead, in the background. Not so on a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter

import safetensors.torch
import torch
from torch import Tensor

LEFT_BEHIND = 24 * 3600  # seconds after which an unfinished file is that of a process which was killed
LARGE = 64e6  # bytes from which an entry that a GPU made is timed: a smaller one is read in no time
READS_FASTER = 3.0  # a disk reads up to about so many times as fast as it writes


def digest(value) -> str:
    """SHA-256 (hex) of a JSON-like value; the same for the same content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Tensors by content: `get(kind, depends_on, make)` gives what `make()` returned for these `depends_on` before."""

    def __init__(self, folder: Path, limit_gb: float, most_gb: float = math.inf):
        """At most `limit_gb` in all, `most_gb` of them held in host memory at once; a GB is 1e9 bytes."""
        self.folder, self.limit, self.most = Path(folder), int(limit_gb * 1e9), most_gb * 1e9
        self.used: set[Path] = set()  # entries of this process are not evicted to make room for its own next one
        self.hits: list[str] = []
        self.misses: list[str] = []
        self.said: set[tuple[str, str]] = set()
        self.read_speed = self.write_speed = math.inf  # bytes/s of the last large entry, from and to this folder
        self.returned, self.apart = math.inf, 0.0  # when the last entry was handed out; seconds from there to the next
        self.reader, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # the process waits for both at its end
        self.reading: tuple[Path | None, float, Future | None] = (None, 0.0, None)  # what is read ahead, since when
        self.writing: dict[Path, Future] = {}  # what was written last in the background
        self.in_flight = 0  # bytes of it that are not yet written

    def path(self, kind: str, depends_on: dict) -> Path:
        return self.folder / f"{kind}-{digest(depends_on)[:32]}.safetensors"

    def fits(self, n_bytes: int) -> bool:
        """Whether an entry of that size may be stored beside what this process already uses."""
        return n_bytes <= self.most and n_bytes + self.in_flight + sum(map(bytes_of, self.used)) <= self.limit

    def get(self, kind: str, depends_on: dict, make: Callable[[], dict[str, Tensor]],
            then: dict | None = None) -> dict[str, Tensor]:
        """The entry, from disk (memory-mapped) or made now and stored if it fits; values are the same either way.

        `then`: what the next request of a sequence will depend on. On a GPU it is read ahead in the background.
        """
        path = self.path(kind, depends_on)
        self.apart = max(0.0, perf_counter() - self.returned)
        tensors = self._stored(path)
        if tensors is None:
            self.misses.append(kind)
            tensors = self._made(path, make)
        else:
            self.hits.append(kind)
        next_path = self.path(kind, depends_on if then is None else then)
        if gpu() and next_path != path and bytes_of(next_path) >= LARGE and not self._slower(next_path, self.apart):
            self.reading = next_path, perf_counter(), self.reader.submit(self._read, next_path)
        self.returned = perf_counter()
        return tensors

    def holds(self, kind: str, depends_on: dict) -> bool:
        """Whether the entry of the next request is there, and reading it seems to be faster than making it."""
        path = self.path(kind, depends_on)
        return path.exists() and not self._slower(path, self.apart)

    def forget(self, kind: str, depends_on: dict) -> None:
        """Remove an entry, whatever lies there."""
        remove(self.path(kind, depends_on))

    def size(self) -> int:
        """Bytes in the store, with what is still being written."""
        wait(self.writing.values())
        return sum(map(bytes_of, self.folder.glob("*.safetensors")))

    def _stored(self, path: Path) -> dict[str, Tensor] | None:
        """An entry; None where there is none, it is damaged, or reading it takes longer than making it."""
        if path in self.writing:
            wait([self.writing[path]])
        (ahead, since, read), self.reading = self.reading, (None, 0.0, None)
        if not os.path.lexists(path) or self._slower(path, perf_counter() - since if ahead == path else 0.0):
            return None
        tensors = read.result() if ahead == path else self._read(path)
        if tensors is None:
            return None
        with contextlib.suppress(OSError):  # in a store that may only be read
            os.utime(path)  # least recently used goes first
        self.used.add(path)
        return tensors

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        begun, n_bytes = perf_counter(), bytes_of(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
                written = (file.metadata() or {}).get("checksum")
            if written and written != checksum(tensors):
                raise ValueError("its bytes are not those that were written")
        except Exception as error:  # noqa: BLE001  a damaged entry is made again, whatever is wrong with it
            print(f"cache: {path.name} is unreadable ({error}); making it again", flush=True)
            remove(path)
            return None
        if gpu() and written and n_bytes >= LARGE:  # without a checksum nothing was read yet
            self.read_speed = n_bytes / max(perf_counter() - begun, 1e-9)
        return tensors

    def _slower(self, path: Path, start: float) -> bool:
        """Whether reading takes longer than making did on this GPU, `start` seconds of it being free."""
        needed = bytes_of(path) / self.read_speed - start
        if needed <= 0 or needed <= seconds_made(path):
            return False
        self._say(path, "are made again, as reading them takes longer")
        return True

    def _made(self, path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, stored if that may be and pays; large tensors of a GPU stay there."""
        there, begun = os.path.lexists(path), perf_counter()
        tensors = make()
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        if there or not self.fits(n_bytes):
            return tensors
        if n_bytes >= LARGE and any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()  # now they are made
            self._store_in_background(path, tensors, n_bytes, perf_counter() - begun)
            return tensors
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.used.add(path)
        self._store(path, tensors, {})
        return tensors

    def _store_in_background(self, path: Path, tensors: dict[str, Tensor], n_bytes: int, seconds: float) -> None:
        if n_bytes / self.write_speed > READS_FASTER * seconds:
            self._say(path, "are not stored, as this disk would take longer than making them again")
            return
        if self.in_flight:  # waiting would cost what the store is to save
            self._say(path, "come faster than they are written: a later run stores those that are left out")
            return
        try:
            on_host, until_copied = copied(tensors)
        except RuntimeError as error:  # no host memory for the copy
            print(f"cache: {path.name} not stored ({error}); going on without", flush=True)
            return

        def write() -> None:
            try:
                until_copied()
                begun = perf_counter()
                self._store(path, on_host, {"seconds": f"{seconds:.3f}", "device": gpu()})
                self.write_speed = n_bytes / max(perf_counter() - begun, 1e-9)
            finally:
                self.in_flight = 0

        self.used.add(path)  # by this thread, which looks through them
        self.in_flight = n_bytes
        self.writing = {path: self.writer.submit(write)}

    def _say(self, path: Path, what: str) -> None:
        kind = path.name.rpartition("-")[0]
        if (kind, what) not in self.said:
            print(f"cache: entries of {kind} {what}", flush=True)
        self.said.add((kind, what))

    def _store(self, path: Path, tensors: dict[str, Tensor], note: dict[str, str]) -> None:
        """Write an entry of CPU tensors, and make room for it."""
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, temporary, {"checksum": checksum(tensors), **note})
            os.replace(temporary, path)
        except (OSError, safetensors.SafetensorError) as error:  # a full disk costs speed, not the run
            remove(temporary)
            print(f"cache: {path.name} not stored ({error}); going on without", flush=True)
            return
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


def gpu() -> str:
    """The name of the GPU that this process uses; "" for none."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""


def copied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies in host memory of a GPU's tensors, in the order of its stream, and what waits until they are whole."""
    on_host = {k: v.detach().contiguous().to("cpu", non_blocking=True) for k, v in tensors.items()}
    whole = torch.cuda.Event(blocking=True)
    whole.record()
    return on_host, whole.synchronize


def seconds_made(path: Path) -> float:
    """What making an entry took on a GPU like this process's, as it notes; infinite where that is not known."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            note = file.metadata() or {}
        return float(note["seconds"]) if note.get("device") == gpu() else math.inf
    except Exception:  # noqa: BLE001  without a note, or damaged, which its reading will say
        return math.inf


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
