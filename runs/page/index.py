"""All runs of a folder as a page: the best so far, what went wrong, two charts, and a table of every run.

`page` is given what runs/index.overview returns. Without scripts the whole table and still charts are there;
assets/index.js makes the charts of what its menus and filters choose, and shows the table in leaves of a hundred rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from runs.page import charts, shell
from runs.page.verdict import WORDS

MARK = '<meta name=generator content="sae_experiment runs.index">'  # by which an earlier page is known as ours
SCRIPTS = (*shell.CHARTS, "index.js")
# {a column's name in --by and in the heading: its key in a row}
KEYS = {"run": "run", "verdict": "verdict", "value": "value", "stderr": "stderr", "difference": "difference",
        "l0": "l0", "variant": "variant", "model": "model", "metric": "metric", "hyper": "hyper", "note": "note",
        "seed": "seed", "lines": "lines_changed", "minutes": "minutes", "tokens_per_s": "tokens_per_s",
        "memory": "peak_memory_gb", "time": "time"}
HEADINGS = {"stderr": "±", "l0": "L0", "lines": "lines changed", "tokens_per_s": "tokens/s", "memory": "memory, GB",
            "hyper": "hyper-parameters"}
LEFT = {"run", "verdict", "variant", "model", "metric", "hyper", "note", "time"}
ROUGH = {"stderr", "minutes", "memory"}
FULL = {"run", "verdict", "value", "difference", "l0", "variant", "note", "time"}  # shown even if empty
QUALITY = {"value", "difference"}  # of which one way is better
RANKED = QUALITY | {"stderr"}  # by these, and any metric, what does not count comes behind
# {verdict: (its sign, its colour in charts, its shape there)}
VERDICTS = {"better": (WORDS["better"][0], 2, "circle"), "worse": (WORDS["worse"][0], 7, "rect"),
            "within_noise": (WORDS["within_noise"][0], 0, "circle"),
            "equal_to_baseline": (WORDS["equal_to_baseline"][0], 6, "rect"),
            "suspect": (WORDS["suspect"][0], 5, "triangle"), "incomparable": (WORDS["incomparable"][0], 4, "rectRot"),
            "failed": (WORDS["failed"][0], 7, "rect"), "killed": (WORDS["failed"][0], 7, "rect"),
            "running": ("…", 0, "circle")}
MEANS = {"better": "the difference to the baseline, at the same L0, is beyond two standard errors, for the better",
         "worse": "the same, for the worse",
         "within_noise": "it is not beyond two standard errors: more seeds can tell",
         "equal_to_baseline": "the baseline once more",
         "suspect": "a warning holds (dead features, not sparse, not surely better than a random decoder, …): does not "
                    "count until its cause is found",
         "incomparable": "there is no baseline to hold it against, or another model, data, number of tokens, or L0",
         "failed": "no result", "killed": "ended without a word, often for lack of memory", "running": "under way"}
COUNTS = ("better", "within_noise", "equal_to_baseline", "worse", "suspect", "incomparable")
BEST = {"better", "worse", "within_noise", "equal_to_baseline"}  # as runs/ledger.py has it
FAILED = ("failed", "killed")
NO_RESULT = (*FAILED, "running")
# {kind of an SAE beside others: (its colour, its shape)}; failed runs have no figures to draw
KINDS = {"comparable": (0, "circle"), "suspect": (5, "triangle"), "not comparable": (4, "rectRot")}
SIGNS = {"circle": "●", "triangle": "▲", "rectRot": "◆"}
CAUSE = 160  # letters of a cause that a row shows
STEP, FRONT, RUNS, BASELINE = 1, 1, 0, 6
# {role of what is stored: (its colours, its shape)}
OF_LINES = {"baseline": ((BASELINE,), "rect"), "random": ((3, 4), "dash")}
JOINED = "SAEs of one run"
ALONE = "<label><input type=checkbox class=alone> only what counts</label>"
OPEN = 3  # kinds of failure that are not folded
ORDER = "runs, in the order of their end"
NAMED = 12  # runs of one kind
STILL_POINTS = 1500  # of a still picture: each takes 80 characters
MANY = 16  # points of a chart above which all are small
STILLS = 3  # frontiers without scripts

# ------------------------------------------------------------------------------------------------ what charts show


def running_best(values: list[float | None], way: str) -> list[int]:
    """The places of the values that are better than all before them; none where no way is better."""
    found: list[int] = []
    sign = 1 if way == "higher" else -1
    for i, value in enumerate(values):
        if value is None or not way:
            continue
        if not found or sign * value > sign * values[found[-1]]:
            found.append(i)
    return found


def pareto(points: list[tuple[float, float]], way: str) -> list[int]:
    """The places of the points (L0, value) that none beats in one without losing in the other, by L0; of equal ones the
    first. None where no way is better.
    """
    if not way:
        return []
    sign = -1 if way == "higher" else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i))
    best = running_best([points[i][1] for i in order], way)
    return [order[place] for place in best]


def of_runs(seen: dict, metric: str) -> dict[int, float]:
    """{row: its first SAE's value of the metric}."""
    one, found = seen["metrics"][metric], {}
    for sae, value in zip(one.get("i") or range(len(one["v"])), one["v"]):
        found.setdefault(seen["saes"][sae]["run"], value)
    return found


def kind(verdict: str | None) -> str:
    """What an SAE or run is beside others: a key of KINDS, or "failed" where it has no result."""
    if verdict in BEST:
        return "comparable"
    if verdict in NO_RESULT:
        return "failed"
    return "suspect" if verdict == "suspect" else "not comparable"


def ranked(by: str) -> bool:
    """Whether an order by a column or metric tells good from bad, so that what does not count comes behind."""
    return by in RANKED or by not in KEYS


def groups(rows: list[dict]) -> list[dict]:
    """Runs that can be held against each other, those of the most comparable runs first: {"where": model, layer and
    hook, "metric", "runs": how many, "comparable": how many of them}.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["metric"] is not None and row["value"] is not None:
            key = row["where"], row["metric"]
            one = found.setdefault(key, dict(where=key[0], metric=key[1], runs=0, comparable=0))
            one["runs"] += 1
            one["comparable"] += kind(row["verdict"]) == "comparable" and row["difference"] is not None
    return sorted(found.values(), key=lambda one: (-one["comparable"], -one["runs"]))


def _is_of(row: dict, group: dict) -> bool:
    return row["where"] == group["where"] and row["metric"] == group["metric"]


def progress(seen: dict, group: dict, what: str) -> dict:
    """The chart of a group's runs in their order; `what`: "difference" or "value"."""
    rows = [row for row in seen["rows"] if _is_of(row, group)]
    counted = [row[what] if row["verdict"] in BEST else None for row in rows]
    best = running_best(counted, seen["directions"].get(group["metric"], ""))
    series = []
    for verdict, (_, colour, mark) in VERDICTS.items():
        points = [[x, row[what], _error(row, what)] for x, row in enumerate(rows, 1)
                  if row["verdict"] == verdict and row[what] is not None]
        series.append(dict(name=word(verdict), role="run", mark=mark, colour=colour, line=False, points=points))
    line = dict(name="best so far", role="seed", colour=STEP, line=True, points=steps(best, counted))
    label = "difference to the baseline" if what == "difference" else group["metric"]
    return _spec(f"{group['metric']}, {group['where']}", ORDER, label, [line, *series])


def steps(best: list[int], values: list[float | None]) -> list[list]:
    """A line that is level until the next best, and to the last run."""
    points: list[list] = []
    for i in best:
        if points:
            points.append([i + 1, points[-1][1], 0])
        points.append([i + 1, values[i], 0])
    if points and points[-1][0] < len(values):
        points.append([len(values), points[-1][1], 0])
    return points


def _error(row: dict, what: str) -> float:
    return row["difference_stderr" if what == "difference" else "stderr"] or 0


def frontier(seen: dict, place: int, metric: str) -> dict:
    """The chart of a metric against L0: the SAEs of a place by their kind, those of one run joined, their Pareto front,
    and what is stored. The front is that of the comparable ones; where there are none, of those without a comparison.
    """
    one = seen["metrics"][metric]
    points: dict[str, list[list]] = {name: [] for name in KINDS}
    joined: dict[int, list[list]] = {}
    errors = one.get("e") or [None] * len(one["v"])
    for number, value, error in zip(one.get("i") or range(len(one["v"])), one["v"], errors):
        sae = seen["saes"][number]
        row = seen["rows"][sae["run"]]
        if sae["place"] == place and (sae["l0"] or 0) > 0 and row["verdict"] not in NO_RESULT:
            points[kind((sae["said"] or row)["verdict"])].append([sae["l0"], value, error or 0])
            if row["saes"] > 1:
                joined.setdefault(sae["run"], []).append([sae["l0"], value, 0])
    name, over = "best of the comparable", points["comparable"]
    if not over:
        name, over = "best of the runs, none comparable", points["not comparable"]
    front = [[*over[i][:2], 0] for i in pareto([(x, y) for x, y, _ in over], one["way"])]
    series = [dict(name=name, role="seed", colour=FRONT, line=True, points=front)]
    series += _stored(seen["places"][place]["lines"], metric)
    sweeps = [sorted(points_of) for points_of in joined.values() if len(points_of) > 1]
    parts = [part for part, points_of in enumerate(sweeps) for _ in points_of]
    if sweeps:
        series.append(dict(name=JOINED, role="seed", colour=RUNS, line=True, parts=parts, points=sum(sweeps, [])))
    series += [dict(name=name, role="run", mark=KINDS[name][1], colour=KINDS[name][0], line=False, points=points[name])
               for name in KINDS]
    return _spec(seen["places"][place]["name"], "L0", metric, series, log=True)


def _stored(lines: list[dict], metric: str) -> list[dict]:
    found, numbers = [], {"baseline": 0, "random": 0}
    for line in lines:
        colours, mark = OF_LINES[line["role"]]
        colour = colours[numbers[line["role"]] % len(colours)]
        numbers[line["role"]] += 1
        found.append(dict(name=line["name"], role=line["role"], mark=mark, colour=colour, line=True,
                          points=line["metrics"].get(metric, [])))
    return found


def _spec(title: str, x: str, y: str, series: list[dict], log: bool = False) -> dict:
    many = sum(len(one["points"]) for one in series if not one["line"]) > MANY
    series = [one if one["line"] else one | {"role": "seed" if many else "run"} for one in series]
    return {"title": title, "kind": "points", "x": {"label": x, "log": log, "whole": not log},
            "y": {"label": y, "log": False}, "series": series}


def _still(spec: dict) -> str:
    """A still picture of a chart that is not too heavy, "" without a point."""
    spec = charts.finite(spec)
    count = sum(len(one["points"]) for one in spec["series"])
    if not count:
        return ""
    if count > STILL_POINTS:
        every = -(-count // STILL_POINTS)
        spec["series"] = [one if one["line"] and "parts" not in one else _thinned(one, every) for one in spec["series"]]
    if count > 300:
        spec["series"] = [one | {"points": [[x, y, 0] for x, y, *_ in one["points"]]} for one in spec["series"]]
    return f"<div>{charts.still(spec)}</div>"


def _thinned(series: dict, every: int) -> dict:
    if "parts" in series:  # without some of its points a line is another
        return series | {"points": [], "parts": []}
    return series | {"points": series["points"][::every]}


# ------------------------------------------------------------------------------------------------ words


def word(verdict: str | None) -> str:
    """A verdict in words."""
    return (verdict or "unknown").replace("_", " ")


def _signed(verdict: str | None) -> str:
    sign = VERDICTS.get(verdict or "", ("", 0, ""))[0]
    return f"{sign} {word(verdict)}".strip()


def figure(value) -> str:
    """A number in at most four digits, as tables have it; "" for what is not known."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return f"{value:,.{max(0, 4 - whole)}f}" if abs(value) >= 1e-3 else f"{value:.6f}"


def rough(value) -> str:
    """A number to two digits, as errors and costs are written."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _difference(value) -> str:
    if value is None:
        return ""
    return f"+{figure(value)}" if value > 0 else figure(value)


def _link(row: dict) -> str:
    """A run's name, which leads to the file that says most of it."""
    if row["files"]:
        return f'<a href="{escape(row["at"])}/{row["files"][0]}">{escape(row["run"])}</a>'
    return escape(row["run"])


def _l0(row: dict) -> str:
    """A run's L0, of several SAEs from where to where."""
    if row["l0_high"] is None:
        return figure(row["l0"])
    return f"{_short(row['l0'])}–{_short(row['l0_high'])}, {row['saes']} SAEs"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


# ------------------------------------------------------------------------------------------------ the page


def page(seen: dict) -> str:
    """The page on what `runs.index.overview` found."""
    top = groups(seen["rows"])
    parts = [_head(seen), _best(seen, top), _failed(seen["rows"]), _under_way(seen["rows"]), _progress(seen, top),
             _frontier(seen), _table(seen), shell.data(_data(seen, top), id="runs-data")]
    name = seen["folder"].rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    html = shell.page(f"Runs of {name}" if name not in ("", ".", "..") else "Runs", parts, SCRIPTS, ["index.css"])
    return html.replace("<meta charset=utf-8>", f"<meta charset=utf-8>{MARK}", 1)


def _head(seen: dict) -> str:
    rows = seen["rows"]
    told = [f"<strong>{_counted(len(rows), 'run')}</strong>"]
    models = {row["model"] for row in rows} - {None}
    if len(models) > 1:
        told[0] += f" of {len(models)} models"
    words = [row["verdict"] for row in rows]
    for verdict in dict.fromkeys((*COUNTS, *FAILED, "running", *words)):
        if verdict in words:
            name = "under way" if verdict == "running" else word(verdict)
            tone = f" class={verdict}" if verdict in ("better", "worse") else ""
            told.append(f"<span{tone}>{words.count(verdict):,} {escape(name)}</span>")
    notes = []
    if seen["continued"]:
        notes.append(f"left out: {_counted(seen['continued'], 'line')} of runs that failed and went on later")
    times = sorted(row["time"] for row in rows if row["time"])
    if times:
        notes.insert(0, escape(" to ".join(dict.fromkeys((times[0][:10], times[-1][:10])))))
    return (f"<h1>Runs</h1><p>{' · '.join(told)}</p>" + (f"<p class=mut>{' · '.join(notes)}</p>" if notes else "")
            + _judged_by(seen))


def _judged_by(seen: dict) -> str:
    """What --by says of the verdicts on the page."""
    if seen["judged_by"]:
        return (f"<p class=card>Judged by <strong>{escape(seen['by'])}</strong>, not by each run's headline metric: "
                "verdicts, differences and the best are those in it, by the rules of a run's report.</p>")
    if seen["by"] in seen["metrics"]:
        return (f"<p class=card>Sorted by <strong>{escape(seen['by'])}</strong>, which has no verdict: no eval says "
                "which way it is better. Verdicts and differences are those in each run's headline metric.</p>")
    return ""


def _best(seen: dict, top: list[dict]) -> str:
    """The best run of every model, layer, hook and metric: the last of those that were better than all before."""
    last = {(row["where"], row["metric"]): (i, row) for i, row in enumerate(seen["rows"]) if row["best"]}
    lines = []
    for group in top:
        if (group["where"], group["metric"]) in last:
            i, row = last[group["where"], group["metric"]]
            against = f" ± {rough(row['difference_stderr'])}" if row["difference_stderr"] else ""
            lines.append([_link(row), _difference(row["difference"]) + against, _verdict(row["verdict"]), _l0(row),
                          _changed(row), _repeats(seen["rows"], i), _value(row), escape(str(group["metric"])),
                          escape(str(group["where"]))])
    if not lines:
        return "<p class=mut>No run yet whose difference to its baseline means something.</p>" if top else ""
    heads = [("best run", 1), ("difference", 0), ("verdict", 1), ("L0", 0), ("what it is", 1),
             ("its seeds", 1), ("value", 0), ("metric", 1), ("of", 1)]
    return ("<h2>Best so far</h2><p class=mut>The largest difference to the baseline that counts.</p>"
            + shell.scrolling("the best runs", _plain_table(heads, lines, "best")))


def _value(row: dict) -> str:
    """A run's value and its error; of several SAEs their mean, which is said."""
    error = f" ± {rough(row['stderr'])}" if row["stderr"] else ""
    mean = "mean " if row["saes"] > 1 and row["value"] is not None else ""
    return mean + figure(row["value"]) + error


def _changed(row: dict) -> str:
    """What a run is, in a few words: its variant, what was set, how many lines are new, what its note says."""
    changed = row["lines_changed"]
    parts = [row["variant"], row["hyper"], f"{_counted(changed, 'line')} changed" if changed else "", row["note"]]
    return escape(" · ".join(filter(None, parts)))


def _repeats(rows: list[dict], i: int) -> str:
    """How the other seeds of a run's setting ended: "3: 2 better, 1 within noise"."""
    if rows[i]["seeds"] < 2:
        return "<span class=mut>one</span>"
    words = [word(row["verdict"]) for row in rows
             if row["group"] == rows[i]["group"] and row["verdict"] not in NO_RESULT]
    counts = ", ".join(f"{words.count(one)} {escape(one)}" for one in dict.fromkeys(words))
    return f"{rows[i]['seeds']}: {counts}"


def _plain_table(heads: list[tuple[str, int]], lines: Iterable[list[str]], name: str) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}{' class=l' if left else ''}>{cell}" for cell, (_, left) in zip(cells, heads))

    body = "".join(f"<tr>{row(cells, 'td')}" for cells in lines)
    head = row([text for text, _ in heads], "th")
    return f"<table class={name}><thead><tr>{head}</thead><tbody>{body}</tbody></table>"


def _verdict(verdict: str | None) -> str:
    tone = f" class={verdict}" if verdict in ("better", "worse") else ""
    return f"<span{tone}>{escape(_signed(verdict))}</span>"


def _failed(rows: list[dict]) -> str:
    """Runs without a result by what they failed of, the latest first."""
    kinds: dict[tuple, list[dict]] = {}
    for row in reversed(rows):
        if row["verdict"] in FAILED:
            why, advice = _cause(row)
            kinds.setdefault((why, row["phase"], advice), []).append(row)
    if not kinds:
        return ""
    html = []
    for (why, phase, advice), members in kinds.items():
        names = ", ".join(_link(row) for row in members[:NAMED])
        more = f" and {len(members) - NAMED:,} more" if len(members) > NAMED else ""
        where = f"<span class=mut>in {escape(phase)}: </span>" if phase else ""
        to_do = f" · to do: {escape(advice)}" if advice else ""
        html.append(f"<li>{where}{escape(why)}<br><span class=mut>{names}{more}{to_do}</span>")
    folded = html[OPEN:]
    rest = ""
    if folded:
        rest = (f"<details><summary>{_counted(len(folded), 'more cause')}</summary>"
                f"<ul class=why>{''.join(folded)}</ul></details>")
    count = sum(map(len, kinds.values()))
    return f"<h2>Failed: {count:,}</h2><ul class=why>{''.join(html[:OPEN])}</ul>{rest}"


def _cause(row: dict) -> tuple[str, str]:
    """(why a run has no result, what to do)."""
    why, advice = row["why"] or "no cause is known", row["advice"] or ""
    if row["verdict"] == "killed":
        return "killed without a word, often for lack of memory", advice or "the same command continues"
    if row["folder"] is None:
        why = row["why"] or "no cause is kept: its folder is gone"
    return why, advice


def _under_way(rows: list[dict]) -> str:
    items = []
    for row in rows:
        if row["verdict"] == "running":
            now = row["progress"] or {}
            facts = [f"in {row['phase']}" if row["phase"] else ""]
            if now.get("share") is not None:
                facts.append(f"{now['share']:.0%} of it done")
            if now.get("eta_seconds") is not None:
                facts.append(f"{now['eta_seconds'] / 60:.0f} min left of it")
            items.append(f"<li>{_link(row)} <span class=mut>{escape(', '.join(filter(None, facts)))}</span>")
    if not items:
        return ""
    return f"<h2>Under way, when this page was written</h2><ul class=why>{''.join(items)}</ul>"


def _progress(seen: dict, top: list[tuple]) -> str:
    stills = [_still(progress(seen, group, what)) for group in top[:STILLS] for what in ("difference", "value")]
    if not any(stills):
        return ""
    choices = ("<label>of <select class=group></select></label><label>shown <select class=what></select></label>"
               f"{ALONE}")
    return ("<h2>Progress</h2><p class=mut>The runs in the order of their end; bars are one standard error. "
            "The line is the best so far of those that can be compared, within noise or beyond it.</p>"
            f"<section class=seen id=progress aria-label=progress><p class=choices hidden>{choices}</p>"
            f"<div class='plots charts'>{''.join(filter(None, stills))}</div></section>")


def _frontier(seen: dict) -> str:
    if not seen["metrics"] or not any((sae["l0"] or 0) > 0 for sae in seen["saes"]):
        return ""
    stills = [_still(frontier(seen, 0, metric)) for metric in list(seen["metrics"])[:STILLS]]
    choices = ("<label>metric <select class=metric></select></label><label>of <select class=place></select></label>"
               f"{ALONE}")
    left_out = ""
    if seen["left_out"]:
        left_out = f" {_counted(seen['left_out'], 'metric')} of few runs left out, for the page's size."
    signs = " · ".join(f"{SIGNS[mark]} {name}" for name, (_, mark) in KINDS.items())
    missing = [row["verdict"] for row in seen["rows"] if row["verdict"] in FAILED]
    failed = f" Failed runs, {len(missing):,}, have no point." if missing else ""
    return ("<h2>Against L0</h2><p class=mut>Every SAE of every run by its verdict, those of one run joined by a thin "
            f"line; beside them what is stored with the project: the baseline and random dictionaries.{failed}"
            f"{left_out}</p><noscript><p class=mut>{signs}</p></noscript>"
            f"<section class=seen id=frontier aria-label='against L0'><p class=choices hidden>{choices}</p>"
            f"<div class='plots charts'>{''.join(filter(None, stills))}</div></section>")


def _table(seen: dict) -> str:
    rows, metric = seen["rows"], None
    if seen["by"] in seen["metrics"] and not seen["judged_by"]:
        metric = seen["by"]
    values = {name: {row[key] for row in rows} - {None} for name, key in KEYS.items()}
    names = [name for name, each in values.items()
             if name in FULL or len(each) > 1 or (each and name not in ("model", "metric"))]
    extra = of_runs(seen, metric) if metric else {}
    heads = [_heading(KEYS[name], HEADINGS.get(name, name), name in LEFT, _sorted(seen, name)) for name in names]
    if metric:
        heads.insert(2, _heading("extra", metric, False, _sorted(seen, metric)))
    body = []
    for i in seen["order"]:
        cells = [_cell(name, rows[i]) for name in names]
        if metric:
            cells.insert(2, f"<td>{figure(extra.get(i))}")
        apart = "" if rows[i]["verdict"] in BEST else " class=apart"
        body.append(f"<tr{apart}>{''.join(cells)}")
    filters = "".join(f"<label>{name} <select data-key={name}></select></label>"
                      for name in ("model", "variant", "verdict", "profile"))
    only = ""
    if len(values["metric"]) == 1:
        only = f"value, ± and difference to the baseline: {escape(next(iter(values['metric'])))}. "
    seeds = ""
    if any(row["seeds"] > 1 for row in rows):
        seeds = "“1 (one of 3)”: seed 1, of a setting that has results of three. "
    by_rank = " class=ranked" if ranked(seen["by"]) else ""
    return (f"<h2>All runs</h2><p class=mut>{only}★ was better than all runs before it. {seeds}"
            "Gray: does not count, and comes behind what does where quality is sorted.</p>"
            f"{_meanings({row['verdict'] for row in rows})}"
            "<p class=choices id=filters hidden><label>search <input type=search id=search></label>"
            f"{filters}<button type=button id=clear>show all</button></p>"
            "<div id=pair class=card hidden></div>"
            "<p class=choices id=leaf hidden><span id=count role=status></span>"
            "<button type=button id=back>previous</button><button type=button id=on>next</button></p>"
            + shell.scrolling("all runs", f"<table id=runs{by_rank}><thead><tr>{''.join(heads)}</thead>"
                                          f"<tbody>{''.join(body)}</tbody></table>"))


def _meanings(verdicts: set[str | None]) -> str:
    """What the signs of the verdicts that occur mean."""
    told = "".join(f"<dt>{_verdict(verdict)}<dd>{MEANS[verdict]}" for verdict in MEANS if verdict in verdicts)
    return f"<details><summary>what the verdicts mean</summary><dl class=means>{told}</dl></details>" if told else ""


def _heading(key: str, text: str, left: bool, order: str) -> str:
    side, sort = " class=l" if left else "", f" aria-sort={order}" if order else ""
    return f"<th scope=col data-key={key}{side}{sort}>{escape(text)}"


def _sorted(seen: dict, name: str) -> str:
    """The order in which the table is first shown by a column, "" where by another."""
    by = "value" if seen["judged_by"] else seen["by"]
    if name != by:
        return ""
    if name in LEFT and name != "time":
        return "ascending"
    ways = {seen["metrics"][name]["way"]} if name in seen["metrics"] else set(seen["directions"].values()) - {""}
    best_is_low = name not in KEYS or name in QUALITY
    return "ascending" if best_is_low and ways == {"lower"} else "descending"


def _cell(name: str, row: dict) -> str:
    value = row[KEYS[name]]
    if name == "run":
        star = " <span class=star role=img aria-label='best so far'>★</span>" if row["best"] else ""
        return f"<td class='l name'>{_link(row)}{star}"
    if name == "verdict":
        return f"<td class='l why'>{_verdict(value)}{_first_of_cause(row)}"
    if name == "note":
        return f"<td class='l note' title=\"{escape(value or '')}\">{escape(value or '')}"
    if name == "hyper":
        return f"<td class='l {name}'>{escape(value or '')}"
    if name == "time":
        return f"<td class=l>{escape((value or '')[:16].replace('T', ' '))}"
    if name == "value" and row["saes"] > 1 and value is not None:
        return f"<td><span class=mut>mean</span> {figure(value)}"
    if name == "difference":
        return f"<td>{_difference(value)}"
    if name == "l0":
        return f"<td>{_l0(row)}"
    if name in LEFT:
        return f"<td class=l>{escape(value or '')}"
    if name == "seed":
        of = f" <span class=mut>(one of {row['seeds']})</span>" if row["seeds"] > 1 and value is not None else ""
        return f"<td>{'' if value is None else value}{of}"
    return f"<td>{rough(value) if name in ROUGH else figure(value)}"


def _first_of_cause(row: dict) -> str:
    """Why a run does not count, as far as a row has room."""
    if row["verdict"] in BEST or row["verdict"] == "running":
        return ""
    if row["verdict"] == "killed":
        return f" <span class=mut>in {escape(row['phase'])}</span>" if row["phase"] else ""
    why = _cause(row)[0] if row["verdict"] == "failed" else row["why"] or ""
    first = why if len(why) <= CAUSE else why[:CAUSE - 1] + "…"
    return f"<span class=mut>: {escape(first)}</span>" if first else ""


# ------------------------------------------------------------------------------------------------ for the scripts

SENT = ("run", "at", "shell", "model", "variant", "metric", "value", "stderr", "difference", "difference_stderr",
        "verdict", "why", "phase", "advice", "l0", "l0_high", "saes", "hyper", "seed", "seeds", "lines_changed",
        "minutes", "tokens_per_s", "peak_memory_gb", "peak_gpu_memory_gb", "note", "time", "profile", "group", "best")


def _data(seen: dict, top: list[dict]) -> dict:
    """What index.js reads: rows by column, a column of equal values as that value; settings as the commonest values and
    what each run has otherwise; groups and the files of runs as numbers.
    """
    rows = seen["rows"]
    common, own = compact([row["settings"] for row in rows])
    extra = []
    if seen["by"] in seen["metrics"] and not seen["judged_by"]:
        values = of_runs(seen, seen["by"])
        extra = [values.get(i) for i in range(len(rows))]
    numbers = {(group["where"], group["metric"]): n for n, group in enumerate(top)}
    files = list(dict.fromkeys(file for row in rows for file in row["files"]))
    columns = {key: [row[key] for row in rows] for key in SENT}
    columns |= dict(extra=extra, of=[numbers.get((row["where"], row["metric"])) for row in rows],
                    files=[[files.index(file) for file in row["files"]] for row in rows])
    saes = {key: [sae[key] for sae in seen["saes"]] for key in ("run", "name", "place", "l0")}
    saes["said"] = {i: sae["said"] for i, sae in enumerate(seen["saes"]) if sae["said"]}
    verdicts = {verdict: [word(verdict), *told] for verdict, told in VERDICTS.items()}
    return dict(rows={key: _once(values) for key, values in columns.items()}, count=len(rows), files=files,
                order=seen["order"], common=common, own=_once(own), saes=saes, metrics=seen["metrics"],
                places=[place | dict(lines=_coloured(place["lines"])) for place in seen["places"]],
                directions={str(metric): way for metric, way in seen["directions"].items()}, groups=top,
                verdicts=verdicts, best=sorted(BEST), failed=NO_RESULT, kinds=KINDS, joined=JOINED, many=MANY,
                ranked=[KEYS.get(name, name) for name in sorted(RANKED)] + ["extra"],
                by=seen["by"] if seen["by"] in seen["metrics"] else None, judged=bool(seen["judged_by"]),
                colours=dict(step=STEP, front=FRONT, runs=RUNS))


def _once(values: list) -> list | dict:
    """A column, or {"all": the value} where it has but one."""
    if values and all(value == values[0] for value in values):
        return {"all": values[0]}
    return values


def _coloured(lines: list[dict]) -> list[dict]:
    return [line | dict(colour=one["colour"], mark=one["mark"]) for line, one in zip(lines, _stored(lines, ""))]


def compact(each: list[dict | None]) -> tuple[dict[str, str], list[dict | None]]:
    """(the commonest value of every setting, of each run what it has otherwise: null for what it lacks); a run without
    settings has None.
    """
    counts: dict[str, dict[str, int]] = {}
    for settings in each:
        for key, value in (settings or {}).items():
            of_key = counts.setdefault(key, {})
            of_key[value] = of_key.get(value, 0) + 1
    common = {key: max(values, key=values.get) for key, values in counts.items()}
    own = []
    for settings in each:
        if settings is None:
            own.append(None)
            continue
        other = {key: value for key, value in settings.items() if common[key] != value}
        own.append(other | {key: None for key in common if key not in settings})
    return common, own
