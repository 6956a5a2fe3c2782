"""The trained SAEs beside a run's figures, ready to encode: from the sae/ of a run's folder, or of a stored baseline.

A baseline keeps an SAE in a small form, in sae/<SAE>/:

    decoder.safetensors   W_dec [F, D] int8, every row by its own scale, which no cosine sees
    encoder.safetensors   all else of the variant's state: matrices in float16, biases and thresholds as they were, and
                          W_dec_norm [F], the norms of the decoder's rows; W_dec in their place, in float16, where the
                          variant encodes by it
    cfg.json              variant, sizes, hyper-parameters, scale, metadata, and the hashes of both
    variant.py            of an SAE in the variant's own format, its code

Code that is none of variants/ is run with `trust_code` alone. Only what is asked for is read, torch too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from runs.reading import Run

DECODER, ENCODER = "decoder.safetensors", "encoder.safetensors"
SMALL = "compact"  # the architecture that cfg.json states
SAME = 0.002  # of the features' norm, by which float16 may change those of the median row of random activations


def folder_of(run: Run) -> Path | None:
    """Where the SAE of a run lies, or None."""
    folder = run.path.parent / "sae" / run.section
    is_name = bool(run.section) and Path(run.section).name == run.section
    return folder if is_name and folder.is_dir() else None


def trained(run: Run, trust_code: bool = False):
    """The SAE of a run or a stored baseline, a TrainedSAE on the CPU. ValueError, OSError: there is none; why."""
    from variants.kit import saving

    folder = folder_of(run)
    if folder is None:
        raise ValueError(f"{run.name} keeps no SAE of its own: there is no sae/{run.section}\n"
                         "give a run's folder that has one, or python -m runs.stability for a stored baseline")
    if not (folder / DECODER).is_file():
        return saving.load_sae(folder, trust_code)
    if not (folder / ENCODER).is_file():
        raise ValueError(f"{run.name} keeps its decoder alone, without an encoder\n"
                         "keep both: python -m runs.stability RUN BASELINE")
    return _built(_read(folder), trust_code)


# ------------------------------------------------------------------------------------------------ the small form


def row_bytes(W_dec_FD):
    """A decoder [F, D] in int8, every row by its own largest entry."""
    import torch

    largest_F1 = W_dec_FD.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return (W_dec_FD / largest_F1 * 127).round().to(torch.int8)


def keep_encoder(folder: Path, place: Path) -> Path:
    """Keep in `place`, where its decoder.safetensors lies, what encoding takes of the SAE saved in `folder`.

    Returns the file. ValueError: of code that is not ours, or float16 would change what it finds.
    """
    from safetensors.torch import load_file, save

    from runs.folder import write_bytes, write_json
    from variants.kit import files, interchange
    from variants.kit.found import DIGEST

    found = interchange.read(folder)
    sae, state = _built(found), found.load()
    W_dec_FD = load_file(place / DECODER)["W_dec"]
    tensors = _without_decoder(sae, state, W_dec_FD)
    if "W_dec_norm" in tensors and _moved(sae, found, tensors, W_dec_FD) > SAME:  # it encodes by its decoder
        del tensors["W_dec_norm"]
        tensors["W_dec"] = _half(state["W_dec"])
    moved = _moved(sae, found, tensors, W_dec_FD)
    if moved > SAME:
        raise ValueError(f"{folder}: in float16 its features differ by {moved:.1%}")
    metadata = {key: value for key, value in found.metadata.items() if value is not None}
    write_bytes(place / ENCODER, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    metadata |= {DIGEST: files.digest(place / ENCODER), "decoder_sha256": files.digest(place / DECODER)}
    init = dict(d_in=found.d_in, d_sae=found.d_sae, setting=found.setting)
    if found.scale is not None:  # in the variant's own format its code is part of it
        write_bytes(place / "variant.py", (folder / "variant.py").read_bytes())
    variant = json.loads((folder / "cfg.json").read_text(encoding="utf-8")).get("variant", found.variant)
    write_json(place / "cfg.json", dict(architecture=SMALL, variant=variant, init=init, hyper=found.hyper,
                                        scale=found.scale, metadata=metadata))
    return place / ENCODER


def _built(found, trust_code: bool = False):
    from variants.kit import interchange
    from variants.kit.trained import TrainedSAE

    return TrainedSAE(interchange.build(found, trust_code), found.scale or 1.0)


def _without_decoder(sae, state: dict, kept_FD) -> dict:
    """A state in float16; without W_dec where that is the decoder which is kept, but with the norms of its rows."""
    tensors = {name: _half(tensor) for name, tensor in state.items()}
    W_dec_FD = state.get("W_dec")
    if W_dec_FD is None or W_dec_FD.shape != kept_FD.shape or not W_dec_FD.equal(sae.sae.decoder):
        return tensors
    del tensors["W_dec"]
    return tensors | {"W_dec_norm": W_dec_FD.float().norm(dim=1)}


def _half(tensor):
    """Matrices in float16 where that holds their values; all else as it is."""
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    half = tensor.half()
    return half if bool(half.isfinite().all()) else tensor


def _whole(tensors: dict, W_dec_FD) -> dict:
    """The variant's state from the small form."""
    from torch.nn import functional

    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    norm_F = state.pop("W_dec_norm", None)
    if norm_F is not None:
        state["W_dec"] = functional.normalize(W_dec_FD.float(), dim=1) * norm_F[:, None]
    return state


def _moved(sae, found, tensors: dict, W_dec_FD) -> float:
    """By how much the small form changes the features of the median row of random activations, of their norm."""
    import torch

    small = _built(dataclasses.replace(found, load=lambda: _whole(tensors, W_dec_FD)))
    spread_ND = torch.randn(256, found.d_in, generator=torch.Generator().manual_seed(0)) / found.d_in**0.5
    reach = float(sae.scale) * max(1.0, float(sae.decode(torch.zeros(1, len(sae.gain_F))).norm()))
    z_NF = sae.encode(reach * spread_ND)
    moved_N = (small.encode(reach * spread_ND) - z_NF).norm(dim=1) / z_NF.norm(dim=1).clamp_min(1e-12)
    return float(moved_N.median())  # features that are nearly tied may fall either way


def _read(folder: Path):
    """What is `variants.kit.found.Found` of a small form. ValueError, OSError: damaged, or of two SAEs."""
    from safetensors.torch import load_file

    import variants
    from variants.kit import files
    from variants.kit.found import AGAIN, Found, metadata_of, read_json, undamaged

    cfg = read_json(folder / "cfg.json")
    missing = {"variant", "init", "hyper", "scale", "metadata"} - cfg.keys()
    if cfg.get("architecture") != SMALL or missing:
        raise ValueError(f"{folder / 'cfg.json'} is not that of a kept encoder\n{AGAIN}")
    encoder, decoder = undamaged(folder / ENCODER, cfg), undamaged(folder / DECODER, {})
    if files.digest(decoder) != cfg["metadata"].get("decoder_sha256"):
        raise ValueError(f"{folder}: encoder and decoder are of two SAEs\nkeep both: python -m runs.stability RUN "
                         "BASELINE")
    variant, code = cfg["variant"], folder / "variant.py"
    if cfg["scale"] is not None:
        does = variants.meaning(code.read_bytes())
        ours = [name for name in variants.names() if variants.meaning(variants.path(name).read_bytes()) == does]
        variant = ours[0] if ours else str(code)

    def load() -> dict:
        return _whole(load_file(encoder), load_file(decoder)["W_dec"])

    init = cfg["init"]
    return Found(variant, init["d_in"], init["d_sae"], cfg["hyper"], cfg["scale"], metadata_of(cfg), load, str(folder),
                 init.get("setting") or {})
