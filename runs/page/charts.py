"""Charts as data, drawn twice: interactive by assets/charts.js (Chart.js), and still, by matplotlib, for a page whose
scripts do not run.

A chart, `spec`, is

    {"title": str, "kind": "points" or "bars",
     "x": {"label": str, "log": bool}, "y": {"label": str, "log": bool},
     "series": [{"name": str, "role": one of ROLES, "line": bool, "points": [[x, y, stderr or 0, label, href], …]}]}

label is what hovering says of a point beside its values, in lines, href where a click leads, a relative address or
"#…"; both may be "" or left out. Bars, a histogram: in place of "line" and "points" a series has "edges", n + 1
numbers, and "counts", n; of an axis with "whole": true they count whole numbers from an edge up to the one before the
next, as 32 between 32 and 33. A role decides the shape: "run", "baseline", "random" (a dashed line), "seed" (small
points), "other". Colours go by a series' place, or by its "colour", a number of COLOURS, where what it shows is to keep
one. Points that are not finite, and those not positive on a log axis, are left out.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
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
TITLE = 500  # letters of a still's title, times points of its font
LETTERS = 48  # of a series' name that it shows
SERIES = 24  # that a still draws
ROOM = 900_000  # characters of the data of a menu's charts at most
DIGITS = 6  # of a number in a page's data


def figure(spec: dict, note: str = "") -> str:
    """A chart as HTML: its still picture and its data, of which charts.js makes an interactive one; "" without data."""
    spec = finite(spec)
    if not spec["series"]:
        return ""
    said = f"<figcaption class=mut>{escape(note)}</figcaption>" if note else ""
    kept = shell.data(packed(spec), **{"class": "spec"})
    return f"<figure class=chart><div class=still>{still(spec)}</div>{kept}{said}</figure>"


def menu(label: str, specs: dict[str, dict], shown: str | None = None, elsewhere: str = "final_info.json",
         room: int = ROOM) -> str:
    """Several charts of which a menu shows one, `shown` or the first; without scripts stills of the first STILLS.

    The first of them that fit into so many characters; of the others it is said that they are `elsewhere`.
    """
    specs = {name: spec for name, spec in ((name, finite(spec)) for name, spec in specs.items()) if spec["series"]}
    if not specs:
        return ""
    first = shown if shown in specs else next(iter(specs))
    ordered = {first: specs[first]} | specs
    stills = "".join(f"<div class=still>{still(spec)}</div>" for spec in list(ordered.values())[:STILLS])
    kept, places = _shared(ordered)
    kept = _fitting(kept, room - len(json.dumps(places)))
    options = "".join(f"<option>{escape(name)}</option>" for name in kept)
    held = shell.data({"places": places, "charts": kept}, **{"class": "specs"})
    return (f"<figure class='chart menu'><label class=choice hidden>{escape(label)} <select>{options}</select></label>"
            f"<div class='stills charts'>{stills}</div>{held}{_lacking(len(kept), len(ordered), elsewhere)}</figure>")


def panels(label: str, groups: dict[str, list[dict]], elsewhere: str = "") -> str:
    """Several charts of each of some things, of which a menu shows one; without scripts stills of the first.

    The first of the things that fit into ROOM; of the others it is said that they are `elsewhere`.
    """
    drawn = {name: [one for one in map(finite, specs) if one["series"]] for name, specs in groups.items()}
    drawn = {name: specs for name, specs in drawn.items() if specs}
    if not drawn:
        return ""
    stills = "".join(f"<div class=still>{still(spec)}</div>" for spec in next(iter(drawn.values())))
    kept = _fitting({name: list(map(packed, specs)) for name, specs in drawn.items()}, ROOM)
    options = "".join(f"<option>{escape(name)}</option>" for name in kept)
    first = f"<noscript><p class=mut>the first of {len(drawn)}</p></noscript>" if len(drawn) > 1 else ""
    held = shell.data({"places": [], "charts": kept}, **{"class": "specs"})
    return (f"<figure class='chart menu'><label class=choice hidden>{escape(label)} <select>{options}</select></label>"
            f"{first}<div class='stills charts'>{stills}</div>{held}{_lacking(len(kept), len(drawn), elsewhere)}"
            "</figure>")


def _lacking(kept: int, of: int, elsewhere: str) -> str:
    """A line where not all charts are in the page."""
    if kept == of:
        return ""
    where = f"; all are in {elsewhere}" if elsewhere else ""
    return f"<p class=mut>The menu has {kept:,} of {of:,}, as this page stays under 3 MB{escape(where)}.</p>"


# ------------------------------------------------------------------------------------------------ the data in a page


def packed(spec: dict) -> dict:
    """A chart as a page holds it: numbers of DIGITS digits, and of equal bars the ends and the number alone."""
    series = []
    for one in spec["series"]:
        if spec["kind"] == "bars":
            edges = one["edges"]
            step = (edges[-1] - edges[0]) / (len(edges) - 1)
            if all(abs(edges[0] + i * step - edge) < step / 1e4 for i, edge in enumerate(edges)):
                one = {key: value for key, value in one.items() if key != "edges"} | {"ends": [edges[0], edges[-1]]}
            series.append(one)
        else:
            series.append(one | {"points": list(map(_cut, one["points"]))})
    return spec | {"series": series}


def _cut(point: list) -> list:
    """A point without what is empty at its end."""
    x, y, error, *rest = [*point, 0][:max(len(point), 3)]
    cut = [_digits(x), _digits(y), _digits(error or 0), *rest]
    while cut[-1] in (0, "") and len(cut) > 2:
        cut.pop()
    return cut


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _shared(specs: dict[str, dict]) -> tuple[dict[str, dict], list[list]]:
    """Charts in which the same series stand at the same places, and those places, once.

    In place of points a series has "at", the number of its list of [x, label, href], and "values", for each of these
    null, y or [y, stderr].
    """
    known: dict[tuple, dict] = {}  # of each series its places, in the order in which they come
    numbers: dict[tuple, int] = {}
    found = {}
    for name, spec in specs.items():
        if spec["kind"] == "bars":
            found[name] = packed(spec)
            continue
        series = []
        for one in spec["series"]:
            key = one["name"], one["role"]
            at, number = known.setdefault(key, {}), numbers.setdefault(key, len(numbers))
            values = {at.setdefault(place, len(at)): value for place, value in _placed(one["points"])}
            bare = {key: value for key, value in one.items() if key != "points"}
            listed = [values.get(i) for i in range(max(values) + 1)]
            series.append(bare | {"at": number, "values": listed})
        found[name] = spec | {"series": series}
    return found, [[list(place[:3]) for place in at] for at in known.values()]


def _placed(points: list[list]) -> Iterator[tuple[tuple, float | list]]:
    """(where a point stands and which of those that stand there it is, its value)."""
    there: Counter = Counter()
    for x, y, error, *rest in ([*point, 0, "", ""][:max(len(point), 5)] for point in points):
        place = (_digits(x), *rest[:2])
        there[place] += 1
        yield (*place, there[place]), [_digits(y), float(f"{error:.3g}")] if error else _digits(y)


def _fitting(specs: dict, room: int) -> dict:
    """The first charts that fit into so many characters; one at least."""
    kept: dict = {}
    for name, spec in specs.items():
        room -= len(json.dumps(spec, ensure_ascii=False, separators=(",", ":"))) + 2 * len(name)
        if room < 0 and kept:
            break
        kept[name] = spec
    return kept


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
    from matplotlib.ticker import MaxNLocator, NullFormatter

    title = shell.visible(spec["title"])
    with warnings.catch_warnings(), matplotlib.rc_context(_style(title)):
        warnings.simplefilter("ignore")  # a sign that its font lacks: the browser's has it
        drawn = Figure(figsize=(4.6, 3.0))
        drawn.subplots_adjust(left=0.13, right=0.98, top=0.91, bottom=0.15)
        axes = drawn.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=max(6.0, min(10.0, TITLE / max(len(title), 1))), color=_ink("fg"))
        most = max(MARKS // len(spec["series"]), 2)
        for number, one in enumerate(spec["series"][:SERIES]):
            _draw(axes, spec, one, _ink(str(one.get("colour", number) % len(COLOURS))), most)
        for axis in "xy":
            getattr(axes, f"set_{axis}label")(shell.visible(spec[axis]["label"]))
            if spec[axis].get("log"):
                getattr(axes, f"set_{axis}scale")("log")
                getattr(axes, f"{axis}axis").set_major_formatter(lambda value, place: f"{value:g}")
                getattr(axes, f"{axis}axis").set_minor_formatter(NullFormatter())
            else:
                getattr(axes, f"{axis}axis").set_major_formatter(lambda value, place: _short(value))
            if spec[axis].get("whole"):
                getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(7, integer=True))
        if len(spec["series"]) > 1:
            handles, names = axes.get_legend_handles_labels()
            more = []
            if len(spec["series"]) > NAMED:
                more = [f"and {len(spec['series']) - NAMED} more"]
            handles = handles[:NAMED] + handles[NAMED:NAMED + len(more)]
            axes.legend(handles, names[:NAMED] + more, fontsize=7, frameon=False, ncols=1 + len(names) // 5,
                        loc="best" if len(names) < 5 else "lower right")
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", _tag, svg)  # what names hold stands between tags, where a "<" is "&lt;"
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


def _tag(found: re.Match) -> str:
    """A tag of matplotlib's, in the page's colours and with short coordinates."""
    tag = re.sub(r"#0000([0-9a-f]{2})", lambda colour: f"var({_NAMED[int(colour[1], 16) - 1]})", found[0])
    return re.sub(r' (?:d|x|y|x1|x2|y1|y2|points|transform)="[^"]*"', _rounded, tag)


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
        half = 0.5 if spec["x"].get("whole") else 0.0  # a bar stands around its number
        edges = [edge - half for edge in one["edges"]]
        axes.stairs(one["counts"], edges, fill=True, color=colour, alpha=0.6, label=name)
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
