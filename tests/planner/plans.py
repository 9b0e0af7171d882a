"""Small synthetic plans that are valid by construction, for testing the verifier without the planner.

A decoder of `embed`, layers of `qkv, attend, o, gate_up, down`, and `head, sample`. Every group waits for all of the
group before it, except that `attend` waits for its own KV head's part of `qkv` only (`fine`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpk_spec.planner.plan import Group, Node, Plan, Span, Stage, State, Step, Task, Template, Tensor, Wait, Weight

CHUNK, RING = 1024, 4096


@dataclass(frozen=True)
class Shape:
    """Parameters of a synthetic plan."""

    layers: int = 3
    period: int = 1
    sms: int = 3
    tp: int = 1
    heads: int = 2
    splits: int = 1
    tiles: int = 3
    pool: bool = False
    fine: bool = True
    reuse: bool = True
    kinds: tuple[str, ...] = ("decode",)


def tile(size: int, parts: int) -> list[tuple[int, int]]:
    parts = min(size, parts)
    return [(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


class Builder:
    """One template: groups with events `<group>.done`, tasks dealt to the SMs in turn."""

    def __init__(self, shape: Shape, name: str):
        self.shape, self.name = shape, name
        self.groups: list[Group] = []
        self.events: dict[str, int] = {}
        self.queues: list[list[tuple[int, int]]] = [[] for _ in range(shape.sms)]
        self.next_sm = 0

    def add(self, name, op, tasks, waits=(), chunks=0, cross=False, pool=False, weights=None, inputs=(), output=""):
        """tasks: (out, reads, writes, further waits, further signals) each."""
        made = []
        for index, (out, reads, writes, more_waits, more_signals) in enumerate(tasks):
            signals = (f"{name}.done", *more_signals)
            for event in signals:
                self.events[event] = self.events.get(event, 0) + (self.shape.tp if cross else 1)
            spans = tuple(Span(*r) for r in reads), tuple(Span(*w) for w in writes)
            every = (*waits, *more_waits)
            made.append(
                Task(index, out, *spans, waits=every, signals=signals, load_bytes=chunks * CHUNK, load_chunks=chunks)
            )
            if not pool:
                self.queues[self.next_sm].append((len(self.groups), index))
                self.next_sm = (self.next_sm + 1) % self.shape.sms
        if pool:
            for queue in self.queues:
                queue.append((len(self.groups), -1))
        node = Node(name, op, tuple(inputs), output, weights or {})
        outputs = tuple(dict.fromkeys(s.tensor for t in made for s in t.writes))
        read = tuple(dict.fromkeys(s.tensor for t in made for s in t.reads))
        launch = "dynamic" if pool else "static"
        self.groups.append(
            Group(name, op, (node,), read, outputs, (len(made), 1, 1), (128, 1, 1), tuple(made), launch=launch)
        )

    def wait(self, group: str, stage: int = 0, count: int = 0) -> Wait:
        return Wait(f"{group}.done", count or self.events[f"{group}.done"], stage)

    def build(self) -> Template:
        def has_loads(entry):
            tasks = self.groups[entry[0]].tasks
            return any(t.load_chunks for t in tasks) if entry[1] < 0 else tasks[entry[1]].load_chunks

        loads = tuple(tuple(e for e in q if has_loads(e)) for q in self.queues)
        return Template(self.name, tuple(self.groups), self.events, tuple(map(tuple, self.queues)), loads)


HIDDEN, INTER, VOCAB = 12, 18, 20


def _tensors(s: Shape) -> dict[str, Tensor]:
    inbox = s.tp > 1
    qkv, parts = s.heads * 6, s.splits * s.heads * 4
    sizes = {"token_ids": 1, "r0": HIDDEN, "r1": HIDDEN, "qkv": qkv, "parts": parts, "act": INTER, "next_ids": 1}
    sizes |= {"best": VOCAB} if not inbox else {"o_in": HIDDEN, "d_in": HIDDEN, "best": VOCAB}
    made, offsets = {}, {"cuda": 0, "nvshmem": 0}
    for name, size in sizes.items():
        across = inbox and name in ("o_in", "d_in", "best")
        place = "nvshmem" if across else "cuda"
        number = -(-size * 4 * (s.tp if across else 1) // 128) * 128
        offset = made["qkv"].offset if name == "act" and s.reuse else offsets[place]
        made[name] = Tensor(name, (size,), "f32", size, place, inbox=across, offset=offset, bytes=number)
        offsets[place] = max(offsets[place], offset + number)
    return made


def _embed(s: Shape, before: Builder) -> Builder:
    b = Builder(s, "embed")
    tasks = [((lo, hi), [("token_ids", 0, 1)], [("r0", lo, hi)], (), ()) for lo, hi in tile(HIDDEN, 2)]
    b.add("embed", "embedding", tasks, (before.wait("sample", -1),), inputs=["token_ids"], output="r0")
    return b


def _layer(s: Shape, name: str, tiles: int, first: bool, before: Builder) -> Builder:
    """`before` builds the stage before this one; its last group is what the first waits for."""
    b, parallel = Builder(s, name), s.tp > 1
    publish = parallel and not first
    entry = [("r1", 0, HIDDEN), ("d_in", 0, HIDDEN)] if publish else [("r0", 0, HIDDEN)]
    last = before.groups[-1].name if before.groups else "down"
    entry_wait = before.wait(last, -1)
    size = s.heads * 6
    shares = tile(HIDDEN, tiles)
    tasks = []
    for i, (lo, hi) in enumerate(tile(size, tiles)):
        heads = [f"qkv.{h}" for h in range(lo // 6, (hi - 1) // 6 + 1)] if s.fine else []
        more = [("r0", *shares[i])] if publish and i < len(shares) else []
        tasks.append(((lo, hi), entry, [("qkv", lo, hi), *more], (), heads))
    if publish and len(tasks) < len(shares):
        raise ValueError("more shares than tasks")
    b.add("qkv", "linear", tasks, (entry_wait,), 2, weights={"weight": "w_qkv"}, inputs=["x"], output="qkv")
    tasks = []
    for h in range(s.heads):
        for split in range(s.splits):
            kv, part = h * s.splits + split, (split * s.heads + h) * 4
            spans = [("qkv", h * 6, h * 6 + 6), ("kv", kv, kv + 1)], [("kv", kv, kv + 1), ("parts", part, part + 4)]
            wait = Wait(f"qkv.{h}", b.events[f"qkv.{h}"]) if s.fine else b.wait("qkv")
            tasks.append(((part, part + 4), *spans, (wait,), ()))
    b.add("attend", "attention", tasks, (), 1, pool=s.pool, inputs=["qkv"], output="a")
    whole = ("parts", 0, s.splits * s.heads * 4)
    if parallel:
        tasks = [((lo, hi), [whole], [("o_in", lo, hi)], (), ()) for lo, hi in tile(HIDDEN, s.tiles)]
    else:
        tasks = [((lo, hi), [whole, ("r0", lo, hi)], [("r1", lo, hi)], (), ()) for lo, hi in tile(HIDDEN, s.tiles)]
    common = {"cross": parallel, "weights": {"weight": "w_o"}, "inputs": ["a"]}
    b.add("o", "linear", tasks, (b.wait("attend"),), 1, output="o", **common)
    entry = [("o_in", 0, HIDDEN), ("r0", 0, HIDDEN)] if parallel else [("r1", 0, HIDDEN)]
    cuts, shares = tile(INTER, tiles), tile(HIDDEN, tiles)
    tasks = []
    for i, (lo, hi) in enumerate(cuts):
        more = [("r1", *shares[i])] if parallel and i < len(shares) else []
        tasks.append(((lo, hi), entry, [("act", lo, hi), *more], (), ()))
    summed = {"inputs": ["o"], "output": "os"}
    b.add("gate_up", "all_reduce" if parallel else "linear", tasks, (b.wait("o"),), 3, **summed)
    whole = ("act", 0, INTER)
    if parallel:
        tasks = [((lo, hi), [whole], [("d_in", lo, hi)], (), ()) for lo, hi in tile(HIDDEN, s.tiles)]
    else:
        tasks = [((lo, hi), [whole, ("r1", lo, hi)], [("r0", lo, hi)], (), ()) for lo, hi in tile(HIDDEN, s.tiles)]
    b.add("down", "linear", tasks, (b.wait("gate_up"),), 2, cross=parallel, inputs=["os"], output="d")
    return b


def _head(s: Shape, before: Builder) -> Builder:
    b, parallel = Builder(s, "head"), s.tp > 1
    entry = [("r1", 0, HIDDEN), ("d_in", 0, HIDDEN)] if parallel else [("r0", 0, HIDDEN)]
    tasks = [((lo, hi), entry, [("best", lo, hi)], (), ()) for lo, hi in tile(VOCAB, s.tiles + 1)]
    waits = (before.wait("down", -1),)
    b.add("head", "linear", tasks, waits, 2, cross=parallel, weights={"weight": "w_head"}, inputs=["d"], output="best")
    tasks = [((0, 1), [("best", 0, VOCAB)], [("next_ids", 0, 1)], (), ())]
    b.add("sample", "argmax_reduce", tasks, (b.wait("head"),), inputs=["best"], output="next_ids")
    return b


def _step(s: Shape, kind: str, tiles: int) -> Step:
    tail = Builder(s, "head")
    tail.events["sample.done"] = 1
    builders = [_embed(s, tail)]
    stages = [Stage(0)]
    before, variants = builders[0], {}
    for layer in range(s.layers):
        variant = ("first",) if layer == 0 else ("global",) if layer % s.period == s.period - 1 else ("local",)
        if variant not in variants:
            variants[variant] = len(builders)
            builders.append(_layer(s, variant[0], tiles, layer == 0, before))
        stages.append(Stage(variants[variant], layer))
        before = builders[variants[variant]]
    stages.append(Stage(len(builders)))
    builders.append(_head(s, before))
    return Step(kind, 1, tuple(b.build() for b in builders), tuple(stages))


def make_plan(s: Shape) -> Plan:
    """A valid plan of that shape."""
    tensors = _tensors(s)
    steps = {kind: _step(s, kind, s.tiles + i) for i, kind in enumerate(s.kinds)}
    arenas: dict[str, int] = {}
    for t in tensors.values():
        arenas[t.placement] = max(arenas.get(t.placement, 0), t.offset + t.bytes)
    split = {"split": 1, "parts": s.tp} if s.tp > 1 else {}
    weights = {
        "w_qkv": Weight("w_qkv", "qkv", (s.heads * 6, HIDDEN), (s.heads * 6, HIDDEN), per_layer=True),
        "w_o": Weight("w_o", "o", (HIDDEN, 8), (HIDDEN, 8 * s.tp), per_layer=True, **split),
        "w_head": Weight("w_head", "head", (VOCAB, HIDDEN), (VOCAB, HIDDEN)),
    }
    return Plan(
        name="synthetic",
        spec="synthetic",
        size="tiny",
        target="cpu",
        tp=s.tp,
        batch=1,
        context=64,
        num_sms=s.sms,
        config={},
        architecture="Synthetic",
        steps=steps,
        tensors=tensors,
        weights=weights,
        packings=(),
        states={"kv": State("kv", s.heads, 4, s.layers, 64, 1, extent=s.heads * s.splits)},
        arena_bytes=arenas,
        feeds={"token_ids": "next_ids"},
        ring_bytes=RING,
        chunk_bytes=CHUNK,
    )


def edit_template(plan: Plan, kind: str, stage: int, change) -> Plan:
    """The plan with `change(template)` in that one stage: its template is cloned where others share it."""
    step = plan.steps[kind]
    old = step.stages[stage]
    changed = change(step.templates[old.template])
    stages = list(step.stages)
    if sum(s.template == old.template for s in stages) == 1:
        templates = list(step.templates)
        templates[old.template] = changed
    else:
        templates = [*step.templates, changed]
        stages[stage] = replace(old, template=len(step.templates))
    return replace(plan, steps={**plan.steps, kind: replace(step, templates=tuple(templates), stages=tuple(stages))})


def edit_group(template: Template, name: str, change) -> Template:
    return replace(template, groups=tuple(change(g) if g.name == name else g for g in template.groups))


def edit_tasks(template: Template, name: str, change) -> Template:
    return edit_group(template, name, lambda g: replace(g, tasks=tuple(change(t) for t in g.tasks)))
