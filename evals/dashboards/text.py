"""The held-out text that dashboards are made from, and what the language model makes of it.

Shapes: R rows, r rows of a part, T tokens of a row, D = d_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import evals
from evals import Setup
from evals.common import positions
from evals.model import memory
from evals.storage.identity import code_digest
from evals.texts import packing

# {kind of text: (rows, tokens of a row)}; a row of synthetic ones is BOS, the numbers of a draw and BOS
SIZES = {"hub": (8192, 128), "embedded": (256, 128), "tiny": (64, 32), "synthetic": (32, 1026)}
ON_A_CPU = 256  # rows at most: 32,768 tokens
PASS = 2**10  # tokens that pass the language model at once on a CPU: those of a batch of core's
PART = {"cpu": 2**12, "cuda": 2**15}  # tokens of a part: on a GPU an entry of the cache that is written meanwhile


@dataclass
class Part:
    """Some rows: x_rTD their residuals in the model's dtype; body_rT where features are looked at."""

    first: int
    x_rTD: Tensor
    body_rT: Tensor

    def to(self, device) -> Part:
        return Part(self.first, self.x_rTD.to(device), self.body_rT.to(device))


@dataclass
class Text:
    """Rows of tokens, all parts of which are passed over again and again: their residuals are held if there is room,
    else taken from the cache, and what that has no room for passes the language model once more.
    """

    setup: Setup
    tokens_RT: Tensor
    plain_RT: Tensor  # no special token
    kept_RTD: Tensor | None = None  # residuals of the first rows, which an eval has kept
    _held: dict[int, Part] = field(default_factory=dict)

    def parts(self) -> Iterator[Part]:
        """Its parts, in order, on the model's device; they are held on the CPU."""
        lm, cache = self.setup.lm, self.setup.cache
        R, T = self.tokens_RT.shape
        holds = R * T * lm.d_model * getattr(lm, "dtype", torch.float32).itemsize <= cache.most
        size = max(1, PART[torch.device(lm.device).type] // T)
        for first in range(0, R, size):
            part = self._held.get(first) or self._made(first, first + size)
            if holds:
                self._held[first] = part
            yield part.to(lm.device)

    def _made(self, first: int, end: int) -> Part:
        end = min(end, len(self.tokens_RT))
        tokens_rT, plain_rT = self.tokens_RT[first:end], self.plain_RT[first:end]
        if self.kept_RTD is not None and end <= len(self.kept_RTD):
            x_rTD = self.kept_RTD[first:end]
            return Part(first, x_rTD, positions.within(self.setup, x_rTD, plain_rT))
        of_tokens = hashlib.sha256(tokens_rT.contiguous().numpy().tobytes()).hexdigest()
        lm = self.setup.lm
        depends_on = dict(model=lm.digest, layer=self.setup.layer, tokens=of_tokens,
                          dtype=str(getattr(lm, "dtype", "")), device=torch.device(lm.device).type,
                          code=code_digest(memory.__file__))
        size = len(tokens_rT)
        if depends_on["device"] == "cpu":
            size = max(1, PASS // tokens_rT.shape[1])

        def make() -> dict[str, Tensor]:
            return dict(x=torch.cat([memory.residual(self.setup, rows_rT) for rows_rT in tokens_rT.split(size)]))

        x_rTD = self.setup.cache.get("dashboards", depends_on, make)["x"].cpu()
        return Part(first, x_rTD, positions.within(self.setup, x_rTD, plain_rT))


def read(setup: Setup) -> Text:
    """As much held-out text as dashboards of the run's kind of texts look at, or as there is.

    TooLittleText: not one row; OSError: it cannot be read.
    """
    lm = setup.lm
    rows, context = SIZES[getattr(setup.data, "kind", "embedded")]
    if torch.device(lm.device).type == "cpu":
        rows = min(rows, ON_A_CPU)

    def make() -> dict[str, Tensor]:
        return dict(tokens=packing.pack(setup.texts(), lm.tokenizer, context, lm.bos, rows))

    depends_on = dict(model=lm.digest, texts=setup.texts_digest, rows=rows, context=context, bos=lm.bos,
                      code=code_digest(packing.__file__))
    tokens_RT = setup.cache.get("dashboards-tokens", depends_on, make)["tokens"]
    plain_RT = ~torch.isin(tokens_RT, torch.tensor(sorted(lm.special_ids)))
    return Text(setup, tokens_RT, plain_RT, _kept(setup, tokens_RT))


def _kept(setup: Setup, tokens_RT: Tensor) -> Tensor | None:
    """Residuals of the first rows, where an eval has kept them.

    On a CPU, where the language model takes most of the time. A GPU passes them again in less than reading takes.
    """
    if torch.device(setup.lm.device).type != "cpu":
        return None
    found = (x_RTD for rows_RT, x_RTD in evals.kept_rows(setup) if rows_RT.equal(tokens_RT[:len(rows_RT)]))
    return next(found, None)
