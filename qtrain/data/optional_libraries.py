"""Libraries that only some sources and tokenizers need: imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any


def optional_library(module: str, *, needed_for: str, package: str | None = None) -> Any:
    """The imported ``module``. Raises ImportError with the command that installs ``package`` (default: the module)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, and something that it needs is not
        name = package or module.split(".")[0]
        raise ImportError(
            f"{needed_for} needs the library {name!r}, which is not installed: pip install {name}"
        ) from error
