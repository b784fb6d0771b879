"""Text sources: where documents come from.

A source yields ``Document(id, text)`` in one fixed order, as often as it is asked, and fingerprints what it
yields. Preparation streams over a source several times and never holds it in memory, so a source of any size fits the
same code.
"""

from .base import Document, FileSource, NoFiles, SharedSource, SourceError, TextSource, fingerprint_documents
from .huggingface import HuggingFaceSource
from .jsonl import JsonLinesSource
from .parquet import ParquetSource
from .text import StdlibSource, TextFilesSource

__all__ = [
    "Document",
    "FileSource",
    "HuggingFaceSource",
    "JsonLinesSource",
    "NoFiles",
    "ParquetSource",
    "SharedSource",
    "SourceError",
    "StdlibSource",
    "TextFilesSource",
    "TextSource",
    "fingerprint_documents",
]
