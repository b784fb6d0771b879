"""QuantizedLinear: an nn.Linear (and QuantizedConv1D: a Conv1D) whose three GEMMs follow a LinearRecipe.

It stays an nn.Linear: same parameters, same checkpoint keys (but for ranges with a state: ``quantizers``), and, where
its recipe quantizes nothing, the same code. A module rather than a tensor subclass, so that optimizers, sharding and
compile see ordinary tensors. What it computes is in ``simulated`` and ``native``.

I in, O out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from qtrain_kernels.counter_hash import stream_id
from torch import Tensor, nn

from qtrain.quant import LinearRecipe

from .clock import Clock, Draws
from .native import NativeLinear
from .native_ops import NativeSteps, missing_on
from .prologue import Prologue
from .quantizers import NO_STATES, LearnedStep, Quantizers, check_ranges
from .shared_codes import SharedCodes
from .simulated import SimulatedGemms, SimulatedLinear


class QuantizedLayer(nn.Module):
    """A linear layer with a recipe. Made in place by ``apply_recipe``; ``name`` is its dotted name in the model and
    names its random bits. ``plain``: the class that it was. ``stores_transposed``: whether its weight is [I, O].
    ``native``: whether its GEMMs run on codes (``nn.native``) or are simulated. ``prologue``: the function that it owns
    of what it reads, or None. ``shared``: the model's codes at hand. ``steps``: what a native one read off its recipe."""

    stores_transposed = False
    weight: Tensor
    bias: Any  # a parameter, or None
    recipe: LinearRecipe
    clock: Clock
    name: str
    stream: int
    native: bool
    prologue: Prologue | None
    shared: SharedCodes | None
    steps: NativeSteps | None
    plain: type[nn.Module]
    quantizers: Quantizers | None

    @staticmethod
    def check(layer: nn.Module, recipe: LinearRecipe, name: str) -> None:
        """Raises TypeError for a subclass of nn.Linear or Conv1D, whose own forward would be lost, and ValueError
        for a transform that does not divide the layer's widths and for a range with a state that it cannot hold."""
        if not isinstance(layer, QuantizedLayer) and type(layer) not in (nn.Linear, conv1d_class()):
            raise TypeError(
                f"{name} is a {type(layer).__name__}, whose own forward a conversion would lose; only nn.Linear and "
                f"Hugging Face's Conv1D are converted: add {name!r} to the recipe's exclude"
            )
        out_features, in_features = k_major(layer).shape
        for gemm, contraction in (("fprop", in_features), ("dgrad", out_features)):
            transform = getattr(recipe, gemm).transform
            if transform is not None:
                transform.check(contraction, f"{name} ({gemm})")
        check_ranges(recipe, name, k_major(layer))

    @staticmethod
    def convert(
        layer: nn.Module,
        recipe: LinearRecipe,
        *,
        name: str,
        clock: Clock,
        native: bool = False,
        prologue: Prologue | None = None,
        shared: SharedCodes | None = None,
    ) -> QuantizedLayer:
        """Turn ``layer`` itself into a quantized one: parameters, hooks and every reference to it survive. Raises as
        ``check`` does."""
        QuantizedLayer.check(layer, recipe, name)
        if not isinstance(layer, QuantizedLayer):
            plain = type(layer)
            layer.__class__ = QuantizedLinear if plain is nn.Linear else QuantizedConv1D
            assert isinstance(layer, QuantizedLayer)
            layer.plain = plain
        layer._modules.pop("quantizers", None)
        layer.recipe, layer.clock, layer.name = recipe, clock, name
        layer.stream, layer.native = stream_id(name), native
        layer.prologue, layer.shared = prologue, shared
        layer.steps = NativeSteps.of(recipe) if native else None
        quantizers = Quantizers(recipe, k_major(layer))
        layer.quantizers = quantizers if len(quantizers) else None
        clock.follow(layer.weight.device)
        return layer

    def revert(self) -> None:
        """Back to the plain layer, in place."""
        plain = self.plain
        own = ("recipe", "clock", "name", "stream", "native", "prologue", "shared", "steps")
        for attribute in (*own, "quantizers", "plain"):
            delattr(self, attribute)
        self.__class__ = plain  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)
        self.clock.follow(self.weight.device)
        return self

    def _learned(self) -> dict[str, LearnedStep]:
        held = {} if self.quantizers is None else self.quantizers.by_operand()
        return {operand: q for operand, q in held.items() if isinstance(q, LearnedStep)}

    @property
    def steps_begun(self) -> bool:
        """Whether no learned step waits for ``start_steps``."""
        return all(q.ready for q in self._learned().values())

    def _native_steps(self, device: str) -> NativeSteps:
        """Of the recipe that it has now. Raises RuntimeError on a device without the kernels."""
        if self.steps is None or self.steps.recipe is not self.recipe:
            self.steps = NativeSteps.of(self.recipe)
        if device not in self.steps.devices:
            missing = missing_on(device, self.recipe)
            raise RuntimeError(f"{self.name}: compute=native: {missing}; pass recipe.compute=simulated")
        return self.steps

    def read(self, input: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x [..., I] of what the layer is called with: (h, up), h or x itself."""
        h, up = input if isinstance(input, tuple) else (input, None)
        return h if self.prologue is None else self.prologue.value(h, up)

    @torch.no_grad()
    def start_steps(self, input: Tensor | tuple[Tensor, Tensor]) -> None:
        """Begins the learned steps that have not: of the weight, and of the input from ``input`` [..., I]."""
        input = self.read(input)
        gemms = SimulatedGemms(self.recipe, Draws(self.clock.counters, self.stream), torch.float32, {}, {})
        sources = {
            "fprop.input": input.reshape(-1, input.shape[-1]),
            "fprop.weight": k_major(self).contiguous(),
        }
        for operand, quantizer in self._learned().items():
            if not quantizer.ready:
                quantizer.start(gemms.transformed(sources[operand], "fprop"))

    def extra_repr(self) -> str:
        quantized = ", ".join(f"{k}={v}" for k, v in self.recipe.operands().items() if v is not None)
        native = ", native" if self.native else ""
        owned = "" if self.prologue is None else f", of {self.prologue.function}"
        return f"{super().extra_repr()}, {quantized or 'high precision'}{native}{owned}"

    def forward(self, input: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """input: [..., I] -> [..., O], in autocast's dtype where it is on; with a prologue h or (gate, up). Raises TypeError for float16, whose
        range the products of codes leave, and ValueError for a number of tokens that the transform of wgrad does
        not divide."""
        if not self.recipe.quantizes:
            return self.plain.forward(self, self.read(input))
        input, up = input if isinstance(input, tuple) else (input, None)
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"{self.name}: compute dtype {dtype}; quantized layers compute in bfloat16 or float32"
            )
        trains = torch.is_grad_enabled() and (self.weight.requires_grad or bool(self._learned()))
        if trains and self.recipe.wgrad.transform is not None:
            tokens = input.numel() // input.shape[-1]
            self.recipe.wgrad.transform.check(tokens, f"{self.name} (wgrad, over tokens)")
        # Without draws the layers of a recipe are one function, which is compiled once for blocks that are alike
        counters, stream = (self.clock.counters, self.stream) if self.recipe.stochastic else (None, 0)
        weight = k_major(self)
        if self.native:
            shared = None if torch.compiler.is_compiling() else self.shared
            steps, prologue = self._native_steps(device), self.prologue
            return NativeLinear.apply(
                input, up, weight, self.bias, counters, steps, stream, dtype, trains, prologue, shared
            )
        arguments = (input, up, weight, self.bias, counters, self.recipe, stream, dtype, trains)
        states = NO_STATES
        if self.quantizers is not None:
            self.quantizers.check_ready(self.name, trains=trains)
            states = self.quantizers.flat()
        return SimulatedLinear.apply(*arguments, self.prologue, *states)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """An nn.Linear with a recipe."""


class QuantizedConv1D(QuantizedLayer):
    """A Conv1D of Hugging Face's GPT-2 with a recipe. Its weight stays stored as [I, O]; specs refer to [O, I], as
    those of an nn.Linear do."""

    stores_transposed = True


def conv1d_class() -> type[nn.Module] | None:
    """Conv1D of Hugging Face, if somebody has imported it: a model that has one has."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def k_major(layer: nn.Module, matrix: Tensor | None = None) -> Tensor:
    """The weight of a linear layer, or a tensor of its shape such as the gradient, as GEMMs read it: [O, I], a view of
    what is stored."""
    stored = layer.weight if matrix is None else matrix
    assert isinstance(stored, Tensor)
    if isinstance(layer, QuantizedLayer):
        return stored.t() if layer.stores_transposed else stored
    return stored if isinstance(layer, nn.Linear) else stored.t()
