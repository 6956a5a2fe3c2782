"""The variant whose features are clustered by how they fire together:
correlation, average linkage, the ring of tokens, groups, report.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import experiment
import variants
import variants.kit.saving
from tests.variants.common import SMOLLM, preflight
from variants import base, clustered, standard
from variants.kit.trained import TrainedSAE


def activations(seed=0, n=400, families=12, noise=0.35):
    """Sparse features in families that fire together more or less often, [n, 60], and three that hardly fire."""
    generator = np.random.default_rng(seed)
    parent_NA = generator.random((n, families)) < generator.uniform(0.02, 0.3, families)
    own_NF = generator.random((n, 60)) < 0.02
    fires_NF = (parent_NA[:, np.arange(60) % families] & (generator.random((n, 60)) > noise)) | own_NF
    z_NF = fires_NF * generator.uniform(0.5, 1.5, (n, 60))
    z_NF[:, :3] = 0
    z_NF[:2, 0] = z_NF[:2, 1] = 1.0  # 0 and 1 fire together, but on two tokens only; 2 never
    return z_NF


def slow_groups(z_NF, cut, min_density):
    """Pearson by np.corrcoef; the nearest clusters, by the mean over all cross pairs, merge while within the cut."""
    fires = [f for f in range(z_NF.shape[1]) if (z_NF[:, f] > 0).sum() >= max(3, min_density * len(z_NF))]
    C = np.corrcoef(z_NF[:, fires].T)
    clusters = [[i] for i in range(len(fires))]
    while True:
        pairs = [(np.mean([C[i, j] for i in a for j in b]), x, y)
                 for x, a in enumerate(clusters) for y, b in enumerate(clusters) if x < y]
        best, x, y = max(pairs)
        if best < cut:
            return sorted(sorted(fires[i] for i in c) for c in clusters if len(c) > 1)
        clusters[x] += clusters.pop(y)


def as_groups(label_F):
    return sorted(np.flatnonzero(label_F == g).tolist() for g in range(label_F.max() + 1))


@pytest.mark.parametrize("seed, noise, min_density", [(0, 0.35, 1e-5), (1, 0.2, 1e-5), (2, 0.25, 0.1)])
def test_groups_are_those_of_average_linkage_over_all_features(seed, noise, min_density):
    """Fails for covariance instead of correlation, single linkage (components alone), a wrong cut, rare features."""
    z_NF = activations(seed, noise=noise)
    label_LF, clustered_F = clustered.groups_of(csr_matrix(z_NF), (0.7, 0.5, 0.3), min_density)
    wanted = [slow_groups(z_NF, cut, min_density) for cut in (0.7, 0.5, 0.3)]
    assert [as_groups(label_F) for label_F in label_LF] == wanted
    assert not clustered_F[:3].any() and (label_LF[:, :3] == -1).all()
    assert len({tuple(map(tuple, groups)) for groups in wanted}) > 1 and all(wanted[1:])


def test_average_linkage_splits_what_is_merely_connected():
    """Fails if connected components are taken for groups: a chain of features, each correlated with the next alone."""
    z_NF = np.zeros((600, 9))
    for f in range(9):
        z_NF[60 * f:60 * f + 120 + 3 * f, f] = 1.0  # no two overlaps alike: a tie may be broken either way
    (label_F,), _ = clustered.groups_of(csr_matrix(z_NF), (0.4,), 1e-5)
    assert max(map(len, as_groups(label_F))) < 9 and as_groups(label_F) == slow_groups(z_NF, 0.4, 1e-5)


def test_features_that_never_vary_or_fire_give_no_groups():
    """Fails with a NaN where a feature is constant, or with an error where fewer than two are left."""
    z_NF = np.zeros((50, 4))
    z_NF[:, :2] = 0.7
    label_LF, clustered_F = clustered.groups_of(csr_matrix(z_NF), (0.5,), 1e-5)
    assert not clustered_F.any() and (label_LF == -1).all()


def sparse_data(n, d_in, seed):
    generator = torch.Generator().manual_seed(seed)
    direction_AD = torch.nn.functional.normalize(torch.randn(2 * d_in, d_in, generator=generator), dim=1)
    return (torch.rand(n, 2 * d_in, generator=generator) < 0.1).float() @ direction_AD / (0.2 * d_in) ** 0.5


def train(hyper, steps, total=60, batch=50, state=None, cls=clustered.SAE):
    torch.manual_seed(0)
    sae = cls(12, 40, **hyper)
    optimizer = experiment.make_optimizer(sae, 1e-2)
    if state:
        sae.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    x_SBD = sparse_data(total * batch, 12, 1).reshape(total, batch, 12)
    for step in steps:
        experiment.train_step(sae, optimizer, base.Batch(x_SBD[step]),
                              base.Progress(step, total, step * batch, total * batch))
    return sae, optimizer, x_SBD


def test_ring_holds_the_last_tokens_by_the_sae_of_their_step():
    """Fails if the ring is written at the wrong place, keeps not the largest, or is not full at a clustering."""
    sae, _, x_SBD = train(dict(recent_tokens=120, kept=4), range(58))
    seen = []
    real, sae.remember = sae.remember, lambda x_BD: (real(x_BD), seen.append(sae.encode(x_BD).detach()))
    with torch.no_grad():
        for step in (58, 59):
            sae.after_step(base.Batch(x_SBD[step]), base.Progress(step, 60, step * 50, 3000))
    top = torch.cat(seen)
    top_NF = torch.where(top >= top.topk(4, dim=1).values[:, -1:], top, 0.0)
    ring_NF = torch.from_numpy(sae.recent_activations().toarray())
    assert len(seen) == 2 and ring_NF.shape == (120, 40) and int(sae.remembered) > 120
    found = {tuple(row) for row in ring_NF.tolist()}
    assert all(tuple(row) in found for row in top_NF.tolist())
    assert (top > 0).sum(1).max() > 4  # what is not among the largest was there to be dropped


def test_clusterings_are_counted_from_the_end_of_the_run():
    """Fails if the last is not after the last step, short runs see below four, long ones over one in `every` steps."""
    for total, every, wanted in ((60, 500, 5), (60, 7, 8), (23, 500, 5), (2, 500, 2)):
        sae, _, _ = train(dict(every=every, recent_tokens=100), range(total), total)
        assert int(sae.clusterings) == wanted
        label_LF, _ = clustered.groups_of(sae.recent_activations(), (0.5,), 1e-5)
        assert np.array_equal(sae.group_LF.numpy(), label_LF)


def test_it_trains_like_standard_and_continues_bit_for_bit():
    """Fails if clustering touches the training, or part of its state is lost with the process."""
    hyper = dict(recent_tokens=150, cut=0.3)
    whole, _, x_SBD = train(hyper, range(60))
    plain, _, _ = train({}, range(60), cls=standard.SAE)
    assert all(torch.equal(p, whole.state_dict()[name]) for name, p in plain.state_dict().items())
    for cut in (11, 12, 46):
        head, optimizer, _ = train(hyper, range(cut))
        tail, _, _ = train(hyper, range(cut, 60), state=(head.state_dict(), optimizer.state_dict()))
        assert all(torch.equal(t, whole.state_dict()[name]) for name, t in tail.state_dict().items())
    assert (whole.group_LF >= 0).any() and not torch.equal(whole.group_LF[0], whole.previous_F)


def test_feature_groups_are_lists_of_numbers_and_none_for_the_control(tmp_path):
    """Fails if a feature is in two groups, a group has one, the middle level is not the cut, or saving loses them."""
    sae, _, _ = train(dict(recent_tokens=400, levels=3, cut=0.3), range(60))
    groups = sae.feature_groups()
    assert groups and all(type(f) is int for group in groups for f in group) and min(map(len, groups)) > 1
    assert len({f for group in groups for f in group}) == sum(map(len, groups))
    assert groups == as_groups(clustered.groups_of(sae.recent_activations(), (0.3,), 1e-5)[0][0])
    for fine, coarse in ((0, 1), (1, 2)):  # levels of one tree are nested
        assert all(any(set(g) <= set(h) for h in sae.groups_at(coarse)) for g in sae.groups_at(fine))
    variants.kit.saving.save_sae(tmp_path / "sae", sae, 3.0, variants.path("clustered"),
                                 dict(levels=3, cut=0.3, recent_tokens=400), {})
    assert variants.kit.saving.load_sae(tmp_path / "sae").sae.feature_groups() == groups
    control, _, _ = train(dict(recent_tokens=400, levels=3, cut=0.3, use_groups=False), range(60))
    assert control.feature_groups() is None and control.groups_at() == groups
    with pytest.raises(ValueError, match="levels = 2"):
        clustered.SAE(4, 8, levels=2)


def context_for(sae, seed=0):
    def held_out(n_tokens):
        return base.Batch(sparse_data(600, 12, 2), tokens=torch.arange(600) % 50)

    lm = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: f" word{ids[0]}$"))
    return base.Context(lm, 0, TrainedSAE(sae, 1.0), seed, held_out)


@pytest.mark.slow
def test_report_by_hand():
    """Fails if coherence is of other tokens or the diagonal, the Rand index of other features, or numbers vary."""
    from sklearn.metrics import adjusted_rand_score

    sae, _, _ = train(dict(recent_tokens=400, cut=0.3), range(60))
    numbers, files = sae.report(context_for(sae))
    C = np.corrcoef(sae.encode(sparse_data(600, 12, 2)).detach().double().numpy().T)
    groups = sae.feature_groups()
    wanted = [np.mean([C[i, j] for i in group for j in group if i < j]) for group in groups]
    assert numbers["coherence"] == pytest.approx(np.mean(wanted), abs=1e-5) and numbers["groups"] == len(groups)
    assert numbers["coherence_stderr"] == pytest.approx(np.std(wanted, ddof=1) / len(wanted) ** 0.5, abs=1e-5)
    assert abs(numbers["coherence_random"]) < 0.1 < numbers["coherence"]
    pairs = [(a, b) for a, b in zip(sae.previous_F.tolist(), sae.group_LF[0].tolist()) if a >= 0 or b >= 0]
    alone = iter(range(1000, 2000))
    one, two = zip(*[(a if a >= 0 else next(alone), b if b >= 0 else next(alone)) for a, b in pairs])
    assert numbers["stability"] == pytest.approx(adjusted_rand_score(one, two))
    assert numbers["share_in_groups"] == pytest.approx(sum(map(len, groups)) / int(sae.clustered_F.sum()))
    assert json.loads(files["groups.json"]) == {"level 0.3": groups}
    drawn = {name: file for name, file in files.items() if name.endswith(".png")}
    assert drawn.keys() == {"group_sizes.png", "coherence.png", "largest_groups.png"}
    assert all(1000 < len(file) < 150_000 and file[:4] == b"\x89PNG" for file in drawn.values())
    assert sae.report(context_for(sae)) == (numbers, files)


def test_report_of_an_sae_without_groups():
    """Fails if an SAE that never clustered, or whose features are all dead, brings the report down or gives a NaN."""
    sae = clustered.SAE(12, 40)
    sae.b_enc.data.fill_(-100.0)
    numbers, files = sae.report(context_for(sae))
    assert numbers["groups"] == 0 and numbers["coherence"] is None and numbers["stability"] is None
    assert list(files) == ["groups.json"] and sae.feature_groups() == []
    assert all(number is None or np.isfinite(number) for number in numbers.values())


@pytest.mark.slow
def test_preflight_passes():
    """Fails if preflight refuses the variant or says more than that it trains like `standard`, as it should."""
    findings = preflight("clustered", SMOLLM, reference_files=[variants.path("standard"), variants.path("topk")])
    assert [note for note in findings.notes
            if "trains bit-identically to standard" not in note] == [] and len(findings.notes) == 1


def test_steps_between_clusterings_never_wait_for_the_device():
    """Fails if remembering tokens reads a value back: the meta device has none to give."""
    with torch.device("meta"):
        sae = clustered.SAE(16, 64, recent_tokens=256)
        optimizer = torch.optim.Adam(sae.parameters(), foreach=True)
        for step in (0, 95, 98):
            experiment.train_step(sae, optimizer, base.Batch(torch.empty(32, 16)),
                                  base.Progress(step, 100, step * 32, 3200))
