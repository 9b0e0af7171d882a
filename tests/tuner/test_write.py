"""Written rules are the spec's language: read back, they give the plan that was chosen."""

from __future__ import annotations

import pytest
import yaml

from mpk_spec.planner import plan
from mpk_spec.schema import load_spec
from mpk_spec.tuner.space import with_rules
from mpk_spec.tuner.write import extended, rule

RULES = {
    "attend": {"fuse": ["attention.cache", "attention.a"], "kv_splits": 3},
    "qkv": {"grid": [7, 1, 1], "partition": "balanced"},
    "o_add": {"fuse": False},
    "attention.o": {"grid": [4, 1, 1], "partition": "even"},
    "*": {"in_flight": 32768, "prefetch": 0},
}
ASKED = {"size": "tiny", "target": "h100", "context": 256}


@pytest.mark.parametrize("name", ["qwen3", "smollm2", "qwen2_5", "llama3"])
def test_a_written_file_gives_the_chosen_plan(name, tmp_path):
    spec = load_spec(name)
    chosen = plan(with_rules(spec, RULES), **ASKED)
    path = tmp_path / "tuned.yaml"
    path.write_text(extended(spec, chosen, RULES, path, ["how it was found"]))
    assert path.read_text().startswith(f"# how it was found\nspec: v1\nextends: {name}\nname: {name}\n")
    again = load_spec(path)
    assert plan(again, **ASKED).to_json() == chosen.to_json()
    assert again.sizes == spec.sizes and again.model == spec.model
    for other in ({"target": "h200"}, {"tp": 2}):  # the rule is for what was measured
        assert plan(again, **{**ASKED, **other}).to_json() == plan(spec, **{**ASKED, **other}).to_json()


def test_a_file_of_a_person_is_named_by_its_path_and_keeps_its_own_rules(tmp_path):
    own = tmp_path / "mine" / "my.yaml"
    own.parent.mkdir()
    pinned = {"when": {"target": "h100"}, "set": {"head": {"stages": 2}, "attend": {"kv_splits": 2}}}
    sizes = {"small": load_spec("qwen3").sizes["tiny"].config}
    own.write_text(
        yaml.safe_dump(
            {"spec": "v1", "extends": "qwen3", "name": "my", "model": {"architectures": ["Qwen3ForCausalLM"]},
             "schedule": [{"set": {"o_add": {"stages": 3}, "gate_up": {"stages": 3}}}, pinned], "sizes": sizes}
        )
    )  # fmt: skip
    spec, asked = load_spec(own), {**ASKED, "size": "small"}
    chosen = plan(with_rules(spec, RULES), **asked)
    path = tmp_path / "tuned.yaml"
    path.write_text(extended(spec, chosen, RULES, path, []))
    assert "\nextends: mine/my.yaml\n" in path.read_text()
    again = plan(load_spec(path), **asked)
    assert again.to_json() == chosen.to_json()
    assert (again.schedule["head"]["stages"], again.schedule["gate_up"]["stages"]) == (2, 3)
    assert again.schedule["attend"]["kv_splits"] == 3


def test_a_rule_says_what_it_is_for():
    made = plan(load_spec("qwen3"), **ASKED)
    assert rule(made, RULES) == (
        "  - when: {target: h100, size: tiny, tp: 1, batch: 1}\n"
        "    set:\n"
        "      attend: {fuse: [attention.cache, attention.a], kv_splits: 3}\n"
        "      qkv: {grid: [7, 1, 1], partition: balanced}\n"
        "      o_add: {fuse: false}\n"
        "      attention.o: {grid: [4, 1, 1], partition: even}\n"
        '      "*": {in_flight: 32768, prefetch: 0}\n'
    )
