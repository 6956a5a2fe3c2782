"""The tiny profile: a random model of a few thousand weights and texts from a small grammar; no download, a second to
make.

It exercises the mechanics (shapes, soft-capping, BOS, resuming, file formats) on the code path of real models. Its
weights are random, so its scores mean nothing about an SAE variant.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

from evals.storage import made
from evals.texts.splits import draw, split_documents

VERSION = 1  # goes into cache keys and folder names: raise it when the model or the texts change
SEED = 42
DOCUMENTS = 4000  # about 45 words each
VOCABULARY = 512  # tokens

# ------------------------------------------------------------------------------------------------ language model


def model_folder(cache_dir: Path, architecture: str = "gemma2") -> Path:
    """A random 4-layer "gemma2" or "llama" model (d_model 32, fp32) with its tokenizer, as a Hugging Face folder.

    The same weights on every machine; ValueError for another architecture.
    """
    if architecture not in ("gemma2", "llama"):
        raise ValueError(f"no tiny model of architecture {architecture!r}\nchoose gemma2 or llama")

    def make(folder: Path) -> None:
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        _model(architecture, tokenizer).save_pretrained(folder)

    return made.folder(Path(cache_dir) / "models" / f"tiny-{architecture}-v{VERSION}", make)


def _tokenizer():
    """Byte-level BPE over the synthetic texts; like Gemma's it has pad 0, eos 1,
    bos 2 and puts a BOS before each text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<bos>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(documents("train")[:500], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   add_bos_token=True, padding_side="right", model_max_length=512,
                                   clean_up_tokenization_spaces=False)


def _model(architecture: str, tokenizer):
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                 tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                 pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):  # the constructor draws numbers, which must not disturb the caller's
        if architecture == "gemma2":
            # caps far below Gemma's 50 and 30: at this size attention scores are of order 1, and a lost cap must show
            model = Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=8,
                                                   attn_logit_softcapping=1.0, final_logit_softcapping=5.0))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:  # norm gains keep their initial value
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model


# ------------------------------------------------------------------------------------------------ texts

TOPICS = {
    "animals": (["fox", "otter", "heron", "badger", "wolf", "beetle"], ["hunts", "hides", "sleeps", "runs", "feeds"],
                ["in the forest", "by the river", "under the old oak", "near its den"]),
    "cooking": (["soup", "bread", "sauce", "stew", "cake", "dough"], ["simmers", "rises", "cools", "bakes", "thickens"],
                ["in the oven", "on the stove", "with butter and salt", "for 20 minutes"]),
    "space": (["comet", "planet", "moon", "probe", "star", "telescope"],
              ["orbits", "shines", "drifts", "turns", "fades"], ["around the sun", "in the night sky", "near Saturn",
                                                                 "at 300 km per second"]),
    "music": (["violin", "choir", "drum", "pianist", "song", "flute"], ["plays", "sounds", "echoes", "pauses",
                                                                        "swells"],
              ["in the concert hall", "at 120 beats", "before the audience", "in a minor key"]),
}
ADJECTIVES = ["small", "old", "bright", "quiet", "strange", "famous", "slow", "pale"]


def _document(rng: random.Random, topic: str, sentences: int) -> str:
    nouns, verbs, places = TOPICS[topic]
    return " ".join(
        f"{rng.choice(('The', 'A', 'This', 'Every'))} {rng.choice(ADJECTIVES)} {rng.choice(nouns)} "
        f"{rng.choice(verbs)} {rng.choice(places)}." for _ in range(sentences))


def documents(split: str) -> list[str]:
    """The synthetic documents of a split ("train", "heldout"), always in the same order."""
    return _splits()[split == "heldout"]


@functools.lru_cache(maxsize=1)
def _splits() -> tuple[list[str], list[str]]:
    rng = random.Random(SEED)
    texts = [_document(rng, rng.choice(list(TOPICS)), rng.randint(2, 9)) for _ in range(DOCUMENTS)]
    return split_documents(texts)


def probing(config: dict) -> dict[str, dict[str, dict[str, list[str]]]]:
    """{"synthetic": {topic: {"train": [...], "test": [...]}}}, half of the configured set size per topic."""
    rng = random.Random(SEED + 1)
    # twice what is needed, as some texts may be equal
    n = config["probe_train_set_size"] + config["probe_test_set_size"]
    return {"synthetic": draw("synthetic", {t: [_document(rng, t, 2) for _ in range(n)] for t in TOPICS}, config, SEED)}
