"""int8_scaled_mm on a GPU: the kernels of ``scaled_mm_triton`` with int32 sums, the same bits whatever the config."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from qtrain_kernels import int8_scaled_mm as declaration
from qtrain_kernels import scaled_mm_triton
from qtrain_kernels.aot import Build
from qtrain_kernels.k_major_triton import k_major_build
from qtrain_kernels.scaled_mm_config import SPECIALISED, Config, choose
from qtrain_kernels.scaled_mm_triton import fastest, scaled_mm


def launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """As ``reference``; ``config``: this one instead of the one that is chosen for the shape."""
    declaration.check(a, b, a_scale, b_scale, bias, out_dtype)
    if 0 in (*a.shape, b.shape[0]):
        sums = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
        return declaration.epilogue(sums, a_scale, b_scale, bias, out_dtype)

    def run(chosen: Config) -> Tensor:
        return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, chosen, tl.int32)

    (M, K), N = a.shape, b.shape[0]
    return run(config or choose("int8", M, N, K, out_dtype, a.device, lambda configs: fastest(configs, run)))


def builds() -> list[Build]:
    """The copy to K-major as well, of a transposed operand."""
    from qtrain_kernels.scaled_mm_specialised_triton import build_specialised

    specialised = [build_specialised(config, torch.int8, "bf16") for config in SPECIALISED["int8"]]
    return [*scaled_mm_triton.builds("int8"), *specialised, k_major_build()]


def variants() -> dict[str, Callable[..., Tensor]]:
    """Launches that the contract checks beside the one by rule."""
    return {config.name: functools.partial(launch, config=config) for config in scaled_mm_triton.VARIANTS}
