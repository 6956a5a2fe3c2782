"""Data sets of the Hugging Face hub: access to them, and SAEBench's eight probing sets.

Running text is read by evals.texts.streams.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from evals.storage import network
from evals.texts import streams, text_files
from evals.texts.text_files import identity  # noqa: F401  what evals ask for beside `open_stream`

SELECTION = 1  # goes into cache keys: raise it when the selection of texts below changes
SEED = 42  # SAEBench's, for every selection

# ------------------------------------------------------------------------------------------------ data sets


def load(name: str, config: str | None, split: str):
    """A split of a data set, whole, as `datasets.Dataset`, at the pinned commit; OSError or ValueError in words."""
    import datasets

    of = text_files.found(f"{name}:{config or ''}:{split}")

    def work():
        files = [network.nearby(file) for file in of.files]
        return datasets.load_dataset(of.module, data_files=files, split="train", **of.options)

    return text_files.asked(name, config, work)


def open_stream(name: str, config: str | None = None) -> Iterator[dict]:
    """The rows of the train split of a hub data set, or of a local file or folder, in their own order."""
    rows = streams.Rows(text_files.found(f"{name}:{config}" if config else name), shuffled=False)
    return (row for row in rows if row is not None)


# ---------------------------------------------------------------------------------------------- SAEBench's probing sets
# SAEBench's selections. A frame is a pandas.DataFrame; n counts texts of one class; classes keep the order given.


def probing(config: dict, cache_dir: Path | None = None) -> dict[str, dict[str, dict[str, list[str]]]]:
    """SAEBench's labelled texts {data set: {class: {"train": [...], "test": [...]}}}, selected exactly as it does.

    config: `dataset_names` (default: all eight), `probe_train_set_size` and `probe_test_set_size`, half of which is per
    class.
    """
    n_train, n_test = config["probe_train_set_size"] // 2, config["probe_test_set_size"] // 2

    def draw(name: str) -> dict[str, dict[str, list[str]]]:
        (repository,) = repositories({"dataset_names": [name]})
        depends_on = {"set": name, "n_train": n_train, "n_test": n_test, "selection": SELECTION}

        def make():  # a stream that breaks off is read again from its beginning
            return text_files.asked(repository, None, lambda: PROBING[name](n_train, n_test))

        return network.kept(cache_dir, "probing", depends_on, make, [repository])

    return {name: draw(name) for name in _chosen(config)}


def repositories(config: dict) -> list[str]:
    """The hub data sets that `probing(config)` reads, each once."""
    return list(dict.fromkeys(name.split("_class_set")[0].removesuffix("_sentiment") for name in _chosen(config)))


def _chosen(config: dict) -> list[str]:
    names = config.get("dataset_names") or list(PROBING)
    unknown = [name for name in names if name not in PROBING]
    if unknown:
        raise ValueError(f"unknown probing set {unknown[0]!r}\nchoose among {', '.join(PROBING)}")
    return names


def balanced(frame, label: str, balance: str, text: str, classes: list, n: int) -> dict[str, list[str]]:
    """n texts per class, as many of each value of the column `balance` (two values: n/2 and n/2)."""
    chosen = {}
    for value in classes:
        halves = [group for _, group in frame[frame[label] == value].groupby(balance)]
        chosen[str(value)] = [t for half in halves for t in _sample(half, text, n // 2, value)]
    return chosen


def sampled(frame, label: str, text: str, classes: list, n: int) -> dict[str, list[str]]:
    """n texts per class, drawn without replacement."""
    return {str(value): _sample(frame[frame[label] == value], text, n, value) for value in classes}


def _sample(frame, text: str, n: int, label) -> list[str]:
    if len(frame) < n:
        raise ValueError(f"probing class {label!r} has {len(frame)} texts to draw {n} from\n"
                         "lower the probing set sizes")
    return frame.sample(n=n, random_state=SEED)[text].tolist()


def collect(labelled: Iterable[tuple[str, str]], classes: list[str], more_than: int) -> dict[str, list[str]]:
    """Texts of (class, text) pairs by class, until each has more than `more_than`; others go on growing meanwhile."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    for name, text in labelled:
        if name in found:
            found[name].append(text)
            if all(len(texts) > more_than for texts in found.values()):
                break
    return found


def shuffled_split(texts: dict[str, list[str]], n_train: int, n_test: int) -> dict[str, dict[str, list[str]]]:
    """Train and test texts of each class after a shuffle; one random stream runs through the classes in their order."""
    rng = random.Random(SEED)
    split = {}
    for name, pool in texts.items():
        if len(pool) < n_train + n_test:
            raise ValueError(f"probing class {name!r} has {len(pool)} texts for {n_train} + {n_test}\n"
                             "lower the probing set sizes")
        pool = list(pool)
        rng.shuffle(pool)
        split[name] = {"train": pool[:n_train], "test": pool[n_train:n_train + n_test]}
    return split


def _both(select: Callable, frames: dict, n_train: int, n_test: int) -> dict[str, dict[str, list[str]]]:
    """The same selection from the train and the test frame."""
    train, test = select(frames["train"], n_train), select(frames["test"], n_test)
    return {name: {"train": train[name], "test": test[name]} for name in train}


@functools.lru_cache(maxsize=1)  # the three class sets of biographies follow each other, and so do the two of reviews
def frames(name: str) -> dict:
    """{split: pandas.DataFrame} of a data set's train and test split."""
    return {split: load(name, None, split).to_pandas() for split in ("train", "test")}


def _biographies(classes: list[int], n_train: int, n_test: int):
    return _both(lambda frame, n: balanced(frame, "profession", "gender", "hard_text", classes, n),
                 frames("LabHC/bias_in_bios"), n_train, n_test)


def _reviews(n_train: int, n_test: int):
    return _both(lambda frame, n: balanced(frame, "category", "rating", "text", [1, 2, 3, 5, 6], n),
                 frames("canrager/amazon_reviews_mcauley_1and5"), n_train, n_test)


def _review_sentiment(n_train: int, n_test: int):
    return _both(lambda frame, n: sampled(frame, "rating", "text", [1.0, 5.0], n),
                 frames("canrager/amazon_reviews_mcauley_1and5"), n_train, n_test)


def _news(n_train: int, n_test: int):
    return _both(lambda frame, n: sampled(frame, "label", "text", [0, 1, 2, 3], n),
                 frames("fancyzhx/ag_news"), n_train, n_test)


def _languages(n_train: int, n_test: int):
    pairs = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
    rows = {name: open_stream("Helsinki-NLP/europarl", pair) for name, pair in pairs.items()}
    return shuffled_split(europarl(rows, n_train + n_test), n_train, n_test)


def europarl(rows: dict[str, Iterable[dict]], n: int) -> dict[str, list[str]]:
    """The first n + 1 sentences of each language, from rows of a translation pair it takes part in."""
    return {name: collect(((name, row["translation"][name]) for row in pair), [name], n)[name]
            for name, pair in rows.items()}


CODE_SUFFIXES = {"C": (".c", ".h"), "Python": (".py",), "HTML": (".html",), "Java": (".java",),
                 "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt")}  # the data set's own table
LICENCE_CHARS = 150  # about 50 tokens at the head of a file, often a licence
CODE_CHARS = 384  # about 128 tokens


def _code(n_train: int, n_test: int):
    # the data set's loading script, which `datasets` runs no more, did this: name the language by the path's suffix
    rows = open_stream_of_files("codeparrot/github-code", "data/train-*.parquet")
    return shuffled_split(collect(code(rows), list(CODE_SUFFIXES), n_train + n_test), n_train, n_test)


def open_stream_of_files(name: str, pattern: str) -> Iterator[dict]:
    """Rows of the parquet files of a hub data set, without its loading script."""
    commit = network.commit("dataset", name)
    files = [f"hf://datasets/{name}@{commit}/{file}" for file in network.listing("dataset", name, commit)
             if fnmatch.fnmatch(file, pattern)]
    return iter(streams.Rows(text_files.Found(name, sorted(files), "parquet", {}, [], None, False), shuffled=False))


def code(rows: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """(language, text without its first 150 characters) of the source files that are longer than 534 characters."""
    language = {suffix: name for name, suffixes in CODE_SUFFIXES.items() for suffix in suffixes}
    for row in rows:
        name = language.get(os.path.splitext(row["path"])[1])
        text = row.get("code", row.get("content"))
        if name and len(text) > LICENCE_CHARS + CODE_CHARS:
            yield name, text[LICENCE_CHARS:]


PROBING: dict[str, Callable[[int, int], dict]] = {
    "LabHC/bias_in_bios_class_set1": functools.partial(_biographies, [0, 1, 2, 6, 9]),
    "LabHC/bias_in_bios_class_set2": functools.partial(_biographies, [11, 13, 14, 18, 19]),
    "LabHC/bias_in_bios_class_set3": functools.partial(_biographies, [20, 21, 22, 25, 26]),
    "canrager/amazon_reviews_mcauley_1and5": _reviews,
    "canrager/amazon_reviews_mcauley_1and5_sentiment": _review_sentiment,
    "codeparrot/github-code": _code,
    "fancyzhx/ag_news": _news,
    "Helsinki-NLP/europarl": _languages,
}
