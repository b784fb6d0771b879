"""Train and validation documents, deduplicated between the two.

A validation loss measures memorisation as soon as a validation text, or nearly that text, is in the training
data (Lee et al., "Deduplicating Training Data Makes Language Models Better", 2107.06499). So:

1. Exact duplicates (equal after whitespace is normalised) are dropped; the first of them stays.
2. A document's own content decides its side: ``uint64(sha256(normalised text)) < val_fraction * 2^64``.
   Adding documents moves no other document to the other side.
3. A TRAINING document that nearly duplicates a validation document is dropped. It is the training side that
   loses, as in the decontamination of training sets against benchmarks: the validation set then stays what it
   was when documents are added, and losses stay comparable.

"Nearly duplicates" is Broder's containment ("On the resemblance and containment of documents", 1997): each
document is the set A of hashes of all its windows of ``WINDOW_BYTES`` bytes, thinned to the hashes that are
0 mod ``SAMPLE_MODULUS`` (equal windows are kept or dropped together, so shares are unbiased), and

    |A ∩ B| / min(|A|, |B|)  >=  NEAR_DUPLICATE_SHARE

which also finds a text quoted whole inside a longer one; the Jaccard index that MinHash estimates does not.
Byte windows need no word boundaries and so work for code, prose and scripts without spaces; they are hashed
with prefix sums of a polynomial, a handful of vectorised passes over the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qtrain.data.sources import Document, SourceError, TextSource

# About ten words: shorter windows match boilerplate such as "import os\nimport sys", longer ones lose every
# match around a one-word edit (an edit destroys WINDOW_BYTES windows).
WINDOW_BYTES = 64
# 1/4 of all windows: 100 bytes of text still give about 9 samples, and the table of the validation windows
# stays small.
SAMPLE_MODULUS = 4
NEAR_DUPLICATE_SHARE = 0.5
# Sets smaller than this are compared by exact duplication only: a share of a handful of samples is noise, and
# such documents are shorter than about WINDOW_BYTES + 4 * SAMPLE_MODULUS bytes.
MIN_SAMPLES = 4

# Of a document's sha256, what is kept to find its exact duplicates: by chance, n documents hold a false one with
# probability n^2 / 2^129
_SEEN_BYTES = 16

# Windows hashed at once: temporary arrays of 2 MB each, which stay in the cache of a core.
_BLOCK = 1 << 18
_BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: odd, hence invertible modulo 2^64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


class Side(IntEnum):
    """What becomes of a document."""

    TRAIN = 0
    VAL = 1
    EXACT_DUPLICATE = 2
    NEAR_DUPLICATE = 3


@dataclass(frozen=True)
class Assignment:
    """``sides``: [D] int8, the ``Side`` of each document in the order of the source, near-duplicates not yet told from
    the training side. ``table``: of the validation documents, which tells them. ``text_bytes``: of all documents, up to
    whitespace."""

    sides: NDArray[np.int8]
    table: WindowTable
    text_bytes: int


def normalise(text: str) -> bytes:
    """``text`` with every run of whitespace as one space, in UTF-8."""
    return " ".join(text.split()).encode("utf-8")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): spreads the polynomial's weak low bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """[count] uint64: base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def window_hashes(data: bytes) -> NDArray[np.uint64]:
    """Sorted distinct sampled window hashes of ``data``, [M] uint64; empty below ``WINDOW_BYTES`` bytes.

    With H[i] = sum_{j<i} (d_j + 1) b^j mod 2^64, the window at i hashes to mix((H[i+w] - H[i]) b^-i), which
    depends on its bytes alone. Long documents go through in blocks of windows, so memory stays bounded.
    """
    sampled = [np.empty(0, dtype=np.uint64)]
    powers, inverse_powers = _powers(_BASE, _BLOCK + WINDOW_BYTES), _powers(_BASE_INVERSE, _BLOCK)
    for start in range(0, len(data) - WINDOW_BYTES + 1, _BLOCK):
        block = data[start : start + _BLOCK + WINDOW_BYTES - 1]
        values = np.frombuffer(block, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
        windows = len(values) - WINDOW_BYTES + 1
        prefix = np.zeros(len(values) + 1, dtype=np.uint64)
        np.cumsum(values * powers[: len(values)], out=prefix[1:], dtype=np.uint64)
        hashes = _mix((prefix[WINDOW_BYTES:] - prefix[:windows]) * inverse_powers[:windows])
        sampled.append(hashes[hashes % np.uint64(SAMPLE_MODULUS) == 0])
    return np.unique(np.concatenate(sampled))


class WindowTable:
    """Which validation documents contain which window."""

    def __init__(self, documents: list[NDArray[np.uint64]]) -> None:
        self.sizes = np.array([len(d) for d in documents], dtype=np.int64)
        hashes = np.concatenate([np.empty(0, dtype=np.uint64), *documents])
        owners = np.repeat(np.arange(len(documents)), self.sizes)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.owners = hashes[order], owners[order]

    @staticmethod
    def of(sizes: NDArray[np.int64], hashes: NDArray[np.uint64], owners: NDArray[np.int64]) -> WindowTable:
        """A table that was kept."""
        table = WindowTable([])
        table.sizes, table.hashes, table.owners = sizes, hashes, owners
        return table

    def settled(self, side: Side, text: str) -> Side:
        """``side``, or NEAR_DUPLICATE where it is TRAIN and ``text`` nearly duplicates a validation document."""
        if side is Side.TRAIN and self.has_near_duplicate(window_hashes(normalise(text))):
            return Side.NEAR_DUPLICATE
        return side

    def has_near_duplicate(self, windows: NDArray[np.uint64]) -> bool:
        """Whether a document of the table shares NEAR_DUPLICATE_SHARE of the smaller set with ``windows``."""
        first = np.searchsorted(self.hashes, windows, side="left")
        repeats = np.searchsorted(self.hashes, windows, side="right") - first
        hits = int(repeats.sum())
        if hits == 0:
            return False
        starts = np.repeat(first - (np.cumsum(repeats) - repeats), repeats)
        owners, shared = np.unique(self.owners[starts + np.arange(hits)], return_counts=True)
        smaller = np.minimum(self.sizes[owners], len(windows))
        return bool(((smaller >= MIN_SAMPLES) & (shared >= NEAR_DUPLICATE_SHARE * smaller)).any())


@dataclass(frozen=True)
class Scan:
    """What a pass over documents keeps of them, in their order. digests: [D, 16] uint8, of the normalised texts. windows:
    of each document that may be one of validation, by its digest. text_bytes: up to whitespace."""

    digests: NDArray[np.uint8]
    windows: Mapping[bytes, NDArray[np.uint64]]
    text_bytes: int


def scanned(
    documents: Iterable[Document], val_fraction: float, report: Callable[[int], None] = lambda done: None
) -> Scan:
    """One pass. report: called with the number of documents done."""
    threshold, digests, text_bytes = int(val_fraction * 2.0**64), bytearray(), 0
    windows: dict[bytes, NDArray[np.uint64]] = {}
    for done, document in enumerate(documents, start=1):
        data = normalise(document.text)
        digest = hashlib.sha256(data).digest()[:_SEEN_BYTES]
        digests += digest
        if data and int.from_bytes(digest[:8], "little") < threshold and digest not in windows:
            windows[digest] = window_hashes(data)
        text_bytes += len(data)
        report(done)
    found = np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, _SEEN_BYTES)
    return Scan(found, windows, text_bytes)


def settled_sides(scans: Sequence[Scan], name: str, val_fraction: float) -> Assignment:
    """The sides of the documents of ``scans``, which follow one another in source ``name``: as if one pass had been made
    over all of them. Raises SourceError when a side would be empty."""
    digests = np.concatenate([scan.digests for scan in scans])
    low, high = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2).T
    order = np.lexsort((high, low))  # stable: of equal documents the first one stays first
    low_sorted, high_sorted = low[order], high[order]
    repeats = np.zeros(len(order), dtype=bool)
    repeats[1:] = (low_sorted[1:] == low_sorted[:-1]) & (high_sorted[1:] == high_sorted[:-1])
    sides = np.full(len(digests), Side.TRAIN, dtype=np.int8)
    sides[low < np.uint64(int(val_fraction * 2.0**64))] = Side.VAL
    sides[order[repeats]] = Side.EXACT_DUPLICATE
    empty = hashlib.sha256(b"").digest()[:_SEEN_BYTES]
    sides[(digests == np.frombuffer(empty, np.uint8)).all(axis=1)] = Side.EXACT_DUPLICATE
    check_sides({side: int((sides == side).sum()) for side in Side}, name, val_fraction)
    windows = {digest: hashes for scan in scans for digest, hashes in scan.windows.items()}
    validation = [windows[digests[i].tobytes()] for i in np.flatnonzero(sides == Side.VAL)]
    return Assignment(sides, WindowTable(validation), sum(scan.text_bytes for scan in scans))


def assign_sides(
    source: TextSource, val_fraction: float = 0.05, report: Callable[[int], None] = lambda done: None
) -> Assignment:
    """The side of every document of ``source``, near-duplicates aside; one pass over it.

    ``val_fraction``: the expected share of DOCUMENTS on the validation side, in (0, 1); the share of bytes
    varies with their sizes. Documents of whitespace alone count as exact duplicates (of the empty text).
    ``report``: called with the number of documents done. Memory: about 60 bytes a document, and twice the bytes of the
    validation texts. Raises ValueError on a fraction outside (0, 1), SourceError when a side would be empty.
    """
    check_fraction(val_fraction)
    return settled_sides([scanned(source.documents(), val_fraction, report)], source.name, val_fraction)


def check_fraction(val_fraction: float) -> None:
    """Raises ValueError unless it lies in (0, 1)."""
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction {val_fraction} must lie strictly between 0 and 1, for example 0.05")


def check_sides(counts: Mapping[Side, int], name: str, val_fraction: float) -> None:
    """Raises SourceError where the train or the validation side of source ``name`` has no document."""
    for side in (Side.TRAIN, Side.VAL):
        if counts[side] == 0:
            shown = {s.name.lower(): n for s, n in counts.items()}
            raise SourceError(
                f"the {side.name.lower()} split of source {name!r} is empty ({shown}, val_fraction {val_fraction}); give "
                "more documents (a single large file can be cut into documents with "
                "TextFilesSource(separator=...)) or another val_fraction"
            )


def labelled(source: TextSource, assignment: Assignment) -> Iterator[tuple[Side, str]]:
    """(side, text) of each document in order, near-duplicates still on the training side (``WindowTable.settled``).

    Raises RuntimeError when the source changed in between.
    """
    count = 0
    for count, document in enumerate(source.documents(), start=1):
        if count > len(assignment.sides):
            break
        yield Side(int(assignment.sides[count - 1])), document.text
    if count != len(assignment.sides):
        raise RuntimeError(
            f"source {source.name!r} changed while it was being prepared ({len(assignment.sides)} documents at "
            f"first, then {count}); prepare again when nobody writes to it"
        )
