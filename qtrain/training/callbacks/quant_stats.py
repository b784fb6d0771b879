"""What quantization does to every layer: one eager forward and backward, on sampled steps, of a slice of the step's batch.

It runs before the step, with the step's weights, tokens and random bits. For a moment the slice's tensors of all layers
and float32 gradients of all weights are held beside the model.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from qtrain.analysis.layer_statistics import Statistics, grid_counts, layer_statistics, quantized_layers
from qtrain.analysis.limits import NOISE_FLOOR
from qtrain.nn.census import probed_step
from qtrain.nn.oracle import OracleOperand

from ..module import QuantizedTransformer
from .instrument import BatchSlice, Instrument, check_sequences, worst


class QuantStats(Instrument):
    """Samples under ``quant/``; alert ``quant/noise_floor``. sequences: of the slice. histograms: of the codes of every
    quantized operand, in W&B."""

    name = "quant_stats"

    def __init__(self, every_steps: int = 100, sequences: int = 1, histograms: bool = True) -> None:
        super().__init__(every_steps)
        check_sequences(self.name, sequences)
        self.sequences, self.histograms = sequences, histograms

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        step = trainer.global_step + 1
        if batch_idx % pl_module.accumulate or not self.due(step) or not self.takes_part(trainer, pl_module):
            return
        layers = quantized_layers(pl_module.model)
        if not layers:
            return
        part = BatchSlice(trainer, pl_module, batch, batch_idx, self.sequences)
        probes = probed_step(pl_module.model, pl_module.surgery, part.loss)
        if not trainer.is_global_zero:
            return
        found: Statistics = {}
        with torch.no_grad():
            for name, layer in layers.items():
                if name in probes:
                    numbers, operands = layer_statistics(name, layer, layer.recipe, probes.pop(name))
                    found |= {f"quant/{key}": value for key, value in numbers.items()}
                    self._histograms(trainer, step, operands)
        self.record(trainer, pl_module, step, found)
        floors = {key: v["noise_floor"] for key, v in found.items() if "noise_floor" in v}
        key, floor = worst(floors, least=True)
        self.alert_where(
            floor < NOISE_FLOOR, trainer, pl_module, step, "quant/noise_floor", value=floor, limit=NOISE_FLOOR,
            message=f"the rounding of {key} outweighs it (std(g) / (sqrt(3) std(noise)) = {floor:.2f}), and that of "
            f"{sum(v < NOISE_FLOOR for v in floors.values())} of {len(floors)} gradients",
        )  # fmt: skip

    def _histograms(self, trainer: Trainer, step: int, operands: dict[str, OracleOperand]) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not (self.histograms and loggers):
            return
        import wandb

        drawn = {}
        for key, operand in operands.items():
            if not operand.transposed:  # else those of the forward's operand
                counts, edges = (t.numpy() for t in grid_counts(operand))
                drawn[f"quant/{key}/codes"] = wandb.Histogram(np_histogram=(counts, edges))
        for logger in loggers:
            logger.experiment.log(drawn, step=step)
