"""Run folders as ``qtrain train`` leaves them, with losses of one's choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
