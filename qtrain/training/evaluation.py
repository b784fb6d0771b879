"""evaluate: the validation loss of a saved run, by the same path that its training took it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .auto_plan import as_trained
from .callbacks.metrics_jsonl import bits_per_byte
from .datamodule import WindowsDataModule, open_corpus
from .fit import make_trainer
from .module import QuantizedTransformer
from .report import NO_TOKENIZER, sample_text
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
    """The run's model with its weights, under the recipe of ``run.parts``; with ``compute=auto`` the layers are native that
    were in training. Ranges with a state that this recipe does not have are left out; raises ValueError where it has some
    that the run did not keep."""
    native = run.checkpoint["qtrain"]["plan"].get("native")
    if native is None and run.parts.recipe.compute == "auto":
        print(
            f"compute=auto: {run.path}, by an older version, does not say which layers were native; all that can be are native "
            "here, so that numbers may differ from the run's in rounding",
            file=sys.stderr,
        )
    faster = None if native is None else as_trained(native)
    module = QuantizedTransformer(run.parts, continues=True, faster=faster)
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
    """Raises ValueError where the run's validation data are not there any more, or were made by another tokenizer."""
    data = WindowsDataModule(run.parts, open_corpus(run.parts, run.checkpoint["qtrain"]["data"]))
    theirs = data.corpus.tokenizer
    if run.tokenizer is not None and (theirs is None or theirs.digest != run.tokenizer.digest):
        raise ValueError(
            f"the tokens of {data.identity()['shards']} are not of the run's tokenizer {run.tokenizer.name!r}: its digest is "
            f"{run.tokenizer.digest}, theirs {'unknown' if theirs is None else theirs.digest}; bring the run's own data here"
        )
    module = trained_module(run)
    trainer = make_trainer(run.parts, run.folder)
    trainer.validate(module, data, verbose=False)
    numbers = {
        "checkpoint": str(run.path),
        "step": run.step,
        "val_loss": module.val_loss,
        "val_bits_per_byte": bits_per_byte(module.val_loss, data.val.tokens_per_byte),
        "val_losses": data.val.losses(module.window_losses) if len(data.val.parts) > 1 else {},
        "perplexity": math.exp(min(module.val_loss, 700.0)),  # of a token; e^709 is the largest double
        "quantized_fraction": module.surgery.quantized_fraction,
        "compute": module.surgery.compute,
        "data": data.identity(),
    }
    return Evaluation(module.window_losses.numpy(), numbers)


def complete(run: TrainedRun, sample: SampleSettings, seed: int) -> str:
    """``sample.prompt`` and what the run's model adds to it. Raises ValueError for data without a tokenizer."""
    if run.tokenizer is None:
        raise ValueError(f"{run.path}: no text can be made: {NO_TOKENIZER}")
    module = trained_module(run)
    trainer = make_trainer(run.parts, run.folder)
    module.to(trainer.strategy.root_device)
    with torch.no_grad():
        return sample_text(module, run.tokenizer, sample, seed)
