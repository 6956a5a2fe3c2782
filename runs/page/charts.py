"""Charts as data, drawn twice: interactive by assets/charts.js (Chart.js), and still, by matplotlib, for a page whose
scripts do not run.

A chart, `spec`, is

    {"title": str, "kind": "points" or "bars",
     "x": {"label": str, "log": bool}, "y": {"label": str, "log": bool},
     "series": [{"name": str, "role": one of ROLES, "line": bool, "points": [[x, y, stderr or 0, label, href], …]}]}

label is what hovering says of a point beside its values, in lines, href where a click leads, a relative address or
"#…"; both may be "" or left out. Bars, a histogram: in place of "line" and "points" a series has "edges", n + 1
numbers, and "counts", n. A role decides the shape: "run", "baseline", "random" (a dashed line), "seed" (small points),
"other". Colours go by a series' place, or by its "colour", a number of COLOURS, where what it shows is to keep one.
Points that are not finite, and those not positive on a log axis, are left out.
"""

from __future__ import annotations

import io
import math
import re
from html import escape

from runs.page import shell

ROLES = ("run", "baseline", "random", "seed", "other")
# CSS variables of page.css; what matplotlib draws in these grays becomes one of them
COLOURS = tuple(f"--c{i}" for i in range(8))
STILLS = 6  # of a menu's charts are there without scripts


def figure(spec: dict, note: str = "") -> str:
    """A chart as HTML: its still picture and its data, of which charts.js makes an interactive one; "" without data."""
    spec = finite(spec)
    if not spec["series"]:
        return ""
    said = f"<figcaption class=mut>{escape(note)}</figcaption>" if note else ""
    kept = shell.data(spec, **{"class": "spec"})
    return f"<figure class=chart><div class=still>{still(spec)}</div>{kept}{said}</figure>"


def menu(label: str, specs: dict[str, dict], shown: str | None = None) -> str:
    """Several charts of which a menu shows one, `shown` or the first; without scripts stills of the first STILLS."""
    specs = {name: spec for name, spec in ((name, finite(spec)) for name, spec in specs.items()) if spec["series"]}
    if not specs:
        return ""
    first = shown if shown in specs else next(iter(specs))
    ordered = {first: specs[first]} | specs
    stills = "".join(f"<div class=still>{still(spec)}</div>" for spec in list(ordered.values())[:STILLS])
    options = "".join(f"<option>{escape(name)}</option>" for name in ordered)
    return (f"<figure class='chart menu'><label class=choice hidden>{escape(label)} <select>{options}</select></label>"
            f"<div class='stills charts'>{stills}</div>{shell.data(ordered, **{'class': 'specs'})}</figure>")


def finite(spec: dict) -> dict:
    """The chart without points and series that cannot be drawn."""
    series = []
    for one in spec["series"]:
        if spec["kind"] == "bars":
            if one["counts"] and any(one["counts"]):
                series.append(one)
            continue
        points = [point for point in one["points"] if _drawable(point, spec)]
        if points:
            series.append(one | {"points": points})
    return spec | {"series": series}


def _drawable(point: list, spec: dict) -> bool:
    return all(value is not None and math.isfinite(value) and (value > 0 or not spec[axis].get("log"))
               for value, axis in zip(point[:2], "xy"))


# ------------------------------------------------------------------------------------------------ stills


def still(spec: dict) -> str:
    """A chart as inline SVG by matplotlib, in the page's own colours, light and dark."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": spec["title"], "font.size": 9,
                                "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
                                **{f"{name}.color": _ink("mut") for name in ("text", "xtick", "ytick")},
                                "axes.edgecolor": _ink("mut"), "axes.labelcolor": _ink("mut"),
                                "grid.color": _ink("line"), "text.parse_math": False}):
        drawn = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = drawn.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_title(spec["title"], loc="left", fontsize=10, color=_ink("fg"))
        for number, one in enumerate(spec["series"]):
            _draw(axes, spec, one, _ink(str(one.get("colour", number) % len(COLOURS))))
        for axis in "xy":
            getattr(axes, f"set_{axis}label")(spec[axis]["label"])
            if spec[axis].get("log"):
                getattr(axes, f"set_{axis}scale")("log")
                getattr(axes, f"{axis}axis").set_major_formatter(lambda value, place: f"{value:g}")
                getattr(axes, f"{axis}axis").set_minor_formatter(NullFormatter())
        if len(spec["series"]) > 1:
            axes.legend(fontsize=7, frameon=False)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda found: f"var({_NAMED[int(found[1], 16) - 1]})", svg)
    label = escape(f"{spec['title']}: {spec['y']['label']} against {spec['x']['label']}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_NAMED = ("--fg", "--mut", "--line", *COLOURS)  # matplotlib's #0000nn stands for the n-th of them, from 1


def _ink(name: str) -> str:
    """The colour by which matplotlib draws what a CSS variable is to colour."""
    number = _NAMED.index(f"--{name}") if f"--{name}" in _NAMED else 3 + int(name)
    return f"#0000{number + 1:02x}"


def _draw(axes, spec: dict, one: dict, colour: str) -> None:
    name = one["name"].lstrip("_") or " "  # matplotlib hides what begins with _
    if spec["kind"] == "bars":
        axes.stairs(one["counts"], one["edges"], fill=True, color=colour, alpha=0.6, label=name)
        return
    x, y, error = ([point[i] if len(point) > i else 0 for point in one["points"]] for i in range(3))
    small = one.get("role") == "seed" or len(x) > 60
    if one.get("line"):
        style = "--" if one.get("role") == "random" else "-"
        axes.plot(x, y, style, color=colour, linewidth=1.5, label=name)
    if not one.get("line") or len(x) <= 60:
        label = None if one.get("line") else name
        axes.errorbar(x, y, yerr=error if any(error) else None, fmt="o", color=colour, markersize=2.5 if small else 4,
                      elinewidth=1, label=label)
