"""Recipes: how the three GEMMs of a linear layer, and all linear layers of a model, are quantized.

    fprop   y  [T, O] = x   [T, I] . W   [O, I]^T
    dgrad   dx [T, I] = g   [T, O] . W^T [I, O]^T
    wgrad   dW [O, I] = g^T [O, T] . x^T [I, T]^T          T tokens, I in, O out

Each operand is seen K-major in its GEMM: ``row`` in wgrad.grad_output is one scale per output channel, over all
tokens; the per-token scales of the literature are ``column`` there. An operand is

    None      high precision, never "inherit"
    a spec    quantized for this GEMM
    "fprop"   the forward's quantized operand again, mapped back through the forward's transform

With "fprop", a scale per row of the forward lies on the contraction of the second GEMM. It is multiplied into
the other operand before that one is quantized, so that the GEMM still runs on codes; a scale along groups
cannot be, and the reused operand then enters dequantized.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .spec import QuantSpec
from .transforms import Hadamard, Transform

Operand = QuantSpec | str | None
GEMMS = ("fprop", "dgrad", "wgrad")
COMPUTES = ("simulated", "native", "auto")


def as_operand(value: Any, where: str, *, reuse: bool = False) -> Operand:
    """None, "none", "fprop" (where allowed), a spec, its short form or a mapping -> Operand."""
    if value is None or value == "none":
        return None
    if value == "fprop":
        if not reuse:
            raise ValueError(
                f"{where}='fprop': only dgrad.weight and wgrad.input can reuse the forward's operand; give a spec or none"
            )
        return "fprop"
    try:
        return QuantSpec.of(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def _as(cls: type, value: Any) -> Any:
    """A sub-recipe from itself or a mapping of its fields."""
    if isinstance(value, Mapping):
        allowed = [f.name for f in fields(cls)]
        unknown = [str(key) for key in value if key not in allowed]
        if unknown:
            raise ValueError(
                f"{cls.__name__}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
            )
        return cls(**{str(k): v for k, v in value.items()})
    if not isinstance(value, cls):
        raise TypeError(
            f"expected a {cls.__name__} or a mapping of its fields, got {type(value).__name__}: {value!r}"
        )
    return value


def _transform(value: Any, reused: bool, gemm: str) -> Transform | None:
    """None, "none", a Transform, its short form or a mapping of its fields -> Transform or None."""
    transform = None if value == "none" else value
    if isinstance(transform, str):
        transform = Transform.parse(transform)
    elif isinstance(transform, Mapping):
        transform = _as(Hadamard, transform)
    if not isinstance(transform, Transform | None):
        raise TypeError(
            f"{gemm}.transform={transform!r}: expected none, hadamard:B, rht:B or package.module:Name, got {type(transform).__name__}"
        )
    if transform is not None and reused:
        raise ValueError(
            f"{gemm}.transform={str(transform)!r} with an operand 'fprop': codes of the forward cannot be transformed again; use a spec there"
        )
    return transform


@dataclass(frozen=True, kw_only=True)
class FpropRecipe:
    """y = x W^T: ``input`` [T, I], ``weight`` [O, I], ``transform`` along I."""

    input: Operand = None
    weight: Operand = None
    transform: Transform | None = None  # or its short form, parsed here

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", as_operand(self.input, "fprop.input"))
        object.__setattr__(self, "weight", as_operand(self.weight, "fprop.weight"))
        object.__setattr__(self, "transform", _transform(self.transform, False, "fprop"))


@dataclass(frozen=True, kw_only=True)
class DgradRecipe:
    """dx = g W: ``grad_output`` [T, O], ``weight`` [I, O], ``transform`` along O."""

    grad_output: Operand = None
    weight: Operand = None
    transform: Transform | None = None  # or its short form, parsed here

    def __post_init__(self) -> None:
        object.__setattr__(self, "grad_output", as_operand(self.grad_output, "dgrad.grad_output"))
        object.__setattr__(self, "weight", as_operand(self.weight, "dgrad.weight", reuse=True))
        object.__setattr__(self, "transform", _transform(self.transform, self.weight == "fprop", "dgrad"))


@dataclass(frozen=True, kw_only=True)
class WgradRecipe:
    """dW = g^T x: ``grad_output`` [O, T], ``input`` [I, T], ``transform`` along T."""

    grad_output: Operand = None
    input: Operand = None
    transform: Transform | None = None  # or its short form, parsed here

    def __post_init__(self) -> None:
        object.__setattr__(self, "grad_output", as_operand(self.grad_output, "wgrad.grad_output"))
        object.__setattr__(self, "input", as_operand(self.input, "wgrad.input", reuse=True))
        object.__setattr__(self, "transform", _transform(self.transform, self.input == "fprop", "wgrad"))


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """The three GEMMs of one linear layer.

    saved: what the forward keeps of x for the backward: ``high_precision`` (x itself, one tensor for all layers
    that read it; quantized again when needed, with the same bits) or ``quantized`` (the packed codes).
    """

    fprop: FpropRecipe = field(default_factory=FpropRecipe)
    dgrad: DgradRecipe = field(default_factory=DgradRecipe)
    wgrad: WgradRecipe = field(default_factory=WgradRecipe)
    saved: str = "high_precision"

    def __post_init__(self) -> None:
        for name, cls in (("fprop", FpropRecipe), ("dgrad", DgradRecipe), ("wgrad", WgradRecipe)):
            object.__setattr__(self, name, _as(cls, getattr(self, name)))
        if self.saved not in ("high_precision", "quantized"):
            raise ValueError(f"saved={self.saved!r}: allowed are high_precision and quantized")
        if self.saved == "quantized" and self.wgrad.input is None:
            raise ValueError(
                "saved='quantized' with wgrad.input=none: a high-precision wgrad needs x itself; quantize wgrad.input or save high_precision"
            )
        for reused, source, name in (
            (self.dgrad.weight, self.fprop.weight, "dgrad.weight='fprop' but fprop.weight"),
            (self.wgrad.input, self.fprop.input, "wgrad.input='fprop' but fprop.input"),
        ):
            if reused == "fprop" and source is None:
                raise ValueError(
                    f"{name}=none: there is no quantized operand to reuse; write none there, or quantize the forward"
                )
        # Asked for in every forward
        operands = self.operands().values()
        transforms = [t for gemm in GEMMS if isinstance(t := getattr(self, gemm).transform, Transform)]
        draws = any(isinstance(v, QuantSpec) and v.stochastic for v in operands)
        object.__setattr__(self, "_quantizes", any(v is not None for v in operands) or bool(transforms))
        object.__setattr__(self, "_stochastic", draws or any(t.randomized for t in transforms))

    def operands(self) -> dict[str, Operand]:
        """The six operands by name, ``fprop.input`` .. ``wgrad.input``."""
        names = {
            "fprop": ("input", "weight"),
            "dgrad": ("grad_output", "weight"),
            "wgrad": ("grad_output", "input"),
        }
        return {
            f"{gemm}.{name}": getattr(getattr(self, gemm), name) for gemm in GEMMS for name in names[gemm]
        }

    def resolved(self, operand: str) -> QuantSpec | None:
        """The spec behind an operand's name, "fprop" followed to the forward's."""
        value = self.operands()[operand]
        if value == "fprop":
            value = self.fprop.weight if operand == "dgrad.weight" else self.fprop.input
        return value  # type: ignore[return-value]

    @property
    def quantizes(self) -> bool:
        """Whether any operand is quantized or any GEMM transformed."""
        return self._quantizes  # type: ignore[attr-defined, no-any-return]

    @property
    def learns_steps(self) -> bool:
        """Whether a range of it is a parameter."""
        return any(isinstance(v, QuantSpec) and v.clip == "learned" for v in self.operands().values())

    @property
    def stochastic(self) -> bool:
        """Whether it draws random bits: stochastic rounding or a randomized transform."""
        return self._stochastic  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Layers whose name matches ``pattern`` (shell wildcards against the whole dotted name) get ``recipe``;
    None leaves them in high precision."""

    pattern: str
    recipe: LinearRecipe | None

    def __post_init__(self) -> None:
        if self.recipe is not None:
            object.__setattr__(self, "recipe", _as(LinearRecipe, self.recipe))


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which linear layer of a model gets which recipe.

    linear: for every linear layer (None: none). rules: ordered, the last match wins. exclude: patterns that stay
    in high precision, whatever the rules. A pattern that matches nothing is an error (raised by
    ``qtrain.nn.apply_recipe``). compute: ``simulated`` multiplies grid values in ordinary GEMMs; ``native`` multiplies
    codes on low-precision hardware, or raises; ``auto`` is native in the layers where that measures faster
    (outside of a run: wherever there are kernels), else simulated, and the surgery's report says where. recompute_activations: quantized layers that alone
    read an activation (an MLP's ``down``) save its inputs and not what they read, which the backward computes again.
    """

    linear: LinearRecipe | None = None
    rules: Sequence[Rule] = ()
    exclude: Sequence[str] = ()
    compute: str = "simulated"
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        if self.linear is not None:
            object.__setattr__(self, "linear", _as(LinearRecipe, self.linear))
        object.__setattr__(self, "rules", tuple(_as(Rule, r) for r in self.rules))
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        object.__setattr__(self, "exclude", exclude)
        if not isinstance(self.recompute_activations, bool):
            raise TypeError(
                f"recompute_activations={self.recompute_activations!r}: allowed are true and false"
            )
        if self.compute not in COMPUTES:
            raise ValueError(
                f"compute={self.compute!r}: allowed are simulated (grid values in bf16 or fp32 GEMMs), native (codes in "
                "int8 or fp8 GEMMs) and auto (native where it is fast)"
            )

    def for_layer(self, name: str) -> LinearRecipe | None:
        """The recipe of the layer of that dotted name, None for high precision."""
        if any(fnmatch.fnmatchcase(name, p) for p in self.exclude):
            return None
        chosen = self.linear
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.pattern):
                chosen = rule.recipe
        return chosen if chosen is not None and chosen.quantizes else None

    def patterns(self) -> list[str]:
        """All patterns, for the check that each matches something."""
        return [*(r.pattern for r in self.rules), *self.exclude]
