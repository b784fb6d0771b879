"""What a source is, and sources that read local files."""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from qtrain.data.cache import RememberedDigests
from qtrain.data.object_store import StoreUnreachable, is_address
from qtrain.data.stored_files import StoredFileText, stored_files


@dataclass(frozen=True)
class Document:
    """One text. ``id`` is unique within its source and independent of the machine."""

    id: str
    text: str


class SourceError(ValueError):
    """Text that is not where a source looks for it, or not what it is said to be."""


class NoFiles(SourceError, FileNotFoundError):
    """Nothing is there under the names that a source was given."""


class TextSource(Protocol):
    """A finite sequence of documents in a deterministic order, never held in memory."""

    @property
    def name(self) -> str:
        """A short name for folders and reports: letters, digits, ``-`` and ``_``."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Ids of what the last complete pass left out because it is no text."""

    def documents(self) -> Iterator[Document]:
        """Begins again at the first document on each call."""

    def fingerprint(self) -> str:
        """Hex digest that changes whenever an id, a text or the order changes."""


def fingerprint_documents(documents: Iterable[Document]) -> str:
    """sha256 over all ids and texts, each preceded by its length so that no two sequences share a stream."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id.encode("utf-8"), document.text.encode("utf-8")):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


# A file of this machine or of an object store
TextFile = Path | StoredFileText


def matching_files(
    paths: Sequence[str | Path], suffixes: Sequence[str], example: str
) -> list[tuple[str, TextFile]]:
    """(id, path) of files, of the files below folders that end in one of ``suffixes``, and of glob patterns, sorted by
    id: the path relative to the deepest folder common to all. Raises NoFiles where one of ``paths`` gives
    nothing; example: a pattern, for its message.
    """
    stored = [path for path in paths if is_address(path)]
    if stored:
        if len(stored) < len(paths):
            raise ValueError(
                f"paths {[str(p) for p in paths]}: give addresses of one kind, or paths of this machine"
            )
        return _stored_files([str(path) for path in stored], suffixes, example)
    found: set[Path] = set()
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = {p for p in path.rglob("*") if p.name.endswith(tuple(suffixes)) and p.is_file()}
        elif path.is_file():
            matches = {path}
        else:
            matches = {Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()}
        if not matches:
            raise NoFiles(
                f"no file matches {str(pattern)!r}; pass a file, a folder with {' or '.join(suffixes)} files, or a "
                f"glob pattern such as '{example}'"
            )
        found |= {match.resolve() for match in matches}
    folders = [file.parent.parts for file in found]
    depth = 0
    while all(len(f) > depth for f in folders) and len({f[depth] for f in folders}) == 1:
        depth += 1
    return sorted((Path(*file.parts[depth:]).as_posix(), file) for file in found)


class SharedSource(TextSource, Protocol):
    """A source that several tasks read, each its share. The documents of the shares 0, 1, ... follow one another as in
    the whole source."""

    def share(self, part: int, parts: int) -> SharedSource:
        """Part ``part`` of ``parts``, possibly without documents. Raises SourceError where the source cannot be cut."""

    def stamp(self) -> str:
        """Hex digest that tasks agree on without reading the text: of names, sizes and times, or of a commit."""

    def facts(self) -> list[Any]:
        """Of a share, what the fingerprint of the whole is made of, as JSON values."""

    def fingerprint_of(self, facts: Sequence[Any]) -> str:
        """``fingerprint()`` of the whole, from the facts of all shares in order."""

    def skipped_of(self, shares: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
        """``skipped`` of the whole, from (documents, skipped) of all shares in order."""


def _stored_files(
    addresses: Sequence[str], suffixes: Sequence[str], example: str
) -> list[tuple[str, TextFile]]:
    """``matching_files`` of addresses; the id is the address without what all have in common."""
    found: dict[str, StoredFileText] = {}
    for address in addresses:
        matches = stored_files(address, suffixes)
        if not matches:
            raise NoFiles(
                f"no file matches {address!r}; pass an address of a file, of a folder with {' or '.join(suffixes)} files, or "
                f"a pattern such as 's3://bucket/{example}'"
            )
        found |= {str(match): match for match in matches}
    common = os.path.commonpath([PurePosixPath(address).parent for address in found])
    ids = {PurePosixPath(address).relative_to(common).as_posix(): file for address, file in found.items()}
    return sorted(ids.items(), key=lambda item: item[0])


def _size_of(file: TextFile) -> int:
    return file.size if isinstance(file, StoredFileText) else file.stat().st_size


def _stamp_of(file: TextFile) -> list[Any]:
    if isinstance(file, StoredFileText):
        return file.stamp()
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _digests_of(files: Sequence[TextFile]) -> list[str]:
    here = iter(RememberedDigests([file for file in files if isinstance(file, Path)]).get())
    return [file.digest() if isinstance(file, StoredFileText) else next(here) for file in files]


class FileSource:
    """Documents out of a sorted list of (id, path).

    The fingerprint is that of the files' bytes and of what decides how they are read; a file whose inode did not change
    is not read for it (``RememberedDigests``).
    """

    name: str

    # (part, parts) of a share
    _share: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.skipped: tuple[str, ...] = ()

    def _files(self) -> list[tuple[str, TextFile]]:
        raise NotImplementedError

    def _chosen(self) -> list[tuple[str, TextFile]]:
        """All files; of a share, those whose middle byte lies in its part of all bytes."""
        files = self._files()
        if self._share is None:
            return files
        part, parts = self._share
        sizes = [_size_of(file) for _, file in files]
        total, before, found = max(1, sum(sizes)), 0, []
        for file, size in zip(files, sizes, strict=True):
            if min((2 * before + size) * parts // (2 * total), parts - 1) == part:
                found.append(file)
            before += size
        return found

    def share(self, part: int, parts: int) -> FileSource:
        """Whole files."""
        found = copy.copy(self)
        found._share, found.skipped = (part, parts), ()
        return found

    def stamp(self) -> str:
        listed = [(file_id, *_stamp_of(file)) for file_id, file in self._files()]
        return hashlib.sha256(json.dumps([type(self).__name__, self._reading(), listed]).encode()).hexdigest()

    def skipped_of(self, shares: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
        return [skipped for _, listed in shares for skipped in listed]

    def _reading(self) -> dict[str, Any]:
        """Settings that decide which documents a file gives, as JSON values."""
        return {}

    def _read(self, file_id: str, path: TextFile, skipped: list[str]) -> Iterator[Document]:
        """The documents of a file; appends to ``skipped`` the ids of what is none."""
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        skipped: list[str] = []
        for file_id, path in self._chosen():
            try:
                yield from self._read(file_id, path, skipped)
            except (StoreUnreachable, FileNotFoundError) as error:
                if isinstance(path, Path):
                    raise
                raise SourceError(f"{path} cannot be read: {error}") from error
        self.skipped = tuple(skipped)

    def facts(self) -> list[Any]:
        files = self._chosen()
        digests = _digests_of([file for _, file in files])
        return [[file_id, digest] for (file_id, _), digest in zip(files, digests, strict=True)]

    def fingerprint_of(self, facts: Sequence[Any]) -> str:
        whole = [type(self).__name__, self._reading(), list(facts)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        return self.fingerprint_of(self.facts())
