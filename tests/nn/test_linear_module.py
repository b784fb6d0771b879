"""QuantizedLinear as a module: compile, copies, checkpoints, devices."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_recipes import LAYERS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qtrain.nn import Clock, QuantizedLinear
from qtrain.quant import LinearRecipe


def make(
    name: str, *, bias: bool = True, clock: Clock | None = None, layer: str = "layer"
) -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=bias)
    return QuantizedLinear.convert(linear, LinearRecipe(**LAYERS[name]), name=layer, clock=clock or Clock(5))


def gradients(layer: nn.Module, module: nn.Module, autocast: bool = False) -> list[Tensor]:
    """y, dx and the gradients of ``module``'s parameters, through ``layer`` (module itself or compiled)."""
    module.zero_grad()
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        ("int8_reused", True),
        ("paper_w8a8g8", False),
        ("quest", True),
        ("nvfp4", False),
        ("saved_reused", False),
    ],
)
def test_compiled_with_aot_eager_is_the_eager_layer_bit_for_bit(name: str, autocast: bool) -> None:
    torch._dynamo.reset()
    layer = make(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in (3, 4):
        layer.clock.set(step=step, token_offset=step * 16)
        eager = gradients(layer, layer, autocast)
        traced = gradients(compiled, layer, autocast)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_the_clock_moves_on_without_another_compilation() -> None:
    torch._dynamo.reset()
    layer = make("w4a8")
    layer.recipe = LinearRecipe(fprop={"input": "int4_row_sr"})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    seen = set()
    for step in range(3):
        layer.clock.set(step=step, token_offset=step)
        with torch.no_grad():
            seen.add(float(compiled(torch.linspace(-1, 1, 64).reshape(2, 32)).sum()))
    assert counter.frame_count == 1
    assert len(seen) == 3


@pytest.mark.inductor
def test_compiled_with_inductor_quantizes_alike() -> None:
    """Fusing may flip codes at a threshold: the two lie 100 times closer than the quantization moves them."""
    torch._dynamo.reset()
    layer, plain = make("int8_reused"), nn.Linear(32, 16)
    plain.load_state_dict(layer.state_dict())
    eager, unquantized = gradients(layer, layer), gradients(plain, plain)
    compiled = gradients(torch.compile(layer, fullgraph=True), layer)
    for e, c, u in zip(eager[:3], compiled[:3], unquantized[:3], strict=True):
        assert (e - c).norm() < 0.01 * (e - u).norm()


def test_state_dict_has_the_keys_of_nn_linear() -> None:
    for bias in (True, False):
        layer, plain = make("nvfp4", bias=bias), nn.Linear(32, 16, bias=bias)
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert not list(layer.buffers())
        layer.load_state_dict(plain.state_dict())
        plain.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_compute_alike_and_share_one_clock_of_their_own(through) -> None:
    clock = Clock(5)
    model = nn.Sequential(make("saved_stochastic", clock=clock, layer="0"), nn.Linear(16, 32))
    QuantizedLinear.convert(model[1], LinearRecipe(**LAYERS["saved_stochastic"]), name="1", clock=clock)
    clock.set(step=3)
    if through == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = through(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, model), gradients(twin, twin), strict=True))
    assert twin[0].clock is twin[1].clock
    assert twin[0].clock is not clock
    assert (twin[0].recipe, twin[0].name, twin[0].stream) == (model[0].recipe, "0", model[0].stream)
    clock.set(step=4)
    assert int(twin[0].clock.counters[1]) == 3


def test_moving_a_model_keeps_its_clock_shared() -> None:
    clock = Clock(5)
    model = nn.Sequential(make("nvfp4", clock=clock), make("nvfp4", clock=clock, layer="1"))
    assert model.to(torch.bfloat16) is model
    assert clock.counters.dtype == torch.int64
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].clock is model[1].clock is clock
    model.to("meta")
    assert clock.counters.device.type == "cpu"


@pytest.mark.gpu
def test_the_clock_follows_to_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = make("nvfp4")
    cpu = gradients(layer, layer)
    layer.to("cuda")
    assert layer.clock.counters.device.type == "cuda"
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(y.cpu(), cpu[0], rtol=1e-3, atol=1e-3)


def test_converting_brings_the_clock_to_the_weights_and_meta_leaves_it() -> None:
    clock = Clock()
    with torch.device("meta"):
        linear = nn.Linear(4, 4)
    QuantizedLinear.convert(linear, LinearRecipe(**LAYERS["w4a8"]), name="up", clock=clock)
    assert clock.counters.device.type == "cpu"


def test_convert_and_revert_are_in_place() -> None:
    linear = nn.Linear(32, 16)
    weight, bias, state = linear.weight, linear.bias, dict(vars(linear))
    fired = []
    linear.register_forward_hook(lambda *_: fired.append(1))
    layer = QuantizedLinear.convert(linear, LinearRecipe(**LAYERS["w4a8"]), name="up", clock=Clock())
    assert layer is linear
    assert layer.weight is weight
    assert layer.bias is bias
    assert isinstance(layer, nn.Linear)
    layer(torch.ones(2, 32))
    assert fired == [1]
    layer.revert()
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == state.keys()
    layer(torch.ones(2, 32))
    assert fired == [1, 1]


def test_repr_shows_what_is_quantized() -> None:
    assert repr(make("w4a8")) == (
        "QuantizedLinear(in_features=32, out_features=16, bias=True, fprop.input=int8 row, fprop.weight=int4 row)"
    )
    layer = make("w4a8")
    layer.recipe = LinearRecipe()
    assert repr(layer).endswith("bias=True, high precision)")
    assert "dgrad.weight=fprop" in repr(make("int8_reused"))
