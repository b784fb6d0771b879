"""The mean of gradients over processes, in low bits, with error feedback.

    x_r  = g_r + e_r                     [R, K] on process r, e_r the residual: what it still owes
    q_r  = Q(x_r)                        sent: its rows of it to each process            (all-to-all)
    e_r <- x_r - q_r
    m    = (1 / W) sum_r q_r             [c, K] float32, added in the order of ranks
    -- under FSDP2 that is all: each process keeps its rows of the gradient. Under DDP the mean goes back:
    y    = m + d                         [c, K] on the process that owns the rows
    p    = Q(y)                          sent to all                                      (all-gather)
    d   <- y - p

Nothing is lost, only late: over T steps

    sum_t p_t  =  sum_t mean_r(g_rt) - (owed_T - owed_0)          owed = mean_r(e_r) + d

so that the mean gradient that was applied differs from the true one by (owed_T - owed_0) / T, and owed is bounded by the
last quantization's error. Without error feedback (``feedback`` None) e and d stay zero and errors add up; stochastic
rounding makes them zero-mean.

Two phases: ZeRO++'s qgZ (arXiv 2306.10209, section 3.3) and 1-bit Adam's compressed all-reduce (arXiv 2102.02888)
quantize, exchange and add up in full precision so. Error feedback: Seide et al. 2014 ("1-bit SGD",
Interspeech), Karimireddy et al. 2019 (arXiv 1901.09847).
Differs from them: a block lies within a row of a parameter, never across parameters, so that neither DDP's buckets
nor the number of processes decide who shares a scale; vectors travel as they are.

Non-finite numbers stay visible: their block decodes to NaN on every process. Their residual is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .exchange import Exchange, Traffic
from .moment import Moment
from .row_format import Piece

PURPOSE = "reduce_gradients"
Rows = Sequence[tuple[Piece, Tensor]]


class Residuals:
    """What was not sent yet, by the name of a parameter: of one phase, on one process. dtype: what it is kept in; None:
    nothing is kept."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.held: dict[str, Tensor] = {}

    def add_to(self, piece: Piece, x: Tensor) -> Tensor:
        """x [n, K] and what is owed of it."""
        owed = self.held.get(piece.name)
        if owed is None or self.dtype is None:
            return x
        return x + owed.to(x.device, torch.float32)

    def keep(self, piece: Piece, x: Tensor, sent: Tensor) -> None:
        """What of x [n, K] was not sent; where that isn't finite, what was owed before."""
        if self.dtype is None or piece.format.spec is None:
            return
        owed = (x - sent).to(self.dtype)
        before = self.held.get(piece.name)
        before = torch.zeros_like(owed) if before is None else before.to(owed)
        self.held[piece.name] = torch.where(torch.isfinite(owed), owed, before)


class GradientReducer:
    """The reduction of one process's gradients. ``owed``: e_r, [W c, K] of every piece; ``owed_mean``: d, [c, K]."""

    def __init__(self, feedback: torch.dtype | None, moment: Moment, traffic: Traffic) -> None:
        self.moment, self.traffic = moment, traffic
        self.owed, self.owed_mean = Residuals(feedback), Residuals(feedback)

    def _encoded(self, rows: Rows, owed: Residuals, what: str, first: Mapping[str, int]) -> list[Tensor]:
        """The bytes of ``rows`` with what is owed of them; what they do not say is owed from now on."""
        encoded = []
        for piece, x in rows:
            if self.moment.live:
                x = owed.add_to(piece, x)
            bits = piece.format.encode(x, self.moment.noise(piece, what, x, first.get(piece.name, 0)))
            encoded.append(bits)
            if self.moment.live:
                owed.keep(piece, x, piece.format.decode(bits))
        return encoded

    def reduce_scatter(self, rows: Rows, group: Any = None) -> list[Tensor]:
        """Of each piece this process's gradient [W c, K] float32, padding rows zero -> the mean over the processes of
        the rows that it owns, [c, K]."""
        exchange, rows = Exchange(self.traffic, group), self._as_it_is(rows)
        what = f"reduce/{self.moment.micro_step}/{exchange.rank}"  # every process draws for itself
        encoded = self._encoded(rows, self.owed, what, {})
        received = exchange.all_to_all(encoded, PURPOSE, sum(x.numel() for _, x in rows))
        means = []
        for (piece, x), parts in zip(rows, received, strict=True):
            decoded = piece.format.decode(parts.flatten(0, 1)).view(exchange.world, -1, piece.columns)
            total = torch.zeros_like(decoded[0])
            for part in decoded:  # in this order everywhere, whatever torch's own sum does
                total += part
            means.append(total / torch.full((), exchange.world, dtype=x.dtype, device=x.device))
        return means

    def all_gather(self, rows: Rows, group: Any = None) -> list[Tensor]:
        """Of each piece the mean [c, K] of the rows that this process owns -> that of all rows, [W c, K], the same bits
        everywhere."""
        exchange, rows = Exchange(self.traffic, group), self._as_it_is(rows)
        first = {piece.name: exchange.rank * len(x) for piece, x in rows}
        encoded = self._encoded(rows, self.owed_mean, f"return/{self.moment.micro_step}", first)
        gathered = exchange.all_gather(encoded, PURPOSE, sum(x.numel() for _, x in rows))
        return [piece.format.decode(bits) for (piece, _), bits in zip(rows, gathered, strict=True)]

    def _as_it_is(self, rows: Rows) -> Rows:
        return rows if self.moment.live else [(piece.exact, x) for piece, x in rows]


def padded_rows(gradient: Tensor, piece: Piece, world: int) -> Tensor:
    """A gradient of any shape -> [W c, K], zeros behind its rows."""
    matrix = gradient.reshape(piece.rows, piece.columns)
    return nn.functional.pad(matrix, (0, 0, 0, world * piece.chunk(world) - piece.rows))


def reduce_bucket(
    reducer: GradientReducer, pieces: Mapping[int, Piece], bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel: the mean of a bucket of gradients. pieces: by the id of the
    parameter. What is sent for a parameter doesn't depend on its bucket, which DDP chooses anew after the first
    step."""
    world = dist.get_world_size()
    of = [pieces[id(parameter)] for parameter in bucket.parameters()]
    gradients = bucket.gradients()
    rows = [(piece, padded_rows(g, piece, world)) for piece, g in zip(of, gradients, strict=True)]
    means = reducer.all_gather(list(zip(of, reducer.reduce_scatter(rows), strict=True)))
    for piece, gradient, mean in zip(of, gradients, means, strict=True):
        gradient.copy_(mean[: piece.rows].view(gradient.shape))
    buffer = bucket.buffer()
    done: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[buffer.device] if buffer.is_cuda else None
    )
    done.set_result(buffer)
    return done


class GradientScatter:
    """FSDP2's reduce-scatter of one module's gradients, ``pieces`` in FSDP's order."""

    def __init__(self, pieces: Sequence[Piece], reducer: GradientReducer) -> None:
        self.pieces, self.reducer = tuple(pieces), reducer

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of FSDP's interface ``Comm``."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """input_tensor [W n] float32: for each process the padded rows of each piece -> output_tensor [n], the mean of
        those of this process. Raises ValueError for a reduction other than the mean, TypeError for another dtype."""
        if op != dist.ReduceOp.AVG:
            raise ValueError(f"trainer.reduce_gradients takes the mean over processes, FSDP asks for {op}")
        if input_tensor.dtype != torch.float32:
            raise TypeError(
                f"trainer.reduce_gradients takes float32 gradients, these are {input_tensor.dtype}; leave it null"
            )
        world = dist.get_world_size(group)
        sizes = [piece.chunk(world) * piece.columns for piece in self.pieces]
        parts = input_tensor.view(world, -1).split(sizes, 1)
        rows = [(p, part.reshape(-1, p.columns)) for p, part in zip(self.pieces, parts, strict=True)]
        means = self.reducer.reduce_scatter(rows, group)
        for place, mean in zip(output_tensor.split(sizes), means, strict=True):
            place.copy_(mean.flatten())
