"""int8_scaled_mm against numpy, on every tier that this machine has."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from qtrain_kernels import contract, cpu_tier, int8_scaled_mm_cpu
from qtrain_kernels import int8_scaled_mm as declaration
from qtrain_kernels.int8_scaled_mm import MAX_K, int8_scaled_mm
from torch import Tensor

TIERS = [
    name for name in cpu_tier.TIERS if name == "torch" or not cpu_tier.NEEDS[name] - cpu_tier.cpu_flags()
]


def _bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> nearest bfloat16, ties to even, as float32; NaN stays."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def oracle(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> list[np.ndarray | Tensor]:  # fmt: skip
    """Integer sums one row at a time; float32 after that."""
    rows, columns = (np.array(t.tolist(), dtype=np.int64).reshape(t.shape) for t in (a, b))
    y = np.zeros((len(rows), len(columns)), dtype=np.float32)
    for m, row in enumerate(rows):
        y[m] = (columns * row).sum(axis=1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        if a_scale is not None:
            y = y * a_scale.numpy().reshape(-1, 1)
        if b_scale is not None:
            y = y * b_scale.numpy().reshape(1, -1)
    if bias is not None:
        y = y + bias.to(torch.float32).numpy()
    assert y.dtype == np.float32
    return [torch.from_numpy(_bf16(y)).to(dtype) if dtype == torch.bfloat16 else y]  # numpy has no bfloat16


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> cpu_tier.Tier:
    return cpu_tier._tier(request.param)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_tier_gives_the_bits_of_the_reference(tier: cpu_tier.Tier, threads: int) -> None:
    kernel = functools.partial(int8_scaled_mm.kernel("cpu"), on=tier)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert contract.failures(int8_scaled_mm, implementation=kernel) == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("M", "N", "K", "turned"),
    [
        pytest.param(300, 1100, 1000, False, id="several pieces of panels and of rows, K-major"),
        pytest.param(290, 1090, 1000, True, id="the same, transposed, the last four panels incomplete"),
        pytest.param(600, 40, 4100, True, id="several pieces of rows and parts of K"),
        pytest.param(100, 90, 1030, False, id="a last part of K of one line"),
    ],
)
def test_products_of_many_pieces(
    tier: cpu_tier.Tier, M: int, N: int, K: int, turned: bool, threads: int
) -> None:
    generator = torch.Generator().manual_seed(K)
    a, b = (
        torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in ((M, K), (N, K))
    )
    b = b.t().contiguous().t() if turned else b
    a_scale, b_scale, bias = (torch.rand(n, generator=generator) for n in (M, N, N))
    arguments = (a, b, a_scale, b_scale, bias, torch.bfloat16 if turned else torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = int8_scaled_mm.kernel("cpu")(*arguments, on=tier)
    finally:
        torch.set_num_threads(before)
    assert contract.same_bits(y, declaration.reference(*arguments))


@pytest.mark.parametrize("name", ["torch", *(name for name in TIERS if name == "avx2")])
def test_torch_s_chunks_give_the_bits_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_scaled_mm_cpu, "SUMS_BYTES", 1000)
    kernel = functools.partial(int8_scaled_mm.kernel("cpu"), on=cpu_tier._tier(name))
    assert contract.failures(int8_scaled_mm, implementation=kernel) == []


def test_the_peak_counts_the_products_of_all_threads() -> None:
    """AMX: 4 of 16 x 16 x 64 a step; vectors: 12 of 16 or 8 sums of four."""
    expected = {
        "amx": 40_000 * 4 * 16 * 16 * 64,
        "avx512_vnni": 500_000 * 12 * 64,
        "avx2_vnni": 500_000 * 12 * 32,
    }
    before = torch.get_num_threads()
    for name in TIERS:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = int8_scaled_mm_cpu.products_alone(cpu_tier._tier(name))
            torch.set_num_threads(before)
            assert (found and found[1]) == (2 * threads * expected[name] if name in expected else None)


def test_two_callers_at_once(tier: cpu_tier.Tier) -> None:
    """Scratch memory belongs to the calling thread."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [int8_scaled_mm.cases[name] for name in ("40x100x1100/bf16", "transposed/fp32") * 20]
    kernel = functools.partial(int8_scaled_mm.kernel("cpu"), on=tier)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: kernel(*case()), cases))
    for case, y in zip(cases, results, strict=True):
        assert contract.same_bits(y, declaration.reference(*case()))


def test_training_follows_inference(tier: cpu_tier.Tier) -> None:
    """Memory that is kept from a product under inference_mode is written to after it."""
    arguments = int8_scaled_mm.cases["per_tensor/bf16"]()
    kernel = functools.partial(int8_scaled_mm.kernel("cpu"), on=tier)
    int8_scaled_mm_cpu._scratch.__dict__.clear()
    with torch.inference_mode():
        kernel(*arguments)
    assert contract.same_bits(kernel(*arguments), declaration.reference(*arguments))


def test_non_finite_scales_show_in_their_row_or_column_and_nowhere_else(tier: cpu_tier.Tier) -> None:
    a, b, scale = torch.ones(6, 70, dtype=torch.int8), torch.ones(5, 70, dtype=torch.int8), torch.ones(6)
    a[2], b[3], scale[2] = 0, 0, float("inf")
    b_scale = torch.ones(5)
    b_scale[3] = float("nan")
    y = int8_scaled_mm.kernel("cpu")(a, b, scale, b_scale, None, torch.bfloat16, on=tier)
    expected = torch.full((6, 5), 70.0)
    expected[2], expected[:, 3] = float("nan"), float("nan")
    assert torch.equal(y.float().nan_to_num(-1), expected.nan_to_num(-1))


def _arguments(**change):
    codes = torch.zeros(2, 3, dtype=torch.int8)
    plain = {"a": codes, "b": codes, "a_scale": None, "b_scale": None, "bias": None}
    return {**plain, "out_dtype": torch.float32, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "must be int8"),
        ({"a": torch.zeros(2, 4, dtype=torch.int8)}, r"must be int8 \[M, K\] and \[N, K\]"),
        ({"a_scale": torch.ones(3)}, r"a_scale must be \[2\]"),
        ({"b_scale": torch.ones(2, dtype=torch.float64)}, "b_scale must be .* float32"),
        ({"bias": torch.ones(3)}, r"bias must be \[2\]"),
        ({"out_dtype": torch.float16}, "out_dtype=torch.float16: allowed are torch.float32, torch.bfloat16"),
        (
            {k: torch.zeros(1, 1, dtype=torch.int8).expand(2, MAX_K + 1) for k in ("a", "b")},
            "split the contraction",
        ),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        declaration.reference(**_arguments(**change))
    with pytest.raises(ValueError, match=message):
        int8_scaled_mm(**_arguments(**change))


def test_the_largest_contraction_is_exact(tier: cpu_tier.Tier) -> None:
    a = torch.full((1, MAX_K), -128, dtype=torch.int8)
    y = int8_scaled_mm.kernel("cpu")(a, a, None, None, None, torch.float32, on=tier)
    assert y.item() == float(np.float32(MAX_K * 2**14))


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(10))
def test_every_config_gives_the_same_bits(index: int) -> None:
    """On a GPU, the tiles of the rule whole and split and the specialised ones, on sizes that fill no tile."""
    _needs_gpu()
    from qtrain_kernels.scaled_mm_config import measurable, properties

    capability, _ = properties(torch.device("cuda"))
    configs = list(
        dict.fromkeys(c for d in declaration.OUT_DTYPES for c in measurable("int8", capability, 2048, d))
    )
    if index >= len(configs):
        pytest.skip("there are no more configs for this architecture")
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (
        torch.randint(-128, 128, (rows, 2080), generator=generator, device="cuda", dtype=torch.int8)
        for rows in (389, 660)
    )
    a_scale, b_scale = (torch.rand(len(x), generator=generator, device="cuda") for x in (a, b))
    for dtype in declaration.OUT_DTYPES:
        arguments = (a, b, a_scale, b_scale, None, dtype)
        y = int8_scaled_mm.kernel("cuda")(*arguments, config=configs[index])
        assert contract.same_bits(y, declaration.reference(*arguments)), configs[index].name


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """The last rows of an operand and of an output of more than 2^31 elements equal the same rows alone."""
    _needs_gpu()
    for M, N, K in ((2**17 + 3, 128, 2**14 + 16), (2**17 + 3, 2**14 + 16, 32)):
        a = torch.randint(-128, 128, (M, K), device="cuda", dtype=torch.int8)
        b = torch.randint(-128, 128, (N, K), device="cuda", dtype=torch.int8)
        y = int8_scaled_mm(a, b, None, None, None, torch.bfloat16)
        want = declaration.reference(a[-64:], b, None, None, None, torch.bfloat16)
        assert contract.same_bits(y[-64:], want)
        turned = a.t().contiguous().t()  # the copy to K-major reads and writes beyond 2^31 as well
        assert torch.equal(int8_scaled_mm(turned, b, None, None, None, torch.bfloat16), y)
