"""scr and tpp: probes, effects and closed-form ablations against plain slow references, scores by hand,
runs on a fake language model.
"""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn import functional

from evals import Setup, declared, scr, tpp
from evals.cache import Cache
from evals.common import concept_probes, pooling, probes
from evals.common.concept_probes import Ablation
from evals.scr import pairs
from evals.texts import tiny
from evals.texts.source import Source

BOS, EOS, PAD = 0, 1, 2
D = 12
PROBE = {"probe_train_batch_size": 16, "probe_epochs": 20, "probe_lr": 1e-3, "probe_l1_penalty": 1e-3}


@pytest.fixture(autouse=True)
def one_thread():
    with probes.one_thread():
        yield


WORDS = sorted({word for nouns, verbs, places in tiny.TOPICS.values() for phrase in (*nouns, *verbs, *places)
                for word in phrase.split()} | {*tiny.ADJECTIVES, "The", "A", "This", "Every"})


class FakeLM:
    """Words have vectors and a position a hundredth of what came before.
    Channels 0 to 3 know the topic, 4 the half of the adjectives.
    """

    name, digest, device, d_model, bos, special_ids = "fake", "d1", "cpu", D, BOS, {BOS, EOS, PAD}

    def __init__(self):
        self.table_VD = torch.randn(len(WORDS) + 3, D, generator=torch.Generator().manual_seed(5)) * 0.3
        self.table_VD[3:, :5] = 0.0
        for t, (nouns, _, _) in enumerate(tiny.TOPICS.values()):
            for noun in nouns:
                self.table_VD[WORDS.index(noun) + 3, t] = 6.0
        for a, adjective in enumerate(tiny.ADJECTIVES):
            self.table_VD[WORDS.index(adjective) + 3, 4] = 9.0 if a < 4 else -9.0
        self.rows = 0

    def tokenizer(self, texts, add_special_tokens, truncation, max_length):
        assert not add_special_tokens and truncation
        return {"input_ids": [[WORDS.index(word) + 3 for word in text.replace(".", "").split()][:max_length]
                              for text in texts]}

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        x_BTD = self.table_VD[tokens_BT]
        return x_BTD + 0.01 * (x_BTD.cumsum(1) - x_BTD)


def channels():
    """An SAE whose features are the channels' positive and negative parts: what it does is known."""
    signs_DF = torch.cat([torch.eye(D), -torch.eye(D)], dim=1)
    return SimpleNamespace(encode=lambda x: torch.relu(x.float() @ signs_DF), W_dec=signs_DF.T)


def random_sae(seed, features=30):
    g = torch.Generator().manual_seed(seed)
    W_DF, b_F = torch.randn(D, features, generator=g), torch.randn(features, generator=g)  # half of encode(0) is not 0
    return SimpleNamespace(encode=lambda x: torch.relu(x.float() @ W_DF + b_F),
                           W_dec=functional.normalize(torch.randn(features, D, generator=g), dim=1))


def make_setup(tmp_path, module, limit_gb=1.0, seed=0, **config):
    config = {**module.CONFIG["tiny"], "llm_batch_size": 7, "sae_batch_size": 5, **config}
    return Setup(FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, limit_gb), Source("tiny"),
                 seed, lambda s: None)


# ------------------------------------------------------------------------------------------------ probes


def reference_probe(x_ND, fit, select, seed):
    """SAEBench's probe from the protocol, alone and by autograd: (weight_D, epoch, best accuracy)."""
    rng = torch.Generator().manual_seed(seed)
    weight_D = torch.empty(1, x_ND.shape[1])
    torch.nn.init.kaiming_uniform_(weight_D, a=math.sqrt(5), generator=rng)
    bias = torch.empty(1).uniform_(-1 / math.sqrt(x_ND.shape[1]), 1 / math.sqrt(x_ND.shape[1]), generator=rng)
    probe = torch.nn.Linear(x_ND.shape[1], 1)
    probe.load_state_dict({"weight": weight_D, "bias": bias})
    adam, (row_M, label_M), best = torch.optim.AdamW(probe.parameters(), lr=1e-3), fit, (None, -1, 0.0)
    for epoch in range(20):
        for index in torch.randperm(len(row_M), generator=rng).split(16):
            loss = functional.binary_cross_entropy_with_logits(probe(x_ND[row_M[index]])[:, 0], label_M[index].float())
            adam.zero_grad()
            (loss + 1e-3 * probe.weight.abs().sum()).backward()
            adam.step()
        accuracy = ((probe(x_ND[select[0]])[:, 0] > 0) == (select[1] == 1)).float().mean().item()
        if accuracy > best[2]:
            best = (probe.weight.detach().clone()[0], epoch, accuracy)
    return best


def test_probes_trained_together_are_the_probes_trained_alone():
    """Fails for another initialisation, optimiser, penalty, row order or choice of epoch,
    or if stacked probes touch each other.
    """
    g = torch.Generator().manual_seed(0)
    x_ND = torch.randn(160, D, generator=g)
    fits, selects = [], []
    for p in range(4):
        row_M, label_N = torch.randperm(160, generator=g), (x_ND[:, p] + torch.randn(160, generator=g) > 0).long()
        fits.append((row_M[:90], label_N[row_M[:90]]))  # the last batch of an epoch has 10 rows
        selects.append((row_M[90:], label_N[row_M[90:]]))
    together = concept_probes.fit(x_ND, fits, selects, [torch.Generator().manual_seed(s) for s in range(4)], PROBE)
    alone = [reference_probe(x_ND, fits[s], selects[s], s) for s in range(4)]
    assert together.epoch_P.tolist() == [epoch for _, epoch, _ in alone] and len(set(together.epoch_P.tolist())) > 1
    torch.testing.assert_close(together.weight_PD, torch.stack([weight_D for weight_D, _, _ in alone]), atol=1e-6,
                               rtol=1e-5)


def test_corrected_probes_see_no_test_row(tmp_path):
    """Fails if a test row chooses the corrected probes' epoch,
    or if the compatible ones' is not chosen by the test rows.
    """
    x_ND = torch.randn(120, D, generator=torch.Generator().manual_seed(1))
    label_N = (x_ND[:, 0] + torch.randn(120, generator=torch.Generator().manual_seed(2)) > 0).long()

    def trained(flip):
        def examples(name, rng):
            return tuple((row_M, label_N[row_M] ^ swap)
                         for row_M, swap in ((torch.arange(80), 0), (torch.arange(80, 120), flip)))
        return concept_probes.trained(make_setup(tmp_path, tpp), "set", ["a", "b"], examples, x_ND)

    plain, flipped = trained(0), trained(1)
    assert torch.equal(plain["corrected"].weight_PD, flipped["corrected"].weight_PD)
    assert not torch.equal(plain["compatible"].weight_PD, flipped["compatible"].weight_PD)


# ------------------------------------------------------------------------------------------------ effects and ablation


@pytest.mark.parametrize("kind", ["compatible", "corrected"])
def test_closed_form_is_the_ablation_of_every_token(tmp_path, kind):
    """Fails if what features add at masked positions is dropped from the compatible ablation
    or enters the corrected one.
    """
    sae, setup = random_sae(3), make_setup(tmp_path, tpp)
    sets = pooling.labelled(setup)
    (texts,) = concept_probes.pooled(setup, {"sae": sae}, "tpp", sets, {"sae": []})
    found = concept_probes.Probes(torch.randn(2, D, generator=torch.Generator().manual_seed(4)),
                                  torch.tensor([0.3, -0.2]), torch.zeros(2))
    ablation = concept_probes.ablations({"compatible": found, "corrected": found}, texts, "sae", sae)[kind]
    selected_n, row_m = torch.tensor([7, 2, 21, 11]), torch.tensor([5, 40, 2])

    ((tokens_NT, length_N, _),) = sets.values()
    for row, logit_P in zip(row_m, ablation.logits(row_m, selected_n)):
        tokens_1T = tokens_NT[row][None]
        real_T = (torch.arange(tokens_1T.shape[1]) < length_N[row]) & (tokens_1T[0] > PAD)
        x_TD = FakeLM().residual(tokens_1T, 3)[0] * real_T[:, None]
        changed_TD = x_TD - sae.encode(x_TD)[:, selected_n] @ sae.W_dec[selected_n]
        if kind == "corrected":
            changed_TD = changed_TD * real_T[:, None]
        pooled_D = changed_TD.sum(0) / real_T.sum()
        torch.testing.assert_close(logit_P, found.weight_PD @ pooled_D + found.bias_P, atol=1e-4, rtol=1e-4)
    assert not real_T[1:].all(), "no text is padded: the two kinds would be the same"


def test_effects_by_hand():
    """Fails if a mean is taken over all rows, or if features without effect are ablated to make up the number."""
    z_NF = torch.tensor([[4.0, 0.0, 1.0], [2.0, 0.0, 1.0], [1.0, 0.0, 3.0], [9.0, 9.0, 9.0]])
    ablation = Ablation(torch.zeros(4, 1), torch.ones(3, 1), z_NF, torch.zeros(3), torch.zeros(4))
    effect_PF = ablation.effects([(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 1]))])
    assert effect_PF.tolist() == [[2.0, 0.0, -2.0]]
    assert concept_probes.strongest(effect_PF[0].abs(), 3).sort().values.tolist() == [0, 2]
    assert concept_probes.strongest(torch.tensor([0.5, 3.0, 2.0, 1.0]), 2).tolist() == [1, 2]
    assert len(concept_probes.strongest(torch.zeros(3), 2)) == 0


# ------------------------------------------------------------------------------------------------ scores


def measured(clean1, before1, after1, clean2, before2, after2):
    return {"dir1": {"clean": clean1, "before": before1, "after": {10: after1}},
            "dir2": {"clean": clean2, "before": before2, "after": {10: after2}}}


def test_scr_scores_by_hand():
    """Fails for another direction, denominator, bound or treatment of ties than the protocol's
    (compatible) or the header's (corrected).
    """
    def scores(*accuracies):
        return scr._scores(measured(*accuracies), measured(*accuracies))

    got = scores(0.9, 0.6, 0.75, 0.95, 0.85, 0.80)
    assert [got[f"scr_{part}_threshold_10"] for part in ("dir1", "dir2", "metric")] == pytest.approx([0.5, -0.5, 0.5])
    got = scores(0.9, 0.8, 0.9, 0.95, 0.7, 0.05)  # direction 2 is worse before; its score is −2.6
    assert got["scr_metric_threshold_10"] == pytest.approx(-2.6) and got["scr_metric_threshold_10_corrected"] == -1.0
    got = scores(0.9, 0.7, 0.8, 0.8, 0.7, 0.8)  # a tie
    assert "scr_metric_threshold_10" not in got and got["scr_metric_threshold_10_corrected"] == pytest.approx(0.5)
    got = scores(0.60, 0.60, 0.7, 0.9, 0.8, 0.85)  # worse in direction 1, where nothing can be gained
    assert got["scr_metric_threshold_10"] == 0.0 == got["scr_dir1_threshold_10"]
    assert got["scr_metric_threshold_10_corrected"] == pytest.approx(0.5)
    assert "scr_metric_threshold_10_corrected" not in scores(0.6, 0.6, 0.7, 0.7, 0.8, 0.7)


def test_tpp_scores_by_hand():
    """Fails if intended and unintended are exchanged, others' losses are summed,
    or a feature that speaks against a class is ablated.
    """
    rows = {split: {name: torch.arange(8) + 8 * c + 24 * s for c, name in enumerate("abc")}
            for s, split in enumerate(("train", "test"))}
    class_N = torch.arange(48) // 8 % 3
    # a class each, and "b or c"
    z_NF = torch.cat([functional.one_hot(class_N, 3).float(), (class_N > 0).float()[:, None]], dim=1)
    # c's feature serves a's probe as well; "b or c" serves b's and speaks against a and c, more strongly than a's own
    # feature for a
    dot_FP = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 2.0], [-5.0, 3.0, -4.0]])
    logit_NP = 2 * z_NF[:, :3] - 1
    logit_NP[class_N == 2, 0] = 1.0  # a's probe takes the texts of c for its own, until c's feature is ablated
    setup = SimpleNamespace(seed=0, config={"n_values": [1, 4, 20]})
    texts = concept_probes.Texts("set", rows, None, None, {})
    ablation = Ablation(logit_NP, dot_FP, z_NF, torch.zeros(4), torch.zeros(48))

    values = tpp._scores(setup, "corrected", texts, lambda name, rng: tpp._examples(rows, name, rng), ablation)
    assert list(values) == [f"tpp_threshold_{n}_{part}" for n in (1, 4)
                            for part in tpp.PARTS], "20 features of 4 were ablated"
    total, intended, unintended = (values[f"tpp_threshold_1_{part}"] for part in tpp.PARTS)
    assert intended == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5})
    # a quarter of a's examples are mended, none of b's
    assert unintended == pytest.approx({"a": 0.0, "b": 0.0, "c": -0.125})
    assert total == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.625})
    for part in tpp.PARTS:
        for name in "ac":  # which have one feature with a positive effect
            assert values[f"tpp_threshold_4_{part}"][name] == values[f"tpp_threshold_1_{part}"][name]


# ------------------------------------------------------------------------------------------------ whole runs


def test_tpp_finds_features_of_single_classes(tmp_path):
    """Fails if rows, classes, probes or features are mixed up on the way from the texts:
    the planted SAE has a feature per topic.
    """
    setup = make_setup(tmp_path, tpp)
    result = tpp.run(setup, {"sae": channels()})["sae"]
    assert not result.problems and set(result.metrics["tpp_metrics"]) | set(result.corrected) == set(declared("tpp", "METRICS"))
    assert result.metrics["tpp_metrics"]["tpp_threshold_2_intended_diff_only"] > 0.3
    assert abs(result.metrics["tpp_metrics"]["tpp_threshold_2_unintended_diff_only"]) < 0.15
    assert result.metrics["tpp_metrics"]["tpp_threshold_50_total_metric"] is None  # of 24 features
    by_hand = [result.unstructured["synthetic"][topic]["tpp_threshold_5_total_metric"] for topic in tiny.TOPICS]
    assert result.metrics["tpp_metrics"]["tpp_threshold_5_total_metric"] == pytest.approx(sum(by_hand) / 4)
    assert result.stderrs == {}  # of four classes


def test_scr_removes_a_planted_attribute(tmp_path, monkeypatch):
    """Fails if the wrong attribute's features are ablated or the wrong one is tested;
    probes that lean on the adjectives are given.
    """
    topic_D, adjective_D = torch.eye(D)[0] - torch.eye(D)[2], torch.eye(D)[4]
    given = {"first": topic_D, "second": adjective_D, "biased": 0.3 * topic_D + adjective_D}

    def trained(setup, key, names, examples, x_ND):
        found = concept_probes.Probes(torch.stack([given[name] for name in names]), torch.zeros(3), torch.zeros(3))
        return {"compatible": found, "corrected": found}

    monkeypatch.setattr(concept_probes, "trained", trained)
    result = scr.run(make_setup(tmp_path, scr), {"sae": channels()})["sae"]
    assert not result.problems and set(result.metrics["scr_metrics"]) | set(result.corrected) == set(declared("scr", "METRICS"))
    for measured in result.unstructured["synthetic_scr_animals_space"]["accuracies"].values():
        assert measured["dir1"]["clean"] == 1.0 > 0.7 > measured["dir1"]["before"] and set(measured["dir1"]["after"].values()) == {1.0}
        assert measured["dir2"]["before"] > 0.9 and set(measured["dir2"]["after"].values()) == {1.0}
    assert result.metrics["scr_metrics"]["scr_metric_threshold_2"] == 1.0 == result.corrected["scr_metric_threshold_10_corrected"]
    assert result.metrics["scr_metrics"]["scr_metric_threshold_100"] is None  # of 24 features
    assert result.stderrs["scr_metric_threshold_2"] == 0.0  # every text is right afterwards, whichever are drawn


def test_scr_errors_are_the_spread_over_new_test_texts():
    """Fails if the error is that between the runs (here equal, so none),
    or if numerator and denominator are not drawn together.
    """
    setup, mixed = SimpleNamespace(seed=0, config={"n_values": [2]}), 20
    rows = {"test": {sign: torch.arange(c * 30, c * 30 + (30 if sign in ("++", "--") else mixed))
                     for c, sign in enumerate(pairs.COMBINATIONS)}}
    texts = concept_probes.Texts("run", rows, torch.zeros(120, 1), None, {})

    def right(rng):
        """Each text right before with .6, after with .75, by the attribute's own probe with .95;
        not independent of each other.
        """
        def of(row_M):
            luck_M = torch.rand(len(row_M), generator=rng)
            return {"before": luck_M < 0.6, "after": {2: luck_M < 0.75}, "clean": (luck_M < 0.95)}
        return {direction: (row_M, of(row_M)) for direction, (row_M, _) in
                {d: scr._labelled(rows["test"], tested) for d, (_, tested) in scr.DIRECTIONS.items()}.items()}

    def scored(right):
        return scr._scores(*[{d: scr._each(of, lambda r: r.double().mean().item())
                              for d, (_, of) in right.items()}] * 2)

    sampled = [right(torch.Generator().manual_seed(seed)) for seed in range(300)]
    for metric in ("scr_dir1_threshold_2", "scr_metric_threshold_2", "scr_metric_threshold_2_corrected"):
        spread = pd.Series([scored(one).get(metric) for one in sampled]).std()
        drawn = [scr._drawn_scores(setup, texts, {"compatible": one, "corrected": one}) for one in sampled[:25]]
        stated = [scr._error(metric, {"run": scores}) for scores in drawn]
        assert pd.Series(stated).mean() == pytest.approx(spread, rel=0.3), metric
    assert scr._drawn_scores(setup, texts._replace(rows={"test": {sign: r[:4] for sign, r in rows["test"].items()}}),
                             sampled[0]) == []


@pytest.mark.parametrize("module", [scr, tpp])
def test_a_score_depends_on_nothing_but_its_inputs(tmp_path, module):
    """Fails if the cache, an SAE beside it or the global random state shifts a score,
    or if anything SAE-independent is done twice.
    """
    alone = module.run(make_setup(tmp_path / "a", module), {"one": random_sae(1)})["one"]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    setup = make_setup(tmp_path / "a", module)
    cached = module.run(setup, {"two": random_sae(2, 40), "one": random_sae(1)})["one"]
    assert setup.lm.rows == 0 and setup.cache.misses == []
    assert alone == cached == module.run(make_setup(tmp_path / "b", module, limit_gb=0), {"one": random_sae(1)})["one"]
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.unstructured != module.run(make_setup(tmp_path / "a", module, seed=1),
                                            {"one": random_sae(1)})["one"].unstructured


@pytest.mark.parametrize("module", [scr, tpp])
def test_what_cannot_be_measured_has_no_number_but_a_reason(tmp_path, module, monkeypatch):
    """Fails if too few texts or non-finite features end the run or give a number,
    or if a dead SAE passes for a measured one.
    """
    nan = SimpleNamespace(encode=lambda x: x.float() / 0.0, W_dec=torch.eye(D))
    dead = SimpleNamespace(encode=lambda x: torch.zeros_like(x.float()), W_dec=torch.eye(D))
    results = module.run(make_setup(tmp_path, module), {"nan": nan, "dead": dead, "good": random_sae(1)})
    (numbers,) = results["nan"].metrics.values()
    assert set(numbers.values()) == {None} and set(results["nan"].corrected.values()) == {None}
    assert "NaN or inf" in results["nan"].problems[0] and "dead SAE" in results["dead"].problems[0] and not results["good"].problems

    monkeypatch.setattr(tiny, "ADJECTIVES", ["old", "old"])
    monkeypatch.setattr(tiny, "TOPICS", {topic: tuple(words[:1] for words in lists)
                                         for topic, lists in tiny.TOPICS.items()})
    few = module.run(make_setup(tmp_path / "few", module), {"sae": random_sae(1)})["sae"]
    assert set(few.corrected.values()) == {None} and "no score" in few.problems[0] and "texts" in few.problems[0]


# ------------------------------------------------------------------------------------------------ texts and settings


def test_scr_sets_have_the_right_combinations():
    """Fails if a set's sides are not balanced over the other attribute,
    or if a text is in two combinations or in train and test.
    """
    ((_, texts),) = pairs.Source(Source("tiny")).probing(scr.CONFIG["tiny"]).items()
    every = [text for splits in texts.values() for side in splits.values() for text in side]
    assert len(every) == len(set(every)) == 6 * (64 + 32) // 4
    rows, start = {}, 0
    for sign, splits in texts.items():
        rows[sign] = torch.arange(start, start + len(splits["train"]))
        start += len(splits["train"])
    assert {sign: len(r) for sign, r in rows.items()} == {"++": 32, "+-": 16, "-+": 16, "--": 32}
    sign_of = {int(row): sign for sign, r in rows.items() for row in r}
    for probe, place in (("first", 0), ("second", 1)):
        row_M, label_M = scr._labelled(rows, probe)
        counts = pd.Series([sign_of[int(row)] for row in row_M]).value_counts().to_dict()
        assert counts == {"++": 16, "+-": 16, "-+": 16, "--": 16}
        assert all((sign_of[int(row)][place] == "+") == bool(label) for row, label in zip(row_M, label_M))
    row_M, label_M = scr._labelled(rows, "biased")
    assert [sign_of[int(row)] for row in row_M] == ["++"] * 32 + ["--"] * 32 and label_M.sum() == 32


def test_hub_texts_are_the_first_of_each_combination():
    """Fails if rows are shuffled, columns exchanged, or the pure combinations are not twice the mixed ones."""
    frame = pd.DataFrame({"hard_text": [f"t{i}" for i in range(40)], "profession": [21, 13] * 20,
                          "gender": [0, 0, 1, 1] * 10})
    found = pairs.first_of_each(frame, pairs.BIOGRAPHIES, (21, 13), 16, "run")
    assert found["++"] == [f"t{i}" for i in range(0, 32, 4)] and found["--"] == [f"t{i}" for i in range(3, 32, 4)]
    assert found["+-"] == ["t2", "t6", "t10", "t14"] and found["-+"] == ["t1", "t5", "t9", "t13"]
    with pytest.raises(ValueError, match="10 texts with profession 21 and gender 0, 12 are asked for"):
        pairs.first_of_each(frame, pairs.BIOGRAPHIES, (21, 13), 24, "run")


def test_requirements_name_the_setting():
    """Fails if settings without a key in SAEBench's schema, or that cannot be run, pass the preflight."""
    for module, source in ((scr, "embedded"), (tpp, "embedded"), (scr, "hub"), (scr, "tiny")):
        config = module.CONFIG["gemma" if source == "hub" else source]
        assert module.requirements(config, {"source": source}) == []
        for wrong in ({"n_values": [3]}, {"context_length": 1}, {"probe_epochs": 0}):
            assert next(iter(wrong)) in module.requirements(config | wrong, {"source": source})[0]
    assert "multiple of 4" in scr.requirements(scr.CONFIG["tiny"] | {"probe_train_set_size": 62}, {"source": "tiny"})[0]
    assert "'gutenberg'" in scr.requirements(scr.CONFIG["tiny"] | {"dataset_names": ["gutenberg"]},
                                             {"source": "tiny"})[0]
