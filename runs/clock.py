"""The clocks of a run: the seconds of its phases, and in training where they go and what is due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from runs import environment, folder
from runs.live import LIVE
from variants.kit import ranks

SAY_SECONDS = 30  # between two lines on the screen
SPARE = 20  # a checkpoint that takes t seconds is followed by at least 20·t of training: a wide SAE's takes long


@dataclass
class Clock:
    """Seconds spent, by what they were spent on, and the moments (time.monotonic) from which other things count."""

    activations: float = 0.0  # texts and the language model
    sae: float = 0.0  # SAE steps
    snapshots: float = 0.0  # evals along training
    lap_begun: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)  # last line on the screen
    saved: float = field(default_factory=time.monotonic)  # last checkpoint
    save_seconds: float = 0.0  # what that took
    rate_from: float = field(default_factory=time.monotonic)  # tokens/s of a row of the log: since then,
    rate_step: int = 0  # and since this step
    first: int | None = None  # the first step made in this process
    covered: int = 0  # steps of the blocks whose activations were made or read in this process,
    until: int = 0  # which are those before this one

    def lap(self, name: str) -> None:
        """Add the time since the last lap to what is spent on `name`."""
        now = time.monotonic()
        setattr(self, name, getattr(self, name) + now - self.lap_begun)
        self.lap_begun = now

    def begin_steps(self, step: int, begins: int, ends: int) -> None:
        """The activations of a block, of steps begins … ends, are there: what follows are SAE steps, from `step` on."""
        self.lap("activations")
        self.first = step if self.first is None else self.first
        self.covered, self.until = self.covered + ends - begins, ends
        self.count_rate(step)
        self.said = self.lap_begun

    def count_rate(self, step: int) -> None:
        """Let the speed be that of the steps from `step` on."""
        self.rate_from, self.rate_step = time.monotonic(), step

    def rate(self, step: int, batch_size: int) -> float:
        """Tokens a second of each SAE since `count_rate`."""
        return (step - self.rate_step) * batch_size / max(time.monotonic() - self.rate_from, 1e-9)

    def eta(self, step: int, total: int) -> float | None:
        """Seconds from `step` to the end of training, by what steps and activations have taken here; None at first."""
        if self.first is None or step <= self.first:
            return None
        of_steps = self.sae + self.snapshots + time.monotonic() - self.lap_begun
        of_activations = (total - self.until) * self.activations / self.covered
        return (total - step) * of_steps / (step - self.first) + of_activations

    def may_say(self) -> bool:
        """Whether a line on the screen is due."""
        return time.monotonic() - self.said > SAY_SECONDS

    def may_save(self, seconds: float) -> bool:
        """Whether a checkpoint is due, one in so many seconds."""
        return time.monotonic() > self.saved + max(seconds, SPARE * self.save_seconds)

    def has_saved(self, begun: float) -> None:
        """Note a checkpoint that was begun then and is written now."""
        self.saved = time.monotonic()
        self.save_seconds = self.saved - begun


@contextmanager
def phase(name: str, info: dict, out: Path) -> Iterator[None]:
    """Time a phase and name it in run_info.json, so that even a process killed without a word leaves its place."""
    info["phase"] = name
    info.setdefault("seconds_before", sum(info["seconds"].values()))  # of earlier processes
    if not ranks.number():
        folder.write_info(out, info)
        LIVE.phase(name)
    start = time.monotonic()
    try:
        yield
    finally:  # the time of a phase that was interrupted is the run's, too
        info["seconds"][name] = round(info["seconds"].get(name, 0) + time.monotonic() - start, 1)
    peaks = info.setdefault("peak_memory_gb", {})
    peaks[name] = environment.peak_memory_gb(info["settings"]["device"])  # so far
