"""What a run ran on: versions, commit, hardware. Standard library only; no path, key or token enters a run folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "datasets", "numpy", "scikit-learn", "safetensors", "tokenizers")


def public_name(name: str) -> str:
    """A hub name as it is; of a local path only its last part: paths do not belong in a result."""
    return Path(name).name if os.path.exists(name) else name


def seed_everything(seed: int) -> None:
    """The generators of torch, NumPy and Python."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict:
    """The state of those generators, in what `torch.load(weights_only=True)` reads."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                numpy=[name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss], python=list(random.getstate()))


def set_random_state(state: dict) -> None:
    """Put them back."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def versions() -> dict[str, str | None]:
    """Installed versions of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the project, with "+changes" where the work tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: E731
        return run("rev-parse", "HEAD").strip() + ("+changes" if run("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: str) -> dict:
    """Processor, cores, memory and GPU."""
    import torch

    facts = dict(machine=platform.machine(), system=platform.system(), cores=os.cpu_count(), threads=torch.get_num_threads(), device=device)
    if device == "cuda":
        facts |= dict(gpu=torch.cuda.get_device_name(), gpu_gb=round(torch.cuda.mem_get_info()[1] / 1e9, 1))
    return facts


def peak_memory_gb(device: str) -> dict[str, float]:
    """Highest resident host memory of this process and, on a GPU, the allocator's peak, in GB (1e9 bytes)."""
    import torch

    peak = dict(host=round(_peak_host_bytes() / 1e9, 3))
    if device == "cuda":
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peak


def _peak_host_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_available(device: str) -> float:
    """Bytes a run may use: of the GPU what other processes leave, or of the host within the container's limit (psutil sees the host)."""
    import psutil
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # the second is free as well, and this process's
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        container = float("inf") if limit == "max" else int(limit) - used
    except (OSError, ValueError):
        container = float("inf")
    return min(psutil.virtual_memory().available, container) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this host


def matmul_rate(device: str, dtype) -> float:
    """Floating-point operations per second of a product like those of the models, from a fifth of a second of trying."""
    import torch

    a, b = (torch.ones(1024, 1024 if device == "cpu" else 8192, device=device, dtype=dtype) for _ in range(2))
    rounds = 1 if device == "cpu" else 20

    def multiply() -> None:
        for _ in range(rounds):
            a @ b.T
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first round pays for the library's start
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.2:
        multiply()
        done += rounds
    return 2 * 1024 * a.numel() * done / elapsed


def disk_free(folder: str | Path) -> int:
    """Free bytes on the disk that holds the folder, or would hold it once made."""
    import shutil

    folder = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
