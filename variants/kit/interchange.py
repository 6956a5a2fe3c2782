"""SAEs made elsewhere, read as variants of this project: `find` says what lies at a place, `build` makes the module.

A place is one of
    a folder in SAELens' format (cfg.json + sae_weights.safetensors, of any version) or in the own format of
    variants/kit/saving.py a dictionary_learning folder (ae.pt + config.json), or a folder that holds several
    (trainer_0, trainer_1, …) a run folder: everything under its sae/
    `release:sae_id` from SAELens' list of pretrained SAEs, fetched from the Hugging Face hub

Features are those the file's own library gives. What that library does besides this project's formulas (centring,
decoder norms, factors) is folded into the weights; what no weights can express is refused. D = d_in, F = d_sae, N any
number of rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import variants
from variants import base
from variants.kit.copying import duplicate
from variants.kit.files import digest
from variants.kit.hyper import hyperparameters
from variants.kit.trained import TrainedSAE


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


# ------------------------------------------------------------------------------------------------ what lies where

FILES = {"cfg.json", "sae_weights.safetensors", "state.safetensors", "ae.pt", "config.json"}
EXPECTED = ("give a SAELens folder (cfg.json, sae_weights.safetensors), a dictionary_learning folder (ae.pt, "
            "config.json), a run folder (sae/), or release:sae_id of SAELens")


def find(place: str) -> dict[str, Found]:
    """Every SAE at a place, by its folder's name. FileNotFoundError, ValueError; ConnectionError of the hub."""
    path = Path(place)
    release, colon, sae_id = place.partition(":")
    if colon and not path.exists() and not Path(release).exists():
        return {sae_id.replace("/", "_"): read_release(release, sae_id)}
    if not path.exists():
        raise FileNotFoundError(f"{place}: there is no such folder\n{EXPECTED}")
    folder = path.resolve()
    if folder.is_file() and folder.name in FILES:
        folder = folder.parent
    folders = [folder] if holds_sae(folder) else inside(folder / "sae") or inside(folder)
    if not folders:
        there = [p.name for p in sorted(folder.iterdir())] if folder.is_dir() else ["a file"]
        if len(there) > 8:
            there[8:] = ["…"]
        raise ValueError(f"{place}: no SAE found; there is {', '.join(there) or 'nothing'}\n{EXPECTED}")
    return {one.name: read(one) for one in folders}


def holds_sae(folder: Path) -> bool:
    return (folder / "cfg.json").is_file() or (folder / "ae.pt").is_file()


def inside(folder: Path) -> list[Path]:
    """The folders in a folder that hold an SAE, trainer_2 before trainer_10; half-written ones begin with a dot."""
    found = [p for p in folder.iterdir() if p.name[0] != "." and holds_sae(p)] if folder.is_dir() else []
    return sorted(found, key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", p.name)])


def read(folder: Path) -> Found:
    """The SAE in one folder, whatever its format."""
    if (folder / "ae.pt").is_file():
        return read_dictionary_learning(folder)
    cfg = read_json(folder / "cfg.json")
    if cfg.get("architecture") == "variant":
        return read_own(folder, cfg)
    return read_saelens(folder, cfg)


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


DIGEST = "weights_sha256"  # in the metadata of cfg.json, where this project wrote it
AGAIN = "it was cut off or garbled: copy it again from where it came, or train that SAE again"


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


def read_own(folder: Path, cfg: dict) -> Found:
    from safetensors.torch import load_file

    file, code = undamaged(present(folder / "state.safetensors"), cfg), present(folder / "variant.py")
    lacks = [key for key in ("init", "hyper", "scale") if key not in cfg]
    if lacks or not {"d_in", "d_sae"} <= set(cfg["init"]):
        raise ValueError(f"{folder / 'cfg.json'} lacks {', '.join(lacks) or 'd_in or d_sae in init'}\n{AGAIN}")
    # of equal files the project's own is run: beside the other there may lie an __init__.py
    same = [name for name in variants.names() if variants.path(name).read_bytes() == code.read_bytes()]
    return Found(same[0] if same else str(code), cfg["init"]["d_in"], cfg["init"]["d_sae"], cfg["hyper"], cfg["scale"],
                 metadata_of(cfg), lambda: load_file(file), str(folder), cfg["init"].get("setting") or {})


def check_trusted(found: Found) -> None:
    """ValueError if building the SAE would run code that is not this project's. Reading its file runs nothing."""
    if not found.variant.endswith(".py"):
        return
    trained_as = read_json(Path(found.variant).with_name("cfg.json")).get("variant")
    differs = f" (it differs from variants/{trained_as}.py)" if trained_as in variants.names() else ""
    raise ValueError(f"{found.variant} is code that is not in variants/{differs}: it would be run\n"
                     "read it, then give --trust_code (in Python: trust_code=True); or copy it into variants/ under a "
                     "name of its own")


def metadata_of(cfg: dict) -> dict:
    """model_name, hook_name and layer of a SAELens-like configuration, which before version 6 was flat."""
    said = cfg | (cfg.get("metadata") or {})
    hook = said.get("hook_name") or said.get("hook_point")
    number = re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", hook or "")
    layer = int(number[1]) if number else said.get("hook_layer", said.get("hook_point_layer"))
    if number and "resid_pre" in hook:  # what enters a block left the one before
        layer -= 1
    return dict(model_name=said.get("model_name"), hook_name=hook, layer=layer)


def check_residual(hook: str | None, place: str) -> None:
    """ValueError for an SAE of another activation, which may well have the residual stream's width."""
    if re.search(r"mlp|attn|attention|resid_mid|hook_[qkvz]\b|\.ln", hook or ""):
        raise ValueError(f"{place}: it reads {hook}, and this project's SAEs read the residual stream after a block\n"
                         "choose one of a hook_resid_post or hook_resid_pre")


# ------------------------------------------------------------------------------------------------ from file to module


def build(found: Found, trust_code: bool = False) -> base.SAE:
    """The variant's module with the weights found, fp32, on the CPU. ValueError if they do not fit, or it was edited.

    A variant.py that is none of variants/ is run with `trust_code` alone, else refused by ValueError.
    """
    if not trust_code:
        check_trusted(found)
    own = found.scale is not None
    module = variants.load(found.variant)
    known = hyperparameters(module)  # a foreign file may carry those of an older form of the variant
    hyper = found.hyper if own else {k: v for k, v in found.hyper.items() if k in known}
    sae = variants.build(module, found.d_in, found.d_sae, hyper, found.setting)
    state = fill(sae, found)
    if not own and not unedited(sae, found.variant, hyper, state):
        raise ValueError(f"{found.place}: variants/{found.variant}.py gives these weights other features than they "
                         "were trained to give\n"
                         f"if you edited it, keep the edit under a name of its own and restore "
                         f"variants/{found.variant}.py")
    return sae


def fill(sae: base.SAE, found: Found) -> dict[str, Tensor]:
    """Put the weights found into a module, and return them; ValueError names what is missing, left over, misshapen."""
    try:
        state = found.load()
    except KeyError as error:
        raise ValueError(f"{found.place}: the weights lack {error}\nwas the file cut off, or edited?") from None
    expected = torch.nn.Module.state_dict(sae)
    # no foreign file has the counters of a training run
    needed = expected if found.scale is not None else dict(sae.named_parameters())
    plain = {name for name in state.keys() - expected.keys() if sae.holder_of(name) is not None}  # of a trainer's ae
    wrong = {"missing": sorted(needed.keys() - state.keys()),
             "unexpected": sorted(state.keys() - expected.keys() - plain),
             "of another shape": [f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
                                  for name in sorted(expected.keys() & state.keys())
                                  if state[name].shape != expected[name].shape]}
    if any(wrong.values()):
        raise ValueError(f"{found.place}: the weights do not fit the variant {found.variant}: "
                         + "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
                         + "\nwas the file or the variant edited?")
    sae.load_state_dict(state, strict=False)
    return state


@torch.no_grad()
def unedited(sae: base.SAE, variant: str, hyper: dict, state: dict[str, Tensor]) -> bool:
    """Whether a variant's file still gives the published features, on random x of any scale around b_dec."""
    directions_ND = F.normalize(torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(0)), dim=1)
    reach = state["b_dec"].norm().clamp_min(1.0)  # far smaller steps from b_dec would drown in its rounding
    x_ND = state["b_dec"] + torch.logspace(-2, 3, 64)[:, None] * reach * directions_ND
    expected_NF = published(variant, hyper, state, x_ND)
    same_N = (sae.encode(x_ND) - expected_NF).norm(dim=1) <= 1e-3 * expected_NF.norm(dim=1)
    return bool(same_N.float().mean() > 0.9)  # features at a threshold may fall either way


def published(variant: str, hyper: dict, state: dict[str, Tensor], x_ND: Tensor) -> Tensor:
    """Features [N, F] by the formulas of the papers, from a variant's state dict."""
    if variant == "jumprelu":
        z_pre_NF = x_ND @ state["W_enc"] + state["b_enc"]
        return z_pre_NF * (z_pre_NF > state["theta"])
    a_NF = (x_ND - state["b_dec"]) @ state["W_enc"]
    if variant == "gated":
        return (a_NF + state["b_gate"] > 0) * F.relu(state["r_mag"].exp() * a_NF + state["b_mag"])
    z_NF = F.relu(a_NF + state["b_enc"])
    if variant != "topk" and "theta" in state:
        return z_NF * (z_NF > state["theta"])
    if "k" not in hyper:
        return z_NF
    top_NK, index_NK = z_NF.topk(int(hyper["k"]), dim=1)
    return torch.zeros_like(z_NF).scatter(1, index_NK, top_NK)


@torch.no_grad()
def rescale(sae: base.SAE, scale: float) -> None:
    """Make weights for raw activations, in place, ones for activations/scale: x_raw/scale then gives z_raw/scale."""
    for name in ("b_enc", "b_dec", "b_gate", "b_mag", "theta"):
        tensor = getattr(sae, name, None)
        if tensor is not None:
            kept = (tensor < 0) & (name == "theta")  # a negative theta says that there is none yet
            tensor.copy_(torch.where(kept, tensor, tensor / scale))


def recentred(state: dict[str, Tensor], now: bool, wanted: bool) -> dict[str, Tensor]:
    """Biases for an encoder of x − b_dec (`wanted`) from those for an encoder of x, or the reverse."""
    if now == wanted:
        return state
    shift_F = (1 if wanted else -1) * (state["b_dec"] @ state["W_enc"])
    if "b_enc" in state:
        return state | {"b_enc": state["b_enc"] + shift_F}
    return state | {"b_gate": state["b_gate"] + shift_F, "b_mag": state["b_mag"] + state["r_mag"].exp() * shift_F}


# ------------------------------------------------------------------------------------------------ SAELens

# SAELens' name -> variants that give the same features: the first, unless the file says how it was trained
ARCHITECTURES = {
    "standard": ("standard", "standard_april", "p_anneal"),
    "topk": ("topk", "batch_topk", "matryoshka_batch_topk"),
    "gated": ("gated",),
    "jumprelu": ("jumprelu", "batch_topk", "matryoshka_batch_topk"),
}
# SAELens 6 trains "standard" with free decoder norms, and saves these three for inference under another name or the
# same
TRAINED_AS = {"standard": "standard_april", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka_batch_topk"}
FOLDED_BY = {  # SAELens' methods for the normalisations that weights can hold
    "expected_average_only_in": "fold_activation_norm_scaling_factor(factor)",
    "covariance_whitening": "fold_activation_whitening(mean, matrix, inverse)",
}


def read_saelens(folder: Path, cfg: dict) -> Found:
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = undamaged(present(folder / "sae_weights.safetensors"), cfg)
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        shape = tensors.get_slice("W_enc").get_shape() if "W_enc" in names else (cfg.get("d_in"), cfg.get("d_sae"))
        threshold = tensors.get_tensor("threshold") if "threshold" in names else None
    return saelens_found(cfg, shape, threshold, lambda: load_file(file), str(folder))


@functools.cache
def read_release(release: str, sae_id: str) -> Found:
    """A pretrained SAE of SAELens' list; the download lies in the hub's own cache."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known, place = get_pretrained_saes_directory(), f"{release}:{sae_id}"
    if release not in known:
        near = difflib.get_close_matches(release, known, 1, 0)[0]
        raise FileNotFoundError(f"{place}: there is no such folder, and SAELens has no release {release!r}; the "
                                f"nearest is {near!r}\n"
                                f"{EXPECTED}")
    ids = known[release].saes_map
    if sae_id not in ids:
        near = difflib.get_close_matches(sae_id, ids, 1, 0)[0]
        raise ValueError(f"{place}: the release has no such SAE; the nearest is {near!r}\n"
                         f"write {release}:{near}, or another of its {len(ids)}")
    try:
        theirs = SAE.from_pretrained(release, sae_id)
    except OSError as error:  # the hub's own errors and those of its connections are of this kind
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConnectionError(f"{place}: the Hugging Face hub did not give it: {reason[:300]}\n"
                              "check the connection, and for a gated repository HF_TOKEN; or save it where the hub is "
                              "reached (SAE.from_pretrained(…).save_model(folder)) and give that folder") from error
    weights = theirs.state_dict()
    return saelens_found(theirs.cfg.to_dict(), weights["W_enc"].shape, weights.get("threshold"), lambda: weights, place)


def saelens_found(cfg: dict, shape, threshold_F: Tensor | None, load: Callable[[], dict[str, Tensor]],
                  place: str) -> Found:
    """What SAELens' configuration and weights amount to here; ValueError for what weights cannot express."""
    architecture, k = refused(cfg, place)
    variant, hyper = trained_as(cfg, architecture, threshold_F)
    if architecture == "topk":
        hyper = hyper | {"k": k}
    if variant == "jumprelu":
        hyper = {"target_l0": min(32, shape[1])} | hyper
    return Found(variant, *shape, hyper, None, metadata_of(cfg), lambda: saelens_state(load(), cfg, variant, place),
                 place)


def refused(cfg: dict, place: str) -> tuple[str, int | None]:
    """SAELens' architecture and k; ValueError for what changes the features and cannot be folded into weights."""
    activation = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"  # these two before version 6
    architecture = "topk" if activation == "topk" else cfg.get("architecture") or "standard"
    k = (cfg.get("activation_fn_kwargs") or {}).get("k") or cfg.get("k")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{place}: no variant reads SAELens' architecture {architecture!r}\n"
                         + (f"save it for inference: sae.save_inference_model(folder) writes one of {known}"
                            if architecture in TRAINED_AS else f"known: {known}"))
    if activation not in ("relu", "topk"):
        raise ValueError(f"{place}: no variant has the activation function {activation!r}\n"
                         "choose an SAE with relu or topk")
    if architecture == "topk" and not k:
        raise ValueError(f"{place}: a topk SAE whose cfg.json says no k\nadd \"k\": … to {Path(place) / 'cfg.json'}")
    normalise = cfg.get("normalize_activations") or "none"
    # the two values it once had were True and False
    normalise = "expected_average_only_in" if normalise is True else normalise
    if normalise != "none":
        raise ValueError(f"{place}: it takes activations normalised by {normalise!r}, and its weights do not hold "
                         "that\n"
                         + (f"fold it in SAELens first: sae.{FOLDED_BY[normalise]}, then sae.save_model(folder)"
                            if normalise in FOLDED_BY
                            else "it differs from token to token, which no weights express; choose another SAE"))
    said = cfg | (cfg.get("metadata") or {})
    hook = said.get("hook_name") or said.get("hook_point") or ""
    if said.get("hook_name_out") not in (None, hook):
        raise ValueError(f"{place}: a transcoder from {hook} to {said['hook_name_out']}\n"
                         "choose an SAE: it reconstructs what it reads")
    check_residual(cfg["reshape_activations"] if cfg.get("reshape_activations") == "hook_z" else hook, place)
    return architecture, k


def trained_as(cfg: dict, architecture: str, threshold_F: Tensor | None) -> tuple[str, dict]:
    """The variant a SAELens file was trained as and its hyper-parameters, if it says so; else the architecture's."""
    said = cfg.get("metadata") or {}
    variant, hyper = said.get("architecture_variant"), said.get("hyper") or {}
    if variant is None:
        details = said.get("training_architecture_details") or {}
        variant = TRAINED_AS.get(said.get("training_architecture"))
        hyper = {k: v for k, v in details.items() if k == "k"}
    if variant not in ARCHITECTURES[architecture]:
        return architecture, {}
    if architecture == "jumprelu" and variant != "jumprelu" and not of_one_value(threshold_F):
        return architecture, {}
    return variant, hyper


def of_one_value(threshold_F: Tensor | None) -> bool:
    """Whether there is one threshold for all features, as every variant but jumprelu has it."""
    if threshold_F is None:
        return False
    return bool(threshold_F.max() - threshold_F.min() <= 1e-5 * threshold_F.abs().max())


def saelens_state(weights: dict[str, Tensor], cfg: dict, variant: str, place: str) -> dict[str, Tensor]:
    """SAELens' tensors as the variant's state: factors, decoder norms and centring folded."""
    state = {name: tensor.detach().float() for name, tensor in weights.items()}
    # before version 6: on features, for the decoder only
    for name in {"scaling_factor", "finetuning_scaling_factor"} & state.keys():
        factor_F = state.pop(name)
        if cfg.get("finetuning_scaling_factor"):
            state["W_dec"] = factor_F[:, None] * state["W_dec"]
        elif not torch.allclose(factor_F, torch.ones_like(factor_F)):
            raise ValueError(f"{place}: the weights hold a {name}, and cfg.json says that none is used\n"
                             "set finetuning_scaling_factor to true there if the SAE was fine-tuned")
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm_F = state["W_dec"].norm(dim=1)
        state["W_enc"], state["b_enc"] = state["W_enc"] * norm_F, state["b_enc"] * norm_F
        state["W_dec"] = state["W_dec"] / norm_F.clamp_min(1e-8)[:, None]
    if "log_threshold" in state:
        state["threshold"] = state.pop("log_threshold").exp()
    if "threshold" in state:
        theta_F = state.pop("threshold").clamp_min(0)  # SAELens takes the ReLU as well
        state["theta"] = theta_F if variant == "jumprelu" else theta_F.median()
    return recentred(state, cfg.get("apply_b_dec_to_input", True), variant != "jumprelu")


# ------------------------------------------------------------------------------------------------ dictionary_learning

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
           "gate_bias": "b_gate",
           "mag_bias": "b_mag", "threshold": "theta"}
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
        hyper["k"] = int(k)
    if variant == "jumprelu":
        hyper["target_l0"] = config.get("target_l0") or min(32, state["W_enc"].shape[1])
    if variant == "matryoshka_batch_topk" and len(config.get("group_weights") or ()) == 5:
        hyper["weights"] = tuple(config["group_weights"])
    if variant != "topk" and "theta" in state:
        state["theta"] = state["theta"].clamp_min(0)  # below 0 (none yet) the library passes all that ReLU does
    return variant, hyper, recentred(state, centred, variant != "jumprelu")


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
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        return f"its index ({error})"


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


# -------------------------------------------------------------------------------------------- as the beginning of a run


def settings_of(place: str, trust_code: bool = False) -> dict:
    """What the SAEs at a place say of settings left open: variant, width, layers. ValueError for untrusted code."""
    found = list(find(place).values())
    if not trust_code:
        for one in found:
            check_trusted(one)
    if len({(f.variant, f.d_sae) for f in found if f.scale is None}) > 1:
        raise ValueError(f"{place}: SAEs of several variants or widths\nname one of {', '.join(find(place))}")
    layers = sorted({f.metadata["layer"] for f in found if f.metadata["layer"] is not None})
    said = dict(variant=found[0].variant, d_sae=found[0].d_sae)
    if layers:
        said["layers"] = ",".join(map(str, layers))
    return said


def check_width(place: str, d_in: int) -> None:
    """ValueError where an SAE at a place was trained on another residual stream than one of `d_in` dimensions."""
    for one in find(place).values():
        if one.d_in != d_in:
            raise ValueError(f"{one.place}: an SAE of {one.d_in} dimensions, and the model's residual stream has "
                             f"{d_in}\n"
                             f"it was trained on {one.metadata['model_name'] or 'another model'}: give --model")


def files(place: str) -> list[Path]:
    """The files at a place that decide what its SAEs are; none for a release, which its name decides."""
    folders = [Path(one.place) for one in find(place).values()]
    return [folder / name for folder in folders for name in sorted(FILES | {"variant.py"}) if (folder / name).is_file()]


def of_trainer(sae) -> base.SAE | None:
    """The variant with the weights of a trainer's ae, if its class is one that dictionary_learning has; else None."""
    try:
        config = getattr(sae.trainer, "config", None)
        config = config if isinstance(config, dict) else {}
        variant, hyper, state = from_dictionary_learning(type(sae.ae).__name__, sae.ae.state_dict(), config)
        return build(Found(variant, *state["W_enc"].shape, hyper, None, {}, lambda: state, variant))
    # a class of the same name that is another: whatever does not fit, the own format holds
    except Exception:  # noqa: BLE001
        return None


def suffix(name: str) -> str:
    """What tells an SAE from its siblings: `layer_12.k_40` -> `.k_40`, `trainer_3` -> `.trainer_3`, others -> ``."""
    if name.startswith("layer_"):
        return re.sub(r"^layer_\d+", "", name)
    return f".{name}" if name.startswith("trainer_") else ""


def hypers_of(place: str, known: dict, fixed: dict) -> dict[str, dict]:
    """Hyper-parameters per SAE of a layer, by its name's suffix: those found that the variant knows, and the fixed."""
    return {suffix(name): {k: v for k, v in f.hyper.items() if k in known} | fixed for name, f in find(place).items()}


@torch.no_grad()
def fold_norms(sae: base.SAE, place: str) -> None:
    """Give an SAE decoder rows of unit norm in place; ValueError where that would change what it does."""
    norm_F, before = sae.W_dec.norm(dim=1).clamp_min(1e-12), TrainedSAE(duplicate(sae), 1.0)
    if (norm_F - 1).abs().max() < 1e-4:
        return
    for name in ("W_enc", "b_enc", "b_gate", "b_mag", "theta"):
        tensor = getattr(sae, name, None)
        if tensor is not None and tensor.shape[-1:] == norm_F.shape:
            tensor *= norm_F
    sae.W_dec /= norm_F[:, None]
    x_ND = sae.b_dec + torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(0))
    z_NF = before.encode(x_ND)
    if (TrainedSAE(sae, 1.0).encode(x_ND) - z_NF).norm() > 1e-3 * z_NF.norm():
        raise ValueError(f"{place}: its decoder rows have norms {float(norm_F.min()):.3g} to "
                         f"{float(norm_F.max()):.3g}, and this variant keeps them at 1, which would select other "
                         "features\n--num_tokens=0 evaluates it; to train it further choose --variant standard_april, "
                         "or one of your own without unit_norm_decoder")
    sae.requires_grad_(True).train()  # TrainedSAE freezes what it wraps


def adopt(sae: base.SAE, place: str, name: str, trust_code: bool = False) -> float | None:
    """Give a fresh SAE the weights found for `name` (layer_12.k_40); returns their scale, None for raw activations.

    Weights of another variant are taken where names and shapes agree, encoder and decoder at least. ValueError.
    """
    found = find(place)
    layer = re.match(r"layer_(\d+)", name)[1]
    fitting = [f for key, f in found.items() if suffix(key) == suffix(name)
               and f.metadata["layer"] in (None, int(layer))]
    if name not in found and len(fitting) != 1:
        raise ValueError(f"{place}: none of its SAEs is {name}\n"
                         f"there are {', '.join(found)}: choose --layers and --sweep accordingly")
    one = found[name] if name in found else fitting[0]
    like = build(one, trust_code)
    if sae.unit_norm_decoder:
        fold_norms(like, one.place)
    if type(sae).__module__ == type(like).__module__:
        sae.load_state_dict(like.state_dict())
        return one.scale
    state, mine = recentred(like.state_dict(), like.centred, sae.centred), sae.state_dict()
    taken = {k: t for k, t in state.items() if k in mine and t.shape == mine[k].shape}
    if not {"W_enc", "W_dec"} <= taken.keys():
        raise ValueError(f"{one.place}: the weights of {one.variant} do not fit {type(sae).__module__}, not even W_enc "
                         "and W_dec\n"
                         "leave out --variant, or choose one of the same form and width")
    sae.load_state_dict(taken, strict=False)
    return one.scale
