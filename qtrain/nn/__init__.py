"""Quantized layers for any nn.Module.

report = apply_recipe(model, ModelRecipe(linear=...))     # in place, before the optimizer
census = take_census(model, report, probe)                # what really ran
census.check()
"""

from .census import Census, CensusError, take_census
from .clock import Clock
from .compiled import CompiledComparison, compare_compiled
from .linear import QuantizedConv1D, QuantizedLayer, QuantizedLinear
from .quantizers import advance_ranges, follow_optimizer, start_steps
from .surgery import LayerReport, SurgeryReport, apply_recipe

__all__ = [
    "Census",
    "CensusError",
    "Clock",
    "CompiledComparison",
    "LayerReport",
    "QuantizedConv1D",
    "QuantizedLayer",
    "QuantizedLinear",
    "SurgeryReport",
    "advance_ranges",
    "apply_recipe",
    "compare_compiled",
    "follow_optimizer",
    "start_steps",
    "take_census",
]
