"""Adam's moments as they lie in memory: which are quantized, into what, and how they are cut into blocks.

    exp_avg    ~ m_t = b1 m_{t-1} + (1 - b1) g          signed
    exp_avg_sq ~ v_t = b2 v_{t-1} + (1 - b2) g^2        never negative

A parameter of two or more dimensions is seen as the matrix [F, K] = [dim 0, all others together]. Blocks never
cross a row of it and codes share the parameter's dim 0, so that a state cut along dim 0, as sharded training
cuts it, holds exactly the codes and scales of its rows; a scale of the whole tensor is copied to all shards,
and its range is their maximum. Layouts that cross rows otherwise are refused, and under sharding those whose
range is not a maximum (``StateLayout.check_sharded``). Parameters with fewer than two dimensions (norm gains,
biases) stay float32: a block of neighbours would cross rows, and a scale an element would save nothing.

Small tensors and embeddings stay float32, as in "8-bit Optimizers via Block-wise Quantization" (Dettmers et
al., 2021, arXiv 2110.02861).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from qtrain.quant import QTensor, QuantSpec, quantize
from qtrain.quant.formats import CodebookFormat

from . import codec

KINDS = ("exp_avg", "exp_avg_sq")
DEFAULT_GRANULARITY = "group:256"  # blocks of 256 keep the scales at 1/8 bit an element
Rows = slice | EllipsisType


def state_spec(kind: str, value: QuantSpec | str | Mapping[str, Any] | None) -> QuantSpec | None:
    """The spec of one moment from what a config says; None for "none" or None (float32).

    Raises ValueError, naming the value and the remedy, for a format that cannot hold the moment and for a
    layout that cannot be cut along dim 0.
    """
    if value is None or value == "none":
        return None
    try:
        spec = QuantSpec.of(value, granularity=DEFAULT_GRANULARITY)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{kind}: {error}") from None
    if spec.stateful:
        raise ValueError(
            f"{kind} with clip={spec.clip!r}: such a range has a state, which layers hold; use absmax or mse"
        )
    blocks, number_format = spec.blocks, spec.plain_format
    whole_tensor = blocks.rows is None and blocks.columns is None
    if blocks.rows != 1 and not whole_tensor:
        raise ValueError(
            f"{kind} with granularity {spec.granularity!r}: blocks of a state must not cross rows of dim 0, or it could "
            "not be sharded exactly; use row, group:G, block:1xC or tensor"
        )
    if whole_tensor and spec.clip_kind_and_value[0] == "percentile":
        raise ValueError(
            f"{kind} with clip={spec.clip!r} over a whole tensor: a percentile cannot be reduced over shards; use "
            "clip=absmax, or granularity row or group:G"
        )
    if spec.estimator != "ste":
        raise ValueError(
            f"{kind} with estimator={spec.estimator!r}: no gradient passes a state; leave it at ste"
        )
    if kind == "exp_avg" and spec.symmetric and number_format.min >= 0:
        raise ValueError(
            f"exp_avg with format {spec.format!r}: the first moment has a sign and this format none; use dynamic8, "
            "int8, int4, e4m3, or int8 with symmetric=False"
        )
    if kind == "exp_avg_sq" and isinstance(number_format, CodebookFormat) and number_format.min < 0:
        return replace(spec, format=number_format.unsigned().name)
    if kind == "exp_avg_sq" and spec.symmetric and number_format.round(torch.zeros(1)).item() < 0:
        raise ValueError(
            f"exp_avg_sq with format {spec.format!r}: zero would be stored as a negative number, whose root is NaN; use "
            "dynamic8, uint8, uint4, linear4_nozero, int8 or e4m3"
        )
    return spec


@dataclass(frozen=True, kw_only=True)
class AdamStateRecipe:
    """How Adam's moments are stored.

    exp_avg, exp_avg_sq: None or "none" (float32), a QuantSpec, its short form or a mapping of its fields. Where
    a short form or mapping names no granularity it is ``group:256``: ``dynamic8`` is the blockwise dynamic map.
    For exp_avg_sq a signed codebook (``dynamic8``, ``dynamic4``) stands for its unsigned counterpart, as in every
    8-bit Adam; ``int8`` stays the signed linear grid it names, half of whose codes a non-negative moment cannot
    use and whose zero bin breaks training (arXiv 2407.11722); ``uint8`` and ``uint4`` are linear
    with zero, ``linear4_nozero`` without (arXiv 2309.01507). Rounding may be stochastic.
    min_numel: parameters with fewer elements stay float32.
    packed: False keeps the same numbers dequantized, in float32, as papers that only simulate quantized states do
    (arXiv 2407.11722 among them): the training is the same bit for bit, and no memory is saved.

    Raises ValueError as ``state_spec`` does.
    """

    exp_avg: QuantSpec | str | Mapping[str, Any] | None = None
    exp_avg_sq: QuantSpec | str | Mapping[str, Any] | None = None
    min_numel: int = 4096
    packed: bool = True

    def __post_init__(self) -> None:
        for kind in KINDS:
            object.__setattr__(self, kind, state_spec(kind, getattr(self, kind)))
        if isinstance(self.min_numel, bool) or not isinstance(self.min_numel, int) or self.min_numel < 0:
            raise ValueError(
                f"min_numel={self.min_numel!r}: must be a whole number of elements, 0 or more; 4096 is usual"
            )
        if not isinstance(self.packed, bool):
            raise ValueError(f"packed={self.packed!r}: true stores codes, false their float32 values")

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers; ``AdamStateRecipe(**recipe.as_dict()) == recipe``."""
        specs = {kind: getattr(self, kind) for kind in KINDS}
        return {
            **{kind: None if s is None else asdict(s) for kind, s in specs.items()},
            "min_numel": self.min_numel,
            "packed": self.packed,
        }

    def layout(self, kind: str, shape: tuple[int, ...], quantize_states: bool = True) -> StateLayout:
        """How the moment ``kind`` of a parameter of this shape is stored; ``quantize_states=False``: in float32."""
        spec: QuantSpec | None = getattr(self, kind)
        if not quantize_states or len(shape) < 2 or math.prod(shape) < max(self.min_numel, 1):
            spec = None
        return _layout(kind, tuple(shape), spec, self.packed)


@cache
def _layout(kind: str, shape: tuple[int, ...], spec: QuantSpec | None, packed: bool) -> StateLayout:
    return StateLayout(kind, shape, spec, packed)


@dataclass(frozen=True)
class StateLayout:
    """One moment of one parameter: what tensors hold it, and the way in and out.

    kind: "exp_avg" or "exp_avg_sq". shape: the parameter's, or that of a shard's rows (``of_rows``). spec: None for
    float32. packed: see AdamStateRecipe.

    The tensors lie in ``optimizer.state[p]``, as plain tensors under plain names: ``exp_avg`` (float32, the
    parameter's shape), or ``exp_avg.codes`` (uint8, [F, packed bytes]), ``exp_avg.scale`` ([F, nc] or [1, 1]) and,
    where the spec has them, ``exp_avg.zero_point`` and ``exp_avg.tensor_scale``; unpacked ``exp_avg.dequantized``
    (float32, the parameter's shape).
    """

    kind: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    packed: bool = True

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """[F, K] of a quantized state."""
        return self.shape[0], math.prod(self.shape[1:])

    @cached_property
    def by_rows(self) -> bool:
        """Whether any rows can be encoded by themselves: nothing is shared over the tensor."""
        return self.spec is None or (self.spec.blocks.rows == 1 and not self.spec.tensor_scale)

    @cached_property
    def _stored(self) -> QuantSpec:
        """The spec, with ``row`` for blocks as long as a row or longer: the same numbers without padding."""
        assert self.spec is not None, "a float32 state has no blocks"
        columns = self.spec.blocks.columns
        whole_row = columns is not None and columns >= self.matrix[1]
        return replace(self.spec, granularity="row") if whole_row else self.spec

    @cached_property
    def _zero_row(self) -> dict[str, Tensor]:
        row = quantize(torch.zeros(1, self.matrix[1]), codec.without_noise(self._stored))
        if not self.packed:
            return {self._dequantized: codec.decode(row).reshape(1, *self.shape[1:])}
        return {f"{self.kind}.{part}": t for part, t in row.tensors().items()}

    @property
    def _dequantized(self) -> str:
        return f"{self.kind}.dequantized"

    def cut_by_rows(self, key: str) -> bool:
        """Whether this tensor has the parameter's dim 0, so that a shard holds its rows; else all rows share it."""
        if self.spec is None:
            return bool(self.shape)
        return key.endswith((".codes", ".dequantized")) or not (
            key.endswith(".tensor_scale") or self._stored.blocks.rows is None
        )

    def of_rows(self, count: int) -> StateLayout:
        """The layout of so many of the parameter's rows; what is quantized was decided by the whole shape."""
        return _layout(self.kind, (count, *self.shape[1:]), self.spec, self.packed) if self.shape else self

    def check_sharded(self, name: str) -> None:
        """Raises ValueError, naming the parameter, where a shard could not hold exactly what one process would.

        A maximum over a block or over shards is the same number in any order. A sum is not: in rms, gaussian and
        mse its last bits follow the number of rows that are summed in one call, even where the scales are per row.
        """
        if self.spec is None:
            return
        clip = self.spec.clip_kind_and_value[0]
        if clip == "absmax" or (clip == "percentile" and self.by_rows):
            return
        shared = "" if self.by_rows else " and a scale over the whole tensor"
        raise ValueError(
            f"{name} is sharded, and {self.kind} with clip={self.spec.clip!r}{shared} ({self.spec}) would depend on the "
            "number of processes; use clip=absmax"
        )

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """key -> (shape, dtype) of every tensor held."""
        if self.spec is None:
            return {self.kind: (self.shape, torch.float32)}
        return {
            key: ((self.matrix[0], *t.shape[1:]) if self.cut_by_rows(key) else tuple(t.shape), t.dtype)
            for key, t in self._zero_row.items()
        }

    def allocate(self, p: Tensor) -> dict[str, Tensor]:
        """The moment at zero, on p's device (a grid without zero: at its smallest number, below 2^-100)."""
        if self.spec is None:
            return {self.kind: torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)}
        held = {}
        for key, t in self._zero_row.items():
            t = t.expand(self.matrix[0], *t.shape[1:]) if self.cut_by_rows(key) else t
            held[key] = t.to(p.device).contiguous().clone()
        return held

    def read(self, held: Mapping[str, Tensor], rows: Rows = ...) -> Tensor:
        """These rows of the moment: the stored float32 itself (a view), or decoded into [n, *shape[1:]]."""
        if self.spec is None:
            return held[self.kind][rows]
        if not self.packed:
            return held[self._dequantized][rows]
        parts = {
            part: t[rows] if self.cut_by_rows(key) else t
            for part in ("codes", "scale", "zero_point", "tensor_scale")
            if (t := held.get(key := f"{self.kind}.{part}")) is not None
        }
        n = parts["codes"].shape[0]
        q = QTensor(
            parts["codes"],
            parts["scale"],
            parts.get("zero_point"),
            parts.get("tensor_scale"),
            (n, self.matrix[1]),
            self._stored,
        )
        return codec.decode(q).reshape(n, *self.shape[1:])

    def write(
        self,
        held: Mapping[str, Tensor],
        values: Tensor,
        rows: Rows = ...,
        noise: Tensor | None = None,
        over_shards: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Encode ``values`` (what ``read`` returned, updated) into these rows. noise: [n, K] where stochastic.
        over_shards: the elementwise maximum over all shards of a float32 tensor that is not negative; None where
        all rows are here. It is called once, by every shard, where the layout is not ``by_rows``.

        A float32 state needs nothing: its rows were updated in place.
        """
        if self.spec is None:
            return
        if not self.by_rows and rows is not ...:
            raise ValueError(
                f"{self.kind} as {self.spec}: its scale spans the tensor; write all rows at once"
            )
        matrix = values.reshape(-1, self.matrix[1])
        count = matrix.shape[0]
        if over_shards is not None and not self.by_rows:
            matrix = _with_extremes(matrix, over_shards)
            noise = None if noise is None else torch.nn.functional.pad(noise, (0, 0, 0, 2))
        q = codec.encode(matrix, self._stored, noise)
        if not self.packed:
            held[self._dequantized][rows].copy_(codec.decode(q)[:count].reshape(values.shape))
            return
        for part, t in q.tensors().items():
            key = f"{self.kind}.{part}"
            if self.cut_by_rows(key):
                held[key][rows].copy_(t[:count])
            else:
                held[key].copy_(t)

    def describe(self) -> str:
        """For messages, and to compare with a checkpoint: ``float32``, or the spec and how it is held."""
        return "float32" if self.spec is None else described(self.spec, self.packed)


def described(spec: QuantSpec, packed: bool) -> str:
    """All fields of a moment's spec, and how its numbers are held."""
    return repr(spec) if packed else f"{spec!r}, dequantized"


def held_by_rows(layouts: Iterable[StateLayout]) -> dict[str, bool]:
    """key -> ``cut_by_rows`` of every tensor that these moments hold, in a fixed order."""
    return {key: layout.cut_by_rows(key) for layout in layouts for key in layout.expected()}


def _with_extremes(matrix: Tensor, over_shards: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, K] of a shard -> [n + 2, K]: rows that begin with the greatest (or 0) and the least (or 0) number of all
    shards. Quantized with them, the shard gets the scale that the whole tensor would have."""
    ends = matrix.new_zeros(2)
    if matrix.numel():
        ends = torch.clamp(torch.stack([matrix.amax(), -matrix.amin()]), min=0.0)
    highest, lowest = over_shards(ends)
    rows = matrix.new_zeros(2, matrix.shape[1])
    rows[0, 0], rows[1, 0] = highest, -lowest
    return torch.cat([matrix, rows])
