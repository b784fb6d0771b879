"""Plug-ins: formats, clips, estimators and transforms from any package, named ``package.module:Name`` in a spec.

    format     a NumberFormat, or something that makes one when called without arguments
    clip       (blocks [nr, r, nc, c], counts [nr, 1, nc, 1]) -> the range's end [nr, 1, nc, 1]; all float32; ragged
               blocks are filled with zeros, ``counts`` are their true elements. Ranges are symmetric
    estimator  (v, values) -> bool, where the gradient passes; both float32 in units of the scale: what was to be
               rounded and what it was rounded to
    transform  a qtrain.quant.Transform, or something that makes one when called without arguments

They are called inside the layers' forward and backward: torch operations of fixed shapes, nothing random and no
state, so that they compile, and recomputation under activation checkpointing gives the same numbers.
"""

from __future__ import annotations

import importlib
import re
from typing import Any


def is_plugin(name: str) -> bool:
    """Whether ``name`` has the shape ``package.module:Name``; the number of rms:2.5 is no name."""
    return re.fullmatch(r"[\w.]+:[^\W\d]\w*", name) is not None


def load_plugin(name: str, kind: str, hint: str = "") -> Any:
    """The object that ``package.module:Name`` names. kind: what it is to be, for messages; hint: one more sentence.

    Raises ValueError where there is none; an error of the plug-in's own imports goes through.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # an import of the plug-in's own
        found = None
    if found is None:
        raise ValueError(
            f"{kind} {name!r}: no {attribute!r} in a module {module!r}; put the plug-in's folder on PYTHONPATH. {hint}".rstrip()
        )
    return found


def load_instance(name: str, kind: str, wanted: type, hint: str = "") -> Any:
    """An instance of ``wanted`` from a plug-in that is one or makes one. Raises TypeError for anything else."""
    found = load_plugin(name, kind, hint)
    found = found if isinstance(found, wanted) or not callable(found) else found()
    if not isinstance(found, wanted):
        raise TypeError(
            f"{kind} {name!r} is a {type(found).__name__}, not a {wanted.__module__.removesuffix('.base').removesuffix('.transforms')}.{wanted.__name__}"
        )
    return found


def load_function(name: str, kind: str) -> Any:
    """Something to call. Raises TypeError where the plug-in cannot be."""
    found = load_plugin(name, kind)
    if isinstance(found, type):
        found = found()
    if not callable(found):
        raise TypeError(f"{kind} {name!r} is a {type(found).__name__}, which cannot be called")
    return found
