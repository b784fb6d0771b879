"""Text sources: where documents come from.

A source yields ``Document(id, text)`` in one fixed order, as often as it is asked, and fingerprints what it
yields. Preparation streams over a source several times (fingerprint, split, tokens) and never holds it in
memory, so a source of any size fits the same code.

``StdlibSource`` needs no network and no download: every Python installation carries about 12 MB of readable,
homogeneous text, enough to train and compare byte-level models of a few million parameters.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Folders of the standard library's tree that hold no sources of their own.
_NOT_SOURCES = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Test folders: `test`, `unittest/test`, `idlelib/idle_test`, `lib2to3/tests`, `tkinter/test`, ...
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One text. ``id`` is unique within its source and independent of the machine."""

    id: str
    text: str


class TextSource(Protocol):
    """A finite sequence of documents in a deterministic order."""

    @property
    def name(self) -> str:
        """A short name for folders and reports: letters, digits, ``-`` and ``_``."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Ids of the documents that the last complete pass left out because they are no UTF-8."""

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


class _FileSource:
    """Documents out of a sorted list of (id, path); files that are no UTF-8 are skipped and listed."""

    def __init__(self) -> None:
        self.skipped: tuple[str, ...] = ()

    def _files(self) -> list[tuple[str, Path]]:
        raise NotImplementedError

    def _split(self, file_id: str, text: str) -> Iterator[Document]:
        yield Document(file_id, text)

    def documents(self) -> Iterator[Document]:
        skipped = []
        for file_id, path in self._files():
            try:
                # newline="" keeps the bytes of the file: universal newlines would change the fingerprint
                # and the byte count from which bits per byte are computed.
                with path.open(encoding="utf-8", newline="") as file:
                    text = file.read()
            except UnicodeDecodeError:
                skipped.append(file_id)
                continue
            yield from self._split(file_id, text)
        self.skipped = tuple(skipped)

    def fingerprint(self) -> str:
        return fingerprint_documents(self.documents())


class StdlibSource(_FileSource):
    """The ``.py`` files of the running Python's standard library, one document a file, by relative path.

    ``include_tests=False`` (12 MB in CPython 3.11) leaves out every test folder; with them it is 31 MB.
    ``root``: another standard library's folder; default: the one of this interpreter.
    """

    def __init__(self, *, include_tests: bool = False, root: str | Path | None = None) -> None:
        super().__init__()
        self.include_tests = include_tests
        self.root = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
        self.name = "stdlib-with-tests" if include_tests else "stdlib"

    def _files(self) -> list[tuple[str, Path]]:
        excluded = _NOT_SOURCES if self.include_tests else _NOT_SOURCES | _TEST_FOLDERS
        found = []
        for path in self.root.rglob("*.py"):
            relative = path.relative_to(self.root)
            if excluded.isdisjoint(relative.parts[:-1]) and path.is_file():
                found.append((relative.as_posix(), path))
        if not found:
            raise FileNotFoundError(
                f"no .py files of the standard library under {self.root}; this Python carries its library as a "
                "zip or without sources: use TextFilesSource with files of your own"
            )
        return sorted(found)


class TextFilesSource(_FileSource):
    """Local text files, in the sorted order of their ids.

    ``paths``: files, folders (every ``.txt`` and ``.md`` below) or glob patterns (``**`` crosses folders).
    ``separator``: None makes one document of each file; a string such as ``"<|endoftext|>"`` or ``"\\n\\n"``
    cuts each file into documents at it (the separator itself is left out, and so are empty pieces).
    A document's id is the file's path relative to the deepest folder common to all files, with ``#k`` when
    files are cut.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], *, separator: str | None = None, name: str = "files"
    ) -> None:
        super().__init__()
        if separator == "":
            raise ValueError("separator '' cannot cut a text; pass None for one document a file")
        self.paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.separator = separator
        self.name = name

    def _files(self) -> list[tuple[str, Path]]:
        found: set[Path] = set()
        for pattern in self.paths:
            path = Path(pattern).expanduser()
            if path.is_dir():
                matches = {p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()}
            elif path.is_file():
                matches = {path}
            else:
                matches = {Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()}
            if not matches:
                raise FileNotFoundError(
                    f"no text file matches {str(pattern)!r}; pass a file, a folder with .txt or .md files, or a "
                    "glob pattern such as 'corpus/**/*.txt'"
                )
            found |= {match.resolve() for match in matches}
        folders = [file.parent.parts for file in found]
        depth = 0
        while all(len(f) > depth for f in folders) and len({f[depth] for f in folders}) == 1:
            depth += 1
        return sorted((Path(*file.parts[depth:]).as_posix(), file) for file in found)

    def _split(self, file_id: str, text: str) -> Iterator[Document]:
        if self.separator is None:
            yield Document(file_id, text)
            return
        for k, piece in enumerate(text.split(self.separator)):
            if piece.strip():
                yield Document(f"{file_id}#{k}", piece)
