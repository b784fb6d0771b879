"""``hardware=this``: small sizes, no claim about speed but that the numbers are ones that a plan can use."""

from __future__ import annotations

import time

from qtrain.planning.calibration import calibrated, clock, median_seconds


def test_a_device_comes_out() -> None:
    device = calibrated("cpu", sequence_tokens=64, scale=1 / 16)
    assert device.type == "cpu"
    assert device.lacks("int8") == ""
    assert device.lacks("fp8")
    assert 1 < device.memory_gib < 10**5
    assert device.gemm_us is not None
    assert device.gemm_us >= device.kernel_us > 0
    assert device.host_us == 0


def test_a_median_is_of_processor_time() -> None:
    """Sleeping costs none."""
    assert median_seconds(lambda: time.sleep(0.02), "cpu") < 0.01
    start = clock("cpu")
    sum(range(10**6))
    assert clock("cpu") > start
