"""The settings of a run's SAEs, and what the variant reported of itself."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from runs.page import shell
from runs.reading import Run

PICTURE = 300_000  # bytes of a picture that a page takes in,
PICTURES = 600_000  # and of all of them
NAMED = 100  # other files that it names
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
    """Pictures a variant made of itself, inside the page as far as there is room; the others, and other files, as links
    to where they lie beside the page.
    """
    shown, links, room = [], [], PICTURES
    for file in sorted(folder.glob("*/*")):
        size, title = file.stat().st_size, f"{escape(file.parent.name)}: {escape(file.name)}"
        if file.suffix in KINDS and size < min(PICTURE, room):
            room -= size
            content = b64encode(file.read_bytes()).decode()
            shown.append(f'<figure><img alt="{title}" src="data:{KINDS[file.suffix]};base64,{content}">'
                         f"<figcaption class=mut>{title}</figcaption></figure>")
        elif file.name != "numbers.json":
            path = "/".join(map(shell.quoted, (folder.name, file.parent.name, file.name)))
            links.append(f'<li><a href="{escape(path)}">{title}</a> <span class=mut>{_size(size)}</span></li>')
    beside = ""
    if links:
        more = f"<li class=mut>and {len(links) - NAMED:,} more</li>" if len(links) > NAMED else ""
        beside = (f"<details><summary>{len(links):,} more in {escape(folder.name)}/, beside this page, which stays "
                  f"under 3 MB</summary><ul>{''.join(links[:NAMED])}{more}</ul></details>")
    return f"<h2>The variant's own report</h2>{''.join(shown)}{beside}" if shown or links else ""


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"
