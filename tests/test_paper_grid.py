"""Every cell of the grid of "Exploring Quantization for Efficient Pre-Training of Transformer Language Models" (arXiv
2407.11722), composed from configs/sweep and held to the paper's equations, written again in float64.

    symmetric    s = max(amax / (2^(b-1) - 1), floor)    q = s clip(round(x / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = max((max - min) / (2^b - 1), floor) q = s (clip(round(x / s) + z, 0, 2^b - 1) - z), z = round(-min / s)
    Y = Q(A) Q(W)^T,   dX = G W,   dW = Q(G)^T A

Differs: the range of a zero point always contains zero here (zeros stay zeros), and floors are 2^-100 unless ``min_scale``
says otherwise. With the paper's floors (1e-5, 1e-9, 1e-8) the equations are the paper's.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from composition import composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qtrain.nn.surgery import apply_recipe
from qtrain.quant import get_format
from qtrain.training.assembly import assemble, build

SWEEPS = (
    "paper_weights",
    "paper_activations",
    "paper_gradients",
    "paper_first_moment",
    "paper_second_moment",
)
FLOORS = {"w": 1e-5, "a": 1e-5, "g": 1e-9, "m1": 1e-8, "m2": 1e-8}
TINY = 2.0**-100


def swept(sweep: str) -> dict[str, list[str]]:
    """knob -> its values, read as Hydra's sweeper reads them."""
    params = composed("train", f"sweep={sweep}", hydra=True).hydra.sweeper.params
    (texts,) = ([f"{k}={v}" for k, v in params.items()],)
    return {
        o.key_or_group: [str(v) for v in o.sweep_iterator()]
        for o in OverridesParser.create().parse_overrides(texts)
    }


CELLS = [
    (sweep, *cell)
    for sweep in SWEEPS
    for k, values in swept(sweep).items()
    for cell in [(k, v) for v in values]
]


# --- the equations ---------------------------------------------------------------------------------------------


def on_grid(x: np.ndarray, bits: int, axes: tuple[int, ...], kind: str, floor: float) -> np.ndarray:
    """axes: what shares a scale. kind: symmetric, asymmetric or unsigned (s = max / (2^b - 1))."""
    if kind == "symmetric":
        s = np.maximum(np.abs(x).max(axes, keepdims=True) / (2 ** (bits - 1) - 1), floor)
        return s * np.clip(np.rint(x / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    high, low = np.maximum(x.max(axes, keepdims=True), 0), np.minimum(x.min(axes, keepdims=True), 0)
    low = low * 0 if kind == "unsigned" else low
    s = np.maximum((high - low) / (2**bits - 1), floor)
    z = np.rint(-low / s)
    return s * (np.clip(np.rint(x / s) + z, 0, 2**bits - 1) - z)


def quantized(x: np.ndarray, spec: str, floor: float = TINY) -> np.ndarray:
    """x [F, K] as the short form ``spec`` says it; K-major."""
    if spec == "none":
        return x
    match = re.fullmatch(r"(u?)int(\d)_(tensor|row|column|group128)(_asym)?", spec)
    assert match, spec
    unsigned, bits, granularity, asymmetric = match.groups()
    kind = "asymmetric" if asymmetric else "unsigned" if unsigned else "symmetric"
    if granularity == "group128":
        parts = [x[:, i : i + 128] for i in range(0, x.shape[1], 128)]
        return np.concatenate([on_grid(p, int(bits), (1,), kind, floor) for p in parts], 1)
    axes = {"tensor": (0, 1), "row": (1,), "column": (0,)}[granularity]
    return on_grid(x, int(bits), axes, kind, floor)


def dynamic(x: np.ndarray, spec: str, *, signed: bool) -> np.ndarray:
    """Nearest level of the dynamic map under an absmax scale."""
    bits = 4 if spec.startswith("dynamic4") else 8
    levels = get_format(f"dynamic{bits}" + ("" if signed else "_unsigned")).levels().double().numpy()
    group = {"tensor": None, "row": x.shape[1], "group128": 128}.get(spec.partition("_")[2], 256)
    parts = [x] if group is None else [x[:, i : i + group] for i in range(0, x.shape[1], group)]
    found = []
    for part in parts:
        s = np.maximum(np.abs(part).max(None if group is None else 1, keepdims=True), TINY)
        found.append(s * levels[np.abs((part / s)[..., None] - levels).argmin(-1)])
    return np.concatenate(found, 1)


# --- weights, activations, gradients -----------------------------------------------------------------------------


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [2, 7, 24] with an outlier channel and a zero token, W [10, 24] with a zero row, g [2, 7, 10] with an outlier."""
    generator = torch.Generator().manual_seed(5)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((2, 7, 24), (10, 24), (2, 7, 10)))
    x[..., 3] *= 40
    x[1, 2] = 0
    w[4] = 0
    g[0, 1, 2] = 300
    return x, 0.02 * w, 1e-3 * g


def linear_step(recipe, x, w, g) -> tuple[np.ndarray, ...]:
    layer = torch.nn.Linear(24, 10, bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    if any(v is not None for v in recipe.linear.operands().values()):
        apply_recipe(torch.nn.ModuleDict({"q": layer}), build_without_head(recipe))
    entered = x.clone().requires_grad_()
    y = layer(entered)
    y.backward(g)
    return tuple(t.detach().double().numpy() for t in (y, entered.grad, layer.weight.grad))


def build_without_head(recipe):
    """The recipe over a single layer: there is no lm_head to exclude."""
    return type(recipe)(linear=recipe.linear)


def expected(knobs: dict[str, str], floors: dict[str, float], x, w, g) -> tuple[np.ndarray, ...]:
    x2, w2, g2 = (t.double().reshape(-1, t.shape[-1]).numpy() for t in (x, w, g))
    qx, qw = quantized(x2, knobs["a"], floors["a"]), quantized(w2, knobs["w"], floors["w"])
    qg = quantized(g2.T, knobs["g"], floors["g"])
    return (qx @ qw.T).reshape(2, 7, 10), (g2 @ w2).reshape(2, 7, 24), qg @ x2


def assert_close(found, wanted) -> None:
    for name, a, b in zip(("y", "dx", "dW"), found, wanted, strict=True):
        # float32 sums of 24 products; a code that falls elsewhere would show as a hundredth of the scale
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max() + 1e-30, err_msg=name)


@pytest.mark.parametrize(("sweep", "knob", "value"), [c for c in CELLS if c[1] in "wag"])
def test_a_cell_s_linear_step_is_the_paper_s(sweep: str, knob: str, value: str) -> None:
    cfg = composed("train", f"sweep={sweep}", f"{knob}={value}", "compile=false", "seed=7")
    parts = assemble(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    assert parts.settings.run == f"{knob}_{value}-seed7"
    knobs = {"w": "none", "a": "none", "g": "none", knob: value}
    assert {k: cfg[k] for k in ("w", "a", "g", "m1", "m2")} == {**knobs, "m1": "none", "m2": "none"}
    assert_close(linear_step(parts.recipe, *data()), expected(knobs, dict.fromkeys("wag", TINY), *data()))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("kind", ["", "_asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_the_paper_s_floors(bits: int, kind: str, scale: float) -> None:
    """At 1e-6 of usual magnitudes the floors decide most scales."""
    spec = f"{{format: int{bits}, granularity: %s, symmetric: {str(not kind).lower()}, min_scale: %g}}"
    texts = {"w": f"int{bits}_row{kind}", "a": f"int{bits}_row{kind}", "g": f"int{bits}_column{kind}"}
    overrides = [f"{k}={spec % (texts[k].split('_')[1], FLOORS[k])}" for k in texts]
    recipe = build(
        OmegaConf.to_container(composed("train", "recipe=qpt", *overrides), resolve=True)["recipe"]
    )
    x, w, g = (scale * t for t in data())
    assert_close(linear_step(recipe, x, w, g), expected(texts, FLOORS, x, w, g))
    if scale < 1:
        without = expected(texts, dict.fromkeys("wag", TINY), x, w, g)
        assert not np.allclose(without[0], expected(texts, FLOORS, x, w, g)[0], rtol=0.05, atol=0)


# --- moments ---------------------------------------------------------------------------------------------------


def gradients(steps: int = 4) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    found = [draw.normal(size=(6, 300)) * 10 ** draw.normal(size=(6, 300)) for _ in range(steps)]
    for g in found:
        g[2] = 0
    return [g.astype(np.float32).astype(np.float64) for g in found]


@pytest.mark.parametrize(("sweep", "knob", "value"), [c for c in CELLS if c[1].startswith("m")])
def test_a_cell_s_moment_is_the_paper_s(sweep: str, knob: str, value: str) -> None:
    """After each update the moment lies on the grid, from which the next update goes on."""
    cfg = composed(
        "train", f"sweep={sweep}", f"{knob}={value}", "compile=false", "optimizer.states.min_numel=0"
    )
    parts = assemble(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    other = "m2" if knob == "m1" else "m1"
    assert (cfg[other], cfg.w, cfg.a, cfg.g) == ("none",) * 4
    p = torch.nn.Parameter(torch.ones(6, 300))
    optimizer = parts.optimizer.make([{"params": [p]}])
    kind, beta = ("exp_avg", 0.9) if knob == "m1" else ("exp_avg_sq", 0.95)
    moment = np.zeros((6, 300))
    for g in gradients():
        p.grad = torch.from_numpy(g).float()
        optimizer.step()
        moment = beta * moment + (1 - beta) * (g if knob == "m1" else g * g)
        is_dynamic = value.startswith("dynamic")
        moment = dynamic(moment, value, signed=knob == "m1") if is_dynamic else quantized(moment, value)
        held = optimizer.decode_states(p)[kind].double().numpy()
        # A float32 moment next to a midpoint may fall to the other side of it: at most one in a thousand
        apart = np.abs(held - moment) > 1e-5 * np.abs(moment) + 1e-12
        assert apart.mean() < 1e-3
        moment = held


def test_a_second_moment_uses_all_codes_of_a_grid_without_sign() -> None:
    """Zero points and unsigned formats have 256 levels for it, the signed grid 128: half of its codes are negative."""
    v = torch.linspace(0, 1, 5000).reshape(1, -1).sqrt()
    levels = {}
    for value in ("int8_row", "uint8_row", "int8_row_asym", "dynamic8_row"):
        cfg = composed(
            "train",
            "sweep=paper_second_moment",
            f"m2={value}",
            "optimizer.states.min_numel=0",
            "compile=false",
        )
        optimizer = assemble(OmegaConf.to_container(cfg, resolve=True)).optimizer.make(
            [{"params": [p := torch.nn.Parameter(torch.zeros(1, 5000))]}]
        )
        p.grad = v.clone()
        optimizer.step()
        levels[value] = len(optimizer.decode_states(p)["exp_avg_sq"].unique())
    assert levels == {
        "int8_row": 128,
        "uint8_row": 256,
        "int8_row_asym": 256,
        "dynamic8_row": pytest.approx(200, abs=56),
    }


def test_the_paper_s_floor_alone_erases_a_small_second_moment() -> None:
    """Gradients of 1e-5, as large batches give them: v is 5e-12, and a scale of 1e-8 has no number between 0 and 1e-8. The
    floor is a parameter of the experiment, not a safeguard."""
    decoded = {}
    for name, floor in (("paper", 1e-8), ("ours", TINY)):
        cfg = composed(
            "train",
            "optimizer=adamw",
            f"m2={{format: uint8, granularity: row, min_scale: {floor!r}}}",
            "compile=false",
        )
        optimizer = assemble(OmegaConf.to_container(cfg, resolve=True)).optimizer.make(
            [{"params": [p := torch.nn.Parameter(torch.zeros(64, 64))]}]
        )
        p.grad = 1e-5 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        decoded[name] = optimizer.decode_states(p)["exp_avg_sq"]
    assert decoded["paper"].count_nonzero() == 0
    assert decoded["ours"].count_nonzero() > 3000


def test_the_grid_is_whole() -> None:
    """Bits {4, 8} x {tensor, row, column} x zero point for W, A and G; m1 in 4 and 8 bits by tensor and row; m2 linear and
    dynamic; a reference each."""
    whole = {f"int{b}_{s}{z}" for b in (4, 8) for s in ("tensor", "row", "column") for z in ("", "_asym")} | {
        "none"
    }
    for sweep, knob in (("paper_weights", "w"), ("paper_activations", "a"), ("paper_gradients", "g")):
        assert set(swept(sweep)[knob]) == whole
        assert len(swept(sweep)[knob]) == 13
    assert {f"int{b}_{s}" for b in (4, 8) for s in ("tensor", "row")} < set(swept("paper_first_moment")["m1"])
    assert {"none", "int8_tensor", "int8_row", "uint8_row", "dynamic8"} < set(
        swept("paper_second_moment")["m2"]
    )
    assert swept("paper_combined") == {k: ["none", "int8_row", "int4_row"] for k in "wa"}
