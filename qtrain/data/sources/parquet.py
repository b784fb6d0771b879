"""Parquet: a document a row, read a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qtrain.data.optional_libraries import optional_library

from .base import Document, FileSource, SourceError, TextFile, matching_files

# Of a row group, which may be gigabytes, decoded at once
_BATCH_ROWS = 1024


class ParquetSource(FileSource):
    """paths: files, folders (their .parquet) or glob patterns. column: of strings.

    Rows without a text (null) are left out and counted in ``skipped``. Raises SourceError, naming the file, for one that
    is no parquet or lacks the column; ImportError without ``pyarrow``.
    """

    def __init__(
        self, paths: str | Path | Sequence[str | Path], *, column: str = "text", name: str = "parquet"
    ) -> None:
        super().__init__()
        self.paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.column, self.name = column, name

    def _files(self) -> list[tuple[str, TextFile]]:
        return matching_files(self.paths, (".parquet",), "corpus/**/*.parquet")

    def _reading(self) -> dict[str, Any]:
        return {"column": self.column}

    def _read(self, file_id: str, path: TextFile, skipped: list[str]) -> Iterator[Document]:
        arrow = optional_library("pyarrow", needed_for=str(path))
        parquet = optional_library("pyarrow.parquet", needed_for=str(path), package="pyarrow")
        try:
            with parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
                self._check_column(arrow, file.schema_arrow, path)
                row = 0
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self.column]):
                        for text in batch.column(0).to_pylist():
                            if text is None:
                                skipped.append(f"{file_id}#{row}")
                            else:
                                yield Document(f"{file_id}#{row}", text)
                            row += 1
        except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
            raise SourceError(f"{path} cannot be read as parquet: {error}") from error

    def _check_column(self, arrow: Any, schema: Any, path: TextFile) -> None:
        if self.column not in schema.names:
            raise SourceError(f"{path} has no column {self.column!r}; it has {', '.join(schema.names)}")
        kind = schema.field(self.column).type
        value = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(value) or arrow.types.is_large_string(value)):
            raise SourceError(f"{path}: the column {self.column!r} holds {kind}, no strings")
