"""What `clustered` measures and draws of its groups: sizes, coherence on held-out tokens, stability, the largest
groups' tokens.

Shapes: N held-out tokens, F features, m members of a group.
"""

from __future__ import annotations

import json
import statistics

import numpy as np

from variants.research import pictures

TOKENS = 16_384  # held out, about
DRAWS = 5  # random groupings to compare with
LARGEST = 10  # groups in the table and in the map
MEMBERS = 12  # at most, of each group in the map


def report(sae, context) -> tuple[dict[str, float | None], dict[str, bytes | str]]:
    """Numbers and files of a trained `clustered` SAE."""
    batch, at_cut = context.held_out(TOKENS), len(sae.cuts) // 2
    cut, groups, label_F = sae.cuts[at_cut], sae.groups_at(), sae.group_LF[at_cut].cpu().numpy()
    clustered_F, sizes = sae.clustered_F.cpu().numpy(), [len(group) for group in groups]
    z_NF, recent_NF = sparse_features(sae, batch.x), sae.recent_activations()
    held_out, recent = Pairs(sae, z_NF), None
    if groups:  # a ring without a token has no correlations
        recent = Pairs(sae, recent_NF)
    of_group = [held_out.mean(group) for group in groups]
    of_random = [held_out.mean(group) for group in random_groups(sizes, clustered_F & held_out.varies_F, context.seed)]
    coherence, random = ([c for c in values if c is not None] for values in (of_group, of_random))
    numbers = dict(
        clusterings=int(sae.clusterings), features_clustered=int(clustered_F.sum()), groups=len(groups),
        group_size_mean=mean(sizes), group_size_max=max(sizes, default=0), groups_of_two=sizes.count(2),
        share_in_groups=share(sum(sizes), clustered_F.sum()),
        coherence=mean(coherence), coherence_stderr=standard_error(coherence), coherence_random=mean(random),
        coherence_recent=mean([c for c in map(recent.mean, groups) if c is not None]) if groups else None,
        coherence_share_above_cut=share(sum(c >= cut for c in coherence), len(coherence)),
        groups_not_held_out=len(groups) - len(coherence),
        stability=rand_index(sae.previous_F.cpu().numpy(), label_F) if sae.clusterings > 1 else None,
        stability_same_sae=rand_index(sae.groups_of(z_NF, sae.cuts, sae.min_density)[0][at_cut], label_F),
        tokens_cut_short=share((np.diff(recent_NF.indptr) == sae.recent_NK.shape[1]).sum(), recent_NF.shape[0]))
    levels = {f"level {c:.2g}": sae.groups_at(level) for level, c in enumerate(sae.cuts)}
    if len(levels) > 1:
        for name, at_level in levels.items():
            numbers |= {f"groups_at_{name.split()[1]}": len(at_level),
                        f"share_in_groups_at_{name.split()[1]}": share(sum(map(len, at_level)), clustered_F.sum())}
    files = {"groups.json": json.dumps(levels)}
    if coherence:
        largest = sorted(range(len(groups)), key=lambda g: (-sizes[g], g))[:LARGEST]
        words = {g: top_tokens(z_NF[:, groups[g]], batch.tokens.cpu().numpy(), context.lm.tokenizer) for g in largest}
        files |= {"largest_groups.txt": table(groups, of_group, words), "group_sizes.png": draw_sizes(sizes, cut),
                  "coherence.png": draw_coherence(coherence, random, cut),
                  "largest_groups.png": draw_map(held_out, groups, words)}
    return numbers, files


# ------------------------------------------------------------------------------------------------ measuring


class Pairs:
    """Correlations of a few features at a time, from activations [N, F]; features that do not vary have none."""

    def __init__(self, sae, z_NF):
        z_NF = z_NF.tocsc()
        self.varies_F = (z_NF.max(0).toarray() > z_NF.min(0).toarray())[0]
        self.column_F = self.varies_F.cumsum() - 1
        self.correlation = sae.correlation
        self.z_Nv, self.mean_v = sae.standardised(z_NF[:, self.varies_F])

    def __call__(self, features) -> np.ndarray:
        """[m, m], NaN where a feature does not vary."""
        features = np.asarray(features)
        there = self.varies_F[features].nonzero()[0]
        c_mm = np.full((len(features),) * 2, np.nan)
        columns = self.column_F[features[there]]
        c_mm[np.ix_(there, there)] = self.correlation(self.z_Nv[:, columns], self.mean_v[columns])
        return c_mm

    def mean(self, features) -> float | None:
        """Over the pairs of different features; None where fewer than two vary."""
        pairs = self(features)[np.triu_indices(len(features), 1)]
        return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else None


def sparse_features(sae, x_ND):
    """The features of normalised activations as a scipy.sparse matrix [N, F]."""
    from scipy.sparse import csr_matrix, vstack

    return vstack([csr_matrix(sae.encode(x_BD).detach().float().cpu().numpy()) for x_BD in x_ND.split(2048)],
                  format="csr")


def random_groups(sizes: list[int], eligible_F: np.ndarray, seed: int) -> list[np.ndarray]:
    """Disjoint groups of the same sizes, drawn DRAWS times from the eligible features as long as there are any left."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        order = generator.permutation(eligible_F.nonzero()[0])
        found += [part for part in np.split(order, np.cumsum(sizes))[:-1] if len(part) > 1]
    return found


def rand_index(one_F: np.ndarray, two_F: np.ndarray) -> float | None:
    """Adjusted Rand index of two labellings (−1: alone) over the features that either of them puts into a group."""
    from sklearn.metrics import adjusted_rand_score

    either = (one_F >= 0) | (two_F >= 0)
    # features alone in one of the labellings are clusters of their own there
    one, two = (np.where(label_F < 0, len(label_F) + np.arange(len(label_F)), label_F)[either]
                for label_F in (one_F, two_F))
    return float(adjusted_rand_score(one, two)) if len(one) else None


def mean(values: list) -> float | None:
    return float(statistics.fmean(values)) if values else None


def standard_error(values: list) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def share(part, whole) -> float | None:
    return float(part / whole) if whole else None


def top_tokens(z_Nm, token_N: np.ndarray, tokenizer, n: int = 8) -> list[str]:
    """The tokens on which a group is most active, by the sum of its activations in shares of each member's largest."""
    from scipy.sparse import diags

    peak_m = z_Nm.max(0).toarray()[0]
    total_N = np.asarray((z_Nm @ diags(1 / np.where(peak_m > 0, peak_m, 1))).sum(1)).ravel()
    by_token = np.bincount(token_N, weights=total_N)
    best = (-by_token).argsort(kind="stable")[:n]
    return [tokenizer.decode([int(token)]) for token in best if by_token[token] > 0]


def table(groups, of_group, words: dict[int, list[str]]) -> str:
    lines = ["members  mean correlation (held out)  tokens of most activation | features"]
    for g, tokens in words.items():
        c = "   -" if of_group[g] is None else f"{of_group[g]:4.2f}"
        lines.append(f"{len(groups[g]):7}  {c}  {' '.join(map(repr, tokens))} | {' '.join(map(str, groups[g]))}")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ drawing


def draw_sizes(sizes: list[int], cut: float) -> bytes:
    """Number of groups by size, both axes logarithmic."""
    fig = pictures.figure(7, 4)
    axes = fig.subplots()
    largest = max(sizes)
    # single sizes up to 10, then bins of equal width on the logarithmic axis
    edges = [s - 0.5 for s in range(2, min(largest, 10) + 2)]
    while edges[-1] < largest:
        edges.append(np.ceil(edges[-1] * 1.25) + 0.5)
    axes.hist(sizes, edges, color="tab:blue", edgecolor="white")
    axes.set(xscale="log", yscale="log", ylim=(0.7, None), xlabel="features in the group", ylabel="groups",
             title=f"{len(sizes)} groups at correlation {cut:g}, {sizes.count(2)} of them pairs; the largest: "
                   f"{largest} features")
    ticks = [t for t in (*range(2, 11), 15, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000) if t <= edges[-1]]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xticks([], minor=True)
    return pictures.png(fig)


def draw_coherence(coherence: list[float], random: list[float], cut: float) -> bytes:
    """How correlated the members of groups are on held-out tokens, against random groups of the same sizes."""
    fig = pictures.figure(7, 4)
    axes = fig.subplots()
    edges = np.linspace(min(-0.1, *coherence, *random), 1, 45)
    for values, name, colour in ((random, "random groups of the same sizes", "tab:gray"),
                                 (coherence, "groups", "tab:blue")):
        if values:
            axes.hist(values, edges, weights=np.full(len(values), 100 / len(values)), alpha=0.7, color=colour,
                      label=f"{name}: mean {statistics.fmean(values):.2f}")
    axes.axvline(cut, color="black", linestyle=":", label=f"cut of the clustering, {cut:g}")
    axes.set(xlabel="mean correlation of a group's pairs, on held-out tokens", ylabel="share of groups (%)",
             title="Correlation inside the groups on held-out tokens, against random groups")
    axes.legend()
    return pictures.png(fig)


def draw_map(pairs: Pairs, groups, words: dict[int, list[str]]) -> bytes:
    """Correlations of the largest groups' features, ordered by group, with each group's tokens."""
    fig = pictures.figure(10, 6)
    axes = fig.subplots()
    shown = [groups[g][:MEMBERS] for g in words]
    ends = np.cumsum([len(group) for group in shown])
    image = axes.imshow(pairs(np.concatenate(shown)), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest",
                        aspect="auto")
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="black", linewidth=0.5)
        axes.axvline(end - 0.5, color="black", linewidth=0.5)
    visible = {g: [pictures.label(t if t.isprintable() else repr(t)[1:-1], 12) for t in words[g][:5]] for g in words}
    names = [f"{'  '.join(tokens)}   ({len(groups[g])})" for g, tokens in visible.items()]
    axes.set_yticks(ends - [len(group) / 2 + 0.5 for group in shown], names)
    axes.set_xticks([])
    axes.set(xlabel=f"features, in the same order (at most {MEMBERS} of a group)",
             ylabel="group: tokens of most activation (features)",
             title="Correlation within and between the largest groups, on held-out tokens")
    fig.colorbar(image, label="correlation (white where a feature is silent or unrelated)")
    return pictures.png(fig)
