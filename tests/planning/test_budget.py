"""Scaling laws, checkpoint intervals and bills against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from qtrain.planning.budget import LAWS, Failures, budget, checkpoint_interval, tokens_of


def test_chinchilla_itself() -> None:
    """70B parameters on 1.4T tokens: 1.69 + 406.4 / 70e9^0.34 + 410.7 / 1.4e12^0.28."""
    by_hand = 1.69 + 406.4 / math.exp(0.34 * math.log(70e9)) + 410.7 / math.exp(0.28 * math.log(1.4e12))
    assert LAWS["hoffmann"].loss(70e9, 1.4e12) == pytest.approx(by_hand)
    assert 1.9 < by_hand < 2.0  # the paper's figure of it: about 1.94


@pytest.mark.parametrize("name", LAWS)
def test_tokens_undo_loss(name: str) -> None:
    law = LAWS[name]
    assert law.tokens(1e9, law.loss(1e9, 3e10)) == pytest.approx(3e10)
    with pytest.raises(ValueError, match="stays above"):
        law.tokens(1e9, law.E)


def test_tokens_are_twenty_a_parameter_unless_said_otherwise() -> None:
    law = LAWS["hoffmann"]
    assert tokens_of(1_000_000, None, None, law)[0] == 20e6
    assert tokens_of(1_000_000, 5e6, None, law) == (5e6, "tokens=")
    assert tokens_of(10**9, None, law.loss(1e9, 7e9), law)[0] == pytest.approx(7e9)
    with pytest.raises(ValueError, match="give one"):
        tokens_of(1, 1.0, 1.0, law)


def test_youngs_interval() -> None:
    """1000 GPUs of 10,000 h each fail every 10 h; writing 720 GB at 2 GB/s takes 360 s: sqrt(2 * 360 * 36000) = 5091 s."""
    failures = Failures(gpu_mtbf_hours=10_000, restart_minutes=10, write_gb_per_s=2)
    found = checkpoint_interval(failures, 1000, 720e9)
    assert (found.mtbf_seconds, found.write_seconds) == (36000, 360)
    assert found.seconds == pytest.approx(5091.17, abs=0.01)
    assert found.lost == pytest.approx(360 / 5091.17 + (5091.17 / 2 + 600) / 36000, rel=1e-5)

    def lost(seconds: float) -> float:
        return 360 / seconds + (seconds / 2 + 600) / 36000

    assert lost(found.seconds) < min(lost(0.8 * found.seconds), lost(1.25 * found.seconds)), (
        "the best interval"
    )
    with pytest.raises(ValueError, match=r"failures\.restart_minutes=0"):
        Failures.of({"gpu_mtbf_hours": 1, "restart_minutes": 0, "write_gb_per_s": 1})


def test_a_bill() -> None:
    """1e9 tokens in steps of 1e6 of 3.6 s on 10 GPUs: 1000 steps, 1 h, 10 GPU hours; a tenth lost makes it 1/0.9."""
    found = budget(
        10**8,
        10**6,
        3.6,
        10,
        tokens=(1e9, ""),
        law=LAWS["hoffmann"],
        lost=0.1,
        price_per_hour=2.0,
        watts=700.0,
    )
    assert found.steps == 1000
    assert found.days == pytest.approx(1 / 24 / 0.9)
    assert found.gpu_hours == pytest.approx(10 / 0.9)
    assert found.cost == pytest.approx(20 / 0.9)
    assert found.kwh == pytest.approx(7 / 0.9)
    assert (
        budget(
            1, 3, 1.0, 1, tokens=(10, ""), law=LAWS["hoffmann"], lost=0, price_per_hour=None, watts=None
        ).steps
        == 4
    )
