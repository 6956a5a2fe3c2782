"""The head of a report: what changed, whether it is better, by how much, how sure; and the change itself, folded."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from html import escape
from pathlib import Path

import variants
from runs import verdict as verdicts
from runs.comparison import Compared, Comparison, differing
from runs.frontier import Interpolated, l0_of
from runs.page import metrics, shell
from runs.reading import Run
from runs.tables import warned
from runs.wording import listing, number, short, signed

WORDS = {"better": ("▲", "Better"), "worse": ("▼", "Worse"), "within_noise": ("≈", "Within the noise"),
         "equal_to_baseline": ("=", "Equal"), "suspect": ("!", "Suspect"), "incomparable": ("–", "Not comparable"),
         "failed": ("✕", "Failed")}
DIFF_LINES = 400  # of one diff that are shown
SAID = 6  # changes that the sentence names

# ------------------------------------------------------------------------------------------------ the whole part


def part(comparisons: list[Comparison], out: Path, info: dict) -> str:
    """The verdict as HTML: the sentence, each SAE's where there are several, what changed, warnings, problems."""
    said = of_run(comparisons, out, info)
    saes = [one for comparison in comparisons for one in comparison.saes]
    word = str(said["verdict"])
    sign, _ = WORDS.get(word, ("", ""))
    first, rest = sentence(said, saes)
    several = len(saes) > 1
    anchor = "" if several or not saes else f' id="{escape(anchor_of(saes[0].run))}"'
    html = [f"<section class='verdict is-{escape(word)}'{anchor}><p class=sentence>"
            f"<strong><span aria-hidden=true>{sign}</span> {escape(first)}</strong> {escape(rest)}</p>"]
    diffs = code_diffs(out, saes, info)
    changes = listed_changes(saes, diffs)
    if changes:
        html.append(f"<p>What changed: {escape('; '.join(changes))}.</p>")
    html.append("</section>")
    if several:
        html.append(_each(said, saes))
    html.append(_folded(saes, diffs))
    html += [f"<div class=warn>{escape(line)}</div>" for line in warned(comparisons)]
    return "".join(html) + _problems([one.run for one in saes])


def of_run(comparisons: list[Comparison], out: Path, info: dict) -> dict:
    """The verdict on the SAEs of a run; that its folder says it failed, where it has ended so."""
    ended = verdicts.stored(out)
    if info.get("status") in ("failed", "interrupted") and ended.get("verdict") == "failed":
        return ended
    asked = info.get("settings") or {}
    runs = [one.run for comparison in comparisons for one in comparison.saes]
    metric = verdicts.headline(asked.get("headline"), runs, str(asked.get("evals") or ""))
    return verdicts.judged(comparisons, metric)


def anchor_of(run: Run) -> str:
    """The id of an SAE's place in the page."""
    return f"sae-{run.section or run.name}"


def link_of(run: Run) -> str:
    """The address of that place."""
    return f"#{shell.quoted(anchor_of(run))}"


# ------------------------------------------------------------------------------------------------ sentences


def sentence(said: dict, saes: list[Compared]) -> tuple[str, str]:
    """(the verdict in a word or three, the rest of the sentence) of what verdict.judged returns of these SAEs."""
    word = said["verdict"]
    _, first = WORDS.get(word, ("", str(word)))
    if word == "failed":
        return f"{first} in {said.get('phase')}:", f"{said.get('why')}."
    if not saes:
        return f"{first}:", f"{said['why']}."
    if len(saes) > 1:
        return _of_several(said, first, saes)
    return _of_one(said, first, saes[0])


def _of_one(said: dict, first: str, one: Compared) -> tuple[str, str]:
    word, metric = said["verdict"], said["metric"]
    source = one.source(metric)
    if word == "equal_to_baseline":
        return f"{first} to the baseline {one.partner.name}:", f"nothing in it differs. {_figure(said)}."
    if word in ("suspect", "incomparable"):
        figure = f" {_figure(said)}{_beside(said, one)}." if said["value"] is not None else ""
        return f"{first}:", f"{said['why']}.{figure}"
    than = {"within_noise": "of"}.get(word, "than")
    rest = (f"the baseline {_called(source)} in {metrics.title(metric)}, {_where(one, source)}: "
            f"{_with_error(said['value'], said['stderr'])} against {_their_figure(said)}, {_by_how_much(said)}")
    if word == "within_noise" and not _known(said):
        rest += f"; {said['why']}"
    return f"{first} {than}", f"{rest}."


def _beside(said: dict, one: Compared) -> str:
    """The baseline's figure, where it means something beside the run's."""
    if one.obstacles or said["baseline_value"] is None:
        return ""
    at = "" if number(said["l0"]) == number(said["baseline_l0"]) else f" at L0 {number(said['baseline_l0'])}"
    return f" against {_their_figure(said)}{at} of the baseline {_called(one.source(said['metric']))}"


def _known(said: dict) -> bool:
    """Whether the standard errors of both sides are."""
    return said["stderr"] is not None and said["baseline_stderr"] is not None


def _of_several(said: dict, first: str, saes: list[Compared]) -> tuple[str, str]:
    word, metric = said["verdict"], said["metric"]
    if word in ("suspect", "incomparable"):
        return f"{first}:", f"{said['why']}."
    source = listing(list(dict.fromkeys(_called(one.source(metric)) for one in saes if one.source(metric))), 2)
    if word == "equal_to_baseline":
        return f"{first} to the baseline {source}:", "nothing differs in any of the SAEs."
    compared = sum(one["difference"] is not None and one["verdict"] != "incomparable" for one in said["saes"].values())
    over = f"over {compared} SAEs" if compared == len(saes) else f"over {compared} of {len(saes)} SAEs"
    than = {"within_noise": "of"}.get(word, "than")
    rest = f"the baseline {source} in {metrics.title(metric)}: {over} the mean is {_by_how_much(said)}"
    if not _known(said):
        rest += "; of some no standard error is known: run several seeds of both"
    return f"{first} {than}", f"{rest}."


def _called(run: Run | None) -> str:
    """A baseline in a word: its variant, where that is known."""
    return str(run.config.get("variant") or run.name) if run else ""


def _with_error(value: float | None, error: float | None) -> str:
    return number(value) + (f" ± {error:.2g}" if error else "")


def _figure(said: dict) -> str:
    """The run's own value, in words."""
    if said["value"] is None:
        return f"{metrics.title(said['metric'])} is not known"
    at = f" at L0 {number(said['l0'])}" if said["l0"] is not None else ""
    return f"{metrics.title(said['metric'])} is {_with_error(said['value'], said['stderr'])}{at}"


def _their_figure(said: dict) -> str:
    if said["baseline_value"] is None:
        return ""
    return _with_error(said["baseline_value"], said["baseline_stderr"])


def _where(one: Compared, source: Run) -> str:
    """At which L0 a run and its baseline are compared."""
    ours, theirs = l0_of(one.run), l0_of(source)
    if isinstance(source, Interpolated):
        low, high = (number(l0_of(sae)) for sae in source.between)
        return f"at the same L0, {number(ours)}, between its SAEs of L0 {low} and {high}"
    if ours is None or theirs is None:
        return "at an L0 that is not known"
    if number(ours) == number(theirs):
        return f"at the same L0, {number(ours)}"
    return f"at L0 {number(ours)} against {number(theirs)}"


def _by_how_much(said: dict) -> str:
    """The difference, and how many standard errors it is."""
    difference, error = said["difference"], said["difference_stderr"]
    sides = [side for side in (said["value"], said["baseline_value"]) if side]
    text = f"{signed(difference, *(sides or [difference or 1.0]))}"
    if error is None or not _known(said):
        return f"a difference of {text}"
    if not error:
        return f"a difference of {text} ± 0"
    times = abs(difference) / error
    shown = f"{times:.0f}" if times >= 10 else f"{times:.1f}"
    needed = "" if abs(difference) > 2 * error else ", and 2 are asked for"
    return f"a difference of {text} ± {error:.2g}, {shown} standard errors{needed}"


def _each(said: dict, saes: list[Compared]) -> str:
    """A table of the SAEs of a run, each with its verdict and a place to go to."""
    metric = said["metric"]
    rows = []
    for one, own in zip(saes, said.get("saes", {}).values()):
        sign, word = WORDS.get(own["verdict"], ("", own["verdict"]))
        sure = ""
        if own["difference"] is not None and own["difference_stderr"] and _known(own):
            sure = f"{abs(own['difference']) / own['difference_stderr']:.1f}"
        difference = ""
        if own["difference"] is not None:
            difference = signed(own["difference"], own["value"], own["baseline_value"])
        name = escape(one.run.section or one.run.name)
        why = f" <span class=mut>{escape(own['why'])}</span>" if own["why"] else ""
        figures = (number(own["l0"]), _with_error(own["value"], own["stderr"]), _their_figure(own), difference, sure)
        cells = "".join(f"<td>{escape(text)}</td>" for text in figures)
        rows.append(f'<tr id="{escape(anchor_of(one.run))}"><td class=l>{name}</td>{cells}'
                    f"<td class=l><span class={escape(own['verdict'])}>{sign} {escape(word)}</span>{why}</td></tr>")
    heads = ("L0", metrics.title(metric or "value"), "baseline", "difference", "standard errors")
    header = "<th class=l>SAE</th>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "<th class=l>verdict</th>"
    words = [WORDS.get(own["verdict"], ("", own["verdict"]))[1].lower() for own in said.get("saes", {}).values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    table = f"<table class=sortable><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (f"<p>Each by itself: {escape(counts)}.</p>"
            + shell.scrolling("verdict of each SAE", table, "tall"))


def _problems(runs: list[Run]) -> str:
    about: dict[str, list[str]] = {}
    for run in runs:
        for problem in run.problems:
            about.setdefault(problem, []).append(run.section or run.name)
    items = [problem if len(names) == len(runs) else f"{listing(names)}: {problem}"
             for problem, names in about.items()]
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<h2>Problems</h2><ul>{found}</ul>" if items else ""


# ------------------------------------------------------------------------------------------------ what changed


def listed_changes(saes: list[Compared], diffs: list[tuple[str, list[str]]]) -> list[str]:
    """What all SAEs of a run have otherwise than what they are compared with, and what differs among them; short."""
    each = [_changes(one) for one in saes]
    common = [line for line in each[0] if all(line in other for other in each)] if each else []
    among = _swept([one.run for one in saes]) if len(saes) > 1 else []
    code = [_counted(title, lines) for title, lines in diffs[:1]]
    variant = [line for line in common if "in place of" in line]
    found = [*variant, *code, *(line for line in common if line not in variant), *among]
    more = [f"and {len(found) - SAID} more"] if len(found) > SAID else []
    return found[:SAID] + more


def _changes(one: Compared) -> list[str]:
    """Settings of an SAE that differ from those of what it is compared with, the variant first."""
    if one.partner is None or one.obstacles:
        return []
    found = []
    for key, (ours, theirs) in one.differs.items():
        if key == "variant":
            found.append(f"{ours} in place of {theirs}")
        elif key == "hyper" and isinstance(ours, dict) and isinstance(theirs, dict):
            found += [f"{name} {short(theirs[name])} → {short(ours[name])}" for name in ours
                      if name in theirs and ours[name] != theirs[name]]
        else:
            found.append(f"{key} {_setting(theirs)} → {_setting(ours)}")
    return found


def _setting(value) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else short(value)


def _swept(runs: list[Run]) -> list[str]:
    """Hyper-parameters and layers in which the SAEs of a run differ from each other."""
    dials = [{"layer": run.config.get("layer"), **(run.config.get("hyper") or {})} for run in runs]
    found = []
    for key in dict.fromkeys(key for one in dials for key in one):
        values = list(dict.fromkeys(short(one.get(key)) for one in dials))
        if len(values) > 1:
            shown = ", ".join(values) if len(values) < 6 else f"{values[0]} to {values[-1]}, {len(values)} values"
            found.append(f"{key} {shown}")
    return found


def _counted(title: str, lines: list[str]) -> str:
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    if not lines:
        return f"variant.py is {title}'s"
    return f"{added} lines added to and {removed} taken from {title}'s variant.py"


def code_diffs(out: Path, saes: list[Compared], info: dict) -> list[tuple[str, list[str]]]:
    """[(whose variant.py, lines of the unified diff from it to the run's own)], the shortest first: the baseline's,
    where it keeps one, and that of the nearest variant that there is; [] for a run that keeps no variant.py.
    """
    own = Path(out) / "variant.py"
    if not own.is_file():
        return []
    source = own.read_bytes()
    nearest = next((one.nearest for one in saes if one.nearest is not None and not one.obstacles), None)
    found = []
    if nearest is not None and (nearest.path.parent / "variant.py").is_file():
        theirs = (nearest.path.parent / "variant.py").read_bytes()
        found.append((f"the baseline {_called(nearest)}", _diff(theirs, source)))
    file = own
    with contextlib.suppress(OSError, ValueError):  # a variant of one's own that is gone: its stored text is there
        file = variants.path(str((info.get("settings") or {}).get("variant") or ""))
    changed, name, text = verdicts.nearest(source, file)
    if name:
        found.append((f"the shipped {name}", _diff(text, source) if changed else []))
    return sorted(found, key=lambda one: len(one[1]))


def _diff(theirs: bytes, ours: bytes) -> list[str]:
    sides = [source.decode("utf-8", "replace").splitlines() for source in (theirs, ours)]
    return [line for line in difflib.unified_diff(*sides, lineterm="") if line[:3] not in ("---", "+++")]


def _folded(saes: list[Compared], diffs: Iterable[tuple[str, list[str]]]) -> str:
    """What changed in full: settings side by side, and the diff of the code."""
    html = []
    settings = _side_by_side(saes)
    if settings:
        html.append(settings)
    for title, lines in diffs:
        if lines:
            html.append(f"<details><summary>variant.py against {escape(title)}'s</summary>{as_html(lines)}</details>")
    return "".join(html)


def _side_by_side(saes: list[Compared]) -> str:
    one = next((one for one in saes if one.nearest is not None and not one.obstacles), None)
    if one is None:
        return ""
    rows = []
    for key, (ours, theirs) in differing(one.run, one.nearest).items():
        if isinstance(ours, dict) and isinstance(theirs, dict):
            rows += [(name, theirs.get(name), ours.get(name)) for name in dict.fromkeys([*theirs, *ours])
                     if theirs.get(name) != ours.get(name)]
        else:
            rows.append((key, theirs, ours))
    if not rows:
        return ""
    body = "".join(f"<tr><td class=l>{escape(str(key))}</td><td class='l w'>{escape(_side(theirs))}</td>"
                   f"<td class='l w'>{escape(_side(ours))}</td></tr>" for key, theirs, ours in rows)
    table = (f"<table><tr><th class=l>setting</th><th class=l>{escape(one.nearest.name)}</th>"
             f"<th class=l>{escape(one.run.name)}</th></tr>{body}</table>")
    return (f"<details><summary>{len(rows)} settings differ</summary>"
            f"{shell.scrolling('settings that differ', table)}</details>")


def _side(value) -> str:
    return "–" if value is None else _setting(value)


def as_html(lines: list[str]) -> str:
    """A unified diff: what was added and removed has its sign and a colour."""
    shown = []
    for line in lines[:DIFF_LINES]:
        tag = {"+": "ins", "-": "del"}.get(line[:1], "span")
        kind = " class=place" if line.startswith("@@") else ""
        shown.append(f"<{tag}{kind}>{escape(line) or ' '}</{tag}>")
    more = f"<p class=mut>{len(lines) - DIFF_LINES} more lines</p>" if len(lines) > DIFF_LINES else ""
    return f"<pre class=diff tabindex=0 role=region aria-label='changed lines'>{''.join(shown)}</pre>{more}"
