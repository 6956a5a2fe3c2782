"""What autointerp's judge gets to see: windows of text in which a latent fires, and random ones.

One pass of the LM serves all SAEs. Only windows are kept, never the activations of all tokens: of each latent the
strongest centres that may be needed, as many drawn ones (the largest of 2·log z + Gumbel noise are a draw without
replacement in proportion to z²) and random ones. Latents are drawn before it is known which are alive: some to spare,
and a second pass where too few of them are.

Shapes: R rows of tokens, T tokens in a row, b rows of a batch, D = d_model, F features, C candidate latents, P centres
in a block of rows, p parts of a batch, N of them at which a latent fires, K windows kept, W = 2·buffer + 1 tokens in a
window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from evals.common import pooling, positions, probes
from evals.model import memory
from evals.storage.identity import code_digest

MIN_CHARS, CHARS_PER_TOKEN, CHUNKS = 100, 5, 20  # of the text, as SAEBench reads it
SPARE = 1.25  # latents looked at for one that is asked for, as some are dead
SILENT = 1e-6  # SAEBench's bound below which there is nothing to draw from
BLOCK_FLOATS = 2**25  # activations of an SAE's candidates ranked at a time: 128 MiB, 27,000 tokens of 1250 candidates


class Window(NamedTuple):
    """A stretch of text and what a latent does in it."""

    tokens: list[str]
    acts: list[float]
    random: bool  # drawn without regard to the latent


class Case(NamedTuple):
    """What tells the judge about a latent and what tests it; tokens are active above `threshold`."""

    latent: int
    threshold: float
    generation: list[Window]
    scoring: list[Window]


def cases_of(setup, saes: dict) -> tuple[dict[str, list[Case]], dict[str, list[str]]]:
    """The cases of every SAE, and why there are fewer than asked for."""
    config, tokens_RT = setup.config, token_rows(setup)
    n_latents, bound, total = config["n_latents"], config["dead_latent_threshold"], config["total_tokens"]
    short = [f"the text gives {tokens_RT.numel():,} of {total:,} tokens"] if tokens_RT.numel() < total else []
    if not len(tokens_RT):
        return {name: [] for name in saes}, {name: [f"{short[0]}, not one row: no autointerp_score"] for name in saes}
    order = {}
    for name, sae in saes.items():
        rng = probes.generator(setup.seed, "autointerp", "latents")
        order[name] = torch.randperm(len(sae.W_dec), generator=rng).tolist()
    first = {name: latents[: math.ceil(SPARE * n_latents)] for name, latents in order.items()}
    seen = look(setup, tokens_RT, saes, first)
    n_tokens = int(content(setup, tokens_RT).sum())
    alive = {name: s.fired_F.double() / n_tokens * total > bound for name, s in seen.items()}
    chosen = {name: [latent for latent in latents if alive[name][latent]][:n_latents]
              for name, latents in order.items()}
    missing = {name: [k for k in latents if k not in seen[name].windows] for name, latents in chosen.items()}
    missing = {name: latents for name, latents in missing.items() if latents}
    if missing:
        for name, more in look(setup, tokens_RT, {name: saes[name] for name in missing}, missing).items():
            seen[name].windows.update(more.windows)

    ids = tokens_RT.unique().tolist()
    written = dict(zip(ids, setup.lm.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)))
    found, problems = {}, {}
    for name, latents in chosen.items():
        if seen[name].bad:
            found[name] = []
            problems[name] = [f"NaN or inf in the features of {seen[name].bad:,} of {n_tokens:,} tokens: no "
                              "autointerp_score"]
            continue
        made = [case(setup, tokens_RT, written, latent, seen[name].windows[latent]) for latent in latents]
        found[name], problems[name] = [c for c in made if c], list(short)
        if len(found[name]) < n_latents:
            problem = (f"{len(found[name])} of {n_latents} latents for the judge: {int(alive[name].sum()):,} of "
                       f"{len(order[name]):,} fire more than {bound} times in {total:,} tokens, {made.count(None)} of "
                       "those looked at in too few places")
            problems[name].append(problem if found[name] else f"{problem}: no autointerp_score")
    return found, problems


# ------------------------------------------------------------------------------------------------ text


def token_rows(setup) -> Tensor:
    """The text as tokens [R, T], BOS first in every row; it is read and tokenised once."""
    config, lm = setup.config, setup.lm
    name, context, total = config["dataset_name"], config["llm_context_size"], config["total_tokens"]
    if name == "held-out":
        texts, identity = setup.texts, setup.texts_digest
    else:
        from evals.texts import streams, text_files

        cache_dir = getattr(setup.data, "cache_dir", None)
        # in the data set's own order, as SAEBench reads it
        texts, identity = lambda: streams.Stream(name, cache_dir=cache_dir, shuffled=False), text_files.identity(name)

    def make() -> dict[str, Tensor]:
        return {"tokens_RT": pack(texts(), lm, context, total)}

    depends_on = {"texts": identity, "lm": lm.digest, "context": context, "total": total, "code": code_digest(pack)}
    return setup.cache.get("autointerp-tokens", depends_on, make)["tokens_RT"]


def pack(texts: Iterable[str | list[int]], lm, context: int, total: int) -> Tensor:
    """Tokens [R, T] of the texts of more than 100 characters, run together; R·T is just above `total`, or all there is.

    They are joined by EOS, cut into 20 parts by characters, each tokenised after a BOS; the first token of a row
    becomes BOS. Token ids are written out as text first.
    """
    kept, chars = [], 0
    for text in texts:
        if not isinstance(text, str):
            text = lm.tokenizer.decode(text[text[:1] == [lm.bos]:])
        if len(text) > MIN_CHARS:
            kept.append(text)
            chars += len(text)
            if chars > CHARS_PER_TOKEN * total:
                break
    joined = (lm.tokenizer.eos_token or lm.tokenizer.bos_token).join(kept)
    size = max(1, math.ceil(len(joined) / CHUNKS))
    chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
    tokenised = lm.tokenizer(chunks, add_special_tokens=False)["input_ids"] if chunks else []
    ids = list(itertools.chain.from_iterable([lm.bos, *chunk] for chunk in tokenised))[: total + context + 1]
    rows = len(ids) // context
    tokens_RT = torch.tensor(ids[: rows * context], dtype=torch.int64).view(rows, context)
    tokens_RT[:, 0] = lm.bos
    return tokens_RT


def content(setup, tokens_RT: Tensor) -> Tensor:
    """True where a token is no BOS, EOS or padding, [R, T]."""
    return ~torch.isin(tokens_RT, torch.tensor(sorted(setup.lm.special_ids)))


# ----------------------------------------------------------------------------------------------- what the SAEs do on it


class Seen(NamedTuple):
    """What a pass over the text kept of one SAE."""

    fired_F: Tensor  # tokens at which a feature fires
    bad: int  # tokens with a feature that is not finite
    # latent -> "top" | "drawn" | "random" -> {"place": [K], "acts": [K, W]}
    windows: dict[int, dict[str, dict[str, Tensor]]]


def look(setup, tokens_RT: Tensor, saes: dict, candidates: dict[str, list[int]]) -> dict[str, Seen]:
    """One pass of the LM: the firings of every feature and the windows of each SAE's candidate latents."""
    config, device, T = setup.config, setup.lm.device, tokens_RT.shape[1]
    mask_RT = content(setup, tokens_RT)
    fired, bad = dict.fromkeys(saes, 0), dict.fromkeys(saes, 0)
    index_C = {name: torch.tensor(latents, device=device) for name, latents in candidates.items()}
    kept = {name: _nothing(setup, tokens_RT, latents) for name, latents in candidates.items()}
    block: dict[str, list[Tensor]] = {name: [] for name in saes}  # of whole rows, z_CbT
    batches = pooling.activation_batches(setup, tokens_RT, torch.full((len(tokens_RT),), T), config["llm_batch_size"])
    n_batches = math.ceil(len(tokens_RT) / config["llm_batch_size"])
    for rows, x_bTD in setup.track(batches, "autointerp: activations", n_batches, "batches"):
        mask_bT = positions.within(setup, x_bTD, mask_RT[rows].to(device))
        for name, sae in saes.items():
            of_row, seen_in = T * len(sae.W_dec), partial(_seen, sae.encode, index_C[name])
            bad_p, fired_pF, z_bTC = memory.by_rows(setup, "the features of text", seen_in, x_bTD, mask_bT,
                                                    most=max(1, pooling.PART_FLOATS // of_row), each=of_row)
            bad[name], fired[name] = bad[name] + bad_p.sum(), fired[name] + fired_pF.sum(0)
            block[name].append(z_bTC.permute(2, 0, 1).contiguous())
            if rows.stop == len(tokens_RT) or sum(z_CbT.numel() for z_CbT in block[name]) > BLOCK_FLOATS:
                z_CbT = torch.cat(block.pop(name), 1)
                _keep(setup, kept[name], z_CbT, first_row=rows.stop - z_CbT.shape[1])
                block[name] = []
    seen = {}
    for name, of_sae in kept.items():
        on_cpu = {kind: {key: t.cpu() for key, t in tensors.items()} for kind, tensors in of_sae.items()}
        windows = {latent: {kind: {key: t[c] for key, t in tensors.items()} for kind, tensors in on_cpu.items()}
                   for c, latent in enumerate(candidates[name])}
        seen[name] = Seen(fired[name].cpu(), int(bad[name]), windows)
    return seen


def _seen(encode: Callable, index_C: Tensor, x_bTD: Tensor, mask_bT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens are bad [1] and how many each feature fires on [1, F], and the candidates' magnitudes z_bTC."""
    z_bTF, mask_bT1 = encode(x_bTD), mask_bT[..., None]
    bad = (~z_bTF.isfinite().all(-1) & mask_bT).sum()
    fired_F = ((z_bTF != 0) & mask_bT1).sum((0, 1))
    return bad[None], fired_F[None], z_bTF[..., index_C].float().abs().masked_fill(~mask_bT1, 0.0)


def _nothing(setup, tokens_RT: Tensor, latents: list[int]) -> dict[str, dict[str, Tensor]]:
    """No windows yet, and the places of random ones: those to score, then as many as the drawn ones may lack."""
    config, (R, T), device = setup.config, tokens_RT.shape, setup.lm.device
    buffer, width = config["buffer"], 2 * config["buffer"] + 1
    number = (config["n_random_ex_for_scoring"] + config["n_iw_sampled_ex_for_generation"]
              + config["n_iw_sampled_ex_for_scoring"])

    def places(latent: int) -> Tensor:
        rng = probes.generator(setup.seed, "autointerp", "random windows", latent)
        row_K = torch.randint(R, (number,), generator=rng)
        return row_K * T + torch.randint(buffer, T - buffer, (number,), generator=rng)

    def empty(n: int) -> dict[str, Tensor]:
        shape = (len(latents), n)
        return {"key": torch.zeros(shape, device=device), "place": torch.zeros(shape, dtype=torch.int64, device=device),
                "acts": torch.zeros(*shape, width, device=device)}

    random = empty(number) | {"place": torch.stack([places(latent) for latent in latents]).to(device)}
    return {"top": empty(0), "drawn": empty(0), "random": random}


def _keep(setup, kept: dict[str, dict[str, Tensor]], z_CbT: Tensor, first_row: int) -> None:
    """Bring the kept windows up to date with a block of rows.

    A chosen centre bars itself and `buffer` neighbours on either side from being chosen, which bounds the strongest
    that are needed. All of those may stand among the drawn ones, too, which in the end must lie below the weakest
    chosen.
    """
    config, T, device = setup.config, z_CbT.shape[-1], z_CbT.device
    buffer = config["buffer"]
    offset_W = torch.arange(-buffer, buffer + 1, device=device)
    latent_C1 = torch.arange(len(z_CbT), device=device)[:, None]
    strongest = (config["n_top_ex_for_generation"] + config["n_top_ex_for_scoring"]) * len(offset_W)
    drawn = strongest + config["n_iw_sampled_ex_for_generation"] + config["n_iw_sampled_ex_for_scoring"]

    centre_CP = z_CbT[..., buffer : T - buffer].flatten(1)
    fires_CP = centre_CP >= SILENT
    z_N = centre_CP[fires_CP]
    rng = torch.Generator(device).manual_seed(probes.generator(setup.seed, "autointerp", first_row).initial_seed())
    noise_N = -torch.empty_like(z_N).exponential_(generator=rng).log()
    drawn_CP = torch.full_like(centre_CP, -torch.inf).masked_scatter_(fires_CP, 2 * z_N.log() + noise_N)
    for kind, key_CP, number in (("top", centre_CP, strongest), ("drawn", drawn_CP, drawn)):
        key_CK, index_CK = key_CP.topk(min(number, key_CP.shape[1]))
        row_CK, column_CK = index_CK // (T - 2 * buffer), index_CK % (T - 2 * buffer) + buffer
        new = {"key": key_CK, "place": (first_row + row_CK) * T + column_CK,
               "acts": z_CbT[latent_C1[..., None], row_CK[..., None], column_CK[..., None] + offset_W]}
        both = {name: torch.cat([kept[kind][name], new[name]], 1) for name in new}
        order_CK = both["key"].topk(min(number, both["key"].shape[1])).indices
        kept[kind] = {name: t[latent_C1, order_CK] for name, t in both.items()}

    row_CK, column_CK = kept["random"]["place"] // T - first_row, kept["random"]["place"] % T
    latent_N, k_N = ((row_CK >= 0) & (row_CK < z_CbT.shape[1])).nonzero(as_tuple=True)
    row_N1, column_N1 = row_CK[latent_N, k_N][:, None], column_CK[latent_N, k_N][:, None]
    kept["random"]["acts"][latent_N, k_N] = z_CbT[latent_N[:, None], row_N1, column_N1 + offset_W]


# ------------------------------------------------------------------------------------------------ from windows to cases


def case(setup, tokens_RT: Tensor, written: dict[int, str], latent: int, windows: dict) -> Case | None:
    """Which windows explain a latent and which test the explanation; None if it fires in too few places."""
    config = setup.config
    buffer, n_random = config["buffer"], config["n_random_ex_for_scoring"]
    n_top = config["n_top_ex_for_generation"] + config["n_top_ex_for_scoring"]
    n_drawn = config["n_iw_sampled_ex_for_generation"] + config["n_iw_sampled_ex_for_scoring"]

    def window(kind: str, k: int) -> Window:
        row, column = divmod(int(windows[kind]["place"][k]), tokens_RT.shape[1])
        ids = tokens_RT[row, column - buffer : column + buffer + 1].tolist()
        return Window([written[i] for i in ids], windows[kind]["acts"][k].tolist(), kind == "random")

    centre = {kind: windows[kind]["acts"][:, buffer].tolist() for kind in ("top", "drawn")}
    chosen = spread(windows["top"]["place"].tolist(), centre["top"], n_top, buffer)
    if len(chosen) < n_top:
        return None
    below = [k for k, value in enumerate(centre["drawn"]) if SILENT <= value < centre["top"][chosen[-1]]][:n_drawn]
    if not below:
        return None
    top = [window("top", k) for k in chosen]
    drawn = [window("drawn", k) for k in below]
    drawn += [window("random", k)._replace(random=False) for k in range(n_random, n_random + n_drawn - len(drawn))]
    rng = probes.generator(setup.seed, "autointerp", "examples", latent)
    top, drawn = ([of_kind[i] for i in torch.randperm(len(of_kind), generator=rng)] for of_kind in (top, drawn))
    of_top, of_drawn = config["n_top_ex_for_generation"], config["n_iw_sampled_ex_for_generation"]
    scoring = [*top[of_top:], *drawn[of_drawn:], *(window("random", k) for k in range(n_random))]
    return Case(latent, threshold=config["act_threshold_frac"] * max(max(w.acts) for w in top),
                generation=sorted([*top[:of_top], *drawn[:of_drawn]], key=lambda w: max(w.acts), reverse=True),
                scoring=[scoring[i] for i in torch.randperm(len(scoring), generator=rng)])


def spread(places: list[int], values: list[float], number: int, buffer: int) -> list[int]:
    """Indices of the first `number` places, in falling order of their positive values, more than `buffer` apart."""
    chosen, barred = [], set()
    for k, (place, value) in enumerate(zip(places, values)):
        if value <= 0 or len(chosen) == number:
            break
        if place not in barred:  # a window never leaves its row, so nothing in another row is barred
            chosen.append(k)
            barred.update(range(place - buffer, place + buffer + 1))
    return chosen
