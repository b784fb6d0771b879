"""Devices: the roofline by hand, what has no hardware, refusals, and the files of configs/hardware."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from round_device import plain_device

from qtrain.planning.devices import Device

FILES = sorted((Path(__file__).parents[2] / "configs" / "hardware").glob("*.yaml"))


def test_a_gemm_takes_the_longer_of_its_products_and_its_bytes() -> None:
    device = dataclasses.replace(plain_device(), kernel_us=3.0)
    assert device.gemm_seconds("bf16", 500e12, 1.0) == pytest.approx(1.0 + 3e-6)
    assert device.gemm_seconds("int8", 500e12, 1.0) == pytest.approx(0.5 + 3e-6)
    assert device.gemm_seconds("bf16", 1.0, 4000e9) == pytest.approx(2.0 + 3e-6)
    narrow = dataclasses.replace(device, gemm_us=100.0)
    assert narrow.gemm_seconds("bf16", 500e12, 1.0) == pytest.approx(1.0 + 100e-6)
    assert device.attention_seconds(250e12, 1.0) == pytest.approx(1.0 + 3e-6)
    without = dataclasses.replace(device, gemm_tflops={"bf16": 1.0, "fp32": 1.0})
    with pytest.raises(ValueError, match="multiplies no int8"):
        without.gemm_seconds("int8", 1.0, 1.0)


def test_what_a_device_lacks() -> None:
    assert plain_device().lacks("fp8") == ""
    for capability in (8.9, 12.0):
        assert "capability 9 and 10" in dataclasses.replace(plain_device(), capability=capability).lacks(
            "fp8"
        )
    assert "multiplies no fp8" in dataclasses.replace(
        plain_device(), gemm_tflops={"bf16": 1.0, "fp32": 1.0}
    ).lacks("fp8")
    assert plain_device("cpu").lacks("int8") == ""
    assert plain_device("cpu").lacks("fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gib": 0}, "memory_gib=0"),
        ({"copy_gb_per_s": -1.0}, "copy_gb_per_s"),
        ({"type": "tpu"}, "allowed are cuda and cpu"),
        ({"gpus_per_node": 0}, "gpus_per_node=0"),
        ({"price_per_hour": "two"}, "price_per_hour='two'"),
        ({"kernel_us": -1}, "kernel_us"),
        ({"gemm_tflops": {"bf16": 1.0}}, "bf16 and fp32 are needed"),
        ({"gemm_tflops": {"bf16": 1.0, "fp32": 1.0, "fp4": 1.0}}, "fp4"),
        ({"speed": 1}, "hardware.speed: allowed are name"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Device.of({**dataclasses.asdict(plain_device()), **change})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_are_devices_that_say_where_their_numbers_are_from(file: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if values == {"calibrate": True}:
        return
    device = Device.of(values)
    assert device.sources
    for precision, rate in device.gemm_tflops.items():
        assert rate < device.peak_tflops.get(precision, float("inf")), (
            f"{precision}: faster than the data sheet"
        )
    assert device.price_per_hour is None, "a price is the user's"


def test_h200_has_what_kernels_readme_measured() -> None:
    """Rates of its table of GEMMs: within a quarter of each, but for the two that the README calls bad or small."""
    values = yaml.safe_load(next(f for f in FILES if f.stem == "h200").read_text(encoding="utf-8"))
    device = Device.of(values)
    # M, N, K, bytes of an output; TFLOP/s of cuBLAS bf16 and of int8 by the rule
    table = [
        (15872, 12288, 4096, 2, 829, 1400), (15872, 4096, 12288, 2, 711, 1306), (15872, 4096, 4096, 2, 720, 1038),
        (12288, 4096, 15872, 4, 759, 1316), (4096, 4096, 15872, 4, 824, 1365), (16384, 768, 3072, 2, 773, 1157),
        (3072, 768, 16384, 4, 752, 1042),
    ]  # fmt: skip
    for m, n, k, out, bf16, int8 in table:
        for precision, size, rate in (("bf16", 2, bf16), ("int8", 1, int8)):
            seconds = device.gemm_seconds(precision, 2.0 * m * n * k, size * k * (m + n) + out * m * n)
            assert 0.75 < seconds / (2e-12 * m * n * k / rate) < 1.25, (m, n, k, precision)
