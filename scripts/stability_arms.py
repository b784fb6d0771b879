"""The arms of the stability study, from healthy to failing: what each changes in ``experiment=stability_study``, and what
was foreseen of it before the first run."""

from __future__ import annotations

from study_runs import BASELINE, PLACEBO, Arm

EXPERIMENT = "stability_study"
_FINE = ("healthy",)
_BEARABLE = ("healthy", "noisy")
_BROKEN = ("unstable", "diverged")


def _qpt(**operands: str) -> tuple[str, ...]:
    """The recipe of arXiv 2407.11722 with these operands quantized alone."""
    return ("recipe=qpt", *(f"{knob}={operands.get(knob, 'none')}" for knob in ("w", "a", "g")))


ARMS = (
    Arm(BASELINE, "float32 everywhere", expected=_FINE),
    # The same sums in another order: what a difference means that has no cause at all
    Arm(PLACEBO, "placebo: float32, two micro-batches a step", ("micro_batch_sequences=4",), expected=_FINE),
    Arm("w8a8g8", "W8A8G8, three GEMMs, a scale a row", ("recipe=all_gemms",), expected=_FINE),
    Arm(
        "w8a8g8_m8",
        "W8A8G8 and both moments dynamic 8-bit",
        ("recipe=all_gemms", "m1=dynamic8_group128", "m2=dynamic8_group128"),
        expected=_FINE,
    ),
    Arm("w4", "weights int4 a channel", _qpt(w="int4_row"), expected=_FINE),
    Arm("a4_token", "activations int4, a scale a token", _qpt(a="int4_row"), expected=_FINE),
    Arm("a4_tensor", "activations int4, one scale a tensor", _qpt(a="int4_tensor"), expected=_BEARABLE),
    Arm("g8", "gradients int8 in dW, a scale a token", _qpt(g="int8_column"), expected=_FINE),
    Arm("g4_tensor", "gradients int4 in dW, one scale a tensor", _qpt(g="int4_tensor"), expected=("noisy", *_BROKEN)),
    Arm("m1_int4_row", "m1 int4, a scale a row", ("m1=int4_row",), expected=_FINE),
    Arm("m2_int8_tensor", "m2 int8 linear, one scale a tensor", ("m2=int8_tensor",), expected=_BROKEN),
    Arm("fp8_rowwise", "FP8, a scale a row", ("recipe=fp8_rowwise",), expected=_FINE),
    Arm("mxfp4", "MXFP4 gradients, prescaled", ("recipe=mxfp4_prescale",), expected=_FINE),
    Arm("nvfp4", "NVFP4, three GEMMs", ("recipe=nvfp4",), expected=_FINE),
    Arm("quartet", "Quartet: MXFP4, three GEMMs", ("recipe=quartet",), expected=_FINE),
    Arm("bitnet_b158", "BitNet b1.58", ("recipe=bitnet_b158",), expected=_BEARABLE),
    Arm("quest_w4a4", "QuEST W4A4", ("recipe=quest_w4a4",), expected=_FINE),
    Arm("lsq_w4a4", "LSQ W4A4", ("recipe=lsq_w4a4",), expected=_BEARABLE),
    Arm("lr_low", "float32, a tenth of the learning rate", ("optimizer.lr=3.0e-4",), expected=_FINE),
    Arm(
        "lr_high",
        "float32, ten times the learning rate",
        ("optimizer.lr=3.0e-2",),
        expected=("noisy", *_BROKEN, "failed"),
    ),
)  # fmt: skip
