"""Compare recorded runs with a baseline and with each other: python -m runs.compare run_1 run_2 … [--baseline X].

A difference counts where it exceeds twice the combined standard error √(se_a² + se_b²); "?" where that is not known:
an eval states no standard error from fewer than five sampling units (evals/common/errors.py), so nothing counts as
beyond it there. Where the baseline has SAEs on both sides of a run's L0, the run is compared with what lies between
them at its own L0. Runs of another model, layer or hook are shown but not compared, nor are evals that ran with other
settings. Where a frozen random decoder is stored for a run's model, the headline metrics in which the run is not
surely better than it are named.

This file judges and returns data (runs/comparison.py); runs/tables.py makes text and tables of it, runs/doubts.py
knows what makes a run's figures doubtful, runs/frontier.py what lies between two SAEs.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import evals
from runs import doubts, exports, frontier, stability, tables
from runs.comparison import HEADLINES, NOT_COMPARED, SETTINGS, UNKNOWN, Compared, Comparison, Floor, Judged, differing
from runs.frontier import Interpolated, l0_of
from runs.reading import RECORDS, Run, canonical, read, setting, slug
from runs.verdict import KEYS, check_headline, costs, exit_status, failures, headline, sides
from runs.verdict import judged as of_sides
from runs.verdict import lines as verdict_lines
from runs.wording import in_a_line

# ------------------------------------------------------------------------------------------------ verdicts


def judge(ours: float, theirs: float, error: float | None, their_error: float | None, direction: str) -> Judged:
    """The difference ours − theirs of a metric, and whether it counts: beyond twice √(error² + their_error²).

    direction: "higher" or "lower" is better; "" for neither. A standard error that is not known is None.
    """
    difference = ours - theirs
    if error is not None and their_error is not None:
        stderr = math.hypot(error, their_error)
        beyond = abs(difference) > 2 * stderr
    else:  # one side's error is a lower bound of both together's: enough for a no, not for a yes
        stderr = their_error if error is None else error
        within = stderr is not None and abs(difference) <= 2 * stderr
        beyond = False if within else None
    if difference == 0:
        return Judged(0.0, stderr, "equal", False)
    word = ""
    if direction:
        word = "better" if (difference > 0) == (direction == "higher") else "worse"
    return Judged(difference, stderr, word, beyond)


def verdict(run: Run, partner: Run, directions: dict[str, str], not_compared: Container[str], metric: str) -> Judged:
    """A metric of the run judged; UNKNOWN where a side lacks it, NOT_COMPARED of the evals named so."""
    ours, theirs = run.means.get(metric), partner.means.get(metric)
    if ours is None or theirs is None:
        return UNKNOWN
    if not_compared and metric.partition(".")[0] in not_compared:
        return NOT_COMPARED
    return judge(ours, theirs, run.stderrs.get(metric), partner.stderrs.get(metric), directions.get(metric, ""))


# final losses and their terms are sums of different things in different variants: no direction
TRAINING = {"training.final_loss": "", "training.l0": "", "training.explained_variance": "higher",
            "training.dead_share": "lower", "training.frac_alive": "higher"}


def directions() -> dict[str, str]:
    """{metric: "higher" | "lower" | ""} of every eval's declared metrics and of training's; others have none."""
    known = dict(TRAINING)
    for name in evals.names():
        known |= {f"{name}.{metric}": way for metric, way in (evals.declared(name, "METRICS") or {}).items()}
    return known


def judged(runs: Iterable[Run] | dict, baseline: Iterable[Run] | dict | None,
           directions: dict[str, str]) -> list[Comparison]:
    """Every run judged against the baseline, by model, layer and hook; both may be what `read` returns.

    Without a stored baseline the runs of the first file stand for it.
    """
    stored, groups = _listed(baseline), defaultdict(list)
    for run in _listed(runs):
        groups[identity(run.config)].append(run)
    matched = {key: [b for b in stored if identity(b.config) == key] for key in groups}
    found = []
    for key, members in groups.items():
        references, stand_ins = matched[key], []
        if not references and not any(matched.values()):
            references = stored  # of another model, layer or hook: shown, and said not to be comparable
        if not references and any(run.path != members[0].path for run in members):
            references = stand_ins = [run for run in members if run.path == members[0].path]
            members = [run for run in members if run.path != members[0].path]
        saes = frontier_for(members, references)
        random = stored_random(key, members[0].config)
        add = partial(_compared, references=references, saes=saes, directions=directions, decoders=random.get(FROZEN))
        same = doubts.twins(members) if len(members) > 1 else [None]
        found.append(Comparison(
            identity=key, references=references, frontier=saes, directions=directions, random=random,
            saes=[add(run, twin=twin) for run, twin in zip(members, same)],
            stand_ins=[add(run) for run in stand_ins]))
    return found


def _compared(run: Run, references: list[Run], saes: list[Run], directions: dict[str, str],
              decoders: list[Run] | None = None, twin: int | None = None) -> Compared:
    """A run beside the nearest of the references and what their frontier `saes` reaches at its own L0."""
    l0 = l0_of(run)
    nearest = min(references, key=lambda reference: abs((l0_of(reference) or 0) - (l0 or 0)), default=None)
    at_l0 = frontier.at(l0, saes)
    partner = _completed(at_l0, nearest)
    floor = beside_random(run, decoders or [], directions)
    if partner is None:
        return Compared(run=run, nearest=None, at_l0=None, partner=None, equal_l0=None, obstacles=[], other_settings={},
                        differs={}, warnings=doubts.warnings(run), twin=twin, floor=floor,
                        judged=lambda metric: UNKNOWN, new=lambda: None)
    why, settings = obstacles(run, partner)
    not_compared = {metric.partition(".")[0] for metric in run.means} if why else settings
    equal_l0 = _equal_l0(l0, l0_of(partner), frontier.SAME if saes else NEAR)
    return Compared(run=run, nearest=nearest, at_l0=at_l0, partner=partner, equal_l0=equal_l0, obstacles=why,
                    other_settings=settings, differs=differing(run, partner), warnings=doubts.warnings(run, nearest),
                    twin=twin, floor=floor, judged=partial(verdict, run, partner, directions, not_compared),
                    new=partial(_new_features, run, references))


def _new_features(run: Run, references: list[Run]) -> stability.New | None:
    same = [reference for reference in references if identity(reference.config) == identity(run.config)]
    return stability.new_features(run, same)


def _equal_l0(ours: float | None, theirs: float | None, share: float) -> bool | None:
    if ours is None or theirs is None:
        return None
    if not ours or not theirs:
        return ours == theirs
    return max(ours / theirs, theirs / ours) < 1 + share


# ------------------------------------------------------------------------------------------------ the random line

FROZEN = "frozen_decoder"  # decoders that stay as they were drawn (arXiv 2602.14111)
# {name under runs/baseline/<model>/: in words}
RANDOM = {FROZEN: "frozen random decoder", "untrained": "untrained SAE"}


def beside_random(run: Run, decoders: list[Run], directions: dict[str, str]) -> Floor | None:
    """What the frozen decoders of the run's width reach at its L0, and in which headline metrics it is not better.

    Not better: the other way, equal, or within two standard errors. A difference for the better whose standard error
    is not known is no evidence either way, and not listed. A frozen decoder is not held against itself.
    """
    fitting = [one for one in decoders if one.config.get("d_sae") == run.config.get("d_sae") and l0_of(one)]
    found = frontier.near(l0_of(run), frontier_for([run], fitting) or fitting[:1])
    if found is None or run.config.get("variant") == FROZEN:
        return None
    why, settings = obstacles(run, found)
    if why:
        return None
    means = {metric: value for metric, value in found.means.items() if metric.partition(".")[0] not in settings}
    floor = replace(found, means=means)
    against = {metric: verdict(run, floor, directions, (), metric) for metric in HEADLINES if directions.get(metric)}
    not_better = {metric: judged for metric, judged in against.items()
                  if judged.difference is not None and (judged.verdict != "better" or judged.beyond is False)}
    own = isinstance(found, Interpolated) or abs(math.log(l0_of(found) / l0_of(run))) < frontier.SAME
    return Floor(floor, own, not_better)


def stored_random(key: tuple, config: dict) -> dict[str, list[Run]]:
    """{name of RANDOM: its stored SAEs} of a model, layer and hook."""
    folders = {name: BASELINES / slug(config.get("model", "")) / name for name in RANDOM if config.get("model")}
    found = {name: [one for one in _with_frontier(folder) if identity(one.config) == key]
             for name, folder in folders.items() if _files(folder)}
    return {name: saes for name, saes in found.items() if saes}


# ------------------------------------------------------------------------------------------------ what with

IDENTITY = ("model", "layer", "hook_name")
# settings of an eval that do not change what it measures; a seed's effect is what the standard error is about
NO_MATTER = re.compile(r"verbose|llm_batch_size|sae_batch_size|lower_vram_usage|device|model_name|(random_)?seed|"
                       r"compute_.*")
NEAR = 0.1  # L0 of a run and of a lone baseline that differ by less than this share count as equal


def identity(config: dict) -> tuple:
    """Model, layer and hook: runs that agree in them can be compared.

    The hook follows from the layer where it is not given.
    """
    hook = config.get("hook_name") or f"blocks.{config.get('layer')}.hook_resid_post"
    return slug(config.get("model", "")), config.get("layer"), hook


def obstacles(run: Run, baseline: Run) -> tuple[list[str], dict[str, dict[str, tuple]]]:
    """Why nothing can be compared (lines), and {eval: {setting: both values}} for evals that ran with other ones."""
    sides = zip(IDENTITY, identity(run.config), identity(baseline.config))
    why = [f"{key} {a} / {b}" for key, a, b in sides if a != b]
    if len(why) > 1 and run.config.get("layer") != baseline.config.get("layer"):
        why = [line for line in why if not line.startswith("hook_name")]  # it names the layer once more
    for side in (run, baseline):
        why += [f"the {key} of {side.name} is uncertain" for key in IDENTITY if key in side.config.get("disagree", {})]
    ours, theirs = (side.config.get("evals") for side in (run, baseline))
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return why, {}
    settings = {}
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        different = sorted(k for k in a.keys() & b.keys() if a[k] != b[k] and not NO_MATTER.fullmatch(k))
        if different:
            settings[canonical(name)] = {k: (a[k], b[k]) for k in different}
    return why, settings


def families(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of one variant that differ in hyper-parameters and seed alone; one of no known variant is alone."""
    found: list[list[Run]] = []
    for run in runs:
        family = next((f for f in found if _related(run, f[0])), None)
        if family is None:
            found.append([run])
        else:
            family.append(run)
    return found


def _related(a: Run, b: Run) -> bool:
    same = (setting(a.config, key) == setting(b.config, key) for key in SETTINGS if key not in ("hyper", "seed"))
    return (bool(a.config.get("variant")) and all(same) and identity(a.config) == identity(b.config)
            and obstacles(a, b) == ([], {}))


def frontier_for(runs: list[Run], references: list[Run]) -> list[Run]:
    """The family of references, of at least two L0, around the L0 of the most runs; [] if there is none."""
    same = [r for r in references if (l0_of(r) or 0) > 0 and identity(r.config) == identity(runs[0].config)]
    several = [saes for saes in families(same) if len({l0_of(sae) for sae in saes}) > 1]
    return max(several, key=lambda saes: sum(frontier.spans(l0_of(run), saes) for run in runs), default=[])


def _completed(partner: Run | None, near: Run | None) -> Run | None:
    """The figures at a run's own L0; evals that the SAEs on either side lack are the nearest SAE's, at its L0."""
    if not isinstance(partner, Interpolated) or near is None:
        return partner or near
    settings = near.config.get("evals", {}) | partner.config.get("evals", {})
    evals_lacking = settings.keys() - {metric.partition(".")[0] for metric in partner.means}
    lacking = {metric: near.means[metric] for metric in near.means.keys() - partner.means.keys()
               if metric.partition(".")[0] in evals_lacking}
    stderrs = {metric: near.stderrs[metric] for metric in lacking if metric in near.stderrs}
    return replace(partner, means=partner.means | lacking, stderrs=partner.stderrs | stderrs,
                   config=partner.config | {"evals": settings})


def _listed(runs: Iterable[Run] | dict | None) -> list[Run]:
    return list(runs.values() if isinstance(runs, dict) else runs or ())


# ------------------------------------------------------------------------------------------------ stored baselines

BASELINES = Path(__file__).resolve().parent / "baseline"
# {model: {width: what its runs are compared with by default, of the nearest width}}; `standard` of every other model
DEFAULTS = {"gemma-2-2b": {16_384: "published_500M_batch_topk_16k", 65_536: "published_500M_batch_topk_65k"},
            "synth16k": {4_096: "published_batch_topk"}}


def baseline_for(config: dict, name: str | None = None) -> Path | None:
    """The folder of the stored baseline of that name, or the default one, for the model of a run's config, or None."""
    if not config.get("model"):
        return None
    model = slug(config["model"])
    folder = BASELINES / model / (name or _default(model, config.get("d_sae")))
    return folder if _files(folder) else None


def _default(model: str, width: int | None) -> str:
    """What runs of a model are compared with unless another baseline is asked for; of several the nearest in width."""
    by_width = DEFAULTS.get(model)
    if by_width is None:
        return "standard"
    return by_width[min(by_width, key=lambda known: abs(math.log(known / (width or known))))]


def stored_baselines(runs: Iterable[Run] | dict, asked: str | None = None) -> list[Run]:
    """The baseline asked for by path or name, else the default one of each model among the runs. FileNotFoundError."""
    runs = _listed(runs)
    if asked and Path(asked).exists():
        return _with_frontier(Path(asked))
    if asked and "/" in asked:
        folders = {BASELINES / asked}
    else:
        folders = {baseline_for(run.config, asked) for run in runs} - {None}
    folders = sorted(folder for folder in folders if _files(folder))
    if asked and not folders:
        raise FileNotFoundError(f"no baseline named {asked!r}{_nearest(asked, _baseline_names(asked, runs))}")
    return [run for folder in folders for run in _with_frontier(folder)]


def _baseline_names(asked: str, runs: list[Run]) -> list[str]:
    """What can be asked for: names among the runs' own models, else, and for a name with a model, all with theirs."""
    stored = sorted(folder for folder in BASELINES.glob("*/*") if _files(folder))
    models = {slug(run.config.get("model", "")) for run in runs}
    own = [path.name for path in stored if path.parent.name in models]
    if own and "/" not in asked:
        return own
    return [path.relative_to(BASELINES).as_posix() for path in stored]


def _with_frontier(path: Path) -> list[Run]:
    """The runs of a file, or of a folder's final_info.json and frontier.json, of which a baseline may lack one."""
    return [run for file in _files(path) or [path] for run in read(file).values()]


def _files(folder: Path) -> list[Path]:
    """What a stored baseline's folder holds of runs."""
    return [folder / name for name in RECORDS if (folder / name).is_file()]


# ------------------------------------------------------------------------------------------------ command line


def compare(runs: Iterable[Run] | dict, baseline: Iterable[Run] | dict | None, directions: dict[str, str],
            everything: bool = False) -> str:
    """The comparison as text of up to 100 columns for one run. `runs` and `baseline` may be what `read` returns."""
    return _laid_out(judged(runs, baseline, directions), everything, tables.as_text)


def _laid_out(comparisons: list[Comparison], everything: bool, form: Callable[[tables.Table], str]) -> str:
    return "\n\n".join(form(table) for table in tables.laid_out(comparisons, everything))


def of_run(path: str | Path) -> list[Comparison]:
    """The run of that folder judged against the stored default baseline of its model."""
    sections = read(path)
    return judged(sections, stored_baselines(sections), directions())


def in_words(comparisons: list[Comparison]) -> str:
    """What a run prints at its end."""
    return _laid_out(comparisons, False, tables.as_text)


def summary(path: str | Path) -> str:
    """The same of a run's folder."""
    return in_words(of_run(path))


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if something was compared, 1 with one line on stderr if not.

    With --exit-status the verdict's (runs/verdict.py): 0 better, 1 not, 2 within the noise, 3 for all else.
    """
    argv = sys.argv[1:] if argv is None else argv
    nothing = 3 if "--exit-status" in argv else 1
    try:
        return _main(argv)
    # the reader, head for one, has gone: nothing to say, not even when Python flushes at its end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return nothing
    except (ValueError, OSError) as error:
        print(in_a_line(error), file=sys.stderr)
        return nothing


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        wrong = re.search(r"unrecognized arguments: (\S+)", message)
        near = wrong and difflib.get_close_matches(wrong[1].split("=")[0], flags, 1, 0)
        raise ValueError(f"unknown argument {wrong[1]}; the nearest is {near[0]}" if near else message)


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m runs.compare", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="run", help="run folder, or any JSON file that records runs")
    parser.add_argument("--baseline", help="a stored baseline's name (standard, gemma-2-2b/topk) or a path; "
                                           "default: that of the runs' own model, see runs/baseline/README.md")
    parser.add_argument("--all", action="store_true", help="every metric")
    parser.add_argument("--csv", action="store_true", help="one line per run and metric, in full precision")
    parser.add_argument("--json", action="store_true", help="all that is known, in full precision, for programs")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    parser.add_argument("--exit-status", action="store_true",
                        help="also one verdict, on the last run against the first (alone, or with --baseline, against "
                             "the baseline), other seeds of either with it: 0 better, 1 not, 2 more seeds needed, 3 "
                             "not comparable")
    parser.add_argument("--headline", help="the metric that decides; default: core.ce_loss_score, or ground_truth.f1")
    options = parser.parse_args(argv)
    known = directions()
    check_headline(options.headline, known)

    if options.exit_status and 1 == len({Path(name).resolve() for name in options.runs}) < len(options.runs):
        raise ValueError(f"{options.runs[0]} is given {len(options.runs)} times: there is nothing to compare it with")
    runs, unreadable = _read_all(options.runs)
    for line in unreadable:
        print(f"left out: {line}", file=sys.stderr)
    comparisons = judged(runs, stored_baselines(runs, options.baseline), known)
    said = {}
    if options.json or options.exit_status:
        said = ruling(runs, unreadable, options.baseline, options.headline, known)
    if options.json:
        print(exports.as_json(comparisons, unreadable, said))
    elif options.csv:
        print(exports.as_csv(comparisons))
    else:
        print(_laid_out(comparisons, options.all, tables.as_markdown if options.markdown else tables.as_text))
        if said and not options.markdown:
            print("\n".join(verdict_lines(said)))
    return exit_status(said["verdict"]) if options.exit_status else 0


def ruling(runs: list[Run], unreadable: list[str], asked: str | None, metric: str | None, directions: dict[str, str],
           ) -> dict:
    """One verdict, as verdict.json holds it: the last run, with its other seeds, against the first, with its own.

    Against the baseline where one is `asked` for, or all runs are one setting. `unreadable`: lines on runs that cannot
    be read. What is known of the last run's cost is taken from its own verdict.json.
    """
    references, candidates = sides(runs)
    if asked or references is None:
        references = stored_baselines(candidates, asked)
    else:  # of a stored baseline the error is that of another seed already
        references, candidates = ([beside_seeds(run) for run in side] for side in (references, candidates))
    found = of_sides(judged(candidates, references, directions), headline(metric, candidates))
    failed = unreadable + failures(runs)
    if failed:
        found = dict(verdict="failed", why=failed[0], metric=found["metric"], warnings=[])
    last = candidates[-1]
    facts = costs(runs[-1]) | found | dict(run=last.name, variant=last.config.get("variant"),
                                           model=slug(last.config.get("model") or "") or None,
                                           seed=last.config.get("seed"))
    saes = {"saes": found["saes"]} if "saes" in found else {}
    return {key: facts.get(key) for key in KEYS} | saes


def beside_seeds(run: Run) -> Run:
    """The run, with what another seed would give in its errors, as far as stored baselines of its model know that.

    They hold means over seeds, with the standard deviation of one; of the variants at the L0 nearest to the run's, the
    root mean square. One seed's error is √(e² + sd²); that of n ≥ 2 is at least sd/√n, since two may lie together by
    chance.
    """
    n = len(run.config.get("seeds") or [0])
    stderrs = dict(run.stderrs)
    for metric, spread in _spreads(identity(run.config), l0_of(run)).items():
        if run.means.get(metric) is not None:
            own = stderrs.get(metric, 0.0)
            stderrs[metric] = math.hypot(own, spread) if n == 1 else max(own, spread / math.sqrt(n))
    return replace(run, stderrs=stderrs)


def _spreads(key: tuple, l0: float | None) -> dict[str, float]:
    """{metric: what a seed alone makes of it} by the stored baselines of a model, layer and hook."""
    nearest = []
    learned = [folder for folder in sorted((BASELINES / key[0]).glob("*")) if folder.name not in RANDOM]
    for folder in filter(_files, learned if l0 else ()):
        same = [sae for sae in _with_frontier(folder) if identity(sae.config) == key]
        same = [sae for sae in same if sae.config.get("seeds") and l0_of(sae)]
        nearest += sorted(same, key=lambda sae: abs(math.log(l0_of(sae) / l0)))[:1]
    found = defaultdict(list)
    for sae in nearest:
        for metric, deviation in sae.stderrs.items():
            found[metric].append(deviation)
    return {metric: math.sqrt(sum(d * d for d in known) / len(known)) for metric, known in found.items()}


def _read_all(names: list[str]) -> tuple[list[Run], list[str]]:
    """The runs, and a line for each place without one; FileNotFoundError, ValueError where nothing can be read."""
    runs, unreadable = [], []
    for name in _once(names):
        if not Path(name).exists():
            raise FileNotFoundError(f"no run named {name!r}" + _nearest(Path(name).name, _neighbours(Path(name))))
        try:
            runs += read(name).values()
        except (ValueError, OSError) as error:
            unreadable.append(in_a_line(error))
    if not runs:
        raise ValueError("; ".join(unreadable))
    return runs, unreadable


def _once(names: list[str]) -> list[str]:
    """The names without those of places that an earlier one names, too."""
    places: dict[Path, str] = {}
    for name in names:
        places.setdefault(Path(name).resolve(), name)
    return list(places.values())


def _neighbours(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return sorted(p.name for p in path.parent.iterdir() if p.suffix == ".json" or (p / "final_info.json").is_file())


def _nearest(wrong: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wrong, names, 1, 0)
    return f"; the nearest is {near[0]!r}" if near else "; there are none here"


if __name__ == "__main__":
    sys.exit(main())
