"""Recipes named in a list, as ``recipes=[none,'qpt w=int4_row a=int8_row']``: a file of configs/recipe and its knobs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

TRAINED = "trained"
"""The recipe that the run was trained under."""

_HOST = "evaluate"  # a primary config with a recipe group and nothing that its knobs could be taken for


def recipe_config(text: str, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """``NAME key=value ...`` -> the plain mapping of a ModelRecipe. allowed: packages beside qtrain whose classes it may
    name. Raises UserError, naming what is allowed, for an unknown recipe or knob and for foreign classes."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from qtrain.cli import config_dir
    from qtrain.overrides import Overrides, UserError, resolved
    from qtrain.targets import check_targets

    name, *knobs = text.split()
    if any("=" not in knob for knob in knobs) or "=" in name:
        raise UserError(
            f"recipes: {text!r} is no recipe; write its name and then knobs, as in 'qpt w=int4_row'"
        )
    with ExitStack() as stack:
        if not GlobalHydra().is_initialized():  # in a launcher's own process: the package's recipes alone
            stack.enter_context(initialize_config_dir(str(config_dir()), version_base="1.3"))
        loader = GlobalHydra.instance().config_loader()
        config = Overrides(loader, _HOST, [f"recipe={name}", *knobs])  # type: ignore[arg-type]
        values = resolved(config.compose(config.overrides))
    check_targets({"recipe": values["recipe"]}, allowed)
    recipe: dict[str, Any] = values["recipe"]
    return recipe
