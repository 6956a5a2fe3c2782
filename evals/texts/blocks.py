"""Training text as the blocks of a run.

Shapes: R rows of a block, r others, T tokens in a row (the context), N tokens that are trained on.
"""

from __future__ import annotations

import threading

from torch import Tensor

from evals.texts.reader import Rows

FIRST = {"block": 0, "documents": None, "leftover": [], "before": []}  # the cursor of a run's beginning


class TokenStream:
    """Blocks of packed rows: BOS, then T − 1 tokens of documents joined by BOS.

    Block b holds as many rows as give `plan[b]` trainable tokens, so its content depends on the text and on b alone.
    `cursors[b]` is all that is needed to continue from block b; `rows` stand where the one given says. Passes take
    `pass_rows` rows and run on over the ends of blocks; 1: each block begins with a pass.
    """

    def __init__(self, rows: Rows, plan: list[int], pass_rows: int, cursor: dict):
        self.rows, self.plan, self.pass_rows = rows, plan, pass_rows
        self.next, self.cursors = cursor["block"], {cursor["block"]: cursor}
        self.lock = threading.Lock()

    @property
    def digest(self) -> str:
        """Identity of the text, for cache keys."""
        return self.rows.reader.source.digest("train")

    def block(self, b: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Rows [R, T] (int32), flat positions [plan[b]] to train on, (before, after): rows in a pass with its ends."""
        with self.lock:  # the background thread and a late caller must not both advance
            while True:
                found = self.rows.take(self.plan[self.next:], self.pass_rows)
                # the current block's cursor stays: while one is trained on, the next is passed, a third is tokenised
                self.cursors = {b: cursor for b, cursor in self.cursors.items() if b >= self.next - 2}
                self.next += 1
                self.cursors[self.next] = dict(block=self.next, **self.rows.place)
                if self.next > b:
                    return found
