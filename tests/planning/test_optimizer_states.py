"""States against those of real optimizers after a real step, whole and of one process's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtrain.models.llama import LlamaConfig
from qtrain.optim import AdamW, TorchAdamW, parameter_groups
from qtrain.planning.fake_model import meta_model
from qtrain.planning.optimizer_states import OptimizerBytes, local_elements, optimizer_bytes
from qtrain.quant import ModelRecipe

CONFIG = LlamaConfig(vocab_size=70, sequence_tokens=8, layers=2, heads=2, width=72, mlp_width=136)
STATES: dict[str, Any] = {
    "float32": None,
    "dynamic8": {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"},
    "int4_row": {"exp_avg": "int4_row", "exp_avg_sq": "uint8_row", "min_numel": 1},
    "asymmetric": {"exp_avg": "int8_group64_asym", "exp_avg_sq": "int8_tensor"},
    "unpacked": {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8", "packed": False},
}


def planned(make: Any, **more: Any) -> OptimizerBytes:
    model, _ = meta_model(CONFIG, ModelRecipe())
    return optimizer_bytes(make, model, 0.1, **{"device_type": "cpu", **more})


def stepped(make: Any) -> Any:
    model = CONFIG.build(seed=0)
    optimizer = make(parameter_groups(model, 0.1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", STATES)
def test_states_are_exact(name: str) -> None:
    def make(groups: Any) -> AdamW:
        return AdamW(groups, states=STATES[name])

    found, real = planned(make), stepped(make).state_bytes()
    assert (found.states, found.as_float32) == (real["total"], real["as_float32"])


def test_torchs_states_are_exact() -> None:
    assert planned(TorchAdamW).states == stepped(TorchAdamW).state_bytes()["total"]


def test_rows_of_the_first_process() -> None:
    """70 rows over 4 processes: 18 on the first (``torch.chunk``)."""
    assert local_elements((70, 72), 4) == 18 * 72 == torch.empty(70, 72).chunk(4)[0].numel()
    assert local_elements((), 4) == 1

    def make(groups: Any) -> AdamW:
        return AdamW(groups, states=None)

    model = CONFIG.build(seed=0)
    rows = sum(p.chunk(4)[0].numel() for p in model.parameters())
    count = len(list(model.parameters()))
    assert planned(make, shards=4).states == 8 * rows + 4 * count
    with pytest.raises(ValueError, match="optimizer=adamw"):
        planned(TorchAdamW, shards=4)


def test_a_fused_step_reads_and_writes_everything_once() -> None:
    def make(groups: Any) -> AdamW:
        return AdamW(groups, states=None)

    n = CONFIG.build(seed=0).num_parameters()
    fused, eager = planned(make, device_type="cuda"), planned(make, device_type="cpu")
    assert fused.moved == 3 * 4 * n + 2 * 8 * n  # w and g read, w written; m and v read and written
    assert (fused.eager, eager.eager) == (0, n)
    assert eager.moved > 1.5 * fused.moved

    def stochastic(groups: Any) -> AdamW:
        return AdamW(groups, states={"exp_avg": "int8_row_sr", "exp_avg_sq": "dynamic8"})

    assert planned(stochastic, device_type="cuda").eager > 0, "the kernel does not round stochastically"
