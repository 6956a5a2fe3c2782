"""What an SAE that was made elsewhere says of itself, and what every format is read with.

Shapes: D = d_in, F = d_sae, N any number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from variants.kit.files import digest

EXPECTED = ("give a SAELens folder (cfg.json, sae_weights.safetensors), a dictionary_learning folder (ae.pt, "
            "config.json), a run folder (sae/), or release:sae_id of SAELens")
DIGEST = "weights_sha256"  # in the metadata of cfg.json, where this project wrote it
AGAIN = "it was cut off or garbled: copy it again from where it came, or train that SAE again"


@dataclass(frozen=True)
class Found:
    """One SAE at a place, its weights not kept in memory yet."""

    # a variant's name; or the path of the variant.py beside the weights (own format), if it is none of variants/
    variant: str
    d_in: int
    d_sae: int
    hyper: dict  # the hyper-parameters that follow from the file
    scale: float | None  # own format: what training divided activations by; None: the weights take raw activations
    # model_name, hook_name, layer (the residual stream after this block); None where the file does not say
    metadata: dict
    load: Callable[[], dict[str, Tensor]]  # the state dict, in the variant's names and shapes
    place: str = ""  # for messages
    setting: dict = dataclasses.field(default_factory=dict)  # what its trainer was told of the run (variants.build)


def read_json(file: Path) -> dict:
    try:
        found = json.loads(present(file).read_text(encoding="utf-8"))
    except ValueError as error:  # also for bytes that are no UTF-8
        raise ValueError(f"{file} is not JSON: {error}\nwas it cut off, or edited?") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__} and not an object of settings\n"
                         "was it cut off, or edited?")
    return found


def present(file: Path) -> Path:
    if not file.is_file():
        there = ", ".join(p.name for p in sorted(file.parent.iterdir())) if file.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"{file.parent}: {file.name} is missing; there is {there}\n{EXPECTED}")
    return file


def undamaged(file: Path, cfg: dict) -> Path:
    """A file of weights that opens and has the bytes it was written with, if cfg.json says which; else ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} holds no readable weights: {str(error)[:120]}\n{AGAIN}") from None
    expected = (cfg.get("metadata") or {}).get(DIGEST)
    if expected and _digest(str(file), file.stat().st_size, file.stat().st_mtime_ns) != expected:
        raise ValueError(f"{file} has other bytes than it was written with\n{AGAIN}")
    return file


@functools.cache
def _digest(file: str, *changes) -> str:
    """SHA-256 of a file, read once as long as nothing touches it: a run looks for the same SAEs several times."""
    return digest(file)


def metadata_of(cfg: dict) -> dict:
    """model_name, hook_name, layer of a SAELens-like configuration (flat before version 6), max_norm if it has one."""
    said = cfg | (cfg.get("metadata") or {})
    hook = said.get("hook_name") or said.get("hook_point")
    number = re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", hook or "")
    layer = int(number[1]) if number else said.get("hook_layer", said.get("hook_point_layer"))
    if number and "resid_pre" in hook:  # what enters a block left the one before
        layer -= 1
    bound = {"max_norm": said["max_norm"]} if said.get("max_norm") else {}
    return dict(model_name=said.get("model_name"), hook_name=hook, layer=layer, **bound)


def check_residual(hook: str | None, place: str) -> None:
    """ValueError for an SAE of another activation, which may well have the residual stream's width."""
    if re.search(r"mlp|attn|attention|resid_mid|hook_[qkvz]\b|\.ln", hook or ""):
        raise ValueError(f"{place}: it reads {hook}, and this project's SAEs read the residual stream after a block\n"
                         "choose one of a hook_resid_post or hook_resid_pre")


def recentred(state: dict[str, Tensor], now: bool, wanted: bool) -> dict[str, Tensor]:
    """Biases for an encoder of x − b_dec (`wanted`) from those for an encoder of x, or the reverse."""
    if now == wanted:
        return state
    shift_F = (1 if wanted else -1) * (state["b_dec"] @ state["W_enc"])
    if "b_enc" in state:
        return state | {"b_enc": state["b_enc"] + shift_F}
    return state | {"b_gate": state["b_gate"] + shift_F, "b_mag": state["b_mag"] + state["r_mag"].exp() * shift_F}
