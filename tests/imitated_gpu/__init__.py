"""A GPU imitated in host memory, for machines without one: finds what only shows off the CPU. What it refuses and
counts: gpu.cpp.

    python -m tests.imitated_gpu experiment.py --profile=tiny --out_dir=run_1      # any script
    python -m tests.imitated_gpu -m tests.benchmarks.training                      # or module

`IMITATED_GPU_BYTES` is its memory (16e9), `IMITATED_GPU_LEFT` what of it can be had, as if others had taken the rest
unseen. Needs a C++ compiler and a build of torch without CUDA; nothing is compiled by torch.compile.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import time
import types
from pathlib import Path

SOURCE = Path(__file__).with_name("gpu.cpp")


def build() -> Path:
    """The compiled library, made once for this source and torch; CalledProcessError where it does not compile."""
    torch_folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    made_of = SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes() + bytes(torch_folder)
    made_for = hashlib.sha256(made_of).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae_experiment"
    library = folder / f"imitated_gpu_{made_for}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
        subprocess.run([os.environ.get("CXX", "c++"), "-O1", "-std=c++20", "-fPIC", "-shared", str(SOURCE),
                        "-o", str(unfinished), *headers, *links], check=True, capture_output=True, text=True)
        os.replace(unfinished, library)
    return library


def start(library: Path, memory: int, left: int) -> None:
    """Load it and let torch.cuda speak of it; `memory` and what is `left` of it in bytes.

    Comes before torch is imported, which looks for a GPU once.
    """
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # there is no machine code to make
    import torch

    torch.ops.load_library(str(library))
    gpu, cuda = torch.ops.imitated_gpu, torch.cuda
    gpu.limit(left)
    properties = types.SimpleNamespace(name="imitated GPU", total_memory=memory, major=9, minor=0,
                                       multi_processor_count=1)

    class Event:
        def __init__(self, *args, **kwargs):
            self.seconds = 0.0

        def record(self, *args):
            self.seconds = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, other) -> float:
            return 1e3 * (other.seconds - self.seconds)

    for name, found in dict(is_available=True, is_initialized=True, device_count=1, current_device=0,
                            is_bf16_supported=True, get_device_name="imitated GPU", get_device_capability=(9, 0),
                            get_device_properties=properties, _exchange_device=0, _maybe_exchange_device=0,
                            _lazy_init=None, set_device=None, synchronize=None, empty_cache=None, manual_seed=None,
                            manual_seed_all=None).items():
        setattr(cuda, name, lambda *args, found=found, **kwargs: found)
    cuda.device, cuda.Event = contextlib.nullcontext, Event
    cuda.memory_allocated = cuda.memory_reserved = lambda *args: gpu.allocated()
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *args: gpu.peak()
    cuda.reset_peak_memory_stats = lambda *args: gpu.reset_peak()
    cuda.mem_get_info = lambda *args: (memory - gpu.allocated(), memory)
    cuda.set_per_process_memory_fraction = lambda share, *args: gpu.limit(int(share * memory))
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.set_sync_debug_mode = lambda mode: gpu.raise_on_wait(mode in (2, "error"))

    # storages that torch's Python makes by name instead of by an operation
    new = torch._C.StorageBase.__new__

    def bytes_on(device, n: int):
        return torch.empty(n, dtype=torch.uint8, device=device).untyped_storage()

    def storage(cls, *args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            return bytes_on(device, args[0] if args else 0)
        return new(cls, *args, **({} if device is None else {"device": device}), **kwargs)

    torch.UntypedStorage.__new__ = storage
    torch.UntypedStorage.clone = lambda self: bytes_on(self.device, self.nbytes()).copy_(self)
    torch.storage._StorageBase._to = lambda self, device, non_blocking=False: (
        self if self.device == device else bytes_on(device, self.nbytes()).copy_(self, non_blocking))
