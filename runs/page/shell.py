"""What every page has: its head, colours for light and dark, and a policy by which nothing but our scripts runs."""

from __future__ import annotations

import functools
import json
import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from pathlib import Path
from urllib.parse import quote

ASSETS = Path(__file__).resolve().parent / "assets"
CHARTS = ("chart.umd.min.js", "charts.js")
NONE = "'none'"


@functools.cache
def asset(name: str) -> str:
    """The text of a file of assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


def page(title: str, parts: Iterable[str], scripts: Iterable[str] = (), styles: Iterable[str] = ()) -> str:
    """A whole HTML page around `parts`, which are HTML; scripts and styles name files of assets/, in their order.

    The policy names each script by its hash, so that text which came to be read as a script would not run, and no
    address at all, so that the page asks for nothing.
    """
    code = [asset(name) for name in scripts]
    allowed = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in code)
    nothing = ";".join(f"{what} {NONE}" for what in ("default-src", "base-uri", "form-action"))
    policy = f"{nothing};style-src 'unsafe-inline';img-src data:;script-src {allowed or NONE}"
    css = "\n".join(map(asset, ("page.css", *styles)))
    head = (f'<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><meta name=viewport content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}</title><style>{css}</style></head><body>")
    body = "\n".join(filter(None, parts))
    return f"{head}<main>\n{body}\n</main>{''.join(f'<script>{text}</script>' for text in code)}</body></html>\n"


def data(value, **attributes: str) -> str:
    """A block of JSON inside a page, which scripts read and browsers never run; attributes as class, id."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    named = "".join(f' {name}="{escape(text)}"' for name, text in attributes.items())
    return f'<script type="application/json"{named}>{safe}</script>'


def scrolling(label: str, html: str, kind: str = "") -> str:
    """A table that may be wider than its place: it scrolls there, with a keyboard too, fades at the edges behind which
    there is more, and `label` says what it is. kind: further classes of the place, as "tall".
    """
    named = escape(label)
    captioned = re.sub(r"^<table[^>]*>", lambda tag: f"{tag[0]}<caption><span>{named}</span></caption>", html)
    return f'<div class="{f"scroll {kind}".strip()}" role=region tabindex=0 aria-label="{named}">{captioned}</div>'


def visible(token: str) -> str:
    """Line breaks, tabs and other control characters as signs, so that a token stays one visible piece."""
    return "".join({"\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else "·") for c in token)


def quoted(name: str) -> str:
    """A file's name as a part of an address."""
    return quote(name, safe="")
