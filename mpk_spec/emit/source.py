"""Plan -> the kernel's source, and everything else that a launch of it needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from mpk_spec.emit.layout import Layout, lay_out
from mpk_spec.emit.program import Programs, check_one_schedule, pack_programs
from mpk_spec.emit.tasks import HEADERS, HEADERS_OF_RANKS, TaskType, identifier, task_type
from mpk_spec.errors import UserError
from mpk_spec.paths import templates_dir
from mpk_spec.planner.plan import Plan, Step
from mpk_spec.planner.targets import find_target
from mpk_spec.planner.weights import layer_bytes

EVENT_STRIDE = 32  # counters lie 128 bytes apart: pollers of one do not slow the signals of another
MAX_SLOTS = 64
L2_GBPS = 6000  # that SMs get out of L2 (measured on an H200), where what comes from memory goes through as well
MOST_APART = 4  # chunks that are fetched ahead: the loader knows 17 to 32 of those to come
PREFETCH_CLOCKS = 1.6  # of one byte, times memory's GB/s for each SM: 1.25 times an SM's share at 2 GHz
MAX_RANKS = 8  # of one host; a task's signals to all of them fit one warp


@dataclass(frozen=True)
class Emitted:
    """A plan ready to compile and, once compiled, to launch."""

    plan: Plan
    step: Step
    layout: Layout
    programs: Programs
    source: str
    tasks: tuple[TaskType, ...]

    @property
    def num_events(self) -> int:
        """Counters of all stages."""
        return len(self.step.stages) * len(self.programs.events)

    @property
    def num_counters(self) -> int:
        """Those, and behind them one for each pool."""
        return self.num_events + len(self.programs.pools)


def emit(plan: Plan) -> Emitted:
    """Raises UserError, naming operator or group, for plans that the kernel cannot run."""
    _check(plan)
    step = check_one_schedule(plan)
    layout = lay_out(plan)
    tasks, runs = _tasks(plan, layout, step)
    programs = pack_programs(plan, step, layout, runs)
    return Emitted(plan, step, layout, programs, _render(plan, step, layout, tasks, programs), tuple(tasks))


def _check(plan: Plan) -> None:
    if plan.target == "cpu":
        raise UserError("this plan is for the CPU", "plan it for a GPU: --target h100")
    if plan.tp > MAX_RANKS:
        raise UserError(f"the CUDA kernel runs on up to {MAX_RANKS} GPUs, this plan is for {plan.tp}")
    if plan.batch != 1:
        raise UserError(f"the CUDA kernel runs one sequence, this plan has {plan.batch}", "plan it with --batch 1")
    most = max(s.tokens for s in plan.steps.values())
    if most > 16:
        raise UserError(f"the CUDA kernel takes up to 16 tokens a step, this plan has {most}")


def _tasks(plan: Plan, layout: Layout, step: Step) -> tuple[list[TaskType], list[list[int]]]:
    """Distinct task types, and for each template and group the one it uses."""
    found: dict[str, TaskType] = {}
    runs: list[list[int]] = []
    for number, template in enumerate(step.templates):
        runs.append([])
        for group in template.groups:
            body = task_type(plan, layout, group, template)
            task = found.setdefault(body, TaskType(f"{identifier(group.name)}_{len(found)}", ""))
            task.names.append(f"{template.name}: {group.name}")
            task.source = f"using {task.symbol} = {body};"
            task.stages += sum(stage.template == number for stage in step.stages)
            runs[-1].append(list(found).index(body))
    return list(found.values()), runs


def _layers(step: Step) -> list[int]:
    """The layer of each stage; after the layers it stays that of the last."""
    found = [0]
    for stage in step.stages:
        found.append(found[-1] if stage.layer is None else stage.layer)
    return found[1:]


def slots(plan: Plan, layout: Layout) -> tuple[int, int]:
    """(slots of the ring, bytes of one): the plan's ring, cut as finely as the largest chunk allows."""
    weights = (p.chunk_bytes for p in layout.packed.values())
    largest = max([*weights, *(c.chunk_bytes for c in layout.caches.values())])
    if largest > plan.chunk_bytes:
        raise UserError(f"a chunk of {largest} bytes exceeds the plan's {plan.chunk_bytes}")
    size = -(-largest // 128) * 128
    return min(plan.ring_bytes // size, MAX_SLOTS), size


def prefetch_every(plan: Plan) -> int:
    """1: the chunks that come next are brought into L2 while the ring is full; n: every nth of them.

    As many as L2 gives the SMs without taking from what memory gives them. A layer has to be as long as what they
    reach over: where it is shorter, the next wait comes before they were of use.
    """
    if plan.prefetch_bytes == 0:
        return 1
    spare = 1 - find_target(plan.target).stream_gbps / L2_GBPS
    wanted = round(1 / spare) if spare > 1 / MOST_APART else MOST_APART
    share = layer_bytes(plan.weights) // plan.num_sms
    return max(1, min(wanted, share // plan.prefetch_bytes))


def _render(plan: Plan, step: Step, layout: Layout, tasks: list[TaskType], programs: Programs) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(templates_dir()), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, variable_start_string="((", variable_end_string="))", block_start_string="(%",
        block_end_string="%)", comment_start_string="(#", comment_end_string="#)", autoescape=False,
    )  # fmt: skip
    ring_slots, slot_bytes = slots(plan, layout)
    headers = HEADERS + (HEADERS_OF_RANKS if plan.tp > 1 else ())
    return environment.get_template("megakernel.cu.j2").render(
        plan=plan, target=find_target(plan.target), groups=tasks, num_stages=len(step.stages),
        headers=[f"tasks/{name}.cuh" for name in headers], ring_slots=ring_slots, slot_bytes=slot_bytes,
        prefetch_chunks=plan.prefetch_bytes // plan.copy_bytes, prefetch_every=prefetch_every(plan),
        prefetch_clocks=round(PREFETCH_CLOCKS * plan.copy_bytes * plan.num_sms / find_target(plan.target).stream_gbps),
        copies_in_flight=max(1, min(ring_slots, plan.in_flight_bytes // plan.copy_bytes)),
        copies_while_looking=max(1, plan.in_flight_looking_bytes // plan.copy_bytes), num_events=len(programs.events),
        event_stride=EVENT_STRIDE, sampling_sm=programs.sampling_sm, max_queue=programs.max_queue,
        sizes=programs.sizes, templates=[t.name for t in step.templates],
        stage_template=[s.template for s in step.stages], stage_layer=_layers(step), num_layers=layout.layers,
        event_total=programs.event_total, weight_rows=list(layout.packed.values()),
        cache_pages=list(layout.caches.values()),
        from_peers=[int(name in programs.from_peers) for name in programs.events],
        pools=programs.pools, pool_rows=programs.pool_rows,
    )  # fmt: skip
