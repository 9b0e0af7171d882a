"""One launch does prompt and answer, ends where it should, and goes on in the next turn."""

from __future__ import annotations

import json

import pytest
from gpu.models import TIMEOUT_S, ids_of
from tiny_specs import child

pytestmark = pytest.mark.gpu


class Twins:
    """A checkpoint in which the tokens 256 to 511 have the vectors of 0 to 255, or none a vector of numbers."""

    def __init__(self, checkpoint, nan: bool = False):
        self.checkpoint, self.nan = checkpoint, nan

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def on(self, device):
        return Twins(self.checkpoint.on(device), self.nan)

    def read(self, name, slices=None):
        whole = self.checkpoint.read(name).clone()
        if name.endswith("embed_tokens.weight"):
            whole[256:512] = whole[:256]
            if self.nan:
                whole[:] = float("nan")
        return whole if slices is None else whole[slices]


def test_prompt_and_512_tokens_are_one_launch(models, tmp_path):
    """The profiler (CUPTI) sees every kernel on the device, whoever launched it."""
    from torch.profiler import ProfilerActivity, profile

    backend = models.backend("qwen3", "0.6b")
    prompt = ids_of(backend, 100)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        made = list(backend.stream(prompt, max_new_tokens=512))
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(made) == 512
    assert [e["name"] for e in events if e.get("cat") == "kernel"] == ["megakernel"]


@pytest.mark.parametrize("size", ["tiny", "0.6b"])
def test_a_stop_within_a_step_and_a_second_turn(models, size):
    backend = models.backend("qwen3", size)
    prompt = ids_of(backend, 30)
    whole = list(backend.stream(prompt, max_new_tokens=60))
    backend.reset()
    stream = backend.stream(prompt, max_new_tokens=180)
    begun = [next(stream) for _ in range(3)]
    before = int(backend.memory.ring[0])
    stream.close()
    ended = int(backend.memory.ring[0])
    assert begun == whole[:3]
    if size == "0.6b":  # 50 us a token is too fast for this clock
        assert ended <= before + 3
    cached = len(backend._cached)
    assert cached >= len(prompt)
    second = prompt + whole[:20]
    assert list(backend.stream(second, max_new_tokens=40)) == whole[20:60]
    assert backend._cached[: len(second)] == second


@pytest.mark.parametrize("fused", [True, False])
def test_the_lowest_id_among_equals(models, fused):
    """Every logit has its equal in another task. In steps of one token, and in those of several that end a prompt."""
    from mpk_spec.planner import plan
    from mpk_spec.runtime.cuda_backend import CudaBackend

    made = models.plans["qwen3", "tiny"]
    if not fused:
        apart = child("qwen3", fusions={"head": {"of": ["h", "logits"]}})
        made = plan(apart, size="tiny", target=models.target, context=256)
    assert len(made.steps["decode"].templates[-1].groups) == (2 if fused else 3)
    backend = CudaBackend(made, Twins(models.checkpoint("qwen3", "tiny")))
    backend.launcher.timeout_s = TIMEOUT_S
    sampled = []
    for length in (1, 5, 20):
        prompt = ids_of(backend, length, salt=length)
        backend.reset()
        answer = list(backend.stream(prompt, max_new_tokens=60))
        logits = backend.logits(prompt + answer)[length - 1 : -1]
        best = logits == logits.max(-1, keepdim=True).values
        assert (best.sum(-1) == 2).sum() > 30  # equals, of most steps
        assert answer == best.int().argmax(-1).tolist()  # the first of them
        sampled += answer
    assert not set(sampled) & set(range(256, 512))


def test_logits_that_are_no_numbers_are_reported(models):
    from mpk_spec.errors import UserError
    from mpk_spec.runtime.cuda_backend import CudaBackend

    backend = CudaBackend(models.plans["qwen3", "tiny"], Twins(models.checkpoint("qwen3", "tiny"), nan=True))
    backend.launcher.timeout_s = TIMEOUT_S
    for length in (1, 20):
        backend.reset()
        with pytest.raises(UserError, match="NaN"):
            list(backend.stream(list(range(1, 1 + length)), max_new_tokens=5))


def test_stop_ids_end_the_answer(models):
    backend = models.backend("qwen3", "tiny")
    prompt = ids_of(backend, 20, salt=3)
    whole = list(backend.stream(prompt, max_new_tokens=40))
    last = whole[17]
    expected = whole[: whole.index(last) + 1]
    backend.reset()
    assert list(backend.stream(prompt, max_new_tokens=40, stop=frozenset({last, 10**6}))) == expected


def test_a_full_context_ends_the_answer(models):
    backend = models.backend("qwen3", "tiny")
    prompt = ids_of(backend, backend.context - 6)
    assert len(list(backend.stream(prompt, max_new_tokens=100))) == 7  # the last one is not put into the cache
    backend.reset()
    full = ids_of(backend, backend.context)
    assert len(list(backend.stream(full, max_new_tokens=100))) == 1


@pytest.mark.parametrize("start", [2**31, 2**32])
def test_counters_may_pass_the_ends_of_their_numbers(models, start):
    """Every event, and the count of steps, passes 2^31 and 2^32 in some run."""
    backend = models.backend("qwen3", "tiny")
    prompt = ids_of(backend, 20)
    expected = list(backend.stream(prompt, max_new_tokens=12))
    totals = {total for row in backend.emitted.programs.event_total for total in row if total}
    try:
        for total in sorted(totals):
            backend.reset()
            backend.launcher.reset_events(start // total - 6)
            assert list(backend.stream(prompt, max_new_tokens=12)) == expected, total
    finally:
        backend.launcher.reset_events()


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(models, monkeypatch):
    import torch

    from mpk_spec.errors import UserError
    from mpk_spec.runtime import cuda_weights
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.cuda_device import SPARE_BYTES

    backend = models.backend("qwen3", "0.6b")
    layout, plan = backend.emitted.layout, backend.plan
    fixed = layout.weight_bytes + sum(plan.arena_bytes.values()) + SPARE_BYTES
    monkeypatch.setattr(cuda_weights, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    for room, hint in ((layout.cache_bytes // 2, "a context of 512 fits: -c 512"), (-1, "a smaller model would fit")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, room=room: (fixed + room, fixed + room))
        with pytest.raises(UserError) as error:
            CudaBackend(plan, models.checkpoint("qwen3", "0.6b"))
        assert error.value.hint == hint
