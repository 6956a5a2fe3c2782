"""What final_info.json says of a trained SAE: what was measured, how sure it is, and how the SAE came about."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import evals
import variants
from evals.common import stored
from evals.storage import network
from runs import environment, reading
from variants.kit import norms, saving


def section(out: Path, sae: str, trained: dict[str, float], chosen: Iterable[str], crashed: dict[str, BaseException],
            unreported: BaseException | None, notes: list[str], config: dict, others: list[str]) -> dict:
    """The section of one SAE of the run in `out`: means, stderrs, config and problems.

    `trained`: the means of its training; `crashed`: the evals that did; `unreported`: why the variant's own report is
    not there; `notes`: what training found that makes the result doubtful; `others`: problems that do not.
    """
    numbers = json.loads((out / "variant_report" / sae / "numbers.json").read_bytes())
    of_training = trained | {f"variant.{k}": v for k, v in numbers.items()}
    measured, stderrs, problems = stored.collected(out, chosen, sae, crashed)
    problems += [*(reading.DOUBT + note for note in notes), *others]
    if unreported:
        problems.append(f"the variant's own report failed: {type(unreported).__name__}: {unreported}")
    return dict(means=dict(sorted(of_training.items())) | dict(sorted(measured.items())),
                stderrs=dict(sorted(stderrs.items())), config=config, problems=problems)


def config(settings, sae, hyper: dict, place: dict, steps: int, chosen: dict[str, dict], dense: float) -> dict:
    """How an SAE came about: every setting that is the rule, and of the exceptions those that hold.

    `place`: hook_name, layer, d_in and norms.told; `dense`: the share of features that are active on the average token,
    where that is so much that it is said.
    """
    found = dict(
        variant=variants.title(settings.variant), hyper=hyper, model=environment.public_name(settings.model), **place,
        d_sae=len(sae.decoder), context=settings.context, num_tokens=settings.num_tokens, passes=settings.passes,
        batch_size=settings.batch_size, steps=steps, lr=settings.lr or sae.default_lr, keep_bos=settings.keep_bos,
        seed=settings.seed, dtype=settings.dtype, dataset=environment.public_name(settings.dataset),
        core_dataset=environment.public_name(settings.core_dataset), profile=settings.profile, evals={})
    left_out = {key: place[key] for key in ("max_norm_ratio", "max_norm") if key in place}
    if "max_norm_ratio" in left_out:  # by which runs are compared: the bound follows from it
        del left_out["max_norm"]
    for name, own in chosen.items():
        outside = evals.outside(name)
        found["evals"][name] = own | ({"outside": outside} if outside else {})
        if left_out and evals.declared(name, "MASKED"):  # measured on fewer positions
            found["evals"][name] |= left_out
    if getattr(sae, "either_sign", False):
        found["either_sign"] = True
    if settings.init_from:
        found["init_from"] = environment.public_name(settings.init_from)
    if network.pinned():
        found["revisions"] = network.pinned()
    if dense:
        found["dense"] = round(dense, 3)
    return found


def save_sae(settings, job, out: Path, hook_name: str) -> None:
    """Save a trained SAE as sae/<SAE>, for SAELens where it has the architecture, and for this project."""
    model, dataset = environment.public_name(settings.model), environment.public_name(settings.dataset)
    metadata = dict(model_name=model, hook_name=hook_name, context_size=settings.context, prepend_bos=True,
                    dataset_path=dataset, **norms.told(settings.max_norm_ratio, job.max_norm))
    saving.save_sae(out / "sae" / job.name, job.sae, job.scale, variants.path(settings.variant), job.hyper, metadata)
