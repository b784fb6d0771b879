"""Recipes that the tests of this folder run."""

from __future__ import annotations

from typing import Any

LAYERS: dict[str, dict[str, Any]] = {
    "weight_int8": {"fprop": {"weight": "int8_row"}},
    "input_int4": {"fprop": {"input": "int4_row"}},
    "dgrad_grad_output": {"dgrad": {"grad_output": "int8_row"}},
    "dgrad_weight": {"dgrad": {"weight": "int4_row"}},
    "wgrad_grad_output": {"wgrad": {"grad_output": "int4_row"}},
    "wgrad_input": {"wgrad": {"input": "int8_row"}},
    "w4a8": {"fprop": {"input": "int8_row", "weight": "int4_row"}},
    "paper_w8a8g8": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "wgrad": {"grad_output": "int8_column"},
    },
    "int8_reused": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
    },
    "int4_own_specs": {
        "fprop": {"input": "int4_row", "weight": "int4_tensor"},
        "dgrad": {"grad_output": "int5_row", "weight": "int6_tensor"},
        "wgrad": {"grad_output": "int7_tensor", "input": "int8_row"},
    },
    "tensor_reused": {
        "fprop": {"input": "int8_tensor", "weight": "int4_tensor"},
        "dgrad": {"grad_output": "int8_tensor", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_tensor", "input": "fprop"},
    },
    "reused_below_high_precision_gradient": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "dgrad": {"weight": "fprop"},
        "wgrad": {"input": "fprop"},
    },
    "group_reused": {
        "fprop": {"input": "int8_group8", "weight": "int4_group8"},
        "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
    },
    "asymmetric_mse": {
        "fprop": {"input": "int8_row_asym", "weight": "int4_group8_asym_mse"},
        "dgrad": {"grad_output": "int8_tensor_asym", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row_asym", "input": "fprop"},
    },
    "asymmetric_saved": {
        "fprop": {"input": "int4_row_asym", "weight": "int4_row"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
        "saved": "quantized",
    },
    "saved_reused": {
        "fprop": {"input": "int4_row", "weight": "int8_row"},
        "dgrad": {"weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
        "saved": "quantized",
    },
    "saved_own": {
        "fprop": {"input": "int8_row", "weight": "int8_row"},
        "wgrad": {"input": "int4_row"},
        "saved": "quantized",
    },
    "saved_stochastic": {
        "fprop": {"input": "int4_row_sr", "weight": "int4_row_sr"},
        "dgrad": {"grad_output": "int8_row_sr", "weight": "int4_row_sr"},
        "wgrad": {"grad_output": "int4_row_sr", "input": "int4_row_sr"},
        "saved": "quantized",
    },
    "clipped": {
        "fprop": {
            "input": {"format": "int4", "clip": "percentile:90", "estimator": "clipped"},
            "weight": {"format": "int4", "clip": "rms:1.5", "estimator": "clipped"},
        },
        "dgrad": {"weight": "fprop"},
        "wgrad": {"input": "fprop"},
    },
    "clipped_own_backward": {
        "fprop": {
            "input": {"format": "int4", "clip": "rms:1.5", "estimator": "clipped"},
            "weight": {"format": "int4", "clip": "rms:1.5", "estimator": "clipped"},
        }
    },
    "quest": {
        "fprop": {
            "input": "midrise4_row_gaussian_trust",
            "weight": "midrise4_row_gaussian_trust",
            "transform": "hadamard:16",
        },
        "dgrad": {"weight": "fprop"},
        "wgrad": {"input": "fprop"},
    },
    "quest_high_precision_backward": {
        "fprop": {
            "input": "midrise2_row_gaussian_trust",
            "weight": "midrise2_row_gaussian_trust",
            "transform": "hadamard:8",
        }
    },
    "rht_forward": {
        "fprop": {"input": "int4_row", "weight": "int4_row_gaussian_trust", "transform": "rht:16"},
        "dgrad": {"grad_output": "int8_row", "weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
        "saved": "quantized",
    },
    "transforms_alone": {
        "fprop": {"transform": "hadamard:4"},
        "dgrad": {"transform": "rht:2"},
        "wgrad": {"transform": "rht:8"},
    },
    "mxfp8": {
        "fprop": {"input": "mxfp8", "weight": "mxfp8"},
        "dgrad": {"grad_output": "mxfp8", "weight": "mxfp8"},
        "wgrad": {"grad_output": "mxfp8", "input": "mxfp8"},
    },
    "mxfp4_saved": {
        "fprop": {"input": "mxfp4", "weight": "mxfp4"},
        "dgrad": {"grad_output": "mxfp4_sr", "weight": "mxfp4"},
        "wgrad": {"grad_output": "mxfp4_sr", "input": "mxfp4"},
        "saved": "quantized",
    },
    "nvfp4": {
        "fprop": {"input": "nvfp4", "weight": "nvfp4_block16x16"},
        "dgrad": {"grad_output": "nvfp4_sr", "weight": "nvfp4_block16x16"},
        "wgrad": {"grad_output": "nvfp4_sr", "input": "nvfp4", "transform": "rht:16"},
        "saved": "quantized",
    },
    "fp8_tensor": {
        "fprop": {"input": "e4m3_tensor", "weight": "e4m3_tensor"},
        "dgrad": {"grad_output": "e5m2_tensor", "weight": "fprop"},
        "wgrad": {"grad_output": "e5m2_tensor", "input": "fprop"},
        "saved": "quantized",
    },
    "fp8_block": {
        "fprop": {"input": "e4m3_group8", "weight": "e4m3_block8x8"},
        "dgrad": {"grad_output": "e4m3_group8", "weight": "e4m3_block8x8"},
        "wgrad": {"grad_output": "e4m3_group8", "input": "e4m3_group8"},
    },
    "codebook": {
        "fprop": {"input": "dynamic8_row", "weight": "dynamic4_row"},
        "dgrad": {"weight": "fprop"},
        "wgrad": {"grad_output": "int8_row", "input": "fprop"},
    },
    "stochastic_trust": {
        "fprop": {"input": "int4_row_sr_trust", "weight": "midrise4_row_gaussian_sr_trust"},
        "dgrad": {"weight": "fprop"},
        "wgrad": {"input": "fprop"},
    },
    "stochastic_column": {
        "fprop": {"input": "int4_column", "weight": "int8_column_sr"},
        "dgrad": {"grad_output": "int4_column_sr", "weight": "int8_row_sr"},
        "wgrad": {"grad_output": "int4_column_sr", "input": "int8_row_sr"},
    },
}
"""By name: every operand alone, and the schemes of the literature."""
