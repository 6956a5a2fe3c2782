"""What a model's folder holds, and what is wrong with it: told by its files, before transformers opens any."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from evals.storage import network

# in the order in which transformers looks for weights
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
              "tekken.json")
# files of weights that are not read
OTHER_FORMATS = {"*.gguf": "GGUF", "*.h5": "TensorFlow's", "*.msgpack": "Flax's",
                 "consolidated*": "in its maker's own format", "*.pth": "in its maker's own format",
                 "model.*.safetensors": "a variant's"}
ADVICE = "give a folder that save_pretrained wrote, of the model and of its tokenizer"
COPY_AGAIN = "copy it again, or save the model again"

# ------------------------------------------------------------------------------------------------ files


def read_json(file: Path) -> dict:
    """The object in a JSON file of a model's folder; ValueError that names the file if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cut off: {network.first_line(error)}\n{COPY_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged, or of something else: it holds no JSON object\n{COPY_AGAIN}")
    return found


def index_of(folder: Path) -> dict:
    """The index of the weight files, {"weight_map": {weight: file}, "metadata": …}; {} without one."""
    file = next((folder / name for name in INDICES if (folder / name).exists()), None)
    index = read_json(file) if file else {}
    if file and not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{file} names no weight files: it is damaged, or of something else\n{COPY_AGAIN}")
    return index


def shards(folder: Path) -> list[str]:
    """The weight files that the index names; [] without one, or beside a file of all weights, which comes first."""
    if (folder / SINGLE[0]).exists():
        return []
    return sorted(set(index_of(folder).get("weight_map", {}).values()))


# ------------------------------------------------------------------------------------------------ checks


def check_folder(folder: Path, name: str, whole: bool = True) -> None:
    """ValueError in one line for what transformers would refuse in many, or fill up in silence.

    `whole`: the weights are there too.
    """
    if not folder.is_dir():
        raise ValueError(f"--model={name} is a file, not a folder\n{ADVICE}")
    _check_no_adapter(folder, name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json{_other_formats(folder)}\n{ADVICE}")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise ValueError(f"{name} has no tokenizer ({', '.join(TOKENIZERS[:3])}, …)\n"
                         "save the model's own beside it: AutoTokenizer.from_pretrained(…).save_pretrained(…)")
    if whole:
        _check_whole(folder, name)


def _check_no_adapter(folder: Path, name: str) -> None:
    """ValueError for a PEFT adapter: with PEFT installed transformers would load the model that it names, no other."""
    if not (folder / "adapter_config.json").exists():
        return
    adapted = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    beside = " beside the files of a model" if (folder / "config.json").exists() else ", not a whole model"
    raise ValueError(f"{name} is a PEFT adapter of {adapted or 'a model that it does not name'}{beside}\n"
                     "merge it first and give that folder: "
                     f"PeftModel.from_pretrained(base, {name!r}).merge_and_unload().save_pretrained(…)")


def _check_whole(folder: Path, name: str) -> None:
    wanted = shards(folder) or [next((file for file in SINGLE if (folder / file).is_file()), SINGLE[0])]
    lacking = [file for file in wanted if not (folder / file).is_file()]
    if lacking:
        others = f" and {len(lacking) - 1} more of its {len(wanted)} weight files" if len(lacking) > 1 else ""
        there = _other_formats(folder)
        advice = ADVICE if there else "copy the folder whole, or save it again"
        raise ValueError(f"{name} lacks {lacking[0]}{others}{there}\n{advice}")
    quantised = "quantization_config" in read_json(folder / "config.json")
    for file in wanted:
        check_weights(folder / file, name, quantised)


def _other_formats(folder: Path) -> str:
    """What to add to "no weights": files that hold some in a format, or under a name, that is not read."""
    for pattern, what in OTHER_FORMATS.items():
        file = next(folder.glob(pattern), None)
        if file:
            return f"; {file.name} is {what}, and not read"
    return ""


def check_weights(file: Path, name: str, quantised: bool) -> None:
    """ValueError for a file of weights that is damaged, or holds integers where the model is not `quantised`.

    A safetensors file must be as long as its header says, another one must have an end. Integers of which the
    configuration says nothing would be taken for numbers.
    """
    if file.suffix != ".safetensors":
        with open(file, "rb") as stream:
            old = stream.read(1) == b"\x80"  # of torch before 1.6, a bare pickle
        if not old and not zipfile.is_zipfile(file):
            raise _damaged(file, name)
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
        raise _damaged(file, name)
    integers = [key for key, entry in header.items()
                if key.endswith("weight") and str(entry.get("dtype")).startswith(("I", "U"))]
    if integers and not quantised:
        raise ValueError(f"{name}: {file.name} holds integers as weights, and config.json no quantization_config that "
                         f"says what they mean: {some(integers)}\ngive the model as it was before it was quantised")


def _damaged(file: Path, name: str) -> ValueError:
    return ValueError(f"{name}: {file.name} is damaged or cut off ({file.stat().st_size:,} bytes)\n{COPY_AGAIN}")


def some(keys: list[str]) -> str:
    """The first of some weights' names, and how many more there are."""
    return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]
