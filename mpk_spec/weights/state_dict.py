"""A checkpoint over tensors already in memory, without copying them.

transformers keeps some weights in another form in memory than on disk: the experts of a layer as one stacked tensor,
gate and up joined, and newer module names. Its conversion mapping says how; read backwards it gives the published
names, as views of the same memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.weights.checkpoint import known_name
from mpk_spec.weights.config import model_type_of, normalise_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class StateDictCheckpoint:
    """`state_dict` as `model.state_dict()` gives it. `config`: a dict, or the model's config object.

    `names()` are the published names; a tied tensor that shares the memory of another is not listed twice. `read`
    and `shape` also take the names of the state dict itself. Reads return views, never copies.
    """

    source = "tensors in memory"

    def __init__(
        self, state_dict: Mapping[str, torch.Tensor], architecture: str, config, directory: Path | None = None
    ):
        keys = config if isinstance(config, dict) else config.to_dict()
        self.architecture, self.directory = architecture, directory
        self.config = normalise_config(architecture, _json_keys(keys))
        self._published = _untied(published_views(architecture, state_dict))
        self._all = {**state_dict, **self._published}

    def names(self) -> list[str]:
        return list(self._published)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._all[known_name(name, self._all, self.source)].shape)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor = self._all[known_name(name, self._all, self.source)].detach()
        return tensor if slices is None else tensor[tuple(slices)]


def published_views(architecture: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that a published checkpoint of `architecture` uses."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    found = get_checkpoint_conversion_mapping(architecture)
    if found is None:
        found = get_checkpoint_conversion_mapping(model_type_of(architecture)) or []
    converters = [c for c in found if isinstance(c, WeightConverter) and _is_stack(c)]
    renamings = [c.reverse_transform() for c in reversed(found) if not isinstance(c, (WeightConverter, PrefixChange))]
    views = {}
    for name, tensor in state_dict.items():
        for key, view in _unstack(name, tensor, converters).items():
            for renaming in renamings:
                key = renaming.rename_source_key(key)[0]
            views[key] = view
    return views


def _is_stack(converter) -> bool:
    """Whether it stacks experts ("experts.*.up_proj" to one tensor), perhaps after joining parts along a dim."""
    kinds = [type(op).__name__ for op in converter.operations]
    return kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def _unstack(name: str, tensor: torch.Tensor, converters: list) -> dict[str, torch.Tensor]:
    for converter in converters:
        (target,) = converter.target_patterns
        found = re.search(re.escape(target.rstrip("$")) + "$", name)
        if not found:
            continue
        sources = converter._original_source_patterns
        join = converter.operations[1].dim if len(converter.operations) == 2 else 1
        parts = tensor.chunk(len(sources), dim=join)
        return {
            name[: found.start()] + source.lstrip("^").rstrip("$").replace("*", str(e)): part[e]
            for source, part in zip(sources, parts, strict=True)
            for e in range(tensor.shape[0])
        }
    return {name: tensor}


def _untied(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen, kept = set(), {}
    for name, tensor in views.items():
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.device.type == "meta" or memory not in seen:
            kept[name] = tensor
        seen.add(memory)
    return kept


def _json_keys(keys: dict) -> dict:
    """A config object's dict may hold a torch dtype; JSON has its name."""
    return {
        k: _json_keys(v) if isinstance(v, dict) else str(v).removeprefix("torch.") if k == "dtype" and v else v
        for k, v in keys.items()
    }
