"""What several tests of variants set up: a preflight at real sizes, the line of a text, a saved SAE read back."""

from pathlib import Path

import torch

import experiment
import variants
from variants.kit import saving
from variants.kit.trained import TrainedSAE
from variants.preflight import check

SMOLLM = dict(d_in=576, d_sae=2304, batch_size=1024, total_steps=156, lr=3e-3)  # the embedded profile
GEMMA = dict(d_in=2304, d_sae=16384, batch_size=2048, total_steps=2441, lr=3e-4)


def preflight(variant, sizes: dict, hyper: dict | None = None, **changes) -> check.Findings:
    """The preflight of a variant, by name or path, at these sizes, with the training loop's own step."""
    loop = dict(train_step=experiment.train_step, make_optimizer=experiment.make_optimizer)
    return check.run(str(variant), hyper or {}, **(sizes | dict(seed=0) | loop | changes))


def line_of(file, text: str) -> int:
    """Number of the first line of a file that holds the text."""
    return 1 + next(i for i, line in enumerate(Path(file).read_text().splitlines()) if text in line)


def read_by_both(folder: Path, name: str, sae, hyper: dict | None = None):
    """(as trained, as SAELens reads it, as this project reads it) of an SAE saved with scale 37."""
    from sae_lens import SAE as SAELens

    saving.save_sae(folder, sae, 37.0, variants.path(name), hyper or {}, {})
    return TrainedSAE(sae, 37.0), SAELens.load_from_disk(folder), saving.load_sae(folder)


def raw_activations() -> torch.Tensor:
    """Activations [3, 7, 12] of the size that goes with a scale of 37."""
    return torch.randn(3, 7, 12) * 37
