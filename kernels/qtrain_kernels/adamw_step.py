"""adamw_step: one step of AdamW over many tensors, their moments stored in few bits, each byte read and written once.

    m = decode(exp_avg), v = decode(exp_avg_sq)                    level of the code times the scale of its block
    m = fma(1 - b1, g - m, m)                                      b1 <= 1/2: fma(-b1, g - m, g), as torch.lerp
    v = fma(1 - b2, g * g, b2 * v)
    w = fma(-step_size, m / (sqrt(v) * (1 / root) + eps), decay * w)
    exp_avg = encode(m), exp_avg_sq = encode(v)                    scale = max(amax / top, 2^-100), code of m * (1 / scale)

Float32 throughout, each operation rounded once; a bfloat16 weight is rounded to nearest. This is the arithmetic of torch's CUDA
kernels (lerp, addcmul and addcdiv fused; division by a number as the product with its float64 inverse rounded to float32),
in their order, so that switching from an eager AdamW changes no bit there (torch 2.11: native/Lerp.h,
native/cuda/DeviceAddCmulCdiv.cuh, native/cuda/BinaryDivTrueKernel.cu). Torch's CPU kernels divide, and round addcmul and
addcdiv otherwise, one unit in the last place apart.

A moment is float32, of the weight's shape, or codes of 8 or 4 bits (uint8 [F, K], or [F, ceil(K / 2)] with the even column in
the low half) with float32 scales [F, nc], one a block of ``block`` columns of a row; the last block of a row may be short. F rows,
K columns of the weight as a matrix [dim 0, all others]. What codes mean comes as two tables, ``levels`` and ``encoder``
(``code_table``), so any monotone format goes, with its own ties. A NaN is encoded as its table says; the block's scale is then NaN.

The kernel is ``adamw_step_triton``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtrain_kernels.adamw_problems import cases, workloads
from qtrain_kernels.code_table import look_up
from qtrain_kernels.op import define_op

MIN_SCALE = 2.0**-100
WIDEST_BLOCK = 4096  # columns of a block that the CUDA kernel holds in registers
DTYPES = (torch.float32, torch.bfloat16)


class Moment(NamedTuple):
    """One moment of all tensors: float32 states (no scales, no tables), or codes."""

    name: str
    states: list[Tensor]
    scales: list[Tensor]
    levels: Tensor | None
    encoder: Tensor | None
    top: float

    @property
    def bits(self) -> int:
        """32, 8 or 4 a number."""
        return 32 if self.levels is None else 8 if self.levels.numel() == 256 else 4


def rows_columns(weight: Tensor) -> tuple[int, int]:
    """(F, K) of a weight; one without dimensions is one element."""
    F = weight.shape[0] if weight.dim() else 1
    return F, weight.numel() // max(F, 1)


def check(weights: list[Tensor], gradients: list[Tensor], moments: Sequence[Moment], block: int) -> None:
    """Raise ValueError for arguments outside the op's domain; shapes and dtypes only, no data is read."""
    if not weights or block < 1:
        raise ValueError(f"{len(weights)} weights and blocks of {block} columns: give one or more of both")
    for moment in moments:
        quantized = moment.levels is not None
        if quantized != (moment.encoder is not None) or len(moment.scales) != quantized * len(weights):
            raise ValueError(
                f"{moment.name}: codes need levels, an encoder and a scale a weight; float32 none of them"
            )
        if moment.levels is not None and moment.levels.numel() not in (16, 256):
            raise ValueError(f"{moment.name}: levels must be 16 or 256 float32, not {moment.levels.numel()}")
        if moment.bits == 4 and block % 2 and any(block < rows_columns(w)[1] for w in weights):
            raise ValueError(f"{moment.name}: blocks of {block} columns end within a byte of 4-bit codes")
    for name, tensors in (("gradients", gradients), *((m.name, m.states) for m in moments)):
        if len(tensors) != len(weights):
            raise ValueError(f"{len(tensors)} {name} for {len(weights)} weights")
    of_weights, of_gradients, device = weights[0].dtype, gradients[0].dtype, weights[0].device
    if of_weights not in DTYPES or of_gradients not in DTYPES:
        raise ValueError(f"weights {of_weights} and gradients {of_gradients} must be float32 or bfloat16")
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        if w.dtype != of_weights or g.dtype != of_gradients or g.shape != w.shape:
            raise ValueError(
                f"weight {i} is {w.dtype} {list(w.shape)} with a gradient {g.dtype} {list(g.shape)}: one call takes one "
                "dtype of weights and one of gradients, in equal shapes"
            )
        held = [w, g, *(t for m in moments for t in (m.states[i], *m.scales[i : i + 1]))]
        if not all(t.is_contiguous() and t.device == device for t in held):
            raise ValueError(f"weight {i}, its gradient and its states must be contiguous and on one device")
        F, K = rows_columns(w)
        for m in moments:
            shape = w.shape if m.bits == 32 else (F, K if m.bits == 8 else -(-K // 2))
            if m.states[i].shape != shape or m.states[i].dtype != (
                torch.float32 if m.bits == 32 else torch.uint8
            ):
                raise ValueError(
                    f"{m.name} {i} is {m.states[i].dtype} {list(m.states[i].shape)}, not {m.bits} bits of {list(shape)}"
                )
            if m.bits < 32 and (
                m.scales[i].shape != (F, -(-K // block)) or m.scales[i].dtype != torch.float32
            ):
                raise ValueError(
                    f"the scale of {m.name} {i} is {list(m.scales[i].shape)}, not [{F}, {-(-K // block)}]"
                )


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c with one rounding: the float64 sum is rounded to odd first, so that the second rounding sees
    which side of a midpoint it lay on (Boldo and Melquiond, 2008)."""
    product, c = a.double() * b.double(), c.double()  # exact: 24 and 24 bits
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.contiguous().view(torch.int64)
    nudge = torch.where((error > 0) == (total > 0), 1, -1)
    inexact_and_even = (error != 0) & torch.isfinite(total) & (bits & 1 == 0)
    return torch.where(inexact_and_even, bits + nudge, bits).view(torch.float64).float()


def _decode(codes: Tensor, scale: Tensor, levels: Tensor, K: int, block: int) -> Tensor:
    """float32 [F, K]."""
    if levels.numel() == 16:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :K]
    return levels[codes.to(torch.int64)] * scale.repeat_interleave(min(block, max(K, 1)), 1)[:, :K]


def _encode(x: Tensor, moment: Moment, block: int) -> tuple[Tensor, Tensor]:
    """float32 [F, K] -> codes as they are stored, scale [F, nc]."""
    assert moment.levels is not None
    assert moment.encoder is not None
    F, K = x.shape
    block = min(block, max(K, 1))
    blocks = torch.nn.functional.pad(x, (0, -K % block)).reshape(F, -1, block)
    amax = blocks.abs().amax(2) if x.numel() else x.new_zeros(F, blocks.shape[1])
    scale = (amax / torch.full_like(amax, moment.top)).clamp(min=MIN_SCALE)
    codes = look_up(moment.encoder, blocks * scale.reciprocal()[:, :, None]).reshape(F, -1)[:, :K]
    if moment.bits == 4:
        codes = torch.nn.functional.pad(codes, (0, K % 2))
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes, scale


def reference(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_scale: list[Tensor],
    exp_avg_levels: Tensor | None,
    exp_avg_encoder: Tensor | None,
    exp_avg_top: float,
    exp_avg_sq: list[Tensor],
    exp_avg_sq_scale: list[Tensor],
    exp_avg_sq_levels: Tensor | None,
    exp_avg_sq_encoder: Tensor | None,
    exp_avg_sq_top: float,
    block: int,
    decay: float,
    beta1: float,
    beta2: float,
    step_size: float,
    root: float,
    eps: float,
) -> None:
    """Steps all tensors in place: weights, both moments and their scales.

    ``weights``, ``gradients``: float32 or bfloat16, any shapes, contiguous. ``exp_avg`` and ``exp_avg_sq``: see the module's
    docstring; ``*_scale``: one a weight, or none where the moment is float32. ``*_levels``: float32 [256] or [16];
    ``*_encoder``: int32 [65536]; ``*_top``: the end of the grid, which a block's largest magnitude is scaled to.
    ``decay`` = 1 - lr * weight_decay, ``step_size`` = lr / (1 - b1^t), ``root`` = sqrt(1 - b2^t). Raises ValueError, see ``check``.
    """
    moments = (
        Moment("exp_avg", exp_avg, exp_avg_scale, exp_avg_levels, exp_avg_encoder, exp_avg_top),
        Moment(
            "exp_avg_sq", exp_avg_sq, exp_avg_sq_scale, exp_avg_sq_levels, exp_avg_sq_encoder, exp_avg_sq_top
        ),
    )
    check(weights, gradients, moments, block)
    for i, w in enumerate(weights):
        F, K = rows_columns(w)
        g, wide = gradients[i].float().reshape(F, K), w.float().reshape(F, K)
        m, v = (
            x.states[i].reshape(F, K)
            if x.levels is None
            else _decode(x.states[i], x.scales[i], x.levels, K, block)
            for x in moments
        )
        weight = torch.tensor(1 - beta1, dtype=torch.float32, device=w.device)
        one_minus_beta2 = torch.tensor(1 - beta2, dtype=torch.float32, device=w.device)
        m = fma(weight, g - m, m) if weight.abs() < 0.5 else fma(weight - 1, g - m, g)
        v = fma(one_minus_beta2, g * g, v * beta2)
        # torch's float32 root on CPUs is not always the nearest; rounded from float64 it is
        denominator = v.double().sqrt().float() * (1 / root) + eps
        # A tensor of minus step_size, since the product with it is rounded inside fma
        w.copy_(fma(wide.new_tensor(-step_size), m / denominator, wide * decay).reshape(w.shape))
        for x, values in zip(moments, (m, v), strict=True):
            if x.levels is None:
                x.states[i].copy_(values.reshape(w.shape))
            else:
                codes, scale = _encode(values, x, block)
                x.states[i].copy_(codes)
                x.scales[i].copy_(scale)


def _fake(*args: object) -> None:
    """Nothing is returned; tracing sees the mutations in the schema."""


adamw_step = define_op(
    "adamw_step",
    reference,
    fake=_fake,
    cases=cases(),
    workloads=workloads,
    cuda="qtrain_kernels.adamw_step_triton:launch",
    mutates=("weights", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"),
)
