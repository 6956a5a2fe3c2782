"""dictionary_learning's format (ae.pt, config.json), and its classes, read as variants of this project."""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from variants.kit.found import (
    AGAIN,
    Found,
    check_residual,
    read_json,
    recentred,
)

DICTIONARIES = {  # class -> variant, and whether the class encodes x − b_dec
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard_april", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batch_topk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka_batch_topk", True),
}
RENAMED = {"bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "encoder.bias": "b_enc",
           "gate_bias": "b_gate", "mag_bias": "b_mag", "threshold": "theta"}
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}  # nn.Linear keeps [out, in]


def from_dictionary_learning(dict_class: str, state: dict[str, Tensor],
                             config: dict) -> tuple[str, dict, dict[str, Tensor]]:
    """Variant, hyper-parameters, state dict of a dictionary of the library; config: config.json or its "trainer".

    A matryoshka's groups do not matter to its features; trained further it has those of the variant.
    """
    config = config.get("trainer", config)
    if dict_class not in DICTIONARIES:
        raise ValueError(f"no variant reads dictionary_learning's class {dict_class!r}\n"
                         f"known: {', '.join(DICTIONARIES)}")
    variant, centred = DICTIONARIES[dict_class]
    if dict_class == "AutoEncoder" and config.get("trainer_class") == "StandardTrainerAprilUpdate":
        variant = "standard_april"  # which leaves decoder norms free
    state = {RENAMED.get(name, name): tensor.detach() for name, tensor in state.items()}
    state = {TRANSPOSED.get(name, name): tensor.T if name in TRANSPOSED else tensor for name, tensor in state.items()}
    k, hyper = state.pop("k", config.get("k")), {}
    state.pop("group_sizes", None)
    state = {name: tensor.float() for name, tensor in state.items()}
    if "topk" in variant:
        if k is None:
            raise ValueError(f"a {dict_class} without k, neither among its tensors nor in its configuration\n"
                             "add \"k\": … to the trainer's part of config.json")
        k = float(k)
        if variant == "topk" and not k.is_integer():
            raise ValueError(f"an SAE of class {dict_class} with k = {k}: it keeps a whole number of features of each "
                             "token\ncorrect \"k\" in the trainer's part of config.json")
        hyper["k"] = int(k) if k.is_integer() else k
    if variant == "jumprelu":
        hyper["target_l0"] = config.get("target_l0") or min(32, state["W_enc"].shape[1])
    if variant == "matryoshka_batch_topk" and len(config.get("group_weights") or ()) == 5:
        hyper["weights"] = tuple(config["group_weights"])
    if variant != "topk" and "theta" in state:
        state["theta"] = state["theta"].clamp_min(0)  # below 0 (none yet) the library passes all that ReLU does
    return variant, hyper, recentred(state, centred, variant != "jumprelu")


def read_dictionary_learning(folder: Path) -> Found:
    config = read_json(folder / "config.json")
    trainer = config.get("trainer", config)

    harmed = flipped(folder / "ae.pt")
    if harmed:
        raise ValueError(f"{folder / 'ae.pt'} has other bytes in {harmed} than it was written with\n{AGAIN}")

    def converted():
        # mapped, not read: of a folder of many only the one that is built takes memory
        state = torch.load(folder / "ae.pt", weights_only=True, map_location="cpu", mmap=True)
        return from_dictionary_learning(trainer.get("dict_class"), state, trainer)

    try:
        variant, hyper, state = converted()
        d_in, d_sae = state["W_enc"].shape
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and zipfile.is_zipfile(folder / "ae.pt"):
            raise ValueError(f"{folder}: ae.pt holds more than tensors, and is not read for that reason\n"
                             "save ae.state_dict()") from None
        raise ValueError(f"{folder / 'ae.pt'} holds no readable weights\n{AGAIN}") from None
    # torch's words for an archive that is cut off
    except (RuntimeError, EOFError, OSError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{folder / 'ae.pt'} holds no readable weights: {reason}\n{AGAIN}") from None
    except KeyError as error:
        raise ValueError(f"{folder}: ae.pt lacks {error}\n"
                         f"was it made by another class than {trainer.get('dict_class')}?") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    layer, hook = trainer.get("layer"), trainer.get("submodule_name")
    if re.fullmatch(r"resid_post_layer_\d+", hook or ""):
        hook = f"blocks.{hook.rpartition('_')[2]}.hook_resid_post"
    check_residual(hook, str(folder))
    metadata = dict(model_name=trainer.get("lm_name"), hook_name=hook, layer=layer if isinstance(layer, int) else None)
    return Found(variant, d_in, d_sae, hyper, None, metadata, lambda: converted()[2], str(folder))


def flipped(file: Path) -> str | None:
    """The first record of torch's zip archive that misses its CRC-32, which torch.load does not look at; else None."""
    if not zipfile.is_zipfile(file):  # an older form, or cut off: opening it says so
        return None
    return _flipped(str(file), file.stat().st_size, file.stat().st_mtime_ns)


@functools.cache
def _flipped(file: str, *changes) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError) as error:
        return f"its index ({error})"
