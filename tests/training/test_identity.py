"""What makes two trainings the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtrain.quant import LinearRecipe, ModelRecipe
from qtrain.training.identity import _different_communication, recipe_digest


def test_the_digest_is_of_the_numbers_and_not_of_what_is_kept_for_them() -> None:
    """Layers that own their activation compute the same bits, so that a run may go on with or without."""
    recipe = ModelRecipe(linear=LinearRecipe(fprop={"input": "int8_row", "weight": "int8_row"}))  # type: ignore[arg-type]
    assert recipe_digest(recipe) == recipe_digest(replace(recipe, recompute_activations=True))
    assert recipe_digest(recipe) != recipe_digest(replace(recipe, exclude=["lm_head"]))
    assert recipe_digest(recipe) != recipe_digest(replace(recipe, compute="native"))


@pytest.mark.parametrize(
    ("there", "here", "different"),
    [
        ({}, {"devices": 4, "strategy": "fsdp2", "reduce_gradients": None, "error_feedback": "float32"}, ""),
        ({"gather_weights": "int8"}, {"gather_weights": "int8_row"}, ""),
        ({"error_feedback": None}, {"error_feedback": "float32"}, ""),  # of a reduction that is not there
        ({"gather_weights": "int8_row"}, {}, "trainer.gather_weights: int8 row there, None here"),
        ({}, {"reduce_gradients": "int4_row"}, "trainer.reduce_gradients: None there, int4 row here"),
        (
            {"reduce_gradients": "int4_row", "error_feedback": None},
            {"reduce_gradients": "int4_row"},
            "trainer.error_feedback: None there, float32 here",
        ),
    ],
)
def test_what_travels_in_low_bits_belongs_to_a_run(there, here, different) -> None:
    found = _different_communication({"trainer": there}, {"trainer": here})
    assert len(found) == bool(different)
    assert not found or found[0].startswith(different)
    assert not _different_communication(
        {"trainer": there}, {"trainer": here, "allow_changed": ["communication"]}
    )
