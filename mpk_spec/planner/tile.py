"""Groups -> tasks: each task's part of the output, what it reads, what it writes and what it streams.

All regions follow from one recursion: the features of the output that a task makes, traced back through the ops'
`needs` to the group's inputs.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from mpk_spec.ops.base import FeatureSpan
from mpk_spec.ops.linear import K_BLOCK, ROW_TILE
from mpk_spec.planner.fuse import Fused
from mpk_spec.planner.model import BoundOp, Model
from mpk_spec.planner.plan import DTYPE_BYTES, Group, Node, Span, Task
from mpk_spec.planner.schedule import (
    SHARE,
    Settings,
    in_two_shots,
    linear_features,
    linear_granule,
    linear_rows,
    row_units,
)

ACTIVATION_SMEM = 46336  # and partial sums: activations of more tokens are streamed in K tiles
FIXED_SMEM = 4 * 1024  # barriers, the SM's program, the scheduler's mailbox


def tile(
    group: Fused, settings: Settings, model: Model, layer: int | None, tokens: int, kv_splits: dict[str, int]
) -> Group:
    """The group of one stage, without events. `kv_splits` by state."""
    rows = _shares if in_two_shots(group, model) else _rows
    cutter = {"linear": _linear, "attention": _attention}.get(group.kind, rows)
    tasks = tuple(cutter(group, settings, model, tokens, kv_splits))
    nodes = tuple(_node(op, model, layer) for op in group.ops)
    return Group(
        name=group.name, task=group.body[0].op.task if group.body else group.ops[-1].op.task, nodes=nodes,
        inputs=tuple(i for i in group.inputs if model.types[i].kind != "cache"), outputs=outputs(group, model),
        grid=settings.grid, block=settings.block, tasks=tasks, split_k=settings.split_k, kv_splits=settings.kv_splits,
        stages=settings.stages, partition=settings.partition, launch=settings.launch,
        smem_bytes=smem_bytes(group, model, tokens), published=group.published,
    )  # fmt: skip


def _node(op: BoundOp, model: Model, layer: int | None) -> Node:
    kind = model.types[op.output]
    fields = {f: getattr(op.op, f) for f in ("fn", "score", "state") if hasattr(op.op, f)}
    if op.op.op in ("rope", "attention"):
        fields["head_dim"] = model.types[op.inputs[0]].axes[-1].size
    if op.op.op == "attention":
        fields["heads"] = model.types[op.inputs[0]].axes[0].size
        fields["state"] = model.cache_state[op.inputs[1]]
    return Node(
        op.name, op.op.op, op.inputs, op.output, dict(op.weights), {**op.at(layer), **fields}, kind.features,
        op.op.granule(kind),
    )  # fmt: skip


def renamed(group: Group, old: str, new: str) -> Group:
    """The group with another name for one of its tensors."""

    def names(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if n == old else n for n in given)

    def spans_of(given: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(replace(s, tensor=new) if s.tensor == old else s for s in given)

    return replace(
        group,
        nodes=tuple(replace(n, inputs=names(n.inputs), output=names((n.output,))[0]) for n in group.nodes),
        inputs=names(group.inputs),
        outputs=names(group.outputs),
        published=names(group.published),
        tasks=tuple(replace(t, reads=spans_of(t.reads), writes=spans_of(t.writes)) for t in group.tasks),
    )


def outputs(group: Fused, model: Model) -> tuple[str, ...]:
    """The tensors that a group stores: its last value (or all linears, if they are kept) and what it publishes."""
    kept = (*group.body, *group.epilogue) if group.keeps_body else group.ops[-1:]
    made = tuple(o.output for o in kept)
    return tuple(v for v in (*made, *group.published) if model.types[v].kind != "cache")


def smem_bytes(group: Fused, model: Model, tokens: int) -> int:
    """Shared memory of one task beside the ring: a linear's input rounded to bf16 (or a K tile of it), an attention's
    queries and new keys and values; row operators keep what they need in registers."""
    if group.kind == "linear":
        width = model.types[group.body[0].inputs[0]].features
    elif group.kind == "attention":
        (heads, head_dim), kv_heads = (
            model.types[group.body[0].inputs[0]].shape,
            model.types[group.body[0].inputs[1]].shape[0],
        )
        width = (heads // kv_heads + 2) * head_dim
    else:
        width = 0
    return FIXED_SMEM + min(ACTIVATION_SMEM, tokens * width * 2)


def chunk_bytes(group: Fused, model: Model) -> int:
    """The largest bulk copy of a linear group, in whole units of 128 bytes."""
    weight = model.weights[group.body[0].weights["weight"]]
    size = DTYPE_BYTES[weight.storage.get("format", weight.dtype)]
    return -(-int(ROW_TILE * chunk_columns(weight.shape[-1], model.weight_chunk, size) * size) // 128) * 128


def cuts(units: int, parts: int) -> list[tuple[int, int]]:
    """`units` in `parts` ranges whose lengths differ by one at most."""
    return [(n * units // parts, (n + 1) * units // parts) for n in range(parts)]


def trace(group: Fused, model: Model, value: str, span: FeatureSpan, found: dict[str, FeatureSpan]) -> None:
    """Adds to `found` what of the group's inputs the features `span` of `value` need (the hull where several do)."""
    op = next((o for o in group.ops if o.output == value), None)
    if op is None:
        lo, hi = found.get(value, span)
        found[value] = (min(lo, span[0]), max(hi, span[1]))
        return
    types = [model.types[i] for i in op.inputs]
    for name, part in zip(op.inputs, op.op.needs(aligned(op, model, span), model.types[value], types), strict=True):
        trace(group, model, name, part, found)


def aligned(op: BoundOp, model: Model, span: FeatureSpan) -> FeatureSpan:
    """`span` widened to what the op computes at least."""
    kind = model.types[op.output]
    step = op.op.granule(kind) if op.op.role != "linear" else 1
    return span[0] // step * step, min(-(-span[1] // step) * step, kind.features)


def spans(found: dict[str, FeatureSpan], model: Model) -> tuple[Span, ...]:
    """As the plan counts: of a value whose experts are claimed, all slots."""
    whole = {n: (0, model.types[n].features * model.slots[n]) for n in found if n in model.slots}
    return tuple(Span(name, *whole.get(name, span)) for name, span in found.items())


def _published(group: Fused, model: Model, index: int, count: int) -> list[Span]:
    """Task `index` of `count` stores its share of the prologue's values, if there is one for each."""
    shares = [Span(v, *_share(model.types[v].features, index, count)) for v in group.published]
    return [s for s in shares if s.lo < s.hi]


def _share(features: int, index: int, count: int) -> FeatureSpan:
    """In whole vectors, as tasks load a row."""
    lo, hi = cuts(-(-features // SHARE), count)[index]
    return lo * SHARE, min(hi * SHARE, features)


def _rows(group: Fused, settings: Settings, model: Model, tokens: int, kv_splits: dict[str, int]):
    last = group.ops[-1]
    kind = model.types[last.output]
    units = row_units(group, model)
    step = -(-kind.features // units)
    for index, (lo, hi) in enumerate(cuts(units, settings.grid[0])):
        span = (lo * step, min(hi * step, kind.features))
        found: dict[str, FeatureSpan] = {}
        trace(group, model, last.output, span, found)
        if last.op.role == "append":
            splits = kv_splits[last.op.state]
            heads = [s // kind.axes[1].size * splits for s in span]
            yield Task(index, span, spans(found, model), (Span(last.op.state, *heads),))
        elif last.op.op == "attention_merge":  # of every split the task's heads alone
            rows = tuple(Span(last.inputs[0], *part) for part in last.op.rows(span))
            yield Task(index, span, rows, (Span(last.output, *span),))
        else:
            yield Task(index, span, spans(found, model), (Span(last.output, *span),))


def _shares(group: Fused, settings: Settings, model: Model, tokens: int, kv_splits: dict[str, int]):
    """`out` is in a rank's share; spans are those of all ranks' shares."""
    output = group.ops[-1].output
    share = model.types[output].features // model.tp
    for index, (lo, hi) in enumerate(cuts(row_units(group, model), settings.grid[0])):
        parts = [(rank * share + lo * SHARE, rank * share + hi * SHARE) for rank in range(model.tp)]
        reads: list[Span] = []
        for part in parts:
            found: dict[str, FeatureSpan] = {}
            trace(group, model, output, part, found)
            reads += spans(found, model)
        yield Task(index, (lo * SHARE, hi * SHARE), tuple(reads), tuple(Span(output, *part) for part in parts))


def _linear(group: Fused, settings: Settings, model: Model, tokens: int, kv_splits: dict[str, int]):
    granule, rows = linear_granule(group, settings.partition), linear_rows(group, model)
    k = model.types[group.body[0].inputs[0]].features
    slots = settings.grid[1] // settings.split_k
    row_cuts = [(lo * granule, min(hi * granule, rows)) for lo, hi in cuts(-(-rows // granule), settings.grid[0])]
    k_cuts = cuts(-(-k // 512), settings.split_k)
    index = 0
    for part, (k_lo, k_hi) in enumerate(k_cuts):
        for slot in range(slots):
            for span in row_cuts:
                found: dict[str, FeatureSpan] = {}
                for linear in group.body:
                    trace(group, model, linear.output, (0, 1), found)
                wrote = _linear_writes(group, model, span, part if settings.split_k > 1 else slot, found)
                if group.keeps_body and group.epilogue:
                    wrote.append(Span(group.ops[-1].output, 2 * index, 2 * index + 2))  # a pair for each task
                wrote += _published(group, model, index, prod(settings.grid))
                choice = (slot, slot + 1) if slots > 1 else None
                summed = (k_lo * 512, min(k_hi * 512, k)) if settings.split_k > 1 else choice
                yield _streams(
                    group, model, tokens, slots, Task(index, span, spans(found, model), tuple(wrote), k=summed), k
                )
                index += 1


def _streams(group: Fused, model: Model, tokens: int, slots: int, task: Task, k: int) -> Task:
    """The task with the weight bytes that flow through its ring."""
    width = task.k[1] - task.k[0] if task.k and slots == 1 else k
    per_row = len(group.body) if group.epilogue and any(o.op.op == "gated_act" for o in group.epilogue) else 1
    rows = (task.out[1] - task.out[0]) * per_row
    weight = model.weights[group.body[0].weights["weight"]]
    routed = model.types[group.body[0].output].routed
    copies = min(weight.shape[0], routed * tokens) if routed and slots == 1 else 1
    size = DTYPE_BYTES[weight.storage.get("format", weight.dtype)]
    tiles = -(-rows // ROW_TILE) * copies
    return replace(
        task, load_bytes=int(rows * width * size) * copies, flops=2 * rows * width * tokens,
        load_chunks=tiles * -(-width // chunk_columns(weight.shape[-1], model.weight_chunk, size)),
    )  # fmt: skip


def chunk_columns(k: int, most: int, size: float = 2) -> int:
    """Columns of one bulk copy of ROW_TILE rows: as few copies as keep each within `most` bytes, all alike, in whole
    blocks of the columns that one multiplication takes, or pairs of them, whose rows are in different banks."""
    step = K_BLOCK * (2 if k % (2 * K_BLOCK) == 0 else 1)
    copies = -(-k // (max(1, int(most / (ROW_TILE * size)) // step) * step))
    return min(k, -(-k // (copies * step)) * step)


def _linear_writes(group: Fused, model: Model, span: FeatureSpan, part: int, found: dict) -> list[Span]:
    """Spans of the group's outputs for the rows `span`; adds what the epilogue reads to `found`."""
    last = group.ops[-1]
    if not group.keeps_body:
        linears = {o.output for o in group.body}
        _trace_epilogue(group, model, last.output, span, found, linears)
        return [Span(last.output, *_shifted(model, last.output, span, part))]
    wrote, done = [], 0
    for output, lo, hi in packed_rows(group, model, span):
        wrote.append(Span(output, *_shifted(model, output, (lo, hi), part)))
        done += hi - lo
    return wrote


def _shifted(model: Model, value: str, span: FeatureSpan, part: int) -> FeatureSpan:
    """A split (or claimed slot) stores its features behind those of the ones before it."""
    width = model.types[value].axes[-1].size if value.endswith(".splits") else model.types[value].features
    return span[0] + part * width, span[1] + part * width


def _trace_epilogue(group: Fused, model: Model, value: str, span: FeatureSpan, found: dict, linears: set[str]) -> None:
    if value in linears:
        return
    op = next((o for o in group.ops if o.output == value), None)
    if op is None or op in group.prologue:
        trace(group, model, value, span, found)
        return
    types = [model.types[i] for i in op.inputs]
    for name, needed in zip(op.inputs, op.op.needs(span, model.types[value], types), strict=True):
        _trace_epilogue(group, model, name, needed, found, linears)


def packed_rows(group: Fused, model: Model, span: FeatureSpan) -> list[tuple[str, int, int]]:
    """Which rows of which linear the packed rows `span` are; the linears' rows alternate in `pack_groups` groups."""
    sizes = [(o.output, linear_features(o, model) // group.pack_groups) for o in group.body]
    return packed_segments(sizes, group.pack_groups, span)


def packed_segments(sizes: list[tuple[str, int]], groups: int, span: FeatureSpan) -> list[tuple[str, int, int]]:
    """`sizes`: rows of each linear in one group. Neighbouring rows of the same linear come as one segment."""
    found: list[tuple[str, int, int]] = []
    base = 0
    for group in range(groups):
        for name, size in sizes:
            lo, hi = max(span[0], base), min(span[1], base + size)
            if lo < hi:
                first = group * size + lo - base
                if found and found[-1][0] == name and found[-1][2] == first:
                    found[-1] = (name, found[-1][1], first + hi - lo)
                else:
                    found.append((name, first, first + hi - lo))
            base += size
    return found


def _attention(group: Fused, settings: Settings, model: Model, tokens: int, kv_splits: dict[str, int]):
    attention = group.body[0]
    q_type, cache_type = model.types[attention.inputs[0]], model.types[attention.inputs[1]]
    (heads, head_dim), kv_heads = q_type.shape, cache_type.axes[0].size
    per_kv, splits = heads // kv_heads, settings.kv_splits
    append = next((o for o in group.ops if o.op.role == "append"), None)
    state = model.cache_state[attention.inputs[1]]
    for kv_head in range(kv_heads):
        q_span = (kv_head * per_kv * head_dim, (kv_head + 1) * per_kv * head_dim)
        for split in range(splits):
            found: dict[str, FeatureSpan] = {}
            trace(group, model, attention.inputs[0], q_span, found)
            cached = Span(state, kv_head * splits + split, kv_head * splits + split + 1)
            wrote = [_attention_writes(attention.output, heads, head_dim, per_kv, kv_head, split, splits)]
            if append is not None:
                for value in append.inputs:
                    trace(group, model, value, (kv_head * head_dim, (kv_head + 1) * head_dim), found)
                wrote.append(cached)
            reads = (*spans(found, model), cached)
            yield Task(kv_head * splits + split, q_span, reads, tuple(wrote), k=(split, split + 1))


def _attention_writes(
    output: str, heads: int, head_dim: int, per_kv: int, kv_head: int, split: int, splits: int
) -> Span:
    if splits == 1:
        return Span(output, kv_head * per_kv * head_dim, (kv_head + 1) * per_kv * head_dim)
    row = head_dim + 2
    return Span(output, (split * heads + kv_head * per_kv) * row, (split * heads + (kv_head + 1) * per_kv) * row)
