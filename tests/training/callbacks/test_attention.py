"""The largest attention logit, against attention as it is written."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.attention import AttentionLogits, max_logit
from qtrain.training.fit import train


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_max_logit(kv_heads):
    random = torch.Generator().manual_seed(kv_heads)
    q, k = torch.randn(2, 6, 5, 4, generator=random), torch.randn(2, kv_heads, 5, 4, generator=random)
    best = -math.inf
    for b in range(2):
        for h in range(6):
            for i in range(5):
                for j in range(i + 1):
                    best = max(best, float(q[b, h, i] @ k[b, h // (6 // kv_heads), j]) / 2)
    assert max_logit(q, k) == pytest.approx(best, rel=1e-6)


def test_the_future_does_not_count():
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    q[0, 0, 0], k[0, 0, 2] = 100.0, 100.0  # the first token does not see the last
    assert max_logit(q, k) == 0
    q[0, 0, 2] = 1.0
    assert max_logit(q, k) == 200.0


def test_a_slice_is_needed():
    with pytest.raises(ValueError, match=r"callbacks\.attention\.sequences=0"):
        AttentionLogits(sequences=0)


@pytest.mark.parametrize("model", ["gpt_1m", "llama_1m"])
def test_a_run_whose_queries_are_large_is_told(configure, tmp_path, model, monkeypatch):
    import qtrain.training.callbacks.attention as attention

    monkeypatch.setattr(attention, "MAX_LOGIT", 1e-3)
    overrides = [
        f"model={model}",
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "steps=1",
        "~callbacks.census",
    ]
    _, folder = train(assemble(configure(tmp_path, *overrides, "recipe=none")))
    found = read_instruments(folder / INSTRUMENTS)
    logit, z = (found.samples[1][name] for name in ("attention/blocks.0.attn/max_logit", "stability/z_loss"))
    assert [(a.name, a.value) for a in found.alerts] == [("attention/max_logit", logit)]
    # Near its initial weights the model says nothing of 257 bytes
    assert z == pytest.approx(math.log(257) ** 2, rel=0.02)
