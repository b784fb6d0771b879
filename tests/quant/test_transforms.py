"""Hadamard transforms against their definition."""

from __future__ import annotations

import pytest
import torch

from qtrain.quant import Hadamard, Transform

BLOCKS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def definition(block: int) -> torch.Tensor:
    """H[i, j] = (-1)^popcount(i & j) / sqrt(B), float64."""
    signs = [[(-1.0) ** ((i & j).bit_count()) for j in range(block)] for i in range(block)]
    return torch.tensor(signs, dtype=torch.float64) / block**0.5


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_of(k: int) -> torch.Tensor:
    return torch.where(data(k, seed=9) < 0, -1.0, 1.0)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix(block):
    """The rows of the identity give the rows of H: exact signs, one rounding of 1/sqrt(B)."""
    h = Hadamard(block).forward(torch.eye(block))
    assert h.dtype == torch.float32
    if block <= 256:
        assert torch.equal(h, definition(block).to(torch.float32))
    assert torch.allclose(h @ h.t(), torch.eye(block), atol=2e-6)
    assert torch.equal(h, h.t())


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("block", [2, 8, 64])
def test_forward_and_inverse_against_the_definition(block, randomized):
    transform = Hadamard(block, randomized)
    k = 3 * block
    x = data(5, k)
    signs = signs_of(k) if randomized else None
    h = torch.block_diag(*[definition(block)] * 3)
    d = torch.diag((torch.ones(k) if signs is None else signs).double())
    want = x.double() @ d @ h
    y = transform.forward(x, signs)
    # sums of up to 64 float32 products of numbers near 1
    assert torch.allclose(y.double(), want, atol=1e-5)
    assert torch.allclose(transform.inverse(x, signs).double(), x.double() @ h.t() @ d, atol=1e-5)
    assert torch.allclose(transform.inverse(y, signs), x, atol=1e-5)
    assert torch.allclose(y.square().sum(1), x.square().sum(1), rtol=1e-5)


@pytest.mark.parametrize("randomized", [False, True])
def test_the_product_is_kept_if_both_operands_share_it(randomized):
    a, b = data(4, 96), data(6, 96, seed=1)
    transform = Hadamard(32, randomized)
    signs = signs_of(96) if randomized else None
    product = transform.forward(a, signs) @ transform.forward(b, signs).t()
    assert torch.allclose(product, a @ b.t(), atol=2e-5)
    if randomized:
        other = transform.forward(b, -signs.roll(1))
        assert not torch.allclose(transform.forward(a, signs) @ other.t(), a @ b.t(), atol=0.1)


def test_leading_dimensions_and_dtype():
    transform = Hadamard(4)
    x = data(2, 3, 8)
    y = transform.forward(x)
    assert y.shape == x.shape
    assert torch.equal(y[1, 2], transform.forward(x[1, 2]))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = x.to(dtype)
        assert transform.forward(low).dtype == transform.inverse(low).dtype == torch.float32
        assert torch.equal(transform.forward(low), transform.forward(low.to(torch.float32)))
    assert torch.equal(transform.forward(x.transpose(0, 1)), y.transpose(0, 1))


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 256)
    x[0, 5] = 16.0
    y = Hadamard(128).forward(x)
    assert torch.allclose(y[0, :128].abs(), torch.full((128,), 16 / 128**0.5))
    assert not y[0, 128:].any()


@pytest.mark.parametrize("block", BLOCKS)
def test_parse(block):
    assert Transform.parse(f"hadamard:{block}") == Hadamard(block)
    assert Transform.parse(f"rht:{block}") == Hadamard(block, randomized=True)
    assert Transform.parse(f"hadamard:{block}").randomized is False
    assert Transform.parse(f"rht:{block}").randomized is True
    for text in (f"hadamard:{block}", f"rht:{block}"):
        assert str(Transform.parse(text)) == text
    assert Hadamard(block) != Hadamard(block, True)
    assert hash(Hadamard(block)) == hash(Transform.parse(f"hadamard:{block}"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hadamard",
        "hadamard:",
        "hadamard:0",
        "hadamard:1",
        "hadamard:3",
        "hadamard:12",
        "hadamard:2048",
        "rht:6",
        "rht:-4",
        "rht:4.0",
        "Hadamard:4",
        "dct:8",
        "xrht:8",
        "rht:8 ",
    ],
)
def test_malformed(text):
    with pytest.raises(ValueError, match="transform") as raised:
        Transform.parse(text)
    assert (
        str(raised.value)
        == f"transform {text!r}: allowed are hadamard:B and rht:B, B a power of two from 2 to 1024, or package.module:Name"
    )


@pytest.mark.parametrize("block", [-4, 0, 1, 3, 6, 1023, 1025, 2048])
def test_blocks_are_checked_at_construction(block):
    with pytest.raises(
        ValueError, match=rf"^a Hadamard block of {block}: allowed are powers of two from 2 to 1024$"
    ):
        Hadamard(block)


@pytest.mark.parametrize(
    ("contraction", "remedy"),
    [
        (96, "use a block of 32 or exclude the layer"),
        (130, "use a block of 2 or exclude the layer"),
        (1, "exclude the layer"),
        (129, "exclude the layer"),
        (192, "use a block of 64 or exclude the layer"),
    ],
)
def test_a_block_that_does_not_divide_names_the_largest_that_does(contraction, remedy):
    for text in ("hadamard:128", "rht:128"):
        with pytest.raises(ValueError, match="divisible") as raised:
            Transform.parse(text).check(contraction, "blocks.0.up (fprop)")
        assert str(raised.value) == (
            f"blocks.0.up (fprop): the transform {text} needs a contraction divisible by 128, got {contraction}; {remedy}"
        )


def test_the_largest_remedy():
    with pytest.raises(ValueError, match="use a block of 512 or"):
        Hadamard(1024).check(512 * 3, "x")
    # 1024 itself fits 3072, so it is what a longer block would be told, were there one
    Hadamard(1024).check(3072, "x")


@pytest.mark.parametrize("contraction", [128, 256, 384])
def test_a_block_that_divides(contraction):
    assert Hadamard(128).check(contraction, "x") is None


def test_signs_exactly_when_randomized():
    x = data(2, 8)
    for method in ("forward", "inverse"):
        with pytest.raises(
            ValueError, match=r"^the transform rht:4 needs signs; rht:4 is the randomized one$"
        ):
            getattr(Hadamard(4, True), method)(x)
        with pytest.raises(
            ValueError, match=r"^the transform hadamard:4 takes no signs; rht:4 is the randomized one$"
        ):
            getattr(Hadamard(4), method)(x, torch.ones(8))


def test_frozen():
    with pytest.raises(AttributeError):
        Hadamard(4).block = 8  # type: ignore[misc]
