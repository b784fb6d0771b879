"""A training step of a model of any size, run on fake tensors: no memory, no arithmetic, a second for 70B parameters.

    embed -> block x L -> head and loss           forward
    head and loss -> block x L -> embed           backward

Blocks that are alike (same recipe, same shapes) are run once. What runs is the project's own code, the real model under
the real recipe, so that a new recipe or model needs no word here. Of each piece: its operations, what it keeps for the
backward, by what keeps it, and how much lives at once.

The forward runs under autocast as on a CPU, whose list of bf16 operations is that of a GPU for what is here. On a
GPU RMSNorm is one kernel that keeps its input and a number a row; on a CPU it is made of parts, which keep more (``device_type``).

Differs: fused attention is the CPU's flash kernel, which keeps what those of a GPU keep: q, k, v, the output, and a float32
number a row and head.

B sequences, S tokens each, C width, L blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qtrain.nn.linear import QuantizedLayer
from qtrain.quant import ModelRecipe

from .fake_model import AsOnGpu, fake_mode, meta_model, to_fake
from .kept import KeptFor, id_of
from .operations import Operation, Tracker


@dataclass(frozen=True)
class Piece:
    """A part of the model in one micro-batch. All in bytes.

    kept: for the backward, by what keeps it (``linear``, ``norm``, ``attention``, ``activation``, ``embedding``, ``loss``,
    ``weight copies``, ``other``), its input included where it is kept. forward_peak, backward_peak: the most that lives
    at once of what was made in it, its input and the gradient of its output included. gradients: of its parameters.
    forward, backward: the operations. kept_storages: for ``fused_bytes``. input: bytes of the hidden states that it reads.
    """

    kept: Mapping[str, int]
    forward_peak: int
    backward_peak: int
    gradients: int
    input: int
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    kept_storages: frozenset[int]

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class StepTrace:
    """embed, head: pieces. blocks: (piece, how many are like it), in the model's order of first appearance.
    parameters: elements by dotted name, a tied one once. tokens: B S."""

    embed: Piece
    blocks: tuple[tuple[Piece, int], ...]
    head: Piece
    tokens: int

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        yield self.embed, 1
        yield from self.blocks
        yield self.head, 1

    def kept(self) -> dict[str, int]:
        """For the backward of a micro-batch, by what keeps it."""
        found: Counter[str] = Counter()
        for piece, count in self.pieces():
            for kind, nbytes in piece.kept.items():
                found[kind] += count * nbytes
        return dict(found)


@dataclass(frozen=True)
class Call:
    """How a block was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states among the arguments."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def others(self) -> list[Tensor]:
        """Tensors that all blocks share: rotary angles, masks."""
        return [
            t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t is not self.hidden
        ]

    def with_hidden(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with x in the place of the hidden states."""
        whole = self.hidden
        args, kwargs = tree_map(lambda t: x if t is whole else t, (self.args, self.kwargs))
        return args, kwargs


class _StandIn:
    """In the place of every block: ends what comes before the first one, and begins what comes after the last with a
    leaf. x: what the first was to read. kept, operations, peak, storages: of what came before. base: bytes alive that are not the head's."""

    call: Call | None = None
    x: Tensor
    leaf: Tensor

    def __init__(self, tracker: Tracker, kept: KeptFor) -> None:
        self.tracker, self.watched = tracker, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.call is not None:
            return self.leaf
        self.call = Call(args, kwargs)
        self.x, tracker = self.call.hidden, self.tracker
        self.watched.know(self.x)
        shared = {id_of(t): _nbytes(t) for t in self.call.others()}
        self.kept = dict(self.watched.bytes + Counter({"other": sum(shared.values())}))
        self.storages, self.peak = frozenset(self.watched.storages), tracker.peak
        self.operations = tracker.taken()
        self.watched.forget()
        self.leaf = torch.empty_like(self.x).requires_grad_()
        self.base = tracker.live - _nbytes(self.x)  # the leaf is the head's input
        tracker.restart_peak()
        return self.leaf


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """As training computes it: mean nats a token."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").mean()


class Recorder:
    """Runs pieces of one fake model."""

    def __init__(self, model: Any, dtype: torch.dtype, device_type: str) -> None:
        self.model, self.dtype, self.on_gpu = model, dtype, device_type == "cuda"
        self.blocks: list[nn.Module] = list(model.repeated_blocks())

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.on_gpu:
                with AsOnGpu():
                    yield
            else:
                yield

    @contextmanager
    def _without_blocks(self, stand_in: _StandIn) -> Iterator[None]:
        own = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = stand_in  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward  # type: ignore[method-assign]

    def outer(self, sequences: int, tokens: int) -> tuple[Piece, Piece, Call]:
        """embed, head and how the blocks are called."""
        with Tracker() as tracker:
            kept = KeptFor(self.model, tracker)
            blocks = _StandIn(tracker, kept)
            batch = torch.zeros(sequences, tokens + 1, dtype=torch.int64)
            tracker.restart_peak()
            with self._without_blocks(blocks), kept.watching():
                with self._autocast():
                    logits = self.model(batch[:, :-1])
                loss = token_loss(getattr(logits, "logits", logits), batch[:, 1:])
            del logits
            if blocks.call is None:
                raise ValueError(
                    "the model never called its repeated_blocks(): a plan needs a model whose forward calls them as modules"
                )
            forward, forward_peak = tracker.taken(), tracker.peak - blocks.base
            tracker.restart_peak()
            loss.backward()
            gradients = _gradient_bytes(self.model)
            head = Piece(
                dict(kept.bytes), forward_peak, tracker.peak - blocks.base, gradients, _nbytes(blocks.leaf), forward,
                tracker.taken(), frozenset(kept.storages),
            )  # fmt: skip
            kept.forget()
            before, peak, x = tracker.live, 0, blocks.x
            if x.requires_grad:
                tracker.restart_peak()
                x.backward(torch.empty_like(x))
                peak = tracker.peak - before
            embed = Piece(
                blocks.kept, blocks.peak, peak, _gradient_bytes(self.model) - gradients, 0, blocks.operations, tracker.taken(),
                blocks.storages,
            )  # fmt: skip
        return embed, head, blocks.call

    def block(self, block: nn.Module, call: Call) -> Piece:
        """One block, forward and backward."""
        x = torch.empty_like(call.hidden).requires_grad_()
        args, kwargs = call.with_hidden(x)
        for parameter in self.model.parameters():
            parameter.grad = None
        with Tracker() as tracker:
            kept = KeptFor(self.model, tracker)
            kept.know(call.others())
            with kept.watching(), self._autocast():
                y = block(*args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y
            input_bytes = _nbytes(x)
            forward, forward_peak = tracker.taken(), tracker.peak + input_bytes
            found, storages = dict(kept.bytes), frozenset(kept.storages)
            g = torch.empty_like(y)
            tracker.restart_peak()
            kept.forget()
            y.backward(g)
            backward_peak = tracker.peak + input_bytes - _nbytes(y)
            gradients = _gradient_bytes(self.model)
            return Piece(
                found, forward_peak, backward_peak, gradients, input_bytes, forward, tracker.taken(), storages
            )


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


def signature(block: nn.Module) -> tuple[Any, ...]:
    """Alike for blocks that compute alike."""
    return tuple(
        (name, type(module), tuple((k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items()))
        + ((module.recipe, module.native, module.prologue) if isinstance(module, QuantizedLayer) else ())
        for name, module in block.named_modules()
    )  # fmt: skip


def trace_step(
    config: Any,
    recipe: ModelRecipe,
    *,
    sequences: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    device_type: str = "cuda",
) -> StepTrace:
    """A micro-batch of ``sequences`` x ``tokens`` of the ``ModelConfig`` under ``recipe``; dtype: of autocast, float32 for
    none. Raises as ``apply_recipe`` does, and ValueError for a model that does not call its blocks."""
    model, _ = meta_model(config, recipe)
    with fake_mode():
        to_fake(model)
        recorder = Recorder(model, dtype, device_type)
        embed, head, call = recorder.outer(sequences, tokens)
        pieces: dict[tuple[Any, ...], tuple[Piece, int]] = {}
        for block in recorder.blocks:
            key = signature(block)
            if key in pieces:
                piece, count = pieces[key]
                pieces[key] = (piece, count + 1)
            else:
                pieces[key] = (recorder.block(block, call), 1)
    return StepTrace(embed, tuple(pieces.values()), head, sequences * tokens)
