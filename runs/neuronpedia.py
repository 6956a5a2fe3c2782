"""A run's dashboards for Neuronpedia: python -m runs.neuronpedia run_1 [--sae NAME] [--out DIR].

Written is what SAEDashboard 0.8.0 writes (sae_dashboard/neuronpedia/neuronpedia_dashboard.py has the fields), a folder
for each SAE:

    <model>_<set>_<hook>_<width>[_<suffix>]/
        batch-0.json, …          up to 128 features each that have a dashboard
        run_settings.json        how the dashboards were made
        skipped_indexes.json     features that fired on no token, of which the site can make dead ones
        explanations.jsonl       where features have some

Neuronpedia's convert-saedashboard-to-neuronpedia-export.py (github.com/hijohnnylin/neuronpedia, in
utils/neuronpedia-utils/neuronpedia_utils; tried at commit ebb8426 of August 2026) turns such a folder into an import,
whose source is called <layer>-<set>[__<suffix>]. Of what it asks for, a folder knows

    --saedashboard-output-dir    itself, which is read for batch-*.json alone
    --model-name                 model_id of the batches, as the site calls the model: --model_id here
    --neuronpedia-source-set-id  their sae_set: --set here
    --layer-num, --hook-point    their layer, and hook_resid_post
    --n-prompts-total, --n-tokens-in-prompt, --prompts-huggingface-dataset-path    as in run_settings.json
    --hf-weights-repo-id, --hf-weights-path    owner/name and <hook>/sae_weights.safetensors, see runs/publish.py

--zero-out-bos-token changes nothing, as no context holds a BOS. SAEDashboard's main branch of May 2026, whose batches
have the same fields, writes what that converter does by itself (output_neuronpedia_exports).

What a field means: bin_min, bin_max and bin_contains of the strongest contexts are -1, the largest activation and -1;
of an interval its bounds and the share of all tokens with an activation within, silent ones being 0 and so in the
lowest. freq_hist and logits_hist have the middles of 50 bars and their counts. correlated_features are those that fire
on the same tokens, `pearson` the φ coefficient, which is Pearson's of firing; SAEDashboard has that of activations
there. values and tokens are of the context that is kept, not of the whole row. Where features fire with negative values
too, those tokens count as firing, which SAEDashboard leaves out, and bin_min and bin_max are magnitudes: an activation
of -3 lies in the bin from 2 to 4. Who reads signed values finds the sign in `values` alone, and that of bars in
freq_hist_data_bar_values; a feature that fires with negative values alone has bins as its mirror image would have, and
the largest activation that the converter gives it (maxActApprox, of signed values) is 0.

Left at the class's own default:
    correlated_features_l1                     cosines of activations: a board has φ alone
    neuron_alignment_*, correlated_neurons_*   of the dimensions of x, which mean little in a residual stream
    decoder_weights_dist                       shares of attention heads, and a residual stream has none
    vector                                     of steering vectors; those of an SAE are in its weights
    dfa_*                                      direct feature attribution, of attention alone

Live features without a dashboard are in no file, so Neuronpedia does not know them. The converter reads batches alone.
skipped_indexes.json is what the site's upload-skipped-features takes, which leaves out the suffix of a
source: not for one of a sweep. explanations.jsonl has of the columns of Neuronpedia's table (db_models/explanation.py
beside the converter; docs.neuronpedia.org/api-and-data/exports) those that a run knows: modelId, layer (the source),
index, description. id, authorId, typeName and explanationModelName are the importing site's to give, which reads them
from explanations/*.jsonl.gz: they refer to its own users, methods and models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from runs import features, outward
from runs.reading import slug, without_result
from runs.wording import in_a_line
from variants.kit.files import file_name

BATCH = 128  # features of a file, as SAEDashboard's runner has them
TOP = -1.0  # bin_min and bin_contains of the strongest contexts
# of the dashboards, see evals/dashboards
INTERVALS, STRONGEST, EACH = 10, 20, 5


def batches(board: dict, model_id: str, sae_set: str) -> list[dict]:
    """The features of a board that have a dashboard, as SAEDashboard's NeuronpediaDashboardBatch, in their order.

    ValueError for a board of a model that reads no text.
    """
    if not board["text"] or not board["features"]:
        raise ValueError(f"{board['sae']} has no dashboards: its model reads no text, or no feature fired")
    found = [feature(board, int(index)) for index in sorted(board["features"], key=int)]
    common = {"model_id": model_id, "layer": board["layer"], "sae_set": sae_set, "sae_id_suffix": suffix(board["sae"])}
    return [common | {"features": found[start : start + BATCH]} for start in range(0, len(found), BATCH)]


def feature(board: dict, index: int) -> dict:
    """One feature as SAEDashboard's NeuronpediaDashboardFeature."""
    told, text = board["features"][str(index)], board["text"]
    logits = told["logits"] or {"top": [], "bottom": [], "edges": [], "counts": []}
    return {
        "feature_index": index,
        "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
        "correlated_neurons_indices": [], "correlated_neurons_l1": [], "correlated_neurons_pearson": [],
        "correlated_features_indices": [other for other, _ in told["cofiring"]],
        "correlated_features_l1": [],
        "correlated_features_pearson": [float(phi) for _, phi in told["cofiring"]],
        "neg_str": [storable(token) for token, _ in logits["bottom"]],
        "neg_values": [float(logit) for _, logit in logits["bottom"]],
        "pos_str": [storable(token) for token, _ in logits["top"]],
        "pos_values": [float(logit) for _, logit in logits["top"]],
        "frac_nonzero": float(told["density"]),
        "freq_hist_data_bar_values": middles(told["histogram"]["edges"]),
        "freq_hist_data_bar_heights": [float(count) for count in told["histogram"]["counts"]],
        "logits_hist_data_bar_heights": [float(count) for count in logits["counts"]],
        "logits_hist_data_bar_values": middles(logits["edges"]),
        "n_prompts_total": int(text["rows"]), "n_tokens_in_prompt": int(text["context"]), "dataset": text["dataset"],
        "decoder_weights_dist": [],
        "activations": activations(told, text["tokens"], board["vocab"]),
        "vector": [],
    }


def activations(told: dict, tokens: int, vocab: list[str]) -> list[dict]:
    """The contexts of a feature that was looked at on so many tokens: the strongest, then those of each interval."""
    found = []
    for group in told["groups"]:
        bounds = interval(group, told, tokens)
        found += [activation(context, bounds, vocab) for context in group["contexts"]]
    return found


def activation(context: dict, bounds: tuple[float, float, float], vocab: list[str]) -> dict:
    """A context as SAEDashboard's NeuronpediaDashboardActivation: an activation for each of its tokens."""
    values = [0.0] * len(context["tokens"])
    for place, value in context["values"]:
        values[place] = float(value)
    low, high, share = bounds
    return {"bin_min": low, "bin_max": high, "bin_contains": share,
            "tokens": [storable(vocab[number]) for number in context["tokens"]], "values": values,
            "qualifying_token_index": int(context["peak"])}


def interval(group: dict, told: dict, tokens: int) -> tuple[float, float, float]:
    """(bin_min, bin_max, bin_contains) of a group of contexts, of a feature looked at on so many tokens."""
    if group["name"] == "top":
        return TOP, float(abs(told["max"])), TOP
    low, high = float(group["from"]), float(group["to"])
    edges, counts = told["histogram"]["edges"], told["histogram"]["counts"]
    within = sum(count * overlap(left, right, low, high) for left, right, count in zip(edges, edges[1:], counts))
    if low <= 0:  # a token on which it does not fire has activation 0
        within += tokens - sum(counts)
    return low, high, min(1.0, max(0.0, within / tokens))


def overlap(left: float, right: float, low: float, high: float) -> float:
    """The share of a bar from `left` to `right` that lies between `low` and `high` in size, whatever its sign."""
    if right <= left:
        return float(low <= abs(left) <= high)
    inside = max(0.0, min(right, high) - max(left, low)) + max(0.0, min(right, -low) - max(left, -high))
    return inside / (right - left)


def middles(edges: list[float]) -> list[float]:
    """Of each bar of a histogram."""
    return [(left + right) / 2 for left, right in zip(edges, edges[1:])]


def storable(token: str) -> str:
    """A token's text without the one character that a database's text cannot hold."""
    return token.replace("\0", "\ufffd")


# ------------------------------------------------------------------------------------------------ names


def suffix(sae: str) -> str | None:
    """What tells an SAE from its siblings of a layer, as part of an address: `layer_12.k_40` -> `k_40`; None alone."""
    return plain(re.sub(r"^layer_\d+\.?", "", sae)) or None


def plain(text: str) -> str:
    """Letters, digits, dots, dashes and lines alone, as Neuronpedia's names have them."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def set_name(board: dict) -> str:
    """`topk-res-16k`: variant, hook and width, as Neuronpedia's own sets are called."""
    width = str(board["d_sae"])
    if board["d_sae"] % 1024 == 0:
        width = f"{board['d_sae'] // 1024}k"
    return f"{plain(board['variant']) or 'sae'}-res-{width}"


# ------------------------------------------------------------------------------------------------ files


def write(board: dict, folder: Path, model_id: str, sae_set: str) -> Path:
    """Write one SAE's files below `folder`; returns theirs."""
    found = batches(board, model_id, sae_set)
    parts = [model_id, sae_set, board["hook_name"], board["d_sae"], suffix(board["sae"])]
    target = folder / file_name("_".join(str(part) for part in parts if part is not None))
    target.mkdir(parents=True)
    for number, batch in enumerate(found):
        _write(target / f"batch-{number}.json", batch)
    _write(target / "run_settings.json", settings(board, model_id, sae_set))
    columns = zip(board["list"]["density"], board["list"]["max"])
    silent = [index for index, (share, largest) in enumerate(columns) if not share and not largest]
    _write(target / "skipped_indexes.json", {"model_id": model_id, "layer": str(board["layer"]), "sae_set": sae_set,
                                             "log_sparsity": 0, "skipped_indexes": silent})
    lines = explanations(board, model_id, sae_set)
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (target / "explanations.jsonl").write_text(text, encoding="utf-8")
    return target


def settings(board: dict, model_id: str, sae_set: str) -> dict:
    """How the dashboards were made, in those fields of NeuronpediaRunnerConfig that mean something here."""
    text = board["text"]
    return {"sae_set": sae_set, "sae_path": board["sae"], "outputs_dir": "", "np_set_name": sae_set,
            "np_sae_id_suffix": suffix(board["sae"]), "from_local_sae": True,
            "huggingface_dataset_path": text["dataset"], "n_prompts_total": text["rows"],
            "n_tokens_in_prompt": text["context"], "n_features_at_a_time": BATCH, "n_quantiles": INTERVALS,
            "top_acts_group_size": STRONGEST, "quantile_group_size": EACH, "model_id": model_id,
            "layer": board["layer"]}


def explanations(board: dict, model_id: str, sae_set: str) -> list[dict]:
    """Of each feature that has one, in the columns of Neuronpedia's table that are known here."""
    parts = [f"{board['layer']}-{sae_set}", suffix(board["sae"])]
    source = "__".join(part for part in parts if part)
    return [{"modelId": model_id, "layer": source, "index": index, "description": storable(told["explanation"])}
            for index, told in sorted(board["features"].items(), key=lambda item: int(item[0])) if told["explanation"]]


def _write(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def export(run: Path, out: Path, saes: list[str], model_id: str = "", sae_set: str = "") -> list[Path]:
    """Write a folder `out` with the dashboards of a run's SAEs, all or those named; returns the folders in it.

    FileNotFoundError, ValueError: no such run, SAE or dashboards, or `out` holds something.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"there is no folder {run}")
    kept = features.kept(run)
    if not kept and not (run / "final_info.json").is_file():
        raise FileNotFoundError(f"{run} {without_result(run)}")
    if not kept:
        raise FileNotFoundError(f"{run} has no dashboards ({features.FOLDER}/): its model reads no text, or the run is "
                                "of before them")
    unknown = [name for name in saes if name not in kept]
    if unknown:
        raise ValueError(f"{run} has no dashboards of an SAE {unknown[0]!r}; there are {', '.join(kept)}")
    with outward.new_folder(out) as folder:
        written = []
        for name in saes or kept:
            board = features.read(run, name)
            outward.check_contexts(board["features"], board, run)
            written.append(write(board, folder, model_id or slug(board["model"]), sae_set or set_name(board)))
        outward.check_clean(folder, run)
    return [out / path.name for path in written]


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if something was written, 1 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m runs.neuronpedia", allow_abbrev=False,
                                     description="A run's dashboards as SAEDashboard writes them for Neuronpedia.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--sae", action="append", default=[], help="one of its SAEs; again for more; default: all")
    parser.add_argument("--out", type=Path, help="the new folder; default: <run>_neuronpedia")
    parser.add_argument("--model_id", default="", help="the model's id on Neuronpedia; default: the end of its name")
    parser.add_argument("--set", default="", help="the source set; default: variant, hook and width, topk-res-16k")
    options = parser.parse_args(argv)
    try:
        out = options.out or outward.beside(options.run, "_neuronpedia")
        written = export(options.run, out, options.sae, options.model_id, options.set)
    except (OSError, ValueError) as error:
        print(f"nothing written: {in_a_line(error)}", file=sys.stderr)
        return 1
    for folder in written:
        print(f"{folder}: {len(list(folder.glob('batch-*.json')))} files of up to {BATCH} features")
    return 0


if __name__ == "__main__":
    sys.exit(main())
