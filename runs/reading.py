"""Recorded runs in every shape this workflow has had, read into one form. Standard library only.

    ours, AI-Scientist's    {section: {"means": {"core.l0": …}, "stderrs": …, "config": …, "problems": …}}
    published figures       {"provenance": …, "saes": [{"name", "source", "config", "means"}, …]}
    flat SAEBench dump      {"eval_type_id", "eval_config", "eval_result_metrics": {category: {metric: …}},
                            "sae_cfg_dict", …}
    sectioned               {"training results for layer 12": {"config", "final_info"}, "core evaluation results": …, …}

The config of a run, whatever its shape: model, layer, hook_name, d_in, d_sae, steps, tokens where they are known;
"evals" {eval: its settings}; "disagree" {key: {where in the file: value}} where the file contradicts itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One SAE's record.

    Means are numbers or None (not measured, NaN); names are `<eval>.<metric>`, `training.…`, `variant.…`.
    """

    name: str
    means: dict[str, float | None]
    stderrs: dict[str, float]
    config: dict
    problems: list[str]
    path: Path
    section: str = field(default="", kw_only=True)  # its key in the file: what its folder in sae/ is called


def read(path: str | Path) -> dict[str, Run]:
    """The runs in a run folder or a JSON file, {section: Run}; FileNotFoundError, ValueError if it is no record."""
    file = _file(Path(path)).resolve()
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}\ngive a run folder or its final_info.json") from None
    sections = dict(_sections(document, file)) if isinstance(document, dict) else {}
    if not any(means or config for _, means, _, config, _ in sections.values()):
        raise ValueError(f"{file} records no run: it has neither \"means\" nor SAEBench's results\n"
                         "give a run folder, its final_info.json, or a file SAEBench wrote")
    label = file_label(file)
    return {key: Run(label if len(sections) == 1 else f"{label} {name}", means, stderrs, config, problems, file,
                     section=key)
            for key, (name, means, stderrs, config, problems) in sections.items()}


RECORDS = ("final_info.json", "frontier.json")  # what holds a folder's runs; the second in stored baselines alone


def file_label(file: Path) -> str:
    """What a file's runs are called: run_1/final_info.json is run_1."""
    return file.parent.name if file.name in RECORDS else file.stem


def code_of(run: Run) -> str:
    """A hash of the variant's file as it ran, which lies in a run's folder; "" where none does."""
    return _digest(run.path.parent / "variant.py")


@functools.lru_cache(4096)  # a sweep's runs have one
def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def slug(model: str) -> str:
    """`google/gemma-2-2b` -> `gemma-2-2b`: what a model is called, wherever it was loaded from."""
    return str(model).rstrip("/").rsplit("/", 1)[-1].lower()


@functools.cache  # a folder's runs have the same names
def canonical(metric: str) -> str:
    """A metric's name with its eval called as this workflow does: SAEBench names three of its types otherwise."""
    eval_name, dot, rest = metric.partition(".")
    return ALIASES.get(eval_name, eval_name) + dot + rest


DOUBT = "doubtful: "  # begins a problem of a run that concerns all its figures
# metrics that depend on the language model and the texts alone, and so are equal in every run
LM_ONLY = re.compile(r"\.llm_|with_ablation$|ce_loss_without_sae$|l2_norm_in$|total_tokens|mean_probe_f1$|num_letters$|"
                     r"duplicated_test_share$|true_l0$|^training\.(steps?|tokens)$")
FORMER = {"context": ("context_size", "context_length"), "num_tokens": ("tokens",)}  # {setting: its former names}


def setting(config: dict, key: str):
    """A setting of a run under its present or a former name, or None."""
    value = config.get(key)
    if value is None and key in FORMER:
        value = next((config[name] for name in FORMER[key] if config.get(name) is not None), None)
    return value


def finite(value):
    """What strict JSON can hold: NaN and infinities inside become None, tuples lists."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


ALIASES = {"absorption_first_letter": "absorption", "RAVEL": "ravel", "sparse_probing_sae_probes": "sae_probes"}


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    file = next((path / name for name in RECORDS if (path / name).is_file()), None)
    if file is not None:
        return file
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}\ngive a run folder or its final_info.json")
    raise FileNotFoundError(f"{path} {without_result(path)}")


def without_result(folder: Path) -> str:
    """What a folder without final_info.json is, as what follows its name, and in a second line what to do."""
    info, error = json_object(folder / "run_info.json"), json_object(folder / "error.json")
    status, nothing = info.get("status"), "has no final_info.json"
    phase = error.get("phase") or info.get("phase") or "of preparing"
    if held(folder):
        now = json_object(folder / "progress.json")
        share = now.get("share")
        done = f", {share:.0%} of it done" if isinstance(share, (int, float)) else ""
        return f"is under way, in its phase {now.get('phase') or phase}{done}, and {nothing} yet\nwait for its end"
    if error and status in ("failed", None):
        cause = str(error.get("message") or error.get("type")).split("\n")[0]
        advice = str(error.get("advice") or "give the folder of a finished run").split("\n")[0]
        return f"failed in its phase {phase}, {cause}, and {nothing}\n{advice}"
    how = {"interrupted": "was interrupted", "running": "was killed"}.get(status)
    if how:
        return f"{how} in its phase {phase}, and {nothing}\nthe command that began it continues it"
    if status == "finished":
        return f"finished, but {nothing} any more\nthe command that began it makes it again"
    inside = sorted(file.parent.name for file in folder.glob("*/final_info.json"))
    if inside:
        more = f" and {len(inside) - 3:,} more" if len(inside) > 3 else ""
        return f"is no run but holds runs, and {nothing}\ngive one of those in it: {', '.join(inside[:3])}{more}"
    return f"is no run's folder, it {nothing}\ngive the folder of a finished run"


def held(folder: Path) -> bool:
    """Whether a process has the run's folder: its lock is held. False, too, where a system has no such locks."""
    try:
        import fcntl

        with open(folder / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False


def json_object(file: Path, most: float = math.inf) -> dict:
    """A file's JSON object; {} of what is none, of `most` bytes or more, or no regular file: a pipe would never end."""
    try:
        if file.is_file() and file.stat().st_size < most:
            value = json.loads(file.read_bytes())
            return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def _sections(document: dict, file: Path) -> Iterator[tuple[str, tuple]]:
    """(section, (name, means, stderrs, config, problems)) of each SAE in a document of any shape."""
    if any(isinstance(v, dict) and isinstance(v.get("means"), dict) for v in document.values()):
        for section, entry in document.items():
            if isinstance(entry, dict) and isinstance(entry.get("means"), dict):
                yield section, _entry(section, entry)
    elif isinstance(document.get("saes"), list):
        for number, entry in enumerate(document["saes"]):
            if isinstance(entry, dict) and isinstance(entry.get("means"), dict):
                name = str(entry.get("name", number))
                config = {**(entry.get("config") or {}), "source": entry.get("source")}
                yield name, _entry(name, {**entry, "config": config})
    else:
        yield from _saebench(document, file)


# ------------------------------------------------------------------------------------------------ entries with "means"


def _entry(section: str, entry: dict) -> tuple:
    problems = [str(p) for p in entry.get("problems") or []]
    means = _numbers(entry["means"], problems)
    given = entry.get("stderrs") or entry.get("stderr") or {}
    stderrs = {k: v for k, v in _numbers(given, []).items() if v is not None} if isinstance(given, dict) else {}
    config = dict(entry.get("config") or {})
    places = {"hook_name": config.get("hook_name", ""), f"section {section}": section}
    stated = [("layer", where, _layer(str(text))) for where, text in places.items() if _layer(str(text)) is not None]
    if isinstance(config.get("layer"), int):
        stated.insert(0, ("layer", "layer", config["layer"]))
    _settle(config, stated)
    return section, means, stderrs, config, problems


def _numbers(given: dict, problems: list[str]) -> dict[str, float | None]:
    """Numeric values under canonical names; NaN and infinities become None and are noted, the rest is left out."""
    numbers = {}
    for key, value in given.items():
        if type(value) in (float, int):  # no bool, which is an int
            if not math.isfinite(value):
                problems.append(f"{key} is {value} in the file")
                value = None
        elif value is not None:
            continue
        numbers[canonical(key)] = value
    return numbers


def _layer(text: str) -> int | None:
    found = re.search(r"\bblocks\.(\d+)\.|layer[ _]?(\d+)", text)
    return int(found[1] or found[2]) if found else None


def _settle(config: dict, stated: list[tuple[str, str, object]]) -> None:
    """Enter what is stated, (key, where, value), into the config: the first holds, contradictions are kept."""
    by_key: dict[str, dict[str, object]] = {}
    for key, where, value in stated:
        by_key.setdefault(key, {}).setdefault(where, value)
    for key, places in by_key.items():
        config.setdefault(key, next(iter(places.values())))
        values = {slug(v) if key == "model" else v for v in places.values()}
        if len(values) > 1:
            config.setdefault("disagree", {})[key] = places


# ------------------------------------------------------------------------------------------------ SAEBench's own output

# which eval a title or a category of metrics belongs to; longer names first, lest they be taken for shorter ones
EVALS = ("sparse_probing_sae_probes", "sparse_probing", "meta_structure", "absorption", "autointerp", "unlearning",
         "ravel", "core", "scr", "tpp", "mdl")
CATEGORIES = {"model_behavior_preservation": "core", "model_performance_preservation": "core", "shrinkage": "core",
              "reconstruction_quality": "core", "sparsity": "core", "token_stats": "core", "misc_metrics": "core",
              "scr_metrics": "scr", "tpp_metrics": "tpp"}
NAN_IS_MINUS_1 = ("core", "sparse_probing", "sparse_probing_sae_probes")  # scr and tpp can truly reach -1
SETTINGS = ("eval_config", "eval_cfg")
RESULTS = ("eval_result_metrics", "corrected_metrics", "metrics")
DETAILS = ("eval_result_details", "eval_result_unstructured", "stderrs")
NO_RESULTS = (*DETAILS, "sae_cfg_dict", "config", "final_info")
MEANING = {"model_name": "model", "lm_name": "model", "hook_layer": "layer", "layer": "layer", "hook_name": "hook_name",
           "d_in": "d_in", "activation_dim": "d_in", "d_sae": "d_sae", "dict_size": "d_sae", "training_steps": "steps",
           "training_tokens": "tokens", "lr": "lr", "learning_rate": "lr", "sparsity_penalty": "sparsity_penalty",
           "final_loss": "final_loss"}
NAMES_A_LAYER = ("hook_name", "sae_lens_release_id", "sae_set", "submodule_name")


def _saebench(document: dict, file: Path) -> Iterator[tuple[str, tuple]]:
    for part in _by_layer(document):
        means, config, problems = {}, {}, []
        evals: dict[str, dict] = {}
        for eval_name, metric, value in _metrics(part, None, evals):
            if value == -1 and eval_name in NAN_IS_MINUS_1:
                problems.append(f"{eval_name}.{metric} is -1 in the file, SAEBench's stand-in for NaN")
                value = None
            means.update(_numbers({f"{eval_name}.{metric}": value}, problems))
        stated = sorted(_stated(part), key=lambda item: "cfg_dict" not in item[1])  # the SAE's own config counts first
        if _layer(file.stem) is not None:
            stated.append(("layer", "file name", _layer(file.stem)))
        if not (means or any(key == "steps" for key, _, _ in stated)):
            continue
        _settle(config, stated)
        loss = config.pop("final_loss", None)
        if loss is not None:
            means.update(_numbers({"training.final_loss": loss}, problems))
        if evals:
            config["evals"] = evals
        section = f"layer_{config['layer']}" if "layer" in config else "run"
        yield section, (section, means, {}, config, problems)


def _by_layer(document: dict) -> list[dict]:
    """A document per layer that was trained, the whole one where there is but one.

    Each eval goes with the layer that its own SAE config names, with the last trained where it names none.
    """
    titles = [key for key, value in document.items() if isinstance(value, dict) and key.startswith("training results")]
    trained = {_layer(key): key for key in titles if _layer(key) is not None}
    if len(trained) < 2:
        return [document]
    parts = {layer: {key: document[key]} for layer, key in trained.items()}
    last = list(parts)[-1]
    for key, value in document.items():
        if isinstance(value, dict) and key not in trained.values():
            layers = [v for k, _, v in _stated({key: value}) if k == "layer"]
            layer = layers[0] if layers and layers[0] in parts else last
            parts[layer][key] = value
    return list(parts.values())


def _metrics(node: dict, eval_name: str | None, evals: dict, counts: bool = False) -> Iterator[tuple[str, str, object]]:
    """(eval, metric, value) below a node, whatever the depth; the settings of evals are put into `evals` on the way.

    `counts`: a number in this node is a metric, as it lies under SAEBench's results or in a section without them.
    """
    eval_name = _eval_of(node.get("eval_type_id")) or eval_name
    for key, value in node.items():
        if key in NO_RESULTS:
            continue
        if key in SETTINGS:
            if eval_name and isinstance(value, dict):
                evals[eval_name] = value
        elif isinstance(value, dict):
            section = _eval_of(key)
            inside = counts if section is None else not any(name in value for name in RESULTS)
            yield from _metrics(value, CATEGORIES.get(key) or section or eval_name, evals,
                                inside or key in RESULTS or key in CATEGORIES)
        elif counts and eval_name and not isinstance(value, (str, list, bool)):
            yield ("tpp" if key.startswith("tpp_") else eval_name), key, value  # "scr and tpp" was one section


def _eval_of(title) -> str | None:
    """The eval that a title or an eval_type_id names: "sparse probing evaluation results" -> sparse_probing."""
    words = "_" + re.sub(r"[^a-z]+", "_", str(title or "").lower()) + "_"
    return next((name for name in EVALS if f"_{name}_" in words), None)


def _stated(node: dict, where: str = "") -> Iterator[tuple[str, str, object]]:
    """(key, where, value) for all that a SAEBench document says of its SAE."""
    for key, value in node.items():
        place = f"{where}{key}"
        if isinstance(value, dict) and key not in DETAILS:
            if _layer(key) is not None:
                yield "layer", place, _layer(key)
            if _eval_of(key) != "unlearning":  # it runs on the instruction-tuned sibling of the model
                yield from _stated(value, f"{place}.")
        elif key in MEANING and value is not None and not isinstance(value, list):
            yield MEANING[key], place, value
        if key in NAMES_A_LAYER and isinstance(value, str) and _layer(value) is not None:
            yield "layer", place, _layer(value)
