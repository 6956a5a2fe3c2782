"""What `cosine_concepts` measures: mutual information of concepts with base features, and how its weights are
distributed.

Shapes: N held-out tokens, C base features, P concepts (Q of them at a time), D = d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.research import pictures

TOKENS = 12_000
LEAST = 10  # firings, and silent tokens, that a concept needs for its mutual information to be estimated
NEAR_ZERO = 1e-3  # of the largest |w|


@torch.no_grad()
def report(sae, context) -> tuple[dict[str, float | None], dict[str, bytes]]:
    """Numbers and pictures of a `cosine_concepts` SAE; mutual information is None if no concept fires often enough."""
    x_ND = context.held_out(TOKENS).x
    z_NF = torch.cat([sae.encode(part_ND) for part_ND in x_ND.split(1024)]).float()
    z1_NC, z2_NP = z_NF[:, :sae.n_1], z_NF[:, sae.n_1:]
    numbers = layers(sae, x_ND, z1_NC, z2_NP)

    fires_NC, fires_NP = (z1_NC > 0).float(), (z2_NP > 0).float()
    firings_P = fires_NP.sum(0)
    fires_NP = fires_NP[:, (firings_P >= LEAST) & (firings_P <= len(x_ND) - LEAST)]
    # the same permutation of the tokens for all concepts: what they share with each other stays, what they share with
    # the base goes
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(context.seed)).to(x_ND.device)
    real_P, null_P = largest_nmi(fires_NC, fires_NP), largest_nmi(fires_NC, fires_NP[order_N])
    numbers |= dict(nmi_concepts=len(real_P), nmi=None, nmi_shuffled=None, nmi_above_shuffled=None)
    files = {}
    if len(real_P):
        numbers |= dict(nmi=real_P.mean().item(), nmi_shuffled=null_P.mean().item(),
                        nmi_above_shuffled=(real_P > null_P.max()).float().mean().item())
        files["nmi.png"] = nmi_picture(real_P, null_P)

    weights = {"W_enc": sae.W_enc, "W_concept": sae.W_concept, "W_dec": sae.W_dec, "W_dec2": sae.W_dec2}
    forms = {name: moments(W) for name, W in weights.items()}
    numbers |= {f"{name}_{key}": value for name, form in forms.items() for key, value in form.items()}
    return numbers, files | {"weights.png": weight_picture(weights, forms)}


# ------------------------------------------------------------------------------------------------ numbers


def layers(sae, x_ND: Tensor, z1_NC: Tensor, z2_NP: Tensor) -> dict[str, float]:
    """Explained variance with and without the concepts; per layer the features that fire per token and ever."""
    variance = (x_ND - x_ND.mean(0)).pow(2).sum()
    e_ND = x_ND - z1_NC @ sae.W_dec - sae.b_dec
    numbers = dict(ev_without_concepts=1 - (e_ND.pow(2).sum() / variance).item(),
                   ev=1 - ((e_ND - z2_NP @ sae.W_dec2).pow(2).sum() / variance).item())
    for name, z in (("base", z1_NC), ("concepts", z2_NP)):
        numbers |= {f"l0_{name}": (z > 0).sum(1).float().mean().item(),
                    f"alive_{name}": (z > 0).any(0).float().mean().item()}
    return numbers


def largest_nmi(fires_NC: Tensor, fires_NP: Tensor, chunk: int = 256) -> Tensor:
    """For each concept the largest normalised mutual information, 2·I/(H_c + H_p), of its and a base feature's firings.

    All probabilities come from one product of counts, exact in fp32 below 2**24 tokens; `chunk` concepts at a time.
    """
    N = len(fires_NC)
    p_C = fires_NC.sum(0).double() / N
    found = [torch.zeros(0, device=fires_NC.device, dtype=torch.float64)]
    for fires_NQ in fires_NP.split(chunk, 1) if fires_NP.shape[1] else ():
        p_Q = fires_NQ.sum(0).double() / N
        both_CQ = (fires_NC.T @ fires_NQ).double() / N
        H_joint_CQ = (plogp(both_CQ) + plogp(p_C[:, None] - both_CQ) + plogp(p_Q - both_CQ)
                      + plogp(1 - p_C[:, None] - p_Q + both_CQ))
        H_CQ = (plogp(p_C) + plogp(1 - p_C))[:, None] + plogp(p_Q) + plogp(1 - p_Q)
        found.append((2 * (H_CQ - H_joint_CQ) / H_CQ.clamp_min(1e-12)).amax(0).clamp(0, 1))
    return torch.cat(found)


def plogp(p: Tensor) -> Tensor:
    """−p·log p, 0 at p = 0 (and where rounding leaves less)."""
    return -torch.xlogy(p.clamp_min(0), p.clamp_min(1e-300))


def moments(W: Tensor) -> dict[str, float | None]:
    """Mean, standard deviation, skewness, kurtosis (normal: 3) of all entries, share with |w| < 1e-3·max|w|."""
    W = W.detach().double()
    mean, largest = W.mean(), W.abs().max()
    std = (W - mean).pow(2).mean().sqrt()
    shape = {name: ((W - mean) / std).pow(n).mean().item() if std > 0 else None
             for name, n in (("skewness", 3), ("kurtosis", 4))}
    near_zero = (W.abs() < NEAR_ZERO * largest).double().mean().item() if largest > 0 else 1.0
    return dict(mean=mean.item(), std=std.item(), **shape, near_zero=near_zero)


# ------------------------------------------------------------------------------------------------ pictures


def nmi_picture(real_P: Tensor, null_P: Tensor) -> bytes:
    """Histogram over concepts of the largest mutual information, as measured and with shuffled tokens."""
    fig = pictures.figure(8, 4.5)
    axes = fig.subplots()
    top = max(0.05, real_P.max().item(), null_P.max().item())
    bins = [top * i / 40 for i in range(41)]
    for values_P, colour, name in ((null_P, "tab:gray", "tokens shuffled (null)"), (real_P, "tab:blue", "measured")):
        axes.hist(values_P.tolist(), bins=bins, color=colour, alpha=0.65, label=f"{name}, mean {values_P.mean():.3f}")
    axes.set(xlabel="largest normalised mutual information with any base feature (0 none, 1 the same firing)",
             ylabel="number of concepts", title=f"How far a concept repeats a single base feature ({len(real_P):,} "
                                                f"concepts with {LEAST} firings or more)")
    axes.legend()
    return pictures.png(fig)


def weight_picture(weights: dict[str, Tensor], forms: dict[str, dict]) -> bytes:
    """Histogram of the entries of every weight matrix, counts on a logarithmic scale."""
    meaning = {"W_enc": "encoder of the base layer", "W_concept": "base features to concepts",
               "W_dec": "decoder of the base layer",
               "W_dec2": "decoder of the concepts"}
    fig = pictures.figure(10, 7.5)
    fig.suptitle("How the entries of each weight matrix are distributed after training")
    for axes, (name, W) in zip(fig.subplots(2, 2).flat, weights.items()):
        W = W.detach().float().cpu()
        largest = max(W.abs().max().item(), 1e-12)
        counts = torch.histc(W, 100, -largest, largest)
        edges = torch.linspace(-largest, largest, 101).tolist()
        axes.stairs(counts.tolist(), edges, fill=True, color="tab:blue")
        form, near = forms[name], NEAR_ZERO * largest
        kurtosis = "undefined" if form["kurtosis"] is None else f"{form['kurtosis']:.1f}"
        axes.axvspan(-near, near, color="tab:orange", label=f"|w| < {NEAR_ZERO:g}·max: {form['near_zero']:.1%}")
        axes.set(yscale="log", ylim=(0.5, 50 * counts.max().item()), xlabel=f"entry of {name} (for E‖x‖² = 1)",
                 ylabel="number of entries", title=f"{name}, {meaning[name]}, {W.shape[0]:,} × {W.shape[1]:,}\n"
                                                   f"std {form['std']:.4f}, kurtosis {kurtosis} (normal: 3)")
        axes.legend(loc="upper right")
    return pictures.png(fig, dpi=80)
