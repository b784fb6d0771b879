"""The quantization algebra: torch only, no modules, no state.

spec = QuantSpec.parse("int4_group128")
q = quantize(x, spec);  dequantize(q);  q.ledger()["total"]      # bits per element
y = fake_quantize(x, spec)                                       # with a straight-through gradient
"""

from .formats import NumberFormat, get_format
from .granularity import Granularity
from .qtensor import (
    QTensor,
    Quantized,
    dequantize,
    dequantize_values,
    pack,
    quantize,
    quantize_values,
    unpack,
)
from .recipe import DgradRecipe, FpropRecipe, LinearRecipe, ModelRecipe, Operand, Rule, WgradRecipe
from .spec import QuantSpec
from .ste import fake_quantize
from .transforms import Hadamard, Transform

__all__ = [
    "DgradRecipe",
    "FpropRecipe",
    "Granularity",
    "Hadamard",
    "LinearRecipe",
    "ModelRecipe",
    "NumberFormat",
    "Operand",
    "QTensor",
    "QuantSpec",
    "Quantized",
    "Rule",
    "Transform",
    "WgradRecipe",
    "dequantize",
    "dequantize_values",
    "fake_quantize",
    "get_format",
    "pack",
    "quantize",
    "quantize_values",
    "unpack",
]
