"""Training text as one endless run of token ids, cut into rows, that can be left and continued at any document.

Shapes: R rows of a block, r others, T tokens in a row (the context).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from evals.texts import packing

AT_ONCE = 64  # documents


class Reader:
    """The documents of a source's "train" side, tokenised, from `place` on and from the beginning again at their end.

    `vocabulary`: how many ids the model embeds. ValueError for text without a token, or with an id beyond that.
    """

    def __init__(self, source, tokenizer, bos: int, vocabulary: int, place: dict | None, say: Callable[[str], None]):
        self.source, self.tokenizer, self.bos, self.vocabulary, self.say = source, tokenizer, bos, vocabulary, say
        self.documents, self.begun_at = None, place  # opened at need: blocks from the cache need no text
        self.readings, self.found = 0, 0  # times the text was begun again; tokens found since

    @property
    def place(self) -> dict | None:
        """What a Reader that continues here is made with; JSON-able."""
        return self.documents.state() if self.documents else self.begun_at

    def more(self) -> list[int]:
        """The token ids of the next documents, each with BOS behind it."""
        self.documents = self.documents or self.source.documents("train", self.begun_at)
        texts = list(itertools.islice(self.documents, AT_ONCE)) or self._again()
        ids = []
        for document in packing.ids_of(texts, self.tokenizer, self.bos):
            ids += [*document, self.bos]
            self.found += len(document) - document.count(self.bos)
        most = max(ids, default=0)
        if most >= self.vocabulary:
            raise ValueError(f"a text has the token id {most}, and the model embeds {self.vocabulary} tokens\n"
                             "give the model's own tokenizer, or embed its tokens: "
                             "model.resize_token_embeddings(len(tokenizer))")
        return ids

    def _again(self) -> list[str | list[int]]:
        """The first documents, when the last have been read."""
        if self.readings and not self.found:
            raise ValueError("the training dataset holds no token to train on\ncheck --dataset and --text_field")
        if not self.readings:
            self.say("the training text has been read once; starting again from its beginning, as often as it takes")
        self.readings, self.found = self.readings + 1, 0
        self.documents = self.source.documents("train", None)
        texts = list(itertools.islice(self.documents, AT_ONCE))
        if not texts:
            raise ValueError("the training dataset holds no text\ncheck --dataset and --text_field")
        return texts


class Rows:
    """A reader's tokens as rows, BOS and the T − 1 that follow, taken a block at a time.

    `leftover` has been read and not taken; `before` are the rows taken last that begin an unfinished pass.
    """

    def __init__(self, reader: Reader, context: int, keep_bos: bool, leftover: list[int], before: list[list[int]]):
        self.reader, self.context, self.keep_bos = reader, context, keep_bos
        self.ids, self.before = list(leftover), list(before)

    @property
    def place(self) -> dict:
        """Where the next block begins; JSON-able."""
        return dict(documents=self.reader.place, leftover=list(self.ids), before=self.before)

    def take(self, plan: list[int], pass_rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Rows [R, T] (int32) that give plan[0] trainable tokens, the flat positions of these, and the rows around.

        `plan`: from this block to the run's last. Passes of `pass_rows` rows are counted from the run's first row:
        around are those taken earlier that share a pass with the first of these, and those that share one with the
        last, which the next blocks are still to take: (before, after), [r, T] each.
        """
        before, own, after = _last(self.before, len(self.before) % pass_rows), [], []
        valid, wanted = 0, list(plan)
        # to the end of the block, and on to the end of its last pass, or of the run
        while len(wanted) == len(plan) or (wanted and (len(before) + len(own) + len(after)) % pass_rows):
            row = self._row(len(own) + len(after))
            if len(wanted) == len(plan):
                own.append(row)
            else:
                after.append(row)
            valid += len(row) if self.keep_bos else len(row) - row.count(self.reader.bos)
            if valid >= wanted[0]:
                valid = 0
                del wanted[0]
        del self.ids[:len(own) * (self.context - 1)]
        self.before = _last(before + own, (len(before) + len(own)) % pass_rows)
        rows_RT = self._tensor(own)
        keep_RT = torch.ones_like(rows_RT, dtype=torch.bool) if self.keep_bos else rows_RT != self.reader.bos
        index_N = keep_RT.flatten().nonzero().squeeze(1)[:plan[0]]
        return rows_RT, index_N, (self._tensor(before), self._tensor(after))

    def _row(self, i: int) -> list[int]:
        """Row i of those that follow."""
        start = i * (self.context - 1)
        stop = start + self.context - 1
        while len(self.ids) < stop:
            self.ids.extend(self.reader.more())
        return [self.reader.bos, *self.ids[start:stop]]

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).view(-1, self.context)


def _last(rows: list[list[int]], n: int) -> list[list[int]]:
    return rows[len(rows) - n:]
