"""features/<SAE>.html: all features of an SAE in one list, dashboards of some beside the baseline's nearest, and how it
reads a few passages.

    python -m runs.page.features run_1    writes these pages of a run again, from its boards

A page is made from a board alone (evals/dashboards says what that is). The board lies in the page as gzip in base64,
lines of text: the first is the list and whatever else is known, each further one a name, a tab and a dashboard: "12" of
the run, "b77" of the baseline, before those that are compared with it. assets/features.js reads a line when it is asked
for. Figures are cut to three or four digits.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import zlib
from base64 import b64encode
from collections import Counter, deque
from html import escape
from pathlib import Path
from statistics import median

from runs import features
from runs.folder import write_text
from runs.page import charts, shell

SCRIPTS = (*shell.CHARTS, "features.js")
STYLES = ("features.css",)  # which `preview` needs too
SIZE = 2_950_000  # bytes of a page at most
FEWEST = 60  # dashboards that stay while rows of the list can go instead
TOP = 20  # strongest contexts of a dashboard
STATIC = 50  # features in the table without scripts
SAMPLE = 20_000  # rows by which the size of a longer list is estimated
REASONS = ("best probe", "new", "explained", "absorbed letter", "random", "rarest", "densest")  # most telling first
SCALED = ("own_cosine", "cosine", "encoder_cosine")  # kept in thousandths
COLUMNS = ("density", "max", "peak", "own_nearest", "own_cosine", "nearest", "cosine", "new", "encoder_cosine")


def place(out: Path, sae: str) -> Path:
    """Where the page of an SAE's features lies in a run's folder, there or not."""
    return features.place(out, sae).with_name(f"{sae}.html")


def write(out: Path, sae: str, board: dict | None = None) -> Path:
    """Write out/features/<sae>.html, under 3 MB, from the board that `out` keeps, or `board`, as read.

    OSError, ValueError: as features.read.
    """
    if board is None:
        board = features.read(out, sae)
    before, after = [_head(board), _app(board)], [_static(board), _densities(board)]
    # what the page is without the data; 2,000 for the line that says what was left out
    rest = len(shell.page(_title(board), [*before, *after], SCRIPTS, STYLES).encode()) + 2_000
    kept, rows, boards = _packed(board, (SIZE - rest) // 4 * 3)
    told = _left_out(board, rows, boards)
    data = shell.data(b64encode(kept).decode(), id="board")
    path = place(out, sae)
    write_text(path, shell.page(_title(board), [before[0], told, before[1], *after, data], SCRIPTS, STYLES))
    return path


def address(sae: str) -> str:
    """Where the page of an SAE's features is, seen from the run's folder; "#123" behind it leads to a feature."""
    return f"{features.FOLDER}/{shell.quoted(place(Path(), sae).name)}"


def preview(board: dict, n: int) -> str:
    """n dashboards as HTML for a page with STYLES in the run's folder, a reason for being chosen after the other."""
    waiting = {why: deque() for why in REASONS}
    for feature, one in board["features"].items():
        waiting.setdefault(next(iter(one["why"]), "random"), deque()).append(feature)
    chosen = []
    while len(chosen) < n and any(waiting.values()):
        chosen += [queue.popleft() for queue in waiting.values() if queue]
    return "".join(_card(board, feature) for feature in chosen[:n])


# ------------------------------------------------------------------------------------------------ what goes in


def _packed(board: dict, room: int) -> tuple[bytes, int, int]:
    """The board as gzip of at most `room` bytes; how many rows of the list and how many dashboards are in it.

    Where it is larger, dashboards go from the end, down to FEWEST, then rows of features, the rarest first.
    """
    lines = _lines(board)
    fewest = len(zlib.compress("".join(lines[:FEWEST]).encode()))
    order = _by_need(board)
    bare = len(zlib.compress(_first(board, []).encode()))
    rows = len(order)
    if rows > SAMPLE:
        sample = sorted(order[::rows // SAMPLE])
        each = (len(zlib.compress(_first(board, sample).encode())) - bare) / len(sample)
        rows = min(rows, int((room - bare - fewest) / each))
    while True:
        rows = max(rows, 0)
        stream = zlib.compressobj(9, wbits=31)
        kept = [_put(stream, _first(board, sorted(order[:rows])))]
        used = len(kept[0])
        if used + fewest <= room or rows == 0:
            break
        rows = int(rows * 0.98 * max(room - bare - fewest, 0) / max(used - bare, 1))
    boards = 0
    for line in lines:
        trial = stream.copy()
        chunk = _put(trial, line)
        if used + len(chunk) + 16 > room:  # 16: the end of the stream
            break
        stream, used, boards = trial, used + len(chunk), boards + 1
        kept.append(chunk)
    return b"".join([*kept, stream.flush()]), rows, boards


def _put(stream, text: str) -> bytes:
    """Text through a compressor, to the last byte."""
    return stream.compress(text.encode()) + stream.flush(zlib.Z_SYNC_FLUSH)


def _by_need(board: dict) -> list[int]:
    """All features: those with a dashboard, then the others, the densest first."""
    density = board["list"]["density"] or [0.0] * board["d_sae"]
    own = {int(feature) for feature in board["features"]}
    return sorted(range(board["d_sae"]), key=lambda feature: (feature not in own, -(density[feature] or 0), feature))


def _first(board: dict, rows: list[int]) -> str:
    """The first line: all but the dashboards; of the list these rows."""
    columns = {}
    for name in COLUMNS:
        values = board["list"].get(name)  # boards of before have no peak and no new
        if values is not None:
            columns[name] = [_shown(values[row], name) for row in rows]
    classes = {name: place for place, name in enumerate(dict.fromkeys(
        name for one in board["features"].values() for name in one["classes"]))}
    notes = {feature: [one["why"], [classes[name] for name in one["classes"]], one["letters"], one["explanation"],
                       one["score"], _peaks(board, one)] for feature, one in board["features"].items()}
    baseline = board["baseline"]
    if baseline is not None:
        baseline = {key: baseline.get(key) for key in ("name", "variant", "l0", "problem", "new")}
    named = {key: board[key] for key in ("sae", "variant", "either_sign", "d_sae", "text", "vocab")}
    return _text(named | {"rows": None if len(rows) == board["d_sae"] else rows, "columns": columns, "notes": notes,
                          "order": _order(board), "classes": [[name, class_in_words(name)] for name in classes],
                          "baseline": baseline, "passages": _passages(board)}) + "\n"


def _order(board: dict) -> list[int]:
    """The features with dashboards as one looks at them: by reasons, and of each those of middle density first."""
    logs = {feature: math.log10(one["density"] or 1e-9) for feature, one in board["features"].items()}
    if not logs:
        return []
    middle = median(logs.values())

    def place(feature: str) -> tuple:
        reasons = [REASONS.index(why) for why in board["features"][feature]["why"] if why in REASONS]
        return min(reasons, default=len(REASONS)), abs(logs[feature] - middle), int(feature)

    return [int(feature) for feature in sorted(logs, key=place)]


def class_in_words(name: str) -> str:
    """"105_click_bait", a data set of sae_probes, as "click bait (sae_probes 105)"; others without underscores."""
    numbered = re.fullmatch(r"(\d+)_(.+)", name, re.DOTALL)
    if numbered is None:
        return name.replace("_", " ")
    return f"{numbered[2].replace('_', ' ')} (sae_probes {numbered[1]})"


def _peaks(board: dict, one: dict, n: int = 3) -> list[str]:
    """The tokens at the peaks of a dashboard's strongest contexts, the most frequent first."""
    counted = Counter(board["vocab"][context["tokens"][context["peak"]]] for context in _strongest(one, TOP))
    return [token for token, _ in counted.most_common(n)]


def _shown(value, column: str):
    if value is None:
        return None
    if column in SCALED:
        return round(value * 1000)
    if column == "density":  # whole: a number of tokens is made of it
        return _digits(value, 8)
    return value if isinstance(value, int) else _digits(value, 3)


def _digits(value: float, n: int = 4) -> float | int:
    """A number with n digits that count."""
    short = float(f"{value:.{n}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _passages(board: dict) -> list[dict]:
    def short(side):
        return None if side is None else [[[f, _digits(v, 3)] for f, v in token] for token in side]

    return [one | {"run": short(one["run"]), "baseline": short(one["baseline"])} for one in board["passages"]]


def _beside(board: dict, feature: str) -> str | None:
    """The baseline's feature whose dashboard stands beside this one's."""
    baseline, theirs = board["baseline"], board["features"][feature]["theirs"]
    if baseline is None or not theirs:
        return None
    return next((str(other) for other, _ in theirs if str(other) in baseline["features"]), None)


def _lines(board: dict) -> list[str]:
    """Of each feature its dashboard's line, after that of the baseline's beside it where that did not come before."""
    lines, told = [], {None}
    for feature, one in board["features"].items():
        other, line = _beside(board, feature), ""
        if other not in told:
            line = f"b{other}\t{_text(_dashboard(board['baseline']['features'][other]))}\n"
            told.add(other)
        lines.append(f"{line}{feature}\t{_text(_dashboard(one) | {'beside': other})}\n")
    return lines


def _dashboard(one: dict) -> dict:
    """A dashboard without what the first line has; a context is [tokens, values, peak, row, cut before, after]."""
    groups = []
    for group in one["groups"]:
        contexts = [[context["tokens"], [[place, _digits(value, 3)] for place, value in context["values"]],
                     context["peak"], context["row"], *map(int, context["cut"])] for context in group["contexts"]]
        groups.append([group["name"], _digits(group["from"], 3), _digits(group["to"], 3), contexts])
    logits = one["logits"]
    if logits is not None:
        words = {side: [[token, _digits(value, 3)] for token, value in logits[side]] for side in ("top", "bottom")}
        logits = words | _bars(logits)
    links = {name: [[other, _digits(value, 3)] for other, value in one[name]] for name in ("own", "theirs", "cofiring")}
    return {"density": _digits(one["density"], 8), "max": _digits(one["max"]), "groups": groups,
            "histogram": _bars(one["histogram"]), "logits": logits, **links}


def _bars(histogram: dict) -> dict:
    """Edges at equal distances as the first and the last."""
    edges = histogram["edges"]
    ends = [edges[0], edges[-1]]
    step = (ends[1] - ends[0]) / (len(edges) - 1)
    even = all(abs(edges[0] + i * step - edge) <= 0.02 * abs(step) for i, edge in enumerate(edges))
    return {"edges": [_digits(edge, 5) for edge in (ends if even else edges)], "counts": histogram["counts"]}


def _text(value) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------ what is said


def _title(board: dict) -> str:
    return f"Features of {board['sae']}"


def _head(board: dict) -> str:
    facts = [board["variant"], f"on {board['model']}", board["hook_name"], f"width {board['d_sae']:,}"]
    text = board["text"]
    if text is not None:
        facts.append(f"text: {text['dataset']}, {text['tokens']:,} tokens in {text['rows']:,} rows of "
                     f"{text['context']:,}")
    said = escape(" · ".join(str(fact) for fact in facts if fact))
    return (f"<p><a href=../report.html>← the run’s report</a></p><h1>{escape(_title(board))}</h1>"
            f"<p class=mut>{said}</p><p>{escape(_summary(board))}</p>")


def _summary(board: dict) -> str:
    density, width = board["list"]["density"], board["d_sae"]
    if density is None or board["text"] is None:
        return f"{width:,} features; the model reads no text, so that there are no dashboards."
    firing = [feature for feature, share in enumerate(density) if share]
    said = [f"{len(firing):,} of {width:,} features fire on this text, {width - len(firing):,} "
            f"({(width - len(firing)) / width:.1%}) never do; {len(board['features']):,} have a dashboard."]
    if firing:
        said.append(f"The median of those that fire does so on "
                    f"{_share(board, median(density[feature] for feature in firing))}.")
    new = (board["baseline"] or {}).get("new")
    if new:
        said.append(f"{new['count']:,} of {new['of']:,} features are new, as the comparison counts them, of those that "
                    f"fire in the text of core: no feature of {board['baseline']['name']} has a cosine of "
                    f"{new['threshold']} with them.")
    return " ".join(said)


def _share(board: dict, density: float) -> str:
    """0.0123 as "1.23% of tokens (398 of 32,326)", as features.js has it."""
    tokens = board["text"]["tokens"]
    return f"{100 * density:.3g}% of tokens ({density * tokens:,.0f} of {tokens:,})"


def _left_out(board: dict, rows: int, boards: int) -> str:
    said = []
    if boards < len(board["features"]):
        said.append(f"the dashboards of {len(board['features']) - boards:,} features, the last that were chosen")
    if rows < board["d_sae"]:
        density = board["list"]["density"] or ()
        dead = sum(not share for share in density)
        gone = board["d_sae"] - rows
        what = "features that never fire" if gone <= dead else f"{dead:,} features that never fire and of the rarest"
        said.append(f"{gone:,} rows of the list, those of {what}")
    if not said:
        return ""
    file = features.place(Path(), board["sae"]).name
    lacks = f"To keep this page under 3 MB it lacks {' and '.join(said)}. {file} has all."
    return f"<p class=warn>{escape(lacks)}</p>"


def _densities(board: dict) -> str:
    """How often features fire, as a histogram over all that do."""
    logs = [math.log10(share) for share in board["list"]["density"] or () if share]
    if not logs:
        return ""
    low, high = math.floor(min(logs) * 10) / 10, 0.0
    bins = min(50, max(1, round((high - low) * 10)))
    counts = [0] * bins
    for value in logs:
        counts[min(bins - 1, int((value - low) / (high - low or 1) * bins))] += 1
    edges = [round(low + (high - low) * i / bins, 4) for i in range(bins + 1)]
    spec = {"title": "How often features fire", "kind": "bars",
            "x": {"label": "log10 of the share of tokens", "log": False}, "y": {"label": "features", "log": False},
            "series": [{"name": "this run", "role": "run", "edges": edges, "counts": counts}]}
    return f"<h2>Densities</h2><div class=narrow>{charts.figure(spec)}</div>"


def _app(board: dict) -> str:
    """What features.js fills; hidden while it does not run."""
    filters = [("has", "with a dashboard")]
    if board["list"].get("new") is not None:
        filters.append(("new", "new"))
    if board["list"]["density"] is not None:
        filters.append(("dead", "never firing"))
    boxes = "".join(f"<label><input type=checkbox id=only-{name}> {said}</label>" for name, said in filters)
    there = {why for one in board["features"].values() for why in one["why"]}
    reasons = [*(why for why in REASONS if why in there), *sorted(there - set(REASONS))]
    options = "".join(f"<option>{escape(why)}</option>" for why in reasons)
    chosen = f'<label>chosen as <select id=why><option value="">any</option>{options}</select></label>'
    keys = ("Keys while the list or what is below it has the focus: <kbd>/</kbd> search · <kbd>j</kbd> <kbd>k</kbd> "
            "next and previous dashboard · in the list <kbd>↑</kbd> <kbd>↓</kbd> <kbd>Enter</kbd> · on a token "
            "<kbd>←</kbd> <kbd>→</kbd>")
    passages = "<section aria-labelledby=read><h2 id=read>Passages</h2><div id=passages></div></section>"
    return f"""<div id=app hidden>
<section aria-labelledby=all><h2 id=all>All features</h2>
<div class=controls><label>Search <input type=search id=query size=26 autocomplete=off spellcheck=false></label>
<label>in <select id=where><option value=any>numbers, words, tokens</option><option value=words>explanations, classes
</option><option value=tokens>tokens it fires on or promotes</option><option value=contexts>all text of its contexts
</option></select></label>{boxes}{chosen if options else ""}</div>
<p class="mut keys"><output id=found></output> <span id=scope></span></p>
<div id=list></div><p class="mut keys">{keys}</p></section>
<section id=one aria-labelledby=which></section>{passages if board["passages"] else ""}
<div id=tip role=tooltip hidden></div></div>"""


# ------------------------------------------------------------------------------------------------ without scripts


def _static(board: dict) -> str:
    """The first features with dashboards as a table, for a browser that runs no scripts."""
    note = "<p class=mut id=plain-note>Searching, sorting and dashboards need JavaScript.</p>"
    if not board["features"]:
        return f"<div id=plain>{note}</div>"
    cosine = board["list"]["cosine"]
    heads = ["feature", "density", "max", *(["cosine to the baseline"] if cosine else [])]
    rows = []
    for feature in map(str, _order(board)[:STATIC]):
        one = board["features"][feature]
        cells = [feature, f"{100 * one['density']:.3g}%", f"{one['max']:.3g}"]
        if cosine:
            cells.append("" if cosine[int(feature)] is None else f"{cosine[int(feature)]:.3f}")
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        words = ", ".join([*map(escape, one["why"]), *_classes(one)])
        shown = "".join(_context(board, one, context) for context in _strongest(one, 1))
        rows.append(f'<tr>{figures}<td class="l w">{words}</td><td class="l w">{shown}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in heads) + "<th class=l>chosen as, classes</th><th class=l>context</th>"
    said = f"<h2>{len(rows)} of the {len(board['features']):,} features with dashboards</h2>"
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<div id=plain>{said}{note}{shell.scrolling('features with dashboards', table)}</div>"


def _card(board: dict, feature: str) -> str:
    """A dashboard, short: figures, what it promotes, three contexts."""
    one, cosine = board["features"][feature], board["list"]["cosine"]
    figures = [f"density {100 * one['density']:.3g}%", f"max {one['max']:.3g}"]
    if cosine is not None and cosine[int(feature)] is not None:
        figures.append(f"cosine to the baseline’s nearest {cosine[int(feature)]:.2f}")
    words = [*map(escape, one["why"]), *_classes(one), *([escape(one["explanation"])] if one["explanation"] else [])]
    promoted = ""
    if one["logits"]:
        tokens = " ".join(f"<code>{escape(shell.visible(token))}</code>" for token, _ in one["logits"]["top"][:8])
        promoted = f"<p class=mut>promotes {tokens}</p>"
    contexts = "".join(_context(board, one, context) for context in _strongest(one, 3))
    return (f'<div class=card><h3><a href="{escape(address(board["sae"]))}#{feature}">Feature {feature}</a> '
            f"<span class=mut>{escape(' · '.join(figures))}</span></h3><p>{' · '.join(words)}</p>"
            f"{promoted}{contexts}</div>")


def _classes(one: dict) -> list[str]:
    """The classes of a dashboard as HTML, in words, their names in the evals as titles."""
    return [f'<span title="{escape(name)}">{escape(class_in_words(name))}</span>' for name in one["classes"]]


def _strongest(one: dict, n: int) -> list[dict]:
    return [context for group in one["groups"][:1] for context in group["contexts"][:n]]


def _context(board: dict, one: dict, context: dict, reach: int = 12) -> str:
    """The tokens around the peak, those on which it fires shaded."""
    values, top = dict(map(tuple, context["values"])), abs(one["max"]) or 1.0
    first, last = max(0, context["peak"] - reach), min(len(context["tokens"]), context["peak"] + reach + 1)
    html = []
    for place in range(first, last):
        text, value = escape(shell.visible(board["vocab"][context["tokens"][place]])), values.get(place)
        if value:
            sign = "neg" if value < 0 else "pos"
            text = f'<span class="on {sign}" style="--a:{min(1.0, abs(value) / top):.2f}">{text}</span>'
        html.append(text)
    before = "…" if first or context["cut"][0] else ""
    after = "…" if last < len(context["tokens"]) or context["cut"][1] else ""
    return f"<div class=said>{before}{''.join(html)}{after}</div>"


# ------------------------------------------------------------------------------------------------ command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runs.page.features", allow_abbrev=False,
                                     description="Write the pages of a run's features again, from its boards.")
    parser.add_argument("run", help="the folder of a run")
    out = Path(parser.parse_args(argv).run)
    saes = features.kept(out)
    if not saes:
        print(f"{out} has no {features.FOLDER}/*.json.gz\nname the folder of a run that has them", file=sys.stderr)
        return 1
    failed = 0
    for sae in saes:
        try:
            print(write(out, sae))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
