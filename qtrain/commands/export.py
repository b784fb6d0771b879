"""qtrain export: a trained run as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from .evaluate import trusted_config
from .train import plain

CONFIG = "export"
FORMATS = ("huggingface",)


def check(cfg: DictConfig) -> None:
    """Raises ValueError for values that cannot be right, among them a run that is not there and a folder that is."""
    from qtrain.training.saved import chosen_checkpoint

    config = plain(cfg)
    if config["format"] not in FORMATS:
        raise ValueError(f"format={config['format']!r}: allowed are {', '.join(FORMATS)}")
    chosen_checkpoint(config["run"], config["checkpoint"])
    if Path(config["out"]).exists():
        raise ValueError(f"out={config['out']} exists; name a folder that does not, or remove it")


def run(cfg: DictConfig) -> int:
    """Writes the folder and says what is in it."""
    from qtrain.training.export import export_huggingface
    from qtrain.training.saved import chosen_checkpoint, trained_run

    config = plain(cfg)
    path = chosen_checkpoint(config["run"], config["checkpoint"])
    trusted_config(path, config["allow_targets"])
    out = Path(config["out"])
    for note in export_huggingface(trained_run(path, {"device": "cpu"}), out):
        print(note)
    print(f"written to {out}: AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0
