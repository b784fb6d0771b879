"""Which ops multiply and quantize natively, which recipes they serve, and on which devices.

    kind    formats        codes                             quantized by                  multiplied by
    int8    int2 ... int8  int8                              quantize_rows_columns         int8_scaled_mm
    fp8     e4m3, e5m2     float8_e4m3fn, float8_e5m2        quantize_fp8_rows_columns     fp8_scaled_mm

Both operands of a GEMM have one kind; e5m2 goes with e4m3 only (no library or tensor core path multiplies two of e5m2). A
device runs a kind where both of its ops have a kernel for
it: their references would run anywhere, and would be neither fast nor what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from qtrain_kernels.fp8_scaled_mm import fp8_scaled_mm
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.op import DEVICES, Op
from qtrain_kernels.quantize_fp8_rows_columns import quantize_fp8_rows_columns
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import Tensor

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
    """Codes of one kind of number: what makes and what multiplies them. exact: whether its sums are, so that every device
    gives the same bits."""

    name: str
    quantize: Op[..., Any]
    multiply: Op[..., Any]
    exact: bool


KINDS = {
    "int8": Kind("int8", quantize_rows_columns, int8_scaled_mm, exact=True),
    "fp8": Kind("fp8", quantize_fp8_rows_columns, fp8_scaled_mm, exact=False),
}
FP8_FORMATS = ("e4m3", "e5m2")


def kind_of(spec: QuantSpec) -> str | None:
    """Of the codes of an operand; None for a format that no GEMM here multiplies."""
    number_format = spec.number_format
    if spec.symmetric and isinstance(number_format, IntegerFormat) and number_format.signed:
        return "int8"
    return "fp8" if spec.format in FP8_FORMATS else None


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
        found += _mismatch(gemm, [spec for spec in specs.values() if spec is not None])
    return found


def _mismatch(gemm: str, specs: list[QuantSpec]) -> list[str]:
    """What keeps two operands, each of which could be multiplied, from being multiplied with each other."""
    formats = " with ".join(spec.format for spec in specs)
    kinds = {kind_of(spec) for spec in specs} - {None}
    if len(kinds) > 1:
        return [f"{gemm} multiplies {formats}: write two integers, or two of {', '.join(FP8_FORMATS)}"]
    if len(specs) == 2 and all(spec.format == "e5m2" for spec in specs):
        return [f"{gemm} multiplies {formats}, which no GEMM does: write e4m3 for one of them"]
    return []


def _unsupported(spec: QuantSpec) -> str:
    if kind_of(spec) is None:
        return (
            "the GEMMs multiply symmetric integers, int2 ... int8, e4m3 and e5m2; write int8_row or e4m3_row"
        )
    if spec.granularity not in ("row", "tensor"):
        return f"{spec.granularity} scales do not fold out of a GEMM; write {spec.format}_row or {spec.format}_tensor"
    if spec.clip != "absmax":
        return f"clip={spec.clip}: the kernel takes absmax"
    if spec.estimator != "ste":
        return f"estimator={spec.estimator}: the native path has ste"
    if spec.scale_format != "float32" or spec.tensor_scale or spec.min_scale != MIN_SCALE:
        return "the kernel has float32 scales, of at least 2^-100"
    return ""


@dataclass(frozen=True)
class OperandSteps:
    """How one operand is quantized, as arguments of its op."""

    kind: str
    grid: int | str
    stochastic: bool
    per_tensor: bool
    spec: QuantSpec

    def nothing(self, *, again: bool) -> tuple[int | str, bool, bool, int, None]:
        """The op's arguments for the copy that isn't wanted. again: in the backward, what the forward quantized. The
        stream, which draws nothing here, then tells the two calls apart: a compiler would merge them, and keep codes that
        are made again in order not to be kept."""
        return (0 if self.kind == "int8" else "", False, False, int(again), None)


@dataclass(frozen=True, eq=False)
class NativeSteps:
    """What a native layer reads off its recipe, once: at small shapes the time of a layer is that of its Python.

    operands: those that are quantized. fprop, dgrad, wgrad: whether that GEMM multiplies codes; else both of its operands
    are in high precision. keeps_codes: of the input, for the backward. own_input: whether wgrad quantizes it for itself.
    devices: the types that have kernels for it.
    """

    recipe: LinearRecipe
    operands: Mapping[str, OperandSteps]
    fprop: bool
    dgrad: bool
    wgrad: bool
    reuses_weight: bool
    reuses_input: bool
    keeps_codes: bool
    own_input: bool
    plain_wgrad: bool
    devices: tuple[str, ...]

    @staticmethod
    def of(recipe: LinearRecipe) -> NativeSteps:
        """Of a recipe without ``obstacles``."""
        operands = {}
        for name in recipe.operands():
            spec = recipe.resolved(name)
            if spec is not None:
                kind = kind_of(spec)
                assert kind is not None, f"{name}={spec} has no native path"
                grid = int(spec.number_format.max) if kind == "int8" else spec.format
                operands[name] = OperandSteps(kind, grid, spec.stochastic, spec.granularity == "tensor", spec)
        return NativeSteps(
            recipe,
            operands,
            fprop=runs_natively(recipe, "fprop"),
            dgrad=runs_natively(recipe, "dgrad"),
            wgrad=runs_natively(recipe, "wgrad"),
            reuses_weight=recipe.dgrad.weight == "fprop",
            reuses_input=recipe.wgrad.input == "fprop",
            keeps_codes=recipe.saved == "quantized",
            own_input=recipe.saved == "quantized" and recipe.wgrad.input != "fprop",
            plain_wgrad=recipe.wgrad.input is None,
            devices=tuple(device for device in DEVICES if not missing_on(device, recipe)),
        )


def run(op: Any, x: Tensor, *args: Any) -> Any:
    """``op(x, *args)``, without the dispatcher where nobody looks: its way through Python takes longer than a small
    kernel. Counted all the same; a dispatch mode (the census), a compiler, a subclass of tensors or another current device
    see the op."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(op, Op)
        or torch._C._len_torch_dispatch_stack()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or (device := x.device).type not in op.kernels
        or (device.type == "cuda" and device.index != torch.cuda.current_device())
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return op(x, *args)
    result = op.kernel(device.type)(x, *args)
    op.executions[device.type] += 1
    return result


_ZEROS: dict[torch.device, Tensor] = {}


def no_counters(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seed, step and row offset where nothing is drawn."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return zero, zero, zero
    zero = _ZEROS.get(device)  # type: ignore[assignment]
    if zero is None:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        if (
            device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        ):  # a graph's memory is its own
            _ZEROS[device] = zero
    return zero, zero, zero


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
