"""What transformers makes of a model's folder: its configuration, its class, its blocks, its sizes, its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from evals.model import folders
from evals.storage import network

ONE_STREAM = "use a model whose blocks pass on one residual stream, such as Llama, Gemma or GPT-2"

# ------------------------------------------------------------------------------------------------ configuration


def configuration(folder: Path, name: str):
    """The model's configuration; ValueError if this version of transformers makes nothing of it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  unknown types, broken JSON, values its own checks refuse
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name} brings code of its own (auto_map in config.json), and that is not run\n"
                             "give a model that transformers has itself") from error
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: transformers cannot use its config.json: {said}\n"
                         "check the file; a newer model may want a newer version: "
                         "pip install -U transformers") from error


def auto_class(config, name: str):
    """The class of transformers that loads the language model; ValueError if there is none for such a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for cls in (AutoModelForCausalLM, AutoModelForImageTextToText):  # the second: a language model with eyes
        if type(config) in cls._model_mapping:
            return cls
    raise ValueError(f"{name} is of the type {config.model_type}, which is no causal language model\n"
                     "give a model that predicts the next token, such as Gemma, Llama or GPT-2")


def sizes(config, name: str, itemsize: int) -> dict:
    """As evals.model.places.shape, from a configuration, and the `vocabulary`: rows of the embedding.

    Taken from the model itself, made on the meta device, so that they hold for every architecture.
    """
    check_quantised(config, name)
    cls, text = auto_class(config, name), config.get_text_config()
    if not text.num_hidden_layers:
        raise ValueError(f"{name}: its config.json says that it has no blocks\n"
                         "check num_hidden_layers, or save the model again")
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        hf = cls.from_config(config)
    of_blocks = sum(p.numel() for p in blocks(hf).parameters())
    return dict(d_model=text.hidden_size, n_layers=text.num_hidden_layers,
                block_parameters=of_blocks // text.num_hidden_layers,
                bytes=itemsize * sum(p.numel() for p in hf.parameters()), positions=positions(text),
                vocabulary=len(hf.get_input_embeddings().weight))


def positions(config) -> int | None:
    """Most tokens of a row that the model knows positions for; None where it has none that end."""
    if getattr(config, "alibi", False):
        return None
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def check_quantised(config, name: str) -> None:
    """ValueError for weights in a format whose package is not installed (GPTQ, AWQ, bitsandbytes, …)."""
    from transformers.quantizers import AutoHfQuantizer

    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    try:
        AutoHfQuantizer.from_config(given, pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        raise ValueError(f"{name} is quantised, and its format needs a package: {network.first_line(error)}\n"
                         "install it, or give the model as it was before it was quantised") from error
    except Exception:  # noqa: BLE001  a device, a version: loading decides, and may still undo the format
        return


# ------------------------------------------------------------------------------------------------ blocks


def backbone(hf: torch.nn.Module) -> torch.nn.Module:
    """The transformer without its unembedding, of a multimodal model its text part; RuntimeError if none has blocks."""
    n_layers, prefix = hf.config.get_text_config().num_hidden_layers, getattr(hf, hf.base_model_prefix, None)
    for module in (hf.get_decoder(), prefix, *hf.children()):
        if isinstance(module, torch.nn.Module) and _lists(module, n_layers):
            return module
    raise RuntimeError(f"{type(hf).__name__} has no list of its {n_layers} blocks\n{ONE_STREAM}")


def blocks(hf: torch.nn.Module) -> torch.nn.ModuleList:
    """The transformer blocks, whatever the architecture calls them."""
    return _lists(backbone(hf), hf.config.get_text_config().num_hidden_layers)[0]


def _lists(module: torch.nn.Module, n_layers: int) -> list[torch.nn.ModuleList]:
    return [m for m in module.children() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]


# ------------------------------------------------------------------------------------------------ tokenizer


def open_tokenizer(folder: Path, name: str):
    """The tokenizer in a model's folder; ValueError if it cannot be loaded, or has neither a BOS nor an EOS token."""
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  each sort of tokenizer breaks in its own way
        for file in sorted(Path(folder).glob("*.json")):
            if "index" not in file.name:
                folders.read_json(file)  # which names the file that is damaged
        there = ", ".join(file for file in folders.TOKENIZERS if (Path(folder) / file).is_file()) or "none"
        said = f"{type(error).__name__}: {network.first_line(error)} (its files: {there})"
        raise ValueError(f"{name}: its tokenizer cannot be loaded: {said}\n"
                         "save it again beside the model: "
                         "AutoTokenizer.from_pretrained(…).save_pretrained(…)") from error
    bos_of(made, name)
    return made


def check_vocabulary(tokenizer, vocabulary: int, name: str) -> None:
    """ValueError for a tokenizer with ordinary tokens that the model does not embed: it is another model's.

    Added tokens may lie beyond the vocabulary: they come in no text but one that spells them.
    """
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    beyond = sorted(i for i in set(tokenizer.get_vocab().values()) - added if i >= vocabulary)
    if beyond:
        raise ValueError(f"the tokenizer of {name} has {len(beyond):,} ordinary tokens beyond the {vocabulary:,} that "
                         f"config.json has embeddings for, such as {beyond[0]:,} ({tokenizer.decode([beyond[0]])!r}): "
                         "it is another model's\n"
                         "save the model's own beside it: AutoTokenizer.from_pretrained(…).save_pretrained(…)")


def bos_of(tokenizer, name: str) -> int:
    """The token that begins a row and separates documents: BOS, or EOS where there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(f"the tokenizer of {name} has neither a BOS nor an EOS token\n"
                     "give tokenizer_config.json a bos_token")
