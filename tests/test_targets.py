"""What a config may name, and the ways around it that were thought of."""

from __future__ import annotations

import pytest

from qtrain.overrides import UserError
from qtrain.targets import check_targets, strings


@pytest.mark.parametrize(
    "target",
    [
        "qtrain.models.gpt.GPTConfig",
        "qtrain.optim.AdamW",  # taken over from qtrain.optim.adamw
        "qtrain.optim.schedules.CosineSchedule",
        "qtrain.quant.ModelRecipe",
        "qtrain.data.sources.StdlibSource",
        "qtrain.training.callbacks.checkpoint.Checkpoints",
    ],
)
def test_what_configs_build(target):
    check_targets({"a": [{"b": {"_target_": target}}]})


@pytest.mark.parametrize(
    ("target", "why"),
    [
        # A command line in a config would bring its own --allow-target
        ("qtrain.cli.main", "main is a function"),
        ("qtrain.commands.train.run", "run is a function"),
        # Any file, any module, any call
        ("qtrain.training.run_folder.write_text", "write_text is a function"),
        ("qtrain.training.assembly.locate", "locate is a function"),
        ("qtrain.training.assembly.build", "build is a function"),
        ("qtrain.training.saved.read_checkpoint", "read_checkpoint is a function"),
        ("qtrain.quant.formats.get_format", "get_format is a function"),
        # The same under the name of a module that imports it
        ("qtrain.training.callbacks.census.write_json", "write_json is a function"),
        (
            "qtrain.training.callbacks.guard.QuantizedTransformer",
            "configs build classes of qtrain.data.prepared_folder, ",
        ),
        ("qtrain.data.shards.TokenShards", "configs build classes of qtrain.data.prepared_folder, "),
        ("qtrain.data.sources.Path.unlink", "qtrain.data.sources has no class 'Path.unlink'"),
        ("qtrain.data.sources.Path", "qtrain.data.sources has no class 'Path'"),
        ("qtrain.optim.AdamW.load_state_dict", "qtrain.optim has no class 'AdamW.load_state_dict'"),
        ("qtrain.optim.adamw", "qtrain.optim.adamw has no class ''"),
        ("qtrain.optim", "qtrain.optim has no class ''"),
        ("qtrain.", "no dotted name"),
        ("qtrain.optim..AdamW", "no dotted name"),
        ("qtrain./tmp/evil.X", "no dotted name"),
        ("qtrain.${a}", "no dotted name"),
        ("qtrain", "configs may name classes of qtrain only"),
        ("os.system", "allow its package with --allow-target os"),
        ("", "configs may name classes of qtrain only"),
    ],
)
def test_what_they_do_not(target, why):
    with pytest.raises(UserError) as caught:
        check_targets({"a": [{"b": {"_target_": target}}]})
    assert str(caught.value).startswith(f"a[0].b._target_={target}: ")
    assert why in str(caught.value)


def test_a_target_that_is_no_text_is_looked_at_too():
    for target in (["os.system"], {"_target_": "os.system"}, None, 3):
        with pytest.raises(UserError):
            check_targets({"a": {"_target_": target}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("w", "os:abort"),
        ("m1", "antigravity:x"),
        ("format", "a.b.c:Name"),
        ("input", "qtrain.cli:main"),
        ("input", "qtrain.quantum:Format"),
    ],
)
def test_a_plug_in_needs_the_user_s_consent(key, value):
    """Its module is imported, and what it names is called."""
    config = {"recipe": {"rules": [{key: value}]}}
    package = value.split(":")[0].split(".")[0]
    with pytest.raises(UserError, match=rf"^recipe\.rules\[0\]\.{key}={value}: .*--allow-target {package}$"):
        check_targets(config)
    check_targets(config, [package])
    with pytest.raises(UserError):
        check_targets(config, [package + "x", "o", package[:-1]])


def test_what_is_no_plug_in():
    texts = [
        "int4_group128",
        "group:128",
        "block:32x32",
        "percentile:99.9",
        "rms:2.5",
        "hadamard:64",
        "a: b",
        ":x",
        "x:",
    ]
    check_targets({"recipe": {"input": texts, "n": 3, "f": 1.5, "none": None, "yes": True}})
    check_targets({"recipe": {"input": "qtrain.quant.formats.integer:IntegerFormat"}})
    check_targets({"sample": {"prompt": "Q:A"}, "logger": {"tags": ["team:x"]}, "out": "c:runs"})


def test_strings_are_found_at_any_depth():
    tree = {"a": {"b": [1, ["x", {"c": "y"}]], "_target_": "t"}, "d": ("z",), "e": None}
    found = [("a.b[1][0]", "x"), ("a.b[1][1].c", "y"), ("a._target_", "t"), ("d[0]", "z")]
    assert list(strings(tree)) == found
