"""`mpk-spec chat`: opens a model and hands it to a conversation, in a terminal or for one question."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mpk_spec.cli.options import Model, Ranks, ReadWith, Size, Weights
from mpk_spec.errors import UserError


def command(
    model: Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Ask this once and end.")] = None,
    size: Size = None,
    weights: Weights = None,
    spec: ReadWith = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, cuda, cpu or torch.")] = "auto",
    tp: Ranks = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "-n", "--max-new-tokens", min=1, metavar="N", help="Longest answer; default: to the context's end."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("-c", "--context", min=2, metavar="N", help="Tokens of a conversation; default: 4096 at most."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    temp: Annotated[float, typer.Option(metavar="T", help="Temperature; only 0, greedy, exists so far.")] = 0.0,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Thinking mode, where the chat template has it.")
    ] = None,
) -> None:
    """Talk with a model. Text piped in, like -p, is asked once, and only the answer goes to standard output."""
    from mpk_spec.chat import commands, terminal

    commands.refuse_temperature(temp)
    question = prompt if prompt is not None else _piped()
    if question is not None:
        _check_question(question)
    session = open_session(model, size, weights, spec, backend, context, tp)
    session.system = system
    session.settings.max_new_tokens = max_new_tokens
    commands.set_thinking(session, think)
    if question is not None:
        terminal.one_shot(session, question)
    else:
        print(f"{session.backend.description}; /help lists the commands", file=sys.stderr)
        terminal.interactive(session)
    session.backend.close()


def _piped() -> str | None:
    """What was piped or redirected to standard input; None where a person sits there."""
    if sys.stdin.isatty():
        return None
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text") from None


def _check_question(question: str) -> None:
    if not question.strip():
        raise UserError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text come as lone surrogates
        raise UserError("the question is not UTF-8 text") from None


def open_session(
    model: str,
    size: str | None,
    weights: str | None,
    spec: str | None,
    backend: str,
    context: int | None,
    tp: int | None = None,
):
    """A `ChatSession` for what the command line names, with its weights loaded."""
    from mpk_spec.chat.raw_tokens import RawTokens
    from mpk_spec.chat.session import ChatSession
    from mpk_spec.cli.progress import progress
    from mpk_spec.cli.target import open_target
    from mpk_spec.runtime.select import choose_degree, open_backend
    from mpk_spec.weights import eos_ids, load_tokenizer

    with progress() as report:
        target = open_target(model, report, size=size, weights=weights, spec=spec)
        tokenizer = RawTokens() if target.checkpoint.directory is None else load_tokenizer(target.checkpoint)
        opened = open_backend(
            target.spec, target.size, target.checkpoint, backend, context, report, target.build,
            choose_degree(tp, target.build),
        )  # fmt: skip
    if target.checkpoint.directory is None:
        print("random weights have no tokenizer: bytes go in, other ids come out as numbers", file=sys.stderr)
    elif not tokenizer.chat_template:
        print("this checkpoint has no chat template: it continues your text as it is", file=sys.stderr)
    origin = {"spec": target.name, "size": target.size or "", "weights": str(target.checkpoint.source)}
    return ChatSession(
        opened, tokenizer, frozenset(eos_ids(target.checkpoint)), origin={k: v for k, v in origin.items() if v}
    )
