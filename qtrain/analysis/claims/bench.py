"""What claims are measured on: Gaussian and heavy-tailed samples, and trainings of a very small byte model.

The model has 2 layers, width 64, 4 heads (about 132,000 parameters) and sees 200 steps of 16 x 64 bytes of Python's standard
library: a minute of a slow core with quantization, enough for weights, activations, gradients and moments that are not Gaussian.
Arms of one seed share initial weights and batches. Everything that was computed is kept in the bench's folder, each in one file
that appears by a rename, so that a verification that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qtrain.analysis.gradients import Pass, record_pass
from qtrain.data.sources import StdlibSource
from qtrain.models.gpt import GPTConfig
from qtrain.nn.inventory import linear_layers
from qtrain.nn.observation import sqnr_db
from qtrain.nn.surgery import apply_recipe
from qtrain.optim import AdamW, CosineSchedule, parameter_groups
from qtrain.quant import ModelRecipe, QuantSpec, fake_quantize

SEEDS = (0, 1, 2)
# Of the trainings: those of configs/experiment/optimizer_states.yaml
LR, BETAS, WEIGHT_DECAY, CLIP, WARMUP = 3e-3, (0.9, 0.95), 0.1, 1.0, 50
TRAIN_BYTES, VAL_BYTES = 4_000_000, 200_000


class OutOfTime(Exception):
    """The budget is spent; what was finished is kept."""


@dataclass(frozen=True)
class Arm:
    """A training: its recipe and the formats of its moments."""

    recipe: ModelRecipe
    exp_avg: str | None = None
    exp_avg_sq: str | None = None


@dataclass(frozen=True)
class Size:
    """Of the trainings. Another size has other results: they are kept apart."""

    steps: int = 200
    sequences: int = 16
    tokens: int = 64
    width: int = 64
    layers: int = 2
    val_windows: int = 256

    @property
    def key(self) -> str:
        return f"w{self.width}l{self.layers}s{self.steps}b{self.sequences}x{self.tokens}"


class Baseline(NamedTuple):
    """exp_avg, exp_avg_sq: Adam's moments, by the names of the matrices in linear layers but for the head."""

    model: nn.Module
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


def rows_of(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] float32. kind: ``gaussian``, or ``student3`` (Student's t with 3 degrees of freedom)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=generator)
    if kind == "gaussian":
        return z
    chi = torch.randn(3, rows, columns, generator=generator).square().mean(0)
    return z / chi.sqrt()


def quality(x: Tensor, spec: str) -> float:
    """SQNR in dB of x [F, K] under a deterministic spec."""
    return sqnr_db(x, fake_quantize(x, QuantSpec.parse(spec)))


class Bench:
    """folder: where results are kept. deadline: of ``time.monotonic``, or None; it is looked at before each training."""

    def __init__(self, folder: Path, deadline: float | None = None, size: Size | None = None) -> None:
        self.folder, self.deadline, self.size = folder, deadline, size or Size()
        (folder / "trainings").mkdir(parents=True, exist_ok=True)

    def check_time(self) -> None:
        """Raises OutOfTime."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """(training, validation) bytes of the standard library, int64: files in their order, every twentieth is held out."""
        train, val = bytearray(), bytearray()
        for i, document in enumerate(StdlibSource().documents()):
            (val if i % 20 == 19 else train).extend(document.text.encode() + b"\0")
            if len(train) > TRAIN_BYTES and len(val) > VAL_BYTES:
                break
        return tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8).long() for t in (train, val))  # type: ignore[return-value]

    def batch(self, seed: int, step: int) -> Tensor:
        """[sequences, tokens + 1] of the training text."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._windows(
            self.text[0],
            torch.randint(
                len(self.text[0]) - self.size.tokens - 1, (self.size.sequences,), generator=generator
            ),
        )

    def val_batch(self) -> Tensor:
        """[val_windows, tokens + 1], evenly over the held-out text."""
        starts = torch.linspace(0, len(self.text[1]) - self.size.tokens - 1, self.size.val_windows).long()
        return self._windows(self.text[1], starts)

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(self.size.tokens + 1)]

    def _model(self, seed: int) -> nn.Module:
        size = self.size
        return GPTConfig(
            vocab_size=256, sequence_tokens=size.tokens, layers=size.layers, heads=4, width=size.width
        ).build(seed=seed)

    def val_loss(self, name: str, arm: Arm, seed: int) -> float:
        """Nats per byte on the held-out text after training; inf where it was not finite. name: of the arm, for its file."""
        return float(self._trained(name, arm, seed)["val_loss"])

    def losses(self, name: str, arm: Arm) -> list[float]:
        """Of all SEEDS."""
        return [self.val_loss(name, arm, seed) for seed in SEEDS]

    def baseline(self, seed: int) -> Baseline:
        """The model trained in high precision."""
        self._trained("baseline", Arm(ModelRecipe()), seed)
        kept = torch.load(self._path("baseline", seed).with_suffix(".pt"), weights_only=True)
        model = self._model(seed)
        model.load_state_dict(kept["model"])
        return Baseline(model.eval(), kept["exp_avg"], kept["exp_avg_sq"])

    def loss_of(self, windows: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda model: cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def observed(self, seed: int) -> tuple[nn.Module, Pass]:
        """The baseline's model, and the inputs, outputs and gradients of its layers on 16 held-out windows."""
        model = self.baseline(seed).model
        return model, record_pass(model, self.loss_of(self.val_batch()[:16]))

    def _path(self, name: str, seed: int) -> Path:
        return self.folder / "trainings" / f"{name}-seed{seed}-{self.size.key}.json"

    def _trained(self, name: str, arm: Arm, seed: int) -> Mapping[str, Any]:
        path = self._path(name, seed)
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["arm"] == repr(arm):
                return found
        self.check_time()
        model = self._model(seed)
        report = apply_recipe(model, arm.recipe, seed=seed)
        states = {"exp_avg": arm.exp_avg, "exp_avg_sq": arm.exp_avg_sq}
        optimizer = AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, states=states, seed=seed)
        schedule = CosineSchedule(
            warmup_steps=min(WARMUP, self.size.steps // 4), total_steps=self.size.steps, min_lr_fraction=0.1
        )
        for step in range(self.size.steps):
            report.clock.set(step=step)
            loss = self.loss_of(self.batch(seed, step))(model)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = LR * schedule(step)
            optimizer.step()
            if not math.isfinite(float(loss.detach())):
                break
        with torch.no_grad():
            report.clock.set(step=0)
            val = float(self.loss_of(self.val_batch())(model.eval()))
        if name == "baseline":
            self._keep_tensors(path, model, optimizer)
        result = {"arm": repr(arm), "val_loss": val if math.isfinite(val) else math.inf}
        replace_text(path, json.dumps(result))
        return result

    def _keep_tensors(self, path: Path, model: nn.Module, optimizer: AdamW) -> None:
        names = [f"{name}.weight" for name in linear_layers(model) if name != "lm_head"]
        moments = {name: optimizer.decode_states(model.get_parameter(name)) for name in names}
        kept = {
            "model": model.state_dict(),
            **{kind: {name: m[kind] for name, m in moments.items()} for kind in ("exp_avg", "exp_avg_sq")},
        }
        partial = path.with_suffix(".pt.partial")
        torch.save(kept, partial)
        partial.replace(path.with_suffix(".pt"))


def replace_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def gap(arm: Sequence[float], reference: Sequence[float], *, percent: bool = False) -> list[float]:
    """arm - reference seed by seed, in nats or in percent of the reference."""
    return [
        (a - r) * (100 / r if percent else 1.0) if math.isfinite(a) else math.inf
        for a, r in zip(arm, reference, strict=True)
    ]
