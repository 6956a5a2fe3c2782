"""Whole contexts and attention patterns, for variants that need them: what a block of activations holds, its batches.

A block holds the trainable tokens of R rows (contexts) of T positions, in their order. Position 0 of a row is its BOS,
which is left out of training like every other BOS, so the positions of a row start at 1 and have gaps.
    tokens_N, place_N           int32; place = row·T + position, ascending
    attention_RATT              fp16, mean over heads, query × key position, for A layers
or, instead of the patterns, their entries above a threshold:
    pair_query_P, pair_key_P    int32, indices into the block's N tokens, sorted by query; key before it in the same row
    pair_attention_PA           fp16
place_N, pair_query_P and pair_key_P stay on the host, where batches are put together; the others may lie on the device.

Shapes as in base.py, and C contexts in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SYNTHETIC_CONTEXT = 8  # positions


def sparse_attention(pattern_RATT: Tensor, place_N: Tensor, context: int,
                     threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(query_P, key_P int32, value_PA) by query: pairs of tokens for which one of the A layers exceeds the threshold.

    `place_N` and the pairs count from the first of these rows and of their tokens.
    """
    place_N = place_N.to(pattern_RATT.device)
    # positions that are not trained on, above all the BOS columns, which are attention sinks, have no token
    token_RT = torch.full((len(pattern_RATT), context), -1, dtype=torch.int32, device=pattern_RATT.device)
    token_RT.view(-1)[place_N] = torch.arange(len(place_N), dtype=torch.int32, device=pattern_RATT.device)
    trained_RT = token_RT >= 0
    trained_RT[:, 0] = False  # also where BOS is trained on
    wanted_RTT = (pattern_RATT.amax(1) > threshold) & trained_RT[:, :, None] & trained_RT[:, None, :]
    row, query, key = wanted_RTT.tril(-1).nonzero().unbind(1)
    return token_RT[row, query], token_RT[row, key], pattern_RATT[row, :, query, key]


def rows_of_step(n_rows: int, steps: int, order_R: Tensor) -> list[Tensor]:
    """The rows of each step: all of `order_R`, whole, in equal shares. ValueError where steps outnumber rows."""
    if steps > n_rows:
        raise ValueError(f"{steps} steps cannot share {n_rows} contexts: each needs at least one\n"
                         "make --batch_size at least as large as --context")
    return [order_R[i * n_rows // steps:(i + 1) * n_rows // steps] for i in range(steps)]


def take(block: dict[str, Tensor], rows: Tensor, context: int, layer_x_ND: Tensor,
         device: torch.device | str) -> dict[str, Tensor]:
    """The rows of a block (host int64 [C], in the order wanted) as fields of base.Batch on `device`, x in fp32.

    Sizes and indices come from the block's place_N and pair_query_P on the host, so nothing waits for the device.
    """
    place_N = block["place_N"]
    start_C, stop_C = torch.searchsorted(place_N, torch.stack([rows, rows + 1]).to(place_N.dtype) * context)
    index_B, context_B, shift_C = _runs(start_C, stop_C)
    batch = dict(x=_pick(layer_x_ND, index_B, device).float(),
                 tokens=_pick(block["tokens_N"], index_B, device).long(),
                 positions=(place_N[index_B].long() % context).to(device, non_blocking=True),
                 contexts=context_B.to(device, non_blocking=True))
    if "attention_RATT" in block:
        batch["attention"] = _pick(block["attention_RATT"], rows, device).float()
    if "pair_query_P" in block:
        query_P, key_P = block["pair_query_P"], block["pair_key_P"]
        first_C, last_C = torch.searchsorted(query_P, torch.stack([start_C, stop_C]).to(query_P.dtype))
        index_P, context_P, _ = _runs(first_C, last_C)
        pairs_2P = torch.stack([query_P[index_P], key_P[index_P]]) + shift_C[context_P]
        batch |= dict(pairs=pairs_2P.to(device, non_blocking=True),
                      pair_attention=_pick(block["pair_attention_PA"], index_P, device).float())
    return batch


def _runs(start_C: Tensor, stop_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ranges start..stop in turn: indices [n], number of the range [n], what moves an index to its place [C]."""
    length_C = stop_C - start_C
    shift_C = length_C.cumsum(0) - stop_C
    range_n = torch.repeat_interleave(length_C)
    return torch.arange(len(range_n)) - shift_C[range_n], range_n, shift_C


def _pick(values: Tensor, index: Tensor, device: torch.device | str) -> Tensor:
    """values[index] on `device`, gathered where the values lie."""
    return values.index_select(0, index.to(values.device, non_blocking=True)).to(device, non_blocking=True)


def synthetic(x_BD: Tensor, attention_layers: tuple[int, ...], threshold: float | None, seed: int) -> dict[str, Tensor]:
    """Fields of base.Batch for activations x_BD: contexts of 7 tokens, random ids, random causal attention."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(x_BD), SYNTHETIC_CONTEXT
    rows = torch.arange(-(-B // (T - 1)))
    place_N = 1 + torch.arange(B) + torch.arange(B) // (T - 1)
    tokens_N = torch.randint(256, (B,), generator=generator, dtype=torch.int32)  # ids that every vocabulary has
    block = dict(tokens_N=tokens_N, place_N=place_N.int())
    if attention_layers:
        score_RATT = torch.randn(len(rows), len(attention_layers), T, T, generator=generator)
        future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        pattern_RATT = score_RATT.masked_fill(future_TT, -torch.inf).softmax(-1).half()
        if threshold is None:
            block["attention_RATT"] = pattern_RATT
        else:
            pairs = sparse_attention(pattern_RATT, place_N, T, threshold)
            block |= dict(zip(("pair_query_P", "pair_key_P", "pair_attention_PA"), pairs))
    return take(block, rows, T, x_BD, x_BD.device)


# ------------------------------------------------------------------------------------------------ a run's share


@dataclass(frozen=True)
class Attention:
    """What batches of an SAE at `layer` hold of attention: layers relative to its own, dense or above a threshold."""

    layer: int
    offsets: tuple[int, ...]
    threshold: float | None

    @classmethod
    def of(cls, sae, layer: int) -> Attention | None:
        """What a variant declared, or None."""
        return cls(layer, tuple(sae.attention_layers), sae.attention_threshold) if sae.attention_layers else None

    @property
    def layers(self) -> list[int]:
        return [self.layer + offset for offset in self.offsets]

    def keep(self, pattern: dict[int, Tensor], place_N: Tensor, first: int) -> dict[str, Tensor]:
        """What a block holds of the patterns {layer: [B, T, T]} of rows whose tokens, at place_N, start at `first`."""
        pattern_RATT = torch.stack([pattern[layer] for layer in self.layers], 1)
        if self.threshold is None:
            return dict(attention_RATT=pattern_RATT)
        query_P, key_P, value_PA = sparse_attention(pattern_RATT, place_N, pattern_RATT.shape[-1], self.threshold)
        return dict(pair_query_P=query_P + first, pair_key_P=key_P + first, pair_attention_PA=value_PA)

    def named(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was kept of all rows, under names of its own: a block may serve several SAEs."""
        return {f"{self}/{name}": torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def of_block(self, block: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block as `take` wants it."""
        mine = {name.rpartition("/")[2]: tensor for name, tensor in block.items() if name.startswith(f"{self}/")}
        return {name: block[name] for name in ("tokens_N", "place_N")} | mine

    def __str__(self) -> str:
        return f"attention_{self.layer}_{','.join(map(str, self.offsets))}_{self.threshold}"


def gather(block: dict[str, Tensor], rows: Tensor, context: int, layer: int, attention: Attention | None,
           device: str) -> dict[str, Tensor]:
    """`take` for an SAE at `layer` from a block that may serve several."""
    return take(attention.of_block(block) if attention else block, rows, context, block[f"x_{layer}"], device)


def placed(block: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """A block's tensors where batches are put together from them: indices on the host, the others on the device.

    Takes them out of `block`, so that whoever still holds it does not keep them.
    """
    on_host = ("place_N", "pair_query_P", "pair_key_P", "starts_W")
    return {name: block.pop(name).to("cpu" if name.endswith(on_host) else device) for name in list(block)}
