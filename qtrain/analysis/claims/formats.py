"""Which grid of numbers fits which distribution (arXiv 2305.12356, 2403.06408)."""

from __future__ import annotations

from collections.abc import Callable

from .bench import SEEDS, Bench, quality, rows_of
from .claim import Claim, Measured

ROWS, COLUMNS = 64, 4096
EIGHT_BITS = {"int8": 41.0, "e3m4": 38.0, "e4m3": 32.0, "e5m2": 26.0}


def difference(kind: str, better: str, other: str) -> Callable[[Bench], Measured]:
    """SQNR of ``better`` minus that of ``other``, dB."""

    def measure(_: Bench) -> Measured:
        samples = [rows_of(kind, ROWS, COLUMNS, seed) for seed in range(5)]
        of = f"{'Gaussian' if kind == 'gaussian' else 'Student-t3'}, {ROWS} rows of {COLUMNS}, 5 samples"
        return Measured.mean([quality(x, better) - quality(x, other) for x in samples], of)

    return measure


def eight_bit_numbers(_: Bench) -> Measured:
    worst = [
        max(
            abs(quality(rows_of("gaussian", ROWS, COLUMNS, seed), f"{f}_row") - db)
            for f, db in EIGHT_BITS.items()
        )
        for seed in SEEDS
    ]
    return Measured.mean(worst, f"Gaussian, {ROWS} rows of {COLUMNS}, 3 samples")


def _claim(
    name: str, says: str, source: str, measure: Callable[[Bench], Measured], **expected: float
) -> Claim:
    return Claim(name=name, says=says, source=source, quantity="SQNR gained, dB", measure=measure, **expected)  # type: ignore[arg-type]


MOFQ, HARD = "arXiv 2305.12356", "arXiv 2403.06408"
CLAIMS = (
    _claim("w4_channel_e2m1", "4 bits with a scale a row: e2m1 is better than int4 on Gaussian weights", MOFQ,
           difference("gaussian", "e2m1_row", "int4_row"), low=0.0),
    _claim("w4_group32_int4", "in groups of 32 int4 is better than e2m1", MOFQ,
           difference("gaussian", "int4_group32", "e2m1_group32"), low=0.0),
    Claim(name="eight_bit_numbers", says="8 bits on Gaussian rows: int8 41 dB > e3m4 38 > e4m3 32 > e5m2 26", source=MOFQ,
          quantity="largest distance to these four, dB", high=0.75, measure=eight_bit_numbers),
    _claim("heavy_tails_flip", "heavy tails flip the order of int8 and e4m3", MOFQ,
           difference("student3", "e4m3_row", "int8_row"), low=0.0),
    _claim("cube_root_heavy", "The cube-root quantizer beats int4 on heavy tails", HARD,
           difference("student3", "power4_row", "int4_row"), low=0.0),
    _claim("cube_root_gaussian", "and loses to it on Gaussian rows", HARD,
           difference("gaussian", "power4_row", "int4_row"), high=0.0),
)  # fmt: skip
