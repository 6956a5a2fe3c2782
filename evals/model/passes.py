"""The language model over the rows of a training block: as many rows at once as a GPU holds.

Shapes: R rows, T tokens in a row, N tokens that are wanted, D = d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from evals.model.checks import not_finite


def collect(*args, **kwargs) -> dict[str, Tensor]:
    """`collecting`, all at once."""
    return finished(collecting(*args, **kwargs))


def finished(work: Generator) -> Any:
    """What a generator returns when it is driven to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def collecting(lm, rows_RT: Tensor, index_N: Tensor, layers: list[int], wanted: list, batch: int, say: Callable,
               track: Callable, label: str, around: tuple[Tensor, Tensor] | None = None,
               carried: dict[int, Tensor] | None = None) -> Generator[None, None, dict[str, Tensor]]:
    """A generator that yields after each pass, and returns what a block holds, on the model's device.

    Of the positions index_N (flat, ascending) of its rows:

    x_<layer> [N, D] in the model's dtype, tokens_N, place_N, what is `wanted` of attention (its `layers` and `keep`),
    and bos_share: the share of E‖x‖² that BOS positions would have had. FloatingPointError for what is not finite.
    `around` and `carried` as in `in_turn`; passes that give attention have no fixed shape and end with the block.
    """
    T = rows_RT.shape[1]
    out = {layer: torch.empty(len(index_N), lm.d_model, dtype=lm.dtype, device=lm.device) for layer in layers}
    attention = {w: [] for w in wanted}
    attending = sorted({layer for w in wanted for layer in w.layers})
    index_dev_N = index_N.to(lm.device)  # once: each copy waits for the device
    norm_bos = torch.zeros((), dtype=torch.float64, device=lm.device)
    if around is None or attending:
        given = passes(lm, rows_RT.to(lm.device), layers, attending, batch, say, track, label)
    else:
        given = in_turn(lm, rows_RT, around, carried, layers, batch, say, track, label)
    for start, stop, kept, patterns in given:
        low, high = torch.searchsorted(index_N, torch.tensor([start * T, stop * T])).tolist()
        inside = index_dev_N[low:high] - start * T
        for layer in layers:
            out[layer][low:high] = kept[layer].flatten(0, 1).index_select(0, inside)
        for w in wanted:
            attention[w].append(w.keep(patterns, index_N[low:high] - start * T, low))
        norm_bos += kept[layers[0]][:, 0].double().pow(2).sum()
        yield
    tokens_N = rows_RT.flatten()[index_N]
    # in parts: a copy in fp64 would be the run's peak
    squares = {layer: sum(map(_square, x_ND.split(2**14))) for layer, x_ND in out.items()}
    for layer, square in squares.items():
        if not square.isfinite():
            raise not_finite(lm, layer, out[layer], tokens_N)
    block = {f"x_{layer}": x_ND for layer, x_ND in out.items()}
    block["bos_share"] = norm_bos / (norm_bos + squares[layers[0]])
    block |= dict(tokens_N=tokens_N, place_N=index_N.int())
    return block | {name: tensor for w in wanted for name, tensor in w.named(attention[w]).items()}


def in_turn(lm, rows_RT: Tensor, around: tuple[Tensor, Tensor], carried: dict[int, Tensor], layers: list[int],
            batch: int, say: Callable, track: Callable, label: str,
            ) -> Iterator[tuple[int, int, dict[int, Tensor], dict[int, Tensor]]]:
    """As `passes` of a block's rows, in passes that run on over the ends of blocks; no attention.

    `around` = (before, after): the rows [r, T] of the run that share a pass with the block's first, and with its last.
    `carried`: residuals {layer: [r, T, D]} of its first rows, where the block before gave them; at the end what this
    one leaves to the next. If it is empty the rows before are passed again: a row at the same place of the same pass
    has the same bits, whether or not the run was left in between.
    """
    before_RT, after_RT = around
    R, first = len(rows_RT), -len(before_RT)
    held = dict(carried)
    if held:
        first = len(held[layers[0]])
    to_pass_RT = torch.cat([before_RT, rows_RT, after_RT])[len(before_RT) + first:]

    def passed() -> Iterator[tuple[int, int, dict[int, Tensor]]]:
        if held:
            yield 0, first, held
        for start, stop, kept, _ in passes(lm, to_pass_RT.to(lm.device), layers, [], batch, say, track, label):
            yield first + start, first + stop, kept

    beyond = {layer: [] for layer in layers}
    for start, stop, kept in passed():
        low, high = max(start, 0), min(stop, R)
        if low < high:
            yield low, high, {layer: x_rTD[low - start:high - start] for layer, x_rTD in kept.items()}, {}
        if stop > R:
            for layer, x_rTD in kept.items():
                beyond[layer].append(x_rTD[max(R - start, 0):])
    carried.clear()
    carried.update({layer: torch.cat(parts) for layer, parts in beyond.items() if parts})  # copied: not whole passes


def passes(lm, rows_RT: Tensor, layers: list[int], attending: list[int], batch: int, say: Callable[[str], None],
           track: Callable, label: str) -> Iterator[tuple[int, int, dict[int, Tensor], dict[int, Tensor]]]:
    """Yield (start, stop, {layer: residuals [r, T, D]}, {layer: attention pattern}) of `batch` rows at a time.

    `attending`: the layers whose attention is wanted. Where the memory of a GPU runs out the batch is halved, which is
    said and holds to the end; torch.OutOfMemoryError for a single row.
    """
    R, T = rows_RT.shape
    done = 0

    def spans() -> Iterator[tuple[int, int]]:
        while done < R:
            yield done, min(done + batch, R)

    for start, stop in track(spans(), label, R * T, "tok", lambda span: (span[1] - span[0]) * T):
        tokens_rT, kept, patterns = rows_RT[start:stop].long(), None, {}
        try:
            if attending:
                kept, patterns = lm.residuals_and_attention(tokens_rT, layers, attending)
            else:
                kept = lm.training_residuals(tokens_rT, layers, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if kept is None:  # here, where the traceback no longer holds the tensors of the attempt
            batch = batch // 2
            say(f"out of GPU memory: going on with a language-model batch of {batch} rows")
            torch.cuda.empty_cache()
            continue
        done = stop
        yield start, stop, kept, patterns


def kind(lm, run_on: bool) -> dict:
    """What of the way a row is passed may change its bits; passes that `run_on` over blocks begin with the run."""
    found = {"compiled": True} if lm.compiled else {}
    if run_on:  # the place of a row in its pass, by which sums may be rounded
        found["counted_from"] = "first row of the run"
    return found


def _square(x_ND: Tensor) -> Tensor:
    """Sum of all squares, (), in fp64; on a GPU of rows' norms in fp32, which makes no copy."""
    if x_ND.is_cuda:
        return torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float32).double().pow(2).sum()
    return x_ND.double().pow(2).sum()
