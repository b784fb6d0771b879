"""Sharing of codes: where their bits are equal, and nowhere else; in eager and in compiled code."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import Tensor, nn

from qtrain.nn import apply_recipe
from qtrain.nn.shared_codes import SharedCodes
from qtrain.quant import ModelRecipe, QuantSpec

ROW, COARSE, RANDOM = (QuantSpec.parse(name) for name in ("int8_row", "int4_row", "int8_row_sr"))


class Siblings(nn.Module):
    """Three layers of one x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, 48, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def recipe(row: str = "int8_row", **changes: Any) -> ModelRecipe:
    linear = {
        "fprop": {"input": row, "weight": "int8_row"},
        "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
        "saved": "quantized",
        **changes,
    }
    return ModelRecipe(linear=linear, compute="native")


def reads_of(x: Tensor, run: Callable[[], Any]) -> int:
    """How many times ``run`` quantizes a matrix of the shape of x."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is quantize_rows_columns.overload and args[0].shape == x.shape:
                self.reads += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.reads


def test_siblings_read_once_and_give_the_bits_of_layers_alone() -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model, alone = Siblings(), Siblings()
    apply_recipe(model, recipe())
    apply_recipe(alone, recipe())
    for layer in (alone.q, alone.k, alone.v):
        layer.shared = None
    found = []
    for each in (model, alone):
        x.grad = None
        y = each(x)
        y.sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in each.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert reads_of(x, lambda: model(x.clone())) == 1
    assert reads_of(x, lambda: alone(x.clone())) == 3


def test_the_backward_shares_too_where_x_itself_is_saved() -> None:
    x = torch.randn(40, 32).requires_grad_()
    model = Siblings()
    apply_recipe(model, recipe(saved="high_precision"))
    y, alone = model(x).sum(), model.q(x.clone())
    assert model.q.shared is not None
    model.q.shared._forget(None)
    assert reads_of(x, y.backward) == 1
    assert reads_of(x, alone.sum().backward) == 1


@pytest.mark.parametrize("changes", [{"row": "int8_row_sr"}, {}])
def test_a_step_in_between_is_seen(changes: dict[str, str]) -> None:
    model = Siblings()
    apply_recipe(model, recipe(**changes))
    x = torch.randn(40, 32)
    first = model.q(x)
    x.mul_(3.0)
    assert not torch.allclose(model.q(x), first)
    assert torch.allclose(model.q(x), 3 * first, rtol=0.05, atol=0.05)


def test_stochastic_siblings_draw_their_own_bits() -> None:
    x = torch.randn(40, 32)
    model = Siblings()
    apply_recipe(model, recipe("int8_row_sr"))
    assert reads_of(x, lambda: model(x)) == 3
    model.k.weight.data.copy_(model.q.weight.data)
    assert not torch.equal(model.q(x), model.k(x))


def test_what_makes_bits_differ_is_not_shared() -> None:
    shared, x = SharedCodes(), torch.randn(6, 4)
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    def of(x: Tensor, specs: tuple[QuantSpec | None, ...], reader: object = None) -> int:
        return shared.of(x, specs, make, reader or object())

    assert (of(x, (ROW, None)), of(x, (ROW, None))) == (0, 0)
    assert of(x.view(6, 4), (ROW, None)) == 0, "a view of the same numbers"
    assert of(x, (None, ROW)) == 1, "along the other axis"
    assert of(x, (COARSE, None)) == 2
    assert of(x.t(), (COARSE, None)) == 3
    assert of(x[:3], (COARSE, None)) == 4
    x.add_(0.0)
    assert of(x[:3], (COARSE, None)) == 5, "written to"
    assert of(x.clone(), (COARSE, None)) == 6
    assert [of(x, (RANDOM, None)) for _ in range(2)] == [7, 8]
    with torch.inference_mode():
        y = torch.ones(2, 2)
        assert [of(y, (ROW, None)) for _ in range(2)] == [9, 10]


def test_a_reader_that_asks_again_gets_codes_made_anew() -> None:
    """Numpy, like collectives and CUDA graphs, writes without a new version."""
    shared, x = SharedCodes(), torch.zeros(6, 4)

    def read(*readers: str) -> list[float]:
        return [shared.of(x, (ROW, None), lambda: float(x.sum()), reader) for reader in readers]

    version = x._version
    assert read("q", "k") == [0.0, 0.0]
    x.numpy()[:] = 1.0
    assert x._version == version
    assert read("v", "q", "k", "v") == [0.0, 24.0, 24.0, 24.0]


@pytest.mark.parametrize("saved", ["quantized", "high_precision"])
def test_a_buffer_that_is_filled_again_without_a_new_version_is_quantized_again(saved: str) -> None:
    model, x = Siblings(), torch.randn(40, 32)
    apply_recipe(model, recipe(saved=saved))

    def step(x: Tensor) -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    first = step(x)
    x.numpy()[:] = torch.randn(40, 32).numpy()
    second = step(x)
    assert not torch.equal(second[0], first[0])
    assert all(torch.equal(a, b) for a, b in zip(second, step(x.clone()), strict=True))


def test_codes_go_when_their_tensor_goes() -> None:
    shared, x = SharedCodes(), torch.randn(6, 4)
    shared.of(x, (ROW, None), lambda: "codes", "q")
    assert shared._codes == "codes"
    del x
    gc.collect()
    assert shared._codes is None
    # Another tensor at the same address is another tensor
    y = torch.randn(6, 4)
    assert shared.of(y, (ROW, None), lambda: "others", "k") == "others"


def test_models_are_copied() -> None:
    model, x = Siblings(), torch.randn(40, 32)
    apply_recipe(model, recipe())
    y = model(x)
    other = copy.deepcopy(model)
    assert other.q.shared is other.k.shared is not model.q.shared
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("saved", ["quantized", "high_precision"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_siblings_quantize_and_keep_one(backend: str, saved: str) -> None:
    """One node of the graph; what the partitioner keeps of x is one tensor."""
    torch.compiler.reset()
    model = Siblings()
    apply_recipe(model, recipe(saved=saved))
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    eager = model(x)
    (expected,) = torch.autograd.grad(eager.square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    before = quantize_rows_columns.calls
    y = compiled(x)
    assert quantize_rows_columns.calls - before == 1 + 3, "x once, three weights"
    assert torch.equal(y, eager)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.allclose(dx, expected, rtol=1e-5, atol=1e-5)
    assert quantize_rows_columns.calls - before == 4 + 6, "three gradients, three weights again; x not"
