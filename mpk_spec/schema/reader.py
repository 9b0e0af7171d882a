"""Text to a tree of nodes: YAML 1.2 scalars, one document, no duplicate keys, no aliases or merge keys."""

from __future__ import annotations

from pathlib import Path

import yaml

from mpk_spec.errors import Position, Problem, SpecError
from mpk_spec.schema.nodes import Node, Source, plain_scalar

MAX_DEPTH = 40
MAX_BYTES = 4 << 20
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_tree(path: Path, text: str) -> tuple[Node, list[Problem]]:
    """The tree of a file's text and what is wrong in it. Raises SpecError where there is no tree to speak of."""
    source = Source.of(path, text)
    _refuse_tabs(source)
    builder = _Builder(source, _events(source, text))
    root = builder.document()
    if not isinstance(root.value, dict):
        raise SpecError([*builder.problems, root.problem(f"a spec is a map of sections, this is {root.kind}")])
    return root, builder.problems


def read_text(path: Path) -> str:
    """The text of a spec file. OSError is the caller's; SpecError where it is not UTF-8 or far too large."""
    raw = path.read_bytes()
    from mpk_spec.schema.nodes import shown

    if len(raw) > MAX_BYTES:
        raise SpecError(Problem(f"{len(raw)} bytes are too many for a spec", Position(shown(path), 1, 1)))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        bad = raw[error.start]
        place = Position(shown(path), line, column)
        raise SpecError(Problem(f"the file is not UTF-8: byte 0x{bad:02x}", place, "save it as UTF-8")) from None


def _refuse_tabs(source: Source) -> None:
    """Tabs that indent are the commonest YAML mistake and the parser's words for it are hard to understand."""
    problems = []
    for number, line in enumerate(source.lines):
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        if "\t" in indent and line.strip() and not line.lstrip().startswith("#"):
            place = Position(source.shown, number + 1, indent.index("\t") + 1)
            problems.append(Problem("a tab in the indentation", place, "YAML indents with spaces", line))
    if problems:
        raise SpecError(problems)


def _events(source: Source, text: str) -> list[yaml.Event]:
    try:
        return list(yaml.parse(text, Loader=_FAST))
    except yaml.YAMLError:
        pass
    try:  # again, slowly: the messages of the parser in Python are the same on every machine
        return list(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        place = Position(source.shown, line + 1, column + 1)
        raise SpecError(Problem(f"a character that YAML forbids: {chr(error.character)!r}", place)) from None
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax_problem(source, error)) from None


_PLAINER = {
    "mapping values are not allowed here": "a ':' where no key can be; quote the text if it contains ': '",
    "could not find expected ':'": "a ':' is missing after this key",
    "expected <block end>, but found '<block mapping start>'": "this line is indented differently from its neighbours",
    "expected <block end>, but found '<scalar>'": "text after the end of a value",
    "found unexpected end of stream": "a quote is never closed",
    "found character '\\t' that cannot start any token": "a tab where YAML wants spaces",
}


def _syntax_problem(source: Source, error: yaml.MarkedYAMLError) -> Problem:
    said = error.problem or error.context or "cannot read this YAML"
    opened, mark = error.context_mark, error.problem_mark or error.context_mark
    message = _PLAINER.get(said, said)
    if said.startswith(("expected ',' or '}'", "expected ',' or ']'")):
        close, is_near = said[17], opened is not None and opened.line == mark.line
        message = f"a ',' or '{close}' is missing before this" if is_near else f"no '{close}' or ',' follows this line"
    if opened is not None and opened.line != mark.line and message != said:
        mark = opened  # where it was opened tells more than where the parser noticed
    line = min(mark.line, max(0, len(source.lines) - 1))
    excerpt = source.lines[line] if source.lines else ""
    column = mark.column if line == mark.line else len(excerpt)
    return Problem(message, Position(source.shown, line + 1, column + 1), None, excerpt)


class _Builder:
    """Events to nodes. Notes problems and goes on where it can."""

    def __init__(self, source: Source, events: list[yaml.Event]):
        self.source, self.events, self.next = source, events, 0
        self.problems: list[Problem] = []

    def document(self) -> Node:
        documents = [e for e in self.events if isinstance(e, yaml.DocumentStartEvent)]
        empty = Node(self.source, 0, 0, 1, None)
        if not documents:
            raise SpecError(empty.problem("the file is empty", "start it with 'spec: v1'"))
        if len(documents) > 1:
            second = self._node(documents[1], None)
            raise SpecError(
                second.problem("a second document starts here", "a spec is one document; put the other in its own file")
            )
        self.next = self.events.index(documents[0]) + 1
        return self._build((), 0)

    def _node(self, event: yaml.Event, value, **more) -> Node:
        start, end = event.start_mark, event.end_mark
        length = end.column - start.column if end.line == start.line else 1
        return Node(self.source, start.line, start.column, length, value, **more)

    def _build(self, path: tuple, depth: int) -> Node:
        event = self.events[self.next]
        self.next += 1
        if depth > MAX_DEPTH:
            raise SpecError(self._node(event, None).problem(f"nested more than {MAX_DEPTH} deep"))
        self._refuse_marks(event)
        if isinstance(event, yaml.AliasEvent):
            return self._node(event, None)
        if isinstance(event, yaml.ScalarEvent):
            quoted = bool(event.style)
            value = event.value if quoted else plain_scalar(event.value)
            return self._node(event, value, raw=event.value, style=event.style or "")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(event, path, depth)
        return self._map(event, path, depth)

    def _refuse_marks(self, event: yaml.Event) -> None:
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            if sign == "&":  # the alias is a consequence
                node = self._node(event, None)
                node.length = len(anchor) + 1
                hint = "name a value in 'values', or share a file with 'extends'"
                self.problems.append(node.problem(f"anchors ('&{anchor}') are not part of the language", hint))
        tag = getattr(event, "tag", None)
        if tag is not None:
            node = self._node(event, None)
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self.problems.append(node.problem(f"tags ('{shown}') are not part of the language", "leave it out"))

    def _list(self, event: yaml.Event, path: tuple, depth: int) -> Node:
        node = self._node(event, [])
        node.length = 1
        while not isinstance(self.events[self.next], yaml.SequenceEndEvent):
            is_alias = isinstance(self.events[self.next], yaml.AliasEvent)
            item = self._build((*path, len(node.value)), depth + 1)
            if not is_alias:  # its anchor has been complained about
                node.value.append(item)
        self.next += 1
        return node

    def _map(self, event: yaml.Event, path: tuple, depth: int) -> Node:
        node = self._node(event, {})
        node.length = 1
        while not isinstance(self.events[self.next], yaml.MappingEndEvent):
            key = self._build(path, depth + 1)
            is_alias = isinstance(self.events[self.next], yaml.AliasEvent)
            value = self._build((*path, key.raw), depth + 1)
            if not is_alias:
                self._add(node, key, value, path)
        self.next += 1
        return node

    def _add(self, node: Node, key: Node, value: Node, path: tuple) -> None:
        name = key.value
        if key.raw == "<<" and not key.style:
            hint = "share a file with 'extends' instead"
            self.problems.append(key.problem("merge keys ('<<') are not part of the language", hint))
        elif isinstance(name, bool) or not isinstance(name, (str, int)):
            self.problems.append(key.problem(f"a key must be text, this is {key.kind}", "put it in quotes"))
        elif isinstance(name, int) and path[:1] != ("checks",):
            self.problems.append(key.problem("a key must be text, this is a number", f'write "{key.raw}"'))
        elif name in node.value:
            first = node.keys[name]
            self.problems.append(
                key.problem(f"'{name}' is given twice; first in line {first.line + 1}, column {first.column + 1}")
            )
        else:
            node.value[name], node.keys[name] = value, key
