"""Tokenizers: text <-> token ids, found by what a configuration says.

    byte                 UTF-8 bytes
    bpe:8192             byte-level BPE of 8,192 tokens, trained on the training split while the data are prepared
    hf:NAME_OR_FOLDER    any Hugging Face tokenizer
    tiktoken:gpt2        any tiktoken encoding; or tiktoken:FILE.tiktoken, tiktoken:FOLDER (encoder.json, vocab.bpe)
    saved:FOLDER         one that qtrain saved: the folder ``tokenizer`` of prepared data or of a run

A mapping says more: ``{kind: bpe, vocab_size: 8192, train_bytes: 100000000}``, ``{kind: hf, name: N, revision: R, eot:
"</s>"}``, ``{kind: tiktoken, name: N, pattern: P, eot: T}``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .base import ABOUT, Tokenizer, TokenizerError
from .byte import BYTE_VALUES, ByteTokenizer
from .huggingface import BpeTraining, HuggingFaceTokenizer, pretrained
from .tiktoken import TiktokenTokenizer, encoding

__all__ = [
    "BYTE_VALUES",
    "BpeTraining",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "TokenizerError",
    "get_tokenizer",
    "is_training",
    "load_tokenizer",
    "tokenizer_from_state",
]

_CLASSES: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (ByteTokenizer, HuggingFaceTokenizer, TiktokenTokenizer)
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``Tokenizer.save`` wrote. Raises TokenizerError where it is missing, cut or altered."""
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise TokenizerError(f"{folder} holds no tokenizer that qtrain saved: there is no {ABOUT}")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ABOUT}
    try:
        return tokenizer_from_state({"about": json.loads((folder / ABOUT).read_bytes()), "files": files})
    except (TokenizerError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"the tokenizer in {folder} cannot be used: {error}") from error


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The inverse of ``Tokenizer.state``. Raises TokenizerError where the contents do not have the digest that they
    are said to have."""
    about = state["about"]
    if about["kind"] not in _CLASSES:
        raise TokenizerError(f"unknown kind of tokenizer {about['kind']!r}; known: {', '.join(_CLASSES)}")
    try:
        found = _CLASSES[about["kind"]].from_files(about, state["files"])
    except KeyError as error:
        raise TokenizerError(f"its file {error} is missing") from error
    if found.digest != about["digest"]:
        raise TokenizerError(
            f"its contents were altered: their digest is {found.digest}, and {about['digest']} was saved"
        )
    return found


# kind -> (the key that the short form KIND:VALUE sets, the function)
_KINDS: dict[str, tuple[str | None, Callable[..., Tokenizer | BpeTraining]]] = {
    "byte": (None, ByteTokenizer),
    "bpe": ("vocab_size", BpeTraining),
    "hf": ("name", pretrained),
    "tiktoken": ("name", encoding),
    "saved": ("folder", load_tokenizer),
}
_GRAMMAR = (
    "byte, bpe:VOCABULARY, hf:NAME_OR_FOLDER, tiktoken:NAME_OR_FILE, saved:FOLDER, or a mapping with kind"
)


def is_training(spec: str | Mapping[str, Any]) -> bool:
    """Whether ``spec`` describes a tokenizer that is still to be trained; nothing is looked up."""
    return (spec.partition(":")[0] if isinstance(spec, str) else spec.get("kind")) == "bpe"


def get_tokenizer(spec: str | Mapping[str, Any]) -> Tokenizer | BpeTraining:
    """What ``spec`` describes: a tokenizer, or one that is still to be trained. Raises TokenizerError, naming what is
    allowed, and ImportError where a library is missing."""
    if isinstance(spec, str):
        kind, colon, value = spec.partition(":")
        key = _KINDS[kind][0] if kind in _KINDS else None
        if kind not in _KINDS or bool(value) != (key is not None) or (colon and not value):
            raise TokenizerError(f"unknown tokenizer {spec!r}; allowed: {_GRAMMAR}")
        more: dict[str, Any] = {} if key is None else {key: value}
    elif isinstance(spec, Mapping) and spec.get("kind") in _KINDS:
        kind = spec["kind"]
        more = {str(k): v for k, v in spec.items() if k != "kind"}
    else:
        raise TokenizerError(f"unknown tokenizer {spec!r}; allowed: {_GRAMMAR}")
    if kind == "bpe" and isinstance(more.get("vocab_size"), str):
        try:
            more["vocab_size"] = int(more["vocab_size"])
        except ValueError:
            raise TokenizerError(
                f"tokenizer {spec!r}: bpe takes a number of tokens, as in bpe:8192"
            ) from None
    try:
        return _KINDS[kind][1](**more)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TokenizerError(f"tokenizer {spec!r}: {error}") from error
