"""What makes two trainings the same: the recipe's digest, the plan of a model, and what a continuation may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from qtrain.communication.settings import CommunicationSettings
from qtrain.models.protocol import ModelConfig
from qtrain.nn.surgery import SurgeryReport
from qtrain.quant import ModelRecipe

# Where it writes, how long it is, how it is watched and spread over machines: none of it changes a step.
FREE = frozenset(
    {
        "name", "run", "out", "baseline", "resume", "allow_changed", "steps", "compile", "device", "trainer", "logger",
        "callbacks", "eval_every_steps", "eval_windows", "checkpoint_every_steps", "micro_batch_sequences",
        "activation_checkpointing", "sample",
    }
)  # fmt: skip
# Of the trainer, what does change steps: it travels in low bits
_COMMUNICATION = tuple(f.name for f in fields(CommunicationSettings))
# Short knobs, which say nothing that the recipe does not
_KNOBS = frozenset({"w", "a", "g", "saved", "compute"})
# What a continuation may change when it is asked to. All else is restored from the checkpoint (the optimizer's
# hyperparameters, the schedule) or would not fit it (the model, the formats of the states)
CHANGEABLE = ("recipe", "communication")


def recipe_digest(recipe: ModelRecipe) -> str:
    """sha256 of what the recipe says, however it was spelled: 64 hexadecimal digits. What is computed again instead of
    being kept changes no number and is no part of it."""
    said = {key: value for key, value in asdict(recipe).items() if key != "recompute_activations"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def plan_of(surgery: SurgeryReport, recipe: ModelRecipe) -> dict[str, Any]:
    """How each linear layer is computed: {"compute", "native": [name], "layers": {name: {operand: spec or None}}}."""
    layers = {
        name: {operand: None if v is None else str(v) for operand, v in layer.operands().items()}
        for name, layer in surgery.plan.items()
    }
    native = [layer.name for layer in surgery.layers if layer.native]
    return {"compute": surgery.compute, "native": native, "layers": layers}


def check_allowed(names: Sequence[str]) -> None:
    """Raises ValueError for something that a continuation cannot change."""
    unknown = [name for name in names if name not in CHANGEABLE]
    if unknown:
        raise ValueError(
            f"allow_changed={list(names)!r}: a resumed run can change {', '.join(CHANGEABLE)}; everything else comes "
            "from its checkpoint"
        )


def _different(key: str, there: Any, here: Any) -> list[str]:
    """A sentence for each value that differs, however deep it lies in mappings."""
    if there == here:
        return []
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        inner = dict.fromkeys([*there, *here])
        return [s for k in inner for s in _different(f"{key}.{k}", there.get(k), here.get(k))]
    return [f"{key}: {there} there, {here} here"]


def _different_models(there: Mapping[str, Any], here: Mapping[str, Any], model: ModelConfig) -> list[str]:
    defaults: dict[str, Any] = {f.name: f.default for f in fields(model)} if is_dataclass(model) else {}
    there, here = ({k: side.get(k, defaults.get(k)) for k in {**there, **here}} for side in (there, here))
    # What is written here, or what became of it: a vocabulary that is left open is the tokenizer's
    became = {k: getattr(model, k, None) for k in here}
    return [s for k in here if there[k] != became[k] for s in _different(f"model.{k}", there[k], here[k])]


def _different_communication(theirs: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    if "communication" in config.get("allow_changed", ()):
        return []
    there, here = (CommunicationSettings.of(side.get("trainer") or {}) for side in (theirs, config))
    # Residuals that nothing makes are kept in nothing
    names = [
        n for n in _COMMUNICATION if n != "error_feedback" or there.reduce_gradients or here.reduce_gradients
    ]
    return [
        f"trainer.{name}: {getattr(there, name)} there, {getattr(here, name)} here (allow_changed=[communication] goes "
        "on with it)"
        for name in names
        if getattr(there, name) != getattr(here, name)
    ]


def differences(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    model: ModelConfig,
    recipe: ModelRecipe,
    data: Mapping[str, Any],
) -> list[str]:
    """What ``config``, ``model`` (which is built from it), ``recipe`` and ``data`` describe otherwise than the checkpoint
    ``saved`` has it, a sentence each. Recipes are compared by what they mean, not by how they are written, and a value
    of a model that one side leaves out is its class's default."""
    theirs = saved["hyper_parameters"]["config"]
    keys = (set(config) | set(theirs)) - FREE - _KNOBS - {"data", "recipe"}
    found: list[str] = []
    for key in sorted(keys):
        there, here = theirs.get(key), config.get(key)
        if key == "model" and isinstance(there, Mapping):
            found += _different_models(there, config[key], model)
        else:
            found += _different(key, there, here)
    facts = saved["qtrain"]
    if facts["recipe_sha256"] != recipe_digest(recipe) and "recipe" not in config.get("allow_changed", ()):
        found.append(
            f"recipe: {theirs['recipe']} there, {config['recipe']} here (allow_changed=[recipe] goes on with it)"
        )
    found += _different_communication(theirs, config)
    for key in ("shards", "tokenizer_digest", "sequence_tokens", "order"):
        there, here = facts["data"].get(key), data.get(key)
        if there != here:
            found.append(f"data {key}: {there} there, {here} here")
    return found
