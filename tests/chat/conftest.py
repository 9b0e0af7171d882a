"""A tokenizer of bytes and a backend that says what it is told: chats without a model."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import pytest

from mpk_spec.chat.session import ChatSession

STOP = 256


class ByteTokenizer:
    """One id per byte, so that every character beyond ASCII is spread over several tokens. 256 ends a message."""

    chat_template = "{% if enable_thinking %}...{% endif %}"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        ids: list[int] = []
        for part in text.split("<end>"):
            ids += [*part.encode(), STOP]
        return {"input_ids": ids[:-1]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(i for i in ids if i != STOP).decode(errors="replace")

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking=None) -> str:
        text = "".join(f"{m['role']}:{m['content']}<end>" for m in messages) + "assistant:"
        return text + {None: "", True: "<think>\n", False: "<think>\n\n</think>\n\n"}[enable_thinking]


class ScriptedBackend:
    """Answers with the given texts, one byte per token, and notes every prompt that it saw."""

    name, description, vocab_size = "fake", "fake backend", 257

    def __init__(self, replies: list[str | bytes], context: int = 1000):
        self.replies, self.context = list(replies), context
        self.prompts: list[str] = []
        self.resets = 0
        self.during = lambda position: None  # called before each token

    def stream(self, ids, *, max_new_tokens, stop=frozenset()) -> Iterator[int]:
        self.prompts.append(bytes(i for i in ids if i != STOP).decode())
        reply = self.replies.pop(0)
        tokens = [*(reply.encode() if isinstance(reply, str) else reply), STOP]
        for position, token in enumerate(tokens[:max_new_tokens]):
            self.during(position)
            yield token
            if token in stop:
                return

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        pass


@pytest.fixture
def make_session():
    def make(*replies: str | bytes, context: int = 1000, template: str | None = ByteTokenizer.chat_template):
        tokenizer = ByteTokenizer()
        tokenizer.chat_template = template
        return ChatSession(ScriptedBackend(list(replies), context), tokenizer, frozenset([STOP]))

    return make


@pytest.fixture
def pieces():
    """A callback for streamed text that remembers `(text, is_thought)`."""

    class Pieces(list):
        def __call__(self, text: str, thought: bool) -> None:
            self.append((text, thought))

    return Pieces()


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Also where the tests were started in the background, which makes a shell ignore Ctrl-C for all it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
