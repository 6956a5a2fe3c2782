"""A whole run of seconds: its command, and how it is started, waited for and interrupted."""

import errno
import itertools
import subprocess
import sys
import time
from pathlib import Path

from tests import PROJECT

# several blocks, passes and a last block that is cut
SMALL = ["--profile=tiny", "--num_tokens=5000", "--block_tokens=2048", "--passes=2", "--device=cpu"]


def command(out: Path, cache: Path, *more: str) -> list[str]:
    """Arguments of experiment.main."""
    return [*SMALL, f"--out_dir={out}", f"--cache_dir={cache}", *more]


def start(out: Path, cache: Path, *more: str) -> subprocess.Popen:
    """The run in a process of its own, which can be killed."""
    return subprocess.Popen([sys.executable, "experiment.py", *command(out, cache, *more)], cwd=PROJECT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def leave_out_pages(patch=setattr) -> None:
    """Runs of this process end without report.html and features/: half of a small run's time. `patch` sets them."""
    from runs import report

    patch(report, "with_features", lambda out, looked_at, say: None)
    patch(report, "write", lambda out, sections, baseline, log_rows: None)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the process has made that file; AssertionError with its last words if it ends before."""
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert path.exists(), process.communicate()[1]


def fail_at_checkpoint(number: int, arguments: list[str], monkeypatch) -> None:
    """A run in this process that ends at a checkpoint, for which the disk has no space: it can be continued."""
    import experiment
    from runs import checkpoint, clock

    count, real = itertools.count(1), checkpoint.write

    def limited(folder, state):
        if next(count) >= number:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / checkpoint.NAME))
        real(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", limited)
        patch.setattr(clock, "SPARE", 0)  # one after every step, however long each takes
        assert experiment.main([*arguments, "--checkpoint_seconds=0"]) == 1
