"""From a plain configuration to the parts of a run, without Lightning and without Hydra.

A configuration is nested dicts, lists, strings and numbers, as it stands in ``config.yaml`` and inside every
checkpoint; ``_target_`` names the class that a mapping describes. So a saved run is built again, in a notebook
as by a command, from what it saved. Building everything here costs milliseconds: a wrong value is found before
data are read.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from qtrain_kernels.cpu_tier import tier
from torch import nn
from torch.optim import Optimizer

from qtrain.data.corpus import DataPlan, PreparedText
from qtrain.data.mixture import Mixture
from qtrain.data.tokenizers import BpeTraining, Tokenizer
from qtrain.models.protocol import ModelConfig
from qtrain.nn.native_ops import missing_on, obstacles
from qtrain.optim import parameter_groups
from qtrain.quant import ModelRecipe

from .processes import ProcessSettings
from .settings import RunSettings

# What the optimizer's mapping holds beside the arguments of its class.
_CLIP = "clip_norm"
# Top-level knobs of the optimizers that have ``states``.
_MOMENTS = ("m1", "m2")


def locate(target: str) -> Any:
    """The class or function of a dotted name; raises ValueError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"_target_ {target!r}: {error}; write package.module.Name of something that exists"
        ) from error


def build(value: Any, **more: Any) -> Any:
    """``value`` with every mapping that has a ``_target_`` replaced by that target called on its other keys.
    more: further arguments of the outermost. Raises ValueError, naming the target, for arguments it lacks."""
    if isinstance(value, Mapping):
        built = {str(k): build(v) for k, v in value.items() if k != "_target_"}
        if "_target_" not in value:
            return built
        target = locate(value["_target_"])
        try:
            return target(**built, **more)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ValueError(f"{value['_target_']}: {error}") from error
    if isinstance(value, list | tuple):
        return [build(v) for v in value]
    return value


@dataclass(frozen=True, kw_only=True)
class OptimizerParts:
    """``make(groups)`` gives the optimizer. clip_norm: of the whole gradient; None: no clipping."""

    target: Mapping[str, Any]
    weight_decay: float
    clip_norm: float | None

    @staticmethod
    def of(config: Mapping[str, Any]) -> OptimizerParts:
        """Raises ValueError for a clip that is not positive and for whatever the optimizer refuses."""
        clip = config.get(_CLIP)
        if clip is not None and not clip > 0:
            raise ValueError(f"optimizer.{_CLIP}={clip!r}: must be positive, or null for no clipping")
        target = {k: v for k, v in config.items() if k != _CLIP}
        parts = OptimizerParts(
            target=target, weight_decay=float(config.get("weight_decay", 0.0)), clip_norm=clip
        )
        parts.make([{"params": [nn.Parameter(torch.zeros(1))]}])
        return parts

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        return build(self.target, params=groups)

    def for_model(self, model: nn.Module) -> Optimizer:
        return self.make(parameter_groups(model, self.weight_decay))


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run. ``config`` is the plain configuration they were made from. ``tokenizer``: may be still to be
    trained; the prepared data have the one that was."""

    config: Mapping[str, Any]
    settings: RunSettings
    model_config: ModelConfig
    recipe: ModelRecipe
    optimizer: OptimizerParts
    schedule: Callable[[int], float]
    data: DataPlan

    @property
    def tokenizer(self) -> Tokenizer | BpeTraining | None:
        """Of the data, which may be still to be trained: what is opened has the one that was. None where they name
        none."""
        return self.data.tokenizer

    @property
    def processes(self) -> ProcessSettings:
        return ProcessSettings.of(self.config["trainer"])

    @property
    def world_size(self) -> int:
        """Processes of the run, as the trainer's configuration says."""
        return self.processes.world_size

    def make_model(self, *, pretrained: bool = True) -> nn.Module:
        """The model with its initial weights, in high precision; of type ``LanguageModel``. pretrained: see
        ``ModelConfig.build``."""
        model = self.model_config.build(seed=self.settings.seed, pretrained=pretrained)
        model.set_activation_checkpointing(self.settings.activation_checkpointing)
        return model


def _check_fit(parts: Assembly) -> None:
    """What one part demands of another."""
    settings, model, vocabulary = parts.settings, parts.model_config, parts.data.vocab_size
    if settings.sequence_tokens > model.sequence_tokens:
        raise ValueError(
            f"sequence_tokens={settings.sequence_tokens} exceeds model.sequence_tokens={model.sequence_tokens}; "
            "shorten the sequences or raise both"
        )
    if model.vocab_size < vocabulary:
        whose = "data" if parts.tokenizer is None else f"tokenizer {parts.tokenizer.name!r}"
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is less than the {vocabulary} ids of the {whose}; set "
            f"model.vocab_size={vocabulary} or more"
        )
    settings.accumulate(parts.world_size)
    optimizer = parts.optimizer.target["_target_"]
    idle = [key for key in _MOMENTS if key in parts.config]
    if idle and "states" not in parts.optimizer.target:
        raise ValueError(
            f"{' and '.join(idle)} would do nothing: {optimizer} has states of its own; take them out (~{' ~'.join(idle)}), or "
            "take optimizer=adamw, whose moments they choose"
        )
    if parts.processes.sharding == "fsdp2" and not hasattr(locate(optimizer), "full_state_dict"):
        raise ValueError(
            f"optimizer {optimizer} under trainer.strategy=fsdp2: its states could not be gathered into a checkpoint; "
            "take optimizer=adamw (qtrain.optim.AdamW), or trainer=ddp"
        )
    tokens = settings.micro_batch_sequences * settings.sequence_tokens
    for recipe in (parts.recipe.linear, *(rule.recipe for rule in parts.recipe.rules)):
        if recipe is not None and recipe.learns_steps and parts.processes.sharding == "fsdp2":
            raise ValueError(
                "a recipe with clip=learned under trainer.strategy=fsdp2: a layer's steps are fewer than its rows, and "
                "would be cut up with them; take trainer=ddp, or ranges static or delayed"
            )
        if recipe is not None and recipe.wgrad.transform is not None:
            recipe.wgrad.transform.check(tokens, "wgrad contracts the tokens of a micro-batch")


def _check_compute(recipe: ModelRecipe, device: str | None) -> None:
    """What ``compute=native`` asks for and cannot have, and a choice of CPU kernels that cannot run, before data are
    read; surgery then says which layer it is. device: None for that of another machine."""
    if recipe.compute == "simulated":
        return
    if device == "cpu":
        tier()
    if recipe.compute == "native":
        for linear in (recipe.linear, *(rule.recipe for rule in recipe.rules)):
            if linear is None:
                continue
            found = obstacles(linear) or ([] if device is None else [missing_on(device, linear)])
            if found and found[0]:
                raise ValueError(f"compute=native: {'; '.join(found)}; or pass compute=simulated")


def _check_machine(settings: RunSettings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; pass device=cpu or device=auto")
    on_cuda = resolved_device(settings.device) == "cuda"
    if settings.compile and not on_cuda:
        compilers = [c for c in (os.environ.get("CXX"), "g++", "clang++") if c]
        if not any(shutil.which(c) for c in compilers):
            raise ValueError(
                "compile=true on a CPU needs a C++ compiler, and there is no g++ or clang++; install one, or pass "
                "compile=false"
            )


def resolved_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` is CUDA where there is some."""
    return device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _settings(config: Mapping[str, Any]) -> RunSettings:
    """A micro-batch that is left open is the whole share of a process in a step."""
    if config["micro_batch_sequences"] is not None:
        return RunSettings.of(config)
    batch, processes = config["batch_sequences"], ProcessSettings.of(config["trainer"]).world_size
    if isinstance(batch, int) and batch % processes:
        raise ValueError(
            f"batch_sequences={batch} cannot be shared by {processes} processes (trainer.devices * "
            f"trainer.num_nodes); take batch_sequences={max(1, batch // processes) * processes}"
        )
    share = batch // processes if isinstance(batch, int) else batch
    return RunSettings.of({**config, "micro_batch_sequences": share})


def _model_config(config: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """A vocabulary that is left open is the tokenizer's."""
    if config.get("vocab_size", 0) is None:
        config = {**config, "vocab_size": vocab_size}
    model = build(config)
    if not isinstance(model, ModelConfig):
        raise TypeError(
            f"model is a {type(model).__name__}: its _target_ must be a configuration that builds a model "
            "(qtrain.models.protocol.ModelConfig), as in configs/model"
        )
    return model


# What the parts of a mixture have of it where they do not say it themselves
_SHARED = ("tokenizer", "folder")


def data_plan(config: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> DataPlan:
    """A mixture, where the configuration has ``parts``; texts to prepare, where it has no ``_target_``. tokenizer: in
    the place of the one that is named."""
    if "parts" in config:
        return _mixture(config, tokenizer)
    if tokenizer is not None:
        config = {**config, "tokenizer": tokenizer}
    if "_target_" in config:
        plan: DataPlan = build(config)
        return plan
    return PreparedText(**build(config))


def _mixture(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> DataPlan:
    unknown = set(config) - {"parts", *_SHARED}
    if unknown:
        raise ValueError(
            f"data.{min(unknown)}: a mixture has {', '.join(('parts', *_SHARED))}; the rest is its parts'"
        )
    shared, parts = {key: config.get(key) for key in _SHARED}, {}
    for name, part in (config["parts"] or {}).items():
        if not isinstance(part, Mapping) or "weight" not in part:
            raise ValueError(f"data.parts.{name}: give its weight, as in data.parts.{name}.weight=0.5")
        if "parts" in part:
            raise ValueError(
                f"data.parts.{name} is a mixture itself; give its parts here, with the products of the weights"
            )
        own = {key: value for key, value in part.items() if key != "weight"}
        missing = {k: v for k, v in shared.items() if v is not None and own.get(k) is None}
        try:
            parts[str(name)] = (part["weight"], data_plan({**own, **missing}, tokenizer))
        except (ValueError, TypeError) as error:
            raise ValueError(f"data.parts.{name}: {error}") from error
    return Mixture(parts)


def assemble(config: Mapping[str, Any], tokenizer: Tokenizer | None = None, *, here: bool = True) -> Assembly:
    """The parts of the run that ``config`` describes, checked alone and against each other. tokenizer: in
    the place of the one that ``config`` names, as where a checkpoint brings it. here: whether this machine will run it, and
    has to have what it takes.

    Raises ValueError or TypeError, naming the value, what is allowed and the remedy.
    """
    data = data_plan(config["data"], tokenizer)
    recipe = build(config["recipe"])
    if not isinstance(recipe, ModelRecipe):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}: give it _target_: qtrain.quant.ModelRecipe, as in configs/recipe"
        )
    model = _model_config(config["model"], data.vocab_size)
    if hasattr(model, "plain"):  # described elsewhere: a run writes down what it found there
        config = {**config, "model": model.plain()}
    parts = Assembly(
        config=config,
        settings=_settings(config),
        model_config=model,
        recipe=recipe,
        optimizer=OptimizerParts.of(config["optimizer"]),
        schedule=build(config["schedule"]),
        data=data,
    )
    _check_fit(parts)
    if here:
        _check_machine(parts.settings)
    _check_compute(parts.recipe, resolved_device(parts.settings.device) if here else None)
    return parts
