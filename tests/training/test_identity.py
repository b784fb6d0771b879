"""What makes two trainings the same."""

from __future__ import annotations

from dataclasses import replace

from qtrain.quant import LinearRecipe, ModelRecipe
from qtrain.training.identity import recipe_digest


def test_the_digest_is_of_the_numbers_and_not_of_what_is_kept_for_them() -> None:
    """Layers that own their activation compute the same bits, so that a run may go on with or without."""
    recipe = ModelRecipe(linear=LinearRecipe(fprop={"input": "int8_row", "weight": "int8_row"}))  # type: ignore[arg-type]
    assert recipe_digest(recipe) == recipe_digest(replace(recipe, recompute_activations=True))
    assert recipe_digest(recipe) != recipe_digest(replace(recipe, exclude=["lm_head"]))
    assert recipe_digest(recipe) != recipe_digest(replace(recipe, compute="native"))
