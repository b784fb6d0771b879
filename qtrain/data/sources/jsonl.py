"""JSON lines: a document a line, plain or compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from qtrain.data.optional_libraries import optional_library

from .base import Document, FileSource, SourceError, TextFile, matching_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BAD_LINES = ("error", "skip")
# Of a compressed file, decoded at once
_CHUNK_BYTES = 1 << 16


class JsonLinesSource(FileSource):
    """paths: files, folders (their .jsonl, .jsonl.gz, .jsonl.zst) or glob patterns; compressed by their last suffix.

    text_key: of each line's object, the key that holds the text. bad_lines: ``error`` raises SourceError at a line that
    is no JSON object with a text under that key, naming file and line; ``skip`` leaves it out and counts it in
    ``skipped``. Blank lines are no lines. A compressed file that is cut is an error either way.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        text_key: str = "text",
        bad_lines: str = "error",
        name: str = "jsonl",
    ) -> None:
        super().__init__()
        if bad_lines not in BAD_LINES:
            raise ValueError(f"bad_lines {bad_lines!r}: allowed are {', '.join(BAD_LINES)}")
        self.paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.text_key, self.bad_lines, self.name = text_key, bad_lines, name

    def _files(self) -> list[tuple[str, TextFile]]:
        return matching_files(self.paths, SUFFIXES, "corpus/**/*.jsonl.gz")

    def _reading(self) -> dict[str, Any]:
        return {"text_key": self.text_key, "bad_lines": self.bad_lines}

    def _text(self, line: bytes) -> str:
        """The text of a line. Raises ValueError, without the place."""
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            raise ValueError("no UTF-8") from None
        except ValueError as error:
            raise ValueError(f"no JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}, and a line is an object")
        if self.text_key not in value:
            raise ValueError(
                f"no key {self.text_key!r} (it has {', '.join(map(repr, value)) or 'none'}); set text_key"
            )
        text = value[self.text_key]
        if not isinstance(text, str):
            raise ValueError(f"{self.text_key!r} holds a {type(text).__name__}, no text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise ValueError("half of a surrogate pair, which is no character") from None
        return text

    def _read(self, file_id: str, path: TextFile, skipped: list[str]) -> Iterator[Document]:
        for number, line in _numbered_lines(path):
            if not line.strip():
                continue
            try:
                text = self._text(line)
            except ValueError as error:
                if self.bad_lines == "error":
                    raise SourceError(
                        f"{path}:{number}: {error}; mend the line, or leave such lines out with bad_lines=skip"
                    ) from None
                skipped.append(f"{file_id}:{number}")
            else:
                yield Document(f"{file_id}:{number}", text)


def _numbered_lines(path: TextFile) -> Iterator[tuple[int, bytes]]:
    """From 1. Raises SourceError, naming the place, where a compressed file is cut or damaged."""
    number = 0
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_lines(path, raw), start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}:{number + 1}: the compressed file is cut or damaged ({error})") from error


def _lines(path: TextFile, raw: IO[bytes]) -> Iterator[bytes]:
    if path.suffix == ".zst":
        return _zstandard_lines(path, raw)
    return iter(gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else iter(raw)


def _zstandard_lines(path: TextFile, raw: IO[bytes]) -> Iterator[bytes]:
    """A file may be several frames, as parallel compressors write it. The library's own reader takes the end of a file
    within a frame for the end of the text, and would lose the rest without a word."""
    library = optional_library("zstandard", needed_for=str(path))
    frame, rest = None, b""
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or library.ZstdDecompressor().decompressobj()
            try:
                *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            except library.ZstdError as error:
                raise EOFError(str(error)) from error
            yield from lines
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")
    if rest:
        yield rest
