"""What a tokenizer is here: two directions, an id that ends a document, and contents that rebuild it anywhere.

A tokenizer is saved by its contents (``save``: a few files; ``state``: the same in memory, for checkpoints), never by
the name of something on a hub or in a folder, which may change under the name. ``digest`` is that of the contents, so
equal digests mean equal ids for equal text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qtrain.data.manifest import token_dtype
from qtrain.data.partial_folders import sync_folder

ABOUT = "about.json"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used, or whose saved contents are missing or altered."""


class Tokenizer(ABC):
    """Text <-> ids in [0, vocab_size). Pickling, and so every worker process, carries the contents.

    name: for folders and reports. eot_token: the id written after each document; ``encode`` never gives it, whatever
    the text says.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, vocab_size: int, eot_token: int) -> None:
        if not 0 <= eot_token < vocab_size:
            raise TokenizerError(
                f"tokenizer {name!r}: its end-of-text id {eot_token} lies outside [0, {vocab_size})"
            )
        # Of a folder's name, whatever stands in a hub's
        self.name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".") or self.kind
        self.vocab_size, self.eot_token = vocab_size, eot_token

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 up to 65,536 ids, else uint32: how shards store them."""
        return token_dtype(self.vocab_size)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, [N] of ``dtype``, without end-of-text ids."""

    @abstractmethod
    def _text(self, ids: Sequence[int]) -> str:
        """Text of valid ids, none of them ``eot_token``."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Contents that rebuild it, beside name, vocab_size and eot_token."""

    @classmethod
    @abstractmethod
    def from_files(cls, about: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
        """The inverse of ``files``; about: name, vocab_size, eot_token."""

    def encode(self, text: str) -> NDArray[Any]:
        """[N] of ``dtype``, without an end-of-text id."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, end-of-text ids left out; bytes that are no UTF-8, as where a sample stops within a
        character, become U+FFFD. Raises ValueError on an id outside [0, vocab_size)."""
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise ValueError(
                f"token id {int(array[outside][0])} is outside the vocabulary [0, {self.vocab_size}) of the tokenizer "
                f"{self.name!r}; restrict the model's logits to the tokenizer's vocab_size before sampling"
            )
        return self._text(array[array != self.eot_token].tolist())

    @property
    def about(self) -> dict[str, Any]:
        """kind, name, vocab_size, eot_token and digest."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eot_token": self.eot_token,
            "digest": self.digest,
        }

    @cached_property
    def digest(self) -> str:
        """sha256 of kind, vocab_size, eot_token and files: 64 hexadecimal digits. The name is not in it."""
        whole = hashlib.sha256(json.dumps([self.kind, self.vocab_size, self.eot_token]).encode())
        for name, content in sorted(self.files().items()):
            for part in (name.encode(), content):
                whole.update(len(part).to_bytes(8, "little"))
                whole.update(part)
        return whole.hexdigest()

    def state(self) -> dict[str, Any]:
        """``about`` and ``files``: what ``tokenizer_from_state`` takes."""
        return {"about": self.about, "files": self.files()}

    def __reduce__(self) -> Any:
        from qtrain.data.tokenizers import tokenizer_from_state

        return tokenizer_from_state, (self.state(),)

    def save(self, folder: str | Path) -> None:
        """Writes ``folder``, whole or not at all. Does nothing where it holds this very tokenizer already. One process
        at a time.

        Raises TokenizerError where it holds something else, OSError as the disk does.
        """
        from qtrain.data.tokenizers import load_tokenizer

        folder = Path(folder)
        if folder.exists():
            if load_tokenizer(folder).digest != self.digest:
                raise TokenizerError(
                    f"{folder} holds another tokenizer than {self.name!r}; remove that folder"
                )
            return
        # Always the same name: what a killed writer left goes with the next attempt
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for name, content in {**self.files(), ABOUT: json.dumps(self.about, indent=1).encode()}.items():
                with (partial / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(partial)
            partial.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
