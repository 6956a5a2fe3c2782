"""What `hierarchical` measures of its composition W_comp on held-out tokens, and its picture.

Shapes: N held-out tokens, C features of layer 1 (children), P features of layer 2 (parents), K, L features kept per
token in layers 1 and 2, M children of a parent at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from variants.research import pictures

TOKENS = 12_000
SHARE, MOST = 0.1, 10  # children: |W_comp| above this share of the parent's largest, this many at most


@torch.no_grad()
def report(sae, context) -> tuple[dict[str, float | None], dict[str, bytes]]:
    """Numbers and pictures of a `hierarchical` SAE; one without a meaning (no composition was learned) is None."""
    batch = context.held_out(TOKENS)
    z_NF = torch.cat([sae.encode(x_ND) for x_ND in batch.x.split(1024)])
    h1_NC, h2_NP = z_NF[:, :sae.n_1], z_NF[:, sae.n_1:]
    numbers = sparsity(sae.W_comp) | explained(sae, batch.x, h1_NC, h2_NP)
    numbers |= consistency(sae, h1_NC > 0, h2_NP, context.seed)
    files = {}
    if sae.W_comp.any():
        files["composition.png"] = heat_map(sae, h1_NC, h2_NP, batch.tokens, context.lm.tokenizer)
    return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}, files


# ------------------------------------------------------------------------------------------------ numbers


def sparsity(W_comp_CP: Tensor) -> dict[str, float | None]:
    """Sparsity of W_comp: share near zero, children over 10 % of a parent's largest weight, mean Gini index."""
    weight_CP = W_comp_CP[:, W_comp_CP.any(0)].abs()  # parents without any weight have no children to count
    if not weight_CP.numel():
        return dict(composition_near_zero=1.0, children_per_parent=None, composition_gini=None)
    largest_P = weight_CP.amax(0)
    gini_sum = sum(gini(part_CP).sum().item() for part_CP in weight_CP.split(256, 1))
    return dict(composition_near_zero=1 - (W_comp_CP.abs() >= 1e-3 * largest_P.max()).float().mean().item(),
                children_per_parent=(weight_CP > SHARE * largest_P).float().sum(0).mean().item(),
                composition_gini=gini_sum / weight_CP.shape[1])


def gini(weight_CP: Tensor) -> Tensor:
    """Gini index of each column of weights >= 0: 0 where all are equal, 1 − 1/C where one holds everything."""
    C = len(weight_CP)
    rank_C = 2 * torch.arange(1, C + 1, device=weight_CP.device) - C - 1
    return (rank_C[:, None] * weight_CP.sort(0).values).sum(0) / (C * weight_CP.sum(0))


def explained(sae, x_ND: Tensor, h1_NC: Tensor, h2_NP: Tensor) -> dict[str, float]:
    """Explained variance of x by either layer and by both, R² of h1·W_comp for h2, features that fire."""
    def r2(target: Tensor, estimate: Tensor) -> float:
        return 1 - ((target - estimate).pow(2).sum() / (target - target.mean(0)).pow(2).sum()).item()

    x_hat_1_ND, x_hat_2_ND = h1_NC @ sae.W_dec, h2_NP @ sae.W_dec2
    return dict(ev_layer_1=r2(x_ND, x_hat_1_ND + sae.b_dec), ev_layer_2=r2(x_ND, x_hat_2_ND + sae.b_dec),
                ev_both=r2(x_ND, x_hat_1_ND + x_hat_2_ND + sae.b_dec), composition_r2=r2(h2_NP, h1_NC @ sae.W_comp),
                l0_layer_1=(h1_NC > 0).sum(1).float().mean().item(),
                l0_layer_2=(h2_NP > 0).sum(1).float().mean().item(),
                alive_layer_1=(h1_NC > 0).any(0).float().mean().item(),
                alive_layer_2=(h2_NP > 0).any(0).float().mean().item())


def consistency(sae, fires_NC: Tensor, h2_NP: Tensor, seed: int) -> dict[str, float | None]:
    """When a parent fires, the share of its children that fire, mean over firings; and of another parent's."""
    child_PM, is_child_PM = top_children(sae.W_comp)
    h2_NL, parent_NL = h2_NP.topk(sae.k2)
    firing_N_L = h2_NL > 0
    parents = firing_parents(h2_NP).nonzero().squeeze(1)
    if not is_child_PM[parents].any():
        return dict(consistency=None, consistency_shuffled=None)

    def share(owner_P: Tensor) -> float:
        owner_NL = owner_P[parent_NL]
        children = child_PM[owner_NL], is_child_PM[owner_NL]
        fire_NLM = fires_NC.gather(1, children[0].flatten(1)).view_as(children[0]) & children[1]
        known_NL = firing_N_L & children[1].any(-1)
        share_NL = fire_NLM.sum(-1) / children[1].sum(-1).clamp_min(1)
        return ((share_NL * known_NL).sum() / known_NL.sum()).item()

    own_P = torch.arange(len(child_PM), device=h2_NP.device)
    generator, shuffled = torch.Generator().manual_seed(seed), []
    for _ in range(5):
        # a random cycle through the parents that fire gives each another's children
        cycle = parents[torch.randperm(len(parents), generator=generator).to(parents.device)]
        other_P = own_P.clone()
        other_P[cycle] = cycle.roll(1)
        shuffled.append(share(other_P))
    return dict(consistency=share(own_P), consistency_shuffled=sum(shuffled) / len(shuffled))


def top_children(W_comp_CP: Tensor) -> tuple[Tensor, Tensor]:
    """The MOST strongest layer-1 features of every parent [P, M], strongest first; which count as its children."""
    weight_MP, child_MP = W_comp_CP.abs().topk(min(MOST, len(W_comp_CP)), dim=0)
    return child_MP.T, (weight_MP > SHARE * weight_MP[0]).T


def firing_parents(h2_NP: Tensor) -> Tensor:
    """Mask [P] of parents that fire on held-out tokens."""
    return (h2_NP > 0).any(0)


# ------------------------------------------------------------------------------------------------ the picture


def heat_map(sae, h1_NC: Tensor, h2_NP: Tensor, tokens_N: Tensor, tokenizer, n_parents: int = 12,
             per_parent: int = 3) -> bytes:
    """W_comp of the strongest parents × their strongest children, each with the tokens it fires on most."""
    child_PM, is_child_PM = top_children(sae.W_comp)
    often_P = (h2_NP > 0).sum(0) >= len(h2_NP) // 1000
    parents = (sae.W_comp.abs().amax(0) * often_P).topk(min(n_parents, int(often_P.sum()) or 1)).indices
    child_PM, is_child_PM = child_PM[:, :per_parent], is_child_PM[:, :per_parent]
    children = list(dict.fromkeys(child for p in parents.tolist() for child in child_PM[p][is_child_PM[p]].tolist()))
    weight_QR = sae.W_comp[children][:, parents].T
    relative_QR = (weight_QR / weight_QR.abs().amax(1, keepdim=True).clamp_min(1e-12)).cpu().numpy()

    fig = pictures.figure(3.6 + 0.3 * len(children), 3.2 + 0.34 * len(parents))
    axes = fig.subplots()
    image = axes.imshow(relative_QR, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    child_labels = [f"{c}  {top_tokens(h1_NC[:, c], tokens_N, tokenizer)}" for c in children]
    parent_labels = [f"{sae.n_1 + p}  {top_tokens(h2_NP[:, p], tokens_N, tokenizer)}" for p in parents.tolist()]
    axes.set_xticks(range(len(children)), child_labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(parents)), parent_labels, fontsize=8)
    axes.set_xlabel("child: feature of layer 1, and the tokens it fires on most")
    axes.set_ylabel("parent: feature of layer 2, and its tokens")
    axes.set_title(f"Which layer-1 features compose a layer-2 feature: the {len(parents)} parents with the largest "
                   "weights", fontsize=11)
    fig.colorbar(image, ax=axes, label="weight in W_comp / largest of the parent", shrink=0.9)
    return pictures.png(fig, dpi=85)


def top_tokens(z_N: Tensor, tokens_N: Tensor, tokenizer, n: int = 3) -> str:
    """The n different tokens with the largest activations of a feature."""
    order = z_N.topk(min(100, len(z_N)))
    found = dict.fromkeys(pictures.label(tokenizer.decode([t]), 10)
                          for t, value in zip(tokens_N[order.indices].tolist(), order.values.tolist()) if value > 0)
    return " · ".join(list(found)[:n]) or "silent"
