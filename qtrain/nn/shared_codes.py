"""The codes of an activation that several layers read (q, k and v; gate and up): made once, kept once.

Each of these layers quantizes the same tensor in the same way. In bf16 they would save one tensor between them; three
sets of int8 codes would be more than that. So the codes of the last tensor that was quantized are at hand as long as
that tensor lives, and the layer behind takes them where everything that makes their bits is the same: the tensor, its
version, its place in memory, and the specs. Operands that round stochastically draw bits of their own in each layer and
are not shared.

A version does not tell of every write: collectives, numpy, the replay of a CUDA graph and kernels of others leave it. So a
reader gets the same codes once. One that asks again begins another passage, whose codes are made anew.

Compiled code needs none of this: the same op on the same tensor is one node of its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from qtrain.quant import QuantSpec

T = TypeVar("T")


class SharedCodes:
    """Of one model, for the tensor that one of its layers quantized last."""

    def __init__(self) -> None:
        self._forget(None)

    def _forget(self, _: object) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[object, ...] = ()
        self._codes: object = None
        self._readers: set[object] = set()

    def __reduce__(self) -> tuple[type[SharedCodes], tuple[()]]:
        """A copy of a model begins with none."""
        return SharedCodes, ()

    def of(self, x: Tensor, specs: tuple[QuantSpec | None, ...], make: Callable[[], T], reader: object) -> T:
        """``make()``, the codes of x [R, C] by these specs, or what it gave another reader for the same tensor before.
        reader: hashable, one a layer and passage (forward, backward)."""
        # What a CUDA graph replays must be in it, whatever is captured apart
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if captured or x.is_inference() or any(spec is not None and spec.stochastic for spec in specs):
            return make()
        # A view is of the same numbers as its base and shares its version; the base lives as long as the numbers do
        tensor = x if x._base is None else x._base
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # work on another may not be done
        key = (tensor._version, x.data_ptr(), x.shape, x.stride(), x.dtype, specs, stream)
        if self._tensor() is tensor and self._key == key and reader not in self._readers:
            self._readers.add(reader)
            return self._codes  # type: ignore[return-value]
        codes = make()
        self._tensor, self._key, self._codes = weakref.ref(tensor, self._gone), key, codes
        self._readers = {reader}
        return codes

    def _gone(self, reference: object) -> None:
        if self._tensor is reference:
            self._forget(None)
