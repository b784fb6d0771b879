"""What a run would take: memory of a GPU, time of a step, days, cost, and what each recipe saves; nothing is trained.

    qtrain plan model=llama_1b recipe=int8_lean gpus=8 hardware=h100 micro_batch_sequences=8
    qtrain plan model=llama_1b gpus=64 trainer.strategy=fsdp2 recipes=[none,all_gemms,fp8_rowwise] png=plan.png json=plan.json
    qtrain plan check=true                  small models planned for this machine, and measured on it

hardware=this measures the rates of this machine first. The model of memory and time, what is measured and what is assumed, and how
far it was off: docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .named_recipes import recipe_config
from .train import plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qtrain.planning.plan import Inputs, RunPlan
    from qtrain.quant import ModelRecipe

CONFIG = "plan"
_NUMBERS = ("tokens", "target_loss")
_FLAGS = ("compile", "trace_compiled", "activation_checkpointing", "check")
# Keys that belong to a GPU's memory: what torch does not count, and what its allocator loses
_MEMORY = ("overhead_gib", "margin_fraction")


def _check_values(config: dict[str, Any]) -> None:
    for name in _FLAGS:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name}={config[name]!r}: true or false")
    for name in _NUMBERS:
        value = config[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
        ):
            raise ValueError(f"{name}={value!r}: a positive number, or null")
    for name in _MEMORY:
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name}={value!r}: must be 0 or more")
    for name, endings in (("json", (".json",)), ("png", (".png",))):
        if config[name] is not None and not str(config[name]).endswith(endings):
            raise ValueError(f"{name}={config[name]}: a file whose name ends in {endings[0]}")


def _gpus(config: dict[str, Any], per_node: int) -> dict[str, Any]:
    """The trainer's part, with ``gpus`` in the place of devices and nodes."""
    gpus, trainer = config["gpus"], dict(config["trainer"])
    if gpus is None:
        return trainer
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ValueError(
            f"gpus={gpus!r}: a whole number, 1 or more, or null for trainer.devices * trainer.num_nodes"
        )
    if gpus > per_node and gpus % per_node:
        raise ValueError(
            f"gpus={gpus}: nodes of {per_node}; take gpus={gpus // per_node * per_node}, or hardware.gpus_per_node"
        )
    return {**trainer, "devices": min(gpus, per_node), "num_nodes": max(1, gpus // per_node)}


def inputs_of(config: dict[str, Any], *, measure: bool) -> Inputs:
    """measure: whether ``hardware=this`` is measured in full; else a moment's measurement takes its place. Raises ValueError or
    TypeError for what cannot be planned."""
    from qtrain.planning.budget import LAWS, Failures
    from qtrain.planning.communication import LowBits
    from qtrain.planning.plan import Inputs
    from qtrain.training.assembly import OptimizerParts, build
    from qtrain.training.processes import ProcessSettings
    from qtrain.training.settings import RunSettings

    _check_values(config)
    if config["scaling_law"] not in LAWS:
        raise ValueError(f"scaling_law={config['scaling_law']!r}: allowed are {', '.join(LAWS)}")
    if config["tokens"] is not None and config["target_loss"] is not None:
        raise ValueError("tokens and target_loss: give one of them")
    device = _device(config["hardware"], config["sequence_tokens"] if measure else None)
    processes = ProcessSettings.of(_gpus(config, device.gpus_per_node))
    settings = _settings(config, processes.world_size, RunSettings)
    model = config["model"]
    if model.get("vocab_size", 0) is None:
        # No tokenizer here; where a model leaves its vocabulary to one: bytes and the end of a document
        model = {**model, "vocab_size": 257}
    model_config = build(model)
    if settings.sequence_tokens > model_config.sequence_tokens:
        raise ValueError(
            f"sequence_tokens={settings.sequence_tokens} exceeds model.sequence_tokens={model_config.sequence_tokens}; shorten the "
            "sequences or raise both"
        )
    optimizer = OptimizerParts.of(config["optimizer"])
    return Inputs(
        model_config=model_config,
        make_optimizer=optimizer.make,
        weight_decay=optimizer.weight_decay,
        device=device,
        gpus=processes.world_size,
        low_bits=LowBits.of(processes.communication),
        strategy=processes.sharding if processes.world_size > 1 else "none",
        batch_sequences=settings.batch_sequences,
        micro_batch_sequences=0
        if config["micro_batch_sequences"] is None
        else settings.micro_batch_sequences,
        sequence_tokens=settings.sequence_tokens,
        bf16=settings.precision == "bf16",
        compile=settings.compile,
        trace_compiled=config["trace_compiled"],
        checkpointing=settings.activation_checkpointing,
        overhead_gib=float(config["overhead_gib"]) if device.type == "cuda" else 0.0,
        margin_fraction=float(config["margin_fraction"]),
        tokens=config["tokens"],
        target_loss=config["target_loss"],
        law=LAWS[config["scaling_law"]],
        failures=Failures.of(config["failures"]),
    )


def _device(config: dict[str, Any], sequence_tokens: int | None) -> Any:
    """sequence_tokens: of the attention that ``hardware=this`` measures; None: a moment's measurement, for checks."""
    from qtrain.planning.devices import Device

    if not config.get("calibrate"):
        return Device.of({key: value for key, value in config.items() if key != "calibrate"})
    from qtrain.planning.calibration import calibrated

    changed = {key: value for key, value in config.items() if key != "calibrate"}
    found = (
        calibrated(scale=1 / 64)
        if sequence_tokens is None
        else calibrated(sequence_tokens=min(sequence_tokens, 4096))
    )
    unknown = [name for name in found.unknown if name not in changed]
    return dataclasses.replace(found, **changed, unknown=unknown)


def _named_device(name: str) -> Any:
    """Of a file in configs/hardware."""
    from omegaconf import OmegaConf

    from qtrain.cli import config_dir
    from qtrain.planning.devices import Device

    values: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "hardware" / f"{name}.yaml"))
    return Device.of(values)


def _settings(config: dict[str, Any], processes: int, settings: Any) -> Any:
    """RunSettings; with a micro-batch of one sequence where none is given."""
    micro = config["micro_batch_sequences"]
    given = 1 if micro is None else micro
    made = settings.of(
        {**config, "micro_batch_sequences": given, "steps": 1, "eval_every_steps": 1, "device": "auto"}
    )
    made.accumulate(processes)
    return made


def _recipes(config: dict[str, Any]) -> dict[str, ModelRecipe]:
    """By name, the planned one first."""
    from qtrain.quant import ModelRecipe
    from qtrain.training.assembly import build

    recipe = build(config["recipe"])
    if not isinstance(recipe, ModelRecipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; its _target_ must be qtrain.quant.ModelRecipe")
    found = {_chosen(): recipe}
    names = config["recipes"]
    if not isinstance(names, list):
        raise ValueError(
            f"recipes={names!r}: a list, as in recipes=[none,all_gemms,'all_gemms compute=native']"
        )
    for text in names:
        if str(text) not in found:
            found[str(text)] = build(recipe_config(str(text)))
    return found


def _chosen() -> str:
    """What the command line calls the planned recipe."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return "recipe"
    return str(HydraConfig.get().runtime.choices.get("recipe", "recipe"))


def check(cfg: DictConfig) -> None:
    """Raises ValueError or TypeError for what cannot be planned."""
    config = plain(cfg)
    inputs = inputs_of(config, measure=False)
    from qtrain.planning.plan import refused

    first = next(iter(_recipes(config).values()))
    if not config["check"] and not config["hardware"].get("calibrate"):
        refused(inputs, first)


def run(cfg: DictConfig) -> int:
    """0; 1 where the planned recipe does not fit; of check=true 1 where what must be exact is not."""
    from qtrain.planning import report

    config = plain(cfg)
    if config["check"]:
        from qtrain.planning import check as checks

        found = checks.measured(_named_device("h200"))
        print(checks.table(found))
        if config["json"]:
            _write(Path(config["json"]), checks.as_numbers(found))
        return 0 if checks.exact(found) else 1
    from qtrain.planning.plan import with_micro_batch

    recipes = _recipes(config)
    inputs = with_micro_batch(inputs_of(config, measure=True), next(iter(recipes.values())))
    plans, refused = planned(inputs, recipes)
    print(report.tables(inputs, plans))
    for name, why in refused.items():
        print(f"{name} is not planned: {why}")
    if config["json"]:
        numbers = report.as_numbers(inputs, plans, refused)
        _write(Path(config["json"]), {"config": config, **numbers})
    if config["png"]:
        from qtrain.planning import figure

        figure.save(inputs, plans, Path(config["png"]))
    return 0 if plans[0].fits else 1


def _write(path: Path, numbers: Any) -> None:
    from qtrain.training.run_folder import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(numbers, indent=1) + "\n")


def planned(inputs: Inputs, recipes: dict[str, ModelRecipe]) -> tuple[list[RunPlan], dict[str, str]]:
    """The plans, and why others have none. Raises ValueError where it is the first, the one that was asked for."""
    from qtrain.planning.plan import plan_run

    plans, refused = [], {}
    for i, (name, recipe) in enumerate(recipes.items()):
        try:
            plans.append(plan_run(inputs, name, recipe))
        except (ValueError, TypeError) as error:
            if i == 0:
                raise
            refused[name] = str(error)
    return plans, refused
