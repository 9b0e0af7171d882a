from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import spec_of

from mpk_spec.errors import UserError
from mpk_spec.planner import plan
from mpk_spec.testing.golden import difference, golden_path, golden_text, write_golden


@pytest.fixture(scope="module")
def made():
    return plan(spec_of("qwen3"), size="tiny", target="h100")


def test_the_page_is_short_and_the_same_every_time(made):
    text = golden_text(made)
    assert text == golden_text(plan(spec_of("qwen3"), size="tiny", target="h100"))
    assert 20 < len(text.splitlines()) < 100
    assert text.startswith("qwen3 tiny on h100, tp 1, batch 1, context 512\nring ")


def test_the_page_shows_what_changed(made, tmp_path):
    path = tmp_path / "golden" / "tiny.txt"
    write_golden(path, golden_text(made))
    assert difference(path, golden_text(made)) is None
    step = made.steps["decode"]
    first = replace(
        step.templates[0], groups=(replace(step.templates[0].groups[0], stages=9), *step.templates[0].groups[1:])
    )
    changed = replace(made, steps={**made.steps, "decode": replace(step, templates=(first, *step.templates[1:]))})
    lines = difference(path, golden_text(changed)).splitlines()
    assert lines[:2] == [f"--- {path}", "+++ now"]
    assert [line[0] for line in lines if line[0] in "+-"] == ["-", "+", "-", "+"]
    assert any(line.startswith("+") and "stages 9" in line for line in lines)


def test_tasks_that_the_page_does_not_list_count_too(made):
    step = made.steps["decode"]
    queues = step.templates[0].queues
    swapped = replace(step.templates[0], queues=(queues[1], queues[0], *queues[2:]))
    changed = replace(made, steps={**made.steps, "decode": replace(step, templates=(swapped, *step.templates[1:]))})
    assert golden_text(changed) != golden_text(made)


def test_what_transformers_adds_to_a_config_does_not_count(made):
    assert golden_text(replace(made, config={**made.config, "new_in_transformers": 1})) == golden_text(made)


def test_a_missing_file_says_how_to_write_it(tmp_path):
    path = tmp_path / "x.txt"
    assert difference(path, "a\n") == f"there is no {path}; 'mpk-spec test --update' writes it"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "golden").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x\.txt: "):
        write_golden(tmp_path / "golden" / "x.txt", "a\n")


def test_goldens_lie_beside_their_spec():
    spec = spec_of("qwen3")
    assert golden_path(spec, "8b") == spec.path.parent / "golden" / "qwen3" / "8b.txt"
