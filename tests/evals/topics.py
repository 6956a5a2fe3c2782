"""What the tests of scr and tpp share: a language model that knows the tiny topics, SAEs, and what both must hold."""

from types import SimpleNamespace

import torch
from torch.nn import functional

from evals import Setup
from evals.cache import Cache
from evals.texts import tiny
from evals.texts.source import Source

BOS, EOS, PAD = 0, 1, 2
D = 12
WORDS = sorted({word for nouns, verbs, places in tiny.TOPICS.values() for phrase in (*nouns, *verbs, *places)
                for word in phrase.split()} | {*tiny.ADJECTIVES, "The", "A", "This", "Every"})


class FakeLM:
    """A position is its word's vector and some of those before; channels 0 to 3 know the topic, 4 the adjectives."""

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


def make_setup(tmp_path, config, limit_gb=1.0, seed=0):
    config = config | {"llm_batch_size": 7, "sae_batch_size": 5}
    return Setup(FakeLM(), 3, "blocks.3.hook_resid_post", config, None, "", Cache(tmp_path, limit_gb), Source("tiny"),
                 seed, lambda s: None)


def check_independence(tmp_path, module):
    """Fails if the cache, another SAE or the global random state shifts a score, or if the LM is asked twice."""
    config = module.CONFIG["tiny"]

    def measured(setup, **beside):
        return module.run(setup, beside | {"one": random_sae(1)})["one"]

    alone = measured(make_setup(tmp_path / "a", config))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    setup = make_setup(tmp_path / "a", config)
    cached = measured(setup, two=random_sae(2, 40))
    assert setup.lm.rows == 0 and setup.cache.misses == []
    assert alone == cached == measured(make_setup(tmp_path / "b", config, limit_gb=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.unstructured != measured(make_setup(tmp_path / "a", config, seed=1)).unstructured


def check_reasons(tmp_path, module, monkeypatch):
    """Fails if too few texts or non-finite features end the run or give a number, or a dead SAE passes for measured."""
    nan = SimpleNamespace(encode=lambda x: x.float() / 0.0, W_dec=torch.eye(D))
    dead = SimpleNamespace(encode=lambda x: torch.zeros_like(x.float()), W_dec=torch.eye(D))
    results = module.run(make_setup(tmp_path, module.CONFIG["tiny"]), {"nan": nan, "dead": dead, "good": random_sae(1)})
    (numbers,) = results["nan"].metrics.values()
    assert set(numbers.values()) == {None} and set(results["nan"].corrected.values()) == {None}
    assert "NaN or inf" in results["nan"].problems[0] and "dead SAE" in results["dead"].problems[0]
    assert not results["good"].problems

    monkeypatch.setattr(tiny, "ADJECTIVES", ["old", "old"])
    monkeypatch.setattr(tiny, "TOPICS", {topic: tuple(words[:1] for words in lists)
                                         for topic, lists in tiny.TOPICS.items()})
    few = module.run(make_setup(tmp_path / "few", module.CONFIG["tiny"]), {"sae": random_sae(1)})["sae"]
    assert set(few.corrected.values()) == {None} and "no score" in few.problems[0] and "texts" in few.problems[0]


def check_requirements(module, *sources):
    """Fails if a profile's settings are refused, or some that SAEBench has no key for, or that cannot run, pass."""
    for source in sources:
        config = module.CONFIG["gemma" if source == "hub" else source]
        assert module.requirements(config, {"source": source}) == []
        for wrong in ({"n_values": [3]}, {"context_length": 1}, {"probe_epochs": 0}):
            assert next(iter(wrong)) in module.requirements(config | wrong, {"source": source})[0]
