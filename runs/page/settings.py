"""The settings of a run's SAEs, and what the variant reported of itself."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from runs.page import shell
from runs.reading import Run

PICTURE = 300_000  # bytes of a picture that a page takes in
KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def part(runs: list[Run]) -> str:
    """What all SAEs share once, and what differs in a row per SAE."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return ""
    shared = [k for k in keys if all(run.config.get(k) == runs[0].config.get(k) for run in runs)]
    rows = (f"<td class=l>{escape(k)}</td><td class='l w'>{escape(_plain(runs[0].config[k]))}</td>" for k in shared)
    html = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    own = [k for k in keys if k not in shared]
    if own:
        header = "".join(f"<th class=l>{escape(cell)}</th>" for cell in ["SAE", *own])
        lines = [[run.section or run.name, *(_plain(run.config.get(k)) for k in own)] for run in runs]
        rows = ("".join(f"<td class=l>{escape(cell)}</td>" for cell in line) for line in lines)
        table = f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
        html += shell.scrolling("settings of each SAE", table)
    return f"<h2>Settings</h2><details><summary>{len(keys)} settings</summary>{html}</details>"


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} = {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def own_report(folder: Path) -> str:
    """Pictures a variant made of itself, inside the page; larger ones and other files are named."""
    html = []
    for file in sorted(folder.glob("*/*")):
        title = f"{escape(file.parent.name)}: {escape(file.name)}"
        if file.suffix in KINDS and file.stat().st_size < PICTURE:
            content = b64encode(file.read_bytes()).decode()
            html.append(f'<figure><img alt="{title}" src="data:{KINDS[file.suffix]};base64,{content}">'
                        f"<figcaption class=mut>{title}</figcaption></figure>")
        elif file.name != "numbers.json":
            html.append(f"<p class=mut>variant_report/{escape(file.parent.name)}/{escape(file.name)}</p>")
    return f"<h2>The variant's own report</h2>{''.join(html)}" if html else ""
