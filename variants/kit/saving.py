"""Trained SAEs on disk: SAELens' format where SAELens has the architecture, else the variant's own file with its state.

SAELens' format (cfg.json + sae_weights.safetensors, read by `sae_lens.SAE.load_from_disk(folder)`): W_enc [D, F],
b_enc [F] (gated: b_gate, b_mag, r_mag; jumprelu: also threshold), W_dec [F, D] with unit rows, b_dec [D], on raw
activations: the training normalisation is folded into biases and thresholds.
Own format: cfg.json with architecture "variant", state.safetensors, variant.py.
Either is read by one line:

    sae = variants.kit.saving.load_sae("run_1/sae/layer_12")   # encode(x_raw), decode(features), W_dec
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import torch
from torch import Tensor

import variants
from variants import base
from variants.kit import files, imperative, interchange
from variants.kit.copying import duplicate
from variants.kit.found import DIGEST
from variants.kit.trained import TrainedSAE

FILES = {"cfg.json", "sae_weights.safetensors", "state.safetensors", "variant.py"}  # what a saved SAE may consist of


def save_sae(folder: Path, sae: base.SAE, scale: float, source: Path, hyper: dict, metadata: dict) -> None:
    """Write a trained SAE to `folder`, whole or not at all. `source`: the variant's file. ValueError: `check_place`."""
    from safetensors.torch import save_file

    check_place(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    trained = TrainedSAE(duplicate(sae, "cpu"), scale)
    known = trained
    like = interchange.of_trainer(trained.sae) if isinstance(sae, imperative.Imperative) else None
    if like and same(trained, TrainedSAE(like, scale)):
        known = TrainedSAE(like, scale)
    k = {"k": known.sae.k} if hasattr(known.sae, "k") else {}
    cfg = dict(d_in=sae.d_in, d_sae=len(trained.gain_F), dtype="float32", device="cpu", metadata=metadata)
    # what the weights do not say: read back, a BatchTopK SAE is one again, and not just SAELens' JumpReLU
    trained_as = dict(sae_lens_version="6.0.0", architecture_variant=source.stem, hyper=hyper | k)
    if not (known.sae.saelens and write_saelens(temporary, known, cfg | dict(metadata=metadata | trained_as))):
        # copies, since two names may stand for one tensor (tied weights), which the format refuses
        state = {name: tensor.clone().contiguous() for name, tensor in trained.sae.state_dict().items()}
        save_file(state, temporary / "state.safetensors")
        (temporary / "variant.py").write_bytes(variants.text(source))
        told = {key: value for key, value in getattr(sae, "setting", {}).items() if key != "device"}
        init = dict(d_in=sae.d_in, d_sae=sae.d_sae, setting=told)
        own = dict(architecture="variant", variant=source.stem, init=init, hyper=hyper, scale=scale)
        (temporary / "cfg.json").write_text(json.dumps(cfg | own, indent=1), encoding="utf-8")
    note_digest(temporary)
    if folder.exists():  # of an interrupted attempt of the same run
        shutil.rmtree(folder)
    files.put(temporary, folder)


def note_digest(folder: Path) -> None:
    """Note the weights' SHA-256 in the cfg.json beside: no format of weights says that a bit was flipped."""
    weights = next(folder.glob("*.safetensors"))
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    cfg["metadata"] = (cfg.get("metadata") or {}) | {DIGEST: files.digest(weights)}
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1), encoding="utf-8")


def check_place(folder: Path) -> None:
    """ValueError where `save_sae` would write elsewhere than `folder` says, or remove what is not its own."""
    if ".." in folder.parts or folder.is_symlink():
        raise ValueError(f"{folder}: an SAE is saved in a folder of its own, without .. in its path, and through no "
                         "link\n"
                         "give the path of that folder itself")
    others = sorted({file.name for file in folder.iterdir()} - FILES) if folder.is_dir() else []
    if others or folder.is_file():
        raise ValueError(f"{folder} holds {', '.join(others[:3]) or 'a file'}, which is no saved SAE: it is not "
                         "replaced\n"
                         "move that away, or save elsewhere")


def write_saelens(folder: Path, trained: TrainedSAE, cfg: dict) -> bool:
    """Write SAELens' files; False, and no file, where they read back to other features or another decoder.

    A variant made from another one's file or class may still carry its `saelens` while it computes something else.
    """
    from safetensors.torch import save_file

    try:
        tensors, extra = folded(trained)
        save_file(tensors, folder / "sae_weights.safetensors")
        cfg = cfg | dict(architecture=trained.sae.saelens, apply_b_dec_to_input=True, normalize_activations="none",
                         reshape_activations="none") | extra
        (folder / "cfg.json").write_text(json.dumps(cfg, indent=1), encoding="utf-8")
        if same(trained, load_sae(folder)):
            return True
    # other weights or shapes, a variant's file edited or deleted meanwhile: the own format holds all
    except Exception:  # noqa: BLE001
        pass
    for name in ("sae_weights.safetensors", "cfg.json"):
        (folder / name).unlink(missing_ok=True)
    return False


def same(trained: TrainedSAE, other: TrainedSAE) -> bool:
    """Whether two SAEs give the same features and reconstructions, on random activations of the training scale."""
    d_in = trained.sae.d_in
    spread_ND = trained.scale * torch.randn(64, d_in, generator=torch.Generator().manual_seed(0)) / d_in**0.5
    x_ND = spread_ND + trained.decode(torch.zeros(1, len(trained.gain_F)))
    z_NF = trained.encode(x_ND)
    pairs = (z_NF, other.encode(x_ND)), (trained.decode(z_NF), other.decode(z_NF))
    # features at a threshold may fall either way
    return all((one - two).norm() <= 1e-3 * one.norm() for one, two in pairs)


def folded(trained: TrainedSAE) -> tuple[dict[str, Tensor], dict]:
    """SAELens' tensors and architecture-specific configuration of a trained SAE."""
    sae = trained.sae
    extra = {}
    if sae.saelens in ("topk", "abstopk"):
        extra = dict(k=sae.k, rescale_acts_by_decoder_norm=False)
    tensors = dict(W_dec=trained.W_dec, b_dec=sae.b_dec.detach() * trained.scale)
    if sae.saelens == "matching_pursuit":
        extra = dict(max_iterations=sae.k, residual_threshold=0.0, stop_on_duplicate_support=False)
    else:
        tensors |= dict(W_enc=trained.W_enc)
    if sae.saelens == "gated":  # both paths grow with W_enc, so r_mag, the ratio of the two, stays as it is
        tensors |= dict(b_gate=sae.b_gate * trained.gain_F, b_mag=sae.b_mag * trained.gain_F, r_mag=sae.r_mag)
    elif sae.saelens != "matching_pursuit":
        tensors |= dict(b_enc=trained.b_enc)
    if sae.saelens == "jumprelu":  # theta: one for all features (0-d) or one for each
        tensors |= dict(threshold=sae.theta.detach() * trained.gain_F)
        extra = dict(apply_b_dec_to_input=sae.centred)
    return {k: v.float().contiguous() for k, v in tensors.items()}, extra


def load_sae(folder: str | Path, trust_code: bool = False) -> TrainedSAE:
    """An SAE for raw activations from a folder of `save_sae`, in either format, or any that `interchange` knows.

    Its variant.py is run if it does the same as one in variants/, or with `trust_code`; else ValueError.
    """
    found = interchange.read(Path(folder))
    return TrainedSAE(interchange.build(found, trust_code), found.scale or 1.0)
