"""What makes a run the same run: its settings, what it reads, by content, and the code that decides its result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

import evals
import variants
from evals.cache import digest
from evals.storage import network
from evals.storage.identity import files_digest
from runs import folder

PROJECT = Path(__file__).resolve().parents[1]
FOR_TRAINING = ("model", "train texts", "init_from")  # of what is read


def fingerprints(settings: dict[str, object], measuring: set[str], read: dict[str, str], variant: str,
                 ) -> tuple[str, str]:
    """Hashes of what decides a run's result, and of what decides its training alone.

    `settings`: those that count; `measuring`: the names of those that decide only what is measured of trained SAEs;
    `read` {what: content}; `variant` a name or a path.
    """
    kept = settings | dict(variant=variants.path(variant).name)
    for name in ("model", "dataset", "core_dataset", "init_from"):  # a path is no content: that is in `read`
        kept[name] = "a path" if kept[name] and os.path.exists(kept[name]) else kept[name]
    code = {variants.label(file): variants.text(file).hex() for file in variants.sources(variant)}
    own = [PROJECT / "experiment.py", *(PROJECT / "evals").rglob("*.py")]
    whole = digest([kept, read, files_digest(own, PROJECT), code, torch.__version__])

    of_evals = {file for name in (*evals.names(), *evals.broken()) for file in evals.files(name)}
    own = [file for file in own if file not in of_evals]
    kept = {name: value for name, value in kept.items() if name not in measuring}
    read = {what: content for what, content in read.items() if what in FOR_TRAINING}
    code = variants.training_sources(variant)
    return whole, digest([kept, read, files_digest(own, PROJECT), code, torch.__version__])


def evals_digest() -> str:
    """A hash of the code of all evals and of what they share."""
    return files_digest((PROJECT / "evals").rglob("*.py"), PROJECT)


def recognised(out_dir: str, inputs: Callable[[], dict[str, str]], marks: Callable[[dict], tuple[str, str]],
               ) -> tuple[dict[str, str], str, str]:
    """What the run in `out_dir` reads, and its fingerprints; one that was interrupted goes on at its commits.

    `inputs()`: what it reads, by content; `marks(read)`: its fingerprints.
    """
    before = folder.left(out_dir)
    if before.get("status") != "finished" and before.get("commits"):
        network.pin(before["commits"])  # though the hub may have moved on
        read = inputs()
        whole, training = marks(read)
        if whole == before.get("fingerprint") or training == before.get("training_fingerprint"):
            return read, whole, training
        network.PINNED.clear()  # something else has changed: this is another run
    read = inputs()
    return read, *marks(read)
