"""QuantSpec: how ONE operand is quantized. Frozen, hashable, validated at construction.

Configs and command lines write it short, ``<format>[_<granularity>][_<modifier>...]``:

    int4_row   int8_tensor   int4_group128_asym   e4m3_block128x128   int8_row_sr   midrise4_row_gaussian_trust

or by the name of a standard layout (``mxfp8``, ``mxfp4``, ``nvfp4``), or as a mapping of the fields below, which
also takes what the short form does not say: percentiles, the levels of a codebook, plug-ins beside formats.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from .formats import POWER_LAW, CodebookFormat, IntegerFormat, NumberFormat, format_names, get_format
from .granularity import Granularity
from .plugins import is_plugin, load_function
from .ranges import MIN_SCALE, gaussian_clip

SCALE_FORMATS = ("float32", "e8m0", "e8m0_ceil", "e8m0_down", "e8m0_prescale", "e4m3")
ROUNDINGS = ("nearest", "stochastic")
ESTIMATORS = ("ste", "clipped", "trust", "seq")
CLIPS = (
    "absmax, percentile:P, mse, rms:K, gaussian, absmean:K, four_six, fixed:A, learned, static:N, delayed:H, "
    "package.module:Name"
)
_PLUGIN = "package.module:Name"
_NUMBERED = ("percentile", "rms", "absmean", "fixed", "static", "delayed")
STATEFUL = ("learned", "static", "delayed")
# Of those without a number in their name; and what the short form's words leave out.
_ALONE = ("absmax", "mse", "four_six", "learned")
_DEFAULT_NUMBER = {"absmean": "1", "static": "16", "delayed": "16"}


def _mx(number_format: str, rule: str = "e8m0_ceil") -> dict[str, Any]:
    return {"format": number_format, "granularity": "group:32", "scale_format": rule}


LAYOUTS: dict[str, dict[str, Any]] = {
    # OCP MX v1.0. The ceil rule where OCP's floor would saturate many blocks: those of e4m3 with a mantissa over 1.75
    "mxfp8": _mx("e4m3"),
    "mxfp8_e5m2": _mx("e5m2"),
    "mxfp6": _mx("e2m3"),
    "mxfp6_e3m2": _mx("e3m2"),
    "mxfp4": _mx("e2m1", "e8m0"),
    "mxint8": _mx("int8"),
    "nvfp4": {"format": "e2m1", "granularity": "group:16", "scale_format": "e4m3", "tensor_scale": True},
}
MODIFIERS: dict[str, dict[str, Any]] = {
    "sr": {"rounding": "stochastic"},
    "asym": {"symmetric": False},
    "mse": {"clip": "mse"},
    "gaussian": {"clip": "gaussian"},
    "clipped": {"estimator": "clipped"},
    "trust": {"estimator": "trust"},
    "seq": {"estimator": "seq"},
    "absmean": {"clip": "absmean:1"},
    "four_six": {"clip": "four_six"},
    "floor": {"scale_format": "e8m0"},
    "ceil": {"scale_format": "e8m0_ceil"},
    "down": {"scale_format": "e8m0_down"},
    "prescale": {"scale_format": "e8m0_prescale"},
    "learned": {"clip": "learned", "estimator": "clipped"},
    "static": {"clip": "static:16"},
    "delayed": {"clip": "delayed:16"},
}


def _one_of(field: str, value: str, allowed: tuple[str, ...] | list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        raise ValueError(
            f"{field}={value!r}: allowed are {', '.join(allowed)}{f'; did you mean {near[0]}?' if near else ''}"
        )


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one operand, seen K-major as [free, contraction], is quantized.

    format: a name that ``get_format`` knows, or ``codebook`` with its ``levels``. granularity: who shares a scale
    (``Granularity.parse``). symmetric: False adds a zero point (integers only); the range then always contains zero,
    so that zero stays exact. clip: how the range is chosen within a block: ``absmax``; ``percentile:P`` (P percent of
    the elements lie inside); ``mse`` (grid search); ``rms:K``, ``absmean:K`` (K times the root mean square, the mean
    magnitude); ``gaussian`` (``rms:K`` with the K that is optimal for this format on N(0, 1)); ``four_six`` (e2m1: the
    largest element becomes 4 or 6, whichever errs less); ``fixed:A``; a plug-in; or, with a state that lives in the
    layer (``qtrain.nn.quantizers``), ``learned``, ``static:N`` and ``delayed:H``. scale_format: what a scale is stored
    in (``ranges.e8m0`` has the rules for powers of two); ``tensor_scale``: a second, float32 scale for the whole tensor
    (needs ``e4m3``). rounding: ``nearest`` (ties to even) or ``stochastic``. estimator of the gradient: ``ste`` passes
    it; ``clipped`` zeroes it where the value was clipped; ``trust`` where it moved by more than half the widest step
    (QuEST, arXiv 2502.05003, section 3.2); ``seq`` where it lies more than half a step beyond the last level (ParetoQ,
    arXiv 2502.02631); or a plug-in.
    min_scale: floor of the scale, before that is rounded to its format.

    Raises ValueError, naming the value, the allowed ones and the remedy.
    """

    format: str
    granularity: str = "row"
    symmetric: bool = True
    clip: str = "absmax"
    scale_format: str = "float32"
    tensor_scale: bool = False
    rounding: str = "nearest"
    estimator: str = "ste"
    min_scale: float = MIN_SCALE
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(float(x) for x in self.levels))
        if self.levels and self.format != "codebook":
            raise ValueError(f"levels with format {self.format!r}: they belong to format codebook")
        _ = self.plain_format
        _ = self.blocks
        _one_of("scale_format", self.scale_format, SCALE_FORMATS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        if not is_plugin(self.estimator):
            _one_of("estimator", self.estimator, (*ESTIMATORS, _PLUGIN))
        kind, value = self.clip_kind_and_value
        if not self.symmetric:
            if not isinstance(self.plain_format, IntegerFormat):
                raise ValueError(
                    f"symmetric=False with format {self.format!r}: a zero point needs an integer format, int2..int8"
                )
            if kind not in ("absmax", "percentile", "mse"):
                raise ValueError(
                    f"clip={self.clip!r} is symmetric; with symmetric=False use absmax, percentile:P or mse"
                )
            if self.scale_format != "float32":
                raise ValueError(
                    f"scale_format={self.scale_format!r} with symmetric=False: a zero point needs scale_format=float32"
                )
        if self.tensor_scale and self.scale_format != "e4m3":
            raise ValueError(
                f"tensor_scale=True with scale_format={self.scale_format!r}: a second level needs scale_format=e4m3"
            )
        if kind == "percentile" and not 50.0 <= value <= 100.0:
            raise ValueError(
                f"clip={self.clip!r}: the percentile must lie in 50..100, for example percentile:99.9"
            )
        if kind in ("rms", "absmean", "fixed") and not value > 0:
            raise ValueError(f"clip={self.clip!r}: the number must be positive, for example {kind}:2.5")
        if kind in ("static", "delayed") and not (value >= 1 and value.is_integer()):
            raise ValueError(f"clip={self.clip!r}: needs a whole number of steps, for example {kind}:16")
        if kind == "four_six" and self.format != "e2m1":
            raise ValueError(f"clip='four_six' with format {self.format!r}: 4 and 6 are levels of e2m1")
        if self.stateful and self.tensor_scale:
            raise ValueError(
                f"clip={self.clip!r} with tensor_scale=True: a range with state has one scale a block; use absmax"
            )
        if kind == "learned" and self.estimator not in ("clipped", "seq"):
            raise ValueError(
                f"clip='learned' with estimator={self.estimator!r}: the step's gradient tells clipped values apart; "
                "allowed are clipped (LSQ) and seq (ParetoQ)"
            )
        if kind == "learned" and self.scale_format != "float32":
            raise ValueError(
                f"clip='learned' with scale_format={self.scale_format!r}: the step is learned as a float32 number"
            )
        if not MIN_SCALE <= self.min_scale < math.inf:
            raise ValueError(f"min_scale={self.min_scale!r}: must be at least 2^-100 and finite")
        # Computed now: a compiler that traces the first use would meet the lock inside cached_property
        _ = self.number_format.widest_gap, self.clip_function, self.estimator_function

    @cached_property
    def plain_format(self) -> NumberFormat:
        """What ``format`` and ``levels`` name."""
        if self.format == "codebook" and self.levels:
            return CodebookFormat("codebook", self.levels)
        return get_format(self.format)

    @cached_property
    def number_format(self) -> NumberFormat:
        """The grid that codes name: the format itself, or its unsigned counterpart with a zero point."""
        return self.plain_format if self.symmetric else self.plain_format.unsigned()

    @cached_property
    def blocks(self) -> Granularity:
        return Granularity.parse(self.granularity)

    @cached_property
    def clip_kind_and_value(self) -> tuple[str, float]:
        """(the kind of clip, its number; 0 where it has none). ``gaussian`` is an rms; a plug-in is ``plugin``."""
        if self.clip in _ALONE:
            return self.clip, 0.0
        if self.clip == "gaussian":
            return "rms", gaussian_clip(self.plain_format)
        text = f"{self.clip}:{_DEFAULT_NUMBER[self.clip]}" if self.clip in _DEFAULT_NUMBER else self.clip
        match = re.fullmatch(rf"({'|'.join(_NUMBERED)}):(\d+\.?\d*|\.\d+)", text)
        if match:
            return match[1], float(match[2])
        if is_plugin(self.clip) and self.clip.split(":")[0] not in _NUMBERED:
            return "plugin", 0.0
        raise ValueError(f"clip={self.clip!r}: allowed are {CLIPS}")

    @cached_property
    def clip_function(self) -> Any:
        """Of a plug-in; None for the others."""
        return load_function(self.clip, "clip") if self.clip_kind_and_value[0] == "plugin" else None

    @cached_property
    def estimator_function(self) -> Any:
        """Of a plug-in; None for the others."""
        return load_function(self.estimator, "estimator") if is_plugin(self.estimator) else None

    @property
    def stateful(self) -> bool:
        """Whether its range has a state, which lives in a layer."""
        return self.clip_kind_and_value[0] in STATEFUL

    @property
    def bits(self) -> int:
        return self.number_format.bits

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def folds(self) -> bool:
        """Whether a GEMM on grid values needs the scales in its epilogue only."""
        return self.blocks.folds

    def __str__(self) -> str:
        defaults = {f.name: f.default for f in fields(self)}
        parts = [self.format, self.granularity]
        parts[0] += f"[{' '.join(f'{x:g}' for x in self.levels)}]" if self.levels else ""
        parts += [] if self.symmetric else ["asym"]
        parts += [self.clip] if self.clip != "absmax" else []
        parts += [f"scale:{self.scale_format}"] if self.scale_format != "float32" else []
        parts += ["tensor_scale"] if self.tensor_scale else []
        parts += ["sr"] if self.stochastic else []
        parts += [self.estimator] if self.estimator != "ste" else []
        parts += [f"min_scale:{self.min_scale:g}"] if self.min_scale != defaults["min_scale"] else []
        return " ".join(parts)

    @staticmethod
    def parse(text: str, *, granularity: str = "row") -> QuantSpec:
        """From the short form. ``granularity``: which one where the text names none.

        Raises ValueError with the allowed words.
        """
        base, rest = _split_format(text)
        values = dict(LAYOUTS[base]) if base in LAYOUTS else {"format": base, "granularity": granularity}
        for word in rest:
            match = re.fullmatch(r"(tensor|row|column)|group(\d+)|block(\d+x\d+)", word)
            numbered = re.fullmatch(r"(static|delayed)(\d+)", word)
            if numbered:
                values["clip"] = f"{numbered[1]}:{numbered[2]}"
            elif match:
                named, group, block = match.groups()
                values["granularity"] = named or (f"group:{group}" if group else f"block:{block}")
            elif word in MODIFIERS:
                values.update(MODIFIERS[word])
            else:
                near = difflib.get_close_matches(word, ["tensor", "row", "column", *MODIFIERS], n=1)
                raise ValueError(
                    f"{word!r} in the spec {text!r}: allowed are a granularity (tensor, row, column, group<G>, "
                    f"block<R>x<C>) and modifiers ({', '.join(MODIFIERS)}, static<N>, delayed<H>){f'; did you mean {near[0]}?' if near else ''}"
                )
        return QuantSpec(**values)

    @staticmethod
    def of(value: QuantSpec | str | Mapping[str, Any], *, granularity: str = "row") -> QuantSpec:
        """A spec from a spec, its short form, or a mapping of its fields."""
        if isinstance(value, QuantSpec):
            return value
        if isinstance(value, str):
            return QuantSpec.parse(value, granularity=granularity)
        if isinstance(value, Mapping):
            known = [f.name for f in fields(QuantSpec)]
            for key in value:
                _one_of("field of a spec", str(key), known)
            return QuantSpec(**{"granularity": granularity, **{str(k): v for k, v in value.items()}})
        raise TypeError(
            f"a spec is a QuantSpec, its short form or a mapping, not {type(value).__name__}: {value!r}"
        )


def _split_format(text: str) -> tuple[str, list[str]]:
    """("int4", ["row", "sr"]) from "int4_row_sr"; format names may hold underscores themselves, and a plug-in's
    ``package.module:Name`` is never split."""
    if ":" in text:
        return text, []
    words = text.split("_")
    for n in range(len(words), 0, -1):
        base = "_".join(words[:n])
        if base in LAYOUTS or base in format_names() or re.fullmatch(POWER_LAW, base):
            return base, re.sub(r"\bfour\0six\b", "four_six", "\0".join(words[n:])).split("\0") if words[
                n:
            ] else []
    near = difflib.get_close_matches(words[0], [*format_names(), *LAYOUTS], n=3)
    raise ValueError(
        f"spec {text!r}: {words[0]!r} is no number format{f'; did you mean {near[0]}?' if near else '.'} Allowed: "
        f"{', '.join([*format_names(), *LAYOUTS])}, as in int4_row or int8_group128_sr"
    )
