"""cosine_concepts: its loss against a plain dense reference, schedules, AdamW, every ablation,
and its report on planted firings.
"""

import math

import numpy as np
import pytest
import torch

import experiment
import variants
from tests.variants.common import SMOLLM, preflight
from variants import base, cosine_concepts
from variants.research import cosine_concepts_report

MIDDLE = base.Progress(5, 100, 500, 10_000)  # half of the sparsity warm-up, a twentieth of the run


def scrambled(**hyper) -> base.SAE:
    """In fp64, decoder rows of various norms, biases and the running mean off zero."""
    torch.manual_seed(0)
    sae = cosine_concepts.SAE(6, 150, **hyper).double()
    for p in sae.parameters():
        p.data += torch.randn_like(p) * 0.2
    sae.mean_z1_C.uniform_(0, 0.3)
    return sae


# k = 1 of 30 concepts takes the sparse path on a CPU
@pytest.mark.parametrize("k, adaptive", [(1, False), (4, False), (4, True)])
def test_loss_equals_dense_autograd(k, adaptive):
    """Fails if a term, its weight, the choice of concepts, or a gradient differs from plain autograd in fp64."""
    sae = scrambled(k=k, adaptive_topk=adaptive, l1_base=0.3, l1_concept=0.7, w1_penalty=0.5, w2_peak=2.0)
    x_BD = torch.randn(9, 6, dtype=torch.float64)
    loss, terms = sae.loss(base.Batch(x_BD), MIDDLE)
    loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()

    z1_BC = torch.relu((x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)
    acts_BP = torch.relu((z1_BC - sae.mean_z1_C) @ sae.W_concept.T + sae.b_concept)
    mask_BP = torch.zeros_like(acts_BP)
    for row, values in enumerate(acts_BP.tolist()):
        ranked = sorted(range(30), key=lambda i: -values[i])[:2 * k if adaptive else k]
        mean = sum(values[i] for i in ranked) / len(ranked)
        mask_BP[row, [i for i in ranked if not adaptive or values[i] >= mean]] = 1
    z2_BP = acts_BP * mask_BP
    reconstruction = ((x_BD - z1_BC @ sae.W_dec - z2_BP @ sae.W_dec2 - sae.b_dec) ** 2).sum(1).mean()
    parts = [reconstruction, z1_BC.sum(1).mean(), z2_BP.sum(1).mean(),
             sae.W_enc.abs().sum() / (6 * 120), sae.W_concept.abs().sum() / (120 * 30)]
    w2 = 0.001 + 1.999 * (1 - math.cos(math.pi * 0.05)) / 2
    whole = sum(w * part for w, part in zip((1, 0.5 * 0.3, 0.5 * 0.7, 0.5, w2), parts))
    whole.backward()
    # the penalties are summed in fp32
    assert [t.item() for t in terms.values()] == pytest.approx([p.item() for p in parts], rel=1e-6)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, p in sae.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-6, atol=1e-8), name
    z_BF = sae.encode(x_BD)
    assert torch.allclose(z_BF, torch.cat([z1_BC, z2_BP], 1), rtol=1e-12, atol=1e-14)
    assert torch.allclose(sae.decode(z_BF), z_BF @ sae.decoder + sae.b_dec)
    assert torch.equal(sae._fired_F, (z_BF > 0).any(0))


def steps(hyper: dict, n: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sae = cosine_concepts.SAE(8, 100, **hyper)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    for step in range(n):
        x_BD = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)) / 8**0.5
        experiment.train_step(sae, optimizer, base.Batch(x_BD), base.Progress(step, n, 32 * step, 32 * n))
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(100), atol=1e-5)
    return [p.detach() for p in sae.parameters()]


@pytest.mark.parametrize("ablation", [dict(l1_base=0), dict(l1_concept=0), dict(w1_penalty=0),
                                      dict(w2_start=0, w2_peak=0), dict(w2_peak=0.4), dict(k=5), dict(concept_std=0.02),
                                      dict(preset="precise"), dict(preset="previous"), dict(adaptive_topk=True),
                                      dict(restarts=1), dict(weight_decay=0)])
def test_every_ablation_changes_training(ablation):
    """Fails where a hyper-parameter is never passed on or its term has no effect."""
    full, other = steps({}), steps(ablation)
    assert any(not torch.equal(a, b) for a, b in zip(full, other))


def test_presets_and_schedules_by_hand():
    """Fails if a preset's number, an explicit value's precedence, λ_w2(t), its length or the restarts are wrong."""
    torch.manual_seed(0)
    precise, previous = (cosine_concepts.SAE(16, 1000, preset=p) for p in ("precise", "previous"))
    assert (precise.n_1, precise.k, precise.l1_concept, previous.k, previous.l1_concept) == (800, 10, 0.35, 10, 0.35)
    assert cosine_concepts.SAE(16, 2000, preset="previous").k == 20  # 5 % of 400
    assert [sae.W_concept.std().item() for sae in (precise, previous)] == pytest.approx([0.001, 0.02], rel=0.01)
    assert cosine_concepts.SAE(16, 1000, preset="previous", w2_peak=0.3, k=7).k == 7
    weights = [precise.w2_penalty(base.Progress(t, 20_000, 0, 1)) for t in (0, 2500, 5000, 9000)]
    assert weights == pytest.approx([0.001, 0.0605, 0.12, 0.12])
    # a short run anneals over its whole length
    assert precise.w2_penalty(base.Progress(50, 100, 0, 1)) == pytest.approx(0.0605)
    assert previous.w2_penalty(base.Progress(5000, 20_000, 0, 1)) == pytest.approx(0.4)
    twice = cosine_concepts.SAE(16, 100, restarts=1)
    scales = [twice.lr_scale(base.Progress(t, 80, 0, 1)) for t in (0, 10, 20, 40, 60)]
    assert scales == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 1, 0.5])
    assert precise.lr_scale(base.Progress(20, 80, 0, 1)) == 1


def test_unknown_preset_and_k_say_what_to_do():
    """Fails if a wrong preset or too many concepts per token end in a KeyError or in top-k's own words."""
    with pytest.raises(ValueError, match="no preset 'new'\nchange --hyper preset=… to one of alive, precise, previous"):
        cosine_concepts.SAE(4, 100, preset="new")
    with pytest.raises(ValueError, match="k = 21: .* whole number from 1 to the number of concepts = 20"):
        cosine_concepts.SAE(4, 100, k=21)


def test_optimiser_is_adamw():
    """Fails if the decay is coupled to the gradient (Adam with L2), missing, or another number than AdamW's."""
    torch.manual_seed(0)
    sae = cosine_concepts.SAE(5, 100, weight_decay=0.3)
    ours = experiment.make_optimizer(sae, 0.01)
    twins = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    theirs = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.3, betas=(0.9, 0.999))
    for _ in range(3):
        for p, twin in zip(sae.parameters(), twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin in zip(sae.parameters(), twins):
        assert torch.allclose(p, twin, rtol=1e-5, atol=1e-7)


def test_report_numbers_against_other_libraries():
    """Fails if a count, an entropy, the normalisation, the maximum over base features or a moment is off."""
    import scipy.stats
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(0)
    base_NC = rng.random((400, 7)) < 0.3
    concepts_NP = np.stack([base_NC[:, 2], ~base_NC[:, 3], base_NC[:, 0] | base_NC[:, 1], rng.random(400) < 0.1], 1)
    found = cosine_concepts_report.largest_nmi(torch.tensor(base_NC).float(), torch.tensor(concepts_NP).float(),
                                               chunk=3)
    wanted = [max(normalized_mutual_info_score(c, b) for b in base_NC.T) for c in concepts_NP.T]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert wanted[:2] == pytest.approx([1, 1]) and 0.2 < wanted[2] < 0.8  # a copy, a negation, a union

    W = rng.gamma(2.0, size=(30, 50)).astype("float64")
    W[:4] = 0
    form = cosine_concepts_report.moments(torch.tensor(W))
    assert form == pytest.approx(dict(mean=W.mean(), std=W.std(), skewness=scipy.stats.skew(W, None),
                                      kurtosis=scipy.stats.kurtosis(W, None, fisher=False),
                                      near_zero=(abs(W) < 1e-3 * W.max()).mean()))


class FakeContext:
    seed = 3

    def held_out(self, n_tokens):
        return base.Batch(torch.randn(600, 8, generator=torch.Generator().manual_seed(1)) / 8**0.5)


@pytest.mark.slow
def test_report_is_deterministic_and_survives_dead_concepts():
    """Fails if two reports differ, a picture is missing, or dead concepts give NaN instead of None."""
    torch.manual_seed(0)
    sae = cosine_concepts.SAE(8, 100).eval()
    (numbers, files), (again, same_files) = sae.report(FakeContext()), sae.report(FakeContext())
    assert numbers == again and files == same_files and set(files) == {"nmi.png", "weights.png"}
    assert all(math.isfinite(value) for value in numbers.values()) and all(len(png) < 150_000 for png in files.values())
    sae.b_concept.data.fill_(-100)
    numbers, files = sae.report(FakeContext())
    assert numbers["nmi"] is None and numbers["alive_concepts"] == 0 and set(files) == {"weights.png"}


@pytest.mark.slow
def test_preflight_passes():
    """Fails if the variant waits for the device, loses state, breaks under bf16, or cannot be forecast."""
    rivals = [variants.path(n) for n in ("standard", "topk")]
    findings = preflight("cosine_concepts", SMOLLM, reference_files=rivals, accelerator=True)
    assert not findings.notes
