"""Which rows of a parameter this process holds, and what has to be asked of the other processes.

    F rows over W processes, c = ceil(F / W):      process r holds rows [min(r c, F), min((r + 1) c, F))

as ``fully_shard`` (FSDP2), ``distribute_tensor`` and ``torch.chunk`` cut dim 0: the last processes may hold fewer
rows or none. All that the optimizer knows of DTensors stands here; its states are plain tensors of these rows.

torch.distributed.tensor takes a second to import, so it is imported only where a DTensor is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class RowShard(NamedTuple):
    """Rows [start, stop) of ``total``; mesh: the 1-D DeviceMesh that they are spread over, None where this process
    holds the whole parameter (one without dimensions too) and asks nobody.

    ``maximum`` and ``gather`` are collectives of the mesh.
    """

    start: int
    stop: int
    total: int
    mesh: Any

    def take(self, t: Tensor) -> Tensor:
        """The rows of this process: a view of t, which has all of them."""
        return t if self.mesh is None else t[self.start : self.stop]

    def maximum(self, t: Tensor) -> Tensor:
        """The elementwise maximum over the shards of t, float32 that is not negative; NaN if one of them is.

        Float32 patterns without the sign are ordered as the numbers are, NaN above infinity: the maximum of the
        patterns, unlike that of floats, is the same in every backend.
        """
        if self.mesh is None:
            return t
        import torch.distributed as dist

        patterns = self._reachable(t.abs().contiguous().view(torch.int32).clone())
        dist.all_reduce(patterns, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return patterns.to(t.device).view(torch.float32)

    def gather(self, t: Tensor) -> Tensor | None:
        """All rows, from the rows t of each process, on the first process of the mesh; None on the others."""
        if self.mesh is None or self.total == 0:
            return t
        import torch.distributed as dist

        world = self.mesh.size()
        chunk = -(-self.total // world)  # all but the last rows fill it, so that only the end is padding
        padded = t.new_zeros(chunk, *t.shape[1:])
        padded[: t.shape[0]] = t
        padded = self._reachable(padded)
        whole = padded.new_empty(world * chunk, *t.shape[1:]) if self.is_first else None
        parts = None if whole is None else list(whole.split(chunk))
        dist.gather(padded, parts, group=self.mesh.get_group(), group_dst=0)
        return None if whole is None else whole[: self.total]

    @property
    def is_first(self) -> bool:
        """Whether this process is where ``gather`` puts the rows together."""
        return self.mesh is None or self.mesh.get_local_rank() == 0

    def _reachable(self, t: Tensor) -> Tensor:
        """t where the mesh communicates: parameters offloaded to the CPU may lie on a mesh of GPUs."""
        return t if t.device.type == self.mesh.device_type else t.to(self.mesh.device_type)


def is_dtensor(t: Any) -> bool:
    return hasattr(t, "placements") and hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """What this process holds of t: the tensor itself, or the plain local tensor of a DTensor, sharing memory."""
    if not is_dtensor(t):
        return t
    with torch.no_grad():
        return t.to_local()  # type: ignore[attr-defined]


def row_shard(name: str, p: Tensor) -> RowShard:
    """The rows of the parameter p that this process holds.

    Raises ValueError, naming the parameter, its placement and the remedy, for any other than Shard(0) and
    Replicate() on a device mesh of one dimension that this process is part of.
    """
    total = p.shape[0] if p.dim() else 1
    if not is_dtensor(p):
        return RowShard(0, total, total, None)
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} lies as {placements} on a device mesh of shape {tuple(mesh.shape)}: AdamW takes one dimension; use "
            "fully_shard(module, mesh=init_device_mesh(device_type, (world_size,)))"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} lies on ranks {mesh.mesh.tolist()}, to which this process does not belong: build the "
            "optimizer there alone"
        )
    (placement,) = placements
    if type(placement) is Replicate:
        return RowShard(0, total, total, None)
    if type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"{name} has the placement {placement!r}: AdamW keeps states of whole rows and takes Shard(0) and "
            "Replicate(); use fully_shard without shard_placement_fn"
        )
    rank, chunk = mesh.get_local_rank(), -(-total // mesh.size())
    start, stop = min(rank * chunk, total), min((rank + 1) * chunk, total)
    held = tuple(local(p).shape)
    if held != (stop - start, *p.shape[1:]):
        raise ValueError(
            f"{name} {tuple(p.shape)} has {held} on rank {rank} of {mesh.size()}, where torch.chunk gives "
            f"{stop - start} rows: distribute it with fully_shard or distribute_tensor"
        )
    return RowShard(start, stop, total, mesh)


def local_gradient(name: str, p: Tensor) -> Tensor:
    """The rows of p's gradient that belong to the local rows of p; raises ValueError where it is placed otherwise."""
    grad = p.grad
    assert grad is not None
    if is_dtensor(p):
        own, found = p.placements, getattr(grad, "placements", "none")  # type: ignore[attr-defined]
        if found != own:
            raise ValueError(
                f"the gradient of {name} has the placements {found}, the parameter {own}: call "
                "grad.redistribute(placements=parameter.placements) before the step"
            )
    return local(grad)


def check_one_mesh(shards: Sequence[tuple[str, RowShard]]) -> None:
    """Raises ValueError where parameters (name, rows) are spread over different processes, so that none could have
    all rows of everything."""
    spread = [(name, shard.mesh.mesh.tolist()) for name, shard in shards if shard.mesh is not None]
    for name, ranks in spread[1:]:
        if ranks != spread[0][1]:
            raise ValueError(
                f"{spread[0][0]} is sharded over ranks {spread[0][1]}, {name} over {ranks}: use one optimizer for each"
            )


def check_shardable(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer of bitsandbytes that holds a DTensor: its kernels read raw memory and fail
    there. bitsandbytes is not imported; a class is known by the module that it, or a base of it, comes from."""
    if all(cls.__module__.split(".")[0] != "bitsandbytes" for cls in type(optimizer).__mro__):
        return
    for group in optimizer.param_groups:
        names = group.get("names") or group.get("param_names")
        for i, p in enumerate(group["params"]):
            if is_dtensor(p):
                raise ValueError(
                    f"{type(optimizer).__name__} of bitsandbytes cannot step "
                    f"{names[i] if names else f'a parameter of shape {tuple(p.shape)}'}, which is a DTensor "
                    f"{tuple(p.placements)}: train with DDP, or with optimizer=adamw m1=dynamic8 m2=dynamic8, whose "
                    "packed states shard"
                )
