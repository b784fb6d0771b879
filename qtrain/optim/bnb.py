"""bitsandbytes' AdamW and Lion, the optimizers that low-precision training is usually compared with.

    AdamW   m, v as in ``adamw.py``
    Lion    w -= lr * (sign(b1 m + (1 - b1) g) + wd w),    m = b2 m + (1 - b2) g      (arXiv 2302.06675, alg. 2)

States are float32 (``bits=32``) or bytes of the dynamic map in blocks of 256 over the flattened tensor (``bits=8``,
"8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861); ``paged`` puts large ones in CUDA's managed memory,
which the driver moves to the host when the device is full. The arithmetic is the library's.

Embeddings keep 32-bit states, as that paper recommends (section 2.3): groups with ``quantize_states=False`` do.
Differs: the library's own way, ``GlobalOptimManager``, keeps overrides by the address of a parameter in one object of
the process, where the next run of a sweep would meet those of the last.

The only file that imports bitsandbytes, and only when an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The states of a parameter as the library names them; the maps belong to the format, one tensor for all parameters
STATES, MAPS = ("state1", "state2"), ("qmap1", "qmap2")
BITS = (8, 32)
# How the library's state_dict hides its states from FSDP's gathering
_WRAPPED = "__bnb_optimizer_quant_state__"


def _library() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"this optimizer needs bitsandbytes ({error}): pip install 'bitsandbytes>=0.45', or take optimizer=adamw, "
            "whose 8-bit states need nothing"
        ) from error
    return bitsandbytes


if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class _Ours(_Base):
    """What qtrain adds to an optimizer of the library: bits by group, refusals, bytes, exact loading."""

    def _bits(self, group: Mapping[str, Any], p: Tensor) -> int:
        small = p.numel() < self.args.min_8bit_size
        return 32 if small or not group.get("quantize_states", True) else self.args.optim_bits

    def get_config(self, gindex: int, pindex: int, group: Mapping[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)
        return {**config, "optim_bits": self._bits(group, group["params"][pindex])}

    def init_state(self, group: Mapping[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        if hasattr(p, "placements"):
            raise ValueError(
                "a parameter is sharded (a DTensor): bitsandbytes would step on its rows as if they were a tensor; take "
                "trainer=ddp, or optimizer=adamw"
            )
        if self.is_paged and p.device.type != "cuda":
            raise ValueError(
                f"a paged optimizer with parameters on {p.device.type}: paging needs CUDA's managed memory, and "
                "bitsandbytes would go on without it; take device=cuda, or the optimizer without paged"
            )
        super().init_state(group, p, gindex, pindex)

    def _held(self) -> list[tuple[Tensor, dict[str, Any], Mapping[str, Any]]]:
        groups = ((p, group) for group in self.param_groups for p in group["params"])
        return [(p, self.state[p], group) for p, group in groups if self.state.get(p)]

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by kind of tensor (the maps once), their ``total``, and ``as_float32``: what the same moments
        would take in float32."""
        found: dict[str, int] = {}
        maps: dict[int, int] = {}
        as_float32 = 0
        for p, held, _ in self._held():
            for key, t in held.items():
                if key in MAPS:
                    maps[t.data_ptr()] = t.numel() * t.element_size()
                elif isinstance(t, Tensor):
                    found[key] = found.get(key, 0) + t.numel() * t.element_size()
            as_float32 += sum(4 * p.numel() for key in STATES if key in held)
        found["qmap"] = sum(maps.values())
        return {**found, "total": sum(found.values()), "as_float32": as_float32}

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Takes over the ``state_dict()`` of the same optimizer over the same parameters.

        Raises ValueError, naming what is stored and expected, for states of other bits, of another number, or of
        another optimizer. Paged states become paged again: the library would keep them on the device.
        """
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(parameters) == len(saved):  # else the library says so
            for i, (p, group) in zip(saved, parameters, strict=True):
                self._check(i, p, group, state_dict["state"].get(i))
        own = [{k: g[k] for k in ("quantize_states", "names") if k in g} for g in self.param_groups]
        super().load_state_dict(dict(state_dict), move_to_device)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        if self.is_paged:
            for p, held, _ in self._held():
                for key in (k for k in STATES if k in held):
                    held[key] = self.get_state_buffer(p, dtype=held[key].dtype).copy_(held[key])

    def _check(self, index: int, p: Tensor, group: Mapping[str, Any], held: Any) -> None:
        if not held:
            return
        tensors = {k: v for k, v in {**held, **held.get(_WRAPPED, {})}.items() if k in STATES}
        wanted = {8: torch.uint8, 32: torch.float32}[self._bits(group, p)]
        count = 1 if self.optimizer_name == "lion" else 2
        stored = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
        if stored != dict.fromkeys(STATES[:count], (wanted, tuple(p.shape))):
            raise ValueError(
                f"parameter {index}: the checkpoint holds {stored or sorted(held)}, this optimizer ({type(self).__name__}) "
                f"{count} state(s) of {wanted} {tuple(p.shape)}; resume with the optimizer, bits and parameter groups "
                "of the run that saved it"
            )


@cache
def _subclass(name: str) -> type:
    return type(name, (_Ours, getattr(_library().optim, name)), {"__doc__": _Ours.__doc__})


def _make(name: str, params: Any, bits: int, paged: bool, **more: Any) -> Optimizer:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: bitsandbytes keeps states in {' or '.join(map(str, BITS))} bits")
    if paged and not torch.cuda.is_available():
        raise ValueError(
            "paged=true needs a CUDA device (managed memory), and torch sees none; bitsandbytes would go on unpaged. "
            "Take the optimizer without paged"
        )
    more["betas"] = tuple(more["betas"])
    return _subclass(name)(params, optim_bits=bits, is_paged=paged, **more)


class BnbAdamW:
    """``BnbAdamW(params, ...)`` is a ``bitsandbytes.optim.AdamW``, a torch Optimizer, with ``state_bytes()``.

    params: parameters or groups, as from ``parameter_groups``. lr, betas, eps, weight_decay: as in AdamW. bits: 8 or
    32, of both states. paged: see above. min_8bit_size: smaller tensors keep float32 states.

    Raises ValueError where bitsandbytes is missing, for other bits, without CUDA where paged, and at the first step
    for DTensors.
    """

    def __new__(
        cls,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bits: int = 8,
        paged: bool = False,
        min_8bit_size: int = 4096,
    ) -> Any:
        more = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        return _make("AdamW", params, bits, paged, min_8bit_size=min_8bit_size, **more)


class BnbLion:
    """``BnbLion(params, ...)`` is a ``bitsandbytes.optim.Lion``; arguments and errors as in BnbAdamW.

    Its updates have the size lr whatever the gradient: take a third to a tenth of AdamW's lr, and as much more
    weight_decay (arXiv 2302.06675, section 5).
    """

    def __new__(
        cls,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        bits: int = 8,
        paged: bool = False,
        min_8bit_size: int = 4096,
    ) -> Any:
        more = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        return _make("Lion", params, bits, paged, min_8bit_size=min_8bit_size, **more)
