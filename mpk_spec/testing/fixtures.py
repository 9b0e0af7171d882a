"""What checks share, made once: plans of a spec, random checkpoints, and the truth about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.schema import Spec
    from mpk_spec.testing.yardstick import Yardstick
    from mpk_spec.weights import Checkpoint

SEEDS = 2  # sequences of a check's few positions: long enough to cross a KV block
CONTEXT = 512  # positions of a sequence at most


class WeightsMissing(UserError):
    """A check needs a real checkpoint and none is on this machine: it is skipped."""


class Fixtures:
    """Plans, checkpoints and yardsticks of one spec; whoever asks second gets what the first got."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self._made: dict[tuple, object] = {}

    def plan(self, size: str, target: str = "h100", tp: int = 1) -> Plan:
        """A plan of one of the sizes, proved. Raises SpecError, UserError or PlanError."""
        from mpk_spec.planner import plan

        return self._once(("plan", size, target, tp), lambda: plan(self.spec, size=size, target=target, tp=tp))

    def checkpoint(self, size: str, weights: str) -> Checkpoint:
        """weights: `random:SEED`, or `checkpoint` for the size's own, which is never downloaded for a check."""
        from mpk_spec.runtime.random_model import random_checkpoint

        scheme, _, seed = weights.partition(":")
        if scheme == "random":
            return self._once(("weights", size, weights), lambda: random_checkpoint(self.spec, size, int(seed)))
        return self._once(("weights", size, weights), lambda: present_checkpoint(self.spec, size))

    def yardstick(self, size: str, weights: str, positions: int) -> Yardstick:
        from mpk_spec.testing.yardstick import Yardstick, sequences
        from mpk_spec.weights import text_config

        def make() -> Yardstick:
            checkpoint = self.checkpoint(size, weights)
            config = text_config(checkpoint.config)
            context = min(CONTEXT, config.get("max_position_embeddings") or CONTEXT)
            return Yardstick(checkpoint, sequences(config["vocab_size"], positions, SEEDS, context))

        return self._once(("yardstick", size, weights, positions), make)

    def _once(self, key: tuple, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def present_checkpoint(spec: Spec, size: str) -> Checkpoint:
    """The first source of a size that this machine has already. Raises WeightsMissing."""
    from mpk_spec.weights import SafetensorsCheckpoint, cache_entries

    sources = spec.sizes[size].weights
    cached = {entry.source: entry.path for entry in cache_entries()}
    for source in sources:
        scheme, _, rest = source.partition(":")
        folder = cached.get(source) or (_in_hub_cache(rest) if scheme == "hub" else None)
        if folder is not None:
            return SafetensorsCheckpoint(source, folder)
    said = ", ".join(sources) or "it names no source"
    raise WeightsMissing(f"the weights of size '{size}' are not on this machine ({said})")


def _in_hub_cache(repo: str):
    from pathlib import Path

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from mpk_spec.weights.hub import PATTERNS

    try:
        folder = Path(snapshot_download(repo, allow_patterns=PATTERNS, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None
