"""`mpk-spec chat` from the command line to the answer: options reach the session, and stdout holds the answer only."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from mpk_spec import errors
from mpk_spec.chat.session import ChatSession
from mpk_spec.cli import chat
from mpk_spec.cli.main import main


class Tokenizer:
    chat_template = "{{ messages }}"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **options):
        return "".join(f"{m['role']}={m['content']};" for m in messages)


class Echo:
    """Answers with the prompt that it got."""

    name, description, context = "echo", "echo backend", 200

    def stream(self, ids, *, max_new_tokens, stop):
        yield from [*ids, 0][:max_new_tokens]

    def close(self):
        self.closed = True


@pytest.fixture
def opened(monkeypatch):
    """Replaces models by an echo; holds the arguments of the last call and its session."""
    seen = SimpleNamespace()

    def open_session(*arguments):
        seen.arguments = arguments
        seen.session = ChatSession(Echo(), Tokenizer(), frozenset([0]))
        return seen.session

    monkeypatch.setattr(chat, "open_session", open_session)
    return seen


def test_a_prompt_is_answered_on_stdout_alone(opened, capsys):
    assert main(["chat", "smollm2", "-p", "hello", "--system", "Be brief."]) == errors.EXIT_OK
    shown = capsys.readouterr()
    assert shown.out == "system=Be brief.;user=hello;\n"
    assert "tok/s, first token after" in shown.err
    assert opened.session.backend.closed


def test_piped_text_is_a_prompt(opened, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(["chat", "smollm2"]) == errors.EXIT_OK
    assert capsys.readouterr().out == "user=two\nlines\n;\n"


def test_piped_bytes_that_are_no_text_are_refused(opened, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert main(["chat", "smollm2"]) == errors.EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: standard input is not utf-8 text\n"


def test_a_terminal_that_cannot_show_an_emoji_shows_a_question_mark(opened, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["chat", "smollm2", "-p", "é🎉"]) == errors.EXIT_OK
    assert narrow.buffer.getvalue().decode("latin-1") == "user=é?;\n"


def test_a_prompt_leaves_stdin_alone(opened, capsys, monkeypatch):
    stdin = io.StringIO("unread")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", "smollm2", "-p", "hello"]) == errors.EXIT_OK
    assert stdin.read() == "unread"


def test_options_reach_their_places(opened, capsys):
    arguments = [
        "chat",
        "qwen3",
        "--size",
        "0.6b",
        "--weights",
        "hub:a/b",
        "--backend",
        "torch",
        "-n",
        "3",
        "-c",
        "99",
        "-p",
        "hello",
    ]
    assert main(arguments) == errors.EXIT_OK
    assert opened.arguments == ("qwen3", "0.6b", "hub:a/b", None, "torch", 99, None)
    assert capsys.readouterr().out == "use\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "0.8", "-p", "a"], "a temperature of 0.8 needs sampling, which this version does not have"),
        (["--think", "-p", "a"], "the chat template of this checkpoint has no thinking mode"),
        (["-p", " "], "the question is empty"),
        (["-p", "a\udcff"], "the question is not UTF-8 text"),
        (["-p", "a" * 300], "the context is full: with this turn the conversation has 306 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(opened, capsys, arguments, message):
    assert main(["chat", "smollm2", *arguments]) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")


def test_an_interrupted_question_exits_with_130(opened, capsys, monkeypatch):
    def interrupt(self, ids, *, max_new_tokens, stop):
        yield 65
        raise KeyboardInterrupt

    monkeypatch.setattr(Echo, "stream", interrupt)
    monkeypatch.setattr(Echo, "reset", lambda self: None, raising=False)
    assert main(["chat", "smollm2", "-p", "hello"]) == errors.EXIT_INTERRUPTED
    assert capsys.readouterr().out == "A\n"
