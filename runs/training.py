"""Where a training stands: rows of its log now and then, its checkpoint, and the way back from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from evals.model import checks
from evals.model.language_model import LanguageModel
from runs import checkpoint, environment, hopeless, training_log
from runs.clock import Clock
from runs.live import LIVE
from runs.voice import say
from variants.base import Batch, Progress
from variants.kit import interchange, norms, ranks
from variants.kit.imperative import Imperative
from variants.kit.scale import dominant_mean, stream_scale


@dataclass
class Training:
    """Where training stands."""

    step: int  # steps that are done
    log: list[dict]  # rows of training_log.csv
    recent: dict[str, list]  # (loss, terms) of each SAE since the last of them, on the device
    cursor: dict | None = None  # where the token stream goes on
    keep_until: int = 0  # last step whose checkpoint is kept for a longer run; 0: none is
    clock: Clock = field(default_factory=Clock)
    began: int = 0  # steps that were done when this process took over
    hopeless: set[str] = field(default_factory=set)  # SAEs that are known to be so, while others learn


    def tokens_per_s(self, batch_size: int) -> int | None:
        """Tokens of each SAE a second in this process, texts and language model included; None if it trained none."""
        seconds = self.clock.activations + self.clock.sae
        return round((self.step - self.began) * batch_size / seconds) if self.step > self.began and seconds else None


def note(settings, out: Path, jobs: list, batch_of_job: dict[str, Batch], progress: Progress, now: Training) -> None:
    """Rows of the log on what passed since the last; now and then on the screen and the disk, too.

    hopeless.Hopeless where --stop_hopeless finds that nothing comes of it.
    """
    x_of_job = {name: batch.x for name, batch in batch_of_job.items()}
    batch_size = progress.total_tokens // progress.total_steps
    found = training_log.rows(jobs, now.recent, x_of_job, progress, batch_size, now.clock, now.step, ranks.mean)
    now.log += found
    LIVE.rows(found)
    if now.clock.may_say() or now.step == progress.total_steps:
        now.clock.said = time.monotonic()
        if not ranks.number():
            training_log.write(out, now.log)
        training_log.say_rows(now.log[-len(jobs):], progress.total_tokens)
    hopeless.check(settings, jobs, now, progress)


def tell(progress: Progress, now: Training) -> None:
    """How far training is, for progress.json, now and then; by what has been launched, no step waits for it."""
    if LIVE.due():
        tokens = progress.total_tokens // progress.total_steps * now.step
        LIVE.trained(tokens, progress.total_tokens, now.clock.eta(now.step, progress.total_steps))


def begin(settings, lm: LanguageModel, jobs: list, block: dict[str, Tensor], spread: Callable) -> None:
    """Measure the scale on the first block, let fresh SAEs initialise themselves on normalised data, note outliers.

    `spread(settings, job)` shares an SAE out among the ranks, where that is asked for.
    """
    for job in jobs:
        x_ND = block[f"x_{job.layer}"]
        if not job.scale:
            job.scale, share = stream_scale(x_ND)
            if dominant_mean(share):
                say(f"note: {job.name}: {dominant_mean(share)}")
            if settings.init_from:  # its weights took raw activations
                interchange.rescale(job.sae, job.scale)
        if not settings.init_from:
            start = int(block["starts_W"][ranks.number()]) if ranks.sharing() > 1 else 0
            job.sae.initialise(ranks.first_rows(x_ND, start, 8192).float() / job.scale)
        hopeless.measure_untrained(settings, job, x_ND)
        spread(settings, job)
    for layer in dict.fromkeys(job.layer for job in jobs):
        # the tokens that hold most of E‖x‖², where a few do: an SAE is then judged on those
        line = checks.outliers(block[f"x_{layer}"], block["tokens_N"], lm)
        if line:
            say(f"note: layer {layer}: {line}")
            for job in (job for job in jobs if job.layer == layer):
                job.notes = [line]


def leave_out(ratio: float | None, jobs: list, block: dict[str, Tensor], b: int) -> None:
    """Take the tokens above `ratio` times the median norm of the first block, if there is one, out of block b, said of
    the first. A token that is above at one of the run's layers is left out at all: its SAEs share the batches."""
    if not ratio:
        return
    for job in jobs:
        job.max_norm = job.max_norm or norms.bound(block[f"x_{job.layer}"], ratio)
    n = len(block["tokens_N"])
    left_out = norms.leave_out(block, {job.layer: job.max_norm for job in jobs})
    for job in jobs:
        job.left_out = job.left_out | {b: left_out / n}  # by block: a resume passes one again
    if not b:
        say(f"tokens above {ratio:g} times the median norm are left out of training and evals: {left_out:,} of "
            f"{n:,} in the first block")


def means(log: list[dict], job, plan: list[int]) -> dict[str, float]:
    """What final_info.json says of a job's training; `plan`: the tokens of each block, left-out ones with them."""
    found = training_log.last_means(log, job.name)
    if job.left_out:
        left_out = sum(share * plan[b] for b, share in job.left_out.items())
        found["training.left_out_share"] = left_out / sum(plan[b] for b in job.left_out)
    return found


def save(out: Path, jobs: list, now: Training, cursors: dict[int, dict], b: int) -> None:
    """All that a resume in block b needs, in one file, by the first rank. `cursors`: the token stream's, by block."""
    begun = time.monotonic()
    cursor = cursor_at(cursors, b)
    recent = {name: [(ranks.mean(x), {k: ranks.mean(v) for k, v in terms.items()}) for x, terms in rows]
              for name, rows in now.recent.items()}
    saes = {job.name: ranks.whole(dict(sae=job.sae.state_dict(), optimizer=job.optimizer.state_dict(), scale=job.scale,
                                       max_norm=job.max_norm, left_out=job.left_out, untrained=job.untrained))
            for job in jobs}
    state = dict(step=now.step, cursor=cursor, log=now.log, recent=recent, rng=environment.random_state(),
                 notes={job.name: job.notes for job in jobs}, saes=saes)
    if not ranks.number():
        training_log.write(out, now.log)
        checkpoint.write(out, state)
        if now.step <= now.keep_until:
            checkpoint.keep(out)
    now.clock.has_saved(begun)


def cursor_at(cursors: dict[int, dict], b: int) -> dict:
    """Where the token stream goes on for block b; it lags where blocks came from the cache: the nearest one before."""
    return cursors[max(block for block in cursors if block <= b)]


def begun(out: Path, jobs: list, total_steps: int, view: bool, spread: Callable) -> Training:
    """Training at its first step, or where the last checkpoint in `out` left it: jobs and random state are put back.

    Whatever the number of ranks was. `spread` shares an SAE out among the ranks, where that is asked for; the file is
    then read as a `view`, part by part.
    """
    state = checkpoint.read(out, next(jobs[0].sae.parameters()).device, view)
    LIVE.begin_loggers(state["log"][-1]["tokens"] if state and state["log"] else 0)
    if not state:
        return Training(0, [], {job.name: [] for job in jobs})
    ended = state["step"] == total_steps
    for job in jobs:
        saved = checkpoint.part(state, job.name, out)  # taken out: else it stays to the end of training
        checkpoint.fit(job.sae.load_state_dict, saved["sae"], out)
        if state["step"] > 0 and not ended:  # before the first step the SAEs are still to be initialised
            spread(job)
        if not ended or isinstance(job.sae, Imperative):  # whose trainer lies there
            ranks.load_optimizer(job.optimizer, saved["optimizer"])
        job.scale, job.notes = saved["scale"], state["notes"][job.name]
        job.max_norm, job.left_out = saved["max_norm"], saved["left_out"]
        job.untrained = saved.get("untrained")  # a checkpoint of an earlier version has none
    environment.set_random_state(state["rng"])
    say(f"continuing from step {state['step']:,}")
    return Training(state["step"], state["log"], state["recent"], state["cursor"], began=state["step"])
