"""int8_scaled_mm on a GPU: the kernels of ``scaled_mm_triton`` with int32 sums, the same bits whatever the config."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qtrain_kernels import int8_scaled_mm as declaration
from qtrain_kernels.scaled_mm_config import Config, choose
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
