"""What `direction_contrastive` reports: which of the pairs of features that fire together its mask selects.

A pair i ≠ j is co-active if the firing indicators of its features, on held-out tokens, are correlated at φ_ij ≥ .2 and
both fire on at least 5 tokens. Measured are the features that fire on at least 10 tokens, evenly spaced ones where
there are more than 4096. Two-sided: cos_ij among the largest `top` of row i or of row j. One-sided: of row i alone,
over both orders of a pair; a sum over all ordered pairs holds what one-sided masks miss in one order with half the
weight, if the other order selects it. Chance: a mask's density.

Shapes: N tokens, S features measured, P pairs of them, T widths of the mask.
"""

from __future__ import annotations

import torch

from variants.research.pictures import figure, png

TOKENS, CORRELATION, TOGETHER, FIRED, MOST = 12_000, 0.2, 5, 10, 4096
WIDTHS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)


@torch.no_grad()
def report(sae, context) -> tuple[dict[str, float | None], dict[str, bytes]]:
    """(numbers, pictures) of a trained SAE on held-out tokens."""
    batch = context.held_out(TOKENS)
    z_NF = torch.cat([sae.encode(x_BD) for x_BD in batch.x.split(2048)])
    importance_F = sae.importance_F().float()
    numbers = dict(truncated_tokens=((z_NF > 0).sum(1) > sae.max_active).float().mean().item(),
                   rows_reset=float(sae.rows_reset), importance_median=importance_F.median().item(),
                   importance_p95_to_p5=spread(importance_F))
    found = pairs(sae, z_NF)
    numbers |= measured(found, WIDTHS.index(sae.top) if sae.top in WIDTHS else len(WIDTHS))
    if not numbers["coactive_pairs"]:
        return numbers, {}
    return numbers, {"capture.png": draw_capture(found, sae.top), "cosines.png": draw_cosines(found)}


def spread(value_F) -> float | None:
    low, high = value_F.quantile(torch.tensor([0.05, 0.95], device=value_F.device)).tolist()
    return high / low if low > 0 else None


def pairs(sae, z_NF) -> dict:
    """Of each pair measured: product of rows, cosine, φ, tokens together, those expected; of features q [T, S]."""
    fired_F = (z_NF > 0).sum(0)
    chosen_S = (fired_F >= FIRED).nonzero().squeeze(1)
    chosen_S = chosen_S[:: max(1, -(-len(chosen_S) // MOST))]
    on_NS = (z_NF[:, chosen_S] > 0).float()
    p_S, n = on_NS.mean(0), len(on_NS)
    i_P, j_P = torch.triu_indices(len(chosen_S), len(chosen_S), 1, device=z_NF.device)
    together_P = (on_NS.T @ on_NS)[i_P, j_P]
    expected_P = n * p_S[i_P] * p_S[j_P]
    sd_S = (p_S * (1 - p_S)).sqrt().clamp_min(1e-9)
    phi_P = (together_P - expected_P) / (n * sd_S[i_P] * sd_S[j_P])
    rows_FD = (sae.decoder if sae.normalise else sae.W_dec).float()
    unit_SD = sae.decoder.float()[chosen_S]
    widths = [*WIDTHS, sae.top]
    q_TS = sae.quantiles(rows_FD, widths)[:, chosen_S]
    product_P = (rows_FD[chosen_S] @ rows_FD[chosen_S].T)[i_P, j_P]
    return dict(features=len(chosen_S), product_P=product_P, cos_P=(unit_SD @ unit_SD.T)[i_P, j_P], phi_P=phi_P,
                together_P=together_P, expected_P=expected_P,
                coactive_P=(phi_P >= CORRELATION) & (together_P >= TOGETHER), i_P=i_P, j_P=j_P, q_TS=q_TS)


def selected(found: dict, t: int):
    """(two-sided, one-sided averaged over both orders) selection [P] by the mask of width t."""
    q_S = found["q_TS"][t]
    by_i, by_j = found["product_P"] >= q_S[found["i_P"]], found["product_P"] >= q_S[found["j_P"]]
    return (by_i | by_j).float(), (by_i.float() + by_j.float()) / 2


def mean(value_P, of_P=None) -> float | None:
    value_P = value_P if of_P is None else value_P[of_P]
    return value_P.mean().item() if len(value_P) else None


def measured(found: dict, t: int) -> dict[str, float | None]:
    """Capture by the trained width's mask and what goes with it; None where there are no such pairs."""
    two_P, one_P = selected(found, t)
    coactive_P, together_P, expected_P = found["coactive_P"], found["together_P"], found["expected_P"]
    capture, one = mean(two_P, coactive_P), mean(one_P, coactive_P)
    numbers = dict(features_measured=float(found["features"]), coactive_pairs=float(coactive_P.sum()),
                   coactive_share=mean(coactive_P.float()),
                   capture_two_sided=capture, capture_one_sided=one, missed_by_one_sided=None if capture is None
                   else capture - one, chance_two_sided=mean(two_P), chance_one_sided=mean(one_P))
    for level in (0.1, 0.4):
        numbers[f"capture_two_sided_phi_{level}"] = mean(two_P, (found["phi_P"] >= level) & (together_P >= TOGETHER))
    numbers |= dict(cos_coactive=mean(found["cos_P"], coactive_P), cos_all=mean(found["cos_P"]))
    for name, of_P in (("selected", two_P > 0), ("others", two_P == 0)):
        expected = expected_P[of_P].sum().item()
        numbers[f"cofiring_lift_{name}"] = together_P[of_P].sum().item() / expected if expected else None
    return numbers


def draw_capture(found: dict, top: float) -> bytes:
    """Capture and chance against the mask's width."""
    fig = figure(7.5, 5)
    axes = fig.subplots()
    masks = [selected(found, t) for t in range(len(WIDTHS))]
    percent = [100 * width for width in WIDTHS]
    for side, name, colour in ((0, "two-sided (row i or row j)", "C0"), (1, "one-sided (row i)", "C1")):
        axes.plot(percent, [100 * mean(m[side], found["coactive_P"]) for m in masks], "o-", color=colour,
                  label=f"co-active pairs, {name}")
        axes.plot(percent, [100 * mean(m[side]) for m in masks], "--", color=colour,
                  label=f"all pairs = chance, {name}")
    axes.axvline(100 * top, color="grey", linewidth=1, label=f"width in training, {100 * top:g} %")
    axes.set(xscale="log", ylim=(0, 103), xlabel="mask's width: largest share of each decoder row's cosines (%)",
             ylabel="pairs selected (%)",
             title=f"Which of {int(found['coactive_P'].sum()):,} co-active pairs (φ ≥ {CORRELATION}) the mask selects")
    axes.set_xticks(percent, [f"{p:g}" for p in percent])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=9)
    return png(fig)


def draw_cosines(found: dict) -> bytes:
    """Distribution of decoder cosines over co-active and over all pairs."""
    fig = figure(7.5, 5)
    axes = fig.subplots()
    low, high = min(-0.2, found["cos_P"].min().item()), max(0.2, found["cos_P"].max().item())
    edges = torch.linspace(low, high, 61)
    coactive = f"co-active pairs (φ ≥ {CORRELATION})"
    for of_P, name, colour in ((slice(None), "all pairs", "grey"), (found["coactive_P"], coactive, "C0")):
        cos_P = found["cos_P"][of_P].cpu()
        share = 100 * torch.histogram(cos_P, edges).hist / len(cos_P)
        axes.stairs(share.numpy(), edges.numpy(), fill=True, alpha=0.5, color=colour,
                    label=f"{name}, {len(cos_P):,}, mean {cos_P.mean():.3f}")
    axes.set(xlabel="cosine of the two decoder rows", ylabel="share of the pairs in a bin (%)", yscale="log",
             title="Cosines of decoder rows: pairs of features that fire together against all pairs")
    axes.legend(fontsize=9)
    return png(fig)
