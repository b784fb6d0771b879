"""What the instruments share: when they look, where their numbers go, and the slice of a batch that probes read.

An instrument looks at step 1 and at every multiple of ``every_steps``. Nothing that it does changes the training: not a
gradient, a random bit, a range or a compiled graph. Of several processes rank 0 looks, at its own tokens; where the model
is sharded all take part, since a forward is then an act of all, and rank 0 writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from qtrain.analysis.instrument_records import INSTRUMENTS, Values, flat, rounded
from qtrain.analysis.layer_statistics import quantized_layers
from qtrain.data.stream import mix_words

from ..module import QuantizedTransformer
from ..run_folder import jsonable
from ..verdict import RunStopped
from .checkpoint import storage_verdict


class Instrument(Callback):
    """every_steps: between two samples. Raises ValueError for less than 1."""

    name = "instrument"

    def __init__(self, every_steps: int = 100) -> None:
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(
                f"callbacks.{self.name}.every_steps={every_steps!r}: must be a whole number of steps, 1 or more; "
                f"~callbacks.{self.name} takes the instrument out"
            )
        self.every_steps = every_steps
        self._raised: dict[str, bool] = {}

    def due(self, step: int) -> bool:
        """step: from 1."""
        return step == 1 or step % self.every_steps == 0

    def takes_part(self, trainer: Trainer, module: QuantizedTransformer) -> bool:
        """Whether this process has to look."""
        return trainer.is_global_zero or module.parts.processes.sharding == "fsdp2"

    def record(self, trainer: Trainer, module: QuantizedTransformer, step: int, values: Values) -> None:
        """Writes a sample of that step, to the run's folder and to its loggers."""
        if not values or not trainer.is_global_zero:
            return
        kept = {prefix: {k: rounded(x) for k, x in inner.items()} for prefix, inner in values.items()}
        tokens = step * module.settings.step_tokens
        _append(trainer, {"kind": "sample", "step": step, "tokens": tokens, "values": kept})
        for logger in trainer.loggers:
            row = {"step": step, "tokens": tokens, **flat(kept)}
            # With a step of its own, as the metrics
            logger.experiment.log(row, step=step)  # type: ignore[attr-defined]

    def alert_where(
        self,
        crossed: bool,
        trainer: Trainer,
        module: QuantizedTransformer,
        step: int,
        name: str,
        *,
        value: float,
        limit: float,
        message: str,
    ) -> None:
        """An alert when ``crossed`` becomes true: not again before it was false."""
        before, self._raised[name] = self._raised.get(name, False), crossed
        if not crossed or before or not trainer.is_global_zero:
            return
        tokens = step * module.settings.step_tokens
        row = {"kind": "alert", "step": step, "tokens": tokens, "name": name, "value": rounded(value)}
        _append(trainer, {**row, "limit": limit, "message": message})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(title=name, text=f"step {step}: {message}")

    def state_dict(self) -> dict[str, Any]:
        return {"raised": dict(self._raised)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._raised = dict(state_dict["raised"])


def _append(trainer: Trainer, row: Mapping[str, Any]) -> None:
    """On the disk when this returns."""
    try:
        with (Path(trainer.default_root_dir) / INSTRUMENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(row), separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunStopped(storage_verdict(trainer, f"{INSTRUMENTS}: {error}")) from error


def check_sequences(name: str, sequences: int) -> None:
    """Raises ValueError for less than 1."""
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise ValueError(f"callbacks.{name}.sequences={sequences!r}: must be a whole number, 1 or more")


class BatchSlice:
    """The first sequences of a step's micro-batch as the training step reads them: same tokens, same random bits, and,
    in ``loss``, the same gradient a token. More than ``sequences`` where a transform over tokens needs it, and all that
    there are where there are fewer."""

    def __init__(
        self,
        trainer: Trainer,
        module: QuantizedTransformer,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        sequences: int,
    ) -> None:
        self.trainer, self.module = trainer, module
        count = min(sequences, batch["input"].shape[0])
        while count < batch["input"].shape[0] and not _divides(module.model, batch["input"][:count].numel()):
            count += 1
        self.input, self.target = batch["input"][:count], batch["target"][:count]
        self.first = module.first_sequence(batch_idx)
        self.scale = 1.0 / (batch["input"].numel() * module.accumulate)

    def logits(self, model: nn.Module) -> Tensor:
        """[B, S, V]. Inside of a fork of the random state."""
        settings, step = self.module.settings, self.trainer.global_step
        torch.manual_seed(mix_words(settings.seed, step, self.first))
        self.module.surgery.clock.set(step=step, token_offset=self.first * settings.sequence_tokens)
        with self.trainer.precision_plugin.forward_context():
            return model(self.input)

    def loss(self, model: nn.Module) -> Tensor:
        """This slice's part of the step's loss."""
        with torch.enable_grad():
            logits = self.logits(model).float().flatten(0, 1)
            return F.cross_entropy(logits, self.target.flatten(), reduction="sum") * self.scale


def _divides(model: nn.Module, tokens: int) -> bool:
    try:
        for name, layer in quantized_layers(model).items():
            if layer.recipe.wgrad.transform is not None:
                layer.recipe.wgrad.transform.check(tokens, name)
    except ValueError:
        return False
    return True


@contextmanager
def untouched(module: QuantizedTransformer) -> Iterator[None]:
    """A forward without gradients inside leaves no trace: random state and clock are put back, nothing is compiled."""
    counters = module.surgery.clock.counters
    kept = counters.clone()
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        counters.copy_(kept)


def worst(values: Mapping[str, float], *, least: bool) -> tuple[str, float]:
    """(name, number) of the least or largest that is a number; ("", nan) where there is none."""
    numbers = {k: x for k, x in values.items() if not math.isnan(x)}
    pick = min if least else max
    return pick(numbers.items(), key=lambda item: item[1], default=("", math.nan))
