"""Model configs in full: the keys that a checkpoint (or a spec's `sizes`) gives, completed by transformers.

A published config.json says only what differs from its class's defaults, in the spelling of its day. What a spec
calls `config` is what the transformers class makes of it: defaults filled in, `layer_types` and `rope_parameters`
spelled out. Asking transformers takes seconds, so the answer is kept as JSON in the cache.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.paths import cache_dir
from mpk_spec.weights.cache import cache_key, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_VOLATILE = ("transformers_version", "_name_or_path")  # say nothing about the model, and differ between machines


def normalise_config(architecture: str, keys: dict) -> dict:
    """The full config of `architecture` ("Qwen3ForCausalLM") with `keys` (as in config.json) set. JSON data.

    `keys` may be sparse; `model_type` is not needed. Cached by architecture, keys and transformers' version, so
    that a second call imports neither transformers nor torch. UserError for an unknown architecture or keys that the
    config class refuses.
    """
    identity = (architecture, {k: v for k, v in keys.items() if k not in _VOLATILE}, version("transformers"))
    path = cache_dir() / "configs" / f"{cache_key(architecture, *identity)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    full = _plain(json.loads(make_config(architecture, keys).to_json_string(use_diff=False)))
    full["architectures"] = [architecture]
    write_atomically(path, json.dumps(full, indent=1, sort_keys=True))
    return full


def make_config(architecture: str, keys: dict) -> PreTrainedConfig:
    """The transformers config object of `architecture` with `keys` set."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = model_type_of(architecture, keys.get("model_type"))
    given = {k: v for k, v in keys.items() if k not in ("model_type", *_VOLATILE)}
    try:
        return CONFIG_MAPPING[model_type].from_dict({**given, "architectures": [architecture]})
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"transformers refuses this config of {architecture}: {_cause(error)}") from error


def empty_model(architecture: str, keys: dict) -> PreTrainedModel:
    """The transformers model without weights (on the meta device): for its names and shapes."""
    import torch
    import transformers

    config = make_config(architecture, keys)
    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


def model_type_of(architecture: str, stated: str | None = None) -> str:
    """transformers' `model_type` for a class name. UserError if this transformers has no such class."""
    from transformers.models.auto import modeling_auto as auto

    known: dict[str, list[str]] = {}
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, names in table.items():
            for name in [names] if isinstance(names, str) else names:
                known.setdefault(name, []).append(model_type)
    if architecture not in known:
        hint = did_you_mean(architecture, known, "architectures")
        raise UserError(f"transformers {version('transformers')} has no language model '{architecture}'", hint)
    types = known[architecture]
    if stated in types:
        return stated
    # several types may share a class (internlm3 is a LlamaForCausalLM): prefer the one the class is named after
    return next((t for t in types if architecture.lower().startswith(t.replace("_", "") + "for")), types[0])


def text_config(config: dict) -> dict:
    """The part of a normalised config that describes the language model (all of it, or its `text_config`)."""
    return config if "num_hidden_layers" in config else config.get("text_config", config)


def _plain(data):
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items() if k not in _VOLATILE}
    return [_plain(v) for v in data] if isinstance(data, list) else data


def _cause(error: Exception) -> str:
    """The last line of a config class's report: the lines before it name its own validators."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition("Error: ")[2] or lines[-1] if lines else type(error).__name__
