"""k that falls in the course of training, and Matryoshka's prefixes by frequency and inner errors of their own."""

import pytest
import torch

import experiment
import variants
from tests.variants.common import preflight, read_by_both
from variants import base, batch_topk, matryoshka_batch_topk, topk
from variants.kit import interchange, saving
from variants.kit.trained import TrainedSAE

ANNEALED = ["topk", "batch_topk", "matryoshka_batch_topk"]


def built(name, **hyper):
    torch.manual_seed(0)
    return variants.build(variants.load(name), 6, 40, hyper)


def kept_in(sae, step, total, B=6):
    """Features that the loss of a step keeps of a batch of B tokens."""
    x_BD = torch.randn(B, 6, generator=torch.Generator().manual_seed(1))
    sae.loss(base.Batch(x_BD), base.Progress(step, total, step * B, total * B))
    return int(((sae._kept if hasattr(sae, "_kept") else sae._kept_BF) > 0).sum())


# ------------------------------------------------------------------------------------------------ k falls


@pytest.mark.parametrize("name", ANNEALED)
def test_k_falls_linearly_and_arrives(name):
    """Fails if k starts elsewhere, falls otherwise, or has not arrived by its time, in a run of any length."""
    sae = built(name, k=4, k_start=10, k_share=0.5)
    found = [kept_in(sae, step, 9) for step in range(9)]  # the 4 steps from 0 to half of 8: 1.5 less in each
    fractions = [10, 8.5, 7, 5.5, 4, 4, 4, 4, 4]
    whole = [10, 8, 7, 6, 4, 4, 4, 4, 4]  # of each token, rounded to even
    assert found == [6 * k for k in (whole if name == "topk" else fractions)]
    assert [kept_in(sae, total - 1, total) for total in (1, 2, 3)] == [24] * 3
    assert [kept_in(built(name, k=4), step, 9) for step in (0, 8)] == [24, 24]
    assert kept_in(built(name, k=4, k_start=10, k_share=1), 8, 9) == 24


@pytest.mark.parametrize("name", ANNEALED)
@pytest.mark.parametrize("share", [0.8, 1])
def test_l0_is_k_at_the_end(name, share):
    """Fails if theta still remembers larger k, or evals on the way and at the end see another L0 than k."""
    sae, x_NBD = built(name, k=3, k_start=30, k_share=share), torch.randn(25, 256, 6) / 6**0.5
    optimizer, l0 = experiment.make_optimizer(sae, 3e-3), []
    for step, x_BD in enumerate(x_NBD):
        l0.append(float((sae.encode(x_BD) > 0).sum(1).float().mean()))
        experiment.train_step(sae, optimizer, base.Batch(x_BD), base.Progress(step, 25, step * 256, 25 * 256))
    assert l0[:19] == [3] * 19  # the k of the end, as there is no theta yet
    assert float((sae.encode(x_NBD[-1]) > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.05)
    assert sae.theta > 0


def test_a_k_that_cannot_fall_is_refused():
    """Fails if it would rise, be cut to a whole number, or fall over a share of the run that there is not."""
    for hyper, words in [(dict(k_start=3), "k_start = 3: k falls from there to k = 4"),
                         (dict(k_start=5.5), "k_start = 5.5: .* whole number"), (dict(k_start=41), "k_start = 41"),
                         (dict(k_start=8, k_share=0), "k_share = 0"), (dict(k_start=8, k_share=1.5), "k_share = 1.5")]:
        with pytest.raises(ValueError, match=f"--hyper {words}") as refused:
            topk.SAE(6, 40, k=4, **hyper)
        assert len(str(refused.value).splitlines()) == 2
    assert batch_topk.SAE(6, 40, k=1.5, k_start=5.5).k_start == 5.5


def test_a_loss_with_another_k_in_each_step_is_not_compiled():
    """Fails if it would be compiled anew from step to step, or where k does not change, not at all."""
    for name in ANNEALED:
        assert built(name).compiled_loss and not built(name, k=4, k_start=8).compiled_loss
        assert variants.load(name).SAE.compiled_loss


TINY = dict(d_in=48, d_sae=128, batch_size=256, total_steps=64, lr=3e-3)


@pytest.mark.parametrize("name, hyper", [
    ("topk", dict(k=8, k_start=24)), ("batch_topk", dict(k=8, k_start=24)), ("batch_topk", dict(k=8, k_start=128)),
    ("batch_topk", dict(k=1.5, k_start=20)), ("matryoshka_batch_topk", dict(k=8, k_start=24, k_share=1)),
    ("matryoshka_batch_topk", dict(k=8, detach=True)), ("matryoshka_batch_topk", dict(k=8, by_frequency=True))])
def test_preflight_passes_without_a_note(name, hyper):
    """Fails if preflight calls an SAE dense for the k that it starts with, finds lost state, or a loss that waits."""
    found = preflight(name, TINY, hyper, accelerator=True, reference_files=[variants.path("standard")])
    assert found.notes == [] and found.active < 0.2


# ------------------------------------------------------------------------------------------------ Matryoshka


def nested_by_hand(sae, x_BD, k, order, detach):
    """Σ w_i·error_i with masks over whole matrices; an inner error's other features and b_dec are constants."""
    acts_BF = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    smallest = acts_BF.flatten().sort(descending=True).values[k * len(x_BD) - 1]
    z_BF = torch.where(acts_BF >= smallest, acts_BF, 0.0)
    loss, ends = 0.0, [1, 3, 8, 18, 40]
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        earlier_F, own_F = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
        earlier_F[order[:begin]], own_F[order[begin:end]] = 1, 1
        before_BD = (z_BF * earlier_F) @ sae.W_dec + sae.b_dec
        if detach and 0 < i < 4:
            before_BD = before_BD.detach()
        x_hat_BD = before_BD + (z_BF * own_F) @ sae.W_dec
        loss = loss + sae.weights[i] * ((x_BD - x_hat_BD) ** 2).sum(1).mean()
    return loss


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_nested_losses_equal_dense_autograd(detach, by_frequency):
    """Fails if a group holds other features, or an inner error's gradient reaches what it should not, in fp64."""
    torch.manual_seed(0)
    sae = matryoshka_batch_topk.SAE(6, 40, k=4, auxk_alpha=0, weights=(5, 4, 3, 2, 1), detach=detach,
                                    by_frequency=by_frequency).double()
    order = list(range(40))
    if by_frequency:
        order = torch.randperm(40).tolist()
        sae.frequency_F[order] = torch.linspace(0.9, 0, 40, dtype=torch.float64)
    for bias in (sae.b_enc, sae.b_dec):
        bias.data.normal_(0, 0.1)
    x_BD = torch.randn(9, 6, dtype=torch.float64)
    loss, _ = sae.loss(base.Batch(x_BD), base.Progress(50, 100, 0, 10**9))
    loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    wanted = nested_by_hand(sae, x_BD, 4, order, detach)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for name, p in sae.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-10, atol=1e-12), name


def test_frequency_by_hand():
    """Fails if firing is averaged otherwise, weights or counters move with the ranks, or the first step has another."""
    sae, plain = built("matryoshka_batch_topk", k=4, by_frequency=True), built("matryoshka_batch_topk", k=4)
    x_BD, late = torch.randn(50, 6), base.Progress(500, 1000, 0, 10**9)
    assert sae.loss(base.Batch(x_BD), late)[0] == plain.loss(base.Batch(x_BD), late)[0]
    for kept_BF, wanted in [([[1, 1, 0], [0, 2, 0]], [0.005, 0.01, 0]),
                            ([[0, 0, 3], [0, 0, 1]], [0.00495, 0.0099, 0.01])]:
        sae._kept_BF = torch.nn.functional.pad(torch.tensor(kept_BF, dtype=torch.float32), (0, 37))
        sae.after_step(None, base.Progress(500, 10**6, 0, 1))  # a window of 100 steps: .99
        assert sae.frequency_F[:3].tolist() == pytest.approx(wanted, rel=1e-4)
    assert base.theta_decay(base.Progress(0, 40, 0, 1), 100) == 0.5  # a twentieth of a shorter run


def test_ranks_are_for_training_alone(tmp_path):
    """Fails if the ranks, which only training knows, change what is saved, or stop a run that begins with the SAE."""
    sae, x_BD = built("matryoshka_batch_topk", k=4, by_frequency=True), torch.randn(200, 6)
    sae.theta.fill_(0.5)
    sae.frequency_F.uniform_()
    trained, theirs, ours = read_by_both(tmp_path / "layer_2", "matryoshka_batch_topk", sae,
                                         dict(k=4, by_frequency=True, detach=True))
    for other in (theirs, ours):
        assert torch.allclose(other.encode(37 * x_BD), trained.encode(37 * x_BD), atol=1e-3)
    again = built("matryoshka_batch_topk", k=4, by_frequency=True)
    saving.save_sae(tmp_path / "plain/layer_2", built("matryoshka_batch_topk", k=4), 37.0,
                    variants.path("matryoshka_batch_topk"), dict(k=4), {})
    for place in ("layer_2", "plain/layer_2"):
        interchange.adopt(again, str(tmp_path / place), "layer_2")
        assert not again.frequency_F.any()
    assert TrainedSAE(again, 1.0).W_dec.shape == (40, 6)
