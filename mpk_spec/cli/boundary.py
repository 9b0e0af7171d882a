"""The single error boundary: whatever a command raises becomes a message for a person and one exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from mpk_spec import errors


def guarded(program: Callable[[], object], arguments: list[str] | None = None) -> int:
    """Calls `program` and returns the exit code that belongs to how it ended (`errors.EXIT_CODES`)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without emoji shows "?" rather than ending the chat
    try:
        code = _exit_code_of(program)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as in `mpk-spec schema | head`
        drop_stdout()
        return errors.EXIT_OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except errors.MpkSpecError as error:
        sys.stdout.flush()
        print(error if isinstance(error, errors.SpecError) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # the one broad except of the project: a bug becomes a log and a line that names it
        _report_bug(error, sys.argv[1:] if arguments is None else arguments)
        return errors.EXIT_BUG


def _exit_code_of(program: Callable[[], object]) -> int:
    """Typer ends by SystemExit, whether all went well (None or 0) or the command line was wrong (2)."""
    try:
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else errors.EXIT_OK
    return errors.EXIT_OK


def drop_stdout() -> None:
    """Points standard output at nothing, so that Python's own flush at exit finds no closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: Exception, arguments: list[str]) -> None:
    text = "".join(traceback.format_exception(error))
    try:
        log = _write_log(text, arguments)
    except OSError as trouble:  # no disk, no permission: the traceback is all that there is to show
        print(text, file=sys.stderr)
        print(f"this is a bug in mpk-spec; its log could not be written: {trouble}", file=sys.stderr)
        return
    summary = str(error).partition("\n")[0]
    print(f"this is a bug in mpk-spec: {type(error).__name__}: {summary}; the log is {log}", file=sys.stderr)


def _write_log(text: str, arguments: list[str]):
    import platform
    from datetime import datetime

    from mpk_spec import __version__, paths

    folder = paths.log_dir()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    head = (
        f"mpk-spec {__version__}, Python {platform.python_version()}, {platform.platform()}\narguments: {arguments}\n"
    )
    log.write_text(f"{head}\n{text}", encoding="utf-8")
    return log
