"""Feature groups for targeted unlearning: `standard` (Bricken et al. 2023), its features clustered by how they fire.

loss as in `standard`: the groups act in evals only.
Groups = average linkage at distance 1 − C_ij, cut at C = .5 (levels=3: .7, .5, .3), C = Pearson's correlation over the
last 8192 tokens, of features that fire on 1e-5 and 3 of them at least.
Clustered every 500 steps (a fifth of a shorter run) from the end, so that the last is of the finished SAE.
Shapes: N tokens remembered, K activations kept of each, m features in play, c components, L levels; else as in base.py.
"""

import numpy as np
import torch

from variants import standard


def standardised(z_NF):
    """Sparse activations [N, F] over each feature's standard deviation (CSC, fp64), and the means of the result [F].

    C = ZᵀZ/N − mean·meanᵀ is then the correlation. Every feature must vary.
    """
    z_NF = z_NF.tocsc().astype(np.float64)
    mean_F = np.asarray(z_NF.mean(0)).ravel()
    deviation_F = np.sqrt(np.asarray(z_NF.multiply(z_NF).mean(0)).ravel() - mean_F**2)
    z_NF.data /= np.repeat(deviation_F, np.diff(z_NF.indptr))
    return z_NF, mean_F / deviation_F


def correlation(z_Nm, mean_m):
    """Dense correlations [m, m] of a few columns of a standardised matrix."""
    return (z_Nm.T @ z_Nm).toarray() / z_Nm.shape[0] - np.outer(mean_m, mean_m)


def groups_of(z_NF, cuts, min_density):
    """Average-linkage clusters of the features of a scipy.sparse [N, F]: labels [L, F] (−1: alone), who took part [F].

    Worked out within the connected components of the graph C ≥ c, c the lowest cut, which is exact: pairs of different
    components, and so their averages, have C < c; no merge up to the cut leaves a component or depends on another.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial.distance import squareform

    (n, F), z_NF = z_NF.shape, z_NF.tocsc()
    label_LF, made = np.full((len(cuts), F), -1, np.int32), [0] * len(cuts)
    clustered_F = (np.diff(z_NF.indptr) >= max(min_density * n, 3)) & (z_NF.max(0).toarray() > z_NF.min(0).toarray())[0]
    m, rows, columns = int(clustered_F.sum()), [], []
    if m < 2:
        return label_LF, clustered_F
    z_Nm, mean_m = standardised(z_NF[:, clustered_F])
    for start in range(0, m, 1024):  # a band of the product at a time: all of it may not fit
        band = (z_Nm[:, start:start + 1024].T @ z_Nm).tocoo()
        near = band.data / n - mean_m[start + band.row] * mean_m[band.col] >= min(cuts)
        rows.append(start + band.row[near])
        columns.append(band.col[near])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    near_mm = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(m, m))
    component_m = connected_components(near_mm, directed=False)[1]
    order_m = component_m.argsort(kind="stable")
    z_Nm, feature_m = z_Nm[:, order_m], clustered_F.nonzero()[0][order_m]
    size_c = np.bincount(component_m)
    for start, end in zip((size_c.cumsum() - size_c)[size_c > 1], size_c.cumsum()[size_c > 1]):
        distance = 1 - correlation(z_Nm[:, start:end], mean_m[order_m[start:end]])
        tree = linkage(squareform(distance.clip(0), checks=False), "average")
        for level, cut in enumerate(cuts):
            _, cluster, size = np.unique(fcluster(tree, 1 - cut, "distance"), return_inverse=True, return_counts=True)
            number = np.where(size > 1, made[level] + np.cumsum(size > 1) - 1, -1)  # clusters of one are no groups
            label_LF[level, feature_m[start:end]] = number[cluster]
            made[level] += int((size > 1).sum())
    return label_LF, clustered_F


class SAE(standard.SAE):
    """Standard SAE with feature groups; use_groups=False: the control, no groups for unlearning. every: steps between
    clusterings; cut: correlation; levels: 1, or 3 for cut + .2, cut, cut − .2; recent_tokens: over which it is taken,
    the `kept` largest activations of each; min_density: share of them on which a clustered feature fires."""

    saelens = None  # its format has no place for groups
    standardised, correlation = staticmethod(standardised), staticmethod(correlation)  # these three for the report
    groups_of = staticmethod(groups_of)

    def __init__(self, d_in, d_sae, l1_penalty=0.1, every=500, cut=0.5, levels=1, recent_tokens=8192, kept=128,
                 min_density=1e-5, use_groups=True):
        self.cuts = {1: (cut,), 3: (cut + 0.2, cut, cut - 0.2)}.get(levels, ())
        if not self.cuts or not 0 < min(self.cuts) <= max(self.cuts) < 1:
            raise ValueError(f"clustered: levels = {levels} around the correlation cut = {cut}\ngive levels=1 or 3, "
                             "and a cut for which all levels (cut, or cut − .2 to cut + .2) lie between 0 and 1")
        if min(every, recent_tokens, kept) < 1:
            raise ValueError(f"clustered: every = {every}, recent_tokens = {recent_tokens}, kept = {kept}: each must "
                             "be at least 1\nchange --hyper every=…,recent_tokens=…,kept=…")
        super().__init__(d_in, d_sae, l1_penalty)
        self.every, self.min_density, self.use_groups = every, min_density, use_groups
        shape_NK = recent_tokens, min(kept, d_sae)
        self.register_buffer("recent_NK", torch.zeros(shape_NK))  # a ring of the last tokens' largest activations
        self.register_buffer("recent_index_NK", torch.zeros(shape_NK, dtype=torch.int32))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))  # tokens so far
        self.register_buffer("group_LF", torch.full((len(self.cuts), d_sae), -1, dtype=torch.int32))  # −1: in no group
        self.register_buffer("previous_F", torch.full((d_sae,), -1, dtype=torch.int32))  # group at the cut, one earlier
        self.register_buffer("clustered_F", torch.zeros(d_sae, dtype=torch.bool))  # fired often enough for the last one
        self.register_buffer("clusterings", torch.zeros((), dtype=torch.int64))

    def after_step(self, batch, progress):
        interval = max(1, min(self.every, progress.total_steps // 5))
        steps_left = (progress.total_steps - 1 - progress.step) % interval
        if steps_left * len(batch.x) < len(self.recent_NK):  # what is older would be overwritten before it is looked at
            self.remember(batch.x)
        if not steps_left and progress.step + 1 >= interval:
            self.cluster()

    def remember(self, x_BD):
        """Put the last tokens' largest activations, by the SAE as it now is, into the ring."""
        N, K = self.recent_NK.shape
        top_BK, index_BK = self.encode(x_BD[-N:]).topk(K, dim=-1, sorted=False)
        row_B = (self.remembered + torch.arange(len(top_BK), device=top_BK.device)) % N
        self.recent_NK.index_copy_(0, row_B, top_BK.to(self.recent_NK.dtype))
        self.recent_index_NK.index_copy_(0, row_B, index_BK.int())
        self.remembered += len(top_BK)

    def recent_activations(self):
        """The ring as a scipy.sparse matrix [N, F]."""
        from scipy.sparse import csr_matrix

        n = np.minimum(self.remembered.cpu().numpy(), len(self.recent_NK))
        value_NK, index_NK = self.recent_NK[:n].cpu().numpy(), self.recent_index_NK[:n].cpu().numpy()
        fired_NK = value_NK > 0
        return csr_matrix((value_NK[fired_NK], (fired_NK.nonzero()[0], index_NK[fired_NK])), shape=(n, self.d_sae))

    def cluster(self):
        label_LF, clustered_F = groups_of(self.recent_activations(), self.cuts, self.min_density)
        self.previous_F.copy_(self.group_LF[len(self.cuts) // 2])
        self.group_LF.copy_(torch.from_numpy(label_LF))
        self.clustered_F.copy_(torch.from_numpy(clustered_F))
        self.clusterings += 1

    def groups_at(self, level=None):
        """Groups of at least two features, [[feature number, …], …], at a level (number in `cuts`) or at the cut."""
        groups = {}
        for feature, label in enumerate(self.group_LF[len(self.cuts) // 2 if level is None else level].tolist()):
            if label >= 0:
                groups.setdefault(label, []).append(feature)
        return list(groups.values())

    def feature_groups(self):
        return self.groups_at() if self.use_groups else None

    def report(self, context):
        from variants.research import clustered_report

        return clustered_report.report(self, context)
