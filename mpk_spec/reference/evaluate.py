"""One group of the plan, computed for one of its tasks or for all of them at once, with the same bits.

A value of the group is computed for just the features wanted: ops say what of their inputs that needs. Decode steps
multiply token by token, prefill steps pad their tokens to a multiple of 16, so that a token's bits depend neither on
its neighbours nor on the chunk it came in.
"""

from __future__ import annotations

from math import gcd, prod

import torch
import torch.nn.functional as F

from mpk_spec.ops import all_ops
from mpk_spec.ops.base import Op, Scope, round_to
from mpk_spec.planner.plan import Group, Node, Plan, Span, Task
from mpk_spec.planner.tile import packed_segments
from mpk_spec.reference.attend import append, attend
from mpk_spec.reference.state import Rank, share_of

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
        self.linears = [n for n in group.nodes if n.op == "linear"]
        self.attention = next((n for n in group.nodes if n.op == "attention"), None)
        self.results: dict[str, tuple[int, torch.Tensor]] = {}  # linears' rows: (first feature, values)
        self._ops: dict[str, tuple[Op, dict[str, torch.Tensor]]] = {}

    def run(self, step) -> None:
        self.step = step
        if self.linears:
            self._linear()
        elif self.attention is not None:
            self._attention(self.attention)
        else:
            self._rows()
        self._publish()
        self.results = {}

    # kinds of group

    def _rows(self) -> None:
        last = self.group.nodes[-1]
        if last.op == "kv_append":
            self._append(last)
            return
        width = self._width(last.output)
        lo, hi = self.task.out if self.task else (0, width)
        self._write(last.output, lo, hi, self.value(last.output, (lo, hi)))

    def _append(self, node: Node) -> None:
        state = self.plan.states[node.values["state"]]
        lo, hi = self.task.out if self.task else (0, self._width(node.inputs[0]))
        keys, values = (self.value(i, (lo, hi)) for i in node.inputs)
        heads = range(lo // state.head_dim, hi // state.head_dim)
        splits = state.extent // state.kv_heads
        self._touch(Span(state.name, heads.start * splits, heads.stop * splits), "writes")
        append(self.rank, state, self.layer, heads, (0, 1), keys, values, self.step)

    def _attention(self, node: Node) -> None:
        """Each KV head with its query heads; each split of the positions on its own."""
        state = self.plan.states[node.values["state"]]
        per_kv, splits = node.values["heads"] // state.kv_heads, self.group.kv_splits
        heads, wanted = range(state.kv_heads), (0, splits)
        if self.task:
            head = self.task.index // splits
            heads, wanted = range(head, head + 1), self.task.k
        q_span = (heads.start * per_kv * state.head_dim, heads.stop * per_kv * state.head_dim)
        queries = round_to(self.value(node.inputs[0], q_span), "bf16")
        appended = next((n for n in self.group.nodes if n.op == "kv_append"), None)
        for split in range(*wanted):
            if appended is not None:
                part = (heads.start * state.head_dim, heads.stop * state.head_dim)
                keys, values = (self.value(i, part) for i in appended.inputs)
                append(self.rank, state, self.layer, heads, (split, splits), keys, values, self.step)
            if self.task:
                self._touch(Span(state.name, heads.start * splits + split, heads.start * splits + split + 1), "reads")
            out = attend(self.rank, state, self.layer, heads, (split, splits), queries, node.values, self.step)
            width = out.shape[-1] // len(heads)
            base = split * state.kv_heads * width
            self._write(node.output, base + heads.start * width, base + heads.stop * width, out)

    def _linear(self) -> None:
        linears, last = self.linears, self.group.nodes[-1]
        gated = last is not linears[-1]
        sizes = [(n.output, self._rows_of(n)) for n in linears]
        lo, hi = self.task.out if self.task else (0, sizes[0][1] if gated else sum(s for _, s in sizes))
        if gated:
            segments = [(n, lo, hi) for n, _ in sizes]
        elif self.task is None:
            segments = [(n, 0, size) for n, size in sizes]
        else:
            groups = self._pack_groups()
            segments = packed_segments([(n, size // groups) for n, size in sizes], groups, (lo, hi))
        by_name = {n.output: n for n in linears}
        for part in self._k_parts():
            x = self._linear_input(linears[0], part)
            self.results = {}
            for output, first, end in segments:
                y = self._product(by_name[output], x, first, end, part)
                if gated:
                    self.results[output] = (first, y)
                else:
                    base = (part[0] if part else 0) * self._rows_of(by_name[output])
                    self._write(output, base + first, base + end, y)
            if gated:
                self._write(last.output, lo, hi, self.value(last.output, (lo, hi)))

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

    def _linear_input(self, node: Node, part) -> torch.Tensor:
        """The input, rounded once as tensor cores take it; `[tokens, K]`, or `[tokens, choices, K]` of routed rows."""
        name = node.inputs[0]
        x = self._whole(name)
        if name in self.made or self.plan.tensors[name].dtype != "bf16":
            x = round_to(x, "bf16")
        return x if part is None else x[..., part[1] : part[2]]

    def _product(self, node: Node, x: torch.Tensor, lo: int, hi: int, part) -> torch.Tensor:
        weight = self.rank.weight(node.weights["weight"], self.layer)
        bias = self.rank.weight(node.weights["bias"], self.layer) if "bias" in node.weights else None
        if len(node.inputs) == 2:
            return self._experts(node, x, weight, bias, lo, hi)
        y = self._rows_product(x, weight if part is None else weight[:, part[1] : part[2]], lo, hi)
        # a sum over K splits takes its bias once; of one over ranks, all but one hold zeros
        takes_bias = bias is not None and (part is None or part[0] == 0)
        return y + bias[lo:hi].float() if takes_bias else y

    def _rows_product(self, x: torch.Tensor, weight: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        """Rows [lo, hi) of the product. A single task multiplies by all rows: BLAS has other bits for few of them."""
        if self.task is not None:
            return product(x, weight, self.step.decode)[..., lo:hi]
        return product(x, weight[lo:hi], self.step.decode)

    def _experts(self, node: Node, x: torch.Tensor, weight, bias, lo: int, hi: int) -> torch.Tensor:
        """Routed rows `[tokens, choices, hi - lo]`; a claimed task computes just its slot's expert, the rest is NaN."""
        route = self._whole(node.inputs[1])
        ids = route[:, : route.shape[-1] // 2].long()
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
            y = self._rows_product(rows[chosen], weight[expert - first], lo, hi)
            out[chosen] = y if bias is None else y + bias[expert - first, lo:hi].float()
        return out

    # values

    def value(self, name: str, span: tuple[int, int]) -> torch.Tensor:
        """Features `span` of a value: of this group, computed; of another, read from its buffer."""
        if name in self.results:
            first, rows = self.results[name]
            return rows[..., span[0] - first : span[1] - first]
        node = self.made.get(name)
        if node is None:
            return self._read(name, *span)
        step = node.granule
        lo, hi = span[0] // step * step, -(-span[1] // step) * step
        inputs = [self._input(node, source, (lo, hi)) for source in node.inputs]
        if name not in self._ops:
            self._ops[name] = op_of(node), {r: self.rank.weight(w, self.layer) for r, w in node.weights.items()}
        op, weights = self._ops[name]
        out = op.compute(inputs, weights, self._scope(node, (lo, hi)))
        return out if (lo, hi) == span else out[..., span[0] - lo : span[1] - lo]

    def _input(self, node: Node, source: str, span: tuple[int, int]) -> torch.Tensor:
        """What `node` needs of `source` for its features `span`."""
        if node.op in WHOLE_INPUT or (node.op == "combine" and source == node.inputs[1]):
            return self._whole(source)
        if node.op == "argmax_partial":
            size, vocab = node.values["slice"], node.values["vocab"]
            return self.value(source, (span[0] // 2 * size, min(span[1] // 2 * size, vocab)))
        return self.value(source, span) if node.op != "embedding" else self._read(source, 0, 1)

    def _scope(self, node: Node, span: tuple[int, int]) -> Scope:
        extras = {"rank": self.rank.index}
        if node.op == "rope":
            extras["rope_rows"] = self.step.rope_rows(self.rank.rope, rope_key(node))
            extras["head_dim"] = node.values["head_dim"]
        return Scope(self.step.positions, self.step.slots, node.values, span, extras)

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

    def _whole(self, name: str) -> torch.Tensor:
        return self.value(name, (0, self._width(name)))

    def _read(self, name: str, lo: int, hi: int) -> torch.Tensor:
        self._touch(Span(name, lo, hi), "reads")
        return self.rank.read(Span(name, lo, hi))

    def _write(self, name: str, lo: int, hi: int, value: torch.Tensor) -> None:
        tensor = self.plan.tensors[name]
        if tensor.routed and self.task is not None and self.group.grid[1] > 1:  # rows of the claimed slot alone
            width = prod(tensor.shape[1:])
            self._touch(Span(name, lo + self.task.k[0] * width, hi + self.task.k[0] * width), "writes")
            kept = self.rank.read(Span(name, lo, hi))
            value = torch.where(value.isnan(), kept, value)
        else:
            self._touch(Span(name, lo, hi), "writes")
        self.rank.write(Span(name, lo, hi), value)

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
                    self._write(name, span.lo, span.hi, self.value(name, (span.lo, span.hi)))


WHOLE_INPUT = frozenset({"top_k", "argmax_reduce", "attention_merge", "split_k_reduce"})


def rope_key(node: Node) -> str:
    """Nodes with the same key share their cos and sin tables."""
    return repr((node.values["head_dim"], node.values["parameters"]))


def op_of(node: Node) -> Op:
    """The operator of a node, rebuilt from its values."""
    cls = all_ops()[node.op]
    fields = {n: node.values[n] for n in cls.model_fields if n in node.values}
    operand = {"inputs": list(node.inputs)} if "inputs" in cls.model_fields else {"input": node.inputs[0]}
    return cls.model_construct(**operand, **fields)


def product(x: torch.Tensor, weight: torch.Tensor, token_by_token: bool) -> torch.Tensor:
    """`x [rows, K] @ weight[N, K].T` in float32, each row's bits independent of the number of rows."""
    weight = weight.float()
    if token_by_token:
        if len(x) == 1:
            return _in_parts(x, weight)
        return torch.cat([_in_parts(row, weight) for row in x.split(1)]) if len(x) else x.new_zeros(0, len(weight))
    return _in_parts(F.pad(x, (0, 0, 0, -len(x) % PAD)), weight)[: len(x)]


def _in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in equal parts of the weight's rows: BLAS gives a batch to all cores, a single vector to one."""
    parts = gcd(len(weight), PARTS)
    y = torch.bmm(weight.unflatten(0, (parts, -1)), x.t().expand(parts, -1, -1))
    return y.flatten(0, 1).t().contiguous()
