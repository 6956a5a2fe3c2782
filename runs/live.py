"""Where a run stands, for programs that watch it: progress.json, replaced whole, and events.jsonl, a line an event.

progress.json: status (running, finished, failed, interrupted), phase, share (of the phase that is done, 0 to 1),
eta_seconds (to the end of the phase), what (what it is at) and what_share, tokens and total_tokens (in training), run,
pid, started and updated (UTC, ISO). What is not known is null. It is written at every change of phase, and in between
every two seconds at most, where the run gets on with something that is counted.

events.jsonl: {"time", "event", …} with event start, phase, row, note, warning, eval, error, verdict, end. A run that
continues appends to it.

A failure to write either is of no consequence. Of several ranks the first alone is ever opened. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from runs.reading import finite

PERIOD = 2.0  # seconds between two progress.json of one phase, at least
MARKS = ("note: ", "warning: ")  # lines that are events, too
INDENT = "    "  # a line of a table's words that was folded goes on so
LOGGERS = ("tensorboard", "wandb")  # what --log names, each the name of its package


class Live:
    """The run under way in this process, if it is the first rank's; else every method does nothing."""

    def __init__(self):
        self.out: Optional[Path] = None  # the run's folder
        self._clear()

    def _clear(self) -> None:
        self.state: dict[str, Any] = {}  # progress.json
        self.tracked: list[list] = []  # [label, done, total] of what the run is at, the innermost last
        self.next = 0.0  # time.monotonic() from which progress.json may be written again
        self.ends: Optional[float] = None  # time.monotonic() at which the phase will be through
        self.cut = False  # whether the last line of events.jsonl lacks its end
        self.warned: set[str] = set()
        self.settings: dict = {}
        self.asked: list[str] = []  # names of --log whose package is there and not yet begun
        self.loggers: dict[str, Any] = {}
        self.say: Callable[[str], None] = print

    # -------------------------------------------------------------------------------------------- beginning and end

    def open(self, out: Path, settings: dict, resumed: bool, say: Callable[[str], None]) -> None:
        """Begin: from now on the folder `out` says where its run stands.

        settings: without paths of this machine; resumed: whether an earlier run in the folder is continued.
        """
        self._clear()
        self.out, self.settings, self.say = out, settings, say
        self.state = dict(status="running", phase="preflight", share=None, eta_seconds=None, what=None,
                          what_share=None, tokens=None, total_tokens=None, run=out.name, pid=os.getpid(),
                          started=now("seconds"))
        with contextlib.suppress(OSError), open(out / "events.jsonl", "rb") as file:
            file.seek(-1, os.SEEK_END)
            self.cut = file.read() != b"\n"
        self.event("start", run=out.name, settings=settings, resumed=resumed, pid=os.getpid())
        self._write()
        for name in dict.fromkeys(filter(None, map(str.strip, settings["log"].split(",")))):
            if installed(name):
                self.asked.append(name)
            else:
                say(f"note: --log {name}: the package {name} is not installed (pip install {name}); "
                    "the run goes on without")

    def ended(self, status: str) -> None:
        """How the run ends, known before it is closed: finished, failed, interrupted."""
        if self.out is not None:
            self.state["status"] = status

    def close(self, status: str) -> None:
        """The end: `status` counts where the run's last words (`ended`) named none. Never raises an Exception."""
        if self.out is None:
            return
        if self.state["status"] == "running":
            self.state["status"] = status
        status = self.state["status"]
        if status == "finished":
            self.state["share"] = 1.0
        self.tracked.clear()
        self._write()  # before loggers are closed: that may take a while
        with contextlib.suppress(KeyboardInterrupt):  # whoever asks for the end again does not want to wait
            self._tell("close", status == "finished")
        self.event("end", status=status)
        self.out = None
        self._clear()

    # -------------------------------------------------------------------------------------------- events

    def event(self, kind: str, /, **fields) -> None:
        """Append an event to events.jsonl; NaN and infinities become null, what JSON lacks its text."""
        if self.out is None:
            return
        with contextlib.suppress(OSError, ValueError):
            told = dict(time=now("milliseconds"), event=kind)
            told |= {f"own_{name}" if name in told else name: value for name, value in fields.items()}
            line = json.dumps(finite(told), ensure_ascii=False, allow_nan=False, default=str) + "\n"
            if self.cut:
                line = "\n" + line
            data = line.encode("utf-8", "replace")
            with open(self.out / "events.jsonl", "ab", buffering=0) as file:
                written = file.write(data)
            self.cut = written != len(data)

    def heard(self, text: str) -> None:
        """What was said on the screen: its notes and warnings are events, those of several lines folded back."""
        if self.out is None or not any(mark in text for mark in MARKS):
            return
        found: list[tuple[str, str]] = []
        inside = False
        for line in text.splitlines():
            mark = next((mark for mark in MARKS if line.startswith(mark)), None)
            if mark:
                found.append((mark[:-2], line.removeprefix(mark)))
            elif inside and line.startswith(INDENT):
                kind, before = found[-1]
                gap = "" if before.endswith("-") else " "  # folded behind a hyphen
                found[-1] = (kind, before + gap + line.strip())
            inside = bool(mark) or (inside and line.startswith(INDENT))
        for kind, words in found:
            if kind == "note" or words not in self.warned:  # the table says them, and the verdict's lines do
                self.event(kind, text=words)
            self.warned |= {words} if kind == "warning" else set()

    # -------------------------------------------------------------------------------------------- progress

    def phase(self, name: str) -> None:
        """A phase begins."""
        if self.out is None:
            return
        self.tracked.clear()
        self.state |= dict(phase=name, share=None, tokens=None, total_tokens=None)
        self.ends = None
        self.event("phase", phase=name)
        self._write()

    def due(self) -> bool:
        """Whether progress.json may be written again: asked at every step, so it costs a look at the clock."""
        return self.out is not None and time.monotonic() >= self.next

    def trained(self, tokens: int, total_tokens: int, eta_seconds: float | None) -> None:
        """How far training has come, where that is `due`."""
        if self.out is None:
            return
        self.state |= dict(share=round(tokens / total_tokens, 4), tokens=tokens, total_tokens=total_tokens)
        self.ends = None if eta_seconds is None else time.monotonic() + eta_seconds
        self._write()

    def follow(self, items: Iterable, label: str, total: int, size: Callable[[Any], int]) -> Iterator:
        """Yield the items; meanwhile the run is at `label`, with so much of the total done as `size` says of each."""
        if self.out is None:
            yield from items
            return
        entry = [label, 0, total]
        self.tracked.append(entry)
        if self.due():
            self._write()
        try:
            for item in items:
                yield item
                entry[1] += size(item)
                if self.due():
                    self._write()
        finally:
            self.tracked[:] = [other for other in self.tracked if other is not entry]

    def parts(self, items: Iterable, total: int) -> Iterator:
        """Yield the items that a phase consists of, so many in all: its share is told by them.

        Not in training, where they are the evals of a snapshot.
        """
        counted = self.out is not None and self.state["phase"] != "training"
        for done, item in enumerate(items):
            if counted:
                self.state["share"] = round(done / total, 4)
            yield item

    @contextlib.contextmanager
    def eval(self, name: str, layer: int) -> Iterator[None]:
        """An eval of a layer's SAEs: what the run is at, and where it comes to its end an event with its seconds."""
        before, begun = len(self.tracked), time.monotonic()
        if self.out is not None:
            self.tracked.append([f"eval {name}, layer {layer}", 0, 0])
            self._write()
        failed = None
        try:
            yield
        except BaseException as error:  # out of time, too
            failed = told(error)
            raise
        finally:
            del self.tracked[before:]  # and what a crash has left
            self.event("eval", name=name, layer=layer, seconds=round(time.monotonic() - begun, 2), failed=failed)

    def _write(self) -> None:
        """progress.json anew, whole or not at all."""
        if self.out is None:
            return
        label, done, total = self.tracked[-1] if self.tracked else (None, 0, 0)
        share = round(min(done / total, 1.0), 4) if total else None
        left = None if self.ends is None else round(max(0.0, self.ends - time.monotonic()), 1)
        state = self.state | dict(eta_seconds=left, what=label, what_share=share, updated=now("seconds"))
        temporary = self.out / ".progress.json.tmp"  # which the next run in the folder removes, see folder.HALF_WRITTEN
        try:
            temporary.write_text(json.dumps(finite(state), ensure_ascii=False) + "\n", "utf-8", "replace")
            os.replace(temporary, self.out / "progress.json")
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.next = time.monotonic() + PERIOD

    # -------------------------------------------------------------------------------------------- --log

    def begin_loggers(self, tokens: int) -> None:
        """Begin what --log asked for, at the first step, or where a checkpoint after so many tokens left off."""
        asked, self.asked = self.asked, []
        for name in asked:
            with self._dropping(name):
                from runs import loggers

                self.loggers[name] = loggers.KINDS[name](self.out, self.settings, tokens)

    def rows(self, rows: list[dict]) -> None:
        """Rows of the training log: one interval's, one of each SAE."""
        for row in rows:
            self.event("row", **row)
        self._tell("rows", rows)

    def means(self, sections: dict[str, dict]) -> None:
        """final_info.json, as it was written."""
        self._tell("means", {sae: section["means"] for sae, section in sections.items()})

    def _tell(self, what: str, *given) -> None:
        for name, logger in list(self.loggers.items()):
            with self._dropping(name):
                getattr(logger, what)(*given)

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        """Whatever a logger raises within costs that logger alone, and a note."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # whose last words are the run's
                yield
        except (Exception, SystemExit) as error:
            logger = self.loggers.pop(name, None)
            if logger:
                with contextlib.suppress(Exception):
                    logger.leave()
            self.say(f"note: --log {name}: {told(error)}; the run goes on without")


def elapsed(out: Path) -> float:
    """Seconds from the start of the run that progress.json in the folder tells of to its last sign; 0 without one."""
    try:
        state = json.loads((out / "progress.json").read_bytes())
        return (datetime.fromisoformat(state["updated"]) - datetime.fromisoformat(state["started"])).total_seconds()
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0


def told(error: BaseException) -> str:
    """An error in one line."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0][:200]}" if words else type(error).__name__


def installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as wandb leaves everywhere, is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # imported, and without a spec
        return True
    return spec is not None and spec.origin is not None


def now(precision: str) -> str:
    """The time, UTC, in ISO 8601, to "seconds" or "milliseconds"."""
    return datetime.now(timezone.utc).isoformat(timespec=precision)


LIVE = Live()
