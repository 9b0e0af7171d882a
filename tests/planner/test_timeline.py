from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import shapes

from mpk_spec.errors import UserError
from mpk_spec.planner.simulate import simulate
from mpk_spec.planner.timeline import chrome_trace, middle, svg

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def simulation():
    return simulate(shapes.make(shapes.TINY, target="cpu", context=64))


def bars(document):
    """The tasks' rectangles, as (x, y, width, title)."""
    for rect in ElementTree.fromstring(document).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            yield float(rect.get("x")), float(rect.get("y")), float(rect.get("width")), title.text


def test_the_middle_of_a_step(simulation):
    assert middle(simulation) == (1, 3)
    assert middle(simulation, 9) == (0, 4)


def test_a_row_for_every_sm_and_a_title_for_every_task(simulation):
    document = svg(simulation, (0, 4))
    drawn = list(bars(document))
    assert len({y for _, y, _, _ in drawn}) == 4
    tasks = {title.split(" on ")[0] for *_, title in drawn}
    step = simulation.step
    wanted = {f"{g.name}[{t.index}]" for s in step.stages for g in step.templates[s.template].groups for t in g.tasks}
    assert tasks == wanted


def test_bars_of_an_sm_do_not_overlap(simulation):
    ends = {}
    for x, y, width, _ in bars(svg(simulation)):
        assert x >= ends.get(y, 0) - 0.2  # rounded to a tenth of a pixel, twice
        ends[y] = x + width


def test_the_legend_names_groups_and_waits(simulation):
    texts = [t.text for t in ElementTree.fromstring(svg(simulation)).iter(f"{SVG}text")]
    assert {"qkv", "attend", "o_add", "gate_up", "down", "waits for an event or values"} <= set(texts)
    assert "head" not in texts  # not in the two layers shown
    assert any(t.endswith(" µs") for t in texts) and "SM 0" in texts


def test_stages_that_are_not_there(simulation):
    with pytest.raises(UserError) as error:
        svg(simulation, (3, 9))
    assert str(error.value) == "stages 3 to 8\n  hint: this step has the stages 0 to 3"


def test_the_trace_has_every_task_once(simulation):
    events = json.loads(chrome_trace(simulation))["traceEvents"]
    tasks = [e for e in events if e.get("cat") == "task"]
    assert len(tasks) == len(simulation.records) - simulation.first == 65
    assert len({(e["args"]["stage"], e["name"]) for e in tasks}) == 65
    assert {e["args"].get("layer") for e in tasks} == {0, 1, 2, None}
    assert max(e["ts"] + e["dur"] for e in tasks) == pytest.approx(simulation.us, abs=0.01)
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {f"SM {n}" for n in range(4)}


def test_the_trace_shows_waits(simulation):
    events = json.loads(chrome_trace(simulation))["traceEvents"]
    waits = [e for e in events if e.get("cat") == "wait"]
    assert waits and all(e["name"].startswith("wait ") and e["dur"] >= 0 for e in waits)
