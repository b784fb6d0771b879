"""LowBitCommunication: the low-bit collectives of a run, attached to its model, counted and saved.

    communication = LowBitCommunication(settings, seed=0, gathered={"blocks.0.mlp.up.weight", ...})
    communication.attach_fsdp2(model)            after fully_shard, or
    communication.attach_ddp(ddp, model)         on DistributedDataParallel(model)
    communication.begin(step, micro_step)        before each forward

A checkpoint is that of one process, but for what each process owes: that is as large as the model on every process, and
all of it is saved, so that a run of as many processes goes on bit for bit:

    owed        {name: [W, *shape]}      e_r of every process
    owed_mean   {name: shape}            d, under DDP

Other processes, or another strategy, go on with owed = mean_r(e_r) + d on each: the same sum, so that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .exchange import Traffic
from .gather import WeightGather
from .moment import Moment
from .reduce import GradientReducer, GradientScatter, Residuals, padded_rows, reduce_bucket
from .row_format import Piece
from .settings import CommunicationSettings


def fsdp2_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The parameters that FSDP2 gathers and reduces together for ``module``, in its order, which nothing public says."""
    state: Any = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [held.sharded_param for group in groups for held in group.fsdp_params]


class LowBitCommunication:
    """settings: at least one of the two is active. seed: of the random bits. gathered: names of the parameters whose
    all-gather is in low bits (weights of linear layers); all others travel as they are.

    ``traffic`` counts the bytes of the step that ``begin`` began.
    """

    def __init__(self, settings: CommunicationSettings, *, seed: int, gathered: Collection[str] = ()) -> None:
        self.settings, self.gathered = settings, frozenset(gathered)
        self.traffic, self.moment = Traffic(), Moment(seed)
        feedback = settings.error_feedback
        dtype = None if feedback is None else getattr(torch, feedback)
        self.reducer = GradientReducer(dtype, self.moment, self.traffic)
        self._pieces: dict[str, Piece] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._returns = False  # whether means are sent back: DDP

    @property
    def remembers(self) -> bool:
        """Whether errors of the reduction are fed back: what is owed is then a state."""
        return self.settings.reduce_gradients is not None and self.settings.error_feedback is not None

    def begin(self, step: int, micro_step: int) -> None:
        """Before each forward of training; ``step`` and ``micro_step`` count from 0."""
        if micro_step == 0:
            self.traffic.start()
        self.moment.begin(step, micro_step)

    def attach_fsdp2(self, model: nn.Module) -> None:
        """To every part of ``model`` that ``fully_shard`` was called on."""
        names = {id(p): name for name, p in model.named_parameters()}
        for part in model.modules():
            if not isinstance(part, FSDPModule):
                continue
            parameters = [(names[id(p)], p) for p in fsdp2_parameters(part)]
            if self.settings.gather_weights is not None:
                pieces = [self._gather_piece(name, p.shape) for name, p in parameters]
                part.set_custom_all_gather(WeightGather(part, pieces, self.moment, self.traffic))  # type: ignore[arg-type]
            if self.settings.reduce_gradients is not None:
                pieces = self._reduce_pieces(parameters)
                part.set_custom_reduce_scatter(GradientScatter(pieces, self.reducer))  # type: ignore[arg-type]

    def attach_ddp(self, ddp: DistributedDataParallel, model: nn.Module) -> None:
        """To ``ddp``, which wraps ``model`` or something around it."""
        named = list(model.named_parameters())
        pieces = self._reduce_pieces(named)
        by_id = {id(p): piece for (_, p), piece in zip(_trained(named), pieces, strict=True)}
        self._returns = True
        # Without annotations: DDP compares them with classes, and here they would be strings
        ddp.register_comm_hook(self.reducer, lambda reducer, bucket: reduce_bucket(reducer, by_id, bucket))

    def _gather_piece(self, name: str, shape: torch.Size) -> Piece:
        return Piece.of(name, shape, self.settings.gather_weights if name in self.gathered else None)

    def _reduce_pieces(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[Piece]:
        found = []
        for name, parameter in _trained(named):
            piece = Piece.of(name, parameter.shape, self.settings.reduce_gradients)
            self._pieces[name], self._shapes[name] = piece, parameter.shape
            found.append(piece)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What is owed, whole and on the CPU, on rank 0; empty on the others and where nothing is owed. All ranks call
        it; a tensor at a time is gathered."""
        reducer, world, rank = self.reducer, dist.get_world_size(), dist.get_rank()
        owed, owed_mean = {}, {}
        for name, piece in self._pieces.items():
            if name not in reducer.owed.held:
                continue
            shape = self._shapes[name]
            parts = _to_first(reducer.owed.held[name])
            if rank == 0:
                owed[name] = torch.stack([part[: piece.rows].reshape(shape) for part in parts])
            if self._returns:
                parts = _to_first(reducer.owed_mean.held[name])
                if rank == 0:
                    owed_mean[name] = torch.cat(parts)[: piece.rows].reshape(shape)
        if rank != 0 or not owed:
            return {}
        return {"processes": world, "returns": self._returns, "owed": owed, "owed_mean": owed_mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave on rank 0, which every rank has read. Raises ValueError where it is of another
        model, or where nothing is remembered here."""
        reducer, world, rank = self.reducer, dist.get_world_size(), dist.get_rank()
        reducer.owed.held, reducer.owed_mean.held = {}, {}
        if not state:
            return
        if not self.remembers:
            raise ValueError(
                "gradients are owed, and without reduce_gradients and error_feedback nobody pays them"
            )
        same = state["processes"] == world and state["returns"] == self._returns
        for name, held in state["owed"].items():
            piece = self._pieces.get(name)
            if piece is None or held.shape[1:] != self._shapes[name]:
                raise ValueError(
                    f"the checkpoint owes gradients of {name} {tuple(held.shape[1:])}, which this model does not have"
                )
            mean = state["owed_mean"].get(name, torch.zeros_like(held[0]))
            if same:
                owed = held[rank]
            else:
                owed, mean = held.float().mean(0) + mean.float(), torch.zeros_like(mean)
            self._hold(reducer.owed, name, padded_rows(owed, piece, world))
            if self._returns:
                self._hold(reducer.owed_mean, name, padded_rows(mean, piece, world).chunk(world)[rank])

    @staticmethod
    def _hold(residuals: Residuals, name: str, rows: Tensor) -> None:
        residuals.held[name] = rows.to(residuals.dtype, copy=True)

    def summary(self) -> dict[str, Any]:
        """Of the last step, for the final table: the specs, and bytes that left a process."""
        settings = self.settings
        return {
            "gather_weights": None if settings.gather_weights is None else str(settings.gather_weights),
            "gathered": len(self.gathered),
            "reduce_gradients": None if settings.reduce_gradients is None else str(settings.reduce_gradients),
            "error_feedback": settings.error_feedback,
            "bytes": {purpose: list(pair) for purpose, pair in self.traffic.bytes.items()},
        }


def _trained(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in named if p.requires_grad]


def _to_first(t: Tensor) -> list[Tensor]:
    """t of every process, in their order and on the CPU, on rank 0; nothing on the others."""
    t = t.contiguous()
    if dist.get_backend() == "nccl":
        t = t.cuda()
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(t, parts, dst=0)
    return [] if parts is None else [part.cpu() for part in parts]
