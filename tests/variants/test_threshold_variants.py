"""Variants whose features pass a threshold: batch_topk, matryoshka_batch_topk and jumprelu against plain references."""

import pytest
import torch

import experiment
import variants
import variants.kit.saving
from tests.variants.common import SMOLLM, preflight, raw_activations, read_by_both
from variants import base, batch_topk, jumprelu, matryoshka_batch_topk
from variants.kit.trained import TrainedSAE

NAMES = ["batch_topk", "matryoshka_batch_topk", "jumprelu"]
LATE = base.Progress(50, 100, 5000, 10_000)


def biased(sae):
    """The SAE in fp64 with non-zero biases, every third feature dead."""
    sae = sae.double()
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.1)
    sae.tokens_since_fired[::3] = 10**9
    return sae


def reference(sae, x_BD, k, prefixes):
    """Sum over prefixes (end, weight) and auxk, dense and slow: the threshold is the k·B-th of all values sorted."""
    acts_BF = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    threshold = sorted(acts_BF.flatten().tolist(), reverse=True)[k * len(x_BD) - 1]
    z_BF = torch.where(acts_BF >= threshold, acts_BF, 0.0)
    nested = sum(w * ((x_BD - z_BF[:, :end] @ sae.W_dec[:end] - sae.b_dec) ** 2).sum(1).mean() for end, w in prefixes)
    residual_BD = (x_BD - z_BF @ sae.W_dec - sae.b_dec).detach()
    dead_BF = torch.where(torch.arange(acts_BF.shape[1]) % 3 == 0, acts_BF, -torch.inf)
    aux_BK, index_BK = dead_BF.topk(x_BD.shape[1] // 2)
    aux_BD = torch.zeros_like(acts_BF).scatter(1, index_BK, aux_BK) @ sae.W_dec
    auxk = ((residual_BD - aux_BD) ** 2).sum(1).mean() / ((residual_BD - residual_BD.mean(0)) ** 2).sum(1).mean()
    return nested, auxk


@pytest.mark.parametrize("make, prefixes", [
    (lambda: batch_topk.SAE(6, 40, k=4, auxk_alpha=0.3), [(40, 1)]),
    # groups of 40: 40/32, 40/16, 40/8, 40/4 rounded down, and what is left
    (lambda: matryoshka_batch_topk.SAE(6, 40, k=4, auxk_alpha=0.3, weights=(5, 4, 3, 2, 1)),
     [(1, 5), (3, 4), (8, 3), (18, 2), (40, 1)]),
])
def test_batch_topk_losses_equal_dense_autograd(make, prefixes):
    """Fails if a term, its weight, or any parameter's gradient differs from plain autograd in fp64."""
    torch.manual_seed(0)
    sae, x_BD = biased(make()), torch.randn(9, 6, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), LATE)
    loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    nested, auxk = reference(sae, x_BD, 4, prefixes)
    (nested + 0.3 * auxk).backward()
    assert [t.item() for t in terms.values()] == pytest.approx([nested.item(), auxk.item()], rel=1e-12)
    assert loss.item() == pytest.approx((nested + 0.3 * auxk).item(), rel=1e-12)
    for name, p in sae.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-10, atol=1e-12), name


def test_matryoshka_prefixes_by_hand():
    """Fails if groups do not add up, or a prefix decodes more or less than the features in front of its end."""
    assert matryoshka_batch_topk.SAE(4, 37).groups == [1, 2, 4, 9, 21]
    assert matryoshka_batch_topk.SAE(4, 2304, k=1).groups == [72, 144, 288, 576, 1224]
    sae = matryoshka_batch_topk.SAE(2, 32, k=2, auxk_alpha=0)  # groups 1, 2, 4, 8, 17
    for weight in (sae.W_dec, sae.W_enc):
        weight.data.zero_()
    sae.W_dec.data[0, 0] = sae.W_enc.data[0, 0] = 1  # the first prefix has x's first coordinate
    sae.W_dec.data[3, 1] = sae.W_enc.data[1, 3] = 1  # the third and later ones its second
    loss, _ = sae.loss(base.Batch(torch.tensor([[3.0, 4.0]])), LATE)
    assert loss.item() == pytest.approx(16 + 16 + 0 + 0 + 0)


def test_batch_topk_keeps_exactly_k_times_batch():
    """Fails where ties, zeros or an untypical sample make the count or the choice inexact."""
    torch.manual_seed(0)
    random_BF = torch.relu(torch.randn(40, 50))
    untypical = torch.rand(2000)
    untypical[::17] += 10  # all that the bound is taken from is large
    for acts_BF in (random_BF, random_BF.round(), torch.ones(40, 50), torch.zeros(40, 50), untypical.view(40, 50),
                    -untypical.view(40, 50)):
        keep_BF = base.batch_topk(acts_BF, 5)
        best = sorted(acts_BF.flatten().tolist(), reverse=True)[:200]
        assert keep_BF.sum() == 200 and sorted(acts_BF[keep_BF].tolist(), reverse=True) == best
    assert base.batch_topk(random_BF, 50).all()
    assert base.batch_topk(random_BF, 5).sum(1).unique().numel() > 1  # over the batch, not per token


@pytest.mark.parametrize("k, B, kept", [(1.5, 40, 60), (1.5, 63, 94), (0.3, 10, 3), (12.25, 20, 245), (0.01, 7, 1)])
def test_batch_topk_keeps_a_fraction_as_a_mean(k, B, kept):
    """Fails if k is cut to a whole number anywhere: in the mask, in the SAE, or where it is saved and read again."""
    acts_BF = torch.rand(B, 50, generator=torch.Generator().manual_seed(0))
    assert base.batch_topk(acts_BF, k).sum() == kept
    for module in (batch_topk, matryoshka_batch_topk):
        sae = module.SAE(6, 50, k=k)
        sae.loss(base.Batch(torch.randn(B, 6)), LATE)
        assert sae.k == k and sae.encode(torch.randn(3, 6)).shape == (3, 50)


@pytest.mark.parametrize("theta", [0.4, -1.0])
def test_a_fractional_k_is_saved_as_it_was_trained(tmp_path, theta):
    """Fails if the file says another k than the run, or holds a fraction as SAELens' TopK, which takes none."""
    sae = batch_topk.SAE(12, 40, k=1.5)
    sae.theta.fill_(theta)
    variants.kit.saving.save_sae(tmp_path / "sae", sae, 3.0, variants.path("batch_topk"), {"k": 1.5}, {})
    again, x = variants.kit.saving.load_sae(tmp_path / "sae"), torch.randn(20, 12) * 3
    assert again.sae.k == 1.5 and torch.allclose(again.encode(x), TrainedSAE(sae, 3.0).encode(x), atol=1e-5)
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists() == (theta >= 0)


REFUSED = [0, -1, 41, 1e9, float("nan"), float("inf"), "abc", True, False, None, (3,)]


@pytest.mark.parametrize("name, key, value", [(name, key, value) for name, key in [
    ("topk", "k"), ("batch_topk", "k"), ("matryoshka_batch_topk", "k"), ("jumprelu", "target_l0")] for value in REFUSED]
    + [("topk", "k", 1.5), ("topk", "k", 0.5), ("hierarchical", "k1", 1.5), ("hierarchical", "k2", 2.5),
       ("cosine_concepts", "k", 1.5), ("cosine_concepts", "k", -0.5)])
def test_a_count_of_features_that_cannot_be_is_refused(name, key, value):
    """Fails if such a k is trained as another one, or ends in an error that does not name it."""
    with pytest.raises(ValueError, match=f"--hyper {key} = ") as refused:
        variants.build(variants.load(name), 6, 40, {key: value})
    assert len(str(refused.value).splitlines()) == 2 and repr(value) in str(refused.value)


def test_a_whole_number_written_as_a_fraction_is_one():
    """Fails if k=4.0 is refused, or kept as a float that a top-k does not take."""
    assert [variants.build(variants.load(name), 6, 40, {"k": 4.0}).k for name in ("topk", "batch_topk")] == [4, 4]


def test_theta_decides_alone_at_inference():
    """Fails if encode ranks within the batch, takes theta for its own decay, or gives nothing before a theta."""
    torch.manual_seed(0)
    for sae in (batch_topk.SAE(6, 40, k=4), matryoshka_batch_topk.SAE(6, 40, k=4)):
        x_BD = torch.randn(30, 6)
        assert sae.encode(x_BD).count_nonzero(1).tolist() == [4] * 30 and sae.saelens == "topk"
        sae.theta.fill_(0.7)
        acts_BF = torch.relu(x_BD @ sae.W_enc)
        z_BF = sae.encode(x_BD)
        assert torch.equal(z_BF > 0, acts_BF > 0.7) and torch.allclose(z_BF[z_BF > 0], acts_BF[acts_BF > 0.7])
        assert torch.allclose(z_BF[:1], sae.encode(x_BD[:1])) and z_BF.count_nonzero(1).unique().numel() > 1
        sae.loss(base.Batch(x_BD), LATE)
        sae.after_step(None, LATE)
        kept = sorted(acts_BF.flatten().tolist(), reverse=True)[4 * 30 - 1]
        assert sae.theta.item() == pytest.approx(0.7 + (kept - 0.7) / 5)  # 100 steps: a window of 5
    assert base.theta_decay(base.Progress(0, 10**6, 0, 1)) == pytest.approx(0.999)


def test_straight_through_gradients_by_hand():
    """Fails if the window, the factor theta of the reconstruction's path or the sum over tokens is wrong."""
    z_pre_BF = torch.tensor([[0.52, 0.36], [0.47, 0.31]], requires_grad=True)
    theta_F = torch.tensor([0.5, 0.3], requires_grad=True)
    z_BF, l0_B = jumprelu.JumpReLU.apply(z_pre_BF, theta_F, 0.1)
    assert torch.equal(z_BF, torch.tensor([[0.52, 0.36], [0.0, 0.31]])) and l0_B.tolist() == [2, 1]
    (z_BF * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().add((l0_B * torch.tensor([10.0, 20.0])).sum()).backward()
    assert torch.equal(z_pre_BF.grad, torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    # within .05 of theta: both tokens of the first feature, the second token of the second
    assert theta_F.grad.tolist() == pytest.approx([-(0.5 * (1 + 3) + 10 + 20) / 0.1, -(0.3 * 4 + 20) / 0.1], rel=1e-5)


def test_jumprelu_loss_and_gradients_equal_a_dense_loop():
    """Fails if a term, the warm-up, the centring or any gradient differs from the formulas written out in fp64."""
    torch.manual_seed(0)
    B, D, F, target, eps, sp = 7, 5, 12, 3, 0.5, 0.4
    sae = biased(jumprelu.SAE(D, F, target_l0=target, bandwidth=eps))
    sae.theta.data.uniform_(0.1, 0.6)
    x_BD = torch.randn(B, D, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), base.Progress(4, 100, 0, 1))  # sparsity warm-up: 4 of 10 steps
    loss.backward()
    with torch.no_grad():
        z_pre_BF = x_BD @ sae.W_enc + sae.b_enc
        z_BF = torch.where(z_pre_BF > sae.theta, z_pre_BF, 0.0)
        e_BD = x_BD - z_BF @ sae.W_dec - sae.b_dec
        l0 = (z_BF != 0).double().sum(1).mean()
        g_BF, g_l0 = -2 / B * e_BD @ sae.W_dec.T, sp * 2 * (l0 / target - 1) / target / B
        d_theta = [0.0] * F
        for b in range(B):
            for f in range(F):
                if abs(z_pre_BF[b, f] - sae.theta[f]) < eps / 2:
                    d_theta[f] += float(-sae.theta[f] / eps * g_BF[b, f] - g_l0 / eps)
        d_z_pre_BF = g_BF * (z_BF != 0)
        wanted = dict(W_enc=x_BD.T @ d_z_pre_BF, b_enc=d_z_pre_BF.sum(0), W_dec=-2 / B * z_BF.T @ e_BD,
                      b_dec=-2 / B * e_BD.sum(0), theta=torch.tensor(d_theta, dtype=torch.float64))
    assert terms["reconstruction"].item() == pytest.approx((e_BD**2).sum().item() / B, rel=1e-12)
    assert terms["sparsity"].item() == pytest.approx((l0.item() / target - 1) ** 2, rel=1e-12) and l0 != target
    assert loss.item() == pytest.approx(terms["reconstruction"].item() + sp * terms["sparsity"].item(), rel=1e-12)
    for name, p in sae.named_parameters():
        assert wanted[name].any() and torch.allclose(p.grad, wanted[name], rtol=1e-10, atol=1e-12), name


def test_jumprelu_comes_to_its_target_l0():
    """Fails if the thresholds move the wrong way or stay behind: from half of all features down to the target."""
    torch.manual_seed(0)
    truth_FD = torch.nn.functional.normalize(torch.randn(200, 32), dim=1)
    sae = jumprelu.SAE(32, 128, target_l0=8)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    for step in range(150):
        x_BD = (torch.rand(256, 200) * (torch.rand(256, 200) < 0.02)) @ truth_FD
        x_BD = x_BD / x_BD.pow(2).sum(1).mean().sqrt()
        if step == 0:
            assert sae.encode(x_BD).count_nonzero() > 30 * len(x_BD)
        experiment.train_step(sae, optimizer, base.Batch(x_BD), base.Progress(step, 150, step * 256, 150 * 256))
    assert sae.encode(x_BD).count_nonzero() / len(x_BD) == pytest.approx(8, rel=0.1)
    assert (sae.theta >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_preflight_passes_without_a_note(name):
    """Fails if preflight finds features that depend on other tokens, lost state, an idle term or a step that waits."""
    rivals = [variants.path(n) for n in ("standard", "topk", *NAMES) if n != name]
    assert preflight(name, SMOLLM, reference_files=rivals, accelerator=True).notes == []


@pytest.mark.parametrize("name", NAMES)
def test_saved_sae_loads_in_saelens_and_here_with_the_same_features(tmp_path, name):
    """Fails if threshold or centring is lost or left in normalised units: scale 37, biases, rows of any norm."""
    torch.manual_seed(0)
    sae = variants.build(variants.load(name), 12, 40, {})
    sae.W_dec.data *= torch.linspace(0.5, 2, 40)[:, None]
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.3)
    sae.theta.data.copy_(torch.linspace(0.2, 1, 40) if sae.theta.ndim else torch.tensor(0.5))
    x_raw = raw_activations()
    trained, theirs, ours = read_by_both(tmp_path / "layer_1", name, sae)
    features = trained.encode(x_raw)
    assert 0.05 < (features > 0).float().mean() < 0.5
    for other in (theirs, ours):
        assert torch.equal(other.encode(x_raw) > 0, features > 0)
        assert torch.allclose(other.encode(x_raw), features, rtol=1e-5, atol=1e-4)
        assert torch.allclose(other.decode(features), trained.decode(features), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("theta", [0.02, 0.3])
@pytest.mark.parametrize("D, F", [(32, 256), (256, 1024)])
def test_jumprelu_under_autocast_is_that_of_fp32(D, F, theta):
    """Fails if z_pre reaches theta through bf16: its steps are wider than the window, the gradient is noise."""
    torch.manual_seed(0)
    sae = jumprelu.SAE(D, F, target_l0=8)
    sae.theta.data.fill_(theta)
    sae.b_enc.data.normal_(theta - 0.1, 0.05)
    x_BD = torch.nn.functional.normalize(torch.randn(512, D), dim=1)
    found = []
    for bf16 in (False, True):
        sae.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, terms = sae.loss(base.Batch(x_BD), LATE)
        loss.backward()
        l0 = 8 * (1 + terms["sparsity"].item() ** 0.5)
        found.append((l0, {name: p.grad.clone() for name, p in sae.named_parameters()}))
    (l0, exact), (l0_bf16, rounded) = found
    assert l0_bf16 == pytest.approx(l0, rel=1e-3) and exact["theta"].any()
    for name, grad in exact.items():
        assert torch.cosine_similarity(grad.flatten(), rounded[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("name", ["standard", "topk", "batch_topk", "matryoshka_batch_topk", "gated"])
def test_biases_and_results_are_not_rounded_under_autocast(name):
    """Fails if b_dec·W_enc or a pre-activation is rounded to bf16: with a mean of norm 1, by up to .004."""
    torch.manual_seed(0)
    sae = variants.load(name).SAE(64, 512)
    mean_D = torch.nn.functional.normalize(torch.randn(64), dim=0)
    sae.b_dec.data.copy_(mean_D)
    x_BD = mean_D + 0.05 * torch.randn(128, 64)
    pre = (lambda: sae.gate_and_magnitude(x_BD)[0]) if name == "gated" else (lambda: sae.pre_activations(x_BD))
    exact_BF = pre()
    with torch.autocast("cpu", torch.bfloat16):
        rounded_BF = pre()
    assert rounded_BF.dtype == torch.float32
    # what the rounding of x and W_enc alone leaves, and rounded results or biases exceed: .002·‖W‖·‖x‖/√D
    limit = 0.0035 * sae.W_enc.detach().norm(dim=0).mean() / 8
    assert (rounded_BF - exact_BF).square().mean().sqrt() < limit


def test_gradients_of_rounded_factors_are_those_of_the_product():
    """Fails if a gradient of the product under autocast is missing, or of another sign or shape: x, W, bias, centre."""
    torch.manual_seed(0)
    shapes = (2, 3, 4), (4, 5), (5,), (4,)
    x, W_DF, b_F, centre_D = (torch.randn(shape).requires_grad_() for shape in shapes)
    wanted = torch.randn(2, 3, 5)
    for fine in (False, True):
        grads = []
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z = base.affine(x, W_DF, b_F, centre_D, fine=fine)
            grads.append(torch.autograd.grad((z * wanted).sum(), (x, W_DF, b_F, centre_D)))
        for exact, rounded in zip(*grads):
            assert exact.shape == rounded.shape and (exact - rounded).norm() < 0.01 * exact.norm()
