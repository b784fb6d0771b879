"""Number formats by name. A new one is one file here and one line in ``get_format``, or comes from outside as
``package.module:Name`` (a NumberFormat instance, or something that makes one when called)."""

from __future__ import annotations

import difflib
import importlib
import re
from functools import cache

from .base import NumberFormat
from .codebook import CodebookFormat, dynamic_tree
from .floating import E2M1, E4M3, E5M2, FloatFormat
from .integer import IntegerFormat, MidriseFormat

__all__ = [
    "CodebookFormat",
    "FloatFormat",
    "IntegerFormat",
    "MidriseFormat",
    "NumberFormat",
    "format_names",
    "get_format",
]

_NAMED: dict[str, NumberFormat] = {
    **{f"int{b}": IntegerFormat(b) for b in range(2, 9)},
    **{f"uint{b}": IntegerFormat(b, signed=False) for b in range(1, 9)},
    **{f"midrise{b}": MidriseFormat(b) for b in range(1, 9)},
    **{f.name: f for f in (E4M3, E5M2, E2M1)},
    **{f.name: f for b in (4, 8) for f in (dynamic_tree(b, signed=True), dynamic_tree(b, signed=False))},
    "linear4_nozero": CodebookFormat("linear4_nozero", tuple((i + 1) / 16 for i in range(16))),
}


def format_names() -> list[str]:
    """The built-in names."""
    return list(_NAMED)


@cache
def get_format(name: str) -> NumberFormat:
    """The format of that name, or of that ``package.module:Name``.

    Raises ValueError, naming the near and the allowed names, for an unknown one, and for a plug-in that is not
    there; TypeError where a plug-in is no NumberFormat.
    """
    if name in _NAMED:
        return _NAMED[name]
    if re.fullmatch(r"[\w.]+:\w+", name):
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # an import of the plug-in's own
            found = None
        if found is None:
            raise ValueError(
                f"format {name!r}: no {attribute!r} in a module {module!r}; put the plug-in's folder on PYTHONPATH. "
                "A granularity is written without a colon, as in int4_group128"
            )
        found = found if isinstance(found, NumberFormat) else found()
        if not isinstance(found, NumberFormat):
            raise TypeError(
                f"format {name!r} is a {type(found).__name__}, not a qtrain.quant.formats.NumberFormat"
            )
        return found
    near = difflib.get_close_matches(name, _NAMED, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"unknown number format {name!r}{hint} Allowed: {', '.join(_NAMED)}, or 'package.module:Name'"
    )
