"""Formats by name (``qtrain.quant.formats``)."""

from __future__ import annotations

import sys
import textwrap

import pytest

from qtrain.quant.formats import IntegerFormat, MidriseFormat, NumberFormat, format_names, get_format

NAMES = (
    [f"int{b}" for b in range(2, 9)]
    + [f"uint{b}" for b in range(1, 9)]
    + [f"midrise{b}" for b in range(1, 9)]
    + [
        "e4m3",
        "e5m2",
        "e3m4",
        "e3m2",
        "e2m3",
        "e2m1",
        "dynamic4",
        "dynamic4_unsigned",
        "dynamic8",
        "dynamic8_unsigned",
        "linear4_nozero",
        "nf4",
        "sign",
        "ternary",
    ]
    + [f"power{b}" for b in range(2, 9)]
)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A function that writes a module to a folder on the path and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, body: str) -> str:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(body))
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)
    get_format.cache_clear()


def test_the_names():
    assert format_names() == NAMES
    for name in NAMES:
        assert isinstance(get_format(name), NumberFormat)
        assert get_format(name).name == name
        assert get_format(name) is get_format(name)
    assert get_format("linear4_nozero").table == tuple(i / 16 for i in range(1, 17))
    assert get_format("int3") == IntegerFormat(3)
    assert get_format("uint3") == IntegerFormat(3, signed=False)
    assert get_format("midrise3") == MidriseFormat(3)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("int44", "int4"),
        ("midris4", "midrise4"),
        ("e4m33", "e4m3"),
        ("linear4", "linear4_nozero"),
        ("INT4", None),
        ("??", None),
    ],
)
def test_an_unknown_name_is_told_its_neighbours_and_all_names(name, near):
    with pytest.raises(ValueError, match="unknown number format") as raised:
        get_format(name)
    text = str(raised.value)
    assert text.startswith(f"unknown number format {name!r}")
    assert text.endswith(
        f" Allowed: {', '.join(NAMES)}, power<b>p<P>, codebook (with levels), or 'package.module:Name'"
    )
    head = text.partition(" Allowed")[0]
    if near is None:
        assert head == f"unknown number format {name!r}."
    else:
        assert "; did you mean " in head
        assert near in head.partition("mean ")[2].rstrip("?").split(" or ")
        assert head.endswith("?")
        assert len(head.split(" or ")) <= 3


def test_up_to_three_neighbours_are_named():
    with pytest.raises(
        ValueError, match=r"^unknown number format 'int'; did you mean \w+ or \w+ or \w+\? Allowed: int2"
    ):
        get_format("int")
    with pytest.raises(
        ValueError, match=r"^unknown number format 'linear4'; did you mean linear4_nozero\? Allowed: "
    ):
        get_format("linear4")


def test_a_plugin_class_is_made_and_an_instance_is_taken(plugin):
    body = """
        from qtrain.quant.formats import CodebookFormat, IntegerFormat

        SIGN = CodebookFormat("sign", (-1.0, 1.0))

        def nibble():
            return IntegerFormat(4)

        class Word:
            pass

        number = 3
    """
    name = plugin("some_plugin", body)
    assert get_format(f"{name}:SIGN").levels().tolist() == [-1.0, 1.0]
    assert get_format(f"{name}:nibble") == IntegerFormat(4)
    assert get_format(f"{name}:SIGN") is get_format(f"{name}:SIGN")
    with pytest.raises(
        TypeError, match=r"^format 'some_plugin:Word' is a Word, not a qtrain\.quant\.formats\.NumberFormat$"
    ):
        get_format(f"{name}:Word")


def test_a_plugin_in_a_package(plugin):
    name = plugin(
        "plugin_package.inner.grids", "from qtrain.quant.formats import IntegerFormat as Four\nFour = Four(4)"
    )
    assert get_format(f"{name}:Four") == IntegerFormat(4)


@pytest.mark.parametrize(
    "name", ["int4_group:128", "no_such_module:Grid", "qtrain.no_such.module:Grid", "qtrain.quant:NoSuch"]
)
def test_a_plugin_that_is_not_there(name):
    module, _, attribute = name.partition(":")
    with pytest.raises(ValueError, match="on PYTHONPATH") as raised:
        get_format(name)
    assert str(raised.value) == (
        f"format {name!r}: no {attribute!r} in a module {module!r}; put the plug-in's folder on PYTHONPATH. "
        "A granularity is written without a colon, as in int4_group128"
    )


def test_a_plugin_whose_own_import_fails_says_so(plugin):
    name = plugin("needy_plugin", "import no_such_dependency_of_a_plugin")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_a_plugin"):
        get_format(f"{name}:Grid")


@pytest.mark.parametrize("name", ["a:b:c", "a b:C", ":C", "a:", "a-b:C"])
def test_what_is_no_plugin_name_is_unknown(name):
    with pytest.raises(ValueError, match="unknown number format"):
        get_format(name)
