"""Comparisons (runs/comparison.py) laid out as tables, and tables as text and markdown. Nothing is judged here."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runs import frontier, stability
from runs.comparison import NOT_COMPARED, UNKNOWN, Compared, Comparison, Judged, differing
from runs.frontier import Interpolated, l0_of
from runs.reading import LM_ONLY, Run, canonical, file_label
from runs.wording import beyond, listing, number, random_line, short, signed, words

PROJECT = Path(__file__).resolve().parent.parent
HEADLINE = ("ce_loss_score", "kl_div_score", "f1", "mcc", "r2", "uniqueness", "explained_variance", "l0", "frac_alive",
            "r2_median", "sae_top_1_test_auc", "sae_top_1_test_accuracy",
            "sae_top_2_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy", "sae_top_1_minus_llm_top_1",
            "mean_absorption_fraction_score", "mean_absorption_score", "scr_metric_threshold_10",
            "tpp_threshold_10_total_metric", "autointerp_score", "unlearning_score", "text_unlearning_precision",
            "disentanglement_score")
HEADLINE_LINES = 11
BY_RUN = (*frontier.L0, "core.ce_loss_score", "core.r2", "ground_truth.f1", "ground_truth.mcc", "ground_truth.r2",
          "ground_truth.uniqueness", "sparse_probing.sae_top_1", *frontier.ALIVE, "core.explained_variance")
WIDTH = 100  # columns of printed text
RANDOM = "random: a frozen random decoder, – where it was not measured"
MARKS = "* by more than 2 standard errors, ? standard error unknown"
# of the table by L0: metrics and rows at most, characters of an SAE's name
BY_L0_METRICS, BY_L0_ROWS, BY_L0_NAME = 6, 36, 30


class Cell(NamedTuple):
    """What stands in one place of a table."""

    text: str
    judged: Judged = UNKNOWN  # what a cell with a verdict states: HTML colours it


@dataclass
class Table:
    """Lines that stand above, a header, rows of cells (the first `left` columns aligned left), lines below."""

    above: list[str]
    header: list[str]
    rows: list[list[Cell]]
    below: list[str]
    left: int = 1


def laid_out(comparisons: Iterable[Comparison], everything: bool = False) -> list[Table]:
    """One table per model, layer and hook: by metric for up to three runs, else one row per run; a sweep by L0.

    Several runs of which one is judged at its own L0 have a row each per metric. `everything`: every metric, where the
    table has room for it.
    """
    built = []
    for comparison in comparisons:
        saes = comparison.saes
        around = any(one.at_l0 for one in saes)
        if around and 1 < len(saes) <= BY_L0_ROWS // 2:
            built.append(_by_l0(comparison, everything))
        elif _is_sweep(comparison) or len(saes) > 3:
            built.append(_by_run(comparison))
        else:
            built.append(_by_metric(comparison, everything))
    return built


def warned(comparisons: list[Comparison]) -> list[str]:
    """The warnings about all runs, with the run's name where there are several."""
    alone = sum(len(c.saes) + len(c.stand_ins) for c in comparisons) == 1
    return [line for c in comparisons for line in (_noted_alone(c.saes[0]) if alone else _noted(c.saes))]


# ------------------------------------------------------------------------------------------------ a row per metric


def _by_metric(comparison: Comparison, everything: bool) -> Table:
    saes, several = comparison.saes, len(comparison.saes) > 1
    distinct = list({id(one.partner): one.partner for one in saes if one.partner}.values())
    above = _stand_in(comparison) + [f"baseline: {_described(partner)}" for partner in distinct]
    for one in saes:
        above += _about_one(one, f"{one.run.name}: " if several else "", comparison.frontier)
    noted = _noted(saes) if several else _noted_alone(saes[0])
    above += [f"warning: {line}" for line in noted]

    header = ["metric", *(["baseline"] if len(distinct) == 1 else [partner.name for partner in distinct])]
    for one in saes:
        header.append(one.run.name)
        if _is_judged(one):
            header += ["difference", "verdict"] if several else ["difference", "verdict", "> 2 SE"]
    floor = None if several else saes[0].floor
    if floor:
        header.append("random")
    names = _ordered({m for run in (*(one.run for one in saes), *distinct) for m, v in run.means.items()
                      if v is not None})
    shown = names
    if not everything:
        shown = _headlines([m for m in names if any(one.run.means.get(m) is not None for one in saes)])
    rows = []
    for metric in shown:
        row = plain([_brief(metric) if several else metric, *(_theirs(partner, metric) for partner in distinct)])
        for one in saes:
            row.append(Cell(number(one.run.means.get(metric))))
            if _is_judged(one):
                judged = one.judged(metric)
                row.append(Cell(_difference(one, judged, metric)))
                row += [_marked(one, judged)] if several else [_verdict(one, judged), Cell(beyond(judged))]
        if floor:
            row.append(Cell(_theirs(floor.run, metric)))
        rows.append(row)
    below = [MARKS] if several and any(map(_is_judged, saes)) else []
    below += [RANDOM] if floor else []
    if len(names) > len(shown):
        below.append(f"{len(names) - len(shown)} more metrics with --all")
    return Table(above, header, rows, below)


def _is_judged(one: Compared) -> bool:
    return one.partner is not None and not one.obstacles


def _about_one(one: Compared, of: str, saes: list[Run]) -> list[str]:
    """Lines above: why a run or an eval of it is not compared, another L0, other settings."""
    lines = []
    if one.obstacles:
        lines.append(f"not compared: {of}{'; '.join(one.obstacles)}")
    elif one.partner:
        lines += [of + line for line in _other_l0(one, saes)]
    lines += [f"not compared: {of}{eval_name} ({_settings(different)})"
              for eval_name, different in sorted(one.other_settings.items())]
    if one.differs:
        lines.append(f"differs: {of}{_settings(one.differs)}")
    new = one.new()
    if new is not None:
        lines.append(of + stability.in_words(new))
    return lines


def _other_l0(one: Compared, saes: list[Run]) -> list[str]:
    """A line where a run and what it is compared with have not the same L0."""
    ours, theirs = l0_of(one.run), l0_of(one.partner)
    if ours and theirs is None:
        return ["not at equal L0: the baseline's is not known"]
    if one.equal_l0 or not ours or not theirs:
        return []
    outside = f", outside the baseline's {_range(saes)}" if saes else ""
    factor = max(ours / theirs, theirs / ours)
    return [f"not at equal L0: {number(ours)} / {number(theirs)}, a factor of {factor:.3g}{outside}"]


def _headlines(ordered: list[str]) -> list[str]:
    """The first metrics, and after them the headline of each eval that they leave out."""
    shown = ordered[:HEADLINE_LINES]
    for metric in ordered[HEADLINE_LINES:]:
        name, _, leaf = metric.partition(".")
        if leaf in HEADLINE and all(name != m.partition(".")[0] for m in shown):
            shown.append(metric)
    return shown


def _described(partner: Run) -> str:
    """What a run is compared with: the SAE, or the two that its L0 lies between."""
    place = f"{partner.name} ({_source(partner)})"
    if not isinstance(partner, Interpolated):
        return place
    a, b = (f"{_section(sae)} (L0 {number(l0_of(sae))})" for sae in partner.between)
    lacking = {m.partition(".")[0] for m in partner.means} - {m.partition(".")[0] for m in partner.between[0].means}
    without = f"; without ~ ({', '.join(sorted(lacking))}) at the nearest SAE's own L0" if lacking else ""
    return f"{place}, ~ between {a} and {b}, linear in log L0{without}"


# ------------------------------------------------------------------------------------------------ a row per SAE, by L0


def _by_l0(comparison: Comparison, everything: bool) -> Table:
    """Per metric a row per SAE, each beside the baseline at its own L0; SAEs that it does not reach have no verdict."""
    known, saes = comparison.directions, comparison.frontier
    ordered = sorted(zip(_names(comparison.saes), comparison.saes), key=lambda pair: _by_size(pair[1].run))
    names = [re.sub(r"\blayer_\d+\.", "", name) for name, _ in ordered]
    ours = [one for _, one in ordered]
    measured = {m for one in ours for m, v in one.run.means.items() if v is not None}
    directed = [m for m in _ordered(measured) if known.get(m)]
    shown = directed
    if not everything:
        headline = [m for m in _headline([one.run for one in ours]) if known.get(m)
                    and any(one.at_l0 and one.at_l0.means.get(m) is not None for one in ours)]
        shown = headline[: min(BY_L0_METRICS, BY_L0_ROWS // len(ours))]
    floors = any(one.floor for one in ours)
    rows = []
    for metric in shown:
        title = metric if everything else _leaf(metric)
        for name, one in zip(names, ours):
            judged = one.at_own_l0(metric) if one.at_l0 else UNKNOWN
            figures = [number(l0_of(one.run)), _theirs(one.at_l0, metric), number(one.run.means.get(metric))]
            rows.append([*plain([title, _cut(name), *figures, _difference(one, judged, metric)]),
                         _marked(one, judged)])
            if floors:
                rows[-1].append(Cell(_theirs(one.floor.run if one.floor else None, metric)))
            title = ""
    above = [*_stand_in(comparison),
             f"baseline: {saes[0].config['variant']}, {len(saes)} SAEs of {_range(saes)} ({_source(saes[0])})",
             f"the frontier of layer {ours[0].run.config.get('layer')}, the baseline at each SAE's own L0",
             *_about(names, ours, [_reasons_at_own_l0(one) + _differences(one.run, saes[0]) for one in ours])]
    below = []
    if any(frontier.is_between(one.at_l0, metric) for one in ours for metric in shown):
        below.append("~ between the baseline's two SAEs of the next L0, linear in log L0")
    if not all(one.at_l0 for one in ours):
        below.append(f"– outside the baseline's {_range(saes)}")
    below.append(MARKS)
    below += [RANDOM] if floors else []
    if len(directed) > len(shown):
        below.append(f"{len(directed) - len(shown)} more metrics with --all")
    header = ["metric", "SAE", "L0", "baseline", "run", "difference", "verdict", *(["random"] if floors else [])]
    return Table(above, header, rows, below, 2)


def _reasons_at_own_l0(one: Compared) -> list[str]:
    """What is not compared, and why, of the evals that ran on the frontier."""
    if one.at_l0 is None:
        return []
    ran = {canonical(name) for name in one.at_l0.config.get("evals") or {}}
    return _reasons(one.obstacles, {name: found for name, found in one.other_settings.items() if name in ran})


def _differences(run: Run, reference: Run) -> list[str]:
    found = {key: sides for key, sides in differing(run, reference).items() if key != "hyper"}
    return [f"differs: {_settings(found)}"] if found else []


def _cut(name: str) -> str:
    """A name without its middle where it is too long for the table by L0."""
    return name if len(name) <= BY_L0_NAME else f"{name[: BY_L0_NAME // 2]}…{name[1 - BY_L0_NAME // 2 :]}"


# ------------------------------------------------------------------------------------------------ a row per run


def _by_run(comparison: Comparison) -> Table:
    """A row per run with the headline metrics that fit, verdicts as a sign behind each."""
    saes, references, sweep = comparison.saes, comparison.references, _is_sweep(comparison)
    # the nearest SAE to one of a sweep has another L0, so that a verdict on a single metric would mislead
    judging = bool(references) and not sweep
    if comparison.frontier:
        judging = any(one.at_l0 for one in saes)
    no_mark = " " if judging else ""
    names, paths, metrics = _names(saes), {one.run.path for one in saes}, _headline([one.run for one in saes])
    rows = [(run, [f"{run.name} (baseline)", *(number(run.means.get(m)) + no_mark for m in metrics)])
            for run in references if run.path not in paths]
    for name, one in zip(names, saes):
        unreached = bool(comparison.frontier) and one.at_l0 is None
        cells = [name]
        for metric in metrics:
            mark = no_mark
            if judging and not unreached:
                mark = _sign(one.at_own_l0(metric))
            cells.append(number(one.run.means.get(metric)) + mark)
        rows.append((one.run, cells))
    if sweep:
        rows.sort(key=lambda row: _by_size(row[0]))
    reasons = []
    for one in saes:
        reasons.append(_reasons(one.obstacles, one.other_settings))
        if comparison.frontier and one.at_l0 is None:
            reasons[-1].append(f"not compared: outside the baseline's {_range(comparison.frontier)}")
    above = _stand_in(comparison)
    sources = {run.path: _source(run) for run in references}
    above += [f"baseline: {source}" for source in sources.values()]
    above += ["the frontier, by L0"] if sweep else []
    above += _about(names, saes, reasons)
    below = []
    if judging:
        below.append("+ better, - worse, by more than 2 standard errors; ? standard error unknown")
    if judging and comparison.frontier:
        below.append("compared at equal L0: with what lies between the baseline's two SAEs around it")
    header, *shown = _fitting([["SAE", *(_leaf(m) + no_mark for m in metrics)], *(cells for _, cells in rows)])
    return Table(above, header, [plain(cells) for cells in shown], below)


def _sign(judged: Judged) -> str:
    if judged.beyond:
        return {"better": "+", "worse": "-"}.get(judged.verdict, " ")
    return "?" if beyond(judged) == "?" else " "


def _fitting(rows: list[list[str]]) -> list[list[str]]:
    """The first columns, as many as fit into a line, two at least."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    fitting = max(2, sum(sum(widths[: i + 1]) - 2 <= WIDTH for i in range(len(widths))))
    return [row[:fitting] for row in rows]


def _headline(runs: list[Run]) -> list[str]:
    """The measured headline metrics, those that matter most beside an L0 first."""
    named = (m for m in set().union(*(run.means for run in runs)) if m.rpartition(".")[2] in HEADLINE)
    measured = {m for m in named if any(run.means.get(m) is not None for run in runs)}
    return sorted(_ordered(measured), key=lambda m: BY_RUN.index(_brief(m)) if _brief(m) in BY_RUN else len(BY_RUN))


# ------------------------------------------------------------------------------------------------ lines above


def _stand_in(comparison: Comparison) -> list[str]:
    """What is said where the first run stands for a stored baseline."""
    first = comparison.stand_ins
    if not first:
        return []
    model = comparison.identity[0] or "this model"
    return [f"no stored baseline for {model}: {file_label(first[0].run.path)} stands for it",
            *(f"warning: {one.run.name}: {line}" for one in first for line in _noted_alone(one))]


def _about(names: list[str], saes: list[Compared], reasons: list[list[str]]) -> list[str]:
    """Lines above a table of many SAEs: what is not compared and why, and warnings; ten of them at most."""
    lines = _collected(names, reasons) + [f"warning: {line}" for line in _noted(saes)]
    if len(lines) > 10:
        lines[10:] = [f"warning: {len(lines) - 10} more lines like these, see the single runs"]
    return lines


def _reasons(obstacles: list[str], other_settings: dict[str, dict[str, tuple]]) -> list[str]:
    evals = [f"{name} ({_settings(different)})" for name, different in other_settings.items()]
    return [f"not compared: {reason}" for reason in (*obstacles, *evals)]


def _settings(different: dict[str, tuple]) -> str:
    return ", ".join(f"{key} {short(ours)} / {short(theirs)}" for key, (ours, theirs) in different.items())


def _noted_alone(one: Compared) -> list[str]:
    return one.warnings + random_line(one)


def _noted(saes: list[Compared]) -> list[str]:
    """The warnings about several runs, with their names, and those about runs that are one and the same SAE."""
    names, same = _names(saes), defaultdict(list)
    for name, one in zip(names, saes):
        if one.twin is not None:
            same[one.twin].append(name)
    twins = [f"all SAE metrics of {listing(found, 6)} are equal to the last digit: the same SAE"
             for found in same.values()]
    return twins + _collected(names, [one.warnings + random_line(one, figures=False) for one in saes])


def _collected(names: list[str], lines: list[list[str]]) -> list[str]:
    """Each line once, with the names of the runs it is about."""
    about = defaultdict(list)
    for name, own in zip(names, lines):
        for line in own:
            about[line].append(name)
    return [f"{line} — {f'all {len(names)}' if len(found) == len(names) > 3 else listing(found)}"
            for line, found in about.items()]


def _source(run: Run) -> str:
    """Where a baseline's figures stand, after what marks figures that were measured by others."""
    marked = run.config.get("published")
    return f"{marked}; {_where(run.path)}" if marked else _where(run.path)


def _where(path: Path) -> str:
    """A path as short as it can be said from here."""
    path = path.parent if path.name == "final_info.json" else path
    for folder in (Path.cwd(), PROJECT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


def _range(saes: list[Run]) -> str:
    least, most = frontier.ends(saes)
    return f"L0 {number(least)} to {number(most)}"


# ------------------------------------------------------------------------------------------------ names and order


def _names(saes: list[Compared]) -> list[str]:
    """What to call runs beside each other: those of one file by their sections alone."""
    of_one_file = len(saes) > 1 and len({one.run.path for one in saes}) == 1
    return [_section(one.run) if of_one_file else one.run.name for one in saes]


def _section(run: Run) -> str:
    return run.name.removeprefix(file_label(run.path) + " ")


def _brief(metric: str) -> str:
    return re.sub(r"(top_\d+)_test_accuracy", r"\1", metric)


def _leaf(metric: str) -> str:
    return _brief(metric).rpartition(".")[2]


def _is_sweep(comparison: Comparison) -> bool:
    """Whether a file holds several of the SAEs."""
    return len({one.run.path for one in comparison.saes}) < len(comparison.saes)


def _by_size(run: Run) -> tuple:
    """Sorts by L0, what has none last."""
    return l0_of(run) is None, l0_of(run)


def _ordered(metrics: Iterable[str]) -> list[str]:
    """Headline metrics in their order, then the variant's own, the rest, and last what says nothing about the SAE."""
    rank = {name: i for i, name in enumerate(HEADLINE)}

    def key(metric):
        other = 99
        if metric.startswith("variant."):
            other = 98
        elif LM_ONLY.search(metric):
            other = 100
        by_name = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", metric)]
        return rank.get(metric.rpartition(".")[2], other), by_name

    return sorted(metrics, key=key)


# ------------------------------------------------------------------------------------------------ cells


def _theirs(partner: Run | None, metric: str) -> str:
    """The baseline's figure, with ~ where it lies between those of two SAEs."""
    value = partner.means.get(metric) if partner else None
    return ("~" if value is not None and frontier.is_between(partner, metric) else "") + number(value)


def _difference(one: Compared, judged: Judged, metric: str) -> str:
    if judged.difference is None:
        return ""
    return signed(judged.difference, one.run.means[metric], one.partner.means[metric])


def _verdict(one: Compared, judged: Judged) -> Cell:
    return Cell("–" if judged is NOT_COMPARED else words(one, judged), judged)


def _marked(one: Compared, judged: Judged) -> Cell:
    mark = {"yes": "*", "?": "?"}.get(beyond(judged), "")
    return Cell(_verdict(one, judged).text + mark, judged)


def plain(texts: Iterable[str]) -> list[Cell]:
    """Cells that state no verdict."""
    return [Cell(text) for text in texts]


# ------------------------------------------------------------------------------------------------ forms


def as_text(table: Table) -> str:
    rows = [table.header, *([cell.text for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = [str.ljust if left else str.rjust for left in lefts(table)]
    lines = [line for text in table.above for line in textwrap.wrap(text, WIDTH, subsequent_indent="    ")]
    for row in rows:
        lines.append("  ".join(put(cell, width) for put, cell, width in zip(align, row, widths)).rstrip())
    return "\n".join(lines + table.below)


def as_markdown(table: Table) -> str:
    def row(texts):
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rows = [row(cell.text for cell in cells) for cells in table.rows]
    rule = row([":--" if left else "--:" for left in lefts(table)])
    parts = ["\n".join(f"- {line}" for line in table.above),
             "\n".join([row(table.header), rule, *rows]), "\n".join(table.below)]
    return "\n\n".join(filter(None, parts))


def lefts(table: Table) -> list[bool]:
    """Whether each column is aligned left: names and verdicts are, figures are not."""
    return [i < table.left or name == "verdict" for i, name in enumerate(table.header)]
