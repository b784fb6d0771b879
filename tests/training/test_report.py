"""The final table's line on the optimizer: what the last step really took."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtrain.optim import AdamW, fused
from qtrain.training import report


def stepped(**more: Any) -> AdamW:
    """Five tensors: two float32 ones, three with 8-bit states, one of those without a gradient."""
    tensors = [torch.nn.Parameter(torch.randn(8, 256)) for _ in range(5)]
    groups = [{"params": tensors[:3]}, {"params": tensors[3:], "quantize_states": False}]
    optimizer = AdamW(groups, states={"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"}, **more)
    for p in tensors[1:]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_every_tensor_that_stepped_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))  # the op runs its reference there
    found = report.fused_tensors(stepped())
    assert found == {"fused": 4, "tensors": 4, "eager": {}}
    assert report._fused_row(found) == "4 of 4 tensors in the fused kernel"


def test_those_that_stepped_eagerly_are_counted_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    optimizer = stepped()
    last = optimizer.param_groups[1]["params"][-1]
    last.data = last.data.t()
    last.grad = torch.randn(8, 256).t()
    optimizer.state.pop(last)
    optimizer.step()
    found = report.fused_tensors(optimizer)
    assert found == {"fused": 3, "tensors": 4, "eager": {"it or its gradient is not contiguous": 1}}
    text = "3 of 4 tensors in the fused kernel; 1 eagerly: it or its gradient is not contiguous"
    assert report._fused_row(found) == text
    found = report.fused_tensors(stepped(fused=False))
    assert found == {"fused": 0, "tensors": 4, "eager": {"fused=False": 4}}


def test_nothing_is_said_where_there_is_no_such_kernel() -> None:
    assert report.fused_tensors(stepped()) is None, "on a CPU"
    assert report.fused_tensors(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])) is None
    assert report.fused_tensors(AdamW([torch.nn.Parameter(torch.ones(2))])) is None, "no step yet"
