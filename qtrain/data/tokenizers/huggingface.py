"""Hugging Face tokenizers: any that comes down to a ``tokenizer.json``, and byte-level BPE trained on one's own text.

``transformers`` finds and converts what a hub name or a folder holds (sentencepiece models included, where it can);
what is kept is the resulting ``tokenizer.json`` of the ``tokenizers`` library, which alone encodes and decodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data.optional_libraries import optional_library

from .base import Tokenizer, TokenizerError
from .byte import BYTE_VALUES

FILE = "tokenizer.json"
# GPT-2's separator of documents (Radford et al. 2019, encoder.json)
END_OF_TEXT = "<|endoftext|>"


class HuggingFaceTokenizer(Tokenizer):
    """tokenizer_json: text of a ``tokenizer.json``. eot: the token that ends a document.

    Whatever the file says of special tokens, templates, truncation and padding, a text becomes its own ids and nothing
    else: "<|endoftext|>" inside a text is encoded as ordinary characters. Raises TokenizerError where ``eot`` is none of
    its tokens, or one that ordinary text gives too; ImportError without ``tokenizers``.
    """

    kind = "huggingface"

    def __init__(self, tokenizer_json: str, eot: str, name: str) -> None:
        library = optional_library("tokenizers", needed_for=f"the tokenizer {name!r}")
        backend = library.Tokenizer.from_str(tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if eot not in vocabulary:
            raise TokenizerError(
                f"tokenizer {name!r} has no token {eot!r} to end a document with; name one that it has, as in "
                "data.tokenizer={kind:hf,name:...,eot:'</s>'}"
            )
        # Ids may have gaps, so that their number is not enough
        super().__init__(name, max(vocabulary.values()) + 1, vocabulary[eot])
        self.eot, self._json, self._backend = eot, tokenizer_json, backend
        if self.eot_token in self.encode(eot):
            raise TokenizerError(
                f"tokenizer {name!r}: {eot!r} is an ordinary token, which texts may hold; name a special token as eot"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in found]

    def _text(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        return {FILE: self._json.encode(), "eot.txt": self.eot.encode()}

    @classmethod
    def from_files(cls, about: Mapping[str, Any], files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
        return cls(files[FILE].decode(), files["eot.txt"].decode(), about["name"])


def pretrained(name: str, *, revision: str | None = None, eot: str | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of a folder or of a model on the Hugging Face hub.

    revision: commit, tag or branch there. eot: default: what it declares as its end of sequence. Raises TokenizerError
    where nothing can be loaded, where it has no fast form, and where it declares no such token.
    """
    folder = Path(name).expanduser()
    title = (folder.resolve().name if folder.exists() else name).replace("/", "--")
    file = folder / FILE if folder.is_dir() else folder
    if file.is_file() and not (folder / "tokenizer_config.json").is_file():
        if eot is None:
            raise TokenizerError(
                f"{file} does not say which token ends a text; name it: data.tokenizer={{kind:hf,name:{name},eot:'</s>'}}"
            )
        return HuggingFaceTokenizer(file.read_text(encoding="utf-8"), eot, title)
    library = optional_library("transformers", needed_for=f"the tokenizer {name!r}")
    where = str(folder) if folder.is_dir() else name
    try:
        # Never code of the model's repository
        found = library.AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise TokenizerError(
            f"no Hugging Face tokenizer can be loaded from {name!r}: {str(error).strip().splitlines()[0]}; give a folder "
            f"with {FILE}, or a name on the hub while there is a network (or once it is in the local cache)"
        ) from error
    if not getattr(found, "is_fast", False):
        raise TokenizerError(
            f"tokenizer {name!r} has no {FILE} and transformers cannot convert it; convert it once with a fast tokenizer "
            "class and save_pretrained"
        )
    eot = eot if eot is not None else found.eos_token
    if eot is None:
        raise TokenizerError(
            f"tokenizer {name!r} declares no end-of-sequence token; name one: data.tokenizer={{kind:hf,name:{name},eot:...}}"
        )
    return HuggingFaceTokenizer(found.backend_tokenizer.to_str(), eot, title)


@dataclass(frozen=True, kw_only=True)
class BpeTraining:
    """A tokenizer that is still to be trained: byte-level BPE (Sennrich et al., 1508.07909; bytes as in GPT-2).

    vocab_size: in all, the 256 bytes and the end-of-text token included. train_bytes: it learns from the first so many
    UTF-8 bytes of the training documents; the merges of a larger text are nearly the same and cost memory. The result is
    a function of the text and these numbers. Raises TokenizerError for a vocabulary too small to hold the bytes.
    """

    vocab_size: int
    train_bytes: int = 1 << 30
    eot: str = END_OF_TEXT

    def __post_init__(self) -> None:
        least = {"vocab_size": BYTE_VALUES + 1, "train_bytes": 1}
        for key, lowest in least.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise TokenizerError(
                    f"tokenizer bpe: {key}={value!r} must be a whole number, {lowest} or more (a vocabulary holds the "
                    f"{BYTE_VALUES} bytes and the end of a text)"
                )

    @property
    def name(self) -> str:
        return f"bpe-{self.vocab_size}"

    @property
    def digest(self) -> str:
        """sha256 of the numbers that decide, beside the text, what comes out."""
        return hashlib.sha256(json.dumps(["bpe", asdict(self)], sort_keys=True).encode()).hexdigest()

    def train(self, texts: Iterable[str]) -> HuggingFaceTokenizer:
        """The tokenizer that ``texts`` give. Raises TokenizerError where they hold too little for ``vocab_size``."""
        library = optional_library("tokenizers", needed_for="training a BPE tokenizer")
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[self.eot],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(self._first(texts), trainer)
        found = backend.get_vocab_size(with_added_tokens=True)
        if found < self.vocab_size:
            raise TokenizerError(
                f"the training text gives a vocabulary of {found} tokens, fewer than bpe:{self.vocab_size}; ask for "
                f"data.tokenizer=bpe:{found} or less, or give more text"
            )
        return HuggingFaceTokenizer(backend.to_str(), self.eot, self.name)

    def _first(self, texts: Iterable[str]) -> Iterator[str]:
        left = self.train_bytes
        for text in texts:
            data = text.encode("utf-8")
            yield text if len(data) <= left else data[:left].decode("utf-8", errors="ignore")
            left -= len(data)
            if left <= 0:
                return
