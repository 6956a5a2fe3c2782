"""How a run speaks: on stdout and in its log.txt. No output that cannot be written ends it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import select
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from runs.live import LIVE


class Steady(io.FileIO):
    """A standard stream whose reader may have gone (a closed pipe, a full disk): what cannot be written is dropped."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
            if written is None:  # a pipe that does not wait and is full
                select.select([], [self], [], 10)
                written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def steady() -> None:
    """Make stdout and stderr such that no write to them can fail, for libraries' prints, progress bars and C code too.

    A closed one becomes os.devnull: else the next file that is opened would take its number, and with it what C code
    prints. Characters that an encoding lacks become `?`. A stream that somebody has put in the place of Python's own
    stays as it is.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue
        encoding = getattr(stream, "encoding", None) or "utf-8"
        raw = Steady(number, "wb", closefd=False)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
        errors = "replace" if number == 1 else "backslashreplace"
        by_line = number == 2 or raw.isatty()
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line))


def is_terminal(stream) -> bool:
    """Whether somebody may be watching; False for a stream that is None, closed or no stream at all."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


class Voice:
    """Progress on stdout and in the run's log.txt: a bar on a terminal, else a line every 30 seconds.
    Never on stderr.
    """

    def __init__(self):
        self.log: Optional[io.TextIOBase] = None
        self.silent = False  # of several processes, one speaks
        self.crashes = False  # whether faulthandler is enabled by this

    def say(self, text: str) -> None:
        if self.silent:
            return
        LIVE.heard(text)
        if self.log:
            with contextlib.suppress(OSError):  # a full disk: the text stays in the buffer, for the next try
                print(text, file=self.log, flush=True)
        try:
            print(text, flush=True)
        except UnicodeEncodeError as error:
            with contextlib.suppress(OSError, ValueError):
                print(text.encode(error.encoding, "replace").decode(error.encoding), flush=True)
        except (OSError, ValueError, AttributeError):  # nobody listens any more
            pass

    def listen(self, file: Path) -> None:
        """Write all that is said to a file too, always in UTF-8, and there what a crash in native code has to say
        (faulthandler).
        """
        self.log = open(file, "a", encoding="utf-8", errors="replace")  # noqa: SIM115  open to the end of the run
        if not faulthandler.is_enabled() or self.crashes:  # else somebody has asked for it elsewhere
            faulthandler.enable(self.log)
            self.crashes = True

    @contextmanager
    def muted(self):
        """Nothing is said within."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def close(self) -> None:
        """Close log.txt; `say` goes on to stdout alone."""
        log, self.log = self.log, None
        if self.crashes:
            faulthandler.disable()
            self.crashes = False
        if log:
            with contextlib.suppress(OSError):
                log.close()

    def track(self, items, label: str, total: int, unit: str, size=lambda item: 1):
        """Yield the items; every 30 s say how far, how fast and how long still."""
        if not self.silent:
            items = LIVE.follow(items, label, total, size)
        if is_terminal(sys.stdout) and not self.silent:
            from tqdm import tqdm

            with tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stdout, leave=False) as bar:
                for item in items:
                    yield item
                    bar.update(size(item))
            return
        start = last = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += size(item)
            now = time.monotonic()
            if now - last >= 30 and done < total:
                last, rate = now, done / (now - start)
                speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
                self.say(f"{label}: {done:,} of {total:,} {unit}  {speed} {unit}/s  eta "
                         f"{duration((total - done) / rate)}")


VOICE = Voice()
say, track = VOICE.say, VOICE.track


def duration(seconds: float) -> str:
    """Seconds as one reads them: 45s, 3m05s, 2h10m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
