"""Tokenizers: text <-> token ids, behind one small protocol, found by name.

The rest of the room knows only ``Tokenizer``: a name that goes into the manifest of the shards, the number of
ids, the id that ends a document, and the two directions. A new tokenizer is a class and one line in
``_TOKENIZERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

BYTE_VALUES = 256


@runtime_checkable
class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    @property
    def name(self) -> str:
        """Identifies the mapping: equal names mean equal ids for equal text."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""

    @property
    def eot_token(self) -> int:
        """The id written after each document; ``encode`` never produces it."""

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids [N] of ``text``, without an end-of-document id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; end-of-document ids are left out."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document.

    Every text is encodable and ``decode(encode(text)) == text``. A model's samples may stop inside a
    character: ``decode`` writes U+FFFD for bytes that are no UTF-8.
    """

    name = "byte"
    vocab_size = BYTE_VALUES + 1
    eot_token = BYTE_VALUES

    def encode(self, text: str) -> NDArray[np.integer]:
        """[N] uint16, N = length of ``text`` in UTF-8 bytes."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """``ids``: any iterable of integers in [0, 257). Raises ValueError on another id."""
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise ValueError(
                f"token id {int(array[outside][0])} is outside the byte vocabulary [0, {self.vocab_size}); "
                "restrict the model's logits to the tokenizer's vocab_size before sampling"
            )
        return array[array != self.eot_token].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name``. Raises ValueError, naming the allowed ones, on an unknown name."""
    if name not in _TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; allowed: {', '.join(sorted(_TOKENIZERS))}")
    return _TOKENIZERS[name]()
