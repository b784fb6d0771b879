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
from .run_folder import WINDOW_LOSSES, write_array, write_json
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
        write_array(folder / WINDOW_LOSSES, self.window_losses)
        write_json(folder / "evaluation.json", dict(self.numbers))


def trained_module(run: TrainedRun) -> QuantizedTransformer:
    """The run's model with its weights, under the recipe of ``run.parts``."""
    module = QuantizedTransformer(run.parts, continues=True)
    module.configure_model()
    module.load_state_dict(run.checkpoint["state_dict"])
    return module


def evaluate(run: TrainedRun) -> Evaluation:
    """Raises ValueError where the run's validation data are not there any more, or were made by another tokenizer."""
    recorded = run.checkpoint["qtrain"]["data"]["shards"]
    data = WindowsDataModule(run.parts, open_shards(run.parts, recorded))
    if data.shards.tokenizer.digest != run.tokenizer.digest:
        raise ValueError(
            f"the tokens in {data.shards.directory} are not of the run's tokenizer {run.tokenizer.name!r}: its digest is "
            f"{run.tokenizer.digest}, theirs {data.shards.tokenizer.digest}; bring the run's own prepared data here"
        )
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
        return sample_text(module, run.tokenizer, sample, seed)
