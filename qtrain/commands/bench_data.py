"""``qtrain bench data``: tokens a second of the loader, for the configured data, against what a training step needs.

The loader is the one of training, in the process of training and with nothing in its place: windows by sample index,
read, shuffled or streamed, and stacked into batches. What is needed comes from

    need=step          the unquantized step of ``model``, timed here; a quantized step is slower and needs less
    need=TOKENS_PER_S  a number, or a name of PUBLISHED
    step_ms=NUMBER     a step's time measured elsewhere

A loader with a ratio of 5 costs a fifth of a step where nothing overlaps it, and nothing where a device computes
meanwhile.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qtrain.training.datamodule import StreamLoader

TARGET = 5.0
# Tokens a second of one device. llm.c trains GPT-2 124M on 10 B tokens in 90 minutes on 8 A100 (its discussion 481): 231,000
# each; 500,000 is a round number above what one H100 does.
PUBLISHED = {"gpt2_124m_h100": 500_000.0}
# Batches are timed in groups of about so many seconds, so that a read from a disk does not count as one batch
_GROUP_SECONDS = 0.1


def check(cfg: DictConfig) -> None:
    """Raises ValueError or TypeError for what cannot be timed."""
    from .train import plain

    if not isinstance(cfg.seconds, int | float) or not cfg.seconds > 0:
        raise ValueError(f"seconds={cfg.seconds!r}: must be positive")
    if cfg.step_ms is not None and (not isinstance(cfg.step_ms, int | float) or not cfg.step_ms > 0):
        raise ValueError(f"step_ms={cfg.step_ms!r}: must be positive, or null")
    given = isinstance(cfg.need, int | float) and not isinstance(cfg.need, bool) and cfg.need > 0
    if not given and cfg.need not in ("step", *PUBLISHED):
        raise ValueError(f"need={cfg.need!r}: allowed are step, {', '.join(PUBLISHED)}, or tokens a second")
    for key in ("batch_sequences", "sequence_tokens"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]!r}: must be an integer of at least 1")
    _plan(plain(cfg))


def _plan(config: Mapping[str, Any]) -> Any:
    from qtrain.training.assembly import data_plan

    return data_plan(config["data"])


def run(cfg: DictConfig) -> int:
    """Prints the table and writes the JSON file."""
    from qtrain.training.run_folder import write_text

    from . import bench
    from .train import plain

    config = plain(cfg)
    corpus = _plan(config).open()
    device = bench._device(cfg)
    needed, source = need(cfg, device)
    loader = _loader(corpus, cfg)
    try:
        rates = timed(loader, cfg.batch_sequences * cfg.sequence_tokens, cfg.seconds)
    finally:
        loader.dataset.close()  # type: ignore[attr-defined]
    row = summarize(corpus.identity(), rates, needed, source)
    report = {
        "rows": [row],
        "settings": bench.settings(cfg),
        **bench.provenance(device),
        "tokens_per_s": rates,
    }
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(cfg.output) if cfg.output else Path("outputs/bench") / f"data_{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1))
    print(table(row))
    print(", ".join(f"{k} {report[k]}" for k in ("device", "threads", "torch", "commit")))
    print(f"written to {path}")
    return 0


def need(cfg: DictConfig, device: str) -> tuple[float, str]:
    """(tokens a second that a step consumes, where the number is from)."""
    import numpy as np

    from . import bench

    tokens = cfg.batch_sequences * cfg.sequence_tokens
    if cfg.step_ms is not None:
        return tokens / cfg.step_ms * 1e3, f"step_ms={cfg.step_ms}"
    if cfg.need in PUBLISHED:
        return PUBLISHED[cfg.need], str(cfg.need)
    if cfg.need != "step":
        return float(cfg.need), "given"
    compiled = device == "cuda" or bench._compiler() is not None
    arm = "unquantized_compiled" if compiled else "unquantized_eager"
    print(f"{arm}: the step that the loader is held to", flush=True)
    wall, _ = bench.timed_in_turns(
        {arm: bench.build_arm(arm, cfg, device)}, device, cfg.rounds, cfg.warmup_rounds
    )
    return tokens / float(np.median(wall[arm])) * 1e3, f"{arm}, timed here"


def _loader(corpus: Any, cfg: DictConfig) -> StreamLoader:
    from qtrain.data.stream import GlobalBatchSampler
    from qtrain.training.datamodule import StreamLoader

    batch, taken = cfg.batch_sequences, iter(range(1 << 62))
    sampler = GlobalBatchSampler(start_step=0, max_steps=1 << 62, global_batch=batch, micro_batch=batch)
    windows = corpus.train_windows(cfg.sequence_tokens, cfg.seed)
    return StreamLoader(windows, sampler, lambda: next(taken))


def timed(loader: StreamLoader, batch_tokens: int, seconds: float) -> list[float]:
    """Tokens a second of each group of batches, after a first batch, which opens and fills what there is to fill."""
    batches = iter(loader)
    next(batches)
    rates: list[float] = []
    begun = time.perf_counter()
    while not rates or time.perf_counter() - begun < seconds:
        first, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - first) < _GROUP_SECONDS or count == 0:
            next(batches)
            count += 1
        rates.append(count * batch_tokens / spent)
    return rates


def summarize(identity: Mapping[str, Any], rates: list[float], needed: float, source: str) -> dict[str, Any]:
    """The row of the table. Groups take equal time, so that their mean is that of the whole."""
    import numpy as np

    p20, p80 = (float(q) for q in np.quantile(rates, [0.2, 0.8]))
    mean = float(np.mean(rates))
    return {
        "data": identity["shards"],
        "loader_tokens_per_s": mean,
        "p20_tokens_per_s": p20,
        "p80_tokens_per_s": p80,
        "needed_tokens_per_s": needed,
        "needed_by": source,
        "ratio": mean / needed,
        "target": TARGET,
        "met": mean / needed >= TARGET,
    }


def table(row: Mapping[str, Any]) -> str:
    """A Markdown table."""
    keys = ("loader_tokens_per_s", "p20_tokens_per_s", "p80_tokens_per_s", "needed_tokens_per_s")
    rates = " | ".join(f"{row[key]:,.0f}" for key in keys)
    verdict = "met" if row["met"] else "MISSED"
    return "\n".join(
        [
            "| data | loader tokens/s | p20 | p80 | needed tokens/s | needed by | ratio | target |",
            "|---|---|---|---|---|---|---|---|",
            f"| {row['data']} | {rates} | {row['needed_by']} | {row['ratio']:.1f} | {row['target']:.0f}: {verdict} |",
        ]
    )
