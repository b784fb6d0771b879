"""Sources of plain text: files, and the standard library.

``StdlibSource`` needs no network and no download: every Python installation carries about 12 MB of readable,
homogeneous text, enough to train and compare byte-level models of a few million parameters.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .base import Document, FileSource, NoFiles, TextFile, matching_files

# Folders of the standard library's tree that hold no sources of their own.
_NOT_SOURCES = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Test folders: `test`, `unittest/test`, `idlelib/idle_test`, `lib2to3/tests`, `tkinter/test`, ...
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


class _TextSource(FileSource):
    """Files that are no UTF-8 are skipped and listed."""

    def _split(self, file_id: str, text: str) -> Iterator[Document]:
        yield Document(file_id, text)

    def _read(self, file_id: str, path: TextFile, skipped: list[str]) -> Iterator[Document]:
        try:
            # newline="" keeps the bytes of the file: universal newlines would change the byte count from which bits
            # per byte are computed.
            with path.open(encoding="utf-8", newline="") as file:
                text = file.read()
        except UnicodeDecodeError:
            skipped.append(file_id)
            return
        yield from self._split(file_id, text)


class StdlibSource(_TextSource):
    """The ``.py`` files of the running Python's standard library, one document a file, by relative path.

    ``include_tests=False`` (12 MB in CPython 3.11) leaves out every test folder; with them it is 31 MB.
    ``root``: another standard library's folder; default: the one of this interpreter.
    """

    def __init__(self, *, include_tests: bool = False, root: str | Path | None = None) -> None:
        super().__init__()
        self.include_tests = include_tests
        self.root = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
        self.name = "stdlib-with-tests" if include_tests else "stdlib"

    def _files(self) -> list[tuple[str, TextFile]]:
        excluded = _NOT_SOURCES if self.include_tests else _NOT_SOURCES | _TEST_FOLDERS
        found = []
        for path in self.root.rglob("*.py"):
            relative = path.relative_to(self.root)
            if excluded.isdisjoint(relative.parts[:-1]) and path.is_file():
                found.append((relative.as_posix(), path))
        if not found:
            raise NoFiles(
                f"no .py files of the standard library under {self.root}; this Python carries its library as a "
                "zip or without sources: use TextFilesSource with files of your own"
            )
        return sorted(found)


class TextFilesSource(_TextSource):
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

    def _files(self) -> list[tuple[str, TextFile]]:
        return matching_files(self.paths, (".txt", ".md"), "corpus/**/*.txt")

    def _reading(self) -> dict[str, Any]:
        return {"separator": self.separator}

    def _split(self, file_id: str, text: str) -> Iterator[Document]:
        if self.separator is None:
            yield Document(file_id, text)
            return
        for k, piece in enumerate(text.split(self.separator)):
            if piece.strip():
                yield Document(f"{file_id}#{k}", piece)
