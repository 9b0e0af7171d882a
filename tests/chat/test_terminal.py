from __future__ import annotations

import os
import re
import signal

from mpk_spec.chat import terminal

SPEED = re.compile(r"\[\d+ tokens?, [\d.]+ tok/s, first token after [\d.]+ s\]")


def reader(*lines):
    """An `input` that gives these lines, raises those that are exceptions, and then ends the file."""
    script = iter(lines)

    def read(prompt: str) -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_one_shot_writes_only_the_answer_to_stdout(make_session, capsys):
    terminal.one_shot(make_session("<think>hm</think>\n\nParis 🎉"), "France?")
    shown = capsys.readouterr()
    assert shown.out == "Paris 🎉\n"
    assert shown.err.startswith("hm")
    assert SPEED.search(shown.err)


def test_a_chat_answers_until_the_end_of_input(make_session, capsys):
    session = make_session("one", "two")
    terminal.interactive(session, reader("first", "", "second"))
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n\n"
    assert len(SPEED.findall(shown.err)) == 2


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(make_session, capsys):
    session = make_session("a long answer", "more")
    session.backend.during = lambda position: position == 6 and os.kill(os.getpid(), signal.SIGINT)
    terminal.interactive(session, reader("hi"))
    shown = capsys.readouterr()
    assert shown.out == "a long \n\n"
    assert "[stopped; what was said stays in the conversation]" in shown.err
    assert session.messages[-1]["content"] == "a long "
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_breaks_a_step_that_takes_long(make_session, capsys):
    session = make_session("a long answer", "more")

    def press_twice(position: int) -> None:
        if position == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    session.backend.during = press_twice
    terminal.interactive(session, reader("hi"))
    assert capsys.readouterr().out == "a \n\n"
    assert session.backend.resets == 1


def test_ctrl_c_twice_at_the_prompt_leaves(make_session, capsys):
    session = make_session("one")
    terminal.interactive(session, reader(KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never"))
    shown = capsys.readouterr()
    assert shown.err.count("[Ctrl-C again, Ctrl-D or /exit leaves]") == 2
    assert len(session.messages) == 2


def test_a_line_that_is_no_text_is_said_and_skipped(make_session, capsys):
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    terminal.interactive(make_session("one"), reader(bad, "hi"))
    shown = capsys.readouterr()
    assert "[that was not utf-8 text]" in shown.err
    assert shown.out == "one\n\n"


def test_commands_and_their_mistakes_do_not_end_the_chat(make_session, capsys):
    session = make_session("one", "two")
    terminal.interactive(session, reader("/hlep", "hi", "/regen", "/exit", "never"))
    shown = capsys.readouterr()
    assert "[there is no command /hlep]\n  hint: did you mean '/help'?" in shown.err
    assert shown.out == "one\ndecoding is greedy: the answer changes only where the settings did\ntwo\n"


def test_a_full_context_is_said_and_the_chat_goes_on(make_session, capsys):
    session = make_session("abcdefgh", "ok", context=38)
    terminal.interactive(session, reader("x" * 15, "y", "/clear", "hi"))
    shown = capsys.readouterr()
    assert "the context of 38 tokens is full and the answer was cut" in shown.err
    assert "[the context is full: with this turn the conversation has " in shown.err
    assert shown.out.endswith("the conversation is empty\nok\n\n")


def test_an_answer_cut_by_n_is_said(make_session, capsys):
    session = make_session("abcdefgh")
    session.settings.max_new_tokens = 2
    terminal.one_shot(session, "hi")
    assert "[cut after 2 tokens, as -n or /set n says]" in capsys.readouterr().err
