"""Memory of one process, from the trace of its step: what stays, what the backward keeps, and the highest moment.

    forward      weights + states + gradients of the last step + kept by the pieces before + most alive in this one
    backward     weights + states + gradients so far + kept by the pieces before + most alive in this one
    optimizer    weights + states + gradients + what the update needs for a moment

Lightning frees the last step's gradients between forward and backward, and so does the plan; when micro-batches are
accumulated they stay. With checkpointing of activations a block keeps its input, and all else for its own backward
alone.

    ddp      + buckets, a second copy of all gradients (torch's default, gradient_as_bucket_view=false)
    fsdp2    weights, states, gradients: the rows of one process. Gathered: what lies outside of blocks for the whole of a
             forward and backward; of blocks the present one, the next one and the buffer that it arrives in; in the backward
             the whole gradients of the present block and the buffer that they leave in
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import nn

from qtrain.nn.inventory import gathered_layers
from qtrain.quant import ModelRecipe

from .communication import ParameterGroup
from .optimizer_states import OptimizerBytes, local_elements
from .trace import Piece, StepTrace

GATHERED_BLOCKS = 3  # the present, the next, and what it arrives in
REDUCED_BLOCKS = 1  # the buffer that a block's gradients leave in


@dataclass(frozen=True)
class Sharding:
    """strategy: ``none``, ``ddp`` or ``fsdp2``; processes. weights, largest_block, outer: float32 bytes of all parameters,
    of each block and of those outside of blocks; coded, outer_coded: of these, what a low-bit gather takes as codes; local: of the rows
    of one process. owed: what error feedback keeps
    of low-bit gradients (docs/communication.md)."""

    strategy: str
    processes: int
    weights: int
    local: int
    blocks: tuple[int, ...]
    outer: int
    owed: int = 0
    coded: tuple[int, ...] = ()
    outer_coded: int = 0

    def parameter_groups(self) -> tuple[list[ParameterGroup], ParameterGroup]:
        """Of the blocks, and of all else."""
        blocks = [ParameterGroup(*pair) for pair in zip(self.blocks, self.coded, strict=True)]
        return blocks, ParameterGroup(self.outer, self.outer_coded)

    @property
    def gathered(self) -> int:
        """Of whole parameters alive at once beside the rows."""
        if self.strategy != "fsdp2" or self.processes == 1:
            return 0
        return self.outer + GATHERED_BLOCKS * max(self.blocks, default=0)

    @property
    def reducing(self) -> int:
        if self.strategy != "fsdp2" or self.processes == 1:
            return 0
        return REDUCED_BLOCKS * max(self.blocks, default=0)


def sharding_of(model: nn.Module, recipe: ModelRecipe, strategy: str, processes: int) -> Sharding:
    """model: on the meta device, with ``repeated_blocks``."""
    blocks: list[nn.Module] = list(model.repeated_blocks())  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    coded = {id(parameters[name]) for name in gathered_layers(model, recipe)}

    def nbytes(part: nn.Module, of: Container[int] | None = None) -> int:
        return sum(p.numel() * p.element_size() for p in part.parameters() if of is None or id(p) in of)

    whole, sizes = nbytes(model), tuple(nbytes(block) for block in blocks)
    coded_sizes = tuple(nbytes(block, coded) for block in blocks)
    return Sharding(
        strategy, processes, whole,
        local=sum(local_elements(tuple(p.shape), processes) * p.element_size() for p in model.parameters()),
        blocks=sizes, outer=whole - sum(sizes),
        coded=coded_sizes, outer_coded=nbytes(model, coded) - sum(coded_sizes),
    )  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process. kept: for the backward, by what keeps it. peak: the most at once, and ``phase`` when;
    gradients_at_peak: of those of this step and the last, what is there then. transient: what is none of the other parts."""

    weights: int
    gradients: int
    states: int
    buffers: int
    kept: Mapping[str, int]
    peak: int
    gradients_at_peak: int
    phase: str
    phases: Mapping[str, int]

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @property
    def transient(self) -> int:
        kept = 0 if self.phase == "optimizer" else self.kept_bytes
        return max(0, self.peak - self.weights - self.gradients_at_peak - self.states - self.buffers - kept)


def plan_memory(
    trace: StepTrace, sharding: Sharding, optimizer: OptimizerBytes, *, accumulates: bool, checkpointing: bool
) -> MemoryPlan:
    """accumulates: whether a step has several micro-batches."""
    sharded = sharding.strategy == "fsdp2" and sharding.processes > 1
    weights = sharding.local if sharded else sharding.weights
    gradients = weights
    share = gradients / max(1, sharding.weights)
    buffers = sharding.weights if sharding.strategy == "ddp" and sharding.processes > 1 else sharding.gathered
    buffers += sharding.owed if sharding.processes > 1 else 0
    stays = weights + optimizer.states + buffers
    order = [trace.embed, *(piece for piece, count in trace.blocks for _ in range(count)), trace.head]
    inner = {id(piece) for piece, _ in trace.blocks} if checkpointing else set()

    def kept_of(piece: Piece) -> int:
        return piece.input if id(piece) in inner else piece.kept_bytes

    level = forward = backward = 0
    for piece in order:
        forward = max(forward, level + piece.forward_peak)
        level += kept_of(piece)
    done, then = 0.0, 0
    for piece in reversed(order):
        level -= kept_of(piece)
        whole = piece.backward_peak
        held = gradients if accumulates else share * done
        if (most := int(level + whole + held) + sharding.reducing) > backward:
            backward, then = most, int(held)
        done += piece.gradients
    phases = {
        "forward": stays + gradients + forward,
        "backward": stays + backward,
        "optimizer": stays - (sharding.gathered if sharded else 0) + gradients + optimizer.transient,
    }
    phase = max(phases, key=phases.__getitem__)
    kept = trace.kept()
    if checkpointing:
        blocks = {id(piece): count for piece, count in trace.blocks}
        kept = {"inputs of blocks": sum(count * piece.input for piece, count in trace.blocks)}
        for piece, count in trace.pieces():
            if id(piece) not in blocks:
                for kind, nbytes in piece.kept.items():
                    kept[kind] = kept.get(kind, 0) + count * nbytes
    there = then if phase == "backward" else gradients
    return MemoryPlan(
        weights, gradients, optimizer.states, buffers, kept, phases[phase], there, phase, phases
    )


def grows_linearly(small: StepTrace, large: StepTrace, sequences: int) -> StepTrace:
    """The trace of ``sequences`` from those of one and of two: every number of bytes is a constant plus so much a sequence.
    Operations are those of ``large``."""
    assert 2 * small.tokens == large.tokens, "traces of one and of two sequences"

    def between(a: int, b: int) -> int:
        return a + (sequences - 1) * (b - a)

    def piece(a: Piece, b: Piece) -> Piece:
        kinds = {*a.kept, *b.kept}
        return Piece(
            {kind: between(a.kept.get(kind, 0), b.kept.get(kind, 0)) for kind in sorted(kinds)},
            between(a.forward_peak, b.forward_peak), between(a.backward_peak, b.backward_peak), b.gradients,
            between(a.input, b.input), b.forward, b.backward, b.kept_storages,
        )  # fmt: skip

    blocks = tuple(
        (piece(a, b), count) for (a, count), (b, _) in zip(small.blocks, large.blocks, strict=True)
    )
    return StepTrace(
        piece(small.embed, large.embed), blocks, piece(small.head, large.head), sequences * small.tokens
    )
