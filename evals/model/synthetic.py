"""A synthetic model in the place of a language model: its true features are known (sae_lens.synthetic, SynthSAEBench,
Chanin & Garriga-Alonso 2026, https://arxiv.org/abs/2602.14687).

A sample is x = b + Σ_i z_i·f_i: sparse true features z, of Zipfian frequencies, in a hierarchy and correlated, times
their directions f_i, which are more than there are dimensions. The model's text are numbers of samples
(evals/texts/numbers.py): the residual stream at token t is sample t, whatever stands around it.

Shapes: B rows, T tokens in a row, S = DRAW samples, D dimensions, G true features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

import torch
from torch import Tensor

from evals.storage import made
from evals.texts import numbers
from evals.texts.numbers import DRAW

CONFIG = "synthetic_model_config.json"  # by this file a folder or a repository is known as a synthetic model
# The names that --model takes. The large one is the benchmark's, whose configuration SAELens publishes (docs,
# "SynthSAEBench"); the small one has the same structure and is as much in superposition, at a size for two cores.
WORLDS = {
    "synthetic": dict(num_features=1024, hidden_dim=256, max_prob=0.4, min_prob=5e-3, total_root_nodes=32, max_depth=3,
                      rank=16, l0=8),
    "synth16k": dict(num_features=16_384, hidden_dim=768, max_prob=0.4, min_prob=5e-4, total_root_nodes=128,
                     max_depth=3, rank=25, l0=25),
}
# l0: how many features a sample has of the most frequent quarter, for which an SAE of the default width has room
TARGETS = ("k", "target_l0")  # hyper-parameters that are a mean L0
VERSION = 1  # raise it when `_made` makes another model of the same numbers


def shape_of(width: int, features: int) -> dict:
    """What evals.model.places.shape says of a synthetic model of so many dimensions and true features."""
    return dict(d_model=width, n_layers=1, block_parameters=width * features, bytes=8 * width * features,
                positions=None, vocabulary=numbers.VOCABULARY, synthetic=True)


SHAPES = {name: shape_of(world["hidden_dim"], world["num_features"]) for name, world in WORLDS.items()}


def identity(name: str) -> str:
    """Of one of WORLDS, made or not: from what it is made."""
    made_from = json.dumps([VERSION, WORLDS[name]], sort_keys=True)
    return f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"


def sparsity(name: str, known: dict) -> dict[str, int]:
    """What of a variant's hyper-parameters `known` is an L0, at that of the model `name` if it is one of WORLDS.

    A variant's own default is made for language models: at several times the true L0 no latent is a true feature.
    """
    if name not in WORLDS:
        return {}
    return {target: WORLDS[name]["l0"] for target in TARGETS if target in known}


def is_synthetic(folder: Path) -> bool:
    """Whether a folder holds a synthetic model, as SAELens saves it."""
    return (folder / CONFIG).is_file()


def shape(folder: Path) -> dict:
    """As `shape_of`, of a saved synthetic model; ValueError for a configuration without its two sizes."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return shape_of(int(config["hidden_dim"]), int(config["num_features"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder.name}: {CONFIG} is damaged ({type(error).__name__}: {error})\n"
                         "save the model again: SyntheticModel.save(folder)") from None


def world_folder(cache_dir: Path, name: str) -> Path:
    """One of WORLDS as SAELens saves it, in the cache; made once, on the CPU: seconds, and minutes for the large."""
    def make(folder: Path) -> None:
        print(f"synthetic model {name}: making its true features (once)", flush=True)
        with contextlib.redirect_stderr(io.StringIO()):  # SAELens always shows a bar
            _made(WORLDS[name]).save(folder)

    return made.folder(Path(cache_dir) / "models" / identity(name), make, shape)


def _made(world: dict):
    """SAELens' SyntheticModel of one of WORLDS: what the names do not vary is the published configuration."""
    from sae_lens import synthetic

    hierarchy = synthetic.HierarchyConfig(
        total_root_nodes=world["total_root_nodes"], branching_factor=4, max_depth=world["max_depth"],
        mutually_exclusive_portion=1.0, compensate_probabilities=True, scale_children_by_parent=True)
    firing = synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=world["max_prob"],
                                                      min_prob=world["min_prob"])
    config = synthetic.SyntheticModelConfig(
        num_features=world["num_features"], hidden_dim=world["hidden_dim"], firing_probability=firing,
        hierarchy=hierarchy, orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=world["rank"], correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5), bias=0.5, seed=42)
    return synthetic.SyntheticModel(config, device="cpu")  # a GPU's generators would draw other features


class SyntheticModel:
    """What training and the evals ask of a language model, of samples with known features."""

    compiled, n_layers, vocab_size, bos = None, 1, numbers.VOCABULARY, numbers.BOS
    reads_text = False

    def __init__(self, model, name: str, digest: str, dtype: torch.dtype):
        self.model, self.name, self.digest, self.dtype = model, name, digest, dtype
        self.device, self.d_model = torch.device(model.device), model.cfg.hidden_dim
        self.tokenizer, self.special_ids = numbers.Numbers(), {numbers.BOS}
        self.seed = model.cfg.seed or 0

    @property
    def title(self) -> str:
        """What it is, for a run's log."""
        return f"synthetic model: {self.name}, {len(self.features_GD):,} true features"

    @property
    def features_GD(self) -> Tensor:
        """The directions of the true features, rows of unit norm."""
        return self.model.feature_dict.feature_vectors.detach()

    @torch.no_grad()
    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """(x_SD, z_SG): the samples of a draw and their true features. The same on every call, on a kind of device."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the generator draws from torch's own state
            torch.manual_seed((self.seed << 32) + number)
            return self.model.sample_with_features(DRAW)

    def residuals(self, tokens_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """{layer: x_BTD}: the samples of which these are the numbers; 0 at BOS."""
        number_N = tokens_BT.flatten().to(self.device)
        x_ND = torch.zeros(len(number_N), self.d_model, dtype=self.dtype, device=self.device)
        for draw in (number_N // DRAW).unique().tolist():
            if draw:  # else BOS
                x_SD, _ = self.draw(draw)
                of_draw_N = number_N // DRAW == draw
                x_ND[of_draw_N] = x_SD[number_N[of_draw_N] % DRAW].to(self.dtype)
        return dict.fromkeys(layers, x_ND.view(*tokens_BT.shape, -1))

    residual_of = residuals

    def training_residuals(self, tokens_BT: Tensor, layers: list[int], rows: int) -> dict[int, Tensor]:
        """As `residuals`: no pass has a fixed shape."""
        return self.residuals(tokens_BT, layers)

    def residual(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """x_BTD as `residuals`."""
        return self.residuals(tokens_BT, [layer])[layer]

    def residuals_and_attention(self, tokens_BT: Tensor, layers: list[int], attention_layers: list[int]):
        """RuntimeError: samples do not attend to each other."""
        raise RuntimeError(f"{self.name} has no attention: its samples are independent of each other\n"
                           "train variants with attention_layers on a language model: --profile embedded")


def load(folder: Path, name: str, digest: str, dtype: torch.dtype, device: str) -> SyntheticModel:
    """The synthetic model `name` saved in `folder`; ValueError where SAELens cannot read it."""
    from sae_lens.synthetic import SyntheticModel as Saved

    try:
        model = Saved.load_from_disk(folder, device=device)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  each damaged file breaks in its own way
        raise ValueError(f"{name}: SAELens cannot read this synthetic model: {' '.join(str(error).split())[:200]}\n"
                         "save it again: SyntheticModel.save(folder)") from error
    # a CPU's and a GPU's generators give different samples
    return SyntheticModel(model, name, f"{digest}:{torch.device(device).type}:{str(dtype).removeprefix('torch.')}",
                          dtype)
