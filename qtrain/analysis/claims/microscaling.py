"""Small blocks, scales that are powers of two or e4m3, Hadamard transforms, stochastic rounding with a prescale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qtrain.nn.observation import sqnr_db
from qtrain.quant import Hadamard, QuantSpec, fake_quantize, quantize_values

from .bench import Bench, quality, rows_of
from .claim import Claim, Measured
from .weights_activations import activations, mean_gain, weights, with_outliers

OCP, NVFP4, BACKWARD, QUARTET2 = (
    "OCP MX v1.0, section 6.3",
    "arXiv 2512.02010",
    "arXiv 2502.20586",
    "arXiv 2601.22813",
)
BLOCK = 64  # divides the small model's widths


def saturated(spec: str) -> Callable[[Bench], Measured]:
    """Share of blocks whose largest element is beyond the largest level."""

    def measure(_: Bench) -> Measured:
        parsed, found = QuantSpec.parse(spec), []
        for seed in range(5):
            x = rows_of("gaussian", 64, 1024, seed)
            q = quantize_values(x, parsed)
            largest = x.abs().unflatten(1, (-1, 32)).amax(-1)
            found.append(float((largest > q.scale * parsed.number_format.max * (1 + 1e-6)).double().mean()))
        return Measured.mean(found, "Gaussian, 10,240 blocks of 32")

    return measure


def four_six(_: Bench) -> Measured:
    samples = [rows_of("gaussian", 64, 1024, seed) for seed in range(5)]
    return Measured.mean([quality(x, "nvfp4_four_six") - quality(x, "nvfp4") for x in samples], "Gaussian, 64 rows of 1024, 5 samples")  # fmt: skip


def length(spec: str) -> Callable[[Bench], Measured]:
    """<mean of draws, x> / <x, x> - 1: the length that stochastic rounding keeps on average."""

    def measure(_: Bench) -> Measured:
        parsed, found = QuantSpec.parse(spec), []
        for seed in range(16):
            x = rows_of("gaussian", 64, 1024, seed)
            noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1000 + seed))
            y = fake_quantize(x, parsed, noise)
            found.append(float((y * x).sum(dtype=torch.float64) / x.square().sum(dtype=torch.float64)) - 1)
        return Measured.mean(found, "Gaussian, 64 rows of 1024, 16 samples")

    return measure


def rht_error(_: Bench) -> Measured:
    """Of a product of two operands with outliers, each rounded stochastically: the error with a randomized Hadamard over that
    without, in dB gained."""
    spec, rht, found = QuantSpec.parse("mxfp4_prescale_sr"), Hadamard(BLOCK, True), []
    for seed in range(5):
        a, b = rows_of("gaussian", 64, 1024, seed), rows_of("gaussian", 64, 1024, 100 + seed)
        generator = torch.Generator().manual_seed(seed)
        for x in (a, b):
            x[:, torch.randint(1024, (16,), generator=generator)] *= 30.0
        signs = torch.randint(2, (1024,), generator=generator) * 2.0 - 1.0
        errors = []
        for turned in (True, False):
            operands = [rht.forward(x, signs) if turned else x for x in (a, b)]
            q = [fake_quantize(x, spec, torch.rand(x.shape, generator=generator)) for x in operands]
            errors.append(sqnr_db(a @ b.t(), q[0] @ q[1].t()))
        found.append(errors[0] - errors[1])
    return Measured.mean(found, "products over 1024 with 16 outliers x 30 in each operand, 5 samples")


def both(bench: Bench, seed: int) -> Iterator[Tensor]:
    yield from weights(bench, seed)
    yield from activations(bench, seed)


def turned(spec: str) -> Callable[[Bench], Measured]:
    """SQNR gained by a Hadamard transform, dB."""
    hadamard = Hadamard(BLOCK)
    return mean_gain(
        both, lambda x: quality(hadamard.forward(x), spec) - quality(x, spec), "weights and activations"
    )


def _claim(name: str, says: str, source: str, measure: Callable[[Bench], Measured], quantity: str = "SQNR gained, dB", **expected: float) -> Claim:  # fmt: skip
    return Claim(name=name, says=says, source=source, quantity=quantity, measure=measure, **expected)  # type: ignore[arg-type]


def turned_outliers(x: Tensor) -> float:
    """dB gained by int4 of activations with outlier channels."""
    x = with_outliers(x)
    return quality(Hadamard(BLOCK).forward(x), "int4_row") - quality(x, "int4_row")


CLAIMS = (
    _claim("mx_floor", "OCP's floor scale saturates many blocks of e4m3", OCP, saturated("mxfp8_floor"), "share of blocks saturated", low=0.05),
    _claim("mx_ceil", "a scale rounded up saturates none", OCP, saturated("mxfp8_ceil"), "share of blocks saturated", high=0.0),
    _claim("four_six", "4/6 lowers the error of NVFP4", NVFP4, four_six, low=0.0),
    _claim("prescale_unbiased", "MXFP4 with stochastic rounding and a prescale of 3/4 is unbiased", BACKWARD,
           length("mxfp4_prescale_sr"), "<mean, x> / <x, x> - 1", low=-0.001, high=0.001),
    _claim("no_prescale_biased", "without the prescale it is not: what saturates is shortened", BACKWARD,
           length("mxfp4_floor_sr"), "<mean, x> / <x, x> - 1", high=-0.001),
    _claim("rht_outliers", "A randomized Hadamard lowers the error of products with outliers", BACKWARD, rht_error, low=0.0),
    _claim("hadamard_int4", "A Hadamard transform helps int4 with a scale a row", QUARTET2, turned("int4_row"), low=0.0),
    _claim("hadamard_int4_outliers", "where channels are outliers, it does", "arXiv 2502.05003",
           mean_gain(activations, turned_outliers, "activations with 2 channels x 30"), low=0.0),
    _claim("hadamard_mxfp4", "it helps MXFP4", QUARTET2, turned("mxfp4"), low=0.0),
    _claim("hadamard_nvfp4", "and hurts NVFP4", QUARTET2, turned("nvfp4"), high=0.0),
)  # fmt: skip
