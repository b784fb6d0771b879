"""``qtrain bench train device=cuda``: whole training steps of a model, optimizer included: tokens/s, peak memory, MFU.

A step is forward, loss and backward under bf16 autocast with float32 parameters, the gradient's clipping, and the
optimizer. Every contender (``bench_contenders``; all but ``bf16`` compiled as a whole, with the loss) holds the same
parameters, so that each optimizer has one set of states, whoever computed the gradient. Contenders and optimizers take
turns, ``STEPS`` steps each without waiting in between.

    MFU = tokens/s * FLOPs a token / dense bf16 peak of the data sheet         (PaLM, 2204.02311, appendix B)

so that one of 8 bits may exceed what bf16 could reach; ``of_measured_peak`` has the measured bf16 GEMM in its place.
Peak memory is that of one contender with one optimizer: what other optimizers hold is subtracted.

cuda_graphs=true: compiled with mode=reduce-overhead, for all alike, so that launches cost nothing.
largest_batch=true: then, of each contender with each optimizer, the largest batch that fits, and tokens/s there.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .bench_contenders import CONTENDERS, check_arms, reason
from .bench_timing import Samples, ratio_interval
from .bench_train_steps import OPTIMIZERS, SharedParameters, TrainStep

if TYPE_CHECKING:
    from torch import Tensor

    from qtrain.models.protocol import ModelConfig

ARMS = ("bf16_compiled", "native_int8", "native_fp8", "simulated")
STEPS = 3  # a sample: enough that the launch of the first one's kernels is small beside it
# Dense bf16, operations a second, of NVIDIA's data sheets (H100 and H200 SXM: 1979 with sparsity; A100: 624)
DATA_SHEET_PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}


def check(cfg: Any, config: ModelConfig) -> None:
    """Raises ValueError for what cannot be timed."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device; device=cpu times the CPU")
    check_arms(list(cfg.arms or ARMS))
    unknown = [name for name in cfg.optimizers if name not in OPTIMIZERS]
    if unknown or not cfg.optimizers:
        raise ValueError(f"optimizers={list(cfg.optimizers)}: allowed are {', '.join(OPTIMIZERS)}")
    for key, least in (("batch_sequences", 1), ("sequence_tokens", 1), ("rounds", 5)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise ValueError(f"{key}={cfg[key]!r}: must be an integer of at least {least}")
    if cfg.sequence_tokens > config.sequence_tokens:
        raise ValueError(
            f"sequence_tokens={cfg.sequence_tokens}: this model reads at most {config.sequence_tokens}"
        )
    for key in ("largest_batch", "cuda_graphs"):
        if not isinstance(cfg[key], bool):
            raise ValueError(f"{key}={cfg[key]!r}: true or false")


class Bench:
    """The steps and optimizers of one model on one device."""

    def __init__(self, cfg: Any, config: ModelConfig, device: str) -> None:
        self.cfg, self.device = cfg, device
        self.vocab_size = config.vocab_size
        self.shared = SharedParameters(config, device, cfg.seed)
        self.optimizers: dict[str, Any] = {}
        self.steps: dict[str, TrainStep] = {}
        self.missing: dict[str, str] = {}
        self.losses: dict[str, float] = {}

    def tokens(self, sequences: int) -> Tensor:
        """[B, S + 1], random."""
        import torch

        generator = torch.Generator(self.device).manual_seed(self.cfg.seed)
        size = (sequences, self.cfg.sequence_tokens + 1)
        return torch.randint(self.vocab_size, size, generator=generator, device=self.device)

    def prepare(self, tokens: Tensor) -> None:
        """Compiles every contender and makes every optimizer's states; those that fail are ``missing``."""
        for name in self.cfg.arms or ARMS:
            start = time.perf_counter()
            try:
                step = TrainStep(name, self.shared, self.cfg.seed, cuda_graphs=self.cfg.cuda_graphs)
                self.losses[name] = float(step.gradients(tokens))
                self.steps[name] = step
            except Exception as error:  # whatever another library raises is a row of the table
                self.missing[name] = reason(error)
            seconds = time.perf_counter() - start
            print(f"  {name}: {self.missing.get(name, 'ready')}, {seconds:.1f} s", flush=True)
        if not self.steps:
            return
        from qtrain.optim import parameter_groups

        first = next(iter(self.steps.values()))
        for name in self.cfg.optimizers:
            try:
                optimizer = OPTIMIZERS[name](parameter_groups(self.shared.model(), 0.1))
                first.step(tokens, optimizer)
                self.optimizers[name] = optimizer
            except Exception as error:
                self.missing[name] = reason(error)
                print(f"  {name}: {self.missing[name]}", flush=True)

    def combinations(self) -> list[tuple[str, str]]:
        return [(arm, optimizer) for optimizer in self.optimizers for arm in self.steps]

    def state_bytes(self, optimizer: str) -> int:
        return int(self.optimizers[optimizer].state_bytes()["total"])

    def peak_bytes(self, arm: str, optimizer: str, tokens: Tensor) -> int:
        """Of a step, allocated, without the states of the other optimizers."""
        import torch

        others = sum(self.state_bytes(name) for name in self.optimizers if name != optimizer)
        for p in self.steps[arm].parameters:
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.steps[arm].step(tokens, self.optimizers[optimizer])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others

    def timed(self, tokens: Tensor, rounds: int) -> Samples:
        """Milliseconds of a step, ``STEPS`` at once, of each combination in turns; keys are "arm optimizer"."""
        combinations = self.combinations()
        times: Samples = {f"{arm} {optimizer}": [] for arm, optimizer in combinations}
        for i in range(rounds + 1):  # the first round warms up
            shift = i % len(combinations)
            for arm, optimizer in combinations[shift:] + combinations[:shift]:
                self.synchronize()
                start = time.perf_counter()
                for _ in range(STEPS):
                    self.steps[arm].step(tokens, self.optimizers[optimizer])
                self.synchronize()
                if i:
                    times[f"{arm} {optimizer}"].append((time.perf_counter() - start) * 1e3 / STEPS)
        return times

    def optimizer_ms(self, rounds: int) -> dict[str, float]:
        """Median ms of an update alone, of each optimizer, ``STEPS`` at once, in turns; with the last gradient."""
        times: Samples = {name: [] for name in self.optimizers}
        for i in range(rounds + 1):
            for name, optimizer in self.optimizers.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(STEPS):
                    optimizer.step()
                self.synchronize()
                if i:
                    times[name].append((time.perf_counter() - start) * 1e3 / STEPS)
        return {name: statistics.median(ms) for name, ms in times.items()}

    def synchronize(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def keep_only(self, optimizer: str) -> None:
        """Frees what the other optimizers hold; they make new states when they step again."""
        for name, other in self.optimizers.items():
            if name != optimizer:
                other.state.clear()

    def fits(self, arm: str, optimizer: str, sequences: int) -> float | None:
        """ms of a step of that batch, the least of two samples, None where memory runs out."""
        import torch

        tokens, step = self.tokens(sequences), self.steps[arm]
        try:
            samples = []
            for _ in range(3):  # the first may compile
                self.synchronize()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step.step(tokens, self.optimizers[optimizer])
                self.synchronize()
                samples.append((time.perf_counter() - start) * 1e3 / STEPS)
            return min(samples[1:])
        except torch.OutOfMemoryError:
            return None
        finally:
            for p in step.parameters:
                p.grad = None
            gc.collect()
            torch.cuda.empty_cache()


def largest(fits: Callable[[int], float | None], first: int, tries: int = 16) -> tuple[int, float] | None:
    """(n, fits(n)) of the largest n that fits, within 1/16 of it: doubled from ``first``, then halved intervals. None
    where not even 1 fits."""
    low, high, found = 0, None, None
    n = first
    for _ in range(tries):
        got = fits(n)
        if got is None:
            high = n
        else:
            low, found = n, (n, got)
        if high is not None and (high - low <= max(1, low // 16)):
            break
        n = 2 * low if high is None else max(1, (low + high) // 2)
    return found


def data_sheet_peak(device_name: str) -> float | None:
    """Dense bf16 operations a second, None for a device that is not listed."""
    return next((peak for name, peak in DATA_SHEET_PEAKS.items() if name in device_name), None)


def measured_peak(device: str) -> float:
    """bf16 operations a second of the best GEMM."""
    from qtrain_kernels.bench import PEAK, interleaved_ms, rates, roof

    roofs = roof(device)
    times = interleaved_ms({name: function for name, (function, _) in roofs.items()}, device, 20)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return rates({name: work for name, (_, work) in roofs.items()}, medians)[PEAK]


def row_of(
    times: Sequence[float], base: Sequence[float], tokens: int, flops: int, peaks: Mapping[str, float | None]
) -> dict[str, Any]:
    """From ms a step: tokens/s, model FLOPs a second of the data sheet's and of the measured peak, ratio to ``base``."""
    median = statistics.median(times)
    per_s = tokens / median * 1e3
    ratio, low, high = ratio_interval(times, base)
    row = {"median_ms": median, "tokens_per_s": per_s, "ratio": ratio, "ratio_low": low, "ratio_high": high}
    shares = {key: per_s * flops / peak if peak else None for key, peak in peaks.items()}
    return {**row, **shares}


def measured(
    cfg: Any, config: ModelConfig, save: Callable[[dict[str, Any]], None], device: str = "cuda"
) -> tuple[dict[str, Any], str]:
    """What the file holds, and the table; ``save`` is called with what there is before the search for batches."""
    import torch

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(CONTENDERS))  # one code, many models
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = measured_peak(device)
    bench = Bench(cfg, config, device)
    tokens = bench.tokens(cfg.batch_sequences)
    bench.prepare(tokens)
    flops = bench.shared.model().flops_per_token()
    peaks = {"mfu": data_sheet_peak(name), "of_measured_peak": peak}
    rows: list[dict[str, Any]] = []
    count = sum(p.numel() for p in bench.shared.model().parameters())
    found: dict[str, Any] = {"parameters": count, "flops_per_token": flops, "bf16_peak_per_s": peak}
    found |= {"rows": rows, "missing": bench.missing}
    if not bench.combinations():
        return found, table(found)
    memory = {c: bench.peak_bytes(*c, tokens) if device == "cuda" else None for c in bench.combinations()}
    times = bench.timed(tokens, cfg.rounds)
    updates = bench.optimizer_ms(cfg.rounds)
    step_tokens = cfg.batch_sequences * cfg.sequence_tokens
    for arm, optimizer in bench.combinations():
        base = times[f"{next(iter(bench.steps))} {optimizer}"]
        row = {
            "arm": arm,
            "optimizer": optimizer,
            "sequences": cfg.batch_sequences,
            "loss": bench.losses[arm],
        }
        row |= row_of(times[f"{arm} {optimizer}"], base, step_tokens, flops, peaks)
        row |= {
            "peak_bytes": memory[arm, optimizer],
            "state_bytes": bench.state_bytes(optimizer),
            "optimizer_ms": updates[optimizer],
            "ms": times[f"{arm} {optimizer}"],
        }
        rows.append(row)
    save(found)
    if cfg.largest_batch:
        found["largest"] = []
        for optimizer in bench.optimizers:
            bench.keep_only(optimizer)
            for arm in bench.steps:
                got = largest(functools.partial(bench.fits, arm, optimizer), 2 * cfg.batch_sequences)
                row = {"arm": arm, "optimizer": optimizer, "sequences": got and got[0]}
                row["tokens_per_s"] = got and got[0] * cfg.sequence_tokens / got[1] * 1e3
                found["largest"].append(row)
                save(found)
    return found, table(found)


def table(found: Mapping[str, Any]) -> str:
    """Markdown; ratios of time to the first contender's with the same optimizer, intervals of 95 % in brackets."""
    rows = found["rows"]
    base = rows[0]["arm"] if rows else ""
    lines = [
        f"| optimizer | contender | sequences | ms | tokens/s | time / {base} (95 %) | MFU | of measured peak | peak GB | states GB | update ms | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r['ratio']:.3f} [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {r['optimizer']} | {r['arm']} | {r['sequences']} | {r['median_ms']:.2f} | {r['tokens_per_s']:.0f} | {ratio} | "
            f"{mfu} | {r['of_measured_peak']:.1%} | {memory} | {r['state_bytes'] / 1e9:.3f} | {r['optimizer_ms']:.2f} | {r['loss']:.4f} |"
        )
    lines += [f"{name}: missing: {why}" for name, why in found["missing"].items()]
    for r in found.get("largest", ()):
        fits = (
            "nothing fits"
            if r["sequences"] is None
            else f"{r['sequences']} sequences, {r['tokens_per_s']:.0f} tokens/s"
        )
        lines.append(f"largest batch, {r['arm']} with {r['optimizer']}: {fits}")
    lines.append(f"measured in this run: bf16 GEMM {found['bf16_peak_per_s'] * 1e-12:.0f} TFLOP/s")
    return "\n".join(lines)
