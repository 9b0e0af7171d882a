"""Groups -> C++ types: which header a task takes, with what. The one place that knows the headers' parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from mpk_spec.emit.layout import Layout
from mpk_spec.emit.program import ROW_TASKS
from mpk_spec.errors import UserError
from mpk_spec.ops import all_ops
from mpk_spec.planner.cost import experts_of
from mpk_spec.planner.plan import Group, Node, Plan, Template
from mpk_spec.planner.schedule import SHARE

DTYPES = {"bf16": "bf16", "f32": "float", "i32": "i32"}
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "gelu_tanh": "GeluTanh", "relu": "Relu"}
HEADERS_OF_RANKS = ("inbox", "all_reduce")
HEADERS = (
    "linear", "plain", "rmsnorm", "embedding", "attention_merge", "add", "gated_act", "attention", "argmax", "rows",
)  # fmt: skip
HEAD_DIMS = (32, 64, 128)  # of which a warp computes one at a time
MOST_ROW_FEATURES = 4096  # of a task; see tasks/rows.cuh


@dataclass
class TaskType:
    """One instantiated task: `source` defines `symbol`; `names` are the groups that it serves, `stages` how often."""

    symbol: str
    source: str
    names: list[str] = field(default_factory=list)
    stages: int = 0


class Refused(UserError):
    """The kernel has no task for this."""

    def __init__(self, group: Group, what: str, hint: str | None = None):
        super().__init__(f"the CUDA kernel cannot run group '{group.name}': {what}", hint)


def task_type(plan: Plan, layout: Layout, group: Group, template: Template) -> str:
    """The C++ type of the task of a template's group."""
    for node in group.nodes:
        if not all_ops()[node.op].cuda:
            raise Refused(group, f"there is no CUDA task for '{node.op}' yet", "--backend cpu runs this plan")
        if any(isinstance(v, dict) and "per_layer" in v for v in node.values.values()):
            raise Refused(group, f"'{node.name}' has values that differ by layer")
    if group.launch == "dynamic" and (group.task != "linear" or experts_of(plan, group)):
        what = "experts" if group.task == "linear" else "tasks that stream no weights"
        raise Refused(group, f"it claims {what} at run time", f"set '{group.name}: {{launch: static}}' in the schedule")
    if group.split_k != 1:
        raise Refused(group, f"it splits K in {group.split_k}", f"set '{group.name}: {{split_k: 1}}' in the schedule")
    writer = _Writer(plan, layout, group, template)
    if group.nodes[0].op == "all_reduce" and group.task in ("add", "all_reduce"):
        return writer.all_reduce()
    makers = {
        "linear": writer.linear,
        "attention": writer.attention,
        "attention_merge": writer.attention_merge,
        "argmax_partial": writer.argmax_partial,
        "argmax_reduce": writer.argmax_reduce,
        **dict.fromkeys(ROW_TASKS, writer.rows),
    }
    if group.task not in makers:
        raise Refused(group, f"there is no CUDA task for '{group.nodes[-1].op}' on its own yet")
    return makers[group.task]()


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


class _Writer:
    def __init__(self, plan: Plan, layout: Layout, group: Group, template: Template):
        self.plan, self.layout, self.group, self.template = plan, layout, group, template
        self.made = {n.output: n for n in group.nodes}

    # pieces

    def tensor(self, name: str, write: bool = False) -> str:
        """write: as the group stores it, not as it reads it."""
        tensor = self.plan.tensors[name]
        if tensor.shares == "gathered" and tensor.dtype != "f32":
            raise Refused(self.group, f"'{name}' is a sum in two shots of {tensor.dtype}", "all_reduce: one_shot")
        if tensor.shares == "gathered":
            return f"Gathered<{tensor.offset}ull, {tensor.extent}>"
        if tensor.inbox:
            kind = "Scattered" if tensor.shares == "scattered" else "Inbox"
            copy = tensor.bytes // tensor.turns
            turns = f", {copy}ull, {self.turn(name, write)}" if tensor.turns > 1 else ""
            return f"{kind}<{tensor.offset}ull, {tensor.extent}, {copy // self.plan.tp}ull{turns}>"
        if tensor.placement != "cuda":
            raise Refused(self.group, f"'{name}' is placed in {tensor.placement} memory")
        where = f"{tensor.offset}ull, {tensor.extent}, {DTYPES[tensor.dtype]}"
        if tensor.turns == 1:
            return f"Tensor<{where}>"
        return f"Turns<{where}, {tensor.bytes // 2}ull, {self.turn(name, write)}>"

    def turn(self, name: str, write: bool) -> str:
        """Which of a tensor's two copies the group means."""
        if self.plan.tensors[name].per == "step":
            return "of_step"
        if write:
            return "of_layer"
        place = next(n for n, group in enumerate(self.template.groups) if group is self.group)
        later = any(name in group.outputs for group in self.template.groups[place:])
        return "of_layer_before" if later else "of_layer"

    def vector(self, name: str | None) -> str:
        if name is None:
            return "NoVector"
        flat = self.layout.flat[name]
        return f"Vector<{flat.offset}ull, {flat.layer_stride}ull>"

    def node(self, op: str) -> Node | None:
        return next((n for n in self.group.nodes if n.op == op), None)

    # linear

    def linear(self) -> str:
        linears = [n for n in self.group.nodes if n.op == "linear"]
        first, last = (self.group.nodes.index(n) for n in (linears[0], linears[-1]))
        packed = self.layout.packed[self.group.name]
        most = max(-(-(hi - lo) // packed.tile_rows) for lo, hi in pairwise(packed.cuts))
        shape = f"Tiles<{packed.k}, {packed.rows}, {packed.tile_k}, {most}>"
        prologue = self.prologue(list(self.group.nodes[:first]), linears[0].inputs[0])
        epilogue = self.epilogue(list(self.group.nodes[last + 1 :]), linears, packed)
        return f"Linear<\n    {shape},\n    {prologue},\n    {epilogue}>"

    def prologue(self, nodes: list[Node], value: str) -> str:
        ops = [n.op for n in nodes]
        if not ops:
            return f"Plain<{self.tensor(value)}>"
        if ops == ["attention_merge"]:
            return f"AttentionMerge<{self.tensor(nodes[0].inputs[0])}, {self.splits(nodes[0])}>"
        if ops == ["rmsnorm"]:
            return self.norm(nodes[0], f"Row<{self.tensor(nodes[0].inputs[0])}>", "NotPublished")
        if ops == ["embedding", "rmsnorm"]:
            return self.norm(nodes[1], f"EmbeddingRow<{self.table(nodes[0])}>", self.publish(nodes[0]))
        if ops == ["all_reduce", "add", "rmsnorm"] and nodes[2].inputs[0] == nodes[1].output:
            residual = next(i for i in nodes[1].inputs if i != nodes[0].output)
            source = f"SumRow<{self.tensor(residual)}, {self.tensor(nodes[0].inputs[0])}>"
            return self.norm(nodes[2], source, self.publish(nodes[1]))
        raise Refused(self.group, f"no prologue does {' and '.join(ops)}")

    def table(self, node: Node) -> str:
        return f"{self.layout.flat[node.weights['weight']].offset}ull, {node.width}, {number(node.values['scale'])}"

    def publish(self, node: Node) -> str:
        """Whether the tasks write a prologue's value down for others."""
        return (
            f"Published<{self.tensor(node.output, write=True)}>"
            if node.output in self.group.published
            else "NotPublished"
        )

    def norm(self, node: Node, source: str, publish: str) -> str:
        if node.output in self.group.published:
            raise Refused(self.group, f"its norm is not written down, and '{node.output}' is read by others too")
        gain = self.vector(node.weights["weight"])
        eps, offset = number(node.values["eps"]), number(node.values.get("weight_offset") or 0)
        return f"RmsNorm<{source}, {gain}, {eps}, {offset}, {publish}>"

    def epilogue(self, nodes: list[Node], linears: list[Node], packed) -> str:
        ops = [n.op for n in nodes]
        biases = [self.vector(n.weights.get("bias")) for n in linears]
        if not ops:
            parts = []
            for node, bias in zip(linears, biases, strict=True):
                rows = self.plan.weights[node.weights["weight"]].shape[-2] // packed.groups
                parts.append(f"Part<{self.tensor(node.output, write=True)}, {rows}, {bias}>")
            return f"Store<{packed.groups}, " + ",\n          ".join(parts) + ">"
        if ops == ["add"] and len(nodes[0].inputs) == 2 and len(linears) == 1:
            residual = next(i for i in nodes[0].inputs if i != linears[0].output)
            return f"AddResidual<{self.tensor(residual)}, {self.tensor(nodes[0].output, write=True)}, {biases[0]}>"
        if ops == ["gated_act"] and len(linears) == 2 and packed.layout == "interleave":
            if list(nodes[0].inputs) != [n.output for n in linears]:
                raise Refused(self.group, "the gate must be the first of the packed linears")
            fn = ACTIVATIONS[nodes[0].values["fn"]]
            return f"GatedAct<{fn}, {self.tensor(nodes[0].output, write=True)}, {biases[0]}, {biases[1]}>"
        if ops == ["argmax_partial"] and len(linears) == 1:
            logits, pairs = self.tensor(linears[0].output, write=True), self.tensor(nodes[0].output, write=True)
            return f"StoreBest<{logits}, {packed.rows}, {biases[0]}, {pairs}, {self.ids(nodes[0])}>"
        raise Refused(self.group, f"no epilogue does {' and '.join(ops)} here")

    # sums over ranks

    def all_reduce(self) -> str:
        parts, out = self.group.nodes[0], self.group.nodes[-1]
        residual = "NoResidual"
        if out is not parts:
            others = [i for i in out.inputs if i != parts.output]
            if len(self.group.nodes) != 2 or out.op != "add" or len(others) != 1:
                raise Refused(self.group, f"no task adds up parts and then does {out.op}")
            residual = self.tensor(others[0])
        addends, summed = self.tensor(parts.inputs[0]), self.tensor(out.output)
        if self.plan.tensors[parts.inputs[0]].shares != "scattered":
            return f"AllReduce<{residual}, {addends}, {summed}>"
        if residual == "NoResidual":
            raise Refused(self.group, "its sum in two shots has no residual", "all_reduce: one_shot")
        return f"SharedSum<{residual}, {addends}, {summed}>"

    # rows

    def rows(self) -> str:
        """A row operator that is fused with nothing."""
        node, most = self.group.nodes[-1], max(t.out[1] - t.out[0] for t in self.group.tasks)
        if len(self.group.nodes) != 1:
            raise Refused(self.group, f"no task does {' and '.join(n.op for n in self.group.nodes)} on rows")
        if node.op == "rmsnorm" and node.granule == node.width and self.plan.tensors[node.inputs[0]].dtype == "f32":
            return self.norm_of_rows(node)
        if most > MOST_ROW_FEATURES:
            hint = f"set '{self.group.name}: {{grid: [{-(-node.width // MOST_ROW_FEATURES)}]}}' or more in the schedule"
            raise Refused(self.group, f"a task has {most} features, one does at most {MOST_ROW_FEATURES}", hint)
        return f"Rows<{most}, {self.tensor(node.output, write=True)},\n    {self.row_value(node)}>"

    def norm_of_rows(self, node: Node) -> str:
        if self.plan.tensors[node.output].dtype != "bf16":
            raise Refused(self.group, f"its norm makes bf16, '{node.output}' is {self.plan.tensors[node.output].dtype}")
        if any(edge % SHARE for task in self.group.tasks for edge in task.out):
            raise Refused(self.group, f"its tasks do not begin and end at multiples of {SHARE} features")
        norm = self.norm(node, f"Row<{self.tensor(node.inputs[0])}>", "NotPublished")
        return f"NormRows<\n    {norm},\n    {self.tensor(node.output, write=True)}>"

    def row_value(self, node: Node) -> str:
        if node.op == "embedding":
            return f"Embedded<{self.table(node)}>"
        read = ", ".join(self.tensor(i) for i in node.inputs)
        if node.op == "add":
            return f"Sum<{read}>"
        if node.op == "gated_act":
            return f"Gated<{ACTIVATIONS[node.values['fn']]}, {read}>"
        if node.granule not in HEAD_DIMS:
            sizes = ", ".join(map(str, HEAD_DIMS))
            raise Refused(self.group, f"'{node.op}' of bf16 takes vectors of {sizes}, not {node.granule}")
        if node.op == "rope":
            return f"RotatedHeads<{read}, {node.granule}, {self.rope(node)}>"
        if node.values.get("weight_offset"):
            raise Refused(self.group, "the gain of its heads has an offset")
        return f"NormedHeads<{read}, {node.granule}, {self.head_norms(node, node)}>"

    # attention

    def attention(self) -> str:
        node, append = self.node("attention"), self.node("kv_append")
        if append is None:
            raise Refused(self.group, "it does not append to the cache that it reads")
        if node.values.get("window") or node.values.get("softcap"):
            raise Refused(self.group, "it has a window or a softcap")
        state = self.plan.states[node.values["state"]]
        if state.page != state.kv_block or state.dtype != "bf16" or state.batch != 1:
            raise Refused(self.group, "it needs bf16 pages of one block of positions, and one sequence")
        q, q_norm, rope = self.chain(node.inputs[0])
        k, k_norm, k_rope = self.chain(append.inputs[0])
        v, v_norm, v_rope = self.chain(append.inputs[1])
        if rope != k_rope or v_norm is not None or v_rope is not None:
            raise Refused(self.group, "queries and keys need the same rope, values none")
        if other := next((n for n in (q, k, v) if self.plan.tensors[n].dtype != "bf16"), None):
            raise Refused(self.group, f"attention reads bf16, '{other}' is {self.plan.tensors[other].dtype}")
        shape = f"{node.values['heads']}, {state.kv_heads}, {state.head_dim}, {self.group.kv_splits}, {state.kv_block}"
        cache = self.layout.caches[state.name].offset
        return (
            f"Attention<\n    AttentionShape<{shape}>,\n    {self.tensor(q)}, {self.tensor(k)}, {self.tensor(v)},\n"
            f"    {self.head_norms(q_norm, k_norm)},\n    {rope or 'NoRope'}, {cache}ull,\n    "
            f"{self.tensor(node.output, write=True)}, {number(node.values['scale'])}>"
        )

    def attention_merge(self) -> str:
        node = self.group.nodes[-1]
        if len(self.group.nodes) != 1:
            raise Refused(self.group, "its merge of splits has a prologue")
        tensors = f"{self.tensor(node.inputs[0])}, {self.tensor(node.output, write=True)}"
        return f"MergeHeads<{tensors}, {self.splits(node)}>"

    def splits(self, merge: Node) -> str:
        """What a merge knows of the attention: heads, features of one, splits, positions of a block."""
        block = next(iter(self.plan.states.values())).kv_block
        return ", ".join(str(merge.values[key]) for key in ("heads", "head_dim", "kv_splits")) + f", {block}"

    def head_norms(self, q: Node | None, k: Node | None) -> str:
        if q is None and k is None:
            return "NoHeadNorms"
        if q is None or k is None or q.values["eps"] != k.values["eps"]:
            raise Refused(self.group, "queries and keys need norms with the same eps, or none")
        gains = f"{self.vector(q.weights['weight'])}, {self.vector(k.weights['weight'])}"
        return f"HeadNorms<{gains}, {number(q.values['eps'])}>"

    def rope(self, node: Node) -> str:
        table = self.layout.ropes[repr(node.values["parameters"])]
        return f"Rope<{table.offset}ull, {table.dims}>"

    def chain(self, value: str) -> tuple[str, Node | None, str | None]:
        """(tensor, head norm, rope) that make a value of the group from a stored one."""
        norm, rope = None, None
        while value in self.made:
            node = self.made[value]
            if node.op == "rope" and rope is None and norm is None:
                rope = self.rope(node)
            elif node.op == "rmsnorm" and norm is None and not node.values.get("weight_offset"):
                norm = node
            else:
                raise Refused(self.group, f"attention cannot do '{node.op}' ({node.name}) on the way")
            value = node.inputs[0]
        return value, norm, rope

    # sampling

    def argmax_partial(self) -> str:
        node = self.group.nodes[-1]
        values = node.values
        if len(self.group.nodes) != 1:
            raise Refused(self.group, "its first stage of argmax has a prologue")
        if values["slices"] != -(-values["vocab"] // values["unit"]):
            raise Refused(self.group, "its slices are not alike")
        tensors = f"{self.tensor(node.inputs[0])}, {self.tensor(node.output)}"
        return f"ArgmaxPartial<{tensors}, {values['unit']}, {self.ids(node)}>"

    @staticmethod
    def ids(node: Node) -> str:
        """Below which they are valid, and by how many those of neighbouring ranks are apart."""
        stride = node.values["rank_stride"]
        return f"{node.values['valid'] if stride else min(node.values['vocab'], node.values['valid'])}, {stride}"

    def argmax_reduce(self) -> str:
        node = self.group.nodes[-1]
        return f"ArgmaxReduce<{self.tensor(node.inputs[0])}, {self.tensor(node.output)}, {node.values['slices']}>"


def number(value) -> str:
    """A float literal of C++."""
    text = repr(float(value))
    return f"{text}f"
