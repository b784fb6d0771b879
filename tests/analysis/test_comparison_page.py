"""The page, the pictures and the numbers say what the comparison found, to people without scripts too."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import healthy_losses, write_curve_run
from test_arms import QUANTIZED
from test_comparison import pair_of_arms

from qtrain.analysis import comparison_figures, comparison_page
from qtrain.analysis.comparison import compare
from qtrain.analysis.comparison_figures import band, color, marker
from qtrain.analysis.comparison_page import _thin
from qtrain.analysis.comparison_table import COLUMNS, count, headline, numbers, table_rows
from qtrain.analysis.run_records import read_run

EVIL = "<script>alert(1)</script>&$x_{$"


@pytest.fixture
def comparison(tmp_path: Path):
    """base and arm of three seeds; arm diverged in a fourth; an arm with an evil name and logged SQNR of one seed."""
    records = pair_of_arms(tmp_path)
    risen = healthy_losses(100, 3)
    risen[50:] += 4.0
    logged = [{"step": s, "quant/blocks.0.mlp/fprop.input/sqnr_db": 20.0 - s / 10} for s in (20, 40, 60)]
    records += [
        read_run(write_curve_run(tmp_path, "base", 3, healthy_losses(100, 3))),
        read_run(write_curve_run(tmp_path, "arm", 3, risen, **QUANTIZED)),
        read_run(
            write_curve_run(
                tmp_path, "evil", 0, healthy_losses(100, 9), instruments=logged, **QUANTIZED, tag=EVIL
            )
        ),
    ]
    found = compare(records)
    object.__setattr__(found.arms[2].arm, "label", EVIL)
    return found


def without_scripts(page: str) -> str:
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.S)))


def test_the_page_is_whole_and_readable_without_scripts(comparison, tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    comparison_page.save(comparison, ["arm: too far"], "qtrain compare runs=[a]", b"png", path)
    page = path.read_text()
    assert 4_000_000 < len(page) < comparison_page.LIMIT_BYTES
    text = without_scripts(page)
    for part in (*COLUMNS, "Against base", "+1.15 (", "3 of 3, 0.25 (least 0.25)", "diverged: the loss rose from step 51",
                 "Gates that do not pass: arm: too far", "qtrain compare runs=[a]", "14.0 dB blocks.0.mlp fprop.input (step 60)"):  # fmt: skip
        assert part in text, part
    # Nothing is fetched, and no name is markup
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", page)
    assert EVIL not in page
    assert "alert(1)" in text
    assert page.count("Plotly.newPlot(") == 5
    assert '<noscript><img alt="loss curves and gaps" src="data:image/png;base64,cG5n">' in page
    assert list(tmp_path.glob(".*partial*")) == []


def test_too_large_a_page_is_refused(comparison, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(comparison_page, "LIMIT_BYTES", 1000)
    with pytest.raises(ValueError, match="html=false"):
        comparison_page.save(comparison, [], "", b"", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_plotly_the_command_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ValueError, match=r"pip install 'qtrain\[report\]'"):
        comparison_page.check_page()


def test_pictures(comparison, tmp_path: Path) -> None:
    for name, begin in (("c.png", b"\x89PNG"), ("c.pdf", b"%PDF")):
        comparison_figures.save(comparison, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    curves, forest = comparison_figures.draw(comparison).axes
    assert [text.get_text() for text in curves.get_legend().get_texts()] == [
        "base",
        "arm",
        EVIL.replace("$", r"\$"),
    ]
    assert [label.get_text() for label in forest.get_yticklabels()] == ["arm", EVIL.replace("$", r"\$")]
    thick = [line for line in forest.get_lines() if line.get_linewidth() == 2.2]
    gap = comparison.arms[1].gap_fraction
    assert thick[0].get_xdata() == pytest.approx([100 * gap.low, 100 * gap.high])
    # Gaps below 5 % need no other axis
    assert forest.get_xscale() == "linear"
    # The run that diverged does not set the range
    assert curves.get_ylim()[1] < 5.5


def test_one_wide_gap_leaves_room_for_the_others(tmp_path: Path) -> None:
    runs = [("base", 0.0, {}), *((f"arm{i}", g, {"tag": i}) for i, g in enumerate((0.01, 1.0, *[0.0] * 25)))]
    found = compare([read_run(write_curve_run(tmp_path, n, 0, healthy_losses(100, 0) + g, **o)) for n, g, o in runs], baseline="base")  # fmt: skip
    curves, forest = comparison_figures.draw(found).axes
    assert forest.get_xscale() == "symlog"
    low, high = forest.get_xlim()
    assert low <= -1
    assert high > 38  # 100 * 1 / 2.6, and more
    # No two of the arms that are shown look alike
    drawn = [(line.get_color(), line.get_marker()) for line in curves.get_lines()]
    assert len(set(drawn)) == len(drawn) == comparison_figures.MOST_ARMS
    assert len({(color(i), marker(i)) for i in range(25)}) == 25


def test_a_band_is_over_the_sound_runs_at_common_tokens(comparison) -> None:
    at, mean, low, high = band(comparison.arms[1])
    # Seeds 0 to 2 were evaluated every 20 steps; 2.5 + 0.1 s + 0.8 + gap at step 20
    assert at.tolist() == [640, 1280, 1920, 2560, 3200]
    first = [3.3 + 0.02, 3.4 + 0.05, 3.5 + 0.02]
    assert (mean[0], low[0], high[0]) == pytest.approx((np.mean(first), min(first), max(first)))
    assert color(0) != color(1) == color(7)


def test_thinning_keeps_the_end_and_drops_what_is_not_finite() -> None:
    x = np.arange(1000.0)
    y = np.where(x % 100 == 50, np.nan, x)
    thin_x, thin_y = _thin(x, y, 10)
    assert (len(thin_x), thin_x[-1], thin_x.dtype) == (10, 999, np.float32)
    assert thin_y == pytest.approx(np.arange(49.5, 1000, 100), abs=1)
    assert [len(v) for v in _thin(x[:5], y[:5], 10)] == [5, 5]


def test_numbers_are_json_and_those_of_the_table(comparison) -> None:
    found = json.loads(json.dumps(numbers(comparison, ["a gate"]), allow_nan=False))
    arm = found["arms"][1]
    assert arm["gap_fraction"]["mean"] == pytest.approx(comparison.arms[1].gap_fraction.mean)
    assert arm["gap_nats"]["by_seed"] == pytest.approx({"0": 0.02, "1": 0.05, "2": 0.02})
    assert (arm["unstable_runs"], arm["judged_runs"], found["gate_failures"]) == (1, 4, ["a gate"])
    assert arm["runs"]["3"]["verdict"] == "diverged"
    assert arm["runs"]["3"]["first_step"] == 51
    rows = table_rows(comparison)
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert rows[1][1] == "3 healthy, 1 diverged"
    assert rows[1][COLUMNS.index("unstable")] == "1 of 4"
    assert "arm: 1 of 4 runs went wrong" in headline(comparison)
    assert "from one seed, which tells nothing of another" in headline(comparison)


def test_what_is_not_finite_is_a_string(tmp_path: Path) -> None:
    runs = [write_curve_run(tmp_path, "base", 0, healthy_losses(100, 0)),
            write_curve_run(tmp_path, "arm", 0, healthy_losses(100, 1), validation={50: 3.0, 100: math.nan}, **QUANTIZED)]  # fmt: skip
    found = json.loads(json.dumps(numbers(compare([read_run(r) for r in runs]), []), allow_nan=False))
    assert found["arms"][1]["runs"]["0"]["val_loss"] == "nan"


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (81_920, "81.9k"), (-1.5e6, "-1.5M"), (2e9, "2B")])
def test_counts(value: float, text: str) -> None:
    assert count(value) == text
