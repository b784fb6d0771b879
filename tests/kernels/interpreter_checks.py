"""TRITON_INTERPRET=1 python interpreter_checks.py OP [--all]: prints, as JSON, what its Triton kernel gets wrong on CPU tensors.

Of the op's cases it takes those that add a layout, a format or a mode (``covering``), with ``--all`` every one.

A script and not a test, since the variable is read when triton is first imported.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from qtrain_kernels import contract, counter_hash
from qtrain_kernels.adamw_step import fma
from qtrain_kernels.counter_hash_triton import key, random_bits, row_keys, uniform
from qtrain_kernels.op import Op, all_ops, kernel_module
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@triton.jit
def _random_kernel(
    bits_ptr,
    uniform_ptr,
    seed_ptr,
    step_ptr,
    stream,
    row_offset_ptr,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.expand_dims(tl.arange(0, BLOCK_R), 1)
    column = tl.expand_dims(tl.arange(0, BLOCK_C), 0)
    k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
    r0, r1 = row_keys(row.to(tl.int64) + tl.load(row_offset_ptr), k0, k1)
    bits = random_bits(column, r0, r1)
    tl.store(bits_ptr + row * C + column, bits.to(tl.int32, bitcast=True), mask=column < C)
    tl.store(uniform_ptr + row * C + column, uniform(bits), mask=column < C)


def hash_failures() -> list[str]:
    found = []
    for seed, step, stream, row_offset in (
        (0, 0, 0, 0),
        (1234, 17, 99, 5),
        (-5, 2**33 + 3, -(2**31), 2**31 - 2),
        (2**62 + 11, 2**31, 2**31 - 1, 2**40 + 5),
        (-(2**63), -1, -1, 2**32 - 1),
    ):
        scalars = [torch.tensor(v, dtype=torch.int64) for v in (seed, step, row_offset)]
        want = counter_hash.random_bits(scalars[0], scalars[1], stream, 4, 100, scalars[2])
        bits, uniforms = torch.zeros(4, 100, dtype=torch.int32), torch.zeros(4, 100)
        _random_kernel[(1,)](bits, uniforms, *scalars[:2], stream, scalars[2], 100, BLOCK_R=4, BLOCK_C=128)
        if not torch.equal(bits, want):
            found.append(f"bits differ for {(seed, step, stream, row_offset)}")
        if not torch.equal(uniforms, counter_hash.uniform(want)):
            found.append(f"uniforms differ for {(seed, step, stream, row_offset)}")
    return found


def covering(names: Iterable[str]) -> list[str]:
    """Names that together hold every part ("nan_inf", "stochastic") of all names; a part costs seconds here."""
    seen: set[str] = set()
    kept = []
    for name in names:
        parts = set(re.split(r"/|, ", name))
        if not parts <= seen:
            kept.append(name)
            seen |= parts
    return kept


def variant_failures(op: Op[Any, Any]) -> list[str]:
    """Of the other ways that a kernel may be launched, on some of the cases."""
    few = copy.copy(op)
    few.cases = {name: op.cases[name] for name in list(op.cases)[7::4]}
    module = kernel_module(op, "cuda")
    named = module.variants() if hasattr(module, "variants") else {}
    return [
        f"{name}: {line}" for name, launch in named.items() for line in contract.failures(few, "cpu", launch)
    ]


def round_fma_once() -> None:
    """The interpreters of older Tritons compute a fused multiply-add as a product and a sum, of two roundings."""

    def create_fma(
        self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
    ) -> TensorHandle:
        a, b, c = (torch.from_numpy(v.copy()) for v in np.broadcast_arrays(x.data, y.data, z.data))
        return TensorHandle(fma(a, b, c).numpy(), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def kernel_failures(name: str, every: bool) -> list[str]:
    op = copy.copy(all_ops()[name])
    found = variant_failures(op)
    op.cases = {case: op.cases[case] for case in (op.cases if every else covering(op.cases))}
    return found + contract.failures(op, "cpu", op.kernel("cuda"))


if __name__ == "__main__":
    round_fma_once()
    name, every = sys.argv[1], "--all" in sys.argv[2:]
    print(json.dumps(hash_failures() if name == "counter_hash" else kernel_failures(name, every)))
