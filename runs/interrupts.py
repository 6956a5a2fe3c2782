"""SIGTERM and Ctrl-C during a run."""

from __future__ import annotations

import signal


class Interrupts:
    """At once where nothing is half done, else (`deferred`) at the optimiser step's end; a second always at once."""

    def __init__(self):
        self.signal, self.deferred = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame) -> None:
        again, self.signal = self.signal, number
        if again or not self.deferred:
            raise KeyboardInterrupt
