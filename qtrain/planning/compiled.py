"""What a compiled block keeps for the backward: the compiler itself says, on fake tensors.

``torch.compile`` chooses what to keep and what to compute again when it cuts the joint graph in two (the min-cut partitioner), before
any code is made. So each block is compiled with a backend that makes none (``aot_eager``), at a batch whose size divides no width: a tensor whose
size the batch divides grows with the tokens, the others (codes and copies of weights) do not.

Training compiles the whole model, in which a block's output may be kept by the next; here each block is compiled alone, as FSDP2
has it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.nn.linear import QuantizedLayer
from qtrain.quant import ModelRecipe

from .fake_model import fake_mode, meta_model, to_fake
from .kept import id_of
from .trace import Piece, Recorder, StepTrace, signature

_BATCHES = (23, 29, 31, 37, 41)
_MOST_TOKENS = 1024  # of a sequence: what is kept is linear in tokens, and native int8 takes 131,071 in all
KEPT = "compiled blocks"


@dataclass(frozen=True)
class CompiledBlock:
    """Bytes kept: fixed, and a token."""

    fixed: int
    per_token: float

    def at(self, tokens: int) -> int:
        return self.fixed + round(self.per_token * tokens)


def _batch(model: nn.Module) -> int:
    """A prime that divides no dimension of a weight. Raises ValueError where each divides one."""
    sizes = {size for p in model.parameters() for size in p.shape}
    for prime in _BATCHES:
        if all(size % prime for size in sizes):
            return prime
    raise ValueError(f"widths {sorted(sizes)}: each of {_BATCHES} divides one; pass trace_compiled=false")


def _kept(
    block: nn.Module, args: Any, kwargs: Any, known: set[int], dtype: torch.dtype
) -> list[tuple[int, int]]:
    """(bytes, elements) of each storage that the compiled block keeps."""
    found: dict[int, tuple[int, int]] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if id_of(tensor) not in known:
            nbytes = tensor.untyped_storage().nbytes()
            found[id_of(tensor)] = (nbytes, nbytes // tensor.element_size())
        return tensor

    block.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
        block(*args, **kwargs)
    return list(found.values())


def _as_compiled(model: nn.Module) -> None:
    """What a compiler has otherwise."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.shared = None  # a compiler merges what siblings share by itself
        elif "atten" in type(module).__name__.lower() and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]  # the CPU's fused kernel has none; a GPU's keeps a seed


def compiled_blocks(
    config: Any, recipe: ModelRecipe, *, tokens: int, dtype: torch.dtype
) -> list[CompiledBlock]:
    """Of each kind of block, in the order of ``StepTrace.blocks``. tokens: of a sequence. Seconds a kind. Raises as ``trace_step``
    does."""
    model, _ = meta_model(config, recipe)
    sequences = _batch(model)
    tokens = min(tokens, _MOST_TOKENS)
    found: dict[Any, CompiledBlock] = {}
    torch.compiler.reset()
    try:
        with fake_mode():
            to_fake(model)
            _as_compiled(model)
            recorder = Recorder(model, dtype, "cpu")
            _, _, call = recorder.outer(sequences, tokens)
            known = {id_of(t) for t in (*model.parameters(), *model.buffers(), *call.others())}
            for block in recorder.blocks:
                if (key := signature(block)) in found:
                    continue
                args, kwargs = call.with_hidden(torch.empty_like(call.hidden).requires_grad_())
                kept = _kept(block, args, kwargs, known, dtype)
                growing = sum(nbytes for nbytes, elements in kept if elements % sequences == 0)
                fixed = sum(nbytes for nbytes, elements in kept if elements % sequences)
                found[key] = CompiledBlock(fixed, growing / (sequences * tokens))
    finally:
        torch.compiler.reset()
    return list(found.values())


def with_compiled(trace: StepTrace, blocks: list[CompiledBlock]) -> StepTrace:
    """``trace`` with blocks that keep what the compiled ones do; at their peaks the rest is as it was."""

    def changed(piece: Piece, block: CompiledBlock) -> Piece:
        kept = block.at(trace.tokens)
        less = piece.kept_bytes - kept
        return dataclasses.replace(
            piece,
            kept={KEPT: kept - block.fixed, "weight copies": block.fixed},
            forward_peak=max(kept, piece.forward_peak - less),
            backward_peak=max(kept, piece.backward_peak - less),
        )

    pieces = tuple(
        (changed(piece, block), count) for (piece, count), block in zip(trace.blocks, blocks, strict=True)
    )
    return dataclasses.replace(trace, blocks=pieces)
