"""`extends`: a file says how it differs from another one.

Maps merge by key, null deletes, lists replace. Identity is not inherited: model, sizes, checks and schedule rules made
for a target stay with the file that wrote them; the child's other rules come after the parent's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpk_spec.errors import Problem, SpecError, did_you_mean
from mpk_spec.paths import specs_dir
from mpk_spec.schema.models import SPEC_VERSION
from mpk_spec.schema.nodes import Node, shown
from mpk_spec.schema.reader import read_text, read_tree

IDENTITY = ("extends", "name", "spec", "model", "sizes", "checks")


def resolve(path: Path, text: str | None, ops: frozenset[str]) -> tuple[Node, list[Problem]]:
    """The merged tree of a file and all that it extends, and what is wrong in them. `ops`: the operators' keys."""
    chain, problems = _read_chain(path, text)
    merger = _Merger(ops)
    tree = chain[-1]
    for child in reversed(chain[:-1]):
        tree = merger.extend(tree, child)
    return tree, problems + merger.problems


def _read_chain(path: Path, text: str | None) -> tuple[list[Node], list[Problem]]:
    """The trees of the file, of what it extends, and so on."""
    trees: list[Node] = []
    problems: list[Problem] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        tree, found = read_tree(path, read_text(path) if text is None else text)
        trees.append(tree)
        problems += [*found, *_version_problems(tree)]
        text = None
        parent = tree.child("extends")
        if parent is None:
            return trees, problems
        if not isinstance(parent.value, str):
            hint = "write the path of one file"
            raise SpecError([*problems, parent.problem(f"'extends' must be text, this is {parent.kind}", hint)])
        path = _named(path.parent, parent.value)
        if path.resolve() in seen:
            loop = " -> ".join(p.name for p in [*seen[seen.index(path.resolve()) :], path])
            raise SpecError([*problems, parent.problem(f"'extends' goes in a circle: {loop}")])
        if not path.is_file():
            raise SpecError([*problems, _missing(parent, path)])


def _named(folder: Path, name: str) -> Path:
    """What `extends: name` means in a file of `folder`: a file, or by its bare name a spec that comes with mpk-spec."""
    return specs_dir() / f"{name}.yaml" if _is_bare(name) else folder / name


def _is_bare(name: str) -> bool:
    return "/" not in name and Path(name).suffix not in (".yaml", ".yml")


def _missing(parent: Node, path: Path) -> Problem:
    ours = [p.stem for p in specs_dir().glob("*.yaml")]
    if _is_bare(parent.value):
        return parent.problem(f"there is no spec named '{parent.value}'", did_you_mean(parent.value, ours, "specs"))
    said = f"there is no file '{shown(path)}'"
    if path.stem in ours:
        return parent.problem(said, f"'extends: {path.stem}' means the spec that comes with mpk-spec")
    return parent.problem(said, did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")], "files"))


def _version_problems(tree: Node) -> list[Problem]:
    version = tree.child("spec")
    if version is None:
        return [tree.problem("'spec' is missing", f"start the file with 'spec: {SPEC_VERSION}'")]
    if version.value != SPEC_VERSION:
        hint = f"this version of mpk-spec reads '{SPEC_VERSION}'"
        return [version.problem(f"unsupported version of the language: {version.raw or version.kind}", hint)]
    return []


class _Merger:
    def __init__(self, ops: frozenset[str]):
        self.ops, self.problems = ops, []

    def extend(self, base: Node, child: Node) -> Node:
        inherited = {k: v for k, v in base.value.items() if k not in IDENTITY}
        keys = {k: base.keys[k] for k in inherited}
        kept = _unpinned(base.child("schedule"))
        own = child.child("schedule")
        merged = self._merge(replace(base, value=inherited, keys=keys), child, ())
        if own is not None and isinstance(own.value, list):
            merged.value["schedule"] = replace(own, value=[*kept, *own.value])
        elif own is None and "schedule" in inherited:
            merged.value["schedule"] = replace(base.child("schedule"), value=kept)
        return merged

    def _merge(self, base: Node, child: Node, path: tuple) -> Node:
        if not isinstance(base.value, dict) or not isinstance(child.value, dict) or self._other_op(base, child, path):
            return child
        value, keys = dict(base.value), dict(base.keys)
        for key, node in child.value.items():
            if node.value is None and (key in base.value or path):
                if key not in base.value:
                    near = did_you_mean(str(key), map(str, base.value), "keys")
                    self.problems.append(
                        child.keys[key].problem(f"'{key}' cannot be deleted: {base.source.shown} has none", near)
                    )
                value.pop(key, None)
                keys.pop(key, None)
                continue
            value[key] = self._merge(base.value[key], node, (*path, key)) if key in base.value else node
            keys[key] = child.keys[key]
        return replace(child, value=value, keys=keys)

    def _other_op(self, base: Node, child: Node, path: tuple) -> bool:
        """Whether the child puts another operator in the place of an inherited one: nothing of that one stays."""
        is_op = (path[:1] == ("blocks",) and len(path) == 3) or (path[:1] == ("layers",) and len(path) == 2)
        theirs = self.ops & child.value.keys()
        return is_op and bool(theirs) and not theirs & base.value.keys()


def _unpinned(schedule: Node | None) -> list[Node]:
    """The rules of a schedule that hold for every target."""
    if schedule is None or not isinstance(schedule.value, list):
        return []

    def is_pinned(rule: Node) -> bool:
        when = rule.child("when")
        return when is not None and when.child("target") is not None

    return [rule for rule in schedule.value if not is_pinned(rule)]
