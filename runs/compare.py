"""Compare recorded runs with a baseline and with each other: python -m runs.compare run_1 run_2 … [--baseline
NAME_OR_PATH].

A difference counts where it exceeds twice the combined standard error √(se_a² + se_b²); "?" where that is not known:
an eval states no standard error from fewer than five sampling units (evals/common/errors.py), so nothing counts as
beyond it there. Where the baseline has SAEs on both sides of a run's L0, the run is compared with what lies between
them at its own L0. Runs of another model, layer or hook are shown but not compared, nor are evals that ran with other
settings.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import functools
import io
import math
import os
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import evals
from runs import frontier
from runs.frontier import Interpolated
from runs.reading import Run, canonical, file_label, read, slug

BASELINES = Path(__file__).resolve().parent / "baseline"
HEADLINE = ("ce_loss_score", "kl_div_score", "r2", "explained_variance", "l0", "frac_alive", "sae_top_1_test_accuracy",
            "sae_top_2_test_accuracy", "sae_top_5_test_accuracy", "sae_test_accuracy", "sae_top_1_minus_llm_top_1",
            "mean_absorption_fraction_score", "mean_absorption_score", "scr_metric_threshold_10",
            "tpp_threshold_10_total_metric", "autointerp_score", "unlearning_score", "text_unlearning_precision",
            "disentanglement_score")
HEADLINE_LINES = 13
BY_RUN = ("core.l0", "core.ce_loss_score", "core.r2", "sparse_probing.sae_top_1", "core.frac_alive",
          "core.explained_variance")
WIDTH = 100  # columns of printed text
DOUBT = "doubtful: "  # begins a problem of a run that concerns all its figures
MARKS = "* by more than 2 standard errors, ? standard error unknown"
# of the table by L0: metrics and rows at most, characters of an SAE's name
BY_L0_METRICS, BY_L0_ROWS, BY_L0_NAME = 6, 36, 30
# final losses and their terms are sums of different things in different variants: no direction
TRAINING = {"training.final_loss": "", "training.l0": "", "training.explained_variance": "higher",
            "training.dead_share": "lower", "training.frac_alive": "higher"}
IDENTITY = ("model", "layer", "hook_name")
SHOWN = {"variant": (), "hyper": (), "d_sae": (), "context": ("context_size", "context_length"), "dataset": (),
         "keep_bos": (),
         # {key: its former names}
         "dtype": (), "num_tokens": ("tokens",), "passes": (), "batch_size": (), "lr": (), "seed": ()}
ACCURACY = re.compile(r"\.sae_(top_\d+_|val_selected_)?test_accuracy")
# settings of an eval that do not change what it measures; a seed's effect is what the standard error is about
NO_MATTER = re.compile(r"verbose|llm_batch_size|sae_batch_size|lower_vram_usage|device|model_name|(random_)?seed|compute_.*")
# counts over counts, which two SAEs can share by chance
COUNTED = re.compile(r"frac_alive$|freq_over_|dead_share$")
# what depends on the language model and the texts alone, and so is equal in every run
LM_ONLY = re.compile(r"\.llm_|with_ablation$|ce_loss_without_sae$|l2_norm_in$|total_tokens|mean_probe_f1$|num_letters$|"
                     r"duplicated_test_share$|^training\.(steps?|tokens)$")

# what no SAE's figure can be: {leaf of a metric: (least, most)}; the CE loss score alone can, and says then that
# ablation is no worse
BOUNDS = {"r2": (-math.inf, 1), "explained_variance": (-math.inf, 1), "cossim": (-1, 1), "frac_alive": (0, 1)}
TOP_K = ("topk", "batch_topk", "matryoshka_batch_topk")  # variants whose k is the L0 that is asked for

# ------------------------------------------------------------------------------------------------ what is known


def directions() -> dict[str, str]:
    """{metric: "higher" | "lower" | ""} of every eval's declared metrics and of training's;
    what is missing has no direction.
    """
    known = dict(TRAINING)
    for name in evals.names():
        known |= {f"{name}.{metric}": way for metric, way in (evals.declared(name, "METRICS") or {}).items()}
    return known


def baseline_for(config: dict, name: str = "standard") -> Path | None:
    """The stored baseline of that name for the model of a run's config, or None."""
    path = BASELINES / slug(config.get("model", "")) / name / "final_info.json"
    return path if config.get("model") and path.is_file() else None


def warnings(run: Run, baseline: Run | None = None) -> list[str]:
    """What makes a run's figures doubtful, one line each;
    with a baseline also what looks like the baseline's own figures.
    """
    found, l0, width = [], _leaf(run, "l0"), run.config.get("d_sae")
    alive = _leaf(run, "frac_alive")
    if l0 == 0 or alive == 0:
        found.append(f"dead SAE: {'L0 = 0' if l0 == 0 else 'frac_alive = 0'}, no feature ever fires")
    elif alive is not None and alive < 0.1:
        found.append(f"nearly dead SAE: only {alive:.1%} of its features ever fire")
    if l0 is not None and width and l0 > width / 10:
        found.append(f"not sparse: L0 = {number(l0)} is more than a tenth of its {width:,} features")
    if run.config.get("dense"):
        found.append(f"a dense code: {run.config['dense']:.0%} of its features are active on the average token; "
                     "verdicts are marked")
    found += [problem.removeprefix(DOUBT) for problem in run.problems if problem.startswith(DOUBT)]
    found += _poor(run) + _off_target(run, l0)
    accuracies = {m: v for m, v in run.means.items() if v is not None and _is_accuracy(m)}
    chance = [m for m, v in accuracies.items() if v <= 0.5 + max(0.005, 2 * run.stderrs.get(m, 0.0))]
    if chance:
        found.append(f"probing at chance (.5) in {len(chance)} of {len(accuracies)} accuracies of the SAE: "
                     f"{_listing(chance)}")
    steps = run.config.get("steps", run.means.get("training.steps"))
    tokens = _get(run.config, "num_tokens")
    if run.config.get("init_from"):  # trained elsewhere; how, its own record says
        pass
    elif steps == 0:
        found.append("untrained: 0 training steps")
    # SAEBench's custom SAEs say -100000 even if trained
    elif steps is None and isinstance(tokens, (int, float)) and tokens <= 0:
        found.append(f"no sign of training: {tokens} training tokens and no number of steps")
    for key, places in run.config.get("disagree", {}).items():
        by_value = defaultdict(list)
        for where, value in places.items():
            by_value[value].append(where)
        found.append(f"metadata disagree on the {key}: " + ", ".join(f"{v} ({', '.join(w)})"
                                                                     for v, w in by_value.items()))
    if baseline is not None and baseline.path != run.path:
        same, of = _identical(run, baseline)
        if len(same) == of > 1:
            found.append(f"all {of} SAE metrics equal those of {baseline.name} to the last digit: the change had no "
                         "effect")
        elif same:
            found.append(f"equal to {baseline.name} to the last digit: {_listing(same)}")
    return found


def _poor(run: Run) -> list[str]:
    """What says that the SAE reconstructs worse than no SAE would, and figures that cannot be."""
    found, r2, score = [], _leaf(run, "r2"), _leaf(run, "ce_loss_score")
    if r2 is not None and r2 < 0:
        found.append(f"R² = {number(r2)} is below 0: the mean activation reconstructs better than the SAE")
    if score is not None and score < 0:
        found.append(f"CE loss score = {number(score)} is below 0: the model predicts worse with the SAE than with "
                     "zeros in its place")
    room = 2 * run.stderrs.get("core.ce_loss_score", 0.0)
    if score is not None and score > 1 + room:
        found.append(f"CE loss score = {number(score)} is above 1: the model predicts better with the SAE than without")
    for metric, value in run.means.items():
        least, most = (0, 1) if _is_accuracy(metric) else BOUNDS.get(metric.removeprefix("core."),
                                                                     (-math.inf, math.inf))
        if value is not None and not least - 1e-6 <= value <= most + 1e-6:
            found.append(f"impossible: {metric} = {number(value)} lies outside {least} to {most}")
    return found


def _off_target(run: Run, l0: float | None) -> list[str]:
    """A measured L0 that is less than half, or more than one and a half times, the one the variant was to reach."""
    hyper = run.config.get("hyper") or {}
    key = "k" if run.config.get("variant") in TOP_K else "target_l0"
    wanted, evaluated_only = hyper.get(key), run.config.get("init_from") and not run.config.get("steps")
    if not isinstance(wanted, (int, float)) or wanted <= 0 or not l0 or evaluated_only or 0.5 <= l0 / wanted <= 1.5:
        return []
    return [f"L0 = {number(l0)} is far from {key} = {wanted}, which was asked for"]


def _identical(run: Run, other: Run) -> tuple[list[str], int]:
    """Metrics of the SAE with equal values that can hardly be equal by chance,
    and the number of those both sides have.
    """
    both = [m for m, v in run.means.items() if _telling(m, v) and other.means.get(m) is not None]
    return [m for m in both if run.means[m] == other.means[m]], len(both)


def _telling(metric: str, value: float | None) -> bool:
    """Whether equality would tell anything: of the SAE, no count,
    and with more than the 8 significant bits of a bfloat16.
    """
    return isinstance(value, float) and not _by_nature(metric) and not (math.frexp(value)[0] * 256).is_integer()


@functools.cache  # the same few hundred names in every run
def _by_nature(metric: str) -> bool:
    """Whether a metric is equal in two SAEs for other reasons than that they are one."""
    return bool(LM_ONLY.search(metric) or COUNTED.search(metric))


@functools.cache
def _is_accuracy(metric: str) -> bool:
    return bool(ACCURACY.search(metric))


def _leaf(run: Run, name: str) -> float | None:
    """A core metric by its last name."""
    return run.means.get(f"core.{name}")


def _get(config: dict, key: str):
    """A setting under its present or a former name."""
    return next((config[name] for name in (key, *SHOWN.get(key, ())) if config.get(name) is not None), None)


def _listing(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stored_baselines(runs: Iterable[Run] | dict, asked: str | None = None) -> list[Run]:
    """The baseline asked for by path or name, else the standard one of each model among the runs. FileNotFoundError."""
    runs = _listed(runs)
    if asked and Path(asked).exists():
        return _with_frontier(Path(asked))
    if asked and "/" in asked:
        paths = {BASELINES / asked / "final_info.json"}
    else:
        paths = {baseline_for(run.config, asked or "standard") for run in runs} - {None}
    paths = sorted(path for path in paths if path.is_file())
    if asked and not paths:
        models = {slug(run.config.get("model", "")) for run in runs}
        stored = sorted(p.parent for p in BASELINES.glob("*/*/final_info.json"))
        names = [p.name for p in stored if p.parent.name in models] if "/" not in asked else []
        names = names or [p.relative_to(BASELINES).as_posix() for p in stored]
        raise FileNotFoundError(f"no baseline named {asked!r}{_nearest(asked, names)}")
    return [run for path in paths for run in _with_frontier(path.parent)]


def _with_frontier(path: Path) -> list[Run]:
    """The runs of a file, or of a folder's final_info.json and, where a baseline has one,
    its frontier.json beside it.
    """
    return [run for file in (path, path / "frontier.json") if file == path or file.is_file()
            for run in read(file).values()]


# ------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class Judged:
    """One metric of one run against the baseline's: `verdict` better, worse, equal or "";
    `beyond` two standard errors.
    """

    difference: float | None = None
    verdict: str = ""
    beyond: str = ""  # yes, no, ? (standard error unknown)


def judge(metric: str, run: Run, baseline: Run | None, direction: str) -> Judged:
    """The difference run − baseline of a metric that both have; empty where one lacks it."""
    a, b = run.means.get(metric), baseline and baseline.means.get(metric)
    if a is None or b is None:
        return Judged()
    difference = a - b
    if difference == 0:
        return Judged(0.0, "equal", "no")
    verdict = "" if not direction else "better" if (difference > 0) == (direction == "higher") else "worse"
    verdict += " (dense)" if verdict and run.config.get("dense") else ""
    errors = [side.stderrs[metric] for side in (run, baseline) if side.stderrs.get(metric) is not None]
    beyond = "yes" if errors and abs(difference) > 2 * math.hypot(*errors) else "no"
    # one side's error is a lower bound: enough for a no, not for a yes
    if not errors or (len(errors) == 1 and beyond == "yes"):
        beyond = "?"
    return Judged(difference, verdict, beyond)


def identity(config: dict) -> tuple:
    """Model, layer and hook: runs that agree in them can be compared.
    The hook follows from the layer where it is not given.
    """
    hook = config.get("hook_name") or f"blocks.{config.get('layer')}.hook_resid_post"
    return slug(config.get("model", "")), config.get("layer"), hook


def obstacles(run: Run, baseline: Run) -> tuple[list[str], dict[str, str]]:
    """Why nothing can be compared (lines), and {eval: why} for single evals that ran with other settings."""
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
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        different = sorted(k for k in a.keys() & b.keys() if a[k] != b[k] and not NO_MATTER.fullmatch(k))
        if different:
            settings[canonical(name)] = ", ".join(f"{k} {_short(a[k])} / {_short(b[k])}" for k in different)
    return why, settings


def _short(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return f"{len(value)} items" if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------------------ tables


@dataclass
class Table:
    """Lines that stand above, a header, rows of cells (the first `left` columns aligned left), lines below."""

    above: list[str]
    header: list[str]
    rows: list[list[str]]
    below: list[str]
    left: int = 1


def tables(runs: Iterable[Run] | dict, baseline: Iterable[Run] | dict | None, directions: dict[str, str],
           everything: bool = False) -> list[Table]:
    """One table per model, layer and hook: by metric for up to three runs, else one row per run; a sweep is sorted by
    L0.

    Where the baseline has SAEs around the L0 of a run, it is judged at equal L0: of several runs per metric one row per
    run.
    """
    built = []
    for compared, references, above in _groups(_listed(runs), _listed(baseline)):
        sweep = len({run.path for run in compared}) < len(compared)
        saes = frontier_for(compared, references)
        around = any(frontier.at(_leaf(run, "l0"), saes) for run in compared)
        if around and 1 < len(compared) <= BY_L0_ROWS // 2:
            built.append(_by_l0(compared, references, saes, directions, above, everything))
        elif sweep or len(compared) > 3:
            built.append(_by_run(compared, references, saes, directions, above, sweep))
        else:
            built.append(_by_metric(compared, references, saes, directions, above, everything))
    return built


def families(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of one variant that differ in hyper-parameters and seed alone belong together;
    each without a known variant is alone.
    """
    found: list[list[Run]] = []
    for run in runs:
        family = next((f for f in found if _related(run, f[0])), None)
        found.append([run]) if family is None else family.append(run)
    return found


def _related(a: Run, b: Run) -> bool:
    same = (_get(a.config, key) == _get(b.config, key) for key in SHOWN if key not in ("hyper", "seed"))
    return (bool(a.config.get("variant")) and all(same) and identity(a.config) == identity(b.config)
            and obstacles(a, b) == ([], {}))


def frontier_for(runs: list[Run], references: list[Run]) -> list[Run]:
    """The family of references, of at least two L0, around the L0 of the most runs; [] if there is none."""
    same = [r for r in references if (_leaf(r, "l0") or 0) > 0 and identity(r.config) == identity(runs[0].config)]
    several = [saes for saes in families(same) if len({_leaf(sae, "l0") for sae in saes}) > 1]
    return max(several, key=lambda saes: sum(frontier.at(_leaf(run, "l0"), saes) is not None for run in runs),
               default=[])


def _groups(runs: list[Run], stored: list[Run]) -> list[tuple[list[Run], list[Run], list[str]]]:
    """(runs to compare, what with, lines to say) per model, layer and hook.
    Without any baseline the first run stands for it.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[identity(run.config)].append(run)
    matched = {key: [b for b in stored if identity(b.config) == key] for key in groups}
    found = []
    for key, members in groups.items():
        references = matched[key] or ([] if any(matched.values()) else stored)
        others = [run for run in members if run.path != members[0].path]
        if references or not others:
            found.append((members, references, []))
        else:
            first = [run for run in members if run.path == members[0].path]
            found.append((others, first, [f"no stored baseline for {key[0] or 'this model'}: "
                                          f"{file_label(first[0].path)} stands for it",
                                          *(f"warning: {run.name}: {line}" for run in first
                                            for line in warnings(run))]))
    return found


def _listed(runs: Iterable[Run] | dict | None) -> list[Run]:
    return list(runs.values() if isinstance(runs, dict) else runs or ())


def _partner(run: Run, references: list[Run]) -> Run | None:
    """The reference to compare with: of several, the one with the nearest L0."""
    l0 = _leaf(run, "l0") or 0
    return min(references, key=lambda b: abs((_leaf(b, "l0") or 0) - l0), default=None)


def _by_metric(runs: list[Run], references: list[Run], saes: list[Run], known: dict[str, str], above: list[str],
               everything: bool) -> Table:
    nearest = [_partner(run, references) for run in runs]
    partners = [_completed(frontier.at(_leaf(run, "l0"), saes), near) for run, near in zip(runs, nearest)]
    distinct = list({id(p): p for p in partners if p}.values())
    above, several, blocked, skipped = list(above), len(runs) > 1, [], []
    above += [f"baseline: {_described(p)}" for p in distinct]
    for run, partner in zip(runs, partners):
        why, settings = obstacles(run, partner) if partner else ([], {})
        blocked.append(bool(why) or partner is None)
        skipped.append(settings)
        of = f"{run.name}: " if several else ""
        if why:
            above.append(f"not compared: {of}{'; '.join(why)}")
        elif partner and (other := _other_l0(run, partner, saes)):
            above.append(of + other)
        above += [f"not compared: {of}{name} ({reason})" for name, reason in sorted(settings.items())]
        if partner and (differs := _differences(run, partner)):
            above.append(f"differs: {of}{differs}")
    above += [f"warning: {line}" for line in (_noted(runs, nearest) if several else warnings(runs[0], nearest[0]))]

    header = ["metric", *(["baseline"] if len(distinct) == 1 else [p.name for p in distinct])]
    for run, block in zip(runs, blocked):
        header += [run.name, *([] if block else ["difference", "verdict"] if several
                               else ["difference", "verdict", "> 2 SE"])]
    names = _ordered({m for run in (*runs, *distinct) for m, v in run.means.items() if v is not None})
    shown = names if everything else _headlines([m for m in names if any(run.means.get(m) is not None for run in runs)])
    rows = []
    for metric in shown:
        row = [_brief(metric) if several else metric, *(_theirs(p, metric) for p in distinct)]
        for run, partner, block, settings in zip(runs, partners, blocked, skipped):
            row.append(number(run.means.get(metric)))
            if not block:
                judged = judge(metric, run, partner, known.get(metric, ""))
                if judged.difference is not None and metric.partition(".")[0] in settings:
                    judged = Judged(None, "–")
                difference = signed(judged.difference, run.means.get(metric), partner.means.get(metric))
                row += [difference, _verdict(judged)] if several else [difference, judged.verdict, judged.beyond]
        rows.append(row)
    below = [MARKS] if several and not all(blocked) else []
    if hidden := len(names) - len(shown):
        below.append(f"{hidden} more metrics with --all")
    return Table(above, header, rows, below)


def _headlines(ordered: list[str]) -> list[str]:
    """The first metrics, and after them the headline of each eval that they leave out."""
    shown = ordered[:HEADLINE_LINES]
    for metric in ordered[HEADLINE_LINES:]:
        name, _, leaf = metric.partition(".")
        if leaf in HEADLINE and all(name != m.partition(".")[0] for m in shown):
            shown.append(metric)
    return shown


def _completed(partner: Run | None, near: Run | None) -> Run | None:
    """The figures at a run's own L0; evals that the SAEs on either side lack are the nearest SAE's, at its L0."""
    if not isinstance(partner, Interpolated) or near is None:
        return partner or near
    ran = {metric.partition(".")[0] for metric in partner.means}
    evals_of_both = near.config.get("evals", {}) | partner.config.get("evals", {})
    lacking = {m: v for m, v in near.means.items() if m.partition(".")[0] not in ran
               and m.partition(".")[0] in evals_of_both}
    stderrs = {m: near.stderrs[m] for m in lacking if m in near.stderrs}
    config = partner.config | {"evals": evals_of_both}
    return replace(partner, means=partner.means | lacking, stderrs=partner.stderrs | stderrs, config=config)


def _verdict(judged: Judged) -> str:
    return judged.verdict + {"yes": "*", "?": "?"}.get(judged.beyond, "")


def _theirs(partner: Run | None, metric: str) -> str:
    """The baseline's figure, with ~ where it lies between those of two SAEs."""
    value = partner.means.get(metric) if partner else None
    return "~" * (value is not None and _between(partner, metric)) + number(value)


def _between(partner: Run, metric: str) -> bool:
    values = {sae.means.get(metric) for sae in partner.between} if isinstance(partner, Interpolated) else set()
    return None not in values and len(values) > 1


def _described(partner: Run) -> str:
    if not isinstance(partner, Interpolated):
        return f"{partner.name} ({_where(partner.path)})"
    a, b = (f"{_section(sae)} (L0 {number(_leaf(sae, 'l0'))})" for sae in partner.between)
    return f"{partner.name} ({_where(partner.path)}), ~ between {a} and {b}, linear in log L0{_without(partner)}"


def _without(partner: Interpolated) -> str:
    names = sorted({m.partition(".")[0] for m in partner.means} - {m.partition(".")[0]
                                                                   for m in partner.between[0].means})
    return f"; without ~ ({', '.join(names)}) at the nearest SAE's own L0" if names else ""


def _section(run: Run) -> str:
    return run.name.removeprefix(file_label(run.path) + " ")


def _other_l0(run: Run, partner: Run, saes: list[Run]) -> str:
    """What to say where a run and what it is compared with have not the same L0, else nothing."""
    ours, theirs = _leaf(run, "l0"), _leaf(partner, "l0")
    if ours and theirs is None:
        return "not at equal L0: the baseline's is not known"
    if not ours or not theirs or max(ours / theirs, theirs / ours) < 1 + (frontier.SAME if saes else 0.1):
        return ""
    outside = f", outside the baseline's {_range(saes)}" if saes else ""
    return f"not at equal L0: {number(ours)} / {number(theirs)}, a factor of {max(ours / theirs, theirs / ours):.3g}{outside}"


def _range(saes: list[Run]) -> str:
    return "L0 {} to {}".format(*map(number, frontier.ends(saes)))


def _by_l0(runs: list[Run], references: list[Run], saes: list[Run], known: dict[str, str], above: list[str],
           everything: bool) -> Table:
    named = sorted(zip(_names(runs), runs), key=lambda pair: (_leaf(pair[1], "l0") is None, _leaf(pair[1], "l0")))
    names, runs = [re.sub(r"\blayer_\d+\.", "", name) for name, _ in named], [run for _, run in named]
    partners = [frontier.at(_leaf(run, "l0"), saes) for run in runs]
    blocked = [obstacles(run, partner) if partner else ([], {}) for run, partner in zip(runs, partners)]
    directed = [m for m in _ordered({m for run in runs for m, v in run.means.items() if v is not None}) if known.get(m)]
    headline = [m for m in _headline(runs) if known.get(m) and any(p and p.means.get(m) is not None for p in partners)]
    shown = directed if everything else headline[: min(BY_L0_METRICS, BY_L0_ROWS // len(runs))]
    rows = []
    for metric in shown:
        title = metric if everything else _brief(metric).rpartition(".")[2]
        for name, run, partner, (why, settings) in zip(names, runs, partners, blocked):
            judged = judge(metric, run, partner, known[metric])
            if judged.difference is not None and (why or metric.partition(".")[0] in settings):
                judged = Judged(None, "–")
            ours, l0 = run.means.get(metric), _leaf(run, "l0")
            difference = "" if judged.difference is None else signed(judged.difference, ours, partner.means[metric])
            rows.append([title, _cut(name), number(l0), _theirs(partner, metric), number(ours), difference,
                         _verdict(judged)])
            title = ""
    differs = [[f"differs: {found}"] if (found := _differences(run, saes[0], but="hyper")) else [] for run in runs]
    above = [*above, f"baseline: {saes[0].config['variant']}, {len(saes)} SAEs of {_range(saes)} "
                     f"({_where(saes[0].path)})",
             f"the frontier of layer {runs[0].config.get('layer')}, the baseline at each SAE's own L0",
             *_about(names, runs, blocked, [_partner(run, references) for run in runs], differs)]
    between = any(p and _between(p, metric) for p in partners for metric in shown if p
                  and p.means.get(metric) is not None)
    below = ["~ between the baseline's two SAEs of the next L0, linear in log L0"] if between else []
    below += [f"– outside the baseline's {_range(saes)}"] if None in partners else []
    hidden = [f"{len(directed) - len(shown)} more metrics with --all"] if len(directed) > len(shown) else []
    return Table(above, ["metric", "SAE", "L0", "baseline", "run", "difference", "verdict"], rows,
                 [*below, MARKS, *hidden], 2)


def _cut(name: str) -> str:
    """A name without its middle where it is too long for the table by L0."""
    return name if len(name) <= BY_L0_NAME else f"{name[: BY_L0_NAME // 2]}…{name[1 - BY_L0_NAME // 2 :]}"


def _headline(runs: list[Run]) -> list[str]:
    """The measured headline metrics, those that matter most beside an L0 first."""
    named = (m for m in set().union(*(run.means for run in runs)) if m.rpartition(".")[2] in HEADLINE)
    measured = {m for m in named if any(run.means.get(m) is not None for run in runs)}
    return sorted(_ordered(measured), key=lambda m: BY_RUN.index(_brief(m)) if _brief(m) in BY_RUN else len(BY_RUN))


def _about(names: list[str], runs: list[Run], blocked: list[tuple], nearest: list[Run | None],
           more: list[list[str]]) -> list[str]:
    """Lines above a table of many SAEs: what is not compared and why, more, and warnings; ten of them at most."""
    reasons = [[*(f"not compared: {reason}" for reason in (*why, *(f"{k} ({v})" for k, v in settings.items()))), *own]
               for (why, settings), own in zip(blocked, more)]
    lines = _collected(names, reasons) + [f"warning: {line}" for line in _noted(runs, nearest)]
    if len(lines) > 10:
        lines[10:] = [f"warning: {len(lines) - 10} more lines like these, see the single runs"]
    return lines


def _by_run(runs: list[Run], references: list[Run], saes: list[Run], known: dict[str, str], above: list[str],
            sweep: bool) -> Table:
    nearest = [_partner(run, references) for run in runs]
    partners = [frontier.at(_leaf(run, "l0"), saes) for run in runs] if saes else nearest
    names, known_paths = _names(runs), {run.path for run in runs}
    # the nearest SAE to one of a sweep has another L0, so that a verdict on a single metric would mislead
    judging = any(partners) if saes else bool(references) and not sweep
    metrics = _headline(runs)
    rows = []
    for reference in (r for r in references if r.path not in known_paths):
        rows.append((reference, [f"{reference.name} (baseline)", *(number(reference.means.get(m)) + " " * judging
                                                                   for m in metrics)]))
    blocked = [obstacles(run, near) if near else ([], {}) for run, near in zip(runs, nearest)]
    for name, run, partner, (why, settings) in zip(names, runs, partners, blocked):
        cells = [name]
        for metric in metrics:
            mark = " " * judging
            if judging and not why and metric.partition(".")[0] not in settings:
                judged = judge(metric, run, partner, known.get(metric, ""))
                mark = {"yes": {"better": "+", "worse": "-"}.get(judged.verdict.partition(" ")[0], " "),
                        "?": "?"}.get(judged.beyond, " ")
            cells.append(number(run.means.get(metric)) + mark)
        rows.append((run, cells))
    if sweep:
        rows.sort(key=lambda row: (_leaf(row[0], "l0") is None, _leaf(row[0], "l0")))
    outside = [[f"not compared: outside the baseline's {_range(saes)}"] if saes and partner is None else []
               for partner in partners]
    above = [*above, *(f"baseline: {_where(path)}" for path in dict.fromkeys(r.path for r in references)),
             *["the frontier, by L0"] * sweep, *_about(names, runs, blocked, nearest, outside)]
    table = [["SAE", *(_brief(m).rpartition(".")[2] + " " * judging for m in metrics)], *(cells for _, cells in rows)]
    widths = [max(map(len, column)) + 2 for column in zip(*table)]
    fitting = max(2, sum(sum(widths[: i + 1]) - 2 <= WIDTH for i in range(len(widths))))
    header, *rows = [cells[:fitting] for cells in table]
    below = ["+ better, - worse, by more than 2 standard errors; ? standard error unknown"] if judging else []
    below += (["compared at equal L0: with what lies between the baseline's two SAEs around it"] if judging and saes
              else [])
    return Table(above, header, rows, below)


def _names(runs: list[Run]) -> list[str]:
    """What to call runs beside each other: those of one file by their sections alone."""
    one = len({run.path for run in runs}) == 1 and len(runs) > 1
    return [run.name.removeprefix(file_label(run.path) + " ") if one else run.name for run in runs]


def _brief(metric: str) -> str:
    return re.sub(r"(top_\d+)_test_accuracy", r"\1", metric)


def _collected(names: list[str], lines: list[list[str]]) -> list[str]:
    """Each line once, with the names of the runs it is about."""
    about = defaultdict(list)
    for name, own in zip(names, lines):
        for line in own:
            about[line].append(name)
    return [f"{line} — {f'all {len(names)}' if len(found) == len(names) > 3 else _listing(found)}"
            for line, found in about.items()]


def _noted(runs: list[Run], partners: list[Run | None]) -> list[str]:
    """The warnings of several runs, with their names, and those about runs that are one and the same SAE."""
    names, same = _names(runs), defaultdict(list)
    for name, run in zip(names, runs):
        same[tuple(sorted((m, v) for m, v in run.means.items() if _telling(m, v)))].append(name)
    twins = [f"all SAE metrics of {_listing(found, 6)} are equal to the last digit: the same SAE"
             for metrics, found in same.items() if metrics and len(found) > 1]
    return twins + _collected(names, [warnings(run, partner) for run, partner in zip(runs, partners)])


def all_warnings(runs: Iterable[Run] | dict, baseline: Iterable[Run] | dict | None) -> list[str]:
    """The warnings of all runs, with the run's name where there are several."""
    runs, found = _listed(runs), []
    for compared, references, _ in _groups(runs, _listed(baseline)):
        partners = [_partner(run, references) for run in compared]
        found += _noted(compared, partners) if len(runs) > 1 else warnings(compared[0], partners[0])
    return found


def _differences(run: Run, baseline: Run, but: str = "") -> str:
    pairs = ((key, _get(run.config, key), _get(baseline.config, key)) for key in SHOWN if key != but)
    return ", ".join(f"{key} {_short(a)} / {_short(b)}" for key, a, b in pairs if a is not None and b is not None
                     and a != b)


def _ordered(metrics: Iterable[str]) -> list[str]:
    """Headline metrics in their order, then the variant's own, the rest by name,
    and last what says nothing about the SAE.
    """
    rank = {name: i for i, name in enumerate(HEADLINE)}

    def key(metric):
        other = 98 if metric.startswith("variant.") else 100 if LM_ONLY.search(metric) else 99
        return rank.get(metric.rpartition(".")[2], other), [int(p) if p.isdigit() else p
                                                            for p in re.split(r"(\d+)", metric)]

    return sorted(metrics, key=key)


def _where(path: Path) -> str:
    """A path as short as it can be said from here."""
    path = path.parent if path.name == "final_info.json" else path
    for folder in (Path.cwd(), BASELINES.parent.parent):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(path)


# ------------------------------------------------------------------------------------------------ printing


def number(value: float | None) -> str:
    """Four significant digits, counts in full; – for what is missing."""
    if value is None:
        return "–"
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    return f"{value:.3e}" if not 1e-4 <= abs(value) < 1e7 else f"{value:,.{_decimals(value)}f}"


def signed(difference: float | None, *sides: float) -> str:
    """A difference with no more decimals than the values it comes from, unless nothing were left of it."""
    if not difference:
        return "" if difference is None else "0"
    decimals = min(_decimals(difference), max(_decimals(v) for v in sides if v))
    text = f"{difference:+,.{decimals}f}"
    return text if float(text.replace(",", "")) else f"{difference:+.1e}"


def _decimals(value: float) -> int:
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 8)


def compare(runs: Iterable[Run] | dict, baseline: Iterable[Run] | dict | None, directions: dict[str, str],
            everything: bool = False) -> str:
    """The comparison as text of up to 100 columns for one run. `runs` and `baseline` may be what `read` returns."""
    return "\n\n".join(as_text(table) for table in tables(runs, baseline, directions, everything))


def summary(path: str | Path) -> str:
    """What a run prints at its end: the run of that folder against the stored standard baseline of its model."""
    sections = read(path)
    return compare(sections, stored_baselines(sections), directions())


def as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows)]
    align = [str.ljust if i < table.left or name == "verdict" else str.rjust for i, name in enumerate(table.header)]
    lines = [line for text in table.above for line in textwrap.wrap(text, WIDTH, subsequent_indent="    ")]
    for row in (table.header, *table.rows):
        lines.append("  ".join(put(cell, width) for put, cell, width in zip(align, row, widths)).rstrip())
    return "\n".join(lines + table.below)


def as_markdown(table: Table) -> str:
    def row(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = row([":--" if i < table.left or name == "verdict" else "--:" for i, name in enumerate(table.header)])
    parts = ["\n".join(f"- {line}" for line in table.above),
             "\n".join([row(table.header), rule, *map(row, table.rows)]), "\n".join(table.below)]
    return "\n\n".join(filter(None, parts))


def _csv(runs: list[Run], baseline: list[Run], known: dict[str, str]) -> str:
    """Every metric of every run in full precision, one line each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "model", "layer", "metric", "value", "stderr", "baseline", "baseline_value",
                     "baseline_stderr", "difference", "direction", "verdict", "beyond_2_se", "l0", "baseline_l0"])
    for compared, references, _ in _groups(runs, baseline):
        saes = frontier_for(compared, references)
        for run in compared if baseline else (*references, *compared):
            partner = frontier.at(_leaf(run, "l0"), saes) or _partner(run, references)
            why, settings = obstacles(run, partner) if partner else ([], {})
            of_run = run.name, run.config.get("model"), run.config.get("layer")
            # made text once
            l0s = ["" if l0 is None else str(l0) for l0 in (_leaf(run, "l0"), partner and _leaf(partner, "l0"))]
            for metric, value in run.means.items():
                judged = judge(metric, run, partner, known.get(metric, ""))
                if judged.difference is not None and (why or metric.partition(".")[0] in settings):
                    judged = Judged(None, "not compared")
                theirs = [partner.name, partner.means.get(metric),
                          partner.stderrs.get(metric)] if partner else [None] * 3
                writer.writerow([*of_run, metric, value, run.stderrs.get(metric), *theirs, judged.difference,
                                 known.get(metric, ""), judged.verdict, judged.beyond, *l0s])
    return out.getvalue().rstrip("\n")


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if something was compared, 1 with one line on stderr if not."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    # the reader, head for one, has gone: nothing to say, not even when Python flushes at its end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(str(error).split("\n")[0], file=sys.stderr)
        return 1


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
                                           "default: standard, of the runs' own model")
    parser.add_argument("--all", action="store_true", help="every metric")
    parser.add_argument("--csv", action="store_true", help="one line per run and metric, in full precision")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    options = parser.parse_args(argv)

    runs, unreadable = [], []
    for name in dict.fromkeys(options.runs):
        if not Path(name).exists():
            raise FileNotFoundError(f"no run named {name!r}" + _nearest(Path(name).name, _neighbours(Path(name))))
        try:
            runs += read(name).values()
        except (ValueError, OSError) as error:
            unreadable.append(str(error).split("\n")[0])
    if not runs:
        raise ValueError("; ".join(unreadable))
    for line in unreadable:
        print(f"left out: {line}", file=sys.stderr)
    baseline = stored_baselines(runs, options.baseline)
    known = directions()
    if options.csv:
        print(_csv(runs, baseline, known))
    else:
        show = as_markdown if options.markdown else as_text
        print("\n\n".join(show(table) for table in tables(runs, baseline, known, options.all)))
    return 0


def _neighbours(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return sorted(p.name for p in path.parent.iterdir() if p.suffix == ".json" or (p / "final_info.json").is_file())


def _nearest(wrong: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wrong, names, 1, 0)
    return f"; the nearest is {near[0]!r}" if near else "; there are none here"


if __name__ == "__main__":
    sys.exit(main())
