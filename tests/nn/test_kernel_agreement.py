"""The algebra and the kernels round alike: int8_row and int4_row against the reference of ``quantize_rows``."""

from __future__ import annotations

import pytest
import torch
from qtrain_kernels.counter_hash import random_bits, uniform
from qtrain_kernels.op import all_ops

from qtrain.nn.clock import Draws
from qtrain.quant import QuantSpec, dequantize, quantize, quantize_values

OP = all_ops()["quantize_rows"]
FORMATS = {127: "int8", 7: "int4"}


def spec_of(qmax: int, stochastic: bool) -> QuantSpec:
    return QuantSpec(format=FORMATS[qmax], rounding="stochastic" if stochastic else "nearest")


@pytest.mark.parametrize("case", [n for n, make in OP.cases.items() if make()[1] in FORMATS])
def test_codes_and_scales_equal_those_of_the_kernel_bit_for_bit(case: str) -> None:
    x, qmax, stochastic, seed, step, stream, row_offset = OP.cases[case]()
    codes, scale = OP.reference(x, qmax, stochastic, seed, step, stream, row_offset)
    spec = spec_of(qmax, stochastic)
    noise = uniform(random_bits(seed, step, stream, *x.shape, row_offset)) if stochastic else None
    q = quantize_values(x, spec, noise)
    if x.shape[1] == 0:  # no columns: the algebra has no scale either
        assert q.values.shape == codes.shape
        return
    finite = torch.isfinite(scale)
    assert torch.equal(q.scale[finite, 0], scale[finite])
    # Rows with NaN or infinity: both decode to NaN throughout, the kernel with scales inf or NaN, the algebra NaN
    assert q.scale[~finite].isnan().all()
    assert torch.equal(q.values[finite].to(torch.int8), codes[finite])
    packed = quantize(x, spec, noise)
    bits = packed.spec.bits
    unsigned = codes.to(torch.int16) & (2**bits - 1)
    stored = spec.number_format.encode(q.values)
    assert torch.equal(stored[finite].to(torch.int16), unsigned[finite])
    decoded = dequantize(packed)
    assert torch.equal(decoded[finite], (codes.to(torch.float32) * scale[:, None])[finite])
    assert decoded[~finite].isnan().all()
    assert (codes[~finite].to(torch.float32) * scale[~finite, None]).isnan().all()


@pytest.mark.parametrize("operand", ["fprop.input", "wgrad.grad_output"])
def test_a_layers_noise_is_what_the_kernel_draws_for_its_stream(operand: str) -> None:
    counters, layer = torch.tensor([7, 3, 40]), 12345
    draws, x = Draws(counters, layer), torch.randn(6, 10)
    spec = spec_of(127, True)
    noise = draws.noise(spec, operand, (6, 10), tokens=True)
    stream = draws._named(operand)[2]
    codes, scale = OP.reference(x, 127, True, counters[0], counters[1], stream, counters[2])
    q = quantize_values(x, spec, noise)
    assert torch.equal(q.values.to(torch.int8), codes)
    assert torch.equal(q.scale[:, 0], scale)


def test_the_cases_reach_both_roundings_of_both_widths() -> None:
    reached = {(make()[1], make()[2]) for make in OP.cases.values()}
    assert {(q, s) for q in FORMATS for s in (False, True)} <= reached
