"""The census of a run: before the first step, proof that the configured numbers are what the GEMMs multiply.

One eager probe step on the run's first micro-batch, in the run's precision, held to the recipe; then, where the
model is compiled, the compiled step's loss and gradients against the eager ones. A failure ends the run: its
results would be those of another recipe. Of several processes each takes the census of itself, on the same
micro-batch; rank 0's is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import default_collate

from qtrain.nn.census import take_census
from qtrain.nn.compiled import compare_compiled

from ..module import QuantizedTransformer
from ..processes import any_rank
from ..run_folder import CENSUS, write_json, write_text
from ..verdict import RunStopped, Verdict

SURGERY = "surgery.txt"


class CensusAtStart(Callback):
    """Writes ``surgery.txt`` and ``census.json``; raises RunStopped where the census fails."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        model, surgery, folder = pl_module.model, pl_module.surgery, Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            write_text(folder / SURGERY, str(surgery))
        probe = _probe(trainer, pl_module)
        dropping = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        if dropping:
            model.eval()  # two steps with other dropout masks cannot be compared
        try:
            census = take_census(model, surgery, probe)
            found: dict[str, Any] = {"eager": census.to_dict()}
            failures, summary = census.failures(), census.summary()
            if pl_module.settings.compile:
                comparison = compare_compiled(model, surgery, probe)
                found["compiled"] = comparison.to_dict()
                failures = [*failures, *comparison.failures()]
                summary = f"{summary}; {comparison.summary()}"
        finally:
            if dropping:
                model.train()
        if trainer.is_global_zero:
            write_json(folder / CENSUS, {"summary": summary, "failures": failures, **found})
        if any_rank(bool(failures)):
            shown = "; ".join(failures[:5]) or "another rank of this run says so"
            raise RunStopped(
                Verdict(
                    outcome="census_failed",
                    step=trainer.global_step,
                    message=f"what runs is not what was configured: {shown}",
                )
            )


def _probe(trainer: Trainer, module: QuantizedTransformer) -> Any:
    """model -> scalar loss on the run's first micro-batch, as a training step computes it."""
    windows = trainer.datamodule.train_windows()  # type: ignore[attr-defined]
    batch = default_collate([windows[i] for i in range(module.settings.micro_batch_sequences)])
    batch = {name: t.to(module.device) for name, t in batch.items()}

    def probe(model: nn.Module) -> Tensor:
        module.surgery.clock.set(step=0, token_offset=0)
        with trainer.precision_plugin.forward_context(), torch.enable_grad():
            logits = model(batch["input"])
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["target"].flatten())

    return probe
