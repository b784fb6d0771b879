"""A run before it is paid for: memory, step time, tokens, days and cost of one recipe on so many GPUs.

    plan = plan_run(inputs, "int8_lean", recipe)

The model is traced on fake tensors (``trace``), the optimizer asked for its states (``optimizer_states``), both put on a device
(``memory``, ``step_time``) and a cluster (``communication``), and the step multiplied into a run (``budget``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qtrain.nn.native_ops import kinds_of, obstacles
from qtrain.quant import LinearRecipe, ModelRecipe

from .budget import Budget, Failures, Interval, ScalingLaw, budget, checkpoint_interval, tokens_of
from .communication import NOTHING, Cluster, Communication, LowBits, of_ddp, of_fsdp2
from .compiled import compiled_blocks, with_compiled
from .devices import GIB, Device
from .fake_model import meta_model
from .memory import MemoryPlan, Sharding, grows_linearly, plan_memory, sharding_of
from .optimizer_states import Make, OptimizerBytes, local_elements, optimizer_bytes
from .step_time import StepTime, launches, micro_batch, plan_time
from .trace import StepTrace, trace_step

# Contractions of int8 are exact in int32 up to here (kernels/README.md, README.md: Limits)
INT8_CONTRACTION = 131_071


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all recipes of a plan share.

    model_config: a ``ModelConfig``. make_optimizer, weight_decay: of ``optimizer_bytes``. batch_sequences: a step, over all GPUs;
    micro_batch_sequences: a forward of one; 0: still to be chosen (``with_micro_batch``). sequence_tokens: of a sequence. bf16: autocast, else float32. strategy: ``none``,
    ``ddp``, ``fsdp2``. low_bits: what of the communication travels as codes. trace_compiled: whether the compiler is asked what it keeps; else it is taken to keep what eager code does, more. overhead_gib, margin_fraction: of a GPU's memory that torch does not count (context, libraries),
    and of the peak that the allocator loses. tokens, target_loss: None or the user's. law, failures: of ``budget``.
    """

    model_config: Any
    make_optimizer: Make
    weight_decay: float
    device: Device
    gpus: int
    strategy: str
    low_bits: LowBits
    batch_sequences: int
    micro_batch_sequences: int
    sequence_tokens: int
    bf16: bool
    compile: bool
    trace_compiled: bool
    checkpointing: bool
    overhead_gib: float
    margin_fraction: float
    tokens: float | None
    target_loss: float | None
    law: ScalingLaw
    failures: Failures

    @property
    def micro_batches(self) -> int:
        """A step and process."""
        return self.batch_sequences // (self.micro_batch_sequences * self.gpus)

    @property
    def usable_bytes(self) -> int:
        """For what the plan counts."""
        return int((self.device.memory_gib - self.overhead_gib) * GIB / (1 + self.margin_fraction))


@dataclass(frozen=True)
class RunPlan:
    """One recipe. compute: ``native``, ``simulated`` or what a mixture comes to. largest: micro-batch that fits, in sequences; 0 where none does.
    parameters: trainable numbers of the whole model."""

    name: str
    compute: str
    parameters: int
    memory: MemoryPlan
    time: StepTime
    budget: Budget
    interval: Interval
    largest: int
    optimizer: OptimizerBytes
    fits: bool
    warnings: tuple[str, ...]


def linear_recipes(recipe: ModelRecipe) -> Iterator[LinearRecipe]:
    for linear in (recipe.linear, *(rule.recipe for rule in recipe.rules)):
        if linear is not None and linear.quantizes:
            yield linear


def on_device(recipe: ModelRecipe, device: Device) -> ModelRecipe:
    """``recipe`` with ``auto`` decided: native where every layer has a path and the device kernels. Raises ValueError for
    ``native`` without them, naming what is missing."""
    if recipe.compute == "simulated":
        return recipe
    found = [problem for linear in linear_recipes(recipe) for problem in obstacles(linear)]
    found += [
        device.lacks(kind)
        for linear in linear_recipes(recipe)
        for kind in kinds_of(linear)
        if device.lacks(kind)
    ]
    if recipe.compute == "native" and found:
        raise ValueError(f"compute=native: {'; '.join(dict.fromkeys(found))}; or compute=simulated")
    return dataclasses.replace(recipe, compute="simulated" if found else "native")


def refused(inputs: Inputs, recipe: ModelRecipe) -> ModelRecipe:
    """``on_device``, and what surgery and the kernels refuse at these shapes. Raises ValueError or TypeError."""
    decided = on_device(recipe, inputs.device)
    meta_model(inputs.model_config, decided)
    tokens = (inputs.micro_batch_sequences or 1) * inputs.sequence_tokens
    int8 = any("int8" in kinds_of(linear) for linear in linear_recipes(decided))
    if decided.compute == "native" and int8 and tokens > INT8_CONTRACTION:
        raise ValueError(
            f"native int8 sums at most {INT8_CONTRACTION:,} tokens in dW, and a micro-batch has {tokens:,}: take "
            f"micro_batch_sequences={max(1, INT8_CONTRACTION // inputs.sequence_tokens)} or less"
        )
    return decided


def traced(inputs: Inputs, recipe: ModelRecipe, sequences: int) -> StepTrace:
    return trace_step(
        inputs.model_config, recipe, sequences=sequences, tokens=inputs.sequence_tokens,
        dtype=torch.bfloat16 if inputs.bf16 else torch.float32, device_type=inputs.device.type,
    )  # fmt: skip


def largest_micro_batch(peak: Callable[[int], int], usable: int, most: int) -> int:
    """The largest number of sequences whose ``peak`` fits, at most ``most``; 0 where not even one does. peak never falls."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= usable else (low, middle - 1)
    return low


class _Memory:
    """Of one recipe at any micro-batch: traced at one and two sequences, linear beyond."""

    def __init__(self, inputs: Inputs, recipe: ModelRecipe) -> None:
        self.inputs, self.recipe = inputs, recipe
        self.small, self.large = traced(inputs, recipe, 1), traced(inputs, recipe, 2)
        if inputs.compile and inputs.trace_compiled:
            blocks = compiled_blocks(
                inputs.model_config,
                recipe,
                tokens=inputs.sequence_tokens,
                dtype=torch.bfloat16 if inputs.bf16 else torch.float32,
            )
            self.small, self.large = with_compiled(self.small, blocks), with_compiled(self.large, blocks)
        self.model, _ = meta_model(inputs.model_config, recipe)
        self.sharding, self.optimizer = cache(self._sharding), cache(self._optimizer)

    def _sharding(self, strategy: str | None = None) -> Sharding:
        inputs = self.inputs
        found = sharding_of(self.model, self.recipe, strategy or inputs.strategy, inputs.gpus)
        owed = inputs.low_bits.owed_bytes(found.weights // 4, found.strategy, inputs.gpus)
        return dataclasses.replace(found, owed=owed)

    def _optimizer(self, strategy: str | None = None) -> OptimizerBytes:
        shards = self.inputs.gpus if (strategy or self.inputs.strategy) == "fsdp2" else 1
        return optimizer_bytes(
            self.inputs.make_optimizer,
            self.model,
            self.inputs.weight_decay,
            device_type=self.inputs.device.type,
            shards=shards,
        )

    def at(
        self, sequences: int, *, checkpointing: bool | None = None, strategy: str | None = None
    ) -> MemoryPlan:
        inputs = self.inputs
        return plan_memory(
            grows_linearly(self.small, self.large, sequences),
            self.sharding(strategy), self.optimizer(strategy),
            accumulates=inputs.batch_sequences > sequences * inputs.gpus,
            checkpointing=inputs.checkpointing if checkpointing is None else checkpointing,
        )  # fmt: skip


def _communication(inputs: Inputs, sharding: Sharding, forward: float, backward: float) -> Communication:
    cluster = Cluster(inputs.device, inputs.gpus)
    if inputs.gpus == 1:
        return NOTHING
    if inputs.strategy == "fsdp2":
        blocks, outer = sharding.parameter_groups()
        return of_fsdp2(cluster, blocks, outer, inputs.micro_batches, forward, backward, inputs.low_bits)
    return of_ddp(cluster, sharding.weights, backward, overlaps=not inputs.compile, low_bits=inputs.low_bits)


def plan_run(inputs: Inputs, name: str, recipe: ModelRecipe) -> RunPlan:
    """Raises ValueError where the recipe cannot run: no native path, a device without its kernels, a transform that
    does not divide a width."""
    return _plan_run(inputs, name, refused(inputs, recipe))


def with_micro_batch(inputs: Inputs, recipe: ModelRecipe) -> Inputs:
    """``inputs`` with the largest micro-batch that fits and divides a GPU's share, where none was given; one sequence where
    none fits. No more tokens than native int8 can sum: beyond that larger ones gain nothing."""
    if inputs.micro_batch_sequences:
        return inputs
    one = dataclasses.replace(inputs, micro_batch_sequences=1)
    most = max(1, min(inputs.batch_sequences // inputs.gpus, INT8_CONTRACTION // inputs.sequence_tokens))
    at = _Memory(one, refused(one, recipe))
    largest = largest_micro_batch(lambda n: at.at(n).peak, inputs.usable_bytes, most)
    return dataclasses.replace(inputs, micro_batch_sequences=_divides(inputs, max(1, largest)))


def _plan_run(inputs: Inputs, name: str, recipe: ModelRecipe) -> RunPlan:
    at = _Memory(inputs, recipe)
    memory, sharding, optimizer = at.at(inputs.micro_batch_sequences), at.sharding(), at.optimizer()
    trace = traced(inputs, recipe, inputs.micro_batch_sequences)
    forward, backward = micro_batch(
        trace, inputs.device, compiled=inputs.compile, checkpointing=inputs.checkpointing
    )
    communication = _communication(inputs, sharding, sum(forward.values()), sum(backward.values()))
    sharded = inputs.gpus if inputs.strategy == "fsdp2" else 1
    flops = getattr(at.model, "flops_per_token", None)
    time = plan_time(
        forward, backward, inputs.device,
        micro_batches=inputs.micro_batches,
        host_operations=0 if inputs.compile else launches(trace, inputs.checkpointing),
        optimizer_moved=optimizer.moved,
        local_parameters=sum(local_elements(tuple(p.shape), sharded) for p in at.model.parameters()),
        communication=communication,
        step_tokens=inputs.batch_sequences * inputs.sequence_tokens,
        processes=inputs.gpus,
        flops_per_token=None if flops is None else flops(),
    )  # fmt: skip
    parameters = sum(p.numel() for p in at.model.parameters())
    whole_states = at.optimizer("none").states if sharded > 1 else optimizer.states
    # What every process owes is saved as well
    saved = sharding.weights + whole_states + inputs.gpus * sharding.owed
    interval = checkpoint_interval(inputs.failures, inputs.gpus, saved)
    spent = budget(
        parameters, inputs.batch_sequences * inputs.sequence_tokens, time.total, inputs.gpus,
        tokens=tokens_of(parameters, inputs.tokens, inputs.target_loss, inputs.law), law=inputs.law, lost=interval.lost,
        price_per_hour=inputs.device.price_per_hour, watts=inputs.device.watts,
    )  # fmt: skip
    share = inputs.batch_sequences // inputs.gpus
    largest = largest_micro_batch(
        lambda n: at.at(n).peak, inputs.usable_bytes, max(share, inputs.micro_batch_sequences)
    )
    fits = memory.peak <= inputs.usable_bytes
    quantizes = any(True for _ in linear_recipes(recipe))
    found = tuple(_warnings(inputs, recipe, at, memory, time, largest, fits, interval))
    compute = recipe.compute if quantizes else "bf16" if inputs.bf16 else "fp32"
    return RunPlan(name, compute, parameters, memory, time, spent, interval, largest, optimizer, fits, found)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _warnings(
    inputs: Inputs, recipe: ModelRecipe, at: _Memory, memory: MemoryPlan, time: StepTime, largest: int, fits: bool, interval: Interval
) -> Iterator[str]:  # fmt: skip
    if not fits:
        yield _remedies(inputs, at, memory, largest)
    quantizes = [*linear_recipes(recipe)]
    if quantizes and recipe.compute == "simulated":
        cost = time.parts.get("quantization", 0.0)
        yield (
            f"compute=simulated: GEMMs run in {'bf16' if inputs.bf16 else 'fp32'}, and quantizing takes {cost:.3g} s of a step of "
            f"{time.total:.3g} s; it shows what low precision does to training, not what it saves"
        )
    copies = memory.kept.get("weight copies", 0)
    if inputs.strategy == "fsdp2" and not inputs.checkpointing and copies > memory.weights:
        yield (
            f"fsdp2 does not shard what autograd keeps of the weights ({_gib(copies)} of bf16 copies or quantized weights, a GPU); "
            "activation_checkpointing=true or a native recipe keeps none of them"
        )
    if inputs.gpus > 1 and inputs.strategy == "ddp" and inputs.compile and "communication" in time.parts:
        yield "ddp with compile=true: gradients come at the end of one compiled backward, so their reduction hides behind nothing"
    if unknown := _unknown_links(inputs):
        device, spent = inputs.device, time.parts.get("communication", 0.0)
        yield (
            f"nobody measured how {device.name} is connected: {', '.join(f'{name}={getattr(device, name):g}' for name in unknown)} stand for "
            f"it, and {spent:.3g} s of communication in a step of {time.total:.3g} s follow from them; give "
            f"{' '.join(f'+hardware.{name}=...' for name in unknown)}"
        )
    if interval.lost > 0.2:
        yield f"failures and checkpoints take {interval.lost:.0%} of the time at {inputs.gpus} GPUs: write checkpoints faster"


def _unknown_links(inputs: Inputs) -> list[str]:
    """Names of the device's unknown numbers that the communication of the plan follows from."""
    if inputs.gpus == 1:
        return []
    within = inputs.gpus <= inputs.device.gpus_per_node
    return [name for name in inputs.device.unknown if not (within and name.startswith("node_"))]


def _remedies(inputs: Inputs, at: _Memory, memory: MemoryPlan, largest: int) -> str:
    usable, found = inputs.usable_bytes, []
    if largest:
        found.append(
            f"micro_batch_sequences={_divides(inputs, largest)} ({_gib(at.at(_divides(inputs, largest)).peak)})"
        )
    now = inputs.micro_batch_sequences
    if not inputs.checkpointing and (peak := at.at(now, checkpointing=True).peak) <= usable:
        found.append(f"activation_checkpointing=true ({_gib(peak)})")
    if inputs.gpus > 1 and inputs.strategy != "fsdp2":
        try:
            peak = at.at(1, strategy="fsdp2", checkpointing=True).peak
        except ValueError:
            peak = usable + 1
        if peak <= usable:
            found.append(
                f"trainer.strategy=fsdp2 with activation_checkpointing=true and micro_batch_sequences=1 ({_gib(peak)})"
            )
    remedy = (
        f": {'; or '.join(found)}" if found else ": more GPUs with trainer.strategy=fsdp2, or a smaller model"
    )
    return f"does not fit: {_gib(memory.peak)} of {_gib(usable)} usable on {inputs.device.name}{remedy}"


def _divides(inputs: Inputs, most: int) -> int:
    """The largest micro-batch up to ``most`` that divides a process's share of the batch."""
    share = inputs.batch_sequences // inputs.gpus
    return next(n for n in range(min(most, share), 0, -1) if share % n == 0)
