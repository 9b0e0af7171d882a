"""The same checkpoint as a transformers model and tokenizer: the truth that ours is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.weights.config import make_config, text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mpk_spec.weights.checkpoint import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them holds the vocabulary


def load_hf_model(
    checkpoint: Checkpoint, dtype: str = "float32", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The transformers model of `checkpoint.architecture`, in eval mode, with the checkpoint's weights.

    UserError names the weights that the checkpoint lacks or holds in another shape; none is ever left at random.
    """
    import torch
    import transformers

    model_class = getattr(transformers, checkpoint.architecture)
    state = {name: checkpoint.read(name) for name in checkpoint.names()}
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would warn about is an error here, and said below
    try:
        model, info = model_class.from_pretrained(
            None,
            config=make_config(checkpoint.architecture, checkpoint.config),
            state_dict=state,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"transformers cannot load {checkpoint.source}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(said)
    wrong = sorted(f"{name} is {list(have)}, not {list(want)}" for name, have, want in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{checkpoint.source} does not fit its config: {_some(wrong)}")
    lost = sorted(info["missing_keys"])
    if lost:
        raise UserError(f"{checkpoint.source} lacks {len(lost)} weights of {checkpoint.architecture}: {_some(lost)}")
    return model.to(device).eval()


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, chat template included. UserError where there is none."""
    from transformers import AutoTokenizer

    if checkpoint.directory is None:
        raise UserError(f"{checkpoint.source} has no tokenizer", "text needs a checkpoint folder, hub id or GGUF file")
    if not any((Path(checkpoint.directory) / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{checkpoint.directory} has no tokenizer: none of {', '.join(TOKENIZERS)}")
    try:
        return AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{checkpoint.directory} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def eos_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """Every token id that ends an answer: of the generation config, the config and the tokenizer."""
    found = [checkpoint.config.get("eos_token_id"), text_config(checkpoint.config).get("eos_token_id")]
    if checkpoint.directory is not None:
        path = Path(checkpoint.directory) / "generation_config.json"
        if path.is_file():
            found.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
        found.append(load_tokenizer(checkpoint).eos_token_id)
    ids = [i for one in found for i in (one if isinstance(one, list) else [one])]
    return frozenset(i for i in ids if i is not None)
