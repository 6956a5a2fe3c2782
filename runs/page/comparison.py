"""The comparison's tables as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import evals
from runs.comparison import Comparison
from runs.page import shell
from runs.reading import Run
from runs.tables import Cell, Table, laid_out, lefts, plain

ROOM = 500_000  # characters of a table's rows in the page at most


def part(comparisons: list[Comparison], runs: list[Run]) -> str:
    """The brief tables, every metric folded, and what evals note of themselves."""
    brief, full = (laid_out(comparisons, everything) for everything in (False, True))
    html = ["<h2>Comparison</h2>", *(_table(table, ROOM // len(brief), "run beside baseline") for table in brief)]
    if any(len(a.rows) != len(b.rows) for a, b in zip(brief, full)):
        room = ROOM // len(full)
        html.append("<details><summary>every metric</summary>"
                    + "".join(_table(table, room, "comparison, every metric") for table in full) + "</details>")
    ran = {name for run in runs for name in run.config.get("evals") or {}}
    notes = {name: evals.declared(name, "NOTE") for name in evals.names() if name in ran}
    html += [f"<p class=mut>{escape(name)}: {escape(note)}</p>" for name, note in notes.items() if note]
    return "".join(html)


def _table(table: Table, room: int, label: str) -> str:
    """A comparison as HTML, the first rows that fit into so many characters; a verdict has a colour where it exceeds
    two standard errors.
    """
    left = lefts(table)

    def row(cells: list[Cell], tag: str) -> str:
        out = []
        for cell, is_left in zip(cells, left):
            side = "l " if is_left else ""
            out.append(f'<{tag} class="{side}{_sure_verdict(cell)}">{escape(cell.text)}</{tag}>')
        return f"<tr>{''.join(out)}</tr>"

    above = "".join(f"<p class=mut>{escape(line)}</p>" for line in table.above if not line.startswith("warning: "))
    below = "".join(f"<p class=mut>{escape(line)}</p>" for line in table.below if not line.endswith("--all"))
    body, left_out = _fitting((row(cells, "td") for cells in table.rows), room, len(table.rows))
    if left_out:
        below += (f"<p class=mut>{left_out:,} of {len(table.rows):,} rows are left out, as this page stays under 3 MB; "
                  "all figures are in final_info.json.</p>")
    return above + shell.scrolling(label, f"<table>{row(plain(table.header), 'th')}{body}</table>") + below


def _fitting(rows: Iterable[str], room: int, of: int) -> tuple[str, int]:
    """(the first rows that fit into so many characters, how many are left out)."""
    kept: list[str] = []
    for html in rows:
        room -= len(html)
        if room < 0:
            break
        kept.append(html)
    return "".join(kept), of - len(kept)


def _sure_verdict(cell: Cell) -> str:
    """better or worse, which CSS colours, where the difference exceeds two standard errors."""
    sure = cell.judged.beyond and cell.judged.verdict in ("better", "worse")
    return cell.judged.verdict if sure else ""
