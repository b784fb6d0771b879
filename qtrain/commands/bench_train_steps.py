"""Training steps of a GPU benchmark: contenders that hold the same parameters, and the optimizers that take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .bench_contenders import CONTENDERS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtrain.models.protocol import ModelConfig

CLIP_NORM = 1.0
LR = 1e-5  # parameters are shared and only have to stay finite


def _fused(groups: Any) -> Any:
    from qtrain.optim import TorchAdamW

    return TorchAdamW(groups, lr=LR, fused=True)


def _ours(states: str | None) -> Callable[[Any], Any]:
    def make(groups: Any) -> Any:
        from qtrain.optim import AdamW

        return AdamW(groups, lr=LR, states={"exp_avg": states, "exp_avg_sq": states} if states else None)

    return make


def _bnb8bit(groups: Any) -> Any:
    from qtrain.optim import BnbAdamW

    return BnbAdamW(groups, lr=LR, bits=8)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "torch_fused": _fused,  # torch.optim.AdamW, float32 states, one kernel for many tensors
    "adamw32": _ours(None),
    "adamw8bit": _ours("dynamic8"),
    "bnb8bit": _bnb8bit,
}


class SharedParameters:
    """The parameters of a model, made once on the device; ``model()`` gives another module that holds them."""

    def __init__(self, config: ModelConfig, device: str, seed: int) -> None:
        import torch

        self.config, self.device = config, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._made: dict[tuple[str, str], nn.Parameter] = {}
        self.model()

    def model(self) -> Any:
        """A new one of the configured kind, tied as it ties, without a copy."""
        import torch

        with torch.device("meta"):
            model = self.config.build(seed=0, pretrained=False)
        drawn: dict[int, nn.Parameter] = {}
        for name, module in model.named_modules():
            for key, meta in module._parameters.items():
                if meta is None:
                    continue
                if (name, key) not in self._made:
                    if id(meta) not in drawn:
                        drawn[id(meta)] = self._draw(meta, key)
                    self._made[name, key] = drawn[id(meta)]
                module._parameters[key] = self._made[name, key]
        return model

    def _draw(self, like: Tensor, key: str) -> nn.Parameter:
        """N(0, 0.02^2) for matrices, ones for gains, zeros for biases: speed does not ask for more."""
        import torch
        from torch import nn

        made = torch.ones(like.shape, device=self.device)
        if like.dim() > 1:
            made.normal_(0.0, 0.02, generator=self._generator)
        elif key == "bias":
            made.zero_()
        return nn.Parameter(made)


def loss_of(model: Any, tokens: Tensor, device: str) -> Tensor:
    """tokens [B, S + 1] -> mean nats a token."""
    import torch
    import torch.nn.functional as F

    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class TrainStep:
    """One contender of one model; ``step`` trains on a batch."""

    def __init__(self, name: str, shared: SharedParameters, seed: int, *, cuda_graphs: bool = False) -> None:
        import torch

        self.model, self.device = shared.model(), shared.device
        self.clock = CONTENDERS[name].convert(self.model, ("lm_head",), seed)
        self.parameters = list(self.model.parameters())
        model, device = self.model, self.device

        def loss(tokens: Tensor) -> Tensor:
            return loss_of(model, tokens, device)

        mode = "reduce-overhead" if cuda_graphs else "default"
        self.loss: Callable[[Tensor], Tensor] = loss if name == "bf16" else torch.compile(loss, mode=mode)
        self.steps = 0

    def gradients(self, tokens: Tensor) -> Tensor:
        """Forward and backward alone; the loss."""
        import torch

        for p in self.parameters:
            p.grad = None
        torch.compiler.cudagraph_mark_step_begin()  # gradients of the last step may be overwritten
        if self.clock is not None:
            self.clock.set(step=self.steps)
        self.steps += 1
        loss = self.loss(tokens)
        loss.backward()
        return loss.detach()

    def step(self, tokens: Tensor, optimizer: Any) -> Tensor:
        from torch import nn

        loss = self.gradients(tokens)
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        optimizer.step()
        return loss
