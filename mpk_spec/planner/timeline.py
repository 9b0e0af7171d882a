"""A simulated step as a picture: one row per SM as SVG, or a trace for Perfetto, both in the plan's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape

from mpk_spec.errors import UserError
from mpk_spec.planner.simulate import Ran, Simulation

PALETTE = ("#4878a8", "#e08a3c", "#5a9e58", "#c0504d", "#8668a8", "#8a6d5c", "#cf7ab4", "#a8a43c", "#4aa8a8", "#6b7f99")
LEFT, TOP, ROW, WIDTH, BOTTOM = 52, 56, 6, 1400, 34  # pixels


def middle(simulation: Simulation, count: int = 2) -> tuple[int, int]:
    """`[lo, hi)` of the step's stages: the `count` in its middle."""
    total = len(simulation.step.stages)
    lo = max(0, min((total - count) // 2, total - count))
    return lo, min(total, lo + count)


def svg(simulation: Simulation, stages: tuple[int, int] | None = None) -> str:
    """The tasks of the stages `[lo, hi)` of the step (default: two in its middle) as an SVG document.

    One row per SM; a colour per group; pale: waiting for data; hatched: waiting for an event, or for values that
    cross as data until they are seen. The axis counts
    microseconds from the start of the step. Raises UserError for stages that the step does not have.
    """
    lo, hi = stages or middle(simulation)
    shown = _of_stages(simulation, lo, hi)
    begin = min(r.free for r in shown)
    end = max(r.stored for r in shown)
    scale = WIDTH / (end - begin)
    names = list(dict.fromkeys(simulation.group_of(r).name for r in shown))
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)}
    height = TOP + ROW * simulation.plan.num_sms + BOTTOM
    title = f"{simulation.plan.name} on {simulation.plan.target}, {simulation.step.kind}, stages {lo} to {hi - 1}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<defs><pattern id="wait" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="5" height="5" fill="#f4f4f4"/><line x1="0" y1="0" x2="0" y2="5" stroke="#b0b0b0" '
        'stroke-width="2"/></pattern></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
        *_legend(colours),
        *_axis(simulation, begin, end, scale, height),
    ]
    for ran in sorted(shown, key=lambda r: (r.sm, r.free)):
        lines += _bars(simulation, ran, begin, scale, colours)
    return "\n".join([*lines, "</svg>", ""])


def _of_stages(simulation: Simulation, lo: int, hi: int) -> list[Ran]:
    total = len(simulation.step.stages)
    if not 0 <= lo < hi <= total:
        raise UserError(f"stages {lo} to {hi - 1}", f"this step has the stages 0 to {total - 1}")
    return [r for r in simulation.records[simulation.first :] if lo <= r.stage - simulation.warm < hi]


def _legend(colours: dict[str, str]) -> Iterator[str]:
    at = LEFT
    for name, colour in [*colours.items(), ("waits for an event or values", "url(#wait)")]:
        yield f'<rect x="{at}" y="26" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{at + 16}" y="36">{escape(name)}</text>'
        at += 32 + 7 * len(name)
    yield f'<text x="{at}" y="36">pale: waits for data</text>'


def _axis(simulation: Simulation, begin: float, end: float, scale: float, height: int) -> Iterator[str]:
    for sm in range(0, simulation.plan.num_sms, 10):
        yield f'<text x="{LEFT - 6}" y="{TOP + sm * ROW + ROW}" text-anchor="end">SM {sm}</text>'
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if (end - begin) / s <= 20)
    tick = -(-begin // step) * step
    while tick <= end:
        x = LEFT + (tick - begin) * scale
        yield f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{height - BOTTOM + 4}" stroke="#dddddd"/>'
        yield f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{tick:.0f} µs</text>'
        tick += step


def _bars(simulation: Simulation, ran: Ran, begin: float, scale: float, colours: dict[str, str]) -> Iterator[str]:
    group = simulation.group_of(ran)
    colour = colours[group.name]
    tip = f"{group.name}[{ran.task}] on SM {ran.sm}: {ran.start:.1f} to {ran.stored:.1f} µs"
    parts = [
        (ran.free, ran.start, 'fill="url(#wait)"'),
        (ran.start, ran.consumed - ran.stalled, f'fill="{colour}"'),
        (ran.consumed - ran.stalled, ran.consumed, f'fill="{colour}" fill-opacity="0.35"'),
        (ran.consumed, ran.stored, f'fill="{colour}"'),
    ]
    for start, end, fill in parts:
        if (end - start) * scale >= 0.1:
            yield (
                f'<rect x="{LEFT + (start - begin) * scale:.1f}" y="{TOP + ran.sm * ROW}" '
                f'width="{(end - start) * scale:.1f}" height="{ROW - 1}" {fill}><title>{escape(tip)}</title></rect>'
            )


def chrome_trace(simulation: Simulation) -> str:
    """The whole step of one rank in Chrome's trace format, for ui.perfetto.dev: a thread per SM.

    Tasks are named `group[task]`, waits for events `wait group[task]`, for values that cross as data
    `look group[task]`; `args` hold the stage, its layer and how long weights or the cache were waited for.
    """
    events: list[dict] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": f"{simulation.plan.name} (simulated)"}}
    ]
    for sm in range(simulation.plan.num_sms):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": sm, "args": {"name": f"SM {sm}"}})
    for ran in simulation.records[simulation.first :]:
        group = simulation.group_of(ran)
        stage = simulation.stages[ran.stage]
        name = f"{group.name}[{ran.task}]"
        if ran.start > ran.free:
            what = "look" if ran.by == "data" else "wait"
            events.append(_slice(f"{what} {name}", what, ran.sm, ran.free, ran.start, {}))
        arguments = {"stage": ran.stage - simulation.warm, "data_wait_us": max(0.0, round(ran.stalled, 3))}
        if stage.layer is not None:
            arguments["layer"] = stage.layer
        events.append(_slice(name, "task", ran.sm, ran.start, ran.stored, arguments))
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events})


def _slice(name: str, category: str, sm: int, start: float, end: float, arguments: dict) -> dict:
    """A complete event; times in microseconds, three digits."""
    times = {"ts": round(start, 3), "dur": round(end - start, 3)}
    return {"ph": "X", "name": name, "cat": category, "pid": 0, "tid": sm, **times, "args": arguments}
