"""Pictures of the research variants' reports: matplotlib without pyplot's global state,
returned as the bytes of a PNG.
"""

from __future__ import annotations

import io

WRONG = str.maketrans({"$": r"\$", "\n": "⏎", "\t": "→", "\r": "⏎"})  # a dollar would start a formula


def figure(width: float = 8.0, height: float = 5.0):
    """An empty matplotlib Figure, in inches; draw on `fig.subplots(rows, columns)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def png(fig, dpi: int = 100) -> bytes:
    """The figure as a PNG, width × dpi pixels wide; the same bytes for the same figure."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def label(text: str, length: int = 16) -> str:
    """A token's text as a label: visible spaces and line ends, no formulas, at most `length` characters."""
    text = text.strip(" ") or "␣"
    return (text if len(text) <= length else text[:length - 1] + "…").translate(WRONG)
