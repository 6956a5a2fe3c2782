"""The variant direction_contrastive: its three terms, the mask, resets and what it reports."""

import math

import pytest
import torch

import experiment
from variants import base, direction_contrastive
from variants.kit.sparse import taken
from variants.research import direction_contrastive_report

B, D, F = 6, 5, 12
WARMING = base.Progress(5, 100, 30, 600)  # half of the sparsity warm-up, which takes a tenth of the run


def scrambled(**hyper) -> direction_contrastive.SAE:
    torch.manual_seed(0)
    sae = direction_contrastive.SAE(D, F, **hyper)
    for p in sae.parameters():
        p.data += torch.randn_like(p) * 0.3
    sae.double().initialise(torch.zeros(1, D))
    return sae


def x_of(n=B):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def by_hand(sae, x_BD, top=0.1, normalise=True, weighting=True, directional=False, l1_penalty=0.3, lambda_c=0.1):
    """(reconstruction, l1, contrastive) by loops over Python numbers."""
    W, E = sae.W_dec.tolist(), sae.W_enc.T.tolist()
    norm = [math.sqrt(dot(w, w)) for w in W]
    unit = [[v / n for v in w] for w, n in zip(W, norm)]
    aligned = [max(0.0, dot(u, e) / math.sqrt(dot(e, e))) for u, e in zip(unit, E)]
    importance = aligned if directional else norm
    if not weighting:
        importance = [1.0] * F
    rows = unit if normalise else W
    cos = [[dot(a, b) for b in rows] for a in rows]
    count = max(1, round(top * (F - 1)))
    chosen = [set(sorted((j for j in range(F) if j != i), key=lambda j: -cos[i][j])[:count]) for i in range(F)]
    terms = [0.0, 0.0, 0.0]
    for x in x_BD.tolist():
        centred = [a - b for a, b in zip(x, sae.b_dec.tolist())]
        z = [max(0.0, dot(centred, E[i]) + sae.b_enc[i].item()) * importance[i] for i in range(F)]
        x_hat = [sum(z[i] * unit[i][d] for i in range(F)) for d in range(D)]
        terms[0] += sum((a - b) ** 2 for a, b in zip(centred, x_hat)) / len(x_BD)
        terms[1] += sum(z) / len(x_BD)
        pairs = [(i, j) for i in range(F) for j in range(F) if j in chosen[i] or i in chosen[j]]
        terms[2] += sum(cos[i][j] * z[i] * z[j] for i, j in pairs) / len(x_BD)
    return [*terms, terms[0] + l1_penalty * 0.5 * terms[1] + lambda_c * terms[2]]


@pytest.mark.parametrize("hyper", [{}, dict(top=0.4), dict(normalise=False), dict(weighting=False),
                                   dict(lambda_c=0.7, l1_penalty=0.1), dict(importance="directional")])
@pytest.mark.parametrize("sparse", [False, True])
def test_terms_by_hand(hyper, sparse):
    """Fails if a term, a flag, a side of the mask, its diagonal or the warm-up is not the formula's, either path."""
    sae, x_BD = scrambled(**hyper), x_of()
    with taken(sparse):
        loss, terms = sae.loss(base.Batch(x_BD), WARMING)
    expected = by_hand(sae, x_BD, **{k: v for k, v in hyper.items() if k != "importance"},
                       directional="importance" in hyper)
    assert [t.item() for t in (*terms.values(), loss)] == pytest.approx(expected, rel=1e-6)
    assert abs(expected[2]) > 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_gradient_is_that_of_the_dense_sum(monkeypatch, chunk):
    """Fails if the gradient made with the value is not that of Σ cos∘mask∘(zᵀz), or chunks lose or repeat tokens."""
    monkeypatch.setattr(direction_contrastive, "CHUNK", chunk)
    sae, x_BD = scrambled(top=0.3), x_of(20)
    _, terms = sae.loss(base.Batch(x_BD), WARMING)
    found = torch.autograd.grad(terms["contrastive"], [sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec])
    z_BF, cos_FF = sae.encode(x_BD), sae.decoder @ sae.decoder.T
    high_FF = cos_FF >= sae.threshold[:, None]
    mask_FF = (high_FF | high_FF.T) & ~torch.eye(F, dtype=torch.bool)
    dense = (cos_FF * mask_FF * (z_BF.T @ z_BF)).sum() / 20
    for a, b in zip(found, torch.autograd.grad(dense, [sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec])):
        torch.testing.assert_close(a, b)
    assert (high_FF != high_FF.T).any()  # the two sides of the mask are not the same


def test_limits_take_the_largest_features_of_the_first_tokens():
    """Fails if max_active keeps others than the largest, or pair_tokens divides by the whole batch."""
    sae, x_BD = scrambled(top=0.5, max_active=3, pair_tokens=4), x_of(20)
    z_BF = sae.encode(x_BD)[:4].detach()
    z_BF = z_BF * (z_BF >= z_BF.topk(3, dim=1).values[:, 2:])
    cos_FF = sae.decoder @ sae.decoder.T
    mask_FF = (cos_FF >= torch.minimum(sae.threshold[:, None], sae.threshold)).double().fill_diagonal_(0)
    expected = sum((z_F @ (cos_FF * mask_FF) @ z_F).item() for z_F in z_BF) / 4
    assert sae.loss(base.Batch(x_BD), WARMING)[1]["contrastive"].item() == pytest.approx(expected, rel=1e-6)


def test_evals_see_the_reconstruction_that_is_trained():
    """Fails if importance is applied twice or not at all between encode, decode and the decoder's rows."""
    sae, x_BD = scrambled(), x_of()
    by_rows = torch.relu(sae.pre_activations(x_BD)) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(sae.encode(x_BD)), by_rows)
    torch.testing.assert_close(sae.encode(x_BD) @ sae.decoder + sae.b_dec, by_rows)


def trained(steps=60, **hyper):
    torch.manual_seed(0)
    sae = direction_contrastive.SAE(16, 80, **{"l1_penalty": 0.05} | hyper)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    x_NBD = torch.randn(steps, 64, 16, generator=torch.Generator().manual_seed(3)) / 4
    sae.initialise(x_NBD[0])
    for step in range(steps):
        if step == steps // 3:
            sae.b_enc.data[:20] = -9  # dead from now on
        experiment.train_step(sae, optimizer, base.Batch(x_NBD[step]),
                              base.Progress(step, steps, step * 64, steps * 64), 3e-3)
    return sae


@pytest.mark.slow
def test_every_flag_changes_training():
    """Fails if an ablation is read and then ignored: its decoder would be that of the full variant."""
    flags = [dict(lambda_c=0.0), dict(lambda_c=0.2), dict(top=0.05), dict(top=0.2), dict(normalise=False),
             dict(weighting=False), dict(importance="directional"), dict(resets=False), dict(warmup_steps=9000),
             dict(l1_penalty=0.0)]
    full = trained()
    for hyper in flags:
        assert not torch.equal(trained(**hyper).W_dec, full.W_dec), hyper


@pytest.mark.slow
def test_resets_revive_dead_features_after_the_warm_up_only():
    """Fails if nothing is reset, resets come in the warm-up, or a new row does not point along a token's error."""
    assert trained().rows_reset >= 20
    assert trained(warmup_steps=20_000).rows_reset == 0 and trained(resets=False).rows_reset == 0
    sae, x_BD = scrambled(), x_of(40)
    error_BD = torch.nn.functional.normalize(x_BD - sae.decode(sae.encode(x_BD)), dim=1)
    dead_F = torch.arange(F) < 3
    before = sae.W_dec.detach().clone()
    with torch.no_grad():
        sae.reset_dead(x_BD, dead_F, 1)
    assert torch.equal(sae.W_dec[3:], before[3:]) and (sae.W_dec[:3] != before[:3]).all()
    torch.testing.assert_close((sae.decoder[:3] @ error_BD.T).max(1).values, torch.ones(3, dtype=torch.float64))


def test_capture_of_pairs_by_hand():
    """Fails if co-active pairs, two- and one-sided selection or their chance level are not counted as defined."""
    sae = scrambled(top=0.2)
    z_NF = torch.relu(torch.randn(200, F, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    z_NF[:, 1] = z_NF[:, 0] * (torch.arange(200) % 5 > 0)
    z_NF[:, 7] = z_NF[:, 4]
    z_NF[:, 9] = 0  # never fires: not measured
    found = direction_contrastive_report.measured(direction_contrastive_report.pairs(sae.float(), z_NF.float()), -1)
    cos, on = (sae.decoder @ sae.decoder.T).tolist(), (z_NF > 0).double()
    chosen = {i: sorted((j for j in range(F) if j != i), key=lambda j: -cos[i][j])[:2] for i in range(F)}
    alive = [i for i in range(F) if i != 9]
    pairs = [(i, j) for i in alive for j in alive if i < j]
    coactive = [(i, j) for i, j in pairs if torch.corrcoef(on[:, [i, j]].T)[0, 1] >= 0.2
                and (on[:, i] * on[:, j]).sum() >= 5]

    def share(of, both):
        hits = [(j in chosen[i], i in chosen[j]) for i, j in of]
        return sum(any(h) if both else sum(h) / 2 for h in hits) / len(of)

    assert {(0, 1), (4, 7)} <= set(coactive) and len(coactive) < len(pairs)
    expected = dict(coactive_pairs=len(coactive), capture_two_sided=share(coactive, True),
                    capture_one_sided=share(coactive, False), chance_two_sided=share(pairs, True),
                    chance_one_sided=share(pairs, False))
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-5)
