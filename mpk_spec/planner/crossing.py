"""How values get from the SM that writes them to those that read them: announced by an event, or as data.

As data: in a step of one token, readers look at the values themselves until all are there, which saves the writer's
release and the reader's event, a microsecond in each hop. For that a tensor lies twice in memory; writes take turns,
and whoever writes one copy fills the same part of the other with a pattern that no result has (0xFF). Events stay: a
reader waits for the one of the write before, which says that the copy was cleared, and for which nobody waits long.

Steps of several tokens wait for events as ever. All of the layers' values cross in one way, or none: then nothing but
the end of a step relies on events for what was written in the same step. What the head reads of the last layer crosses
as data too, and so does what the sampling reads, if it is written once in a step: the event of the write before is then
that of the step before.

What a step is about crosses as data as well, each word with the number of its step, so that there is nothing to clear.
It does not tell an SM what the others have done: the first layer waits for what it needs to know of the step before as
other layers do of the layer before. In a model of few layers, or with several ranks, that is not enough: all of the
first layer's tasks wait for the event that ends the step before, and the head for that of its input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from mpk_spec.planner.memory import ALIGN, bytes_of
from mpk_spec.planner.plan import Group, Span, Stage, Step, Task, Template, Tensor, Wait
from mpk_spec.planner.tile import renamed

FIRST = ".first"
FEW = 4
"""Layers. What a task knows it has from the two layers before; those of one step must not be those of two."""
Turns = dict[str, Literal["layer", "step"]]


@dataclass(frozen=True)
class Crossing:
    """`turns`: the tensors that lie twice, and what a write to them happens once in. `refused`: why nothing does."""

    steps: dict[str, Step]
    turns: Turns = field(default_factory=dict)
    refused: str | None = None


def cross_as_data(
    steps: dict[str, Step], tensors: dict[str, Tensor], states: Iterable[str], feeds: Iterable[str]
) -> Crossing:
    """The steps with their layers' values crossing as data, or unchanged and the reason. `feeds`: what steps are given.

    Sums over ranks in two shots are announced by events, where nothing else is but a step's end.
    """
    first = next(iter(steps.values()))
    if first.stages[0].layer is None or first.stages[-1].layer is not None:
        return Crossing(steps, refused="a step does not begin with its layers and end with something else")
    made = {kind: _own_first(step) for kind, step in steps.items()}
    everywhere = [_written(step) for step in made.values()]
    if any(w != everywhere[0] for w in everywhere) or everywhere[0] is None:
        return Crossing(steps, refused="not every layer writes the same values on the same SMs")
    ranks = any(t.inbox for t in tensors.values())
    by_event = {*states, *(t.name for t in tensors.values() if t.inbox and t.shares != "all")}
    turns: Turns = dict.fromkeys((t for t in everywhere[0] if t not in by_event), "layer")
    turns |= dict.fromkeys((t for step in made.values() for t in _once(step, turns)), "step")
    turns |= dict.fromkeys(_sampled(made.values()), "step")
    for step in made.values():
        refused = _why_not(step, turns, tensors, by_event)
        if refused:
            return Crossing(steps, refused=refused)
    told = ranks or len({s.layer for s in first.stages} - {None}) < FEW
    given = () if told else tuple(feeds)
    return Crossing({kind: _marked(step, turns, given) for kind, step in made.items()}, turns)


def in_turns(
    tensors: dict[str, Tensor], turns: Turns, arenas: dict[str, int], tokens: int, tp: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of `turns`, both copies of each behind what is placed in `arenas` already; and their new sizes."""
    placed: dict[str, Tensor] = {}
    arenas = dict(arenas)
    for name, per in sorted(turns.items()):
        like = tensors[name.removesuffix(FIRST)]
        copy = -(-bytes_of(like, tokens, tp) // (ALIGN * tp)) * ALIGN * tp
        offset = arenas.get(like.placement, 0)
        placed[name] = replace(like, name=name, offset=offset, bytes=2 * copy, turns=2, per=per)
        arenas[like.placement] = offset + 2 * copy
    return placed, arenas


def write_before(named: int, layers: int, stages: int) -> int:
    """The stage that wrote, the time before, what stage `named` of a step writes: in a step of one token a wait for
    data is for its event. The first `layers` stages are the layers'; negative: of the step before."""
    if named >= layers:
        return named - stages
    return named - 1 if named else layers - 1 - stages


def further_back(step: Step, template: int, stage: int) -> int:
    """`write_before` as a program has it (`Wait::data`): so many stages before the one that a template's wait names;
    the kernel knows what comes before the first layer."""
    place = next(n for n, s in enumerate(step.stages) if s.template == template)
    return len(step.stages) if place + stage >= layers_of(step) else 1


def layers_of(step: Step) -> int:
    return sum(s.layer is not None for s in step.stages)


def signallers(template: Template) -> dict[str, list[tuple[int, Task]]]:
    """Of each event the tasks that signal it, and the numbers of their groups."""
    found: dict[str, list[tuple[int, Task]]] = {}
    for g, group in enumerate(template.groups):
        for task in group.tasks:
            for event in task.signals:
                found.setdefault(event, []).append((g, task))
    return found


def makers(signalling: Iterable[tuple[int, Task]], reads: Iterable[Span]) -> tuple[tuple[int, int], ...]:
    """Of the tasks that signal an event, those that write something of `reads`: (group, task)."""
    spans: dict[str, list[Span]] = {}
    for span in reads:
        spans.setdefault(span.tensor, []).append(span)
    return tuple(
        (g, task.index)
        for g, task in signalling
        if any(w.lo < r.hi and r.lo < w.hi for w in task.writes for r in spans.get(w.tensor, ()))
    )


def layered(step: Step) -> list[Template]:
    """The templates of layers, that of the first layer first."""
    return [step.templates[n] for n in dict.fromkeys(s.template for s in step.stages if s.layer is not None)]


def _own_first(step: Step) -> Step:
    """What the first layer alone writes down (the embedding) under a name of its own: it is written once in a step."""
    number = step.stages[0].template
    template = step.templates[number]
    published = {name for group in template.groups for name in group.published}
    groups = list(template.groups)
    for name in published:
        last = max(n for n, g in enumerate(groups) if name in g.outputs)
        if name in groups[last].published:
            continue  # nobody writes it after that
        groups[:last] = [renamed(g, name, name + FIRST) for g in groups[:last]]
    alone = sum(s.template == number for s in step.stages) == 1
    if not published or not alone:
        return step
    templates = list(step.templates)
    templates[number] = replace(template, groups=tuple(groups))
    return replace(step, templates=tuple(templates))


def _written(step: Step) -> dict[str, tuple] | None:
    """What every layer writes: the parts of each tensor and on which SM; None where layers differ."""
    found = [_parts(template) for template in layered(step)]
    common = {t: parts for t, parts in found[-1].items() if all(t in f for f in found)}
    return common if all(f[t] == parts for f in found for t, parts in common.items()) else None


def _parts(template: Template) -> dict[str, tuple]:
    sms = {entry: sm for sm, queue in enumerate(template.queues) for entry in queue}
    found: dict[str, list] = {}
    for g, group in enumerate(template.groups):
        for task in group.tasks:
            for span in task.writes:
                found.setdefault(span.tensor, []).append((span.lo, span.hi, sms.get((g, task.index), -1)))
    return {tensor: tuple(sorted(parts)) for tensor, parts in found.items()}


def _once(step: Step, turns: Turns) -> set[str]:
    """What the first layer writes and no other."""
    return {t for t in _parts(step.templates[step.stages[0].template]) if t.endswith(FIRST) and t not in turns}


def _sampled(steps: Iterable[Step]) -> set[str]:
    """What the last group of a step reads of the groups before it, if all steps write it on the same SMs."""
    found = []
    for template in (step.templates[step.stages[-1].template] for step in steps):
        reads = {s.tensor for task in template.groups[-1].tasks for s in task.reads}
        static = all(g.launch == "static" for g in template.groups)
        found.append({t: parts for t, parts in _parts(template).items() if static and t in reads})
    return {t for t, parts in found[0].items() if all(other.get(t) == parts for other in found)}


def _why_not(step: Step, turns: Turns, tensors: dict[str, Tensor], by_event: set[str]) -> str | None:
    for name in turns:
        tensor = tensors[name.removesuffix(FIRST)]
        if tensor.placement != ("nvshmem" if tensor.inbox else "cuda"):
            return f"'{name}' is placed in {tensor.placement} memory"
    for template in layered(step):
        for group in template.groups:
            if group.launch != "static":
                return f"the tasks of '{group.name}' are claimed at run time"
            for span in (s for task in group.tasks for s in (*task.reads, *task.writes)):
                if span.tensor in tensors and span.tensor not in turns and span.tensor not in by_event:
                    return f"'{span.tensor}' of group '{group.name}' is not written once in every layer"
    return None


def _marked(step: Step, turns: Turns, given: tuple[str, ...]) -> Step:
    """Waits of layers for layers are for data, and of what follows for the last layer; the step's end waits for all
    events of that layer as well. `given`: what the step is given, if that suffices to begin it; else only layers wait
    so."""
    templates = list(step.templates)
    for number in {s.template for s in step.stages if s.layer is not None}:
        before = [step.stages[at - 1] for at, s in enumerate(step.stages) if s.template == number]
        follows = all(s.layer is not None for s in before)  # else it is the first, which reads what a step is given
        earlier = step.templates[before[0].template] if follows else None
        templates[number] = _as_data(step.templates[number], earlier, turns, given)
    at = next(n for n, s in enumerate(step.stages) if s.layer is None)
    last = templates[step.stages[at - 1].template]
    stages = list(step.stages)
    for place, change in ((at, partial(_told, turns if given else {})), (len(stages) - 1, partial(_ended, turns))):
        templates.append(change(templates[stages[place].template], last, at - 1 - place))
        stages[place] = Stage(len(templates) - 1)
    return _without_unused(replace(step, templates=tuple(templates), stages=tuple(stages)))


def _as_data(template: Template, before: Template | None, turns: Turns, given: tuple[str, ...]) -> Template:
    """Waits for data of this layer and of the one before; every reader waits for every tensor's writers.

    Also for those of what does not cross as data: that they are done shows by no value.
    """
    groups = []
    entry = [] if before is not None or given else _of_step_before(template)
    marker = _Marker({0: template} if before is None else {0: template, -1: before}, turns)
    for g, group in enumerate(template.groups):
        makers = {t: (maker.name, 0) for maker in template.groups[:g] for t in maker.outputs}
        if before is not None:
            makers = {t: (maker.name, -1) for maker in before.groups for t in maker.outputs} | makers
        tasks = (_with_waits(t, entry) for t in marker.marked(group, makers))
        groups.append(replace(group, tasks=tuple(_given(t, given) if before is None else t for t in tasks)))
    return replace(template, groups=tuple(groups))


def _given(task: Task, given: tuple[str, ...]) -> Task:
    """Who reads what the step is given waits for that alone."""
    reads = any(s.tensor in given for s in task.reads)
    return replace(task, waits=tuple(replace(w, data=w.data or (reads and w.stage < 0)) for w in task.waits))


def _of_step_before(template: Template) -> list[Wait]:
    """What the first tasks of a step wait for. Where `given` does not suffice all tasks of its first layer do: what was
    cleared in the step before nothing else tells them."""
    return list(dict.fromkeys(w for g in template.groups for t in g.tasks for w in t.waits if w.stage < 0))


class _Marker:
    """Decides of each wait whether it is for data: if by the values that it reads, or by other waits, a task knows that
    all are done which signal the event.

    `behind[group]`: the groups, and how many stages away, that every task of a group comes after as a whole.
    """

    def __init__(self, sources: dict[int, Template], turns: Turns):
        self.sources, self.turns = sources, turns
        self.sent = {stage: signallers(template) for stage, template in sources.items()}
        self.behind: dict[str, set[tuple[str, int]]] = {}
        self._seen: dict[tuple, bool] = {}

    def marked(self, group: Group, makers: dict[str, tuple[str, int]]) -> tuple[Task, ...]:
        """The group's tasks. makers: of each tensor the group that wrote it, and how many stages away."""
        done = [self._marked(task, makers) for task in group.tasks]
        self.behind[group.name] = set.intersection(*(known for _, known in done)) if done else set()
        return tuple(task for task, _ in done)

    def _marked(self, task: Task, makers: dict[str, tuple[str, int]]) -> tuple[Task, set[tuple[str, int]]]:
        waits = [replace(w, data=self.by_values(w, task.reads)) for w in task.waits]
        known = set().union(*(self._told(w) for w in waits))
        for tensor in dict.fromkeys(s.tensor for s in task.reads if s.tensor in makers and s not in task.writes):
            maker, stage = makers[tensor]
            if any(w.stage == stage and _group_of(w.event) == maker for w in waits):
                continue
            reads = task.reads if self.turns.get(tensor) != "step" else ()  # else the step before has cleared it
            for name in _events(maker, self.sent[stage], reads):
                wait = Wait(name, self.sources[stage].events[name], stage)
                data = tensor in self.turns and ((maker, stage) in known or self.by_values(wait, task.reads))
                waits.append(replace(wait, data=data))
                known |= self._told(waits[-1])
        return replace(task, waits=tuple(waits)), known

    def by_values(self, wait: Wait, reads: tuple[Span, ...]) -> bool:
        key = wait.event, wait.stage, reads
        if key not in self._seen:
            sent = self.sent.get(wait.stage, {}).get(wait.event, [])
            seen = makers(sent, (s for s in reads if s.tensor in self.turns))
            self._seen[key] = len(seen) == len(sent) > 0
        return self._seen[key]

    def _told(self, wait: Wait) -> set[tuple[str, int]]:
        """What a wait makes known as a whole."""
        group = _group_of(wait.event)
        behind = self.behind.get(group, set()) if wait.stage == 0 else set()
        return behind | ({(group, wait.stage)} if wait.event == f"{group}.done" else set())


def _events(maker: str, sent: dict[str, list[tuple[int, Task]]], reads: tuple[Span, ...]) -> list[str]:
    """What says that a group has written `reads`: events of none but their writers, else of all the group's tasks."""
    whole = f"{maker}.done"
    wrote = {e: makers(tasks, reads) for e, tasks in sent.items() if _group_of(e) == maker}
    if whole in sent:
        exact = [e for e, found in wrote.items() if len(found) == len(sent[e])]
        told = {task for e in exact for task in wrote[e]}
        return exact if whole not in exact and told >= {*wrote[whole]} and exact else [whole]
    return [e for e, found in wrote.items() if found]


def _group_of(event: str) -> str:
    return event.partition(".done")[0]


def _told(turns: Turns, template: Template, layer: Template, back: int) -> Template:
    """Readers after the layers wait for those of the last layer, `back` stages away, whose values they read."""
    makers = {t: group.name for group in layer.groups for t in group.outputs}
    sent = signallers(layer)
    marker = _Marker({back: layer}, turns)

    def told(task: Task) -> Task:
        names = {e for s in task.reads if s.tensor in makers for e in _events(makers[s.tensor], sent, task.reads)}
        waits = [w for w in task.waits if w.stage != back or w.event not in names]
        more = [Wait(name, layer.events[name], back) for name in sorted(names)]
        more = [replace(w, data=marker.by_values(w, task.reads)) for w in more]
        return replace(task, waits=(*waits, *more))

    groups = tuple(replace(g, tasks=tuple(told(t) for t in g.tasks)) for g in template.groups)
    return replace(template, groups=groups)


def _ended(turns: Turns, template: Template, layer: Template, back: int) -> Template:
    """The tasks of the last group wait for all events of the last layer, `back` stages away, and look at what was made
    of it since."""
    *groups, last = template.groups
    more = [Wait(name, count, back) for name, count in layer.events.items()]
    marker = _Marker({0: template}, turns)
    tasks = (
        replace(t, waits=tuple(replace(w, data=marker.by_values(w, t.reads)) for w in t.waits)) for t in last.tasks
    )
    return replace(template, groups=(*groups, replace(last, tasks=tuple(_with_waits(t, more) for t in tasks))))


def _with_waits(task: Task, more: list[Wait]) -> Task:
    return replace(task, waits=(*task.waits, *(w for w in more if w not in task.waits)))


def _without_unused(step: Step) -> Step:
    used = list(dict.fromkeys(s.template for s in step.stages))
    stages = tuple(replace(s, template=used.index(s.template)) for s in step.stages)
    return replace(step, templates=tuple(step.templates[n] for n in used), stages=stages)
