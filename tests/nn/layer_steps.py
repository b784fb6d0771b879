"""One step of one layer, beside the equations."""

from __future__ import annotations

import equations
import torch
from torch import Tensor, nn

from qtrain.nn import Clock, QuantizedLinear
from qtrain.quant import LinearRecipe

SEED, STEP, OFFSET = 2**33 + 5, 11, 70
MOMENT = equations.Moment(SEED, STEP, OFFSET, "blocks.0.up")
MATRICES = {"y": 0, "dx": 1, "dW": 2, "db": 3}


def make(
    recipe: LinearRecipe, in_features: int, out_features: int, *, bias: bool = True, seed: int = SEED
) -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    quantized = QuantizedLinear.convert(linear, recipe, name="blocks.0.up", clock=Clock(seed))
    quantized.clock.set(step=STEP, token_offset=OFFSET)
    return quantized


def sizes(recipe: LinearRecipe) -> tuple[int, int, int]:
    """(T, I, O): odd ones, unless a transform must divide them."""
    transforms = (recipe.fprop.transform, recipe.dgrad.transform, recipe.wgrad.transform)
    return (16, 32, 16) if any(transforms) else (15, 37, 23)


def hostile(tokens: int, width: int) -> Tensor:
    """Gaussian, with a row of zeros and one huge outlier."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    x[3] = 0.0
    x[1, 4] = 30.0
    return x


def step(layer: nn.Module, x: Tensor, *, autocast: bool, g: Tensor | None = None) -> dict[str, Tensor]:
    """y, dx, dW, db and g of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    if g is None:
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        g[..., 2, :] = 0.0 if y.dim() > 1 else g[..., 2, :]
    g = g.to(y)
    y.backward(g)
    out = {"y": y.detach(), "dx": x.grad, "dW": layer.weight.grad, "g": g}
    return out if layer.bias is None else {**out, "db": layer.bias.grad}


def assert_follows(
    name: str,
    recipe: LinearRecipe,
    layer: QuantizedLinear,
    x: Tensor,
    seen: dict[str, Tensor],
    dtype: str,
    moment: equations.Moment = MOMENT,
) -> None:
    flat = {k: v.reshape(-1, v.shape[-1]) if k in ("y", "dx", "g") else v for k, v in seen.items()}
    x = x.reshape(-1, x.shape[-1])
    expected = equations.layer(recipe, x, layer.weight, layer.bias, flat["g"], moment)
    for what in ("y", "dx", "dW") if layer.bias is None else MATRICES:
        off = abs(equations._dense(flat[what]) - expected[what].value)
        bound = getattr(expected[what], dtype)
        assert (off <= bound).all(), (
            f"{name} {dtype} {what}: off by {(off / (bound + 1e-300)).max():.3g} bounds"
        )
