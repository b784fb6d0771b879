"""fp8_scaled_mm on a GPU."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qtrain_kernels import fp8_scaled_mm as declaration
from qtrain_kernels.int8_scaled_mm import epilogue
from qtrain_kernels.scaled_mm_triton import Config, scaled_mm

POINTER = Config("pointer", 128, 128, 128, num_warps=8, num_stages=3)
TMA = Config("tma", 128, 128, 128, num_warps=8, num_stages=4)


def launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    config: Config | None = None, imprecise: int = declaration.PROMOTED,
) -> Tensor:  # fmt: skip
    """As ``reference``; ``config``: this one instead of the one that the shape asks for."""
    declaration.check(a, b, a_scale, b_scale, bias, out_dtype)
    if 0 in (*a.shape, b.shape[0]):
        sums = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.float32, device=a.device)
        return epilogue(sums, a_scale, b_scale, bias, out_dtype)
    return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype, config or TMA, tl.float32, imprecise)
