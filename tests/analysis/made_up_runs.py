"""Run folders as ``qtrain train`` leaves them, with losses of one's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PARAMETERS = 1000


def write_run(
    root: Path,
    name: str,
    seed: int,
    loss: float | None,
    *,
    outcome: str | None = "completed",
    run: str | None = None,
    spikes: tuple[int, ...] = (),
    clipped_every: int = 10,
    best: float | None = None,
    state_bytes: int = 8 * PARAMETERS,
    tokens_per_s: float = 1000.0,
    **config: Any,
) -> Path:
    """outcome None: killed at step 60 of 100, with a cut last line. best: a better validation before the last."""
    folder = root / name / (run or f"seed{seed}")
    folder.mkdir(parents=True)
    whole = {
        "name": name, "seed": seed, "steps": 100, "batch_sequences": 4, "sequence_tokens": 8, "precision": "fp32",
        "eval_windows": 2, "model": {"layers": 1}, "schedule": {"warmup_steps": 1}, "device": "cpu", "compile": False,
        "optimizer": {"lr": 0.003, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0}, **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": i + 1, "loss": 3.0 + 0.01 * (i % 3) + (2.0 if i in spikes else 0.0),
         "clipped": i % clipped_every == 0, "tokens_per_s": tokens_per_s}
        for i in range(100 if outcome else 60)
    ]  # fmt: skip
    if loss is not None:
        shown = "nan" if loss != loss else loss
        rows += [{"kind": "val", "step": 50, "val_loss": best or loss + 0.1 if loss == loss else 3.0}]
        rows += [{"kind": "val", "step": 100, "val_loss": shown}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text if outcome else text + '{"kind": "tr')
    if outcome:
        verdict = {"outcome": outcome, "step": 100 if outcome == "completed" else 33, "message": "made up"}
        (folder / "verdict.json").write_text(json.dumps(verdict))
    if outcome == "completed" and loss is not None:
        summary = {
            "steps": 100, "tokens": 3200, "val_loss": shown, "val_bits_per_byte": shown, "parameters": PARAMETERS,
            "optimizer_state_bytes": {"total": state_bytes, "as_float32": 8 * PARAMETERS},
            "data": {"shards": "a", "val_windows": 2},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def healthy_losses(steps: int, seed: int, end: float = 2.5) -> np.ndarray:
    """A training loss as small language models have it: from ln 257 down, with the noise of batches, heavier than Gaussian."""
    draw = np.random.default_rng(seed)
    t = np.arange(steps)
    return end + (5.55 - end) * np.exp(-t / (0.15 * steps)) + 0.06 * draw.standard_t(8, steps)


def write_curve_run(
    root: Path,
    name: str,
    seed: int,
    losses: Sequence[float] | np.ndarray,
    *,
    steps: int | None = None,
    grad_norms: Sequence[float] | np.ndarray | None = None,
    validation: dict[int, float] | None = None,
    verdict: dict[str, Any] | None = None,
    windows: np.ndarray | None = None,
    instruments: Sequence[dict[str, Any]] = (),
    observations: Sequence[dict[str, Any]] = (),
    run: str | None = None,
    summary: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run with these losses of its steps. steps: what it was to do; verdict None with fewer losses: killed. validation:
    step -> loss; by default the median of the ten losses before every tenth of the run. windows: of the final validation.
    """
    folder = root / name / (run or f"seed{seed}")
    folder.mkdir(parents=True)
    steps = steps or len(losses)
    whole = {
        "name": name, "seed": seed, "steps": steps, "batch_sequences": 4, "sequence_tokens": 8, "precision": "fp32",
        "eval_windows": 8, "schedule": {"warmup_steps": 10}, "device": "cpu", "compile": False,
        "model": {"layers": 1, "width": 8, "tie_embeddings": False, "init_from": None}, "data": {"folder": str(root), "tokenizer": "byte"},
        "recipe": {"_target_": "qtrain.quant.ModelRecipe"},
        "optimizer": {"lr": 0.003, "betas": [0.9, 0.95], "states": {"exp_avg": "none", "exp_avg_sq": "none"}}, **config,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    if grad_norms is None:
        grad_norms = 0.5 + 0.05 * np.random.default_rng(seed + 1000).standard_normal(len(losses)) ** 2
    if validation is None:
        every = max(steps // 10, 1)
        validation = {
            s: float(np.median(losses[max(0, s - 10) : s])) for s in range(every, len(losses) + 1, every)
        }
    rows: list[dict[str, Any]] = []
    for i, (loss, norm) in enumerate(zip(losses, grad_norms, strict=True), start=1):
        rows.append({
            "kind": "train", "step": i, "tokens": 32 * i, "loss": shown(loss), "grad_norm": shown(norm),
            "clipped": bool(norm > 1), "lr": 0.003, "tokens_per_s": 1000.0,
        })  # fmt: skip
        if i in validation:
            rows.append({"kind": "val", "step": i, "tokens": 32 * i, "val_loss": shown(validation[i])})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if instruments:
        text = "".join(json.dumps(sample(row)) + "\n" for row in instruments)
        (folder / "instruments.jsonl").write_text(text)
    if observations:
        (folder / "census.json").write_text(json.dumps({"eager": {"observations": list(observations)}}))
    if verdict is None and len(losses) == steps:
        verdict = {"outcome": "completed", "step": steps, "message": "completed"}
    if verdict is not None:
        (folder / "verdict.json").write_text(json.dumps(verdict))
    if verdict is not None and verdict["outcome"] == "completed":
        numbers = {
            "steps": steps, "tokens": 32 * steps, "val_loss": shown(list(validation.values())[-1]), "parameters": PARAMETERS,
            "optimizer_state_bytes": {"total": 8 * PARAMETERS, "as_float32": 8 * PARAMETERS},
            "data": {"shards": "a", "fingerprint": "f", "tokenizer": "byte", "val_windows": 8}, **(summary or {}),
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(numbers))
        if windows is not None:
            np.save(folder / "window_losses.npy", windows.astype(np.float32))
    return folder


def sample(row: dict[str, Any]) -> dict[str, Any]:
    """{"step": 1, "a/b/c": 2.0} as instruments.jsonl has it."""
    values: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        if name != "step":
            prefix, _, metric = name.rpartition("/")
            values.setdefault(prefix, {})[metric] = value
    return {"kind": "sample", "step": row["step"], "tokens": 32 * row["step"], "values": values}


def shown(value: float) -> float | str:
    """As the run writes what JSON lacks."""
    return float(value) if np.isfinite(value) else str(float(value))
