"""Which ops multiply and quantize natively, which recipes they serve, and on which devices.

    kind    codes                        quantized by                  multiplied by
    int8    int8                         quantize_rows_columns         int8_scaled_mm

An operand has one kind, both operands of a GEMM the same one. A device runs a kind where both of its ops have a kernel for
it: their references would run anywhere, and would be neither fast nor what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.op import Op
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns

from qtrain.quant import LinearRecipe, QuantSpec
from qtrain.quant.formats.integer import IntegerFormat
from qtrain.quant.ranges import MIN_SCALE

OPERANDS: Mapping[str, tuple[str, str]] = {
    "fprop": ("fprop.input", "fprop.weight"),
    "dgrad": ("dgrad.grad_output", "dgrad.weight"),
    "wgrad": ("wgrad.grad_output", "wgrad.input"),
}


@dataclass(frozen=True)
class Kind:
    """Codes of one kind of number: what makes and what multiplies them."""

    name: str
    quantize: Op[..., Any]
    multiply: Op[..., Any]


KINDS = {"int8": Kind("int8", quantize_rows_columns, int8_scaled_mm)}


def kind_of(spec: QuantSpec) -> str | None:
    """Of the codes of an operand; None for a format that no GEMM here multiplies."""
    number_format = spec.number_format
    if spec.symmetric and isinstance(number_format, IntegerFormat) and number_format.signed:
        return "int8"
    return None


def kinds_of(recipe: LinearRecipe) -> list[str]:
    """Of all of its operands, in the order of ``KINDS``."""
    specs = (recipe.resolved(name) for names in OPERANDS.values() for name in names)
    found = {kind_of(spec) for spec in specs if spec is not None}
    return [name for name in KINDS if name in found]


def obstacles(recipe: LinearRecipe) -> list[str]:
    """What keeps the GEMMs of this recipe from running natively, a sentence each with its remedy; empty if nothing."""
    found = []
    for gemm, names in OPERANDS.items():
        if getattr(recipe, gemm).transform is not None:
            found.append(
                f"{gemm}.transform={getattr(recipe, gemm).transform}: write none, or compute=simulated"
            )
        specs = {name: recipe.resolved(name) for name in names}
        for name, spec in specs.items():
            if spec is None and any(specs.values()):
                found.append(f"{name}=none beside a quantized operand: write int8_row there, or none in both")
            elif spec is not None and (problem := _unsupported(spec)):
                found.append(f"{name}={spec}: {problem}")
    return found


def _unsupported(spec: QuantSpec) -> str:
    if kind_of(spec) is None:
        return "the GEMM multiplies symmetric integers, int2 ... int8; write int8_row"
    if spec.granularity not in ("row", "tensor"):
        return f"{spec.granularity} scales do not fold out of a GEMM; write {spec.format}_row or {spec.format}_tensor"
    if spec.clip != "absmax":
        return f"clip={spec.clip}: the kernel takes absmax"
    if spec.estimator != "ste":
        return f"estimator={spec.estimator}: the native path has ste"
    if spec.scale_format != "float32" or spec.tensor_scale or spec.min_scale != MIN_SCALE:
        return "the kernel has float32 scales, of at least 2^-100"
    return ""


def runs_natively(recipe: LinearRecipe, gemm: str) -> bool:
    """Whether that GEMM of a native layer multiplies codes; else both of its operands are in high precision."""
    return recipe.resolved(OPERANDS[gemm][0]) is not None


_references_run = False
"""Whether devices without a kernel may run the references: for tests alone."""


@contextmanager
def references_run() -> Iterator[None]:
    """Native layers compute with the references of their ops where a device has no kernel: slow, for tests."""
    global _references_run
    kept, _references_run = _references_run, True
    try:
        yield
    finally:
        _references_run = kept


def missing_on(device: str, recipe: LinearRecipe) -> str:
    """Which kernels of the recipe's kinds that type of device lacks; empty where it has them all."""
    if _references_run:
        return ""
    for name in kinds_of(recipe):
        for op in (KINDS[name].quantize, KINDS[name].multiply):
            if device not in op.kernels:
                there = ", ".join(sorted(op.kernels)) or "no device"
                return f"{name} on {device} has no kernel of {op.name} (there is one for {there})"
    return ""


def kinds_on(device: str) -> list[str]:
    """The kinds that this type of device has kernels for."""
    return [
        name
        for name, kind in KINDS.items()
        if device in kind.quantize.kernels and device in kind.multiply.kernels
    ]
