"""Where texts come from: the embedded wheels, the tiny profile's grammar, the hub, or files of the user's own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.cache import digest as hashed

SPLITS = ("train", "heldout")


class Listed:
    """An iterator over a list of texts whose place can be kept: it continues where `state()` of another one was taken."""

    def __init__(self, texts: Sequence[str], state: dict | None = None):
        self.texts, self.index = texts, state["index"] if state else 0

    def __iter__(self) -> Listed:
        return self

    def __next__(self) -> str:
        if self.index >= len(self.texts):
            raise StopIteration
        self.index += 1
        return self.texts[self.index - 1]

    def state(self) -> dict:
        return {"index": self.index}


def held_out(text: str) -> bool:
    """Whether a document is kept out of training: 13 of 256 are, by the SHA-256 of the text, so equal texts go together."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] < 13


def split_documents(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The documents to train on and the held-out ones, each in the given order."""
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        sides[held_out(text)].append(text)
    return sides


def draw(name: str, pools: dict[str, list[str]], config: dict, seed: int) -> dict[str, dict[str, list[str]]]:
    """Train and test texts per class, {class: {"train": [...], "test": [...]}}, distinct across the whole data set.

    config: `probe_train_set_size`, `probe_test_set_size`, positives and negatives together as in SAEBench, so half of them
    per class. The test texts stay the same when the training size changes. ValueError if a class has too few texts.
    """
    n_train, n_test = config["probe_train_set_size"] // 2, config["probe_test_set_size"] // 2
    seen: set[str] = set()
    drawn = {}
    for label, pool in pools.items():
        texts = [text for text in dict.fromkeys(pool) if text and text not in seen]
        seen.update(texts)
        if len(texts) < n_train + n_test:
            raise ValueError(f"probing set {name}: class {label!r} has {len(texts)} texts, {n_train} + {n_test} are asked for\n"
                             f"set probe_train_set_size + probe_test_set_size to at most {2 * len(texts)}")
        random.Random(f"{seed} {name} {label}").shuffle(texts)
        drawn[label] = {"train": texts[n_test:n_test + n_train], "test": texts[:n_test]}
    return drawn


@dataclass(frozen=True)
class Source:
    """The texts of a run: `dataset` (a hub name, a file or a folder of .jsonl, .parquet, .txt) or, without it, the kind's own.

    Held-out documents are those of `core_dataset` if that is another one, else the part of the texts that `held_out` picks.
    Probing sets are the kind's own in any case. ValueError for an unknown kind, or the hub without a `dataset`.
    """

    kind: str  # embedded, tiny, hub
    dataset: str | None = None
    core_dataset: str | None = None
    text_field: str = "text"
    cache_dir: Path | None = None
    data_dir: Path | None = None  # folder with wheels fetched by hand

    def __post_init__(self):
        _known("kind of text source", self.kind, ("embedded", "tiny", "hub"))
        if self.kind == "hub" and not self.dataset:
            raise ValueError("texts from the hub need the name of a data set\n"
                             "give --dataset, for example monology/pile-uncopyrighted")

    def documents(self, split: str, state: dict | None = None) -> Iterator[str]:
        """A fresh iterator over the documents of "train" or "heldout", always in the same order.

        Its method `state()` gives, JSON-able, what follows the last text handed out; an iterator made with it continues there.
        """
        _known("split", split, SPLITS)
        if self._name(split):
            from evals import hub
            return hub.Stream(self._name(split), self.text_field, self._keep(split), state)
        if self.kind == "tiny":
            from evals import tiny
            return Listed(tiny.documents(split), state)
        from evals import embedded
        return Listed(embedded.documents(split, self.cache_dir, self.data_dir), state)

    def digest(self, split: str) -> str:
        """Identity of what `documents(split)` yields, for cache keys."""
        _known("split", split, SPLITS)
        if self._name(split):
            from evals import hub
            rule = "all" if self._keep(split) is None else split
            return hashed({"texts": hub.identity(self._name(split)), "field": self.text_field, "rule": rule})
        return hashed({"texts": self._own(), "split": split})

    def probing(self, config: dict) -> dict[str, dict[str, dict[str, list[str]]]]:
        """Labelled texts {data set: {class: {"train": [...], "test": [...]}}} by config's set sizes (and `dataset_names`)."""
        if self.kind == "hub":
            from evals import hub
            return hub.probing(config)
        if self.kind == "tiny":
            from evals import tiny
            return tiny.probing(config)
        from evals import embedded
        return embedded.probing(config, self.cache_dir, self.data_dir)

    def probing_digest(self, config: dict) -> str:
        """Identity of what `probing(config)` returns, for cache keys."""
        keys = ("dataset_names", "probe_train_set_size", "probe_test_set_size")
        if self.kind == "hub":
            from evals import hub
            own = [hub.SELECTION, {name: hub.identity(name) for name in hub.repositories(config)}]
        else:
            own = self._own()
        return hashed({"sets": own, **{key: config.get(key) for key in keys}})

    def _name(self, split: str) -> str | None:
        return (split == "heldout" and self.core_dataset) or self.dataset

    def _keep(self, split: str):
        if self.core_dataset and self.core_dataset != self.dataset:
            return None  # the held-out texts are another data set's, so all of either may be used
        return held_out if split == "heldout" else lambda text: not held_out(text)

    def _own(self):
        """What the texts of the embedded and the tiny kind are made from."""
        if self.kind == "tiny":
            from evals import tiny
            return [tiny.VERSION, tiny.SEED]
        from evals import embedded
        return [embedded.SELECTION, embedded.SEED, {key: embedded.WHEELS[key].sha256 for key in embedded.TEXTS}]


def _known(what: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}\nchoose one of {', '.join(valid)}")
