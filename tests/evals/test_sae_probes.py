"""sae_probes against plain references of the protocol, on a fake language model with the documented interface."""

import dataclasses
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evals import Setup, declared, sae_probes
from evals.cache import Cache
from evals.sae_probes import sets as data_sets
from evals.texts.source import Source
from tests.evals import scarce

BOS, MARK, VOCABULARY, D = 0, 3, 40, 6  # MARK is the last token of the prompts of one class


class FakeLM:
    """Causal: a position holds its token's vector and a hundredth of all before it. Texts are token ids or words."""

    name, digest, device, d_model, vocab_size, bos, special_ids = "fake", "d1", "cpu", D, VOCABULARY, BOS, {BOS}

    def __init__(self):
        self.table_VD = torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(5))
        self.table_VD[:, 0] = 0.0
        self.table_VD[MARK, 0] = 9.0
        self.rows = 0

    @staticmethod
    def tokenizer(texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(t) for t in text.split()] if text.replace(" ", "").isdigit() else
                              [4 + b % (VOCABULARY - 4) for b in text.encode()] for text in texts]}

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        x_BTD = self.table_VD[tokens_BT]
        return x_BTD + 0.01 * (x_BTD.cumsum(1) - x_BTD)


def marked(n=240, repeated=0, seed=0):
    """n prompts, those of label 1 ending in MARK; the last `repeated` repeat the first."""
    rng = np.random.default_rng(seed)
    rows = [(" ".join(map(str, [*rng.integers(4, VOCABULARY, rng.integers(2, 9)), *[MARK] * (i % 2)])), i % 2)
            for i in range(n)]
    return rows[: n - repeated] + rows[:repeated]


def make_setup(tmp_path, monkeypatch, sets, lm=None, seed=0, **config):
    monkeypatch.setattr(data_sets, "read", lambda source, config: sets)
    config = sae_probes.CONFIG["tiny"] | {"dataset_names": list(sets)} | config
    return Setup(lm or FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, 1.0),
                 SimpleNamespace(kind="tiny"), seed, lambda s: None)


def random_sae(features=9):
    """ReLU features; number 4 reads the direction that only MARK has."""
    W_DF = torch.randn(D, features, generator=torch.Generator().manual_seed(1))
    W_DF[:, 4] = 0.0
    W_DF[0, 4] = 1.0
    return SimpleNamespace(encode=lambda x: torch.relu(x.float() @ W_DF - 0.2))


# ------------------------------------------------------------------------------------------------ rows and features


def test_split_repeats_the_reference_stream():
    """Fails if a draw is left out, in another order or from another pool, or a side has another size or balance."""
    for n, seed in ((240, 3), (305, 4), (2400, 5)):
        # the odd row of 305 is a positive one
        label_N = torch.from_numpy(1 - np.random.default_rng(seed).permutation(n) % 2)
        positive, negative = np.where(label_N == 1)[0], np.where(label_N == 0)[0]
        n_train = min(n - 100, 1024)
        n_test = n - n_train - 1
        rng = np.random.RandomState(seed)
        train_1 = rng.choice(positive, math.ceil(n_train / 2), replace=False)
        train_0 = rng.choice(negative, n_train - len(train_1), replace=False)
        test_1 = rng.choice(sorted({*positive} - {*train_1}), math.ceil(n_test / 2), replace=False)
        test_0 = rng.choice(sorted({*negative} - {*train_0}), n_test - len(test_1), replace=False)
        train, test = rng.permutation([*train_1, *train_0]), rng.permutation([*test_1, *test_0])
        got = sae_probes.split(torch.arange(n) + 7, label_N, seed)
        assert got.train_M.tolist() == (train + 7).tolist() and got.test_M.tolist() == (test + 7).tolist()
        assert torch.equal(got.train_label_M, label_N[train]) and torch.equal(got.test_label_M, label_N[test])
        assert got.new_M.all()


def test_selection_normalises_and_the_probe_does_not(tmp_path, monkeypatch):
    """Fails if the selection is by plain means (1 would win) or with zeros (2 would), or the probe gets its values."""
    z_MF = torch.tensor([[2.0, 90.0, 0.0], [2.0, 110.0, 0.0], [2.0, 100.0, 0.0], [0.0, 70.0, 0.0], [0.0, 80.0, 0.0],
                         [2.0, 90.0, 5.0]])
    label_M = torch.tensor([1, 1, 1, 0, 0, 0])
    # mean over positives − negatives: 4/3, 20, −5/3; mean of what is not 0: 2, 90, 5; quotients .667, .222, −.333
    assert sae_probes.by_normalised_difference(z_MF, label_M).tolist() == [0, 2, 1]

    setup = make_setup(tmp_path, monkeypatch, {"a": marked()})
    _, sets, rows, length_U = data_sets.prompts(setup)
    x_UD = data_sets.last_tokens(setup, rows, length_U)
    part, sae = sae_probes.split(*sets["a"], 0), random_sae()
    feature_k, train_Mk, test_Mk = sae_probes.sparse_features(setup, sae, x_UD, part)
    assert feature_k[0] == 4
    assert torch.equal(train_Mk, sae.encode(x_UD[part.train_M])[:, feature_k])
    assert torch.equal(test_Mk, sae.encode(x_UD[part.test_M])[:, feature_k])


def test_a_prompt_is_its_last_tokens_and_passes_the_model_once(tmp_path, monkeypatch):
    """Fails if prompts are cut on the right, BOS is lost, padding read, or equal prompts of two sets computed twice."""
    long = " ".join(str(i) for i in range(4, 30))
    sets = {"a": [("5 6", 1), (long, 0), ("9", 1)], "b": [("5 6", 0), (long, 1), ("9 9 9", 0), ("9", 1)]}
    lm = FakeLM()
    setup = make_setup(tmp_path, monkeypatch, sets, lm, max_tokens=8, llm_batch_size=1)
    _, places, rows, length_U = data_sets.prompts(setup)
    x_UD = data_sets.last_tokens(setup, rows, length_U)
    assert lm.rows == len(x_UD) == 4
    for name, written in sets.items():
        for (text, label), place, stored in zip(written, *places[name]):
            ids = [BOS, *[int(t) for t in text.split()][-7:]]
            expected_D = lm.table_VD[ids[-1]] + 0.01 * lm.table_VD[ids[:-1]].sum(0)
            torch.testing.assert_close(x_UD[place], expected_D)
            assert stored == label
    data_sets.last_tokens(setup, *data_sets.prompts(setup)[2:])
    assert lm.rows == 4, "the second call took something from the LM"


class Layered(FakeLM):
    """Its residuals grow with the layer."""

    def residual(self, tokens_BT, layer):
        return super().residual(tokens_BT, layer) * (1 + layer)

    def residual_of(self, tokens_BT, layers):
        x_BTD = super().residual(tokens_BT, 0)
        return {layer: x_BTD * (1 + layer) for layer in layers}


@pytest.mark.parametrize("limit_gb, passes", [(1.0, [1, 1, 1]), (0.0, [1, 2, 3])])
def test_one_pass_serves_all_layers_of_a_run(tmp_path, monkeypatch, limit_gb, passes):
    """Fails if a layer passes again, gets another's residuals, or others are made where they cannot be kept."""
    lm, sets = Layered(), {"a": marked(130)}
    alone = []
    for layer in (3, 1, 5):
        setup = make_setup(tmp_path / f"alone {layer}", monkeypatch, sets, Layered())
        setup = dataclasses.replace(setup, layer=layer)
        alone.append(data_sets.last_tokens(setup, *data_sets.prompts(setup)[2:]))
    setup = make_setup(tmp_path / "together", monkeypatch, sets, lm)
    setup = dataclasses.replace(setup, cache=Cache(tmp_path / "together", limit_gb), layers=(1, 3, 5))
    for layer, expected_UD, number in zip((3, 1, 5), alone, passes):
        setup = dataclasses.replace(setup, layer=layer)
        assert torch.equal(data_sets.last_tokens(setup, *data_sets.prompts(setup)[2:]), expected_UD)
        assert lm.rows == number * len(expected_UD)
    assert not torch.equal(alone[0], alone[1])


def test_reduced_rows_are_balanced_and_fixed():
    """Fails if the cut is not half of each label, changes between calls, or disturbs the order."""
    rows = [(f"{i}", int(i % 3 == 0)) for i in range(300)]
    cut = data_sets.reduced("a", rows, 120)
    assert sum(label for _, label in cut) == 60 == len(cut) / 2
    assert cut == data_sets.reduced("a", rows, 120) != data_sets.reduced("b", rows, 120)
    numbers = [int(text) for text, _ in cut]
    assert numbers == sorted(numbers)
    assert data_sets.reduced("a", rows, 300) == rows
    assert data_sets.labelled([("x", "yes"), ("y", "no")]) == [("x", 1), ("y", 0)]


# ------------------------------------------------------------------------------------------------ probes


@pytest.mark.parametrize("n", [8, 12, 13, 127, 128, 640])
def test_folds_by_number_of_rows(n):
    """Fails if a regime begins at another number of rows, or if rows to check are drawn differently."""
    label_M = np.arange(n) % 2
    got = [(fit.tolist(), check.tolist()) for fit, check in sae_probes.folds(label_M, 42)]
    if n <= 12:
        expected = {(a, b) for a in range(n) for b in range(a + 1, n) if label_M[a] != label_M[b]}
        assert {tuple(check) for _, check in got} == expected and len(got) == len(expected)
    elif n < 128:
        assert len(got) == 6 and sorted(i for _, check in got for i in check) == list(range(n))
        assert got != [(fit.tolist(), check.tolist()) for fit, check in sae_probes.folds(label_M, 43)]
    else:
        held = min(int(0.2 * n), 100)
        assert got == [(list(range(n - held)), list(range(n - held, n)))]
    assert all(sorted(fit + check) == list(range(n)) for fit, check in got)


def reference_fit(x_MF, label_M, penalty, seed):
    """The protocol from 128 rows on in scikit-learn's calls: all ten C, the first of the best, on shuffled rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    def model(C):
        before = tuple(map(int, version("scikit-learn").split(".")[:2])) < (1, 8)
        named = {"penalty": "l1"} if before else {"l1_ratio": 1}
        kind = {"solver": "saga"} | named if penalty == "l1" else {}
        return LogisticRegression(C=C, random_state=seed, max_iter=1000, **kind)

    cut, scores = len(x_MF) - min(int(0.2 * len(x_MF)), 100), []
    for e in np.linspace(5, -5, 10):
        fitted = model(10.0**e).fit(x_MF[:cut], label_M[:cut])
        scores.append(roc_auc_score(label_M[cut:], fitted.predict_proba(x_MF[cut:])[:, 1]))
    order = np.random.RandomState(seed).permutation(len(x_MF))
    C = np.logspace(5, -5, 10)[int(np.argmax(scores))]
    return model(C).fit(x_MF[order], label_M[order])


@pytest.mark.parametrize("penalty", ["l1", "l2"])
# every C is as good; a later one is best; the classes are apart
@pytest.mark.parametrize("gap, columns", [(0.7, 1), (3.0, 40), (9.0, 4)])
def test_fit_repeats_the_reference(penalty, gap, columns):
    """Fails for another penalty, solver, grid of C, choice among equals, shuffle or seed, or if the end comes early."""
    rng = np.random.default_rng(8)
    label_M = rng.permutation(160) % 2
    x_MF = rng.normal(size=(160, columns))
    x_MF[:, 0] += gap * label_M
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, got = reference_fit(x_MF, label_M, penalty, 3), sae_probes.fit(x_MF, label_M, penalty, 3)
    assert got.C == expected.C and (got.C < 1e5) == (columns == 40)
    np.testing.assert_array_equal(got.coef_, expected.coef_)
    np.testing.assert_array_equal(got.intercept_, expected.intercept_)


def test_scores_by_hand(monkeypatch):
    """Fails for another accuracy, AUC or F1, or if deduplicated scores use repeated prompts or count rows."""
    probability_M = np.array([0.9, 0.45, 0.4, 0.7, 0.6, 0.2])
    model = SimpleNamespace(predict=lambda x: (probability_M > 0.5).astype(int),
                            predict_proba=lambda x: np.stack([1 - probability_M, probability_M], 1))
    monkeypatch.setattr(sae_probes, "fit", lambda *arguments: model)
    label_M, blank = torch.tensor([1, 1, 1, 1, 0, 0]), torch.zeros(6, 1)
    new_M = torch.tensor([True, False, True, True, True, True])
    part = sae_probes.Split(label_M, label_M, label_M, label_M, new_M)
    values = sae_probes.score(part, blank, blank, "l1", 0)
    # two of four and one of two right; of 8 pairs (.45, .6) and (.4, .6) are the wrong way round; F1 is 4/7 and 2/5
    assert values == pytest.approx({"test_accuracy": 3 / 6, "test_auc": 6 / 8, "test_f1": (4 * 4 / 7 + 2 * 2 / 5) / 6})
    monkeypatch.setattr(sae_probes, "FEWEST_DISTINCT", 2)
    values = sae_probes.score(part, blank, blank, "l1", 0)
    # without the second row: two of three positives and one of two negatives are right; 5 of 6 pairs
    assert values["test_accuracy_deduplicated"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert values["test_auc_deduplicated"] == pytest.approx(5 / 6)


# ------------------------------------------------------------------------------------------------ the eval


def test_a_planted_feature_is_found_and_scores_depend_on_nothing_else(tmp_path, monkeypatch):
    """Fails if labels, rows or columns are mixed up before the probe, or if the cache or another SAE shifts a score."""
    sets = {"a": marked(repeated=40), "b": marked(230, seed=1)}
    setup = make_setup(tmp_path, monkeypatch, sets, ks=[1, 5])
    alone = sae_probes.run(setup, {"one": random_sae()})["one"]
    assert alone.metrics["sae"]["sae_top_1_test_accuracy"] == alone.metrics["sae"]["sae_top_1_test_auc"] == 1.0
    assert alone.metrics["sae"]["sae_top_2_test_accuracy"] is None and not alone.problems
    assert all(values["sae_features"][0] == 4 and values["train_rows"] == n - 100 and values["test_rows"] == 99
               for values, n in zip(alone.unstructured.values(), (240, 230)))
    measured = ("llm", "sae_top_1", "sae_top_5")
    expected = {metric for metric in declared("sae_probes", "METRICS")
                if "deduplicated" not in metric or "minus" in metric or metric.split("_test")[0] in measured}
    assert {*alone.metrics["llm"], *alone.metrics["sae"], *alone.corrected} == expected
    setup = make_setup(tmp_path, monkeypatch, sets, ks=[1, 5])
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    cached = sae_probes.run(setup, {"other": random_sae(30), "one": random_sae()})["one"]
    assert cached == alone and setup.lm.rows == 0 and setup.cache.misses == []
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]


def test_the_seed_splits_the_rows(tmp_path, monkeypatch):
    """Fails if another seed takes this one's baseline or split, or passes prompts through the model again."""
    sets = {"noise": [(text, i // 2 % 2) for i, (text, _) in enumerate(marked())]}
    scores = []
    for seed, folder in ((0, "a"), (1, "a"), (1, "b")):
        setup = make_setup(tmp_path / folder, monkeypatch, sets, seed=seed, ks=[1])
        scores.append(sae_probes.run(setup, {"sae": random_sae()})["sae"])
        assert (setup.lm.rows == 0) == (len(scores) == 2)
    assert scores[1] == scores[2]
    assert scores[1].metrics["llm"]["llm_test_auc"] != scores[0].metrics["llm"]["llm_test_auc"]


@pytest.mark.slow
def test_means_and_errors_are_over_data_sets(tmp_path, monkeypatch):
    """Fails if rows are pooled, the difference is not paired, the error is not s/√n, or repetitions are miscounted."""
    sets = {"a": marked(repeated=60)} | {name: marked(n, seed=i)
                                         for i, (name, n) in enumerate(dict(b=230, c=236, d=232, e=234).items(), 1)}
    sae = SimpleNamespace(encode=lambda x: torch.relu(x[:, 1:].float()))  # does not read MARK's direction
    result = sae_probes.run(make_setup(tmp_path, monkeypatch, sets), {"sae": sae})["sae"]
    per_set = [d["sae_top_2_test_auc"] for d in result.details]
    assert [d["sae_metrics_by_k"][2]["test_auc"] for d in result.details] == per_set and len(set(per_set)) > 3
    assert result.metrics["sae"]["sae_top_2_test_auc"] == pytest.approx(np.mean(per_set))
    assert result.stderrs["sae_top_2_test_auc"] == pytest.approx(np.std(per_set, ddof=1) / math.sqrt(5))
    difference = [v["sae_top_1_test_auc_deduplicated"] - v["llm_test_auc_deduplicated"]
                  for v in result.unstructured.values()]
    metric = "sae_top_1_minus_llm_test_auc_deduplicated"
    assert result.corrected[metric] == pytest.approx(np.mean(difference))
    assert result.stderrs[metric] == pytest.approx(np.std(difference, ddof=1) / math.sqrt(5))
    del sets["e"]
    of_four = sae_probes.run(make_setup(tmp_path, monkeypatch, sets), {"sae": sae})["sae"]
    assert of_four.stderrs == {}
    shares = [v["duplicated_test_share"] for v in result.unstructured.values()]
    texts, part = [text for text, _ in sets["a"]], sae_probes.split(torch.arange(240), torch.arange(240) % 2, 0)
    trained = {texts[i] for i in part.train_M}
    assert shares[0] == pytest.approx(np.mean([texts[i] in trained for i in part.test_M])) and shares[0] > 0.2
    assert result.corrected["duplicated_test_share"] == pytest.approx(np.mean(shares))


def test_a_dead_sae_is_reported(tmp_path, monkeypatch):
    """Fails if constant features crash the probe, or if a dead SAE's .5 passes for a result."""
    saes = {"dead": SimpleNamespace(encode=lambda x: torch.zeros(len(x), 8)), "alive": random_sae()}
    results = sae_probes.run(make_setup(tmp_path, monkeypatch, {"a": marked()}), saes)
    assert results["dead"].metrics["sae"]["sae_top_1_test_auc"] == 0.5
    assert [p for p in results["dead"].problems if "probing at chance" in p] and not results["alive"].problems


def test_non_finite_features_give_no_number_but_a_reason(tmp_path, monkeypatch):
    """Fails if NaN reaches scikit-learn (it raises), or if a mean is over the data sets that happen to be finite."""
    sae = SimpleNamespace(encode=lambda x: torch.where(x[:, :1] > 5.0, torch.nan, x.float()))  # NaN on MARK
    clean = [(f"{4 + i % 2} {4 + i // 36} {4 + i % 36}", i % 2) for i in range(240)]
    result = sae_probes.run(make_setup(tmp_path, monkeypatch, {"clean": clean, "dirty": marked()}), {"sae": sae})["sae"]
    assert set(result.metrics["sae"].values()) == {None} and result.corrected["sae_top_1_test_auc_deduplicated"] is None
    assert result.metrics["llm"]["llm_test_accuracy"] > 0.5 and result.details[0]["sae_top_1_test_auc"] is not None
    assert "dirty: NaN or inf in the features" in result.problems[0] and "sae_top_1_test_accuracy" in result.problems[1]


def test_a_data_set_that_cannot_be_split_or_deduplicated_is_named(tmp_path, monkeypatch):
    """Fails if one class too small, or a test set without new prompts, ends in an exception or a mean over the rest."""
    one_class = [(text, int(i < 3)) for i, (text, _) in enumerate(marked())]
    result = sae_probes.run(make_setup(tmp_path / "a", monkeypatch, {"good": marked(), "bad": one_class}),
                            {"sae": random_sae()})["sae"]
    assert {*result.metrics["sae"].values(), *result.metrics["llm"].values(), *result.corrected.values()} == {None}
    assert "bad: 3 positive and 237 negative rows" in result.problems[0] and "llm_test_accuracy" in result.problems[1]

    repeated = marked(60) * 4  # hardly a test prompt does not stand in train
    result = sae_probes.run(make_setup(tmp_path / "b", monkeypatch, {"a": repeated}), {"sae": random_sae()})["sae"]
    assert result.metrics["sae"]["sae_top_1_test_auc"] == 1.0
    assert result.corrected["sae_top_1_test_auc_deduplicated"] is None
    assert "test prompts of each class that do not stand in train" in result.problems[0]
    both = sae_probes.run(make_setup(tmp_path / "c", monkeypatch, {"a": repeated, "b": marked()}),
                          {"sae": random_sae()})["sae"]
    assert both.corrected["sae_top_1_test_auc_deduplicated"] == 1.0 and not both.problems


def test_the_tiny_profile_runs(tmp_path):
    """Fails if the tiny data sets lack repeated prompts or balance, or do not fit the protocol."""
    source = Source("tiny", cache_dir=tmp_path)
    for rows in data_sets.read(source, sae_probes.CONFIG["tiny"]).values():
        texts, labels = zip(*rows)
        assert sum(labels) == len(rows) / 2 and len(set(texts)) == len(rows) - data_sets.REPEATED
    setup = Setup(FakeLM(), 3, "blocks.3.hook_resid_post", sae_probes.CONFIG["tiny"], None, "", Cache(tmp_path, 1.0),
                  source, 0, lambda s: None)
    result = sae_probes.run(setup, {"sae": random_sae()})["sae"]
    assert not result.problems and len(result.details) == len(data_sets.TINY)
    assert result.corrected["duplicated_test_share"] > 0


def test_wheel_members_are_read_as_data(tmp_path, monkeypatch):
    """Fails if a compressed member is not found, quoted line breaks are lost, or targets are not in their order."""
    import zipfile

    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(b'Unnamed: 0,prompt,target\n0,"a, ""b""\r\nc",Republican\n1,d,Democratic\n')
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("sae_probes/data/cleaned_data/95_toxic_is.csv.zst", sink.getvalue().to_pybytes())
    monkeypatch.setattr(data_sets.embedded, "fetch", lambda *arguments: Path(tmp_path / "w.whl"))
    config = sae_probes.CONFIG["gemma"] | {"dataset_names": ["95_toxic_is"]}
    for kind in ("hub", "embedded"):
        assert data_sets.read(SimpleNamespace(kind=kind, cache_dir=tmp_path, data_dir=None), config) == {
            "95_toxic_is": [('a, "b"\r\nc', 1), ("d", 0)]}


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path, monkeypatch):
    """Fails as scarce.check_every_batch says."""
    setup = make_setup(tmp_path, monkeypatch, {"21_headline_istrump": marked()}, ks=[1, 2])
    scarce.check_every_batch(sae_probes.run, setup, random_sae())


def test_requirements_name_the_setting():
    """Fails if an unknown data set, a k without a key in SAEBench's schema or too few rows or tokens pass."""
    assert len(set(data_sets.NAMES)) == 113
    for profile, kind in (("gemma", "hub"), ("embedded", "embedded"), ("tiny", "tiny")):
        assert sae_probes.requirements(sae_probes.CONFIG[profile], {"source": kind}) == []
    for setting, value in (("dataset_names", ["92_glue_sst"]), ("ks", [3]), ("max_rows", 103), ("max_tokens", 1)):
        (problem,) = sae_probes.requirements(sae_probes.CONFIG["gemma"] | {setting: value}, {"source": "hub"})
        assert str(value if setting != "dataset_names" else "92_glue_sst2") in problem
