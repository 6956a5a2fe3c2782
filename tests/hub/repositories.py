"""Small repositories with the names, files, columns, configurations and splits of the real ones, and invented texts.

A builder returns a repository's files, {path: content}, from a fixed seed, so that `Hub.push` takes them too. Texts are
made of 300 invented words; those of a class hold some words more often than the rest does, so that a probe can tell the
classes.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import yaml
import zstandard
from safetensors.torch import save

Files = dict[str, bytes]

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
WORDS = random.Random(0).sample([a + b for a in SYLLABLES for b in SYLLABLES], 300)
MARKS = (WORDS[-28:-14], WORDS[-14:])  # words that tell a second label: gender, rating
TRAIN, TEST = 60, 40  # texts of each class and second label


def build(root: Path, only: Iterable[str] | None = None) -> None:
    """Write the repositories (or those named in `only`) as the server reads them."""
    names = {key.split("/", 1)[1]: key for key in BUILDERS}
    for name in names if only is None else only:
        folder = Path(root) / names[name]
        write(folder / "main", BUILDERS[names[name]]())
        if name in ACCESS:
            write(folder, {"repo.json": json.dumps(ACCESS[name]).encode()})


def write(folder: Path, files: Files) -> None:
    for path, content in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


# ------------------------------------------------------------------------------------------------ texts


def topic(number: int) -> list[str]:
    """Eight words of a class; there are 34 topics."""
    return WORDS[8 * number:8 * number + 8]


def pool(*groups: list[str]) -> list[str]:
    """Words to draw from, those of the groups being 20 times as frequent as the others."""
    return WORDS + 20 * [word for group in groups for word in group]


def sentence(rng: random.Random, words: list[str] = WORDS, least: int = 6, most: int = 18) -> str:
    return " ".join(rng.choices(words, k=rng.randint(least, most))).capitalize() + "."


def document(rng: random.Random, sentences: int, words: list[str] = WORDS) -> str:
    """Paragraphs of four sentences."""
    said = [sentence(rng, words) for _ in range(sentences)]
    return "\n".join(" ".join(said[i:i + 4]) for i in range(0, sentences, 4))


# ------------------------------------------------------------------------------------------------ formats


def card(about: dict, text: str = "Invented texts.\n") -> Files:
    head = yaml.safe_dump(about, sort_keys=False)
    return {"README.md": f"---\n{head}---\n{text}".encode(),
            ".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}


def configs(patterns: dict[str, dict[str, str]], default: str = "") -> dict:
    """The card's list of configurations {name: {split: pattern of its files}}."""
    listed = []
    for name, splits in patterns.items():
        files = [{"split": split, "path": path} for split, path in splits.items()]
        listed.append({"config_name": name, "data_files": files})
        if name == default:
            listed[-1]["default"] = True
    return {"configs": listed}


def features(columns: dict, rows: dict[str, int], config: str = "") -> dict:
    """A configuration's entry in the card's `dataset_info`; `datasets` refuses files with other numbers of rows.

    A column is given as a dtype, or as what stands beside the name in the card.
    """
    listed = [{"name": name, **(about if isinstance(about, dict) else {"dtype": about})}
              for name, about in columns.items()]
    splits = [{"name": split, "num_bytes": 1, "num_examples": n} for split, n in rows.items()]
    named = {"config_name": config} if config else {}
    return {**named, "features": listed, "splits": splits, "download_size": 1, "dataset_size": 1}


def classes(names: Iterable[str]) -> dict:
    return {"dtype": {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}}


def parquet(columns: dict[str, list]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0]}


# ------------------------------------------------------------------------------------------------ streams of documents


def pile() -> Files:
    """30 shards and two held-out files of compressed lines; no configurations. About 18,000 tokens a shard."""
    files = card({"license": "other"}) | {"removal_script.py": b"# removes the copyrighted parts\n"}
    for name in [f"train/{i:02}" for i in range(30)] + ["val", "test"]:
        rng = random.Random(f"pile {name}")
        rows = [{"text": document(rng, rng.choice((4, 12, 40))),
                 "meta": {"pile_set_name": rng.choice(("Pile-CC", "ArXiv", "Github"))}} for _ in range(60)]
        files[f"{name}.jsonl.zst"] = zstandard.ZstdCompressor(level=3).compress(jsonl(rows))
    return files


def openwebtext() -> Files:
    """One configuration of 80 files; about 7,000 rows of 128 tokens."""
    files = card({"dataset_info": features({"text": "string"}, {"train": 80 * 40}, "plain_text"),
                  **configs({"plain_text": {"train": "plain_text/train-*"}}, default="plain_text")})
    for i in range(80):
        rng = random.Random(f"openwebtext {i}")
        files[f"plain_text/train-{i:05}-of-00080.parquet"] = parquet({"text": [document(rng, 16) for _ in range(40)]})
    return files


CODE = {".c": "int {}(int {}) {{ return 0; }}", ".h": "#define {} {}", ".py": "def {}({}): pass",
        ".html": "<p class=\"{}\">{}</p>", ".java": "public static void {}(String {}) {{}}",
        ".php": "<?php function {}(${}) {{}} ?>", ".js": "var {} = {};",
        ".go": "func {}({} int) {{}}", ".md": "# {} {}"}


def github_code() -> Files:
    """A loading script, which `datasets` runs no more, and 8 files (really 1126); about 180 texts of each suffix."""
    files = card({"license": ["other"]}) | {"github-code.py": b"# a loading script\n"}
    for i in range(8):
        rng = random.Random(f"code {i}")
        rows = [source(rng, suffix) for _ in range(22) for suffix in CODE]
        rng.shuffle(rows)
        files[f"data/train-{i:05}-of-00008.parquet"] = parquet(columns_of(rows))
    return files


def source(rng: random.Random, suffix: str) -> dict:
    """A source file: a licence of 150 characters or more, then 20 to 40 lines."""
    words = pool(topic(list(CODE).index(suffix)))
    lines = [f"/* {document(rng, 4)} */"]
    lines += [CODE[suffix].format(*rng.choices(words, k=2)) for _ in range(rng.randint(20, 40))]
    content = "\n".join(lines).ljust(640)
    return {"content": content, "repo_name": "/".join(rng.choices(WORDS, k=2)),
            "path": f"src/{rng.choice(WORDS)}{suffix}", "license": "mit", "size": len(content)}


LANGUAGES = ("bg", "cs", "de", "en", "es", "fr", "it", "nl", "pt")
PAIRS = {"bg-cs": 1, "de-en": 1, "en-es": 1, "en-fr": 2, "es-fr": 1, "fr-it": 1, "nl-pt": 1}  # files of each


def europarl() -> Files:
    """A configuration for each pair of languages in alphabetical order, 300 rows a file."""
    infos = [features({"translation": {"dtype": {"translation": {"languages": pair.split("-")}}}}, {"train": 300 * n},
                      pair)
             for pair, n in PAIRS.items()]
    files = card({"dataset_info": infos, **configs({pair: {"train": f"{pair}/train-*"} for pair in PAIRS})})
    words = {language: pool(topic(i)) for i, language in enumerate(LANGUAGES)}
    for pair, n in PAIRS.items():
        for i in range(n):
            rng = random.Random(f"europarl {pair} {i}")
            rows = [{language: sentence(rng, words[language], 12, 24) for language in pair.split("-")}
                    for _ in range(300)]
            files[f"{pair}/train-{i:05}-of-{n:05}.parquet"] = parquet({"translation": rows})
    return files


# ------------------------------------------------------------------------------------------------ labelled texts


def labelled(name: str, first: int, second: int, number: int) -> list[tuple[str, int, int]]:
    """`number` texts of each pair of labels (text, first label, second label), shuffled."""
    rng = random.Random(name)
    rows = []
    for i in range(first):
        for j in range(second):
            words = pool(topic(i), MARKS[j] if second > 1 else [])
            rows += [(document(rng, 4, words), i, j) for _ in range(number)]
    rng.shuffle(rows)
    return rows


def bias_in_bios() -> Files:
    """Biographies of 28 professions × 2 genders; splits by the files' names, no configurations."""
    columns = {"hard_text": "string", "profession": "int64", "gender": "int64"}
    sizes = {"train": TRAIN, "test": TEST, "dev": 10}
    files = card({"dataset_info": features(columns, {split: 56 * n for split, n in sizes.items()}), "license": "mit"})
    hashes = {"train": "0ab65b32c47407e8", "test": "5598c840ce8de1ee", "dev": "e6551072fff26949"}
    for split, n in sizes.items():
        rows = labelled(f"bios {split}", 28, 2, n)
        table = parquet(dict(zip(columns, map(list, zip(*rows)))))
        files[f"data/{split}-00000-of-00001-{hashes[split]}.parquet"] = table
    return files


def amazon_reviews() -> Files:
    """Reviews of 34 categories × 2 ratings, 1 and 5 stars. (The real files' names are not known: assumed.)"""
    sizes = {"train": TRAIN, "test": TEST}
    info = features({"rating": "float64", "text": "string", "category": "int64"},
                    {split: 68 * n for split, n in sizes.items()})
    files = card({"dataset_info": info, **configs({"default": {split: f"data/{split}-*" for split in sizes}})})
    for split, n in sizes.items():
        texts, categories, ratings = zip(*labelled(f"reviews {split}", 34, 2, n))
        columns = {"rating": [(1.0, 5.0)[j] for j in ratings], "text": list(texts), "category": list(categories)}
        files[f"data/{split}-00000-of-00001.parquet"] = parquet(columns)
    return files


def ag_news() -> Files:
    """News of four classes."""
    sizes = {"train": 2 * TRAIN, "test": 2 * TEST}
    info = features({"text": "string", "label": classes(("World", "Sports", "Business", "Sci/Tech"))},
                    {s: 4 * n for s, n in sizes.items()})
    files = card({"dataset_info": info, **configs({"default": {split: f"data/{split}-*" for split in sizes}})})
    for split, n in sizes.items():
        texts, labels, _ = zip(*labelled(f"news {split}", 4, 1, n))
        files[f"data/{split}-00000-of-00001.parquet"] = parquet({"text": list(texts), "label": list(labels)})
    return files


# ------------------------------------------------------------------------------------------------ unlearning

SUBJECTS = ("college_biology", "college_computer_science", "high_school_geography", "high_school_us_history",
            "human_aging")


def questions(name: str, n: int) -> list[dict]:
    rng = random.Random(f"questions {name}")
    return [{"question": sentence(rng), "choices": [sentence(rng, WORDS, 2, 5) for _ in range(4)],
             "answer": rng.randrange(4)} for _ in range(n)]


def mmlu() -> Files:
    """A configuration for each subject (the real one has 57, "all" and "auxiliary_train")."""
    sizes = {"test": 12, "validation": 4, "dev": 5}
    columns = {"question": "string", "subject": "string", "choices": {"sequence": "string"}, "answer": classes("ABCD")}
    files = card({"dataset_info": [features(columns, sizes, subject) for subject in SUBJECTS],
                  **configs({subject: {split: f"{subject}/{split}-*" for split in sizes} for subject in SUBJECTS})})
    for subject in SUBJECTS:
        for split, n in sizes.items():
            rows = [{"question": q["question"], "subject": subject, "choices": q["choices"], "answer": q["answer"]}
                    for q in questions(f"{subject} {split}", n)]
            files[f"{subject}/{split}-00000-of-00001.parquet"] = parquet(columns_of(rows))
    return files


def wmdp() -> Files:
    """Three configurations with a test split each."""
    names = ("wmdp-bio", "wmdp-chem", "wmdp-cyber")
    files = card(configs({name: {"test": f"{name}/test-*"} for name in names}))
    return files | {f"{name}/test-00000-of-00001.parquet": parquet(columns_of(questions(name, 40))) for name in names}


def forget_corpus() -> Files:
    """Papers in two files, gated. (The real files' names are not known: assumed.)"""
    files = card({"extra_gated_prompt": "WMDP's biology corpus", **configs({"default": {"train": "data/train-*"}})})
    for i in range(2):
        rng = random.Random(f"papers {i}")
        rows = [{"title": sentence(rng), "abstract": document(rng, 4), "text": document(rng, 60, pool(topic(0))),
                 "doi": "10.1/x"} for _ in range(30)]
        files[f"data/train-{i:05}-of-00002.parquet"] = parquet(columns_of(rows))
    return files


def wikitext() -> Files:
    """Four configurations; rows are lines: empty ones, headings, paragraphs."""
    names = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
    splits = ("test", "train", "validation")
    files = card(configs({name: {split: f"{name}/{split}-*" for split in splits} for name in names}))
    for name in names:
        for split in splits:
            rng = random.Random(f"wikitext {split}")
            lines = []
            for _ in range(80):
                lines += ["", f" = {sentence(rng, WORDS, 1, 3)} = \n", "", f" {document(rng, 8)} \n"]
            files[f"{name}/{split}-00000-of-00001.parquet"] = parquet({"text": lines})
    return files


# ------------------------------------------------------------------------------------------------ ravel

RAVEL = {"city": ("Continent", "Country", "Language", "Latitude", "Longitude", "Timezone"),
         "nobel_prize_winner": ("Award Year", "Birth Year", "Country of Birth", "Field", "Gender")}


def ravel_prompts() -> Files:
    """Four tables for each kind of entity: 40 entities, two templates and four values for each attribute."""
    files = card({"license": "mit"})
    for kind, attributes in RAVEL.items():
        rng = random.Random(f"ravel {kind}")
        values = {name: [word.capitalize() for word in rng.sample(WORDS, 4)] for name in attributes}
        names = [word.capitalize() for word in rng.sample(WORDS, 40)]
        entities = {name: {attribute: rng.choice(values[attribute]) for attribute in attributes} for name in names}
        templates = {name: [f"{sentence(rng)} The {name} of %s is", f'[{{"name": "%s", "{name.lower()}": "']
                     for name in attributes}
        tables = {"attribute_to_prompts": templates, "entity_attributes": entities,
                  "entity_to_split": split_of(rng, entities),
                  "prompt_to_split": split_of(rng, [template for both in templates.values() for template in both])}
        files |= {f"ravel_{kind}_{part}.json": json.dumps(table).encode() for part, table in tables.items()}
    return files


def split_of(rng: random.Random, keys: Iterable[str]) -> dict[str, str]:
    return {key: rng.choice(("train", "val", "test")) for key in keys}


# ------------------------------------------------------------------------------------------------ the language model

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)),
           "<start_of_turn>", "<end_of_turn>"]
CHAT = ("{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
# google/gemma-2-2b's config.json; smaller than there: head_dim 256, hidden_size 2304, intermediate_size 9216, 8 heads
# of attention and 4 of keys, query_pre_attn_scalar 256, vocab_size 256000
SETTINGS = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
    "use_cache": True,
}
ALPHABET = [chr(i) for i in range(33, 127)] + ["▁", "\n", "\t"]
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MERGES = [*map(tuple, SYLLABLES), *(("▁", part) for part in (*SYLLABLES, *CAPITALS)),
          *(("▁" + word[:2], word[2:]) for word in WORDS)]
VOCABULARY = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *ALPHABET, *(a + b for a, b in MERGES)]  # 997
RARE = len(SPECIAL) + 256


def tokenizer(instruct: bool) -> Files:
    """Gemma's files: BPE with byte fallback, spaces as ▁, a BOS before each text; each of WORDS is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    numbers = {token: i for i, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.BPE(numbers, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous", False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos>:1 $B:1",
                                                        special_tokens=[("<bos>", 2)])
    about = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"add_bos_token": True, "add_eos_token": False,
              "added_tokens_decoder": {str(i): {"content": token, **about, "special": True}
                                       for i, token in enumerate(SPECIAL)},
              "additional_special_tokens": SPECIAL[-2:], **named, **({"chat_template": CHAT} if instruct else {}),
              "clean_up_tokenization_spaces": False, "model_max_length": 1000000000000000019884624838656,
              "sp_model_kwargs": {}, "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
              "use_default_system_prompt": False}
    special = {"additional_special_tokens": SPECIAL[-2:],
               **{key: {"content": token, **about} for key, token in named.items()}}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode(),
            "tokenizer.model": b"\n\r\n\x05<pad>"}  # transformers 5 reads tokenizer.json instead


def shapes() -> dict[str, tuple[int, ...]]:
    """The model's tensors in Gemma's names; the unembedding is the embedding, kept once."""
    width, inner, each = (SETTINGS[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, pairs = SETTINGS["num_attention_heads"], SETTINGS["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (len(VOCABULARY), width), "model.norm.weight": (width,)}
    for i in range(SETTINGS["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            found[f"{block}.{norm}_layernorm.weight"] = (width,)
        found |= {f"{block}.self_attn.{part}_proj.weight": (n * each, width)
                  for part, n in (("q", heads), ("k", pairs), ("v", pairs))}
        found[f"{block}.self_attn.o_proj.weight"] = (width, heads * each)
        found |= {f"{block}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (width, inner)
    return found


def weights(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random model that keeps what a token is through all blocks, and guesses better than a uniform distribution."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes().items():
        if "norm" in name:  # Gemma scales by 1 + weight: what a block adds is a tenth
            tensor = torch.full(shape, -0.9 if "post" in name else 0.0)
        elif "embed" in name:
            tensor = 0.1 * torch.randn(shape, generator=rng)
            tensor[:, 0] = 0.5  # channel 0, to which no block adds, stays as it is and lowers the logits of
            tensor[:RARE, 0] = -0.5  # special tokens and bytes, which texts do not hold
        else:
            tensor = torch.randn(shape, generator=rng) / shape[1] ** 0.5
            if "o_proj" in name or "down_proj" in name:
                tensor[0] = 0
        made[name] = tensor.to(dtype)
    return made


def gemma(instruct: bool) -> Files:
    """The base model in fp32 and three files, or the other in bf16 and two."""
    about = {"library_name": "transformers", "license": "gemma", "pipeline_tag": "text-generation",
             "extra_gated_heading": "Access Gemma on Hugging Face"}
    dtype, shards, eos = ("bfloat16", 2, [1, 107]) if instruct else ("float32", 3, 1)
    config = SETTINGS | {"vocab_size": len(VOCABULARY), "torch_dtype": dtype, "eos_token_id": eos}
    generation = {"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": eos,
                  "pad_token_id": 0, "transformers_version": "4.42.4"}
    files = card(about | ({"base_model": "google/gemma-2-2b"} if instruct else {})) | tokenizer(instruct)
    files |= {"config.json": json.dumps(config, indent=2).encode(),
              "generation_config.json": json.dumps(generation, indent=2).encode()}
    return files | sharded(weights(int(instruct), getattr(torch, dtype)), shards)


def sharded(state: dict[str, torch.Tensor], number: int) -> Files:
    """The tensors in that many safetensors files, and the index of them."""
    names, files, where = sorted(state), {}, {}
    for i in range(number):
        file = f"model-{i + 1:05}-of-{number:05}.safetensors"
        part = names[i * len(names) // number:(i + 1) * len(names) // number]
        files[file] = save({name: state[name].contiguous() for name in part}, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    return files | {"model.safetensors.index.json": json.dumps(index, indent=2).encode()}


# ------------------------------------------------------------------------------------------------ texts of other shapes


def stories(name: str, n: int) -> list[str]:
    rng = random.Random(f"stories {name}")
    return [document(rng, rng.choice((4, 12))) for _ in range(n)]


def two_configs() -> Files:
    """Lines with two configurations, of which none is the default, and three splits."""
    names, splits = ("letters", "stories"), {"train": 200, "validation": 20, "test": 20}
    files = card(configs({name: {split: f"{name}/{split}.jsonl" for split in splits} for name in names}))
    for name in names:
        for split, n in splits.items():
            texts = stories(f"{name} {split}", n)
            files[f"{name}/{split}.jsonl"] = jsonl([{"text": text, "id": i} for i, text in enumerate(texts)])
    return files


def pretokenised() -> Files:
    """200 rows of 128 token numbers of the tiny Gemma, BOS first, and no text."""
    rng = random.Random("pretokenised")
    word = VOCABULARY.index("▁" + WORDS[0])
    rows = [[2, *rng.choices(range(word, word + len(WORDS)), k=127)] for _ in range(200)]
    ids = pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))
    return card({"license": "mit"}) | {"data/train-00000-of-00001.parquet": parquet({"input_ids": ids})}


def null_row() -> Files:
    """Lines of which the third has no text."""
    texts = stories("null", 100)
    texts[2] = None
    return card({"license": "mit"}) | {"train.jsonl": jsonl([{"text": text} for text in texts])}


def one_parquet(name: str) -> Files:
    return card({"license": "mit"}) | {"data/train-00000-of-00001.parquet": parquet({"text": stories(name, 200)})}


# ------------------------------------------------------------------------------------------------ all of them

BUILDERS: dict[str, Callable[[], Files]] = {
    "models/google/gemma-2-2b": lambda: gemma(False),
    "models/google/gemma-2-2b-it": lambda: gemma(True),
    "datasets/monology/pile-uncopyrighted": pile,
    "datasets/Skylion007/openwebtext": openwebtext,
    "datasets/codeparrot/github-code": github_code,
    "datasets/Helsinki-NLP/europarl": europarl,
    "datasets/LabHC/bias_in_bios": bias_in_bios,
    "datasets/canrager/amazon_reviews_mcauley_1and5": amazon_reviews,
    "datasets/fancyzhx/ag_news": ag_news,
    "datasets/cais/mmlu": mmlu,
    "datasets/cais/wmdp": wmdp,
    "datasets/cais/wmdp-bio-forget-corpus": forget_corpus,
    "datasets/Salesforce/wikitext": wikitext,
    "datasets/adamkarvonen/ravel_prompts": ravel_prompts,
    "datasets/texts/two-configs": two_configs,
    "datasets/texts/pretokenised": pretokenised,
    "datasets/texts/null-row": null_row,
    "datasets/texts/parquet": lambda: one_parquet("parquet"),
    "datasets/texts/private": lambda: one_parquet("private"),
    "datasets/texts/closed": lambda: one_parquet("closed"),
}
ACCESS = {
    "google/gemma-2-2b": {"gated": "manual"},
    "google/gemma-2-2b-it": {"gated": "manual"},
    "cais/wmdp-bio-forget-corpus": {"gated": "manual"},
    "texts/private": {"private": True},
    "texts/closed": {"gated": "manual", "closed": True},  # whatever the token
}
