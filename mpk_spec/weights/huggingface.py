"""The same checkpoint as a transformers model and tokenizer: the truth that ours is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError
from mpk_spec.weights.checkpoint import on_device
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
    checkpoint = on_device(checkpoint, device)
    state = {name: checkpoint.read(name) for name in checkpoint.names()}
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would warn about is an error here, and said below
    try:
        model, info = model_class.from_pretrained(
            None,
            config=make_config(checkpoint.architecture, checkpoint.config),
            state_dict=state,
            dtype=getattr(torch, dtype),
            device_map={"": device},  # straight to where it runs: no second copy in the host's memory
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
    return model.eval()


def stream_hf_model(checkpoint: Checkpoint, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """The same model without its weights in memory: each is read on `device` when its module runs, and dropped after.

    For models that do not fit; a call reads the whole checkpoint once, so call it with all sequences in one batch.
    UserError for a class that keeps its weights in another form than the checkpoint (stacked experts).
    """
    import torch
    import transformers
    from accelerate import cpu_offload, init_empty_weights

    config = make_config(checkpoint.architecture, checkpoint.config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # not .to(dtype), which would round the rope's frequencies too
    try:
        with init_empty_weights(include_buffers=False):
            model = getattr(transformers, checkpoint.architecture)(config).eval()
    finally:
        torch.set_default_dtype(before)
    source = _Streamed(on_device(checkpoint, device), model)
    if source.lost:
        raise UserError(
            f"{checkpoint.architecture} cannot be run layer by layer: transformers keeps {_some(source.lost)} "
            "in another form than the checkpoint",
            "a smaller size fits as a whole",
        )
    return cpu_offload(model, execution_device=torch.device(device), state_dict=source)


class _Streamed(Mapping):
    """A model's parameters, read from a checkpoint each time that one is asked for."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel):
        known, tied = set(checkpoint.names()), _tied_names(model)
        names = [name for name, _ in model.named_parameters()]
        self.checkpoint = checkpoint
        self.names = {n: n if n in known or n not in tied else tied[n] for n in names}
        self.lost = sorted(n for n, source in self.names.items() if source not in known)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.names[name])

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The head's weight and the table that it is, where the config ties them."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    modules = {id(module): name for name, module in model.named_modules()}
    head, table = (modules[id(m)] for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    return {f"{head}.weight": f"{table}.weight"}


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
