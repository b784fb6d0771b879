"""The bytes that were counted are those that reached the backend, seen below Python's functions (C++ of DDP included)."""

from __future__ import annotations

import communicating
import pytest

from qtrain.communication.exchange import Traffic

# What the rows of SHAPES take, from the formats' definitions: codes, and 4 bytes a scale
INT8_GROUP128 = {"inner.odd": 33 + 4, "inner.few": 200 + 8, "bias": 4, "deep": 200 + 8, "tall": 5 + 4}
INT4_ROW = {"inner.odd": 17 + 4, "inner.few": 100 + 4, "bias": 4, "deep": 100 + 4, "tall": 3 + 4}
INT8_ROW = {"inner.odd": 33 + 4, "inner.few": 200 + 4, "bias": 4, "deep": 200 + 4, "tall": 5 + 4}
FLOAT32 = {"inner.odd": 132, "inner.few": 800, "bias": 4, "deep": 800, "tall": 20}


def bytes_of(rows: dict[str, int], world: int) -> int:
    """Of one process's share."""
    return sum(rows[n] * -(-shape[0] // world) for n, shape in communicating.SHAPES.items())


def inner(rows: dict[str, int]) -> dict[str, int]:
    return {n: b if n.startswith("inner.") else 0 for n, b in rows.items()}


def given(case: dict, *names: str) -> int:
    return sum(size for name, _, size in case["seen"] if name in names)


@pytest.mark.parametrize("world", communicating.WORLDS)
def test_ddp(seen, world):
    share = bytes_of(INT8_GROUP128, world)
    for found in seen[world]:
        case = found["traffic"]["ddp"]
        sent = [s for s in case["seen"] if s[0] != "broadcast_"]  # of DDP's new buckets, once in a run
        assert {dtype for _, dtype, _ in sent} == {"torch.uint8"}
        assert {name for name, _, _ in sent} == {"alltoall_base_", "_allgather_base_"}
        assert given(case, "alltoall_base_") == world * share
        assert given(case, "_allgather_base_") == share
        row = case["counted"]
        assert row["communication/bytes_sent"] == 2 * (world - 1) * share
        assert row["communication/reduce_gradients_bytes_sent"] == row["communication/bytes_sent"]
        # An all-reduce of float32: twice (W - 1) / W of it; padding rows count as torch's own would under FSDP2
        assert row["communication/bytes_float32"] == 2 * (world - 1) * bytes_of(FLOAT32, world)
        assert row["communication/bytes_bfloat16"] == (world - 1) * bytes_of(FLOAT32, world)


@pytest.mark.parametrize("world", communicating.WORLDS)
def test_fsdp2(seen, world):
    for found in seen[world]:
        case, exact = found["traffic"]["fsdp2"], found["traffic"]["fsdp2, exact"]
        assert {dtype for _, dtype, _ in case["seen"]} == {"torch.uint8"}
        # The root's once: it stays whole between forward and backward
        gathered = bytes_of(INT8_ROW, world) + bytes_of(inner(INT8_ROW), world)
        assert given(case, "_allgather_base_") == gathered
        assert given(case, "alltoall_base_") == world * bytes_of(INT4_ROW, world)
        row = case["counted"]
        assert row["communication/gather_weights_bytes_sent"] == (world - 1) * gathered
        assert row["communication/reduce_gradients_bytes_sent"] == (world - 1) * bytes_of(INT4_ROW, world)
        # What torch sends in float32, as it was seen sending it
        theirs = given(exact, "_allgather_base_") * (world - 1)
        theirs += given(exact, "_reduce_scatter_base_") * (world - 1) // world
        assert row["communication/bytes_float32"] == theirs


def test_a_build_that_sends_float32_is_seen(seen):
    """The checks above on torch's own collectives, whose names and configuration could be the same."""
    for name in ("ddp, exact", "fsdp2, exact"):
        case = seen[2][0]["traffic"][name]
        assert "torch.float32" in {dtype for _, dtype, _ in case["seen"]}
    exact, low_bit = (seen[2][0]["traffic"][name] for name in ("ddp, exact", "ddp"))
    assert given(exact, "allreduce_") > 2.5 * given(low_bit, "alltoall_base_")


def test_traffic_counts_steps_alone():
    traffic = Traffic()
    traffic.add("reduce_gradients", 10, 40)
    assert traffic.row()["communication/bytes_sent"] == 0
    traffic.start()
    traffic.add("reduce_gradients", 10, 40)
    traffic.add("gather_weights", 5, 20)
    traffic.add("reduce_gradients", 10, 40)
    traffic.stop()
    traffic.add("gather_weights", 500, 500)
    assert traffic.row() == {
        "communication/bytes_sent": 25,
        "communication/reduce_gradients_bytes_sent": 20,
        "communication/gather_weights_bytes_sent": 5,
        "communication/bytes_float32": 100,
        "communication/bytes_bfloat16": 50,
    }
    traffic.start()
    assert traffic.row()["communication/bytes_sent"] == 0
