"""The configs as Hydra composes them for a command."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def composed(name: str, *overrides: str, hydra: bool = False) -> DictConfig:
    """Primary config ``name``. hydra: with Hydra's own section."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=hydra)
