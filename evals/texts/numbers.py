"""The text of the profile synthetic: whole numbers. The token t stands for sample t of a synthetic model
(evals/model/synthetic.py), so that what becomes of texts (blocks, rows, their place in a checkpoint, their shares among
ranks, the cache of activations) becomes of samples too.
"""

from __future__ import annotations

from collections.abc import Sequence

DRAW = 1024  # samples that are made together: the tokens of a document
BOS = 0  # stands between documents and for no sample; the numbers of the first draw are therefore not used
DRAWS = {"train": range(1, 2**20), "heldout": range(2**20, 2**21 - 1)}  # 1.07e9 samples each
VOCABULARY = 2**31 - 1
VERSION = 1  # raise it when a number comes to stand for another sample


class Documents(Sequence):
    """The documents of "train" or "heldout": the numbers of one draw each."""

    def __init__(self, split: str):
        self.draws = DRAWS[split]

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, i: int) -> list[int]:
        draw = self.draws[i]
        return list(range(draw * DRAW, (draw + 1) * DRAW))


class Numbers:
    """What a tokenizer is asked for beside tokenising, of which numbers have no need."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = BOS, None, None, None

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join("<bos>" if i == BOS else f"sample {i}" for i in ids)
