"""QuantizedTransformer: a model, its recipe and its optimizer as a LightningModule.

    loss of a step = mean over the tokens of the global batch of -ln p(token), in float32

Lightning divides each micro-batch's mean by the number of micro-batches; all have the same number of tokens, so
the accumulated gradient is that of the mean. Before each forward the clock of the quantized layers is set to the
optimizer step and to the place of the micro-batch within the global batch, and torch's generator (dropout) to
the same place: no random number depends on what ran before, and a resumed run draws what the uninterrupted one
would have drawn.

Validation runs eagerly also where training is compiled: a run and a later evaluation of its checkpoint then give
the same number, and no second graph is compiled for a forward that is seldom run.

B sequences of a micro-batch, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate

from qtrain.communication.low_bit import LowBitCommunication
from qtrain.data.stream import mix_words
from qtrain.nn.quantizers import follow_optimizer, start_steps
from qtrain.nn.surgery import Faster, SurgeryReport, apply_recipe

from .assembly import Assembly, resolved_device
from .auto_plan import faster_layers
from .identity import plan_of, recipe_digest
from .low_bit import communication_of
from .processes import summed
from .run_folder import CENSUS, versions
from .strategy import compile_for, reshard, shard


@dataclass(frozen=True)
class StepReading:
    """One optimizer step, read when its gradient is complete and before anything is clipped or applied.

    step: its number, from 1. loss: nats per token. grad_norm: of the whole gradient, unclipped. lr: the rate that
    the step uses.
    """

    step: int
    loss: float
    grad_norm: float
    clipped: bool
    lr: float


class QuantizedTransformer(LightningModule):
    """parts: from ``assemble``. The hyperparameters saved are its plain configuration. continues: whether the weights
    of a checkpoint follow, so that no others are read first. faster: what decides for ``compute=auto``; without it a
    fit's measured plan.

    After each step ``reading`` is its StepReading; after each validation ``window_losses`` [n] float32 are the
    mean nats per token of every window.
    """

    model: nn.Module
    surgery: SurgeryReport

    def __init__(self, parts: Assembly, *, continues: bool = False, faster: Faster | None = None) -> None:
        super().__init__()
        self._continues, self._given = continues, faster
        self.save_hyperparameters({"config": dict(parts.config)}, logger=False)
        self.parts, self.settings = parts, parts.settings
        self.reading: StepReading | None = None
        self.window_losses = torch.empty(0)
        self._losses: list[Tensor] = []
        self._window_losses = torch.empty(2, 0)  # losses [n], and whether this rank has seen the window
        self._fresh: StepReading | None = None  # of the step in progress
        self.communication: LowBitCommunication | None = None
        self._owed: dict[str, Any] = {}  # what a checkpoint says of it

    def configure_model(self) -> None:
        """Builds, quantizes, compiles and, under FSDP2, shards; Lightning calls it at the start of every fit and
        validation. Every process draws the whole initial weights before it keeps its rows of them."""
        if hasattr(self, "surgery"):
            return
        model = self.parts.make_model(pretrained=not self._continues)
        device = resolved_device(self.settings.device)
        surgery = apply_recipe(
            model, self.parts.recipe, seed=self.settings.seed, device=device, faster=self._faster(device)
        )
        mesh = self.device_mesh  # FSDP2's strategy sets it
        if self.settings.compile:
            compile_for(model, self.parts.processes.sharding)
        if mesh is not None:
            shard(model, mesh["data_parallel"])
        self.model, self.surgery = model, surgery
        self.communication = communication_of(self.parts, model)
        if self.communication is not None and mesh is not None:
            self.communication.attach_fsdp2(model)

    def _faster(self, device: str) -> Faster | None:
        if self._given is not None or self.parts.recipe.compute != "auto":
            return self._given
        if self._trainer is None or self.trainer.state.fn != "fit":
            return None
        tokens = self.settings.micro_batch_sequences * self.settings.sequence_tokens
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        folder, compiled = Path(self.trainer.default_root_dir), self.settings.compile
        return faster_layers(folder, device=device, tokens=tokens, dtype=dtype, compiled=compiled)

    def configure_optimizers(self) -> Any:
        optimizer = self.parts.optimizer.for_model(self.model)
        follow_optimizer(self.model, optimizer)
        scheduler = LambdaLR(optimizer, self.parts.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Begins the learned steps on the run's first micro-batch, which all ranks have alike."""

        def run(model: nn.Module) -> None:
            windows = self.trainer.datamodule.train_windows()  # type: ignore[attr-defined]
            first = default_collate([windows[i] for i in range(self.settings.micro_batch_sequences)])
            with self.trainer.precision_plugin.forward_context():
                model(first["input"].to(self.device))

        start_steps(self.model, run)

    def on_train_start(self) -> None:
        """Takes over what a checkpoint owes, now that the strategy stands and has read it (FSDP2's after the start of
        the fit)."""
        owed, self._owed = self._owed, {}
        if self.communication is not None and self.communication.remembers:
            self.communication.load_state_dict(owed)
        elif owed and self.global_rank == 0:
            print(
                "what the checkpoint's processes owed each other is dropped: trainer.reduce_gradients or "
                "trainer.error_feedback is null now"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches an optimizer step."""
        return self.settings.accumulate(self.trainer.world_size)

    def first_sequence(self, batch_idx: int) -> int:
        """Place within the step's global batch of the first sequence of this rank's micro-batch."""
        slot = (batch_idx % self.accumulate) * self.trainer.world_size + self.trainer.global_rank
        return slot * self.settings.micro_batch_sequences

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] int64 -> logits [B, S, V]."""
        return self.model(tokens)

    def token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """``input`` and ``target`` [B, S] -> -ln p of every target, [B, S] float32."""
        logits = self.model(batch["input"])
        losses = F.cross_entropy(logits.float().flatten(0, 1), batch["target"].flatten(), reduction="none")
        return losses.view(batch["target"].shape)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        first = self.first_sequence(batch_idx)
        step = self.trainer.global_step
        if batch_idx % self.accumulate == 0:
            self._losses, self._fresh = [], None
        if self.communication is not None:
            self.communication.begin(step, batch_idx % self.accumulate)
        self.surgery.clock.set(step=step, token_offset=first * self.settings.sequence_tokens)
        torch.manual_seed(mix_words(self.settings.seed, step, first))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.token_losses(batch).mean()
        self._losses.append(loss.detach())
        return loss

    def read_step(self, optimizer: Optimizer) -> StepReading:
        """The reading of the step whose gradient is complete; the same one until the next step."""
        if self._fresh is None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
            loss = self.trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
            clip = self.parts.optimizer.clip_norm
            self._fresh = StepReading(
                step=self.trainer.global_step + 1,
                loss=float(loss),
                grad_norm=norm,
                clipped=clip is not None and not norm <= clip,
                lr=float(optimizer.param_groups[0]["lr"]),
            )
        return self._fresh

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Reads the step, then scales the gradient to ``clip_norm`` where it is longer. The clip belongs to the
        optimizer's configuration, not to the Trainer's."""
        self.reading = self.read_step(optimizer)
        clip = self.parts.optimizer.clip_norm
        if clip is not None and self.reading.clipped:
            total = torch.tensor(self.reading.grad_norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), clip, total)

    def on_validation_epoch_start(self) -> None:
        if self.communication is not None:
            self.communication.traffic.stop()
        windows = len(self.trainer.datamodule.val)  # type: ignore[attr-defined]
        self._window_losses = torch.zeros(2, windows, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # The clock stands at step 0 and the windows keep their places: all evaluations of all runs draw alike
        place = batch_idx * self.trainer.world_size + self.trainer.global_rank
        first = place * self.settings.micro_batch_sequences
        self.surgery.clock.set(step=0, token_offset=first * self.settings.sequence_tokens)
        with torch.compiler.set_stance("force_eager"):
            losses = self.token_losses(batch).mean(1)
        if first < self._window_losses.shape[1]:  # else a batch that only keeps this rank in step
            self._window_losses[0, first : first + len(losses)] = losses
            self._window_losses[1, first : first + len(losses)] = 1

    def on_validation_epoch_end(self) -> None:
        # One rank has each window, the others add zeros
        losses, seen = summed(self._window_losses)
        self.window_losses = losses[seen > 0]
        if self.communication is not None:
            reshard(
                self.model
            )  # what was gathered for validation is the master, which training does not read

    @property
    def val_loss(self) -> float:
        """Nats per token over all windows of the last validation; of several parts, by their weights."""
        return self.trainer.datamodule.val.loss(self.window_losses)  # type: ignore[attr-defined]

    def _set_counters(self, loops: dict[str, Any], step: int) -> None:
        """Puts Lightning's counters to the complete step, in micro-batches of this run."""
        batches = step * self.accumulate
        fit = loops["fit_loop"]
        for scope in ("total", "current"):
            # As when saved in on_train_batch_end, before Lightning counts the batch as completed
            fit["epoch_loop.batch_progress"][scope].update(
                ready=batches, started=batches, processed=batches, completed=max(batches - 1, 0)
            )
            fit["epoch_loop.val_loop.batch_progress"][scope].update(
                ready=0, started=0, processed=0, completed=0
            )
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = max(step - 1, 0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A step may be made of other micro-batches, by more or fewer processes, than when it was saved."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._owed = checkpoint.get("communication", {})
            self._set_counters(checkpoint["loops"], checkpoint["qtrain"]["step"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the run is, and counts to the last complete step, wherever in its loops Lightning stands: its
        gradient was applied, that of the micro-batches since was not."""
        step = self.trainer.global_step
        self._set_counters(checkpoint["loops"], step)
        if self.communication is not None and (owed := self.communication.state_dict()):
            checkpoint["communication"] = owed
        census = Path(self.trainer.default_root_dir) / CENSUS
        tokenizer = self.trainer.datamodule.corpus.tokenizer  # type: ignore[attr-defined]
        checkpoint["qtrain"] = {
            "step": step,
            "tokens": step * self.settings.step_tokens,
            "next_sample": step * self.settings.batch_sequences,
            "data": self.trainer.datamodule.identity(),  # type: ignore[attr-defined]
            # By its contents, so that a checkpoint is enough by itself
            "tokenizer": None if tokenizer is None else tokenizer.state(),
            "recipe_sha256": recipe_digest(self.parts.recipe),
            "plan": plan_of(self.surgery, self.parts.recipe),
            "census": json.loads(census.read_text(encoding="utf-8")) if census.is_file() else None,
            # Their whole state: bits and masks are functions of (seed, step, place in the batch)
            "random": {"seed": self.settings.seed, "step": step},
            "processes": self.trainer.world_size,
            "versions": versions(),
        }
