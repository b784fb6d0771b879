"""What quantization does to every layer at one moment, from one probe step: no part of training, and no trace in it.

Operands are those of the oracle, at the moment's weights, ranges and random bits, which the census proves to be what the
GEMMs multiply; ``y``, ``dx`` and ``dW`` are what the layer gave out, against products of what entered it in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtrain.nn.census import named_layers
from qtrain.nn.clock import Draws
from qtrain.nn.linear import QuantizedLayer
from qtrain.nn.oracle import OracleOperand, linear_oracle
from qtrain.nn.probe import Call, LayerProbe
from qtrain.quant import LinearRecipe, dequantize_values

from . import tensor_statistics as of

# The leading directions of a transformer's activations are a handful (arXiv 2509.00404)
TOP = 8
# The three tensors of a layer, where they enter a GEMM first
TENSORS = ("fprop.input", "fprop.weight", "dgrad.grad_output")
Statistics = dict[str, dict[str, float]]


def as_stored(operand: OracleOperand) -> tuple[Tensor, Tensor]:
    """(source, dequantized), in the layout that the operand's spec tiles."""
    assert operand.spec is not None
    assert operand.scale is not None
    source = operand.source.t() if operand.transposed else operand.source
    return source, dequantize_values(operand.values, operand.scale, operand.spec)


def operand_statistics(operand: OracleOperand) -> dict[str, float]:
    """Of one quantized operand."""
    source, dequantized = as_stored(operand)
    assert operand.spec is not None
    assert operand.scale is not None
    return {
        "sqnr_db": of.sqnr_db(source, dequantized),
        "clipped": of.clipped(source, operand.scale, operand.zero_point, operand.spec),
        "underflow": of.underflow(source, dequantized),
        "saturated": of.saturated(operand.values, operand.zero_point, operand.spec),
    }


def outlier_statistics(source: Tensor) -> dict[str, float]:
    """Of a tensor before it is quantized."""
    return {
        "kurtosis": of.kurtosis(source),
        "max_over_p999": of.max_over_p999(source),
        f"top{TOP}_share": of.top_share(source, TOP),
    }


def codes_of(operand: OracleOperand) -> Tensor:
    """Its grid values with their zero point, in the layout that the spec tiles: equal where the codes are."""
    assert operand.spec is not None
    if operand.zero_point is None:
        return operand.values
    rows, columns = operand.values.shape
    return operand.values + operand.spec.blocks.expand(operand.zero_point, (rows, columns))


def grid_counts(operand: OracleOperand, bins: int = 64) -> tuple[Tensor, Tensor]:
    """(how many codes lie in each of ``bins`` equal parts of the grid [bins], their edges [bins + 1]), float32 on the
    CPU; fewer bins where the format has fewer codes."""
    assert operand.spec is not None
    grid = operand.spec.number_format
    bins = min(bins, 2**grid.bits)
    counts = torch.histc(codes_of(operand).to(torch.float32).nan_to_num(), bins, min=grid.min, max=grid.max)
    return counts.cpu(), torch.linspace(grid.min, grid.max, bins + 1)


def _call(probe: LayerProbe) -> Call | None:
    """The first passage that was whole: a layer that is run twice is looked at once."""
    return next((c for c in probe.calls if "y" in c.edges and "g" in c.edges), None)


def layer_statistics(
    name: str, layer: QuantizedLayer, recipe: LinearRecipe, probe: LayerProbe
) -> tuple[Statistics, dict[str, OracleOperand]]:
    """({"<name>/<gemm>.<operand>" or "<name>/y": {metric: value}}, the quantized operands by name); empty of a layer
    that did not run forward and backward."""
    call = _call(probe)
    if call is None:
        return {}, {}
    x, weight, y, g = (call.matrix(edge) for edge in ("x", "weight", "y", "g"))
    assert x is not None
    assert weight is not None
    assert y is not None
    assert g is not None
    gemms = linear_oracle(recipe, Draws(call.counters, layer.stream), x, weight, g, call.given)
    found: Statistics = {}
    operands: dict[str, OracleOperand] = {}
    for gemm in gemms.values():
        for which, operand in zip(gemm.names, (gemm.a, gemm.b), strict=True):
            numbers = {} if operand.spec is None else operand_statistics(operand)
            if operand.spec is not None:
                operands[f"{name}/{which}"] = operand
            if which in TENSORS:
                numbers |= outlier_statistics(operand.source)
            if numbers:
                found[f"{name}/{which}"] = numbers
    bias = call.matrix("bias")
    found[f"{name}/y"] = {"sqnr_db": of.sqnr_db(x @ weight.t(), y if bias is None else y - bias)}
    for result, exact in (("dx", g @ weight), ("dW", g.t() @ x)):
        seen = call.matrix(result)
        if seen is None:
            continue
        found[f"{name}/{result}"] = {
            "sqnr_db": of.sqnr_db(exact, seen),
            "cosine": of.cosine(seen, exact),
            "alignment": of.alignment(seen, exact),
        }
        if result == "dW":
            found[f"{name}/dW"]["noise_floor"] = of.noise_floor(seen, exact)
    return found, operands


@torch.no_grad()
def weight_operand(layer: QuantizedLayer, weight: Tensor) -> OracleOperand:
    """A weight [O, I] as fprop reads it now, whichever weight it is: with the layer's ranges and the bits of this
    moment, so that two weights differ by the weights alone."""
    draws = Draws(layer.clock.counters, layer.stream)
    given = {} if layer.quantizers is None else layer.quantizers.given()
    row = weight.new_zeros(1, weight.shape[1])
    return linear_oracle(layer.recipe, draws, row, weight, given=given)["fprop"].b


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those that quantize, by the names that surgery gave them."""
    layers = named_layers(model).items()
    return {name: m for name, m in layers if isinstance(m, QuantizedLayer) and m.recipe.quantizes}
