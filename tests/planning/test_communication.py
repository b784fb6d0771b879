"""Collectives against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from round_device import plain_device

from qtrain.communication.settings import CommunicationSettings
from qtrain.planning.communication import (
    BUCKET_BYTES,
    FLOAT32,
    NOTHING,
    Cluster,
    LowBits,
    ParameterGroup,
    of_ddp,
    of_fsdp2,
)

MIB = 2**20
GROUP = ParameterGroup(1e9)


def cluster(gpus: int, **changes: object) -> Cluster:
    return Cluster(dataclasses.replace(plain_device(), **changes), gpus)  # type: ignore[arg-type]


def test_a_ring_sends_each_byte_but_ones_own() -> None:
    four = cluster(4, gpus_per_node=4, link_gb_per_s=2.0, link_us=10.0)
    assert four.gather_bytes(8e9) == 6e9
    assert four.reduce_bytes(8e9) == 12e9
    assert four.gather_seconds(8e9) == pytest.approx(6e9 / 2e9 + 3 * 10e-6)  # three hops
    assert four.reduce_seconds(8e9) == pytest.approx(12e9 / 2e9 + 4 * 10e-6)  # a tree: 2 log2 4


def test_nodes_share_their_network() -> None:
    more = {"gpus_per_node": 4, "link_gb_per_s": 100.0, "node_gb_per_s": 30.0, "link_us": 1.0, "node_us": 7.0}
    assert (cluster(4, **more).nodes, cluster(4, **more).gb_per_s, cluster(4, **more).hop_us) == (
        1,
        100.0,
        1.0,
    )
    assert (cluster(8, **more).nodes, cluster(8, **more).gb_per_s, cluster(8, **more).hop_us) == (
        2,
        30.0,
        7.0,
    )
    faster = {**more, "node_gb_per_s": 500.0}
    assert cluster(8, **faster).gb_per_s == 100.0, "no faster than the links inside"


def test_alone_nothing_is_said() -> None:
    one = cluster(1)
    assert of_ddp(one, 1e9, 1.0, overlaps=False) == NOTHING
    assert of_fsdp2(one, [GROUP], GROUP, 1, 1.0, 1.0) == NOTHING


def test_ddp_hides_behind_the_backward_but_for_its_last_bucket() -> None:
    two = cluster(2, gpus_per_node=2, link_gb_per_s=1.0, link_us=0.0)
    gradients = 4 * BUCKET_BYTES
    one_bucket = BUCKET_BYTES / 1e9  # 2 * 1/2 of its bytes at 1 GB/s
    exposed = {s: of_ddp(two, gradients, s, overlaps=True).exposed_seconds for s in (0.0, one_bucket, 100.0)}
    assert exposed[0.0] == pytest.approx(4 * one_bucket)
    assert exposed[one_bucket] == pytest.approx(3 * one_bucket)
    assert exposed[100.0] == pytest.approx(one_bucket)
    compiled = of_ddp(two, gradients, 100.0, overlaps=False)
    assert compiled.exposed_seconds == pytest.approx(4 * one_bucket), (
        "gradients come at the end of one backward"
    )
    assert compiled.sent_bytes == gradients


def test_fsdp2_gathers_blocks_twice_and_the_rest_once() -> None:
    two = cluster(2, gpus_per_node=2, link_gb_per_s=1.0, link_us=0.0)
    found = of_fsdp2(two, [GROUP] * 3, ParameterGroup(2e9), 4, 0.0, 0.0)
    # a micro-batch: blocks gathered twice and reduced once, the outer gathered and reduced once; half of each is sent
    assert found.sent_bytes == 4 * (3 * 3e9 + 2 * 2e9) / 2
    assert found.seconds == pytest.approx(4 * 6.5)
    assert found.exposed_seconds == pytest.approx(4 * 6.5), "behind no computation nothing hides"
    hidden = of_fsdp2(two, [GROUP] * 3, ParameterGroup(2e9), 4, 1e3, 1e3)
    # the outer's gather, the first block's gather, the last block's reduce-scatter: 1 + 0.5 + 0.5 s
    assert hidden.exposed_seconds == pytest.approx(4 * 2.0)
    assert hidden.sent_bytes == found.sent_bytes


def test_latency_grows_with_the_ring() -> None:
    """Why thousands of processes gather in groups."""
    slow = {"gpus_per_node": 8, "node_us": 6.0}
    small = 64 * MIB
    few, many = (cluster(n, **slow).gather_seconds(small) for n in (64, 4096))
    assert many - few == pytest.approx((4095 - 63) * 6e-6, rel=0.05)


def test_codes_travel_with_their_scales() -> None:
    low = LowBits.of(
        CommunicationSettings(
            gather_weights="int8_row", reduce_gradients="int4_group128", error_feedback="bfloat16"
        )
    )
    assert (low.gather, low.reduce, low.owed) == (8 / 32 + 1 / 4096, (4 + 32 / 128) / 32, 2)
    assert LowBits.of(CommunicationSettings()) == LowBits(), "nothing is owed"
    mx = LowBits.of(CommunicationSettings(reduce_gradients="mxfp8", error_feedback=None))
    assert mx == LowBits(reduce=(8 + 8 / 32) / 32), "scales of a byte"
    two = cluster(2, gpus_per_node=2, link_gb_per_s=1.0, link_us=0.0)
    four_bits = of_ddp(two, 1e9, 100.0, overlaps=True, low_bits=low)
    assert four_bits.sent_bytes == pytest.approx(1e9 * (4 + 32 / 128) / 32)
    # An all-to-all and an all-gather, half of the codes each; DDP's hook waits
    assert four_bits.exposed_seconds == four_bits.seconds == pytest.approx((4 + 32 / 128) / 32)
    low = LowBits(gather=0.5, reduce=0.25)
    found = of_fsdp2(two, [ParameterGroup(1e9, 1e9)] * 2, ParameterGroup(2e9), 1, 0.0, 0.0, low)
    # blocks gathered twice at a half, the outer once in float32; both reduced at a quarter; half of each is sent
    assert found.sent_bytes == pytest.approx((2 * 2e9 * 0.5 + 2e9 + 4e9 * 0.25) / 2)
    assert found.seconds == pytest.approx((2 * 2e9 * 0.5 + 2e9 + 4e9 * 0.25) / 2 / 1e9)


def test_what_a_recipe_excludes_is_gathered_in_float32() -> None:
    two = cluster(2, gpus_per_node=2, link_gb_per_s=1.0, link_us=0.0)
    blocks = [ParameterGroup(8e9, coded=6e9), ParameterGroup(8e9, coded=0.0)]
    found = of_fsdp2(two, blocks, ParameterGroup(4e9, coded=2e9), 3, 0.0, 0.0, LowBits(gather=0.25))
    first, second, outer = 2e9 + 1.5e9, 8e9, 2e9 + 0.5e9
    everything = 2 * (first + second) + outer + (8e9 + 8e9 + 4e9)
    assert found.sent_bytes == pytest.approx(3 * everything / 2)
    assert found.seconds == pytest.approx(3 * everything / 2 / 1e9)
    hidden = of_fsdp2(two, blocks, ParameterGroup(4e9, coded=2e9), 3, 1e3, 1e3, LowBits(gather=0.25))
    # the outer's gather, the first block's, and its reduce-scatter
    assert hidden.exposed_seconds == pytest.approx(3 * (outer + first + 8e9) / 2 / 1e9)


def test_codes_go_over_a_nodes_network_once_a_card() -> None:
    """16 processes in nodes of 4: each sends 12/16 to other nodes, and four share what leaves theirs."""
    many = cluster(16, gpus_per_node=4, link_gb_per_s=100.0, node_gb_per_s=20.0, node_us=5.0)
    assert many.exchange_seconds(16e9) == pytest.approx(4 * 12e9 / 20e9 + 15 * 5e-6)
    assert many.gather_seconds(16e9) == pytest.approx(15e9 / 20e9 + 15 * 5e-6), "a ring's crosses it once"
    inside = cluster(4, gpus_per_node=4, link_gb_per_s=100.0, node_gb_per_s=1.0, link_us=0.0)
    assert inside.exchange_seconds(16e9) == pytest.approx(12e9 / 100e9)
    slow_links = cluster(8, gpus_per_node=4, link_gb_per_s=1.0, node_gb_per_s=1e3, node_us=0.0)
    assert slow_links.exchange_seconds(16e9) == pytest.approx(6e9 / 1e9), (
        "the other half leaves by the network"
    )
    at_once = cluster(16, gpus_per_node=4, link_gb_per_s=100.0, node_gb_per_s=20.0)
    exact, quarter = (
        of_fsdp2(at_once, [ParameterGroup(16e9)], ParameterGroup(0.0), 1, 0.0, 0.0, low)
        for low in (FLOAT32, LowBits(reduce=0.25))
    )
    assert quarter.sent_bytes == pytest.approx((2 + 0.25) / 3 * exact.sent_bytes)
    assert exact.seconds == pytest.approx(3 * 15e9 / 20e9)
    assert quarter.seconds == pytest.approx(2 * 15e9 / 20e9 + 4 * 3e9 / 20e9)


def test_what_is_owed_is_the_gradient_and_under_ddp_rows_of_the_mean() -> None:
    low = LowBits(reduce=0.25, owed=4)
    assert low.owed_bytes(1000, "ddp", 2) == 4 * 1500
    assert low.owed_bytes(1000, "fsdp2", 2) == 4 * 1000
    assert LowBits(reduce=0.25).owed_bytes(1000, "ddp", 2) == 0
