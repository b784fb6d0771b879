"""Collectives of data-parallel training: bytes and seconds, per process.

    all-gather, reduce-scatter of S bytes      (N - 1) / N * S sent by each, N - 1 hops (a ring)
    all-reduce                                 twice that (reduce-scatter, then all-gather); 2 log2 N hops (a tree)
    bandwidth                                  the smaller of a GPU's link and of its node's network shared by the node:
                                               rings cross a node's network once, on all its cards together

    ddp        one all-reduce of all gradients a step, in buckets of 25 MB (torch's default)
    fsdp2      a micro-batch: all-gather of every block before its forward and before its backward, reduce-scatter of its gradient,
               all in float32: what a block gathers are the masters

What travels as codes (``LowBits``) counts its bits and scales; encoding it is not counted. In a gather that is the weights of
linear layers, but for those that the recipe excludes and those tied to a table (``ParameterGroup.coded``); in a reduction all matrices, and the few
vectors are counted as if they were. Codes cannot be added on the way, so
gradients in low bits are no ring but an all-to-all of S bytes (and, under ddp, an all-gather back): over a node's network go the rows of
each of its G cards, where a ring crosses it once,

    all-to-all         max((G - 1) / N * S / link, G (N - G) / N * S / network), N - 1 hops

and DDP's hook waits for them: nothing hides behind the backward.

Volumes: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005, section 4.
What reduce-scatter and all-gather cost a sharded step: ZeRO (Rajbhandari et al., 1910.02054, section 7): 1.5 times an all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qtrain.communication.row_format import RowFormat
from qtrain.communication.settings import CommunicationSettings
from qtrain.quant import QuantSpec

from .devices import Device

BUCKET_BYTES = 25 * 2**20  # torch.nn.parallel.DistributedDataParallel's bucket_cap_mb
_COLUMNS = 4096  # of a row whose bytes are counted: its own scale is then a thousandth of float32's bytes


@dataclass(frozen=True)
class LowBits:
    """gather, reduce: bytes that travel, of float32's; reduce None: float32, by torch's own collectives. owed: bytes an
    element of the model that error feedback keeps of a phase of the reduction."""

    gather: float = 1.0
    reduce: float | None = None
    owed: int = 0

    @staticmethod
    def of(settings: CommunicationSettings) -> LowBits:
        reduces = settings.reduce_gradients is not None
        kept = {"float32": 4, "bfloat16": 2, None: 0}[settings.error_feedback]
        return LowBits(
            1.0 if settings.gather_weights is None else _share(settings.gather_weights),
            _share(settings.reduce_gradients) if reduces else None,
            kept if reduces else 0,
        )

    def owed_bytes(self, elements: int, strategy: str, processes: int) -> int:
        """That a process keeps: what it owes of the whole gradient, and under ddp of its rows of the mean."""
        return self.owed * (elements + (elements // processes if strategy == "ddp" else 0))


FLOAT32 = LowBits()


def _share(spec: QuantSpec) -> float:
    """Bytes of codes, scales and zero points of a row, of float32's."""
    return RowFormat(_COLUMNS, spec).row_bytes / (4 * _COLUMNS)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that FSDP2 gathers and reduces together: those of a block, or all outside of blocks. weights: their float32
    bytes; coded: of these, what a low-bit gather takes as codes (``qtrain.nn.inventory.gathered_layers``)."""

    weights: float
    coded: float = 0.0

    def gathered(self, low_bits: LowBits) -> float:
        """Bytes of all processes' rows, as they travel to each of them."""
        return self.weights - self.coded + low_bits.gather * self.coded


@dataclass(frozen=True)
class Cluster:
    """``gpus`` in nodes of ``device.gpus_per_node``."""

    device: Device
    gpus: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.device.gpus_per_node)

    @property
    def gb_per_s(self) -> float:
        """That a GPU sends while all do: GB/s of a ring over all of them."""
        device = self.device
        return device.link_gb_per_s if self.nodes == 1 else min(device.link_gb_per_s, device.node_gb_per_s)

    @property
    def hop_us(self) -> float:
        return self.device.link_us if self.nodes == 1 else self.device.node_us

    def gather_bytes(self, nbytes: float) -> float:
        """Sent, and received, by each process, for ``nbytes`` in all; a reduce-scatter's as well."""
        return nbytes * (self.gpus - 1) / self.gpus

    def gather_seconds(self, nbytes: float) -> float:
        """All-gather or reduce-scatter."""
        hops = (self.gpus - 1) * self.hop_us * 1e-6
        return self.gather_bytes(nbytes) / (self.gb_per_s * 1e9) + hops

    def exchange_seconds(self, nbytes: float) -> float:
        """All-to-all: every process sends each other one its rows of ``nbytes``."""
        device = self.device
        outside = nbytes * max(0, self.gpus - device.gpus_per_node) / self.gpus
        inside = (self.gather_bytes(nbytes) - outside) / device.link_gb_per_s
        across = outside * device.gpus_per_node / device.node_gb_per_s
        return max(inside, across) * 1e-9 + (self.gpus - 1) * self.hop_us * 1e-6

    def reduce_bytes(self, nbytes: float) -> float:
        return 2 * self.gather_bytes(nbytes)

    def reduce_seconds(self, nbytes: float) -> float:
        """All-reduce."""
        hops = 2 * math.ceil(math.log2(self.gpus)) * self.hop_us * 1e-6 if self.gpus > 1 else 0.0
        return self.reduce_bytes(nbytes) / (self.gb_per_s * 1e9) + hops


@dataclass(frozen=True)
class Communication:
    """Of a step and process. sent_bytes; seconds: on the wire; exposed_seconds: in which nothing else happens."""

    sent_bytes: float
    seconds: float
    exposed_seconds: float


NOTHING = Communication(0.0, 0.0, 0.0)


def of_ddp(
    cluster: Cluster,
    gradient_bytes: float,
    backward_seconds: float,
    *,
    overlaps: bool,
    low_bits: LowBits = FLOAT32,
) -> Communication:
    """overlaps: whether gradients arrive one after the other, as in eager code. A model compiled whole gives them all
    at the end. backward_seconds: of the last micro-batch, which is what the buckets can hide behind."""
    if cluster.gpus == 1:
        return NOTHING
    buckets = max(1, math.ceil(gradient_bytes / BUCKET_BYTES))
    if low_bits.reduce is None:
        one = cluster.reduce_seconds(gradient_bytes / buckets)
    else:
        gradient_bytes *= low_bits.reduce
        one = cluster.exchange_seconds(gradient_bytes / buckets)
        one += cluster.gather_seconds(gradient_bytes / buckets)
        overlaps = False
    seconds = buckets * one
    exposed = max(seconds - backward_seconds, one) if overlaps else seconds
    return Communication(cluster.reduce_bytes(gradient_bytes), seconds, exposed)


def of_fsdp2(
    cluster: Cluster,
    blocks: Sequence[ParameterGroup],
    outer: ParameterGroup,
    micro_batches: int,
    forward_seconds: float,
    backward_seconds: float,
    low_bits: LowBits = FLOAT32,
) -> Communication:
    """outer: outside of blocks, and gathered from the forward to the backward. forward_seconds, backward_seconds: of a
    micro-batch's computation, behind which gathering the next block hides; the first gather and the last reduce-scatter of a
    micro-batch hide behind nothing."""
    if cluster.gpus == 1:
        return NOTHING
    gathers = [cluster.gather_seconds(block.gathered(low_bits)) for block in blocks]
    share = 1.0 if low_bits.reduce is None else low_bits.reduce
    scatter_seconds = cluster.gather_seconds if low_bits.reduce is None else cluster.exchange_seconds
    scatters = [scatter_seconds(share * block.weights) for block in blocks]
    outer_gather = cluster.gather_seconds(outer.gathered(low_bits))
    gather = sum(gathers)
    forward = gather + outer_gather
    backward = gather + sum(scatters) + scatter_seconds(share * outer.weights)
    first, last = (gathers[0], scatters[0]) if blocks else (0.0, 0.0)
    exposed = outer_gather + first + max(0.0, gather - first - forward_seconds)
    exposed += last + max(0.0, backward - last - backward_seconds)
    groups = [*blocks, outer]
    gathered = 2 * sum(group.gathered(low_bits) for group in groups) - outer.gathered(low_bits)
    sent = cluster.gather_bytes(gathered + share * sum(group.weights for group in groups))
    return Communication(
        micro_batches * sent,
        micro_batches * (forward + backward),
        micro_batches * min(exposed, forward + backward),
    )
