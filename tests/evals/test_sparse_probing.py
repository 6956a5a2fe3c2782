"""sparse_probing against plain references of the protocol, on a fake language model with the documented interface."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evals import Setup, declared, sparse_probing
from evals.cache import Cache, digest
from evals.common import pooling, probes
from evals.model import memory
from tests.evals import scarce

BOS, EOS, PAD, MARK = 0, 1, 2, 3  # MARK stands in texts of the class "marked" only
VOCABULARY, D = 40, 6


def tokenizer(texts, add_special_tokens, truncation, max_length):
    """Texts are token ids written out."""
    assert not add_special_tokens and truncation
    return {"input_ids": [[int(t) for t in text.split()][:max_length] for text in texts]}


class FakeLM:
    """Causal: a position holds its token's vector and a hundredth of all before it. Counts the rows it was given."""

    name, digest, device, d_model, vocab_size = "fake", "d1", "cpu", D, VOCABULARY
    bos, special_ids, tokenizer = BOS, {BOS, EOS, PAD}, staticmethod(tokenizer)

    def __init__(self):
        self.table_VD = torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(5))
        self.table_VD[:, 0] = 0.0
        self.table_VD[MARK, 0] = 9.0
        self.rows = 0

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        x_BTD = self.table_VD[tokens_BT]
        return x_BTD + 0.01 * (x_BTD.cumsum(1) - x_BTD)


def texts(classes=("marked", "b", "c"), train=24, test=12):
    """Random tokens, of slightly different ranges per class; those of the class "marked" begin with MARK."""
    rng = np.random.default_rng(0)
    made = {}
    for c, name in enumerate(classes):
        made[name] = {}
        for split, number in (("train", train), ("test", test)):
            bodies = [rng.integers(4 + c, VOCABULARY - 4 + c, rng.integers(4, 14)).tolist() for _ in range(number)]
            made[name][split] = [" ".join(map(str, [MARK, *body] if name == "marked" else body)) for body in bodies]
    return made


def make_setup(tmp_path, data=None, lm=None, limit_gb=1.0, seed=0):
    config = {**sparse_probing.CONFIG["tiny"], "llm_batch_size": 7, "sae_batch_size": 5}
    data = data or {"first": texts(), "second": texts(("x", "marked"))}
    source = SimpleNamespace(probing=lambda config: data, probing_digest=lambda config: digest(data))
    return Setup(lm or FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, limit_gb), source,
                 seed, lambda s: None)


def tokenised(setup, written):
    return pooling.tokenise(written, setup.lm.tokenizer, setup.config["context_length"], setup.lm.bos)


def random_sae(seed, features=9):
    """ReLU features; number 4 reads the direction that only MARK has."""
    W_DF = torch.randn(D, features, generator=torch.Generator().manual_seed(seed))
    W_DF[:, 4] = 0.0
    W_DF[0, 4] = 1.0
    return SimpleNamespace(encode=lambda x: torch.relu(x.float() @ W_DF - 0.2))


# ------------------------------------------------------------------------------------------------ pooling


def test_pooling_skips_special_tokens_and_counts_the_rest():
    """Fails if BOS, padding or a special token in a text enters the mean or its count, or a long text is not cut."""
    lm = FakeLM()
    written = [f"5 {EOS} 7", "9", f"{BOS}", " ".join(str(i) for i in range(4, 30))]
    config = {"context_length": 6, "llm_batch_size": 2, "sae_batch_size": 1}
    none = SimpleNamespace(path=lambda *a: SimpleNamespace(exists=lambda: False), fits=lambda n: False)
    setup = SimpleNamespace(lm=lm, layer=0, fits={}, config=config, track=lambda items, *about: items, cache=none,
                            max_norm=None)
    # + 1: what stands at masked positions is not 0
    z_NF = pooling.pooled(setup, *tokenised(setup, written), {"z": lambda x: x + 1.0})["z"]
    for text, z_F in zip(written, z_NF):
        tokens = [BOS] + [int(t) for t in text.split()][:5]
        total, count, before = np.zeros(D), 0, np.zeros(D)
        for token in tokens:
            vector = lm.table_VD[token].double().numpy()
            if token not in (BOS, EOS, PAD):
                total, count = total + vector + 0.01 * before + 1.0, count + 1
            before = before + vector
        np.testing.assert_allclose(z_F, total / max(count, 1), atol=1e-5)


def test_pooling_leaves_out_what_training_left_out(tmp_path):
    """Fails if a position above the bound enters the mean or its count."""
    setup, lm = make_setup(tmp_path), FakeLM()
    x_TD = lm.residual(torch.tensor([[BOS, 5, 6, 7, 8]]), 3)[0, 1:]
    norm_T = x_TD.norm(dim=1)
    bounded = dataclasses.replace(setup, max_norm=float(norm_T.sort().values[2]))
    z_NF = pooling.pooled(bounded, *tokenised(setup, ["5 6 7 8"]), {"x": lambda x: x})["x"]
    torch.testing.assert_close(z_NF[0], x_TD[norm_T < norm_T.max()].mean(0))


def test_an_infinite_feature_at_a_special_position_is_masked():
    """Fails if masking multiplies by 0, which makes NaN of infinity."""
    values_bTF, mask_bT = torch.tensor([[[math.inf], [2.0], [4.0]]]), torch.tensor([[False, True, True]])
    assert pooling.pool(values_bTF, mask_bT).item() == 3.0


def test_equal_rows_pass_the_model_once(tmp_path):
    """Fails if duplicates are not removed, or if BOS as text and BOS as padding are taken for the same row."""
    setup = make_setup(tmp_path)
    z_NF = pooling.pooled(setup, *tokenised(setup, ["5 6", "7", "5 6", "7 0", "5 6"]), {"x": lambda x: x})["x"]
    assert setup.lm.rows == 3
    assert torch.equal(z_NF[0], z_NF[2]) and torch.equal(z_NF[0], z_NF[4]) and not torch.equal(z_NF[0], z_NF[1])


# ------------------------------------------------------------------------------------------------ probes


def test_draw_repeats_the_reference_stream():
    """Fails if a randperm is left out, added or made in another order, or if the classes are not balanced."""
    rows = {"a": torch.arange(0, 7), "b": torch.arange(7, 14), "c": torch.arange(14, 21)}
    row_M, label_M = probes.draw(rows, "b", torch.Generator().manual_seed(11))

    torch.manual_seed(11)
    negatives = [rows[name][torch.randperm(7)[:4]] for name in ("a", "c")]  # ceil(7 / 2) of each
    negatives = torch.cat(negatives)[torch.randperm(8)[:7]]
    shuffle = torch.randperm(14)
    assert torch.equal(row_M, torch.cat([rows["b"], negatives])[shuffle])
    assert torch.equal(label_M, torch.tensor([1] * 7 + [0] * 7)[shuffle])


def test_selection_is_by_absolute_mean_difference():
    """Fails for a signed difference (feature 1 would lose) or one scaled by the deviation (feature 0 would win)."""
    x_MF = torch.tensor([[1.0, 0.0, 9.0, 5.0], [1.0, 0.0, 1.0, 5.0], [0.0, 3.0, 3.0, 5.0], [0.0, 5.0, 3.0, 5.0]])
    assert probes.by_mean_difference(x_MF, torch.tensor([1, 1, 0, 0])).tolist() == [1, 2, 0, 3]


def test_sparse_probe_is_plain_logistic_regression():
    """Fails if features are standardised, C is not 1, the intercept is penalised or other columns enter."""
    rng = np.random.default_rng(3)
    label_M = np.arange(160) % 2
    x_MF = rng.normal(size=(160, 5)) * [0.02, 3.0, 0.3, 1.0, 1.0] + np.outer(label_M, [0.02, 1.5, 0.25, 9.0, 9.0]) + 2.0
    train, test = ((torch.tensor(x_MF[part], dtype=torch.float32), torch.tensor(label_M[part]))
                   for part in (slice(60), slice(60, 160)))

    def newton(columns, C):
        a_M3 = np.column_stack([x_MF[:, columns], np.ones(160)])
        w, ridge = np.zeros(len(columns) + 1), np.diag([1 / C] * len(columns) + [0.0])
        for _ in range(50):
            p = 1 / (1 + np.exp(-a_M3[:60] @ w))
            hessian = (a_M3[:60] * (p * (1 - p))[:, None]).T @ a_M3[:60] + ridge
            w -= np.linalg.solve(hessian, a_M3[:60].T @ (p - label_M[:60]) + ridge @ w)
        return ((a_M3[60:] @ w > 0) == label_M[60:]).mean()

    expected = newton([0, 2], 1.0)
    assert expected != newton([0, 2], 1e3), "the input does not tell the penalty"
    assert probes.sparse_probe_accuracy(train, test, torch.tensor([2, 0])) == pytest.approx(expected, abs=1e-12)


def hard_problem():
    x_MF = torch.randn(300, 60, generator=torch.Generator().manual_seed(2))
    label_M = (x_MF[:, :20].sum(1) + 6 * torch.randn(300, generator=torch.Generator().manual_seed(3)) > 0).long()
    return (x_MF[:200], label_M[:200]), (x_MF[200:], label_M[200:])


def reference_full_probe(train, test, seed):
    """The protocol in torch's own layers on the global random stream: best accuracy, its epoch and weights."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(60, 1)
    optimiser = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    best, since = (0.0, -1, None), 0
    for epoch in range(100):
        order = torch.randperm(400)
        for rows in (order[:250], order[250:]):
            loss = torch.nn.BCEWithLogitsLoss()(linear(train[0][rows]).squeeze(-1), train[1][rows].float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        accuracy = ((linear(test[0]).squeeze(-1) > 0).long() == test[1]).double().mean().item()
        since += 1
        if accuracy > best[0]:
            best, since = (accuracy, epoch, linear.weight.detach().clone()), 0
        if since == 10:
            break
    return best


def chaotic():
    """(train, test) on two features of a residual stream's scale, where lbfgs in fp32 stops well before the optimum."""
    g = torch.Generator().manual_seed(1)
    label_M = torch.arange(1000) % 2
    x_MF = (torch.relu(torch.randn(1000, 2, generator=g) + 0.3 * label_M[:, None]) * torch.tensor([300.0, 0.02])
            + torch.tensor([900.0, 5.0]))
    return (x_MF[:600], label_M[:600]), (x_MF[600:], label_M[600:])


def test_a_corrected_probe_is_the_optimum_and_small_changes_do_not_move_it():
    """Fails if the probe stops before its optimum, where the gradient is 0 and 1e-7 in the input moves no accuracy."""
    train, test = chaotic()
    got = probes.converged_probe_accuracy(train, test, torch.tensor([0, 1]))
    for seed in range(5):
        noise = 1 + 1e-7 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(seed))
        moved = [(x_MF.double() * noise[: len(x_MF)], label_M) for x_MF, label_M in (train, test)]
        assert probes.converged_probe_accuracy(*moved, torch.tensor([0, 1])) == got
    # Newton's method written out
    x_M3, y_M = torch.cat([train[0].double(), torch.ones(600, 1).double()], 1), train[1].double()
    w_3, penalty_33 = torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 1.0, 0.0]).double())
    for _ in range(100):
        p_M = (x_M3 @ w_3).sigmoid()
        hessian_33 = x_M3.T @ (x_M3 * (p_M * (1 - p_M))[:, None]) + penalty_33
        w_3 = w_3 - torch.linalg.solve(hessian_33, x_M3.T @ (p_M - y_M) + penalty_33 @ w_3)
    test_M3 = torch.cat([test[0].double(), torch.ones(400, 1).double()], 1)
    assert got == ((test_M3 @ w_3 > 0) == (test[1] == 1)).double().mean().item()


def test_an_unconverged_probe_is_told(tmp_path, monkeypatch):
    """Fails if a probe that did not converge enters a mean, or leaves its metric out without a word."""
    def accuracy(train, test, feature_k):
        return math.nan if len(feature_k) == 2 else 0.5

    monkeypatch.setattr(probes, "converged_probe_accuracy", accuracy)
    result = sparse_probing.run(make_setup(tmp_path), {"sae": random_sae(1)})["sae"]
    assert result.corrected["sae_top_2_test_accuracy_fixed_draw"] is None
    assert result.corrected["sae_top_1_test_accuracy_fixed_draw"] == 0.5
    told = [problem for problem in result.problems if "did not converge" in problem]
    assert any(problem.endswith("no sae_top_2_test_accuracy_fixed_draw") for problem in told)


def test_full_probe_repeats_the_reference():
    """Fails for another initialisation, optimiser, batch size, order of random numbers or stopping rule."""
    train, test = hard_problem()
    train = tuple(torch.cat([t, t]) for t in train)  # 400 rows: two batches of 250 and 150
    for seed in range(4):
        accuracy, epoch, weight_1F = reference_full_probe(train, test, seed)
        probe = probes.fit_linear_probe(train, test, torch.Generator().manual_seed(seed))
        assert (probe.accuracy, probe.epoch) == (accuracy, epoch) and 0.5 < accuracy < 1.0
        torch.testing.assert_close(probe.weight_1F, weight_1F, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_autograd():
    """Fails for another loss: another mean, positives weighted wrongly, or a gradient of another sign or shape."""
    rng = torch.Generator().manual_seed(0)
    x_MF, W_LF, b_L = torch.randn(9, 5, generator=rng), torch.randn(3, 5, generator=rng), torch.randn(3, generator=rng)
    target_ML, weight_L = torch.rand(9, 3, generator=rng).round(), torch.tensor([1.0, 4.0, 9.0])
    for weight in (None, weight_L):
        parameters = [t.clone().requires_grad_() for t in (W_LF, b_L)]
        logit_ML = torch.nn.functional.linear(x_MF, *parameters)
        torch.nn.functional.binary_cross_entropy_with_logits(logit_ML, target_ML, pos_weight=weight).backward()
        found = probes.gradients(x_MF, target_ML, W_LF, b_L, weight)
        torch.testing.assert_close(list(found), [t.grad for t in parameters])


def test_validation_selected_probe_uses_no_test_label():
    """Fails if test labels choose the epoch: other test labels must leave it, and give the complementary accuracy."""
    train, test = hard_problem()
    accuracy, epoch = probes.validation_selected(train, test, torch.Generator().manual_seed(4))
    flipped, same_epoch = probes.validation_selected(train, (test[0], 1 - test[1]), torch.Generator().manual_seed(4))
    assert epoch == same_epoch and flipped == pytest.approx(1 - accuracy)
    assert accuracy < probes.leaky_accuracy(train, test, torch.Generator().manual_seed(4))


# ------------------------------------------------------------------------------------------ several batches a pass


@pytest.mark.parametrize("limit_gb", [0, 1])
def test_batches_that_pass_together_are_those_that_pass_alone(tmp_path, monkeypatch, limit_gb):
    """Fails if a batch gets another's rows or padding, if one that is kept passes again, or none pass together."""
    tokens_NT, length_N = pooling.tokenise([" ".join(["7"] * n) for n in range(2, 13)], tokenizer, 16, BOS)
    tokens_UT, length_U, _ = pooling.distinct(tokens_NT, length_N)
    passes = []

    class Watched(FakeLM):
        def residual(self, tokens_BT, layer):
            passes.append(len(tokens_BT))
            return super().residual(tokens_BT, layer)

    def batches(folder, at_once):
        passes.clear()
        monkeypatch.setattr(memory, "batches_at_once", lambda setup, tokens: at_once)
        return list(pooling.activation_batches(make_setup(folder, lm=Watched(), limit_gb=limit_gb), tokens_UT,
                                               length_U, 2))

    def check(batches):
        for (rows, x_bTD), (same_rows, same_bTD) in zip(alone, batches, strict=True):
            assert rows == same_rows
            torch.testing.assert_close(x_bTD, same_bTD)

    alone = batches(tmp_path / "alone", 1)
    assert passes == [2, 2, 2, 2, 2, 1]
    check(batches(tmp_path / "together", 3))
    assert passes == [6, 5]
    if limit_gb:
        for file in list((tmp_path / "together").iterdir()):
            if load_file(file)["x"].shape[1] in (13, 9):  # the first and the third batch of a pass are lost
                file.unlink()
        check(batches(tmp_path / "together", 3))
        assert passes == [2, 2]


# ------------------------------------------------------------------------------------------------ the eval


def test_a_planted_feature_is_found(tmp_path):
    """Fails if labels, rows or columns are mixed up anywhere between the texts and the probe."""
    result = sparse_probing.run(make_setup(tmp_path), {"sae": random_sae(1)})["sae"]
    for dataset in ("first_results", "second_results"):
        values = result.unstructured[dataset]
        assert values["sae_top_1_test_accuracy"]["marked"] == 1.0
        assert values["sae_top_1_test_accuracy_fixed_draw"]["marked"] == 1.0
        assert values["sae_features_fixed_draw"]["marked"][0] == 4
    assert result.metrics["sae"]["sae_top_1_test_accuracy"] < 1.0  # the other classes have no such feature
    assert result.metrics["sae"]["sae_top_5_test_accuracy"] is None and not result.problems
    returned = {*result.metrics["llm"], *result.metrics["sae"], *result.corrected}
    assert returned <= set(declared("sparse_probing", "METRICS"))


def test_result_is_averaged_by_data_set_and_paired_by_class(tmp_path):
    """Fails if classes are pooled over data sets, or if the difference is taken between unpaired values."""
    result = sparse_probing.run(make_setup(tmp_path), {"sae": random_sae(1)})["sae"]
    per_set = [result.unstructured[f"{name}_results"] for name in ("first", "second")]
    by_hand = [np.mean(list(v["sae_top_2_test_accuracy"].values())) for v in per_set]
    assert [d["sae_top_2_test_accuracy"] for d in result.details] == pytest.approx(by_hand)
    assert result.metrics["sae"]["sae_top_2_test_accuracy"] == pytest.approx(np.mean(by_hand))
    pooled = [accuracy for v in per_set for accuracy in v["sae_top_2_test_accuracy"].values()]
    assert np.mean(by_hand) != pytest.approx(np.mean(pooled))
    sae, llm = (result.corrected[f"{side}_top_1_test_accuracy_fixed_draw"] for side in ("sae", "llm"))
    assert result.corrected["sae_top_1_minus_llm_top_1"] == pytest.approx(sae - llm)


def test_standard_error_by_hand():
    """Fails if unequal weights, n − 1 or the doubling of a two-class set is left out, or four problems state one."""
    # weights 1/9 six times and 1/3 (the pair as one problem at .9): worth 5.4 of equal weight
    got = probes.standard_error([[0.5, 0.7, 0.6], [0.4, 0.6, 0.8], [0.8, 1.0]])
    mean = (0.6 + 0.6 + 0.9) / 3
    squares = sum((value - mean) ** 2 for value in (0.5, 0.7, 0.6, 0.4, 0.6, 0.8)) / 81 + (0.9 - mean) ** 2 / 9
    assert got == pytest.approx(math.sqrt(7 / 6 * squares))
    assert probes.standard_error([[0.5, 0.7]]) is None is probes.standard_error([[0.5, 0.7, 0.6, 0.9]])
    assert probes.standard_error([[0.5, 0.7, 0.6], [0.4, 0.6, 0.8, 0.7], [0.2, 0.7, 0.6], [0.1, 0.6]]) is not None


@pytest.mark.slow
def test_a_score_depends_on_nothing_but_its_inputs(tmp_path):
    """Fails if the cache, another SAE, the order of SAEs or data sets, or the global random state shifts a score."""
    data = make_setup(tmp_path).data.probing(None)
    alone = sparse_probing.run(make_setup(tmp_path / "a"), {"one": random_sae(1)})["one"]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    setup = make_setup(tmp_path / "a")
    cached = sparse_probing.run(setup, {"two": random_sae(2, 30), "one": random_sae(1)})["one"]
    assert setup.lm.rows == 0 and setup.cache.misses == [], "the second run asked the LM or fitted its probes again"
    uncached = sparse_probing.run(make_setup(tmp_path / "b", limit_gb=0), {"one": random_sae(1)})["one"]
    turned = sparse_probing.run(make_setup(tmp_path / "c", dict(reversed(data.items()))), {"one": random_sae(1)})["one"]
    assert alone == cached == uncached
    assert not list((tmp_path / "b").glob("*"))
    assert turned.unstructured == alone.unstructured
    assert torch.equal(torch.get_rng_state(), state)
    other_seed = sparse_probing.run(make_setup(tmp_path / "a", seed=1), {"one": random_sae(1)})["one"]
    assert all(other_seed.metrics[side] != alone.metrics[side] for side in ("llm", "sae"))


def test_fixed_draw_is_shared_and_the_compatible_draw_is_not(tmp_path):
    """Fails if LM and SAE probes of the fixed draw see different negatives, or if the compatible ones see the same."""
    identity = SimpleNamespace(encode=lambda x: x.float())
    result = sparse_probing.run(make_setup(tmp_path), {"identity": identity})["identity"]
    for k in (1, 2):
        sae, llm = (result.corrected[f"{side}_top_{k}_test_accuracy_fixed_draw"] for side in ("sae", "llm"))
        assert sae == llm
    assert result.corrected["sae_top_1_minus_llm_top_1"] == 0.0 and result.stderrs == {}  # of four classes
    assert result.metrics["sae"]["sae_top_2_test_accuracy"] != result.metrics["llm"]["llm_top_2_test_accuracy"]


def test_a_dead_sae_is_reported(tmp_path):
    """Fails if a dead SAE's .5 passes for a result, or if a living one beside it is accused."""
    saes = {"dead": SimpleNamespace(encode=lambda x: torch.zeros(*x.shape[:-1], 8)), "alive": random_sae(1)}
    results = sparse_probing.run(make_setup(tmp_path), saes)
    dead = results["dead"].metrics["sae"]
    assert dead["sae_top_1_test_accuracy"] == 0.5 == dead["sae_test_accuracy"]
    assert [p for p in results["dead"].problems if "probing at chance" in p] and not results["alive"].problems


def test_non_finite_features_give_no_number_but_a_reason(tmp_path):
    """Fails if NaN reaches scikit-learn (it raises), or if a mean is over the data sets that happen to be finite."""
    def encode(x):
        return torch.where(x[..., :1] > 5.0, torch.nan, x.float())  # NaN on MARK, which only one data set holds

    data = {"clean": texts(("x", "y")), "dirty": texts()}
    result = sparse_probing.run(make_setup(tmp_path, data), {"sae": SimpleNamespace(encode=encode)})["sae"]
    assert set(result.metrics["sae"].values()) == {None} and result.corrected["sae_top_1_minus_llm_top_1"] is None
    assert result.metrics["llm"]["llm_test_accuracy"] > 0.5 and result.details[0]["sae_top_1_test_accuracy"] is not None
    assert len(result.problems) == 1 and "dirty: NaN or inf in the features of 36 of 108 texts" in result.problems[0]


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path):
    """Fails as scarce.check_every_batch says."""
    scarce.check_every_batch(sparse_probing.run, make_setup(tmp_path), random_sae(1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["residual", "encode"])
def test_two_calls_that_run_out_of_memory_lose_nothing(tmp_path, method):
    """Fails as scarce.check_two_calls says."""
    scarce.check_two_calls(sparse_probing.run, make_setup(tmp_path), random_sae(1), method)


def test_features_that_do_not_fit_stay_in_host_memory():
    """Fails if the features of all texts must fit on the GPU, or if that is said twice."""
    said, x_NF = [], SimpleNamespace(to=scarce.full)
    setup = scarce.small_setup(said)
    setup.lm = SimpleNamespace(device="cuda")
    assert [sparse_probing._placed(setup, x_NF) for _ in range(2)] == [x_NF, x_NF] and len(said) == 1


def test_requirements_name_the_setting():
    """Fails if a k without a key in SAEBench's schema, or a context without room for text, is let through."""
    config = sparse_probing.CONFIG["embedded"]
    assert sparse_probing.requirements(config, {}) == []
    assert "k_values" in sparse_probing.requirements(config | {"k_values": [1, 3]}, {})[0]
    assert "context_length" in sparse_probing.requirements(config | {"context_length": 1}, {})[0]
