"""The highest moment, by hand on made-up traces, and against every storage of a real step."""

from __future__ import annotations

from typing import Any

import pytest
from round_device import plain_device

from qtrain.planning.check import MODELS, RECIPES, SmallRun, inputs_for
from qtrain.planning.memory import Sharding, grows_linearly, plan_memory
from qtrain.planning.optimizer_states import OptimizerBytes
from qtrain.planning.plan import largest_micro_batch, plan_run
from qtrain.planning.trace import Piece, StepTrace

STATES = OptimizerBytes(states=500, as_float32=800, moved=0.0, transient=7, eager=0)


def piece(kept: int, forward: int, backward: int, gradients: int, input: int = 0) -> Piece:
    return Piece({"linear": kept}, forward, backward, gradients, input, (), (), frozenset())


def trace(blocks: int = 2) -> StepTrace:
    return StepTrace(
        piece(10, 15, 20, 40), ((piece(100, 130, 180, 60, 20), blocks),), piece(50, 300, 400, 40, 20), 8
    )


def sharding(strategy: str = "none", processes: int = 1) -> Sharding:
    return Sharding(strategy, processes, 200, 200 // processes, (60, 60), 80)


def test_one_process_by_hand() -> None:
    found = plan_memory(trace(), sharding(), STATES, accumulates=False, checkpointing=False)
    stays = 200 + 500
    assert found.phases == {
        "forward": stays + 200 + (10 + 2 * 100 + 300),  # the last step's gradients are still there
        "backward": stays + (10 + 2 * 100 + 400),
        "optimizer": stays + 200 + 7,
    }
    assert (found.peak, found.phase) == (1410, "forward")
    assert found.kept == {"linear": 260}
    assert found.transient == 1410 - 200 - 200 - 500 - 260


def test_gradients_grow_while_the_backward_goes_on() -> None:
    """Where the first block's own work is the highest: all later gradients are there."""
    heavy = StepTrace(piece(10, 15, 900, 40), ((piece(1, 2, 3, 60), 2),), piece(1, 2, 3, 40), 8)
    found = plan_memory(heavy, sharding(), STATES, accumulates=False, checkpointing=False)
    assert found.phases["backward"] == 700 + 900 + (40 + 60 + 60)
    more = plan_memory(heavy, sharding(), STATES, accumulates=True, checkpointing=False)
    assert more.phases["backward"] == 700 + 900 + 200


def test_checkpointing_keeps_inputs() -> None:
    found = plan_memory(trace(), sharding(), STATES, accumulates=True, checkpointing=True)
    assert found.kept == {"inputs of blocks": 40, "linear": 60}
    assert found.phases["forward"] == 900 + 10 + 2 * 20 + 300
    assert found.phases["backward"] == 900 + 10 + 2 * 20 + 400


def test_ddp_has_buckets_and_fsdp2_has_rows_and_gathers() -> None:
    ddp = plan_memory(trace(), sharding("ddp", 2), STATES, accumulates=False, checkpointing=False)
    assert (ddp.weights, ddp.gradients, ddp.buffers) == (200, 200, 200)
    fsdp = plan_memory(trace(), sharding("fsdp2", 2), STATES, accumulates=False, checkpointing=False)
    assert (fsdp.weights, fsdp.gradients, fsdp.buffers) == (100, 100, 80 + 3 * 60)
    assert fsdp.phases["optimizer"] == 100 + 500 + 100 + 7, "nothing is gathered any more"
    alone = plan_memory(trace(), sharding("fsdp2", 1), STATES, accumulates=False, checkpointing=False)
    assert alone.buffers == 0


def test_traces_of_one_and_two_sequences_give_any() -> None:
    small, large = (
        trace(),
        StepTrace(
            piece(12, 18, 20, 40), ((piece(150, 200, 300, 60, 40), 2),), piece(50, 300, 400, 40, 40), 16
        ),
    )
    five = grows_linearly(small, large, 5)
    assert (five.tokens, five.blocks[0][0].kept_bytes, five.blocks[0][0].backward_peak) == (
        40,
        300,
        180 + 4 * 120,
    )
    assert (five.embed.kept_bytes, five.head.kept_bytes, five.blocks[0][0].gradients) == (18, 50, 60)
    assert grows_linearly(small, large, 1) == StepTrace(
        five.embed.__class__({"linear": 10}, 15, 20, 40, 0, (), (), frozenset()), small.blocks, small.head, 8
    )


def test_the_largest_micro_batch() -> None:
    def peak(n: int) -> int:
        return 100 + 7 * n

    assert largest_micro_batch(peak, 170, 64) == 10
    assert largest_micro_batch(peak, 169, 64) == 9
    assert largest_micro_batch(peak, 10**6, 64) == 64
    assert largest_micro_batch(peak, 106, 64) == 0


@pytest.mark.parametrize(("recipe", "checkpointing"), [("none", False), ("none", True), ("int8_lean", False)])
def test_the_peak_is_that_of_a_real_step(recipe: str, checkpointing: bool) -> None:
    config: Any = MODELS["llama"]
    plan = plan_run(
        inputs_for(config, plain_device("cpu"), checkpointing=checkpointing), recipe, RECIPES[recipe]
    )
    run = SmallRun(config, RECIPES[recipe], "cpu", checkpointing=checkpointing)
    # Checkpointed, the head's gradients are taken to lie beside all of a block's work
    assert plan.memory.peak == pytest.approx(run.peak_bytes(), rel=0.08 if checkpointing else 0.02)
    assert plan.memory.states == run.optimizer.state_bytes()["total"]
    assert plan.memory.gradients == run.gradient_bytes()
    assert 4 * plan.parameters == run.weight_bytes()
