"""A device of round numbers."""

from __future__ import annotations

from qtrain.planning.devices import Device


def plain_device(kind: str = "cuda") -> Device:
    return Device(
        name="round",
        type=kind,
        capability=9.0 if kind == "cuda" else None,
        memory_gib=80.0,
        peak_tflops={"bf16": 1000.0},
        gemm_tflops={"bf16": 500.0, "fp32": 50.0, "int8": 1000.0, "fp8": 1000.0},
        attention_tflops=250.0,
        copy_gb_per_s=2000.0,
        quantize_fraction=0.5,
        kernel_us=0.0,
        host_us=0.0,
        gpus_per_node=8,
        link_gb_per_s=400.0,
        node_gb_per_s=200.0,
        link_us=0.0,
        node_us=0.0,
    )
