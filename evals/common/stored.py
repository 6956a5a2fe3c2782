"""Which eval results of a run are already there: one is kept by the hash of what it depends on, never by its name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from torch import nn

from evals import Result, declared
from evals.common import saebench
from evals.storage.identity import file_digest


def path(out: Path, name: str, sae: str) -> Optional[Path]:
    """The result file of the eval `name` for one SAE in the run folder `out`, if it was written."""
    return next((out / "eval_results" / name).glob(f"*_{sae}_eval_results.json"), None)


def write(out: Path, name: str, sae: str, result: Result, eval_config: dict, sae_config: dict) -> Path:
    """Write one SAE's result of the eval `name` into the run folder `out`, in SAEBench's form; returns the file.

    Metrics that the eval's METRICS does not declare are named among its problems: they have no better and worse.
    """
    strange = undeclared(result, declared(name, "METRICS"))
    if strange:
        told = f"returns metrics that METRICS does not declare: {', '.join(strange)}"
        result = replace(result, problems=[*result.problems, told])
    return saebench.write(out / "eval_results" / name, result, declared(name, "EVAL_TYPE_ID"), eval_config, sae,
                          sae_config["architecture"], sae_config)


def undeclared(result: Result, metrics: dict[str, str]) -> list[str]:
    """The metrics of a result that METRICS does not declare, not even for another number: k and thresholds are set."""
    def form(metric: str) -> str:
        return re.sub(r"\d+", "n", metric)

    known = {form(metric) for metric in metrics}
    returned = {metric for group in (*result.metrics.values(), result.corrected) for metric in group}
    return sorted(metric for metric in returned if form(metric) not in known)


def note(result: Path, depends_on: str) -> dict[str, str]:
    """What is noted beside a result file: from what it was made, and the hash of its bytes, by which damage shows."""
    return dict(depends_on=depends_on, sha256=file_digest(result))


def is_done(out: Path, name: str, sae: str, depends_on: str) -> bool:
    """Whether that result is there, whole, and was made from exactly this; a damaged one is said and made again."""
    result = path(out, name, sae)
    if not result:
        return False
    beside = result.with_suffix(".depends_on")
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
        known, total = said["depends_on"], said["sha256"]
    except FileNotFoundError:  # the run ended between the two
        return False
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"eval {name}: {beside.name} is damaged ({type(error).__name__}); measuring {sae} again", flush=True)
        return False
    if known != depends_on:
        return False
    if file_digest(result) != total:
        print(f"eval {name}: {result.name} is damaged; measuring {sae} again", flush=True)
        return False
    return True


def collected(out: Path, names: Iterable[str], sae: str,
              crashed: dict[str, BaseException]) -> tuple[dict, dict, list[str]]:
    """Means, standard errors and problems of one SAE over the evals `names`; of a crashed one the problem alone."""
    means, stderrs = {}, {}
    problems = [f"the eval {name} failed: {type(e).__name__}: {str(e).splitlines()[0]}" for name, e in crashed.items()]
    for name in names:
        file = path(out, name, sae)
        if file and name not in crashed:
            result = saebench.read(file)
            new_means, new_stderrs = saebench.flatten(result, name)
            means, stderrs = means | new_means, stderrs | new_stderrs
            problems += [f"{name}: {problem.removeprefix(f'{name}: ')}" for problem in result.problems]
    told = {name for name in means if any(name.split(".")[-1] in problem for problem in problems)}
    means = {name: value for name, value in means.items() if value is not None or name in told}
    return means, stderrs, problems


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    total = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
