"""Tiny random Hugging Face models of the specs' architectures, and the reference run on their weights.

Models are made once per session. Everything is float32: inside `without_rounding` the reference must agree with
transformers to the last few bits.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
import yaml

from mpk_spec.ops.base import without_rounding
from mpk_spec.paths import specs_dir
from mpk_spec.planner import plan
from mpk_spec.planner.plan import Plan
from mpk_spec.reference.executor import Executor, StepInput
from mpk_spec.schema import Spec, load_spec
from mpk_spec.weights import StateDictCheckpoint, normalise_config

SPECS = ("qwen3", "llama3", "smollm2", "qwen2_5", "qwen3_moe", "gemma3")
WIDE = {"head_dim": 128, "intermediate_size": 1536}  # over which K can be split


@cache
def spec_of(name: str) -> Spec:
    return load_spec(name)


def child(name: str, size: dict[str, Any] | None = None, **sections: Any) -> Spec:
    """A spec that extends `name` with more sections and a size `tiny` changed by `size`, read as YAML."""
    parent = spec_of(name)
    text = yaml.safe_dump(
        {
            "spec": "v1",
            "extends": f"{name}.yaml",
            "name": "child",
            "model": {
                "architectures": [parent.model.architectures[0]],
                "prefixes": list(parent.model.prefixes),
                "ignore": list(parent.model.ignore),
            },
            "sizes": {"tiny": {**parent.sizes["tiny"].config, **(size or {})}},
            **sections,
        },
        sort_keys=False,
    )
    return load_spec(specs_dir() / "child.yaml", text=text)


def model_of(spec: Spec) -> tuple[Any, StateDictCheckpoint]:
    """The random model of the spec's size `tiny`, and its weights."""
    config = spec.sizes["tiny"].config
    return _model(spec.model.architectures[0], yaml.safe_dump(config))


@cache
def _model(architecture: str, config: str) -> tuple[Any, StateDictCheckpoint]:
    import transformers

    full = normalise_config(architecture, yaml.safe_load(config))
    made = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = made(made.config_class.from_dict(full)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:  # gains, which Gemma stores less 1, and biases
                parameter.copy_(noise * 0.3 + (0 if "Gemma" in architecture or "bias" in name else 1))
            else:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[-1] ** 0.5)
        for module in model.modules():
            if hasattr(module, "embed_scale"):  # the specs round it as transformers does in bf16
                module.embed_scale = module.embed_scale.bfloat16().float()
    model.tie_weights()
    return model, StateDictCheckpoint(model.state_dict(), architecture, full)


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 515, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def truth(spec: Spec, ids: list[int]) -> torch.Tensor:
    """What transformers computes: logits `[len(ids), vocab]`."""
    return _truth(spec.model.architectures[0], yaml.safe_dump(spec.sizes["tiny"].config), tuple(ids))


@cache
def _truth(architecture: str, config: str, ids: tuple[int, ...]) -> torch.Tensor:
    model, _ = _model(architecture, config)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def executor_of(spec: Spec, made: Plan | None = None, **request: Any) -> Executor:
    """The reference with the tiny model's weights; `request` as for `plan`."""
    made = made or planned(spec, **request)
    return Executor(made, model_of(spec)[1])


def planned(spec: Spec, **request: Any) -> Plan:
    return plan(spec, **{"size": "tiny", "target": "cpu", "context": 256, **request})


def step_input(ids: list[int], start: int, decode: bool, slot: int = 0) -> StepInput:
    positions = torch.arange(start, start + len(ids))
    return StepInput(torch.tensor(ids), positions, torch.full_like(positions, slot), decode)


def forced(executor: Executor, ids: list[int], prompt: int, shuffle: int | None = None, slot: int = 0) -> torch.Tensor:
    """Logits `[len(ids), vocab]`: the first `prompt` ids in prefill steps, the others one by one."""
    chunk, parts = executor.plan.steps["prefill"].tokens, []
    cuts = [*range(0, prompt, chunk), *range(prompt, len(ids) + 1)]
    with torch.inference_mode():
        for lo, hi in pairwise(cuts):
            kind = "decode" if lo >= prompt else "prefill"
            part = ids[lo:hi]
            executor.run(kind, step_input(part, lo, kind == "decode", slot), shuffle=shuffle)
            parts.append(executor.value("logits")[:, :515])
    return torch.cat(parts)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest value; NaN counts as infinite."""
    worst = ((got - want).abs().max() / want.abs().max()).item()
    return float("inf") if worst != worst else worst


def exact_error(spec: Spec, made: Plan | None = None, count: int = 44, prompt: int = 38, **request: Any) -> float:
    """How far the reference without roundings is from transformers, prefill and decode."""
    ids = tokens(count)
    with without_rounding():
        return error(forced(executor_of(spec, made, **request), ids, prompt), truth(spec, ids))
