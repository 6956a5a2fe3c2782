"""How figures, verdicts and lists are written wherever a comparison is put into words."""

from __future__ import annotations

import math

from runs.comparison import Compared, Judged
from runs.frontier import l0_of


def number(value: float | None) -> str:
    """Four significant digits, counts in full; – for what is missing."""
    if value is None:
        return "–"
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:,.{_decimals(value)}f}"
    return f"{value:.3e}"


def signed(difference: float | None, *sides: float) -> str:
    """A difference with no more decimals than the values it comes from, unless nothing were left of it."""
    if difference is None:
        return ""
    if not difference:
        return "0"
    decimals = min(_decimals(difference), max(_decimals(v) for v in sides if v))
    text = f"{difference:+,.{decimals}f}"
    return text if float(text.replace(",", "")) else f"{difference:+.1e}"


def _decimals(value: float) -> int:
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 8)


def words(one: Compared, judged: Judged) -> str:
    """The verdict; one on a dense code is marked."""
    dense = judged.verdict in ("better", "worse") and one.run.config.get("dense")
    return f"{judged.verdict} (dense)" if dense else judged.verdict


def random_line(one: Compared, figures: bool = True) -> list[str]:
    """In which headline metrics a run is not surely better than a frozen random decoder: one line, or none.

    `figures`: with the run's value, the decoder's and the standard error of their difference.
    """
    if one.floor is None or not one.floor.not_better:
        return []
    said = []
    for metric, judged in one.floor.not_better.items():
        text = metric.replace("_test_accuracy", "").replace("_test_auc", " AUC")
        if figures:
            error = f" ± {judged.stderr:.1g}" if judged.stderr else ""
            text += f" ({one.run.means[metric]:.3g} vs {one.floor.run.means[metric]:.3g}{error})"
        said.append(text)
    where = "" if one.floor.at_own_l0 else f" (of L0 {number(l0_of(one.floor.run))}, the nearest stored)"
    return [f"not better than a frozen random decoder{where}: {', '.join(said)}"]


def beyond(judged: Judged) -> str:
    """yes, no or ? for a difference: whether it exceeds two standard errors; "" without one."""
    if judged.difference is None:
        return ""
    return {True: "yes", False: "no", None: "?"}[judged.beyond]


def in_a_line(error: Exception) -> str:
    """What went wrong and, of our own errors, what to do, which stands in their second line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    what, _, advice = str(error).partition("\n")
    advice = advice.strip().split("\n")[0]
    return f"{what}: {advice}" if advice else what


def first_line(error: Exception) -> str:
    """What went wrong, on one line; its kind where it says nothing."""
    return str(error).split("\n")[0] or type(error).__name__


def listing(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def short(value) -> str:
    """A setting's value in a word."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return f"{len(value)} items" if isinstance(value, list) else str(value)
