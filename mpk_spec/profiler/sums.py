"""What the sums over ranks cost a token, beside what crosses between SMs of one GPU, and what the weights hide of it.

A task that adds up the ranks' parts waits for those of all. Had the sum been this rank's alone, the SM would have seen
its last part one hop after it was sent: the signal that says so, which would have been sent earlier by what one to
peers takes longer than another, or the values themselves where they cross as data. The rest of the wait is the sum's.
Meanwhile the loader goes on filling the SM's ring. For what the task waits for its weights even so, it would have
waited had the parts come sooner: so much of the sum's wait is hidden.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean

import numpy as np

from mpk_spec.planner.cost import look_us
from mpk_spec.planner.plan import Step
from mpk_spec.planner.report import table
from mpk_spec.planner.simulate import Simulation, simulate
from mpk_spec.profiler.clock import Times
from mpk_spec.profiler.ranks import Exchange, exchanges


@dataclass(frozen=True)
class Sum:
    """One wait for a sum over ranks (or for one of its two shots): means over stages, recorded tokens and ranks, in us.

    data: its parts cross as data. later: from when a rank had sent its own last part to when all ranks had. way: from
    that to its being seen (as data: and prepared). signal: what the signals to peers took longer than others; values
    need none. waited: the sum's part of an SM's wait. beyond: of it, what no wait for weights hides.
    """

    name: str
    times: int  # in a token, those of the first stage left out where they reach into the token before
    in_layers: bool
    data: bool
    later: float
    way: float
    signal: float
    waited: float
    beyond: float


@dataclass(frozen=True)
class Sums:
    """`layers`: of the model; `predicted_us`: of all sums of a layer, beyond what is hidden, by the simulation."""

    rows: tuple[Sum, ...]
    layers: int
    predicted_us: float

    def of_a_layer(self, what: str) -> float:
        """`waited` or `beyond` of all sums of activations together, a layer."""
        return sum(row.times * getattr(row, what) for row in self.rows if row.in_layers) / self.layers

    def data(self) -> dict:
        return {
            "rows": [asdict(row) for row in self.rows], "layer_waited_us": self.of_a_layer("waited"),
            "layer_beyond_us": self.of_a_layer("beyond"), "layer_predicted_us": self.predicted_us,
        }  # fmt: skip


def sums_of(ranks: list[Times], predicted: Simulation, predicted_us: float) -> Sums:
    """`ranks`: by one clock, at least two steps. Of the prediction's constants, the hops between SMs of one GPU."""
    step = predicted.step
    layers = len({stage.layer for stage in step.stages} - {None})
    longer = _longer(ranks, step)
    found: dict[str, list[Exchange]] = {}
    for one in exchanges(step):
        found.setdefault(_group(step, one).name, []).append(one)
    rows = []
    for name, ones in found.items():
        adds = all(node.op != "argmax_reduce" for node in _group(step, ones[0]).nodes)
        means = np.array([_cost(ranks, predicted, one, longer) for one in ones]).mean(0).tolist()
        rows.append(Sum(name, len(ones), adds, ones[0].data, *means))
    return Sums(tuple(rows), layers, predicted_us)


def _group(step: Step, one: Exchange):
    return step.templates[step.stages[one.stage].template].groups[one.group]


def _longer(ranks: list[Times], step: Step) -> float:
    """By how much a task that signals to peers signals longer than one that does not, of the middle of both."""
    crossing = {(one.sent, at) for one in exchanges(step) for at in one.senders}
    both: dict[bool, list[float]] = {True: [], False: []}
    for times in ranks:
        took = (times.signalled - times.stored).mean(0)  # [SM, stage, place]
        for sm, stage, place in np.argwhere(np.isfinite(took)).tolist():
            both[(stage, (sm, place)) in crossing].append(float(took[sm, stage, place]))
    return max(0.0, float(np.median(both[True]) - np.median(both[False]))) if all(both.values()) else 0.0


def _cost(ranks: list[Times], predicted: Simulation, one: Exchange, longer: float) -> tuple[float, ...]:
    """(later, way, signal, waited, beyond), means over ranks, tokens and SMs."""
    sms, places = (list(x) for x in zip(*one.seen, strict=True))
    longer = 0.0 if one.data else longer
    step, group = predicted.step, _group(predicted.step, one)
    look = look_us(predicted.plan, group, group.tasks[0], predicted.cost, predicted.context)
    at_once, hop = (look, look) if one.data else (0.0, predicted.cost.hop_us - longer)  # asked when all parts are there
    rows = []
    for number in range(1, ranks[0].asked.shape[0]):
        own = [one.last_sent(times, number) for times in ranks]
        last = max(own)
        for times, mine in zip(ranks, own, strict=True):
            arrived = one.arrived(times, number)
            asked = times.asked[number, sms, one.stage, places]
            waited = np.maximum(0.0, arrived - np.maximum(asked + at_once, mine + hop))
            beyond = np.maximum(0.0, waited - _weights(times, step, one, number, sms))
            rows.append((last - mine, arrived.mean() - last, longer, waited.mean(), beyond.mean()))
    return tuple(fmean(column) for column in zip(*rows, strict=True))


def _weights(times: Times, step: Step, one: Exchange, number: int, sms: list[int]) -> np.ndarray:
    """How long each SM waited for the weights of all its tasks of the group."""
    queues = step.templates[step.stages[one.stage].template].queues
    return np.array(
        [
            sum(float(times.waited[number, sm, one.stage, p]) for p, (g, _) in enumerate(queues[sm]) if g == one.group)
            for sm in sms
        ]
    )


def predicted_sums(predicted: Simulation) -> float:
    """What a layer's sums cost by the simulation: against one whose peers are as near as other SMs."""
    near = replace(predicted.cost, peer_hop_us=predicted.cost.hop_us, peer_gbps=float("inf"))
    without = simulate(predicted.plan, context=predicted.context, cost=near)
    return (predicted.us - without.us) / len({stage.layer for stage in predicted.step.stages} - {None})


def page(sums: Sums) -> str:
    """For people."""
    headers = ["added up by", "crosses", "a token", "later rank", "way", "signal", "waited", "beyond"]
    columns = ("later", "way", "signal", "waited", "beyond")
    rows = [
        [r.name, "as data" if r.data else "by event", r.times, *(f"{getattr(r, what):.2f}" for what in columns)]
        for r in sums.rows
    ]
    title = (
        "sums over ranks in us, each once: from when a rank has sent its part to when the last has, from there to its\n"
        "being seen (as data: and prepared), what a signal to peers takes longer; what an SM waits for it all, and\n"
        "what of this no wait for weights hides"
    )
    count = sum(r.times for r in sums.rows if r.in_layers) / sums.layers
    total = (
        f"the sums of a layer together, {count:.1f} waits: "
        f"{sums.of_a_layer('beyond'):.2f} us beyond what is hidden, of "
        f"{sums.of_a_layer('waited'):.2f} us waited (the simulation says {sums.predicted_us:.2f} us)"
    )
    return f"{title}\n{table(headers, rows, frozenset({'added up by', 'crosses'}))}\n{total}"
