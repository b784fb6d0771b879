"""Ranges with a state: learned steps, static ranges, delayed scaling.

    learned    the step s of x ~ s * q(x / s) is a parameter (LSQ, arXiv 1902.08153, equations 3 to 5):
               dL/ds = c * sum dL/dx^ (q - x/s where the estimator passes, else q)        c = 1 / sqrt(n * Qp)
    static:N   the largest magnitude of the first N optimizer steps, frozen afterwards
    delayed:H  the largest magnitude of the last H optimizer steps ("FP8 Formats for Deep Learning", arXiv 2209.05433)

A layer's states are under ``<its name>.quantizers.<gemm>.<operand>``: ``step`` [F/r, K/c] is a Parameter,
``history`` [H, F/r, K/c], ``amax`` and ``steps`` are buffers. Until there is a past (and while ``static`` calibrates)
the range is the operand's own maximum.

A forward or backward only *notes* its maximum, in ``current``, and the notes become part of the state when the optimizer
steps (``follow_optimizer``), the largest over all processes. So within a step every micro-batch, every process and every
recomputation of a checkpointed block has one range, and noting twice changes nothing. ``current`` is no part of a
checkpoint, which is of a whole step, and no buffer, which DistributedDataParallel would overwrite with rank 0's.

Differs from LSQ: a step begins where it is best for N(0, 1) of the operand's root mean square (theirs, 2 mean|x| /
sqrt(Qp), is for integers alone). n is the number of elements that share the step, of an activation those of one token
(the features), so that it does not depend on how a batch is cut into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant import LinearRecipe, QuantSpec
from qtrain.quant.qtensor import Quantized
from qtrain.quant.ranges import gaussian_clip, root_mean_square

_TOKENS_AXIS = {"fprop.input": 0, "dgrad.grad_output": 0, "wgrad.grad_output": 1, "wgrad.input": 1}
LEARNABLE = ("fprop.input", "fprop.weight")


class LearnedStep(nn.Module):
    """``step``: float32 [F/r, K/c], not a number until ``start``."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.step = nn.Parameter(torch.full(shape, math.nan, device=device))
        self.ready = False

    @torch.no_grad()
    def start(self, view: Tensor) -> None:
        """From an operand [F, K]. A block of zeros begins at the least scale."""
        blocks = self.spec.blocks.blocks(view.detach().to(torch.float32))
        counts = self.spec.blocks.counts((view.shape[0], view.shape[1]), view.device)
        grid = self.spec.number_format
        best = root_mean_square(blocks, counts) * (gaussian_clip(grid) / grid.max)
        self.step.copy_(best.clamp(min=self.spec.min_scale).reshape(self.step.shape))
        self.ready = True

    def given(self) -> Tensor:
        return self.step

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = bool(self.step.isfinite().all())


class _Noting(nn.Module):
    """A range that is made of maxima. ``current``: the largest of this step so far, [F/r, K/c] float32."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.spec, self.steps_kept = spec, int(spec.clip_kind_and_value[1])
        self.current = torch.zeros(shape, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.current = fn(self.current).to(torch.float32)
        return self


class StaticRange(_Noting):
    """``amax``: the largest magnitude of the ``steps`` first steps; used once these are ``spec``'s N."""

    amax: Tensor
    steps: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(spec, shape, device)
        self.register_buffer("amax", torch.zeros(shape, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def given(self) -> Tensor:
        return torch.where(self.steps >= self.steps_kept, self.amax.to(torch.float32), 0.0)

    def advance(self) -> None:
        used = (self.current > 0).any() & (self.steps < self.steps_kept)
        self.amax.copy_(torch.where(used, torch.maximum(self.amax, self.current), self.amax))
        self.steps.add_(used)
        self.current.zero_()


class DelayedRange(_Noting):
    """``history``: [H, F/r, K/c], the newest step first."""

    history: Tensor

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(spec, shape, device)
        self.register_buffer("history", torch.zeros(self.steps_kept, *shape, device=device))

    def given(self) -> Tensor:
        return self.history.to(torch.float32).amax(0)

    def advance(self) -> None:
        used = (self.current > 0).any()
        newer = torch.cat([self.current[None], self.history[:-1]])
        self.history.copy_(torch.where(used, newer, self.history))
        self.current.zero_()


_KINDS: dict[str, Callable[..., nn.Module]] = {
    "learned": LearnedStep,
    "static": StaticRange,
    "delayed": DelayedRange,
}


def check_ranges(recipe: LinearRecipe, name: str, weight: Tensor) -> None:
    """Raises ValueError for a range with a state that a layer cannot hold."""
    stateful = {k: v for k, v in recipe.operands().items() if isinstance(v, QuantSpec) and v.stateful}
    for operand, spec in stateful.items():
        where = f"{name}: {operand} with clip={spec.clip!r}"
        if weight.is_meta:
            raise ValueError(
                f"{where} needs a weight in memory: build the model on a device, then convert it"
            )
        if spec.clip == "learned" and operand not in LEARNABLE:
            raise ValueError(
                f"{where}: a step is learned for {' and '.join(LEARNABLE)} only; use absmax or delayed"
            )
        axis, blocks = _TOKENS_AXIS.get(operand), spec.blocks
        if axis is not None and (blocks.rows, blocks.columns)[axis] is not None:
            allowed = ("tensor", "column") if axis == 0 else ("tensor", "row")
            raise ValueError(
                f"{where} and granularity {spec.granularity!r}: tokens come and go, so a state cannot tell them apart; "
                f"allowed are {' and '.join(allowed)}"
            )


class Quantizers(nn.ModuleDict):
    """The states of one layer, by GEMM and operand. ``followed``: whether an optimizer advances them."""

    def __init__(self, recipe: LinearRecipe, weight: Tensor) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        sizes = {
            "fprop.input": (1, in_features),
            "fprop.weight": (out_features, in_features),
            "dgrad.grad_output": (1, out_features),
            "dgrad.weight": (in_features, out_features),
            "wgrad.grad_output": (out_features, 1),
            "wgrad.input": (in_features, 1),
        }
        for operand, spec in recipe.operands().items():
            if isinstance(spec, QuantSpec) and spec.stateful:
                gemm, which = operand.split(".")
                shape = spec.blocks.scale_shape(*sizes[operand])
                made = _KINDS[spec.clip_kind_and_value[0]](spec, shape, weight.device)
                inner = self[gemm] if gemm in self else nn.ModuleDict()
                assert isinstance(inner, nn.ModuleDict)
                inner[which] = made
                self[gemm] = inner
        self.followed = False

    def by_operand(self) -> dict[str, Any]:
        """``fprop.input`` .. -> its state."""
        return {
            f"{gemm}.{which}": q
            for gemm, inner in self.items()
            for which, q in inner.items()  # type: ignore[operator]
        }

    def check_ready(self, name: str, *, trains: bool) -> None:
        """Raises RuntimeError where nobody started a step, or nobody is going to advance a range."""
        for operand, quantizer in self.by_operand().items():
            if isinstance(quantizer, LearnedStep):
                if not quantizer.ready:
                    raise RuntimeError(
                        f"{name}: the learned step of {operand} has not begun; call qtrain.nn.start_steps(model, probe), "
                        "whose probe runs the model once, or load a checkpoint"
                    )
            elif trains and not self.followed:
                raise RuntimeError(
                    f"{name}: the range of {operand} advances with the optimizer's steps; call "
                    "qtrain.nn.follow_optimizer(model, optimizer) once"
                )

    def given(self) -> dict[str, Tensor]:
        """What ``quantize_values`` gets for each operand."""
        return {operand: q.given() for operand, q in self.by_operand().items()}

    def flat(self) -> list[Tensor | None]:
        """What an autograd.Function takes, and ``of_flat`` reads: the steps of ``LEARNABLE`` (None where there is none),
        the other ranges, and where each of these notes its maxima."""
        held = self.by_operand()
        noting = [q for q in held.values() if isinstance(q, _Noting)]
        steps = [held[o].step if isinstance(held.get(o), LearnedStep) else None for o in LEARNABLE]
        return [*steps, *(q.given() for q in noting), *(q.current for q in noting)]  # type: ignore[operator]


def of_flat(
    recipe: LinearRecipe, states: tuple[Tensor | None, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ranges by operand, notes by operand) of a layer with that recipe."""
    names = [
        operand
        for operand, spec in recipe.operands().items()
        if isinstance(spec, QuantSpec) and spec.stateful and spec.clip != "learned"
    ]
    given = {o: s for o, s in zip((*LEARNABLE, *names), states, strict=False) if s is not None}
    notes = {o: s for o, s in zip(names, states[2 + len(names) :], strict=True) if s is not None}
    return given, notes


def note(current: Tensor, q: Quantized) -> None:
    """Takes the operand's maxima into ``current``, in place; what is not finite is carried by the scale."""
    assert q.amax is not None
    current.copy_(torch.maximum(current, torch.where(q.amax.isfinite(), q.amax, 0.0)))


def move_of_step(view: Tensor, q: Quantized, spec: QuantSpec) -> Tensor:
    """dx^/ds of every element, [F, K] float32: q - x/s where the estimator passes the gradient, else q. Of two levels,
    whose choice the step does not change, q."""
    if spec.bits == 1 or q.inside is None:
        return q.values
    scale = spec.blocks.expand(q.scale, (view.shape[0], view.shape[1]))
    return torch.where(q.inside, q.values - view * (1.0 / scale), q.values)


def step_gradient(d: Tensor, move: Tensor, spec: QuantSpec, operand: str) -> Tensor:
    """dL/ds [F/r, K/c] from dL/dx^ [F, K], both in the basis of the forward, scaled by 1 / sqrt(n * Qp)."""
    products = d.to(torch.float32) * move.to(torch.float32)
    free = 1 if operand == "fprop.input" else d.shape[0]
    r, c = spec.blocks.block_shape(free, d.shape[1])
    total = spec.blocks.blocks(products).sum((1, 3))
    return total / math.sqrt(r * c * spec.number_format.max)


def quantizers_of(model: nn.Module) -> list[Quantizers]:
    return [m for m in model.modules() if isinstance(m, Quantizers)]


def _noting(model: nn.Module) -> list[Any]:
    return [q for held in quantizers_of(model) for q in held.by_operand().values() if isinstance(q, _Noting)]


@torch.no_grad()
def advance_ranges(model: nn.Module) -> None:
    """The end of an optimizer step: what was noted, the largest over all processes, becomes part of the ranges. All
    processes call it."""
    found = _noting(model)
    if not found:
        return
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        flat = torch.cat([q.current.flatten() for q in found])
        distributed.all_reduce(flat, op=distributed.ReduceOp.MAX)
        for q, part in zip(found, flat.split([q.current.numel() for q in found]), strict=True):
            q.current.copy_(part.reshape(q.current.shape))
    for q in found:
        q.advance()


def follow_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """From now on every ``optimizer.step()`` ends with ``advance_ranges(model)``. Once, after surgery."""
    held = quantizers_of(model)
    for quantizers in held:
        quantizers.followed = True
    if _noting(model):
        optimizer.register_step_post_hook(lambda *_: advance_ranges(model))


@contextmanager
def notes_put_back(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no note: a probe is no training step."""
    found = _noting(model)
    kept = [q.current.clone() for q in found]
    try:
        yield
    finally:
        for q, current in zip(found, kept, strict=True):
            q.current.copy_(current)


def start_steps(model: nn.Module, probe: Callable[[nn.Module], Any]) -> None:
    """Begins the learned steps that have not begun: of weights from the weights, of inputs from one run of the model,
    ``probe(model)``, without gradients. All processes call it, and begin as rank 0 does.

    Raises ValueError for a layer whose input the probe does not reach.
    """
    from .linear import QuantizedLayer

    waiting = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, QuantizedLayer) and m.quantizers is not None and not m.steps_begun
    }
    if not waiting:
        return
    handles = [m.register_forward_pre_hook(lambda m, args: m.start_steps(args[0])) for m in waiting.values()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            probe(model)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, m in waiting.items() if not m.steps_begun]
    if missed:
        raise ValueError(
            f"the probe did not run {', '.join(missed[:5])}, whose learned steps then have no beginning"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for held in quantizers_of(model):
            for q in held.by_operand().values():
                if isinstance(q, LearnedStep):
                    torch.distributed.broadcast(q.step.data, 0)
