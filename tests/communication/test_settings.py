from __future__ import annotations

import pytest

from qtrain.communication.settings import CommunicationSettings
from qtrain.quant import QuantSpec


def test_what_is_understood():
    settings = CommunicationSettings.of(
        {
            "gather_weights": "int8_row",
            "reduce_gradients": {"format": "int4", "granularity": "group:64"},
            "devices": 2,
        }
    )
    assert settings.gather_weights == QuantSpec.parse("int8_row")
    assert settings.reduce_gradients == QuantSpec.parse("int4_group64")
    assert settings.error_feedback == "float32"
    assert settings.active
    assert not CommunicationSettings(gather_weights="none", reduce_gradients=None).active


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gather_weights": "int8_tensor"}, r"trainer.gather_weights='int8_tensor': granularity tensor crosses the rows"),
        ({"reduce_gradients": "int8_column"}, r"granularity column crosses the rows of dim 0.*int8_group128"),
        ({"reduce_gradients": "e4m3_block128x128"}, r"granularity block:128x128 crosses"),
        ({"gather_weights": "nvfp4"}, r"one scale for the whole tensor crosses"),
        ({"gather_weights": "int4_row_learned"}, r"clip='learned' has a state"),
        ({"reduce_gradients": "int8_row_delayed"}, r"trainer.reduce_gradients='int8_row_delayed': clip='delayed:16' has"),
        ({"reduce_gradients": "int9_row"}, r"trainer.reduce_gradients: spec 'int9_row'"),
        ({"gather_weights": 8}, r"trainer.gather_weights: a spec is"),
        ({"error_feedback": "float16"}, r"trainer.error_feedback='float16': allowed are float32, bfloat16 and null"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CommunicationSettings(**given)
