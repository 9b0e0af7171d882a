"""Recorded times as a GPU would leave them, made from a simulation: clocks that start anywhere, a timer that ticks."""

from __future__ import annotations

import numpy as np

from mpk_spec.planner.simulate import Simulation
from mpk_spec.runtime.cuda_probe import TIMES

CYCLES_PER_US = 1755.0
EPOCH_NS = 1_790_000_000_000_000_000  # as large as real ones: no float64 holds it to the nanosecond


def times_of(simulation: Simulation, steps: int = 3, tick_ns: int = 32, seed: int = 0) -> np.ndarray:
    """`TIMES` `[steps, SM, stage, place]` of a GPU that does what was simulated, step after step."""
    step, sms = simulation.step, simulation.plan.num_sms
    places = max(len(queue) for template in step.templates for queue in template.queues)
    raw = np.zeros((steps, sms, len(step.stages), places), TIMES)
    starts = np.random.default_rng(seed).integers(10**12, 10**13, sms)
    for ran in simulation.records[simulation.first :]:
        stage = ran.stage - simulation.warm
        place = list(step.templates[step.stages[stage].template].queues[ran.sm]).index((ran.group, ran.task))
        task = simulation.group_of(ran).tasks[ran.task]
        looks = any(w.data for w in task.waits)  # then the scheduler has it ready at once
        streams = task.load_bytes > 0 or ran.stalled > 0
        for number in range(steps):
            begin = 1000.0 + number * simulation.us
            ready = ran.free if looks else ran.start
            at = [begin + t for t in (ran.free, ready, ran.ready, ran.consumed, ran.stored, ran.done)]
            cycles = [int(starts[ran.sm] + t * CYCLES_PER_US) for t in at]
            record = raw[number, ran.sm, stage, place]
            record["global_ns"] = (EPOCH_NS + int(at[0] * 1e3)) // tick_ns * tick_ns
            record["asked"], record["ready"] = cycles[0], cycles[1]
            record["seen"] = cycles[2] if streams or looks else 0
            record["stored"], record["signalled"] = cycles[4], cycles[5]
            if streams:
                record["opened"], record["computed"] = cycles[2], cycles[3]
                record["waited"] = int(ran.stalled * CYCLES_PER_US)
    return raw
