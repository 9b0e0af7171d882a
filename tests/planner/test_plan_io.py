from __future__ import annotations

import json

import pytest
import shapes

from mpk_spec.errors import UserError
from mpk_spec.planner.plan_io import load_plan, read_plan, save_plan
from mpk_spec.planner.verify import PlanError


@pytest.fixture
def plan():
    return shapes.make(shapes.TINY, target="cpu", context=64)


def test_what_is_saved_is_loaded(tmp_path, plan):
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # nothing half-written beside it


def test_a_folder_that_is_not_there(tmp_path, plan):
    path = tmp_path / "none" / "plan.json"
    with pytest.raises(UserError) as error:
        save_plan(plan, path)
    assert str(error.value) == f"cannot write {path}: No such file or directory"


def test_a_target_that_cannot_be_replaced(tmp_path, plan):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        save_plan(plan, tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def changed(plan, **keys):
    data = {**json.loads(plan.to_json()), **keys}
    return json.dumps({k: v for k, v in data.items() if v is not ...})


HINT = "\n  hint: make it again with 'mpk-spec plan SPEC -o FILE'"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"version": 99}, "is a plan of version 99, this is mpk-spec for version 2" + HINT),
        ({"version": ...}, "is no plan: it has no version\n  hint: plans come from 'mpk-spec plan SPEC -o FILE'"),
        ({"steps": ..., "tp": ...}, "is no plan: 'tp' is missing; 'steps' is missing" + HINT),
        ({"states": 7}, "is no plan: 'states': Input should be an object" + HINT),
        (
            {"name": None, "spec": ..., "size": ..., "target": ..., "tp": ...},
            "is no plan: 'name': Input should be a valid string; "
            "'spec' is missing; 'size' is missing and 2 more" + HINT,
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_plans(tmp_path, plan, keys, message):
    path = tmp_path / "plan.json"
    path.write_text(changed(plan, **keys))
    with pytest.raises(UserError) as error:
        load_plan(path)
    assert str(error.value) == f"{path} {message}"


def test_not_json(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("spec: v1")
    with pytest.raises(UserError) as error:
        load_plan(path)
    assert str(error.value) == f"{path} is no plan: it is not JSON: Expecting value: line 1 column 1 (char 0)"


def test_not_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as error:
        load_plan(path)
    assert str(error.value) == f"{path} is no plan: it is not text"


def test_no_file(tmp_path):
    with pytest.raises(UserError) as error:
        load_plan(tmp_path / "plan.json")
    assert str(error.value) == f"cannot read {tmp_path / 'plan.json'}: No such file or directory"


def test_a_plan_that_must_not_run_is_refused(tmp_path, plan):
    data = json.loads(plan.to_json())
    data["steps"]["decode"]["templates"][1]["groups"][1]["tasks"][0]["waits"] = []  # attention starts too early
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    read_plan(path)
    with pytest.raises(PlanError, match="attend"):
        load_plan(path)
