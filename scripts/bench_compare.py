"""How long does `qtrain compare` take? Writes made-up runs (arms of five seeds, curves, instruments, windows), compares them by the
command line, and prints the seconds and the size of the page.

    python scripts/bench_compare.py --runs 500 --steps 2000 --folder bench-compare
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from qtrain import cli

SEEDS = 5
LAYERS = 12


def write_run(folder: Path, arm: int, seed: int, steps: int) -> None:
    """A run of ``steps`` whose loss falls as a language model's does; arm 0 is unquantized, others end a little higher."""
    draw = np.random.default_rng(1000 * arm + seed)
    t = np.arange(1, steps + 1)
    data = np.random.default_rng(seed).normal(0, 0.05, steps)  # of a seed's batches: the same in all arms
    losses = 2.5 + 3 * np.exp(-t / (0.15 * steps)) + 0.001 * arm + data + draw.normal(0, 0.01, steps)
    norms = 0.5 * np.exp(0.2 * draw.normal(size=steps))
    folder.mkdir(parents=True)
    linear = {"fprop": {"input": "int8_row", "weight": f"int8_group{arm}"}} if arm else {}
    config = {
        "name": f"arm{arm:03d}", "seed": seed, "steps": steps, "batch_sequences": 16, "sequence_tokens": 128,
        "precision": "bf16", "eval_windows": 64, "model": {"layers": LAYERS, "width": 128}, "data": {"tokenizer": "byte"},
        "schedule": {"warmup_steps": 100}, "recipe": {"linear": linear},
        "optimizer": {"lr": 0.003, "states": {"exp_avg": "none", "exp_avg_sq": "none"}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows, instruments = [], []
    for i in range(steps):
        axes = {"step": i + 1, "tokens": 2048 * (i + 1)}
        rows.append({
            "kind": "train", **axes, "loss": losses[i], "grad_norm": norms[i], "clipped": bool(norms[i] > 1), "lr": 0.003,
            "seconds": 0.1 * i, "tokens_per_s": 20_000.0,
        })  # fmt: skip
        if (i + 1) % 100 == 0:
            rows.append({"kind": "val", **axes, "val_loss": float(np.median(losses[i - 20 : i + 1]))})
            if arm:
                operands = [
                    f"blocks.{k}.mlp.up/fprop.{o}" for k in range(LAYERS) for o in ("input", "weight")
                ]
                metrics = ("sqnr_db", "kurtosis", "clipped", "underflow")
                values = {f"quant/{o}": {m: float(draw.normal(35, 2)) for m in metrics} for o in operands}
                instruments.append({"kind": "sample", **axes, "values": values})
    for name, lines in (("metrics.jsonl", rows), ("instruments.jsonl", instruments)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "verdict.json").write_text(json.dumps({"outcome": "completed", "step": steps, "message": ""}))
    final = next(row["val_loss"] for row in reversed(rows) if row["kind"] == "val")
    summary = {"val_loss": final, "steps": steps, "parameters": 869_760, "data": {"fingerprint": "x"},
               "optimizer_state_bytes": {"total": 1_800_000, "as_float32": 7_000_000}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    np.save(folder / "window_losses.npy", (final + draw.normal(0, 0.3, 64)).astype(np.float32))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; removed at the end")
    options = parser.parse_args()
    for i in range(options.runs):
        write_run(
            options.folder / f"arm{i // SEEDS:03d}" / f"seed{i % SEEDS}", i // SEEDS, i % SEEDS, options.steps
        )
    out = options.folder / "comparison"
    wall, cpu = time.perf_counter(), time.process_time()
    code = cli.main(["compare", f"runs=[{options.folder}]", f"out={out}"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    size = (out / "comparison.html").stat().st_size
    shutil.rmtree(options.folder)
    print(
        f"{options.runs} runs of {options.steps} steps: {wall:.1f} s ({cpu:.1f} s of processor time), page of {size / 1e6:.1f} MB"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
