"""Plans of well-known shapes written by hand, for tests of what reads plans: no spec and no planner needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpk_spec.planner.plan import Group, Node, Plan, Span, Stage, State, Step, Task, Template, Tensor, Wait, Weight
from mpk_spec.planner.targets import find_target

CHUNK = 16 * 1024


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    kv_splits: int = 4


QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151936)
QWEN3_06B = Shape(28, 1024, 3072, 16, 8, 128, 151936)
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 64, 128256)
TINY = Shape(3, 128, 256, 4, 2, 32, 512, 2)


def cuts(n: int, parts: int) -> list[tuple[int, int]]:
    return [(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


class _Builder:
    def __init__(self, shape: Shape, num_sms: int):
        self.shape, self.num_sms = shape, num_sms
        self.groups: list[Group] = []
        self.weights: dict[str, Weight] = {}
        self.tensors: dict[str, Tensor] = {}

    def linear(self, name: str, rows: int, k: int, reads: str, writes: str, waits, *, granule=1, per=1, publish=None):
        """`rows` of `k`, cut into whole granules; `per` rows make a feature of the output."""
        tasks = []
        parts = min(self.num_sms, rows // granule)
        for n, (lo, hi) in enumerate((lo * granule, hi * granule) for lo, hi in cuts(rows // granule, parts)):
            size = (hi - lo) * k * 2
            out = (lo // per, hi // per)
            wrote = (Span(writes, *out), *([Span(publish, *cuts(k, parts)[n])] if publish else []))
            tasks.append(
                Task(
                    n, out, (Span(reads, 0, self.tensors[reads].extent),), wrote, waits=waits,
                    signals=(f"{name}.done",), load_bytes=size, load_chunks=-(-size // CHUNK), flops=2 * (hi - lo) * k,
                )
            )  # fmt: skip
        self.weights[f"{name}_w"] = Weight(
            f"{name}_w", f"layers.{{i}}.{name}", (rows, k), (rows, k), per_layer=name != "head"
        )
        node = Node(name, "linear", (reads,), writes, {"weight": f"{name}_w"})
        self.groups.append(
            Group(name, "linear", (node,), (reads,), (writes, *([publish] if publish else [])), (len(tasks), 1, 1),
                  (384, 1, 1), tuple(tasks), published=(publish,) if publish else ())
        )  # fmt: skip

    def tensor(self, name: str, features: int) -> None:
        offset = sum(-(-t.bytes // 256) * 256 for t in self.tensors.values())
        self.tensors[name] = Tensor(name, (features,), "bf16", features, offset=offset, bytes=features * 2)

    def attention(self, waits) -> None:
        s = self.shape
        per = s.heads // s.kv_heads * s.head_dim
        keys, values = s.heads * s.head_dim, (s.heads + s.kv_heads) * s.head_dim
        tasks = []
        for unit in range(s.kv_heads * s.kv_splits):
            head = unit // s.kv_splits
            tasks.append(
                Task(
                    unit, (head * per, (head + 1) * per),
                    (Span("qkv", head * per, (head + 1) * per),
                     *(Span("qkv", at + head * s.head_dim, at + (head + 1) * s.head_dim) for at in (keys, values)),
                     Span("kv", unit, unit + 1)),
                    (Span("att", unit * per, (unit + 1) * per), Span("kv", unit, unit + 1)),
                    waits=waits, signals=("attend.done",),
                )
            )  # fmt: skip
        node = Node("attend", "attention", ("qkv",), "att", {}, {"scale": s.head_dim**-0.5})
        self.groups.append(
            Group(
                "attend", "attention", (node,), ("qkv",), ("att",), (s.kv_heads, s.kv_splits, 1), (384, 1, 1),
                tuple(tasks), kv_splits=s.kv_splits,
            )
        )  # fmt: skip

    def template(self, name: str) -> Template:
        """Tasks go round the SMs, each group starting where the one before ended."""
        queues: list[list[tuple[int, int]]] = [[] for _ in range(self.num_sms)]
        start = 0
        for g, group in enumerate(self.groups):
            for t in group.tasks:
                queues[(start + t.index) % self.num_sms].append((g, t.index))
            start += len(group.tasks)
        loads = [[(g, t) for g, t in q if self.groups[g].tasks[t].load_chunks] for q in queues]
        events = {f"{g.name}.done": len(g.tasks) for g in self.groups}
        made = Template(name, tuple(self.groups), events, tuple(map(tuple, queues)), tuple(map(tuple, loads)))
        self.groups = []
        return made


def make(shape: Shape = QWEN3_8B, target: str = "h100", ring: int = 176 * 1024, context: int = 512) -> Plan:
    """A decode step of a dense transformer: five groups a layer, and the head in a stage of its own."""
    s, sms = shape, find_target(target).num_sms
    b = _Builder(s, sms)
    qkv_rows, heads = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
    extents = {
        "token_ids": 1,
        "x": s.hidden,
        "qkv": qkv_rows,
        "att": heads * s.kv_splits,
        "act": s.inter,
        "y": s.hidden,
    }
    for name, features in {**extents, "logits": s.vocab, "next_ids": 1}.items():
        b.tensor(name, features)

    def after(event: str, count: int, back: int = 0):
        return (Wait(event, count, back),)

    def layer(name: str, reads: str, entry) -> Template:
        b.linear("qkv", qkv_rows, s.hidden, reads, "qkv", entry, granule=16, publish="x" if reads != "x" else None)
        b.attention(after("qkv.done", len(b.groups[-1].tasks)))
        b.linear("o_add", s.hidden, heads, "att", "y", after("attend.done", len(b.groups[-1].tasks)))
        b.linear("gate_up", 2 * s.inter, s.hidden, "y", "act", after("o_add.done", len(b.groups[-1].tasks)),
                 granule=2, per=2)  # fmt: skip
        b.linear("down", s.hidden, s.inter, "act", "x", after("gate_up.done", len(b.groups[-1].tasks)))
        return b.template(name)

    width = min(sms, s.hidden)
    sample = Task(0, (0, 1), (Span("logits", 0, s.vocab),), (Span("next_ids", 0, 1),),
                  waits=after("head.done", min(sms, s.vocab)), signals=("sample.done",))  # fmt: skip
    first = layer("first", "token_ids", after("sample.done", 1, -1))
    middle = layer("layer", "x", after("down.done", width, -1))
    b.linear("head", s.vocab, s.hidden, "x", "logits", after("down.done", width, -1))
    b.groups.append(
        Group("sample", "argmax_reduce", (Node("sample", "sample", ("logits",), "next_ids"),), ("logits",),
              ("next_ids",), (1, 1, 1), (384, 1, 1), (sample,))
    )  # fmt: skip
    head = b.template("head")
    stages = [Stage(0, 0), *(Stage(1, i) for i in range(1, s.layers)), Stage(2)]
    return Plan(
        name="by-hand", spec="by-hand", size="test", target=target, tp=1, batch=1, context=context, num_sms=sms,
        config={}, architecture="None", steps={"decode": Step("decode", 1, (first, middle, head), tuple(stages))},
        tensors=b.tensors, weights=b.weights, packings=(),
        states={"kv": State("kv", s.kv_heads, s.head_dim, s.layers, context, 1, extent=s.kv_heads * s.kv_splits)},
        arena_bytes={"cuda": sum(-(-t.bytes // 256) * 256 for t in b.tensors.values())},
        feeds={"token_ids": "next_ids"},
        schedule={g.name: {"grid": list(g.grid), "block": list(g.block), "launch": g.launch}
                  for t in (middle, head) for g in t.groups},
        ring_bytes=ring, chunk_bytes=CHUNK,
    )  # fmt: skip


def with_step(plan: Plan, **changes) -> Plan:
    """The plan with its decode step changed."""
    return replace(plan, steps={**plan.steps, "decode": replace(plan.steps["decode"], **changes)})
