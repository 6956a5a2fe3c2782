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
import warnings
from html import escape

from runs.page import shell

ROLES = ("run", "baseline", "random", "seed", "other")
# to have another shape than its role's a series names it as its "mark", a key of these, Chart.js's: matplotlib's
# a line with "parts", a number for each point, joins the points of one part alone, and is thin
MARKS_OF = {"circle": "o", "rectRot": "D", "triangle": "^", "rect": "s", "dash": "_"}
# CSS variables of page.css; what matplotlib draws in these grays becomes one of them
COLOURS = tuple(f"--c{i}" for i in range(8))
STILLS = 6  # of a menu's charts are there without scripts
MARKS = 400  # points of one still at most
NAMED = 12  # series that a still's legend names
LETTERS = 48  # of a series' name that it shows


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


def panels(label: str, groups: dict[str, list[dict]]) -> str:
    """Several charts of each of some things, of which a menu shows one; without scripts stills of the first."""
    drawn = {name: [one for one in map(finite, specs) if one["series"]] for name, specs in groups.items()}
    drawn = {name: specs for name, specs in drawn.items() if specs}
    if not drawn:
        return ""
    stills = "".join(f"<div class=still>{still(spec)}</div>" for spec in next(iter(drawn.values())))
    options = "".join(f"<option>{escape(name)}</option>" for name in drawn)
    first = f"<noscript><p class=mut>the first of {len(drawn)}</p></noscript>" if len(drawn) > 1 else ""
    return (f"<figure class='chart menu'><label class=choice hidden>{escape(label)} <select>{options}</select></label>"
            f"{first}<div class='stills charts'>{stills}</div>{shell.data(drawn, **{'class': 'specs'})}</figure>")


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
    """A chart as inline SVG by matplotlib, in the page's own colours, light and dark; at most MARKS points of it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    title = shell.visible(spec["title"])
    with warnings.catch_warnings(), matplotlib.rc_context(_style(title)):
        warnings.simplefilter("ignore")  # a sign that its font lacks: the browser's has it
        drawn = Figure(figsize=(4.6, 3.0))
        drawn.subplots_adjust(left=0.13, right=0.98, top=0.91, bottom=0.15)
        axes = drawn.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10, color=_ink("fg"))
        most = max(MARKS // len(spec["series"]), 2)
        for number, one in enumerate(spec["series"]):
            _draw(axes, spec, one, _ink(str(one.get("colour", number) % len(COLOURS))), most)
        for axis in "xy":
            getattr(axes, f"set_{axis}label")(shell.visible(spec[axis]["label"]))
            if spec[axis].get("log"):
                getattr(axes, f"set_{axis}scale")("log")
                getattr(axes, f"{axis}axis").set_major_formatter(lambda value, place: f"{value:g}")
                getattr(axes, f"{axis}axis").set_minor_formatter(NullFormatter())
            else:
                getattr(axes, f"{axis}axis").set_major_formatter(lambda value, place: _short(value))
        if len(spec["series"]) > 1:
            handles, names = axes.get_legend_handles_labels()
            more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
            handles = handles[:NAMED] + handles[NAMED:NAMED + len(more)]
            axes.legend(handles, names[:NAMED] + more, fontsize=7, frameon=False, ncols=1 + len(names) // 5,
                        loc="best" if len(names) < 5 else "lower right")
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r"#0000([0-9a-f]{2})", lambda found: f"var({_NAMED[int(found[1], 16) - 1]})", svg)
    svg = re.sub(r' (?:d|x|y|x1|x2|y1|y2|points|transform)="[^"]*"', _rounded, svg)
    label = escape(f"{spec['title']}: {spec['y']['label']} against {spec['x']['label']}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _style(title: str) -> dict:
    """matplotlib's settings of a picture in the page's colours, with its text as text."""
    inked = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    return {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif",
            "axes.spines.top": False, "axes.spines.right": False, "grid.color": _ink("line"), "text.parse_math": False,
            **dict.fromkeys(inked, _ink("mut"))}


_NAMED = ("--fg", "--mut", "--line", *COLOURS)  # matplotlib's #0000nn stands for the n-th of them, from 1


def _ink(name: str) -> str:
    """The colour by which matplotlib draws what a CSS variable is to colour."""
    number = _NAMED.index(f"--{name}") if f"--{name}" in _NAMED else 3 + int(name)
    return f"#0000{number + 1:02x}"


def _rounded(found: re.Match) -> str:
    """An attribute's coordinates to a hundredth of a point: a third of the picture's bytes."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), found[0])


def _short(value: float) -> str:
    """1500000 -> 1.5M, 0.25 -> 0.25."""
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{name}"
    return f"{value:.4g}"


def _draw(axes, spec: dict, one: dict, colour: str, most: int) -> None:
    """One series, of which `most` points are shown, evenly apart."""
    name = shell.visible(one["name"]).lstrip("_")[:LETTERS] or " "  # matplotlib hides what begins with _
    if spec["kind"] == "bars":
        axes.stairs(one["counts"], one["edges"], fill=True, color=colour, alpha=0.6, label=name)
        return
    points = one["points"][:: max(1, math.ceil(len(one["points"]) / most))]
    x, y, error = ([point[i] if len(point) > i else 0 for point in points] for i in range(3))
    many = len(one["points"]) > 60
    if "parts" in one:
        ends = [i for i in range(1, len(one["parts"])) if one["parts"][i] != one["parts"][i - 1]]
        gap = [math.nan, math.nan]
        parts = [one["points"][a:b] + [gap] for a, b in zip([0, *ends], [*ends, None])]
        x, y = zip(*(point[:2] for part in parts for point in part))
        axes.plot(x, y, "-", color=colour, linewidth=0.6, label=name)
        return
    if one.get("line"):
        style = "--" if one.get("role") == "random" else "-"
        axes.plot(x, y, style, color=colour, linewidth=1.5, label=name)
    if not one.get("line") or not many:
        label = None if one.get("line") else name
        small = len(one["points"]) > 16 or one.get("role") == "seed"
        axes.errorbar(x, y, yerr=error if any(error) else None, fmt=MARKS_OF.get(one.get("mark"), "o"), color=colour,
                      markersize=2.5 if small else 4, elinewidth=1, label=label)
