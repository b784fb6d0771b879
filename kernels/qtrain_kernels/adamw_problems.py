"""What ``adamw_step`` is checked and timed on: inputs of the op, and the rivals' optimizers on the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtrain_kernels.code_table import code_table
from qtrain_kernels.op import Workload

Inputs = tuple[Any, ...]
HYPER = {"beta1": 0.9, "beta2": 0.95, "lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}
WHOLE_ROW = 1 << 30
STEP = 3  # the inverse of its root, rounded from float64, is not that of the float32 root

# -- formats: name -> what codes mean, as qtrain.quant would hand it over ------------------------------------------


def _codebook(name: str) -> Tensor:
    """Cubes of a uniform grid: as fine around zero as the dynamic maps of 8-bit optimizers, sorted, the last one 1."""
    if name == "linear4_nozero":
        return (torch.arange(16) + 1) / 16
    first, last = {"cubic8": (-127, 128), "cubic8_unsigned": (0, 255), "cubic4": (-7, 8)}[name]
    return (torch.arange(first, last + 1) / last) ** 3


def _nearest(name: str) -> Callable[[Tensor], Tensor]:
    if name == "e4m3":
        return lambda v: v.nan_to_num(nan=0.0).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    levels = _codebook(name)
    return lambda v: torch.bucketize(v.nan_to_num(nan=0.0), (levels[1:] + levels[:-1]) / 2)


@cache
def tables(name: str) -> tuple[Tensor | None, Tensor | None, float]:
    """(levels, encoder, top) on the CPU; float32 has none."""
    if name == "float32":
        return None, None, 1.0
    if name == "e4m3":
        return (
            torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
            code_table(_nearest(name)),
            448.0,
        )
    return _codebook(name), code_table(_nearest(name)), 1.0


def numbers(step: int, **changes: float) -> tuple[float, float, float, float, float, float]:
    """(decay, beta1, beta2, step_size, root, eps) of the step, as ``reference`` takes them."""
    h = HYPER | changes
    root = (1 - h["beta2"] ** step) ** 0.5
    return (
        1 - h["lr"] * h["weight_decay"],
        h["beta1"],
        h["beta2"],
        h["lr"] / (1 - h["beta1"] ** step),
        root,
        h["eps"],
    )


def _moment(
    name: str, shapes: Sequence[tuple[int, ...]], block: int, first: bool, seed: int, device: str
) -> tuple[Any, ...]:
    """(states, scales, levels, encoder, top) with random numbers, or zeros before the first step."""
    levels, encoder, top = tables(name)
    states, scales = [], []
    generator = torch.Generator(device).manual_seed(seed)
    for shape in shapes:
        if levels is None:
            x = torch.zeros(shape, device=device)
            states.append(x if first else x.normal_(generator=generator).mul_(0.1).square_())
            continue
        F, K = shape[0], torch.Size(shape).numel() // shape[0]
        width = K if levels.numel() == 256 else -(-K // 2)
        codes = torch.randint(
            0, 126 if name == "e4m3" else 256, (F, width), generator=generator, device=device
        )
        if levels.numel() == 16 and K % 2:
            codes[:, -1] &= 15  # the padding of a row is zero
        scale = torch.rand((F, -(-K // block)), generator=generator, device=device) * (0.1 / top)
        zero = int((levels.nan_to_num(nan=1e9).abs()).argmin()) * (17 if levels.numel() == 16 else 1)
        states.append((torch.full_like(codes, zero) if first else codes).to(torch.uint8))
        scales.append(torch.full_like(scale, 2.0**-100) if first else scale)
    held = (None, None) if levels is None or encoder is None else (levels.to(device), encoder.to(device))
    return states, scales, *held, top


def problem(
    shapes: Sequence[tuple[int, ...]],
    m: str = "cubic8",
    v: str = "cubic8_unsigned",
    *,
    block: int = 256,
    weights: torch.dtype = torch.float32,
    gradients: torch.dtype = torch.float32,
    step: int = STEP,
    change: Callable[[list[Tensor]], None] | None = None,
    device: str = "cpu",
    **hyper: float,
) -> Inputs:
    """Inputs of the op. change: edits the gradients in place. step 1 has states of zero."""
    generator = torch.Generator(device).manual_seed(len(shapes))

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    w = [normal(shape).to(weights) for shape in shapes]
    g = [(normal(shape) * 10 ** normal(shape)).to(gradients) for shape in shapes]
    if change is not None:
        change(g)
    first = step == 1
    states = (*_moment(m, shapes, block, first, 1, device), *_moment(v, shapes, block, first, 2, device))
    return w, g, *states, block, *numbers(step, **hyper)


# -- cases ---------------------------------------------------------------------------------------------------------

# Full and short blocks, rows shorter than a block, odd columns, more dimensions, rows over several programs
ODD = ((3, 256), (1, 513), (2, 33), (1, 1), (2, 3, 50), (9, 64), (3, 2))
ALIGNED = ((3, 768), (1, 2064), (5, 16))
FLAT = ((), (5,), (3, 7), (0,), (3, 0), (2049,), (10, 256))


def _poison(gradients: list[Tensor]) -> None:
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        gradients[i].view(-1)[-1 - i] = value


def _edges(gradients: list[Tensor]) -> None:
    gradients[0].zero_()  # a zero block
    gradients[1].mul_(1e-38)  # squares vanish, first moments are subnormal
    gradients[2].mul_(1e18)  # squares overflow
    gradients[3].fill_(-0.0)
    gradients[4].view(-1)[0] = 1e10  # one outlier takes the range of its block


def _ties(gradients: list[Tensor]) -> None:
    """With beta1 = 0 the first moment is the gradient; here it lies on the midpoints, and its scale is 1."""
    levels = _codebook("cubic8")
    gradients[0][:] = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.ones(1)])


def cases() -> dict[str, Callable[[], Inputs]]:
    bf16 = torch.bfloat16
    eight, four, fp8 = ("cubic8", "cubic8_unsigned"), ("cubic4", "linear4_nozero"), ("e4m3", "e4m3")
    return {
        "8 bit": lambda: problem(ODD, *eight),
        "8 bit, aligned": lambda: problem(ALIGNED, *eight),
        "8 bit, aligned, bf16": lambda: problem(ALIGNED, *eight, weights=bf16, gradients=bf16),
        "8 bit, block 64, bf16 gradients": lambda: problem(ODD, *eight, block=64, gradients=bf16),
        "8 bit, first step": lambda: problem(ODD, *eight, step=1),
        "8 bit, not finite": lambda: problem(ODD, *eight, change=_poison),
        "8 bit, edges": lambda: problem(ODD, *eight, change=_edges),
        "8 bit, no decay, beta1 0": lambda: problem(ODD, *eight, weight_decay=0.0, beta1=0.0),
        "8 bit, beta1 .3, beta2 0, eps 0": lambda: problem(ODD, *eight, beta1=0.3, beta2=0.0, eps=0.0),
        "8 bit, ties": lambda: problem(ODD[:1], *eight, change=_ties, beta1=0.0),
        "8 bit, rows": lambda: problem(ODD, *eight, block=WHOLE_ROW),
        "4 bit": lambda: problem(ODD, *four, block=128),
        "4 bit, aligned, bf16": lambda: problem(ALIGNED, *four, block=128, weights=bf16, gradients=bf16),
        "4 bit, first step": lambda: problem(ODD, *four, step=1),
        "4 bit, not finite": lambda: problem(ODD, *four, change=_poison),
        "4 bit, edges": lambda: problem(ODD, *four, change=_edges),
        "e4m3": lambda: problem(ODD, *fp8, weights=bf16),
        "e4m3, aligned": lambda: problem(ALIGNED, *fp8, block=128),
        "e4m3, not finite": lambda: problem(ODD, *fp8, change=_poison),
        "4 bit and 8 bit": lambda: problem(ALIGNED, "cubic4", "cubic8_unsigned", gradients=bf16),
        "8 bit and float32": lambda: problem(ODD, "cubic8", "float32"),
        "float32 and 4 bit": lambda: problem(ALIGNED, "float32", "linear4_nozero"),
        "float32": lambda: problem(FLAT, "float32", "float32"),
        "float32, bf16 weights, first step": lambda: problem(FLAT, "float32", "float32", weights=bf16, step=1),
    }  # fmt: skip


# -- workloads -----------------------------------------------------------------------------------------------------

# The matrices of GPT-2 (124M): embeddings, then a layer's q/k/v, projection and two of the MLP
GPT2_124M = ((50304, 768), (1024, 768), *(12 * ((2304, 768), (768, 768), (3072, 768), (768, 3072))))
WIDE = 30 * ((4096, 2184),)  # 2^28 elements within 0.03%, in 30 tensors of a width that is no multiple of 256


def _rival(make: Callable[[list[Any]], Any]) -> Callable[[Inputs], Callable[[], Any]]:
    """An optimizer's step over copies of the same weights and gradients."""

    def start(inputs: Inputs) -> Callable[[], Any]:
        parameters = [torch.nn.Parameter(w.clone()) for w in inputs[0]]
        for p, g in zip(parameters, inputs[1], strict=True):
            p.grad = g.to(p.dtype, copy=True)
        return make(parameters).step

    return start


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes.optim


def _torchao() -> Any:
    import torchao.optim

    return torchao.optim


def rivals(device: str) -> dict[str, Callable[[Inputs], Callable[[], Any]]]:
    """AdamW of torch (float32 states for float32 weights), bitsandbytes and torchao, where they are installed."""
    options: dict[str, Any] = {
        "lr": HYPER["lr"],
        "betas": (HYPER["beta1"], HYPER["beta2"]),
        "weight_decay": HYPER["weight_decay"],
    }
    found = {"torch fused": _rival(lambda ps: torch.optim.AdamW(ps, **options, fused=True))}
    if device == "cuda" and importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes 8 bit"] = _rival(lambda ps: _bitsandbytes().AdamW8bit(ps, **options))
    if device == "cuda" and importlib.util.find_spec("torchao"):

        def torchao(name: str) -> Callable[[list[Any]], Any]:
            return lambda ps: getattr(_torchao(), name)(ps, **options)

        found |= {f"torchao {name}": _rival(torchao(name)) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")}
    return found


def workloads(device: str) -> Sequence[Workload]:
    lists = {"GPT-2 124M": GPT2_124M, "2^28 in 30": WIDE} if device == "cuda" else {"768x768": ((768, 768),)}
    formats = {  # 8 bit last: of a few workloads, a benchmark of all ops takes the last
        "float32": ("float32", "float32", 256),
        "e4m3": ("e4m3", "e4m3", 256),
        "4 bit": ("cubic4", "linear4_nozero", 128),
        "8 bit": ("cubic8", "cubic8_unsigned", 256),
    }

    def workload(name: str, dtype: torch.dtype) -> list[Workload]:
        shapes = lists[name]

        def inputs(fmt: str, on: str) -> Inputs:
            m, v, block = formats[fmt]
            return problem(shapes, m, v, block=block, weights=dtype, gradients=dtype, step=100, device=on)

        def of(fmt: str) -> Workload:
            block = formats[fmt][2]
            bits = {"8 bit": 8, "e4m3": 8, "4 bit": 4, "float32": 32}[fmt]
            elements = sum(F * K for F, K in shapes)
            scales = 0 if bits == 32 else sum(F * -(-K // block) for F, K in shapes)
            read = elements * 2 * dtype.itemsize + 2 * (elements * bits // 8 + 4 * scales)
            written = elements * dtype.itemsize + 2 * (elements * bits // 8 + 4 * scales)
            kind = "fp32" if dtype == torch.float32 else "bf16"
            others = rivals(device) if fmt == "8 bit" else {}
            return Workload(
                f"{name}/{kind}/{fmt}", lambda on: inputs(fmt, on), bytes=read + written, rivals=others
            )

        return [of(fmt) for fmt in formats]

    return [w for name in lists for dtype in (torch.float32, torch.bfloat16) for w in workload(name, dtype)]
