"""A checkpoint over tensors already in memory, without copying them.

transformers keeps some weights in another form in memory than on disk: the experts of a layer as one stacked tensor,
gate and up joined, and newer module names. Its conversion mapping says how; read backwards it gives the published
names, as views of the same memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.weights.checkpoint import known_name
from mpk_spec.weights.config import empty_model, normalise_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel


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
        self._published = published_views(empty_model(architecture, self.config), _untied(state_dict))
        self._all = {**state_dict, **self._published}

    def names(self) -> list[str]:
        return list(self._published)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._all[known_name(name, self._all, self.source)].shape)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor = self._all[known_name(name, self._all, self.source)].detach()
        return tensor if slices is None else tensor[tuple(slices)]


def published_views(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that a published checkpoint of `model` (which may be on meta) uses. No copies.

    transformers' own way back (`revert_weight_conversion`) would copy joined tensors, so those are taken apart
    here, as views; what is left for it is renaming.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    stacks = [c for c in mapping if isinstance(c, WeightConverter) and _is_stack(c)]
    apart = {key: view for name, tensor in state_dict.items() for key, view in _unstack(name, tensor, stacks).items()}
    return revert_weight_conversion(model, apart)


def _is_stack(converter) -> bool:
    """Whether it stacks experts ("experts.*.up_proj" to one tensor), perhaps after joining parts along a dim."""
    kinds = [type(op).__name__ for op in converter.operations]
    return kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def _unstack(name: str, tensor: torch.Tensor, stacks: list) -> dict[str, torch.Tensor]:
    for converter in stacks:
        (target,) = converter.target_patterns
        if not name.endswith(target):
            continue
        dim = converter.operations[1].dim if len(converter.operations) == 2 else 1
        parts = tensor.chunk(len(converter.source_patterns), dim=dim)
        return {
            name.removesuffix(target) + source.replace("*", str(expert)): part[expert]
            for source, part in zip(converter.source_patterns, parts, strict=True)
            for expert in range(tensor.shape[0])
        }
    return {name: tensor}


def _untied(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without later names for the same memory: a tied head is published under the embedding's name alone."""
    kept: dict[tuple, str] = {}
    for name, tensor in state_dict.items():
        kept.setdefault((tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
    return {name: state_dict[name] for name in kept.values()}


def _json_keys(keys: dict) -> dict:
    """A config object's dict may hold a torch dtype; JSON has its name."""
    return {
        k: _json_keys(v) if isinstance(v, dict) else str(v).removeprefix("torch.") if k == "dtype" and v else v
        for k, v in keys.items()
    }
