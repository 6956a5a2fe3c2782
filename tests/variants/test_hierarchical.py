"""The hierarchical variant: each loss term against a plain reference, the curriculum, its ablations,
the hierarchy it reports.
"""

import types

import pytest
import torch

import experiment
from tests.variants.common import SMOLLM, preflight
from variants import base, hierarchical
from variants.preflight.trial import synthetic
from variants.research import hierarchical_report

D, F_SAE, K1, K2, STEPS = 12, 40, 4, 2, 20


def progress(step, total=STEPS):
    return base.Progress(step, total, step * 64, total * 64)


def fresh(seed=0, **hyper):
    torch.manual_seed(seed)
    return hierarchical.SAE(D, F_SAE, **dict(k1=K1, k2=K2) | hyper)


def trained(steps=STEPS, seed=0, **hyper):
    sae, x_BD = fresh(seed, **hyper), synthetic(64 * STEPS, D, 3)
    sae.initialise(x_BD)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    for step in range(steps):
        experiment.train_step(sae, optimizer, base.Batch(x=x_BD[64 * step:64 * step + 64]), progress(step))
    return sae, optimizer


@torch.no_grad()
def reference(sae, x_BD):
    """Every quantity of the loss, token by token and feature by feature, one encoder on [x − b_dec, h1]."""
    n_1 = round(0.8 * F_SAE)
    W_encoder_2 = torch.cat([sae.W_enc2, sae.W_12])
    total = dict(reconstruction=0.0, composition=0.0, skip_1=0.0, skip_2=0.0)
    z = []
    for x in x_BD:
        centred = x - sae.b_dec
        h1 = keep([max(0.0, float(centred @ sae.W_enc[:, f] + sae.b_enc[f])) for f in range(n_1)], K1)
        both = torch.cat([centred, torch.tensor(h1, dtype=x.dtype)])
        h2 = keep([max(0.0, float(both @ W_encoder_2[:, f] + sae.b_enc2[f])) for f in range(F_SAE - n_1)], K2)
        out_1 = sum((a * sae.W_dec[f] for f, a in enumerate(h1)), torch.zeros_like(x))
        out_2 = sum((a * sae.W_dec2[f] for f, a in enumerate(h2)), torch.zeros_like(x))
        total["reconstruction"] += float(((x - out_1 - out_2 - sae.b_dec) ** 2).sum())
        total["skip_1"] += float(((x - out_1 - sae.b_dec) ** 2).sum())
        total["skip_2"] += float(((x - out_2 - sae.b_dec) ** 2).sum())
        total["composition"] += sum((sum(a * float(sae.W_comp[f, j]) for f, a in enumerate(h1)) - b) ** 2
                                    for j, b in enumerate(h2))
        z.append(h1 + h2)
    l1 = sum(abs(float(w)) for row in sae.W_comp for w in row) / (F_SAE - n_1)
    return {name: value / len(x_BD)
            for name, value in total.items()} | dict(comp_l1=l1, z=torch.tensor(z, dtype=x_BD.dtype))


def keep(values, k):
    kept = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


@pytest.fixture
def random_sae():
    """In float64, with every parameter, W_comp and W_12 among them, away from its start."""
    sae = fresh(alpha_comp=0.3, lambda_comp=0.7, lambda_skip=0.2).double()
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.1 * torch.randn_like(p)
    return sae.requires_grad_(True), torch.randn(9, D, dtype=torch.float64)


def test_loss_and_features_equal_a_slow_reference(random_sae):
    """Fails if a term, a weight, the top-k of a layer, the concatenation or the normalisation of a sum is another."""
    sae, x_BD = random_sae
    want = reference(sae, x_BD)
    for step in (8, 19):  # layer 2 alone and jointly: the same value, other gradients
        loss, terms = sae.loss(base.Batch(x=x_BD), progress(step))
        got = {name: value.item() for name, value in terms.items()}
        assert got == pytest.approx({"reconstruction": want["reconstruction"], "composition": want["composition"],
                                     "comp_l1": want["comp_l1"], "skip": want["skip_1"] + want["skip_2"]}, rel=1e-10)
        whole = want["reconstruction"] + 0.7 * (want["composition"]
                                                + 0.3 * want["comp_l1"]) + 0.2 * (want["skip_1"] + want["skip_2"])
        assert loss.item() == pytest.approx(whole, rel=1e-10)
    loss, _ = sae.loss(base.Batch(x=x_BD), progress(7))
    assert loss.item() == pytest.approx(1.2 * want["skip_1"], rel=1e-10)  # layer 1 alone
    assert torch.allclose(sae.encode(x_BD.view(3, 3, D)).view(9, -1), want["z"], rtol=1e-10, atol=0)
    assert torch.allclose(sae.decode(want["z"]), want["z"] @ sae.decoder + sae.b_dec)


def test_gradient_equals_finite_differences_where_both_layers_learn(random_sae):
    """Fails if a path is cut: h1 through W_12 and W_comp, b_dec through both encoders, h2 through the composition."""
    sae, x_BD = random_sae
    sae.loss(base.Batch(x=x_BD), progress(19))[0].backward()
    for name, p in sae.named_parameters():
        direction = torch.randn_like(p)
        if name in ("W_dec", "W_dec2"):  # along its row a decoder's gradient is projected out
            row = torch.nn.functional.normalize(p.detach(), dim=1)
            direction -= (direction * row).sum(1, keepdim=True) * row
            assert (p.grad * row).sum(1).abs().max() < 1e-12
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-6 * direction
                values.append(sae.loss(base.Batch(x=x_BD), progress(19))[0].item())
                p -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-8), name


LAYER_1 = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.mark.parametrize("until, step, moving", [(6, 7, 1), (12, 13, 2), (18, 19, 3)])
def test_the_curriculum_moves_one_layer_bit_for_bit(until, step, moving):
    """Fails if a frozen parameter moves (Adam's momentum, renormalisation, a leaking gradient), a trained one stays."""
    sae, optimizer = trained(steps=until)
    decoders = {1: [sae.W_dec], 2: [sae.W_dec2], 3: [sae.W_dec, sae.W_dec2]}[moving]
    with torch.no_grad():
        for W_dec in (sae.W_dec, sae.W_dec2):
            W_dec *= 1.5  # renormalising what is frozen would show
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    experiment.train_step(sae, optimizer, base.Batch(x=synthetic(64, D, 5)), progress(step))
    moved = {name for name, p in sae.named_parameters() if not torch.equal(p, before[name])}
    layer_1, layer_2 = set(LAYER_1), set(before) - set(LAYER_1)
    assert moved == {1: layer_1, 2: layer_2, 3: layer_1 | layer_2}[moving]
    for W_dec in decoders:
        assert torch.allclose(W_dec.norm(dim=1), torch.ones(len(W_dec)), atol=1e-6)
    assert sae.lr_scale(progress(step)) == (0.1 if moving == 3 else 1.0)


def test_without_the_curriculum_all_learn_from_the_start_at_the_full_rate():
    """Fails if curriculum=False leaves a stage in place."""
    sae, optimizer = trained(steps=0, curriculum=False)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for step in (0, 1):  # W_12 and W_comp start at zero
        experiment.train_step(sae, optimizer, base.Batch(x=synthetic(64, D, 5)), progress(step))
    assert not [name for name, p in sae.named_parameters() if torch.equal(p, before[name])]
    assert sae.lr_scale(progress(19)) == 1.0


@pytest.mark.parametrize("hyper", [dict(curriculum=False), dict(lambda_comp=0), dict(lambda_skip=0),
                                   dict(alpha_comp=0)], ids=str)
def test_every_ablation_changes_what_is_learned(hyper):
    """Fails if a term or the curriculum has no effect."""
    full, ablated = trained()[0], trained(**hyper)[0]
    assert not torch.allclose(full.W_comp, ablated.W_comp, rtol=1e-3)
    x_BD = synthetic(50, D, 9)
    assert not torch.equal(full.encode(x_BD), ablated.encode(x_BD))


def hand_made():
    """Layer 1: features 0 to 31, layer 2: 32 to 39; parent 32 is made of 3, 5 and (negatively) 9, parent 33 of 7."""
    sae = fresh()
    with torch.no_grad():
        sae.W_comp[[3, 5, 9, 11], 0] = torch.tensor([1.0, 0.5, -0.11, 0.1])
        sae.W_comp[7, 1] = 2.0
    return sae


def test_children_and_stages_by_hand():
    """Fails if layers are swapped, numbers shifted, the 10 % level or the sign is treated otherwise."""
    sae = hand_made()
    assert sae.stages() == {"layer_2": range(32, 40), "layer_1": range(32)}
    assert sae.children_of([32]) == [3, 5, 9] and sae.children_of([33, 32]) == [3, 5, 7, 9]
    assert sae.children_of([32], most=2) == [3, 5]
    assert sae.children_of([34]) == [] and sae.children_of([]) == []
    with pytest.raises(ValueError, match="leave layer 2"):
        sae.children_of([3, 32])


def test_reported_numbers_by_hand():
    """Fails if a parent without weights is counted, or the consistency mixes its own with the shuffled children."""
    sae = hand_made()
    numbers = hierarchical_report.sparsity(sae.W_comp)
    assert numbers["composition_near_zero"] == pytest.approx(1 - 5 / (32 * 8))
    assert numbers["children_per_parent"] == pytest.approx((3 + 1) / 2)
    # one weight of 32: 1 − 1/32; sorted .1 .11 .5 1: Σ(2i − 33)·w / (32·Σw), i = 29..32
    first = (25 * 0.1 + 27 * 0.11 + 29 * 0.5 + 31 * 1.0) / (32 * 1.71)
    assert numbers["composition_gini"] == pytest.approx((first + 31 / 32) / 2, rel=1e-5)
    h1_NC, h2_NP = torch.zeros(3, 32), torch.zeros(3, 8)
    h2_NP[0, 0] = h2_NP[1, 0] = h2_NP[2, 1] = 1.0  # parent 32 fires on tokens 0 and 1, parent 33 on token 2
    h1_NC[0, [3, 5]] = h1_NC[1, 3] = h1_NC[2, [7, 9]] = 1.0
    got = hierarchical_report.consistency(sae, h1_NC > 0, h2_NP, 0)
    assert got["consistency"] == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)
    assert got["consistency_shuffled"] == pytest.approx((0 + 0 + 1 / 3) / 3)  # with two parents a shuffle is the swap


def test_report_is_deterministic_and_readable_without_a_composition(random_sae):
    """Fails if a number is not finite, a picture is no PNG or too large, or lambda_comp = 0 breaks the report."""
    batch = types.SimpleNamespace(x=synthetic(300, D, 2), tokens=torch.arange(300) % 50)
    lm = types.SimpleNamespace(tokenizer=types.SimpleNamespace(decode=lambda ids: f" $tok{ids[0]}\n"))
    context = types.SimpleNamespace(held_out=lambda n: batch, lm=lm, seed=0)
    sae = trained()[0]
    numbers, files = sae.report(context)
    again, pictures = sae.report(context)
    assert numbers == again and files == pictures
    assert all(isinstance(v, float) and abs(v) < 1e6 for v in numbers.values())
    assert files["composition.png"].startswith(b"\x89PNG") and len(files["composition.png"]) < 150_000
    numbers, files = trained(lambda_comp=0)[0].report(context)
    assert numbers["consistency"] is None and numbers["composition_near_zero"] == 1.0 and not files


@pytest.mark.slow
def test_preflight_passes():
    """Fails if the preflight refuses the variant or has something to remark."""
    assert not preflight("hierarchical", SMOLLM).notes
