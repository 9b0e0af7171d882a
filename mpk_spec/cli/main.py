"""The program `mpk-spec`: a table of commands, each loaded only when it is used."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperGroup

from mpk_spec import errors
from mpk_spec.cli import boundary, complete

# name -> one line of help. The function is `mpk_spec.cli.<name>:command`, imported when the command is used.
COMMANDS = {
    "validate": "Check a spec and say what is wrong with it, where.",
    "plan": "Turn a spec into a proved plan: grids, tasks, events, bytes, predicted time.",
    "build": "Compile a plan into one CUDA kernel.",
    "chat": "Talk with a model.",
    "compare": "Compare a backend's numbers with Hugging Face in float32 and give a verdict.",
    "test": "Run the checks of specs: the built-in ones and their own.",
    "bench": "Measure tokens per second against Hugging Face on the same weights.",
    "profile": "Say where each microsecond of a token goes on the GPU, and write a trace.",
    "tune": "Search the fastest schedule on this machine's GPU, or fit the planner's predictions to it.",
    "schema": "Print the JSON Schema of specs, for editors.",
    "new": "Draft a spec from a checkpoint.",
    "doctor": "Say what this machine has and lacks for mpk-spec.",
    "cache": "List or clear what mpk-spec has stored on this machine.",
}

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class CommandTable(TyperGroup):
    """A group whose help comes from `COMMANDS`, so that no command's module is imported to list it."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS)  # typer suggests near names from the keys

    def list_commands(self, ctx) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in COMMANDS:
            return None
        if self.commands[cmd_name] is None:
            self.commands[cmd_name] = load(cmd_name)
        return self.commands[cmd_name]

    def format_commands(self, ctx, formatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx):
        """As the base does, with a reader that went away and Ctrl-C turned into exit codes before typer sees them."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            boundary.drop_stdout()
            raise typer.Exit(errors.EXIT_OK) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(errors.EXIT_INTERRUPTED) from None


def load(name: str):
    """The click command behind `name`, made from its module's function `command` (or its typer application `app`)."""
    module = import_module(f"mpk_spec.cli.{name}")
    application = getattr(module, "app", None)
    if application is None:
        application = typer.Typer(add_completion=False, rich_markup_mode=None)
        function = complete.with_completion(module.command)
        application.command(name, context_settings=CONTEXT_SETTINGS, help=function.__doc__)(function)
    loaded = typer.main.get_command(application)
    loaded.name = name
    return loaded


app = typer.Typer(
    name="mpk-spec",
    cls=CommandTable,
    help="An LLM described in YAML becomes one persistent CUDA kernel; without a GPU its plan runs on the CPU.",
    epilog="A bare name such as 'smollm2' means the spec of that name that comes with mpk-spec.",
    context_settings=CONTEXT_SETTINGS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mpk_spec import __version__

        print(f"mpk-spec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass  # options of the program itself; each command is a module of its own


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return boundary.guarded(lambda: app(args=arguments, prog_name="mpk-spec"), arguments)


def run() -> None:
    """The entry point of the console script; under torchrun all ranks but the first follow that one."""
    under_torchrun = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if under_torchrun and os.environ["RANK"] != "0":
        from mpk_spec.runtime import follower

        follower.run()
    code = main()
    if under_torchrun and code == errors.EXIT_OK:  # after a failure torchrun ends the others itself
        from mpk_spec.runtime import follower

        code = boundary.guarded(follower.dismiss)
    sys.exit(code)
