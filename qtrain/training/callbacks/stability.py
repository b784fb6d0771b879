"""Stability of the loss and of the gradient norm, from every step; alerts as soon as a threshold is crossed.

The scores are those of ``qtrain.analysis.spikes``, the thresholds those of ``qtrain.analysis.limits``. Their windows are part of a checkpoint, so that
a resumed run finds what the uninterrupted one would have found.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from lightning.pytorch import Trainer

from qtrain.analysis.limits import CLIP_LEAST_STEPS, CLIP_SHARE, DIVERGED_NATS, JOINT_SCORE, SPIKE_SCORE
from qtrain.analysis.spikes import (
    ROLLING,
    Divergence,
    RobustScore,
    SigmaSpikes,
    put_back,
    state_of,
)

from ..module import QuantizedTransformer, StepReading
from ..verdict import RunStopped
from .instrument import Instrument


class Stability(Instrument):
    """Samples under ``stability/``; alerts ``stability/loss_spike``, ``grad_norm_spike``, ``joint_spike``, ``clip_share``,
    ``diverged`` and ``non_finite``."""

    name = "stability"

    def __init__(self, every_steps: int = 100) -> None:
        super().__init__(every_steps)
        self._scores = {"loss": RobustScore(), "grad_norm": RobustScore()}
        self._spikes = {"loss": SigmaSpikes(), "grad_norm": SigmaSpikes()}
        self._divergence = Divergence()
        self._clipped: deque[bool] = deque(maxlen=ROLLING)
        self._largest = {"loss": 0.0, "grad_norm": 0.0}
        self._joint = self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        reading = pl_module.reading
        if reading is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._take(trainer, pl_module, reading)
        if self.due(reading.step):
            self.record(trainer, pl_module, reading.step, {"stability": self._sample()})
            self._largest = dict.fromkeys(self._largest, 0.0)

    def _take(self, trainer: Trainer, module: QuantizedTransformer, reading: StepReading) -> None:
        step, values = reading.step, {"loss": reading.loss, "grad_norm": reading.grad_norm}
        scores = {}
        for name, value in values.items():
            # A gradient of zeros is no spike
            score = self._scores[name].of(value) if value != 0 else 0.0
            scores[name], self._largest[name] = score, max(score, self._largest[name])
            self._spikes[name].of(value)
            self.alert_where(
                score > SPIKE_SCORE, trainer, module, step, f"stability/{name}_spike", value=score, limit=SPIKE_SCORE,
                message=f"the {name.replace('_', ' ')} is {value:.4g}, a robust score of {score:.1f}",
            )  # fmt: skip
        both = min(scores.values())
        self._joint += both > JOINT_SCORE
        self.alert_where(
            both > JOINT_SCORE, trainer, module, step, "stability/joint_spike", value=both, limit=JOINT_SCORE,
            message="loss and gradient norm spike together",
        )  # fmt: skip
        self._clipped.append(reading.clipped)
        share = self._clip_share()
        self.alert_where(
            share > CLIP_SHARE and len(self._clipped) >= CLIP_LEAST_STEPS, trainer, module, step, "stability/clip_share",
            value=share, limit=CLIP_SHARE,
            message=f"{share:.1%} of the last {len(self._clipped)} steps were clipped",
        )  # fmt: skip
        diverged = self._divergence.of(reading.loss)
        self.alert_where(
            diverged, trainer, module, step, "stability/diverged", value=reading.loss,
            limit=self._divergence.least + DIVERGED_NATS,
            message=f"the loss is {reading.loss:.4f}, its least was {self._divergence.least:.4f}",
        )  # fmt: skip

    def _clip_share(self) -> float:
        return sum(self._clipped) / len(self._clipped)

    def _sample(self) -> dict[str, float]:
        return {
            **{f"{name}_spike_share": spikes.share for name, spikes in self._spikes.items()},
            **{f"{name}_robust_score": score for name, score in self._largest.items()},
            "joint_spikes": float(self._joint),
            "clip_share": self._clip_share(),
            "diverged": float(self._divergence.diverged),
        }

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """The step that the guard refused."""
        if not isinstance(exception, RunStopped) or exception.verdict.outcome != "non_finite":
            return
        verdict = exception.verdict
        self.alert_where(
            True, trainer, pl_module, verdict.step, "stability/non_finite", value=verdict.value or math.nan,
            limit=math.inf, message=verdict.message,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "scores": {name: state_of(score) for name, score in self._scores.items()},
            "spikes": {name: state_of(spikes) for name, spikes in self._spikes.items()},
            "divergence": state_of(self._divergence),
            "clipped": list(self._clipped),
            "largest": dict(self._largest),
            "joint": self._joint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name in self._scores:
            put_back(self._scores[name], state_dict["scores"][name])
            put_back(self._spikes[name], state_dict["spikes"][name])
        put_back(self._divergence, state_dict["divergence"])
        self._clipped = deque(state_dict["clipped"], maxlen=ROLLING)
        self._largest, self._joint = dict(state_dict["largest"]), state_dict["joint"]
