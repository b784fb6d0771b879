"""What the package offers at its door (``qtrain/quant/__init__.py``)."""

from __future__ import annotations

import qtrain.quant
from qtrain.quant import granularity, packing, qtensor, recipe, spec, ste, transforms

HOMES = {
    granularity: ["Granularity"],
    qtensor: [
        "QTensor",
        "Quantized",
        "dequantize",
        "dequantize_values",
        "quantize",
        "quantize_values",
    ],
    recipe: ["DgradRecipe", "FpropRecipe", "LinearRecipe", "ModelRecipe", "Operand", "Rule", "WgradRecipe"],
    packing: ["pack", "unpack"],
    spec: ["QuantSpec"],
    ste: ["fake_quantize"],
    transforms: ["Hadamard", "Transform"],
    qtrain.quant.formats: ["NumberFormat", "get_format"],
}


def test_exports():
    names = [name for listed in HOMES.values() for name in listed]
    assert sorted(qtrain.quant.__all__) == sorted(names)
    for module, listed in HOMES.items():
        for name in listed:
            assert getattr(qtrain.quant, name) is getattr(module, name)
