"""qtrain generate: text from a trained run, with the recipe it was trained under."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig

from .evaluate import trusted_config
from .train import plain

CONFIG = "generate"


def _sample(config: dict[str, Any]) -> Any:
    from qtrain.training.settings import SampleSettings

    return SampleSettings(**{k: config[k] for k in ("prompt", "max_new_tokens", "temperature", "top_k")})


def check(cfg: DictConfig) -> None:
    """Raises ValueError for values that cannot be right, among them a run that is not there."""
    from qtrain.training.saved import chosen_checkpoint

    config = plain(cfg)
    chosen_checkpoint(config["run"], config["checkpoint"])
    _sample(config)


def run(cfg: DictConfig) -> int:
    """Prints the prompt and its continuation. 2 where the run's data named no tokenizer."""
    from qtrain.training.evaluation import complete
    from qtrain.training.saved import chosen_checkpoint, trained_run

    config = plain(cfg)
    path = chosen_checkpoint(config["run"], config["checkpoint"])
    trusted_config(path, config["allow_targets"])
    run = trained_run(path, {"device": config["device"]})
    if run.tokenizer is None:
        print(
            f"qtrain: {path}: no text can be made of ids, since the run's data named no tokenizer",
            file=sys.stderr,
        )
        return 2
    print(complete(run, _sample(config), config["seed"]))
    return 0
