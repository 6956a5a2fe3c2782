"""Texts -> one vector per text: the mean over a text's own positions of LM activations or of SAE features.

Shapes: N texts, U distinct token rows, b rows of one LM batch, T positions, D = d_model, F features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from evals.common import positions
from evals.model import memory
from evals.storage.identity import code_digest

PART_FLOATS = 2**26  # floats of features held at a time: 256 MiB in fp32


def short_context(name: str, config: dict) -> list[str]:
    """The problem of an eval whose rows have no room for text, for its `requirements`."""
    if config["context_length"] >= 2:
        return []
    return [f"{name}: context_length = {config['context_length']} leaves no token beside BOS\n"
            "set context_length to 2 or more"]


def unknown_sets(name: str, config: dict, source: str | None) -> list[str]:
    """The problem of an eval that asks a text source for labelled texts it does not have, for its `requirements`."""
    from evals.texts import embedded, hub

    offered = {"hub": list(hub.PROBING), "embedded": list(embedded.PROBING), "tiny": ["synthetic"]}
    known = offered.get(source, config["dataset_names"])
    unknown = [asked for asked in config["dataset_names"] if asked not in known]
    return [f"{name}: no data set {unknown[0]!r}\nchoose dataset_names among {', '.join(known)}"] if unknown else []


def tokenise(texts: list[str], tokenizer, context: int, bos: int) -> tuple[Tensor, Tensor]:
    """Token rows tokens_NT (int64, T = context), BOS first, cut to T, padded on the right, and their lengths length_N
    with BOS.

    Any token may pad, and the LM needs no attention mask: under causal attention a position never sees what is on its
    right, and positions counted from the left are not moved by padding on the right. BOS is used because every model
    has one.
    """
    rows = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=context - 1)["input_ids"]
    tokens_NT = torch.full((len(rows), context), bos, dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens_NT[row, 1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens_NT, torch.tensor([1 + len(ids) for ids in rows], dtype=torch.int64)


def distinct(tokens_NT: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows tokens_UT with their length_U, the longest first, and the place of each text among them, inverse_N.

    Rows of like length next to each other waste little of an LM batch on padding; the longest first, so that a batch
    too large for the memory fails at once. The result does not depend on the order in which the texts came.
    """
    # the length is part of the key: BOS may be text or padding
    keyed_NT = torch.cat([-length_N[:, None], tokens_NT], dim=1)
    keyed_UT, inverse_N = torch.unique(keyed_NT, dim=0, return_inverse=True)
    return keyed_UT[:, 1:].contiguous(), -keyed_UT[:, 0], inverse_N


def content_mask(tokens_NT: Tensor, length_N: Tensor, special_ids: Iterable[int]) -> Tensor:
    """True at the positions that are averaged, [N, T]: inside the text and no pad, BOS or EOS token, wherever it is."""
    inside_NT = torch.arange(tokens_NT.shape[1]) < length_N[:, None]
    return inside_NT & ~torch.isin(tokens_NT, torch.tensor(sorted(special_ids), dtype=tokens_NT.dtype))


def pool(values_bTF: Tensor, mask_bT: Tensor) -> Tensor:
    """Mean over positions where the mask is True, [b, F] in fp32; 0 where there is none (SAEBench divides by 0)."""
    kept_bTF = values_bTF.float().masked_fill(~mask_bT[..., None], 0.0)  # not a product: 0·inf at a BOS would give NaN
    return kept_bTF.sum(1) / mask_bT.sum(1, keepdim=True).clamp_min(1)


def _encoded_and_pooled(encode: Callable, x_bTD: Tensor, mask_bT: Tensor) -> Tensor:
    return pool(encode(x_bTD), mask_bT)


def activation_batches(setup, tokens_UT: Tensor, length_U: Tensor, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """The residual stream at setup.layer of `batch` rows at a time: (slice of rows, x_bTD on the LM's device, in the
    LM's dtype).

    T is the longest row of the batch. Kept in the cache, an entry per batch, if all batches fit there (counted as
    fp32), else taken from the LM each time, on a GPU several batches at once; the batches are the same. Rows are best
    given as `distinct` orders them.
    """

    def batch_tokens(start: int) -> Tensor:
        rows = slice(start, start + batch)
        return tokens_UT[rows, : int(length_U[rows].max())].contiguous()

    def depends_on(tokens_bT: Tensor) -> dict:
        sha = hashlib.sha256(tokens_bT.numpy().tobytes()).hexdigest()
        return {"lm": setup.lm.digest, "layer": setup.layer, "tokens": sha, "shape": list(tokens_bT.shape),
                "torch": torch.__version__, "device": torch.device(setup.lm.device).type}

    def kept(start: int) -> bool:
        return setup.cache.path("activations", depends_on(batch_tokens(start))).exists()

    ahead: dict[int, Tensor] = {}  # what came of a pass beside the batch that needed it

    def residual(start: int) -> Tensor:
        if start not in ahead:
            number = memory.batches_at_once(setup, batch_tokens(start).numel())
            following = starts[start // batch:start // batch + number]
            wanted = list(itertools.takewhile(lambda s: s == start or not (stored and kept(s)), following))
            with torch.no_grad():
                ahead.update(zip(wanted, memory.residuals(setup, [batch_tokens(s) for s in wanted])))
        return ahead.pop(start).contiguous()

    starts = range(0, len(tokens_UT), batch)
    # what is stored already takes no further room: without this an entry just written would be what no longer fits
    missing = sum(batch_tokens(s).numel() for s in starts if not kept(s))
    stored = setup.cache.fits(missing * setup.lm.d_model * 4)
    for start in starts:
        tokens_bT = batch_tokens(start)
        if stored:
            entry = setup.cache.get("activations", depends_on(tokens_bT), lambda s=start: {"x": residual(s)})
            x_bTD = entry["x"].to(setup.lm.device)
        else:
            x_bTD = residual(start)
        yield slice(start, start + len(tokens_bT)), x_bTD


def pooled(setup, tokens_NT: Tensor, length_N: Tensor, encoders: dict[Hashable, Callable]) -> dict[Hashable, Tensor]:
    """Pooled features {name: [N, F] fp32} of every encoder (x_bTD -> z_bTF), all fed from one pass of the LM.

    On the LM's device, or where a GPU has no room to spare, on the CPU. Reads llm_batch_size and sae_batch_size from
    setup.config. How an encoder's input is cut into parts depends on its own width only, so its features do not depend
    on which other encoders run beside it.
    """
    config = setup.config
    tokens_UT, length_U, inverse_N = distinct(tokens_NT, length_N)
    mask_UT = content_mask(tokens_UT, length_U, setup.lm.special_ids)
    features_UF: dict[Hashable, Tensor] = {}
    batches = activation_batches(setup, tokens_UT, length_U, config["llm_batch_size"])
    for rows, x_bTD in setup.track(batches, "pooled texts", len(tokens_UT), "texts", lambda batch: len(batch[1])):
        mask_bT = positions.within(setup, x_bTD, mask_UT[rows, : x_bTD.shape[1]].to(x_bTD.device))
        for name, encode in encoders.items():
            if name not in features_UF:
                shape = len(tokens_UT), encode(x_bTD[:1, :1]).shape[-1]
                room = memory.has_room(x_bTD, 4 * shape[1] * (len(tokens_UT) + len(tokens_NT)))
                features_UF[name] = torch.empty(shape, device=x_bTD.device if room else "cpu")
            of_text = x_bTD.shape[1] * features_UF[name].shape[1]
            z_bF = memory.by_rows(setup, "the features of texts", partial(_encoded_and_pooled, encode), x_bTD, mask_bT,
                                  most=max(1, min(config["sae_batch_size"], PART_FLOATS // of_text)), each=of_text)
            features_UF[name][rows] = z_bF.to(features_UF[name].device)
    return {name: z_UF[inverse_N.to(z_UF.device)] for name, z_UF in features_UF.items()}


def labelled(setup) -> dict[str, tuple[Tensor, Tensor, dict]]:
    """Every data set as (tokens_NT, length_N, places of its texts by split and class); a second run reads no texts."""

    def make() -> dict[str, Tensor]:
        stored = {}
        for dataset, classes in setup.data.probing(setup.config).items():
            texts, rows = _layout(dataset, classes)
            tokenised = tokenise(texts, setup.lm.tokenizer, setup.config["context_length"], setup.lm.bos)
            named = zip((("tokens",), ("length",)), tokenised)
            placed = (((split, name), places) for split, by_class in rows.items() for name, places in by_class.items())
            for key, tensor in itertools.chain(named, placed):
                # numbered: the file does not keep their order
                stored[json.dumps([len(stored), dataset, *key])] = tensor
        return stored

    depends_on = {"texts": setup.data.probing_digest(setup.config), "lm": setup.lm.digest,
                  "context": setup.config["context_length"], "code": code_digest(__file__)}
    stored = [(json.loads(key), tensor) for key, tensor in setup.cache.get("probing-tokens", depends_on, make).items()]
    found: dict = {}
    for (_, dataset, *what), tensor in sorted(stored, key=lambda item: item[0][0]):
        if what == ["tokens"]:
            found[dataset] = [tensor, None, {"train": {}, "test": {}}]
        elif what == ["length"]:
            found[dataset][1] = tensor
        else:
            found[dataset][2][what[0]][what[1]] = tensor
    return {dataset: tuple(parts) for dataset, parts in found.items()}


def _layout(dataset: str, classes: dict) -> tuple[list[str], dict[str, dict[str, Tensor]]]:
    """All texts of a data set in one list, and {"train" | "test": {class: their places in it}}."""
    if len(classes) < 2:
        raise ValueError(f"data set {dataset} has {len(classes)} classes, one against the rest needs 2\n"
                         f"leave {dataset} out of dataset_names or give it more classes")
    texts: list[str] = []
    rows: dict[str, dict[str, Tensor]] = {"train": {}, "test": {}}
    for name, splits in classes.items():
        for split, places in rows.items():
            places[name] = torch.arange(len(texts), len(texts) + len(splits[split]))
            texts += splits[split]
    return texts, rows
