"""tiktoken encodings: by name, or from a file of ranks.

An encoding is its ranks (bytes -> id, which is also the order of merges), the pattern that cuts text into pieces first,
and its special tokens. All three are saved, so that nothing is downloaded twice.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data.optional_libraries import optional_library

from .base import Tokenizer, TokenizerError
from .huggingface import END_OF_TEXT

RANKS, ENCODING = "ranks.tiktoken", "encoding.json"
# GPT-2's, as published with it (Radford et al. 2019, encoder.py)
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class TiktokenTokenizer(Tokenizer):
    """ranks: bytes -> id. pattern: regular expression of the pieces. special_tokens: text -> id. eot: one of these.

    A special token inside a text is encoded as ordinary characters. Raises TokenizerError without ``eot`` and for ranks
    that lack one of the 256 bytes; ImportError without ``tiktoken``.
    """

    kind = "tiktoken"

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int], eot: str, name: str
    ) -> None:
        library = optional_library("tiktoken", needed_for=f"the tokenizer {name!r}")
        if eot not in special_tokens:
            raise TokenizerError(
                f"tiktoken encoding {name!r} has no special token {eot!r} to end a document with (it has "
                f"{', '.join(sorted(special_tokens)) or 'none'}); name one: data.tokenizer={{kind:tiktoken,name:...,eot:...}}"
            )
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise TokenizerError(
                f"the ranks of {name!r} lack {len(missing)} of the 256 bytes, first {missing[0]:#04x}; is the file whole?"
            )
        self._ranks, self._pattern, self._special, self.eot = (
            dict(ranks),
            pattern,
            dict(special_tokens),
            eot,
        )
        super().__init__(name, max(*ranks.values(), *special_tokens.values()) + 1, special_tokens[eot])
        self._encoding = library.Encoding(
            name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._special
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.asarray(self._encoding.encode_ordinary(t), dtype=self.dtype) for t in texts]

    def _text(self, ids: Sequence[int]) -> str:
        try:
            return self._encoding.decode(list(ids), errors="replace")
        except KeyError as error:
            raise ValueError(
                f"the tokenizer {self.name!r} does not use one of the ids: {error.args[0]}"
            ) from error

    def files(self) -> dict[str, bytes]:
        by_rank = sorted(self._ranks.items(), key=lambda item: item[1])
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank]
        about = {"pattern": self._pattern, "special_tokens": self._special, "eot": self.eot}
        return {RANKS: b"".join(lines), ENCODING: json.dumps(about, sort_keys=True).encode()}

    @classmethod
    def from_files(cls, about: Mapping[str, Any], files: Mapping[str, bytes]) -> TiktokenTokenizer:
        rest = json.loads(files[ENCODING])
        ranks = parse_ranks(files[RANKS], RANKS)
        return cls(ranks, rest["pattern"], rest["special_tokens"], rest["eot"], about["name"])


def parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Lines of a ``.tiktoken`` file, ``BASE64 RANK``. Raises TokenizerError, naming the line."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(f"{name}:{number}: no 'BASE64 RANK' line ({error})") from error
    return ranks


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where it is printable, else the next code point from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def parse_gpt2(encoder_json: str, vocab_bpe: str, folder: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """(ranks, special tokens) of GPT-2's two files: token -> id, and the merges in their order.

    Raises TokenizerError where ids do not follow the order of the merges, since tiktoken takes one for the other.
    """
    stand_ins = _gpt2_bytes()
    ids: dict[str, int] = json.loads(encoder_json)
    merged = ["".join(line.split(" ")) for line in vocab_bpe.split("\n")[1:] if line]
    known = {*stand_ins, *merged}
    if missing := next((token for token in known if token not in ids), None):
        raise TokenizerError(f"{folder}: encoder.json lacks the token {missing!r} of vocab.bpe")
    order = [ids[token] for token in merged]
    if order != sorted(order):
        raise TokenizerError(f"{folder}: the ids in encoder.json do not follow the merges in vocab.bpe")
    ranks = {bytes(stand_ins[c] for c in token): ids[token] for token in known}
    return ranks, {token: i for token, i in ids.items() if token not in known}


def encoding(name: str, *, pattern: str | None = None, eot: str | None = None) -> TiktokenTokenizer:
    """name: of an encoding that tiktoken knows (``gpt2``, ``cl100k_base``: downloaded once), a ``.tiktoken`` file, or a
    folder with GPT-2's ``encoder.json`` and ``vocab.bpe``.

    pattern: of a file or folder; default: GPT-2's. eot: default: ``<|endoftext|>``; where a file of ranks, which can
    hold no special token, is to have one, it is named here and gets the next free id. Raises TokenizerError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        encoder_json, vocab_bpe = (_text(path / file) for file in ("encoder.json", "vocab.bpe"))
        ranks, special = parse_gpt2(encoder_json, vocab_bpe, str(path))
    elif path.is_file():
        ranks, special = parse_ranks(path.read_bytes(), str(path)), {}
    else:
        return _known(name, pattern, eot)
    if eot is not None and eot not in special:
        special[eot] = max(*ranks.values(), *special.values(), -1) + 1
    title = path.resolve().name.removesuffix(".tiktoken")
    return TiktokenTokenizer(ranks, pattern or GPT2_PATTERN, special, eot or END_OF_TEXT, title)


def _text(path: Path) -> str:
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: a folder of GPT-2's files holds encoder.json and vocab.bpe")
    return path.read_text(encoding="utf-8")


def _known(name: str, pattern: str | None, eot: str | None) -> TiktokenTokenizer:
    library = optional_library("tiktoken", needed_for=f"the tokenizer {name!r}")
    if name not in library.list_encoding_names():
        raise TokenizerError(
            f"tiktoken knows no encoding {name!r}, and there is no such file or folder; it knows "
            f"{', '.join(library.list_encoding_names())}"
        )
    if pattern is not None:
        raise TokenizerError(f"the pattern of tiktoken's own encoding {name!r} is given; leave pattern out")
    try:
        found = library.get_encoding(name)
    except Exception as error:  # requests' and its own, by what is missing
        raise TokenizerError(
            f"tiktoken could not fetch its encoding {name!r} ({type(error).__name__}); without a network, give a file: "
            "data.tokenizer={kind:tiktoken,name:FILE.tiktoken,eot:'<|endoftext|>'} or a folder with encoder.json and vocab.bpe"
        ) from error
    # Documented for extending an encoding, underscores and all
    return TiktokenTokenizer(
        found._mergeable_ranks, found._pat_str, found._special_tokens, eot or END_OF_TEXT, name
    )
