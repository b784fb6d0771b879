"""Where the tokens lie in the files of other programs. All numbers are little-endian.

nanogpt    NAME.bin     uint16 ids and nothing else (nanoGPT, data/*/prepare.py)
llmc       NAME.bin     256 int32: magic, version, number of tokens, zeros; then the ids (llm.c, dev/data/data_common.py;
                        the same shards: modded-nanogpt, build-nanogpt's successors)
                          magic 20240520, version 1: uint16       magic 20240801, version 7: uint32
megatron   NAME.bin     the ids of all sequences
           NAME.idx     b"MMIDIDX\\0\\0", uint64 version 1, uint8 code of the dtype, uint64 sequences n, uint64 m,
                        int32 [n] tokens of each sequence, int64 [n] its first byte in NAME.bin, int64 [m] the
                        sequence that each document begins with, and n at the end; int8 [n] modes may follow
                        (Megatron-LM, megatron/core/datasets/indexed_dataset.py)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtrain.data.checked_file import ShardError

KINDS = ("nanogpt", "llmc", "megatron")
_LLMC_WORDS = 256
# (magic, version) -> dtype
_LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
# The codes of DType that are whole numbers; 6 and 7 are floats
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class Layout:
    """stored: dtype of the ids. segments: (first byte, tokens) in the order of reading. size: bytes of the file.
    documents: [D] positions of their first tokens; None where the format does not say. index: bytes of a second
    file that the layout was read from, for its digest."""

    path: Path
    kind: str
    stored: np.dtype[Any]
    segments: tuple[tuple[int, int], ...]
    size: int
    documents: NDArray[np.int64] | None = None
    index: bytes = b""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.segments)


def index_of(path: Path) -> Path:
    """NAME.idx of NAME.bin."""
    return path.with_suffix(".idx")


def _magic_of_llmc(path: Path) -> int | None:
    with path.open("rb") as file:
        start = file.read(4)
    magic = int.from_bytes(start, "little")
    return magic if magic in {known for known, _ in _LLMC} else None


def detected(path: Path) -> str:
    """The kind of a file: by the magic of its header, by an index beside it, else nanoGPT's, which has no mark."""
    if _magic_of_llmc(path) is not None:
        return "llmc"
    return "megatron" if index_of(path).is_file() else "nanogpt"


def read_layout(path: Path, kind: str = "auto", dtype: str = "uint16") -> Layout:
    """kind: one of KINDS, or ``auto``. dtype: of nanoGPT's files, which do not say it: uint16 or uint32.

    Raises ShardError, naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise ShardError(
            f"token file {path} is missing; give a file, a folder or a pattern such as 'shards/train_*.bin'"
        )
    found = detected(path)
    if kind != "auto" and found != kind and found == "llmc":
        raise ShardError(f"token file {path} has the header of llm.c's files: its kind is llmc, not {kind}")
    kind = found if kind == "auto" else kind
    layout = {"nanogpt": _nanogpt, "llmc": _llmc, "megatron": _megatron}[kind](path, np.dtype(dtype))
    if layout.tokens == 0:
        raise ShardError(f"token file {path} holds no tokens; leave it out")
    return layout


def _nanogpt(path: Path, dtype: np.dtype[Any]) -> Layout:
    stored, size = dtype.newbyteorder("<"), path.stat().st_size
    if size % stored.itemsize:
        raise ShardError(
            f"token file {path} is {size} bytes long, no multiple of {stored.itemsize} ({dtype.name}): it was cut, or its "
            "ids are of another dtype"
        )
    return Layout(path, "nanogpt", stored, ((0, size // stored.itemsize),), size)


def _llmc(path: Path, _: np.dtype[Any]) -> Layout:
    start, size = 4 * _LLMC_WORDS, path.stat().st_size
    with path.open("rb") as file:
        header = file.read(start)
    if len(header) < start:
        raise ShardError(f"token file {path} is {size} bytes long, less than llm.c's header of {start} bytes")
    magic, version, tokens = struct.unpack_from("<3i", header)
    if (magic, version) not in _LLMC:
        known = ", ".join(f"magic {m} version {v}" for m, v in _LLMC)
        raise ShardError(
            f"token file {path}: its header says magic {magic} version {version}; llm.c's files have {known}"
        )
    stored = np.dtype(_LLMC[magic, version])
    needed = start + tokens * stored.itemsize
    if tokens < 0 or size != needed:
        raise ShardError(
            f"token file {path} is {size} bytes long, and its header says {tokens} tokens, which is {needed} bytes: it was "
            "cut or added to; copy it anew"
        )
    return Layout(path, "llmc", stored, ((start, tokens),), size)


def _megatron(path: Path, _: np.dtype[Any]) -> Layout:
    index, size = index_of(path), path.stat().st_size
    if not index.is_file():
        raise ShardError(f"token file {path}: its index {index} is missing; copy both files of Megatron-LM")
    data = index.read_bytes()
    if not data.startswith(_MEGATRON_MAGIC) or len(data) < _MEGATRON_HEADER.size:
        raise ShardError(f"index {index} does not begin as one of Megatron-LM ({_MEGATRON_MAGIC!r})")
    _, version, code, sequences, marks = _MEGATRON_HEADER.unpack_from(data)
    if version != 1:
        raise ShardError(f"index {index} has version {version}; version 1 is read")
    if code not in _MEGATRON_DTYPES:
        raise ShardError(
            f"index {index}: code {code} is no dtype of token ids; allowed: {', '.join(map(str, _MEGATRON_DTYPES))}"
        )
    body = _MEGATRON_HEADER.size + sequences * 12 + marks * 8
    if len(data) not in (body, body + sequences):  # with a mode a sequence
        raise ShardError(
            f"index {index} is {len(data)} bytes long; {sequences} sequences and {marks} document marks take {body}: it "
            "was cut"
        )
    stored, at = np.dtype(_MEGATRON_DTYPES[code]), _MEGATRON_HEADER.size
    lengths = np.frombuffer(data, "<i4", sequences, at).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, at + sequences * 4)
    documents = np.frombuffer(data, "<i8", marks, at + sequences * 12)
    return _from_index(path, size, stored, lengths, pointers, documents, data)


def _from_index(
    path: Path,
    size: int,
    stored: np.dtype[Any],
    lengths: NDArray[np.int64],
    pointers: NDArray[np.int64],
    documents: NDArray[np.int64],
    index: bytes,
) -> Layout:
    """Sequences that follow one another in the file are one segment."""
    n, width = len(lengths), stored.itemsize
    ends = pointers + lengths * width
    if n and (lengths.min() < 0 or pointers.min() < 0 or (pointers % width).any() or ends.max() != size):
        raise ShardError(
            f"token file {path} is {size} bytes long, and its index speaks of sequences up to byte {ends.max()}: one of "
            "the two was cut or belongs to another; copy both anew"
        )
    if (
        n == 0
        or len(documents) < 2
        or documents[0] != 0
        or documents[-1] != n
        or (np.diff(documents) < 0).any()
    ):
        raise ShardError(
            f"{index_of(path)}: its document marks do not go from 0 to its {n} sequences; it is damaged or empty"
        )
    first = np.flatnonzero(np.concatenate([[True], pointers[1:] != ends[:-1]]))
    counts = np.add.reduceat(lengths, first)
    segments = tuple((int(pointers[i]), int(c)) for i, c in zip(first, counts, strict=True) if c)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Layout(path, "megatron", stored, segments, size, starts[documents[:-1]], index)
