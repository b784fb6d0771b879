"""Libraries that only some sources and tokenizers need: imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any


class LibraryMissing(ImportError, ValueError):
    """A value asks for a library that is not installed: an import that failed, and a value that is refused here."""


def optional_library(module: str, *, needed_for: str, package: str | None = None) -> Any:
    """The imported ``module``. Raises LibraryMissing with the command that installs ``package`` (default: the module)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, and something that it needs is not
        name = package or module.split(".")[0]
        raise LibraryMissing(
            f"{needed_for} needs the library {name!r}, which is not installed: pip install {name}"
        ) from error
