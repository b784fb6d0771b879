"""The arms of the study of optimizer states: what each changes in ``experiment=optimizer_states``."""

from __future__ import annotations

from study_runs import BASELINE, PLACEBO, Arm

EXPERIMENT = "optimizer_states"
# Quantized in the forward, and the same operands again in the backward; gradients stay float32.
_W8A8 = ("recipe=all_gemms", "w=int8_row", "a=int8_row", "g=none")


def _activations(spec: str) -> tuple[str, ...]:
    return ("recipe=all_gemms", "w=none", f"a={spec}", "g=none", "recipe.linear.dgrad.weight=none")


ARMS = (
    Arm(BASELINE, "float32 everywhere"),
    Arm("m2_int8_tensor", "m2 int8 linear, one scale a tensor", ("m2=int8_tensor",)),
    Arm("m2_int8_row", "m2 int8 linear, a scale a row", ("m2=int8_row",)),
    Arm("m2_dynamic8", "m2 dynamic 8-bit, blocks of 128", ("m2=dynamic8_group128",)),
    Arm("m2_uint4", "m2 4-bit linear with zero, blocks of 128", ("m2=uint4_group128",)),
    Arm("m2_linear4_nozero", "m2 4-bit linear without zero, blocks of 128", ("m2=linear4_nozero_group128",)),
    Arm("a4_tensor", "activations int4, one scale a tensor", _activations("int4_tensor")),
    Arm("a4_token", "activations int4, a scale a token", _activations("int4_row")),
    Arm("w8a8", "weights and activations int8, a scale a row", _W8A8),
    # The same sums in another order: what a difference means that has no cause at all
    Arm(PLACEBO, "placebo: float32, two micro-batches a step", ("micro_batch_sequences=8",)),
    # Without the head and attention, which have fewer than 40,000 elements a matrix
    Arm(
        "m2_int8_tensor_mlp",
        "m2 int8 linear, one scale a tensor, MLPs alone",
        ("m2=int8_tensor", "optimizer.states.min_numel=40000"),
        claimed=False,
    ),
    Arm("m1_int4_row", "m1 int4, a scale a row", ("m1=int4_row",), claimed=False),
    Arm("m1_int4_tensor", "m1 int4, one scale a tensor", ("m1=int4_tensor",), claimed=False),
)
