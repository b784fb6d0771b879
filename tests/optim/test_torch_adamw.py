"""TorchAdamW is torch's, and says what it holds."""

from __future__ import annotations

import pytest
import torch

from qtrain.optim import AdamW, TorchAdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_and_bytes(dtype: torch.dtype) -> None:
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 21).reshape(3, 7).to(dtype)) for _ in range(2))
    optimizer = TorchAdamW([p], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    ours = AdamW([q], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(3):
        for w, o in ((p, optimizer), (q, ours)):
            w.grad = torch.sin(torch.arange(21.0) * (i + 1)).reshape(3, 7).to(dtype)
            o.step()
    if dtype == torch.float32:
        assert torch.equal(p, q)
    size = 2 if dtype == torch.bfloat16 else 4
    assert optimizer.state_bytes() == {
        "step": 4, "exp_avg": 21 * size, "exp_avg_sq": 21 * size,
        "total": 4 + 42 * size, "as_float32": 4 + 42 * 4,
    }  # fmt: skip
