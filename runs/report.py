"""report.html: one self-contained page about a run, readable in light and dark, without any request to the outside."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Collection, Iterable
from html import escape
from pathlib import Path

import evals
from runs import snapshots
from runs.compare import RANDOM, directions, families, identity, judged
from runs.comparison import Comparison
from runs.folder import write_text
from runs.frontier import l0_of
from runs.reading import Run
from runs.stability import as_data
from runs.tables import Cell, Table, laid_out, lefts, plain, warned

SIZE = 700_000  # characters that dashboards may fill the page up to
POINTS = 4000  # of all lines of one chart together
NOT_PLOTTED = {"sae", "step", "tokens"}
# {column of the training log: (title, unit)}
AXES = {"l0": ("L0", "features per token"),
        "explained_variance": ("Explained variance", "share of the batch's variance"),
        "dead_share": ("Dead features", "share of features"),
        "tokens_per_s": ("Speed", "tokens per second"),
        "loss": ("Loss", "at E‖x‖² = 1")}
# (metric, title, unit) of the charts by L0
FRONTIER = (("core.ce_loss_score", "CE loss score", "share of the loss recovered"),
            ("core.r2", "R²", "share of variance"),
            ("sparse_probing.sae_top_1_test_accuracy", "Sparse probing, top 1", "test accuracy"),
            ("sae_probes.sae_top_1_test_auc", "sae-probes, top 1", "test AUC"),
            ("ground_truth.f1", "F1 of the features", "mean over SAE features"),
            ("ground_truth.mcc", "MCC of the features", "mean cosine of matched directions"),
            ("ground_truth.r2", "R²", "share of variance"),
            ("ground_truth.uniqueness", "Uniqueness", "share of distinct true features"))

CSS = """
:root{color-scheme:light dark;--fg:#1c1f24;--mut:#5d6673;--bg:#fff;--card:#f5f6f8;--line:#d5d9df;\
--good:#0a7a3c;--bad:#b3261e;
--warn:#fff3d6;--warnline:#e0a92e;--act:235,120,20}
@media(prefers-color-scheme:dark){\
:root{--fg:#e4e7eb;--mut:#9aa4b1;--bg:#15181c;--card:#1e2227;--line:#3a4149;--good:#5fd08f;
--bad:#ff8a80;--warn:#3a2f14;--warnline:#b98a22;--act:255,150,50}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1120px;
margin:0 auto;padding:24px}\
h1{font-size:24px;margin:0 0 2px}h2{font-size:18px;margin:34px 0 10px}\
p{margin:4px 0}.mut{color:var(--mut)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--mut);font-weight:600}td.l,th.l{text-align:left}td.w{white-space:normal;overflow-wrap:anywhere}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}
.warn{background:var(--warn);border-left:4px solid var(--warnline);padding:6px 12px;margin:6px 0;border-radius:3px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:16px}\
svg{width:100%;height:auto;display:block}
figure{margin:14px 0}
figure img{max-width:100%;background:#fff;border-radius:6px}
svg text{fill:var(--mut);font:11px system-ui,sans-serif}svg .t{fill:var(--fg);font-size:13px;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0 10px;font-size:13px}\
.legend i{display:inline-block;width:18px;
height:0;border-top:3px solid;margin-right:6px;vertical-align:middle}
.feature{background:var(--card);border-radius:6px;padding:10px 14px;margin:10px 0}\
.feature h3{font-size:15px;margin:0 0 4px}
.context{font:13px/1.75 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;\
border-top:1px solid var(--line);
padding:3px 0}.context span{border-radius:3px}details{margin:8px 0}summary{cursor:pointer;color:var(--mut)}
"""

# ------------------------------------------------------------------------------------------------ the page


def write(out_dir: str | Path, sections: dict[str, Run], baseline: Iterable[Run] | dict | None, log_rows: list[dict],
          dashboards: Iterable[dict] = ()) -> Path:
    """Write out_dir/report.html (under 1 MB) and return its path; beside it new_features.json where there is any.

    `sections` as `read` returns them. log_rows: rows of training_log.csv (sae, step, tokens, loss, its terms, l0, …).
    dashboards: {"sae" (optional), "feature", "density", "max_activation", "contexts": [[(token, activation), …], …],
    "top_logits" (optional): [(token, logit), …]} per feature.
    """
    runs, name = list(sections.values()), Path(out_dir).resolve().name
    stored = list(baseline.values() if isinstance(baseline, dict) else baseline or ())
    comparisons = judged(runs, stored, directions())
    parts = [_head(name, runs), _comparison(comparisons, runs), _frontier(runs, stored, comparisons),
             _along_training(runs), _curves(log_rows), _own_pictures(Path(out_dir) / "variant_report"),
             _problems(runs), _settings(runs)]
    parts.insert(7, _dashboards(dashboards, SIZE - sum(map(len, parts))))
    head = ('<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>{escape(name)}</title><style>{CSS}</style>")
    _write_new_features(Path(out_dir), comparisons)
    path = Path(out_dir) / "report.html"
    write_text(path, "\n".join([head, *filter(None, parts), "</html>\n"]))
    return path


def _write_new_features(out: Path, comparisons: list[Comparison]) -> None:
    """new_features.json: of every SAE whose baseline's decoder is at hand the nearest feature there, for dashboards."""
    asked = {one.run.section: one.new() for c in comparisons for one in c.saes if one.run.path.parent == out.resolve()}
    found = {section: as_data(new, every=True) for section, new in asked.items() if new is not None}
    if found:
        write_text(out / "new_features.json", json.dumps(found, allow_nan=False) + "\n")


def _own_pictures(folder: Path) -> str:
    """Pictures a variant made of itself, inside the page; larger ones and other files are named."""
    kinds, html = {".png": "image/png", ".svg": "image/svg+xml"}, []
    for file in sorted(folder.glob("*/*")):
        title = f"{escape(file.parent.name)}: {escape(file.name)}"
        if file.suffix in kinds and file.stat().st_size < 300_000:
            data = b64encode(file.read_bytes()).decode()
            html.append(f'<figure><img alt="{title}" src="data:{kinds[file.suffix]};base64,{data}">'
                        f"<figcaption class=mut>{title}</figcaption></figure>")
        elif file.name != "numbers.json":
            html.append(f"<p class=mut>variant_report/{escape(file.parent.name)}/{escape(file.name)}</p>")
    return f"<h2>The variant's own report</h2>{''.join(html)}" if html else ""


def _head(name: str, runs: list[Run]) -> str:
    config, several = runs[0].config if runs else {}, len(runs) > 1
    width = config.get("d_sae")
    facts = [config.get("variant")]
    if config.get("model"):
        facts.append(f"on {config['model']}")
    facts.append(f"{len(runs)} SAEs" if several else config.get("hook_name"))
    if isinstance(width, int):
        facts.append(f"width {width:,}")
    return f"<h1>{escape(name)}</h1><p class=mut>{escape(' · '.join(str(f) for f in facts if f))}</p>"


def _comparison(comparisons: list[Comparison], runs: list[Run]) -> str:
    brief, full = (laid_out(comparisons, everything) for everything in (False, True))
    html = [f"<div class=warn>{escape(line)}</div>" for line in warned(comparisons)]
    html.append("<h2>Comparison</h2>" + "".join(map(_table, brief)))
    if any(len(a.rows) != len(b.rows) for a, b in zip(brief, full)):
        html.append("<details><summary>every metric</summary>" + "".join(map(_table, full)) + "</details>")
    ran = {name for run in runs for name in run.config.get("evals") or {}}
    notes = {name: evals.declared(name, "NOTE") for name in evals.names() if name in ran}
    html += [f"<p class=mut>{escape(name)}: {escape(note)}</p>" for name, note in notes.items() if note]
    return "".join(html)


def _table(table: Table) -> str:
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
    return f"{above}<div class=scroll><table>{row(plain(table.header), 'th')}{body}</table></div>{below}"


def _sure_verdict(cell: Cell) -> str:
    """better or worse, which CSS colours, where the difference exceeds two standard errors."""
    sure = cell.judged.beyond and cell.judged.verdict in ("better", "worse")
    return cell.judged.verdict if sure else ""


def _problems(runs: list[Run]) -> str:
    about: dict[str, list[str]] = {}
    for run in runs:
        for problem in run.problems:
            about.setdefault(problem, []).append(run.name)
    items = [problem if len(names) == len(runs) else f"{', '.join(names)}: {problem}"
             for problem, names in about.items()]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>Problems</h2><ul>{listed}</ul>" if items else ""


def _settings(runs: list[Run]) -> str:
    """What all SAEs share once, and what differs in a column per SAE."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    shared = [k for k in keys if all(run.config.get(k) == runs[0].config.get(k) for run in runs)]
    rows = (f"<td class=l>{escape(k)}</td><td class='l w'>{escape(_plain(runs[0].config[k]))}</td>" for k in shared)
    html = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    own = [k for k in keys if k not in shared]
    if own:
        lines = [["SAE", *own], *([run.name, *(_plain(run.config.get(k)) for k in own)] for run in runs)]
        rows = ("".join(f"<td class=l>{escape(cell)}</td>" for cell in line) for line in lines)
        html += f"<div class=scroll><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"
    return f"<h2>Settings</h2><details><summary>{len(keys)} settings</summary>{html}</details>" if keys else ""


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} = {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------------------ charts


def _curves(log_rows: list[dict]) -> str:
    if not log_rows:
        return ""
    names = list(dict.fromkeys(row["sae"] for row in log_rows))
    columns = list(dict.fromkeys(c for row in log_rows for c in row if c not in NOT_PLOTTED))
    charts = []
    for column in columns:
        series = []
        for name in names:
            pairs = ((_float(row.get("tokens")), _float(row.get(column))) for row in log_rows if row["sae"] == name)
            series.append((name, [(x, y) for x, y in pairs if x is not None and y is not None]))
        title, unit = AXES.get(column, (column.replace("_", " "), "mean of the term"))
        charts.append(chart(title, series, "training tokens", unit))
    return f"<h2>Training</h2>{_legend(names)}<div class=charts>{''.join(filter(None, charts))}</div>"


def _along_training(runs: list[Run]) -> str:
    """Quality by tokens, where the run was measured along training (--snapshots)."""
    measured = {sae: rows for path in dict.fromkeys(run.path for run in runs)
                for sae, rows in snapshots.read(path).items()}
    charts = []
    for metric, title, unit in FRONTIER:
        series = [(sae, [(row["tokens"], row["means"][metric], row["stderrs"].get(metric, 0.0)) for row in rows
                         if row["means"].get(metric) is not None]) for sae, rows in measured.items()]
        charts.append(chart(title, series, "training tokens", unit, dots=True))
    if not any(charts):
        return ""
    return f"<h2>Along training</h2>{_legend(list(measured))}<div class=charts>{''.join(filter(None, charts))}</div>"


def _frontier(runs: list[Run], stored: list[Run], comparisons: list[Comparison]) -> str:
    """Quality against L0 where the run, the baseline or a random dictionary has SAEs of several L0 in a layer."""
    random = {comparison.identity: comparison.random for comparison in comparisons}
    by_layer: dict[tuple, list[Run]] = {}
    for run in runs:
        by_layer.setdefault(identity(run.config), []).append(run)
    html = []
    for key, members in by_layer.items():
        sides = [("this run", members), ("baseline", [b for b in stored if identity(b.config) == key])]
        floors = [(RANDOM[name], family) for name, saes in random.get(key, {}).items() for family in families(saes)]
        if not any(len({l0_of(sae) for sae in side} - {None}) > 1 for _, side in sides + floors):
            continue
        lines = [(f"{name} ({family[0].config.get('variant') or family[0].name})", family)
                 for name, side in sides for family in families(side)] + floors
        charts = []
        for metric, title, unit in FRONTIER:
            series = [(name, _by_l0(family, metric)) for name, family in lines]
            loose = {name for name, family in lines if not _one_line(family)}
            if not any(_by_l0(members, metric)):  # nothing of this run's
                continue
            charts.append(chart(f"{title}, layer {key[1]}", series, "L0, features per token (log)", unit,
                                dots=True, log_x=True, loose=loose))
        if any(charts):
            html += [_legend([name for name, _ in lines]), f"<div class=charts>{''.join(filter(None, charts))}</div>"]
    return f"<h2>Frontier</h2><p class=mut>bars: one standard error, where known</p>{''.join(html)}" if html else ""


def _by_l0(saes: list[Run], metric: str) -> list[tuple[float, float, float]]:
    """(L0, value, standard error or 0) of the SAEs that have both, by L0; L0 = 0 has no place on a log axis."""
    return sorted((l0_of(sae), sae.means[metric], sae.stderrs.get(metric, 0.0)) for sae in saes
                  if (l0_of(sae) or 0) > 0 and sae.means.get(metric) is not None)


def _one_line(saes: list[Run]) -> bool:
    """Whether one hyper-parameter at most makes them differ, so that a line through them means something."""
    hyper = [sae.config.get("hyper") or {} for sae in saes]
    return sum(len({str(h.get(key)) for h in hyper}) > 1 for key in dict.fromkeys(k for h in hyper for k in h)) <= 1


def chart(title: str, series: list[tuple[str, list[tuple[float, ...]]]], x_unit: str, y_unit: str, dots: bool = False,
          log_x: bool = False, loose: Collection[str] = ()) -> str:
    """An inline SVG chart of finite (x, y) or (x, y, standard error).

    y is logarithmic where positive and over a factor 50. Series named in `loose` are points without a line.
    """
    keep = max(2, min(300, POINTS // max(len(series), 1)))
    thinned = [(name, points[:-1][:: max(1, math.ceil(len(points) / keep))] + points[-1:]) for name, points in series]
    xs = [p[0] for _, points in thinned for p in points]
    ys = [p[1] + sign * sum(p[2:]) for _, points in thinned for p in points for sign in (-1, 1)]
    if not xs:
        return ""
    log_y = min(ys) > 0 and max(ys) / min(ys) > 50
    scale_x, scale_y = (math.log10 if log else float for log in (log_x, log_y))
    width, height, left, right, top, bottom = 360, 230, 58, 14, 30, 42
    x_low, x_high = _span(scale_x(min(xs)), scale_x(max(xs)), 0.05 * log_x)
    y_low, y_high = _span(scale_y(min(ys)), scale_y(max(ys)), 0.05)

    def at_x(x):
        return left + (scale_x(x) - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y):
        return height - bottom - (scale_y(y) - y_low) / (y_high - y_low) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(title)}">'
           f"<text class=t x={left} y=16>{escape(title)}</text>"]
    y_ticks = _log_ticks(y_low, y_high) if log_y else _ticks(y_low, y_high)
    for y in y_ticks:
        out.append(f'<path d="M{left} {at_y(y):.1f}H{width - right}" stroke="var(--line)"/>'
                   f'<text x={left - 6} y={at_y(y) + 4:.1f} text-anchor=end>{_short(y)}</text>')
    for x in _l0_ticks(10**x_low, 10**x_high) if log_x else _ticks(x_low, x_high, 4):
        out.append(f'<path d="M{at_x(x):.1f} {height - bottom}v4" stroke="var(--mut)"/>'
                   f'<text x={at_x(x):.1f} y={height - bottom + 17} text-anchor=middle>{_short(x)}</text>')
    middle = (top + height - bottom) / 2
    y_unit += " (log)" if log_y else ""
    out.append(f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill=none stroke="var(--mut)"/>'
               f'<text x={(left + width - right) / 2:.0f} y={height - 8} text-anchor=middle>{escape(x_unit)}</text>'
               f'<text transform="translate(13 {middle:.0f})rotate(-90)" text-anchor=middle>{escape(y_unit)}</text>')
    for number, (name, points) in enumerate(thinned):
        colour, path = _colour(number, len(series)), "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y, *_ in points)
        if len(points) > 1 and name not in loose:
            out.append(f'<path d="M{path}" fill=none stroke="{colour}" stroke-width=1.8 stroke-linejoin=round>'
                       f"<title>{escape(name)}</title></path>")
        bars = "".join(f"M{at_x(x):.1f} {at_y(y - error[0]):.1f}V{at_y(y + error[0]):.1f}"
                       for x, y, *error in points if sum(error))
        if bars:
            out.append(f'<path d="{bars}" fill=none stroke="{colour}" stroke-width=1.2 opacity=.6 />')
        if dots or len(points) == 1:
            for x, y, *error in points:
                known = f" ± {error[0]:.2g}" if sum(error) else ""
                out.append(f'<circle cx={at_x(x):.1f} cy={at_y(y):.1f} r=3.2 fill="{colour}">'
                           f"<title>{escape(name)}: {x:.4g}, {y:.4g}{known}</title></circle>")
    return "".join(out) + "</svg>"


def _legend(names: list[str]) -> str:
    lines = (f'<i style="border-color:{_colour(i, len(names))}"></i>{escape(str(name))}'
             for i, name in enumerate(names))
    return f"<div class=legend>{''.join(f'<span>{line}</span>' for line in lines)}</div>"


def _colour(number: int, of: int) -> str:
    """Colours that differ in hue and stand out on white and on black (the first eight), or a ramp for a long sweep."""
    few = ("#3b82d6", "#e07b1f", "#2f9e62", "#c2558f", "#8a63d2", "#b08a00", "#1f9bb0", "#d0483e")
    return few[number] if of <= len(few) else f"hsl({int(300 * number / of)} 65% 50%)"


def _span(low: float, high: float, margin: float) -> tuple[float, float]:
    """Ends of an axis: some margin around the data, and never of length 0."""
    room = margin * (high - low) or (0 if high > low else abs(high) * 0.1 or 1.0)
    return low - room, high + room


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two exponents, at most six; also three times each where they are few."""
    every = max(1, math.ceil((high - low) / 6))
    ticks = [10.0**e for e in range(math.floor(low), math.floor(high) + 1, every)]
    ticks += [3 * t for t in ticks] if high - low < 2.5 else []
    return sorted(t for t in ticks if low <= math.log10(t) <= high)


def _l0_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values; the powers alone if many, round numbers if few."""
    powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [t for t in (m * power for power in powers for m in (1, 2, 5)) if low <= t <= high]
    if len(ticks) > 7:
        return [power for power in powers if low <= power <= high]
    return ticks if len(ticks) > 2 else [t for t in _ticks(low, high, 4) if t > 0]


def _short(value: float) -> str:
    """1500000 -> 1.5M, 0.25 -> 0.25."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def _float(value) -> float | None:
    """A finite number from a CSV field, else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ------------------------------------------------------------------------------------------------ features


def _dashboards(dashboards: Iterable[dict], room: int) -> str:
    html, shown, left_out = [], 0, 0
    for feature in dashboards:
        text = _feature(feature)
        if len(text) > room:
            left_out += 1
            continue
        room -= len(text)
        shown += 1
        html.append(text)
    note = f"<p class=mut>{left_out} more left out to keep the page small</p>" if left_out else ""
    return f"<h2>Features</h2>{''.join(html)}{note}" if shown or left_out else ""


def _feature(feature: dict) -> str:
    top = _float(feature.get("max_activation")) or 0.0
    of = f"{feature['sae']} · " if feature.get("sae") else ""
    facts = [f"fires on {_float(feature.get('density')) or 0.0:.3%} of tokens", f"largest activation {top:.4g}"]
    logits = ", ".join(f"{_visible(token)!r} {value:+.2f}" for token, value in feature.get("top_logits") or ())
    shown = list(feature.get("contexts") or ())[:10]
    contexts = "".join(f"<div class=context>{_context(c, abs(top))}</div>" for c in shown)
    if logits:
        facts.append(f"raises the logits of {logits}")
    return (f"<div class=feature><h3>{escape(of)}feature {escape(str(feature.get('feature')))}</h3>"
            f"<p class=mut>{escape(' · '.join(facts))}</p>{contexts}</div>")


def _context(context: list[tuple[str, float]], top: float, around: int = 24) -> str:
    """A window around the largest activation of either sign, tokens shaded by theirs; silent ones are plain text."""
    values = [_float(value) or 0.0 for _, value in context]
    peak = max(range(len(values)), key=lambda i: abs(values[i]), default=0)
    window = range(max(0, peak - around), min(len(values), peak + around + 1))
    out = ["…"] if window and window[0] > 0 else []
    for i in window:
        text = escape(_visible(str(context[i][0])))
        if values[i] != 0:
            shade = 0.12 + 0.68 * min(abs(values[i]) / top, 1.0) if top > 0 else 0.12
            text = f'<span style="background:rgba(var(--act),{shade:.2f})" title="{values[i]:.3g}">{text}</span>'
        out.append(text)
    return "".join(out) + ("…" if window and window[-1] + 1 < len(values) else "")


def _visible(token: str) -> str:
    """Line breaks, tabs and other control characters as signs, so that a token stays one visible piece."""
    return "".join({"\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else "·") for c in token)
