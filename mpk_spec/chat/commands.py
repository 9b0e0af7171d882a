"""The slash commands of a chat: one function each, `(session, argument) -> Outcome`. They print nothing themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpk_spec.chat.session import ChatSession
from mpk_spec.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Outcome:
    """What the terminal does next: shows `text`, asks for the last answer again, or leaves."""

    text: str = ""
    regenerate: bool = False
    leave: bool = False


@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    function: Callable[[ChatSession, str], Outcome]


def run(session: ChatSession, line: str) -> Outcome:
    """Carries out a line that begins with a slash. Raises UserError for an unknown command or a wrong argument."""
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise UserError(f"there is no command /{name}", hint=_nearest(name))
    return COMMANDS[name].function(session, argument.strip())


def _nearest(name: str) -> str:
    hint = did_you_mean(name, COMMANDS, "commands")
    return hint.replace("'", "'/", 1) if hint.startswith("did you mean") else "/help lists the commands"


def _help(session: ChatSession, argument: str) -> Outcome:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.help}" for command in COMMANDS.values()]
    return Outcome("\n".join([*lines, "Ctrl-C stops an answer; Ctrl-D at the prompt leaves."]))


def _clear(session: ChatSession, argument: str) -> Outcome:
    session.clear()
    return Outcome("the conversation is empty")


def _regen(session: ChatSession, argument: str) -> Outcome:
    if not session.messages:
        raise UserError("there is no answer to give again")
    return Outcome("decoding is greedy: the answer changes only where the settings did", regenerate=True)


def _system(session: ChatSession, argument: str) -> Outcome:
    if not argument:
        shown = session.system or "none of yours (the checkpoint's chat template may have its own)"
        return Outcome(f"system prompt: {shown}")
    session.system = None if argument == "none" else argument
    return Outcome("the system prompt holds from the next turn on")


def _set(session: ChatSession, argument: str) -> Outcome:
    if not argument:
        return Outcome("\n".join(f"{name} {show(session)}" for name, (show, _) in SETTINGS.items()))
    name, _, value = argument.partition(" ")
    if name not in SETTINGS:
        raise UserError(f"there is no setting '{name}'", hint=did_you_mean(name, SETTINGS, "settings"))
    if value:
        SETTINGS[name][1](session, value.strip())
    return Outcome(f"{name} {SETTINGS[name][0](session)}")


def _stats(session: ChatSession, argument: str) -> Outcome:
    backend, totals = session.backend, session.totals
    pace = totals.tokens / totals.seconds if totals.seconds else 0.0
    origin = ", ".join(f"{key} {value}" for key, value in session.origin.items())
    lines = [
        f"backend: {backend.description}",
        f"model: {origin}" if origin else "",
        f"context: {session.used()} of {backend.context} tokens, {len(session.messages)} messages",
        f"answers: {totals.answers}, {totals.tokens} tokens in {totals.seconds:.1f} s ({pace:.1f} tok/s with prompts)",
    ]
    return Outcome("\n".join(line for line in lines if line))


def _save(session: ChatSession, argument: str) -> Outcome:
    path = _path(argument, "/save FILE")
    session.save(path)
    return Outcome(f"saved {len(session.messages)} messages to {path}")


def _load(session: ChatSession, argument: str) -> Outcome:
    path = _path(argument, "/load FILE")
    session.load(path)
    return Outcome(f"loaded {len(session.messages)} messages from {path}")


def _exit(session: ChatSession, argument: str) -> Outcome:
    return Outcome(leave=True)


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise UserError(f"a file is missing: {usage}")
    return Path(argument).expanduser()


def _set_max_new_tokens(session: ChatSession, value: str) -> None:
    if value == "none":
        session.settings.max_new_tokens = None
    elif value.isdecimal() and int(value) > 0:
        session.settings.max_new_tokens = int(value)
    else:
        raise UserError(f"n is a number of tokens from 1 on, or 'none' for no limit, not '{value}'")


def _set_thinking(session: ChatSession, value: str) -> None:
    known = {"on": True, "off": False, "template": None}
    if value not in known:
        raise UserError(f"think is on, off or template, not '{value}'")
    set_thinking(session, known[value])


def set_thinking(session: ChatSession, wanted: bool | None) -> None:
    """Raises UserError where thinking is wanted and the checkpoint's template has no such mode."""
    if wanted and not session.prompt.has_thinking:
        raise UserError("the chat template of this checkpoint has no thinking mode")
    session.settings.thinking = wanted if session.prompt.has_thinking else None


def refuse_temperature(value: float) -> None:
    """Raises UserError for any temperature but 0."""
    if value != 0:
        raise UserError(
            f"a temperature of {value:g} needs sampling, which this version does not have: it decodes greedily",
            hint="leave the temperature at 0",
        )


def _set_temperature(session: ChatSession, value: str) -> None:
    try:
        temperature = float(value)
    except ValueError:
        raise UserError(f"temp is a number, not '{value}'") from None
    refuse_temperature(temperature)


def _show_thinking(session: ChatSession) -> str:
    if not session.prompt.has_thinking:
        return "off (the chat template of this checkpoint has no thinking mode)"
    return {True: "on", False: "off", None: "as the template has it"}[session.settings.thinking]


# name -> (what it is now, how to change it)
SETTINGS: dict[str, tuple[Callable[[ChatSession], str], Callable[[ChatSession, str], None]]] = {
    "n": (lambda session: str(session.settings.max_new_tokens or "none"), _set_max_new_tokens),
    "think": (_show_thinking, _set_thinking),
    "temp": (lambda session: "0 (greedy)", _set_temperature),
}

COMMANDS = {
    "help": Command("/help", "show this", _help),
    "clear": Command("/clear", "forget the conversation", _clear),
    "regen": Command("/regen", "answer the last turn again", _regen),
    "system": Command("/system [TEXT|none]", "show or set the system prompt", _system),
    "set": Command("/set [NAME VALUE]", f"show or change a setting: {', '.join(SETTINGS)}", _set),
    "stats": Command("/stats", "show tokens, speed and the backend", _stats),
    "save": Command("/save FILE", "write the conversation", _save),
    "load": Command("/load FILE", "read a conversation back", _load),
    "exit": Command("/exit", "leave", _exit),
}
