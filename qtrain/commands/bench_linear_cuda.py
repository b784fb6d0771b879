"""``qtrain bench linear device=cuda``: fprop + dgrad + wgrad of one linear layer, quantization included, in turns.

    floor = 3 * 2 T I O / peak + (bytes of x, W, g read and y, dx, dW written, once each, in bf16) / copy bandwidth

peak: of the best bf16 GEMM measured beside it, twice that for operands of 8 bits. Every contender has the same x, W and g,
all bf16, and no autocast. "In a graph": the same kernels replayed by a CUDA graph, where Python costs nothing; the share of
the floor is that one's. saved: bytes that autograd keeps between forward and backward, the weight aside. error: relative
distance of y, dx and dW from those of bf16; 0 says that nothing was quantized.

profile=true: after the times, the kernels of a step by name (``bench_profile``).

T tokens, I in, O out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import bench_profile
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
        self.x, self.g = x, g
        (self.weight,) = self.model.parameters()

    def __call__(self) -> tuple[Tensor, ...]:
        """y, dx and dW."""
        import torch

        y: Tensor = self.run(self.x)
        return (y.detach(), *torch.autograd.grad(y, (self.x, self.weight), self.g))

    def graph(self) -> Callable[[], None]:
        """The same kernels in a CUDA graph: what the GPU takes, without Python in between. Raises what the capture
        raises."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(
                2
            ):  # as torch's documentation has it: libraries make their workspaces for the stream
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay  # type: ignore[no-any-return]

    def saved_bytes(self) -> int:
        """What autograd keeps between forward and backward, without the weight."""
        from qtrain.nn.saved_tensors import saved_bytes

        return saved_bytes(lambda: self.run(self.x), self.model.parameters())


def floor_ms(shape: Shape, bits: int, peak_per_s: float, copy_per_s: float) -> float:
    """peak: operations a second in bf16."""
    T, I, O = shape
    moved = 2 * 2 * (T * I + I * O + T * O)
    return 1e3 * (3 * 2 * T * I * O / (peak_per_s * 16 / bits) + moved / copy_per_s)


def relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """||a - b|| / ||b|| of each pair."""
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True)]


def of_shape(
    shape: Shape, arms: Sequence[str], rounds: int, seed: int, device: str = "cuda", *, profile: bool = False
) -> dict[str, Any]:
    """The contenders on one shape: for each its times, saved bytes and errors, or why it did not run. profile: then
    also its kernels, ``profile`` or the reason in ``no_profile``."""
    import torch
    from qtrain_kernels.bench import interleaved_ms, rates, roof

    torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(seed)
    T, I, O = shape

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    x, weight, g = drawn(T, I).requires_grad_(), drawn(O, I) * I**-0.5, drawn(T, O)
    want = (x.detach() @ weight.t(), g @ weight, g.t() @ x.detach())
    timed: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in arms:
        start = time.perf_counter()
        try:
            step = LayerStep(name, x, weight, g, seed)
            found[name] = {"errors": relative_errors(step(), want), "saved_bytes": step.saved_bytes()}
            timed[name] = step
        except Exception as error:  # whatever another library raises is a row of the table
            found[name] = {"missing": reason(error)}
        seconds = time.perf_counter() - start
        print(f"  {name}: {found[name].get('missing', 'ready')}, {seconds:.1f} s", flush=True)
    del want
    graphs = _graphs(timed, found) if device == "cuda" else {}
    roofs = roof(device, [(T, O, I)])
    functions = timed | graphs | {name: function for name, (function, _) in roofs.items()}
    times = interleaved_ms(functions, device, rounds)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    reached = rates({name: work for name, (_, work) in roofs.items()}, medians)
    for name in timed:
        graph = f"{name} graph"
        best = medians.get(graph, medians[name])
        floor = floor_ms(shape, CONTENDERS[name].bits, reached["bf16 peak"], reached["copy"])
        found[name] |= {"median_ms": medians[name], "graph_ms": medians.get(graph), "floor_ms": floor}
        found[name] |= {"percent_of_floor": 100 * floor / best, "tflop_per_s": 6 * T * I * O / best * 1e-9}
        found[name] |= {"ms": times[name], "ms_in_graph": times.get(graph)}
    if profile:
        _profile(timed, found, device)
    return {"shape": list(shape), "contenders": found, "roof_per_s": reached, "rounds": rounds}


def _profile(
    steps: Mapping[str, Callable[[], Any]], found: Mapping[str, dict[str, Any]], device: str
) -> None:
    """After the timing, which a profiler would slow down."""
    for name, step in steps.items():
        try:
            found[name]["profile"] = bench_profile.profiled(step, device)
        except Exception as error:
            found[name]["no_profile"] = reason(error)


def profiles(results: Sequence[Mapping[str, Any]]) -> str:
    """The kernels of each shape and contender, after an empty line each; empty where nothing was profiled."""
    parts = []
    for result in results:
        for name, r in result["contenders"].items():
            title = f"{', '.join(map(str, result['shape']))}, {name}"
            if "profile" in r:
                parts.append(bench_profile.text(title, r["profile"]))
            elif "no_profile" in r:
                parts.append(f"{title}: no profile: {r['no_profile']}")
    return "".join(f"\n\n{part}" for part in parts)


def _graphs(
    steps: Mapping[str, Callable[[], Any]], found: Mapping[str, dict[str, Any]]
) -> dict[str, Callable[[], Any]]:
    """ "NAME graph" -> its replay, of those that can be captured; of others ``found`` says why not."""
    graphs: dict[str, Callable[[], Any]] = {}
    for name, step in steps.items():
        assert isinstance(step, LayerStep)
        try:
            graphs[f"{name} graph"] = step.graph()
        except Exception as error:
            found[name]["no_graph"] = reason(error)
            print(f"  {name}: no graph: {reason(error)}", flush=True)
    return graphs


def _ratio(base: Mapping[str, Any], row: Mapping[str, Any], key: str, *, inverse: bool) -> str:
    """bf16's over this one's, or the other way round; empty where one of them is not there."""
    if not base.get(key) or not row.get(key):
        return ""
    return f"{base[key] / row[key] if inverse else row[key] / base[key]:.2f}"


def _cells(base: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    """The columns that a layer and the sum of layers have."""
    best = r["graph_ms"] or r["median_ms"]
    graph = r.get("no_graph") or ("" if r["graph_ms"] is None else f"{r['graph_ms']:.3f}")
    times = f"{r['median_ms']:.3f} | {_ratio(base, r, 'median_ms', inverse=True)} | {graph} | {_ratio(base, r, 'graph_ms', inverse=True)}"
    floor = f"{r['floor_ms']:.3f} | {r['floor_ms'] / best:.0%}"
    return (
        f"{times} | {floor} | {r['saved_bytes'] / 1e6:.1f} | {_ratio(base, r, 'saved_bytes', inverse=False)}"
    )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row a shape and contender, and the sums over all shapes."""
    lines = [
        "| T, I, O | contender | ms | times bf16's speed | ms in a graph | times bf16's | floor ms | of floor | saved MB | of bf16's | TFLOP/s | error y, dx, dW |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        shape, found = ", ".join(map(str, result["shape"])), result["contenders"]
        for name, r in found.items():
            if "missing" in r:
                lines.append(f"| {shape} | {name} | missing: {r['missing']} | | | | | | | | | |")
                continue
            errors = ", ".join(f"{e:.4f}" for e in r["errors"])
            cells = _cells(found.get("bf16", {}), r)
            lines.append(f"| {shape} | {name} | {cells} | {r['tflop_per_s']:.0f} | {errors} |")
    return "\n".join([*lines, *_sums(results)])


def _sums(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of the contenders that ran on every shape."""
    if len(results) < 2:
        return []
    names = [
        n for n in results[0]["contenders"] if all("median_ms" in r["contenders"].get(n, {}) for r in results)
    ]
    sums: dict[str, dict[str, Any]] = {}
    for name in names:
        rows = [r["contenders"][name] for r in results]
        sums[name] = {key: sum(r[key] for r in rows) for key in ("median_ms", "floor_ms", "saved_bytes")}
        captured = all(r["graph_ms"] is not None for r in rows)
        sums[name]["graph_ms"] = sum(r["graph_ms"] for r in rows) if captured else None
    base = sums.get("bf16", {})
    return [f"| sum | {name} | {_cells(base, s)} | | |" for name, s in sums.items()]


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
        results.append(
            of_shape(shape, list(cfg.arms or CONTENDERS), cfg.rounds, cfg.seed, profile=cfg.profile)
        )
        save({"shapes": results})
    peaks = ", ".join(f"{r['roof_per_s']['bf16 peak'] * 1e-12:.0f}" for r in results)
    copy = ", ".join(f"{r['roof_per_s']['copy'] * 1e-9:.0f}" for r in results)
    roof_line = f"measured beside each shape: best bf16 GEMM {peaks} TFLOP/s, copy {copy} GB/s"
    return {"shapes": results}, f"{table(results)}\n{roof_line}{profiles(results)}"
