"""Devices: what a data sheet says, what was measured, and what is assumed; from configs/hardware, or measured here.

    time of a GEMM = max(FLOPs / rate, bytes / bandwidth) + overhead          of another kernel: bytes / bandwidth + overhead

``rate`` is that of large GEMMs, measured where there is a measurement; the overhead is what a kernel takes to fill and drain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

GIB = 1 << 30
PRECISIONS = ("bf16", "fp32", "int8", "fp8")
FP8_CAPABILITIES = (9, 10)  # of CUDA, the major ones that have kernels (qtrain_kernels.fp8_scaled_mm_triton)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU (or this CPU) and how it is connected.

    name: for people. type: ``cuda`` or ``cpu``. capability: of CUDA, 9.0 for Hopper; None of a CPU. memory_gib: what programs
    can allocate. peak_tflops, gemm_tflops: dense, by precision (``bf16``, ``fp32``, ``int8``, ``fp8``): the data sheet's
    and what large GEMMs reach; a precision that is missing has no hardware. attention_tflops: of fused attention.
    copy_gb_per_s: read plus written. quantize_fraction: of it, in kernels that quantize natively. kernel_us: of the device, a kernel; gemm_us: a GEMM's, None for the same. host_us: of Python and the dispatcher, an eager
    operation. gpus_per_node; link_gb_per_s: a GPU's to its neighbours in the node, one direction, reached; node_gb_per_s: a node's to
    others, one direction, reached; link_us, node_us: latency of one hop. watts: at full load. price_per_hour: of one GPU, in whatever currency.
    measured: which of these numbers were measured, and where; sources: of the others. unknown: names of those that stand for numbers that
    nobody gave.

    Raises ValueError, naming the value.
    """

    name: str
    type: str
    memory_gib: float
    peak_tflops: Mapping[str, float]
    gemm_tflops: Mapping[str, float]
    attention_tflops: float
    copy_gb_per_s: float
    quantize_fraction: float
    kernel_us: float
    host_us: float
    gpus_per_node: int
    link_gb_per_s: float
    node_gb_per_s: float
    link_us: float
    node_us: float
    gemm_us: float | None = None
    capability: float | None = None
    watts: float | None = None
    price_per_hour: float | None = None
    measured: str = ""
    sources: str = ""
    unknown: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.type not in ("cuda", "cpu"):
            raise ValueError(f"hardware.type={self.type!r}: allowed are cuda and cpu")
        for name in (
            "memory_gib",
            "attention_tflops",
            "quantize_fraction",
            "copy_gb_per_s",
            "link_gb_per_s",
            "node_gb_per_s",
        ):
            _positive(name, getattr(self, name))
        for name in ("kernel_us", "host_us", "link_us", "node_us"):
            if not _number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"hardware.{name}={getattr(self, name)!r}: microseconds, 0 or more")
        for name in ("watts", "price_per_hour", "gemm_us"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if (
            isinstance(self.gpus_per_node, bool)
            or not isinstance(self.gpus_per_node, int)
            or self.gpus_per_node < 1
        ):
            raise ValueError(f"hardware.gpus_per_node={self.gpus_per_node!r}: a whole number, 1 or more")
        for name in ("peak_tflops", "gemm_tflops"):
            rates = dict(getattr(self, name))
            object.__setattr__(self, name, {k: v for k, v in rates.items() if v is not None})
            for precision, rate in rates.items():
                if precision not in PRECISIONS:
                    raise ValueError(f"hardware.{name}.{precision}: allowed are {', '.join(PRECISIONS)}")
                if rate is not None:
                    _positive(f"{name}.{precision}", rate)
        if not {"bf16", "fp32"} <= set(self.gemm_tflops):
            raise ValueError("hardware.gemm_tflops: bf16 and fp32 are needed")

    @staticmethod
    def of(config: Mapping[str, Any]) -> Device:
        """From a mapping of the fields. Raises ValueError for unknown and missing ones."""
        known = [f.name for f in fields(Device)]
        unknown = [str(key) for key in config if key not in known]
        if unknown:
            raise ValueError(f"hardware.{unknown[0]}: allowed are {', '.join(known)}")
        try:
            return Device(**{str(key): value for key, value in config.items()})
        except TypeError as error:
            raise ValueError(f"hardware: {error}") from error

    def lacks(self, kind: str) -> str:
        """Why codes of this kind (``int8``, ``fp8``) have no kernel here; empty where they have."""
        if kind not in self.gemm_tflops:
            return f"{self.name} multiplies no {kind}"
        if kind == "fp8" and int(self.capability or 0) not in FP8_CAPABILITIES:
            majors = " and ".join(map(str, FP8_CAPABILITIES))
            return f"fp8 runs natively on GPUs of capability {majors}, not on {self.name}"
        return ""

    def gemm_seconds(self, precision: str, flops: float, nbytes: float) -> float:
        """Raises ValueError for a precision that it does not multiply."""
        rate = self.gemm_tflops.get(precision)
        if rate is None:
            raise ValueError(f"{self.name} multiplies no {precision}")
        overhead = self.kernel_us if self.gemm_us is None else self.gemm_us
        return max(flops / (rate * 1e12), nbytes / (self.copy_gb_per_s * 1e9)) + overhead * 1e-6

    def attention_seconds(self, flops: float, nbytes: float) -> float:
        return (
            max(flops / (self.attention_tflops * 1e12), nbytes / (self.copy_gb_per_s * 1e9))
            + self.kernel_us * 1e-6
        )

    def copy_seconds(self, nbytes: float) -> float:
        return nbytes / (self.copy_gb_per_s * 1e9)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: Any) -> None:
    if not _number(value) or not value > 0:
        raise ValueError(f"hardware.{name}={value!r}: a positive number")
