"""How a run fails: a few last lines on stderr, which is all the workflow's client shows,
and the whole story in files.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from runs import disk, folder

PROJECT = Path(__file__).resolve().parent.parent
ADVICE = {"OutOfMemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size",
          "MemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size"}


def report(error: BaseException, phase: str, out: Optional[Path], variant: Optional[Path],
           places: Sequence[str | Path] = ()) -> int:
    """Say on stderr, in under 1,200 characters, what failed, where in the user's own file and what to do; returns 1.

    Into the run folder `out`, where there is one and it can be written to, go error.json and, at the end of log.txt,
    the traceback. Whatever fails in here itself, the first error is said. `places`: other folders that the run writes
    to.
    """
    kind = type(error).__name__
    what, advice = words(error, out, places)
    where = ""
    with contextlib.suppress(Exception):  # a variant's file that is gone, a traceback through what is no file
        where = place(error, variant)
    lines = [f"FAILED in {phase}: {what or kind}"[:600], *([f"at {where}"] if where and where not in what else []),
             kind + (f"; to do: {advice}"[:400] if advice else "")]
    if out and out.is_dir():
        details = dict(phase=phase, type=kind, message=what, where=where, advice=advice)
        lines.append(kept(error, out, details))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is closed, full or None
        print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)
    return 1


def words(error: BaseException, out: Optional[Path], places: Sequence[str | Path] = ()) -> tuple[str, str]:
    """What is wrong and what to do, of any exception."""
    with contextlib.suppress(Exception):  # a disk so broken that it cannot even be asked
        known = disk.explained(error, out, places)
        if known:
            return known
    if isinstance(error, SystemExit):
        return (f"the run was ended from inside, by sys.exit({'' if error.code is None else repr(error.code)})",
                "take out what calls sys.exit(), exit() or a command line's parser: a variant's file is imported, not "
                "run")
    what, _, advice = str(error).partition("\n")
    if "onnection" in what and "peer" in what:  # gloo's words; NCCL's processes are ended by torchrun
        return "another process of this run ended", "see what it said; the same command continues from the last checkpoint"
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

    if variant and (where := messages.where(error, variant)):
        return where
    if disk.code_of(error)[0] not in (None, errno.ENOENT):  # the disk's fault, no line's
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PROJECT)]
    # a message with advice is this project's own: the line that raised it helps nobody
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames and "\n" not in str(error) else ""


def inside(stop: BaseException, settings) -> str:
    """`, at mine.py:12`, where an interrupt came while the user's variant was at work; else nothing."""
    import variants
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


CONTINUES = "was left in its phase"  # begins a run's part of log.txt when it goes on with an earlier one
