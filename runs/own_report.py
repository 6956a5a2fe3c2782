"""What a variant measures of itself, after training and before the evals wrap the model."""

from __future__ import annotations

import functools
import math
import traceback
from pathlib import Path

import torch

from evals.model import passes
from evals.model.language_model import LanguageModel
from evals.storage import network
from evals.texts import packing
from runs import folder
from runs.limit import OutOfTime
from runs.voice import say, track
from variants import base
from variants.kit import contexts, norms
from variants.kit.copying import duplicate
from variants.kit.trained import TrainedSAE


def report_of(settings, lm: LanguageModel, job, source) -> tuple[dict, dict]:
    """What the variant measures of itself, numbers and files; before the evals wrap the model."""
    looked_at = TrainedSAE(duplicate(job.sae), job.scale)
    held_out = functools.partial(held_out_batch, settings, lm, job, source)
    return job.sae.report(base.Context(lm, job.layer, looked_at, settings.seed, held_out))


def held_out_batch(settings, lm: LanguageModel, job, source, n_tokens: int) -> base.Batch:
    """About so many held-out tokens as one training batch, in whole contexts."""
    rows = math.ceil(n_tokens / (settings.context - 1))
    rows_RT = packing.pack(source.documents("heldout"), lm.tokenizer, settings.context, lm.bos, rows)
    index_N = (rows_RT != lm.bos).flatten().nonzero().squeeze(1)
    wanted = [job.attention] if job.attention else []
    block = passes.collect(lm, rows_RT, index_N, [job.layer], wanted, settings.lm_batch_size, say, track,
                           "held-out text")
    norms.leave_out(block, {job.layer: job.max_norm})
    fields = contexts.gather(contexts.placed(block, settings.device), torch.arange(len(rows_RT)), settings.context,
                             job.layer, job.attention, settings.device)
    return base.Batch.of(fields, job.scale)


def reported(settings, lm: LanguageModel, jobs: list, source, out: Path, limit) -> dict[str, BaseException]:
    """Write what the variant measures of each SAE into variant_report/<SAE>; returns the crashed reports, by SAE."""
    crashed = {}
    for job in jobs:
        numbers, files = {}, {}
        try:
            with limit.within(limit.spare, lambda: "in the variant's own report"):
                numbers, files = report_of(settings, lm, job, source)
        except OutOfTime as error:
            say(f"note: {job.name}: no report of the variant's own: {network.first_line(error)}")
        except packing.TooLittleText as error:
            say(f"{job.name}: no report of the variant's own: {network.first_line(error)}")
        except Exception as error:  # noqa: BLE001  it must cost neither the training nor the evals
            crashed[job.name] = error
            traceback.clear_frames(error.__traceback__)
            say(f"{job.name}: the variant's own report failed: {type(error).__name__}: {error}")
        folder.write_report(out / "variant_report" / job.name, numbers, files)
    return crashed
