"""The core eval against its formulas, written out with loops; packing; SAEBench's files."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from evals import Result, Setup, core
from evals.cache import Cache
from evals.common import errors, saebench
from evals.texts import packing
from tests.evals import scarce
from variants import base, topk
from variants.kit.trained import TrainedSAE

VOCABULARY, D, N_FEATURES, CONTEXT, BOS, EOS = 41, 10, 24, 9, 0, 1
CONFIG = {
    "context_size": CONTEXT, "batch_size_prompts": 4, "n_eval_reconstruction_batches": 2,
    "n_eval_sparsity_variance_batches": 2, "exclude_special_tokens_from_reconstruction": True,
    "reuse_reconstruction_rows": False,
}


class FakeLM:
    """Two bias-free blocks that mix earlier positions into later ones; the SAE sits between them, at layer 0."""

    name, digest, device, d_model, d_final, vocab_size = "fake", "0", "cpu", D, D, VOCABULARY
    bos, special_ids, uniform_when_ablated = BOS, {BOS, EOS}, True

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.E_VD, self.U_DV, self.W1_DD, self.W2_DD = (
            torch.randn(shape, generator=generator) for shape in ((VOCABULARY, D), (D, VOCABULARY), (D, D), (D, D)))
        self.E_VD += 3 * torch.randn(D, generator=generator)  # a mean that is not 0
        self.bias_D = torch.zeros(D)
        self.prefix_tokens = 0

    def tokenizer(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) if word.isdigit() else 7 for word in text.split()] for text in texts]}

    def block(self, x_BTD, W_DD):
        position_T1 = torch.arange(1, x_BTD.shape[1] + 1)[:, None]
        return x_BTD + torch.tanh(x_BTD.cumsum(1) / position_T1 @ W_DD / 4 + position_T1 * self.bias_D)

    def residual(self, tokens_BT, layer):
        assert layer == 0
        self.prefix_tokens += tokens_BT.numel()
        return self.block(self.E_VD[tokens_BT], self.W1_DD)

    def finish(self, x_BTD, layer):
        x_BTD = self.block(x_BTD, self.W2_DD)
        return x_BTD / (x_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def unembed(self, h):
        return h @ self.U_DV


class WideEncoder(base.SAE):
    """An encoder that is not one [D, F] matrix."""

    def __init__(self, d_in, d_sae):
        super().__init__(d_in, d_sae)
        self.W_enc = torch.nn.Parameter(torch.randn(d_in, d_sae // 2))

    def encode(self, x):
        return torch.relu(x @ torch.cat([self.W_enc, -self.W_enc], dim=1))


class Signed(base.SAE):
    """Features of both signs: tells f != 0 from f > 0, and the sum of magnitudes from the sum."""

    def encode(self, x):
        pre = self.pre_activations(x)
        return torch.where(pre.abs() > 0.5, pre, 0.0)


def TopK(d_in, d_sae):
    return topk.SAE(d_in, d_sae, k=5)


def trained(SAE, seed=0):
    torch.manual_seed(seed)
    sae = SAE(D, N_FEATURES)
    sae.b_enc.data.normal_(0, 0.1)
    sae.b_dec.data.normal_(0, 0.1)
    sae.W_dec.data *= torch.rand(N_FEATURES, 1) + 0.5  # norms that TrainedSAE has to fold
    sae.W_enc.data += 0.1 * torch.randn(sae.W_enc.shape)
    sae.W_enc.data[:, 3], sae.b_enc.data[3] = 0.0, -9.0  # one feature never fires
    return TrainedSAE(sae, scale=4.0)


def texts(n=60):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        ids = torch.randint(-4, VOCABULARY, (length,), generator=generator).clamp_min(EOS)  # one in eight is EOS
        yield " ".join(map(str, ids.tolist()))


def setup(folder, lm=None, limit_gb=1.0, n_texts=60, **config):
    return Setup(lm=lm or FakeLM(), layer=0, hook_name="blocks.0.hook_resid_post", config=CONFIG | config,
                 texts=lambda: texts(n_texts), texts_digest=str(n_texts), cache=Cache(folder, limit_gb), data=None,
                 seed=0, say=lambda line: None)


def means(result):
    return {name.removeprefix("core."): value for name, value in saebench.flatten(result, "core")[0].items()}


# --------------------------------------------------------------------------------------------- the formulas, with loops


def full_run(lm, tokens_T, change=None):
    """Log-probabilities [T, V] of one row in double precision, with the residual changed by `change(position, x_D)`."""
    x_TD = lm.residual(tokens_T[None], 0)[0]
    if change is not None:
        x_TD = torch.stack([change(t, x_TD[t]) for t in range(len(x_TD))])
    return lm.unembed(lm.finish(x_TD[None], 0)[0]).double().log_softmax(-1)


def reference(lm, sae, tokens_RT, config):
    """SAEBench's core metrics, token by token."""
    batch, special = config["batch_size_prompts"], lm.special_ids
    n_reconstruction = min(len(tokens_RT), batch * config["n_eval_reconstruction_batches"])
    first = 0 if config["reuse_reconstruction_rows"] else n_reconstruction
    rows = tokens_RT[first : first + batch * config["n_eval_sparsity_variance_batches"]]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    out = {"total_tokens_eval_reconstruction": n_reconstruction * CONTEXT,
           "total_tokens_eval_sparsity_variance": rows.numel()}

    ce, kl = {"clean": [], "sae": [], "abl": []}, {"sae": [], "abl": []}
    for tokens_T in tokens_RT[:n_reconstruction]:
        keep = [int(t) in special and config["exclude_special_tokens_from_reconstruction"] for t in tokens_T]
        logp = {
            "clean": full_run(lm, tokens_T),
            "sae": full_run(lm, tokens_T, lambda t, x_D, keep=keep: x_D if keep[t] else sae.decode(sae.encode(x_D))),
            "abl": full_run(lm, tokens_T, lambda t, x_D: 0 * x_D),
        }
        for t in range(CONTEXT):
            if int(tokens_T[t]) in special:
                continue
            for run in kl:
                kl[run].append(sum(math.exp(p) * (p - q)
                                   for p, q in zip(logp["clean"][t].tolist(), logp[run][t].tolist())))
            if t + 1 < CONTEXT:
                for run in ce:
                    ce[run].append(-float(logp[run][t, tokens_T[t + 1]]))
    out |= {"ce_loss_with_sae": mean(ce["sae"]), "ce_loss_without_sae": mean(ce["clean"]),
            "ce_loss_with_ablation": mean(ce["abl"]), "kl_div_with_sae": mean(kl["sae"]),
            "kl_div_with_ablation": mean(kl["abl"])}
    out["ce_loss_score"] = (mean(ce["abl"]) - mean(ce["sae"])) / (mean(ce["abl"]) - mean(ce["clean"]))
    out["kl_div_score"] = (mean(kl["abl"]) - mean(kl["sae"])) / mean(kl["abl"])

    values, all_x, all_r, bias, S, R, from_centre = {}, [], [], [], [], [], []
    fired, prompts, tokens = [0] * N_FEATURES, [0] * N_FEATURES, 0
    for start in range(0, len(rows), batch):
        xs, x_hats = [], []
        for tokens_T in rows[start : start + batch]:
            in_row = [0] * N_FEATURES
            for x_D, token in zip(lm.residual(tokens_T[None], 0)[0], tokens_T.tolist()):
                if token in special:
                    continue
                z = sae.encode(x_D)
                values.setdefault("l0", []).append(sum(v != 0 for v in z.tolist()))
                values.setdefault("l1", []).append(sum(abs(v) for v in z.tolist()))
                in_row = [n + (v != 0) for n, v in zip(in_row, z.tolist())]
                xs.append(x_D.double())
                x_hats.append(sae.decode(z).double())
            fired = [a + b for a, b in zip(fired, in_row)]
            prompts = [a + (b > 0) for a, b in zip(prompts, in_row)]
        tokens += len(xs)
        centre = mean(xs)
        for x, x_hat in zip(xs, x_hats):
            r_sq = float((x - x_hat) @ (x - x_hat))
            for name, value in {
                "l2_norm_in": x.norm(), "l2_norm_out": x_hat.norm(), "l2_ratio": x_hat.norm() / x.norm(),
                "mse": r_sq / len(xs),
                "cossim": x @ x_hat / x.norm() / x_hat.norm(), "mse_per_token": r_sq,
                "explained_variance_legacy": 1 - r_sq / float((x - centre) @ (x - centre)),
            }.items():
                values.setdefault(name, []).append(float(value))
        bias.append(mean([float(v @ v) for v in x_hats]) / mean([float(x @ v) for x, v in zip(xs, x_hats)]))
        S.append(mean([float(x @ x) for x in xs]))
        R.append(mean([float((x - v) @ (x - v)) for x, v in zip(xs, x_hats)]))
        all_x, all_r = all_x + xs, all_r + [x - v for x, v in zip(xs, x_hats)]
        from_centre += [x - usual(xs) for x in xs]
    out["r2_median"] = 1 - median_square(all_r) / median_square(from_centre)
    out |= {name: mean(column) for name, column in values.items()}
    out["relative_reconstruction_bias"] = mean(bias)
    out["explained_variance"] = 1 - mean(R) / (mean(S) - (mean(S) / D) ** 2)
    out["r2"] = r2(all_x, all_r)

    density = [n / tokens for n in fired]
    out["frac_alive"] = mean([float(d > 0) for d in density])
    for percent in (1, 10):
        often = [d for d in density if d > percent / 100]
        out[f"freq_over_{percent}_percent"] = len(often) / N_FEATURES
        out[f"normalized_freq_over_{percent}_percent"] = sum(often) / sum(density)

    def cosine(a, b):
        return float(a.double() @ b.double()) / max(float(a.double().norm() * b.double().norm()), 1e-12)

    W_enc, W_dec = list(sae.W_enc.T), list(sae.W_dec)
    details = [{
        "index": i, "feature_density": density[i],
        "consistent_activation_heuristic": fired[i] / prompts[i] if prompts[i] else -1.0,
        "encoder_bias": float(sae.b_enc[i]), "encoder_norm": float(W_enc[i].norm()),
        "encoder_decoder_cosine_sim": cosine(W_enc[i], W_dec[i]),
        "max_encoder_cosine_sim": max(cosine(W_enc[i], W_enc[j]) for j in range(N_FEATURES) if j != i),
        "max_decoder_cosine_sim": max(cosine(W_dec[i], W_dec[j]) for j in range(N_FEATURES) if j != i),
    } for i in range(N_FEATURES)]
    for side in ("encoder", "decoder"):
        out[f"average_max_{side}_cosine_sim"] = mean([row[f"max_{side}_cosine_sim"] for row in details])
    return out, details


def r2(x, r):
    """1 − E‖r‖² / (E‖x‖² − ‖E x‖²)"""
    x_ND, r_ND = torch.stack(list(x)), torch.stack(list(r))
    return float(1 - r_ND.square().sum(1).mean() / (x_ND.square().sum(1).mean() - x_ND.mean(0).square().sum()))


def usual(xs):
    """The mean of tokens at most ten times the median distance away: from 0, then from that mean."""
    centre = 0 * xs[0]
    for _ in range(2):
        reach = 10 * statistics.median_low(float((x - centre).norm()) for x in xs)
        near = [x for x in xs if float((x - centre).norm()) <= reach]
        centre = sum(near) / len(near)
    return centre


def median_square(vectors):
    return statistics.median_low(float(v @ v) for v in vectors)


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("changes", [
    {},
    {"reuse_reconstruction_rows": True, "n_eval_sparsity_variance_batches": 1},
    {"exclude_special_tokens_from_reconstruction": False},
])
@pytest.mark.parametrize("SAE", [Signed, TopK])
def test_every_metric_equals_its_formula(tmp_path, monkeypatch, changes, SAE):
    """Fails if a metric departs from its definition; batches are uneven, rows hold special tokens, E x is not 0."""
    monkeypatch.setattr(core, "LOGIT_BYTES", {"cpu": 20 * VOCABULARY * 7})  # several chunks, the last one smaller
    monkeypatch.setattr(core, "FEATURE_BYTES", {"cpu": 16 * CONTEXT * N_FEATURES * 3})
    s, sae = setup(tmp_path, n_texts=16, **changes), trained(SAE)
    random_state = torch.get_rng_state()
    result = core.run(s, {"a": sae})["a"]
    assert torch.equal(torch.get_rng_state(), random_state)

    rows, wanted = (8, 8) if s.config["reuse_reconstruction_rows"] else (15, 16)
    tokens_RT = packing.pack(texts(16), s.lm.tokenizer, CONTEXT, BOS, wanted)
    assert len(tokens_RT) == rows and int((tokens_RT[:, 1:] == EOS).sum()) > 5
    expected, details = reference(s.lm, sae, tokens_RT, s.config)
    assert means(result) == pytest.approx(expected, rel=1e-4)
    assert set(expected) == set(core.METRICS)
    for row, want in zip(result.details, details, strict=True):
        assert row == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert result.problems == (["the held-out texts fill only 15 of the 16 rows asked for"] if rows < wanted else [])


def test_zero_ablation_in_closed_form_equals_the_pass(tmp_path):
    """Fails if ln V and ln V − H(p) are not what a bias-free model gives for a residual of zeros."""
    saes = {"a": trained(TopK)}
    closed = means(core.run(setup(tmp_path), saes)["a"])
    lm = FakeLM()
    lm.uniform_when_ablated = False
    passed = means(core.run(setup(tmp_path, lm), saes)["a"])
    assert closed["ce_loss_with_ablation"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert passed == pytest.approx(closed, rel=1e-5)


def test_zero_ablation_runs_the_model_where_it_has_biases(tmp_path):
    """Fails if the ablated run is skipped, or its one row is not laid over all rows position by position."""
    lm = FakeLM()
    lm.bias_D, lm.uniform_when_ablated = torch.linspace(-1, 1, D), False
    s, sae = setup(tmp_path, lm), trained(TopK)
    expected, _ = reference(lm, sae, packing.pack(texts(), lm.tokenizer, CONTEXT, BOS, 16), s.config)
    assert means(core.run(s, {"a": sae})["a"]) == pytest.approx(expected, rel=1e-4)


def test_cached_streamed_and_repeated_runs_are_identical(tmp_path):
    """Fails if the cache changes a number, or if a second SAE pays for the prefix again."""
    first, other = {"a": trained(TopK)}, {"a": trained(TopK, seed=5)}
    streamed = core.run(setup(tmp_path / "none", limit_gb=0), first)
    assert not (tmp_path / "none").exists()
    s = setup(tmp_path / "some")
    assert core.run(s, first) == streamed
    s = replace(s, texts=lambda: pytest.fail("the texts were read again"), cache=Cache(tmp_path / "some", 1.0),
                lm=FakeLM())
    assert core.run(s, first) == streamed
    assert core.run(s, other) != streamed
    assert s.lm.prefix_tokens == 2  # one token per run, to learn the dtype
    assert s.cache.misses == []


def test_an_saes_result_does_not_depend_on_the_others(tmp_path):
    """Fails if SAEs that share the language model's batches leak into each other, also where one of them is broken."""
    a, b, broken = trained(TopK), trained(Signed, seed=5), trained(Signed, seed=6)
    broken.sae.W_dec[2, 2] = math.nan
    together = core.run(setup(tmp_path), {"broken": broken, "b": b, "a": a})
    for name, sae in {"a": a, "b": b}.items():
        assert core.run(setup(tmp_path), {name: sae})[name] == together[name]


def test_broken_and_dead_saes_have_problems_and_no_crash(tmp_path):
    """Fails if NaN reaches a result, or if a dead SAE passes without a word."""
    broken, dead = trained(TopK), trained(TopK)
    broken.sae.W_dec[2, 2] = math.nan
    dead.sae.b_enc.fill_(-1e4)
    dead.sae.b_dec.zero_()
    results = core.run(setup(tmp_path), {"broken": broken, "dead": dead})
    values = means(results["broken"])
    left = {name for name, value in values.items() if value is not None}
    assert left == {name for name in core.METRICS if name.startswith("total_")}
    assert "not finite" in results["broken"].problems[0] and results["broken"].stderrs == {}
    values = means(results["dead"])
    assert (values["l0"], values["frac_alive"], values["cossim"]) == (0, 0, 0)
    assert values["relative_reconstruction_bias"] is None
    assert results["dead"].problems == ["the SAE is dead: L0 = 0",
                                        "not finite, so without a value: relative_reconstruction_bias"]


def test_an_encoder_of_another_shape_leaves_only_its_metrics_out(tmp_path):
    """Fails if an SAE without W_enc [D, F] crashes the eval, loses other metrics, or no reason is given."""
    result = core.run(setup(tmp_path), {"a": trained(WideEncoder)})["a"]
    assert [name for name, value in means(result).items() if value is None] == ["average_max_encoder_cosine_sim"]
    assert result.problems == ["the SAE has no encoder matrix [D, F]: its encoder metrics have no value"]
    assert result.details[3]["encoder_norm"] is None and result.details[3]["max_decoder_cosine_sim"] is not None


def test_a_bfloat16_model_is_measured_in_float32(tmp_path):
    """Fails if metrics are computed in the model's dtype, which rounds l2_norm_in to three digits."""
    lm = FakeLM()
    for name in ("E_VD", "U_DV", "W1_DD", "W2_DD", "bias_D"):
        setattr(lm, name, getattr(lm, name).bfloat16())
    lm.block = lambda x, W: FakeLM.block(lm, x, W).bfloat16()
    s, sae = setup(tmp_path, lm), trained(TopK)
    result = core.run(s, {"a": sae})["a"]
    assert core.run(setup(tmp_path / "none", lm, limit_gb=0), {"a": sae})["a"] == result
    tokens_RT = packing.pack(texts(), lm.tokenizer, CONTEXT, BOS, 16)[8:]
    norms = [float(x.double().norm()) for row in tokens_RT for x, t in zip(lm.residual(row[None], 0)[0], row.tolist())
             if t not in lm.special_ids]
    assert means(result)["l2_norm_in"] == pytest.approx(sum(norms) / len(norms), rel=1e-6)


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path):
    """Fails as scarce.check_every_batch says."""
    scarce.check_every_batch(core.run, setup(tmp_path), trained(TopK))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["residual", "finish", "unembed", "encode"])
def test_two_calls_that_run_out_of_memory_lose_nothing(tmp_path, method):
    """Fails as scarce.check_two_calls says."""
    scarce.check_two_calls(core.run, setup(tmp_path), trained(TopK), method)


def test_too_little_text_says_what_to_do(tmp_path):
    """Fails if a sparsity pass without rows ends in a division by zero."""
    with pytest.raises(ValueError, match="n_eval_reconstruction_batches"):
        core.run(setup(tmp_path, n_texts=8), {"a": trained(TopK)})
    for wrong in (1, "128"):
        problem = f"core: context_size = {wrong!r} cannot be measured\nset it to a whole number, 2 or more"
        assert core.requirements(CONFIG | {"context_size": wrong}, {}) == [problem]
    assert all(core.requirements(config, {}) == [] for config in core.CONFIG.values())


def test_standard_errors_agree_with_the_jackknife_over_documents(tmp_path):
    """Fails if tokens are taken for independent, or a ratio's denominator for fixed (delete-one-document jackknife)."""
    config = {"batch_size_prompts": 1, "n_eval_reconstruction_batches": 40, "n_eval_sparsity_variance_batches": 40,
              "reuse_reconstruction_rows": True}
    s, sae = setup(tmp_path, n_texts=200, **config), trained(TopK)
    stated = core.run(s, {"a": sae})["a"].stderrs
    tokens_RT, document_RT = packing.pack_numbered(texts(200), s.lm.tokenizer, CONTEXT, BOS, 40)

    of = {}  # document: cross-entropies of the clean model and with the SAE, residuals, errors of reconstruction
    for tokens_T, document_T in zip(tokens_RT, document_RT.tolist()):
        used = [int(t) not in s.lm.special_ids for t in tokens_T]
        logp = [full_run(s.lm, tokens_T),
                full_run(s.lm, tokens_T, lambda t, x, u=used: sae.decode(sae.encode(x)) if u[t] else x)]
        x_TD = s.lm.residual(tokens_T[None], 0)[0]
        for t in (t for t in range(CONTEXT) if used[t]):
            ce = [[-float(p[t, tokens_T[t + 1]])] if t < CONTEXT - 1 else [] for p in logp]
            x_1D = x_TD[t : t + 1]
            parts = *ce, [x_1D.double()], [x_1D.double() - sae.decode(sae.encode(x_1D)).double()]
            of[document_T[t]] = tuple(a + b for a, b in zip(of.get(document_T[t], ([],) * 4), parts))
    per_document = list(of.values())
    n = len(per_document)

    def score(documents):
        clean, with_sae = (sum((document[i] for document in documents), []) for i in (0, 1))
        uniform = math.log(VOCABULARY) * len(clean)
        return (uniform - sum(with_sae)) / (uniform - sum(clean))

    def jackknife(statistic):
        left_out = [statistic(per_document[:i] + per_document[i + 1 :]) for i in range(n)]
        centre = sum(left_out) / n
        return math.sqrt((n - 1) / n * sum((value - centre) ** 2 for value in left_out))

    def stacked(documents, i):
        return torch.cat([tensor for document in documents for tensor in document[i]])

    def mse(documents):
        return float(stacked(documents, 3).square().sum(1).mean())

    assert stated["ce_loss_score"] == pytest.approx(jackknife(score), rel=0.1)
    assert stated["r2"] == pytest.approx(jackknife(lambda docs: r2(stacked(docs, 2), stacked(docs, 3))), rel=0.1)
    assert stated["mse_per_token"] == pytest.approx(jackknife(mse), rel=0.05)


ALL_ROWS = {"reuse_reconstruction_rows": True, "n_eval_sparsity_variance_batches": 20}


class Outliers(FakeLM):
    """One token of the vocabulary has `times` the norm."""

    def __init__(self, times):
        super().__init__()
        self.E_VD[7] *= times
        self.digest = str(times)

    def block(self, x_BTD, W_DD):
        return super().block(x_BTD, W_DD) if W_DD is self.W2_DD else x_BTD


def test_a_huge_token_does_not_move_the_median_based_r2(tmp_path):
    """Fails if r2_median, as r2 does, says how well one token in forty is reconstructed, or the others'."""
    sae = trained(TopK)
    plain, huge = (means(core.run(setup(tmp_path, Outliers(times), n_texts=200, **ALL_ROWS), {"a": sae})["a"])
                   for times in (1, 1e3))
    assert huge["r2_median"] == pytest.approx(plain["r2_median"], rel=0.02)
    assert huge["r2"] != pytest.approx(plain["r2"], rel=0.5)


def test_tokens_above_the_bound_count_nowhere(tmp_path):
    """Fails if a token that training left out is reconstructed, or moves a metric: then it is as good as special."""
    sae, bounded, told = trained(TopK), Outliers(1e3), Outliers(1e3)
    told.special_ids = {BOS, EOS, 7}
    usual_norm = float(told.E_VD.norm(dim=1).median())
    everything = setup(tmp_path, bounded, n_texts=200, **ALL_ROWS)
    within = core.run(replace(everything, max_norm=10 * usual_norm), {"a": sae})
    assert within == core.run(setup(tmp_path, told, n_texts=200, **ALL_ROWS), {"a": sae})
    assert within != core.run(everything, {"a": sae})


def test_the_error_of_a_ratio_of_medians_is_its_spread_in_a_bootstrap_of_documents():
    """Fails if tokens of a document are taken for independent, or the two medians for unrelated."""
    generator = torch.Generator().manual_seed(0)
    topic_C = torch.randn(80, generator=generator)
    document_N = torch.randint(80, (4000,), generator=generator)
    shared_N = (0.3 * topic_C[document_N] + 0.3 * torch.randn(4000, generator=generator)).exp()
    above_N = shared_N * (0.2 * torch.randn(4000, generator=generator) + topic_C[document_N] / 9).exp()
    ratio, stated = errors.of_medians(above_N, shared_N, document_N)
    assert ratio == pytest.approx(float(above_N.median() / shared_N.median()), rel=1e-6)
    members = [(document_N == c).nonzero().squeeze(1) for c in range(80)]
    drawn = []
    for _ in range(400):
        index = torch.cat([members[c] for c in torch.randint(80, (80,), generator=generator).tolist()])
        drawn.append(float(above_N[index].median() / shared_N[index].median()))
    assert stated == pytest.approx(statistics.stdev(drawn), rel=0.2)
    naive = errors.of_medians(above_N, shared_N, torch.arange(4000))[1]
    assert naive < 0.6 * stated


def topical(seed, documents=60):
    """Documents of 10 to 70 words, each of three words of its own: about four rows, of tokens much alike."""
    rng = random.Random(seed)
    for _ in range(documents):
        words = rng.sample(range(2, VOCABULARY), 3)
        yield " ".join(str(rng.choice(words)) for _ in range(rng.randrange(10, 70)))


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_new_texts(tmp_path, monkeypatch):
    """Fails if documents of several rows do not count once: over new texts, a metric must vary as it says it does."""
    sae = trained(TopK)
    config = {"n_eval_reconstruction_batches": 30, "n_eval_sparsity_variance_batches": 30,
              "reuse_reconstruction_rows": True}

    def measured(seed, label=""):
        s = replace(setup(tmp_path, **config), texts=lambda: topical(seed), texts_digest=f"{seed}{label}")
        return core.run(s, {"a": sae})["a"]

    results = [measured(seed) for seed in range(60)]
    spread = {name: statistics.stdev(means(r)[name] for r in results) for name in results[0].stderrs}
    del spread["ce_loss_with_ablation"], spread["l0"]  # ln V and k at every token
    assert len(spread) == 16
    for name, value in spread.items():
        assert statistics.fmean(r.stderrs[name] for r in results) == pytest.approx(value, rel=0.3), name

    def by_row(*arguments, packed=packing.pack_numbered):
        tokens_RT, _ = packed(*arguments)
        return tokens_RT, torch.arange(len(tokens_RT))[:, None].repeat(1, CONTEXT)

    monkeypatch.setattr(packing, "pack_numbered", by_row)
    of_rows = [measured(seed, "rows").stderrs for seed in range(5)]
    assert all(statistics.fmean(stderrs[name] for stderrs in of_rows) < 0.7 * value for name, value in spread.items())


def test_fewer_than_five_documents_state_no_error(tmp_path):
    """Fails if an error is stated that four documents, or ten of which one is nearly all the text, have to carry."""
    for documents, stated in ((["7 8 9 7 5 6 8 9"] * 4, False), (["7 8 9 7 5 6 8 9"] * 6, True),
                              (["7 8"] * 9 + ["7 8 9 5 6 "] * 1, True), (["7 8"] * 9 + ["7 8 9 5 6 " * 40], False)):
        s = replace(setup(tmp_path, reuse_reconstruction_rows=True, n_eval_reconstruction_batches=20,
                          n_eval_sparsity_variance_batches=20),
                    texts=lambda documents=documents: iter(documents), texts_digest=str(documents))
        assert ("r2" in core.run(s, {"a": trained(TopK)})["a"].stderrs) == stated


def test_packing_by_hand():
    """Fails if BOS is missing at a row's start or between documents, doubled, or if empty documents leave one."""
    documents = {"a": [11, 12], "b": [], "c": [13], "d": [14, 15, 16, 17, 18], "e": [19], "f": [20, 21]}

    def tokenizer(batch, add_special_tokens):
        return {"input_ids": [documents[text] for text in batch]}

    rows = packing.pack("abcdef", tokenizer, context=4, bos=0)
    # the separator before d takes the last place of its row; the row then starts with the one BOS every row has
    assert rows.tolist() == [[0, 11, 12, 0], [0, 13, 0, 14], [0, 15, 16, 17], [0, 18, 0, 19], [0, 20, 21, 0]][:4]
    assert packing.pack("abcdef", tokenizer, context=4, bos=0, rows=2).tolist() == rows[:2].tolist()
    _, document_RT = packing.pack_numbered("abcdef", tokenizer, 4, 0)
    assert document_RT.tolist() == [[0, 0, 0, 2], [2, 2, 3, 3], [3, 3, 3, 3], [3, 3, 4, 4]]
    with pytest.raises(ValueError, match="fewer than the 4 tokens"):
        packing.pack("ab", tokenizer, context=4, bos=0)


def test_packing_reads_no_further_than_it_must():
    """Fails if a stream without end is read to its end."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield "5 6 7"

    assert packing.pack(endless(), FakeLM().tokenizer, CONTEXT, BOS, rows=3).shape == (3, CONTEXT)
    assert len(read) <= 64


def test_json_round_trip_is_exact(tmp_path):
    """Fails if a float loses a digit, a NaN reaches the file, or a key of SAEBench's schema is missing."""
    result = Result(metrics={"sparsity": {"l0": 0.1 + 0.2, "l1": math.nan}, "misc_metrics": {"frac_alive": None}},
                    corrected={"r2": 1 / 3}, stderrs={"l0": 1e-300}, details=[{"index": 0, "feature_density": 2 / 3}],
                    unstructured={"x": [1, 2.5]}, problems=["why l1 is None"])
    path = saebench.write(tmp_path / "core", result, "core", {"context_size": 8}, "custom/sae", "org/model",
                          {"d_in": 3})
    assert [p.name for p in path.parent.iterdir()] == ["org_model_custom_sae_eval_results.json"]
    result.metrics["sparsity"]["l1"] = None
    assert saebench.read(path) == result
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert {"eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
            "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version",
            "sae_cfg_dict", "eval_result_unstructured", "corrected_metrics", "stderrs", "problems"} == set(content)
    flat, errors = saebench.flatten(result, "core")
    assert flat == {"core.l0": 0.1 + 0.2, "core.l1": None, "core.frac_alive": None, "core.r2": 1 / 3}
    assert errors == {"core.l0": 1e-300}
