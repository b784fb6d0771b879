"""The measured plan of a run with ``compute=auto``: in its folder, from a cache, or measured now; the same on all ranks.

RUN/plan.json                          what this run decided by; a resumed run decides by it again
$QTRAIN_CACHE/plans/DIGEST.json        what was measured on this device with these versions
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from qtrain_kernels.cpu_tier import tier

from qtrain.data.cache import cache_root
from qtrain.nn.measured_plan import Measure, Problem, Timing, measured, of_json, time_problem, to_json
from qtrain.nn.surgery import Faster
from qtrain.quant import LinearRecipe

from .processes import by_rank_zero
from .run_folder import PLAN, versions, write_json


def device_of_plans(device: str) -> str:
    """What a measurement holds for: the device, its kernels and threads, and the versions."""
    if device == "cuda":
        here = torch.cuda.get_device_name()
    else:
        here = (
            f"{platform.processor() or platform.machine()}, {tier().name}, {torch.get_num_threads()} threads"
        )
    found = {k: v for k, v in versions().items() if k in ("torch", "triton", "git_commit", "qtrain")}
    return json.dumps({"device": here, **found}, sort_keys=True)


def _read(path: Path) -> dict[str, Timing]:
    try:
        return of_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # there is none, or it was cut: measured again


def faster_layers(
    folder: Path, *, device: str, tokens: int, dtype: torch.dtype, measure: Measure = time_problem
) -> Faster:
    """For ``apply_recipe``: which layers are faster natively. tokens: of a forward in one process.

    Rank 0 reads and measures, and writes ``plan.json``; all ranks call it.
    """

    def faster(layers: Mapping[str, tuple[tuple[int, int], LinearRecipe]]) -> set[str]:
        named = {
            name: Problem(shape, recipe, tokens, str(dtype).removeprefix("torch."))
            for name, (shape, recipe) in layers.items()
        }
        problems = {problem.key: problem for problem in named.values()}
        plan = by_rank_zero(lambda: _plan(folder, problems, device, measure))
        return {name for name, problem in named.items() if plan[problem.key].native}

    return faster


def _plan(folder: Path, problems: Mapping[str, Problem], device: str, measure: Measure) -> dict[str, Timing]:
    digest = hashlib.sha256(device_of_plans(device).encode()).hexdigest()[:32]
    cache = cache_root() / "plans" / f"{digest}.json"
    remembered, before = _read(cache), _read(folder / PLAN)
    plan = measured(problems, device, {**remembered, **before}, measure)
    write_json(folder / PLAN, to_json({**before, **plan}))
    # What the run's folder said may be of another device, where the run began
    if new := {key: timing for key, timing in plan.items() if key not in remembered and key not in before}:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, to_json({**remembered, **new}))
        except OSError:  # it is measured again another time; nothing else depends on it
            print(f"the measured plan could not be kept in {cache}", flush=True)
    return plan
