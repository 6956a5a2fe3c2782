"""All runs of a folder as a page: what went wrong, the best so far, two charts, and a table of every run.

`page` is given what runs/index.overview returns. Without scripts the whole table and still charts are there;
assets/index.js makes the charts of what its menus and filters choose, and shows the table in leaves of a hundred rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from runs.page import charts, shell

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
# {verdict: (its sign, its colour in charts, its shape there)}
VERDICTS = {"better": ("▲", 2, "run"), "worse": ("▼", 7, "other"), "within_noise": ("≈", 0, "seed"),
            "equal_to_baseline": ("=", 6, "other"), "suspect": ("?", 5, "random"), "incomparable": ("≠", 4, "baseline"),
            "failed": ("✕", 7, "other"), "killed": ("✕", 7, "other"), "running": ("…", 0, "seed")}
COUNTS = ("better", "within_noise", "equal_to_baseline", "worse", "suspect", "incomparable")  # whose figures mean less
BEST = {"better", "worse", "within_noise", "equal_to_baseline"}  # as runs/ledger.py has it
FAILED = ("failed", "killed")
STEP, FRONT, RUNS, BASELINE = 1, 1, 0, 6
OF_LINES = {"baseline": (BASELINE,), "random": (3, 4)}
OPEN = 3  # kinds of failure that are not folded
ORDER = "runs, in the order of their end"
NAMED = 12  # runs of one kind
STILL_POINTS = 1500  # of a still picture: each takes 80 characters
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


def groups(rows: list[dict]) -> list[tuple[str | None, str | None]]:
    """(model, metric) of the runs that can be held against each other, most runs first."""
    count: dict[tuple, int] = {}
    for row in rows:
        if row["metric"] is not None and row["value"] is not None:
            key = row["model"], row["metric"]
            count[key] = count.get(key, 0) + 1
    return sorted(count, key=lambda key: -count[key])


def progress(seen: dict, group: tuple, what: str) -> dict:
    """The chart of a group's runs in their order; `what`: "difference" or "value"."""
    rows = [row for row in seen["rows"] if (row["model"], row["metric"]) == group]
    counted = [row[what] if row["verdict"] in BEST else None for row in rows]
    best = running_best(counted, seen["directions"].get(group[1], ""))
    series = []
    for verdict, (_, colour, role) in VERDICTS.items():
        points = [[x, row[what], _error(row, what)] for x, row in enumerate(rows, 1)
                  if row["verdict"] == verdict and row[what] is not None]
        series.append(dict(name=word(verdict), role=role, colour=colour, line=False, points=points))
    line = dict(name="best so far", role="seed", colour=STEP, line=True, points=steps(best, counted))
    label = "difference to the baseline" if what == "difference" else group[1]
    return _spec(f"{group[1]}, {group[0]}", ORDER, label, [line, *series])


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
    """The chart of a metric against L0: the SAEs of a place, their Pareto front, and what is stored."""
    one = seen["metrics"][metric]
    sound, doubtful = [], []
    errors = one.get("e") or [None] * len(one["v"])
    for number, value, error in zip(one.get("i") or range(len(one["v"])), one["v"], errors):
        sae = seen["saes"][number]
        if sae["place"] == place and (sae["l0"] or 0) > 0:
            known = seen["rows"][sae["run"]]["verdict"] not in ("suspect", *FAILED)
            (sound if known else doubtful).append([sae["l0"], value, error or 0])
    front = [[*sound[i][:2], 0] for i in pareto([(x, y) for x, y, _ in sound], one["way"])]
    series = [dict(name="best of the runs", role="seed", colour=FRONT, line=True, points=front)]
    series += _stored(seen["places"][place]["lines"], metric)
    series += [dict(name="runs", role="run", colour=RUNS, line=False, points=sound),
               dict(name="suspect or failed", role="random", colour=5, line=False, points=doubtful)]
    return _spec(seen["places"][place]["name"], "L0", metric, series, log=True)


def _stored(lines: list[dict], metric: str) -> list[dict]:
    found, numbers = [], {"baseline": 0, "random": 0}
    for line in lines:
        colours = OF_LINES[line["role"]]
        colour = colours[numbers[line["role"]] % len(colours)]
        numbers[line["role"]] += 1
        found.append(dict(name=line["name"], role=line["role"], colour=colour, line=True,
                          points=line["metrics"].get(metric, [])))
    return found


def _spec(title: str, x: str, y: str, series: list[dict], log: bool = False) -> dict:
    return {"title": title, "kind": "points", "x": {"label": x, "log": log}, "y": {"label": y, "log": False},
            "series": series}


def _still(spec: dict) -> str:
    """A still picture of a chart that is not too heavy, "" without a point."""
    spec = charts.finite(spec)
    count = sum(len(one["points"]) for one in spec["series"])
    if not count:
        return ""
    if count > STILL_POINTS:
        every = -(-count // STILL_POINTS)
        spec["series"] = [one if one["line"] else one | {"points": one["points"][::every]} for one in spec["series"]]
    if count > 300:
        spec["series"] = [one | {"points": [[x, y, 0] for x, y, *_ in one["points"]]} for one in spec["series"]]
    return f"<div>{charts.still(spec)}</div>"


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
    if row["href"]:
        return f'<a href="{escape(row["href"])}">{escape(row["run"])}</a>'
    return escape(row["run"])


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
    return (f"<h1>Runs</h1><p>{' · '.join(told)}</p>" + (f"<p class=mut>{' · '.join(notes)}</p>" if notes else ""))


def _best(seen: dict, top: list[tuple]) -> str:
    """The best run of every model and metric: the last of those that were better than all before."""
    last = {(row["model"], row["metric"]): row for row in seen["rows"] if row["best"]}
    lines = []
    for key in top:
        if key in last:
            row = last[key]
            error = f" ± {rough(row['stderr'])}" if row["stderr"] else ""
            against = f" ± {rough(row['difference_stderr'])}" if row["difference_stderr"] else ""
            lines.append([escape(str(key[0])), _link(row), escape(str(key[1])), figure(row["value"]) + error,
                          _difference(row["difference"]) + against, _verdict(row["verdict"]), figure(row["l0"]),
                          escape(row["variant"] or "")])
    if not lines:
        return "<p class=mut>No run yet whose difference to its baseline means something.</p>" if top else ""
    heads = [("model", 1), ("best run", 1), ("metric", 1), ("value", 0), ("difference to the baseline", 0),
             ("verdict", 1), ("L0", 0), ("variant", 1)]
    return "<h2>Best so far</h2>" + _scrolling("the best runs", _plain_table(heads, lines))


def _plain_table(heads: list[tuple[str, int]], lines: Iterable[list[str]]) -> str:
    def row(cells, tag):
        return "".join(f"<{tag}{' class=l' if left else ''}>{cell}" for cell, (_, left) in zip(cells, heads))

    body = "".join(f"<tr>{row(cells, 'td')}" for cells in lines)
    return f"<table><thead><tr>{row([name for name, _ in heads], 'th')}</thead><tbody>{body}</tbody></table>"


def _scrolling(label: str, table: str) -> str:
    return f'<div class=scroll tabindex=0 role=region aria-label="{label}">{table}</div>'


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
        why = row["why"] or "its folder is gone"
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
    stills = [_still(progress(seen, group, what)) for what in ("difference", "value") for group in top[:STILLS]]
    if not any(stills):
        return ""
    choices = "<label>of <select class=group></select></label><label>shown <select class=what></select></label>"
    return ("<h2>Progress</h2><p class=mut>The runs in the order of their end; bars are one standard error. "
            "The line is the best so far among those whose difference means something.</p>"
            f"<section class=seen id=progress aria-label=progress><p class=choices hidden>{choices}</p>"
            f"<div class='plots charts'>{''.join(filter(None, stills))}</div></section>")


def _frontier(seen: dict) -> str:
    if not seen["metrics"] or not any((sae["l0"] or 0) > 0 for sae in seen["saes"]):
        return ""
    stills = [_still(frontier(seen, 0, metric)) for metric in list(seen["metrics"])[:STILLS]]
    choices = "<label>metric <select class=metric></select></label><label>of <select class=place></select></label>"
    left_out = ""
    if seen["left_out"]:
        left_out = f" {_counted(seen['left_out'], 'metric')} of few runs left out, for the page's size."
    return ("<h2>Against L0</h2><p class=mut>Every SAE of every run; beside them what is stored with the project: the "
            f"baseline and random dictionaries.{left_out}</p>"
            f"<section class=seen id=frontier aria-label='against L0'><p class=choices hidden>{choices}</p>"
            f"<div class='plots charts'>{''.join(filter(None, stills))}</div></section>")


def _table(seen: dict) -> str:
    rows, metric = seen["rows"], seen["by"] if seen["by"] in seen["metrics"] else None
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
        body.append(f"<tr>{''.join(cells)}")
    filters = "".join(f"<label>{name} <select data-key={name}></select></label>"
                      for name in ("model", "variant", "verdict", "profile"))
    only = ""
    if len(values["metric"]) == 1:
        only = f"value, ± and difference to the baseline: {escape(next(iter(values['metric'])))}. "
    return (f"<h2>All runs</h2><p class=mut>{only}★ was better than all runs before it.</p>"
            "<p class=choices id=filters hidden><label>search <input type=search id=search></label>"
            f"{filters}<button type=button id=clear>show all</button></p>"
            "<div id=pair class=card hidden></div>"
            "<p class=choices id=leaf hidden><span id=count role=status></span>"
            "<button type=button id=back>previous</button><button type=button id=on>next</button></p>"
            + _scrolling("all runs", f"<table id=runs><thead><tr>{''.join(heads)}</thead>"
                                     f"<tbody>{''.join(body)}</tbody></table>"))


def _heading(key: str, text: str, left: bool, order: str) -> str:
    side, sort = " class=l" if left else "", f" aria-sort={order}" if order else ""
    return f"<th scope=col data-key={key}{side}{sort}>{escape(text)}"


def _sorted(seen: dict, name: str) -> str:
    """The order in which the table is first shown by a column, "" where by another."""
    if name != seen["by"]:
        return ""
    if name in LEFT and name != "time":
        return "ascending"
    ways = {seen["metrics"][name]["way"]} if name in seen["metrics"] else set(seen["directions"].values()) - {""}
    best_is_low = name not in KEYS or name in ("value", "difference")
    return "ascending" if best_is_low and ways == {"lower"} else "descending"


def _cell(name: str, row: dict) -> str:
    value = row[KEYS[name]]
    if name == "run":
        star = " <span class=star role=img aria-label='best so far'>★</span>" if row["best"] else ""
        return f"<td class='l name'>{_link(row)}{star}"
    if name == "verdict":
        return f"<td class=l>{_verdict(value)}"
    if name in ("note", "hyper"):
        return f"<td class='l {name}'>{escape(value or '')}"
    if name == "time":
        return f"<td class=l>{escape((value or '')[:16].replace('T', ' '))}"
    if name == "difference":
        return f"<td>{_difference(value)}"
    if name in LEFT:
        return f"<td class=l>{escape(value or '')}"
    if name == "seed":
        return f"<td>{'' if value is None else value}"
    return f"<td>{rough(value) if name in ROUGH else figure(value)}"


# ------------------------------------------------------------------------------------------------ for the scripts

SENT = ("run", "href", "model", "variant", "metric", "value", "stderr", "difference", "difference_stderr", "verdict",
        "l0", "hyper", "seed", "lines_changed", "minutes", "tokens_per_s", "peak_memory_gb", "peak_gpu_memory_gb",
        "note", "time", "profile", "group", "best", "folder")


def _data(seen: dict, top: list[tuple]) -> dict:
    """What index.js reads: rows by column, settings as the commonest values and what each run has otherwise."""
    rows = seen["rows"]
    common, own = compact([row["settings"] for row in rows])
    extra = []
    if seen["by"] in seen["metrics"]:
        values = of_runs(seen, seen["by"])
        extra = [values.get(i) for i in range(len(rows))]
    saes = {key: [sae[key] for sae in seen["saes"]] for key in ("run", "name", "place", "l0")}
    verdicts = {verdict: [word(verdict), *told] for verdict, told in VERDICTS.items()}
    return dict(folder=seen["folder"], rows={key: [row[key] for row in rows] for key in SENT} | dict(extra=extra),
                order=seen["order"], common=common, own=own, saes=saes, metrics=seen["metrics"],
                places=[place | dict(lines=_coloured(place["lines"])) for place in seen["places"]],
                directions={str(metric): way for metric, way in seen["directions"].items()}, groups=top,
                verdicts=verdicts, best=sorted(BEST), failed=["suspect", *FAILED],
                by=seen["by"] if seen["by"] in seen["metrics"] else None,
                colours=dict(step=STEP, front=FRONT, runs=RUNS))


def _coloured(lines: list[dict]) -> list[dict]:
    return [line | dict(colour=one["colour"]) for line, one in zip(lines, _stored(lines, ""))]


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
