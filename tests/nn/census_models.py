"""Small models under the census, and what a failed census looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_recipes import LAYERS
from torch import Tensor, nn

from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn import Census, CensusError, apply_recipe, take_census
from qtrain.quant import LinearRecipe, ModelRecipe

TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
Probe = Callable[[nn.Module], Tensor]


def loss_of(dtype: str) -> Probe:
    def probe(model: nn.Module) -> Tensor:
        tokens = TOKENS.to(next(model.parameters()).device)
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return probe


def gpt(
    name: str = "int8_reused",
    *,
    layers: int = 1,
    compute: str = "simulated",
    device: str = "cpu",
    **changes: Any,
) -> tuple[GPT, Any]:
    """A converted model with biases that are not zero, and its report, at some step of its clock."""
    config = GPTConfig(
        vocab_size=64, sequence_tokens=16, layers=layers, heads=2, width=32, **{"bias": True, **changes}
    )
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    model.to(device)
    recipe = LAYERS[name] if isinstance(name, str) else name
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**recipe), compute=compute), seed=5)
    report.clock.set(step=7, token_offset=320)
    return model, report


def census_of(name: str = "int8_reused", dtype: str = "bf16", **changes: Any) -> Census:
    model, report = gpt(name, **changes)
    return take_census(model, report, loss_of(dtype))


def assert_fails(census: Census, *, layer: str = "", name: str = "", text: str = "") -> None:
    found = [o for o in census.observations if o.problem]
    assert found, "the fake passed"
    assert all(layer in o.layer for o in found), found[0]
    assert any(name == o.name or not name for o in found), {o.name for o in found}
    assert any(text in o.problem for o in found), {o.problem for o in found}
    with pytest.raises(CensusError, match="what ran is not what was configured: "):
        census.check()
