"""How texts are divided: what is held out of training, and the train and test texts of labelled sets."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable

HELD_OUT = 13  # of 256 documents


def held_out(document: str | list[int]) -> bool:
    """Whether a document is kept out of training: 13 of 256 are, by their SHA-256, so that equal texts go together."""
    text = document if isinstance(document, str) else json.dumps(document)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] < HELD_OUT


def split_documents(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The documents to train on and the held-out ones, each in the given order."""
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        sides[held_out(text)].append(text)
    return sides


def draw(name: str, pools: dict[str, list[str]], config: dict, seed: int) -> dict[str, dict[str, list[str]]]:
    """Train and test texts per class, {class: {"train": [...], "test": [...]}}, distinct across the whole data set.

    config: `probe_train_set_size`, `probe_test_set_size`, positives and negatives together as in SAEBench, so half of
    them per class. The test texts stay the same when the training size changes. ValueError if a class has too few
    texts.
    """
    n_train, n_test = config["probe_train_set_size"] // 2, config["probe_test_set_size"] // 2
    seen: set[str] = set()
    drawn = {}
    for label, pool in pools.items():
        texts = [text for text in dict.fromkeys(pool) if text and text not in seen]
        seen.update(texts)
        if len(texts) < n_train + n_test:
            raise ValueError(f"probing set {name}: class {label!r} has {len(texts)} texts, "
                             f"{n_train} + {n_test} are asked for\n"
                             f"set probe_train_set_size + probe_test_set_size to at most {2 * len(texts)}")
        random.Random(f"{seed} {name} {label}").shuffle(texts)
        drawn[label] = {"train": texts[n_test:n_test + n_train], "test": texts[:n_test]}
    return drawn
