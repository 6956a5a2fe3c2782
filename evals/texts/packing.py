"""Held-out documents as rows of tokens, packed as SAELens packs them for SAEBench's core eval.

Shapes: R rows, T tokens in a row (the context).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

DOCUMENTS_AT_ONCE = 64  # fast tokenizers work on a list of texts in parallel
PIECE = 2**20  # characters that are tokenised at once


class TooLittleText(ValueError):
    """The texts do not fill one row."""


def pack(texts: Iterable[str | list[int]], tokenizer, context: int, bos: int, rows: int | None = None) -> Tensor:
    """Tokens [R, T] int64 with a BOS at position 0 of every row and between documents inside a row.

    Documents (texts, or token ids) are tokenised without special tokens and run on from one row to the next; what does
    not fill a row is dropped. R is `rows`, or less if texts run out; TooLittleText if they do not fill one row.
    """
    return pack_numbered(texts, tokenizer, context, bos, rows)[0]


def pack_numbered(texts: Iterable[str | list[int]], tokenizer, context: int, bos: int,
                  rows: int | None = None) -> tuple[Tensor, Tensor]:
    """What `pack` gives, and the number [R, T] of each token's document; a BOS belongs to what it precedes."""
    if context < 2:
        raise ValueError(f"a row of {context} tokens has no room for text after its BOS\n"
                         "set context_size to 2 or more")
    packed = list(islice(_rows(_documents(texts, tokenizer, bos), context, bos), rows))
    if not packed:
        raise TooLittleText(f"the texts hold fewer than the {context} tokens of one row\n"
                            "give more text, or set a smaller context_size")
    tokens, documents = zip(*packed)
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(documents, dtype=torch.int64)


def ids_of(documents: Iterable[str | list[int]], tokenizer, bos: int | None = None) -> list[list[int]]:
    """The token ids of documents: of texts without special tokens, of ids as they are but for a leading `bos`."""
    documents = list(documents)
    texts = [document for document in documents if isinstance(document, str)]
    tokenised = iter(_tokenised(texts, tokenizer))
    return [next(tokenised) if isinstance(document, str) else _without_bos(document, bos) for document in documents]


def _without_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids[1:] if ids[:1] == [bos] else ids


def _tokenised(texts: list[str], tokenizer) -> list[list[int]]:
    """The token ids of each text, about PIECE characters at a time: at once, 10 MB take 3 GB of memory."""
    ids: list[list[int]] = [[] for _ in texts]
    group, size = [], 0

    def tokenise() -> None:
        found = tokenizer([piece for _, piece in group], add_special_tokens=False)["input_ids"] if group else []
        for (i, _), part in zip(group, found):
            ids[i] += part
        group.clear()

    for i, text in enumerate(texts):
        for piece in pieces(text):
            if size + len(piece) > PIECE:
                tokenise()
                size = 0
            group.append((i, piece))
            size += len(piece)
    tokenise()
    return ids


def pieces(text: str, most: int = 0) -> Iterator[str]:
    """A text in parts of at most `most` characters (0: PIECE), cut before a space, with which BPE begins a word."""
    start, most = 0, most or PIECE
    while len(text) - start > most:
        space = text.rfind(" ", start + most // 2, start + most)
        end = space if space > start else start + most
        yield text[start:end]
        start = end
    yield text[start:]


def _documents(texts: Iterable[str | list[int]], tokenizer, bos: int) -> Iterator[list[int]]:
    texts = iter(texts)
    while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
        yield from ids_of(batch, tokenizer, bos)


def _rows(documents: Iterable[list[int]], context: int, bos: int) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, the numbers of their documents) of each full row."""
    row, of = [bos], []
    for number, ids in enumerate(documents):
        if ids and len(row) > 1:  # at the start of a row the row's own BOS separates the documents
            ids = [bos, *ids]
        start = 0
        while (end := start + context - len(row)) <= len(ids):
            of += [number] * (context - len(of))
            yield row + ids[start:end], of
            row, of, start = [bos], [], end
        row += ids[start:]
        if len(row) > 1:  # else the BOS waits for the next document
            of += [number] * (len(row) - len(of))
