"""The reduction of gradients in real processes, held to a reference in numpy that knows equations alone, in float64."""

from __future__ import annotations

import communicating
import numpy as np
import pytest
import torch

STRATEGIES = ("ddp", "fsdp2")
WORLDS = communicating.WORLDS
NAMES = list(communicating.SHAPES)
MATRICES = [name for name, shape in communicating.SHAPES.items() if len(shape) > 1]
# bits of codes, columns of a block
NUMPY = {"int8_group128": (8, 128), "int4_row": (4, 10**6)}


def quantized(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(x on the grid, half a step of each element), by blocks of ``group`` columns of a row; 0 where all is zero."""
    found, half = np.empty_like(x), np.empty_like(x)
    for start in range(0, x.shape[1], group):
        block = x[:, start : start + group]
        step = np.abs(block).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        found[:, start : start + group] = np.rint(block / np.where(step == 0, 1, step)) * step
        half[:, start : start + group] = step / 2
    return found, half


class Reference:
    """One parameter over W processes."""

    def __init__(self, world: int, bits: int, group: int, *, feedback: bool, returns: bool) -> None:
        self.world, self.form, self.feedback, self.returns = world, (bits, group), feedback, returns
        self.owed = [np.zeros(1)] * world
        self.owed_mean = np.zeros(1)

    def reduce(self, gradients: list[np.ndarray], found: np.ndarray) -> np.ndarray:
        """Holds ``found`` to the mean; how far each element may lie from that of ``gradients`` with what was owed.

        The second phase rounds means of two numbers on grids, which may lie between two codes exactly: either will do.
        """
        total, bound, sure = 0.0, 0.0, True
        for r, g in enumerate(gradients):
            x = g + self.owed[r]
            sent, half = quantized(x, *self.form)
            self.owed[r] = x - sent if self.feedback else np.zeros(1)
            total, bound = total + sent / self.world, bound + half / self.world
        expected = total
        if self.returns:
            y = total + self.owed_mean
            expected, half = quantized(y, *self.form)
            bound, sure = bound + half, np.abs(np.abs(y - expected) - half) >= 1e-4 * half
            self.owed_mean = y - found if self.feedback else np.zeros(1)
        off = np.where(sure, np.abs(found - expected), 0)
        assert np.mean(sure) > 0.8  # an outlier on all processes gives their blocks one scale
        assert off.max() <= 1e-5 * np.abs(expected).max()
        return bound


def matrix(t: torch.Tensor) -> np.ndarray:
    return t.double().numpy().reshape(t.shape[0], -1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spec", NUMPY)
@pytest.mark.parametrize("feedback", ["float32", None])
def test_against_the_equations(seen, world, strategy, spec, feedback):
    case = seen[world][0][strategy][f"{spec}/{feedback}"]
    for name in MATRICES:
        reference = Reference(world, *NUMPY[spec], feedback=feedback is not None, returns=strategy == "ddp")
        for step in range(communicating.STEPS):
            of = [matrix(communicating.gradients(step, r)[name]) for r in range(world)]
            owed = np.mean(reference.owed, 0) + reference.owed_mean if feedback else np.zeros(1)
            found = matrix(case["steps"][step][name])
            bound = reference.reduce(of, found)
            # What the documentation promises; two-sided: an exact reduction would lie at 0
            error = np.abs(found - np.mean(of, 0) - owed)
            assert np.all(error <= bound * (1 + 1e-5) + 1e-7)
            assert error.max() > 0.3 * bound.max() / world
        if feedback:
            for r in range(world):
                owed = matrix(case["state"]["owed"][name][r])
                np.testing.assert_allclose(owed, reference.owed[r], rtol=0, atol=1e-4)
            if strategy == "ddp":
                owed = matrix(case["state"]["owed_mean"][name])
                np.testing.assert_allclose(owed, reference.owed_mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spec", communicating.SPECS)
def test_all_processes_have_one_gradient_and_vectors_an_exact_one(seen, world, strategy, spec):
    for feedback in ("float32", None):
        cases = [found[strategy][f"{spec}/{feedback}"]["steps"] for found in seen[world]]
        for step in range(communicating.STEPS):
            exact = seen[world][0][strategy]["exact"][step]
            for name in NAMES:
                assert all(torch.equal(case[step][name], cases[0][step][name]) for case in cases), name
            # float32 sums in one order or another
            torch.testing.assert_close(cases[0][step]["bias"], exact["bias"], rtol=3e-7, atol=1e-7)
            assert bool((cases[0][step]["inner.odd"][2] == 0).all())
            assert cases[0][step]["inner.odd"].abs().sum() > 0
            # int8 and e4m3 blocks with an outlier of 50: an eighth is generous; equal would be no quantization
            for name in MATRICES:
                off = (cases[0][step][name] - exact[name]).norm() / exact[name].norm()
                assert 1e-4 < off < (0.6 if spec == "int4_row" else 0.125), (name, off)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stochastic_bits_differ_by_step_and_average_out(seen, world, strategy):
    spec = "int8_group128_sr/None"
    errors = []
    for step in range(communicating.STEPS):
        exact = seen[world][0][strategy]["exact"][step]["deep"]
        errors.append(seen[world][0][strategy][spec]["steps"][step]["deep"] - exact)
    for a, b in ((0, 1), (1, 2)):
        correlation = float((errors[a] * errors[b]).sum() / (errors[a].norm() * errors[b].norm()))
        assert abs(correlation) < 5 / 1200**0.5
    mean = float(torch.stack(errors).mean() / torch.stack(errors).std())
    assert abs(mean) < 5 / 3600**0.5


@pytest.mark.parametrize("world", WORLDS)
def test_every_process_draws_for_itself(seen, world):
    """One gradient on all of them: the mean lies between the codes, where draws were not the same."""
    found = matrix(seen[world][0]["fsdp2"]["one gradient"]["deep"])
    step = np.abs(matrix(communicating.gradients(0, 0)["deep"])).max(1, keepdims=True) / 7
    codes = found / step
    assert np.mean(np.abs(codes - np.rint(codes)) > 0.1) > 0.1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_are_paid_back(seen, world, strategy):
    """Over T steps of one gradient the sums differ by what is owed, and the means by that over T; without error
    feedback small numbers beside an outlier never arrive."""
    steps = communicating.LONG_STEPS
    true = [communicating.gradients(0, r, alike=True) for r in range(world)]
    for name in MATRICES:
        mean = np.mean([matrix(t[name]) for t in true], 0)
        largest = max(float(t[name].abs().max()) for t in true)
        # |e| <= (G + |e|) / 14 for 4 bits; the second phase quantizes a mean that is no longer than that
        phase = largest / 13
        bound = phase + (phase + largest / 13 if strategy == "ddp" else 0)
        for feedback, unit in (("float32", 1e-5), ("bfloat16", 2**-8)):
            case = seen[world][0][strategy][f"long/{feedback}"]
            owed = matrix(case["state"]["owed"][name].float().mean(0))
            if strategy == "ddp":
                owed = owed + matrix(case["state"]["owed_mean"][name].float())
            assert np.abs(owed).max() <= bound * 1.01
            total = matrix(case["total"][name])
            # Every step rounds what it owes to ``feedback``
            np.testing.assert_allclose(total + owed, steps * mean, rtol=0, atol=steps * unit * largest)
            assert np.abs(total / steps - mean).max() <= bound * 1.01 / steps + unit * largest
        without = np.abs(matrix(seen[world][0][strategy]["long/None"]["total"][name]) / steps - mean).max()
        assert (
            without
            > 5 * np.abs(matrix(seen[world][0][strategy]["long/float32"]["total"][name]) / steps - mean).max()
        )


@pytest.mark.parametrize("world", WORLDS)
def test_descent_comes_nearer_with_error_feedback(seen, world):
    """The negative control: 4 bits that forget their errors stop where the errors of the processes balance."""
    descent = seen[world][0]["descent"]
    for name in MATRICES:
        for feedback in ("float32", "bfloat16"):
            assert descent[feedback][name] < descent["None"][name] / 3, (name, feedback)
    # (1 - lr)^T of the way is left where nothing is rounded
    assert descent["None"]["bias"] == pytest.approx(0.95**100, rel=1e-3)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_non_finite_gradient_reaches_every_process(seen, world, strategy):
    for found in seen[world]:
        good, nan, inf, after = found[f"{strategy}/bad"]["steps"]
        for step in (nan, inf):
            assert not bool(step["inner.few"][2, 128:].isfinite().any()), "all that shares its scale"
            assert bool(step["inner.few"][:2].isfinite().all())
            assert not bool(step["bias"][1].isfinite())
            assert bool(step["deep"].isfinite().all())
        for step in (good, after):
            assert all(bool(g.isfinite().all()) for g in step.values())
    state = seen[world][0][f"{strategy}/bad"]["state"]
    assert all(bool(t.isfinite().all()) for t in state["owed"].values())


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_takes_the_state_over_goes_on_bit_for_bit(seen, world, strategy):
    for found in seen[world]:
        straight, resumed = found[f"{strategy}/resume"]["on"]
        assert same(straight, resumed)
    assert same(seen[world][0][f"{strategy}/resume"]["state"], seen[world][0][f"{strategy}/resume"]["again"])
    state = seen[world][0][f"{strategy}/resume"]["state"]
    assert state["owed"].keys() == set(MATRICES)
    assert (state["owed_mean"].keys() == set(MATRICES)) == (strategy == "ddp")
    assert state["owed"]["tall"].shape == (world, 257, 5)


def total_owed(state: dict, name: str) -> torch.Tensor:
    owed = state["owed"][name].double().mean(0)
    return owed + state["owed_mean"][name].double() if state["owed_mean"] else owed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_owed_is_lost_on_the_way_to_others(seen, strategy):
    for world in WORLDS:
        found = seen[world][0][f"{strategy}/resume"]
        for name in MATRICES:
            there, here = total_owed(found["state"], name), total_owed(found["elsewhere"], name)
            assert there.abs().max() > 0
            torch.testing.assert_close(here, there, rtol=0, atol=1e-6 * float(there.abs().max()))
    if strategy == "ddp":
        two, four = seen[2][0]["ddp/resume"]["state"], seen[4][0]["from two"]
        for name in MATRICES:
            torch.testing.assert_close(total_owed(four, name), total_owed(two, name), rtol=0, atol=1e-6)
