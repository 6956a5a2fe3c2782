"""The variant attention_contrastive: its loss against sums written out, its pairs, and what its report counts."""

import math

import pytest
import torch

import experiment
import variants
from tests.variants.common import GEMMA, preflight
from variants import attention_contrastive, base
from variants.kit import contexts
from variants.kit.trained import TrainedSAE
from variants.research import attention_contrastive_report

WARMING = base.Progress(5, 100, 500, 10_000)  # half of the sparsity warm-up, which takes a tenth of the run
TRAINED = base.Progress(50, 100, 5000, 10_000)


def attending_batch(n_tokens: int, d_in: int, layers=(-2, -1, 0, 1), tau=0.2, dtype=torch.float32) -> base.Batch:
    """Tokens of four contexts of 7 and their synthetic attention; the last token attends to none."""
    fields = contexts.synthetic(torch.randn(n_tokens, d_in).to(dtype), layers, tau, seed=3)
    kept_P = fields["pairs"][0] != n_tokens - 1
    return base.Batch(**fields | dict(pairs=fields["pairs"][:, kept_P],
                                      pair_attention=fields["pair_attention"][kept_P].to(dtype)))


def sums(z, pairs, attention, logits, tau, tau_c) -> list[float]:
    """Lc of each token by the formula, one token and one pair at a time; 0 without positives."""
    z, w = z.tolist(), [math.exp(v) / sum(math.exp(u) for u in logits) for v in logits]
    s = {(i, j): sum(wk * a for wk, a in zip(w, row)) for (i, j), row in zip(zip(*pairs.tolist()), attention.tolist())}

    def cos(a, b):
        norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(u * v for u, v in zip(a, b)) / norms if norms else 0.0

    losses = []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if s.get((i, j), 0) > tau]
        numerator = sum(s[i, j] * math.exp(cos(z[i], z[j]) / tau_c) for j in positives)
        denominator = sum(math.exp(cos(z[i], z[k]) / tau_c) for k in range(len(z)) if k != i)
        losses.append(-math.log(numerator / denominator) if positives else 0.0)
    return losses


def test_loss_is_the_written_one():
    """Fails if a term, the layers' softmax, τ on s and not α, query → key, k ≠ i or the mean over tokens is wrong."""
    torch.manual_seed(0)
    sae = attention_contrastive.SAE(6, 20, tau=0.2, lambda_c=0.7, tau_c=0.3, l1_penalty=0.4).double()
    for p in sae.parameters():
        p.data += torch.randn_like(p) * 0.3
    batch = attending_batch(28, 6, dtype=torch.float64)
    z_BF = sae.encode(batch.x).detach()
    expected = sums(z_BF, batch.pairs, batch.pair_attention, sae.layer_logit.tolist(), 0.2, 0.3)
    below = sum(max(row) > 0.2
                for row in batch.pair_attention.tolist()) - (sae.strength(batch.pair_attention) > 0.2).sum().item()
    # candidates that are no positives, and tokens without any
    assert below > 0 and 0.0 in expected and max(expected) > 0
    loss, terms = sae.loss(batch, WARMING)
    error = (batch.x - z_BF @ sae.W_dec - sae.b_dec).pow(2).sum().item() / 28
    by_hand = [error, z_BF.sum().item() / 28, sum(expected) / 28]
    assert [t.item() for t in terms.values()] == pytest.approx(by_hand, rel=1e-6)
    assert loss.item() == pytest.approx(error + 0.4 * 0.5 * z_BF.sum().item() / 28 + 0.7 * sum(expected) / 28, rel=1e-6)


def test_gradients_by_finite_differences():
    """Fails if the product's own backward drops a half, or norms or the layers' logits pass another gradient."""
    torch.manual_seed(0)
    sae = attention_contrastive.SAE(6, 20, tau=0.1).double()
    batch = attending_batch(14, 6, tau=0.1, dtype=torch.float64)
    z_BF = (torch.rand(14, 5, dtype=torch.float64) + 0.1).requires_grad_()

    def contrastive(z_BF, logit_A):
        s_P = (batch.pair_attention * logit_A.softmax(0)).sum(-1)
        return sae.contrastive(z_BF, batch.pairs, s_P).sum()

    logit_A = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive, (z_BF, logit_A))
    assert torch.autograd.grad(contrastive(z_BF, logit_A), logit_A)[0].abs().min() > 1e-4


@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_without_features_and_bf16(autocast):
    """Fails if a token with z = 0 gives NaN or a cosine that is not 0, or bf16 loses more than by rounding."""
    torch.manual_seed(0)
    sae = attention_contrastive.SAE(16, 40, tau=0.2)
    batch = attending_batch(28, 16)
    z_BF = torch.rand(28, 40) * (torch.rand(28, 40) < 0.3)
    z_BF[[2, 9]] = 0
    z_BF.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        Lc_B = sae.contrastive(z_BF, batch.pairs, sae.strength(batch.pair_attention))
    Lc_B.sum().backward()
    assert Lc_B.dtype == torch.float32 and z_BF.grad.isfinite().all() and not z_BF.grad[[2, 9]].any()
    expected = sums(z_BF.detach().double(), batch.pairs, batch.pair_attention, [0.0] * 4, 0.2, 0.1)
    assert Lc_B.tolist() == pytest.approx(expected, abs=0.1 if autocast else 1e-4)


def trained(steps=4, **hyper) -> base.SAE:
    torch.manual_seed(0)
    sae = attention_contrastive.SAE(16, 40, **hyper)
    optimizer = experiment.make_optimizer(sae, 3e-3)
    batch = attending_batch(28, 16, sae.attention_layers, sae.attention_threshold)
    for _ in range(steps):
        experiment.train_step(sae, optimizer, batch, TRAINED)
    return sae


def test_every_setting_changes_training():
    """Fails if a term, the layers, τ, τc or λ1 have no effect, λc = 0 is not `standard`, or w is not learned."""
    full = trained()
    assert full.layer_logit.abs().min() > 0.006  # Adam's first four steps of 3e-3 each
    for hyper in (dict(lambda_c=0), dict(attention_layers=(0,)), dict(attention_layers=(-1, 1)), dict(tau=0.2),
                  dict(tau_c=0.2), dict(l1_penalty=0), dict(logit_lr=10)):
        assert not torch.equal(trained(**hyper).W_enc, full.W_enc), hyper
    torch.manual_seed(0)
    standard = variants.load("standard").SAE(16, 40)
    optimizer, batch = experiment.make_optimizer(standard, 3e-3), attending_batch(28, 16, tau=0.05)
    for _ in range(4):
        experiment.train_step(standard, optimizer, batch, TRAINED)
    assert torch.equal(standard.W_enc, trained(lambda_c=0).W_enc)


@pytest.mark.slow
@pytest.mark.parametrize("hyper", [{}, {"attention_layers": (0,)}])
def test_preflight_has_nothing_to_say(hyper):
    """Fails if one layer alone leaves a weight that cannot learn, or a step has something of B × B × F or F × F."""
    found = preflight("attention_contrastive", GEMMA, hyper, context=128, room=(2, 1))
    assert found.notes == [] and found.step_peak_bytes < 1e9  # F × F in fp32 alone is 1.07e9


def test_report_counts():
    """Fails if positives, contexts without any, bytes or controls are miscounted: six tokens of three contexts."""
    batch = base.Batch(x=torch.eye(6), tokens=torch.arange(6), positions=torch.tensor([1, 2, 3, 1, 1, 2]),
                       contexts=torch.tensor([0, 0, 0, 1, 2, 2]), pairs=torch.tensor([[1, 2, 2, 5], [0, 0, 1, 4]]),
                       pair_attention=torch.tensor([[0.1, 0.5], [0.3, 0.3], [0.2, 0.02], [0.06, 0.0]]))
    sae = attention_contrastive.SAE(6, 12, attention_layers=(-1, 0), tau=0.05)
    context = base.Context(None, 3, TrainedSAE(attention_contrastive.SAE(6, 12), 1.0), 0, lambda n: batch)
    numbers, files = sae.report(context)
    assert {k: numbers[k] for k in ("positives_per_token", "tokens_without_positive",
                                    "contexts_without_positive")} == pytest.approx(
        # .03 is not above τ
        {"positives_per_token": 3 / 6, "tokens_without_positive": 4 / 6, "contexts_without_positive": 2 / 3})
    assert (numbers["attention_bytes_per_token"],
            numbers["dense_attention_bytes_per_token"]) == (4 * 12 / 6, 3 * 2 * 16 * 2 / 6)
    assert (numbers["attention_layer-1"], numbers["weight_layer+0"]) == pytest.approx((0.2, 0.5))
    assert all(files[name].startswith(b"\x89PNG") for name in ("attention_weights.png", "pair_cosines.png"))
    assert sae.report(context)[0] == numbers

    generator, context_B = torch.Generator().manual_seed(0), batch.contexts
    pairs_2P = attention_contrastive_report.moved(batch.pairs.repeat(1, 50), context_B, generator)
    assert set(zip(*pairs_2P.tolist())) == {(1, 0), (2, 1), (2, 0), (5, 4)}
    pairs_2P = attention_contrastive_report.random_pairs(context_B, 400, generator)
    assert set(zip(*pairs_2P.tolist())) == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (4, 5), (5, 4)}
    one, other = context_B[attention_contrastive_report.distant_pairs(context_B, 400, generator)]
    assert len(one) == 400 and not (one == other).any() and len(set(zip(one.tolist(), other.tolist()))) == 6
