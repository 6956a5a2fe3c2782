"""Prompts of the eval `sae_probes` and their last token's activations: the 113 binary data sets in the wheel of
sae-probes 0.4.2, read as data, or two made from the tiny profile's grammar.

A data set is a list of (prompt, label), label 0 or 1, as many of either, in the file's order.
Shapes: N rows of a data set, U distinct prompts, b of one LM batch, T positions, D = d_model.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evals.common import layers, probes
from evals.model import memory
from evals.storage.identity import code_digest
from evals.texts import embedded, tiny

# the rows of type "Binary Classification" in the wheel's probing_datasets_MASTER.csv, in its order
NAMES = (
    "5_hist_fig_ismale", "6_hist_fig_isamerican", "7_hist_fig_ispolitician", "21_headline_istrump",
    "22_headline_isobama", "23_headline_ischina", "24_headline_isiran", "26_headline_isfrontpage", "36_sciq_tf",
    "41_truthqa_tf", "42_temp_sense", "44_phys_tf", "47_reasoning_tf", "48_cm_correct", "49_cm_isshort",
    "50_deon_isvalid", "51_just_is", "52_virtue_is", "54_cs_tf", "56_wikidatasex_or_gender", "57_wikidatais_alive",
    "58_wikidatapolitical_party", "59_wikidata_occupation_isjournalist", "60_wikidata_occupation_isathlete",
    "61_wikidata_occupation_isactor", "62_wikidata_occupation_ispolitician", "63_wikidata_occupation_issinger",
    "64_wikidata_occupation_isresearcher", "65_high-school", "66_living-room", "67_social-security", "68_credit-card",
    "69_blood-pressure", "70_prime-factors", "71_social-media", "72_gene-expression", "73_control-group",
    "74_magnetic-field", "75_cell-lines", "76_trial-court", "77_second-derivative", "78_north-america",
    "79_human-rights", "80_side-effects", "81_public-health", "82_federal-government", "83_third-party",
    "84_clinical-trials", "85_mental-health", "87_glue_cola", "89_glue_mrpc", "90_glue_qnli", "91_glue_qqp",
    "92_glue_sst2", "94_ai_gen", "95_toxic_is", "96_spam_is", "100_news_fake", "105_click_bait", "106_hate_hate",
    "107_hate_offensive", "110_aimade_humangpt3", "113_movie_sent", "114_nyc_borough_Manhattan",
    "115_nyc_borough_Brooklyn", "116_nyc_borough_Bronx", "117_us_state_FL", "118_us_state_CA", "119_us_state_TX",
    "120_us_timezone_Chicago", "121_us_timezone_New_York", "122_us_timezone_Los_Angeles",
    "123_world_country_United_Kingdom", "124_world_country_United_States", "125_world_country_Italy",
    "126_art_type_book", "127_art_type_song", "128_art_type_movie", "129_arith_mc_A", "130_temp_cat_Frequency",
    "131_temp_cat_Typical Time", "132_temp_cat_Event Ordering", "133_context_type_Causality",
    "134_context_type_Belief_states", "135_context_type_Event_duration", "136_glue_mnli_entailment",
    "137_glue_mnli_neutral", "138_glue_mnli_contradiction", "139_news_class_Politics", "140_news_class_Technology",
    "141_news_class_Entertainment", "142_cancer_cat_Thyroid_Cancer", "143_cancer_cat_Lung_Cancer",
    "144_cancer_cat_Colon_Cancer", "145_disease_class_digestive system diseases",
    "146_disease_class_cardiovascular diseases", "147_disease_class_nervous system diseases", "148_twt_emotion_worry",
    "149_twt_emotion_happiness", "150_twt_emotion_sadness", "151_it_tick_HR Support", "152_it_tick_Hardware",
    "153_it_tick_Administrative rights", "154_athlete_sport_football", "155_athlete_sport_basketball",
    "156_athlete_sport_baseball", "157_amazon_5star", "158_code_C", "159_code_Python", "160_code_HTML", "161_agnews_0",
    "162_agnews_1", "163_agnews_2",
)
TINY = {"topic_animals": ("animals", 120), "topic_music": ("music", 116)}  # topic told from the others, rows of a side
REPEATED = 12  # rows of the other side in a tiny data set that repeat earlier ones: the real ones have such, too
TOKENISED_AT_ONCE = 1024  # prompts; all 222,062 at once would hold gigabytes of offsets


# ------------------------------------------------------------------------------------------------ data sets


def names(kind: str) -> tuple[str, ...]:
    """The data sets there are for a kind of text source."""
    return tuple(TINY) if kind == "tiny" else NAMES


def identity(kind: str) -> list:
    """What the data sets are made from, for cache keys."""
    return [tiny.VERSION, tiny.SEED] if kind == "tiny" else [embedded.WHEELS["sae_probes"].sha256, embedded.SEED]


def read(source, config: dict) -> dict[str, list[tuple[str, int]]]:
    """The data sets of config's `dataset_names` (empty: all), each cut to `max_rows`; with the hub, the wheel's."""
    chosen = config["dataset_names"] or names(source.kind)
    if source.kind == "tiny":
        return {name: reduced(name, _topic(*TINY[name]), config["max_rows"]) for name in chosen}
    wheel = embedded.fetch("sae_probes", source.cache_dir, source.data_dir)
    return {name: reduced(name, _member(wheel, name), config["max_rows"]) for name in chosen}


def reduced(name: str, rows: list[tuple[str, int]], max_rows: int) -> list[tuple[str, int]]:
    """At most `max_rows` rows in the given order, half of each label; the same ones on every run, whatever its seed."""
    if len(rows) <= max_rows:
        return rows
    rng = probes.generator(embedded.SEED, name)
    kept: list[int] = []
    for wanted in (0, 1):
        places = torch.tensor([place for place, (_, label) in enumerate(rows) if label == wanted])
        kept += places[torch.randperm(len(places), generator=rng)[: max_rows // 2]].tolist()
    return [rows[place] for place in sorted(kept)]


def labelled(rows: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Rows (prompt, target) with the targets numbered in their alphabetical order."""
    number = {target: label for label, target in enumerate(sorted({target for _, target in rows}))}
    return [(prompt, number[target]) for prompt, target in rows]


def _member(wheel: Path, name: str) -> list[tuple[str, int]]:
    import pyarrow

    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(f"{embedded.WHEELS['sae_probes'].member}cleaned_data/{name}.csv.zst")
    text = pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd").read().decode("utf-8")
    return labelled([(row["prompt"], row["target"]) for row in csv.DictReader(io.StringIO(text, newline=""))])


def _topic(topic: str, n: int) -> list[tuple[str, int]]:
    """n texts about the topic and n about the others, alternating."""
    drawn = tiny.probing({"probe_train_set_size": 2 * n, "probe_test_set_size": 0})["synthetic"]
    pools = [splits["train"] for name, splits in drawn.items() if name != topic]
    others = [text for texts in zip(*pools) for text in texts][: n - REPEATED]
    pairs = zip(drawn[topic]["train"], others + others[:REPEATED])
    return [row for pair in pairs for row in zip(pair, (1, 0))]


# ---------------------------------------------------------------------------------------------- prompts and activations


def prompts(setup) -> tuple[dict, dict[str, tuple[Tensor, Tensor]], list[Tensor], Tensor]:
    """What decides them (for cache keys), {data set: (place_N, label_N)}, the distinct prompts' tokens and their
    length_U.

    BOS and the last max_tokens − 1 tokens of a prompt; the longest come first, so that a batch wastes little on
    padding. Prompts of equal tokens, in one data set or in several, are one prompt: 334,092 rows are 222,062 prompts. A
    second run reads no texts.
    """
    config, bos = setup.config, setup.lm.bos

    def make() -> dict[str, Tensor]:
        sets = read(setup.data, config)
        texts = list(dict.fromkeys(text for rows in sets.values() for text, _ in rows))
        ends = {}
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            part = texts[start : start + TOKENISED_AT_ONCE]
            for text, ids in zip(part, setup.lm.tokenizer(part, add_special_tokens=False)["input_ids"]):
                ends[text] = (bos, *ids[-(config["max_tokens"] - 1) :])
        distinct = sorted(set(ends.values()), key=lambda end: (-len(end), end))
        place = {end: i for i, end in enumerate(distinct)}
        stored = {"tokens": torch.tensor([token for end in distinct for token in end], dtype=torch.int32),
                  "length": torch.tensor([len(end) for end in distinct])}
        for i, rows in enumerate(sets.values()):
            stored[f"rows {i}"] = torch.tensor([[place[ends[text]] for text, _ in rows], [label for _, label in rows]])
        return stored

    chosen = list(dict.fromkeys(config["dataset_names"] or names(setup.data.kind)))
    depends_on = {"data": identity(setup.data.kind), "names": chosen, "max_rows": config["max_rows"],
                  "max_tokens": config["max_tokens"], "lm": setup.lm.digest,
                  "code": code_digest(__file__)}
    stored = setup.cache.get("sae_probes_prompts", depends_on, make)
    sets = {name: tuple(stored[f"rows {i}"]) for i, name in enumerate(chosen)}
    return depends_on, sets, list(stored["tokens"].split(stored["length"].tolist())), stored["length"]


def last_tokens(setup, rows: list[Tensor], length_U: Tensor) -> Tensor:
    """The residual stream at setup.layer of each prompt's last token, x_UD on the CPU in the LM's dtype.

    All of them are held: 222,062 prompts are 1 GB in bf16 for Gemma-2-2B. A batch has as many tokens as llm_batch_size
    prompts of max_tokens have; each is an entry of the cache, so a run that was stopped goes on.
    """
    spans, tokens = [], setup.config["llm_batch_size"] * setup.config["max_tokens"]
    while not spans or spans[-1].stop < len(rows):
        start = spans[-1].stop if spans else 0
        spans.append(slice(start, min(len(rows), start + max(1, tokens // int(length_U[start])))))
    parts = []
    for span in setup.track(spans, "sae_probes: language model", len(spans), "batch"):
        tokens_bT = torch.nn.utils.rnn.pad_sequence(rows[span], batch_first=True, padding_value=setup.lm.bos).long()

        def make(wanted: list[int], tokens_bT=tokens_bT, last_b=length_U[span] - 1) -> dict[int, dict[str, Tensor]]:
            with torch.no_grad():
                found = memory.residual_of(setup, tokens_bT, wanted)
            return {layer: {"x": x_bTD[torch.arange(len(last_b)), last_b]} for layer, x_bTD in found.items()}

        lengths, sha = length_U[span].tolist(), hashlib.sha256(tokens_bT.numpy().tobytes()).hexdigest()

        def depends_on(layer: int, lengths=lengths, sha=sha) -> dict:
            return {"lm": setup.lm.digest, "layer": layer, "tokens": sha, "lengths": lengths,
                    "torch": torch.__version__, "device": torch.device(setup.lm.device).type}

        n_bytes = 4 * len(lengths) * setup.lm.d_model
        parts.append(layers.shared(setup, "last_tokens", depends_on, n_bytes, make)["x"].cpu())
    return torch.cat(parts)
