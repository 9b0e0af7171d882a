"""Errors a person can act on: where it is, what is wrong, what would work.

Three families, one per exit code that a failing command can have:

* `SpecError`   a spec, plan or input is wrong (exit 1); carries one `Problem` per cause.
* `UserError`   the surroundings are wrong: no GPU, no disk, a corrupt checkpoint (exit 1).
* `VerdictFailed` the command worked and its answer is "no": `compare`, say (exit 4).

Everything else that escapes is a bug (exit 3) and is reported with a log.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

EXIT_OK = 0
EXIT_BAD_INPUT = 1
EXIT_USAGE = 2
EXIT_BUG = 3
EXIT_VERDICT = 4
EXIT_INTERRUPTED = 130

EXIT_CODES = {
    EXIT_OK: "it worked",
    EXIT_BAD_INPUT: "a bad spec, checkpoint or other input, or a machine that cannot do it",
    EXIT_USAGE: "the command line was wrong",
    EXIT_BUG: "a bug in mpk-spec; the message names a log file",
    EXIT_VERDICT: "the command ran and its verdict is a failure (compare, test, bench, tune)",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}


@dataclass(frozen=True, order=True)
class Position:
    """A place in a file; `line` and `column` count from 1, `length` is in characters."""

    file: str
    line: int
    column: int
    length: int = field(default=1, compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One cause of failure. `position` is None only where no file is to blame."""

    message: str
    position: Position | None = None
    hint: str | None = None
    excerpt: str | None = None  # the source line, without its newline

    def render(self) -> str:
        """`file:line:column: message`, then the excerpt with a caret, then the hint."""
        lines = [f"{self.position}: {self.message}" if self.position else self.message]
        if self.excerpt is not None and self.position is not None:
            pad = "".join("\t" if c == "\t" else " " for c in self.excerpt[: self.position.column - 1])
            width = max(1, min(self.position.length, len(self.excerpt) - self.position.column + 1))
            lines += [f"  | {self.excerpt}", f"  | {pad}{'^' * width}"]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class MpkSpecError(Exception):
    """Base of all errors that are meant for the person at the keyboard."""

    exit_code = EXIT_BAD_INPUT


class SpecError(MpkSpecError):
    """A spec (or plan, or pinned schedule) is wrong. Holds every cause, ordered by position."""

    def __init__(self, problems: Iterable[Problem] | Problem):
        given = [problems] if isinstance(problems, Problem) else list(problems)
        unique = list(dict.fromkeys(given))
        self.problems = sorted(unique, key=lambda p: (p.position is None, p.position or Position("", 0, 0)))
        super().__init__("\n".join(p.render() for p in self.problems))


class UserError(MpkSpecError):
    """Something outside the spec is wrong. `hint` says what would work."""

    def __init__(self, message: str, hint: str | None = None):
        self.message, self.hint = message, hint
        super().__init__(message if hint is None else f"{message}\n  hint: {hint}")


class VerdictFailed(MpkSpecError):
    """The command ran to its end and its verdict is a failure."""

    exit_code = EXIT_VERDICT


def did_you_mean(word: str, known: Iterable[str], kind: str = "") -> str:
    """A hint that names the nearest known word, or lists what there is."""
    known = sorted(set(known))
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if not known:
        return f"there are no {kind or 'names'} here"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known{' ' + kind if kind else ''}: {shown}"
