"""What the processes of ``test_processes`` do; without Lightning, whose import takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from qtrain.training.processes import (
    ProcessSettings,
    RankZeroFailed,
    any_rank,
    broadcast,
    by_rank_zero,
    connected,
    rank,
    rank_zero_first,
    summed,
    world_size,
)


def _touch(path: Path) -> bool:
    """Whether it was there already."""
    was_there = path.exists()
    path.touch()
    return was_there


def work(task: dict[str, Any]) -> int:
    """What each rank sees of the others."""
    out, found = Path(task["out"]), {}
    with connected(ProcessSettings(devices=3), "cpu"):
        found["place"] = [rank(), world_size()]
        found["broadcast"] = broadcast({"from": rank()})
        found["any"] = [any_rank(rank() == 2), any_rank(False), any_rank(True)]
        found["sum"] = str(summed(torch.tensor([rank(), 1.0, math.nan if rank() == 1 else 0.0])).tolist())
        found["alone"] = by_rank_zero(rank)
        found["first"] = rank_zero_first(lambda: _touch(out / "first"))
        try:
            by_rank_zero(out.mkdir)
        except (FileExistsError, RankZeroFailed) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    (out / f"found-{rank()}.json").write_text(json.dumps(found))
    return 0
