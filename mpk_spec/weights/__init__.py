"""Weights: named tensors and a config from a folder, a hub id, a GGUF file, a wheel, memory, or a seed.

Importing this package imports neither torch nor transformers; the functions that need them do.
"""

from __future__ import annotations

from mpk_spec.weights.cache import CacheEntry, cache_entries, remove_cache_entry
from mpk_spec.weights.checkpoint import Checkpoint, SafetensorsCheckpoint, on_device
from mpk_spec.weights.config import normalise_config, text_config
from mpk_spec.weights.huggingface import eos_ids, load_hf_model, load_tokenizer, stream_hf_model
from mpk_spec.weights.random_weights import RandomCheckpoint, TensorSpec
from mpk_spec.weights.sources import open_checkpoint
from mpk_spec.weights.state_dict import StateDictCheckpoint

__all__ = [
    "CacheEntry",
    "Checkpoint",
    "RandomCheckpoint",
    "SafetensorsCheckpoint",
    "StateDictCheckpoint",
    "TensorSpec",
    "cache_entries",
    "eos_ids",
    "load_hf_model",
    "load_tokenizer",
    "normalise_config",
    "on_device",
    "open_checkpoint",
    "remove_cache_entry",
    "stream_hf_model",
    "text_config",
]
