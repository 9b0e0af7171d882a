"""Spec + config + degree -> Model: expressions evaluated, names resolved, types inferred, collectives inserted.

Tensor parallelism is a matter of sizes: a weight whose shape holds a split dim has a rank's share of it, and a product
summed over such an axis is partial. Where a partial value is needed whole, an `all_reduce` goes in between.
"""

from __future__ import annotations

from typing import Any

from mpk_spec.errors import SpecError
from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Axis, Kind, Op, OpError, TensorType
from mpk_spec.planner.environment import Environment
from mpk_spec.planner.model import BoundOp, Model, Section
from mpk_spec.planner.plan import State
from mpk_spec.planner.weights import bind_weights
from mpk_spec.schema import Spec, expression_of

STEP_INPUTS = {"token_ids": TensorType((Axis(1),), dtype="i32")}
KEEPS_PARTIAL = frozenset({"combine", "all_reduce", "split_k_reduce"})


def bind(spec: Spec, config: dict[str, Any], *, tp: int, batch: int, context: int) -> Model:
    """Raises SpecError with every problem found: requirements, sizes, shapes, degrees."""
    env = Environment(spec, config, tp)
    for index, requirement in enumerate(spec.model.requires):
        if env.evaluate(requirement, ("model", "requires", index), env.names(requirement, None)) is False:
            env.problems.append(
                spec.problem(
                    ("model", "requires", index),
                    f"this config does not meet: {requirement.text}",
                    "another spec may fit; this one would compute something else",
                )
            )
    env.check()
    weights, weight_types = bind_weights(spec, env)
    env.check()
    binder = _Binder(spec, env, weight_types)
    sections = binder.sections()
    env.check()
    states = _states(spec, env, batch, context)
    env.check()
    return Model(
        sections=sections, types=binder.types, weights={n: w for n, w in weights.items() if n in binder.used},
        states=states, dims=env.local, carries=frozenset(binder.carries), cache_state=binder.cache_state, config=env.config, tp=tp,
        all_reduces=sum((s.layers or 1) * sum(o.op.op == "all_reduce" for o in s.ops) for s in sections) if tp > 1 else 0,
    )  # fmt: skip


def _states(spec: Spec, env: Environment, batch: int, context: int) -> dict[str, State]:
    found = {}
    for name, decl in spec.state.items():
        path = ("state", name, "shape")
        shape = [env.evaluate(e, (*path, n), env.names(e, None, local=True)) for n, e in enumerate(decl.shape)]
        layers = 1
        for dim in decl.per:
            layers *= env.dims.get(dim, 1)
        if len(shape) != 2:
            env.problems.append(spec.problem(path, "a kv_cache is [kv_heads, head_dim]"))
        elif None not in shape:
            found[name] = State(name, shape[0], shape[1], layers, context, batch)
    return found


class _Binder:
    """Walks the operators in order, keeping the types of the values seen."""

    def __init__(self, spec: Spec, env: Environment, weight_types: dict[str, TensorType]):
        self.spec, self.env, self.weight_types = spec, env, weight_types
        self.types: dict[str, TensorType] = dict(STEP_INPUTS)
        self.used: set[str] = set()
        self.carries: list[str] = []
        self.cache_state: dict[str, str] = {}

    def sections(self) -> tuple[Section, ...]:
        """Operators before, in and after each repeat."""
        done: list[Section] = []
        plain: list[BoundOp] = []
        carried_in = {item.input: name for name, item in self.spec.layers.items() if not isinstance(item, Op)}
        renamed: dict[str, str] = {}
        for name, item in self.spec.layers.items():
            if isinstance(item, Op):
                output = carried_in.get(name, name)
                self._add(plain, name, item, renamed, output, ("layers", name), None)
                renamed[name] = output
                continue
            if plain:
                done.append(Section(f"before_{name}", tuple(plain)))
                plain = []
            done.append(self._repeat(name, item, renamed))
            renamed[name] = name
        if plain:
            done.append(Section("head" if done else "model", tuple(plain)))
        return tuple(done)

    def _repeat(self, name: str, item, renamed: dict[str, str]) -> Section:
        layers = self.env.dims[item.over]
        ops: list[BoundOp] = []
        self.carries.append(name)
        if name not in self.types:  # the input is a step input or comes under its own name
            self.types[name] = self.types[renamed.get(item.input, item.input)]
        source = name
        for position, block in enumerate(item.blocks):
            last = position == len(item.blocks) - 1
            names = {"x": source}
            for key, op in self.spec.blocks[block].items():
                output = name if last and key == "out" else f"{block}.{key}"
                self._add(ops, f"{block}.{key}", op, names, output, ("blocks", block, key), layers)
                names[key] = names.pop("=", output)
            source = names["out"]
        return Section(name, tuple(ops), layers)

    def _add(
        self, ops: list[BoundOp], name: str, op: Op, names: dict[str, str], output: str, path: tuple, layers
    ) -> None:
        """Binds one operator and appends it (and an all_reduce before it where an operand is partial)."""
        when = self.spec.op_when.get(path[1:] if path[0] == "blocks" else ("layers", path[1]))
        if when is not None and not self.env.evaluate(when, (*path, "when"), self.env.names(when, None)):
            names["="] = names.get(op.operands()[0], op.operands()[0])
            return
        operands = [names.get(o, o) for o in op.operands()]
        if op.op not in KEEPS_PARTIAL:
            operands = [self._whole(ops, o, path) for o in operands]
        values, per_layer = self._values(op, path, layers)
        roles = {f: getattr(op, f) for f in _fields(op, "weight") if getattr(op, f) is not None}
        if any(w not in self.weight_types for w in roles.values()):
            roles = {f: w for f, w in roles.items() if w in self.weight_types}  # left out by its own `when`
        self.used |= set(roles.values())
        first = {k: v[0] if k in per_layer else v for k, v in values.items()}
        try:
            result = op.infer(
                [self.types[o] for o in operands], {r: self.weight_types[w] for r, w in roles.items()}, first
            )
        except OpError as error:
            at = (*path, error.field) if error.field else path
            self.env.problems.append(self.spec.problem(at, error.message, error.hint))
            raise SpecError(self.env.problems) from None
        if op.op == "kv_append":
            self.cache_state[output] = op.state
        bound = BoundOp(name, op, tuple(operands), output, roles, values, frozenset(per_layer), path)
        self.types[output] = self._declared(name, path, result, output)
        ops.append(bound)

    def _whole(self, ops: list[BoundOp], value: str, path: tuple) -> str:
        """The value itself, or the sum over ranks of a partial one."""
        kind = self.types.get(value)
        if kind is None or not kind.partial:
            return value
        summed = f"{value}.all_reduce"
        if summed not in self.types:
            op = all_ops()["all_reduce"](all_reduce=value)
            self.types[summed] = op.infer([kind], {}, {})
            ops.append(BoundOp(summed, op, (value,), summed, {}, {}, path=path))
        return summed

    def _values(self, op: Op, path: tuple, layers: int | None) -> tuple[dict[str, Any], set[str]]:
        """Evaluates the op's expressions; those that differ by layer become lists."""
        values: dict[str, Any] = {}
        per_layer: set[str] = set()
        for field in _fields(op, "expr"):
            expression = expression_of(getattr(op, field))
            at = (*path, field)
            if layers and self.env.mentions_layer(expression):
                each = [
                    self.env.evaluate(expression, at, self.env.names(expression, i, local=True), i)
                    for i in range(layers)
                ]
                if all(v == each[0] for v in each):
                    values[field] = each[0]
                else:
                    values[field], _ = each, per_layer.add(field)
            else:
                values[field] = self.env.evaluate(expression, at, self.env.names(expression, None, local=True))
        return values, per_layer

    def _declared(self, name: str, path: tuple, result: TensorType, output: str) -> TensorType:
        """Applies what `tensors:` says of the value; its shape is checked, not believed."""
        from dataclasses import replace

        decl = self.spec.tensors.get(name) or self.spec.tensors.get(output)
        if decl is None:
            return result
        if decl.shape is not None:
            wanted = [
                self.env.evaluate(
                    e, ("tensors", name, "shape", n), {"tokens": 1, **self.env.names(e, None, local=True)}
                )
                for n, e in enumerate(decl.shape)
            ][1:]
            if tuple(wanted) != result.shape:
                self.env.problems.append(
                    self.spec.problem(
                        ("tensors", name, "shape"),
                        f"'{name}' is [tokens, {', '.join(map(str, result.shape))}], not {['tokens', *wanted]}",
                    )
                )
        return replace(result, dtype=decl.dtype) if decl.dtype else result


def _fields(op: Op, kind: str) -> list[str]:
    """The fields of an op that hold weights, expressions, ..."""
    return [n for n, f in type(op).model_fields.items() if kind in _kinds(f)]


def _kinds(field) -> set[str]:
    from typing import get_args

    found = {m.of for m in field.metadata if isinstance(m, Kind)}
    for part in get_args(field.annotation):
        found |= {m.of for m in getattr(part, "__metadata__", ()) if isinstance(m, Kind)}
    return found
