"""What a report needs of the boards of SAEs (evals/dashboards), each read once however many parts of a page ask."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runs import features
from runs.page import features as pages


@dataclass(frozen=True)
class Health:
    """What is known of one SAE; None of what is not."""

    name: str
    density: Sequence[float]  # of every feature, share of tokens
    tokens: int | None  # looked at
    cosine: Sequence[float] | None  # of every decoder row with the most similar other one
    l0: dict | None  # {"edges", "counts"}: tokens by active features
    norms: list[float] | None  # ‖x‖ of some tokens
    errors: list[float] | None  # and ‖x − x̂‖ of the same
    # of the baseline on the same text {"edges", "counts": features by log10 of their density, "silent", "of": all}
    baseline: dict | None = None


@dataclass(frozen=True)
class Glance:
    """What is kept of a board."""

    stamp: tuple[int, int]  # of its file: when it was written, its size
    shown: int  # dashboards in `preview`
    health: Health
    preview: str  # HTML


_known: dict[Path, Glance] = {}


def of(out: Path, sae: str, shown: int = 0, board: dict | None = None) -> Glance:
    """What is kept of the board of an SAE, with so many of its dashboards, or 0 for whatever there are.

    board: as it was just read; else it is read where that has not been done. OSError, ValueError: as features.read.
    """
    file = features.place(out, sae)
    stat = file.stat()
    stamp = stat.st_mtime_ns, stat.st_size
    known = _known.get(file)
    if known is not None and known.stamp == stamp and shown in (0, known.shown):
        return known
    if board is None:
        board = features.read(out, sae)
    _known[file] = Glance(stamp, shown, _health(board, sae), pages.preview(board, shown))
    return _known[file]


def forget() -> None:
    """Keep nothing of the boards that were read."""
    _known.clear()


def _health(board: dict, sae: str) -> Health:
    columns, health = board["list"], board.get("health") or {}
    text, cosine = board.get("text") or {}, columns.get("own_cosine")
    if cosine is not None:
        cosine = array("d", (value for value in cosine if value is not None)) or None
    return Health(sae, array("d", columns["density"]), text.get("tokens"), cosine, health.get("l0"),
                  health.get("norms"), health.get("errors"), (board.get("baseline") or {}).get("density"))
