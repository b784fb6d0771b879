"""Number formats by name. A new one is one file here and one line in ``get_format``, or comes from outside as
``package.module:Name`` (a NumberFormat instance, or something that makes one when called)."""

from __future__ import annotations

import difflib
import re
from functools import cache

from ..plugins import load_instance
from .base import NumberFormat
from .codebook import CodebookFormat, dynamic_tree, normal_float4, power_law
from .floating import E2M1, E2M3, E3M2, E3M4, E4M3, E5M2, FloatFormat
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
    **{f.name: f for f in (E4M3, E5M2, E3M4, E3M2, E2M3, E2M1)},
    **{f.name: f for b in (4, 8) for f in (dynamic_tree(b, signed=True), dynamic_tree(b, signed=False))},
    "linear4_nozero": CodebookFormat("linear4_nozero", tuple((i + 1) / 16 for i in range(16))),
    "nf4": normal_float4(),
    "sign": CodebookFormat("sign", (-1.0, 1.0)),
    "ternary": CodebookFormat("ternary", (-1.0, 0.0, 1.0)),
    **{f"power{b}": power_law(b) for b in range(2, 9)},
}

POWER_LAW = r"power(\d)p(\d*\.?\d+)"
"""``power4p0.5``: the power-law format of 4 bits with p = 0.5."""


def format_names() -> list[str]:
    """The built-in names."""
    return list(_NAMED)


@cache
def get_format(name: str) -> NumberFormat:
    """The format of that name, ``power<b>p<P>`` among them, or of that ``package.module:Name``.

    Raises ValueError, naming the near and the allowed names, for an unknown one, and for a plug-in that is not
    there; TypeError where a plug-in is no NumberFormat.
    """
    if name in _NAMED:
        return _NAMED[name]
    if match := re.fullmatch(POWER_LAW, name):
        return power_law(int(match[1]), float(match[2]))
    if re.fullmatch(r"[\w.]+:\w+", name):
        hint = "A granularity is written without a colon, as in int4_group128"
        return load_instance(name, "format", NumberFormat, hint)
    if name == "codebook":
        raise ValueError(
            "format 'codebook' needs its levels: a mapping {format: codebook, levels: [-1, 0, 0.5, 1]}"
        )
    near = difflib.get_close_matches(name, _NAMED, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"unknown number format {name!r}{hint} Allowed: {', '.join(_NAMED)}, power<b>p<P>, codebook (with "
        "levels), or 'package.module:Name'"
    )
