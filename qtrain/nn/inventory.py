"""Inventory: where a model keeps the weights of its GEMMs, and which of them surgery can quantize.

    linear layers    nn.Linear, and Conv1D of Hugging Face's GPT-2, which stores its weight [I, O]
    outside          every other matrix: convolutions, fused experts of a mixture, routers, in_proj_weight, tables

What lies outside is not quantized by anything here, so that a recipe that covers it by its name is refused rather
than followed in part. Embeddings and norms do not count: they are read or multiplied element by element.

O out, I in.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtrain.quant import ModelRecipe

from .linear import QuantizedLayer, conv1d_class

_NO_GEMM = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the model by its (first) dotted name, subclasses included."""
    conv1d = conv1d_class()
    kinds = (nn.Linear, QuantizedLayer) if conv1d is None else (nn.Linear, QuantizedLayer, conv1d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def gathered_layers(model: nn.Module, recipe: ModelRecipe) -> dict[str, str]:
    """{name of the weight: name of the layer} of the linear layers whose weights a low-bit all-gather takes: all but those
    that the recipe excludes, which are meant to stay in high precision, and those that are tied to a table."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight": name
        for name, layer in linear_layers(model).items()
        if uses[id(layer.weight)] == 1
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.exclude)
    }


def outside_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Parameters with two dimensions or more that no linear layer, embedding or norm holds, by their names without
    a final ``.weight``: ``model.layers.0.mlp.experts.down_proj``, ``vision.patch_embedding``."""
    found: dict[str, Tensor] = {}
    linears = linear_layers(model)
    inside = tuple(f"{name}." if name else "" for name in linears)
    for prefix, module in model.named_modules():
        if isinstance(module, _NO_GEMM) or prefix in linears or prefix.startswith(inside):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if sum(size > 1 for size in parameter.shape) > 1:
                found[name.removesuffix(".weight")] = parameter
    return found


def _adapters(model: nn.Module) -> Iterator[str]:
    """Names of the modules in which PEFT has put an adapter around a layer (LoRA and its kin)."""
    for name, module in model.named_modules():
        if "base_layer" in module._modules and any(
            cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__
        ):
            yield name


def why_not(model: nn.Module, name: str, layer: nn.Module) -> str:
    """What keeps a linear layer from being converted, as the end of a sentence that begins with its name; empty
    where nothing does."""
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer) or weight is None:
        return "has a weight that is computed (a parametrization, weight norm or pruning), which is not what it stores"
    if type(layer) not in (nn.Linear, conv1d_class()) and not isinstance(layer, QuantizedLayer):
        return f"is a {type(layer).__name__}, whose own forward a conversion would lose"
    if "forward" in vars(layer):
        return "has a forward of its own set on it (as accelerate's hooks do), which would run instead"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"keeps its weight in a {type(weight.data).__name__}: surgery wants a plain tensor, before any sharding"
    if weight.dtype not in _DTYPES:
        return f"keeps its weight in {weight.dtype}: it is quantized already; load the model in float32 or bfloat16"
    if any(name.startswith(f"{adapter}." if adapter else "") for adapter in _adapters(model)):
        return (
            "belongs to a PEFT adapter, whose parts would be rounded one by one; merge or unload the adapter"
        )
    return ""


def check_not_quantized(model: nn.Module) -> None:
    """Raises ValueError for a model of Hugging Face that was loaded with quantized weights, whatever its layers are
    called (GPTQ's keep codes in buffers, where no parameter shows them)."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is not None or getattr(module, "is_quantized", False):
            raise ValueError(
                f"{name or type(module).__name__} was loaded quantized (its config has a quantization_config); load it "
                "in float32 or bfloat16 and let the recipe quantize it"
            )


def as_patterns(names: list[str]) -> list[str]:
    """Exclusions that cover ``names``, with a wildcard for the number of a layer."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))
