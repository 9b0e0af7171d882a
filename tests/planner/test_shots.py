"""`all_reduce: one_shot | two_shot | auto`: who may say it, what follows in the plan, what the proof sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_specs import child, planned, spec_of

from mpk_spec.errors import SpecError
from mpk_spec.planner import plan
from mpk_spec.planner.cost import cost_model, sum_us
from mpk_spec.planner.report import explain, pin
from mpk_spec.planner.simulate import simulate
from mpk_spec.planner.verify import PlanError, verify
from mpk_spec.schema import load_spec


def ruled(*rules: dict, name: str = "qwen3"):
    return child(name, schedule=list(rules))


def two_shots(group: str = "*") -> dict:
    return {"set": {group: {"all_reduce": "two_shot"}}}


def shares(made) -> dict[str, str]:
    return {n: t.shares for n, t in made.tensors.items() if t.inbox}


@pytest.fixture(scope="module")
def made():
    return planned(ruled(two_shots()), tp=4, target="h100", context=256)


def test_a_share_is_summed_by_each_rank_and_sent_to_all(made):
    assert shares(made) == {
        "attention.o": "scattered", "attention.out": "gathered", "mlp.down": "scattered", "y.sum": "gathered",
        "next_ids.partial": "all",
    }  # fmt: skip
    first, middle, head = made.steps["decode"].templates
    groups = {g.name: g for g in middle.groups}
    group = groups["attention.o.all_reduce"]
    (task,) = group.tasks
    assert task.out == (0, 24)  # of the 96 features, in a rank's share
    assert [(s.tensor, s.lo, s.hi) for s in task.writes] == [("attention.out", n, n + 24) for n in (0, 24, 48, 72)]
    assert middle.events["attention.o.all_reduce.done"] == 4  # one of each rank
    assert [n.op for n in groups["gate_up"].nodes][:2] == ["rmsnorm", "linear"]
    assert groups["gate_up"].published == ()
    assert next(g for g in first.groups if g.name == "qkv").published == ("y",)  # layer 0 makes it of the embedding
    assert groups["qkv"].inputs == head.groups[0].inputs == ("y.sum",)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5", "qwen3_moe", "gemma3"])
def test_such_plans_are_proved(name, tp):
    made = planned(ruled(two_shots(), name=name), tp=tp, target="h100", context=256)
    assert "scattered" in shares(made).values()


def test_real_sizes_are_proved_and_simulated():
    spec = load_spec("qwen3")
    spec = replace(spec, schedule=[*spec.schedule, *ruled(two_shots()).schedule[-1:]])
    made = plan(spec, size="8b", target="h100", tp=8, context=512)
    tasks = next(g for g in made.steps["decode"].templates[1].groups if g.name == "attention.o.all_reduce").tasks
    assert len(tasks) == 8 and tasks[-1].out == (448, 512)
    found = {time.name for time in simulate(made, context=128).groups}
    assert {"attention.o.all_reduce", "mlp.down.all_reduce"} <= found


def test_the_cost_model_chooses_where_nothing_is_said():
    cost = cost_model("h100")
    one, two = ([sum_us(cost, tp, 4096, 1, shots) for tp in (2, 4, 8)] for shots in (False, True))
    assert one[0] < two[0] and one[2] - one[0] > two[2] - two[0]  # what a reader loads grows with the ranks
    assert sum_us(cost, 8, 8192, 1, True) < sum_us(cost, 8, 8192, 1, False)
    assert sum_us(cost, 2, 4096, 16, True) < sum_us(cost, 2, 4096, 16, False)
    assert set(shares(planned(spec_of("qwen3"), tp=2, target="h100", context=256)).values()) == {"all"}
    large = child("qwen3", {"hidden_size": 8192})
    assert "scattered" in shares(planned(large, tp=8, target="h100", context=256, verified=False)).values()
    asked = child("qwen3", {"hidden_size": 8192}, schedule=[{"set": {"*": {"all_reduce": "one_shot"}}}])
    assert set(shares(planned(asked, tp=8, target="h100", context=256, verified=False)).values()) == {"all"}


def test_explain_says_what_was_chosen_and_what_both_cost(made):
    shown = explain(made)
    assert "  attention.o.all_reduce: in two shots; by the cost model one takes 1.2 us, two 5.3 us\n" in shown
    assert "all_reduce: two_shot" in shown.partition("schedule (")[2]
    shown = explain(planned(spec_of("qwen3"), tp=2, target="h100", context=256))
    assert "  mlp.down.all_reduce: in one shot; by the cost model one takes " in shown
    assert "all_reduce" not in explain(planned(spec_of("qwen3"), target="h100", context=256))


def test_pinned_it_is_the_same_plan(made):
    import yaml

    again = planned(ruled(*yaml.safe_load(pin(made))["schedule"]), tp=4, target="h100", context=256)
    assert again.to_json() == made.to_json()


def test_a_rule_of_one_group_and_auto_behind_it():
    only = planned(ruled(two_shots("down_add")), tp=2, target="h100", context=256)
    assert shares(only)["attention.o"] == "all" and shares(only)["mlp.down"] == "scattered"
    auto = ruled(two_shots(), {"set": {"o_add": {"all_reduce": "one_shot"}, "down_add": {"all_reduce": "auto"}}})
    assert set(shares(planned(auto, tp=2, target="h100", context=256)).values()) == {"all"}
    assert planned(ruled(two_shots("o_add")), tp=1, target="h100", context=256).all_reduces == 0


@pytest.mark.parametrize(
    ("rules", "size", "message"),
    [
        ([two_shots("qkv")], {}, "the ranks do not add up what 'qkv' makes\n.*\n.*\n  hint: groups of whose results"),
        (
            [two_shots("o_add")], {"hidden_size": 98, "head_dim": 32},
            "what 'o_add' makes cannot be added up in two shots: 98 features are no 2 shares of whole vectors of 4"
            "\n.*\n.*\n  hint: nearest that works: one_shot",
        ),
        (
            [{"when": {"step": "decode"}, **two_shots("o_add")}], {},
            "'all_reduce' is two_shot in the decode step and auto in the prefill step\n.*\n.*\n  hint: one kernel",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_its_line(rules, size, message):
    with pytest.raises(SpecError, match=message):
        planned(child("qwen3", size, schedule=rules), tp=2, target="h100", context=256)


def test_for_all_it_is_left_out_where_it_cannot_be():
    made = planned(child("qwen3", {"hidden_size": 98}, schedule=[two_shots()]), tp=2, target="cpu")
    assert set(shares(made).values()) == {"all"}
    assert any("one shot, since 98 features are no 2 shares" in note for note in made.notes)


# ---- the proof


def changed(made, group: str, change):
    """The plan with all tasks of a group changed, in every template."""
    step = made.steps["decode"]
    templates = tuple(
        replace(
            t,
            groups=tuple(replace(g, tasks=tuple(map(change, g.tasks))) if g.name == group else g for g in t.groups),
        )
        for t in step.templates
    )
    return replace(made, steps={"decode": replace(step, templates=templates)})


@pytest.mark.parametrize("group", ["attention.o.all_reduce", "gate_up", "mlp.down.all_reduce", "qkv", "head"])
def test_without_its_wait_a_group_reads_what_the_ranks_have_not_written(made, group):
    with pytest.raises(PlanError, match=f"{group}.* nothing makes it wait for"):
        verify(changed(made, group, lambda task: replace(task, waits=())))


def test_a_wait_for_this_rank_alone_is_too_short(made):
    def own(task):
        return replace(task, waits=tuple(replace(w, count=w.count // 4) for w in task.waits))

    with pytest.raises(PlanError, match="no particular task is known to be done"):
        verify(changed(made, "gate_up", own))


def test_a_sum_that_lies_on_another_is_seen(made):
    """A fast rank would write the layer's end while a slow one still reads its middle."""
    tensors = {**made.tensors, "y.sum": replace(made.tensors["y.sum"], offset=made.tensors["attention.out"].offset)}
    with pytest.raises(PlanError, match=r"y\.sum|attention\.out"):
        verify(replace(made, tensors=tensors))
