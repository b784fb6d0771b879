"""QuantSpec: what it refuses, and in which words."""

from __future__ import annotations

import math
import re

import pytest

from qtrain.quant import QuantSpec
from qtrain.quant.formats import format_names
from qtrain.quant.spec import CLIPS, LAYOUTS, MODIFIERS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"scale_format": "e8m1"},
            "scale_format='e8m1': allowed are float32, e8m0, e8m0_ceil, e8m0_down, e8m0_prescale, e4m3; did you mean e8m0?",
        ),
        (
            {"scale_format": "?"},
            "scale_format='?': allowed are float32, e8m0, e8m0_ceil, e8m0_down, e8m0_prescale, e4m3",
        ),
        (
            {"rounding": "stochastik"},
            "rounding='stochastik': allowed are nearest, stochastic; did you mean stochastic?",
        ),
        (
            {"estimator": "clip"},
            "estimator='clip': allowed are ste, clipped, trust, seq, package.module:Name; did you mean clipped?",
        ),
        ({"estimator": "xyz"}, "estimator='xyz': allowed are ste, clipped, trust, seq, package.module:Name"),
        ({"clip": "max"}, f"clip='max': allowed are {CLIPS}"),
        ({"clip": "rms"}, f"clip='rms': allowed are {CLIPS}"),
        ({"clip": "rms:"}, f"clip='rms:': allowed are {CLIPS}"),
        ({"clip": "rms:."}, f"clip='rms:.': allowed are {CLIPS}"),
        ({"clip": "rms:1.2.3"}, f"clip='rms:1.2.3': allowed are {CLIPS}"),
        ({"clip": "rms:-1"}, f"clip='rms:-1': allowed are {CLIPS}"),
        (
            {"clip": "percentile:x"},
            f"clip='percentile:x': allowed are {CLIPS}",
        ),
        ({"clip": "absmean:0"}, "clip='absmean:0': the number must be positive, for example absmean:2.5"),
        ({"clip": "fixed:0"}, "clip='fixed:0': the number must be positive, for example fixed:2.5"),
        ({"clip": "fixed"}, f"clip='fixed': allowed are {CLIPS}"),
        ({"clip": "delayed:0"}, "clip='delayed:0': needs a whole number of steps, for example delayed:16"),
        ({"clip": "static:1.5"}, "clip='static:1.5': needs a whole number of steps, for example static:16"),
        ({"clip": "four_six"}, "clip='four_six' with format 'int4': 4 and 6 are levels of e2m1"),
        (
            {"clip": "delayed:4", "scale_format": "e4m3", "tensor_scale": True},
            "clip='delayed:4' with tensor_scale=True: a range with state has one scale a block; use absmax",
        ),
        (
            {"clip": "learned", "scale_format": "e8m0", "estimator": "clipped"},
            "clip='learned' with scale_format='e8m0': the step is learned as a float32 number",
        ),
        (
            {"clip": "learned"},
            "clip='learned' with estimator='ste': the step's gradient tells clipped values apart; allowed are clipped "
            "(LSQ) and seq (ParetoQ)",
        ),
        (
            {"symmetric": False, "clip": "learned"},
            "clip='learned' is symmetric; with symmetric=False use absmax, percentile:P or mse",
        ),
        ({"levels": [0, 1]}, "levels with format 'int4': they belong to format codebook"),
        (
            {"format": "codebook"},
            "format 'codebook' needs its levels: a mapping {format: codebook, levels: [-1, 0, 0.5, 1]}",
        ),
        (
            {"format": "codebook", "levels": [1, 0]},
            "codebook 'codebook' needs 2 to 256 strictly increasing levels, got 2",
        ),
        ({"clip": "rms:0"}, "clip='rms:0': the number must be positive, for example rms:2.5"),
        (
            {"clip": "percentile:49.9"},
            "clip='percentile:49.9': the percentile must lie in 50..100, for example percentile:99.9",
        ),
        (
            {"clip": "percentile:100.1"},
            "clip='percentile:100.1': the percentile must lie in 50..100, for example percentile:99.9",
        ),
        (
            {"format": "e4m3", "symmetric": False},
            "symmetric=False with format 'e4m3': a zero point needs an integer format, int2..int8",
        ),
        (
            {"format": "midrise4", "symmetric": False},
            "symmetric=False with format 'midrise4': a zero point needs an integer format, int2..int8",
        ),
        (
            {"symmetric": False, "clip": "rms:2"},
            "clip='rms:2' is symmetric; with symmetric=False use absmax, percentile:P or mse",
        ),
        (
            {"symmetric": False, "clip": "gaussian"},
            "clip='gaussian' is symmetric; with symmetric=False use absmax, percentile:P or mse",
        ),
        (
            {"symmetric": False, "scale_format": "e8m0"},
            "scale_format='e8m0' with symmetric=False: a zero point needs scale_format=float32",
        ),
        (
            {"tensor_scale": True},
            "tensor_scale=True with scale_format='float32': a second level needs scale_format=e4m3",
        ),
        (
            {"tensor_scale": True, "scale_format": "e8m0"},
            "tensor_scale=True with scale_format='e8m0': a second level needs scale_format=e4m3",
        ),
        ({"min_scale": 0.0}, "min_scale=0.0: must be at least 2^-100 and finite"),
        ({"min_scale": 2.0**-101}, f"min_scale={2.0**-101!r}: must be at least 2^-100 and finite"),
        ({"min_scale": math.inf}, "min_scale=inf: must be at least 2^-100 and finite"),
        ({"min_scale": math.nan}, "min_scale=nan: must be at least 2^-100 and finite"),
    ],
)
def test_validation(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        QuantSpec(**{"format": "int4", **fields})
    assert str(raised.value) == message


def test_format_and_granularity_are_checked_at_construction():
    with pytest.raises(ValueError, match=r"^unknown number format 'int44'; did you mean "):
        QuantSpec(format="int44")
    with pytest.raises(ValueError, match=r"^granularity 'rows': allowed are "):
        QuantSpec(format="int4", granularity="rows")


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": "percentile:50"},
        {"clip": "percentile:100"},
        {"clip": "percentile:99.99"},
        {"clip": "rms:0.001"},
        {"clip": "rms:.5"},
        {"clip": "rms:3."},
        {"min_scale": 2.0**-100},
        {"min_scale": 1e30},
        {"format": "uint4", "symmetric": False},
        {"symmetric": False, "clip": "mse"},
        {"symmetric": False, "clip": "percentile:99"},
        {"tensor_scale": True, "scale_format": "e4m3"},
        {"scale_format": "e4m3"},
    ],
)
def test_what_is_allowed(fields):
    spec = QuantSpec(**{"format": "int4", **fields})
    assert all(getattr(spec, k) == v for k, v in fields.items())


@pytest.mark.parametrize(
    ("text", "word", "near"),
    [
        ("int4_rows", "rows", "; did you mean row?"),
        ("int4_row_tust", "tust", "; did you mean trust?"),
        ("int4_group", "group", None),
        ("int4_groupx", "groupx", None),
        ("int4_block4", "block4", None),
        ("int4_row_", "", ""),
        ("int4_row_qqq", "qqq", ""),
        ("mxfp4_e4m3", "e4m3", ""),
    ],
)
def test_unknown_words(text, word, near):
    with pytest.raises(ValueError, match="in the spec") as raised:
        QuantSpec.parse(text)
    message = str(raised.value)
    head = (
        f"{word!r} in the spec {text!r}: allowed are a granularity (tensor, row, column, group<G>, block<R>x<C>) "
        f"and modifiers ({', '.join(MODIFIERS)}, static<N>, delayed<H>)"
    )
    assert message.startswith(head)
    if near is not None:
        assert message == head + near


def test_a_group_of_zero_is_refused_by_the_granularity():
    with pytest.raises(ValueError, match=r"^granularity 'group:0'"):
        QuantSpec.parse("int4_group0")


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("int44_row", "; did you mean int4?"),
        ("mxfp5", "; did you mean mxfp"),
        ("qq_row", "."),
        ("", "."),
        ("_int4", "."),
    ],
)
def test_unknown_formats(text, near):
    with pytest.raises(ValueError, match="is no number format") as raised:
        QuantSpec.parse(text)
    message = str(raised.value)
    first = text.split("_")[0]
    assert message.startswith(f"spec {text!r}: {first!r} is no number format{near}")
    allowed = ", ".join([*format_names(), *LAYOUTS])
    assert message.endswith(f" Allowed: {allowed}, as in int4_row or int8_group128_sr")
    assert message.count("did you mean") == (near != ".")


def test_of():
    with pytest.raises(ValueError, match="field of a spec") as raised:
        QuantSpec.of({"format": "int4", "granularty": "row"})
    assert str(raised.value) == (
        "field of a spec='granularty': allowed are format, granularity, symmetric, clip, scale_format, tensor_scale, "
        "rounding, estimator, min_scale, levels; did you mean granularity?"
    )
    for value, name in ((3, "int"), (None, "NoneType"), (["int4"], "list")):
        with pytest.raises(TypeError) as wrong:
            QuantSpec.of(value)  # type: ignore[arg-type]
        assert str(wrong.value) == (
            f"a spec is a QuantSpec, its short form or a mapping, not {name}: {value!r}"
        )
    with pytest.raises(TypeError):
        QuantSpec.of({"granularity": "row"})  # no format
