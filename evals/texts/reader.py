"""Training text as one endless run of token ids that can be left and continued at any document."""

from __future__ import annotations

import itertools
from collections.abc import Callable

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
