"""evaluate: the validation loss of a saved run, by the same path that its training took it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .callbacks.metrics_jsonl import bits_per_byte
from .datamodule import WindowsDataModule, open_shards
from .fit import make_trainer
from .module import QuantizedTransformer
from .report import sample_text
from .run_folder import write_json
from .saved import TrainedRun
from .settings import SampleSettings


@dataclass(frozen=True)
class Evaluation:
    """window_losses: [n] float32, mean nats per token of every validation window. numbers: the rest, for JSON."""

    window_losses: NDArray[np.float32]
    numbers: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """``window_losses.npy`` and ``evaluation.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "window_losses.npy", self.window_losses)
        write_json(folder / "evaluation.json", dict(self.numbers))


def trained_module(run: TrainedRun) -> QuantizedTransformer:
    """The run's model with its weights, under the recipe of ``run.parts``. Ranges with a state that this recipe does not
    have are left out; raises ValueError where it has some that the run did not keep."""
    module = QuantizedTransformer(run.parts)
    module.configure_model()
    saved, own = run.checkpoint["state_dict"], module.state_dict()
    kept = {name: t for name, t in saved.items() if name in own or "quantizers" not in name.split(".")}
    ranges = sorted(name for name in own if name not in kept and "quantizers" in name.split("."))
    if ranges:
        raise ValueError(
            f"{run.path} has no {ranges[0]}: its run kept no such range; evaluate under the recipe that it was trained "
            "with, or under one whose clips have no state"
        )
    module.load_state_dict(kept)
    return module


def evaluate(run: TrainedRun) -> Evaluation:
    """Raises ValueError where the run's validation data are not there any more."""
    recorded = run.checkpoint["qtrain"]["data"]["shards"]
    data = WindowsDataModule(run.parts, open_shards(run.parts, recorded))
    module = trained_module(run)
    trainer = make_trainer(run.parts, run.folder)
    trainer.validate(module, data, verbose=False)
    numbers = {
        "checkpoint": str(run.path),
        "step": run.step,
        "val_loss": module.val_loss,
        "val_bits_per_byte": bits_per_byte(module.val_loss, data.shards.val.tokens_per_byte),
        "perplexity": math.exp(min(module.val_loss, 700.0)),  # of a token; e^709 is the largest double
        "quantized_fraction": module.surgery.quantized_fraction,
        "data": data.identity(),
    }
    return Evaluation(module.window_losses.numpy(), numbers)


def complete(run: TrainedRun, sample: SampleSettings, seed: int) -> str:
    """``sample.prompt`` and what the run's model adds to it."""
    module = trained_module(run)
    trainer = make_trainer(run.parts, run.folder)
    module.to(trainer.strategy.root_device)
    with torch.no_grad():
        return sample_text(module, run.parts.tokenizer, sample, seed)
