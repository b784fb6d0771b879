"""A model that weighs nothing: on the meta device for its shapes, on fake tensors of the CPU to be run.

Surgery wants plain tensors and ours are fake only afterwards; native layers compute whatever kernels this machine has. ``AsOnGpu``
has what a GPU's kernels do otherwise.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from qtrain.nn.linear import QuantizedLayer
from qtrain.nn.shared_codes import SharedCodes
from qtrain.nn.surgery import SurgeryReport, apply_recipe
from qtrain.quant import ModelRecipe


def meta_model(config: Any, recipe: ModelRecipe) -> tuple[nn.Module, SurgeryReport]:
    """The model of a ``ModelConfig`` on the meta device, after surgery. Raises as ``apply_recipe`` does."""
    with torch.device("meta"):
        model = config.build(seed=0, pretrained=False)
    for parameter in model.parameters():
        assert parameter.is_meta, "the model made real parameters on the meta device"
    return model, apply_recipe(model, recipe, device="meta")


def to_fake(model: nn.Module) -> None:
    """Parameters and buffers of a meta model as fake ones of the CPU, tied ones still tied, in place; inside of
    ``fake_mode``. Native layers compute whatever kernels this machine has."""
    tied = [(module, key, id(p)) for module in model.modules() for key, p in module._parameters.items()]
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
    first: dict[int, Any] = {}
    for module, key, identity in tied:
        if module._parameters[key] is not None:
            module._parameters[key] = first.setdefault(identity, module._parameters[key])
    shared = _SharedOnce()
    for layer in model.modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        if layer.steps is not None:
            layer.steps = dataclasses.replace(layer.steps, devices=("cpu",))
        layer.shared = shared if layer.shared is not None else None
        for quantizer in () if layer.quantizers is None else layer.quantizers.by_operand().values():
            if hasattr(quantizer, "ready"):
                quantizer.ready = True  # a learned step begins with the run; its bytes are the same


class _SharedOnce(SharedCodes):
    """Fake parameters have no address to tell readers by, and each reads once here."""

    def of(self, x: Tensor, specs: Any, make: Callable[[], Any], reader: object) -> Any:
        return super().of(x, specs, make, object())


class _FusedRMSNorm(torch.autograd.Function):
    """What the kernel of a GPU keeps and moves: x and a number a row; the values are nobody's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, rstd = torch.empty_like(x).copy_(x), x.new_empty(*x.shape[:-1], 1)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return grads[0] + x, torch.empty_like(weight)


class AsOnGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            x, _, weight = args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("weight")
            if weight is not None:
                return _FusedRMSNorm.apply(x, weight)
        if (
            func is F.scaled_dot_product_attention
        ):  # the CPU's fused kernel has no dropout; a GPU's draws it anew in the backward
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs = {**(kwargs or {}), **({"dropout_p": 0.0} if len(args) <= 4 else {})}
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Tensors that are made in it are fake. Codes that siblings share ask them for addresses, which they have none of."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield mode
