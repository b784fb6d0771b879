"""The clock and its draws against the counter hash itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from qtrain_kernels.counter_hash import GOLDEN, random_bits, random_signs, stream_id, uniform
from torch import nn

from qtrain.nn import Clock, apply_recipe
from qtrain.nn.clock import DRAWS, Draws
from qtrain.quant import ModelRecipe, QuantSpec, Transform

SR, NEAREST = QuantSpec.parse("int4_row_sr"), QuantSpec.parse("int4_row")
RHT = Transform.parse("rht:8")


def signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def draws(seed: int = 5, step: int = 0, offset: int = 0, layer: str = "blocks.1.up") -> Draws:
    clock = Clock(seed)
    clock.set(step=step, token_offset=offset)
    return Draws(clock.counters, stream_id(layer))


def test_the_order_of_the_streams_is_fixed() -> None:
    """A resumed run must find its bits: the order is part of the file format."""
    assert DRAWS == (
        "fprop.input",
        "fprop.weight",
        "fprop.transform",
        "dgrad.grad_output",
        "dgrad.weight",
        "dgrad.transform",
        "wgrad.grad_output",
        "wgrad.input",
        "wgrad.transform",
    )


@pytest.mark.parametrize("draw", [d for d in DRAWS if not d.endswith("transform")])
@pytest.mark.parametrize("layer", ["blocks.1.up", "blocks.3.attn.q", "lm_head"])
def test_noise_is_the_hash_of_its_stream(draw: str, layer: str) -> None:
    found = draws(5, 17, 1000, layer).noise(SR, draw, (3, 4), tokens=True)
    stream = signed(stream_id(layer) + (DRAWS.index(draw) + 1) * GOLDEN)
    expected = uniform(random_bits(torch.tensor(5), torch.tensor(17), stream, 3, 4, row_offset=1000))
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


def test_streams_are_signed_32_bit_ids_as_the_kernels_take_them() -> None:
    streams = [
        Draws(torch.tensor([1, 2, 3]), stream_id(f"blocks.{i}"))._named(d)[2] for i in range(9) for d in DRAWS
    ]
    assert all(-(2**31) <= s < 2**31 for s in streams)
    assert min(streams) < 0 < max(streams)
    assert len(set(streams)) == len(streams)


def test_rows_that_are_no_tokens_ignore_the_offset() -> None:
    a, b = (draws(offset=o).noise(SR, "fprop.weight", (3, 4), tokens=False) for o in (0, 50))
    assert torch.equal(a, b)
    stream = signed(stream_id("blocks.1.up") + 2 * GOLDEN)
    assert torch.equal(a, uniform(random_bits(torch.tensor(5), torch.tensor(0), stream, 3, 4)))
    a, b = (draws(offset=o).noise(SR, "fprop.input", (3, 4), tokens=True) for o in (0, 50))
    assert not torch.equal(a, b)


def test_the_offset_shifts_rows() -> None:
    whole = draws().noise(SR, "fprop.input", (9, 4), tokens=True)
    assert torch.equal(whole[4:], draws(offset=4).noise(SR, "fprop.input", (5, 4), tokens=True))


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_signs_are_the_hash_of_their_stream_and_know_no_offset(gemm: str) -> None:
    found = draws(step=3, offset=77).signs(RHT, gemm, 16)
    stream = signed(stream_id("blocks.1.up") + (DRAWS.index(f"{gemm}.transform") + 1) * GOLDEN)
    assert torch.equal(found, random_signs(torch.tensor(5), torch.tensor(3), stream, 16))
    assert set(found.tolist()) == {-1.0, 1.0}


def test_no_two_draws_share_bits() -> None:
    seen = [draws().noise(SR, d, (4, 8), tokens=True) for d in DRAWS]
    seen += [draws(layer="blocks.2.up").noise(SR, d, (4, 8), tokens=True) for d in DRAWS]
    seen += [draws(seed=6).noise(SR, DRAWS[0], (4, 8), tokens=True)]
    seen += [draws(seed=5 + 2**32).noise(SR, DRAWS[0], (4, 8), tokens=True)]
    seen += [draws(step=1).noise(SR, DRAWS[0], (4, 8), tokens=True)]
    assert all((a != b).float().mean() > 0.9 for a, b in itertools.combinations(seen, 2))


def test_deterministic_recipes_draw_nothing() -> None:
    nothing = Draws(None, 3)
    assert nothing.noise(NEAREST, "fprop.input", (2, 2), tokens=True) is None
    assert nothing.signs(Transform.parse("hadamard:8"), "fprop", 8) is None
    with pytest.raises(AssertionError, match=r"drew bits for fprop\.input"):
        nothing.noise(SR, "fprop.input", (2, 2), tokens=True)


def test_set_changes_the_tensor_in_place() -> None:
    clock = Clock(2**40)
    counters = clock.counters
    assert counters.tolist() == [2**40, 0, 0]
    assert counters.dtype == torch.int64
    clock.set(step=3, token_offset=2**33)
    assert clock.counters is counters
    assert counters.tolist() == [2**40, 3, 2**33]
    clock.set(step=4)
    assert counters.tolist() == [2**40, 4, 0]


def test_the_default_seed_is_zero() -> None:
    assert Clock().counters.tolist() == [0, 0, 0]


def test_follow_moves_once_and_never_to_meta() -> None:
    clock = Clock()
    counters = clock.counters
    clock.follow(torch.device("cpu"))
    assert clock.counters is counters
    clock.follow(torch.device("meta"))
    assert clock.counters is counters
    if torch.cuda.is_available():
        clock.follow(torch.device("cuda", 0))
        assert clock.counters.device == torch.device("cuda", 0)


def test_follow_moves_off_another_device() -> None:
    clock = Clock()
    clock.counters = clock.counters.to("meta")  # stands in for a device that is not the CPU
    with pytest.raises(NotImplementedError, match="meta"):
        clock.follow(torch.device("cpu"))


def test_the_clock_is_no_part_of_the_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    keys = list(model.state_dict())
    report = apply_recipe(model, ModelRecipe(linear={"fprop": {"input": "int4_row_sr"}}), seed=3)
    assert list(model.state_dict()) == keys
    assert not list(model.buffers())
    assert model[0].clock is model[1].clock is report.clock
    assert report.clock.counters.tolist() == [3, 0, 0]
