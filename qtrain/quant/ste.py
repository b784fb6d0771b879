"""fake_quantize: quantize, dequantize, and a gradient although rounding has none.

    ste      dL/dx = dL/dq                                           (Bengio et al., 2013, arXiv 1308.3432)
    clipped  dL/dx = dL/dq * 1[x within the range]                   (as in PACT and LSQ)
    trust    dL/dx = dL/dq * 1[|q - x| <= half the widest step]      (QuEST, arXiv 2502.05003, section 3.2)

Layers do not use this function: they need the codes of each GEMM apart from their scales (``qtrain.nn.linear``).
It is for everything else that must feel quantization: caches, embeddings, experiments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .qtensor import _as_matrix, dequantize_values, quantize_values
from .spec import QuantSpec


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QuantSpec, noise: Tensor | None) -> Tensor:
        q = quantize_values(_as_matrix(x), spec, None if noise is None else _as_matrix(noise))
        ctx.save_for_backward(*([] if q.inside is None else [q.inside]))
        return dequantize_values(q.values, q.scale, spec).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if ctx.saved_tensors:
            (inside,) = ctx.saved_tensors
            grad = torch.where(inside.reshape(grad.shape), grad, 0.0)
        return grad, None, None


def fake_quantize(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> Tensor:
    """x [..., K] -> the nearest (or stochastically rounded) numbers that ``spec`` can store, in x's shape and
    dtype, with the gradient of ``spec.estimator``. noise: see ``quantize_values``."""
    return _FakeQuantize.apply(x, spec, noise)
