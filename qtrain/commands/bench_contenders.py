"""What is timed beside what on a GPU: how each library turns the linear layers of a model to low precision, in place.

    bf16                     nn.Linear as it is, eager
    bf16_compiled            the same under torch.compile
    native_int8              W8A8G8 on int8 codes, the backward reuses the forward's codes; int8 saved
    native_int8_requantized  W and x quantized anew for the backward, each along its own contraction; int8 saved
    native_fp8               e4m3 with a scale a row of every operand, quantized anew for each GEMM; e4m3 saved
    native_fp8_tensorwise    e4m3 with one scale a tensor, the backward reuses the forward's codes; e4m3 saved
    simulated                W8A8G8 by bf16 GEMMs on values of the int8 grid, compiled
    torchao_int8             Int8MixedPrecisionTrainingConfig(module_swap=True), compiled; without module_swap its
                             quantize_ leaves every GEMM in high precision
    torchao_fp8_rowwise      convert_to_float8_training with the recipe of that name, compiled
    torchao_fp8_tensorwise   the same with the default recipe, compiled

The ops of native layers are opaque to a compiler: alone they are timed eagerly, in a whole model (``bench train``) compiled with it.
A contender that cannot run is in the tables, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qtrain.nn.clock import Clock


@dataclass(frozen=True)
class Contender:
    """convert(model, names of layers that stay, seed): in place; the clock of its random bits where it has one.
    compiled: whether one layer of it is timed under torch.compile. bits: of the operands of its GEMMs."""

    convert: Callable[[nn.Module, Sequence[str], int], Clock | None]
    compiled: bool
    bits: int


def _unchanged(model: nn.Module, exclude: Sequence[str], seed: int) -> None:
    return None


def _ours(compute: str, spec: str, *, reuse: bool, saved: str) -> Callable[..., Clock | None]:
    def convert(model: nn.Module, exclude: Sequence[str], seed: int) -> Clock:
        from qtrain.nn.surgery import apply_recipe
        from qtrain.quant import LinearRecipe, ModelRecipe

        again = "fprop" if reuse else spec
        gemms: dict[str, Any] = {
            "fprop": {"input": spec, "weight": spec},
            "dgrad": {"grad_output": spec, "weight": again},
            "wgrad": {"grad_output": spec, "input": again},
        }
        recipe = ModelRecipe(
            linear=LinearRecipe(**gemms, saved=saved), exclude=tuple(exclude), compute=compute
        )
        return apply_recipe(model, recipe, seed=seed).clock

    return convert


def _chosen(exclude: Sequence[str]) -> Callable[[nn.Module, str], bool]:
    from torch import nn

    return lambda module, name: isinstance(module, nn.Linear) and name not in exclude


def _torchao_int8(model: nn.Module, exclude: Sequence[str], seed: int) -> None:
    from torchao import quantize_
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True), filter_fn=_chosen(exclude))


def _torchao_fp8(recipe: str) -> Callable[..., None]:
    def convert(model: nn.Module, exclude: Sequence[str], seed: int) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        convert_to_float8_training(model, config=config, module_filter_fn=_chosen(exclude))

    return convert


# torchao's fp8 comes last: its conversion changes how Inductor writes min and max, for all that is compiled later
CONTENDERS = {
    "bf16": Contender(_unchanged, compiled=False, bits=16),
    "bf16_compiled": Contender(_unchanged, compiled=True, bits=16),
    "native_int8": Contender(_ours("native", "int8_row", reuse=True, saved="quantized"), False, 8),
    "native_int8_requantized": Contender(
        _ours("native", "int8_row", reuse=False, saved="quantized"), False, 8
    ),
    "native_fp8": Contender(_ours("native", "e4m3_row", reuse=False, saved="quantized"), False, 8),
    "native_fp8_tensorwise": Contender(
        _ours("native", "e4m3_tensor", reuse=True, saved="quantized"), False, 8
    ),
    "simulated": Contender(_ours("simulated", "int8_row", reuse=True, saved="high_precision"), True, 16),
    "torchao_int8": Contender(_torchao_int8, compiled=True, bits=8),
    "torchao_fp8_rowwise": Contender(_torchao_fp8("rowwise"), compiled=True, bits=8),
    "torchao_fp8_tensorwise": Contender(_torchao_fp8("tensorwise"), compiled=True, bits=8),
}


def reason(error: BaseException) -> str:
    """The first line of what went wrong, for a table's cell."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:200].replace("|", "/")


def check_arms(arms: Sequence[str]) -> None:
    """Raises ValueError for names that are no contenders, or given twice."""
    unknown = [arm for arm in arms if arm not in CONTENDERS]
    if unknown or not arms:
        raise ValueError(
            f"arms={list(arms)}: on a GPU, allowed are {', '.join(CONTENDERS)}, as in arms=[bf16]"
        )
    if len(set(arms)) < len(arms):
        raise ValueError(f"arms={list(arms)}: name each arm once")
