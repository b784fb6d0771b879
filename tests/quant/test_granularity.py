"""Tilings against slices taken in a loop."""

from __future__ import annotations

import pytest
import torch

from qtrain.quant import Granularity

SHAPES = [(1, 1), (1, 7), (5, 1), (4, 8), (5, 7), (9, 16)]
# text -> rows and columns of a block of an [F, K] matrix
TILINGS = {
    "tensor": lambda F, K: (F, K),
    "row": lambda F, K: (1, K),
    "column": lambda F, K: (F, 1),
    "group:1": lambda F, K: (1, 1),
    "group:3": lambda F, K: (1, 3),
    "group:4": lambda F, K: (1, 4),
    "group:32": lambda F, K: (1, 32),
    "block:2x3": lambda F, K: (2, 3),
    "block:4x8": lambda F, K: (4, 8),
    "block:3x1": lambda F, K: (3, 1),
    "block:64x64": lambda F, K: (64, 64),
}
CASES = [(text, shape) for text in TILINGS for shape in SHAPES]


def tiles(text: str, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """The blocks of x, ragged at the ends, cut out one by one."""
    r, c = TILINGS[text](*x.shape)
    return [[x[i : i + r, j : j + c] for j in range(0, x.shape[1], c)] for i in range(0, x.shape[0], r)]


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(1, 1 + shape[0] * shape[1], dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("tensor", None, None),
        ("row", 1, None),
        ("column", None, 1),
        ("group:128", 1, 128),
        ("group:016", 1, 16),
        ("group:10", 1, 10),
        ("block:128x64", 128, 64),
        ("block:1x10", 1, 10),
        ("block:20x1", 20, 1),
    ],
)
def test_parse(text, rows, columns):
    parsed = Granularity.parse(text)
    assert (parsed.rows, parsed.columns) == (rows, columns)
    assert parsed == Granularity(rows, columns)
    assert len({parsed, Granularity(rows, columns)}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Row",
        "rows",
        "row ",
        "group",
        "group:",
        "group:0",
        "group:00",
        "group:-1",
        "group:4x4",
        "group:1.5",
        "block:3",
        "block:0x4",
        "block:4x0",
        "block:4x00",
        "block:4x4x4",
        "block:x4",
        "xgroup:4",
        "group:4 ",
        "tensor\n",
    ],
)
def test_malformed(text):
    with pytest.raises(ValueError, match="granularity") as raised:
        Granularity.parse(text)
    assert str(raised.value) == (
        f"granularity {text!r}: allowed are tensor, row, column, group:G and block:RxC with positive G, R, C, "
        "for example group:128 or block:128x128"
    )


@pytest.mark.parametrize(
    ("text", "folds"),
    [
        ("tensor", True),
        ("row", True),
        ("column", False),
        ("group:4", False),
        ("group:1", False),
        ("block:2x3", False),
    ],
)
def test_folds(text, folds):
    assert Granularity.parse(text).folds is folds


def test_several_whole_rows_do_not_fold_into_an_epilogue_of_one_scale_a_row():
    assert Granularity(2, None).folds is False


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_shapes(text, shape):
    cut = tiles(text, matrix(shape))
    tiling = Granularity.parse(text)
    assert tiling.scale_shape(*shape) == (len(cut), len(cut[0]))
    assert tiling.block_shape(*shape) == TILINGS[text](*shape)


def test_shapes_of_empty_matrices():
    assert Granularity.parse("tensor").block_shape(0, 0) == (1, 1)
    assert Granularity.parse("row").block_shape(3, 0) == (1, 1)
    assert Granularity.parse("column").block_shape(0, 3) == (1, 1)
    assert Granularity.parse("row").scale_shape(3, 0) == (3, 0)
    assert Granularity.parse("tensor").scale_shape(0, 5) == (0, 1)
    assert Granularity.parse("group:4").scale_shape(0, 5) == (0, 2)


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_blocks_hold_the_slices_and_zeros(text, shape):
    x = matrix(shape)
    tiling = Granularity.parse(text)
    blocks = tiling.blocks(x)
    r, c = TILINGS[text](*shape)
    for i, line in enumerate(tiles(text, x)):
        for j, tile in enumerate(line):
            block = blocks[i, :, j, :]
            assert block.shape == (r, c)
            assert torch.equal(block[: tile.shape[0], : tile.shape[1]], tile)
            assert block.count_nonzero() == tile.numel()  # x has no zeros: the filling has nothing else
    back = tiling.unblock(blocks, shape)
    assert back.shape == shape
    assert torch.equal(back, x)


def test_a_view_where_nothing_is_ragged():
    x = matrix((4, 8))
    for text in ("tensor", "row", "column", "group:4", "block:2x2"):
        assert Granularity.parse(text).blocks(x).data_ptr() == x.data_ptr()
    assert Granularity.parse("group:3").blocks(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("text", "shape"), CASES)
def test_expand_and_counts(text, shape):
    x = matrix(shape)
    tiling = Granularity.parse(text)
    cut = tiles(text, x)
    scale = torch.rand(len(cut), len(cut[0]), generator=torch.Generator().manual_seed(0)) + 0.5
    r, c = TILINGS[text](*shape)
    want = torch.stack(
        [torch.stack([scale[i // r, j // c] for j in range(shape[1])]) for i in range(shape[0])]
    )
    assert torch.equal(tiling.expand(scale, shape).broadcast_to(shape), want)

    counts = tiling.counts(shape, x.device)
    assert counts.dtype == torch.float32
    assert counts.shape == (len(cut), 1, len(cut[0]), 1)
    assert counts[:, 0, :, 0].tolist() == [[tile.numel() for tile in line] for line in cut]


def test_scales_that_broadcast_are_not_copied():
    for text, shape in (("tensor", (1, 1)), ("row", (4, 1)), ("column", (1, 8))):
        scale = torch.ones(shape)
        assert Granularity.parse(text).expand(scale, (4, 8)) is scale


def test_counts_of_an_empty_matrix():
    assert Granularity.parse("tensor").counts((0, 0), torch.device("cpu")).tolist() == [[[[0.0]]]]
