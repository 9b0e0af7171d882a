"""The models that the GPU tests share: each planned, compiled and loaded once a session."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpk_spec.errors import UserError
from mpk_spec.runtime.cuda_probe import CONFORM, DEFECTS, DELAYS

PROBED = (CONFORM, DELAYS, DEFECTS)
SPECS = ("qwen3", "smollm2", "llama3", "qwen2_5")
CONTEXT = {"tiny": 256, "0.6b": 1024}
TIMEOUT_S = 2.0
BUILDS = [("qwen3", size, probed) for size in CONTEXT for probed in (False, True)]
BUILDS += [(spec, "tiny", False) for spec in SPECS[1:]]


class Models:
    """Backends by spec, size and build; compiled together when the first is asked for."""

    def __init__(self, target: str):
        from mpk_spec.emit.source import emit
        from mpk_spec.planner import plan
        from mpk_spec.schema import load_spec

        self.target = target
        self.plans = {
            (spec, size): plan(load_spec(spec), size=size, target=target, context=CONTEXT[size])
            for spec, size in dict.fromkeys((spec, size) for spec, size, _ in BUILDS)
        }
        sources = {key: emit(made).source for key, made in self.plans.items()}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda build: self._compile(sources, *build), BUILDS))
        self._checkpoints, self._backends, self._yardsticks = {}, {}, {}

    def _compile(self, sources: dict, spec: str, size: str, probed: bool) -> None:
        from mpk_spec.emit.compiler import compile_kernel
        from mpk_spec.planner.targets import find_target

        defines = PROBED if probed else ()
        compile_kernel(f"{spec}-{size}", sources[spec, size], find_target(self.target).arch, defines)

    def checkpoint(self, spec: str, size: str):
        from mpk_spec.runtime.random_model import checkpoint_of_plan

        if (spec, size) not in self._checkpoints:
            self._checkpoints[spec, size] = checkpoint_of_plan(self.plans[spec, size], 0)
        return self._checkpoints[spec, size]

    def backend(self, spec: str, size: str, probed: bool = False):
        from mpk_spec.runtime.cuda_backend import CudaBackend

        key = (spec, size, probed)
        if key not in self._backends:
            defines = PROBED if probed else ()
            made = CudaBackend(self.plans[spec, size], self.checkpoint(spec, size), defines=defines)
            made.launcher.timeout_s = TIMEOUT_S
            self._backends[key] = made
        backend = self._backends[key]
        backend.reset()
        return backend

    def yardstick(self, spec: str, size: str):
        """Positions enough for the verdict: 2048 of the tiny models, 512 of the others."""
        from mpk_spec.testing.yardstick import Yardstick, sequences

        if (spec, size) not in self._yardsticks:
            checkpoint = self.checkpoint(spec, size)
            count, length = (8, 256) if size == "tiny" else (2, 256)
            ids = sequences(checkpoint.config["vocab_size"], count * length, count, length)
            self._yardsticks[spec, size] = Yardstick(checkpoint, ids)
        return self._yardsticks[spec, size]


def ids_of(backend, count: int, salt: int = 0) -> list[int]:
    return [(17 + 31 * n + 7 * salt + n * n * 13) % backend.vocab_size for n in range(count)]


def check_lost_signal(backend, prompt: list[int]) -> None:
    """That an answer ends in time, and the report names who waits in vain for a signal of gate_up in stage 1."""
    backend.reset()
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        list(backend.stream(prompt, max_new_tokens=5))
    assert time.perf_counter() - began < backend.launcher.timeout_s + 3
    said = error.value.message
    assert said.startswith("the kernel was aborted: SM ")
    report = re.search(r"stage 1 \(.*'down_add': event 'gate_up\.done.* of stage 1 stands at (\d+), wanted (\d+)", said)
    assert report and int(report[1]) == int(report[2]) - 1, said
