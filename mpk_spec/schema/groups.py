"""Names in the sections that refer to operators from outside: fusions, tensors, schedule; and sizes in checks."""

from __future__ import annotations

from collections.abc import Iterator

from mpk_spec.errors import Problem, did_you_mean
from mpk_spec.schema.draft import Draft, operators
from mpk_spec.schema.models import WHOLE_KERNEL, Repeat, Settings


def check(draft: Draft) -> Iterator[Problem]:
    """Everything wrong with them."""
    yield from _check_fusions(draft)
    yield from _check_tensors(draft)
    yield from _check_schedule(draft)
    yield from _check_sizes_named(draft)


def _unknown(draft: Draft, name: str, known: set[str], kind: str) -> tuple[str, str]:
    """Message and hint: an unknown block is one mistake, however many of its operators are named."""
    block, dot, _ = name.rpartition(".")
    blocks = draft.written("blocks")
    if dot and block not in blocks and "." not in block and block not in known:
        return f"unknown block '{block}'", did_you_mean(block, blocks, "blocks")
    return f"unknown {kind} '{name}'", did_you_mean(name, known, f"{kind.split()[0]}s")


def _check_fusions(draft: Draft) -> Iterator[Problem]:
    known = operators(draft)
    owner: dict[str, str] = {}
    for name, fusion in draft.file.fusions.items():
        homes = set()
        for index, member in enumerate(fusion.of):
            path = ("fusions", name, "of", index)
            if member not in known:
                yield draft.problem(path, *_unknown(draft, member, known, "operator"))
                continue
            if member in owner:
                where = f"fusion '{owner[member]}'" if owner[member] != name else "this fusion"
                yield draft.problem(path, f"'{member}' is already in {where}", "an operator is computed in one fusion")
            owner.setdefault(member, name)
            homes.add(member.rpartition(".")[0])
        if len(homes) > 1:
            said = " and ".join(f"block '{h}'" if h else "the top level" for h in sorted(homes))
            yield draft.problem(
                ("fusions", name, "of"), f"fusion '{name}' has operators of {said}", "a fusion stays in one block"
            )
        yield from _check_into(draft, name, homes)


def _check_into(draft: Draft, name: str, homes: set[str]) -> Iterator[Problem]:
    into = draft.file.fusions[name].into
    if into is None:
        return
    path = ("fusions", name, "into")
    others = draft.written("fusions") - {name}
    if into not in others:
        yield draft.problem(path, f"unknown fusion '{into}'", did_you_mean(into, others, "fusions"))
    elif homes and homes != {""}:
        hint = "'into' puts operators from before the layers into the first layer's fusion"
        yield draft.problem(path, f"'{name}' is inside a block", hint)


def _check_tensors(draft: Draft) -> Iterator[Problem]:
    known = operators(draft) | {k for k, op in draft.layers.items() if isinstance(op, Repeat)}
    for name in draft.file.tensors.__pydantic_extra__:
        if name not in known:
            yield draft.problem(("tensors", name), *_unknown(draft, name, known, "value"), on="key")


_DERIVED = {"merge": "attention", "reduce": "linear", "all_reduce": None, "partial": "sample"}


def _check_schedule(draft: Draft) -> Iterator[Problem]:
    fused = {member: name for name, fusion in draft.file.fusions.items() for member in fusion.of}
    samples = {name for name, op in draft.layers.items() if getattr(op, "op", None) == "sample"}  # groups of their own
    cut = {
        g for rule in draft.file.schedule for g, s in rule.set.items() if s.fuse is False or isinstance(s.fuse, list)
    }
    inside = {member for member, name in fused.items() if not cut & {name, "*"}} - samples
    known = (operators(draft) - inside) | draft.written("fusions")
    for index, rule in enumerate(draft.file.schedule):
        for group, settings in rule.set.items():
            path = ("schedule", index, "set", group)
            yield from _check_whole_kernel(draft, path, settings)
            base, _, derived = group.rpartition(".")
            if group in known | {"*"} or (derived in _DERIVED and base in known | set(fused)):
                yield from _check_fuse(draft, path, settings)
            elif group in fused:
                hint = f"write '{fused[group]}'"
                yield draft.problem(path, f"'{group}' is computed in fusion '{fused[group]}'", hint, on="key")
            else:
                yield draft.problem(path, *_unknown(draft, group, known, "operator or fusion"), on="key")


def _check_fuse(draft: Draft, path: tuple, settings: Settings) -> Iterator[Problem]:
    """`fuse` is of fusions; a list names operators of one."""
    group, fuse, fusions = path[-1], settings.fuse, draft.file.fusions
    if fuse is None or (group == "*" and not isinstance(fuse, list)):
        return
    if group == "*":
        yield draft.problem((*path, "fuse"), "operators are listed for one fusion, not for '*'", "name the fusion")
    elif group not in draft.written("fusions"):
        home = next((name for name, fusion in fusions.items() if group in fusion.of), None)
        hint = f"it is in '{home}'" if home else did_you_mean(group, fusions, "fusions")
        yield draft.problem((*path, "fuse"), f"'{group}' is no fusion", hint, on="key")
    elif group in fusions:
        for index, member in enumerate(fuse if isinstance(fuse, list) else ()):
            if member not in fusions[group].of:
                hint = did_you_mean(member, fusions[group].of, "operators of it")
                yield draft.problem((*path, "fuse", index), f"'{member}' is not in fusion '{group}'", hint)


def _check_whole_kernel(draft: Draft, path: tuple, settings: Settings) -> Iterator[Problem]:
    """Some settings have no group."""
    for key in WHOLE_KERNEL if path[-1] != "*" else ():
        if getattr(settings, key) is not None:
            said = f"'{key}' holds for the whole kernel, not for '{path[-1]}' alone"
            yield draft.problem((*path, key), said, "write it under '*'", on="key")


def _check_sizes_named(draft: Draft) -> Iterator[Problem]:
    sizes = draft.written("sizes") - {"common"}
    for name, given in draft.file.checks.items():
        size, path = given.__pydantic_extra__.get("size"), ("checks", name, "size")
        if size is not None and not isinstance(size, str):
            yield draft.problem(path, f"'size' must be text, this is {draft.tree.at(path).kind}")
        elif size is not None and size not in sizes:
            yield draft.problem(path, f"unknown size '{size}'", did_you_mean(size, sizes, "sizes"))
