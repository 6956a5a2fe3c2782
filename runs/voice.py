"""How a run speaks: on stdout and in its log.txt."""

from __future__ import annotations

import io
import sys
import time
from contextlib import contextmanager
from typing import Optional


class Voice:
    """Progress on stdout and in the run's log.txt: a bar on a terminal, else a line every 30 seconds. Never on stderr."""

    def __init__(self):
        self.log: Optional[io.TextIOBase] = None
        self.silent = False  # of several processes, one speaks

    def say(self, text: str) -> None:
        if self.silent:
            return
        print(text, flush=True)
        if self.log:
            print(text, file=self.log, flush=True)

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
        if self.log:
            self.log.close()
            self.log = None

    def track(self, items, label: str, total: int, unit: str, size=lambda item: 1):
        """Yield the items; every 30 s say how far, how fast and how long still."""
        if sys.stdout.isatty() and not self.silent:
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
                self.say(f"{label}: {done:,} of {total:,} {unit}  {speed} {unit}/s  eta {duration((total - done) / rate)}")


VOICE = Voice()
say, track = VOICE.say, VOICE.track


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
