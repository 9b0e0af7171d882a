"""A conversation: messages in, streamed answers out. Knows nothing of terminals, so that tests can drive it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.chat.detokenize import Detokenizer, ThinkSplitter
from mpk_spec.chat.prompt import Message, prompt_for
from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.runtime.backend import Backend

FILE_FORMAT = "mpk-spec chat v1"
ROLES = ("user", "assistant")


@dataclass
class Settings:
    """What `/set` changes. Times and counts are per answer."""

    max_new_tokens: int | None = None  # None: until the model stops or the context is full
    thinking: bool | None = None  # None: as the template has it


@dataclass(frozen=True)
class Answer:
    """What came of one request. `ended` is "stop", "length", "context" or "interrupted"."""

    text: str  # without the thought
    tokens: int
    first_token_s: float
    total_s: float
    ended: str

    @property
    def tokens_per_s(self) -> float:
        """The pace after the first token, which alone pays for reading the prompt."""
        pace = self.total_s - self.first_token_s
        return (self.tokens - 1) / pace if self.tokens > 1 and pace > 0 else 0.0


@dataclass
class Totals:
    """Sums over the answers of this session, for `/stats`."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        self.tokens += answer.tokens
        self.seconds += answer.total_s


def _never() -> bool:
    return False


@dataclass
class ChatSession:
    """One model, one conversation.

    `stop_ids` are all ids that end an answer. `on_text(text, is_thought)` of the methods receives text as it appears.
    """

    backend: Backend
    tokenizer: object
    stop_ids: frozenset[int]
    system: str | None = None
    settings: Settings = field(default_factory=Settings)
    origin: dict[str, str] = field(default_factory=dict)  # spec, size, weights: written by `save`

    def __post_init__(self):
        self.prompt = prompt_for(self.tokenizer)
        self.messages: list[Message] = []
        self.totals = Totals()

    def ask(self, text: str, on_text: Callable[[str, bool], None], should_stop: Callable[[], bool] = _never) -> Answer:
        """Adds a turn and streams its answer. A turn that cannot be answered (context full) is not kept."""
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer(on_text, should_stop)
        except BaseException:
            self.messages.pop()
            raise

    def regenerate(self, on_text: Callable[[str, bool], None], should_stop: Callable[[], bool] = _never) -> Answer:
        """Answers the last turn again. Raises UserError where there is none."""
        if not self.messages:
            raise UserError("there is no answer to give again")
        kept = list(self.messages)
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        try:
            return self._answer(on_text, should_stop)
        except BaseException:
            self.messages = kept
            raise

    def clear(self) -> None:
        """Forgets the conversation; the system prompt and the settings stay."""
        self.messages.clear()

    def prompt_text(self) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.prompt.text(system + self.messages, self.settings.thinking)

    def used(self) -> int:
        """Tokens of the conversation so far, as the next turn will see it."""
        return len(self.prompt.ids(self.prompt_text())) if self.messages else 0

    def _answer(self, on_text: Callable[[str, bool], None], should_stop: Callable[[], bool]) -> Answer:
        prompt = self.prompt_text()
        ids = self.prompt.ids(prompt)
        context = self.backend.context
        if len(ids) >= context:
            raise UserError(
                f"the context is full: with this turn the conversation has {len(ids)} tokens "
                f"and the context holds {context}",
                hint="/clear starts over; a larger -c at the start gives more room",
            )
        stream = _Stream(self, prompt, on_text)
        stream.run(ids, should_stop)
        stream.finish()
        self.messages.append({"role": "assistant", "content": stream.text})  # also a partial or an empty one
        answer = stream.answer()
        self.totals.add(answer)
        return answer

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON, aside and renamed, so that a file is whole or absent."""
        document = {"format": FILE_FORMAT, **self.origin, "system": self.system, "messages": self.messages}
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"cannot save to {path}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Replaces the conversation by that of a file that `save` wrote."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot load {path}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"cannot load {path}: it is not JSON") from None
        if not _is_conversation(document):
            raise UserError(f"cannot load {path}: it is not a conversation that /save wrote")
        self.system, self.messages = document["system"], document["messages"]


def _is_conversation(document: object) -> bool:
    if not isinstance(document, dict) or document.get("format") != FILE_FORMAT:
        return False
    messages, system = document.get("messages"), document.get("system", 0)
    return (
        (system is None or isinstance(system, str))
        and isinstance(messages, list)
        and all(isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages)
    )


class _Stream:
    """One answer while it is made: counts, clocks, and text split into thought and answer."""

    def __init__(self, session: ChatSession, prompt: str, on_text: Callable[[str, bool], None]):
        self._session = session
        self._on_text = on_text
        self._decoder = Detokenizer(session.tokenizer)
        opened = prompt.rstrip().endswith(ThinkSplitter.OPEN)
        self._splitter = ThinkSplitter(thinking=opened)
        self.text = ThinkSplitter.OPEN + "\n" if opened else ""  # as the template will want to read it back
        self._visible = ""
        self._tokens = 0
        self._started = time.perf_counter()
        self._first = self._last = self._started
        self._ended = "length"

    def run(self, ids: list[int], should_stop: Callable[[], bool]) -> None:
        session = self._session
        room = session.backend.context - len(ids)
        wanted = session.settings.max_new_tokens
        limit = room if wanted is None else min(wanted, room)
        tokens = session.backend.stream(ids, max_new_tokens=limit, stop=session.stop_ids)
        try:
            for token in tokens:
                self._count()
                if token in session.stop_ids:
                    self._ended = "stop"
                    return
                self._show(self._decoder.push(token))
                if should_stop():
                    self._ended = "interrupted"
                    return
        except KeyboardInterrupt:  # a second Ctrl-C, inside a step: its cache is not to be trusted
            session.backend.reset()
            self._ended = "interrupted"
            return
        finally:
            tokens.close()
        if wanted is None or room < wanted:
            self._ended = "context"

    def _count(self) -> None:
        self._tokens += 1
        self._last = time.perf_counter()
        if self._tokens == 1:
            self._first = self._last

    def _show(self, text: str) -> None:
        self.text += text
        self._emit(self._splitter.push(text))

    def _emit(self, pieces: list[tuple[str, bool]]) -> None:
        for piece, thought in pieces:
            if not thought:
                # the blank lines between a thought and its answer belong to neither
                piece = piece if self._visible else piece.lstrip("\n")
                self._visible += piece
            if piece:
                self._on_text(piece, thought)

    def finish(self) -> None:
        self._show(self._decoder.flush())
        self._emit(self._splitter.flush())

    def answer(self) -> Answer:
        return Answer(self._visible, self._tokens, self._first - self._started, self._last - self._started, self._ended)
