"""What the tracker sees, on tensors small enough to count by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qtrain.planning.operations import ATTENTION, ELEMENTWISE, GEMM, QUANTIZE, Tracker, fused_bytes


def test_bytes_live_from_birth_to_death() -> None:
    x = torch.ones(1000)
    with Tracker() as tracker:
        y = x * 2  # 4000
        z = y + 1  # 8000
        del y
        assert tracker.live == 4000
        w = z[:10]  # a view: nothing
        del z
        assert tracker.live == 4000
        del w
        assert (tracker.live, tracker.peak) == (0, 8000)
        tracker.restart_peak()
        x.mul_(3)
        assert tracker.peak == 0
    assert [o.name for o in tracker.operations] == ["aten::mul", "aten::add", "aten::mul_"]
    assert [o.nbytes for o in tracker.operations] == [8000, 8000, 8000]


def test_a_linear_layer_is_three_products() -> None:
    x, w = torch.ones(5, 3, requires_grad=True), torch.ones(7, 3, requires_grad=True)
    with Tracker() as tracker:
        F.linear(x, w).sum().backward()
    gemms = [o for o in tracker.operations if o.kind == GEMM]
    assert [o.flops for o in gemms] == [2 * 5 * 3 * 7] * 3
    assert {o.precision for o in gemms} == {"fp32"}
    assert sum(n for _, n in gemms[0].read) == 4 * (15 + 21)
    assert sum(n for _, n in gemms[0].written) == 4 * 35


def test_attention_counts_half_where_causal() -> None:
    q = torch.ones(2, 3, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for causal in (False, True):
        with Tracker() as tracker:
            F.scaled_dot_product_attention(q, q * 1, q * 1, is_causal=causal).sum().backward()
        found[causal] = [o.flops for o in tracker.operations if o.kind == ATTENTION]
    forward = 2 * 2 * (2 * 3) * 8 * 8 * 4  # q k^T and p v, of 6 heads
    assert found[False] == [forward, 2.5 * forward]
    assert found[True] == [0.5 * forward, 1.25 * forward]


def test_an_embedding_reads_its_rows_alone() -> None:
    table, tokens = torch.ones(1000, 8), torch.tensor([3, 5])
    with Tracker() as tracker:
        F.embedding(tokens, table)
    assert tracker.operations[0].nbytes <= 3 * 2 * 8 * 4  # not the 32,000 bytes of the table


def test_an_expanded_tensor_is_read_once() -> None:
    one = torch.ones(1)
    with Tracker() as tracker:
        one.expand(1000) + torch.zeros(1000)
    assert tracker.operations[-1].nbytes == 4 + 4000 + 4000


def test_fusing_writes_what_a_product_reads_and_nothing_between() -> None:
    x, w = torch.ones(100, 10), torch.ones(10, 10)
    with Tracker() as tracker:
        y = ((x * 2) + 1).relu() @ w
        y.sigmoid().neg()
    moved = [(o.name.removeprefix("aten::"), n) for o, n in fused_bytes(tracker.operations)]
    assert moved == [
        ("mul", 4000),
        ("add", 0),
        ("relu", 4000),
        ("mm", 4000 + 400 + 4000),
        ("sigmoid", 4000),
        (
            "neg",
            4000,
        ),  # the result: 24,400 in all, as torch 2.13's Inductor counts (GraphLowering.count_bytes)
    ]
    kept = {tracker.operations[1].written[0][0]}  # x * 2 + 1, for a backward
    assert dict(fused_bytes(tracker.operations, kept))[tracker.operations[1]] == 4000
    with Tracker() as tracker:
        y = x * 2
        x @ w
        y + 1
    moved = [(o.name.removeprefix("aten::"), n) for o, n in fused_bytes(tracker.operations)]
    assert moved == [("mul", 4000 + 4000), ("mm", 4000 + 400 + 4000), ("add", 8000)], (
        "what a later run reads was written"
    )


def test_fusing_writes_results() -> None:
    """Of a block: its output and the float32 gradients; what is written again before its end counts at the last time."""
    x, w = torch.ones(100, 10, requires_grad=True), torch.ones(10, 10, requires_grad=True)
    with Tracker() as tracker, torch.autocast("cpu", torch.bfloat16):
        y = x @ w + x
        forward = tracker.taken()
        y.backward(torch.ones(100, 10))
        backward = tracker.taken()
    sizes = {n: 4 * n for n in (1000, 100)}  # of x, of w in float32
    moved = [(o.name.removeprefix("aten::"), n) for o, n in fused_bytes(forward)]
    assert moved[-1] == ("add", 2000 + sizes[1000] + sizes[1000])  # the product in bf16, x, and the result
    last = {o.written[0][1]: n for o, n in fused_bytes(backward) if o.name == "aten::_to_copy"}
    assert last[sizes[100]] == 200 + sizes[100], "the weight's gradient leaves in float32"
    added = [n for o, n in fused_bytes(backward) if o.name == "aten::add"]
    assert added[-1] == 2 * sizes[1000], "y's gradient is read, that of x is left"
    with Tracker() as tracker:
        again = torch.ones(1000) * 2
        again.add_(1).mul_(3)
    moved = [(o.name.removeprefix("aten::"), n) for o, n in fused_bytes(tracker.operations)]
    assert moved[-3:] == [("mul", 0), ("add_", 0), ("mul_", 4000)]


def test_what_weights_alone_made() -> None:
    w, x = torch.ones(4, 4), torch.ones(4, 4)
    with Tracker() as tracker:
        tracker.know_parameters([w])
        copy = w.bfloat16()
        again, mixed = copy.t() * 2, copy * x
        assert tracker.of_parameters(copy)
        assert tracker.of_parameters(again)
        assert not tracker.of_parameters(mixed)


def test_quantizing_is_told_from_the_rest() -> None:
    from qtrain_kernels.quantize_rows_columns import quantize_rows_columns

    from qtrain.nn import apply_recipe
    from qtrain.quant import ModelRecipe

    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    apply_recipe(layer, ModelRecipe(linear={"fprop": {"input": "int8_row", "weight": "int8_row"}}))  # type: ignore[arg-type]
    with Tracker() as tracker:
        (layer(torch.ones(4, 16)) * 2).sum()
    kinds = [o.kind for o in tracker.operations]
    assert kinds.count(GEMM) == 1
    assert kinds.count(QUANTIZE) > 4
    assert kinds[-2:] == [ELEMENTWISE, ELEMENTWISE], "outside of the layer"
    zero, side, nothing = (
        torch.zeros((), dtype=torch.int64),
        (127, False, False, 0, None),
        (0, False, False, 0, None),
    )
    x = torch.ones(32, 64)
    with Tracker() as tracker:
        quantize_rows_columns(x, *side, *nothing, zero, zero, zero)
        quantize_rows_columns(x, *side, *side, zero, zero, zero)
    rows, both = tracker.operations
    assert rows.name == "qtrain::quantize_rows"
    # x once, its codes and scales; or x twice and both
    assert abs(rows.nbytes - (4 + 1) * x.numel()) < 600
    assert abs(both.nbytes - (8 + 2) * x.numel()) < 900
