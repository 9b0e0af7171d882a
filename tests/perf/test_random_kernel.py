"""benchmarks/random_kernel.py: rules and fusions of a plan, its target, how it is compiled and opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mpk_spec.emit.compiler import Compiled, Report
from mpk_spec.errors import UserError
from mpk_spec.runtime import cuda_launch, select

COMPILED = Compiled(b"cubin", Report("sm_90a", "NVRTC", 168, 0, 5.5), Path("folder"), False)


@pytest.fixture
def common(load_script):
    return load_script("random_kernel")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("in_flight", "'in_flight' is no rule"),
        ("in_fligt=4096", "the schedule has no rule 'in_fligt'"),
        ("gate_up.lanch=dynamic", "the schedule has no rule 'lanch'"),
        ("prefetch=much", "rules that cannot be: prefetch: 'auto', 0 or a positive integer"),
        ("crossing=air", "rules that cannot be: crossing: input should be 'event', 'data' or 'auto'"),
    ],
)
def test_a_rule_that_there_is_not_is_refused(common, rule, says):
    with pytest.raises(UserError) as error:
        common.planned("qwen3:tiny", target="h100", rules=[rule])
    assert error.value.message == says


def test_rules_may_be_for_a_group(common):
    rules = ("gate_up.launch=dynamic", "gate_up.grid=16", "attention.o.grid=6", "in_flight=8192")
    made = common.planned("qwen3:tiny", target="h100", rules=rules, without=["o_add"])
    groups = {g.name: g for g in made.steps["decode"].templates[1].groups}
    assert (groups["gate_up"].launch, groups["gate_up"].grid) == ("dynamic", (16, 1, 1))
    assert (groups["attention.o"].launch, groups["attention.o"].grid) == ("static", (6, 1, 1))
    assert made.in_flight_bytes == 8192


@pytest.mark.parametrize(
    ("without", "says", "hint"),
    [
        ("o_ad", "there is no fusion 'o_ad'", "did you mean 'o_add'?"),
        ("attend=attention.b", "the fusion 'attend' has no operator 'attention.b'", "did you mean 'attention.a'?"),
    ],
)
def test_a_fusion_that_there_is_not_is_refused(common, without, says, hint):
    with pytest.raises(UserError) as error:
        common.planned("qwen3:tiny", target="h100", without=[without])
    assert (error.value.message, error.value.hint) == (says, hint)


def test_ranks_over_nvshmem_get_the_kernel_that_they_will_look_for(common, monkeypatch):
    seen = []
    monkeypatch.setattr("mpk_spec.runtime.cuda_rank.compile_for", lambda *asked: seen.append(asked[0]))
    monkeypatch.setenv("MPK_SPEC_TRANSPORT", "nvshmem")
    for tp in (1, 2):
        common.compiled(common.planned("qwen3:tiny", target="h100", tp=tp))
    assert seen == ["peer", "nvshmem"]


def test_plans_are_for_the_gpu_of_this_machine(common, monkeypatch):
    monkeypatch.setattr(select, "target_here", lambda: (SimpleNamespace(name="h200"), None))
    assert common.target_here(needed=True) == common.target_here(needed=False) == "h200"


def test_a_gpu_that_no_target_is_like_is_not_taken_for_an_h100(common, monkeypatch):
    def strange():
        raise UserError("no target is like this GPU")

    monkeypatch.setattr(select, "target_here", strange)
    with pytest.raises(UserError, match="no target is like this GPU"):
        common.target_here(needed=False)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_kernel_is_opened_step_by_step_and_given_little_time(common, two_fake_gpus, monkeypatch, capsys, tp):
    seen = []
    monkeypatch.setattr("mpk_spec.emit.compiler.compile_kernel", lambda *asked: seen.append(asked[3]) or COMPILED)
    two_fake_gpus.driver.sizes = (
        *two_fake_gpus.driver.sizes[:2], cuda_launch.params_dtype(tp).itemsize, *two_fake_gpus.driver.sizes[3:],
    )  # fmt: skip
    plan = common.planned("qwen3:tiny", target="h100", tp=tp)
    backend, checkpoint = common.open_random(plan, 7, ("A_MACRO",))
    assert [launcher.timeout_s for launcher in two_fake_gpus.launchers] == [3.0] * tp
    assert checkpoint.source == "random:7"
    assert set(seen) == {("A_MACRO",)}
    said = [line.partition("s] ")[2] for line in capsys.readouterr().out.splitlines()]
    ranks = ["starting 2 ranks", "compiling the kernel", "joining the ranks"] if tp > 1 else ["compiling the kernel"]
    assert said[:-1] == [*ranks, "packing weights"]
    assert said[-1].startswith(
        "ready: 168 registers, 0 bytes spilled, compiled in 5.5 s; cuda, one persistent kernel on"
    )
    backend.close()
