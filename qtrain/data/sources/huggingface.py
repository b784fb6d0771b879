"""Hugging Face datasets, by name or from a local folder."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qtrain.data.cache import RememberedDigests
from qtrain.data.optional_libraries import optional_library

from .base import Document, SourceError

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HuggingFaceSource:
    """The rows of a split of a dataset, in its own order.

    dataset: a name on the hub (``allenai/c4``) or a local folder, which is read by the same code without a network.
    config, split, data_files: as in ``datasets.load_dataset``. revision: commit, tag or branch on the hub; whatever it
    is, the data are those of the commit that it names when the preparation starts, and prepared data are found by that
    commit. column: of strings; rows without one (null) are left out and counted in ``skipped``. streaming: rows come over
    the network on every pass (two, or three with a BPE to train); false keeps a copy of the whole split in the library's
    own cache. max_documents: only the first so many rows.

    Raises SourceError where the dataset, or its commit, cannot be found; ImportError without ``datasets``.
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        data_files: str | Sequence[str] | None = None,
        column: str = "text",
        streaming: bool = True,
        max_documents: int | None = None,
        name: str | None = None,
    ) -> None:
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents {max_documents} must be at least 1, or null for all")
        self.skipped: tuple[str, ...] = ()
        self.folder = Path(dataset).expanduser() if Path(dataset).expanduser().is_dir() else None
        if self.folder is not None and revision is not None:
            raise ValueError(f"revision {revision!r} is of the hub, and {dataset} is a local folder")
        self.dataset, self.config, self.split, self.revision = dataset, config, split, revision
        self.data_files = [data_files] if isinstance(data_files, str) else data_files
        self.column, self.streaming, self.max_documents = column, streaming, max_documents
        last = dataset.rstrip("/").rsplit("/", 1)[-1]
        self.name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(filter(None, (last, config))))
        self._pinned: str | None = None
        self._share: tuple[int, int] | None = None

    def commit(self) -> str | None:
        """The 40 digits of the commit on the hub; None for a local folder. Asks the hub once, unless ``revision`` is a
        commit already."""
        if self.folder is not None:
            return None
        if self._pinned is None:
            if self.revision is not None and _COMMIT.fullmatch(self.revision):
                self._pinned = self.revision
            else:
                self._pinned = self._ask_hub()
        return self._pinned

    def _ask_hub(self) -> str:
        hub = optional_library("huggingface_hub", needed_for=f"the dataset {self.dataset!r}")
        try:
            return hub.HfApi().dataset_info(self.dataset, revision=self.revision).sha
        except Exception as error:  # requests', httpx's and the hub's own
            raise SourceError(
                f"the hub does not say which commit {self.revision or 'main'!r} of the dataset {self.dataset!r} is "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no answer'}); "
                "check the name and the network, or pin revision=<the 40 digits of a commit>"
            ) from error

    def load(self) -> Any:
        """``datasets.load_dataset`` with these settings: a Dataset, or an IterableDataset where ``streaming``."""
        library = optional_library("datasets", needed_for=f"the dataset {self.dataset!r}")
        where = str(self.folder) if self.folder is not None else self.dataset
        try:
            found = library.load_dataset(
                where,
                self.config,
                split=self.split,
                revision=self.commit(),
                data_files=self.data_files,
                streaming=self.streaming,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SourceError(
                f"the dataset {self.dataset!r} (config {self.config}, split {self.split!r}) cannot be loaded: "
                f"{str(error).strip()}"
            ) from error
        names = found.column_names
        if names is not None and self.column not in names:
            raise SourceError(
                f"the dataset {self.dataset!r} has no column {self.column!r}; it has {', '.join(names)}"
            )
        return found

    def _rows(self) -> Iterator[Any]:
        """In order; of a share, those of its files where they are streamed, else its part of all rows."""
        found = self.load()
        if self._share is None:
            return itertools.islice(found, self.max_documents)
        part, parts = self._share
        if not self.streaming:
            rows = len(found) if self.max_documents is None else min(len(found), self.max_documents)
            return iter(found.select(range(rows * part // parts, rows * (part + 1) // parts)))
        if self.max_documents is not None:
            raise SourceError(
                f"max_documents={self.max_documents} of a stream is the first rows, which cannot be shared by {parts} parts; "
                "take streaming=false, or max_documents=null"
            )
        files = found.num_shards
        mine = range(files * part // parts, files * (part + 1) // parts)
        return itertools.chain.from_iterable(found.shard(num_shards=files, index=i) for i in mine)

    def share(self, part: int, parts: int) -> HuggingFaceSource:
        """Its ``skipped`` are numbered within the share."""
        found = copy.copy(self)
        found._share, found.skipped = (part, parts), ()
        return found

    def stamp(self) -> str:
        return self.fingerprint()

    def facts(self) -> list[Any]:
        return [self.fingerprint()]

    def fingerprint_of(self, facts: Sequence[Any]) -> str:
        """Not of now: a local folder may have changed since it was read."""
        if any(fact != facts[0] for fact in facts):
            raise SourceError(
                f"the dataset {self.dataset!r} changed between its parts; begin again with all of them"
            )
        return str(facts[0])

    def skipped_of(self, shares: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
        found, before = [], 0
        for documents, skipped in shares:
            found += [f"{self.split}#{before + int(name.rsplit('#', 1)[1])}" for name in skipped]
            before += documents + len(skipped)
        return found

    def documents(self) -> Iterator[Document]:
        skipped = []
        for number, row in enumerate(self._rows()):
            if self.column not in row:
                raise SourceError(
                    f"row {number} of {self.dataset!r} has no column {self.column!r}; it has {', '.join(row)}"
                )
            text = row[self.column]
            if text is None:
                skipped.append(f"{self.split}#{number}")
            elif isinstance(text, str):
                yield Document(f"{self.split}#{number}", text)
            else:
                raise SourceError(
                    f"row {number} of {self.dataset!r}: the column {self.column!r} holds a {type(text).__name__}, no text"
                )
        self.skipped = tuple(skipped)

    def fingerprint(self) -> str:
        """Of the commit, or of a local folder's files, and of what chooses among the rows. Reads no row."""
        files = []
        if self.folder is not None:
            paths = sorted(p for p in self.folder.rglob("*") if p.is_file())
            names = [p.relative_to(self.folder).as_posix() for p in paths]
            files = list(zip(names, RememberedDigests(paths).get(), strict=True))
        place = self.dataset if self.folder is None else None
        chosen = [self.config, self.split, self.data_files, self.column, self.max_documents]
        whole = ["HuggingFaceSource", place, self.commit(), files, chosen]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()
