"""What a run ran on: versions, commit, hardware; no path, key or token enters a run folder.

torch, NumPy and psutil are imported where they are used, so that `--help` need not wait for them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "datasets", "numpy", "scikit-learn", "safetensors",
            "tokenizers")


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
                numpy=[name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss],
                python=list(random.getstate()))


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
    def told(*args: str) -> str:
        command = ["git", *args]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5,
                              check=True).stdout.strip()

    try:
        changed = told("status", "--porcelain", "--untracked-files=no")
        return told("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: str) -> dict:
    """Processor, cores, memory and GPU."""
    import torch

    facts = dict(machine=platform.machine(), system=platform.system(), cores=os.cpu_count(),
                 threads=torch.get_num_threads(), device=device)
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


def memory_bound(device: str) -> tuple[float, str]:
    """(bytes a run may use, what sets that bound): "" for the machine itself, else the name of a limit."""
    import psutil
    import torch

    if device == "cuda":
        # the second is free as well, and this process's
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved(), ""
    rooms = {"": psutil.virtual_memory().available, **memory_limits(Path("/"), os.environ)}
    bound = min(rooms, key=rooms.get)
    held = psutil.Process().memory_info()
    own = held.rss - getattr(held, "shared", 0)  # what is shared are files in the page cache, which count as free
    return max(0.0, rooms[bound]) / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + own, bound  # torchrun's, on this host


def memory_limits(root: Path, variables: Mapping[str, str]) -> dict[str, float]:
    """Bytes still free under each limit on this process's host memory, by its name.

    `root`: where /proc and /sys/fs/cgroup are.
    Limits of control groups count on the way from the process's own up to the highest that is visible, ulimit's by what
    is taken of them, and Slurm's where no control group holds it.
    """
    found = {}
    for name, folder in control_groups(root).items():
        found |= {f"{file} of the control group {name}": room for file, room in _group_rooms(folder).items()}
    asked = _slurm_bytes(variables)
    taken = _statuses(root / "proc/self/status")
    if asked and not found:
        found["the memory asked of Slurm"] = asked - taken.get("VmRSS", 0)
    for line in _lines(root / "proc/self/limits"):
        for name, of, key in (("ulimit -v", "Max address space", "VmSize"), ("ulimit -d", "Max data size", "VmData")):
            soft = line.removeprefix(of).split()[0] if line.startswith(of) else ""
            if soft.isdigit():
                found[name] = int(soft) - taken.get(key, 0)
    return found


def control_groups(root: Path) -> dict[str, Path]:
    """This process's control groups that count memory, {path: folder}, its own first; versions 1 and 2 (cgroups(7))."""
    own = {}  # controller: path, as the kernel sees it; "" is version 2
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    found = {}
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, options = right.split()[0], right.split()[-1].split(",")
        controller = "memory" if kind == "cgroup" else ""
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "memory" not in options) or controller not in own:
            continue
        top, mount = (Path(field.replace("\\040", " ")) for field in left.split()[3:5])
        path = Path(own[controller])
        # in a container the path may be the host's
        inside = path.relative_to(top) if path.is_relative_to(top) else Path()
        place = root / mount.relative_to("/")
        for part in (inside, *inside.parents):
            if (place / part).is_dir():
                found[str(Path("/") / part)] = place / part
    return found


def _group_rooms(folder: Path) -> dict[str, float]:
    """Bytes still free under each memory limit of one control group; what the kernel may drop counts as free."""
    statistics = {key: int(value) for key, value in (line.split()[:2] for line in _lines(folder / "memory.stat"))
                  if value.isdigit()}
    found = {}
    for used, inactive, limits in (("memory.current", "inactive_file", ("memory.max", "memory.high")),
                                   ("memory.usage_in_bytes", "total_inactive_file", ("memory.limit_in_bytes",))):
        taken = _number(folder / used)
        for limit in limits:
            most = _number(folder / limit)
            if most is not None and most < 2**60:  # version 1 writes "none" as the largest number of pages
                found[limit] = most - max(0, (taken or 0) - statistics.get(inactive, 0))
    return found


def _slurm_bytes(variables: Mapping[str, str]) -> float:
    """Host memory that a Slurm job was given on this node, in bytes; 0 for unknown, or for all of it."""
    for name, times in (("SLURM_MEM_PER_NODE", None), ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
                        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        given, count = variables.get(name, ""), variables.get(times, "1") if times else "1"
        if given.isdigit() and count.isdigit() and int(given):
            return int(given) * int(count) * 2**20
    return 0


def _statuses(file: Path) -> dict[str, int]:
    """The sizes in a /proc status file, in bytes."""
    parts = [line.split() for line in _lines(file)]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in parts if len(words) == 3 and words[2] == "kB"}


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def matmul_rate(device: str, dtype) -> float:
    """Floating-point operations per second of a product like the models', from a fifth of a second of trying."""
    import torch

    a, b = (torch.ones(1024, 1024 if device == "cpu" else 8192, device=device, dtype=dtype) for _ in range(2))
    rounds = 1 if device == "cpu" else 20

    def multiply() -> None:
        for _ in range(rounds):
            a @ b.T
        if device == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first round pays for the library's start
    done, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < 0.2:
        multiply()
        done += rounds
        elapsed = time.perf_counter() - start
    return 2 * 1024 * a.numel() * done / elapsed


def disk_free(folder: str | Path) -> int:
    """Free bytes on the disk that holds the folder, or would hold it once made."""
    import shutil

    folder = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
