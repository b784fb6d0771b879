"""Documents to ids, a batch at a time: what the worker processes of a preparation do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from qtrain.data.splits import Side, WindowTable
from qtrain.data.tokenizers import Tokenizer

# A batch is sent to a process and its ids come back: large enough that this costs little beside encoding (about 1 MB/s),
# small enough that a few in hand are nothing
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
KEPT = frozenset({Side.TRAIN, Side.VAL})


class EncodedDocument(NamedTuple):
    """side: the last word on it. ids: [N], without end-of-text; None where the document is left out. text_bytes: UTF-8
    bytes of its text."""

    side: Side
    ids: NDArray[Any] | None
    text_bytes: int


def in_batches(documents: Iterable[tuple[Side, str]]) -> Iterator[list[tuple[Side, str]]]:
    """Of at most BATCH_DOCUMENTS, and of BATCH_BYTES characters but for one long document at the end."""
    batch: list[tuple[Side, str]] = []
    size = 0
    for side, text in documents:
        kept = text if side in KEPT else ""
        batch.append((side, kept))
        size += len(kept)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class DocumentEncoder:
    """Settles the sides of a batch of documents, and encodes those that stay. It is sent to each worker once."""

    tokenizer: Tokenizer
    table: WindowTable

    def __call__(self, batch: list[tuple[Side, str]]) -> list[EncodedDocument]:
        sides = [self.table.settled(side, text) for side, text in batch]
        texts = [text for side, (_, text) in zip(sides, batch, strict=True) if side in KEPT]
        ids = iter(self.tokenizer.encode_batch(texts))
        return [
            EncodedDocument(side, next(ids), len(text.encode("utf-8")))
            if side in KEPT
            else EncodedDocument(side, None, 0)
            for side, (_, text) in zip(sides, batch, strict=True)
        ]
