"""Factors worked out by hand, and the configs that name them."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qtrain import optim
from qtrain.optim import AdamW, ConstantSchedule, CosineSchedule, WSDSchedule
from qtrain.optim.schedules import constant, cosine, wsd

CONFIGS = Path(__file__).parents[2] / "configs"
COSINE = {"warmup_steps": 4, "total_steps": 20, "min_lr_fraction": 0.2}
WSD = {"warmup_steps": 4, "total_steps": 20, "decay_fraction": 0.4, "min_lr_fraction": 0.2}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.2),
        (1, 0.4),
        (3, 0.8),
        (4, 1.0),
        (8, 0.2 + 0.4 * (1 + math.sqrt(0.5))),
        (12, 0.6),
        (20, 0.2),
        (99, 0.2),
    ],
)
def test_cosine(step: int, factor: float) -> None:
    assert cosine(step, **COSINE) == pytest.approx(factor, abs=1e-12)
    assert CosineSchedule(**COSINE)(step) == cosine(step, **COSINE)


@pytest.mark.parametrize(
    ("step", "linear", "root"),
    [
        (0, 0.2, 0.2),
        (3, 0.8, 0.8),
        (4, 1, 1),
        (11, 1, 1),
        (12, 1, 1),
        (14, 0.8, 0.6),
        (20, 0.2, 0.2),
        (50, 0.2, 0.2),
    ],
)
def test_wsd(step: int, linear: float, root: float) -> None:
    assert wsd(step, **WSD) == pytest.approx(linear, abs=1e-12)
    assert wsd(step, **WSD, form="1-sqrt") == pytest.approx(root, abs=1e-12)
    assert WSDSchedule(**WSD, form="1-sqrt")(step) == wsd(step, **WSD, form="1-sqrt")


def test_constant() -> None:
    assert [constant(s, warmup_steps=3) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert ConstantSchedule()(0) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(warmup_steps=50, total_steps=1000),
        CosineSchedule(warmup_steps=0, total_steps=1000, min_lr_fraction=0.0),
        WSDSchedule(warmup_steps=50, total_steps=1000),
        WSDSchedule(warmup_steps=500, total_steps=1000, decay_fraction=0.5, form="1-sqrt"),
        WSDSchedule(warmup_steps=50, total_steps=1000, decay_fraction=0.0),
        ConstantSchedule(warmup_steps=50),
    ],
)
def test_up_then_down_without_jumps(schedule) -> None:
    factors = [schedule(s) for s in range(1200)]
    top = schedule.warmup_steps
    assert factors[top] == 1.0
    assert all(a < b for a, b in pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in pairwise(factors[top:]))
    steepest = max(abs(a - b) for a, b in pairwise(factors))
    # warmup 1/51; cosine pi/2/950; linear 1/200; the root falls fastest at once, by sqrt(1/500)
    assert steepest <= max(1 / 51, math.sqrt(1 / 500))
    assert len(set(factors[1000:])) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cosine(-1, **COSINE), "step"),
        (lambda: cosine(1.5, **COSINE), "step"),
        (lambda: cosine(19.5, **COSINE), "step"),
        (lambda: wsd(19.5, **WSD), "step"),
        (lambda: CosineSchedule(warmup_steps=20, total_steps=20), "warmup"),
        (lambda: CosineSchedule(warmup_steps=0, total_steps=0), "total_steps"),
        (lambda: CosineSchedule(warmup_steps=1, total_steps=9, min_lr_fraction=1.1), "min_lr_fraction"),
        (lambda: WSDSchedule(warmup_steps=5, total_steps=10, decay_fraction=0.6), "overlap"),
        (lambda: WSDSchedule(warmup_steps=5, total_steps=10, decay_fraction=-0.1), "decay_fraction"),
        (lambda: WSDSchedule(warmup_steps=5, total_steps=10, form="cos"), "1-sqrt"),
        (lambda: ConstantSchedule(warmup_steps=-1), "warmup_steps"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_drives_lambda_lr_and_resumes() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamW([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, CosineSchedule(**COSINE))
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert rates == [0.5 * cosine(s, **COSINE) for s in range(6)]
    other = AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    resumed = torch.optim.lr_scheduler.LambdaLR(other, CosineSchedule(**COSINE))
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5 * cosine(6, **COSINE)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_schedule_configs(name: str) -> None:
    text = OmegaConf.load(CONFIGS / "schedule" / f"{name}.yaml")
    config = OmegaConf.to_container(OmegaConf.merge({"steps": 1000}, {"schedule": text}), resolve=True)[
        "schedule"
    ]
    module, _, cls = config.pop("_target_").rpartition(".")
    assert module == "qtrain.optim"
    assert getattr(optim, cls)(**config)(0) < 1.0


def test_optimizer_config() -> None:
    text = OmegaConf.load(CONFIGS / "optimizer" / "adamw.yaml")
    whole = OmegaConf.merge(text, {"m2": "none"})
    config = OmegaConf.to_container(whole, resolve=True)["optimizer"]
    assert config.pop("_target_") == "qtrain.optim.AdamW"
    assert config.pop("clip_norm") == 1.0  # the trainer's
    assert set(config) <= set(inspect.signature(AdamW).parameters)
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(2))], **config)
    assert optimizer.recipe.exp_avg.format == "dynamic8"
    assert optimizer.recipe.exp_avg_sq is None
