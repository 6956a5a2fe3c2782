"""absorption against plain references of the protocol, on fake and tiny language models and three tokenizers."""

import dataclasses
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from evals import Setup, absorption, declared
from evals.cache import Cache
from evals.common import first_letter, pooling
from evals.model import built_in, language_model
from tests.evals import scarce

# words of the letter with number SPLIT ("h") that carry MARK have features of their own
BOS, D, SPLIT, MARK = 0, 40, 7, 30


class FakeTokenizer:
    """Words, with their leading space, a newline and a colon are the tokens."""

    def __init__(self, per_letter=40):
        stems = [a + b for a in first_letter.LETTERS for b in first_letter.LETTERS]
        words = [f"{' ' * (i % 2)}{letter}{stem}" for letter in first_letter.LETTERS
                 for i, stem in enumerate(stems[:per_letter])]
        letters = [f" {letter.upper()}" for letter in first_letter.LETTERS]
        self.tokens = ["<bos>", "\n", ":", " has", " the", " first", " letter", *letters, *words]
        self.number = {token: i for i, token in enumerate(self.tokens)}

    def get_vocab(self):
        return dict(reversed(self.number.items()))

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        one = isinstance(texts, str)
        ids = [[self.number[token] for token in re.findall(r"\n|:| ?[A-Za-z]+", text)]
               for text in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}


class FakeLM:
    """Causal: a position holds its token's vector and a thousandth of all before it.

    The first 26 channels hold the first letter; if `odd`, one word in 27 looks as if it began with the next one.
    """

    name, digest, device, d_model, bos = "fake", "d1", "cpu", D, BOS

    def __init__(self, tokenizer=None, letters=True, odd=False):
        self.tokenizer, self.rows = tokenizer or FakeTokenizer(), 0
        tokens = self.tokenizer.tokens
        self.table_VD = 0.3 * torch.randn(len(tokens), D, generator=torch.Generator().manual_seed(5))
        self.table_VD[:, MARK] = 0.0
        for i, token in enumerate(tokens):
            stem = token.strip()
            if letters and stem.isalpha():
                self.table_VD[i, (ord(stem[0].lower()) - 97 + (odd and i % 27 == 1)) % 26] += 4.0
                self.table_VD[i, MARK] = float(stem[0] == "h" and i % 3 == 0)

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        x_BTD = self.table_VD[tokens_BT]
        return x_BTD + 0.001 * (x_BTD.cumsum(1) - x_BTD)


class AbsorbingSAE:
    """A feature per letter, silent on marked words, where one of many that fire on few words takes its part."""

    own = 60  # features that share the marked words

    def __init__(self):
        self.W_dec = torch.zeros(26 + self.own, D)
        self.W_dec[:26, :26] = torch.eye(26)
        self.W_dec[26:, SPLIT], self.W_dec[26:, 31] = 0.8, 0.6

    def encode(self, x):
        z, marked = torch.relu(x[..., :26] - 1.0), x[..., MARK] > 0.5
        which = (x[..., 32] * 1e4).long() % self.own  # channel 32 is random, so it tells words apart
        extra = torch.nn.functional.one_hot(which, self.own) * (marked * x[..., SPLIT])[..., None]
        z[..., SPLIT] *= ~marked
        return torch.cat([z, extra], -1)


def make_setup(tmp_path, lm=None, seed=0, limit_gb=1.0, **changed):
    config = {**absorption.CONFIG["tiny"], "k_sparse_probe_num_epochs": 20, "llm_batch_size": 50, **changed}
    return Setup(lm or FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, limit_gb), None, seed,
                 lambda s: None)


# ------------------------------------------------------------------------------------------------ words and prompts


def sentencepiece_like():
    """A tokenizer that writes spaces as "▁" and has a word (" dogs") it never gives as one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁cat", "cat", "▁dog", "s", "▁has", "▁the", "▁first", "▁letter", "▁C", "▁D", "▁S", "▁H", "▁T", "▁F", "▁L"]
    pieces = [("<unk>", 0.0), ("<bos>", 0.0), ("\n", -1.0), (":", -1.0), ("▁", -9.0), ("▁dogs", -50.0),
              *((w, -2.0) for w in words)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    # as Llama's, which drops a space
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


@pytest.mark.parametrize("make", [FakeTokenizer, built_in.tiny_tokenizer, sentencepiece_like],
                         ids=["words", "byte-level", "sentencepiece"])
def test_words_stand_as_one_token_where_the_protocol_reads(make):
    """Fails if a prompt's lines have other tokens than its text, or a word's token is not where it is looked for."""
    tokenizer = make()
    words = first_letter.vocabulary(tokenizer)
    vocabulary = {i: tokenizer.convert_tokens_to_string([t]) for t, i in tokenizer.get_vocab().items()}
    assert len({word.text for word in words}) == len(words) >= 14
    spaced = sum(word.text.startswith(" ") for word in words)
    assert 0 < spaced < len(words), "words with and without a leading space are needed"
    (tokens, places), = first_letter.prompts(words[:3], words[3:], 4, 3, BOS, random.Random(1))
    assert [tokens[place] for place in places] == [word.head[-1] for word in words[:3]]
    for word in words[:3]:
        assert vocabulary[word.head[-1]].strip() == word.text.strip()
        text = f"\n{words[3].text} has the first letter: {words[3].text.strip()[0].upper()}\n{word.text}"
        ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
        assert ids == words[3].head + words[3].tail + word.head and "▁dogs" not in word.text
        full = tokenizer([text + " has the first letter:"], add_special_tokens=False)["input_ids"][0]
        assert full[:len(ids)] == ids
        if make is not built_in.tiny_tokenizer:  # whose words for the question are not single tokens
            assert full[-6] == word.head[-1]


def test_words_are_those_of_the_protocol():
    """Fails if anything but ASCII letters after at most one space is a word, or if a word in several pieces is."""
    found = {word.text: word.letter for word in first_letter.vocabulary(sentencepiece_like())}
    assert found.keys() >= {" cat", "cat", "s", " D"} and not found.keys() & {" dogs", ":", "\n", "<bos>", " ", ""}
    assert (found[" cat"], found["cat"], found[" D"]) == (2, 2, 3)


def test_a_prompt_is_examples_then_words():
    """Fails if an example is asked for too, is drawn twice or from elsewhere, or the prompt goes on after the word."""
    tokenizer = FakeTokenizer(4)
    words = first_letter.vocabulary(tokenizer)
    asked, pool = words[:25], words[10:60]
    for together in (1, 4):
        made = first_letter.prompts(asked, pool, 10, together, BOS, random.Random(3))
        assert [tokens[p] for tokens, places in made for p in places] == [word.head[-1] for word in asked]
        for tokens, places in made:
            text = "".join(tokenizer.tokens[t] for t in tokens[1:])
            lines = [re.fullmatch(r"( ?[A-Za-z]+) has the first letter: ([A-Z])|( ?[A-Za-z]+)", line)
                     for line in text.split("\n")[1:]]
            assert tokens[0] == BOS and len(tokens) == places[-1] + 1
            assert len(lines) == 10 + len(places) and lines[-1][3]
            assert all(line[1].strip()[0].upper() == line[2] for line in lines[:-1])
            shown, own = [line[1] for line in lines[:10]], [line[1] or line[3] for line in lines[10:]]
            assert len({*shown, *own}) == len(lines) and {*shown} <= {word.text for word in pool}
    with pytest.raises(first_letter.NoScore, match="only 50 words for prompts of 48 "):
        first_letter.prompts(asked, pool, 48, 4, BOS, random.Random(3))


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_what_follows_the_word_is_not_needed(tmp_path, architecture):
    """Fails if the activation of a prompt cut after its word, beside longer ones, is not the whole prompt's."""
    folder = built_in.tiny_folder(tmp_path, architecture)
    lm = language_model.load(str(folder), "tiny", torch.float32, "cpu")
    words = first_letter.vocabulary(lm.tokenizer)
    prompted = [p for n in (1, 3) for p in first_letter.prompts(words[:6], words, n, n, lm.bos, random.Random(0))]
    shown = SimpleNamespace(bos=lm.bos, device="cpu",
                            residual=lambda tokens_BT, layer: lm.residuals(tokens_BT, [layer])[layer])
    setup = SimpleNamespace(config={"llm_batch_size": 4}, layer=2, fits={}, track=lambda items, *rest: items, lm=shown)
    got = iter(first_letter.at_words(setup, prompted, "words", [2])[2])
    by_number = {word.head[-1]: word for word in words}
    for tokens, places in prompted:
        whole = tokens + by_number[tokens[-1]].tail
        x_TD = lm.residuals(torch.tensor([whole]), [2])[2][0]
        for place in places:
            torch.testing.assert_close(next(got), x_TD[place], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ probes


@pytest.mark.parametrize("l1, weight_decay, batch", [(0.0, 1e-4, 64), (0.01, 1e-6, 100)])
def test_probes_repeat_the_reference(l1, weight_decay, batch):
    """Fails for another initialisation, loss, penalty, schedule or row order than torch's parts on an equal seed."""
    rng = torch.Generator().manual_seed(1)
    letter_N = torch.randint(0, 26, (230,), generator=rng)
    letter_N[letter_N == 23] = 3  # a letter without words
    x_NF = torch.randn(230, 12, generator=rng) + torch.randn(26, 12, generator=rng)[letter_N]

    torch.manual_seed(4)
    target_NL = torch.nn.functional.one_hot(letter_N, 26).float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x_NF, target_NL), batch_size=batch,
                                         shuffle=True)
    linear = torch.nn.Linear(12, 26)
    optimiser = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, (1e-5 / 1e-2) ** (1 / 8))
    positives_L = target_NL.sum(0).clamp_min(1)
    criterion = torch.nn.BCEWithLogitsLoss(pos_weight=(230 - positives_L) / positives_L)
    for _ in range(8):
        for x_bF, target_bL in loader:
            optimiser.zero_grad()
            (criterion(linear(x_bF), target_bL) + l1 * linear.weight.abs().sum(1).mean()).backward()
            optimiser.step()
        schedule.step()

    state = torch.get_rng_state()
    W_LF, b_L = first_letter.fit_letters(x_NF.__getitem__, letter_N, 12, batch, 8, l1, weight_decay, rng.manual_seed(4),
                                         "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(W_LF, linear.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b_L, linear.bias.detach(), atol=1e-5, rtol=1e-4)


def test_splitting_rule():
    """Fails if a k behind the first failure is taken, the jump is from the last k, not the best, or F1 is another."""
    rng, stops, small = np.random.default_rng(0), set(), 0
    for _ in range(12):
        true_N = rng.random(500) < 0.25
        shares = rng.permutation([0.6, 0.3, 0.1, 0.05, 0.03])  # of the positives that a column finds
        columns = [(rng.random(500) < share) * true_N + 0.3 * (rng.random(500) < 0.03) for share in shares]
        x_NC = np.stack(columns, 1).astype(np.float32)
        parts = x_NC[:300], true_N[:300], x_NC[300:], true_N[300:]
        by_k = []
        for k in range(1, 6):
            probe = LogisticRegression(max_iter=500, class_weight="balanced").fit(parts[0][:, :k], parts[1])
            by_k.append(f1_score(parts[3], probe.decision_function(parts[2][:, :k]) > 0))
        best, kept, k = by_k[0], 1, 2
        while k <= 5 and by_k[k - 1] > best + 0.03:
            best, kept, k = by_k[k - 1], k, k + 1
        assert absorption.split_features(*parts, 0.03) == (kept, pytest.approx(best))
        stops.add(kept)
        small += kept < 5 and best < by_k[kept] <= best + 0.03
    assert len(stops) >= 3 and small >= 3, "the input does not tell a jump from a step"


# ------------------------------------------------------------------------------------------------ the formulas


def plain_absorption(z_F, cosine_F, along, main):
    """The protocol for one word, in plain Python."""
    p = [float(z) * float(c) for z, c in zip(z_F, cosine_F)]
    own = sum(p[j] for j in main)
    others = sorted((p[j] for j in range(len(p)) if j not in main and p[j] > 0 and cosine_F[j] >= 0.1), reverse=True)
    taken = sum(others[:3])
    if along <= 0 or own >= along or taken / along < 0.4:
        fraction = 0.0
    elif own <= 0:
        fraction = 1.0
    else:
        part = min(taken, along - own)
        fraction = min(1.0, max(0.0, part / (part + own)))
    top = max(range(len(p)), key=lambda j: p[j])
    full = all(z_F[j] < 1e-8 for j in main) and cosine_F[top] >= 0.025 and along > 0 and p[top] / along >= 0.4
    return fraction, full


def test_absorption_by_hand():
    """Fails if a branch or threshold of the two definitions is off."""
    # feature 0 is the letter's; 3 is too little aligned for the fraction
    cosine_F = torch.tensor([0.8, 0.5, 0.25, 0.0625, 0.5, -0.5])
    cases = [  # features, activation along the probe, fraction, full
        ([1, 0, 0, 0, 0, 0], 1.0, 0.0, False),  # .8 from its own, nothing from others
        ([1, 1, 0, 0, 0, 0], 1.5, 0.0, False),  # others give .5, a third of 1.5
        ([1, 1.2, 0, 0, 0, 0], 1.5, 0.6 / 1.4, False),  # others give .6 of the .7 that lacks
        ([1, 4, 0, 0, 0, 0], 1.5, 0.7 / 1.5, False),  # others give 2, but only .7 lacks
        ([2, 2, 0, 0, 0, 0], 1.5, 0.0, False),  # its own gives 1.6, more than there is
        ([0, 2, 0, 0, 0, 0], 1.5, 1.0, True),  # silent, one other gives two thirds
        ([0, 0.8, 0, 0, 0.6, 0], 1.5, 1.0, False),  # two others give .7, neither of them .6
        ([0, 1, 0, 0, 0, 0], 1.5, 0.0, False),  # silent, but nobody takes over
        ([0, 0, 0, 16, 0, 0], 1.5, 0.0, True),  # a feature of cosine .0625 may take all, not a part
        ([0, 2, 0, 0, 2, 0], 1.5, 1.0, True),  # a tie
        ([0, 0, 0, 0, 0, 0], 1.5, 0.0, False),  # nothing fires
        ([0, 2, 0, 0, 0, 0], -1.0, 0.0, False),  # away from the probe
        ([0, 2, 0, 0, 0, 0], 0.0, 0.0, False),  # across it
        ([0, 0, 0, 0, 0, -4], 1.5, 0.0, False),  # minus times minus: p = 2, but a cosine below all thresholds
    ]
    z_nF, along_n = torch.tensor([c[0] for c in cases], dtype=torch.float32), torch.tensor([c[1] for c in cases])
    fraction_n, full_n = absorption.absorbed(z_nF, cosine_F, along_n, torch.tensor([0]))
    assert fraction_n.tolist() == pytest.approx([c[2] for c in cases], abs=1e-6)
    assert full_n.tolist() == [c[3] for c in cases]


def test_absorption_equals_the_plain_loop():
    """Fails if words, features or letters are mixed up by doing all words at once."""
    rng = torch.Generator().manual_seed(0)
    for mains in (1, 3):
        cosine_F = torch.randn(60, generator=rng) * 0.2
        main = cosine_F.topk(mains).indices
        z_nF = torch.relu(torch.randn(400, 60, generator=rng) - 0.8) * (torch.rand(400, 60, generator=rng) < 0.8)
        z_nF[:150, main] = 0.0
        along_n = torch.rand(400, generator=rng) * 2.2 - 0.2
        got = absorption.absorbed(z_nF, cosine_F, along_n, main)
        expected = [plain_absorption(z_F.tolist(), cosine_F.tolist(), a.item(), main.tolist())
                    for z_F, a in zip(z_nF, along_n)]
        assert got[0].tolist() == pytest.approx([fraction for fraction, _ in expected], abs=1e-6)
        assert got[1].tolist() == [full for _, full in expected]
        kinds = {(0 < fraction < 1, fraction == 1, full) for fraction, full in expected}
        assert len(kinds) >= 4, "the input does not reach the branches"
    # no feature along the probe: nothing to sum
    assert not absorption.absorbed(z_nF, -cosine_F.abs(), along_n, main)[1].any()


# ------------------------------------------------------------------------------------------------ the eval


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 4])
def test_planted_absorption_is_found(tmp_path, together):
    """Fails if words, letters, features or probes are mixed up anywhere between the vocabulary and the score."""
    setup = make_setup(tmp_path, words_per_prompt=together, max_icl_examples=5)
    result = absorption.run(setup, {"sae": AbsorbingSAE()})["sae"]
    found = first_letter.measured(setup)
    marked = (found["second_x"][:, MARK] > 0.5) & (found["second_letter"] == SPLIT)
    assert setup.cache.hits == ["first_letter"] and int(marked.sum()) >= 1
    details = {letter["first_letter"]: letter for letter in result.details}
    assert len(details) == result.corrected["num_letters"] == 26 and not result.problems
    assert details["h"]["num_full_absorption"] == int(marked.sum())
    assert details["h"]["num_probe_true_positives"] == int((found["second_letter"] == SPLIT).sum())
    # all or nothing here
    assert details["h"]["mean_absorption_fraction"] == pytest.approx(details["h"]["full_absorption_rate"])
    others = [details[letter] for letter in details if letter != "h"]
    assert all(d["full_absorption_rate"] == 0 == d["mean_absorption_fraction"] for d in others)
    split = result.unstructured["split_features"]
    assert split["h"]["split_features"] == [SPLIT] and split["h"]["k_sparse_f1"] < 0.9 < split["a"]["k_sparse_f1"]
    rates = [letter["full_absorption_rate"] for letter in result.details]
    mean = result.metrics["mean"]
    assert mean["mean_full_absorption_score"] == pytest.approx(np.mean(rates)) and mean["mean_num_split_features"] == 1
    assert mean["std_dev_full_absorption_score"] == pytest.approx(np.std(rates, ddof=1))
    assert result.stderrs["mean_full_absorption_score"] == pytest.approx(np.std(rates, ddof=1) / 26 ** 0.5)
    assert {*mean, *result.corrected} == set(declared("absorption", "METRICS"))


@pytest.mark.slow
def test_only_words_that_the_probe_finds_are_scored(tmp_path):
    """Fails if test words that the LM does not represent by their letter enter the absorption scores."""
    found = first_letter.measured(make_setup(tmp_path, FakeLM(odd=True)))
    odd = {side: int((found[f"{side}_x"].gather(1, found[f"{side}_letter"][:, None]) < 2).sum())
           for side in ("test", "second")}
    assert odd["second"] < odd["test"] and 0 < len(found["test_x"]) - len(found["second_x"]) <= odd["test"]


@pytest.mark.slow
def test_a_score_depends_on_nothing_but_its_inputs(tmp_path, monkeypatch):
    """Fails if the cache, another SAE, features kept or encoded again, or the global random state shifts a score."""
    torch.manual_seed(99)
    state = torch.get_rng_state()
    alone = absorption.run(make_setup(tmp_path / "a"), {"one": AbsorbingSAE()})["one"]
    setup = make_setup(tmp_path / "a")
    cached = absorption.run(setup, {"two": AbsorbingSAE(), "one": AbsorbingSAE()})
    assert setup.lm.rows == 0 and setup.cache.misses == []
    monkeypatch.setattr(absorption, "KEPT_BYTES", 0)
    monkeypatch.setattr(pooling, "PART_FLOATS", 200)
    again = absorption.run(make_setup(tmp_path / "b", limit_gb=0), {"one": AbsorbingSAE()})["one"]
    assert alone == cached["one"] == cached["two"] == again
    assert torch.equal(torch.get_rng_state(), state)
    other = absorption.run(make_setup(tmp_path / "a", seed=1), {"one": AbsorbingSAE()})["one"]
    assert other.details != alone.details


def test_too_few_letters_give_no_score_but_the_figure(tmp_path):
    """Fails if a model without letters gets a score, or costs a second pass of the LM."""
    setup = make_setup(tmp_path, FakeLM(letters=False))
    result = absorption.run(setup, {"sae": AbsorbingSAE()})["sae"]
    words = 4 + 26 * 41  # those of the question and the capital letters are words too
    assert setup.lm.rows == -(-int(words * 0.8) // 4) + -(-(words - int(words * 0.8)) // 4)
    assert set(result.metrics["mean"].values()) == {None} and result.details == [] and result.stderrs == {}
    assert result.corrected["num_letters"] < 20 and 0 <= result.corrected["mean_probe_f1"] < 0.6
    (problem,) = result.problems
    assert re.match(r"only \d+ of 26 letters have a probe with F1 > 0.6, the protocol needs 20: no "
                    r"mean_absorption_fraction_score", problem)


@pytest.mark.slow
def test_broken_saes_give_no_score_but_a_reason(tmp_path):
    """Fails if a dead SAE gets the best score, or NaN reaches scikit-learn, or the SAE beside them is accused."""
    dead, nan = AbsorbingSAE(), AbsorbingSAE()
    dead.encode = lambda x: torch.zeros(*x.shape[:-1], 86)
    nan.encode = lambda x: AbsorbingSAE.encode(nan, x) / (x[..., :1] < 3)
    results = absorption.run(make_setup(tmp_path), {"dead": dead, "nan": nan, "good": AbsorbingSAE()})
    for name, reason in (("dead", "no feature fires on any of"), ("nan", "NaN or inf in the features of")):
        assert results[name].metrics["mean"]["mean_full_absorption_score"] is None
        assert reason in results[name].problems[0]
    assert results["good"].metrics["mean"]["mean_full_absorption_score"] > 0 and not results["good"].problems


def test_a_tokenizer_that_joins_lines_is_refused(tmp_path):
    """Fails if activations are read at places that are not the words'."""
    class Joining(FakeTokenizer):
        def __call__(self, texts, add_special_tokens):
            given = super().__call__(texts, add_special_tokens)["input_ids"]
            return {"input_ids": [t for t in given if t != 1] if isinstance(texts, str) else given}

    result = absorption.run(make_setup(tmp_path, FakeLM(Joining())), {"sae": AbsorbingSAE()})["sae"]
    assert "tokens than each line alone" in result.problems[0] and result.corrected["num_letters"] is None


def test_the_tiny_profile_ends_without_a_score(tmp_path):
    """Fails if the random model's run raises, or claims to know letters."""
    lm = language_model.load(str(built_in.tiny_folder(tmp_path)), "tiny", torch.float32, "cpu")
    shown = SimpleNamespace(tokenizer=lm.tokenizer, bos=lm.bos, device="cpu", digest=lm.digest, d_model=lm.d_model,
                            residual=lambda tokens_BT, layer: lm.residuals(tokens_BT, [layer])[layer])
    setup = make_setup(tmp_path, shown, **absorption.CONFIG["tiny"])
    result = absorption.run(setup, {"sae": AbsorbingSAE()})["sae"]
    assert "of 26 letters" in result.problems[0] and set(result.metrics["mean"].values()) == {None}


def test_one_pass_serves_all_layers_of_a_run(tmp_path):
    """Fails if the words of the first prompts pass again, or a layer's numbers depend on which others are measured."""

    class Layered(FakeLM):
        def residual(self, tokens_BT, layer):
            return self.residual_of(tokens_BT, [layer])[layer]

        def residual_of(self, tokens_BT, layers):
            x_BTD = super().residual(tokens_BT, 0)
            return {layer: x_BTD * (1 + layer) for layer in layers}

    alone, rows = {}, {}
    for layer in (3, 1):
        setup = dataclasses.replace(make_setup(tmp_path / str(layer), Layered()), layer=layer)
        alone[layer], rows[layer] = first_letter.measured(setup), setup.lm.rows
    setup = dataclasses.replace(make_setup(tmp_path / "together", Layered()), layers=(1, 3))
    for layer, expected in alone.items():
        found = first_letter.measured(dataclasses.replace(setup, layer=layer))
        assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()
    of_second = {layer: math.ceil(len(of["second_x"]) / setup.config["words_per_prompt"])
                 for layer, of in alone.items()}
    assert min(of_second.values()) > 0
    assert setup.lm.rows == rows[3] + of_second[1] < sum(rows.values())


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path):
    """Fails as scarce.check_every_batch says."""
    scarce.check_every_batch(absorption.run, make_setup(tmp_path), AbsorbingSAE())


def test_features_that_do_not_fit_are_made_again(monkeypatch):
    """Fails if the features of all words must fit on the GPU, or depend on whether they do."""
    said, index, x_ND = [], torch.tensor([4, 0, 4]), torch.randn(5, 3)
    setup = scarce.small_setup(said)
    kept = absorption._features(setup, lambda x: x * 2, x_ND, 2)(index)
    assert not said
    monkeypatch.setattr(absorption, "torch", SimpleNamespace(empty=scarce.full,
                                                             OutOfMemoryError=torch.OutOfMemoryError))
    assert torch.equal(absorption._features(setup, lambda x: x * 2, x_ND, 2)(index), kept) and len(said) == 1


def test_requirements_name_the_setting():
    """Fails if settings that cannot run are let through, or if those of a profile are not."""
    for profile, config in absorption.CONFIG.items():
        assert absorption.requirements(config, {"profile": profile}) == []
    assert "words_per_prompt" in absorption.requirements(config | {"words_per_prompt": 0}, {})[0]
    assert "min_feats_for_eval" in absorption.requirements(config | {"min_feats_for_eval": 27}, {})[0]
