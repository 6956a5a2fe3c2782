"""Where the weights of a run's language model lie, what they are, and how large: known before any is read."""

from __future__ import annotations

from pathlib import Path

from evals.model import built_in, synthetic
from evals.model.architecture import check_vocabulary, configuration, open_tokenizer, sizes
from evals.model.built_in import EMBEDDED, TINY
from evals.model.folders import SINGLE, check_folder, index_of, shards
from evals.storage import network
from evals.storage.identity import files_digest
from evals.texts.numbers import Numbers
from evals.texts.text_files import is_path

SHAPES = built_in.SHAPES | synthetic.SHAPES  # of the models that need no hub, by the names that --model takes
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # configuration and tokenizer
UNREAD = ("*/*", "generation_config.json")  # other files of those names


def location(name: str, cache_dir: str, data_dir: str, weights: bool = True) -> Path:
    """The folder of a model by hub name, path or built-in name; fetched, or made, first where it must be.

    Without `weights` it holds what is small: configuration and tokenizer.
    """
    if name == EMBEDDED:
        return built_in.embedded_folder(Path(cache_dir), Path(data_dir) if data_dir else None)
    if name == TINY:
        return built_in.tiny_folder(Path(cache_dir))
    if name in synthetic.WORLDS:
        return synthetic.world_folder(Path(cache_dir), name)
    if Path(name).exists():
        return Path(name)
    folder = network.snapshot("model", name, SMALL, UNREAD)
    if weights and synthetic.is_synthetic(folder):
        return network.snapshot("model", name, ["*.safetensors"], ["*/*"])
    if weights:
        wanted = shards(folder)
        if not any((folder / file).exists() for file in (*wanted, *SINGLE)):
            gigabytes = disk_needed(name) / 1e9
            print(f"language model: fetching the weights of {name} ({gigabytes:.2f} GB, once)", flush=True)
        folder = network.snapshot("model", name, wanted or SINGLE[:1])
        if not wanted and not (folder / SINGLE[0]).exists():
            network.snapshot("model", name, SINGLE[1:])
    return folder


def identity(where: str | Path, name: str = "") -> str:
    """What a model's folder holds: the commit, if it was fetched from the hub by that name, else a hash of its files.

    ValueError for no files. A folder that a user names may have been changed, even one in the hub's cache.
    """
    folder = Path(where)
    if ("model", name) in network.PINNED and not Path(name).exists():
        return f"{name}@{network.PINNED['model', name]}"
    kinds = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
    return files_digest([file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()])


def known_identity(name: str, cache_dir: str, data_dir: str) -> str:
    """As `identity`, of a model by its name, without its weights where they would have to be fetched."""
    if name in synthetic.WORLDS:
        return synthetic.identity(name)
    if name in SHAPES:
        return built_in.identity(name)
    if not Path(name).exists() and is_path(name):
        raise FileNotFoundError(f"no folder {name}\ngive the folder of a model, or its name on the hub: owner/name")
    if Path(name).exists():
        if not synthetic.is_synthetic(Path(name)):
            check_folder(Path(name), name)
        return identity(name)
    return identity(network.snapshot("model", name, SMALL, UNREAD), name)


def shape(name: str, itemsize: int, cache_dir: str = "", data_dir: str = "") -> dict:
    """d_model, n_layers, block_parameters (of one block), bytes, positions (most of a row; None: any number).

    `bytes` are those of all parameters of `itemsize` bytes each. A synthetic model says so: synthetic=True.
    """
    if name in SHAPES:
        return SHAPES[name]
    folder, whole = location(name, cache_dir, data_dir, weights=False), Path(name).exists()
    if synthetic.is_synthetic(folder):
        return synthetic.shape(folder)
    check_folder(folder, name, whole)
    found = sizes(configuration(folder, name), name, itemsize)
    check_vocabulary(open_tokenizer(folder, name), found["vocabulary"], name)
    return found


def tokenizer(name: str, cache_dir: str, data_dir: str):
    """The model's tokenizer alone. ValueError if it has neither a BOS nor an EOS token."""
    folder = location(name, cache_dir, data_dir, weights=False)
    return Numbers() if synthetic.is_synthetic(folder) else open_tokenizer(folder, name)


def disk_needed(name: str) -> int:
    """Bytes that fetching a model of the hub adds to its cache; 0 for a local one, or where that is not known."""
    if name in SHAPES or Path(name).exists():
        return 0
    folder = network.snapshot("model", name, SMALL, UNREAD)
    if all((folder / file).exists() for file in shards(folder) or SINGLE[:1]):
        return 0
    return int(index_of(folder).get("metadata", {}).get("total_size", 0)) or network.size("model", name, SINGLE[0])
