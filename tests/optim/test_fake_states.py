"""States that are only fake-quantized (packed=False): the same training bit for bit, and no byte saved."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtrain.optim import AdamStateRecipe, AdamW
from qtrain.optim import eager as module

STATES = [
    ("int8_tensor", "int8_tensor"),
    ("int8_row", "uint8_row"),
    ("dynamic8", "dynamic8"),
    ("int4_group128", "linear4_nozero_group128"),
    ("dynamic4_group128", "dynamic4_group128"),
    ("e4m3_group128", "e4m3_group128"),
    ("int8_row_asym", "int8_tensor_asym"),
    ("dynamic8_sr", "none"),
    ("none", "nvfp4"),
]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(6, 300), (3, 5, 7), (1, 40)]


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype))


def trained(m: str, v: str, shape: tuple[int, ...], packed: bool, dtype: torch.dtype, steps: int = 5):
    p = parameter(shape, dtype)
    states = AdamStateRecipe(exp_avg=m, exp_avg_sq=v, min_numel=0, packed=packed)
    optimizer = AdamW([{"params": [p], "names": ["w"]}], **HYPER, states=states, seed=3)
    for step in range(steps):
        p.grad = gradient(shape, step).to(dtype)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(("m", "v"), STATES)
def test_the_trajectory_is_that_of_packed_states(m: str, v: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", 500)
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        (p, packed), (q, fake) = (trained(m, v, shape, way, dtype) for way in (True, False))
        assert torch.equal(p, q)
        decoded, kept = packed.decode_states(p), fake.decode_states(q)
        assert all(torch.equal(decoded[kind], kept[kind]) for kind in decoded)


def test_the_bytes_are_those_of_float32() -> None:
    (_, packed), (_, fake) = (
        trained("int8_row", "dynamic8", (6, 300), way, torch.float32) for way in (True, False)
    )
    held = fake.state_bytes()
    assert held == {
        "step": 4, "exp_avg.dequantized": 7200, "exp_avg_sq.dequantized": 7200,
        "total": 14404, "as_float32": 14404,
    }  # fmt: skip
    assert packed.state_bytes()["total"] < 0.3 * held["total"]


def test_it_is_quantized_at_all() -> None:
    _, fake = trained("int4_row", "uint8_tensor", (6, 300), False, torch.float32)
    (held,) = fake.state.values()
    assert all(len(row.unique()) <= 16 for row in held["exp_avg.dequantized"])
    assert len(held["exp_avg_sq.dequantized"].unique()) <= 256


def test_resumed_and_refused() -> None:
    whole, _ = trained("int4_row", "dynamic8", (6, 300), False, torch.bfloat16)
    p, first = trained("int4_row", "dynamic8", (6, 300), False, torch.bfloat16, steps=3)
    _, second = trained("int4_row", "dynamic8", (6, 300), False, torch.bfloat16, steps=0)
    second.load_state_dict(first.full_state_dict())
    (q,) = (q for group in second.param_groups for q in group["params"])
    with torch.no_grad():
        q.copy_(p)
    for step in (3, 4):
        q.grad = gradient((6, 300), step).to(torch.bfloat16)
        second.step()
    assert torch.equal(q, whole)
    _, packed = trained("int4_row", "dynamic8", (6, 300), True, torch.bfloat16, steps=1)
    with pytest.raises(ValueError, match=r"stores exp_avg as .*dequantized, this optimizer keeps it as"):
        packed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"keeps it as .*dequantized; resume with"):
        second.load_state_dict(packed.state_dict())
    with pytest.raises(ValueError, match=r"packed='no'"):
        AdamStateRecipe(packed="no")


def test_a_float32_state_is_as_it_was() -> None:
    (p, packed), (q, fake) = (trained("none", "none", (3, 5), way, torch.float32) for way in (True, False))
    assert torch.equal(p, q)
    fake.load_state_dict(packed.state_dict())  # nothing is quantized: nothing to be packed or not
