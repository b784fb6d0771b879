"""Ranges with a state against plain autograd and lists in Python."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qtrain.nn import (
    CensusError,
    advance_ranges,
    apply_recipe,
    compare_compiled,
    follow_optimizer,
    simulated,
    start_steps,
    take_census,
)
from qtrain.nn.quantizers import quantizers_of
from qtrain.optim import parameter_groups
from qtrain.quant import LinearRecipe, ModelRecipe, QuantSpec, fake_quantize, quantize
from qtrain.quant.transforms import _sylvester

FPROP_ONLY = {"dgrad": {"weight": "fprop"}, "wgrad": {"input": "fprop"}}


def layer_of(i: int = 8, o: int = 6, *, seed: int = 0, **gemms) -> tuple[nn.Sequential, object]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(i, o))
    return model, apply_recipe(model, ModelRecipe(linear=LinearRecipe(**gemms)))


def followed(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    follow_optimizer(model, optimizer)
    return optimizer


# --- learned steps ----------------------------------------------------------------------------------------------


def through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def lsq(x: torch.Tensor, s: torch.Tensor, low: float, high: float, c: float) -> torch.Tensor:
    """LSQ as its paper writes it (algorithm in appendix): gradient scale, clip, straight-through round."""
    s = s * c + (s * (1 - c)).detach()
    v = torch.clamp(x / s, low, high)
    return through(v, v.round()) * s


def seq(x: torch.Tensor, a: torch.Tensor, k: float, shift: float) -> torch.Tensor:
    """ParetoQ's stretched elastic quantization; the step's gradient is that of a * q with q straight through."""
    u = torch.clamp(x / a, -1, 1)
    inner = torch.clamp(x / a, -0.99, 0.99) * k - shift
    q = (inner.round() + shift) / k
    # where clipped, q stands alone; else q - u, which through() gives
    return a * torch.where((x / a).abs() <= 1, through(u, q), q.detach())


@pytest.mark.parametrize("transform", [None, "hadamard:4"])
@pytest.mark.parametrize("saved", ["high_precision", "quantized"])
def test_lsq_in_a_layer_is_plain_autograd(transform, saved):
    gemms = {
        "fprop": {"input": "int4_tensor_learned", "weight": "int3_row_learned", "transform": transform},
        **FPROP_ONLY,
    }
    model, _ = layer_of(8, 6, saved=saved, **gemms)
    layer = model[0]
    x = torch.randn(10, 8, requires_grad=True)
    start_steps(model, lambda m: m(x * 0.7))  # so that some of x is clipped
    states = layer.quantizers.by_operand()
    assert states["fprop.weight"].step.shape == (6, 1)
    assert states["fprop.input"].step.shape == (1, 1)
    g = torch.randn(10, 6)
    model(x).backward(g)

    h = torch.eye(8) if transform is None else torch.block_diag(*[_sylvester(4)] * 2)
    x2, w = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    sx, sw = (states[n].step.detach().clone().requires_grad_() for n in ("fprop.input", "fprop.weight"))
    xq = lsq(x2 @ h, sx, -8, 7, 1 / math.sqrt(8 * 7))
    wq = lsq(w @ h, sw, -4, 3, 1 / math.sqrt(8 * 3))
    (xq @ wq.t() + layer.bias.detach()).backward(g)
    for got, want in (
        (x.grad, x2.grad),
        (layer.weight.grad, w.grad),
        (states["fprop.input"].step.grad, sx.grad),
        (states["fprop.weight"].step.grad, sw.grad),
    ):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert (x2.grad == 0).any() or transform is not None  # something was clipped


@pytest.mark.parametrize(
    ("spec", "k", "shift"), [("ternary_row_learned_seq", 1.5, 0.0), ("midrise2_row_learned_seq", 2.0, 0.5)]
)
def test_seq_is_paretoq_s(spec, k, shift):
    """Our step is their a / k: gradients to a are ours over k, up to the scale 1 / sqrt(n max)."""
    model, _ = layer_of(16, 5, fprop={"weight": spec}, dgrad={"weight": "fprop"})
    start_steps(model, lambda m: m(torch.zeros(1, 16)))
    layer, state = model[0], model[0].quantizers.by_operand()["fprop.weight"]
    with torch.no_grad():
        layer.weight.mul_(3.0)  # some beyond the end of the range
    x, g = torch.randn(7, 16), torch.randn(7, 5)
    y = model(x)
    y.backward(g)
    w = layer.weight.detach().clone().requires_grad_()
    a = (state.step.detach() * k).requires_grad_()
    want = x @ seq(w, a, k, shift).t() + layer.bias.detach()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    want.backward(g)
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-4, atol=1e-5)
    top = 1.0 if spec.startswith("ternary") else 1.5
    torch.testing.assert_close(state.step.grad, a.grad * k / math.sqrt(16 * top), rtol=1e-4, atol=1e-5)
    assert 0.1 < float((w.grad == 0).float().mean()) < 0.9


def test_the_step_of_a_sign_has_the_sign_s_own_derivative():
    """a * sign(w) is smooth in a: central differences."""
    model, _ = layer_of(12, 4, fprop={"weight": "sign_row_learned_seq"}, dgrad={"weight": "fprop"})
    start_steps(model, lambda m: m(torch.zeros(1, 12)))
    state, x = model[0].quantizers.by_operand()["fprop.weight"], torch.randn(9, 12)
    # it begins at the best for a Gaussian, sqrt(2 / pi) of the root mean square
    rms = model[0].weight.detach().square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(state.step.detach(), rms * math.sqrt(2 / math.pi), rtol=1e-4, atol=0)
    model(x).square().sum().backward()
    for row in range(4):
        ends = []
        for e in (1e-3, -1e-3):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved[0].quantizers.by_operand()["fprop.weight"].step[row] += e
                ends.append(moved(x).double().square().sum())
        slope = (ends[0] - ends[1]) / 2e-3
        assert state.step.grad[row].item() * math.sqrt(12) == pytest.approx(slope.item(), rel=1e-3)


def test_a_step_learns_the_range_that_fits():
    """Minimising |W x - Q(W) x|^2 over the steps alone, from a bad beginning, halves the error twice."""
    model, _ = layer_of(32, 8, fprop={"weight": "int3_row_learned"})
    start_steps(model, lambda m: m(torch.zeros(1, 32)))
    step = model[0].quantizers.by_operand()["fprop.weight"].step
    with torch.no_grad():
        step.mul_(4.0)
    x = torch.randn(256, 32)
    target = (x @ model[0].weight.t() + model[0].bias).detach()
    optimizer = torch.optim.Adam([step], lr=2e-3)
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_steps_are_parameters_without_decay():
    model, _ = layer_of(fprop={"weight": "int4_row_learned"})
    groups = parameter_groups(model, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay["0.quantizers.fprop.weight.step"] == 0.0
    assert decay["0.weight"] == 0.1


def test_a_step_that_has_not_begun_is_said():
    model, _ = layer_of(fprop={"input": "int4_tensor_learned"})
    with pytest.raises(
        RuntimeError, match=r"0: the learned step of fprop.input has not begun; call qtrain.nn.start_steps"
    ):
        model(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="the probe did not run 0, whose learned steps"):
        start_steps(model, lambda m: None)
    start_steps(model, lambda m: m(torch.ones(2, 8)))
    begun = model.state_dict()
    start_steps(model, lambda m: m(torch.ones(2, 8) * 9))  # nothing: it has begun
    assert torch.equal(
        model.state_dict()["0.quantizers.fprop.input.step"], begun["0.quantizers.fprop.input.step"]
    )
    other, _ = layer_of(seed=1, fprop={"input": "int4_tensor_learned"})
    other.load_state_dict(begun)
    torch.testing.assert_close(other(torch.ones(2, 8)), model(torch.ones(2, 8)))


# --- maxima of the past -----------------------------------------------------------------------------------------


def test_delayed_scaling_uses_the_maxima_of_past_steps():
    """Against a list in Python: 3 micro-batches a step, a history of 2 steps; the first step has its own maximum."""
    model, _ = layer_of(4, 4, fprop={"input": "int8_tensor_delayed2"})
    optimizer = followed(model, lr=0.0)
    past: list[float] = []
    for step in range(5):
        maxima = []
        for micro in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + micro)) * (
                1 + 3 * (step == 1)
            )
            y = model(x)
            own = x.abs().max().item()
            scale = torch.tensor((max(past) if past else own) / 127)
            want = (x / scale).round().clamp(-128, 127) * scale @ model[0].weight.t() + model[0].bias
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
            y.sum().backward()
            maxima.append(own)
        optimizer.step()
        past = [max(maxima), *past][:2]
        history = model[0].quantizers.by_operand()["fprop.input"].history.flatten().tolist()
        assert history[: len(past)] == pytest.approx(past)
    assert past[1] > past[0] / 10


def test_the_gradient_s_range_is_noted_in_the_backward():
    spec = {"dgrad": {"grad_output": "e5m2_tensor_delayed4"}, "wgrad": {"grad_output": "int8_row_static2"}}
    model, _ = layer_of(4, 3, **spec)
    optimizer = followed(model, lr=0.0)
    for step in range(4):
        x, g = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3) * 2.0**step
        model(x).backward(g)
        optimizer.step()
        state = model[0].quantizers.by_operand()
        assert state["dgrad.grad_output"].history[0].item() == g.abs().max()
        static = state["wgrad.grad_output"]
        if step < 2:
            calibrated = torch.maximum(static.amax, g.abs().amax(0)[:, None])
            assert torch.equal(static.amax, calibrated)
        assert static.steps == min(step + 1, 2)
    # frozen after two steps: the gradient of the fourth is clipped to the range of the second
    assert torch.equal(static.amax, calibrated)
    assert g.abs().max() > 2 * calibrated.max()
    model[0].weight.grad = None
    x = torch.eye(4)[:1].expand(6, 4).contiguous()
    model(x).backward(g)
    scale = calibrated / 127
    want = ((g.t() / scale).round().clamp(-128, 127) * scale) @ x
    torch.testing.assert_close(model[0].weight.grad, want, rtol=1e-5, atol=1e-5)


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


STATEFUL = {
    "fprop": {"input": "int4_tensor_delayed3", "weight": "int4_row_learned"},
    "dgrad": {"grad_output": "e5m2_tensor_delayed3", "weight": "fprop"},
    "wgrad": {"grad_output": "int8_row_static2", "input": "fprop"},
}


def two_layers(recipe: dict) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    apply_recipe(model, ModelRecipe(linear=LinearRecipe(**recipe)))
    return model


def three_steps(model: nn.Module, run, first: int = 0, last: int = 3) -> list[float]:
    """Two micro-batches a step, then the optimizer."""
    optimizer = followed(model, lr=0.05)
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        for micro in range(2):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2 * step + micro))
            loss = run(x.requires_grad_()).square().sum()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def begun(recipe: dict = STATEFUL) -> nn.Sequential:
    model = two_layers(recipe)
    start_steps(model, lambda m: m(torch.randn(6, 8, generator=torch.Generator().manual_seed(99))))
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_changes_nothing(use_reentrant):
    plain, recomputed = begun(), begun()
    losses = three_steps(plain, plain)
    assert three_steps(recomputed, Recomputed(recomputed, use_reentrant)) == losses
    for (name, a), b in zip(plain.state_dict().items(), recomputed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    history = plain[0].quantizers.by_operand()["dgrad.grad_output"].history
    assert (history > 0).all()  # one entry a step, not one a micro-batch or a recomputation


def test_a_resumed_run_is_bitwise_the_same():
    whole, first = begun(), begun()
    three_steps(whole, whole, 0, 4)
    three_steps(first, first, 0, 2)
    saved = copy.deepcopy(first.state_dict())
    second = two_layers(STATEFUL)
    second.load_state_dict(saved)
    three_steps(second, second, 2, 4)
    assert whole.state_dict().keys() == second.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_compiled_in_one_graph():
    eager, compiled = begun(), begun()
    losses = three_steps(eager, eager)
    got = three_steps(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert got == pytest.approx(losses, rel=1e-5)
    for (name, a), b in zip(eager.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "gemms", [{"input": "int8_tensor_delayed2"}, {"weight": "int4_row_learned"}, STATEFUL["fprop"]]
)
def test_compiled_without_a_gradient(gemms):
    """Dynamo then traces the Function's forward alone."""
    model, _ = layer_of(fprop=gemms)
    start_steps(model, lambda m: m(torch.ones(2, 8)))
    x = torch.randn(4, 8)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, model(x))


def test_under_autocast():
    """In bfloat16: ranges are float32 maxima of what arrives, steps have float32 gradients."""
    model = begun()
    with torch.autocast("cpu", torch.bfloat16):
        losses = three_steps(model, model)
    for q in model[0].quantizers.by_operand().values():
        assert all(t.dtype in (torch.float32, torch.int64) for t in q.state_dict().values())
    assert model[0].quantizers.by_operand()["fprop.weight"].step.grad.dtype == torch.float32
    assert losses == pytest.approx(three_steps(m := begun(), m), rel=0.1)


def test_without_a_gradient_nothing_is_noted():
    model = begun()
    followed(model)
    with torch.no_grad():
        model(torch.randn(6, 8))
    advance_ranges(model)
    assert not model[0].quantizers.by_operand()["fprop.input"].history.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_and_not_kept(bad):
    model, _ = layer_of(4, 4, fprop={"input": "int8_tensor_delayed2"})
    optimizer = followed(model, lr=0.0)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    x = torch.ones(2, 4)
    x[0, 1] = bad
    y = model(x)
    assert y.isnan().all()  # one range for the tensor, whose past is finite
    y.sum().backward()
    optimizer.step()
    assert model[0].quantizers.by_operand()["fprop.input"].history.isfinite().all()


def test_ranges_need_somebody_who_advances_them():
    model, _ = layer_of(fprop={"input": "int8_tensor_delayed2"})
    with pytest.raises(RuntimeError, match=r"0: the range of fprop.input advances with .*follow_optimizer"):
        model(torch.ones(2, 8))
    with torch.no_grad():
        model(torch.ones(2, 8))
    followed(model)
    model(torch.ones(2, 8))


# --- the layer and its surgery ----------------------------------------------------------------------------------


def test_checkpoint_keys():
    model, _ = layer_of(fprop={"input": "int8_row", "weight": "int4_row"})
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    apply_recipe(model, ModelRecipe(linear=LinearRecipe(**STATEFUL)))
    assert list(model.state_dict()) == [
        "0.weight",
        "0.bias",
        "0.quantizers.fprop.input.history",
        "0.quantizers.fprop.weight.step",
        "0.quantizers.dgrad.grad_output.history",
        "0.quantizers.wgrad.grad_output.amax",
        "0.quantizers.wgrad.grad_output.steps",
    ]
    apply_recipe(model, ModelRecipe(linear=LinearRecipe(fprop={"weight": "int4_row"})))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    apply_recipe(model, ModelRecipe())
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("gemms", "message"),
    [
        ({"fprop": {"input": "int8_row_delayed4"}}, "allowed are tensor and column"),
        ({"fprop": {"input": "int8_group4_static"}}, "allowed are tensor and column"),
        ({"wgrad": {"grad_output": "int8_column_delayed4"}}, "allowed are tensor and row"),
        (
            {"dgrad": {"grad_output": "int8_tensor_learned"}},
            "a step is learned for fprop.input and fprop.weight only",
        ),
    ],
)
def test_states_that_a_layer_cannot_hold(gemms, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**gemms)


def test_a_weight_on_meta_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="needs a weight in memory"):
        apply_recipe(model, ModelRecipe(linear=LinearRecipe(fprop={"weight": "int4_row_learned"})))


def test_outside_of_layers_they_are_refused():
    for use in (fake_quantize, quantize):
        with pytest.raises(ValueError, match=r"clip='learned' has a state, which a quantized layer holds"):
            use(torch.ones(2, 4), QuantSpec.parse("int4_learned"))


def test_moving_a_model_keeps_ranges_in_float32():
    model = begun().to(torch.bfloat16).to(torch.float32)
    q = model[0].quantizers.by_operand()["fprop.input"]
    assert q.current.dtype == q.given().dtype == torch.float32


# --- the census -------------------------------------------------------------------------------------------------


def a_step_later() -> tuple[nn.Sequential, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**STATEFUL)))
    x = torch.randn(64, 16)
    start_steps(model, lambda m: m(x))
    optimizer = followed(model)
    model((x * 3).requires_grad_()).square().sum().backward()
    optimizer.step()
    return model, report


def loss_of(model: nn.Module) -> torch.Tensor:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(5)).requires_grad_()
    return model(x).square().sum()


def test_the_census_holds_ranges_to_their_state_and_leaves_them():
    model, report = a_step_later()
    before = copy.deepcopy(model.state_dict())
    current = [
        q.current.clone()
        for held in quantizers_of(model)
        for q in held.by_operand().values()
        if hasattr(q, "current")
    ]
    take_census(model, report, loss_of).check()
    after = [
        q.current
        for held in quantizers_of(model)
        for q in held.by_operand().values()
        if hasattr(q, "current")
    ]
    assert all(torch.equal(a, b) for a, b in zip(current, after, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_census_sees_a_range_that_is_not_the_state_s(monkeypatch):
    """A layer that takes the operand's own maximum instead: 3 times as fine as configured."""
    model, report = a_step_later()
    real = simulated.quantize_values

    def own_maximum(view, spec, noise=None, given=None):
        delayed = given is not None and spec.clip.startswith("delayed")
        return real(view, spec, noise, torch.zeros_like(given) if delayed else given)

    monkeypatch.setattr(simulated, "quantize_values", own_maximum)
    with pytest.raises(CensusError, match=r"fprop\.input"):
        take_census(model, report, loss_of).check()


def test_the_compiled_comparison_works_with_states():
    model, report = a_step_later()
    model.compile(backend="aot_eager")
    comparison = compare_compiled(model, report, loss_of)
    comparison.check()
    assert comparison.gain == pytest.approx(1.0, abs=0.05)


# --- several processes ------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = two_layers(STATEFUL)
    ones = torch.ones(6, 8) * (1 + rank)  # rank 1 probes with another batch, and begins as rank 0 does
    start_steps(model, lambda m: m(ones))
    begun_at = {name: t.clone() for name, t in model.state_dict().items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = followed(model, lr=0.05)
    maxima = []
    for step in range(2):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2 * step + rank)) * (1 + 9 * rank)
        maxima.append(x.abs().max())
        optimizer.zero_grad()
        parallel(x.requires_grad_()).square().sum().backward()
        optimizer.step()
    torch.save((begun_at, model.state_dict(), maxima), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_largest_of_all(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    (begun0, end0, maxima0), (begun1, end1, maxima1) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    for name in end0:
        assert torch.equal(begun0[name], begun1[name]), name
        assert torch.equal(end0[name], end1[name]), name
    history = end0["0.quantizers.fprop.input.history"].flatten()
    assert history[:2].tolist() == [
        max(a, b).item() for a, b in zip(maxima0[::-1], maxima1[::-1], strict=True)
    ]
    assert maxima1[0] > maxima0[0]
