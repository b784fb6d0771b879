"""Looking from outside: every product, every passage, and nothing of the layer's own word."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from qtrain.nn.probe import LayerProbe, Watch

COUNTERS = torch.tensor([1, 2, 3])


def test_products_go_to_every_open_list() -> None:
    watch, first, second = Watch(), [], []
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    with watch:
        a @ b
        watch.start(first)
        y = a @ b
        watch.start(second)
        torch.addmm(torch.ones(4), a, b)
        watch.stop(first)
        z = b.t() @ a.t()
        watch.stop(second)
        watch.stop(second)
        a @ b
    assert [p.kernel for p in first] == ["mm", "addmm"]
    assert [p.kernel for p in second] == ["addmm", "mm"]
    assert [p.added for p in second] == [True, False]
    (one, two), (_, three) = first, second
    for p, left, right in ((one, a, b), (two, a, b), (three, b.t(), a.t())):
        assert torch.equal(p.a, left)
        assert torch.equal(p.b, right.t())
    assert torch.equal(one.out, y)
    assert torch.equal(three.out, z)


def test_low_precision_products_are_seen() -> None:
    watch, products = Watch(), []
    a = torch.randint(-5, 5, (32, 32), dtype=torch.int8)
    b = torch.randint(-5, 5, (32, 16), dtype=torch.int8)
    eighth, one = torch.float8_e4m3fn, torch.ones(())
    with watch:
        watch.start(products)
        y = torch._int_mm(a, b)
        torch._scaled_mm(a.to(eighth), b.t().contiguous().to(eighth).t(), one, one, out_dtype=torch.bfloat16)
    assert [p.kernel for p in products] == ["_int_mm", "_scaled_mm"]
    assert torch.equal(products[0].out, y)
    for p in products:
        assert torch.equal(p.a.to(torch.int8), a)
        assert torch.equal(p.b.to(torch.int8), b.t())
        assert not p.added


def test_results_are_kept_as_they_were() -> None:
    watch, products = Watch(), []
    with watch:
        watch.start(products)
        y = torch.eye(2) @ torch.eye(2)
        y.mul_(5)
    assert torch.equal(products[0].out, torch.eye(2))


def probed(layer: nn.Linear, x: Tensor, run=None) -> LayerProbe:
    watch = Watch()
    probe = LayerProbe(layer, COUNTERS, watch)
    with watch:
        (layer(x) if run is None else run(layer, x)).backward(torch.full((2, 2), 3.0))
    probe.remove()
    return probe


def test_a_call_shows_its_edges_and_products() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(2, 4, requires_grad=True)
    (call,) = probed(layer, x).calls
    g = torch.full((2, 2), 3.0)
    expected = {
        "x": x,
        "weight": layer.weight,
        "bias": layer.bias,
        "y": x @ layer.weight.t() + layer.bias,
        "g": g,
        "dx": g @ layer.weight,
        "dW": g.t() @ x,
        "db": g.sum(0),
    }
    assert call.edges.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(call.edges[name], value.detach())
    assert call.needs_dx
    assert torch.equal(call.counters, COUNTERS)
    assert [p.kernel for p in call.forward] == ["addmm"]
    assert [p.kernel for p in call.backward] == ["mm", "mm"]
    torch.testing.assert_close(layer.weight.grad, expected["dW"].detach())
    torch.testing.assert_close(layer.bias.grad, expected["db"])
    torch.testing.assert_close(x.grad, expected["dx"].detach())


def test_counters_are_those_of_the_moment() -> None:
    layer, counters, watch = nn.Linear(4, 2), torch.tensor([1, 2, 3]), Watch()
    probe = LayerProbe(layer, counters, watch)
    layer(torch.ones(1, 4))
    counters[1] = 9
    layer(torch.ones(1, 4))
    probe.remove()
    assert [call.counters.tolist() for call in probe.calls] == [[1, 2, 3], [1, 9, 3]]


def test_parameters_are_those_of_the_moment() -> None:
    """Where they are sharded they are whole in the forward only, and their memory is used again."""
    layer, watch = nn.Linear(4, 2), Watch()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    probe = LayerProbe(layer, COUNTERS, watch)
    layer(torch.ones(2, 4))
    probe.remove()
    layer.weight.data.zero_()
    layer.bias.data.zero_()
    assert torch.equal(probe.calls[0].edges["weight"], weight)
    assert torch.equal(probe.calls[0].edges["bias"], bias)


def test_inputs_without_gradient_ask_for_none() -> None:
    (call,) = probed(nn.Linear(4, 2), torch.randn(2, 4)).calls
    assert not call.needs_dx
    assert "dx" not in call.edges
    layer, watch = nn.Linear(4, 2), Watch()
    probe = LayerProbe(layer, COUNTERS, watch)
    with torch.no_grad():
        layer(torch.ones(2, 4, requires_grad=True))
    probe.remove()
    assert not probe.calls[0].needs_dx
    assert probe.calls[0].edges.keys() == {"x", "weight", "bias", "y"}


def test_two_readers_of_one_tensor_are_told_apart() -> None:
    layer = nn.Linear(4, 2, bias=False)
    x = torch.randn(2, 4, requires_grad=True)
    probe = probed(layer, x, lambda m, t: m(t) + 2 * m(input=t))
    first, second = probe.calls
    torch.testing.assert_close(second.edges["dW"], 2 * first.edges["dW"])
    torch.testing.assert_close(second.edges["dx"], 2 * first.edges["dx"])
    torch.testing.assert_close(layer.weight.grad, 3 * first.edges["dW"])
    assert len(first.backward) == len(second.backward) == 2


def test_edges_are_kept_although_tensors_are_written_over() -> None:
    layer = nn.Linear(4, 2, bias=False)
    x = torch.ones(2, 4)

    def run(m: nn.Module, t: Tensor) -> Tensor:
        y = m(t * 1.0)
        return y.mul_(5)

    (call,) = probed(layer, x, run).calls
    torch.testing.assert_close(call.edges["y"], (x @ layer.weight.t()).detach())
    layer.weight.grad.zero_()
    assert call.edges["dW"].abs().sum() > 0


def test_matrices_are_float32_with_tokens_in_front() -> None:
    layer = nn.Linear(4, 2).to(torch.bfloat16)
    watch = Watch()
    probe = LayerProbe(layer, COUNTERS, watch)
    layer(torch.ones(3, 2, 4, dtype=torch.bfloat16)).sum().backward()
    probe.remove()
    call = probe.calls[0]
    assert call.matrix("y").shape == (6, 2)
    assert call.matrix("x").dtype == torch.float32
    assert call.matrix("db").shape == (1, 2)
    assert call.matrix("dx") is None


def test_an_exception_gives_the_parameters_back() -> None:
    class Failing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert not isinstance(self._parameters["weight"], nn.Parameter)
            raise KeyError

    layer, watch = Failing(4, 2), Watch()
    weight = layer.weight
    probe = LayerProbe(layer, COUNTERS, watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a hook raises after an exception becomes a warning
        with pytest.raises(KeyError):
            layer(torch.ones(1, 4))
    assert layer.weight is weight
    assert not watch.open
    assert "y" not in probe.calls[0].edges
    probe.remove()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_hook_in_front_that_raises_is_no_call() -> None:
    layer, watch = nn.Linear(4, 2), Watch()

    def refuse(*args: object) -> None:
        raise KeyError

    layer.register_forward_pre_hook(refuse)
    probe = LayerProbe(layer, COUNTERS, watch)
    with pytest.raises(KeyError):
        layer(torch.ones(1, 4))
    probe.remove()
    assert not probe.calls
    assert isinstance(layer._parameters["weight"], nn.Parameter)
