"""Spec + config + degree -> Model: expressions evaluated, names resolved, types inferred, collectives inserted.

Tensor parallelism is a matter of sizes: a weight whose shape holds a split dim has a rank's share of it, and a product
summed over such an axis is partial. Where a partial value is needed whole, an `all_reduce` goes in between.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpk_spec.errors import SpecError
from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Axis, Kind, Op, OpError, TensorType
from mpk_spec.planner.environment import Environment
from mpk_spec.planner.model import BoundOp, Model, Section
from mpk_spec.planner.plan import State
from mpk_spec.planner.weights import bind_weights
from mpk_spec.schema import Expression, Spec, expression_of

STEP_INPUTS = {"token_ids": TensorType((Axis(1),), dtype="i32")}
KEEPS_PARTIAL = frozenset({"combine", "all_reduce", "split_k_reduce"})


def bind(spec: Spec, config: dict[str, Any], *, tp: int, batch: int, context: int) -> Model:
    """Raises SpecError with every problem found: requirements, sizes, shapes, degrees."""
    env = Environment(spec, config, tp, batch, context)
    if set(spec.dims) - env.dims.keys():
        env.check()
    _check_requirements(spec, env)
    env.check()
    weights, weight_types = bind_weights(spec, env)
    env.check()
    binder = _Binder(spec, env, weight_types)
    sections = binder.sections()
    env.check()
    weights |= {n: replace(weights[n], once=True) for n in binder.once}
    states = _states(spec, env, batch, context)
    env.check()
    return Model(
        sections=sections, types=binder.types, weights={n: w for n, w in weights.items() if n in binder.used},
        states=states, dims=env.local, carries=frozenset(binder.carries), cache_state=binder.cache_state,
        origins=binder.origins, config=env.config, tp=tp,
        all_reduces=sum((s.layers or 1) * sum(o.op.op == "all_reduce" for o in s.ops) for s in sections),
    )  # fmt: skip


def _check_requirements(spec: Spec, env: Environment) -> None:
    for index, requirement in enumerate(spec.model.requires):
        path, known = ("model", "requires", index), len(env.problems)
        met = env.evaluate(requirement, path, env.names(requirement, None))
        if not met and len(env.problems) == known:
            env.problems.append(
                spec.problem(
                    path,
                    f"this config does not meet: {requirement.text}",
                    "another spec may fit; this one would compute something else",
                )
            )


def _states(spec: Spec, env: Environment, batch: int, context: int) -> dict[str, State]:
    found = {}
    for name, decl in spec.state.items():
        path = ("state", name, "shape")
        shape = [env.evaluate(e, (*path, n), env.names(e, None, local=True)) for n, e in enumerate(decl.shape)]
        layers = 1
        for dim in decl.per:
            layers *= env.dims.get(dim, 1)
        if len(shape) != 2:
            env.problems.append(spec.problem(path, f"a kv_cache is [kv_heads, head_dim], got {shape}"))
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
        self.origins: dict[str, str] = {}
        self.once: set[str] = set()

    def sections(self) -> tuple[Section, ...]:
        """Operators before, in and after the repeat."""
        done: list[Section] = []
        plain: list[BoundOp] = []
        self._check_repeats()
        carried = {item.input: name for name, item in self.spec.layers.items() if not isinstance(item, Op)}
        names: dict[str, str] = {}
        for name, item in self.spec.layers.items():
            if isinstance(item, Op):
                self._add(plain, name, item, names, name, carried.get(name, name), ("layers", name), None)
                continue
            if plain:
                done.append(Section(f"before_{name}", tuple(plain)))
                plain = []
            done.append(self._repeat(name, item, names))
            names[name] = name
        if plain:
            done.append(Section("head" if done else "model", tuple(plain)))
        return tuple(done)

    def _check_repeats(self) -> None:
        """One repeat, of blocks that differ, whose input is nobody else's: the layers overwrite it."""
        repeats = {name: item for name, item in self.spec.layers.items() if not isinstance(item, Op)}
        for name in list(repeats)[1:]:
            self._note(("layers", name), "a second 'repeat'", "a model has one; put the blocks of both into it")
        for name, item in repeats.items():
            for n, block in enumerate(item.blocks):
                if block in item.blocks[:n]:
                    self._note(("layers", name, "blocks", n), f"block '{block}' is in this repeat already")
            for other, op in self.spec.layers.items():
                if isinstance(op, Op) and item.input in op.operands():
                    self._note(
                        ("layers", other), f"'{other}' reads '{item.input}', which the layers of '{name}' change"
                    )
        self.env.check()

    def _note(self, path: tuple, message: str, hint: str | None = None) -> None:
        self.env.problems.append(self.spec.problem(path, message, hint))

    def _repeat(self, name: str, item, names: dict[str, str]) -> Section:
        """One layer. Its result takes the repeat's name, so that the next layer finds it where its input was."""
        layers = self.env.dims[item.over]
        ops: list[BoundOp] = []
        self.carries.append(name)
        source = names.get(item.input, item.input)
        if source != name:  # a step input, or what an operator that `when` leaves out would have made
            self._note(("layers", name), f"'{item.input}' is no value of an operator before the layers")
            raise SpecError(self.env.problems)
        given = self.types[name]
        for block in item.blocks:
            seen = {"x": source}
            for key, op in self.spec.blocks[block].items():
                self._add(ops, f"{block}.{key}", op, seen, key, f"{block}.{key}", ("blocks", block, key), layers)
            source = seen["out"]
        source = self._whole(ops, source, ("blocks", item.blocks[-1], "out"))
        if source == name:
            self._note(("layers", name), "no operator of these blocks is left for this config")
            raise SpecError(self.env.problems)
        made = self.types.pop(source)
        self.origins[name] = source
        if made.shape != given.shape:
            self._note(
                ("layers", name),
                f"a layer takes {list(given.shape)} and makes {list(made.shape)}: it cannot be repeated",
            )
        self.env.check()
        self.types[name] = self._declared(name, made) if name in self.spec.tensors else made
        return Section(name, tuple(_renamed(o, source, name) for o in ops), layers)

    def _left_out(self, op: Op, path: tuple, operands: list[str]) -> bool:
        """Whether `when` leaves the operator out; a sum over ranks also goes where there is nothing to sum."""
        when = self.spec.op_when.get(path[1:] if path[0] == "blocks" else path)
        if when is not None and self.env.mentions_layer(when):
            self._note((*path, "when"), "all layers have the same operators: this cannot depend on the layer")
            return False
        if when is not None and not self.env.evaluate(when, (*path, "when"), self.env.names(when, None)):
            return True
        return op.op == "all_reduce" and not self.types[operands[0]].partial

    def _add(
        self, ops: list[BoundOp], name: str, op: Op, names: dict[str, str], key: str, output: str, path: tuple, layers
    ) -> None:
        """Binds one operator and appends it, an all_reduce before it where an operand is partial. `names` gets what
        `key` stands for: `output`, or the operator's first operand where it is left out."""
        operands = [names.get(o, o) for o in op.operands()]
        if self._left_out(op, path, operands):
            names[key] = operands[0]
            return
        if op.op not in KEEPS_PARTIAL:
            operands = [self._whole(ops, o, path) for o in operands]
        values, per_layer = self._values(op, path, layers)
        roles = self._weights_of(op, path)
        self.used |= set(roles.values())
        types = [self.types[o] for o in operands]
        given = {r: self.weight_types[w] for r, w in roles.items()}
        for layer in range(layers) if per_layer else [0]:
            try:
                result = op.infer(types, given, {k: v[layer] if k in per_layer else v for k, v in values.items()})
            except OpError as error:
                at = (*path, error.field) if error.field else path
                self._note(at, error.message, error.hint)
                raise SpecError(self.env.problems) from None
        if "bias" in roles and result.partial:
            self.once.add(roles["bias"])
        if op.op == "kv_append":
            self.cache_state[output] = op.state
        if op.op == "attention":
            self._check_heads(types, path)
        self.types[output] = self._declared(name if name in self.spec.tensors else output, result)
        names[key] = output
        ops.append(BoundOp(name, op, tuple(operands), output, roles, values, frozenset(per_layer), path))

    def _weights_of(self, op: Op, path: tuple) -> dict[str, str]:
        """Weights by role; an optional one may be left out by its own `when`."""
        found = {f: getattr(op, f) for f in _fields(op, "weight") if getattr(op, f) is not None}
        for field, weight in found.items():
            if weight not in self.weight_types and type(op).model_fields[field].is_required():
                self._note((*path, field), f"weight '{weight}' does not exist for this config: its 'when' is false")
                raise SpecError(self.env.problems)
        return {f: w for f, w in found.items() if w in self.weight_types}

    def _check_heads(self, types: list[TensorType], path: tuple) -> None:
        """Every rank's query heads must meet the KV heads that are theirs."""
        for dim in sorted(types[0].axes[0].split | types[1].axes[0].split):
            if self.env.dims[dim] % self.env.parts(dim):
                self._note(
                    path,
                    f"{self.env.dims[dim]} {dim} over {self.env.tp} ranks: heads cannot be padded",
                    "split them evenly",
                )
                raise SpecError(self.env.problems)
        (q, q_step, q_all), (kv, kv_step, kv_all) = (self._heads(t.axes[0]) for t in types)
        for rank in range(self.env.tp):
            for n in range(q):
                head, has = rank // q_step * q + n, rank // kv_step * kv + n // (q // kv)
                if q_all % kv_all or head // (q_all // kv_all) != has:
                    self._note(
                        path,
                        f"at degree {self.env.tp}, query head {head} would meet KV head {has} on rank {rank}",
                        "in 'shard', split the query heads and use 'split_or_replicate' for the KV heads",
                    )
                    raise SpecError(self.env.problems)

    def _heads(self, axis: Axis) -> tuple[int, int, int]:
        """(heads of a rank, ranks that share them, heads of all ranks)."""
        parts = max([1, *(self.env.parts(d) for d in axis.split)])
        return axis.size, self.env.tp // parts, axis.size * parts

    def _whole(self, ops: list[BoundOp], value: str, path: tuple) -> str:
        """The value itself, or the sum over ranks of a partial one."""
        kind = self.types.get(value)
        if kind is None or not kind.partial:
            return value
        summed = f"{value}.all_reduce"
        if summed not in self.types:
            op = all_ops()["all_reduce"](all_reduce=value)
            self.types[summed] = self._declared(summed, op.infer([kind], {}, {}))
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

    def _declared(self, name: str, result: TensorType) -> TensorType:
        """Applies what `tensors:` says of the value; its shape is checked, not believed."""
        default = self.spec.tensor_default.dtype
        if default and result.dtype == TensorType(()).dtype and result.kind == "tensor":
            result = replace(result, dtype=default)
        decl = self.spec.tensors.get(name)
        if decl is None:
            return result
        if decl.shape is not None:
            self._check_shape(name, decl.shape, result)
        return replace(result, dtype=decl.dtype) if decl.dtype else result

    def _check_shape(self, name: str, shape: list[Expression], result: TensorType) -> None:
        path, known = ("tensors", name, "shape"), len(self.env.problems)
        first, *rest = shape
        wanted = [self.env.evaluate(e, (*path, n), self.env.names(e, None, local=True)) for n, e in enumerate(rest, 1)]
        made = [*([result.routed] if result.routed else []), *result.shape]
        if len(self.env.problems) == known and (first.text != "tokens" or wanted != made):
            said = ", ".join([first.text, *map(str, wanted)])
            self._note(path, f"'{name}' is [{', '.join(['tokens', *map(str, made)])}], not [{said}]")


def _renamed(op: BoundOp, old: str, new: str) -> BoundOp:
    return replace(
        op, inputs=tuple(new if i == old else i for i in op.inputs), output=new if op.output == old else op.output
    )


def _fields(op: Op, kind: str) -> list[str]:
    """The fields of an op that hold weights, expressions, ..."""
    return [n for n, f in type(op).model_fields.items() if kind in _kinds(f)]


def _kinds(field) -> set[str]:
    from typing import get_args

    found = {m.of for m in field.metadata if isinstance(m, Kind)}
    for part in get_args(field.annotation):
        found |= {m.of for m in getattr(part, "__metadata__", ()) if isinstance(m, Kind)}
    return found
