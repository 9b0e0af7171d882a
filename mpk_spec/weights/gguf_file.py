"""GGUF files, converted once to an ordinary Hugging Face folder in the cache.

What llama.cpp transformed is put back, so that the result equals the same weights from safetensors:

* Llama's q and k rows come in pairs (2i, 2i+1) that rotate together; Hugging Face rotates (i, i + head_dim/2).
* Gemma's norm gains are stored as 1 + w.
* The experts of a layer are stored as one tensor; published checkpoints have one per expert.

Files whose matrices are all float32 stay float32. Everything else is stored as bf16, which is what megakernels
compute with: blocks (Q4_1, Q8_0, ...) are unpacked in float32 and rounded once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.weights.cache import NOTE, build_once, cache_key, need_space, surroundings
from mpk_spec.weights.checkpoint import INDEX, SINGLE
from mpk_spec.weights.config import empty_model, make_config
from mpk_spec.weights.gguf_config import config_keys
from mpk_spec.weights.state_dict import published_views

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

    from mpk_spec.progress import Progress

CONVERTER = 2  # raise when the converted folders change: old ones are then made anew
SHARD_BYTES = 4_000_000_000
# llama.cpp's names of pre-tokenizers that split every digit off; transformers builds plain GPT-2 splitting for them
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_folder(path: Path, progress: Progress) -> Path:
    """The converted folder of one GGUF file; converts on first use."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with surroundings(f"read {path}"):
        stat = path.stat()
    key = cache_key(path.stem, "gguf", str(path.resolve()), stat.st_size, stat.st_mtime_ns, CONVERTER)
    return build_once(key, lambda folder: convert_gguf(path, folder, str(path), progress), progress)


def convert_gguf(path: Path, folder: Path, source: str, progress: Progress) -> None:
    """Write config, generation config, weights, tokenizer and a note of `source` into the empty `folder`."""
    progress("reading", 0, 1)
    reader = _open(path)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.endswith(_LONG)}
    if meta.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {meta['split.count']} parts", "join them with llama.cpp's llama-gguf-split")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture, keys = config_keys(meta, tensors, path)
    progress("reading", 1, 1)
    dtype = _write_weights(path, folder, meta, tensors, architecture, keys, progress)
    _write_configs(folder, architecture, keys, dtype)
    progress("tokenizer", 0, 1)
    _write_tokenizer(path, folder, meta)
    (folder / NOTE).write_text(json.dumps({"source": source, "gguf": path.name, "converter": CONVERTER}))
    progress("tokenizer", 1, 1)


_LONG = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        with surroundings(f"read {path}"):
            return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is no GGUF file, or is cut short: {error}", "fetch it again") from error


def _write_configs(folder: Path, architecture: str, keys: dict, dtype: str) -> None:
    from transformers import GenerationConfig

    make_config(architecture, {**keys, "dtype": dtype}).save_pretrained(folder)
    ids = {key: keys[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)


def _write_tokenizer(path: Path, folder: Path, meta: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a tokenizer that transformers cannot rebuild: {error}") from error
    # what the file says outright; transformers before 5.23 mixes up bos and eos, and eats spaces when it decodes
    for token, key in _SPECIAL_TOKENS.items():
        if f"tokenizer.ggml.{key}_token_id" in meta:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(meta[f"tokenizer.ggml.{key}_token_id"]))
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    tokenizer.clean_up_tokenization_spaces = False
    if meta.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        from tokenizers import pre_tokenizers as pre

        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.save_pretrained(folder)


def _write_weights(path, folder, meta, tensors, architecture, keys, progress) -> str:
    """Returns the dtype of the weights, as torch spells it."""
    import torch
    from safetensors.torch import save_file

    names = _hf_names(architecture, keys)
    sources = _sources(path, meta["general.architecture"], names, tensors, keys)
    dtype = torch.float32 if _all_float32(tensors) else torch.bfloat16
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in names.items()}
    need_space(folder, sum(sizes.values()))
    shards = _shards(sizes)
    weight_map, done = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        converted = {}
        for name in shard:
            converted[name] = _tensor(path, meta["general.architecture"], name, *sources[name], keys).to(dtype)
            if converted[name].shape != names[name]:
                raise UserError(f"{path} holds {name} of shape {list(converted[name].shape)}, not {list(names[name])}")
            weight_map[name], done = file, done + 1
            progress("converting", done, len(names))
        _save(save_file, converted, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return str(dtype).removeprefix("torch.")


def _save(save_file, tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it reports a full disk in its own words
        raise UserError(f"cannot write {path}: {error}") from error


def _hf_names(architecture: str, keys: dict) -> dict[str, torch.Size]:
    """Published name and shape of every tensor that the model needs."""
    model = empty_model(architecture, keys)
    shapes = {name: tensor.shape for name, tensor in published_views(model, model.state_dict()).items()}
    if keys["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    return shapes


_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(\w+)")


def _sources(path, arch: str, names, tensors, keys) -> dict[str, tuple[ReaderTensor, int | None]]:
    """Each published name's GGUF tensor, and which expert of it."""
    import gguf

    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(number, keys["num_hidden_layers"])
    found: dict[str, tuple[ReaderTensor, int | None]] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        expert = _EXPERT.fullmatch(stem)
        theirs = f"{table.get_name(expert[1] + expert[3] if expert else stem)}.{suffix}"
        if theirs not in tensors:
            raise UserError(f"{path} lacks the tensor {theirs} ({name})", "the file may be cut short or of a new kind")
        found[name] = (tensors[theirs], int(expert[2]) if expert else None)
    unread = sorted(set(tensors) - {tensor.name for tensor, _ in found.values()} - {"rope_freqs.weight"})
    if unread:
        raise UserError(f"{path} holds tensors that are not understood: {', '.join(unread[:4])}")
    return found


def _tensor(path, arch: str, name: str, tensor: ReaderTensor, expert: int | None, keys: dict) -> torch.Tensor:
    """One tensor in float32, unpacked and put back into Hugging Face's layout."""
    import torch
    from gguf import dequantize

    data = tensor.data if expert is None else tensor.data[expert]
    try:
        values = torch.from_numpy(dequantize(data, tensor.tensor_type).copy())
    except NotImplementedError as error:
        raise UserError(f"{path} holds {tensor.name} as {tensor.tensor_type.name}: {error}") from error
    if arch == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
        return _unpermute(values, keys["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
    if arch == "gemma3" and name.endswith("norm.weight"):
        return values - 1
    return values


def _unpermute(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from [pair, which of the two] to [which of the two, pair]."""
    split = values.reshape(heads, -1, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _all_float32(tensors: dict[str, ReaderTensor]) -> bool:
    return all(t.tensor_type.name == "F32" for t in tensors.values() if len(t.shape) > 1)


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards
