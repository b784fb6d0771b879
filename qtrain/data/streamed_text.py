"""A Hugging Face dataset, tokenized while the run goes on: nothing is prepared, and nothing is kept on disk.

    epoch e    takes the dataset's shards (files) in the order permutation(seed, e), and of each, block by block of
               ``shuffle_documents``, the documents in the order permutation(seed, e, shard, block)
    tokens     of the documents in this order, each followed by end-of-text, are one sequence without end
    sample i   is tokens [i S, i S + S + 1) of it, whatever the number of processes

A shuffle buffer that is refilled one by one mixes further than blocks do, but its contents would belong to the state
(``datasets`` loses them on resume). A block is read again: the state is where its block begins, as ``IterableDataset.
state_dict`` says it, how many of its documents are done, and the number of tokens before them. So it is small, and a
resumed run goes on with the very same samples. The digest of the first tokens that are made again shows data that
changed in between.

The first ``val_documents`` are held out: a training document with the text of one of them is left out wherever it
stands. Every process reads the whole stream and keeps its own samples; a thread reads and tokenizes ahead.

S tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qtrain.data.corpus import TokenizerSpec, check_recorded, ready_tokenizer, tokenizer_identity
from qtrain.data.optional_libraries import optional_library
from qtrain.data.read_ahead import ReadAhead, StreamError, of_networks
from qtrain.data.stream import Permutation, ValidationWindows, Windows, item, mix_words
from qtrain.data.tokenizers import Tokenizer
from qtrain.data.validation import ValidationSet

# Raised whenever the same settings begin to give other samples.
STREAM_VERSION = 1
# Documents tokenized at once; a state stands at a multiple of it within a block
_TOGETHER = 64
# Between attempts, seconds. ``datasets`` itself tries 20 times, 5 s apart, before it gives up.
_BACKOFF = (1.0, 4.0, 16.0)


class StreamedText:
    """path, name, revision, data_files, split: as ``datasets.load_dataset`` has them; a local folder is a path too.
    text: the column. val_documents: held out from the start of the split, or of ``val_split``, where there is one.
    shuffle_documents: of a block; a resumed run reads at most one block again. at_end: ``repeat`` the dataset in another
    order, or ``stop`` the run. ahead_tokens: read ahead, at most.

    Raises ValueError, naming the value and the remedy.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: TokenizerSpec,
        name: str | None = None,
        revision: str | None = None,
        data_files: Any = None,
        split: str = "train",
        val_split: str | None = None,
        val_documents: int = 2000,
        text: str = "text",
        shuffle_documents: int = 10_000,
        at_end: str = "repeat",
        ahead_tokens: int = 1 << 22,
    ) -> None:
        for key, value in (
            ("val_documents", val_documents),
            ("shuffle_documents", shuffle_documents),
            ("ahead_tokens", ahead_tokens),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"data.{key}={value!r}: must be a whole number, 1 or more")
        if at_end not in ("repeat", "stop"):
            raise ValueError(f"data.at_end={at_end!r}: allowed are repeat and stop")
        self.tokenizer = ready_tokenizer(tokenizer)
        self.path, self.name, self.revision, self.data_files = path, name, revision, data_files
        self.split, self.val_split, self.val_documents, self.text = split, val_split, val_documents, text
        self.shuffle_documents, self.at_end, self.ahead_tokens = shuffle_documents, at_end, ahead_tokens

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def open(self, recorded: Mapping[str, Any] | None = None) -> StreamedCorpus:
        dataset = self.load(self.split)
        held = dataset if self.val_split is None else self.load(self.val_split)
        corpus = StreamedCorpus(self, dataset, held)
        check_recorded(
            recorded, corpus.identity(), "Name the dataset's revision of that run, and its settings"
        )
        return corpus

    def load(self, split: str) -> Any:
        """A ``datasets.IterableDataset``. Raises StreamError where it cannot be reached or is none, ImportError
        where the library is missing."""
        datasets = optional_library("datasets", needed_for="a stream of a Hugging Face dataset")
        try:
            found = datasets.load_dataset(
                self.path,
                name=self.name,
                revision=self.revision,
                data_files=self.data_files,
                split=split,
                streaming=True,
            )
        except Exception as error:
            if not (of_networks(error) or isinstance(error, ValueError)):
                raise
            raise StreamError(
                f"dataset {self.path!r} ({self.name or 'default'}, split {split!r}) cannot be opened: {error}"
            ) from error
        return found


def texts(rows: Iterator[Mapping[str, Any]], column: str) -> Iterator[str]:
    """The text of each row that has one. Raises StreamError where there is no such column."""
    for row in rows:
        if column not in row:
            raise StreamError(
                f"the dataset has no column {column!r}; it has {', '.join(row)}: give data.text=COLUMN"
            )
        if row[column]:
            yield row[column]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]


class _Held:
    """The validation documents as a split: ``read`` and ``__len__``, as TokenSplit has them."""

    name = "val"

    def __init__(self, documents: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokens = encoded(documents, tokenizer)
        self.text_bytes = sum(len(document.encode("utf-8")) for document in documents)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.tokens[start:stop]


def encoded(documents: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The documents' ids, each document followed by end-of-text."""
    end = np.array([tokenizer.eot_token], dtype=np.int32)
    pieces = [part for ids in tokenizer.encode_batch(documents) for part in (ids.astype(np.int32), end)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


class StreamedCorpus:
    """An opened dataset. ``dataset``, ``held``: IterableDatasets of training and of validation documents."""

    def __init__(self, plan: StreamedText, dataset: Any, held: Any) -> None:
        self.plan, self.dataset = plan, dataset
        documents = list(islice(texts(iter(held), plan.text), plan.val_documents))
        if not documents:
            raise StreamError(f"dataset {plan.path!r} holds no documents in column {plan.text!r}")
        self.held = {_digest(document) for document in documents}
        self._val = _Held(documents, plan.tokenizer)
        try:
            _shard(dataset, 0).state_dict()
        except (AttributeError, NotImplementedError) as error:
            raise StreamError(
                f"dataset {plan.path!r} cannot say where it stands (state_dict: {error!r}), so a run on it could not be "
                "resumed; prepare it instead, or bring it as parquet, JSON lines or Arrow files"
            ) from error

    @property
    def tokenizer(self) -> Tokenizer:
        return self.plan.tokenizer

    @cached_property
    def _identity(self) -> str:
        plan = self.plan
        held = hashlib.sha256(b"".join(sorted(self.held))).hexdigest()
        facts = [
            STREAM_VERSION,
            plan.path,
            plan.name,
            plan.revision,
            plan.data_files,
            plan.split,
            plan.val_split,
            plan.text,
        ]
        facts += [plan.shuffle_documents, self.dataset.num_shards, held, plan.tokenizer.digest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """By name, revision and settings, and by the validation documents; not by the training documents, which nobody
        has read yet."""
        return {
            "shards": f"stream-{self._identity[:16]}",
            "fingerprint": self._identity,
            **tokenizer_identity(self.tokenizer),
        }

    def train_windows(self, sequence_tokens: int, seed: int) -> StreamedWindows:
        return StreamedWindows(Reading(self, seed), sequence_tokens, self.plan.ahead_tokens)

    def validation(self, sequence_tokens: int, max_windows: int | None) -> ValidationSet:
        windows = ValidationWindows(self._val, sequence_tokens, max_windows)  # type: ignore[arg-type]
        return ValidationSet.single(windows, len(self._val) / self._val.text_bytes)

    def check_unchanged(self) -> None:
        """Nothing lies on this machine."""


def _shard(dataset: Any, index: int) -> Any:
    return dataset.shard(num_shards=dataset.num_shards, index=index)


class Reading:
    """The tokens of a corpus in training order, from the beginning or from a state.

    A state: ``epoch``, ``place`` of the shard in the epoch's order, ``block`` of the shard, ``dataset`` (its state at the
    block's first document), ``done`` documents of the block, ``tokens`` before the next one.
    """

    def __init__(self, corpus: StreamedCorpus, seed: int) -> None:
        self._corpus, self._seed = corpus, seed

    @property
    def start(self) -> dict[str, Any]:
        """The state of the beginning."""
        return {"epoch": 0, "place": 0, "block": 0, "dataset": None, "done": 0, "tokens": 0}

    def chunks(self, state: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], NDArray[np.int32]]]:
        """(the state before them, tokens), from ``state`` on. Raises StreamError at the end."""
        plan, dataset = self._corpus.plan, self._corpus.dataset
        at, shards = dict(state), dataset.num_shards
        while True:
            if at["epoch"] > 0 and plan.at_end == "stop":
                raise StreamError(
                    f"the dataset {plan.path!r} came to its end after {at['tokens']} tokens; set data.at_end=repeat, or "
                    "fewer steps"
                )
            whole, before = not (at["place"] or at["block"] or at["done"]), at["tokens"]
            order = Permutation(shards, mix_words(self._seed, at["epoch"]))
            while at["place"] < shards:
                yield from self._of_shard(at, order[at["place"]])
                at.update(place=at["place"] + 1, block=0, dataset=None, done=0)
            if whole and at["tokens"] == before:
                raise StreamError(
                    f"the dataset {plan.path!r} has no documents beside the {len(self._corpus.held)} held out"
                )
            at.update(epoch=at["epoch"] + 1, place=0)

    def _of_shard(self, at: dict[str, Any], shard: int) -> Iterator[tuple[dict[str, Any], NDArray[np.int32]]]:
        """The tokens of a shard; ``at`` goes along."""
        plan, source = self._corpus.plan, _shard(self._corpus.dataset, shard)
        resumed = at["dataset"] is not None
        if resumed:
            source.load_state_dict(at["dataset"])
        rows = iter(source)
        while True:
            if not resumed:  # ``datasets`` does not give back a state that it has not gone on from
                at["dataset"] = source.state_dict()
            resumed = False
            found = list(islice(rows, plan.shuffle_documents))
            if not found:
                return
            block = [t for t in texts(iter(found), plan.text) if _digest(t) not in self._corpus.held]
            if block:
                order = Permutation(len(block), mix_words(self._seed, at["epoch"], shard, at["block"]))
                yield from self._of_block([block[order[i]] for i in range(len(block))], at)
            at.update(block=at["block"] + 1, done=0)

    def _of_block(
        self, block: Sequence[str], at: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], NDArray[np.int32]]]:
        for first in range(at["done"], len(block), _TOGETHER):
            together = block[first : first + _TOGETHER]
            tokens = encoded(together, self._corpus.plan.tokenizer)
            yield dict(at), tokens
            at["done"] += len(together)
            at["tokens"] += len(tokens)


class StreamedWindows(Windows):
    """The samples, in order: an index may be asked for until a later one was released."""

    def __init__(self, reading: Reading, sequence_tokens: int, ahead_tokens: int) -> None:
        if sequence_tokens < 1:
            raise ValueError(f"sequence_tokens {sequence_tokens} must be at least 1")
        self.sequence_tokens = sequence_tokens
        self._reading, self._ahead_tokens = reading, ahead_tokens
        self._ahead: ReadAhead | None = None
        self._start: Mapping[str, Any] = reading.start
        self._expected: str | None = None
        # (state before them, tokens) of what was read and may be asked for again
        self._chunks: deque[tuple[dict[str, Any], NDArray[np.int32]]] = deque()

    def _next_chunk(self) -> None:
        if self._ahead is None:
            self._ahead = ReadAhead(self._reading.chunks, self._start, self._ahead_tokens, _BACKOFF)
        state, tokens = next(self._ahead)
        if self._expected is not None and self._expected != digest_of(tokens):
            raise StreamError(
                "the stream does not go on as it did when the checkpoint was saved: its data or its tokenizer changed; "
                "name the dataset's revision of then"
            )
        self._expected = None
        self._chunks.append((state, tokens))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = int(index) * self.sequence_tokens
        stop = first + self.sequence_tokens + 1
        while not self._chunks or self._end() < stop:
            self._next_chunk()
        if first < self._chunks[0][0]["tokens"]:
            raise IndexError(f"sample {index} lies before what the stream still holds")
        pieces = []
        for state, tokens in self._chunks:
            begin = state["tokens"]
            if begin < stop and begin + len(tokens) > first:
                pieces.append(tokens[max(0, first - begin) : stop - begin])
        return item(np.concatenate(pieces))

    def _end(self) -> int:
        state, tokens = self._chunks[-1]
        return state["tokens"] + len(tokens)

    def release(self, sample: int) -> None:
        first = sample * self.sequence_tokens
        while len(self._chunks) > 1 and self._chunks[1][0]["tokens"] <= first:
            self._chunks.popleft()

    def state_dict(self, sample: int) -> dict[str, Any] | None:
        first = sample * self.sequence_tokens
        while not self._chunks or self._end() < first:
            self._next_chunk()
        if first < self._chunks[0][0]["tokens"]:
            raise IndexError(f"sample {sample} lies before what the stream still holds")
        state, tokens = next(c for c in reversed(self._chunks) if c[0]["tokens"] <= first)
        return {**state, "digest": digest_of(tokens)}

    def load_state_dict(self, state: Mapping[str, Any] | None, sample: int) -> None:
        if state is None:
            if sample:
                raise ValueError("the checkpoint holds no state of a stream; it is of other data")
            return
        if state["tokens"] > sample * self.sequence_tokens:
            raise ValueError(f"the checkpoint's stream stands after sample {sample}; it is damaged")
        self.close()
        self._chunks.clear()
        self._start = {key: value for key, value in state.items() if key != "digest"}
        self._expected = state["digest"]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def digest_of(tokens: NDArray[np.int32]) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
