"""Features of two dictionaries matched one to one: against SAELens' own figure, at any width, within bounded memory."""

import numpy as np
import pytest
import torch
from sae_lens.synthetic import mean_correlation_coefficient
from scipy.optimize import linear_sum_assignment

from runs import matching


def dictionaries(f, g, d, seed=0):
    """Two of f and g features in d dimensions; half of the smaller one's features are noisy copies, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    a_FD, b_GD = (torch.randn(n, d, generator=generator) for n in (f, g))
    shared = min(f, g) // 2
    place = torch.randperm(g, generator=generator)[:shared]
    b_GD[place] = a_FD[:shared] + torch.rand(shared, 1, generator=generator) * b_GD[place]
    return a_FD, b_GD


@pytest.mark.parametrize("f, g", [(60, 60), (40, 60), (60, 40)])
def test_equals_saelens(f, g):
    """Fails if the mean is not that of the best one-to-one matching, rows are not normalised, or a sign is lost."""
    a_FD, b_GD = dictionaries(f, g, 16)
    for rows_FD, rows_GD, absolute in ((a_FD, b_GD, True), (a_FD.abs(), b_GD.abs(), False)):
        cosine_P, _ = matching.matched(matching.unit(3 * rows_FD), matching.unit(rows_GD), absolute=absolute)
        assert len(cosine_P) == min(f, g)
        assert cosine_P.mean() == pytest.approx(mean_correlation_coefficient(rows_FD, rows_GD), abs=1e-6)
    opposite_P, _ = matching.matched(matching.unit(torch.eye(3)), matching.unit(-torch.eye(3)))
    assert opposite_P.tolist() == [0, 0, 0]  # −1 on the diagonal, 0 elsewhere: the best pairs are unlike, not opposite


@pytest.mark.parametrize("f, g", [(500, 500), (300, 500), (500, 300)])
def test_candidates_lose_nothing_and_memory_is_bounded(monkeypatch, f, g):
    """Fails if a wide dictionary's matching is not the exact one, or more cosines are held at once than allowed."""
    a_FD, b_GD = (matching.unit(rows) for rows in dictionaries(f, g, 48))
    alive = torch.arange(f) % 3 > 0, torch.arange(g) % 4 > 0
    held, product = [], matching._cosines

    def counted(*rows):
        held.append(product(*rows).numel())
        return product(*rows)

    monkeypatch.setattr(matching, "EVERY_PAIR", 0)
    monkeypatch.setattr(matching, "CANDIDATES", 40 * 500)
    monkeypatch.setattr(matching, "BLOCK", 7_001)
    monkeypatch.setattr(matching, "_cosines", counted)
    for absolute in (False, True):
        cosine_FG = (a_FD @ b_GD.T).double().numpy()
        cosine_FG = np.abs(cosine_FG) if absolute else cosine_FG
        found = matching.matched(a_FD, b_GD, alive, absolute)
        for cosine_P, part_FG in zip(found, (cosine_FG, cosine_FG[alive[0]][:, alive[1]])):
            exact_P = part_FG[linear_sum_assignment(part_FG, maximize=True)]
            assert len(cosine_P) == len(exact_P)
            assert cosine_P.mean() == pytest.approx(exact_P.mean(), abs=1e-5)
    assert max(held) <= 7_001 and sum(held) == 2 * f * g  # every cosine once, for both sides' best
    largest_F, index_F = matching.nearest(a_FD, b_GD)
    assert max(held) <= 7_001 and torch.equal(index_F, (a_FD @ b_GD.T).argmax(1))
    assert torch.allclose(largest_F, (a_FD @ b_GD.T).amax(1))


def test_a_matching_exists_whatever_the_candidates_are(monkeypatch):
    """Fails if features that all have the same few best partners cannot be matched."""
    monkeypatch.setattr(matching, "EVERY_PAIR", 0)
    monkeypatch.setattr(matching, "CANDIDATES", 2 * 9)
    a_FD, b_FD = torch.eye(3)[:1].repeat(9, 1), torch.eye(3)[1:2].repeat(9, 1)
    b_FD[4:6] = a_FD[:2]
    cosine_P, _ = matching.matched(a_FD, b_FD)
    assert sorted(cosine_P.tolist()) == [0] * 7 + [1] * 2


def test_mutual_nearest_where_the_width_forbids_more(monkeypatch):
    """Fails if a one-sided nearest neighbour counts as a pair, or the shares are not of all features."""
    monkeypatch.setattr(matching, "EVERY_PAIR", 0)
    monkeypatch.setattr(matching, "HUNGARIAN", 2)
    a_FD = matching.unit(torch.tensor([[1.0, 0, 0], [4, 3, 0], [0, 0, 1]]))
    b_FD = matching.unit(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 3, 4]]))
    cosine_P, among_P = matching.matched(a_FD, b_FD, (torch.tensor([True, True, False]), torch.ones(3) > 0))
    assert sorted(cosine_P.tolist()) == pytest.approx([0.8, 1.0])  # (4, 3, 0) is nearest to a row that has a nearer one
    assert among_P.tolist() == [1.0]
    expected = {"mean_cosine": 0.9, "share_above_0.7": 2 / 3, "share_above_0.9": 1 / 3}
    assert matching.figures(cosine_P, 3) == pytest.approx(expected)


def test_few_that_fire_in_a_wide_dictionary(monkeypatch):
    """Fails if the matching among those that fire, few enough for a full one, is forced on mutual nearest alone."""
    monkeypatch.setattr(matching, "EVERY_PAIR", 0)
    monkeypatch.setattr(matching, "HUNGARIAN", 60)
    generator = torch.Generator().manual_seed(0)
    a_FD = matching.unit(torch.randn(100, 32, generator=generator))
    order = torch.randperm(100, generator=generator)
    b_FD = matching.unit(a_FD + 0.05 * torch.randn(100, 32, generator=generator))[order]
    alive_F = torch.arange(100) < 50
    _, among_P = matching.matched(a_FD, b_FD, (alive_F, alive_F[order]))
    assert len(among_P) == 50 and among_P.min() > 0.9  # each with its own noisy copy


def test_random_directions_of_equal_size():
    """Fails if what chance gives is not that of Gaussian directions of that number and dimension, or has no seed."""
    cosine_FF = torch.nn.functional.cosine_similarity(torch.randn(1, 300, 64), torch.randn(300, 1, 64), dim=2).numpy()
    expected = cosine_FF[linear_sum_assignment(cosine_FF, maximize=True)].mean()
    matching.of_random.cache_clear()
    found = matching.of_random(300, 300, 64)
    assert found["mean_cosine"] == pytest.approx(expected, abs=0.01) and found["share_above_0.7"] == 0
    matching.of_random.cache_clear()
    assert matching.of_random(300, 300, 64) == found
