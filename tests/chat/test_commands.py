from __future__ import annotations

import pytest

from mpk_spec.chat import commands
from mpk_spec.errors import UserError


def text(session, line: str) -> str:
    return commands.run(session, line).text


def test_help_names_every_command(make_session):
    shown = text(make_session(), "/help")
    assert all(f"/{name}" in shown for name in commands.COMMANDS)
    assert "Ctrl-C stops an answer" in shown


def test_clear_keeps_the_system_prompt(make_session, pieces):
    session = make_session("a")
    session.system = "Be kind."
    session.ask("hi", pieces)
    assert text(session, "/clear") == "the conversation is empty"
    assert (session.messages, session.system) == ([], "Be kind.")


def test_regen_asks_for_the_answer_again(make_session, pieces):
    session = make_session("a")
    with pytest.raises(UserError, match="there is no answer to give again"):
        commands.run(session, "/regen")
    session.ask("hi", pieces)
    assert commands.run(session, "/regen").regenerate


def test_system_shows_sets_and_removes(make_session):
    session = make_session()
    assert text(session, "/system") == "system prompt: none of yours (the checkpoint's chat template may have its own)"
    text(session, "/system Be  brief.")
    assert session.system == "Be  brief."
    assert text(session, "/system") == "system prompt: Be  brief."
    text(session, "/system none")
    assert session.system is None


def test_set_shows_and_changes(make_session):
    session = make_session()
    assert text(session, "/set") == "n none\nthink as the template has it\ntemp 0 (greedy)"
    assert text(session, "/set n 12") == "n 12"
    assert session.settings.max_new_tokens == 12
    assert text(session, "/set n none") == "n none"
    assert text(session, "/set think off") == "think off"
    assert session.settings.thinking is False
    assert text(session, "/set think on") == "think on"
    assert text(session, "/set think template") == "think as the template has it"
    assert text(session, "/set temp 0") == "temp 0 (greedy)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set n many", "n is a number of tokens from 1 on, or 'none' for no limit, not 'many'"),
        ("/set n 0", "n is a number of tokens from 1 on, or 'none' for no limit, not '0'"),
        ("/set think maybe", "think is on, off or template, not 'maybe'"),
        ("/set temp hot", "temp is a number, not 'hot'"),
        (
            "/set temp 0.7",
            "a temperature of 0.7 needs sampling, which this version does not have: it decodes greedily\n"
            "  hint: leave the temperature at 0",
        ),
        ("/set thinks on", "there is no setting 'thinks'\n  hint: did you mean 'think'?"),
        ("/save", "a file is missing: /save FILE"),
        ("/load", "a file is missing: /load FILE"),
        ("/hlep", "there is no command /hlep\n  hint: did you mean '/help'?"),
        ("/xyzzy", "there is no command /xyzzy\n  hint: /help lists the commands"),
        ("/", "there is no command /\n  hint: /help lists the commands"),
    ],
)
def test_mistakes_are_explained(make_session, line, message):
    with pytest.raises(UserError) as error:
        commands.run(make_session(), line)
    assert str(error.value) == message


def test_thinking_is_refused_where_the_template_has_none(make_session):
    session = make_session(template="{{ messages }}")
    with pytest.raises(UserError, match="has no thinking mode"):
        commands.run(session, "/set think on")
    text(session, "/set think off")  # it is off already
    assert session.settings.thinking is None


def test_stats_count_tokens_and_room(make_session, pieces):
    session = make_session("abc")
    session.origin = {"spec": "smollm2", "size": "135m"}
    session.ask("hi", pieces)
    lines = text(session, "/stats").splitlines()
    assert lines[:2] == ["backend: fake backend", "model: spec smollm2, size 135m"]
    assert lines[2] == "context: 32 of 1000 tokens, 2 messages"
    assert lines[3].startswith("answers: 1, 4 tokens in ")


def test_save_and_load_through_commands(make_session, pieces, tmp_path):
    session = make_session("abc")
    session.ask("hi", pieces)
    file = tmp_path / "a b.json"
    assert text(session, f"/save {file}") == f"saved 2 messages to {file}"
    text(session, "/clear")
    assert text(session, f"/load {file}") == f"loaded 2 messages from {file}"
    assert len(session.messages) == 2


def test_exit_leaves(make_session):
    assert commands.run(make_session(), "/exit").leave
