"""qtrain evaluate: the validation loss of a trained run, as trained or under another recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .train import plain

CONFIG = "evaluate"


def trusted_config(path: Path, allowed: list[str]) -> dict[str, Any]:
    """The configuration in a checkpoint, once every class that it names is known to be harmless: of this package,
    or of a package in ``allowed``. A checkpoint from elsewhere names code of its choice otherwise."""
    from qtrain.overrides import UserError
    from qtrain.targets import check_targets
    from qtrain.training.saved import read_checkpoint, saved_config

    saved = saved_config(read_checkpoint(path))
    built = {key: value for key, value in saved.items() if key != "callbacks"}  # which only training builds
    try:
        check_targets(built, allowed)
    except UserError as error:
        raise ValueError(
            f"{path} names code that is not qtrain's ({error}); if you trust who wrote it, pass allow_targets=[PACKAGE]"
        ) from error
    return saved


def _changes(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What differs from the saved configuration."""
    changes: dict[str, Any] = {"device": config["device"]}
    if "recipe" in config:
        changes["recipe"] = config["recipe"]
    if config["eval_windows"] is not None:
        changes["eval_windows"] = config["eval_windows"]
    if config["data_folder"] is not None:
        changes["data"] = {**saved["data"], "folder": config["data_folder"]}
    return changes


def check(cfg: DictConfig) -> None:
    """Raises ValueError for values that cannot be right, among them a run that is not there."""
    from qtrain.quant import ModelRecipe
    from qtrain.training.assembly import build
    from qtrain.training.saved import chosen_checkpoint
    from qtrain.training.settings import RunSettings

    config = plain(cfg)
    chosen_checkpoint(config["run"], config["checkpoint"])
    RunSettings(
        steps=1,
        batch_sequences=1,
        micro_batch_sequences=1,
        sequence_tokens=1,
        device=config["device"],
        eval_windows=config["eval_windows"],
    )
    if "recipe" in config and not isinstance(build(config["recipe"]), ModelRecipe):
        raise TypeError("recipe must be a qtrain.quant.ModelRecipe, as the files in configs/recipe are")


def run(cfg: DictConfig) -> int:
    """Evaluate, print and save."""
    from qtrain.training.evaluation import evaluate
    from qtrain.training.saved import chosen_checkpoint, trained_run

    config = plain(cfg)
    path = chosen_checkpoint(config["run"], config["checkpoint"])
    saved = trusted_config(path, config["allow_targets"])
    trained = trained_run(path, _changes(config, saved))
    result = evaluate(trained)
    default = "trained" if "recipe" not in config else "other_recipe"
    if "recipe" in config and result.numbers["quantized_fraction"] == 0:
        default = "high_precision"
    folder = Path(config["out"]) if config["out"] is not None else trained.folder / "evaluations" / default
    result.save(folder)
    numbers = result.numbers
    print(f"validation loss   {numbers['val_loss']:.4f} nats/token")
    bits = numbers["val_bits_per_byte"]
    print(f"bits per byte     {'unknown: the data name no tokenizer' if bits is None else f'{bits:.4f}'}")
    for name, loss in numbers["val_losses"].items():
        print(f"  of {name:<12} {loss:.4f} nats/token")
    print(f"perplexity        {numbers['perplexity']:.4f} per token")
    print(
        f"windows           {numbers['data']['val_windows']} of {numbers['data']['sequence_tokens']} tokens"
    )
    print(
        f"quantized         {numbers['quantized_fraction']:.1%} of the linear weights ({default.replace('_', ' ')})"
    )
    print(f"compute           {numbers['compute']}")
    print(f"files             {folder}")
    return 0
