"""``qtrain bench linear device=cuda``: fprop + dgrad + wgrad of one linear layer, quantization included, in turns.

    floor = 3 * 2 T I O / peak + (bytes of x, W, g read and y, dx, dW written, once each, in bf16) / copy bandwidth

peak: of the measured bf16 GEMM, twice that for operands of 8 bits. Every contender has the same x, W and g, all bf16,
and no autocast. saved: bytes that are alive between forward and backward beside the output: x where it is kept, codes,
copies of W. error: relative distance of y, dx and dW from those of bf16; 0 says that nothing was quantized.

T tokens, I in, O out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .bench_contenders import CONTENDERS, check_arms, reason

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (15872, 4096, 12288),
    (15872, 4096, 4096),
    (15872, 4096, 16384),
    (15872, 16384, 4096),
)
"""T, I, O: qkv, output, up and down projection at a width of 4096."""


class LayerStep:
    """One contender on one shape. Calling it runs forward and backward; gradients are new each time."""

    def __init__(self, name: str, x: Tensor, weight: Tensor, g: Tensor, seed: int) -> None:
        import torch
        from torch import nn

        contender = CONTENDERS[name]
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        self.model = nn.Sequential(linear)
        self.clock = contender.convert(self.model, (), seed)
        self.run = torch.compile(self.model, dynamic=False) if contender.compiled else self.model
        self.x, self.g, self.steps = x, g, 0
        (self.weight,) = self.model.parameters()

    def __call__(self) -> Tensor:
        self.x.grad = self.weight.grad = None
        y: Tensor = self.run(self.x)
        y.backward(self.g)
        return y

    def results(self) -> tuple[Tensor, ...]:
        """y, dx and dW of one call."""
        y = self()
        assert self.x.grad is not None
        assert self.weight.grad is not None
        return y.detach(), self.x.grad, self.weight.grad

    def saved_bytes(self) -> int | None:
        """Alive between forward and backward beside the output; read from CUDA's allocator, so also under a compiler.
        None on another device."""
        import torch

        if not self.x.is_cuda:
            return None
        self.x.grad = self.weight.grad = None
        before = torch.cuda.memory_allocated()
        entered = self.x.clone()  # not a leaf: nothing but what the layer saved keeps it
        y = self.run(entered)
        del entered
        alive = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
        y.backward(self.g)
        self.x.grad = self.weight.grad = None
        return alive


def floor_ms(shape: Shape, bits: int, peak_per_s: float, copy_per_s: float) -> float:
    """peak: operations a second in bf16."""
    T, I, O = shape
    moved = 2 * 2 * (T * I + I * O + T * O)
    return 1e3 * (3 * 2 * T * I * O / (peak_per_s * 16 / bits) + moved / copy_per_s)


def relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """||a - b|| / ||b|| of each pair."""
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)]


def of_shape(
    shape: Shape, arms: Sequence[str], rounds: int, seed: int, device: str = "cuda"
) -> dict[str, Any]:
    """The contenders on one shape: for each its times, saved bytes and errors, or why it did not run."""
    import torch
    from qtrain_kernels.bench import interleaved_ms, roof

    torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(seed)
    T, I, O = shape

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    x, weight, g = drawn(T, I).requires_grad_(), drawn(O, I) * I**-0.5, drawn(T, O)
    y = x.detach() @ weight.t()
    want = (y, g @ weight, g.t() @ x.detach())
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in arms:
        start = time.perf_counter()
        try:
            step = LayerStep(name, x, weight, g, seed)
            errors = relative_errors(step.results(), want)
            found[name] = {"errors": errors, "saved_bytes": step.saved_bytes()}
            steps[name] = step
        except Exception as error:  # whatever another library raises is a row of the table
            found[name] = {"missing": reason(error)}
        seconds = time.perf_counter() - start
        print(f"  {name}: {found[name].get('missing', 'ready')}, {seconds:.1f} s", flush=True)
    roofs = roof(device)
    times = interleaved_ms(steps | {name: function for name, (function, _) in roofs.items()}, device, rounds)
    rates = {name: work / statistics.median(times[name]) * 1e3 for name, (_, work) in roofs.items()}
    for name in steps:
        median = statistics.median(times[name])
        floor = floor_ms(shape, CONTENDERS[name].bits, rates["bf16 peak"], rates["copy"])
        tflops = 6 * T * I * O / median * 1e-9
        found[name] |= {
            "median_ms": median,
            "floor_ms": floor,
            "percent_of_floor": 100 * floor / median,
            "tflop_per_s": tflops,
        }
        found[name]["ms"] = times[name]
    return {"shape": list(shape), "contenders": found, "roof_per_s": rates, "rounds": rounds}


def _ratio(base: Mapping[str, Any] | None, row: Mapping[str, Any], key: str, *, inverse: bool) -> str:
    if base is None or not base.get(key) or row[key] is None:
        return ""
    return f"{base[key] / row[key] if inverse else row[key] / base[key]:.2f}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row a shape and contender, and the sums over all shapes."""
    lines = [
        "| T, I, O | contender | ms | times bf16's speed | floor ms | of floor | TFLOP/s | saved MB | of bf16's | error y, dx, dW |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        shape, found = ", ".join(map(str, result["shape"])), result["contenders"]
        base = found.get("bf16") if "median_ms" in found.get("bf16", {}) else None
        for name, r in found.items():
            if "missing" in r:
                lines.append(f"| {shape} | {name} | missing: {r['missing']} | | | | | | | |")
                continue
            speed = _ratio(base, r, "median_ms", inverse=True)
            saved = _ratio(base, r, "saved_bytes", inverse=False)
            megabytes = "" if r["saved_bytes"] is None else f"{r['saved_bytes'] / 1e6:.1f}"
            errors = ", ".join(f"{e:.4f}" for e in r["errors"])
            lines.append(
                f"| {shape} | {name} | {r['median_ms']:.3f} | {speed} | {r['floor_ms']:.3f} | {r['percent_of_floor']:.0f}% | "
                f"{r['tflop_per_s']:.0f} | {megabytes} | {saved} | {errors} |"
            )
    return "\n".join([*lines, *_sums(results)])


def _sums(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the contenders that ran on every shape."""
    if len(results) < 2:
        return []
    by_name = {
        name: [r["contenders"][name] for r in results]
        for name in results[0]["contenders"]
        if all("median_ms" in r["contenders"][name] for r in results)
    }
    keys = ("median_ms", "floor_ms", "saved_bytes")
    sums = {name: {key: sum(r[key] or 0 for r in rows) for key in keys} for name, rows in by_name.items()}
    base = sums.get("bf16")
    lines = []
    for name, s in sums.items():
        speed, saved = (
            _ratio(base, s, "median_ms", inverse=True),
            _ratio(base, s, "saved_bytes", inverse=False),
        )
        share = f"{s['floor_ms'] / s['median_ms']:.0%}"
        lines.append(
            f"| sum | {name} | {s['median_ms']:.3f} | {speed} | {s['floor_ms']:.3f} | {share} | | {s['saved_bytes'] / 1e6:.1f} | {saved} | |"
        )
    return lines


def check(cfg: Any) -> None:
    """Raises ValueError for what cannot be timed."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device; device=cpu times the CPU")
    check_arms(list(cfg.arms or CONTENDERS))
    if not isinstance(cfg.rounds, int) or cfg.rounds < 5:
        raise ValueError(f"rounds={cfg.rounds!r}: must be an integer of at least 5")
    for shape in cfg.shapes or ():
        if len(shape) != 3 or not all(isinstance(n, int) and n >= 16 and n % 16 == 0 for n in shape):
            raise ValueError(
                f"shapes={list(cfg.shapes)}: each is [T, I, O], multiples of 16, as in shapes=[[8192,4096,4096]]"
            )


def measured(cfg: Any, save: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], str]:
    """What the file holds, and the table; ``save`` is called after each shape, so that a run that is stopped leaves
    what it has."""
    import torch

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(CONTENDERS))  # one code, many layers
    results: list[dict[str, Any]] = []
    shapes = SHAPES if cfg.shapes is None else [tuple(shape) for shape in cfg.shapes]
    for shape in shapes:
        print(f"T, I, O = {', '.join(map(str, shape))}", flush=True)
        results.append(of_shape(shape, list(cfg.arms or CONTENDERS), cfg.rounds, cfg.seed))
        save({"shapes": results})
    rates = results[-1]["roof_per_s"]
    roof_line = f"measured in this run: bf16 GEMM {rates['bf16 peak'] * 1e-12:.0f} TFLOP/s, copy {rates['copy'] * 1e-9:.0f} GB/s"
    return {"shapes": results}, f"{table(results)}\n{roof_line}"
