"""Healthy or not at a glance: how often features fire, how many at once, how alike they are, which tokens fail."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median

from evals.common import stored
from runs.comparison import Compared
from runs.page import charts, glance, shell
from runs.page.curves import dead_shares
from runs.page.glance import Health
from runs.wording import listing, number

BINS = 50
POINTS = 1000  # tokens shown of one SAE, and of all SAEs of a page three times so many
FEWEST = 40  # tokens shown of each of many
OFTEN = 0.1  # a feature that fires on a larger share of tokens is said
ALIKE = 0.9  # and one whose decoder row has a larger cosine with another's
SILENT_SHARE, OFTEN_SHARE, ALIKE_SHARE = 0.1, 0.01, 0.01  # of all features from which on it is said
LOUD_TENTH = 1.5  # by which factor the error of the tenth of tokens with the largest norms exceeds the others'


# ------------------------------------------------------------------------------------------------ the part


def part(saes: list[Compared], out: Path, log_rows: list[dict]) -> str:
    """Charts of each SAE by a menu, what is off in words, and of several SAEs a table; "" where nothing is known."""
    found = {}
    for one in saes:
        known = of(out, one.run.section or one.run.name)
        if known is not None:
            found[known.name] = known
    theirs = {one.run.section or one.run.name: _baselines(one) for one in saes
              if (one.run.section or one.run.name) in found}
    most = max(FEWEST, min(POINTS, 3 * POINTS // max(len(found), 1)))
    panels = {name: specs(known, theirs.get(name), most) for name, known in found.items()}
    over_time = dead_shares(log_rows)
    if len(panels) == 1:
        next(iter(panels.values())).append(over_time)
        over_time = over_time | {"series": []}
    dead = charts.figure(over_time)
    if not found and not dead:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in in_words(found.values()))
    said = f"<ul class=off>{lines}</ul>" if lines else ""
    if found and not lines:
        said = "<p class=mut>nothing is off: features fire, rarely and apart, and no kind of token stands out</p>"
    table = _table(list(found.values())) if len(found) > 1 else ""
    shown = charts.panels("SAE", panels, "the table below, in figures")
    dead = f"<div class=charts>{dead}</div>" if dead else ""
    return f"<h2>Health</h2>{said}{shown}{dead}{table}"


def of(out: Path, sae: str) -> Health | None:
    """What the board of an SAE says, or what core's details do; None without either."""
    try:
        return glance.of(out, sae).health
    except (OSError, ValueError):
        return _of_core(out, sae)


def _of_core(out: Path, sae: str) -> Health | None:
    file = stored.path(out, "core", sae)
    if file is None:
        return None
    result = json.loads(file.read_bytes())
    details = result.get("eval_result_details") or []
    density = [one.get("feature_density") for one in details]
    if not density or not all(isinstance(share, (int, float)) for share in density):
        return None
    cosine = [one.get("max_decoder_cosine_sim") for one in details]
    known = all(isinstance(value, (int, float)) for value in cosine)
    tokens = _counted(result.get("eval_result_metrics") or {})
    return Health(sae, density, tokens, cosine if known else None, None, None, None)


def _counted(metrics: dict) -> int | None:
    """The tokens of which core counted what fires."""
    count = (metrics.get("token_stats") or {}).get("total_tokens_eval_sparsity_variance")
    return int(count) if isinstance(count, (int, float)) and count > 0 else None


def _baselines(one: Compared) -> Health | None:
    """The same of the SAE that a run is compared with, where its folder keeps it."""
    if one.nearest is None or one.obstacles:
        return None
    return of(one.nearest.path.parent, one.nearest.section or one.nearest.name)


# ------------------------------------------------------------------------------------------------ charts


def specs(known: Health, theirs: Health | None, most: int) -> list[dict]:
    """The charts of one SAE; `most` tokens of it are shown."""
    sides = {"this run": ("run", known)} | ({"baseline": ("baseline", theirs)} if theirs else {})
    found = [_densities(known, sides)]
    if known.l0:
        found.append({"title": "L0 per token", "kind": "bars",
                      "x": {"label": "active features", "log": False, "whole": True},
                      "y": {"label": "tokens", "log": False},
                      "series": [{"name": "this run", "role": "run", **_with_room(known.l0)}]})
    cosines = {name: (role, side.cosine) for name, (role, side) in sides.items() if side.cosine}
    if known.cosine:
        lowest = min(min(values) for _, values in cosines.values())
        found.append({"title": "Largest decoder cosine", "kind": "bars",
                      "x": {"label": "cosine of a feature with the one most like it", "log": False},
                      "y": {"label": "features", "log": False},
                      "series": histograms(cosines, min(math.floor(lowest * 10) / 10, 0.9), 1.0)})
    if known.norms and known.errors:
        step = max(1, math.ceil(len(known.norms) / most))
        points = [[x, y, 0] for x, y in zip(known.norms[::step], known.errors[::step])]
        found.append({"title": "Error by norm", "kind": "points", "x": {"label": "‖x‖ of a token", "log": True},
                      "y": {"label": "‖x − x̂‖", "log": True},
                      "series": [{"name": "this run", "role": "run", "line": False, "points": points}]})
    return found


def _densities(known: Health, sides: dict[str, tuple[str, Health]]) -> dict:
    """How many features fire how often, of the run and of its baseline."""
    logs = {name: (role, [math.log10(share) for share in side.density if share > 0])
            for name, (role, side) in sides.items()}
    counted = known.baseline
    if counted is not None and len(sides) == 1:  # by the board, on the same text
        edges = counted["edges"]
        series = histograms(logs, edges[0], edges[-1], len(edges) - 1)
        series.append(series[0] | {"name": "baseline", "role": "baseline", "counts": counted["counts"]})
        baseline = counted["silent"], counted["of"]
    else:
        lowest = min((value for _, values in logs.values() for value in values), default=-1.0)
        series = histograms(logs, min(math.floor(lowest), -1), 0.0)
        theirs = [side.density for _, side in list(sides.values())[1:]]
        baseline = (_silent(theirs[0]), len(theirs[0])) if theirs else None
    never = f"{_silent(known.density):,} of {len(known.density):,}"
    title = f"Density · {never} features never fired"
    if baseline is not None:
        title = f"Density · {never} never fired, baseline {baseline[0]:,} of {baseline[1]:,}"
    return {"title": title, "kind": "bars",
            "x": {"label": "log10 of the share of tokens on which a feature fires", "log": False},
            "y": {"label": "features", "log": False}, "series": series}


def _silent(density: Iterable[float]) -> int:
    return sum(share <= 0 for share in density)


def _with_room(l0: dict) -> dict:
    """Tokens by active features, with two empty bars beside what fills one alone."""
    edges, counts = l0["edges"], l0["counts"]
    if len(counts) > 1:
        return l0
    width = edges[1] - edges[0]
    before = min(2, int(edges[0] // width))  # none below 0
    return {"edges": [edges[0] + i * width for i in range(-before, 4)],
            "counts": [*(0 for _ in range(before)), *counts, 0, 0]}


def histograms(sides: dict[str, tuple[str, Sequence[float]]], low: float, high: float, bins: int = BINS) -> list[dict]:
    """A series for each {name: (role, values)} over the same bins of equal width; what lies outside is at the ends."""
    width = (high - low) / bins
    edges = [round(low + i * width, 6) for i in range(bins + 1)]
    series = []
    for name, (role, values) in sides.items():
        counts = [0 for _ in range(bins)]
        for value in values:
            counts[min(max(int((value - low) / width), 0), bins - 1)] += 1
        series.append({"name": name, "role": role, "edges": edges, "counts": counts})
    return series


# ------------------------------------------------------------------------------------------------ words


def in_words(found: Iterable[Health]) -> list[str]:
    """A line for each thing that is off, with the SAEs of which it holds."""
    found = list(found)
    about: dict[str, list[str]] = {}
    for one in found:
        for kind, figure in off(one).items():
            about.setdefault(kind, []).append(f"{one.name} {figure}" if len(found) > 1 else figure)
    return [f"{kind}: {listing(figures)}" for kind, figures in about.items()]


def off(one: Health) -> dict[str, str]:
    """{what is off: its figure}."""
    silent, often, alike = shares(one)
    said = {}
    if silent > SILENT_SHARE:
        on = f"{one.tokens:,} tokens" if one.tokens else "the tokens looked at"
        said[f"features that fired on none of {on}"] = f"{silent:.0%}"
    if often > OFTEN_SHARE:
        said[f"features that fire on more than {OFTEN:.0%} of tokens"] = f"{often:.1%}"
    if alike is not None and alike > ALIKE_SHARE:
        said[f"features whose decoder row has a cosine above {ALIKE:g} with another's"] = f"{alike:.1%}"
    loud = louder(one)
    if loud is not None and loud[0] >= LOUD_TENTH * loud[1]:
        said["share of the norm that is lost grows with it"] = (
            f"{loud[0]:.2f} of the tenth of tokens with the largest norms, {loud[1]:.2f} of the others")
    return said


def shares(one: Health) -> tuple[float, float, float | None]:
    """The shares of features that never fired, that fire often, and that have one much like them."""
    of_all = len(one.density)
    alike = sum(value > ALIKE for value in one.cosine) / len(one.cosine) if one.cosine else None
    return (sum(share <= 0 for share in one.density) / of_all, sum(share > OFTEN for share in one.density) / of_all,
            alike)


def louder(one: Health) -> tuple[float, float] | None:
    """The median of error / norm over the tenth of tokens with the largest norms, and over the others."""
    pairs = sorted((x, y) for x, y in zip(one.norms or (), one.errors or ()) if x > 0)
    cut = len(pairs) - len(pairs) // 10
    if cut in (0, len(pairs)):
        return None
    lost = [y / x for x, y in pairs]
    return median(lost[cut:]), median(lost[:cut])


def _table(found: list[Health]) -> str:
    """A row for each SAE."""
    heads = ("features", "never fired", "density, median", f"on > {OFTEN:.0%} of tokens", "decoder cosine, median",
             f"cosine > {ALIKE:g}")
    rows = []
    for one in found:
        silent, often, alike = shares(one)
        firing = [share for share in one.density if share > 0]
        cells = [f"{len(one.density):,}", f"{silent:.1%}", number(median(firing)) if firing else "–", f"{often:.1%}",
                 number(median(one.cosine)) if one.cosine else "–", "–" if alike is None else f"{alike:.1%}"]
        rows.append(f"<tr><td class=l>{escape(one.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    header = "".join(f"<th>{escape(head)}</th>" for head in heads)
    table = (f"<table class=sortable><thead><tr><th class=l>SAE</th>{header}</tr></thead><tbody>{''.join(rows)}</tbody>"
             "</table>")
    return f"<details><summary>all SAEs</summary>{shell.scrolling('health of each SAE', table)}</details>"
