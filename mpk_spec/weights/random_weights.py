"""Random weights, drawn so that bugs show.

Gains differ from 1 and from one another (a missing or swapped gain changes the answer), q and k gains are large
enough for attention to look at few positions (a wrong position or page changes it), biases are not zero, and
activations keep a scale near 1 through any number of layers.

Every value is a function of (seed, tensor name, element index) alone: the order of reading, slicing, the device and
chunking never change it. The formula is SplitMix64 on 64-bit integers followed by one exact conversion and at
most one rounding to float32, so CPU and CUDA agree to the last bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpk_spec.weights.checkpoint import known_name
from mpk_spec.weights.config import normalise_config, text_config

if TYPE_CHECKING:
    import torch

QK_SCALE = 1.8  # with q and k each scaled so, scores spread by about 3: a handful of positions get the weight
BIAS_STD = 0.5
TIED_LOGIT_STD = 4.0  # of a tied head: peaked like a trained model's, yet not one-hot
_CHUNK = {
    "cpu": 1 << 16,
    "cuda": 1 << 24,
    "meta": 1 << 24,
}  # elements drawn at once: what a core's cache holds; what fills a GPU
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to draw. Shapes as published: linear [out, in], stacked experts one tensor each."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "embedding" | "linear" | "qk_linear" | "gain" | "qk_gain" | "bias"; qk_linear: q/k without a norm
    offset: float = 0.0  # gains are stored minus this (Gemma stores gain - 1)


class RandomCheckpoint:
    """A `Checkpoint` without files. `config` may be sparse; it is completed like any other."""

    directory = None

    def __init__(
        self,
        seed: int,
        architecture: str,
        config: dict,
        tensors: Iterable[TensorSpec],
        dtype: str = "bf16",
        device: str | torch.device = "cpu",
    ):
        self.source, self.seed, self.architecture = f"random:{seed}", seed, architecture
        self.config = normalise_config(architecture, config)
        self._tensors = {t.name: t for t in tensors}
        self._dtype, self._device = _DTYPES.get(dtype, dtype), device

    def on(self, device: str | torch.device) -> RandomCheckpoint:
        """The same checkpoint, drawn on `device`: the same bits, on a GPU billions of them a second."""
        other = copy.copy(self)
        other._device = device
        return other

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[known_name(name, self._tensors, self.source)].shape)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        import torch

        spec = self._tensors[known_name(name, self._tensors, self.source)]
        ranges = _ranges(spec.shape, slices)
        out = torch.empty([len(r) for r in ranges], dtype=getattr(torch, self._dtype), device=self._device)
        flat, row = out.view(len(ranges[0]), -1), max(1, _count(ranges[1:]))
        columns = _offsets(spec.shape, ranges, self._device)
        stride = _count([range(n) for n in spec.shape[1:]])
        step = max(1, _CHUNK[out.device.type] // row)
        for start in range(0, len(ranges[0]), step):
            first, last = ranges[0].start + start, min(ranges[0].stop, ranges[0].start + start + step)
            rows = torch.arange(first, last, device=self._device)
            index = (rows * stride)[:, None] + columns[None, :]
            flat[start : start + len(rows)] = self._draw(spec, index).to(out.dtype)
        return out

    def _draw(self, spec: TensorSpec, index: torch.Tensor) -> torch.Tensor:
        bits = _splitmix64(index, _key(self.seed, spec.name))
        if spec.kind in ("gain", "qk_gain"):  # uniform between 0.5 and 1.5: spread 0.29, never 0
            gain = ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24 + 0.5
            return gain * (QK_SCALE if spec.kind == "qk_gain" else 1.0) - spec.offset
        # The sum of four 16-bit parts is bell-shaped; as an integer below 2^18 it is exact in float32.
        total = sum((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 0xFFFF
        return total.float() * (self._std(spec) / (4 * (2**32 - 1) / 12) ** 0.5)

    def _std(self, spec: TensorSpec) -> float:
        match spec.kind:
            case "embedding":
                tied = self.config.get("tie_word_embeddings") or text_config(self.config).get("tie_word_embeddings")
                # a tied table is the head too: rows of std 1 would make every answer one-hot and hide errors
                return min(1.0, TIED_LOGIT_STD * spec.shape[-1] ** -0.5) if tied else 1.0
            case "linear":
                return spec.shape[-1] ** -0.5
            case "qk_linear":
                return QK_SCALE * spec.shape[-1] ** -0.5
            case "bias":
                return BIAS_STD
        raise ValueError(f"TensorSpec of '{spec.name}' has an unknown kind '{spec.kind}'")


def _key(seed: int, name: str) -> int:
    """A signed 64-bit number from seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _splitmix64(index: torch.Tensor, key: int) -> torch.Tensor:
    """Mix int64 element indices into 64 random bits each; int64 arithmetic wraps on every device."""
    z = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        # torch shifts arithmetically; the mask makes the shift logical
        z ^= (z >> shift) & ((1 << (64 - shift)) - 1)
        z *= _signed(factor)
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def _ranges(shape: tuple[int, ...], slices: tuple[slice, ...] | None) -> list[range]:
    slices = tuple(slices or ())
    slices += (slice(None),) * (len(shape) - len(slices))
    return [range(n)[s] for n, s in zip(shape, slices, strict=True)]


def _count(ranges: list[range]) -> int:
    total = 1
    for r in ranges:
        total *= len(r)
    return total


def _offsets(shape: tuple[int, ...], ranges: list[range], device) -> torch.Tensor:
    """Flat offsets of all elements within one row of the leading dim."""
    import torch

    offsets, stride = torch.zeros(1, dtype=torch.int64), 1
    for n, r in zip(reversed(shape[1:]), reversed(ranges[1:]), strict=True):
        offsets = (torch.arange(r.start, r.stop)[:, None] * stride + offsets[None, :]).reshape(-1)
        stride *= n
    return offsets.to(device)
