"""Layers that own the activation in front of them: the same bits, less memory, and where that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from census_models import assert_fails, loss_of
from layer_recipes import LAYERS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qtrain.nn.prologue as room
from qtrain.models.decoder import ACTIVATIONS, Activation
from qtrain.models.gpt import GPTConfig
from qtrain.models.llama import LlamaConfig
from qtrain.nn import apply_recipe, take_census
from qtrain.nn.prologue import FUNCTIONS, Deferred, Prologue, sites
from qtrain.quant import ModelRecipe

SHAPE: dict[str, Any] = {"vocab_size": 64, "sequence_tokens": 16, "layers": 1, "heads": 2, "width": 32}


def model_of(kind: str, activation: str = "silu") -> nn.Module:
    if kind == "gpt":
        return GPTConfig(**SHAPE, activation=activation, bias=True).build(seed=0)
    return LlamaConfig(**SHAPE, mlp_width=56, activation=activation).build(seed=0)


def converted(
    kind: str, recipe: str, *, recompute: bool, compute: str = "native", activation: str = "silu"
) -> Any:
    model = model_of(kind, activation)
    report = apply_recipe(
        model, ModelRecipe(linear=LAYERS[recipe], compute=compute, recompute_activations=recompute), seed=5
    )
    report.clock.set(step=7, token_offset=320)
    return model, report


def test_the_functions_are_those_of_the_models() -> None:
    assert set(FUNCTIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_value_and_gradients_are_autograds_to_the_bit(name: str, dtype: torch.dtype, gated: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    h, up, dx = (3 * torch.randn(40, 50, generator=generator) for _ in range(3))
    h[0, :4] = torch.tensor([0.0, -0.0, 90.0, -90.0])
    h, up, dx = h.to(dtype).requires_grad_(), up.to(dtype).requires_grad_(), dx.to(dtype)
    x = ACTIVATIONS[name](h) * up if gated else ACTIVATIONS[name](h)
    expected = torch.autograd.grad(x, (h, up) if gated else (h,), dx)
    prologue = Prologue(name)
    with torch.no_grad():
        assert torch.equal(prologue.value(h, up if gated else None), x)
        dh, dup = prologue.gradients(dx, h, up if gated else None)
    assert torch.equal(dh, expected[0])
    assert dup is None if not gated else torch.equal(dup, expected[1])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_autocast_on_cuda_keeps_the_dtype_of_activations(name: str, gated: bool) -> None:
    """By its own rules, on tensors without numbers. It computes a pow, such as square(), in float32: then a layer that
    owns its activation, which runs without autocast, would round where one that does not would not."""
    on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            h = torch.empty(4, 6, device="cuda", dtype=torch.bfloat16)
            assert h.square().dtype == torch.float32
            up = h.clone() if gated else None
            assert Activation(name)(h, up).dtype == Prologue(name).value(h, up).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", on)


def gradients(model: nn.Module, dtype: str) -> list[torch.Tensor]:
    model.zero_grad()
    loss = loss_of(dtype)(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("compute", ["native", "simulated"])
@pytest.mark.parametrize("recipe", ["int8_reused", "saved_stochastic", "tensor_reused"])
@pytest.mark.parametrize(("kind", "activation"), [("gpt", "gelu"), ("gpt", "relu2"), ("llama", "silu")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_model_computes_the_same_bits(
    kind: str, activation: str, recipe: str, compute: str, dtype: str
) -> None:
    found = []
    for recompute in (False, True):
        model, _ = converted(kind, recipe, recompute=recompute, compute=compute, activation=activation)
        assert isinstance(model.blocks[0].mlp.activation, Deferred) == recompute
        found.append(gradients(model, dtype))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("recipe", ["clipped", "mxfp4_saved", "weight_int8"])
def test_simulated_recipes_of_other_kinds_too(recipe: str) -> None:
    found = []
    for recompute in (False, True):
        found.append(
            gradients(converted("llama", recipe, recompute=recompute, compute="simulated")[0], "bf16")
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_compiled(kind: str, backend: str) -> None:
    torch.compiler.reset()
    model, _ = converted(kind, "int8_reused", recompute=True)
    eager = gradients(model, "bf16")
    model.compile(fullgraph=True, backend=backend)
    for a, b in zip(eager, gradients(model, "bf16"), strict=True):
        assert (a - b).norm() <= (1e-6 if backend == "aot_eager" else 0.05) * a.norm()


def test_checkpointed_blocks_give_the_same_bits() -> None:
    model, _ = converted("llama", "saved_stochastic", recompute=True)
    plain = gradients(model, "bf16")
    model.set_activation_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, "bf16"), strict=True))


def test_a_frozen_weight_and_an_input_without_gradient() -> None:
    model, _ = converted("llama", "int8_reused", recompute=True)
    plain = gradients(model, "fp32")
    down = model.blocks[0].mlp.down
    down.weight.requires_grad_(False)
    frozen = gradients(model, "fp32")
    names = [n for n, _ in model.named_parameters()]
    for name, a, b in zip(names, plain[1:], frozen[1:], strict=True):
        assert b is None if name.endswith("down.weight") else torch.equal(a, b), name
    down.weight.requires_grad_(True)
    gate, up = torch.randn(3, 56), torch.randn(3, 56)
    down((gate, up)).sum().backward()
    assert down.weight.grad is not None


@pytest.mark.parametrize("compute", ["native", "simulated"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_census_sees_through_it(kind: str, compute: str, dtype: str) -> None:
    model, report = converted(kind, "int8_reused", recompute=True, compute=compute)
    census = take_census(model, report, loss_of(dtype))
    assert census.failures() == []
    down = [o for o in census.observations if o.layer == "blocks.0.mlp.down"]
    assert {"fprop.input", "wgrad.input", "dx", "dW"} <= {o.name for o in down}


def test_a_wrong_derivative_fails_the_census(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FUNCTIONS["silu"]
    model, report = converted("llama", "int8_reused", recompute=True)
    from qtrain.nn import native

    class Wrong(Prologue):
        def gradients(self, dx: Any, h: Any, up: Any) -> Any:
            dh, dup = super().gradients(dx, h, up)
            return dup, dh

    layer = model.blocks[0].mlp.down
    forward = native.NativeLinear.apply
    monkeypatch.setattr(
        native.NativeLinear, "apply", lambda *a: forward(*a[:9], a[9] and Wrong("silu"), *a[10:])
    )
    assert_fails(take_census(model, report, loss_of("fp32")), layer="mlp.down", name="dx")
    assert room.FUNCTIONS["silu"] is right
    assert layer.prologue == Prologue("silu")


def test_it_is_taken_back() -> None:
    model, report = converted("llama", "int8_reused", recompute=True)
    assert [layer.name for layer in report.layers if layer.recomputes] == ["blocks.0.mlp.down"]
    assert "recomputed, native" in str(report)
    assert "of silu" in str(model.blocks[0].mlp.down)
    keys = set(model.state_dict())
    apply_recipe(
        model, ModelRecipe(linear=LAYERS["int8_reused"], compute="native", recompute_activations=True)
    )
    assert type(model.blocks[0].mlp.activation.deferred).__name__ == "Activation"
    apply_recipe(model, ModelRecipe())
    assert type(model.blocks[0].mlp.activation).__name__ == "Activation"
    assert type(model.blocks[0].mlp.down) is nn.Linear
    assert set(model.state_dict()) == keys == set(model_of("llama").state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(model, "bf16"), gradients(model_of("llama"), "bf16"), strict=True)
    )


def test_where_there_is_nothing_to_own() -> None:
    normed = LlamaConfig(**SHAPE, mlp_width=56, sub_norm=True).build(seed=0)
    assert sites(normed) == {}
    recipe = ModelRecipe(linear=LAYERS["int8_reused"], recompute_activations=True)
    for model in (normed, nn.Sequential(nn.Linear(8, 8))):
        with pytest.raises(
            ValueError, match=r"recompute_activations=true: .* has no quantized layer that alone reads"
        ):
            apply_recipe(model, recipe)
    excluded = ModelRecipe(linear=LAYERS["int8_reused"], recompute_activations=True, exclude=["*.down"])
    with pytest.raises(ValueError, match="recompute_activations=true"):
        apply_recipe(model_of("llama"), excluded)
    with pytest.raises(TypeError, match="recompute_activations=1: allowed are true and false"):
        ModelRecipe(recompute_activations=1)  # type: ignore[arg-type]
