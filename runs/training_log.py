"""What a run records while it trains: one row per SAE and interval, on the screen and in training_log.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from runs.clock import Clock
from runs.folder import check_present, write_text
from runs.voice import VOICE, duration, say
from variants.kit.imperative import Imperative, looking

OWN = ("sae", "step", "tokens", "loss", "l0", "explained_variance", "dead_share", "tokens_per_s")  # the log's columns
NOT_MEANS = ("sae", "step", "loss", "tokens_per_s", "l0", "explained_variance")  # not measured, or by evals better
GLANCE = 512  # tokens a row's L0 and explained variance are taken from: no measurement, that is the core eval's


def check_finite(jobs: list, recent: dict, step: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Stop at the first loss that is not finite or has exploded, naming step and term. Reads the device once a job."""
    for job in jobs:
        if not recent[job.name]:
            continue
        own = isinstance(job.sae, Imperative)  # whose other numbers may be counters, or means over nothing
        names = ["loss"] if own else ["loss", *recent[job.name][0][1]]
        values = torch.stack([torch.stack([loss, *terms.values()][:len(names)]).float()
                              for loss, terms in recent[job.name]])
        values = mean_over_ranks(values).cpu()  # so that all of them stop
        bad = ~values.isfinite() | (values.abs() > 1e6)  # E‖x‖² = 1, so a loss starts near 1
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            term = names[int(bad[row].nonzero()[-1])]
            value, at = values[row, names.index(term)], step - len(values) + row
            raise FloatingPointError(f"{job.name}: the term {term!r} became {value:.3g} at step {at}\n"
                                     f"lower --lr or the term's weight{_last_good()}")


def _last_good() -> str:
    """Words on the run's checkpoint, if there is one: it lies beside the log."""
    if VOICE.log and Path(VOICE.log.name).with_name("checkpoint.pt").exists():
        return "; the last good checkpoint is checkpoint.pt in the run's folder"
    return ""


@torch.no_grad()
def rows(jobs: list, recent: dict, x_of_job: dict[str, Tensor], progress, batch_size: int, clock: Clock, step: int,
         mean_over_ranks: Callable[[Tensor], Tensor]) -> list[dict]:
    """One row per SAE: loss terms averaged since the last row, L0, explained variance, dead share, speed.

    The dead share is None where the loss never says what fired. Measuring changes no SAE.
    """
    check_finite(jobs, recent, step, mean_over_ranks)

    def mean(tensors) -> float:
        return float(mean_over_ranks(torch.stack([t.double() for t in tensors]).mean()))

    found, rate = [], clock.rate(step, batch_size)
    for job in jobs:
        x_BD, dead_share = x_of_job[job.name][:GLANCE], None
        if job.sae.counts_fired:
            dead_share = float(job.sae.dead_features(progress).float().mean())
        l0, explained_variance = glance(job.sae, x_BD)
        if hasattr(job.sae, "reshard"):
            job.sae.reshard()  # else all SAEs would be whole at once
        row = dict(sae=job.name, step=step, tokens=step * batch_size, loss=mean(loss for loss, _ in recent[job.name]))
        row |= {_column(k): mean(terms[k] for _, terms in recent[job.name]) for k in recent[job.name][0][1]}
        row |= dict(l0=l0, explained_variance=explained_variance, dead_share=dead_share, tokens_per_s=round(rate))
        found.append(row)
        recent[job.name].clear()
    clock.count_rate(step)
    return found


@torch.no_grad()
def glance(sae, x_BD: Tensor) -> tuple[float, float]:
    """L0 and explained variance of an SAE, as it is, on a few normalised activations."""
    with looking(sae):
        z_BF = sae.encode(x_BD)
        error = (x_BD - sae.decode(z_BF)).pow(2).sum() / (x_BD - x_BD.mean(0)).pow(2).sum()
    return float((z_BF != 0).float().sum(-1).mean()), 1 - float(error)


def _column(term: str) -> str:
    """A term's column: one that has the name of a column of the log's own is told from it."""
    return f"own_{term}" if term in OWN else term


def last_means(log: list[dict], name: str) -> dict[str, float]:
    """What final_info.json says of an SAE's training, from its last row of the log; {} where nothing was trained."""
    if not log:
        return {}
    last = next(row for row in reversed(log) if row["sae"] == name)
    means = {f"training.{column}": value for column, value in last.items()
             if column not in NOT_MEANS and value is not None}
    return means | {"training.final_loss": last["loss"], "training.steps": last["step"]}


def say_rows(rows: list[dict], total_tokens: int) -> None:
    """The rows of one interval, a line each."""
    for row in rows:
        left = (total_tokens - row["tokens"]) / max(row["tokens_per_s"], 1)
        name = f"  {row['sae']}" if len(rows) > 1 else ""
        dead = "dead not counted"
        if row["dead_share"] is not None:
            dead = f"dead {row['dead_share']:.1%}"
        say(f"tokens {row['tokens'] / 1e6:7.3f}M  loss {row['loss']:.4f}  L0 {row['l0']:6.1f}  "
            f"EV {row['explained_variance']:.3f}  {dead}  "
            f"{row['tokens_per_s'] / 1e3:.1f}k tok/s  eta {duration(left)}{name}")


def write(out: Path, log: list[dict]) -> None:
    """training_log.csv anew, whole or not at all; FileNotFoundError if the run's folder is no longer there."""
    check_present(out)
    if log:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)
        write_text(out / "training_log.csv", text.getvalue())
