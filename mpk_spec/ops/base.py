"""What an operator is.

**One new op = one op class + one `.cuh` + one test.** The class holds everything the rest of the project asks about an
operator: its YAML fields (it is a pydantic model), the shape and sharding of its result, which part of each input a
part of its output needs (from which tasks, their regions and their events all follow), its meaning in torch with its
rounding points, and the name of its CUDA task.

Features: an activation is `[tokens, *shape]`; its features are `shape` flattened. Tasks and spans speak of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

FeatureSpan = tuple[int, int]
Role = Literal["row", "linear", "attention", "append", "gather", "reduce"]


@dataclass(frozen=True)
class Kind:
    """Marks what a field of an op (or of the schema) holds, for name resolution, expressions and the JSON Schema."""

    of: Literal["value", "weight", "state", "expr", "dim_expr"]


Ref = Annotated[str, Kind("value"), Field(description="the name of a value computed before")]
Refs = Annotated[list[str], Kind("value"), Field(description="names of values computed before")]
WeightRef = Annotated[str, Kind("weight"), Field(description="the name of a weight")]
StateRef = Annotated[str, Kind("state"), Field(description="the name of a state")]
Expr = Annotated[
    str | int | float | bool | None,
    Kind("expr"),
    Field(description="a number or an expression over config, dims, values and (per layer) i"),
]


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor on one rank: its local size, and the dimension names that made it.

    `split` holds those of them that tensor parallelism divides: a product summed over such an axis is `partial`.
    """

    size: int
    names: frozenset[str] = frozenset()
    split: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TensorType:
    """The type of a value: axes after the tokens axis, dtype, and what kind of thing it is.

    `partial`: each rank holds an addend of the true value. `route`: expert ids and weights `[tokens, k]`. `cache`: the
    KV cache after an append. `routed`: one row per (token, chosen expert), so `[tokens, k, *axes]`. `elsewhere`: rows
    of experts that other ranks hold are zero here.
    """

    axes: tuple[Axis, ...]
    dtype: str = "bf16"
    kind: Literal["tensor", "route", "cache"] = "tensor"
    partial: bool = False
    routed: int = 0
    elsewhere: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def features(self) -> int:
        return prod(self.shape)


class OpError(Exception):
    """What is wrong with an operator in its place; the binder adds the position. `field`: the YAML key to blame."""

    def __init__(self, message: str, field: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message, self.field, self.hint = message, field, hint


@dataclass
class Scope:
    """What an op's meaning may ask for beside its inputs: the step, the layer's values, and the part being computed.

    positions, slots: int64 `[tokens]`. values: this layer's numbers. span: the features of the output wanted.
    """

    positions: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    span: FeatureSpan = (0, 0)
    extras: Mapping[str, Any] = field(default_factory=dict)


class Op(BaseModel):
    """Base of all operators. Subclasses are registered with `@register`; the YAML key is `op`.

    The field whose alias is the YAML key holds the input(s): `{rmsnorm: x, weight: attn_norm}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)

    op: ClassVar[str]
    role: ClassVar[Role] = "row"
    """How it fuses and tiles: `row` ops are computed feature by feature (or head by head, or row by row)."""
    task: ClassVar[str]
    """The CUDA task template in cuda_templates/tasks/."""
    epilogue_of: ClassVar[frozenset[str]] = frozenset()
    """Roles after which it may be computed in the same task, on the features that the task made."""
    keeps_input: ClassVar[bool] = False
    """Whether, as an epilogue, it leaves in memory what it reads."""
    prologue_of: ClassVar[frozenset[str]] = frozenset()
    """Roles before which it may be recomputed by every task."""
    cuda: ClassVar[bool] = False
    """Whether a CUDA task exists; the emitter refuses the others by name."""

    def operands(self) -> tuple[str, ...]:
        """The names of the values it reads, in order."""
        raise NotImplementedError(f"{type(self).__name__}.operands")

    def infer(
        self, inputs: Sequence[TensorType], weights: Mapping[str, TensorType], values: Mapping[str, Any]
    ) -> TensorType:
        """The type of its result on one rank. Raises OpError for operands that do not fit."""
        raise NotImplementedError(f"{type(self).__name__}.infer")

    def needs(self, span: FeatureSpan, output: TensorType, inputs: Sequence[TensorType]) -> tuple[FeatureSpan, ...]:
        """For each input, the features that the features `span` of the output are computed from."""
        return tuple(span for _ in inputs)

    def granule(self, output: TensorType) -> int:
        """The smallest number of neighbouring output features that can be computed apart."""
        return 1

    def compute(
        self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor], scope: Scope
    ) -> torch.Tensor:
        """Its meaning, rounding points included: float32 in, float32 out.

        Inputs `[tokens, features needed]` hold values already rounded to their tensor's dtype, as float32; the result
        `[tokens, scope.span]` is rounded by whoever stores it. Roundings inside an op are its own business.
        """
        raise NotImplementedError(f"{type(self).__name__}.compute")


REGISTRY: dict[str, type[Op]] = {}


def register(cls: type[Op]) -> type[Op]:
    """Adds an op to the language. Other packages do it from the entry point group `mpk_spec.ops`."""
    if cls.op in REGISTRY and REGISTRY[cls.op] is not cls:
        raise ValueError(f"operator '{cls.op}' is registered twice: {REGISTRY[cls.op].__module__}, {cls.__module__}")
    REGISTRY[cls.op] = cls
    return cls


_rounding: ContextVar[bool] = ContextVar("rounding", default=True)


@contextmanager
def without_rounding() -> Iterator[None]:
    """Inside it every rounding point is skipped, so that a model's meaning can be compared in float32."""
    token = _rounding.set(False)
    try:
        yield
    finally:
        _rounding.reset(token)


def round_to(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rounds float32 values to `dtype` and returns them as float32."""
    import torch

    if dtype == "f32" or not _rounding.get():
        return x
    return x.to({"bf16": torch.bfloat16, "f16": torch.float16}[dtype]).to(torch.float32)


LANES = 64  # elements; whole vectors of every CPU


def elementwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function(x)`, each element's bits independent of the shape: torch has other code for the rest of a vector."""
    from torch.nn.functional import pad

    count = x.numel()
    if count % LANES == 0 and x.is_contiguous():
        return function(x)
    return function(pad(x.reshape(-1), (0, -count % LANES)))[:count].view(x.shape)


def number(values: Mapping[str, Any], field: str, optional: bool = False) -> None:
    """Raises OpError unless the value of `field` is a number (or none, where it is optional)."""
    value = values.get(field)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or (optional and value is None)):
        said = "none" if value is None else repr(value)
        raise OpError(f"'{field}' must be a number, it is {said}", field)


def same_features(op: str, inputs: Sequence[TensorType]) -> None:
    """Raises OpError unless all inputs have the same features."""
    if any(t.shape != inputs[0].shape for t in inputs):
        raise OpError(f"{op} needs operands of one shape, got " + " and ".join(str(list(t.shape)) for t in inputs))
