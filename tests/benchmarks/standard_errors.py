"""Every stated standard error beside a bootstrap over its sampling units:
python -m tests.benchmarks.standard_errors [--evals core,scr]

The embedded model with an untrained TopK SAE (or `--profile tiny`, which states few: its evals have fewer than five
units). Each eval runs once; what it knows of each unit is drawn anew 2000 times and its metrics computed again by
formulas of this file. One line per group of metrics: the units, how many, and stated / bootstrap, the lowest and the
highest; at the end what lies outside 0.7 to 1.3 (exit status 1). The table of evals/README.md is this one's output.
autointerp has its windows judged by a coin: no judge is asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import evals
import experiment
from evals.cache import Cache
from evals.common.settings import choose
from tests.benchmarks.evals import trained

DRAWS = 2000
BOUND = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--evals", default=",".join(name for name in CHECKS if name in evals.names()))
    parser.add_argument("--profile", default="embedded", choices=("embedded", "tiny"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings, _ = experiment.resolve(experiment.parse_settings([f"--profile={args.profile}"]))
    lm, source = experiment.load_language_model(settings), experiment.make_source(settings)
    layer = experiment.layers_of(settings)[0]
    sae = trained(lm, settings, layer, 0)
    print("| eval | metrics | unit | units | stated / bootstrap |\n|---|---|---|---|---|")
    outside = []
    for name in args.evals.split(","):
        wanted = experiment.language_model.instruct_sibling(lm.name) if evals.declared(name, "INSTRUCT") else lm.name
        asked = lm if wanted == lm.name else experiment.load_language_model(dataclasses.replace(settings, model=wanted))
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, OPENAI_API_KEY="none"):
            config = choose(name, args.profile, "")[name]
            setup = experiment.make_setup(settings, asked, layer, config, source, Cache(Path(folder), 20))
            setup = dataclasses.replace(setup, say=lambda line: None, track=lambda items, *rest: items)
            outside += compared(name, *CHECKS[name](setup, sae))
    print(f"outside {1 - BOUND} to {1 + BOUND}: {', '.join(outside) or 'none'}")
    return int(bool(outside))


def compared(name: str, stderrs: dict[str, float], unit: str, drawn: dict[str, tuple[int, np.ndarray]]) -> list[str]:
    """Prints a line for each group of metrics and returns what lies outside the bound.

    `drawn`: {metric: (number of units, its value in each draw or, a number, the spread itself)}.
    """
    if not stderrs:
        print(f"| {name} | – | {unit} | fewer than 5 | none stated |", flush=True)
    groups, outside = defaultdict(list), []
    for metric, stated in stderrs.items():
        n, values = drawn[metric]
        spread = float(np.nanstd(values, ddof=1) if np.ndim(values) else values)
        if stated > 1e-12 or spread > 1e-12:  # a constant has neither
            ratio = stated / max(spread, 1e-300)
            group = re.sub(r"(top|threshold)_\d+", r"\1_n", re.sub("dir[12]", "dirn", metric))
            if name == "core":
                group = "all of a pass"
            groups[group.replace("llm", "sae"), n].append(ratio)
            outside += [f"{name}.{metric} {ratio:.2f}"] if abs(ratio - 1) > BOUND else []
    for (group, n), ratios in groups.items():
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
        print(f"| {name} | {group} ({len(ratios)}) | {unit} | {n} | {span} |", flush=True)
    return outside


def times(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n units stands in each draw, [DRAWS, n]."""
    return rng.multinomial(n, np.full(n, 1 / max(n, 1)), DRAWS).astype(float)


def captured(module, function: str, run: Callable) -> tuple[list, list[tuple]]:
    """(the results of run(), the arguments of every call of module.function meanwhile)."""
    calls, original = [], getattr(module, function)

    def spy(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    with mock.patch.object(module, function, spy):
        return run(), calls


# ------------------------------------------------------------------------------------------------ the evals


def core(setup, sae) -> tuple:
    from evals import core

    results, calls = captured(core, "_result", lambda: core.run(setup, {"sae": sae}))
    ((_, tally, _, x_sum_CD, from_centre_RT, plan, _),) = calls
    rng, drawn = np.random.default_rng(0), {}
    losses, sums = (of.by_document(of.rows) for of in (tally.losses, tally.sparsity))
    times_of = {}
    for part, of in (("losses", losses), ("sums", sums)):
        times_of[part] = times(rng, len(next(iter(of.values()))))
    total = {name: times_of["losses"] @ value_C.numpy() for name, value_C in losses.items()}
    n = times_of["losses"].shape[1]
    for kind, count in (("ce", total["ce_tokens"]), ("kl", total["kl_tokens"])):
        for ours, theirs in (("ablated", "with_ablation"), ("sae", "with_sae"), ("clean", "without_sae")):
            if f"{kind}_{ours}" in total:
                drawn[f"{'ce_loss' if kind == 'ce' else 'kl_div'}_{theirs}"] = n, total[f"{kind}_{ours}"] / count
    drawn["ce_loss_score"] = n, (total["ce_ablated"] - total["ce_sae"]) / (total["ce_ablated"] - total["ce_clean"])
    drawn["kl_div_score"] = n, 1 - total["kl_sae"] / total["kl_ablated"]
    total = {name: times_of["sums"] @ value_C.numpy() for name, value_C in sums.items()}
    n = times_of["sums"].shape[1]
    drawn |= {name: (n, value / total["tokens"]) for name, value in total.items()}
    mean_sq = ((times_of["sums"] @ tally.sparsity.joined(x_sum_CD).numpy()) ** 2).sum(1) / total["tokens"]
    drawn["r2"] = n, 1 - total["mse_per_token"] / (total["x_sq"] - mean_sq)
    used_RT = ~from_centre_RT.isnan()
    document_RT = plan.document_RT[plan.sparsity.start * plan.batch:][:len(used_RT)]
    document_N = np.unique(torch.cat(tally.sparsity.documents).numpy()).searchsorted(document_RT[used_RT].numpy())
    below, above = (medians(value_RT[used_RT].numpy(), times_of["sums"], document_N)
                    for value_RT in (from_centre_RT, torch.cat(tally.r_sq).cpu()))
    drawn["r2_median"] = n, 1 - above / below
    return results["sae"].stderrs, "document", drawn


def medians(value_N: np.ndarray, times_RC: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """The median over tokens in each draw of documents, [R]."""
    order = value_N.argsort()
    found = []
    for times_C in times_RC:
        up_to_N = times_C[document_N[order]].cumsum()
        found.append(value_N[order][up_to_N.searchsorted(up_to_N[-1] / 2)])
    return np.array(found)


def of_classes(name: str) -> Callable:
    """The check of an eval that averages over classes, then over data sets; a two-class data set is one problem."""
    def check(setup, sae) -> tuple:
        result = evals.load(name).run(setup, {"sae": sae})["sae"]
        rng, drawn = np.random.default_rng(0), {}
        for metric in result.stderrs:
            units = []
            for of in result.unstructured.values():
                if name == "sparse_probing":
                    classes = list(of[metric].values())
                else:
                    classes = [by_metric[metric] for by_metric in of.values()]
                if len(classes) == 2:
                    classes = [np.mean(classes)]
                units += [(1 / len(result.unstructured) / len(classes), value) for value in classes]
            weight_n, value_n = np.array(units).T
            # a unit drawn stands with its own weight
            times_Rn = times(rng, len(units))
            drawn[metric] = len(units), (times_Rn * weight_n) @ value_n / (times_Rn @ weight_n)
        return result.stderrs, "class", drawn
    return check


def scr(setup, sae) -> tuple:
    from evals import scr
    from evals.scr import pairs as scr_pairs

    results, calls = captured(scr, "_drawn_scores", lambda: scr.run(setup, {"sae": sae}))
    rng, scored = np.random.default_rng(0), []
    for _ in range(DRAWS):
        of_draw = []
        for _setup, texts, right in calls:
            test = {sign: rows[: len(texts.rows["test"]["+-"])] for sign, rows in texts.rows["test"].items()}
            kept = np.concatenate([rng.choice(test[sign].numpy(), len(test[sign])) for sign in scr_pairs.COMBINATIONS])
            shares = []
            for kind in ("compatible", "corrected"):
                shares.append({})
                for direction, (row_M, of) in right[kind].items():
                    place = {row: i for i, row in enumerate(row_M.tolist())}
                    at = torch.tensor([place[row] for row in kept.tolist()])
                    shares[-1][direction] = scr._each(of, lambda right_M, at=at: right_M[at].double().mean().item())
            of_draw.append(scr._scores(*shares))
        scored.append(of_draw)
    n = sum(len(next(iter(right["compatible"].values()))[0]) for _, _, right in calls)
    drawn = {}
    for metric in results["sae"].stderrs:
        found = [[run[metric] for run in of_draw if metric in run] for of_draw in scored]
        drawn[metric] = n, np.array([np.mean(values) if values else np.nan for values in found])
    return results["sae"].stderrs, "test text", drawn


def absorption(setup, sae) -> tuple:
    from evals import absorption

    result = absorption.run(setup, {"sae": sae})["sae"]
    rows = [letter | result.unstructured["split_features"][letter["first_letter"]] for letter in result.details]
    columns = {"mean_absorption_fraction_score": "mean_absorption_fraction",
               "mean_full_absorption_score": "full_absorption_rate",
               "mean_num_split_features": "num_split_features", "mean_k_sparse_f1": "k_sparse_f1"}
    return result.stderrs, "letter", means({m: [row[c] for row in rows] for m, c in columns.items()})


def means(columns: dict[str, list[float]]) -> dict:
    rng, drawn = np.random.default_rng(0), {}
    for metric, values in columns.items():
        n = len(values)
        drawn[metric] = n, times(rng, n) @ np.array(values) / n if n else np.zeros(DRAWS)
    return drawn


def sae_probes(setup, sae) -> tuple:
    from evals import sae_probes

    result = sae_probes.run(setup, {"sae": sae})["sae"]
    rows = [row | result.unstructured[row["dataset_name"]] for row in result.details]
    columns = {m: [row[m] for row in rows if row.get(m) is not None] for m in result.stderrs}
    return result.stderrs, "data set", means(columns)


def unlearning(setup, sae) -> tuple:
    from evals import unlearning

    results, calls = captured(unlearning, "summary", lambda: unlearning.run(setup, {"sae": sae}))
    rng, drawn = np.random.default_rng(0), {}
    for outcome, task, _ in calls:
        if outcome.best is None:
            continue
        kind = "questions" if task.most_retain == unlearning.SIDE_EFFECT else "text"
        sides, n = [], []
        for rows, harm_EN in ((task.forget, outcome.forget_EN), (task.retain, outcome.retain_EN)):
            sums = [defaultdict(float), defaultdict(float)]
            for cluster, *values in zip(rows.cluster_N.tolist(), harm_EN[outcome.best].tolist(),
                                        rows.weight_N.tolist()):
                for of, value in zip(sums, values):
                    of[cluster] += value
            n.append(len(sums[0]))
            kept = times(rng, n[-1])
            sides.append(kept @ np.array(list(sums[0].values())) / (kept @ np.array(list(sums[1].values()))))
        sides.append(sides[0] / np.maximum(sides[1], task.least_retain))
        drawn |= {name: (of, side) for name, of, side in zip(unlearning.NAMES[kind], (*n, min(n)), sides) if name}
    return results["sae"].stderrs, "document, question", drawn


def ravel(setup, sae) -> tuple:
    from evals import ravel

    results, calls = captured(ravel, "_result", lambda: ravel.run(setup, {"sae": sae}))
    ((known, tasks, _, right, _),) = calls
    if not tasks:
        return {}, "entity", {}
    weights, drawn = ravel.mean_weights([task.kind for task in tasks]), {}
    of_base, of_source = (lambda pair, a=a: (known[pair[a]].kind, known[pair[a]].entity) for a in (0, 1))
    for which, suffix in enumerate(("", "_unseen_prompts")):
        found = [ravel.counted(known, task, ok)[which] for task, ok in zip(tasks, right)]
        # both together draw a pair as often as both of its entities: its own chance counts three times (Owen 2007)
        units = of_base, of_source, lambda pair: (of_base(pair), of_source(pair))
        spreads = [ravel_spreads(weights, found, unit) for unit in units]
        for metric in ("cause_score", "isolation_score", "disentanglement_score"):
            base, source, both = (spread[metric] ** 2 for spread in spreads)
            entities = {of_base(pair) for of in found for pairs in of.values() for pair, _ in pairs}
            drawn[metric + suffix] = len(entities), np.sqrt(max(base + source - both, base, source))
    return results["sae"].stderrs, "entity of base, of source", drawn


def ravel_spreads(weights: list[float], found: list[dict], unit: Callable) -> dict[str, float]:
    """Standard deviation of each score over draws of the units of the pairs."""
    place = {}
    for pairs in (pairs for of in found for pairs in of.values()):
        for pair, _ in pairs:
            place.setdefault(unit(pair), len(place))
    times_RU, sides = times(np.random.default_rng(0), len(place)), defaultdict(lambda: np.zeros(DRAWS))
    for weight, of in zip(weights, found):
        for side, pairs in of.items():
            kept = times_RU[:, [place[unit(pair)] for pair, _ in pairs]]
            sides[side] += weight * (kept @ np.array([float(ok) for _, ok in pairs])) / kept.sum(1)
    values = sides | {"disentanglement_score": (sides["cause_score"] + sides["isolation_score"]) / 2}
    return {metric: value.std(ddof=1) for metric, value in values.items()}


def autointerp(setup, sae) -> tuple:
    from evals import autointerp

    rng = np.random.default_rng(1)

    def verdicts(setup, asked, cases: dict) -> dict:
        def coin(case) -> str:
            return ", ".join(str(i) for i in range(1, len(case.scoring) + 1) if rng.random() < 0.3) or "None"

        return {name: [{"case": case, "explanation": "", "answer": coin(case)} for case in of]
                for name, of in cases.items()}

    with mock.patch.object(autointerp, "_verdicts", verdicts):
        result = autointerp.run(setup, {"sae": sae})["sae"]
    columns = {"autointerp_score": "score", "autointerp_score_checked": "score_checked"}
    judged = result.unstructured.values()
    return result.stderrs, "latent", means({m: [scores[c] for scores in judged] for m, c in columns.items()})


CHECKS = {"core": core, "sparse_probing": of_classes("sparse_probing"), "tpp": of_classes("tpp"), "scr": scr,
          "absorption": absorption, "sae_probes": sae_probes, "unlearning": unlearning, "ravel": ravel,
          "autointerp": autointerp}

if __name__ == "__main__":
    sys.exit(main())
