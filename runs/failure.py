"""How a run fails: a few last lines on stderr, which is all the workflow's client shows, and the whole story in files."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Optional

from runs import folder

PROJECT = Path(__file__).resolve().parent.parent
ADVICE = {"OutOfMemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size",
          "MemoryError": "use a smaller --batch_size, --d_sae or --lm_batch_size"}


def report(error: BaseException, phase: str, out: Optional[Path], variant: Optional[Path]) -> int:
    """Say on stderr, in under 1,200 characters, what failed, where in the user's own file and what to do; returns 1.

    Into the run folder `out`, where there is one, go error.json and, at the end of log.txt, the traceback.
    """
    kind = type(error).__name__
    what, _, advice = str(error).partition("\n")
    if "onnection" in what and "peer" in what:  # gloo's words; NCCL's processes are ended by torchrun
        what, advice = "another process of this run ended", "see what it said; the same command continues from the last checkpoint"
    advice = advice or ADVICE.get(kind, "")
    where = place(error, variant)
    lines = [f"FAILED in {phase}: {what or kind}"[:600], *([f"at {where}"] if where and where not in what else []),
             kind + (f"; to do: {advice}"[:400] if advice else "")]
    if out:
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))
        folder.write_json(out / "error.json", dict(phase=phase, type=kind, message=what, where=where, advice=advice))
        lines.append("details: error.json and log.txt in the run's folder")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return 1


def place(error: BaseException, variant: Optional[Path]) -> str:
    """file:line of the user's variant where the traceback passes through it, else of the last frame in this project."""
    from variants.preflight import check

    if variant and (where := check.where(error, variant)):
        return where
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PROJECT)]
    # a message with advice is this project's own: the line that raised it helps nobody
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames and "\n" not in str(error) else ""


def inside(stop: BaseException, settings) -> str:
    """`, at mine.py:12`, where an interrupt came while the user's variant was at work; else nothing."""
    import variants
    from variants.preflight import check

    try:
        where = check.where(stop, variants.path(settings.variant))
    except (AttributeError, OSError):  # no settings yet, no such file
        return ""
    return f", at {where}" if where else ""
