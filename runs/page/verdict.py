"""The head of a report: what changed, whether it is better, by how much, how sure; and the change itself, folded."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
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
NAMED = 2  # changes that the sentence names beside the variant,
SAID = 6  # and a line under it
NUMBERS = 4  # figures that a warning about several SAEs names
COUNTING = ("better", "worse", "within_noise", "equal_to_baseline")  # verdicts of SAEs whose figures show something
FIGURE = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?)")
# where runs/verdict.py goes on from why to what to do, and what of that is a command
ADVICE = re.compile(r": (?=(?:compare|set|choose|run) )")
COMMAND = re.compile(r"python -m [\w.]+(?: [\w-]+)*|--\w+")

# ------------------------------------------------------------------------------------------------ the whole part


def part(comparisons: list[Comparison], out: Path, info: dict, others: Iterable[Run] = ()) -> str:
    """The verdict as HTML: the sentence, each SAE's where there are several, what changed, warnings, problems.

    others: SAEs of runs beside this one that differ in the seed alone.
    """
    said = of_run(comparisons, out, info)
    saes = [one for comparison in comparisons for one in comparison.saes]
    word, others = str(said["verdict"]), list(others)
    sign, _ = WORDS.get(word, ("", ""))
    directions = comparisons[0].directions if comparisons else {}
    first, rest = sentence(said, saes, directions.get(said.get("metric")) != "lower")
    several = len(saes) > 1
    anchor = "" if several or not saes else f' id="{escape(anchor_of(saes[0].run))}"'
    html = [f"<section class='verdict is-{escape(word)}'{anchor}><p class=sentence>"
            f"<strong><span aria-hidden=true>{sign}</span> {escape(first)}</strong> {escape(rest)}</p>"]
    diffs = code_diffs(out, saes, info)
    lines = [over_seeds(said, saes, others), *listed_changes(saes, diffs)]
    html += [f"<p>{escape(line)}</p>" for line in lines if line]
    html.append("</section>")
    html += [f"<div class=warn>{escape(line)}</div>" for line in warnings(comparisons, said)]
    if several and "saes" in said:
        html.append(_each(said, saes))
    html += [_folded(saes, diffs), _next_html(_next(said, saes, out, others))]
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


def sentence(said: dict, saes: list[Compared], higher: bool = True) -> tuple[str, str]:
    """(the verdict in a word or three, the rest of the sentence) of what verdict.judged returns of these SAEs.

    higher: whether the larger of two values of its metric is the better one.
    """
    word = said["verdict"]
    _, first = WORDS.get(word, ("", str(word)))
    if word == "failed":
        return f"{first} in {said.get('phase')}:", f"{said.get('why')}."
    if not saes:
        return f"{first}:", f"{said['why']}."
    if len(saes) > 1:
        return f"{first}:", _of_several(said, saes, higher)
    return f"{first}:", _of_one(said, saes[0])


def _of_one(said: dict, one: Compared) -> str:
    word, source = said["verdict"], one.source(said["metric"])
    reason = _reason(said, one)
    if word == "equal_to_baseline":
        return f"nothing in this run differs from the baseline {_called(one.partner)}. {_figure(said, 'it')}."
    if word in ("suspect", "incomparable"):
        figure = f" {_figure(said, _subject(one))}{_beside(said, one)}." if said["value"] is not None else ""
        return f"{reason}.{figure}"
    rest = (f"{_subject(one)} reaches {_with_error(said['value'], said['stderr'])} in {metrics.title(said['metric'])}, "
            f"against {_their_figure(said)} of the baseline {_called(source)} {_where(one, source)}: "
            f"{_by_how_much(said)}")
    if word == "within_noise" and not _known(said) and reason:
        rest += f"; {reason}"
    return f"{rest}."


def _reason(said: dict, one: Compared | None = None) -> str:
    """Why a verdict is what it is, without what to do about it, in the words of the page."""
    reason, _ = _parted(said.get("why") or "")
    if said.get("metric"):
        reason = reason.replace(said["metric"], metrics.title(said["metric"]))
    if one is not None and reason.startswith("not sparse"):
        width, l0 = one.run.config.get("d_in"), l0_of(one.run)
        if width and l0 and l0 > width / 2:
            reason += f"; an activation of {width:,} dimensions is easily rebuilt from so many"
    return reason


def _parted(why: str) -> tuple[str, str]:
    """What runs/verdict.py says of why, and behind it what to do, or ""."""
    found = ADVICE.search(why)
    return (why[: found.start()], why[found.end():]) if found else (why, "")


def _subject(one: Compared) -> str:
    """What was run, by what differs: "mine in place of standard, with k 64 in place of 50,"."""
    name = _called(one.run) or "this run"
    changes = _changes(one)
    variant = [(theirs, ours) for key, theirs, ours in changes if key == "variant"]
    others = [f"{key} {ours} in place of {theirs}" for key, theirs, ours in changes if key != "variant"]
    more = len(others) - NAMED
    if more > 0:
        changed = f"{', '.join(others[:NAMED])} and {more} more {'change' if more == 1 else 'changes'}"
    else:
        changed = " and ".join(others)
    if variant:
        ours = f"{variant[0][1]} in place of {variant[0][0]}"
        return f"{ours}, with {changed}," if changed else ours
    return f"{name} with {changed}" if changed else name


def _beside(said: dict, one: Compared) -> str:
    """The baseline's figure, where it means something beside the run's."""
    if one.obstacles or said["baseline_value"] is None:
        return ""
    at = "" if number(said["l0"]) == number(said["baseline_l0"]) else f" at L0 {number(said['baseline_l0'])}"
    return f", against {_their_figure(said)}{at} of the baseline {_called(one.source(said['metric']))}"


def _known(said: dict) -> bool:
    """Whether the standard errors of both sides are."""
    return said["stderr"] is not None and said["baseline_stderr"] is not None


def _of_several(said: dict, saes: list[Compared], higher: bool) -> str:
    """How many SAEs are what, the mean difference, and the best that counts."""
    each = said["saes"]
    parts = [f"{_counted_words(each, said['metric'])}{_shared_subject(saes)}"]
    compared = sum(one["difference"] is not None and one["verdict"] != "incomparable" for one in each.values())
    if said["verdict"] in ("better", "worse", "within_noise") and said["difference"] is not None:
        over = "over all" if compared == len(each) else f"over the {compared} that can be compared"
        unsure = "" if _known(said) else "; of some no standard error is known"
        parts[0] += (f"; {over} the mean of {metrics.title(said['metric'])} is {_by_how_much(said)}{unsure}")
    best = _best(each, higher)
    if best:
        parts.append(_best_in_words(best, said["metric"], each))
    elif all(one["value"] is not None and one["l0"] is not None for one in each.values()):
        ends = sorted(each.values(), key=lambda one: one["l0"])
        low, high = (f"{number(one['value'])} at L0 {number(one['l0'])}" for one in (ends[0], ends[-1]))
        parts.append(f"{metrics.title(said['metric'])} goes from {low} to {high}")
    return " ".join(f"{part}." for part in parts)


def _counted_words(each: dict[str, dict], metric: str | None) -> str:
    """"of 3 SAEs 1 is better, 2 are suspect (not sparse)"."""
    counts = []
    for word, (_, text) in WORDS.items():
        found = [one for one in each.values() if one["verdict"] == word]
        if not found:
            continue
        reasons = list(dict.fromkeys(filter(None, (_brief(one, metric) for one in found))))
        why = f" ({listing(reasons)})" if reasons else ""
        counts.append(f"{len(found)} {'is' if len(found) == 1 else 'are'} {text.lower()}{why}")
    return f"of {len(each)} SAEs {', '.join(counts)}"


def _brief(one: dict, metric: str | None) -> str:
    """Why the figures of an SAE show nothing, without theirs: "not sparse"; "" of one whose do."""
    if one["verdict"] in COUNTING or not one["why"]:
        return ""
    brief = re.split(r": | \(| = ", one["why"])[0]
    return brief.replace(metric, metrics.title(metric)) if metric else brief


def _shared_subject(saes: list[Compared]) -> str:
    """", mine in place of standard", where all SAEs have that in common."""
    found = {_swapped(one) for one in saes}
    swapped = found.pop() if len(found) == 1 else ""
    return f", with {swapped}" if swapped else ""


def _swapped(one: Compared) -> str:
    return next((f"{ours} in place of {theirs}" for key, theirs, ours in _changes(one) if key == "variant"), "")


def _best(each: dict[str, dict], higher: bool) -> str:
    """The SAE that lies highest above its baseline, of those whose verdict counts; "" without one."""
    counting = {name: one["difference"] for name, one in each.items()
                if one["verdict"] in COUNTING and one["difference"] is not None}
    if not counting:
        return ""
    return max(counting, key=lambda name: counting[name] if higher else -counting[name])


def _best_in_words(best: str, metric: str, each: dict[str, dict]) -> str:
    one = each[best]
    at = f" at L0 {number(one['l0'])}" if one["l0"] is not None else ""
    return (f"The best that counts is {best}: {_with_error(one['value'], one['stderr'])}{at}, against "
            f"{_their_figure(one)} of its baseline, {_by_how_much(one)}")


def _called(run: Run | None) -> str:
    """A baseline in a word: its variant, where that is known."""
    return str(run.config.get("variant") or run.name) if run else ""


def _with_error(value: float | None, error: float | None) -> str:
    return number(value) + (f" ± {error:.2g}" if error else "")


def _figure(said: dict, subject: str) -> str:
    """The run's own value, in words."""
    if said["value"] is None:
        return f"{metrics.title(said['metric'])} is not known"
    at = f" at L0 {number(said['l0'])}" if said["l0"] is not None else ""
    return f"{subject} reaches {_with_error(said['value'], said['stderr'])} in {metrics.title(said['metric'])}{at}"


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
    return f"at L0 {number(theirs)} in place of {number(ours)}"


def _by_how_much(said: dict) -> str:
    """The difference, and how many standard errors it is."""
    difference, error = said["difference"], said["difference_stderr"]
    if not difference:
        return "no difference"
    sides = [side for side in (said["value"], said["baseline_value"]) if side]
    size = signed(abs(difference), *(sides or [difference])).removeprefix("+")
    way = "higher" if difference > 0 else "lower"
    if error is None or not _known(said):
        return f"{size} {way}"
    if not error:
        return f"{size} ± 0 {way}"
    return f"{size} ± {error:.2g} {way}, {_times(said)} standard errors where 2 are asked for"


def _times(said: dict) -> str:
    """How many standard errors a difference is."""
    times = abs(said["difference"]) / said["difference_stderr"]
    return f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def over_seeds(said: dict, saes: list[Compared], others: list[Run]) -> str:
    """The mean over a run's SAE and its other seeds, in a sentence; "" of several SAEs or without others."""
    if len(saes) != 1 or not others or said.get("metric") is None:
        return ""
    mean = verdicts.mean_run([saes[0].run, *others])
    value = mean.means.get(said["metric"])
    if value is None:
        return ""
    error = _with_error(value, mean.stderrs.get(said["metric"]))
    return f"Over {len(others) + 1} seeds it reaches {error}."


# ------------------------------------------------------------------------------------------------ what to do next


def _next(said: dict, saes: list[Compared], out: Path, others: list[Run]) -> list[str]:
    """What to do about a verdict, in lines; commands stand between `marks`."""
    whys = [said.get("why") or "", *(one["why"] or "" for one in said.get("saes", {}).values())]
    own = shlex.quote(out.name)
    found = [_marked(advice.replace("run_1 run_2", f"{own} another_run")) for _, advice in map(_parted, whys) if advice]
    configs = [one.run.config for one in saes]
    if any(config.get("profile") == "tiny" for config in configs):
        found.insert(0, "the profile tiny shows that everything runs, not how good a variant is: its model has "
                        "32 dimensions; `python experiment.py --profile=embedded` takes a small real one")
    elif said["verdict"] == "suspect" and any("not sparse" in why for why in whys):
        width = min((config["d_sae"] for config in configs if config.get("d_sae")), default=0)
        if width and all("k" in (config.get("hyper") or {}) for config in configs):
            found.append(f"a sparse SAE of this width has `--hyper k={max(width // 10, 1)}` or less")
    names = [out.name, *(run.path.parent.name for run in others)]
    if said["verdict"] in ("better", "worse", "within_noise", "equal_to_baseline"):
        if others:
            found.append("the verdict over these seeds: "
                         f"`python -m runs.compare {' '.join(map(shlex.quote, names))} --exit-status`")
        elif said["verdict"] != "equal_to_baseline":
            seed = max((config["seed"] for config in configs if isinstance(config.get("seed"), int)), default=0)
            found.append("± is of the evaluated samples alone, and of one seed: the same command with "
                         f"`--seed={seed + 1}` and another `--out_dir` tells whether it holds")
    return list(dict.fromkeys(found))


def _marked(advice: str) -> str:
    """What runs/verdict.py says to do, with its commands marked."""
    return COMMAND.sub(lambda found: f"`{found[0]}`", advice.replace(", python", ": python"))


def _next_html(lines: list[str]) -> str:
    items = []
    for line in lines:
        words = [escape(piece) for piece in line.split("`")]
        words[1::2] = [f"<code>{command}</code>" for command in words[1::2]]
        items.append(f"<li>{''.join(words)}</li>")
    return f"<div class=next><strong>Next</strong><ul>{''.join(items)}</ul></div>" if items else ""


# ------------------------------------------------------------------------------------------------ each SAE, warnings


def _each(said: dict, saes: list[Compared]) -> str:
    """A table of the SAEs of a run, each with its verdict and a place to go to; without columns that are empty."""
    metric = said["metric"]
    heads = ("why", "L0", metrics.title(metric or "value"), "baseline", "difference", "standard errors")
    figures = [_figures(own, metric) for own in said["saes"].values()]
    shown = [i for i in range(len(heads)) if any(row[i] for row in figures)]
    sides = ["l mut" if i == 0 else "" for i in range(len(heads))]
    rows = []
    for one, own, row in zip(saes, said["saes"].values(), figures):
        sign, word = WORDS.get(own["verdict"], ("", own["verdict"]))
        cells = "".join(f'<td class="{sides[i]}">{escape(row[i])}</td>' for i in shown)
        rows.append(f'<tr id="{escape(anchor_of(one.run))}"><td class=l>{escape(one.run.section or one.run.name)}</td>'
                    f"<td class=l><span class={escape(own['verdict'])}>{sign} {escape(word)}</span></td>{cells}</tr>")
    header = "".join(f'<th class="{sides[i]}">{escape(heads[i])}</th>' for i in shown)
    table = (f"<table class=sortable><thead><tr><th class=l>SAE</th><th class=l>verdict</th>{header}</tr></thead>"
             f"<tbody>{''.join(rows)}</tbody></table>")
    return shell.scrolling("verdict of each SAE", table, "tall")


def _figures(own: dict, metric: str | None) -> tuple[str, ...]:
    """Why an SAE's figures show nothing, and its figures."""
    known = own["difference"] is not None
    difference = signed(own["difference"], own["value"], own["baseline_value"]) if known else ""
    sure = _times(own) if known and own["difference_stderr"] and _known(own) else ""
    l0 = "" if own["l0"] is None else number(own["l0"])
    return (_brief(own, metric), l0, _with_error(own["value"], own["stderr"]), _their_figure(own), difference, sure)


def warnings(comparisons: list[Comparison], said: dict) -> list[str]:
    """The warnings of a run's SAEs, one of those that differ in figures alone; without what the sentence says."""
    groups: dict[str, list[tuple[list[str], str]]] = {}
    for line in warned(comparisons):
        text, _, names = line.rpartition(" — ") if " — " in line else (line, "", "")
        groups.setdefault(FIGURE.sub("#", text), []).append((FIGURE.split(text), names))
    found = []
    for lines in groups.values():
        pieces = [_several([pieces[i] for pieces, _ in lines]) for i in range(len(lines[0][0]))]
        names = ", ".join(dict.fromkeys(names for _, names in lines if names))
        found.append("".join(pieces) + (f" — {names}" if names else ""))
    return [line for line in found if line != said.get("why")]


def _several(texts: list[str]) -> str:
    """What stands at one place of several lines."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) <= NUMBERS:
        return ", ".join(distinct) if len(distinct) > 1 else distinct[0]
    values = sorted(distinct, key=lambda text: float(text.replace(",", "")))
    return f"{values[0]} to {values[-1]}"


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
    """Sentences: the changes that the first one has no room for, what differs among several SAEs, and in the code."""
    said = []
    each = [_changes(one) for one in saes]
    common = [change for change in each[0] if all(change in other for other in each)] if each else []
    others = [change for change in common if change[0] != "variant"]
    if (len(saes) > 1 and others) or len(others) > NAMED:
        listed = [f"{key} {theirs} → {ours}" for key, theirs, ours in others]
        more = [f"and {len(listed) - SAID} more"] if len(listed) > SAID else []
        said.append(f"Changed beside the variant: {'; '.join(listed[:SAID] + more)}.")
    among = _swept([one.run for one in saes]) if len(saes) > 1 else []
    if among:
        said.append(f"Among the SAEs: {'; '.join(among)}.")
    return said + [f"Code: {_counted(title, lines)}." for title, lines in diffs[:1]]


def _changes(one: Compared) -> list[tuple[str, str, str]]:
    """(setting, the value of what an SAE is compared with, its own) of those that differ."""
    if one.partner is None or one.obstacles:
        return []
    found = []
    for key, (ours, theirs) in one.differs.items():
        if key == "hyper" and isinstance(ours, dict) and isinstance(theirs, dict):
            found += [(str(name), short(theirs[name]), short(ours[name])) for name in ours
                      if name in theirs and ours[name] != theirs[name]]
        else:
            found.append((key, _setting(theirs), _setting(ours)))
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
        return f"that of {title}, unchanged"
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
