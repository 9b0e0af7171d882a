"""The specs that come with mpk-spec: published sizes, resolved text, the editors' schema."""

from __future__ import annotations

import math

import pytest

from mpk_spec.paths import specs_dir
from mpk_spec.schema import editor, json_schema, load_spec, spec_names

# As published, from the checkpoints' safetensors headers.
PARAMETERS = {
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("llama3", "1b"): 1_235_814_400,
    ("llama3", "3b"): 3_212_749_824,
    ("llama3", "8b"): 8_030_261_248,
    ("qwen2_5", "0.5b"): 494_032_768,
    ("qwen2_5", "1.5b"): 1_543_714_304,
    ("qwen2_5", "7b"): 7_615_616_512,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("qwen3", "32b"): 32_762_123_264,
    ("qwen3_moe", "30b-a3b"): 30_532_122_624,
    ("smollm2", "135m"): 134_515_008,
    ("smollm2", "360m"): 361_821_120,
    ("smollm2", "1.7b"): 1_711_376_384,
}


def dims_of(spec, config):
    env = {"config": config}
    while missing := spec.dims.keys() - env.keys():
        ready = [n for n in missing if not spec.dims[n].names & missing]
        env |= {name: spec.dims[name].evaluate(env) for name in ready}
    return env


def parameters(spec, size):
    config = spec.sizes[size].config
    env = dims_of(spec, config)
    kept = [w for w in spec.weights.values() if not (w.tie and config["tie_word_embeddings"])]
    return sum(math.prod(e.evaluate(env) for e in w.shape) * (env["layers"] if w.layer else 1) for w in kept)


def test_every_size_has_as_many_parameters_as_published():
    counted = {(n, s): parameters(load_spec(n), s) for n in spec_names() for s in load_spec(n).sizes if s != "tiny"}
    assert counted == PARAMETERS


@pytest.mark.parametrize("name", spec_names())
def test_the_check_agrees_with_the_weights(name):
    spec = load_spec(name)
    wanted = spec.checks["parameters"].parameters
    assert parameters(spec, wanted["size"]) == wanted["equal"]


@pytest.mark.parametrize("name", spec_names())
def test_tiny_splits_over_eight_ranks(name):
    spec = load_spec(name)
    env = dims_of(spec, spec.sizes["tiny"].config)
    assert env["heads"] % 8 == 0
    assert env["kv_heads"] == 2
    assert env["inter"] % 128 == 0
    assert env["vocab"] % 2 == 1  # does not split: the last rank's share is padded
    assert env["head_dim"] == 32


@pytest.mark.parametrize("name", spec_names())
def test_the_resolved_spec_is_the_same_spec(name):
    spec = load_spec(name)
    text = spec.resolved_yaml()
    assert "extends" not in text
    again = load_spec("elsewhere.yaml", text=text)
    assert again == spec
    assert again.resolved_yaml() == text
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize("path", sorted(specs_dir().glob("*.yaml")), ids=lambda p: p.stem)
def test_editors_find_the_schema(path):
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../mpk_spec/schema/spec-v1.schema.json"
    assert (path.parent / first.partition("=")[2]).resolve() == editor.FILE.resolve()
    assert load_spec(path).name == path.stem


def test_the_checked_in_json_schema_is_fresh():
    assert editor.FILE.read_text() == editor.text(), "write it anew: python -m mpk_spec.schema.editor"


def test_the_json_schema_knows_every_operator_and_its_fields():
    from mpk_spec.ops import public_ops

    definitions = json_schema()["$defs"]
    for name, op in public_ops().items():
        assert set(definitions[f"op_{name}"]["properties"]) == {f.alias or n for n, f in op.model_fields.items()} | {
            "when"
        }
        assert definitions[f"op_{name}"]["required"] == [name]
        assert definitions[f"op_{name}"]["description"]


@pytest.mark.parametrize("path", sorted(specs_dir().glob("*.yaml")), ids=lambda p: p.stem)
def test_the_json_schema_accepts_the_specs(path):
    import json

    import jsonschema

    from mpk_spec.schema.reader import read_tree

    data = json.loads(json.dumps(read_tree(path, path.read_text())[0].data()))
    jsonschema.Draft202012Validator(json_schema()).validate(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": {"mlp": {"h": {"rmsnrom": "x"}}}},
        {"blocks": {"mlp": {"h": {"rmsnorm": "x", "wieght": "w"}}}},
        {"fusion": {}},
        {"shard": {"tp": {"heads": "spilt"}}},
        {"schedule": [{"set": {"*": {"grid": "big"}}}]},
        {"weights": {"layer": {"q_proj": {"frm": "q"}}}},
    ],
)
def test_the_json_schema_marks_mistakes(wrong):
    import jsonschema

    right = {"spec": "v1", "extends": "qwen3.yaml", "name": "mine", "model": {"architectures": ["A"]}}
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(right)
    assert not validator.is_valid(right | wrong)
