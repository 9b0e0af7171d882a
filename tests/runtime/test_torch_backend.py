from __future__ import annotations

import pytest
import torch

from mpk_spec.errors import UserError
from mpk_spec.runtime.torch_backend import TorchBackend

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 256,
}


def make_model(architecture: str):
    import transformers

    torch.manual_seed(0)
    if architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, initializer_range=0.5))
    else:  # alternates windows of 8 with full attention
        config = transformers.Gemma3TextConfig(
            **SHAPE, sliding_window=8, sliding_window_pattern=2, initializer_range=0.5
        )
        model = transformers.Gemma3ForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    return make_model(request.param)


def greedy(model, ids: list[int], count: int) -> list[int]:
    """The same without a cache: every step sees everything."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture
def counted(model):
    """A backend and the list of how many tokens each forward pass computed."""
    passes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield TorchBackend(model, context=64), passes
    hook.remove()


def test_it_continues_as_the_model_without_a_cache(model):
    assert list(TorchBackend(model, 64).stream([3, 1, 4], max_new_tokens=20)) == greedy(model, [3, 1, 4], 20)


def test_a_second_turn_computes_only_what_is_new(counted, model):
    backend, passes = counted
    first = list(backend.stream([3, 1, 4], max_new_tokens=12))
    talk = [3, 1, 4, *first, 5, 9]
    passes.clear()
    again = list(backend.stream(talk, max_new_tokens=3))
    assert passes == [3, 1, 1]  # the last answer's last token was never fed, then the two new ones
    assert again == greedy(model, talk, 3)


def test_a_turn_that_differs_reuses_what_it_shares(counted, model):
    backend, passes = counted
    list(backend.stream([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], max_new_tokens=5))
    passes.clear()
    other = [3, 1, 4, 1, 5, 9, 2, 6, 7, 7]
    assert list(backend.stream(other, max_new_tokens=5)) == greedy(model, other, 5)
    assert passes[0] == 2


def test_the_same_prompt_again_gives_the_same_answer(counted, model):
    backend, passes = counted
    first = list(backend.stream([3, 1, 4], max_new_tokens=6))
    passes.clear()
    assert list(backend.stream([3, 1, 4], max_new_tokens=6)) == first
    assert passes[0] == 1


def test_a_closed_stream_leaves_a_cache_that_is_right(model):
    backend = TorchBackend(model, 64)
    stream = backend.stream([3, 1, 4], max_new_tokens=50)
    got = [next(stream) for _ in range(5)]
    stream.close()
    assert list(backend.stream([3, 1, 4, *got[:3], 7], max_new_tokens=6)) == greedy(model, [3, 1, 4, *got[:3], 7], 6)


def test_a_step_that_breaks_leaves_no_half_filled_cache(model):
    backend = TorchBackend(model, 64)
    list(backend.stream([3, 1, 4], max_new_tokens=4))

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(backend.stream([3, 1, 4, 9], max_new_tokens=4))
    hook.remove()
    assert list(backend.stream([3, 1, 4, 9], max_new_tokens=6)) == greedy(model, [3, 1, 4, 9], 6)


def test_it_stops_after_a_stop_token_which_it_yields(model):
    expected = greedy(model, [3, 1, 4], 20)
    stop = expected[4]
    got = list(TorchBackend(model, 64).stream([3, 1, 4], max_new_tokens=20, stop=frozenset([stop])))
    assert got == expected[: expected.index(stop) + 1]


def test_it_stops_where_the_context_is_full(model):
    assert len(list(TorchBackend(model, 10).stream([3, 1, 4], max_new_tokens=20))) == 7


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "the prompt is empty"), (10, "the conversation has 10 tokens and the context holds 10")],
)
def test_prompts_that_cannot_be_continued_are_refused(model, length, message):
    with pytest.raises(UserError, match=message):
        list(TorchBackend(model, 10).stream([1] * length, max_new_tokens=1))


def test_logits_are_those_of_the_model_at_every_position(model):
    backend = TorchBackend(model, 64)
    ids = [3, 1, 4, 1, 5]
    list(backend.stream(ids[:2], max_new_tokens=2))
    got = backend.logits(ids)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].float()
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_the_cache_goes_by_either_of_its_names():
    """A name that forward does not know would vanish in its further arguments, and every step would see no past."""
    from types import SimpleNamespace

    from mpk_spec.runtime.torch_backend import cache_name

    assert cache_name(SimpleNamespace(forward=lambda input_ids, cache=None, **more: None)) == "cache"
    assert cache_name(SimpleNamespace(forward=lambda input_ids, past_key_values=None: None)) == "past_key_values"
