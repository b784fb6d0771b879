"""The numbers of a layer against the same computed by hand from its tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtrain.analysis.layer_statistics import grid_counts, layer_statistics, quantized_layers, weight_operand
from qtrain.nn.census import probed_step
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import (
    DgradRecipe,
    FpropRecipe,
    LinearRecipe,
    ModelRecipe,
    QuantSpec,
    WgradRecipe,
    dequantize,
    quantize,
)


def db(reference: torch.Tensor, seen: torch.Tensor) -> float:
    r, s = reference.double(), seen.double()
    return float(10 * torch.log10(r.square().sum() / (r - s).square().sum()))


def fq(x: torch.Tensor, spec: str) -> torch.Tensor:
    return dequantize(quantize(x, QuantSpec.of(spec)))


def probed(recipe: LinearRecipe, bias: bool = False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 3))
    x, target = torch.randn(7, 12), torch.randn(7, 3)
    report = apply_recipe(model, ModelRecipe(linear=recipe, exclude=("2",)), seed=3)
    seen = {}

    def probe(model):
        h = model[0](x)
        h.register_hook(lambda g: seen.update(g=g.clone()))
        seen["y"] = h.detach().clone()
        return F.mse_loss(model[2](torch.tanh(h)), target)

    probes = probed_step(model, report, probe)
    layer = quantized_layers(model)["0"]
    found, operands = layer_statistics("0", layer, layer.recipe, probes["0"])
    return found, operands, layer, x, seen


@pytest.mark.parametrize("bias", [False, True])
def test_w4a8_with_high_precision_gradients(bias):
    recipe = LinearRecipe(fprop=FpropRecipe(input="int8_row", weight="int4_row"))
    found, operands, layer, x, seen = probed(recipe, bias)
    w, g = layer.weight.detach(), seen["g"]
    assert set(operands) == {"0/fprop.input", "0/fprop.weight"}
    assert found["0/fprop.weight"]["sqnr_db"] == pytest.approx(db(w, fq(w, "int4_row")), abs=1e-3)
    assert found["0/fprop.input"]["sqnr_db"] == pytest.approx(db(x, fq(x, "int8_row")), abs=1e-3)
    y = fq(x, "int8_row") @ fq(w, "int4_row").t()
    assert found["0/y"]["sqnr_db"] == pytest.approx(db(x @ w.t(), y), abs=1e-2)
    # The gradients' own operands are in high precision
    assert found["0/dW"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["0/dW"]["sqnr_db"] > 100
    assert "sqnr_db" not in found["0/dgrad.grad_output"]
    d = g - g.mean()
    assert found["0/dgrad.grad_output"]["kurtosis"] == pytest.approx(
        float((d**4).mean() / (d**2).mean() ** 2), rel=1e-4
    )


def test_a_quantized_gradient_moves_dw_and_not_y():
    found, _, _, x, seen = probed(LinearRecipe(wgrad=WgradRecipe(grad_output="int4_tensor")))
    g = seen["g"]
    exact, seen_dw = g.t() @ x, fq(g.t(), "int4_tensor") @ x
    assert found["0/wgrad.grad_output"]["sqnr_db"] == pytest.approx(db(g, fq(g, "int4_tensor")), abs=1e-3)
    assert found["0/dW"]["sqnr_db"] == pytest.approx(db(exact, seen_dw), abs=1e-2)
    cos = F.cosine_similarity(seen_dw.flatten(), exact.flatten(), dim=0)
    assert found["0/dW"]["cosine"] == pytest.approx(float(cos), abs=1e-5)
    ratio = (seen_dw * exact).sum() / exact.square().sum()
    assert found["0/dW"]["alignment"] == pytest.approx(float(ratio), abs=1e-5)
    noise = (seen_dw - exact).std(correction=0) * 3**0.5
    assert found["0/dW"]["noise_floor"] == pytest.approx(float(exact.std(correction=0) / noise), rel=1e-4)
    assert found["0/y"]["sqnr_db"] > 100


def test_the_forwards_operand_in_a_backward_gemm_has_its_numbers():
    recipe = LinearRecipe(
        fprop=FpropRecipe(weight="int4_row"), dgrad=DgradRecipe(grad_output="int8_row", weight="fprop")
    )
    found, *_ = probed(recipe)
    for metric in ("sqnr_db", "underflow", "saturated"):
        assert found["0/dgrad.weight"][metric] == found["0/fprop.weight"][metric]


def test_a_weight_as_fprop_reads_it():
    *_, layer, _, _ = probed(LinearRecipe(fprop=FpropRecipe(input="int8_row", weight="int4_row")))
    other = layer.weight.detach() * 3 + 0.1
    operand = weight_operand(layer, other)
    torch.testing.assert_close(operand.multiplied, fq(other, "int4_row"), rtol=1e-6, atol=0)
    counts, edges = grid_counts(operand)
    assert len(counts) == 16
    assert float(counts.sum()) == other.numel()
    assert (float(edges[0]), float(edges[-1])) == (-8, 7)
    stochastic = QuantSpec.of("int4_row_sr")
    *_, layer, _, _ = probed(LinearRecipe(fprop=FpropRecipe(weight=stochastic)))
    # The same bits for any weight: one that did not move flips nothing
    a, b = weight_operand(layer, other), weight_operand(layer, other)
    assert torch.equal(a.values, b.values)
