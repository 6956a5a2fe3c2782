"""One word on a run, for programs: is it better than its baseline, at its own L0, beyond the noise?

A comparison (runs/comparison.py) says something of every metric; here one metric, the headline, decides:

    better | worse     the difference exceeds two standard errors
    within_noise       it does not, or no error is known to hold it against: more seeds can tell
    equal_to_baseline  it is 0, and the run differs in nothing from the baseline: it is the baseline once more
    suspect            a warning holds (dead, not sparse, at chance, untrained, identical …), or the headline is not
                       surely better than a frozen random decoder's: whatever the figures are, they show nothing
    incomparable       there is nothing to compare with at the run's L0; `why` says what lacks
    failed             there is no result

`runs/endings.py` writes it where a run ends, `python -m runs.compare … --exit-status` reckons it of any runs.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import variants
from runs import doubts, seeds
from runs.comparison import HEADLINES, Compared, Comparison
from runs.frontier import SAME, l0_of
from runs.reading import DOUBT, Run, code_of, finite
from runs.reading import setting as setting_of
from runs.wording import number, random_line, short

PROJECT = Path(__file__).resolve().parent.parent
# verdict.json's keys, in order; of several SAEs also `saes`
KEYS = ("verdict", "why", "metric", "value", "stderr", "l0", "baseline", "baseline_value", "baseline_stderr",
        "baseline_l0", "difference", "difference_stderr", "minutes", "tokens_per_s", "peak_memory_gb",
        "peak_gpu_memory_gb", "lines_changed", "nearest_variant", "run", "variant", "model", "seed", "warnings")
FIGURES = ("value", "stderr", "l0", "baseline_value", "baseline_stderr", "baseline_l0", "difference",
           "difference_stderr")
COSTS = ("minutes", "tokens_per_s", "peak_memory_gb", "peak_gpu_memory_gb", "lines_changed", "nearest_variant")
FILE = "verdict.json"
SAME_BUDGET = 1.1  # numbers of training tokens that differ by less than this factor count as one
EXIT_STATUS = {"better": 0, "worse": 1, "equal_to_baseline": 1, "within_noise": 2}  # of all others 3

# ------------------------------------------------------------------------------------------------ which metric


def headline(asked: str | None, runs: Iterable[Run], chosen: str = "") -> str | None:
    """The metric that decides: the one asked for, else the profile's where its eval ran, else the first measured.

    None where nothing that could decide was measured. `chosen`: --evals, of which one may have been left out for want
    of time or have crashed: another metric must not silently take its place.
    """
    runs = list(runs)
    if asked:
        return asked
    profiles = {run.config.get("profile") for run in runs}
    usual = "ground_truth.f1" if profiles == {"synthetic"} else "core.ce_loss_score"
    eval_name = usual.partition(".")[0]
    if {eval_name, "all"} & {name.strip() for name in chosen.split(",")}:
        return usual
    if any(eval_name in (run.config.get("evals") or {}) or usual in run.means for run in runs):
        return usual
    return next((metric for metric in HEADLINES if any(run.means.get(metric) is not None for run in runs)), None)


def check_headline(asked: str | None, directions: dict[str, str], chosen: Collection[str] | None = None) -> None:
    """ValueError for a headline that no eval declares with a direction, or whose eval is not among those chosen."""
    if not asked:
        return
    known = [metric for metric, way in directions.items() if way and not metric.startswith("training.")]
    if asked not in known:
        what = "has no direction" if asked in directions else "is no metric"
        near = difflib.get_close_matches(asked, known, 1, 0)[0]
        raise ValueError(f"--headline={asked} {what}; the nearest that has one is {near}\n"
                         "give a metric of which higher or lower is better")
    name = asked.partition(".")[0]
    if chosen is not None and name not in chosen:
        raise ValueError(f"--headline={asked} is measured by the eval {name}, which is not among "
                         f"--evals={','.join(chosen) or 'none'}\nadd it there, or give a metric of those")


# ------------------------------------------------------------------------------------------------ the verdict


def judged(comparisons: list[Comparison], metric: str | None) -> dict:
    """`KEYS` from verdict to difference_stderr, and warnings, of the SAEs of one run; of several `saes` too.

    Several SAEs have one verdict: that of their mean difference over those that can be compared. Its standard error is
    the mean of theirs: they are measured on the same samples, so that their errors may go fully together.
    """
    direction = comparisons[0].directions.get(metric, "") if comparisons else ""
    each = {}
    for comparison in comparisons:
        for one in comparison.saes:
            twins = [other.run for other in comparison.saes if other is not one and other.twin is not None
                     and other.twin == one.twin]
            each[_name(one.run, each)] = _of_one(one, metric, twins)
    if not each:
        return dict(verdict="incomparable", why="there is no SAE to compare", metric=metric, warnings=[])
    if len(each) == 1:
        return dict(metric=metric) | next(iter(each.values()))
    return dict(metric=metric) | _together(each, direction) | dict(saes=each)


def _name(run: Run, taken: Collection[str]) -> str:
    """An SAE's key among those of its run: that of final_info.json, unless another layer's has it."""
    name = run.section or run.name
    return run.name if name in taken else name


def _of_one(one: Compared, metric: str | None, twins: list[Run]) -> dict:
    """The verdict on one SAE, with its figures and the baseline's."""
    result, source = one.judged(metric), one.source(metric)
    warnings = list(one.warnings)
    if twins:
        warnings.append(f"all SAE metrics equal those of {', '.join(run.section or run.name for run in twins)} to the "
                        "last digit: the same SAE")
    verdict, why = _ruling(one, metric, warnings)
    theirs = source.means.get(metric) if source else None
    found = dict(verdict=verdict, why=why, value=one.run.means.get(metric), stderr=one.run.stderrs.get(metric),
                 l0=l0_of(one.run), baseline=None, baseline_value=theirs, baseline_stderr=None, baseline_l0=None,
                 difference=result.difference, difference_stderr=result.stderr)
    if source is not None:
        found |= dict(baseline=source.name, baseline_stderr=source.stderrs.get(metric), baseline_l0=l0_of(source))
    return finite(found) | dict(warnings=warnings + random_line(one))


def _ruling(one: Compared, metric: str | None, warnings: list[str]) -> tuple[str, str | None]:
    """(verdict, why) of one SAE."""
    result = one.judged(metric)
    if result.difference == 0 and not one.differs:
        return "equal_to_baseline", f"nothing in it differs from {one.partner.name}"
    if warnings:
        return "suspect", warnings[0]
    if one.floor is not None and metric in one.floor.not_better:
        random, error = one.floor.run.means[metric], one.floor.not_better[metric].stderr
        sure = f" ± {error:.1g}" if error else ""
        return "suspect", (f"{metric} is not better than a frozen random decoder's "
                           f"({number(one.run.means[metric])} vs {number(random)}{sure})")
    lacks = _lacking(one, metric)
    if lacks:
        return "incomparable", lacks
    budget = _other_budget(one, result.verdict)
    if result.beyond and budget:
        return "incomparable", budget
    if result.beyond:
        return result.verdict, None
    if result.beyond is None and result.difference != 0:
        return "within_noise", _silent(one, metric)
    return "within_noise", "the difference is within two standard errors"


def _other_budget(one: Compared, verdict: str) -> str:
    """That the number of training tokens alone may be why a run is better or worse, in a line; "" if it may not."""
    ours, theirs = one.differs.get("num_tokens", (0, 0))
    if not (isinstance(ours, (int, float)) and isinstance(theirs, (int, float)) and ours > 0 and theirs > 0):
        return ""
    if max(ours / theirs, theirs / ours) < SAME_BUDGET or (verdict == "better") != (ours > theirs):
        return ""
    return (f"{verdict}, but trained on {ours:,} tokens and {one.nearest.name} on {theirs:,}: compare runs of one "
            "length, python -m runs.compare run_1 run_2 --exit-status")


def _lacking(one: Compared, metric: str | None) -> str:
    """What keeps an SAE from being compared in a metric, and what to do, in a line; "" if nothing does."""
    config = one.run.config
    if metric is None:
        return "nothing was measured that could decide: choose an eval with --evals"
    if one.run.means.get(metric) is None:
        return f"{metric} was not measured"
    if one.partner is None:
        return (f"no baseline is stored for {config.get('model')}, layer {config.get('layer')}: compare with a run of "
                "yours, python -m runs.compare run_1 run_2 --exit-status")
    if one.obstacles:
        return "; ".join(one.obstacles)
    name = metric.partition(".")[0]
    if name in one.other_settings:
        settings = [f"{key} {short(ours)} / {short(theirs)}" for key, (ours, theirs) in
                    one.other_settings[name].items()]
        return f"{name} ran with other settings than the baseline's: {', '.join(settings)}"
    if one.partner.means.get(metric) is None:
        return f"{metric} was not measured of the baseline {one.partner.name}"
    if not _at_own_l0(one, metric):
        return _other_l0(one.run, one.source(metric))
    return ""


def _silent(one: Compared, metric: str) -> str:
    """That no standard error is known, in a line; "" where one is."""
    sides = {"the run": one.run, "the baseline": one.source(metric)}
    silent = [side for side, run in sides.items() if run.stderrs.get(metric) is None]
    return f"no standard error of {metric} is known of {' and '.join(silent)}: run several seeds of both"


def _at_own_l0(one: Compared, metric: str) -> bool:
    """Whether the baseline's figure is one at the run's own L0."""
    if one.at_l0 is None:
        return one.equal_l0 is True
    if one.at_l0.means.get(metric) is not None:
        return True
    ours, theirs = l0_of(one.run), l0_of(one.nearest)  # the figure is the nearest SAE's
    return bool(ours and theirs) and abs(math.log(ours / theirs)) < SAME


def _other_l0(run: Run, baseline: Run) -> str:
    ours, theirs = l0_of(run), l0_of(baseline)
    if ours is None or theirs is None:
        of = "the run" if ours is None else f"the baseline {baseline.name}"
        return f"the L0 of {of} was not measured: choose core, or ground_truth, among --evals"
    return (f"no baseline at the run's own L0: {number(ours)}, and {baseline.name} has {number(theirs)}: set k or the "
            "penalty for that L0, or --sweep around it")


def _together(each: dict[str, dict], direction: str) -> dict:
    """The verdict on several SAEs of one run."""
    compared = {name: one for name, one in each.items()
                if one["difference"] is not None and one["verdict"] != "incomparable"}
    suspects = [name for name, one in each.items() if one["verdict"] == "suspect"]
    over = compared or each
    means = {key: _mean([one[key] for one in over.values()]) for key in FIGURES}
    baselines = list(dict.fromkeys(one["baseline"] for one in over.values() if one["baseline"]))
    verdict, why = "within_noise", f"mean over {len(compared)} of {len(each)} SAEs"
    if all(one["verdict"] == "equal_to_baseline" for one in each.values()):
        verdict = "equal_to_baseline"
        why = next(iter(each.values()))["why"]
    elif suspects:
        verdict, why = "suspect", f"{suspects[0]}: {each[suspects[0]]['why']}"
    elif not compared:
        name, one = next(iter(each.items()))
        verdict, why = "incomparable", f"{name}: {one['why']}"
    elif means["difference_stderr"] is None:
        why = "no standard error is known of some SAE: run several seeds of both"
    elif abs(means["difference"]) > 2 * means["difference_stderr"]:
        verdict = "better" if (means["difference"] > 0) == (direction == "higher") else "worse"
    warnings = [f"{name}: {line}" for name, one in each.items() for line in one["warnings"]]
    return dict(verdict=verdict, why=why, baseline=", ".join(baselines) or None, **means, warnings=warnings)


def _mean(values: list[float | None]) -> float | None:
    """Their mean, or None where one is not known."""
    return None if None in values else fmean(values)


# ------------------------------------------------------------------------------------------------ several runs


def sides(runs: list[Run]) -> tuple[list[Run] | None, list[Run]]:
    """(reference, candidate) of several runs: the first and the last, each with its other seeds as one.

    None for a reference where all those are one setting: it is then the baseline's part.
    """
    files: dict[Path, list[Run]] = {}
    for run in runs:
        files.setdefault(run.path, []).append(run)
    kinds = list(files.values())
    first, last = _seeds_of(kinds[0], kinds), kinds[-1]
    if any(last is member for member in first):
        return None, _over_seeds(first)
    others = [kind for kind in kinds if not any(kind is member for member in first)]
    return _over_seeds(first), _over_seeds(_seeds_of(last, others))


def _seeds_of(one: list[Run], files: list[list[Run]]) -> list[list[Run]]:
    """The files that differ from `one` in nothing but the seed, and it; the same seed twice is no second draw."""
    found, taken = [one], {_seed(one)}
    for other in files:
        if _setting(other) == _setting(one) and _seed(other) not in taken:
            found.append(other)
            taken.add(_seed(other))
    return found


def _setting(file: list[Run]) -> str:
    each = [[*(setting_of(run.config, key) for key in seeds.SETTING), code_of(run)] for run in file]
    return json.dumps(sorted(json.dumps(one, sort_keys=True, default=str) for one in each))


def _seed(file: list[Run]) -> object:
    return file[0].config.get("seed")


def _over_seeds(files: list[list[Run]]) -> list[Run]:
    return [mean_run(members) for members in seeds.grouped(run for file in files for run in file).values()]


def mean_run(members: list[Run]) -> Run:
    """Runs that differ in the seed alone as one: means over seeds, and their standard errors.

    √(e² + sd²/n), e the mean of the runs' own errors (all may be measured on the same samples, so that it does not
    fall with n) and sd the deviation over n seeds. Of a metric without own errors sd/√n is all that is known.
    """
    if len(members) == 1:
        return members[0]
    means, stderrs = {}, {}
    for metric in members[0].means:
        values = [run.means.get(metric) for run in members]
        means[metric] = _mean(values)
        if means[metric] is None:
            continue
        own = [run.stderrs.get(metric) for run in members]
        if None not in own:
            stderrs[metric] = math.hypot(fmean(own), stdev(values) / math.sqrt(len(values)))
        elif not any(own) and stdev(values) > 0:
            stderrs[metric] = stdev(values) / math.sqrt(len(values))
    problems = list(dict.fromkeys(line for run in members for line in run.problems))
    config = {key: value for key, value in members[0].config.items() if key != "seed"}
    config["seeds"] = [run.config.get("seed") for run in members]
    name = ", ".join(run.name for run in members)
    mean = replace(members[0], name=name, means=means, stderrs=stderrs, config=config, problems=problems)
    said = {line.partition(":")[0] for line in doubts.warnings(mean)}
    # one dead SAE of three does not show in their mean
    more = [f"{DOUBT}{run.name}: {line}" for run in members for line in doubts.warnings(run)
            if line.partition(":")[0] not in said]
    return replace(mean, problems=problems + more)


def failures(runs: Iterable[Run]) -> list[str]:
    """A line for each run whose folder says that it failed, though it records something."""
    found = []
    for path in dict.fromkeys(run.path for run in runs):
        said = stored(path.parent)
        if path.name == "final_info.json" and said.get("verdict") == "failed":
            found.append(f"{path.parent.name}: {said.get('why')}")
    return found


def costs(run: Run) -> dict:
    """What a run's own verdict.json says of its time, memory and code; {} without one."""
    said = stored(run.path.parent) if run.path.name == "final_info.json" else {}
    return {key: said[key] for key in COSTS if key in said}


def stored(folder: Path) -> dict:
    """verdict.json of a run's folder, or {}."""
    try:
        said = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


# ------------------------------------------------------------------------------------------------ as text


def lines(verdict: dict) -> list[str]:
    """What is printed of a verdict: `---`, its warnings, and a line `key: value` for each key."""
    said = ["---", *(f"warning: {_line(text)}" for text in verdict.get("warnings") or [])]
    for key, value in verdict.items():
        if key != "warnings":
            text = _line(value) if isinstance(value, str) else json.dumps(finite(value), ensure_ascii=False)
            said.append(f"{key}: {text}")
    return said


def _line(text: str) -> str:
    return " ".join(text.split())


def exit_status(verdict: str) -> int:
    """0 better, 1 worse or equal to the baseline, 2 within the noise, 3 whatever says nothing."""
    return EXIT_STATUS.get(verdict, 3)


# ------------------------------------------------------------------------------------------------ lines of code


def lines_changed(file: Path) -> tuple[int, str]:
    """(lines added or removed, name) of the existing variant that is nearest to a file; layout and comments left out.

    Existing are the others of variants/, those stored with the baselines as they ran and, of a variant that comes with
    the project, the file as it was last committed.
    """
    return nearest(variants.text(file), file)[:2]


def nearest(text: bytes, file: Path) -> tuple[int, str, bytes]:
    """(lines changed, name, source) of the existing variant that is nearest to a text, which is or was that file's."""
    mine, best = _code(text), None
    for name, source in _existing(file):
        theirs = _code(source)
        if best is not None and abs(len(mine) - len(theirs)) >= best[0]:  # so many at least
            continue
        same = sum(block.size for block in difflib.SequenceMatcher(None, theirs, mine, False).get_matching_blocks())
        changed = len(mine) + len(theirs) - 2 * same
        if best is None or changed < best[0]:
            best = changed, name, source
    if best is None:
        return len(mine), "", b""
    return best


def _existing(file: Path) -> Iterable[tuple[str, bytes]]:
    """(name, source) of the variants that a file is held against."""
    own = file.resolve()
    committed = _as_committed(own)
    if committed is not None:
        yield own.stem, committed
    beside = map(variants.path, variants.names())
    research = sorted((variants.FOLDER / "research").glob("[!_]*.py"))
    stored = sorted((PROJECT / "runs/baseline").glob("*/*/variant.py"))
    for other in [*beside, *research, *stored]:
        if other.resolve() != own:
            yield (other.parent.name if other.name == "variant.py" else other.stem), other.read_bytes()


def _as_committed(file: Path) -> bytes | None:
    """The last committed text of a variant that comes with the project, or None: a user's own is no model of itself."""
    if file.parent != variants.FOLDER:
        return None
    try:
        own = json.loads((PROJECT / "tests/fixtures/golden.json").read_text(encoding="utf-8"))
        if file.stem not in own:
            return None
        return subprocess.run(["git", "show", f"HEAD:./{file.name}"], cwd=file.parent, capture_output=True, timeout=5,
                              check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):  # no checkout, or one without the tests
        return None


def _code(source: bytes) -> list[str]:
    """The lines of a file as Python writes its statements anew: no layout, no comments and docstrings, and nothing of
    what only starts it as a program. A file that Python cannot read has its own lines.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        lines_of = [line.rstrip() for line in source.decode("utf-8", "replace").splitlines()]
        return [line for line in lines_of if line and not line.lstrip().startswith("#")]
    tree.body = [part for part in tree.body
                 if not (isinstance(part, ast.If) and ast.unparse(part.test) == "__name__ == '__main__'")]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return [line for line in ast.unparse(tree).splitlines() if line]
