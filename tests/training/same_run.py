"""Are two runs the same run? Weights, packed states and curves, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qtrain.training.callbacks.metrics_jsonl import METRICS, read_metrics
from qtrain.training.saved import checkpoint_of, read_checkpoint

# What a clock measures differs between any two runs
_TIMED = ("seconds", "tokens_per_s")


def curve(folder: Path, after: int = 0) -> list[dict[str, Any]]:
    """The rows of the metrics after a step, without times."""
    rows = read_metrics(folder / METRICS)
    return [{k: v for k, v in row.items() if k not in _TIMED} for row in rows if row["step"] > after]


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested containers, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return {k: t for key, inner in items for k, t in tensors(inner, f"{name}/{key}").items()}


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a run's latest checkpoint."""
    saved = read_checkpoint(checkpoint_of(folder))
    return tensors({key: saved[key] for key in ("state_dict", "optimizer_states")})


def assert_same(a: Path, b: Path, *, after: int = 0) -> None:
    """after: compare the curves behind that step only."""
    assert curve(a, after) == curve(b, after)
    mine, theirs = state(a), state(b)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
