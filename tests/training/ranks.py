"""What the processes of ``test_strategy`` do: several runs one after the other, since starting them takes seconds."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from qtrain.training.assembly import Assembly, assemble
from qtrain.training.checkpoints import checkpoint_name
from qtrain.training.datamodule import WindowsDataModule, open_corpus
from qtrain.training.fit import _training_trainer, train
from qtrain.training.module import QuantizedTransformer
from qtrain.training.processes import connected, rank


class PoisonRankOne(Callback):
    """Multiplies the embeddings of rank 1's first micro-batch of step 2 by NaN."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        bad = rank() == 1 and trainer.global_step == 1 and batch_idx % pl_module.accumulate == 0
        self.handle = pl_module.model.token_embedding.register_forward_hook(
            lambda module, arguments, output: output * math.nan if bad else None
        )

    def on_train_batch_end(self, *_):
        self.handle.remove()


class GradientSyncs(Callback):
    """Leaves whether DDP averages the gradient of each micro-batch, in ``syncs.json``."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(trainer.strategy.model.require_backward_grad_sync)

    def on_train_end(self, trainer, pl_module):
        if rank() == 0:
            Path(trainer.default_root_dir, "syncs.json").write_text(json.dumps(self.seen))


def reload(parts: Assembly, checkpoint: str, out: str) -> None:
    """Takes over a checkpoint, trains no step, saves it again, and evaluates: ``step-NNNNNN`` and ``windows.json``."""
    module, data = QuantizedTransformer(parts), WindowsDataModule(parts, open_corpus(parts))
    trainer = _training_trainer(parts, Path(out), None, [])
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(Path(out) / checkpoint_name(trainer.global_step))
    trainer.validate(module, data, verbose=False)
    if rank() == 0:
        (Path(out) / "windows.json").write_text(json.dumps(module.window_losses.tolist()))


def work(task: dict[str, Any]) -> int:
    """task["jobs"]: {"config", "reload": None, or a checkpoint}; "backend": of torch.compile. Leaves how each ended, of
    every rank."""
    ends = []
    if "backend" in task:
        torch.compile = functools.partial(torch.compile, backend=task["backend"])
    for job in task["jobs"]:
        parts = assemble(job["config"])
        with connected(parts.processes, "cpu"):
            if job["reload"] is not None:
                reload(parts, job["reload"], job["config"]["out"])
            else:
                ends.append(train(parts)[0].as_dict())
    Path(task["out"], f"ends-{rank()}.json").write_text(json.dumps(ends))
    return 0
