"""What a recipe accepts, and how a moment is laid out."""

from __future__ import annotations

import pytest
import torch

from qtrain.optim import AdamStateRecipe
from qtrain.optim.states import state_spec
from qtrain.quant import QuantSpec, dequantize, quantize

FORMATS = [
    "int8_tensor",
    "int8_row",
    "dynamic8",
    "uint8_row",
    "uint4_group128",
    "linear4_nozero_group128",
    "dynamic4_group128",
    "e4m3_group128",
    "mxfp8",
    "nvfp4",
    "int8_row_asym",
    "int3_group64",
]


def test_short_forms() -> None:
    recipe = AdamStateRecipe(exp_avg="dynamic8", exp_avg_sq="dynamic8")
    assert recipe.exp_avg == QuantSpec(format="dynamic8", granularity="group:256")
    assert recipe.exp_avg_sq == QuantSpec(format="dynamic8_unsigned", granularity="group:256")
    assert AdamStateRecipe(exp_avg="none") == AdamStateRecipe()
    assert AdamStateRecipe(exp_avg={"format": "int4"}).exp_avg.granularity == "group:256"
    assert AdamStateRecipe(exp_avg=QuantSpec(format="int4")).exp_avg.granularity == "row"
    assert AdamStateRecipe(exp_avg_sq="dynamic4_group128").exp_avg_sq.format == "dynamic4_unsigned"
    assert AdamStateRecipe(exp_avg_sq="int8_row").exp_avg_sq.format == "int8"


@pytest.mark.parametrize("m", ["none", "dynamic8_sr", "nvfp4"])
def test_round_trip_through_plain_dicts(m: str) -> None:
    recipe = AdamStateRecipe(exp_avg=m, exp_avg_sq="linear4_nozero_group128", min_numel=7)
    assert AdamStateRecipe(**recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("exp_avg", "uint8_row", "sign"),
        ("exp_avg", "linear4_nozero", "sign"),
        ("exp_avg", "dynamic8_unsigned", "sign"),
        ("exp_avg", "int8_column", "cross rows"),
        ("exp_avg_sq", "int8_block2x64", "cross rows"),
        ("exp_avg_sq", "midrise8", "negative"),
        ("exp_avg", "int8_row_clipped", "estimator"),
        ("exp_avg", {"format": "int8", "granularity": "tensor", "clip": "percentile:99"}, "percentile"),
        ("exp_avg_sq", "int8_rows", "exp_avg_sq"),
    ],
)
def test_what_cannot_hold_a_moment_is_refused(kind: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        state_spec(kind, value)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_min_numel_is_checked(value: object) -> None:
    with pytest.raises(ValueError, match="min_numel"):
        AdamStateRecipe(min_numel=value)


def test_who_stays_float32() -> None:
    recipe = AdamStateRecipe(exp_avg="dynamic8")
    quantized = lambda *a: recipe.layout("exp_avg", *a).spec is not None  # noqa: E731
    assert quantized((64, 64))
    assert quantized((64, 8, 8))
    assert not quantized((64, 63))
    assert not quantized((64, 64), False)
    assert not quantized((8192,))
    assert not quantized(())
    assert not AdamStateRecipe(exp_avg="dynamic8", min_numel=0).layout("exp_avg", (0, 5)).spec
    assert recipe.layout("exp_avg_sq", (64, 64)).spec is None


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(3, 7), (6, 5, 31), (2, 300), (4, 512)])
def test_layout_is_the_packed_tensor_of_the_matrix(text: str, shape: tuple[int, ...]) -> None:
    layout = AdamStateRecipe(exp_avg_sq=text, min_numel=0).layout("exp_avg_sq", shape)
    p = torch.zeros(shape, dtype=torch.bfloat16)
    held = layout.allocate(p)
    assert {k: (tuple(t.shape), t.dtype) for k, t in held.items()} == layout.expected()
    assert held["exp_avg_sq.codes"].shape[0] == shape[0]
    assert (layout.read(held) <= 2.0**-100 * 448).all()  # zero, or the least number of a grid without zero

    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    layout.write(held, x)
    reference = quantize(x.reshape(shape[0], -1), layout.spec)
    assert torch.equal(layout.read(held), dequantize(reference).reshape(shape))
    assert sum(t.numel() * t.element_size() for t in held.values()) == reference.nbytes
    assert reference.ledger()["total"] * x.numel() / 8 == pytest.approx(reference.nbytes)

    if layout.by_rows:  # any cut along dim 0 holds the codes and scales of its rows
        again = layout.allocate(p)
        for rows in (slice(0, 1), slice(1, shape[0])):
            layout.write(again, x[rows], rows)
        assert all(torch.equal(again[k], held[k]) for k in held)
        assert torch.equal(layout.read(held, slice(1, 2)), layout.read(held)[1:2])
        piece = AdamStateRecipe(exp_avg_sq=text, min_numel=0).layout("exp_avg_sq", (1, *shape[1:]))
        shard = piece.allocate(p[1:2])
        piece.write(shard, x[1:2])
        assert all(torch.equal(shard[k], held[k][1:2]) for k in held)
    else:
        with pytest.raises(ValueError, match="spans the tensor"):
            layout.write(held, x[:1], slice(0, 1))
