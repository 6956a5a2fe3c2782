"""The texts of the tiny profile, made in a second from a small grammar.

Its model (evals.model.built_in) has random weights, so that its scores mean nothing about an SAE variant.
"""

from __future__ import annotations

import functools
import random

from evals.texts.splits import draw, split_documents

VERSION = 1  # goes into cache keys and the model's folder name: raise it when the model or the texts change
SEED = 42
DOCUMENTS = 4000  # about 45 words each

# {topic: (nouns, verbs, places)}
TOPICS = {
    "animals": (["fox", "otter", "heron", "badger", "wolf", "beetle"],
                ["hunts", "hides", "sleeps", "runs", "feeds"],
                ["in the forest", "by the river", "under the old oak", "near its den"]),
    "cooking": (["soup", "bread", "sauce", "stew", "cake", "dough"],
                ["simmers", "rises", "cools", "bakes", "thickens"],
                ["in the oven", "on the stove", "with butter and salt", "for 20 minutes"]),
    "space": (["comet", "planet", "moon", "probe", "star", "telescope"],
              ["orbits", "shines", "drifts", "turns", "fades"],
              ["around the sun", "in the night sky", "near Saturn", "at 300 km per second"]),
    "music": (["violin", "choir", "drum", "pianist", "song", "flute"],
              ["plays", "sounds", "echoes", "pauses", "swells"],
              ["in the concert hall", "at 120 beats", "before the audience", "in a minor key"]),
}
ADJECTIVES = ["small", "old", "bright", "quiet", "strange", "famous", "slow", "pale"]


def _document(rng: random.Random, topic: str, sentences: int) -> str:
    nouns, verbs, places = TOPICS[topic]
    return " ".join(f"{rng.choice(('The', 'A', 'This', 'Every'))} {rng.choice(ADJECTIVES)} {rng.choice(nouns)} "
                    f"{rng.choice(verbs)} {rng.choice(places)}." for _ in range(sentences))


def documents(split: str) -> list[str]:
    """The synthetic documents of a split ("train", "heldout"), always in the same order."""
    return _splits()[split == "heldout"]


@functools.lru_cache(maxsize=1)
def _splits() -> tuple[list[str], list[str]]:
    rng = random.Random(SEED)
    texts = [_document(rng, rng.choice(list(TOPICS)), rng.randint(2, 9)) for _ in range(DOCUMENTS)]
    return split_documents(texts)


def probing(config: dict) -> dict[str, dict[str, dict[str, list[str]]]]:
    """{"synthetic": {topic: {"train": [...], "test": [...]}}}, half of the configured set size per topic."""
    rng = random.Random(SEED + 1)
    n = config["probe_train_set_size"] + config["probe_test_set_size"]  # twice what is needed: some may be equal
    pools = {topic: [_document(rng, topic, 2) for _ in range(n)] for topic in TOPICS}
    return {"synthetic": draw("synthetic", pools, config, SEED)}
