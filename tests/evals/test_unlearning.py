"""unlearning on a fake language model that can be worked out by hand, and against slow references of the protocol."""

import itertools
import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evals import Setup, declared, unlearning
from evals.cache import Cache
from evals.texts.source import Source
from evals.unlearning import Edit, Rows, Task, questions
from evals.unlearning.questions import Question
from tests.evals import scarce

BOS, EOS, PAD = 0, 1, 2
WORDS = ["<bos>", "<eos>", "<pad>", "A", "B", "C", "D", "▁A", "▁B", "▁C", "▁D", "A.", "B.", "C.", "D.",
         "right_bio", "right_past", "bio", "past"]
VOCABULARY = 64  # other words share what is left


class Tokenizer:
    """A token a word; a letter after a space is another token than the letter alone."""

    eos_token_id, bos_token, chat_template = EOS, "<bos>", None

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[self.token(word) for word in re.findall(r"^ [A-D]$|\S+", text)] for text in texts]}

    @staticmethod
    def token(word):
        word = word.replace(" ", "▁")
        return WORDS.index(word) if word in WORDS else len(WORDS) + sum(map(ord, word)) % (VOCABULARY - len(WORDS))


class FakeLM:
    """It takes the option that holds a word of dimension 0 (right_bio) or 1 (right_past), and says A where it sees
    neither.

    Dimensions: 0 right_bio, 1 right_past, 2-5 the options' letters, 6 bio, 7 past, 8 on other words; then the letter it
    has settled on, 4.
    """

    name, digest, device, d_model, vocab_size = "fake-it", "d1", "cpu", 13, VOCABULARY
    bos, special_ids, tokenizer = BOS, {BOS, EOS, PAD}, Tokenizer()

    def __init__(self, fails_at=None):
        self.fails_at = fails_at  # a letter it never takes
        self.table_VD = torch.zeros(VOCABULARY, 13)
        for word, dimension in (("right_bio", 0), ("right_past", 1), ("A.", 2), ("B.", 3), ("C.", 4), ("D.", 5),
                                ("bio", 6), ("past", 7)):
            self.table_VD[WORDS.index(word), dimension] = 2.0
        self.table_VD[len(WORDS):, 8] = torch.arange(VOCABULARY - len(WORDS)) / 50
        self.prefixes, self.rows = 0, 0

    def residual(self, tokens_BT, layer):
        self.prefixes += len(tokens_BT)
        return self.table_VD[tokens_BT]

    def finish(self, x_BTD, layer):
        self.rows += len(x_BTD)
        h_BTD = x_BTD.clone()
        for h_TD in h_BTD:
            letter = 0
            for t in range(1, len(h_TD)):
                option = int(h_TD[t - 1, 2:6].argmax())
                if h_TD[t, :2].max() > 1 and option != self.fails_at:
                    letter = option
                h_TD[t, 9:] = torch.eye(4)[letter]
        return h_BTD

    def unembed(self, h):
        logits = torch.zeros(*h.shape[:-1], VOCABULARY)
        logits[..., 3:7] = 3 * h[..., 9:]  # letters
        logits[..., 7:11] = h[..., 9:].roll(1, -1)  # after a space: another letter, less probable
        logits[..., WORDS.index("bio")] = h[..., 6]
        logits[..., WORDS.index("past")] = h[..., 7]
        return logits


def question(subject, answer, word):
    choices = [f"wrong{i}" for i in range(4)]
    choices[answer] = word
    return Question(subject, f"Which {subject} {answer}?", choices, answer)


def material():
    return questions.Material(
        {"forget": [question("life", a, "right_bio") for a in range(4)],
         "retain": [question("history", a, "right_past") for a in range(4)]},
        {"forget": ["right_bio bio cell"] * 60, "retain": ["right_past past king"] * 60},
        {"forget": ["bio bio bio cell"] * 30, "retain": ["past past past king"] * 30})


CONFIG = {"forget_subjects": ["life"], "retain_subjects": ["history"], "max_questions": 100, "min_questions": 4,
          "retain_thresholds": [0.001, 0.01], "n_features_list": [1, 2], "multipliers": [25, 50], "dataset_size": 8,
          "seq_len": 20, "text_rows": 3, "text_len": 12, "llm_batch_size": 3, "mcq_batch_size": 3}


def make_setup(tmp_path, monkeypatch, given=None, lm=None, config=None, limit_gb=1.0):
    monkeypatch.setattr(questions, "load", lambda source, config, seed: given or material())
    monkeypatch.setattr(questions, "identity", lambda source, config: "by hand")
    cache = Cache(tmp_path, limit_gb)
    return Setup(lm or FakeLM(), 3, "blocks.3.hook_resid_post", CONFIG | (config or {}), None, "", cache, None, 0,
                 lambda s: None)


def sae_of(*dimensions, **variant):
    """A feature for each dimension of the fake model, read and written along it."""
    W_FD = torch.eye(13)[list(dimensions)]
    return SimpleNamespace(encode=lambda x: torch.relu(x.float() @ W_FD.T), W_dec=W_FD, sae=SimpleNamespace(**variant))


def score_of(result):
    return result.metrics["unlearning"]["unlearning_score"]


# ------------------------------------------------------------------------------------------------ questions


def test_a_question_counts_if_right_under_all_24_orders(tmp_path, monkeypatch):
    """Fails if an order is left out, the letter does not move with its option, or a lost question is asked again."""
    setup = make_setup(tmp_path, monkeypatch, lm=FakeLM(fails_at=3))
    tricky = [*material().questions["forget"], Question("life", "both", ["right_bio", "right_past", "no", "never"], 0)]
    assert questions.always_right(setup, tricky) == []
    assert setup.lm.rows < 5 * 5, "questions that failed were asked again"
    assert sorted(questions.PERMUTATIONS) == sorted(itertools.permutations(range(4)))
    assert questions.PERMUTATIONS[0] == (0, 1, 2, 3), "the original order is the one that edits are measured in"
    setup = make_setup(tmp_path, monkeypatch)
    by_hand = []
    for q in tricky:
        told = []
        for order in itertools.permutations(range(4)):
            words = [q.choices[i] for i in order]
            # the fake model takes the last it sees
            last = max((i for i, word in enumerate(words) if word.startswith("right")), default=0)
            told.append(order[last] == q.answer)
        by_hand += [q] * all(told)
    assert questions.always_right(setup, tricky) == by_hand == tricky[:4]


def test_the_prompt_is_saebenchs_for_gemma_and_the_template_of_others():
    """Fails if the text differs by a character from SAEBench's, or if a template's own BOS doubles ours."""
    q = Question("high_school_geography", "Where?", ["w", "x", "y", "z"], 0)
    asked = ("The following are multiple choice questions (with answers) about high school geography.\nWhere?"
             "\nA. z\nB. w\nC. x\nD. y")
    gemma = SimpleNamespace(chat_template="… <start_of_turn> …")
    turns = f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    assert questions.prompt(gemma, q, (3, 0, 1, 2)) == turns

    def template(turns, tokenize, add_generation_prompt):
        return f"<s>[{turns[0]['role']}]{turns[0]['content']}[/{tokenize}{add_generation_prompt}]"

    other = SimpleNamespace(chat_template="…", bos_token="<s>", apply_chat_template=template)
    assert questions.prompt(other, q, (3, 0, 1, 2)) == f"[user]{asked}[/FalseTrue]Answer: ("
    assert questions.prompt(SimpleNamespace(chat_template=None), q, (3, 0, 1, 2)) == f"{asked}\nAnswer: ("
    assert " about biology.\n" in questions.prompt(gemma, q._replace(subject="wmdp-bio"), (0, 1, 2, 3))


def test_answers_are_read_at_the_last_token_and_the_likelier_spelling_counts():
    """Fails if padding is read, if spellings are added up, or if the tokens of letters are mixed up."""
    letters_A4 = questions.letter_tokens(Tokenizer())
    assert letters_A4.tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    logits_bTV = torch.full((2, 3, VOCABULARY), -9.0)
    # B beats C at its best, though C's spellings add up to more
    logits_bTV[0, 1, [5, 9, 4]] = torch.tensor([2.0, 1.9, 2.1])
    logits_bTV[0, 2, 6] = 50.0  # padding
    logits_bTV[1, 2, [7, 20]] = torch.tensor([1.0, 5.0])  # a token that is no answer does not matter
    lm = SimpleNamespace(unembed=lambda h: h)
    assert questions.answers(lm, logits_bTV, torch.tensor([2, 3]), letters_A4).tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------ texts


def test_rows_and_draws_repeat_the_reference(tmp_path, monkeypatch):
    """Fails if documents are joined otherwise, BOS is inserted, not written over, or another stream draws the rows."""
    rows_RT = questions.rows_of(["bio past", "A B C", "past"], Tokenizer(), 4, BOS, EOS)
    assert rows_RT.tolist() == [[BOS, 17, 18, EOS], [BOS, 4, 5, EOS]]
    documents = [f"w{i} x y" for i in range(40)]
    random.seed(5)
    expected = random.sample(documents, 10)
    chosen, rest = questions.sampled(documents, 10, 5)
    assert chosen == expected and sorted(chosen + rest) == sorted(documents)
    assert len(questions.sampled(documents, 100, 5)[1]) == 4, "nothing is left to measure the effect on"

    given = material()._replace(choosing={"forget": [f"w{i} bio" for i in range(90)],
                                          "retain": [f"x{i} past" for i in range(70)]})
    ready = questions.prepared(make_setup(tmp_path, monkeypatch, given))
    torch.manual_seed(0)
    for side, n in (("forget", 13), ("retain", 10)):  # 90·2 + 89 and 70·2 + 69 tokens in rows of 20
        all_RT = questions.rows_of(given.choosing[side], Tokenizer(), 20, BOS, EOS)
        assert len(all_RT) == n and torch.equal(ready.choosing[side], all_RT[torch.randperm(n)[:8]])


def test_cross_entropy_skips_what_follows_a_special_token():
    """Fails if BOS, a separator or a document's first token enters the sum or its count, or if logits are shifted."""
    lm = SimpleNamespace(unembed=lambda h: h, vocab_size=VOCABULARY, special_ids={BOS, EOS, PAD})
    tokens_bT = torch.tensor([[BOS, 20, 21, EOS, 22, 23], [BOS, 30, 31, 32, 33, 34]])
    h_bTD = torch.randn(2, 6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    expected = [[(1, 21), (4, 23)], [(1, 31), (2, 32), (3, 33), (4, 34)]]
    ce_b, count_b = questions.losses(lm, h_bTD, tokens_bT)
    for row, pairs in enumerate(expected):
        by_hand = sum(math.log(np.exp(h_bTD[row, t].double().numpy()).sum()) - h_bTD[row, t, target].item()
                      for t, target in pairs)
        assert ce_b[row].item() == pytest.approx(by_hand, abs=1e-5) and count_b[row] == len(pairs)


# ------------------------------------------------------------------------------------------------ features and edits


def test_choice_of_features_by_hand():
    """Fails if the threshold is not exclusive, silent features are chosen, or the densest does not come first."""
    forget_F = np.array([0.5, 0.0, 0.3, 0.9, 0.3, 0.2])
    retain_F = np.array([0.0009, 0.0, 0.0, 0.01, 0.001, 0.0099])
    assert unlearning.choose(forget_F, retain_F, 0.001, 3) == (0, 2)
    assert unlearning.choose(forget_F, retain_F, 0.01, 3) == (0, 4, 2)  # of equals the higher number first
    assert unlearning.choose(forget_F, retain_F, 0.01, 10) == (0, 4, 2, 5)


def test_densities_count_firings_on_ordinary_tokens(tmp_path, monkeypatch):
    """Fails if BOS or separators enter the count or the total, or if the density is not rounded to 6 decimals."""
    setup = make_setup(tmp_path, monkeypatch)
    sae = SimpleNamespace(encode=lambda x: torch.cat([x[..., 6:7], torch.ones_like(x[..., :1])], -1),
                          W_dec=torch.eye(13)[:2])
    tokens = {"forget": torch.tensor([[BOS, 17, EOS, 17, 20], [BOS, 20, 21, 22, 23]]),
              "retain": torch.tensor([[BOS, 20, PAD, 21, 22]])}
    forget_F, retain_F = unlearning._densities(setup, tokens, {"sae": sae})["sae"]
    assert forget_F.tolist() == [0.285714, 1.0] and retain_F.tolist() == [0.0, 1.0]  # 2 of 7


class MixingLM(FakeLM):
    """Causal, every position mixes in all before it."""

    def finish(self, x_BTD, layer):
        self.rows += len(x_BTD)
        return torch.tanh(x_BTD.cumsum(1) / torch.arange(1, x_BTD.shape[1] + 1)[:, None])


@pytest.mark.parametrize("sign", [1, -1])
def test_edits_equal_a_slow_reference(tmp_path, monkeypatch, sign):
    """Fails if a clamp reaches position 0 or padding, a silent feature moves, the error is lost or passes mixed up.

    A feature below 0 is clamped to the other side of 0 as one above is.
    """
    rng = torch.Generator().manual_seed(1)
    setup, lm = make_setup(tmp_path, monkeypatch, lm=MixingLM()), MixingLM()
    lm.table_VD = setup.lm.table_VD = torch.randn(VOCABULARY, 13, generator=rng)
    W_DF, b_F = torch.randn(13, 30, generator=rng), torch.randn(30, generator=rng) - 4.5
    W_dec = torch.nn.functional.normalize(torch.randn(30, 13, generator=rng), dim=1)
    sae = SimpleNamespace(encode=lambda x: sign * torch.relu(x @ W_DF + b_F), W_dec=W_dec, sae=None)
    tokens_NT = torch.randint(3, VOCABULARY, (10, 7), generator=rng)
    tokens_NT[:, 0] = BOS
    length_N = torch.randint(3, 8, (10,), generator=rng).sort(descending=True).values
    direction_D = torch.randn(13, generator=rng)
    spans = ((0, 3), (0, 5), (4, 9), (12, 30))
    edits = [*(Edit(tuple(range(*span)), m) for span in spans for m in (2, 7)), Edit((), 9)]

    def harm(h_bTD, index_b):
        return (h_bTD[torch.arange(len(h_bTD)), length_N[index_b] - 1] @ direction_D - clean_N[index_b]).double()

    clean_N = lm.finish(lm.table_VD[tokens_NT], 0)[torch.arange(10), length_N - 1] @ direction_D
    rows = Rows(tokens_NT, length_N, torch.ones(10), torch.arange(10), harm)
    got_EN = unlearning._harms(setup, "", rows, {"sae": sae}, {"sae": edits})["sae"]
    for edit, got_N in zip(edits, got_EN):
        for n in range(10):
            x_TD = lm.table_VD[tokens_NT[n, :length_N[n]]].clone()
            z_TF = sae.encode(x_TD)
            z_TF[0] = 0.0
            error_TD = x_TD - z_TF @ W_dec
            for t in range(len(x_TD)):
                for f in edit.features:
                    if z_TF[t, f] != 0:
                        z_TF[t, f] = -sign * edit.multiplier
            edited_TD = lm.finish((error_TD + z_TF @ W_dec)[None], 0)[0]
            assert got_N[n].item() == pytest.approx((edited_TD[-1] @ direction_D - clean_N[n]).item(), abs=1e-5)
    assert setup.lm.rows < 0.8 * 10 * len(edits) and (got_EN == 0).any() and (got_EN != 0).any()
    assert setup.lm.prefixes == 10, "the blocks up to the layer ran again"


def test_score_and_precision_by_hand(tmp_path, monkeypatch):
    """Fails if the wrong side is scored, or an edit that costs more than 1 % of the retain questions is the best."""
    # The first feature is what the model knows of life: without it every answer is A, which is right for one question
    # of four. The second is the letter of the first option: without it, an A is taken for a B, in history as well.
    given = material()._replace(choosing={"forget": ["right_bio A. bio right_bio"] * 60,
                                          "retain": ["right_past past king"] * 60})
    result = unlearning.run(make_setup(tmp_path, monkeypatch, given), {"sae": sae_of(0, 2)})["sae"]
    # no retain question lost: counted as one
    assert score_of(result) == 0.75 and result.corrected["unlearning_precision"] == 0.75 / 0.25
    assert result.unstructured["questions_right_of"] == {"forget": {"life": (4, 4)}, "retain": {"history": (4, 4)}}
    assert "unlearning_score" not in result.stderrs  # of four questions
    assert {*result.metrics["unlearning"], *result.corrected} <= set(declared("unlearning", "METRICS"))
    told = [(s["n_features"], s["features"], s["forget"], s["retain"], s["best"])
            for s in result.unstructured["settings"]["questions"]]
    one, both = (1, [0], 0.75, 0.0, False), (2, [0, 1], None, 0.25, False)
    assert told == [(*one[:4], True), one, both, both, one, one, both, both] and result.problems == []


def test_side_effects_are_allowed_up_to_the_bound(tmp_path, monkeypatch):
    """Fails if an edit at the bound is refused, one above it allowed, or a weaker one wins over a stronger one."""
    harms = {"retain": torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]),
             "forget": torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])}
    tried = []

    def fake(setup, label, rows, saes, edits):
        side = "retain" if "retain" in label else "forget"
        if saes:
            tried.append((side, [edit.multiplier for edit in edits["sae"]]))
        return {name: harms[side][[edit.multiplier for edit in edits[name]]].double() for name in saes}

    monkeypatch.setattr(unlearning, "_harms", fake)
    rows = Rows(None, None, torch.ones(4, dtype=torch.float64), torch.arange(4), None)
    for bound, best in ((0.0, 0), (0.25, 1), (0.49, 1), (0.5, 2)):
        task, plan = Task(rows, rows, bound, 0.25, 0.75), {"": [Edit((1,), m) for m in range(3)]}
        outcome = unlearning.assess(None, "x", task, {"sae": None}, {"sae": plan})["sae"][""]
        assert outcome.best == best and tried.pop() == ("forget", list(range(best + 1)))
        (forget, retain, precision), spreads = unlearning.summary(outcome, task, torch.Generator().manual_seed(0))
        assert (forget, retain, precision) == ((0.25, 0.0, 1.0), (0.5, 0.25, 2.0), (1.0, 0.5, 2.0))[best]
        assert spreads == [None] * 3  # of four rows


def test_standard_errors_are_the_spread_over_new_documents():
    """Fails if one document's rows, which an edit harms alike, count as many, or if too few documents have an error."""
    def sample(seed, each=3, documents=15):
        g = torch.Generator().manual_seed(seed)
        own, shared = (torch.randn(2, documents, n, generator=g).double() for n in (each, 1))
        harm = (2 * shared + own + 5).flatten(1)
        rows = Rows(None, None, torch.full((documents * each,), 10.0).double(),
                    torch.arange(documents).repeat_interleave(each), None)
        task = Task(rows, rows._replace(cluster_N=torch.arange(documents * each)), 1.0, 0.25, 0.75)
        return unlearning.summary(unlearning.Outcome([], harm[1][None], harm[0][None], None, None, 0), task, g)

    harms, spreads = zip(*(sample(seed) for seed in range(100)))
    true, stated = torch.tensor(harms).std(0).tolist(), torch.tensor(spreads).mean(0).tolist()
    # retain's rows pass for documents of their own
    assert stated[0] == pytest.approx(true[0], rel=0.3) and stated[1] < 0.7 * true[1]
    assert [spread is None for spread in sample(0, each=20, documents=4)[1]] == [True, False, True]


def test_a_row_belongs_to_the_document_most_of_it_is_from():
    """Fails if rows are numbered by their first token, or if separators shift the numbers."""
    # BOS A B EOS | A B C D | bio past EOS A | B C EOS A | EOS B bio
    documents = ["A B", "A B C D bio past", "A B C", "A", "B bio"]
    rows_RT, document_R = questions.numbered_rows(documents, Tokenizer(), 4, BOS, EOS)
    assert document_R.tolist() == [0, 1, 1, 2]
    assert torch.equal(rows_RT, questions.rows_of(documents, Tokenizer(), 4, BOS, EOS))


# The topic's word chooses the first feature, which no answer needs; what answers need fires on the retain text, too.
HIDDEN = {"forget": ["bio cell"] * 90, "retain": ["right_bio past king"] * 60}


def test_groups_are_clamped_whole(tmp_path, monkeypatch):
    """Fails if the rest of a feature's group stays, the plain score is the group's, or one appears without groups."""
    saes = {"grouped": sae_of(6, 0, feature_groups=lambda: [[1, 0]]),
            "control": sae_of(6, 0, feature_groups=lambda: None),
            "apart": sae_of(6, 0, feature_groups=lambda: [])}
    results = unlearning.run(make_setup(tmp_path, monkeypatch, material()._replace(choosing=HIDDEN)), saes)
    assert [score_of(result) for result in results.values()] == [0.0] * 3
    assert results["grouped"].corrected["unlearning_score_groups"] == 0.75
    assert results["apart"].corrected["unlearning_score_groups"] == 0.0
    assert results["grouped"].corrected["unlearning_precision_groups"] == 3.0
    assert not [name for name in results["control"].corrected if name.endswith("_groups")]
    assert [s["features"] for s in results["grouped"].unstructured["settings"]["questions_groups"]] == [[0, 1]] * 8


def test_stages_add_children_where_something_is_left(tmp_path, monkeypatch):
    """Fails if stage 1 clamps a feature of layer 1, or children are added to what is forgotten already, or nowhere."""
    def staged(layer_2, child):
        return dict(stages=lambda: {"layer_2": layer_2, "layer_1": ()}, children_of=lambda parents: [child])

    # both fire on the forget text, neither on the retain text
    given = material()._replace(choosing={"forget": ["right_bio bio"] * 90, "retain": ["past king"] * 90})
    saes = {"topic first": sae_of(0, 6, **staged([1], 0)), "knowledge first": sae_of(0, 6, **staged(range(1), 1))}
    results = unlearning.run(make_setup(tmp_path, monkeypatch, given), saes)
    scores = {name: [score_of(r), *(r.corrected[f"unlearning_score_stage_{i}"] for i in (1, 2))]
              for name, r in results.items()}
    assert scores == {"topic first": [0.75, 0.0, 0.75], "knowledge first": [0.75, 0.75, 0.75]}
    clamped = {name: [r.unstructured["settings"][f"questions_stage_{i}"][0]["features"] for i in (1, 2)]
               for name, r in results.items()}
    assert clamped == {"topic first": [[1], [0, 1]], "knowledge first": [[0], [0]]}


def test_rise_on_text_by_hand(tmp_path, monkeypatch):
    """Fails if the rise is not per token of the measured text, or if few questions keep it from being measured."""
    setup = make_setup(tmp_path, monkeypatch, config={"min_questions": 5})
    result = unlearning.run(setup, {"sae": sae_of(6, 7)})["sae"]
    assert score_of(result) is None and result.corrected["unlearning_precision"] is None
    assert result.problems == ["the model answers only 4 of 4 forget questions (life 4 of 4) and 4 of 4 retain "
                               "questions (history 4 of 4) right under all 24 orders of the options, 5 of each are "
                               "needed: no unlearning_score, no unlearning_precision"]
    # after "bio", the logits are 2 for "bio", 3 for A, 1 for B after a space, 0 for 61 others; the clamp makes −50 of 2
    others = math.e**3 + math.e + 61
    cell = math.log(math.exp(-50) + others) - math.log(math.e**2 + others)
    rise = {"bio": 52 + cell, "cell": cell}
    tokens_NT = questions.prepared(setup).measuring["forget"][0]
    word = {WORDS.index("bio"): "bio", Tokenizer.token("cell"): "cell"}
    pairs = [(a, b) for row in tokens_NT.tolist() for a, b in itertools.pairwise(row) if a in word and b in word]
    by_hand = sum(rise[word[b]] for a, b in pairs if word[a] == "bio") / len(pairs)
    assert result.corrected["text_forget_rise"] == pytest.approx(by_hand, rel=1e-5)
    assert result.corrected["text_retain_rise"] == 0.0
    assert result.corrected["text_unlearning_precision"] == pytest.approx(by_hand / 0.001, rel=1e-5)


def test_text_bound_and_dead_saes(tmp_path, monkeypatch):
    """Fails if an edit that costs the retain text more than 1 % counts, or if an idle SAE is not told."""
    # the feature chosen by the topic's word also writes what the retain text needs
    def encode(x):
        much = (x[..., 6:8].sum((-1, -2), keepdim=True) > 12).float()
        return torch.relu(x[..., 6:7] + 0.1 * x[..., 7:8] * much)

    mixed = sae_of(6)
    mixed.encode = encode
    mixed.W_dec = (torch.eye(13)[6:7] + torch.eye(13)[7:8]) / math.sqrt(2)
    dead = SimpleNamespace(encode=lambda x: torch.zeros(*x.shape[:-1], 3), W_dec=torch.eye(13)[:3], sae=None)
    given = material()._replace(choosing={"forget": ["bio cell"] * 90, "retain": ["king queen"] * 90})
    results = unlearning.run(make_setup(tmp_path, monkeypatch, given), {"mixed": mixed, "dead": dead})
    for result in results.values():
        for metric in ("text_forget_rise", "text_retain_rise", "text_unlearning_precision"):
            assert result.corrected[metric] == 0.0
    assert all(s["retain"] > 0.1 for s in results["mixed"].unstructured["settings"]["text"])
    assert results["mixed"].problems == [] and "nothing was clamped" in results["dead"].problems[0]
    assert score_of(results["dead"]) == 0.0


# ------------------------------------------------------------------------------------------------ the run


def test_a_second_run_takes_no_question_twice_and_gives_the_same(tmp_path, monkeypatch):
    """Fails if cached parts differ from fresh ones, another SAE shifts a result, or the random state is touched."""
    saes = {"one": sae_of(0, 6), "two": sae_of(0, 2, 7, feature_groups=lambda: [[0, 1]])}
    first = unlearning.run(make_setup(tmp_path / "a", monkeypatch), saes)
    torch.manual_seed(3)
    random.seed(3)
    state = torch.get_rng_state(), random.getstate()
    again = make_setup(tmp_path / "a", monkeypatch)
    monkeypatch.setattr(questions, "load", None)
    assert unlearning.run(again, {"one": saes["one"]})["one"] == first["one"]
    assert again.cache.misses == [] and again.lm.prefixes == 0
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert unlearning.run(make_setup(tmp_path / "b", monkeypatch, limit_gb=0), saes) == first


def test_tiny_source(tmp_path):
    """Fails if the tiny profile's data do not fit the eval."""
    setup = Setup(FakeLM(), 2, "blocks.2.hook_resid_post", unlearning.CONFIG["tiny"], None, "", Cache(tmp_path, 1.0),
                  Source("tiny"), 0, lambda s: None)
    result = unlearning.run(setup, {"sae": sae_of(8)})["sae"]
    assert "0 of 4 forget questions (animals 0 of 4)" in result.problems[0] and "0 of 8 retain" in result.problems[0]
    assert set(result.corrected) >= {"text_forget_rise", "text_retain_rise", "text_unlearning_precision"}


def test_hub_data_are_read_as_saebench_reads_them(tmp_path, monkeypatch):
    """Fails for another data set, split or field than SAEBench's, for short texts, or a message that does not help."""
    from evals.texts import hub

    asked = []

    def load(name, config=None, **options):
        asked.append((name, config, options))
        if name == "Salesforce/wikitext":
            return {"text": ["", f"{options['split']} " + "a " * 40]}
        return [{"question": f"{config}?", "choices": ["a", "b", "c", "d"], "answer": 2}]

    monkeypatch.setattr(hub, "load", load)
    corpus = tmp_path / "bio.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i} " * n}) + "\n" for i in range(20) for n in (5, 60)))
    config = unlearning.CONFIG["gemma"] | {"forget_corpus": str(corpus)}
    found = questions.load(Source("hub", "x"), config, 0)
    assert found.questions["forget"] == [Question("wmdp-bio", "wmdp-bio?", ["a", "b", "c", "d"], 2)]
    assert [q.subject for q in found.questions["retain"]] == config["retain_subjects"]
    for name in (("cais/wmdp", "wmdp-bio"), ("cais/mmlu", "human_aging"), ("Salesforce/wikitext", "wikitext-2-raw-v1")):
        assert (*name, {"split": "test"}) in asked
    # of 20 that are long enough, a tenth is kept back
    assert len(found.choosing["forget"]) == 18 and len(found.measuring["forget"]) == 2
    assert [found.choosing["retain"][0][:4], found.measuring["retain"][0][:4]] == ["test", "vali"]
    assert questions.corpus(Source("hub", "x", data_dir=tmp_path), config) == str(corpus)
    (tmp_path / "bio-forget-corpus.jsonl").write_text("")
    assert questions.corpus(Source("hub", "x", data_dir=tmp_path), config) == str(tmp_path / "bio-forget-corpus.jsonl")
    assert set(unlearning.repositories(config, Source("hub", "x"))) >= {"cais/wmdp", "cais/mmlu", str(corpus)}
    own = unlearning.repositories(unlearning.CONFIG["gemma"], Source("hub", "x", data_dir=tmp_path))
    # gated: not asked for then
    assert own[-1] == str(tmp_path / "bio-forget-corpus.jsonl") and "cais/wmdp-bio-forget-corpus" not in own
    with pytest.raises(OSError, match="cannot read the forget corpus .*\n"
                                      ".*gated: ask for access on https://huggingface.co/.*forget_corpus"):
        questions.load(Source("hub", "x"), config | {"forget_corpus": str(tmp_path / "absent.jsonl")}, 0)


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path, monkeypatch):
    """Fails as scarce.check_every_batch says, of the densities or of the scores."""
    def densities_and_scores(setup, saes):
        densities = unlearning._densities(setup, questions.prepared(setup).choosing, saes)
        return [unlearning.run(setup, saes), [side_F.tolist() for side_F in densities["sae"]]]

    scarce.check_every_batch(densities_and_scores, make_setup(tmp_path, monkeypatch), sae_of(0, 1, 8))


def test_requirements_name_what_is_missing():
    """Fails if a model without instruction tuning, or a setting that leaves nothing to measure, is let through."""
    facts = {"instruct_model": "m-it", "model": "m"}
    for config in unlearning.CONFIG.values():
        assert unlearning.requirements(config, facts) == []
        (problem,) = unlearning.requirements(config, facts | {"instruct_model": None})
        assert "m has no instruction-tuned sibling" in problem
        assert "multipliers" in unlearning.requirements(config | {"multipliers": []}, facts)[0]
        assert "min_questions = 0" in unlearning.requirements(config | {"min_questions": 0}, facts)[0]
