from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpk_spec.errors import UserError
from mpk_spec.weights import normalise_config, text_config


def test_defaults_are_filled_in():
    config = normalise_config("Gemma3ForCausalLM", {"num_hidden_layers": 8, "rope_theta": 1e6})
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    assert config["rope_parameters"]["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert "transformers_version" not in config and text_config(config) is config


def test_text_config_stays_nested():
    config = normalise_config("Gemma3ForConditionalGeneration", {"text_config": {"num_hidden_layers": 7}})
    assert "num_hidden_layers" not in config
    assert text_config(config)["num_hidden_layers"] == 7 and len(text_config(config)["layer_types"]) == 7


def test_a_class_shared_by_types_is_its_own_type():
    assert normalise_config("LlamaForCausalLM", {})["model_type"] == "llama"
    assert normalise_config("Qwen3MoeForCausalLM", {})["model_type"] == "qwen3_moe"


def test_normalising_twice_changes_nothing():
    once = normalise_config("Qwen3ForCausalLM", {"hidden_size": 96})
    assert normalise_config("Qwen3ForCausalLM", once) == once


def test_the_second_time_imports_nothing_heavy(own_cache):
    first = normalise_config("Qwen3ForCausalLM", {"hidden_size": 96})
    code = (
        "import sys, json; from mpk_spec.weights import normalise_config\n"
        "config = normalise_config('Qwen3ForCausalLM', {'hidden_size': 96})\n"
        "print(json.dumps([config['num_hidden_layers'], [m for m in ('torch', 'transformers') if m in sys.modules]]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"[{first['num_hidden_layers']}, []]"


def test_keys_and_architecture_decide_the_cache_entry(own_cache):
    normalise_config("Qwen3ForCausalLM", {"hidden_size": 96})
    normalise_config("Qwen3ForCausalLM", {"hidden_size": 64})
    normalise_config("LlamaForCausalLM", {"hidden_size": 64})
    assert len(list((own_cache / "configs").iterdir())) == 3


def test_unknown_architecture():
    with pytest.raises(UserError) as caught:
        normalise_config("Qwen33ForCausalLM", {})
    assert caught.value.message.endswith("has no language model 'Qwen33ForCausalLM'")
    assert caught.value.hint.startswith("did you mean 'Qwen")


def test_a_value_that_the_class_refuses():
    with pytest.raises(UserError) as caught:
        normalise_config("Qwen3ForCausalLM", {"hidden_size": "wide"})
    assert str(caught.value) == (
        "transformers refuses this config of Qwen3ForCausalLM: "
        "Field 'hidden_size' expected int, got str (value: 'wide')"
    )
