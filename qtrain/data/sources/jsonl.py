"""JSON lines: a document a line, plain or compressed."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qtrain.data.optional_libraries import optional_library

from .base import Document, FileSource, matching_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BAD_LINES = ("error", "skip")


class JsonLinesSource(FileSource):
    """paths: files, folders (their .jsonl, .jsonl.gz, .jsonl.zst) or glob patterns; compressed by their last suffix.

    text_key: of each line's object, the key that holds the text. bad_lines: ``error`` raises ValueError at a line that
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

    def _files(self) -> list[tuple[str, Path]]:
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

    def _read(self, file_id: str, path: Path, skipped: list[str]) -> Iterator[Document]:
        number = 0
        with _opened(path) as file:
            try:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        text = self._text(line)
                    except ValueError as error:
                        if self.bad_lines == "error":
                            raise ValueError(
                                f"{path}:{number}: {error}; mend the line, or leave such lines out with bad_lines=skip"
                            ) from None
                        skipped.append(f"{file_id}:{number}")
                        continue
                    yield Document(f"{file_id}:{number}", text)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path}:{number + 1}: the compressed file is cut or damaged ({error})"
                ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes, by lines."""
    if path.suffix == ".zst":
        library = optional_library("zstandard", needed_for=str(path))
        with path.open("rb") as raw:
            # A file may be several frames one after the other, as parallel compressors write it
            reader = library.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            try:
                yield io.BufferedReader(reader)  # type: ignore[arg-type]
            except library.ZstdError as error:
                raise EOFError(str(error)) from error
    elif path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    else:
        with path.open("rb") as plain:
            yield plain
