"""How a run fails: a few last lines on stderr, all that the workflow's client shows, and the whole story in files."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import variants
from runs import disk, endings, folder, prolong
from runs.interrupts import Interrupts
from runs.live import LIVE, elapsed
from runs.voice import say
from variants.kit import ranks

PROJECT = Path(__file__).resolve().parent.parent
MOST_CHARACTERS = 1198  # of the last words on stderr, their newline not counted: more a client cuts off
ADVICE = {"OutOfMemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size",
          "MemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size"}


@dataclass
class Known:
    """What is known of a run, as it becomes known: what its last words are made of."""

    # run_info.json
    info: dict = field(default_factory=lambda: dict(phase="settings", seconds={}, began=round(time.time(), 2)))
    settings: Any = None  # resolved
    out: Optional[Path] = None  # the run's folder, from where it is this run's
    interrupts: Optional[Interrupts] = None
    lock: Any = None  # on the folder, held to the end
    began: float = 0.0  # time.monotonic() from which --minutes count

    def release(self) -> None:
        """Let other processes have the folder."""
        if self.lock:
            self.lock.release()

    @property
    def begun(self) -> bool:
        """Whether the folder records this run."""
        return self.out is not None and "status" in self.info


def interrupted(stop: KeyboardInterrupt, known: Known) -> int:
    """Say where a signal met the run, and mark its folder; returns the exit status, 128 + signal."""
    LIVE.ended("interrupted")
    if not ranks.number():
        if known.begun:
            folder.mark(known.out, known.info, "interrupted")
            number = known.interrupts.signal or signal.SIGINT
            endings.interrupted(known.settings, known.out, known.info, signal.Signals(number).name)
        place = inside(stop, known.settings)
        print(f"interrupted in {known.info['phase']}{place}: the same command continues", file=sys.stderr, flush=True)
        remains = ", ".join(prolong.remaining(known.out, known.info)) if known.begun else ""
        if remains:
            print(f"remains: {remains}", file=sys.stderr, flush=True)
    ranks.leave()
    return 128 + ((known.interrupts and known.interrupts.signal) or signal.SIGINT)


def ended(error: BaseException, known: Known) -> int:
    """Say in a few lines what ended the run, and mark its folder; returns the exit status, 1."""
    phase = known.info["phase"]
    if ranks.number():  # the first rank's folder is not this one's to write in
        return report(error, f"{phase}, rank {ranks.number()}", None, None)
    if known.out is None and phase == "preflight":
        # an input that cannot be had: said where the run would have been, if that is free
        known.info["status"] = "failed"
        known.out, known.lock = folder.free_for_words(known.settings.out_dir)
        if known.out:
            LIVE.open(known.out, dict(log=""), False, say)
    if known.begun:
        folder.mark(known.out, known.info, "failed")
    if not known.settings:
        return report(error, phase, known.out, None, told=endings.refused)
    try:
        variant = variants.path(known.settings.variant)
    except (OSError, ValueError):  # that is the failure
        variant = None
    told = partial(endings.failed, known.settings, known.out if known.begun else None, known.info)
    if isinstance(error, folder.InUse):  # the run of that folder has its own line in the ledger
        told = endings.refused
    return report(error, phase, known.out, variant, [known.settings.cache_dir], told)


def report(error: BaseException, phase: str, out: Optional[Path], variant: Optional[Path],
           places: Sequence[str | Path] = (), told: Callable[[dict], None] = lambda details: None) -> int:
    """Say on stderr, in under 1,200 characters, what failed, where in the user's own file and what to do; returns 1.

    Into the run folder `out`, where there is one and it can be written to, go error.json and, at the end of log.txt,
    the traceback. Whatever fails in here itself, the first error is said. `places`: other folders it writes to.
    `told` tells programs, with what error.json holds.
    """
    kind = type(error).__name__
    what, advice = words(error, out, places)
    where = ""
    with contextlib.suppress(Exception):  # a variant's file that is gone, a traceback through what is no file
        where = place(error, variant)
    lines = [f"FAILED in {phase}: {what or kind}"[:600]]
    if where and where not in what:
        lines.append(f"at {where}")
    to_do = f"; to do: {advice}"[:400] if advice else ""
    lines.append(kind + to_do)
    details = dict(phase=phase, type=kind, message=what, where=where, advice=advice)
    LIVE.ended("failed")
    if out and out.is_dir():
        with contextlib.suppress(Exception):
            details["remains"] = prolong.remaining(out, folder.left(out))
        last = kept(error, out, details)
        room = MOST_CHARACTERS - len("\n".join([*lines, last])) - 1
        lines += [prolong.told(out, details.get("remains"))[:max(0, room)], last]
    LIVE.event("error", **details)
    with contextlib.suppress(Exception):
        told(details)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is closed, full or None
        print("\n".join(filter(None, lines)), file=sys.stderr, flush=True)
    return 1


def words(error: BaseException, out: Optional[Path], places: Sequence[str | Path] = ()) -> tuple[str, str]:
    """What is wrong and what to do, of any exception."""
    with contextlib.suppress(Exception):  # a disk so broken that it cannot even be asked
        known = disk.explained(error, out, places)
        if known:
            return known
    if isinstance(error, SystemExit):
        code = "" if error.code is None else repr(error.code)
        return (f"the run was ended from inside, by sys.exit({code})",
                "take out what calls sys.exit(), exit() or a command line's parser: a variant's file is imported, "
                "not run")
    what, _, advice = str(error).partition("\n")
    if "onnection" in what and "peer" in what:  # gloo's words; NCCL's processes are ended by torchrun
        return ("another process of this run ended",
                "see what it said; the same command continues from the last checkpoint")
    return what, advice or ADVICE.get(type(error).__name__, "")


def kept(error: BaseException, out: Path, details: dict) -> str:
    """The last line, after writing the details into the run's folder as far as that is possible."""
    written = []
    with contextlib.suppress(Exception):
        folder.write_json(out / "error.json", details)
        written.append("error.json")
    with contextlib.suppress(Exception):
        with open(out / "log.txt", "a", encoding="utf-8", errors="replace") as log:
            log.write("".join(traceback.format_exception(error)))
        written.append("log.txt")
    if not written:
        return "details: none, as the run's folder cannot be written to"
    return f"details: {' and '.join(written)} in the run's folder"


def place(error: BaseException, variant: Optional[Path]) -> str:
    """file:line of the user's variant where the traceback passes through it, else of the last frame in this project."""
    from variants.preflight import messages

    where = messages.where(error, variant) if variant else ""
    if where:
        return where
    if disk.code_of(error)[0] not in (None, errno.ENOENT):  # the disk's fault, no line's
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PROJECT)]
    # a message with advice is this project's own: the line that raised it helps nobody
    if not frames or "\n" in str(error):
        return ""
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def inside(stop: BaseException, settings) -> str:
    """`, at mine.py:12`, where an interrupt came while the user's variant was at work; else nothing."""
    from variants.preflight import messages

    try:
        where = messages.where(stop, variants.path(settings.variant))
    except (AttributeError, OSError):  # no settings yet, no such file
        return ""
    return f", at {where}" if where else ""


def left(out: Path, before: dict) -> str:
    """How an earlier run in the folder ended, as far as its files tell."""
    status = before.get("status")
    if status != "running":
        return str(status)
    text = ""
    with contextlib.suppress(OSError), open(out / "log.txt", "rb") as log:
        log.seek(max(0, (out / "log.txt").stat().st_size - 2**16))
        text = log.read().decode("utf-8", "replace").rpartition(CONTINUES)[2]
    crash = next((line for line in text.splitlines() if line.startswith("Fatal Python error")), "")
    if crash:
        return f"crashed in native code, {crash.removeprefix('Fatal Python error: ')}: see the end of log.txt"
    if "Traceback (most recent call last)" in text:
        return f"failed: {text.strip().splitlines()[-1][:200]}"
    return "killed without a word, often for lack of memory"


def spent(out: Path, before: dict) -> dict[str, float]:
    """The seconds that an earlier run in the folder took, by phase; where it was killed its progress.json tells those
    of the last.
    """
    seconds, phase = dict(before.get("seconds", {})), before.get("phase")
    if before.get("status") == "running" and phase:
        lost = elapsed(out) - (sum(seconds.values()) - before.get("seconds_before", 0.0))
        seconds[phase] = round(seconds.get(phase, 0.0) + max(0.0, lost), 1)
    return seconds


CONTINUES = "was left in its phase"  # begins a run's part of log.txt when it goes on with an earlier one
