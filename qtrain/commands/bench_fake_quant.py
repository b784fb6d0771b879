"""Fake quantization as it is usually written, for the benchmark: quantize-dequantize around F.linear, eager, W8A8G8.

The formulation of "Exploring Quantization for Efficient Pre-Training of Transformer Language Models" (arXiv
2407.11722): W per output channel, x per token, and g per token for dW only. Its operations are in place where they can
be, its estimator is one autograd.Function, and it leaves out what the recipes add (non-finite values, zero rows but for
a floor), so that it is no slower than its authors would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def fake_quantize_linears(model: nn.Module, exclude: Sequence[str]) -> None:
    """Gives every nn.Linear, those named in ``exclude`` aside, an eager W8A8G8 forward."""
    import types

    from torch import nn

    forward = _fake_quant_forward()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in exclude:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def quantize_dequantize(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> its nearest numbers on 255 levels, one scale a row: round(x / s) s with s = max|x| / 127."""
    scale = x.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-12)
    return x.div(scale).round_().clamp_(-127, 127).mul_(scale)


def _fake_quant_forward() -> Callable[..., Any]:
    import torch
    import torch.nn.functional as F

    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return quantize_dequantize(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    class Linear(torch.autograd.Function):
        """y = x W^T; dx from g, dW from the quantized g."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            g = grads[0]
            gq = quantize_dequantize(g)
            return g @ weight, gq.flatten(0, -2).t() @ x.flatten(0, -2)

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        xq, wq = StraightThrough.apply(x), StraightThrough.apply(self.weight)
        with torch.autocast(kind, enabled=False):
            y = Linear.apply(xq.to(dtype), wq.to(dtype))
        return y if self.bias is None else y + self.bias.to(dtype)

    return forward
