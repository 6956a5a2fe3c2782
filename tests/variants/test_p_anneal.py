"""p_anneal's own: its power, the moves of p and α, and their state; its loss and weights: test_penalty_variants.py."""

import pytest
import torch

import experiment
from variants import base, p_anneal


def test_p_anneal_penalty_is_continuous_and_p_ends_at_its_end():
    """Fails if α is rescaled inversely or not at all, a move is missed or not equal, or p stops short of .2."""
    torch.manual_seed(0)
    sae = p_anneal.SAE(6, 30, l1_penalty=0.3)
    x_BD = torch.randn(50, 6)
    z = sae.encode(x_BD).detach().double()
    used, alphas = [], set()
    for step in range(40):
        def penalty():
            return float(sae.alpha) * float(((z[z > 0] + p_anneal.EPSILON) ** float(sae.p)).sum()) / 50

        used.append(float(sae.p))
        before = penalty()
        with torch.no_grad():
            sae.after_step(base.Batch(x_BD), base.Progress(step, 40, step * 50, 2000))
        assert penalty() == pytest.approx(before, rel=1e-5)
        alphas.add(float(sae.alpha))
    assert used == pytest.approx([1.0] * 20 + [1 - 0.08 * move for move in range(1, 11) for _ in range(2)])
    assert len(alphas) == 11 and min(alphas) < 0.9 * max(alphas)
    assert sae.p_at(6, 7) == pytest.approx(0.2)  # four steps for ten moves


def test_p_anneal_slope_is_finite_where_a_feature_barely_fires():
    """Fails for a bare z^p: a feature at 1e-30 would get a gradient of 1e23, one at 0 a NaN."""
    z = torch.tensor([[1e-30, 0.0, 0.5]], requires_grad=True)
    sae = p_anneal.SAE(2, 3)
    sae.power_sum(torch.relu(z), torch.tensor(0.2)).backward()
    assert z.grad[0].tolist() == pytest.approx([0.2 * 1e-6**-0.8, 0.0, 0.2 * 0.5**-0.8], rel=1e-3)


def test_p_anneal_continues_bit_for_bit_in_the_middle_of_the_moves():
    """Fails if p, α or what decides a move is lost with the process, or restoring rescales α once too often."""
    def train(steps, state=None):
        torch.manual_seed(0)
        sae = p_anneal.SAE(6, 30)
        optimizer = experiment.make_optimizer(sae, 1e-2)
        if state:
            sae.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        x_SBD = torch.randn(40, 50, 6) / 6**0.5
        points = [base.Progress(s, 40, s * 50, 2000) for s in steps]
        losses = [experiment.train_step(sae, optimizer, base.Batch(x_SBD[p.step]), p)[0].item() for p in points]
        return losses, (sae.state_dict(), optimizer.state_dict())

    whole, end = train(range(40))
    for cut in (10, 27, 28):  # before the first move, just after one and between two
        head, state = train(range(cut))
        tail, resumed = train(range(cut, 40), state)
        assert head + tail == whole
        assert all(torch.equal(end[0][k], resumed[0][k]) for k in end[0])
