"""AdamW whose moments are stored in the formats of an ``AdamStateRecipe``.

    m_t = b1 m_{t-1} + (1 - b1) g,    v_t = b2 v_{t-1} + (1 - b2) g^2                       (Kingma and Ba, 2014,
    w_t = (1 - lr wd) w_{t-1} - lr / (1 - b1^t) * m_t / (sqrt(v_t / (1 - b2^t)) + eps)      arXiv 1412.6980, alg. 1;
    stored m = Q(m_t),  stored v = Q(v_t)                                                   decay: arXiv 1711.05101)

The update uses m_t and v_t as computed, before they are stored: quantization acts on what the next step
remembers. All of it is float32; a bfloat16 weight is updated in float32 and rounded to nearest. Rows are
processed in chunks, so that the decoded moments of a large matrix never exist at once.

Parameters that ``fully_shard`` cut along dim 0 keep the states of their rows, in plain tensors. Every element is
what one process would hold given the same gradients, and ``full_state_dict`` is what it would save: a checkpoint
knows nothing of the number of processes (``sharding.py``).

With float32 states the arithmetic is that of ``torch.optim.AdamW(foreach=False)``, operation by operation, and
so are the bits. Differs from it: states are float32 for bfloat16 weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .eager import Layouts, Numbers, Part, numbers, step_eagerly
from .fused import FusedSteps, Kind, kind_of, refusal_of_layouts, refusal_of_tensors
from .loading import ELSEWHERE, matched_groups, matched_state, refuse_empty
from .sharding import RowShard, check_one_mesh, is_dtensor, local, local_gradient, row_shard
from .states import KINDS, AdamStateRecipe, StateLayout, held_by_rows


class _Way(NamedTuple):
    """How local rows of one shape are stepped: their layouts, and what the op has for them."""

    layouts: Layouts
    kind: Kind | None
    refusal: str | None


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    if not float(group["lr"]) >= 0.0:
        raise ValueError(f"lr={group['lr']!r}: must be 0 or more, for example 3e-3")
    if len(group["betas"]) != 2 or not all(0.0 <= b < 1.0 for b in group["betas"]):
        raise ValueError(f"betas={group['betas']!r}: two numbers in [0, 1), for example (0.9, 0.95)")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]!r}: must be 0 or more")


class AdamW(Optimizer):
    """AdamW with quantized moments.

    params: parameters, or groups as from ``parameter_groups``. A group may hold ``quantize_states=False`` (its
    states stay float32: embeddings) and ``names``, one a parameter, for messages and for stochastic bits.
    lr: step size. betas: decay rates of the two moments. eps: added to the root of the second, in units of the
    gradient. weight_decay: decoupled; a step multiplies weights by 1 - lr * weight_decay.
    states: an AdamStateRecipe or a mapping of its fields; None keeps float32. seed: of stochastic rounding.
    fused: None steps CUDA parameters by the op ``adamw_step``, many in one launch, where it has a layout for their states,
    and others eagerly (``fused_parameters`` tells which); True raises where it has none; False is eager. States and
    checkpoints are the same. On CUDA the op's bits are those of the eager step.

    Parameters are float32 or bfloat16, whole or DTensors with placement Shard(0) or Replicate() on a mesh of one
    dimension. Missing gradients are skipped, non-finite ones propagate (all of a quantization block is then
    non-finite for good: guard the gradient before the step). Under sharding a gradient is missing on all processes
    or on none; ``state``, ``state_dict()``, ``decode_states`` and ``state_bytes`` are of the local rows.

    Raises ValueError for hyperparameters out of range and for other dtypes, other placements, states that cannot be
    sharded exactly and unknown states; RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        states: AdamStateRecipe | Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        fused: bool | None = None,
    ) -> None:
        self.fused, self._eager_because = fused, dict[str, str | None]()
        self._ways: dict[tuple[object, ...], _Way] = {}
        self.recipe = states if isinstance(states, AdamStateRecipe) else AdamStateRecipe(**(states or {}))
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "quantize_states": True,
            "states": self.recipe.as_dict(),
            "seed": seed,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:  # pickle and deepcopy; torch's own keeps three attributes only
        own = {"recipe": self.recipe, "fused": self.fused, "_eager_because": self._eager_because}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ways = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("states", self.recipe.as_dict()) != self.recipe.as_dict():
            raise ValueError(
                "a parameter group cannot have states of its own; give quantize_states=False to keep its states "
                "in float32, or use a second optimizer"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"] = tuple(group["betas"])
        _check_hyperparameters(group)
        names = group.get("names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(
                f"a parameter group has {len(names)} names for {len(group['params'])} parameters"
            )
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"{self._name(p)} is {p.dtype}: AdamW takes float32 and bfloat16 parameters; convert the "
                    "model with .float() or .bfloat16()"
                )
            if is_dtensor(p) and row_shard(self._name(p), p).mesh is not None:
                for layout in self._layouts(p, group):
                    layout.check_sharded(self._name(p))
            if self.fused:
                self._check_fused(self._name(p), refusal_of_layouts(self._layouts(p, group)))

    @staticmethod
    def _check_fused(name: str, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(f"{name} cannot be stepped with fused=True: {reason}; use fused=None or False")

    def _named_parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) in the order of the state dict; unnamed ones are ``parameter <index>``."""
        index = 0
        for group in self.param_groups:
            names = group.get("names") or group.get("param_names")
            for i, p in enumerate(group["params"]):
                yield (names[i] if names else f"parameter {index}"), p, group
                index += 1

    def _name(self, p: Tensor) -> str:
        return next(name for name, q, _ in self._named_parameters() if q is p)

    def _layouts(self, p: Tensor, group: Mapping[str, Any]) -> tuple[StateLayout, StateLayout]:
        """Of the whole parameter: the shape of a DTensor is the global one."""
        shape, quantized = tuple(p.shape), group["quantize_states"]
        return (
            self.recipe.layout("exp_avg", shape, quantized),
            self.recipe.layout("exp_avg_sq", shape, quantized),
        )

    def _way(self, p: Tensor, group: Mapping[str, Any], shard: RowShard) -> _Way:
        """Found once a shape: a step over many small parameters is the time of Python."""
        key = (p.shape, group["quantize_states"], shard.stop - shard.start)
        if (way := self._ways.get(key)) is None:
            m, v = (layout.of_rows(shard.stop - shard.start) for layout in self._layouts(p, group))
            reason = "fused=False" if self.fused is False else refusal_of_layouts((m, v))
            way = self._ways[key] = _Way((m, v), None if reason else kind_of((m, v)), reason)
        return way

    def _local_layouts(self, p: Tensor, group: Mapping[str, Any], shard: RowShard) -> Layouts:
        return self._way(p, group, shard).layouts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. closure: reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [each for each in self._named_parameters() if each[1].grad is not None]
        gradients = [self._checked_gradient(*each) for each in ready]  # all, before anything changes
        self._eager_because, together = {}, FusedSteps()
        now: dict[tuple[int, int], Numbers] = {}
        for (name, p, group), gradient in zip(ready, gradients, strict=True):
            shard, weights, held = row_shard(name, p), local(p), self.state[p]
            layouts, kind, reason = self._way(p, group, shard)
            if not held:
                held["step"] = torch.zeros((), dtype=torch.float32)
                for layout in layouts:
                    held.update(layout.allocate(weights))
            held["step"] += 1
            step = int(held["step"].item())
            if (at := (id(group), step)) not in now:
                now[at] = numbers(group, step)
            part = Part(name, weights, gradient, held, layouts, shard, now[at])
            self._eager_because[name] = reason = reason or refusal_of_tensors(weights, gradient)
            if reason is None and kind is not None:
                together.add(kind, part)
            else:
                step_eagerly(part, step, group["seed"])
        together.run()
        return loss

    def _checked_gradient(self, name: str, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        gradient = local_gradient(name, p)
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient: AdamW decays every moment at every step; build the embedding "
                "with sparse=False"
            )
        if self.fused:
            self._check_fused(name, refusal_of_tensors(local(p), gradient))
        return gradient

    def fused_parameters(self) -> dict[str, str | None]:
        """How the last step stepped each parameter: name -> None in the op ``adamw_step``, else why eagerly."""
        return dict(self._eager_because)

    def state_layouts(self, p: Tensor) -> tuple[StateLayout, StateLayout]:
        """How the two moments of p, or of its local rows, lie in ``state[p]``. Raises KeyError where p is not optimized
        here."""
        for name, q, group in self._named_parameters():
            if q is p:
                return self._local_layouts(p, group, row_shard(name, p))
        raise KeyError("the tensor is not a parameter of this optimizer")

    def decode_states(self, p: Tensor) -> dict[str, Tensor]:
        """The moments of p as the next step will see them: {"exp_avg", "exp_avg_sq"}, float32 copies of the shape of
        p, or of its local rows where it is sharded.

        Raises KeyError where p is not optimized here or has had no step yet.
        """
        for name, q, group in self._named_parameters():
            if q is p:
                if not self.state.get(p):
                    raise KeyError(f"{name} has no state yet: it has had no step with a gradient")
                held, layouts = self.state[p], self._local_layouts(p, group, row_shard(name, p))
                return {layout.kind: layout.read(held).clone().reshape(layout.shape) for layout in layouts}
        raise KeyError("the tensor is not a parameter of this optimizer")

    def state_bytes(self) -> dict[str, int]:
        """Bytes held now by this process, by kind of state tensor (``exp_avg.codes``, ``exp_avg.scale``, ``exp_avg``
        for float32 ones, ..., ``step``), their ``total``, and ``as_float32``: what the same moments would take in
        float32."""
        found: dict[str, int] = {}
        as_float32 = 0
        for p, held in self.state.items():
            for key, t in held.items():
                found[key] = found.get(key, 0) + t.numel() * t.element_size()
            if held:
                as_float32 += len(KINDS) * 4 * local(p).numel() + held["step"].element_size()
        return {**found, "total": sum(found.values()), "as_float32": as_float32}

    def full_state_dict(self) -> dict[str, Any]:
        """What ``state_dict()`` of one process with the same parameters would be: all rows, packed as they are, as
        copies on the CPU.

        A collective where a parameter is sharded: every process of its mesh calls it. One tensor is gathered at a
        time, to the first process of the mesh; on the others ``state`` is empty and ``states_on_rank`` names that
        first one. Raises ValueError where parameters are sharded over different processes.
        """
        shards = [(name, row_shard(name, p)) for name, p, _ in self._named_parameters()]
        check_one_mesh(shards)
        first, packed = all(shard.is_first for _, shard in shards), self.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for i, (_, p, group) in enumerate(self._named_parameters()):
            held = packed["state"].get(i)
            if not held:
                continue
            for key, cut in {"step": False, **held_by_rows(self._layouts(p, group))}.items():
                whole = shards[i][1].gather(held[key]) if cut else held[key]
                if first and whole is not None:
                    state.setdefault(i, {})[key] = whole.detach().to("cpu", copy=True)
        if first:
            return {**packed, "state": state}
        holder = next(int(shard.mesh.mesh[0]) for _, shard in shards if shard.mesh is not None)
        return {**packed, "state": {}, ELSEWHERE: holder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a ``full_state_dict()`` or, of one process, a ``state_dict()`` of an AdamW with the same
        parameters and state formats, or, where all states are float32, of ``torch.optim.AdamW``. Hyperparameters
        come from the checkpoint, as in torch. Under sharding each process passes the whole dict and keeps its rows;
        nothing is communicated.

        Torch's own loading casts states to the parameter's dtype: for bfloat16 weights it would turn codes and
        scales into bfloat16. Here tensors keep their dtype; hooks before loading see the groups alone.

        Raises ValueError, naming the parameter, what is stored and what is expected, where they differ.
        """
        refuse_empty(state_dict)
        named = [(name, p, self._layouts(p, group)) for name, p, group in self._named_parameters()]
        groups = matched_groups(self.param_groups, state_dict["param_groups"])
        loaded = matched_state(named, state_dict)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        for p, held in loaded.items():
            self.state[p] = held
