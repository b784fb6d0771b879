"""Every trainable parameter once, in the right group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qtrain.optim import AdamW, parameter_groups


class Tiny(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(100, 64), nn.Embedding(16, 64)
        self.up, self.down, self.norm = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.LayerNorm(64)
        self.up.quantizers = nn.ParameterDict({"step": nn.Parameter(torch.ones(96, 1))})
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.tok.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_groups(tied: bool, decay_embeddings: bool) -> None:
    model = Tiny(tied)
    groups = parameter_groups(model, 0.1, decay_embeddings=decay_embeddings)
    found = {n: (g["weight_decay"], g["quantize_states"]) for g in groups for n in g["names"]}
    embeddings = (0.1 if decay_embeddings else 0.0, False)
    expected = {
        "tok.weight": embeddings,
        "pos.weight": embeddings,
        "up.weight": (0.1, True),
        "down.weight": (0.1, True),
        "up.bias": (0.0, True),
        "norm.weight": (0.0, True),
        "norm.bias": (0.0, True),
        "up.quantizers.step": (0.0, True),
    }
    assert found == expected | ({} if tied else {"head.weight": (0.1, True)})
    params = [p for g in groups for p in g["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert all(named[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    assert len({(g["weight_decay"] > 0, g["quantize_states"]) for g in groups}) == len(groups)


@pytest.mark.parametrize("tied", [True, False])
def test_states_follow_the_groups(tied: bool) -> None:
    model = Tiny(tied)
    optimizer = AdamW(parameter_groups(model, 0.1), states={"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    packed = {n for n, p in model.named_parameters() if "exp_avg.codes" in optimizer.state[p]}
    assert packed == {"up.weight", "down.weight"} | (set() if tied else {"head.weight"})


def test_the_head_listed_first_is_still_an_embedding() -> None:
    model = nn.Module()
    model.head, model.tok = nn.Linear(8, 10, bias=False), nn.Embedding(10, 8)
    model.tok.weight = model.head.weight
    (group,) = parameter_groups(model, 0.1)
    assert (group["names"], group["quantize_states"], group["weight_decay"]) == (["head.weight"], False, 0.0)


def test_frozen_parameters_and_refusals() -> None:
    model = Tiny(True)
    model.up.requires_grad_(False)
    names = [n for g in parameter_groups(model, 0.1) for n in g["names"]]
    assert not any(n.startswith("up") for n in names)
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(model, -0.1)
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(model.requires_grad_(False), 0.1)
