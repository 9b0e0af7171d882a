"""One group of the plan, computed for one of its tasks or for all of them at once, with the same bits.

A value of the group is computed for just the features wanted: ops say what of their inputs that needs. What to do is
worked out once, into functions of the step, since every step does the same. Decode steps multiply token by token,
prefill steps pad their tokens to a multiple of 16, so that a token's bits depend neither on its neighbours nor on the
chunk it came in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F

from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Op, Scope, round_to
from mpk_spec.planner.plan import Group, Node, Plan, Span, Task
from mpk_spec.planner.tile import packed_segments
from mpk_spec.reference.attend import append, attend
from mpk_spec.reference.state import Rank, share_of

Value = Callable[[Any], torch.Tensor]  # of a StepInput

PAD = 16
PARTS = 8  # of a weight's rows


class UndeclaredAccess(RuntimeError):
    """A task touched what its spans do not say: a bug of the planner."""


class GroupRun:
    """Computes `group` for one rank and layer, as often as it is run. `task` None: all tasks at once."""

    def __init__(self, rank: Rank, group: Group, layer: int | None, task: Task | None = None):
        self.rank, self.group, self.layer, self.task = rank, group, layer, task
        self.plan: Plan = rank.plan
        self.made = {n.output: n for n in group.nodes}
        self.firsts: dict[str, int] = {}  # linears that an epilogue reads: the first feature computed
        self.results: dict[str, torch.Tensor] = {}  # their rows, while the group runs
        self._actions: list[Callable[[Any], None]] = []
        attention = next((n for n in group.nodes if n.op == "attention"), None)
        if any(n.op == "linear" for n in group.nodes):
            self._linear([n for n in group.nodes if n.op == "linear"])
        elif attention is not None:
            self._attention(attention)
        else:
            self._rows()
        self._publish()

    def run(self, step) -> None:
        for action in self._actions:
            action(step)
        self.results.clear()

    # kinds of group

    def _rows(self) -> None:
        last = self.group.nodes[-1]
        if last.op == "kv_append":
            self._append(last)
            return
        first, end = self._own_rows(last.output)
        lo, hi = (first + edge for edge in self.task.out) if self.task else (first, end)
        self._store(last.output, lo, hi)

    def _own_rows(self, output: str) -> tuple[int, int]:
        """The features of a row group's result that this rank computes: its share of a sum in two shots."""
        first = self.group.nodes[0]
        if first.op == "all_reduce" and self.plan.tensors[first.inputs[0]].shares == "scattered":
            return self.rank.share_of(output)
        return 0, self._width(output)

    def _append(self, node: Node) -> None:
        state = self.plan.states[node.values["state"]]
        lo, hi = self.task.out if self.task else (0, self._width(node.inputs[0]))
        heads = range(lo // state.head_dim, hi // state.head_dim)
        splits = state.extent // state.kv_heads
        self._touch(Span(state.name, heads.start * splits, heads.stop * splits), "writes")
        self._actions.append(self._appending(node, heads, (0, 1)))

    def _appending(self, node: Node, heads: range, split: tuple[int, int]) -> Callable[[Any], None]:
        state = self.plan.states[node.values["state"]]
        part = (heads.start * state.head_dim, heads.stop * state.head_dim)
        keys, values = (self.value(i, part) for i in node.inputs)
        return lambda step: append(self.rank, state, self.layer, heads, split, keys(step), values(step), step)

    def _attention(self, node: Node) -> None:
        """Each KV head with its query heads; each split of the positions on its own."""
        state = self.plan.states[node.values["state"]]
        per_kv, splits = node.values["heads"] // state.kv_heads, self.group.kv_splits
        heads, wanted = range(state.kv_heads), (0, splits)
        if self.task:
            head = self.task.index // splits
            heads, wanted = range(head, head + 1), self.task.k
        q_span = (heads.start * per_kv * state.head_dim, heads.stop * per_kv * state.head_dim)
        queries = self.value(node.inputs[0], q_span)
        appended = next((n for n in self.group.nodes if n.op == "kv_append"), None)
        for number in range(*wanted):
            split = (number, splits)
            if appended is not None:
                self._actions.append(self._appending(appended, heads, split))
            if self.task:
                self._touch(Span(state.name, heads.start * splits + number, heads.start * splits + number + 1), "reads")
            width = self._width(node.output) // (splits * state.kv_heads)
            base = number * state.kv_heads * width
            write = self._writer(node.output, base + heads.start * width, base + heads.stop * width)
            self._actions.append(partial(self._attend, state, heads, split, queries, node.values, write))

    def _attend(self, state, heads: range, split: tuple[int, int], queries: Value, values, write, step) -> None:
        rounded = round_to(queries(step), "bf16")
        write(attend(self.rank, state, self.layer, heads, split, rounded, values, step))

    def _linear(self, linears: list[Node]) -> None:
        last = self.group.nodes[-1]
        sampled = last.op == "argmax_partial"
        gated = last is not linears[-1] and not sampled
        sizes = [(n.output, self._rows_of(n)) for n in linears]
        lo, hi = self.task.out if self.task else (0, sizes[0][1] if gated else sum(s for _, s in sizes))
        if gated:
            segments = [(n, lo, hi) for n, _ in sizes]
            self.firsts = {n: lo for n, _ in sizes}
        elif self.task is None:
            segments = [(n, 0, size) for n, size in sizes]
        else:
            groups = self._pack_groups()
            segments = packed_segments([(n, size // groups) for n, size in sizes], groups, (lo, hi))
        for part in self._k_parts():
            products = []
            for output, first, end in segments:
                node = self.made[output]
                base = (part[0] if part else 0) * self._rows_of(node)
                take = partial(self.results.__setitem__, output)
                write = take if gated else self._writer(output, base + first, base + end)
                if sampled:
                    self.firsts[output] = first
                    write = partial(self._keep, output, write)
                products.append((self._product(node, first, end, part), write))
            self._actions.append(partial(self._multiply, self._linear_input(linears[0], part), products))
            if gated:
                self._store(last.output, lo, hi)
            if sampled:
                slices = (self.task.index, self.task.index + 1) if self.task else (0, last.values["slices"])
                self._store(last.output, 2 * slices[0], 2 * slices[1])

    def _keep(self, output: str, write, value: torch.Tensor) -> None:
        """What is stored and sampled from as well: as it is stored."""
        self.results[output] = round_to(value, self.plan.tensors[output].dtype)
        write(self.results[output])

    @staticmethod
    def _multiply(x: Value, products: list[tuple[Callable, Callable]], step) -> None:
        rows = x(step)
        for product_of, write in products:
            write(product_of(rows, step))

    # linears

    def _pack_groups(self) -> int:
        return next((p.groups for p in self.plan.packings if p.group == self.group.name), 1)

    def _k_parts(self):
        """(number, lo, hi) of each K split wanted; None for the whole of K."""
        if self.group.split_k == 1:
            return [None]
        per = self.group.grid[0]
        if self.task:
            return [(self.task.index // per, *self.task.k)]
        return [(n, *self.group.tasks[n * per].k) for n in range(self.group.split_k)]

    def _linear_input(self, node: Node, part) -> Value:
        """The input, rounded once as tensor cores take it; `[tokens, K]`, or `[tokens, choices, K]` of routed rows."""
        name = node.inputs[0]
        whole = self._whole(name)
        stored = name not in self.made and self.plan.tensors[name].dtype == "bf16"
        rounded = whole if stored else lambda step: round_to(whole(step), "bf16")
        return rounded if part is None else lambda step: rounded(step)[..., part[1] : part[2]]

    def _product(self, node: Node, lo: int, hi: int, part) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """Rows [lo, hi) of the product, as a function of its input and the step."""
        weight = self.rank.weight(node.weights["weight"], self.layer)
        bias = self.rank.weight(node.weights["bias"], self.layer) if "bias" in node.weights else None
        if len(node.inputs) == 2:
            return partial(self._experts, node, self._whole(node.inputs[1]), weight, bias, lo, hi)
        if part is not None:
            weight = weight[:, part[1] : part[2]]
        multiply = self._rows_product(weight, lo, hi)
        # a sum over K splits takes its bias once; of one over ranks, all but one hold zeros
        if bias is None or (part is not None and part[0] > 0):
            return multiply
        return lambda x, step: multiply(x, step) + bias[lo:hi].float()

    def _rows_product(self, weight: torch.Tensor, lo: int, hi: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """Rows [lo, hi) of the product. A single task multiplies by all rows: BLAS has other bits for few of them."""
        if self.task is not None:
            return lambda x, step: product(x, in_parts(weight), step.decode)[..., lo:hi]
        rows = in_parts(weight[lo:hi])
        return lambda x, step: product(x, rows, step.decode)

    def _experts(self, node: Node, route: Value, weight, bias, lo: int, hi: int, x: torch.Tensor, step) -> torch.Tensor:
        """Routed rows `[tokens, choices, hi - lo]`; a claimed task computes just its slot's expert, the rest is NaN."""
        fields = route(step)
        ids = fields[:, : fields.shape[-1] // 2].long()
        rows = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        out = torch.full((*ids.shape, hi - lo), float("nan"))
        held = self.plan.weights[node.weights["weight"]]
        first = share_of(held, self.rank.index) * len(weight) if held.split == 0 else 0
        elsewhere = (ids < first) | (ids >= first + len(weight))  # nothing of split experts that other ranks hold
        active = ids[~elsewhere].unique(sorted=True).tolist()
        claimed = self.group.grid[1] > 1 and self.task is not None
        if not claimed or self.task.k[0] == 0:
            out[elsewhere] = 0.0
        if claimed:
            active = active[self.task.k[0] : self.task.k[1]]
        for expert in active:
            chosen = ids == expert
            y = self._rows_product(weight[expert - first], lo, hi)(rows[chosen], step)
            out[chosen] = y if bias is None else y + bias[expert - first, lo:hi].float()
        return out

    # values

    def value(self, name: str, span: tuple[int, int]) -> Value:
        """Features `span` of a value: of this group, computed; of another, read from its buffer."""
        if name in self.firsts:
            lo, hi = (edge - self.firsts[name] for edge in span)
            return lambda step: self.results[name][..., lo:hi]
        node = self.made.get(name)
        if node is None:
            return self._read(name, *span)
        lo, hi = span[0] // node.granule * node.granule, -(-span[1] // node.granule) * node.granule
        inputs = [self._input(node, source, (lo, hi)) for source in node.inputs]
        weights = {r: self.rank.weight(w, self.layer) for r, w in node.weights.items()}
        op, scope = op_of(node), self._scope(node, (lo, hi))

        def computed(step) -> torch.Tensor:
            return op.compute([i(step) for i in inputs], weights, scope(step))

        return computed if (lo, hi) == span else lambda step: computed(step)[..., span[0] - lo : span[1] - lo]

    def _input(self, node: Node, source: str, span: tuple[int, int]) -> Value:
        """What `node` needs of `source` for its features `span`."""
        if node.op == "argmax_reduce":
            return self.value(source, (0, 2 * node.values["slices"]))
        if node.op in WHOLE_INPUT or (node.op == "combine" and source == node.inputs[1]):
            return self._whole(source)
        if node.op == "attention_merge":
            rows = [self._read(source, *part) for part in op_of(node).rows(span)]
            return lambda step: torch.cat([row(step) for row in rows], -1)
        if node.op == "argmax_partial":
            op = op_of(node)
            return self.value(source, (op.edge(span[0] // 2), op.edge(span[1] // 2)))
        return self.value(source, span) if node.op != "embedding" else self._read(source, 0, 1)

    def _scope(self, node: Node, span: tuple[int, int]) -> Callable[[Any], Scope]:
        extras = {"rank": self.rank.index}
        if node.op != "rope":
            return lambda step: Scope(step.positions, step.slots, node.values, span, extras)
        extras["head_dim"], key = node.values["head_dim"], rope_key(node)

        def scope(step) -> Scope:
            rows = {"rope_rows": step.rope_rows(self.rank.rope, key)}
            return Scope(step.positions, step.slots, node.values, span, extras | rows)

        return scope

    def _rows_of(self, node: Node) -> int:
        """Output features of a linear, before any K split."""
        return self.plan.weights[node.weights["weight"]].shape[-2]

    def _width(self, name: str) -> int:
        """Features of a value (of one routed row)."""
        if name in self.made:
            return self.made[name].width
        tensor = self.plan.tensors[name]
        return prod(tensor.shape[1:]) if tensor.routed else prod(tensor.shape)

    # buffers, checked against the task's spans

    def _whole(self, name: str) -> Value:
        return self.value(name, (0, self._width(name)))

    def _read(self, name: str, lo: int, hi: int) -> Value:
        span = Span(name, lo, hi)
        self._touch(span, "reads")
        return lambda step: self.rank.read(span)

    def _store(self, name: str, lo: int, hi: int) -> None:
        """Features [lo, hi) of a value of this group into its buffer."""
        value, write = self.value(name, (lo, hi)), self._writer(name, lo, hi)
        self._actions.append(lambda step: write(value(step)))

    def _writer(self, name: str, lo: int, hi: int) -> Callable[[torch.Tensor], None]:
        tensor, span = self.plan.tensors[name], Span(name, lo, hi)
        if not (tensor.routed and self.task is not None and self.group.grid[1] > 1):
            self._touch(span, "writes")
            return lambda value: self.rank.write(span, value)
        shift = self.task.k[0] * prod(tensor.shape[1:])  # rows of the claimed slot alone
        self._touch(Span(name, lo + shift, hi + shift), "writes")
        return lambda value: self.rank.write(span, torch.where(value.isnan(), self.rank.read(span), value))

    def _touch(self, span: Span, how: str) -> None:
        """Raises UndeclaredAccess unless the task's spans say so. Slots of claimed experts count as one."""
        if self.task is None:
            return
        allowed = [s for s in getattr(self.task, how) if s.tensor == span.tensor]
        if not any(s.lo <= span.lo and span.hi <= s.hi for s in allowed):
            raise UndeclaredAccess(f"{self.group.name}[{self.task.index}] {how} {span}, declared: {allowed}")

    def _publish(self) -> None:
        for name in self.group.published:
            spans = (
                [s for s in self.task.writes if s.tensor == name] if self.task else [Span(name, 0, self._width(name))]
            )
            for span in spans:
                if span.lo < span.hi:
                    self._store(name, span.lo, span.hi)


WHOLE_INPUT = frozenset({"top_k", "split_k_reduce"})


def rope_key(node: Node) -> str:
    """Nodes with the same key share their cos and sin tables."""
    return repr((node.values["head_dim"], node.values["parameters"]))


def op_of(node: Node) -> Op:
    """The operator of a node, rebuilt from its values."""
    cls = all_ops()[node.op]
    fields = {n: node.values[n] for n in cls.model_fields if n in node.values}
    operand = {"inputs": list(node.inputs)} if "inputs" in cls.model_fields else {"input": node.inputs[0]}
    return cls.model_construct(**operand, **fields)


def in_parts(weight: torch.Tensor) -> torch.Tensor:
    """A weight's rows in equal parts, `[parts, rows, K]`: BLAS gives a batch to all cores, a single vector to one."""
    return weight.unflatten(0, (gcd(len(weight), PARTS), -1))


def product(x: torch.Tensor, parts: torch.Tensor, token_by_token: bool) -> torch.Tensor:
    """`x [rows, K] @ weight[N, K].T` in float32, each row's bits independent of the number of rows."""
    parts, count = parts.float(), len(x)
    if not token_by_token:
        return _multiply(F.pad(x, (0, 0, 0, -count % PAD)), parts)[:count]
    if count == 0:
        return x.new_zeros(0, parts.shape[0] * parts.shape[1])
    return torch.cat([_multiply(row, parts) for row in x.split(1)]) if count > 1 else _multiply(x, parts)


def _multiply(x: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    y = torch.bmm(parts, x.t().expand(len(parts), -1, -1))  # [parts, N / parts, rows]
    return y.view(1, -1) if len(x) == 1 else y.flatten(0, 1).t().contiguous()
