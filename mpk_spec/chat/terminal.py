"""The terminal side of a chat: reads lines, shows text as it comes, turns Ctrl-C into "stop this answer"."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpk_spec.chat import commands
from mpk_spec.chat.session import Answer, ChatSession
from mpk_spec.errors import UserError

PROMPT = "> "
DIM, PLAIN = "\033[2m", "\033[0m"


def one_shot(session: ChatSession, text: str) -> None:
    """Asks once. Only the answer goes to standard output; thoughts, notes and speed go to standard error."""

    def show(piece: str, thought: bool) -> None:
        print(piece, end="", flush=True, file=sys.stderr if thought else sys.stdout)

    answer = session.ask(text, show)
    print(flush=True)
    if answer.ended == "interrupted":
        raise KeyboardInterrupt
    _after(session, answer)


def interactive(session: ChatSession, read: Callable[[str], str] = input) -> None:
    """Reads turns until /exit, Ctrl-D, or Ctrl-C twice at the prompt."""
    _enable_line_editing()
    warned = False
    while True:
        try:
            line = read(PROMPT).strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            _note(f"that was not {error.encoding} text")
            continue
        except KeyboardInterrupt:
            print()
            if warned:
                return
            warned = True
            _note("Ctrl-C again, Ctrl-D or /exit leaves")
            continue
        warned = False
        if line and not _take(session, line):
            return


def _take(session: ChatSession, line: str) -> bool:
    """One turn or command; False when it is time to leave. What goes wrong in a turn is said and the chat goes on."""
    try:
        if not line.startswith("/"):
            _stream(session, lambda show, stop: session.ask(line, show, stop))
            return True
        outcome = commands.run(session, line)
        if outcome.text:
            print(outcome.text, flush=True)
        if outcome.regenerate:
            _stream(session, session.regenerate)
        return not outcome.leave
    except UserError as error:
        _note(str(error))
        return True


def _stream(session: ChatSession, ask: Callable[[Callable[[str, bool], None], Callable[[], bool]], Answer]) -> None:
    colour = sys.stdout.isatty()
    state = {"thought": False}

    def show(piece: str, thought: bool) -> None:
        if thought != state["thought"]:
            state["thought"] = thought
            edge = DIM if thought else PLAIN
            print(("" if thought else "\n\n") + (edge if colour else ""), end="")
        print(piece, end="", flush=True)

    with interrupts() as stopped:
        answer = ask(show, stopped)
    print(PLAIN if colour and state["thought"] else "", flush=True)
    _after(session, answer)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function true; a second one raises KeyboardInterrupt as usual.

    So an answer ends between two tokens, with a cache that is whole; a step that takes long can still be broken.
    """
    pressed = False

    def on_interrupt(number, frame) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _after(session: ChatSession, answer: Answer) -> None:
    """What a person wants to know after an answer: why it ended, if not by itself, and how fast it was."""
    reasons = {
        "interrupted": "stopped; what was said stays in the conversation",
        "length": f"cut after {answer.tokens} tokens, as -n or /set n says",
        "context": f"the context of {session.backend.context} tokens is full and the answer was cut; "
        "/clear starts over, a larger -c at the start gives more room",
    }
    if answer.ended in reasons:
        _note(reasons[answer.ended])
    unit = "token" if answer.tokens == 1 else "tokens"
    _note(f"{answer.tokens} {unit}, {answer.tokens_per_s:.1f} tok/s, first token after {answer.first_token_s:.2f} s")


def _note(text: str) -> None:
    sys.stdout.flush()
    lines = text.splitlines()
    print(f"[{lines[0]}]", *lines[1:], sep="\n", file=sys.stderr, flush=True)


def _enable_line_editing() -> None:
    """Gives `input()` history and editing keys where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
