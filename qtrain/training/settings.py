"""RunSettings: the numbers of a training run, checked before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .identity import check_allowed

DEVICES = ("auto", "cpu", "cuda")
# Lightning's names: autocast over float32 parameters, and none.
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number, {least} or more")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The text that a finished run writes. ``temperature`` 0 is greedy; ``top_k`` None: the whole vocabulary."""

    prompt: str = "\n"
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50

    def __post_init__(self) -> None:
        _whole("sample.max_new_tokens", self.max_new_tokens, 0)
        if not self.temperature >= 0:
            raise ValueError(f"sample.temperature={self.temperature!r}: must be 0 (greedy) or more")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run does, in steps and sequences.

    steps: optimizer steps in all, also of a resumed run. batch_sequences: sequences an optimizer step, over all
    processes. micro_batch_sequences: sequences a forward in one process; the rest is accumulated. sequence_tokens:
    tokens a sequence. eval_every_steps, eval_windows: how often, and on how many windows (None: all), the
    validation loss is taken. checkpoint_every_steps: 0 keeps the final checkpoint only. precision: ``bf16``
    (autocast over float32 parameters) or ``fp32``. name, run, out: the folder ``out/name/run``; run None: the time.
    baseline: a run (its folder, or a name under ``out``) to hold the result against. resume: a checkpoint or a run's
    folder, continued in a folder of its own; ``auto`` continues the run ``out/name/run`` itself, where there is
    something to continue. allow_changed: what a continuation may have different from its checkpoint.

    Raises ValueError, naming the value and the remedy.
    """

    steps: int
    batch_sequences: int
    micro_batch_sequences: int
    sequence_tokens: int
    seed: int = 0
    eval_every_steps: int = 100
    eval_windows: int | None = 64
    checkpoint_every_steps: int = 0
    compile: bool = False
    precision: str = "bf16"
    activation_checkpointing: bool = False
    device: str = "auto"
    name: str = "train"
    run: str | None = None
    out: str = "outputs"
    baseline: str | None = None
    resume: str | None = None
    allow_changed: Sequence[str] = ()
    sample: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        if isinstance(self.sample, Mapping):
            object.__setattr__(self, "sample", SampleSettings(**self.sample))
        least = {"seed": 0, "checkpoint_every_steps": 0}
        counts = ("steps", "batch_sequences", "micro_batch_sequences", "sequence_tokens", "eval_every_steps")
        for name in (*counts, *least):
            _whole(name, getattr(self, name), least.get(name, 1))
        if self.eval_windows is not None:
            _whole("eval_windows", self.eval_windows, 1)
        for name, allowed in (("device", DEVICES), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        for name in ("name", "run"):
            value = getattr(self, name)
            if isinstance(value, int):  # run=1 on a command line
                object.__setattr__(self, name, value := str(value))
            if value is not None and (not value or "/" in value or value.startswith(".")):
                raise ValueError(f"{name}={value!r}: one folder name; it lies under out={self.out}")
        if self.resume == "auto" and self.run is None:
            raise ValueError("resume=auto continues a run by its name: give it one, as in run=first")
        check_allowed(self.allow_changed)
        self.accumulate(1)

    def accumulate(self, world_size: int) -> int:
        """Micro-steps an optimizer step; raises ValueError unless the batch divides into them."""
        per_micro_step = self.micro_batch_sequences * world_size
        if self.batch_sequences % per_micro_step:
            raise ValueError(
                f"batch_sequences={self.batch_sequences} is no multiple of micro_batch_sequences="
                f"{self.micro_batch_sequences} times {world_size} process(es); take batch_sequences="
                f"{max(1, self.batch_sequences // per_micro_step) * per_micro_step}, or other micro-batches"
            )
        return self.batch_sequences // per_micro_step

    @property
    def step_tokens(self) -> int:
        """Tokens an optimizer step."""
        return self.batch_sequences * self.sequence_tokens

    @staticmethod
    def of(config: Mapping[str, Any]) -> RunSettings:
        """The settings among the keys of a whole configuration."""
        known = [f.name for f in fields(RunSettings)]
        return RunSettings(**{name: config[name] for name in known if name in config})
