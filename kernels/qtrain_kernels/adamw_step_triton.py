"""The Triton kernel of ``adamw_step``: one launch over many tensors, everything in registers between one read and one write.

A program takes a few blocks of one tensor, one after the other, found in two tables on the device: ``programs`` (program -> tensor, first
block), which depends on shapes alone, and ``tensors`` (addresses and sizes), which is sent again when an address
changes, from pinned memory, without waiting for the device. Blocks are those of the moments' scales; float32 states are
taken as one long row.

Bits equal the reference's: ``enable_fp_fusion=False`` leaves only the fused multiply-adds that the equation names, divisions and
roots are the IEEE ones, the maximum of a block is taken over the bits of |x| (NaN above infinity, any order). Reading
``encoder`` costs one gathered word an element; of its 256 KB a block of numbers in use touches a few, within L1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import adamw_step as declaration
from qtrain_kernels.adamw_step import WIDEST_BLOCK, Moment, check, rows_columns
from qtrain_kernels.aot import Build
from qtrain_kernels.cast_triton import cast

MIN_SCALE = tl.constexpr(declaration.MIN_SCALE)
FIELDS = 10  # of one row of ``tensors``: six addresses, K, columns a block, blocks, blocks a row
BLOCKS = 8  # the field that counts blocks
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
TILE = 1024  # elements a program, in turns of one block
ELEMENTS_PER_WARP = 256  # 8 a thread
FLAT_BLOCK = 1024  # columns of a "block" of a tensor whose moments are both float32
OPTIONS = {"enable_fp_fusion": False}  # see the module docstring


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load_moment(
    state, scale_ptr, levels_ptr, first, first_byte, column, width, width_bytes,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_C] of one block."""
    if BITS == 32:
        return tl.load(_pointer(state, tl.float32, ALIGNED) + first + column, mask=column < width, other=0.0)
    else:
        if BITS == 8:
            code = tl.load(_pointer(state, tl.uint8, ALIGNED) + first + column, mask=column < width, other=0)
        else:
            byte = tl.arange(0, BLOCK_C // 2)
            at = _pointer(state, tl.uint8, ALIGNED) + first_byte + byte
            pair = tl.load(at, mask=byte < width_bytes, other=0)
            code = tl.interleave(pair & 15, pair >> 4)
        return tl.load(levels_ptr + code.to(tl.int32)) * tl.load(scale_ptr)


@triton.jit
def _store_moment(
    x, state, scale_ptr, encoder_ptr, top, first, first_byte, column, width, width_bytes,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    mask = column < width
    if BITS == 32:
        tl.store(_pointer(state, tl.float32, ALIGNED) + first + column, x, mask=mask)
    else:
        magnitude = tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        amax = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
        scale = tl.math.div_rn(amax, top)
        scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)  # a NaN stays
        tl.store(scale_ptr, scale)
        bits = (x * tl.math.div_rn(top - top + 1.0, scale)).to(tl.int32, bitcast=True)
        entry = tl.load(encoder_ptr + ((bits >> 16) & 0xFFFF))
        code = tl.where((bits & 0xFFFF) <= ((entry >> 16) & 0xFFFF), entry, entry >> 8) & 0xFF
        code = tl.where(mask, code, 0).to(tl.uint8)  # the half byte after an odd row is zero
        if BITS == 8:
            tl.store(_pointer(state, tl.uint8, ALIGNED) + first + column, code, mask=mask)
        else:
            low, high = tl.split(tl.reshape(code, [BLOCK_C // 2, 2]))
            byte = tl.arange(0, BLOCK_C // 2)
            at = _pointer(state, tl.uint8, ALIGNED) + first_byte + byte
            tl.store(at, low | (high << 4), mask=byte < width_bytes)


@triton.jit
def _adamw_step_kernel(
    tensors_ptr,
    programs_ptr,
    m_levels_ptr,
    m_encoder_ptr,
    v_levels_ptr,
    v_encoder_ptr,
    m_top,
    v_top,
    decay,
    lerp_weight,
    beta2,
    one_minus_beta2,
    step_size,
    inverse_root,
    eps,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    M_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    entry = tensors_ptr + tl.load(programs_ptr + 2 * program) * FIELDS
    first_block = tl.load(programs_ptr + 2 * program + 1)
    w_ptr = _pointer(tl.load(entry), WEIGHT, ALIGNED)
    g_ptr = _pointer(tl.load(entry + 1), GRADIENT, ALIGNED)
    m_state, v_state = tl.load(entry + 2), tl.load(entry + 4)
    m_scale_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    v_scale_ptr = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    K, columns = tl.load(entry + 6), tl.load(entry + 7)
    blocks, blocks_a_row = tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    column = tl.arange(0, BLOCK_C)
    is_small = lerp_weight < 0.5  # the two forms of torch.lerp
    near = tl.where(is_small, lerp_weight, lerp_weight - 1.0)
    for block in range(first_block, tl.minimum(first_block + COUNT, blocks)):
        row, start = (block // blocks_a_row).to(tl.int64), (block % blocks_a_row) * columns
        first, first_byte = row * K + start, row * ((K + 1) // 2) + start // 2
        width = tl.minimum(columns, K - start).to(tl.int32)
        width_bytes = (width + 1) // 2
        if ALIGNED:  # vector loads: each row and each block begins and ends at a multiple of 16 elements
            first, width = tl.multiple_of(first, 16), tl.multiple_of(width, 16)
            first_byte, width_bytes = tl.multiple_of(first_byte, 8), tl.multiple_of(width_bytes, 8)
        mask = column < width
        w = tl.load(w_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
        m = _load_moment(
            m_state, m_scale_ptr + block, m_levels_ptr, first, first_byte, column, width, width_bytes,
            M_BITS, ALIGNED, BLOCK_C,
        )  # fmt: skip
        v = _load_moment(
            v_state, v_scale_ptr + block, v_levels_ptr, first, first_byte, column, width, width_bytes,
            V_BITS, ALIGNED, BLOCK_C,
        )  # fmt: skip

        m = tl.fma(near + tl.zeros_like(m), g - m, tl.where(is_small, m, g))
        v = tl.fma(one_minus_beta2 + tl.zeros_like(v), g * g, v * beta2)
        quotient = tl.math.div_rn(m, tl.math.sqrt_rn(v) * inverse_root + eps)
        w = tl.fma(tl.zeros_like(w) - step_size, quotient, w * decay)

        tl.store(w_ptr + first + column, cast(w, WEIGHT), mask=mask)
        _store_moment(
            m, m_state, m_scale_ptr + block, m_encoder_ptr, m_top, first, first_byte, column, width, width_bytes,
            M_BITS, ALIGNED, BLOCK_C,
        )  # fmt: skip
        _store_moment(
            v, v_state, v_scale_ptr + block, v_encoder_ptr, v_top, first, first_byte, column, width, width_bytes,
            V_BITS, ALIGNED, BLOCK_C,
        )  # fmt: skip


def tile(columns: int) -> dict[str, int]:
    """Columns and number of a program's blocks and its warps, for blocks of so many columns."""
    BLOCK_C = max(16, triton.next_power_of_2(columns))
    num_warps = max(1, BLOCK_C // ELEMENTS_PER_WARP)
    return {"COUNT": max(1, TILE // BLOCK_C), "BLOCK_C": BLOCK_C, "num_warps": num_warps}


def _geometry(w: Tensor, block: int, flat: bool) -> tuple[int, int, int, int]:
    """(K, columns a block, blocks, blocks a row) of a tensor that is not empty."""
    F, K = (1, w.numel()) if flat else rows_columns(w)
    columns = FLAT_BLOCK if flat else min(block, K)
    blocks_a_row = -(-K // columns)
    return K, columns, F * blocks_a_row, blocks_a_row


class _Launch(NamedTuple):
    """One launch over tensors of one tile shape: the tables on the device and the specialisation."""

    tensors: Tensor
    programs: Tensor
    options: dict[str, Any]


_PLANS: OrderedDict[Hashable, list[_Launch]] = OrderedDict()
PLANS = 64  # kept: a few calls a step, and the addresses of a few steps' gradients


@cache
def _programs(blocks: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """[programs, 2] int32: which tensor, and its first block."""
    return _sent(
        [(i, first) for i, n in enumerate(blocks) for first in range(0, n, count)], torch.int32, device
    )


def _sent(rows: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=dtype)
    # A copy from pageable memory would wait for the device
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _fingerprint(
    weights: list[Tensor], gradients: list[Tensor], moments: Sequence[Moment], block: int
) -> Hashable:
    """Equal for arguments that have the same plan; cheap, since it is made at every step."""
    held = [t for m in moments for some in (m.states, m.scales) for t in some]
    return (
        block,
        *(m.bits for m in moments),
        *((t.data_ptr(), t.shape, t.dtype, t.is_contiguous()) for some in (weights, gradients) for t in some),
        *((t.data_ptr(), t.numel()) for t in held),
    )


def _plan(
    weights: list[Tensor], gradients: list[Tensor], moments: Sequence[Moment], block: int
) -> list[_Launch]:
    check(weights, gradients, moments, block)
    flat = all(m.bits == 32 for m in moments)
    groups: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
    for i, w in enumerate(weights):
        if w.numel():
            size = K, columns, _, _ = _geometry(w, block, flat)
            if columns > WIDEST_BLOCK:
                raise ValueError(
                    f"blocks of {columns} columns: the kernel takes up to {WIDEST_BLOCK}; use group:256"
                )
            read = [w.data_ptr(), gradients[i].data_ptr()]
            for m in moments:
                read += [m.states[i].data_ptr(), m.scales[i].data_ptr() if m.scales else 0]
            aligned = K % 16 == 0 and columns % 16 == 0 and not any(read[j] % 16 for j in (0, 1, 2, 4))
            groups.setdefault((triton.next_power_of_2(columns), aligned), []).append((*read, *size))
    launches, device = [], weights[0].device
    for (columns, aligned), rows in groups.items():
        block_of = tile(columns)
        programs = _programs(tuple(row[BLOCKS] for row in rows), block_of["COUNT"], device)
        launches.append(_Launch(_sent(rows, torch.int64, device), programs, {"ALIGNED": aligned, **block_of}))
    return launches


def launch(
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
    """``adamw_step.reference`` by one kernel a tile shape; nothing synchronizes. Raises ValueError for blocks of more than
    ``WIDEST_BLOCK`` columns too."""
    m = Moment("exp_avg", exp_avg, exp_avg_scale, exp_avg_levels, exp_avg_encoder, exp_avg_top)
    v = Moment(
        "exp_avg_sq", exp_avg_sq, exp_avg_sq_scale, exp_avg_sq_levels, exp_avg_sq_encoder, exp_avg_sq_top
    )
    key = _fingerprint(weights, gradients, (m, v), block)
    if (plan := _PLANS.get(key)) is None:
        plan = _PLANS[key] = _plan(weights, gradients, (m, v), block)
        if len(_PLANS) > PLANS:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    for tensors, programs, options in plan:
        _adamw_step_kernel[(programs.shape[0],)](
            tensors, programs, exp_avg_levels, exp_avg_encoder, exp_avg_sq_levels, exp_avg_sq_encoder,
            exp_avg_top, exp_avg_sq_top, decay, 1 - beta1, beta2, 1 - beta2, step_size, 1 / root, eps,
            WEIGHT=TYPES[weights[0].dtype], GRADIENT=TYPES[gradients[0].dtype], M_BITS=m.bits, V_BITS=v.bits,
            FIELDS=FIELDS, **options, **OPTIONS,
        )  # fmt: skip


def builds() -> list[Build]:
    """The specialisations that are built ahead of time: 8 and 4 bits and float32, vector loads and single ones."""

    def build(
        name: str, bits: int, columns: int, aligned: bool, dtype: Any = tl.bfloat16, registers: int = 128
    ) -> Build:
        block_of = tile(columns)
        options = {"num_warps": block_of.pop("num_warps"), **OPTIONS}
        floats = (
            "m_top",
            "v_top",
            "decay",
            "lerp_weight",
            "beta2",
            "one_minus_beta2",
            "step_size",
            "inverse_root",
            "eps",
        )
        pointers = ("m_levels_ptr", "m_encoder_ptr", "v_levels_ptr", "v_encoder_ptr")
        types = {"tensors_ptr": "*i64", "programs_ptr": "*i32"} | dict.fromkeys(floats, "fp32")
        types |= {
            "m_levels_ptr": "*fp32",
            "m_encoder_ptr": "*i32",
            "v_levels_ptr": "*fp32",
            "v_encoder_ptr": "*i32",
        }
        constants = {"WEIGHT": dtype, "GRADIENT": dtype, "M_BITS": bits, "V_BITS": bits, "ALIGNED": aligned}
        constants |= {"FIELDS": FIELDS, **block_of}
        if bits == 32:
            constants |= dict.fromkeys(pointers)
        return Build(
            name,
            _adamw_step_kernel,
            types,
            constants,
            divisible_by_16=("tensors_ptr", "programs_ptr", *(pointers if bits < 32 else ())),
            options=options,
            forbidden_ptx=(".ftz", "div.full", ".approx"),
            max_registers=registers,
        )

    return [
        build("8 bit", 8, 256, True),
        build("8 bit, fp32", 8, 256, True, tl.float32),
        build("4 bit", 4, 128, True),
        build("float32, fp32", 32, FLAT_BLOCK, True, tl.float32),
        build("8 bit, odd columns", 8, 256, False),
        build("8 bit, rows of 4096", 8, 4096, True),
    ]
