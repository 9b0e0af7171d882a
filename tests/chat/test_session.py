from __future__ import annotations

import json

import pytest

from mpk_spec.errors import UserError


def test_turns_accumulate_and_are_given_back_in_the_next_prompt(make_session, pieces):
    session = make_session("Paris", "Madrid")
    answer = session.ask("France?", pieces)
    assert (answer.text, answer.tokens, answer.ended) == ("Paris", 6, "stop")
    session.ask("Spain?", pieces)
    assert session.backend.prompts == [
        "user:France?assistant:",
        "user:France?assistant:Parisuser:Spain?assistant:",
    ]
    assert session.totals.tokens == 13


def test_text_is_streamed_in_whole_characters(make_session, pieces):
    make_session("a🎉b").ask("hi", pieces)
    assert pieces == [("a", False), ("🎉", False), ("b", False)]


def test_a_system_prompt_comes_first(make_session, pieces):
    session = make_session("yes")
    session.system = "Be brief."
    session.ask("hi", pieces)
    assert session.backend.prompts == ["system:Be brief.user:hiassistant:"]


def test_a_stopped_answer_stays_in_the_conversation(make_session, pieces):
    session = make_session("a long answer", "next")
    answer = session.ask("hi", pieces, should_stop=lambda: len(pieces) == 3)
    assert (answer.text, answer.ended) == ("a l", "interrupted")
    session.ask("go on", pieces)
    assert session.backend.prompts[1] == "user:hiassistant:a luser:go onassistant:"
    assert session.backend.resets == 0


def test_a_break_inside_a_step_keeps_the_text_and_drops_the_cache(make_session, pieces):
    session = make_session("a long answer")

    def interrupt(position: int) -> None:
        if position == 4:
            raise KeyboardInterrupt

    session.backend.during = interrupt
    answer = session.ask("hi", pieces)
    assert (answer.text, answer.ended) == ("a lo", "interrupted")
    assert session.messages[-1] == {"role": "assistant", "content": "a lo"}
    assert session.backend.resets == 1


def test_an_answer_cut_by_n_says_so(make_session, pieces):
    session = make_session("abcdef")
    session.settings.max_new_tokens = 3
    assert session.ask("hi", pieces).ended == "length"


def test_an_answer_cut_by_the_context_says_so_and_is_kept(make_session, pieces):
    session = make_session("abcdef", context=len("user:hi") + 1 + len("assistant:") + 4)
    answer = session.ask("hi", pieces)
    assert (answer.text, answer.ended) == ("abcd", "context")


def test_n_that_just_fits_the_context_is_not_blamed_on_the_context(make_session, pieces):
    session = make_session("abcdef", context=len("user:hi") + 1 + len("assistant:") + 4)
    session.settings.max_new_tokens = 4
    assert session.ask("hi", pieces).ended == "length"


def test_a_turn_that_does_not_fit_is_refused_and_not_kept(make_session, pieces):
    session = make_session("ok", "never", context=60)
    session.ask("hi", pieces)
    before = list(session.messages)
    with pytest.raises(UserError) as error:
        session.ask("x" * 60, pieces)
    assert str(error.value) == (
        "the context is full: with this turn the conversation has 97 tokens and the context holds 60\n"
        "  hint: /clear starts over; a larger -c at the start gives more room"
    )
    assert session.messages == before


def test_regenerate_answers_the_same_turn_again(make_session, pieces):
    session = make_session("one", "two")
    session.ask("hi", pieces)
    assert session.regenerate(pieces).text == "two"
    assert [m["content"] for m in session.messages] == ["hi", "two"]
    assert session.backend.prompts[0] == session.backend.prompts[1]


def test_regenerate_that_fails_leaves_the_conversation_as_it_was(make_session, pieces):
    session = make_session("one")
    session.ask("hi", pieces)
    session.system = "x" * 1000
    with pytest.raises(UserError, match="the context is full"):
        session.regenerate(pieces)
    assert [m["content"] for m in session.messages] == ["hi", "one"]


def test_thinking_is_streamed_apart_and_left_to_the_template_to_forget(make_session, pieces):
    session = make_session("hm</think>\n\nyes")
    session.settings.thinking = True
    answer = session.ask("hi", pieces)
    assert answer.text == "yes"
    assert "".join(text for text, thought in pieces if thought) == "hm"
    assert session.messages[-1]["content"] == "<think>\nhm</think>\n\nyes"


def test_thinking_off_reaches_the_template(make_session, pieces):
    session = make_session("yes")
    session.settings.thinking = False
    session.ask("hi", pieces)
    assert session.backend.prompts == ["user:hiassistant:<think>\n\n</think>\n\n"]
    assert pieces == [("y", False), ("e", False), ("s", False)]


def test_save_and_load_give_the_same_conversation(make_session, pieces, tmp_path):
    session = make_session("Grüße 🎉")
    session.system, session.origin = "Be kind.", {"spec": "smollm2"}
    session.ask("hi", pieces)
    session.save(tmp_path / "talk.json")
    other = make_session()
    other.load(tmp_path / "talk.json")
    assert (other.messages, other.system) == (session.messages, "Be kind.")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["spec"] == "smollm2"
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no json", "it is not JSON"),
        ("[]", "it is not a conversation that /save wrote"),
        ('{"format": "mpk-spec chat v1", "system": null, "messages": [{"role": "user"}]}', "it is not a conversation"),
        ('{"format": "mpk-spec chat v1", "system": null, "messages": [{"role": "root", "content": ""}]}', "it is not"),
    ],
)
def test_load_refuses_what_save_did_not_write(make_session, pieces, tmp_path, content, reason):
    session = make_session("a")
    session.ask("hi", pieces)
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        session.load(tmp_path / "talk.json")
    assert len(session.messages) == 2


def test_save_to_a_folder_that_is_not_there_says_so(make_session, tmp_path):
    with pytest.raises(UserError) as error:
        make_session().save(tmp_path / "no" / "talk.json")
    assert str(error.value) == f"cannot save to {tmp_path}/no/talk.json: No such file or directory"


def test_without_a_template_the_text_is_continued(make_session, pieces):
    session = make_session(" upon a time", template=None)
    session.ask("Once", pieces)
    assert session.backend.prompts == ["Once"]


def test_a_template_that_refuses_is_an_error_for_people(make_session, pieces):
    from jinja2.exceptions import TemplateError

    session = make_session("a")

    def refuse(*args, **options):
        raise TemplateError("System role not supported")

    session.tokenizer.apply_chat_template = refuse
    with pytest.raises(UserError, match="chat template refuses this conversation: System role not supported"):
        session.ask("hi", pieces)
    assert session.messages == []
