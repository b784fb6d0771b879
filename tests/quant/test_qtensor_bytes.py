"""What a packed tensor holds: bits of each part an element, and the bytes of stored scales."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.quant import QuantSpec, quantize

from .slow_reference import spec_of

NAN = float("nan")


@pytest.mark.parametrize(
    ("text", "shape", "want"),
    [
        ("int8", (4, 64), {"codes": 8, "scale": 32 / 64}),
        ("int4", (4, 64), {"codes": 4, "scale": 32 / 64}),
        ("int4 granularity=tensor", (4, 64), {"codes": 4, "scale": 32 / 256}),
        ("int4 granularity=column", (4, 64), {"codes": 4, "scale": 32 / 4}),
        ("int3", (2, 64), {"codes": 3, "scale": 32 / 64}),
        ("int3", (2, 9), {"codes": 8 * 6 / 9, "scale": 32 / 9}),  # 9 codes take 2 units of 8: 6 bytes
        (
            "int4 granularity=group:128 symmetric=False",
            (2, 256),
            {"codes": 4, "scale": 0.25, "zero_point": 8 / 128},
        ),
        ("int4 granularity=group:128", (3, 200), {"codes": 4, "scale": 2 * 32 / 200}),
        ("e2m1 granularity=group:32 scale_format=e8m0", (2, 64), {"codes": 4, "scale": 8 / 32}),
        (
            "e2m1 granularity=group:16 scale_format=e4m3 tensor_scale=True",
            (4, 32),
            {"codes": 4, "scale": 8 / 16, "tensor_scale": 32 / 128},
        ),
        ("e4m3 granularity=block:128x128", (128, 256), {"codes": 8, "scale": 32 / 128**2}),
        ("midrise1", (2, 16), {"codes": 1, "scale": 2}),
        ("int5", (8,), {"codes": 5, "scale": 4}),
        ("int4", (), {"codes": 8, "scale": 32}),
        ("int4 granularity=group:8", (2, 3, 8), {"codes": 4, "scale": 4}),
    ],
)
def test_ledger(text, shape, want):
    q = quantize(torch.ones(shape), spec_of(text))
    ledger = q.ledger()
    assert ledger == {**want, "total": pytest.approx(sum(want.values()))}
    assert list(ledger) == [*want, "total"]
    held = sum(t.untyped_storage().nbytes() for t in q.tensors().values())
    assert held == q.nbytes
    assert ledger["total"] * max(math.prod(shape), 1) / 8 == pytest.approx(q.nbytes, abs=1e-9)
    assert list(q.tensors()) == list(want)


def test_standard_layouts_cost_what_they_are_known_for():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert quantize(x, QuantSpec.parse("mxfp4")).ledger()["total"] == 4.25
    assert quantize(x, QuantSpec.parse("mxfp8")).ledger()["total"] == 8.25
    assert quantize(x, QuantSpec.parse("mxint8")).ledger()["total"] == 8.25
    assert quantize(x, QuantSpec.parse("nvfp4")).ledger()["total"] == 4.5 + 32 / (64 * 128)
    assert quantize(x, QuantSpec.parse("int4_group128_asym")).ledger()["total"] == 4 + 40 / 128


def test_ledger_of_nothing():
    q = quantize(torch.empty(0, 5), spec_of("int8"))
    assert q.ledger() == {"codes": 0.0, "scale": 0.0, "total": 0.0}
    assert q.nbytes == 0


def test_stored_scales():
    """e8m0: the biased exponent, 255 for NaN. e4m3: the pattern of the hardware type, 0x7F for NaN."""
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([1.0, 6.0, 1e-3, NAN])
    q = quantize(x, QuantSpec.parse("mxfp4"))
    assert q.scale.dtype == torch.uint8
    assert q.scale.flatten().tolist() == [127 - 2, 127, 127 - 12, 255]
    q = quantize(x, spec_of("e2m1 scale_format=e4m3"))
    assert q.scale.dtype == torch.uint8
    want = (torch.tensor([1.0, 6.0, 0.0117]) / 6).to(torch.float8_e4m3fn)
    assert q.scale.flatten().tolist() == [*want.view(torch.uint8).tolist(), 0x7F]
    q = quantize(x, spec_of("e2m1"))
    assert q.scale.dtype == torch.float32
    assert q.scale[3].isnan()
    q = quantize(x, spec_of("int4 symmetric=False"))
    assert q.zero_point.dtype == torch.uint8
    assert q.zero_point.flatten().tolist() == [0, 0, 0, 0]
    assert quantize(-x[:3], spec_of("int4 symmetric=False")).zero_point.flatten().tolist() == [15, 15, 15]
