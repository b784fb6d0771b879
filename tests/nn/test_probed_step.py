"""What ``probed_step`` puts back, thing by thing: a model that was probed goes on as if nobody had looked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from census_models import TOKENS, gpt, loss_of
from torch import Tensor, nn

from qtrain.nn.census import probed_step
from qtrain.nn.probe import Watch
from qtrain.nn.quantizers import _noting, advance_ranges, follow_optimizer

# Stochastic bits, a clock, and ranges that remember: all that a forward leaves behind
RECIPE = {
    "fprop": {"input": "int8_tensor_delayed4", "weight": "int4_row"},
    "dgrad": {"grad_output": "int8_row_sr", "weight": "fprop"},
    "wgrad": {"grad_output": "int8_row_sr", "input": "fprop"},
}


def delayed(**changes: Any) -> tuple[nn.Module, Any]:
    """A model whose ranges advance with the steps of an optimizer, and its report."""
    model, report = gpt(RECIPE, **changes)
    follow_optimizer(model, torch.optim.SGD(model.parameters()))
    return model, report


def trained_step(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) of one step as training runs it."""
    model.zero_grad(set_to_none=True)
    loss = loss_of("fp32")(model)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def state(model: nn.Module, report: object) -> dict[str, Tensor]:
    """Parameters, ranges and notes by name, gradients, random state and clock."""
    found = {f"tensor {k}": v.detach().clone() for k, v in model.state_dict().items()}
    found |= {f"note {i}": q.current.clone() for i, q in enumerate(_noting(model))}
    found |= {f"gradient {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return found | {"random state": torch.get_rng_state(), "clock": report.clock.counters.clone()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(watched: bool, raises: bool) -> None:
    model, report = delayed(dropout=0.2)
    trained_step(model)
    advance_ranges(model)  # ranges of one step, and no notes
    loss_of("fp32")(model)  # notes of a step that is under way
    torch.manual_seed(3)
    before, hooks = state(model, report), sum(len(m._forward_hooks) for m in model.modules())
    assert any(name.startswith("note") and float(value.abs().sum()) > 0 for name, value in before.items())
    assert any(name.endswith("history") and float(value.abs().sum()) > 0 for name, value in before.items())
    assert any(name.startswith("gradient") for name in before)

    def probe(m: nn.Module) -> Tensor:
        report.clock.set(step=99, token_offset=5)
        loss = 1000 * loss_of("fp32")(m)
        torch.rand(3)
        if raises:
            raise RuntimeError("in the middle")
        return loss

    watch = Watch() if watched else None
    if raises:
        with pytest.raises(RuntimeError, match="in the middle"):
            probed_step(model, report, probe, watch)
    else:
        probes = probed_step(model, report, probe, watch)
        assert set(probes) == set(report.plan)
        call = probes["blocks.0.mlp.up"].calls[0]
        assert int(call.counters[1]) == 99
        assert bool(call.forward) is watched
        assert float(call.edges["dW"].abs().sum()) > 0
    after = state(model, report)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_next_step_is_the_one_it_would_have_been() -> None:
    runs = []
    for probed in (False, True):
        model, report = delayed()
        trained_step(model)
        advance_ranges(model)
        if probed:
            report.clock.set(step=7, token_offset=320)
            probed_step(model, report, loss_of("fp32"))
        report.clock.set(step=8, token_offset=640)
        runs.append(trained_step(model))
    (plain_loss, plain), (probed_loss, probed_gradients) = runs
    assert torch.equal(plain_loss, probed_loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed_gradients, strict=True))


def test_a_compiled_model_is_probed_eagerly_under_the_plans_names() -> None:
    model, report = delayed()
    wrapped = torch.compile(model, backend="eager")
    torch.compiler.reset()
    calls: list[bool] = []

    def probe(m: nn.Module) -> Tensor:
        calls.append(torch.compiler.is_compiling())
        logits = m(TOKENS[:, :-1])
        return logits.square().mean()

    assert set(probed_step(wrapped, report, probe)) == set(report.plan)
    assert calls == [False]
