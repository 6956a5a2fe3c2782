"""The training log as charts."""

from __future__ import annotations

import math

from runs.page import charts

POINTS = 2400  # of all lines of one chart together
ROOM = 700_000  # characters of all charts at most
NOT_PLOTTED = {"sae", "step", "tokens", "dead_share"}  # the last is among what health shows
FACTOR = 50  # between the largest and the smallest value from which on an axis is logarithmic
# {column of the training log: (title, unit)}
AXES = {"l0": ("L0", "features per token"),
        "explained_variance": ("Explained variance", "share of the batch's variance"),
        "dead_share": ("Dead features", "share of features"),
        "tokens_per_s": ("Speed", "tokens per second"),
        "loss": ("Loss", "at E‖x‖² = 1")}


def part(log_rows: list[dict]) -> str:
    """A chart for each column of the training log, a line for each SAE."""
    columns = list(dict.fromkeys(c for row in log_rows for c in row if c not in NOT_PLOTTED))
    shown, room, more = [], ROOM, ""
    for number, column in enumerate(columns):
        html = charts.figure(spec(log_rows, column))
        room -= len(html)
        if room < 0:
            more = f"<p class=mut>{len(columns) - number:,} more columns are in training_log.csv.</p>"
            break
        shown.append(html)
    return f"<h2>Training</h2><div class=charts>{''.join(shown)}</div>{more}" if any(shown) or more else ""


def dead_shares(log_rows: list[dict]) -> dict:
    """The chart of dead features by tokens, without a series where the log has none."""
    return spec(log_rows, "dead_share")


def spec(log_rows: list[dict], column: str) -> dict:
    """A column of the log by tokens."""
    by_sae: dict[str, list[list]] = {}
    for row in log_rows:
        x, y = _float(row.get("tokens")), _float(row.get(column))
        if x is not None and y is not None:
            by_sae.setdefault(row["sae"], []).append([x, y, 0])
    keep = max(2, min(300, POINTS // max(len(by_sae), 1)))
    series = [{"name": name, "role": "run", "line": True, "points": _thinned(points, keep)}
              for name, points in by_sae.items()]
    values = [y for one in series for _, y, _ in one["points"]]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > FACTOR
    title, unit = AXES.get(column, (_named(column), "mean of the term"))
    return {"title": title, "kind": "points", "x": {"label": "training tokens", "log": False},
            "y": {"label": unit + (" (log)" if log else ""), "log": log}, "series": series}


def _named(column: str) -> str:
    """A term's name as a title."""
    words = column.replace("_", " ")
    return words[:1].upper() + words[1:]


def _thinned(points: list, keep: int) -> list:
    """Some of the points, evenly apart, and the last."""
    return points[:-1][:: max(1, math.ceil(len(points) / keep))] + points[-1:]


def _float(value) -> float | None:
    """A finite number from a CSV field, else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
