"""The plan against this machine: small models planned, then trained a few steps here, number beside number.

    must be exact       parameters, gradients, optimizer states
    kept                what autograd keeps of a micro-batch: distinct storages (``qtrain.nn.saved_tensors``)
    peak                on CUDA the allocator's; on a CPU every storage from its birth to its death, which sees nothing inside of kernels
    kept, compiled      of a block, by a backend that cuts the graph as every backend does and makes no code (aot_eager)
    step                seconds, eager, medians; of a CPU processor time. The machine's rates are measured just before.
                        And over the step of ``none``: what is common to both, right or wrong, is gone
    wire                bytes that leave a process in a step, two processes with gloo (``check_wire``)

and one linear layer against times that were measured on an H200 (``published``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.models.decoder import rope_angles
from qtrain.models.gpt import GPTConfig
from qtrain.models.llama import LlamaConfig
from qtrain.nn.saved_tensors import saved_bytes
from qtrain.nn.surgery import apply_recipe
from qtrain.optim import AdamW, parameter_groups
from qtrain.quant import ModelRecipe

from . import published
from .budget import LAWS, Failures
from .calibration import calibrated, clock
from .check_wire import wire_bytes
from .communication import Cluster, LowBits, of_ddp, of_fsdp2
from .compiled import compiled_blocks
from .devices import Device
from .fake_model import meta_model
from .operations import Tracker
from .plan import Inputs, RunPlan, plan_run, sharding_of
from .trace import token_loss

SEQUENCES, TOKENS, HEAD_WIDTH = 8, 128, 64
STEPS = 5  # timed
MODELS: Mapping[str, Any] = {
    "gpt": GPTConfig(vocab_size=1000, sequence_tokens=TOKENS, layers=3, heads=4, width=256),
    "llama": LlamaConfig(
        vocab_size=1000, sequence_tokens=TOKENS, layers=3, heads=4, kv_heads=2, width=256, mlp_width=688
    ),
}
_INT8 = {
    "fprop": {"input": "int8_row", "weight": "int8_row"},
    "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
    "wgrad": {"grad_output": "int8_row", "input": "fprop"},
}
_OF_ATTENTION_O = {"pattern": "*.attn.o", "recipe": _INT8}
RECIPES: Mapping[str, ModelRecipe] = {
    "none": ModelRecipe(),
    "all_gemms": ModelRecipe(linear=_INT8, exclude=["lm_head"]),  # type: ignore[arg-type]
    "all_gemms saved=quantized": ModelRecipe(linear={**_INT8, "saved": "quantized"}, exclude=["lm_head"]),  # type: ignore[arg-type]
    "int8_lean": ModelRecipe(
        linear={**_INT8, "saved": "quantized"},  # type: ignore[arg-type]
        rules=[_OF_ATTENTION_O],  # type: ignore[list-item]
        exclude=["lm_head"],
        compute="native",
        recompute_activations=True,
    ),
}
STATES = {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"}


@dataclass(frozen=True)
class Row:
    """One number. exact: whether it must be equal."""

    point: str
    what: str
    predicted: float
    measured: float
    unit: str
    exact: bool = False

    @property
    def error(self) -> float:
        """Relative; 0 where both are 0."""
        return 0.0 if self.predicted == self.measured else self.predicted / self.measured - 1


def make_optimizer(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, lr=1e-4, states=STATES)


def inputs_for(config: Any, device: Device, *, checkpointing: bool = False) -> Inputs:
    """One process, one micro-batch, eager."""
    return Inputs(
        model_config=config, make_optimizer=make_optimizer, weight_decay=0.1, device=device, gpus=1, strategy="none",
        low_bits=LowBits(),
        batch_sequences=SEQUENCES, micro_batch_sequences=SEQUENCES, sequence_tokens=TOKENS, bf16=True, compile=False, trace_compiled=False,
        checkpointing=checkpointing, overhead_gib=0.0, margin_fraction=0.0, tokens=None, target_loss=None, law=LAWS["hoffmann"],
        failures=Failures(gpu_mtbf_hours=1e5, restart_minutes=1, write_gb_per_s=1),
    )  # fmt: skip


class SmallRun:
    """A real model, its optimizer and a batch, stepped as training does: the gradients of the last step go between forward and
    backward."""

    def __init__(
        self, config: Any, recipe: ModelRecipe, device_type: str, *, checkpointing: bool = False
    ) -> None:
        self.device_type = device_type
        self.model = config.build(seed=0)
        self.clock = apply_recipe(self.model, recipe, device=device_type).clock
        self.model.set_activation_checkpointing(checkpointing)
        self.model.to(device_type)
        self.optimizer = make_optimizer(parameter_groups(self.model, 0.1))
        shape, generator = (SEQUENCES, TOKENS + 1), torch.Generator().manual_seed(0)
        self.batch = torch.randint(config.vocab_size, shape, generator=generator).to(device_type)

    def loss(self) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            logits = self.model(self.batch[:, :-1])
        return token_loss(logits, self.batch[:, 1:])

    def step(self, between: Callable[[str], None] = lambda _: None) -> None:
        loss = self.loss()
        between("forward")
        self.optimizer.zero_grad()
        loss.backward()
        between("backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        between("optimizer")

    def gradient_bytes(self) -> int:
        return sum(
            p.grad.numel() * p.grad.element_size() for p in self.model.parameters() if p.grad is not None
        )

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def kept_bytes(self) -> int:
        return saved_bytes(self.loss, [*self.model.parameters(), self.batch])

    def peak_bytes(self) -> int:
        """Of a step that is not the first."""
        self.step()
        stays = self.weight_bytes() + int(self.optimizer.state_bytes()["total"])
        if self.device_type == "cuda":
            torch.cuda.synchronize()
            unseen = torch.cuda.memory_allocated() - stays - self.gradient_bytes()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - unseen
        peaks: dict[str, int] = {}
        old = {"forward": self.gradient_bytes()}  # made before the tracker, freed under it
        with Tracker() as tracker:

            def between(phase: str) -> None:
                peaks[phase] = tracker.peak + old.get(phase, 0)
                tracker.restart_peak()

            self.step(between)
        return stays + max(peaks.values())

    def seconds(self) -> float:
        self.step()
        samples = []
        for _ in range(STEPS):
            start = clock(self.device_type)
            self.step()
            samples.append(clock(self.device_type) - start)
        return statistics.median(samples)


def _rows_of_run(point: str, plan: RunPlan, run: SmallRun, *, kept: bool, timed: bool) -> Iterator[Row]:
    seconds = run.seconds() if timed else None
    if not timed:
        run.step()
    yield Row(point, "parameters", 4 * plan.parameters, run.weight_bytes(), "bytes", exact=True)
    yield Row(point, "gradients", plan.memory.gradients, run.gradient_bytes(), "bytes", exact=True)
    yield Row(
        point,
        "optimizer states",
        plan.memory.states,
        int(run.optimizer.state_bytes()["total"]),
        "bytes",
        exact=True,
    )
    if kept:  # checkpointing keeps its inputs where hooks do not see them
        yield Row(point, "kept for the backward", plan.memory.kept_bytes, run.kept_bytes(), "bytes")
    yield Row(point, "peak", plan.memory.peak, run.peak_bytes(), "bytes")
    if seconds is not None:
        yield Row(point, "step", plan.time.total, seconds, "s")


def rows_of_memory(
    device: Device, models: Sequence[str] = tuple(MODELS), *, timed: bool = True
) -> Iterator[Row]:
    """Every model under every recipe, and one whose activations are checkpointed."""
    for name in models:
        steps: dict[str, Row] = {}
        for recipe_name, recipe in RECIPES.items():
            plan = plan_run(inputs_for(MODELS[name], device), recipe_name, recipe)
            run = SmallRun(MODELS[name], recipe, device.type)
            for row in _rows_of_run(f"{name}, {recipe_name}", plan, run, kept=True, timed=timed):
                yield row
                if row.what == "step":
                    steps[recipe_name] = row
        base = steps.pop("none", None)
        for row in steps.values():
            assert base is not None
            yield Row(
                row.point,
                "step over none's",
                row.predicted / base.predicted,
                row.measured / base.measured,
                "",
            )
    name = models[-1]
    plan = plan_run(inputs_for(MODELS[name], device, checkpointing=True), "none", RECIPES["none"])
    run = SmallRun(MODELS[name], RECIPES["none"], device.type, checkpointing=True)
    yield from _rows_of_run(f"{name}, none, checkpointed", plan, run, kept=False, timed=timed)


def rows_of_compiled(names: Sequence[str] = ("none", "int8_lean")) -> Iterator[Row]:
    """What a compiled block keeps of 1024 tokens."""
    for model_name, config in MODELS.items():
        for name in names:
            predicted = compiled_blocks(config, RECIPES[name], tokens=TOKENS, dtype=torch.bfloat16)[0]
            measured = compiled_block_bytes(config, RECIPES[name])
            yield Row(
                f"{model_name}, {name}",
                "kept, compiled block",
                predicted.at(SEQUENCES * TOKENS),
                measured,
                "bytes",
            )


def compiled_block_bytes(config: Any, recipe: ModelRecipe, backend: str = "aot_eager") -> int:
    """Measured on real tensors."""
    torch.compiler.reset()
    model = config.build(seed=0)
    apply_recipe(model, recipe)
    block, angles = model.blocks[0], rope_angles(torch.arange(TOKENS), model.rope)
    block.compile(fullgraph=True, backend=backend)
    x = torch.randn(SEQUENCES, TOKENS, config.width).requires_grad_()

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = block(x, angles)
        return y

    run()
    found = saved_bytes(run, [*model.parameters(), *angles])
    torch.compiler.reset()
    return found


def rows_of_wire(device: Device) -> Iterator[Row]:
    """Two processes on this CPU, with gloo."""
    config = MODELS["llama"]
    model, _ = meta_model(config, RECIPES["none"])
    sharding = sharding_of(model, RECIPES["none"], "fsdp2", 2)
    cluster = Cluster(device, 2)
    # gloo reduces and scatters by a whole all-reduce: what a ring sends, once more
    more = cluster.gather_bytes(sharding.weights)
    predicted = {
        "ddp": of_ddp(cluster, sharding.weights, 0.0, overlaps=True).sent_bytes,
        "fsdp2": of_fsdp2(cluster, *sharding.parameter_groups(), 1, 0.0, 0.0).sent_bytes + more,
    }
    for strategy, measured in wire_bytes(config, SEQUENCES // 2, TOKENS).items():
        yield Row(
            f"llama, {strategy}, 2 processes (gloo)",
            "sent by a process, a step",
            predicted[strategy],
            measured,
            "bytes",
        )


def rows_of_published(device: Device) -> Iterator[Row]:
    """device: the H200's."""
    for what, predicted, measured in published.rows(device):
        yield Row(what, "fprop + dgrad + wgrad", predicted * 1e-3, measured * 1e-3, "s")


def measured(h200: Device | None = None, *, timed: bool = True) -> list[Row]:
    """All of it; minutes on a CPU. h200: for the numbers of kernels/README.md, None to leave them out."""
    device = calibrated(sequence_tokens=TOKENS, head_width=HEAD_WIDTH)
    found = [*rows_of_memory(device, timed=timed)]
    if device.type == "cpu":
        found += [*rows_of_compiled(), *rows_of_wire(device)]
    if h200 is not None:
        found += rows_of_published(h200)
    return found


def exact(rows: Sequence[Row]) -> bool:
    """Whether what must be equal is."""
    return all(row.predicted == row.measured for row in rows if row.exact)


def as_numbers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "error": row.error} for row in rows]


def _shown(row: Row, value: float) -> str:
    if row.unit == "s":
        return f"{value * 1e3:.2f} ms"
    return f"{value:,.0f}" if row.unit == "bytes" else f"{value:.2f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: predicted beside measured, and the error of the prediction."""
    lines = ["| point | what | predicted | measured | error |", "|---|---|---|---|---|"]
    for row in rows:
        error = "exact" if row.predicted == row.measured else f"{row.error:+.1%}"
        if row.exact and error != "exact":
            error += " WRONG"
        lines.append(
            f"| {row.point} | {row.what} | {_shown(row, row.predicted)} | {_shown(row, row.measured)} | {error} |"
        )
    for what in dict.fromkeys(row.what for row in rows):
        errors = [abs(row.error) for row in rows if row.what == what]
        lines.append(
            f"\n{what}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, of {len(errors)}"
        )
    return "\n".join(lines)
