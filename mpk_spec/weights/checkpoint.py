"""What a checkpoint is to the rest of the project, and the usual kind: a Hugging Face folder with safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mpk_spec.errors import UserError, did_you_mean
from mpk_spec.weights.cache import surroundings
from mpk_spec.weights.config import normalise_config

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint(Protocol):
    """Named tensors and the config that goes with them."""

    source: str  # as the user wrote it
    architecture: str  # the transformers class, "LlamaForCausalLM"
    config: dict  # JSON data, as `normalise_config` completes it; multimodal ones keep their nested text_config
    directory: Path | None  # a folder with config.json and tokenizer files; None where there is none (random)

    def names(self) -> list[str]:
        """Names of all tensors as published, in a fixed order."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor, or the part that `slices` (one per leading dim, step 1) names; only that part is read."""


def on_device(checkpoint: Checkpoint, device: str | torch.device) -> Checkpoint:
    """The checkpoint for a reader that puts its tensors on `device`: random ones are drawn there, files stay files."""
    return checkpoint.on(device) if hasattr(checkpoint, "on") else checkpoint


class SafetensorsCheckpoint:
    """A folder with config.json and model.safetensors, or shards listed in model.safetensors.index.json.

    Opening reads config and headers only; it fails with UserError if a file is missing, truncated or corrupt.
    """

    def __init__(self, source: str, directory: Path):
        self.source, self.directory = source, directory
        keys = _read_json(directory / "config.json", f"{directory} is no checkpoint folder: it has no config.json")
        if not isinstance(keys, dict):
            raise UserError(f"{directory / 'config.json'} is corrupt: not a JSON object")
        self.architecture = _architecture(directory, keys)
        self.config = normalise_config(self.architecture, keys)
        self._shard_of, self._shapes = _headers(directory)

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[known_name(name, self._shapes, self.source)]

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        shard = self._shard_of[known_name(name, self._shapes, self.source)]
        try:
            with surroundings(f"read {shard}"), safe_open(shard, framework="pt") as file:
                if slices is None or not self._shapes[name]:
                    return file.get_tensor(name)
                return file.get_slice(name)[tuple(slices)]
        except SafetensorError as error:
            raise _corrupt(shard, error) from error


def known_name(name: str, names, source: str) -> str:
    if name not in names:
        raise UserError(f"{source} has no tensor '{name}'", did_you_mean(name, names, "tensors"))
    return name


def _architecture(directory: Path, keys: dict) -> str:
    stated = keys.get("architectures")
    if isinstance(stated, list) and stated and isinstance(stated[0], str):
        return stated[0]
    raise UserError(
        f"{directory / 'config.json'} does not name its architecture",
        'it should hold a line like "architectures": ["LlamaForCausalLM"]',
    )


def _headers(directory: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """Shard and shape of every tensor."""
    shard_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    listed = _listed_tensors(directory)
    shards = sorted(set(listed.values())) if listed else [SINGLE]
    missing = [name for name in shards if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of its {len(shards)} weight files: {', '.join(missing[:4])}",
            "the download may be incomplete: fetch it again",
        )
    for name in shards:
        for tensor, shape in _shard_shapes(directory / name).items():
            shard_of[tensor], shapes[tensor] = directory / name, shape
    lost = sorted(set(listed or {}) - set(shapes))
    if lost:
        raise UserError(f"{directory / INDEX} lists {len(lost)} tensors that no shard holds: {', '.join(lost[:4])}")
    return shard_of, shapes


def _listed_tensors(directory: Path) -> dict[str, str] | None:
    """The index's tensor -> shard map; None where one file holds all."""
    if (directory / INDEX).is_file():
        index = _read_json(directory / INDEX, "")
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{directory / INDEX} is corrupt: it has no weight_map")
        return listed
    if (directory / SINGLE).is_file():
        return None
    raise UserError(f"{directory} holds no safetensors weights ({SINGLE} or {INDEX})", _weights_hint(directory))


def _weights_hint(directory: Path) -> str | None:
    if any(directory.glob("*.bin")):
        return "only pickled *.bin weights are there: load them with transformers and save_pretrained() once"
    ggufs = sorted(directory.glob("*.gguf"))
    return f"there is a GGUF file: use {ggufs[0]}" if ggufs else None


def _shard_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        # the numpy view of a file gives names and shapes of every dtype without importing torch
        with surroundings(f"read {path}"), safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is corrupt or cut short: {error}", "fetch or convert it again")


def _read_json(path: Path, if_missing: str):
    if not path.is_file():
        ggufs = sorted(path.parent.glob("*.gguf"))
        raise UserError(if_missing, f"there is a GGUF file: use {ggufs[0]}" if ggufs else None)
    with surroundings(f"read {path}"):
        text = path.read_bytes()
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is corrupt: {error}") from error
