"""UTF-8 bytes as ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Tokenizer

BYTE_VALUES = 256


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document. ``decode(encode(text)) == text`` for every text."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__("byte", BYTE_VALUES + 1, BYTE_VALUES)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """[N] uint16 each, N = length of the text in UTF-8 bytes."""
        return [np.frombuffer(t.encode("utf-8"), dtype=np.uint8).astype(np.uint16) for t in texts]

    def _text(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, about: Mapping[str, Any], files: Mapping[str, bytes]) -> ByteTokenizer:
        return cls()
