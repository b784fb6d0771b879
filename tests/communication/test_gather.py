"""The all-gather of weights in real processes: what the forward of every process sees."""

from __future__ import annotations

import communicating
import pytest
import torch

from qtrain.communication.gather import gathers_exactly
from qtrain.quant import DgradRecipe, FpropRecipe, LinearRecipe, QuantSpec, dequantize, quantize


@pytest.mark.parametrize("world", communicating.WORLDS)
@pytest.mark.parametrize("spec", ["int8_row", "int8_group128"])
def test_every_process_decodes_the_codes_of_the_master(seen, world, spec):
    for found in seen[world]:
        gather = found["gather"][spec]
        for name, master in gather["masters"].items():
            expected = master
            if name in communicating.GATHERED:
                matrix = master.flatten(1)
                expected = dequantize(quantize(matrix, QuantSpec.parse(spec))).view(master.shape)
                assert not torch.equal(expected, master)
            assert torch.equal(gather["train"][name], expected), name
            assert torch.equal(gather["eval"][name], master), name


@pytest.mark.parametrize("world", communicating.WORLDS)
def test_stochastic_weights_are_the_same_everywhere_and_others_in_another_step(seen, world):
    first = seen[2][0]["gather"]["int4_group64_sr"]
    for found in seen[world]:
        gather = found["gather"]["int4_group64_sr"]
        for name, master in gather["masters"].items():
            assert torch.equal(gather["train"][name], first["train"][name]), "on any number of processes"
            if name in communicating.GATHERED:
                assert not torch.equal(gather["train"][name], gather["later"][name])
                # A step of 4 bits, not half of one; and no more
                step = master.abs().max() / 7
                assert step / 2 < (gather["train"][name] - master).abs().max() <= step * 1.0001


def recipe(weight: str | None, dgrad: str | None, transform: str | None = None) -> LinearRecipe:
    return LinearRecipe(
        fprop=FpropRecipe(input="int8_row", weight=weight, transform=transform),
        dgrad=DgradRecipe(weight=dgrad),
    )


def test_which_layers_lose_nothing():
    spec = QuantSpec.parse("int8_row")
    assert gathers_exactly(recipe("int8_row", "fprop"), spec)
    for other in (
        None,
        recipe("int4_row", "fprop"),
        recipe("int8_row", None),  # dX reads W itself
        recipe("int8_row", "int8_row"),  # and its columns here
        recipe("int8_row", "fprop", "hadamard:16"),
        recipe("int8_row_sr", "fprop"),
        recipe(None, None),
    ):
        assert not gathers_exactly(other, spec)
    assert not gathers_exactly(recipe("int8_row_sr", "fprop"), QuantSpec.parse("int8_row_sr"))
    assert not gathers_exactly(recipe("dynamic8_row", "fprop"), QuantSpec.parse("dynamic8_row"))
    assert not gathers_exactly(recipe("int8_row_asym", "fprop"), QuantSpec.parse("int8_row_asym"))
