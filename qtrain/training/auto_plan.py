"""The measured plan of a run with ``compute=auto``: in its folder, from a cache, or measured now; the same on all ranks.

RUN/plan.json                          what this run decided by, the last plan in it in force; a resumed run decides by it
$QTRAIN_CACHE/plans/DIGEST.json        what was measured on this device with these versions

Where a run goes on elsewhere (another device, other versions, compiled or not), it is measured again and says so, and the
file keeps both. A checkpoint holds the names of the layers that were native, which is what an evaluation goes by.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from qtrain_kernels.cpu_tier import tier

from qtrain.data.cache import cache_root
from qtrain.nn.measured_plan import Measure, Plan, Problem, Timing, of_json, time_problem, to_json
from qtrain.nn.surgery import Faster
from qtrain.quant import LinearRecipe

from .processes import by_rank_zero
from .run_folder import PLAN, versions, write_json


def place(device: str, *, compiled: bool) -> dict[str, Any]:
    """What a run's measurement holds for: the device, its kernels and threads, the versions, and how it runs."""
    if device == "cuda":
        here = torch.cuda.get_device_name()
    else:
        here = f"{_cpu_name()}, {tier().name}, {torch.get_num_threads()} threads"
    return {
        "device": here,
        "compiled": compiled,
        **{name: versions()[name] for name in ("qtrain", "torch", "triton")},
    }


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def faster_layers(
    folder: Path,
    *,
    device: str,
    tokens: int,
    dtype: torch.dtype,
    compiled: bool,
    measure: Measure = time_problem,
) -> Faster:
    """For ``apply_recipe``: which layers are faster natively. tokens: of a forward in one process.

    Rank 0 reads and measures, and writes ``plan.json``; all ranks call it.
    """

    def faster(layers: Mapping[str, tuple[tuple[int, int], LinearRecipe]]) -> set[str]:
        named = {
            name: Problem(shape, recipe, tokens, str(dtype).removeprefix("torch."), compiled)
            for name, (shape, recipe) in layers.items()
        }
        problems = {problem.key: problem for problem in named.values()}
        timings = by_rank_zero(lambda: _planned(folder, problems, device, measure))
        return {name for name, problem in named.items() if timings[problem.key].native}

    return faster


def as_trained(native: Iterable[str]) -> Faster:
    """For ``apply_recipe`` of a run's checkpoint: the layers that were native are, where they can be, and no others."""
    names = set(native)
    return lambda layers: names & set(layers)


def _say(sentence: str) -> None:
    print(f"compute=auto: {sentence}", file=sys.stderr, flush=True)


def _read(path: Path) -> list[Plan]:
    """Empty where there is none, or where it is no plan, which is said: it is measured again."""
    try:
        return of_json(path.read_text(encoding="utf-8")) if path.exists() else []
    except (OSError, ValueError) as error:
        _say(f"{path} is no measured plan, cut or written by something else ({error}); measured again")
        return []


def _planned(
    folder: Path, problems: Mapping[str, Problem], device: str, measure: Measure
) -> dict[str, Timing]:
    compiled = next(iter(problems.values())).compiled
    here, path = place(device, compiled=compiled), folder / PLAN
    # Kernels change from commit to commit; a run keeps its decision all the same
    state = json.dumps({**here, "commit": versions()["git_commit"]}, sort_keys=True)
    cache = cache_root() / "plans" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
    before, remembered = _read(path), _read(cache)
    own = {k: t for plan in before if plan.where == here for k, t in plan.timings.items()}
    known = {k: t for plan in remembered for k, t in plan.timings.items()}
    if before and not own:
        _say(f"{path} was measured on {_shown(before[-1].where)}; here, on {_shown(here)}, it is anew")
    begun = time.perf_counter()
    new = {key: measure(problem, device) for key, problem in problems.items() if key not in {**known, **own}}
    timings = {**known, **new, **own}
    chosen = {key: timings[key] for key in problems}
    if new:
        kinds = f"{len(new)} kind{'s' if len(new) > 1 else ''} of layers"
        _say(f"timed {kinds} natively and simulated in {time.perf_counter() - begun:.0f} s ({path})")
    others = [plan for plan in before if plan.where != here]
    write_json(path, to_json([*others, Plan(here, {**own, **chosen})]))
    if new:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, to_json([Plan(here, {**known, **new})]))
        except OSError as error:  # it is measured again another time; nothing else depends on it
            _say(f"the plan could not be kept in {cache}: {error.strerror}")
    return chosen


def _shown(where: Mapping[str, Any]) -> str:
    how = "compiled" if where.get("compiled") else "eager"
    named = [f"{name} {where[name]}" for name in ("qtrain", "torch", "triton") if where.get(name)]
    return f"{where.get('device')} ({', '.join([how, *named])})"
