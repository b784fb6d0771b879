"""adamw_step against numpy, and against Adam written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qtrain_kernels import adamw_problems
from qtrain_kernels.adamw_step import adamw_step, fma, reference
from torch import Tensor

F32 = np.float32
FEW = ("8 bit", "4 bit, aligned, bf16", "e4m3", "float32")


def _numpy(x: Tensor) -> np.ndarray:
    return x.float().numpy().copy()


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Exact product, a sum of 64 bits, then float32."""
    return (np.longdouble(a) * np.longdouble(b) + np.longdouble(c)).astype(F32)


def _codes(v: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest level of each number: ties to the lower level, or to the even code of e4m3."""
    if (np.diff(levels) > 0).all():
        between = (levels[1:] + levels[:-1]) / F32(2)
        return np.searchsorted(between, np.nan_to_num(v, nan=0.0), side="left").astype(np.uint8)
    positive = levels[:127].astype(np.float64)  # code 127 is NaN
    away = np.minimum(np.abs(np.nan_to_num(v, nan=0.0).astype(np.float64)), 448.0)
    upper = np.clip(np.searchsorted(positive, away), 1, 126)
    to_lower, to_upper = away - positive[upper - 1], positive[upper] - away
    code = np.where((to_lower < to_upper) | ((to_lower == to_upper) & (upper % 2 == 1)), upper - 1, upper)
    return (code + 128 * (np.signbit(v) & ~np.isnan(v))).astype(np.uint8)


class _Blocks:
    """One moment of one tensor, by loops over rows and blocks."""

    def __init__(
        self, state: Tensor, scale: Tensor, levels: Tensor, top: float, block: int, shape: tuple[int, int]
    ):
        self.levels, self.top, self.shape = _numpy(levels), F32(top), shape
        self.codes, self.scale, self.four = state.numpy().copy(), scale.numpy().copy(), levels.numel() == 16
        self.spans = [slice(a, min(a + block, shape[1])) for a in range(0, shape[1], block)]

    def read(self) -> np.ndarray:
        codes = self.codes
        if self.four:
            codes = np.stack([codes % 16, codes // 16], -1).reshape(self.shape[0], -1)[:, : self.shape[1]]
        values = self.levels[codes]
        for r in range(self.shape[0]):
            for j, span in enumerate(self.spans):
                values[r, span] *= self.scale[r, j]
        return values

    def write(self, x: np.ndarray) -> None:
        codes = np.zeros((x.shape[0], x.shape[1] + x.shape[1] % 2 * self.four), np.uint8)
        for r in range(self.shape[0]):
            for j, span in enumerate(self.spans):
                amax = np.abs(x[r, span]).max()  # NaN if one is
                scale = amax / self.top
                self.scale[r, j] = scale = F32(2.0**-100) if scale < 2.0**-100 else scale
                codes[r, span] = _codes(x[r, span] * (F32(1) / scale), self.levels)
        self.codes = codes[:, 0::2] + 16 * codes[:, 1::2] if self.four else codes


def oracle(
    weights, gradients, m, m_scale, m_levels, _m_encoder, m_top, v, v_scale, v_levels, _v_encoder, v_top,
    block, decay, beta1, beta2, step_size, root, eps,
) -> list[Tensor]:  # fmt: skip
    """The equations with numpy: what is written, in the order of the arguments."""
    written: list[list[Tensor]] = [[], [], [], [], []]
    with np.errstate(all="ignore"):
        for i, weight in enumerate(weights):
            F = weight.shape[0] if weight.dim() else 1
            shape = F, weight.numel() // max(F, 1)
            w, g = _numpy(weight).reshape(shape), _numpy(gradients[i]).reshape(shape)
            held = [
                None if levels is None else _Blocks(states[i], scales[i], levels, top, block, shape)
                for states, scales, levels, top in (
                    (m, m_scale, m_levels, m_top),
                    (v, v_scale, v_levels, v_top),
                )
            ]
            first = _numpy(m[i]).reshape(shape) if held[0] is None else held[0].read()
            second = _numpy(v[i]).reshape(shape) if held[1] is None else held[1].read()
            near = F32(1 - beta1)
            first = _fma(near, g - first, first) if near < 0.5 else _fma(near - F32(1), g - first, g)
            second = _fma(F32(1 - beta2), g * g, second * F32(beta2))
            below = np.sqrt(second) * F32(1 / root) + F32(eps)
            w = _fma(F32(-step_size), first / below, w * F32(decay))
            written[0].append(torch.from_numpy(w).reshape(weight.shape).to(weight.dtype))
            for at, blocks, values in ((1, held[0], first), (3, held[1], second)):
                if blocks is None:
                    written[at].append(torch.from_numpy(values).reshape(weight.shape))
                    continue
                blocks.write(values)
                written[at].append(torch.from_numpy(blocks.codes))
                written[at + 1].append(torch.from_numpy(blocks.scale))
    return [t for some in written for t in some]


def test_fma_rounds_once() -> None:
    """A sum whose float64 lies on a midpoint of float32: the part that float64 lost decides."""
    tiny = torch.tensor([-(2.0**-80), 0.0, 2.0**-80])
    for units, want in ((1, (1, 2, 2)), (3, (4, 4, 5))):  # (1 + n 2^-23) * 1.5 = 1.5 + 1.5 n units
        a = torch.full((3,), 1 + units * 2.0**-23)
        exact = torch.tensor([1.5 + n * 2.0**-23 for n in want])
        assert torch.equal(fma(a, torch.tensor(1.5), tiny), exact)
        assert torch.equal(fma(-a, torch.tensor(1.5), -tiny), -exact)
    assert fma(torch.tensor([1e30]), torch.tensor([1e30]), torch.tensor([-1.0])).item() == float("inf")


@pytest.mark.parametrize("name", FEW)
def test_the_update_is_adams(name: str) -> None:
    """Against float64 and the formulas of the paper, from the decoded moments of the same inputs."""
    inputs = adamw_step.cases[name]()
    w, g, m, ms, ml, _, _, v, vs, vl, _, _, block, decay, beta1, beta2, step_size, root, eps = inputs

    def decoded(i: int, states: list[Tensor], scales: list[Tensor], levels: Tensor | None) -> Tensor:
        if levels is None:
            return states[i].double()
        K = w[i].numel() // w[i].shape[0]
        codes = states[i]
        if levels.numel() == 16:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :K]
        scale = scales[i].repeat_interleave(min(block, K), 1)[:, :K]
        return (levels[codes.long()] * scale).double().reshape(w[i].shape)

    before = [x.double().clone() for x in w]
    moments = [(decoded(i, m, ms, ml), decoded(i, v, vs, vl)) for i in range(len(w))]
    adamw_step(*inputs)
    for i, (old, (first, second)) in enumerate(zip(before, moments, strict=True)):
        grad = g[i].double()
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        want = decay * old - step_size * first / (second.sqrt() / root + eps)
        one_rounding = 2.0**-8 if w[i].dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(w[i].double(), want, rtol=one_rounding, atol=2e-6)
        for kind, levels, exact in ((decoded(i, m, ms, ml), ml, first), (decoded(i, v, vs, vl), vl, second)):
            off = (kind - exact).abs()
            if levels is None:
                torch.testing.assert_close(kind, exact, rtol=1e-5, atol=1e-6)
            elif exact.numel() > 100:  # half of the widest gap or what the ends cut, and not nothing
                grid = levels.nan_to_num(nan=0.0).sort()[0]
                grid = grid / grid.max()
                lowest = grid.min()  # beyond a negative one, or below a positive one
                most = max(grid.diff().max() / 2, 1 + lowest if lowest < 0 else lowest)
                assert 0 < off.max() <= (1 + 1e-5) * most * exact.abs().max()


def test_bytes_a_parameter() -> None:
    """Of a matrix as wide as GPT-2's: 2.06 bytes with 8 bits, 1.1 with 4."""
    for m, v, block, most in (
        ("cubic8", "cubic8_unsigned", 256, 2.06),
        ("e4m3", "e4m3", 256, 2.06),
        ("cubic4", "linear4_nozero", 128, 1.1),
    ):
        inputs = adamw_problems.problem([(64, 768)], m, v, block=block)
        held = sum(t.nbytes for i in (2, 3, 7, 8) for t in inputs[i])
        assert 0.9 * most < held / inputs[0][0].numel() <= most


def _arguments(**change) -> dict[str, object]:
    names = list(reference.__annotations__)
    return dict(zip(names, adamw_problems.problem([(4, 300)], block=256), strict=False)) | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "0 weights"),
        ({"block": 0}, "blocks of 0"),
        ({"weights": [torch.zeros(4, 300, dtype=torch.float64)]}, "float64"),
        ({"gradients": [torch.zeros(4, 299)]}, "gradient torch.float32"),
        ({"gradients": []}, "0 gradients"),
        ({"gradients": [torch.zeros(300, 4).t()]}, "contiguous"),
        ({"exp_avg": [torch.zeros(4, 300)]}, "exp_avg 0 is torch.float32"),
        ({"exp_avg_scale": [torch.zeros(4, 1)]}, "scale of exp_avg 0"),
        ({"exp_avg_scale": []}, "exp_avg: codes need"),
        ({"exp_avg_sq_encoder": None}, "exp_avg_sq: codes need"),
        ({"exp_avg_levels": torch.zeros(3)}, "16 or 256"),
        ({"exp_avg_levels": torch.zeros(16), "block": 33}, "within a byte"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        reference(**_arguments(**change))


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """Its last rows equal the same rows alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows, last = 2**19 + 3, 5
    inputs = adamw_problems.problem(
        [(rows, 4096)], weights=torch.bfloat16, gradients=torch.bfloat16, device="cuda"
    )
    end = tuple([t[-last:].clone() for t in x] if isinstance(x, list) else x for x in inputs)
    adamw_step(*inputs), adamw_step(*end)
    for whole, part in zip(inputs, end, strict=True):
        if isinstance(whole, list):
            assert all(torch.equal(a[-last:], b) for a, b in zip(whole, part, strict=True))
