"""SAEs made elsewhere, read as variants of this project: `find` says what lies at a place, `build` makes the module.

A place is one of
    a folder in SAELens' format (saelens.py) or in the own format (saving.py)
    a dictionary_learning folder (dictionary_learning.py), or one that holds several (trainer_0, trainer_1, …)
    a run folder: everything under its sae/
    `release:sae_id` from SAELens' list of pretrained SAEs, fetched from the Hugging Face hub

Features are those that the file's own library gives.

Shapes: D = d_in, F = d_sae, N any number of rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

import variants
from variants import base
from variants.kit.copying import duplicate
from variants.kit.dictionary_learning import from_dictionary_learning, read_dictionary_learning
from variants.kit.found import (
    AGAIN,
    EXPECTED,
    Found,
    metadata_of,
    present,
    read_json,
    recentred,
    undamaged,
)
from variants.kit.hyper import hyperparameters
from variants.kit.saelens import PER_FEATURE, read_release, read_saelens
from variants.kit.trained import TrainedSAE

FILES = {"cfg.json", "sae_weights.safetensors", "state.safetensors", "ae.pt", "config.json"}


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


def read_own(folder: Path, cfg: dict) -> Found:
    from safetensors.torch import load_file

    file, code = undamaged(present(folder / "state.safetensors"), cfg), present(folder / "variant.py")
    lacks = [key for key in ("init", "hyper", "scale") if key not in cfg]
    if lacks or not {"d_in", "d_sae"} <= set(cfg["init"]):
        raise ValueError(f"{folder / 'cfg.json'} lacks {', '.join(lacks) or 'd_in or d_sae in init'}\n{AGAIN}")
    # where both do the same the project's own is run: beside the other there may lie an __init__.py
    does = variants.meaning(code.read_bytes())
    same = [name for name in variants.names() if variants.meaning(variants.path(name).read_bytes()) == does]
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
    if variant in PER_FEATURE:
        z_pre_NF = x_ND @ state["W_enc"] + state["b_enc"]
        return z_pre_NF * (z_pre_NF > state["theta"])
    if variant == "matching_pursuit":
        return pursued(x_ND - state["b_dec"], state["W_dec"], int(hyper["k"]))
    a_NF = (x_ND - state["b_dec"]) @ state["W_enc"]
    if variant == "abs_topk":
        a_NF = a_NF + state["b_enc"]
        index_NK = a_NF.abs().topk(int(hyper["k"]), dim=1).indices
        return torch.zeros_like(a_NF).scatter(1, index_NK, a_NF.gather(1, index_NK))
    if variant == "gated":
        return (a_NF + state["b_gate"] > 0) * F.relu(state["r_mag"].exp() * a_NF + state["b_mag"])
    z_NF = F.relu(a_NF + state["b_enc"])
    if variant != "topk" and "theta" in state:
        return z_NF * (z_NF > state["theta"])
    if "k" not in hyper:
        return z_NF
    top_NK, index_NK = z_NF.topk(max(1, round(hyper["k"])), dim=1)
    return torch.zeros_like(z_NF).scatter(1, index_NK, top_NK)


def pursued(r_ND: Tensor, W_dec_FD: Tensor, k: int) -> Tensor:
    """Features [N, F] of k steps of matching pursuit: each takes off the feature that the residual r matches best."""
    z_NF = r_ND.new_zeros(len(r_ND), len(W_dec_FD))
    for _ in range(k):
        most_N, index_N = (r_ND @ W_dec_FD.T).relu().max(1)
        z_NF = z_NF.scatter_add(1, index_N[:, None], most_N[:, None])
        r_ND = r_ND - most_N[:, None] * W_dec_FD[index_N]
    return z_NF


@torch.no_grad()
def rescale(sae: base.SAE, scale: float) -> None:
    """Make weights for raw activations, in place, ones for activations/scale: x_raw/scale then gives z_raw/scale."""
    for name in ("b_enc", "b_dec", "b_gate", "b_mag", "theta"):
        tensor = getattr(sae, name, None)
        if tensor is not None:
            kept = (tensor < 0) & (name == "theta")  # a negative theta says that there is none yet
            tensor.copy_(torch.where(kept, tensor, tensor / scale))


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


def hypers_of(place: str, module: ModuleType, fixed: dict) -> dict[str, dict]:
    """Hyper-parameters per SAE of a layer, by its name's suffix: those found that the variant knows, and the fixed.

    Not those of schedules: what these lead to is reached, and a run of its own would go through them once more.
    """
    known = hyperparameters(module).keys() - set(module.SAE.schedules)
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


def shared_state(sae: base.SAE, like: base.SAE) -> dict[str, Tensor]:
    """The state of `like` for `sae`, of one variant; a buffer that hyper-parameters give one of them alone stays sae's.

    A parameter that one of them lacks is for load_state_dict to refuse.
    """
    mine, theirs = sae.state_dict(), like.state_dict()
    absent = {name: mine[name] for name, _ in sae.named_buffers() if name not in theirs}
    left_over = {name for name, _ in like.named_buffers() if name not in mine}
    return {name: tensor for name, tensor in theirs.items() if name not in left_over} | absent


def of_name(place: str, name: str) -> Found:
    """The SAE that a run calls `name` (layer_12.k_40): of that name, or the only one of its layer and suffix."""
    found = find(place)
    layer = re.match(r"layer_(\d+)", name)[1]
    fitting = [f for key, f in found.items() if suffix(key) == suffix(name)
               and f.metadata["layer"] in (None, int(layer))]
    if name not in found and len(fitting) != 1:
        raise ValueError(f"{place}: none of its SAEs is {name}\n"
                         f"there are {', '.join(found)}: choose --layers and --sweep accordingly")
    return found[name] if name in found else fitting[0]


def max_norm(place: str, name: str) -> float | None:
    """The norm above which tokens were left out of the SAE's training, and are to be left out of its evals."""
    return of_name(place, name).metadata.get("max_norm")


@torch.no_grad()
def adopt(sae: base.SAE, place: str, name: str, trust_code: bool = False) -> float | None:
    """Give a fresh SAE the weights found for `name` (layer_12.k_40); returns their scale, None for raw activations.

    Weights of another variant are taken where names and shapes agree, encoder and decoder at least. ValueError.
    """
    one = of_name(place, name)
    like = build(one, trust_code)
    if sae.unit_norm_decoder:
        fold_norms(like, one.place)
    if type(sae).__module__ == type(like).__module__:
        sae.load_state_dict(shared_state(sae, like))
        return one.scale
    state, mine = like.state_dict(), sae.state_dict()
    if not {"W_enc", "W_dec"} <= _fitting(state, mine).keys():
        raise ValueError(f"{one.place}: the weights of {one.variant} do not fit {type(sae).__module__}, not even W_enc "
                         "and W_dec\n"
                         "leave out --variant, or choose one of the same form and width")
    sae.load_state_dict(_fitting(recentred(state, like.centred, sae.centred), mine), strict=False)
    return one.scale


def _fitting(state: dict[str, Tensor], mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state that have a counterpart of their shape."""
    return {name: tensor for name, tensor in state.items() if name in mine and tensor.shape == mine[name].shape}
