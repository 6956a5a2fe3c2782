"""The comparison's tables as HTML."""

from __future__ import annotations

from html import escape

import evals
from runs.comparison import Comparison
from runs.page import shell
from runs.reading import Run
from runs.tables import Cell, Table, laid_out, lefts, plain


def part(comparisons: list[Comparison], runs: list[Run]) -> str:
    """The brief tables, every metric folded, and what evals note of themselves."""
    brief, full = (laid_out(comparisons, everything) for everything in (False, True))
    html = ["<h2>Comparison</h2>", *map(_table, brief)]
    if any(len(a.rows) != len(b.rows) for a, b in zip(brief, full)):
        html.append("<details><summary>every metric</summary>" + "".join(map(_table, full)) + "</details>")
    ran = {name for run in runs for name in run.config.get("evals") or {}}
    notes = {name: evals.declared(name, "NOTE") for name in evals.names() if name in ran}
    html += [f"<p class=mut>{escape(name)}: {escape(note)}</p>" for name, note in notes.items() if note]
    return "".join(html)


def _table(table: Table, label: str) -> str:
    """A comparison as HTML; a verdict has a colour where it exceeds two standard errors."""
    left = lefts(table)

    def row(cells: list[Cell], tag: str) -> str:
        out = []
        for cell, is_left in zip(cells, left):
            side = "l " if is_left else ""
            out.append(f'<{tag} class="{side}{_sure_verdict(cell)}">{escape(cell.text)}</{tag}>')
        return f"<tr>{''.join(out)}</tr>"

    above = "".join(f"<p class=mut>{escape(line)}</p>" for line in table.above if not line.startswith("warning: "))
    below = "".join(f"<p class=mut>{escape(line)}</p>" for line in table.below if not line.endswith("--all"))
    body = "".join(row(cells, "td") for cells in table.rows)
    return above + shell.scrolling(label, f"<table>{row(plain(table.header), 'th')}{body}</table>") + below


def _sure_verdict(cell: Cell) -> str:
    """better or worse, which CSS colours, where the difference exceeds two standard errors."""
    sure = cell.judged.beyond and cell.judged.verdict in ("better", "worse")
    return cell.judged.verdict if sure else ""
