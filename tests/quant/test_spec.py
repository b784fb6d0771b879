"""QuantSpec: grammar, defaults, validation."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant import Granularity, QuantSpec, get_format
from qtrain.quant.formats import CodebookFormat, IntegerFormat, format_names
from qtrain.quant.ranges import gaussian_clip
from qtrain.quant.spec import CLIPS, ESTIMATORS, LAYOUTS, MODIFIERS, ROUNDINGS, SCALE_FORMATS

PROFILE = settings(deadline=None, derandomize=True, max_examples=80)
PLUGIN = CodebookFormat("thirds", (-1.0, 0.0, 1.0))


WORDS = [
    "sr",
    "asym",
    "mse",
    "gaussian",
    "clipped",
    "trust",
    "seq",
    "absmean",
    "four_six",
    "floor",
    "ceil",
    "down",
    "prescale",
    "learned",
    "static",
    "delayed",
]


def fields_of(spec: QuantSpec) -> dict[str, object]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}


DEFAULTS = {
    "granularity": "row",
    "symmetric": True,
    "clip": "absmax",
    "scale_format": "float32",
    "tensor_scale": False,
    "rounding": "nearest",
    "estimator": "ste",
    "min_scale": 2.0**-100,
    "levels": (),
}


def test_defaults():
    assert fields_of(QuantSpec(format="int4")) == {"format": "int4", **DEFAULTS}


def test_the_allowed_words():
    assert SCALE_FORMATS == ("float32", "e8m0", "e8m0_ceil", "e8m0_down", "e8m0_prescale", "e4m3")
    assert ROUNDINGS == ("nearest", "stochastic")
    assert ESTIMATORS == ("ste", "clipped", "trust", "seq")
    assert CLIPS == (
        "absmax, percentile:P, mse, rms:K, gaussian, absmean:K, four_six, fixed:A, learned, static:N, delayed:H, "
        "package.module:Name"
    )
    assert list(MODIFIERS) == WORDS
    assert list(LAYOUTS) == ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"]


PARSED = {
    "int4": {"format": "int4"},
    "int4_row": {"format": "int4"},
    "int8_tensor": {"format": "int8", "granularity": "tensor"},
    "int8_column": {"format": "int8", "granularity": "column"},
    "int4_group128": {"format": "int4", "granularity": "group:128"},
    "e4m3_block128x64": {"format": "e4m3", "granularity": "block:128x64"},
    "int4_group128_asym": {"format": "int4", "granularity": "group:128", "symmetric": False},
    "int8_row_sr": {"format": "int8", "rounding": "stochastic"},
    "int8_sr_tensor": {"format": "int8", "granularity": "tensor", "rounding": "stochastic"},
    "int4_row_mse": {"format": "int4", "clip": "mse"},
    "midrise4_row_gaussian_trust": {"format": "midrise4", "clip": "gaussian", "estimator": "trust"},
    "int4_clipped": {"format": "int4", "estimator": "clipped"},
    "dynamic8_unsigned": {"format": "dynamic8_unsigned"},
    "dynamic8_unsigned_group256": {"format": "dynamic8_unsigned", "granularity": "group:256"},
    "dynamic8_tensor": {"format": "dynamic8", "granularity": "tensor"},
    "linear4_nozero_row_sr": {"format": "linear4_nozero", "rounding": "stochastic"},
    "int2_asym_mse_sr_trust": {
        "format": "int2",
        "symmetric": False,
        "clip": "mse",
        "rounding": "stochastic",
        "estimator": "trust",
    },
    "mxfp8": {"format": "e4m3", "granularity": "group:32", "scale_format": "e8m0_ceil"},
    "mxfp4": {"format": "e2m1", "granularity": "group:32", "scale_format": "e8m0"},
    "mxint8": {"format": "int8", "granularity": "group:32", "scale_format": "e8m0_ceil"},
    "nvfp4": {"format": "e2m1", "granularity": "group:16", "scale_format": "e4m3", "tensor_scale": True},
    "nvfp4_sr": {
        "format": "e2m1",
        "granularity": "group:16",
        "scale_format": "e4m3",
        "tensor_scale": True,
        "rounding": "stochastic",
    },
    "nvfp4_block16x16": {
        "format": "e2m1",
        "granularity": "block:16x16",
        "scale_format": "e4m3",
        "tensor_scale": True,
    },
    "mxfp4_row": {"format": "e2m1", "granularity": "row", "scale_format": "e8m0"},
    "mxfp8_floor": {"format": "e4m3", "granularity": "group:32", "scale_format": "e8m0"},
    "mxfp8_e5m2_sr": {
        "format": "e5m2",
        "granularity": "group:32",
        "scale_format": "e8m0_ceil",
        "rounding": "stochastic",
    },
    "mxfp6": {"format": "e2m3", "granularity": "group:32", "scale_format": "e8m0_ceil"},
    "mxfp6_e3m2_floor": {"format": "e3m2", "granularity": "group:32", "scale_format": "e8m0"},
    "mxfp4_prescale_sr": {
        "format": "e2m1",
        "granularity": "group:32",
        "scale_format": "e8m0_prescale",
        "rounding": "stochastic",
    },
    "nvfp4_four_six": {
        "format": "e2m1",
        "granularity": "group:16",
        "scale_format": "e4m3",
        "tensor_scale": True,
        "clip": "four_six",
    },
    "e2m1_four_six_group16_clipped": {
        "format": "e2m1",
        "granularity": "group:16",
        "clip": "four_six",
        "estimator": "clipped",
    },
    "ternary_tensor_absmean": {"format": "ternary", "granularity": "tensor", "clip": "absmean:1"},
    "power4p0.5_group32": {"format": "power4p0.5", "granularity": "group:32"},
    "int4_learned": {"format": "int4", "clip": "learned", "estimator": "clipped"},
    "ternary_learned_seq": {"format": "ternary", "clip": "learned", "estimator": "seq"},
    "int8_tensor_static": {"format": "int8", "granularity": "tensor", "clip": "static:16"},
    "int8_tensor_static3": {"format": "int8", "granularity": "tensor", "clip": "static:3"},
    "e4m3_tensor_delayed32": {"format": "e4m3", "granularity": "tensor", "clip": "delayed:32"},
    "int4_row_group8": {"format": "int4", "granularity": "group:8"},
}


@pytest.mark.parametrize(("text", "want"), PARSED.items())
def test_parse(text, want):
    assert fields_of(QuantSpec.parse(text)) == {**DEFAULTS, **want}
    assert QuantSpec.of(text) == QuantSpec.parse(text)
    assert QuantSpec.of(want) == QuantSpec.parse(text)


@pytest.mark.parametrize("name", format_names())
def test_every_format_parses(name):
    assert QuantSpec.parse(name).format == name
    assert QuantSpec.parse(f"{name}_group4_sr").granularity == "group:4"


def test_the_granularity_where_the_text_names_none():
    assert QuantSpec.parse("int4", granularity="group:8").granularity == "group:8"
    assert QuantSpec.parse("int4_tensor", granularity="group:8").granularity == "tensor"
    assert QuantSpec.parse("mxfp4", granularity="row").granularity == "group:32"
    assert QuantSpec.of("int4", granularity="tensor").granularity == "tensor"
    assert QuantSpec.of({"format": "int4"}, granularity="tensor").granularity == "tensor"
    assert QuantSpec.of({"format": "int4", "granularity": "row"}, granularity="tensor").granularity == "row"
    spec = QuantSpec(format="int4")
    assert QuantSpec.of(spec, granularity="tensor") is spec


def test_layouts_are_not_changed_by_parsing():
    QuantSpec.parse("mxfp4_row_sr")
    assert LAYOUTS["mxfp4"] == {"format": "e2m1", "granularity": "group:32", "scale_format": "e8m0"}


@PROFILE
@given(
    name=st.sampled_from([*format_names(), "mxfp4", "nvfp4"]),
    granularity=st.sampled_from(["", "row", "tensor", "column", "group16", "block4x8"]),
    words=st.lists(st.sampled_from(["sr", "mse", "clipped", "trust"]), max_size=3, unique=True),
)
def test_round_trips(name, granularity, words):
    spec = QuantSpec.parse("_".join(w for w in (name, granularity, *words) if w))
    assert QuantSpec.of(fields_of(spec)) == spec
    assert QuantSpec.of(dataclasses.asdict(spec)) == spec
    assert hash(QuantSpec.of(dataclasses.asdict(spec))) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec) == spec


def test_a_plugin_is_never_split():
    spec = QuantSpec.parse(f"{__name__}:PLUGIN") if ":" not in __name__ else None
    assert spec is not None
    assert spec.granularity == "row"
    assert spec.number_format == PLUGIN
    assert QuantSpec.parse(f"{__name__}:PLUGIN", granularity="tensor").granularity == "tensor"
    assert spec.bits == 2


# --- what is derived --------------------------------------------------------------------------------------------


def test_number_format():
    assert QuantSpec(format="int4").number_format == IntegerFormat(4)
    assert QuantSpec(format="int4", symmetric=False).number_format == IntegerFormat(4, signed=False)
    assert QuantSpec(format="e4m3").number_format == get_format("e4m3")
    assert QuantSpec(format="int3", symmetric=False).bits == 3
    assert QuantSpec(format="dynamic8").bits == 8


def test_blocks_and_folds():
    assert QuantSpec(format="int4", granularity="block:2x3").blocks == Granularity(2, 3)
    for granularity, folds in (("tensor", True), ("row", True), ("column", False), ("group:4", False)):
        assert QuantSpec(format="int4", granularity=granularity).folds is folds


def test_stochastic():
    assert QuantSpec(format="int4", rounding="stochastic").stochastic is True
    assert QuantSpec(format="int4").stochastic is False


@pytest.mark.parametrize(
    ("clip", "want"),
    [
        ("absmax", ("absmax", 0.0)),
        ("mse", ("mse", 0.0)),
        ("percentile:99.5", ("percentile", 99.5)),
        ("rms:2.25", ("rms", 2.25)),
        ("rms:.5", ("rms", 0.5)),
    ],
)
def test_clip_kind_and_value(clip, want):
    assert QuantSpec(format="int4", clip=clip).clip_kind_and_value == want


def test_the_gaussian_clip_is_that_of_the_format():
    for name in ("int4", "midrise4", "e2m1"):
        spec = QuantSpec(format=name, clip="gaussian")
        assert spec.clip_kind_and_value == ("rms", gaussian_clip(get_format(name)))


def test_frozen_and_hashable():
    spec = QuantSpec.parse("int4_row")
    assert spec.number_format is spec.number_format  # derived once
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.format = "int8"  # type: ignore[misc]
    assert len({spec, QuantSpec(format="int4"), QuantSpec.parse("int4")}) == 1
    assert spec != QuantSpec.parse("int4_tensor")
    with pytest.raises(TypeError):
        QuantSpec("int4")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(format="int4"), "int4 row"),
        (QuantSpec(format="int4", granularity="group:128", symmetric=False), "int4 group:128 asym"),
        (QuantSpec(format="int4", clip="percentile:99.9"), "int4 row percentile:99.9"),
        (QuantSpec.parse("nvfp4_sr"), "e2m1 group:16 scale:e4m3 tensor_scale sr"),
        (QuantSpec.parse("mxfp4"), "e2m1 group:32 scale:e8m0"),
        (QuantSpec(format="int8", estimator="trust", min_scale=1e-5), "int8 row trust min_scale:1e-05"),
        (QuantSpec(format="int8", estimator="clipped", rounding="stochastic"), "int8 row sr clipped"),
        (
            QuantSpec(format="int8", symmetric=False, clip="mse", rounding="stochastic", estimator="clipped"),
            "int8 row asym mse sr clipped",
        ),
    ],
)
def test_str(spec, text):
    assert str(spec) == text


def test_a_codebook_of_the_user():
    spec = QuantSpec.of({"format": "codebook", "levels": [-1, -0.25, 0, 2], "granularity": "tensor"})
    assert spec.levels == (-1.0, -0.25, 0.0, 2.0)
    assert spec.number_format.levels().tolist() == [-1.0, -0.25, 0.0, 2.0]
    assert spec.bits == 2
    assert str(spec) == "codebook[-1 -0.25 0 2] tensor"
    assert hash(spec) == hash(dataclasses.replace(spec, levels=[-1, -0.25, 0, 2]))
    assert spec != dataclasses.replace(spec, levels=(-1.0, 0.0, 2.0))


def test_which_ranges_have_a_state():
    stateful = {
        clip: QuantSpec(format="int8", clip=clip).stateful for clip in ("absmax", "rms:2", "mse", "fixed:1")
    }
    assert not any(stateful.values())
    assert all(QuantSpec(format="int8", clip=clip).stateful for clip in ("static", "delayed:3"))
    assert QuantSpec.parse("int8_learned").stateful
    assert QuantSpec(format="int8", clip="delayed").clip_kind_and_value == ("delayed", 16.0)
