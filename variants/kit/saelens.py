"""SAELens' format, of any version, and its list of pretrained SAEs, read as variants of this project.

What that library does besides this project's formulas (centring, decoder norms, factors) is folded into the weights;
what no weights can express is refused.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from variants.kit.found import (
    EXPECTED,
    Found,
    check_residual,
    metadata_of,
    present,
    recentred,
    undamaged,
)

# SAELens' name -> variants that give the same features: the first, unless the file says how it was trained
ARCHITECTURES = {
    "standard": ("standard", "standard_april", "p_anneal"),
    "topk": ("topk", "batch_topk", "matryoshka_batch_topk", "frozen_decoder", "aligned"),
    "gated": ("gated",),
    "jumprelu": ("jumprelu", "batch_topk", "matryoshka_batch_topk", "jumprelu_tanh"),
    "abstopk": ("abs_topk",),
    "matching_pursuit": ("matching_pursuit",),
}
K_OF = {"topk": "k", "abstopk": "k", "matching_pursuit": "max_iterations"}  # what cfg.json calls k
PER_FEATURE = ("jumprelu", "jumprelu_tanh")  # a threshold for each feature, and an encoder of x, not of x − b_dec
# SAELens 6 trains "standard" with free decoder norms; for inference it saves these under another name or the same
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
                                f"nearest is {near!r}\n{EXPECTED}")
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
    shape = weights["W_dec"].shape[::-1]
    return saelens_found(theirs.cfg.to_dict(), shape, weights.get("threshold"), lambda: weights, place)


def saelens_found(cfg: dict, shape, threshold_F: Tensor | None, load: Callable[[], dict[str, Tensor]],
                  place: str) -> Found:
    """What SAELens' configuration and weights amount to here; ValueError for what weights cannot express."""
    architecture, k = refused(cfg, place)
    variant, hyper = trained_as(cfg, architecture, threshold_F)
    if architecture in K_OF:
        hyper = hyper | {"k": k}
    if variant == "jumprelu":
        hyper = {"target_l0": min(32, shape[1])} | hyper
    return Found(variant, *shape, hyper, None, metadata_of(cfg), lambda: saelens_state(load(), cfg, variant, place),
                 place)


def refused(cfg: dict, place: str) -> tuple[str, int | None]:
    """SAELens' architecture and k; ValueError for what changes the features and cannot be folded into weights."""
    activation = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"  # these two before version 6
    architecture = "topk" if activation == "topk" else cfg.get("architecture") or "standard"
    k = (cfg.get("activation_fn_kwargs") or {}).get("k") or cfg.get(K_OF.get(architecture, "k"))
    if architecture not in ARCHITECTURES:
        advice = f"known: {', '.join(ARCHITECTURES)}"
        if architecture in TRAINED_AS:
            advice = ("save it for inference: sae.save_inference_model(folder) writes one of "
                      f"{', '.join(ARCHITECTURES)}")
        raise ValueError(f"{place}: no variant reads SAELens' architecture {architecture!r}\n{advice}")
    if activation not in ("relu", "topk"):
        raise ValueError(f"{place}: no variant has the activation function {activation!r}\n"
                         "choose an SAE with relu or topk")
    if architecture in K_OF and not k:
        raise ValueError(f"{place}: a {architecture} SAE whose cfg.json says no {K_OF[architecture]}\n"
                         f"add \"{K_OF[architecture]}\": … to {Path(place) / 'cfg.json'}")
    if architecture in K_OF and k != int(k):
        raise ValueError(f"{place}: a {architecture} SAE with k = {k}: it keeps a whole number of features of each "
                         f"token\ncorrect \"{K_OF[architecture]}\" in {Path(place) / 'cfg.json'}")
    if architecture == "matching_pursuit" and (cfg.get("residual_threshold", 0.01) > 0
                                               or cfg.get("stop_on_duplicate_support", True)):
        raise ValueError(f"{place}: a pursuit that stops by residual_threshold or stop_on_duplicate_support; here it "
                         "takes k steps\nset the first to 0 and the second to false in cfg.json, and max_iterations, "
                         "if that is the SAE you mean")
    normalise = cfg.get("normalize_activations") or "none"
    if normalise is True:  # True and False were once its two values
        normalise = "expected_average_only_in"
    if normalise != "none":
        advice = "it differs from token to token, which no weights express; choose another SAE"
        if normalise in FOLDED_BY:
            advice = f"fold it in SAELens first: sae.{FOLDED_BY[normalise]}, then sae.save_model(folder)"
        raise ValueError(f"{place}: it takes activations normalised by {normalise!r}, and its weights do not hold "
                         f"that\n{advice}")
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
        return ARCHITECTURES[architecture][0], {}
    if architecture == "jumprelu" and variant not in PER_FEATURE and not of_one_value(threshold_F):
        return ARCHITECTURES[architecture][0], {}
    return variant, hyper


def of_one_value(threshold_F: Tensor | None) -> bool:
    """Whether there is one threshold for all features, as every variant has it that is not in PER_FEATURE."""
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
        state["theta"] = theta_F if variant in PER_FEATURE else theta_F.median()
    centred = cfg.get("apply_b_dec_to_input", True)
    if variant == "matching_pursuit":  # there b_dec is taken off and put on, or neither
        return state if centred else state | {"b_dec": torch.zeros_like(state["b_dec"])}
    return recentred(state, centred, variant not in PER_FEATURE)
