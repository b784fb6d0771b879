"""Values of a config that are fixed before a run sees them. What is refused is in test_cli.py."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qtrain.overrides import UserError, literal


@given(st.text(alphabet="\\${}:ax'\" [](),", max_size=14))
def test_a_text_comes_through_as_it_is(text):
    """Given by a resolver, so that no escapes of a file stand between."""
    OmegaConf.register_new_resolver("the_text", lambda: text, replace=True)
    config = OmegaConf.create({"a": "${the_text:}", "b": [{"c": "${the_text:}"}]})
    if text == "???":
        return
    values = OmegaConf.to_container(literal(config), resolve=True)
    assert values == {"a": text, "b": [{"c": text}]}


def test_what_was_checked_is_what_is_used():
    count = itertools.count()
    OmegaConf.register_new_resolver("other_each_time", lambda: next(count), replace=True)
    config = OmegaConf.create(
        {"a": "${other_each_time:}", "b": {"c": "${other_each_time:}"}, "hydra": {"x": 1}}
    )
    fixed = literal(config)
    assert fixed == literal(fixed)
    assert fixed.a == fixed.a
    assert fixed.a + 1 == fixed.b.c == fixed.b.c
    assert "hydra" not in fixed
    with pytest.raises(Exception, match="not in struct"):
        fixed.d = 1


def test_values_keep_their_types():
    values = {"a": 1, "b": 1.5, "c": None, "d": True, "e": "1", "f": [], "g": {}, "h": float("nan")}
    assert repr(OmegaConf.to_container(literal(OmegaConf.create(values)))) == repr(values)


def test_missing_values_are_named():
    with pytest.raises(UserError, match=r"^a\.b has no value and no default"):
        literal(OmegaConf.create({"a": {"b": "???"}}))
