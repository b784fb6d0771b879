"""Time a training step (``qtrain bench step``), native training beside bf16 and fp32 (``bench train``), one linear
layer (``bench linear``), the loader of its data (``bench data``, in ``bench_data``), the instruments of a run (``bench
instruments run=FOLDER``) or the kernels (``qtrain bench kernels``). On a GPU, ``bench train`` and ``bench linear`` are
``bench_train_cuda`` and ``bench_linear_cuda``, with other arms (``bench_contenders``); what follows is of the rest.

A step is the forward, the loss and the backward, without an optimizer. The arms take turns, one step each a round
in rotating order, so that clocks, heat and other jobs weigh on all alike; a ratio of medians carries a 95 %
bootstrap interval over rounds. CPU time (of all threads of this process) is compared too: other jobs
stretch the wall clock, and CPU time much less.

    unquantized_compiled   the model as it is, torch.compile; what the others are compared with
    recipe_compiled        the model after ``apply_recipe``, torch.compile
    fake_quant_eager       W8A8G8 as it is usually written: quantize-dequantize around F.linear, eager
    unquantized_eager      the model as it is, eager
    native_compiled        the model after ``apply_recipe`` with compute=native, torch.compile
    fp32_compiled          the model as it is in float32, torch.compile

``bench step`` times the first four, ``bench train`` native_compiled, unquantized_compiled and fp32_compiled with the
machine's roof. The third is ``bench_fake_quant``.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench_instruments, bench_linear, bench_linear_cuda, bench_profile, bench_train_cuda
from .bench_fake_quant import fake_quantize_linears
from .bench_timing import Samples, ratio_interval, timed_in_turns

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from qtrain.models.protocol import ModelConfig
    from qtrain.quant import ModelRecipe

CONFIG = "bench"
POSITIONAL = "what"
BASELINE = "unquantized_compiled"
STEP_ARMS = (BASELINE, "recipe_compiled", "fake_quant_eager", "unquantized_eager")
TRAIN_ARMS = (BASELINE, "native_compiled", "fp32_compiled")
ARMS = (*STEP_ARMS, *TRAIN_ARMS[1:])


def forward_kernels(arguments: list[str]) -> int:
    """``qtrain bench kernels ...`` is ``python -m qtrain_kernels.bench ...``."""
    from qtrain_kernels import bench

    bench.main(arguments)
    return 0


FORWARDS = {"kernels": forward_kernels}


def check(cfg: DictConfig) -> None:
    """Raises ValueError or TypeError for what cannot be timed."""
    import torch

    bench_profile.check(cfg, _device(cfg))
    if cfg.what == "data":
        from . import bench_data

        return bench_data.check(cfg)
    if cfg.what == "instruments":
        return bench_instruments.check(cfg)
    if cfg.what == "linear" and _device(cfg) == "cuda":
        return bench_linear_cuda.check(cfg)
    if cfg.what == "train" and _device(cfg) == "cuda":
        return bench_train_cuda.check(cfg, _model_config(cfg))
    if cfg.what not in ("step", "train", "linear"):
        raise ValueError(
            f"what={cfg.what!r}: allowed are step, train, linear, data, instruments and kernels (qtrain bench kernels --help)"
        )
    arms = _arms(cfg)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms:
        raise ValueError(f"arms={arms}: allowed are {', '.join(ARMS)}, as in arms=[{BASELINE}]")
    if len(set(arms)) < len(arms):
        raise ValueError(f"arms={arms}: name each arm once")
    for key, least in (("batch_sequences", 1), ("sequence_tokens", 1), ("rounds", 5), ("warmup_rounds", 1)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise ValueError(f"{key}={cfg[key]!r}: must be an integer of at least {least}")
    if cfg.precision not in ("bf16", "fp32"):
        raise ValueError(f"precision={cfg.precision!r}: allowed are bf16 and fp32")
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={cfg.device!r}: allowed are auto, cpu and cuda")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device; device=cpu times the CPU")
    if (
        cfg.what != "linear"
        and any(arm.endswith("_compiled") for arm in arms)
        and _device(cfg) == "cpu"
        and not _compiler()
    ):
        raise ValueError(
            "arms that are compiled need a C++ compiler on a CPU: install g++, or give arms=[fake_quant_eager,unquantized_eager]"
        )
    config, _ = _model_config(cfg), _recipe(cfg)
    if cfg.sequence_tokens > config.sequence_tokens:
        raise ValueError(
            f"sequence_tokens={cfg.sequence_tokens}: this model reads at most {config.sequence_tokens}"
        )


def run(cfg: DictConfig) -> int:
    """Prints the table and writes the JSON file."""
    if cfg.what == "data":
        from . import bench_data

        return bench_data.run(cfg)
    from qtrain.training.host_memory import keep_freed_memory
    from qtrain.training.run_folder import write_text

    device = _device(cfg)
    if device == "cpu":
        keep_freed_memory()  # as a run does
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(cfg.output) if cfg.output else Path("outputs/bench") / f"{cfg.what}_{stamp}.json"
    report = {"settings": settings(cfg), **provenance(device)}

    def save(found: dict[str, Any]) -> None:
        report.update(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(report, indent=1))

    if cfg.what == "instruments":
        found = bench_instruments.measured(Path(cfg.run))
        text = bench_instruments.table(found)
    elif cfg.what == "linear":
        found, text = bench_linear_cuda.measured(cfg, save) if device == "cuda" else _linear(cfg)
    elif cfg.what == "train" and device == "cuda":
        found, text = bench_train_cuda.measured(cfg, _model_config(cfg), save)
    else:
        found, text = _steps(cfg, device)
    save(found)
    print(text)
    shown = ("device", "threads", "cpu_kernels", "torch", "triton", "commit")
    print(", ".join(f"{k} {report[k]}" for k in shown))
    print(f"written to {path}")
    return 0


def _steps(cfg: DictConfig, device: str) -> tuple[dict[str, Any], str]:
    """Of whole steps: what the file holds, and the table."""
    steps = {arm: build_arm(arm, cfg, device) for arm in _arms(cfg)}
    roof = bench_linear.roof_functions() if cfg.what == "train" and device == "cpu" else {}
    print(f"{', '.join(steps)}: warming up, which compiles", flush=True)
    timed = steps | {name: function for name, (function, _) in roof.items()}
    wall, cpu = timed_in_turns(timed, device, cfg.rounds, cfg.warmup_rounds)
    rates = bench_linear.roof_per_s(wall) if roof else {}
    rows = summarize({arm: wall[arm] for arm in steps}, cpu)
    text = table(rows) + (f"\n{bench_linear.roof_line(rates)}" if roof else "")
    return {"rows": rows, "roof_per_s": rates, "wall_ms": wall, "cpu_ms": cpu}, text


def _linear(cfg: DictConfig) -> tuple[dict[str, Any], str]:
    """Of one linear layer in several shapes: what the file holds, and the table."""
    import numpy as np

    recipe = dataclasses.replace(_recipe(cfg), compute="native", exclude=())
    results: dict[Any, Any] = {}
    for shape in bench_linear.SHAPES:
        print(f"T, I, O = {shape}", flush=True)
        steps = {arm: bench_linear.linear_step(arm, shape, recipe, cfg.seed) for arm in bench_linear.ARMS}
        roof = {name: function for name, (function, _) in bench_linear.roof_functions().items()}
        wall, cpu = timed_in_turns(steps | roof, "cpu", cfg.rounds, cfg.warmup_rounds)
        rates = bench_linear.roof_per_s(wall)
        results[shape] = {
            "median_ms": {arm: float(np.median(wall[arm])) for arm in steps},
            "speedup": {base: ratio_interval(wall[base], wall["native"]) for base in ("bf16", "fp32")},
            "cpu_speedup": {base: ratio_interval(cpu[base], cpu["native"]) for base in ("bf16", "fp32")},
            "floor_ms": bench_linear.floor_ms(shape, rates),
            "roof_per_s": rates,
            "wall_ms": wall,
            "cpu_ms": cpu,
        }
    text = f"{bench_linear.table(results)}\nlast {bench_linear.roof_line(rates)}"
    return {"shapes": [{"shape": shape, **result} for shape, result in results.items()]}, text


def _arms(cfg: DictConfig) -> list[str]:
    """Those that were named, or those of ``what``."""
    return list(cfg.arms if cfg.arms is not None else TRAIN_ARMS if cfg.what == "train" else STEP_ARMS)


def _device(cfg: DictConfig) -> str:
    import torch

    if cfg.device != "auto":
        return str(cfg.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _compiler() -> str | None:
    names = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _model_config(cfg: DictConfig) -> ModelConfig:
    from hydra.utils import instantiate

    # No tokenizer here; where a model leaves its vocabulary to one: bytes and the end of a document
    more = {"vocab_size": 257} if cfg.model.vocab_size is None else {}
    return instantiate(cfg.model, **more)


def _recipe(cfg: DictConfig) -> ModelRecipe:
    from hydra.utils import instantiate

    from qtrain.quant import ModelRecipe

    recipe = instantiate(cfg.recipe, _convert_="all")
    if not isinstance(recipe, ModelRecipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; its _target_ must be qtrain.quant.ModelRecipe")
    return recipe


def build_arm(arm: str, cfg: DictConfig, device: str) -> Callable[[int], None]:
    """A function that runs step number i of ``arm``: every arm has the same initial weights and tokens."""
    import torch
    import torch.nn.functional as F

    from qtrain.nn.surgery import apply_recipe

    bf16 = cfg.precision == "bf16" and arm != "fp32_compiled"
    config = _model_config(cfg)
    model = config.build(seed=cfg.seed).to(device)
    clock = None
    if arm in ("recipe_compiled", "native_compiled"):
        recipe = _recipe(cfg)
        if arm == "native_compiled":
            recipe = dataclasses.replace(recipe, compute="native")
        clock = apply_recipe(model, recipe, seed=cfg.seed).clock
    elif arm == "fake_quant_eager":
        fake_quantize_linears(model, exclude=("lm_head",))
    generator = torch.Generator().manual_seed(cfg.seed)
    shape = (cfg.batch_sequences, cfg.sequence_tokens + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    compute = torch.compile(loss_of, dynamic=False) if arm.endswith("_compiled") else loss_of

    def step(i: int) -> None:
        model.zero_grad(set_to_none=True)
        if clock is not None:
            clock.set(step=i)
        compute(tokens[:, :-1], tokens[:, 1:]).backward()

    return step


def summarize(wall: Samples, cpu: Samples) -> list[dict[str, Any]]:
    """One row an arm; ratios to the baseline, or to the first arm where the baseline was not timed."""
    import numpy as np

    base = BASELINE if BASELINE in wall else next(iter(wall))
    rows = []
    for name, values in wall.items():
        p20, median, p80 = (float(q) for q in np.quantile(values, [0.2, 0.5, 0.8]))
        row: dict[str, Any] = {"arm": name, "median_ms": median, "p20_ms": p20, "p80_ms": p80}
        row |= {"cpu_median_ms": float(np.median(cpu[name])), "rounds": len(values), "ratio_to": base}
        for key, samples in (("ratio", wall), ("cpu_ratio", cpu)):
            ratio, low, high = ratio_interval(samples[name], samples[base])
            row |= {key: ratio, f"{key}_low": low, f"{key}_high": high}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; intervals in brackets."""
    base = rows[0]["ratio_to"]
    lines = [
        f"| arm | median ms | p20 | p80 | time / {base} (95 %) | CPU ms | CPU time ratio (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r['ratio']:.3f} [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
        cpu_ratio = f"{r['cpu_ratio']:.3f} [{r['cpu_ratio_low']:.3f}, {r['cpu_ratio_high']:.3f}]"
        times = f"{r['median_ms']:.1f} | {r['p20_ms']:.1f} | {r['p80_ms']:.1f}"
        lines.append(f"| {r['arm']} | {times} | {ratio} | {r['cpu_median_ms']:.1f} | {cpu_ratio} |")
    return "\n".join(lines)


def settings(cfg: DictConfig) -> dict[str, Any]:
    """What was timed, as plain values."""
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def provenance(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    import importlib.metadata

    import torch
    from qtrain_kernels.cpu_tier import tier

    versions: dict[str, str | None] = {}
    for name in ("qtrain", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": str(tier()) if device == "cpu" else None,
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "commit": commit(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """The checkout's commit, "-dirty" with uncommitted changes of tracked files; None outside a checkout (a wheel
    installed below someone else's repository is none)."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        here = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.run([*here, *arguments], capture_output=True, text=True)

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
        return None
    dirty = "-dirty" if git("status", "--porcelain", "-uno").stdout.strip() else ""
    return git("rev-parse", "HEAD").stdout.strip() + dirty
