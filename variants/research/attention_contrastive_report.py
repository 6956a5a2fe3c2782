"""What `attention_contrastive` measures of itself on held-out contexts: its positive pairs, and whether their features
agree.

Shapes: B tokens in all contexts together, F features, P pairs, A attention layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.research import pictures

TOKENS = 8192  # held-out tokens
GROUP = 1024  # tokens whose loss is taken together, in whole contexts: the loss grows with the logarithm of this number


@torch.no_grad()
def report(sae, context) -> tuple[dict[str, float | None], dict[str, bytes]]:
    """Numbers and pictures of a trained attention_contrastive.SAE; a mean over nothing is None."""
    batch = context.held_out(TOKENS)
    z_BF, s_P = sae.encode(batch.x), sae.strength(batch.pair_attention)
    positive_2P = batch.pairs[:, s_P > sae.tau]
    generator = torch.Generator().manual_seed(context.seed)
    cosines = {"attending": cosine(z_BF, positive_2P),
               "same distance": cosine(z_BF, moved(positive_2P, batch.contexts, generator)),
               "random": cosine(z_BF, random_pairs(batch.contexts, positive_2P.shape[1], generator)),
               "other context": cosine(z_BF, distant_pairs(batch.contexts, positive_2P.shape[1], generator))}
    weight_A = sae.layer_logit.softmax(0)
    attention_A = batch.pair_attention[s_P > sae.tau].mean(0)
    numbers = counts(batch, positive_2P)
    numbers["contrastive_loss"] = grouped_loss(sae, z_BF, batch.pairs, s_P, batch.contexts)
    numbers |= {f"cosine_{name.replace(' ', '_')}": mean(cos_P) for name, cos_P in cosines.items()}
    numbers |= stored(batch)
    for offset, weight, attention in zip(sae.attention_layers, weight_A.tolist(), attention_A.tolist()):
        numbers |= {f"weight_layer{offset:+d}": weight,
                    f"attention_layer{offset:+d}": attention if positive_2P.numel() else None}
    files = {"attention_weights.png": weights_picture(sae.attention_layers, weight_A.tolist(), attention_A.tolist())}
    if positive_2P.numel():
        files["pair_cosines.png"] = cosine_picture(cosines, sae.tau)
    return numbers, files


def mean(values: Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None


def cosine(z_BF: Tensor, pairs_2P: Tensor) -> Tensor:
    """cos(z_i, z_j) [P] of pairs, 0 where a token has no features; a few pairs at a time."""
    unit_BF = torch.nn.functional.normalize(z_BF.float(), dim=-1)
    parts = [(unit_BF[query_p] * unit_BF[key_p]).sum(-1)
             for query_p, key_p in zip(*(i_P.split(4096) for i_P in pairs_2P))]
    return torch.cat(parts) if parts else z_BF.new_zeros(0)


def counts(batch, positive_2P: Tensor) -> dict[str, float]:
    """Positives per token, and the shares of tokens (as queries) and of contexts that have none."""
    positives_B = torch.bincount(positive_2P[0], minlength=len(batch.x)).float()
    positives_C = torch.zeros(int(batch.contexts[-1]) + 1,
                              device=positives_B.device).index_add_(0, batch.contexts, positives_B)
    return {"positives_per_token": positives_B.mean().item(),
            "tokens_without_positive": (positives_B == 0).float().mean().item(),
            "contexts_without_positive": (positives_C == 0).float().mean().item()}


def stored(batch) -> dict[str, float]:
    """Bytes a token's attention takes in a block: two int32 and A fp16 a pair, against A dense fp16 patterns."""
    n_pairs, A = batch.pair_attention.shape
    T, C = int(batch.positions.max()) + 1, int(batch.contexts[-1]) + 1
    sparse, dense = n_pairs * (8 + 2 * A) / len(batch.x), C * A * T * T * 2 / len(batch.x)
    return {"attention_bytes_per_token": sparse, "dense_attention_bytes_per_token": dense}


def grouped_loss(sae, z_BF: Tensor, pairs_2P: Tensor, s_P: Tensor, context_B: Tensor) -> float:
    """Mean of Lc over all tokens, those without positives as 0, in groups of about GROUP tokens of whole contexts."""
    per_group = max(1, round(GROUP * (int(context_B[-1]) + 1) / len(context_B)))  # contexts
    losses, group_B = [], context_B // per_group
    for g in range(int(group_B[-1]) + 1):
        start, stop = torch.searchsorted(group_B, torch.tensor([g, g + 1], device=group_B.device)).tolist()
        inside_P = (pairs_2P[0] >= start) & (pairs_2P[0] < stop)
        losses.append(sae.contrastive(z_BF[start:stop], pairs_2P[:, inside_P] - start, s_P[inside_P]))
    return mean(torch.cat(losses))


def span(context_B: Tensor) -> tuple[Tensor, Tensor]:
    """(first [B], length [B]) of each token's context."""
    length_C = torch.bincount(context_B)
    return (length_C.cumsum(0) - length_C)[context_B], length_C[context_B]


def draw(below: Tensor, generator: torch.Generator) -> Tensor:
    """For each n of `below` a random integer from 0 to n − 1."""
    return (torch.rand(len(below), generator=generator).to(below.device) * below).long()


def moved(pairs_2P: Tensor, context_B: Tensor, generator: torch.Generator) -> Tensor:
    """Pairs of the same contexts and distances as these, at random places: what nearness alone explains."""
    first_B, length_B = span(context_B)
    query_P, key_P = pairs_2P
    distance_P = query_P - key_P
    key_P = first_B[query_P] + draw(length_B[query_P] - distance_P, generator)
    return torch.stack([key_P + distance_P, key_P])


def random_pairs(context_B: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n pairs [2, n] of different tokens of one context, each pair of a context as likely as the other."""
    first_B, length_B = span(context_B)
    several_b = (length_B > 1).nonzero().squeeze(1)
    one_n = several_b[draw(torch.full((n,), len(several_b), device=context_B.device), generator)]
    steps_n = 1 + draw(length_B[one_n] - 1, generator)
    other_n = first_B[one_n] + (one_n - first_B[one_n] + steps_n) % length_B[one_n]
    return torch.stack([one_n, other_n])


def distant_pairs(context_B: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n pairs [2, n] of tokens of different contexts; none where there is one context."""
    first_B, length_B = span(context_B)
    B = len(context_B)
    n *= int(context_B[-1] > 0)
    one_n = draw(torch.full((n,), B, device=context_B.device), generator)
    return torch.stack([one_n, (first_B[one_n] + length_B[one_n] + draw(B - length_B[one_n], generator)) % B])


# ------------------------------------------------------------------------------------------------ pictures


def weights_picture(offsets: tuple[int, ...], weights: list[float], attention: list[float]) -> bytes:
    """Bars of w_k by layer, beside the attention that positive pairs have in each."""
    fig = pictures.figure(8, 4)
    left, right = fig.subplots(1, 2)
    names = [f"L{offset:+d}" if offset else "L" for offset in offsets]
    for axes, values, colour, what in ((left, weights, "tab:blue", "learned weight w_k"),
                                       (right, attention, "tab:grey", "mean attention α")):
        bars = axes.bar(names, values, color=colour)
        axes.bar_label(bars, fmt="%.3f", padding=2)
        axes.set(xlabel="attention layer (L: the SAE's own)", ylabel=what,
                 ylim=(0, 1.3 * max([1e-9, *(v for v in values if v == v)])))
    left.axhline(1 / len(weights), color="grey", linestyle="--", linewidth=1, zorder=0, label="start: equal weights")
    left.legend(loc="upper right")
    left.set_title("Learned layer weights")
    right.set_title("Attention of the positive pairs")
    return pictures.png(fig)


def cosine_picture(cosines: dict[str, Tensor], tau: float) -> bytes:
    """Histograms of the features' cosine for positive pairs and the three kinds of control pairs."""
    fig = pictures.figure(8, 4.5)
    axes = fig.subplots()
    labels = {"attending": f"token attends to it (s > {tau:g})",
              "same distance": "same contexts and distances, random places",
              "random": "random pair of a context", "other context": "random pair of two contexts"}
    styles = (dict(color="tab:orange"), dict(color="tab:blue", linestyle="--"), dict(color="tab:grey"),
              dict(color="black", linestyle=":"))
    for (name, cos_P), style in zip(((name, cos_P) for name, cos_P in cosines.items() if len(cos_P)), styles):
        axes.hist(cos_P.cpu().numpy(), bins=50, range=(0, 1), weights=[100 / len(cos_P)] * len(cos_P), histtype="step",
                  linewidth=1.8, **style, label=f"{labels[name]}: mean {mean(cos_P):.3f}")
    axes.set(xlabel="cosine of the two tokens' features z", ylabel="pairs (% per bin of width 0.02)", xlim=(0, 1),
             title=f"Do tokens that attend to each other share features? {len(cosines['attending']):,} pairs, held-out "
                   "text")
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")
    return pictures.png(fig)
