"""A draft as the text of a spec file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpk_spec.schema.new_spec import NO_MATTER, Changes, Drafter
from mpk_spec.schema.nodes import plain_scalar

if TYPE_CHECKING:
    from mpk_spec.schema.spec import Spec
    from mpk_spec.weights import Checkpoint

WIDTH = 120
BARE = re.compile(r"^[\w/.-]+( [\w/.*+=<>!\"'-]+)*$")  # text that needs no quotes anywhere


def draft_text(checkpoint: Checkpoint, parent: Spec, name: str, extends: str) -> str:
    """The file's content. extends: the parent's path as the file is to write it."""
    drafter = Drafter(checkpoint, parent)
    changes = drafter.draft()
    parts = [
        _head(checkpoint, parent, name, extends, changes),
        _model(checkpoint, drafter),
        _weights(changes),
        _blocks(changes),
        _section("tensors", changes.tensors),
        _section("fusions", changes.fusions),
        _sizes(checkpoint, drafter),
        _checks(drafter),
    ]
    return "\n".join(part for part in parts if part)


def size_name(parameters: int) -> str:
    """`0.6b`, `135m`."""
    for unit, step in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
        if parameters >= step / 2:
            shown = f"{parameters / step:.1f}" if parameters < 10 * step else f"{parameters / step:.0f}"
            return shown.removesuffix(".0") + unit
    return str(parameters)


def _head(checkpoint: Checkpoint, parent: Spec, name: str, extends: str, changes: Changes) -> str:
    """Comments on the whole file, and its identity."""
    why = "which reads the same class" if checkpoint.architecture in parent.model.architectures else "the most alike"
    lines = [
        f"# Drafted by `mpk-spec new` from {checkpoint.source}, as a change to {parent.name}, {why}.",
        "# It is a guess from tensor names and shapes: see to each line with 'check:', then run `mpk-spec test` on it.",
        *(f"# check: {question}" for question in changes.questions),
        "spec: v1",
        f"extends: {flow(extends)}",
        f"name: {flow(name)}",
    ]
    return "\n".join(lines) + "\n"


def _model(checkpoint: Checkpoint, drafter: Drafter) -> str:
    model = drafter.parent.model
    kept, broken = drafter.requires()
    lines = ["model:", f"  architectures: [{checkpoint.architecture}]"]
    if len(model.config) > 1:
        lines.append(f"  config: {flow([e.text for e in model.config])}")
    if list(model.prefixes) != [""]:
        lines.append(f"  prefixes: {flow(list(model.prefixes))}")
    if model.ignore:
        lines.append(f"  ignore: {flow(list(model.ignore))}")
    lines.append("  requires:  # check: what else in the config would make this file compute something wrong")
    lines += [f"    - {flow(text)}" for text in kept]
    lines += [f"    # check: {drafter.parent.name} requires {text}" for text in broken]
    if not kept:
        lines[
            lines.index("  requires:  # check: what else in the config would make this file compute something wrong")
        ] = "  requires: []  # check: what in the config would make this file compute something wrong"
    return "\n".join(lines) + "\n"


def _weights(changes: Changes) -> str:
    if not (changes.weights or changes.layer or changes.unread):
        return ""
    lines = ["weights:" if changes.weights or changes.layer else "# weights:"]
    lines += [f"  {name}: {text}" for name, text in changes.weights.items()]
    lines += ["  layer:"] * bool(changes.layer) + [f"    {name}: {text}" for name, text in changes.layer.items()]
    if changes.unread:
        lines.append("  # check: no operator is known for these tensors; a checkpoint with unread tensors is refused")
        lines += [f"  # {text}" for text in changes.unread]
    return "\n".join(lines) + "\n"


def _blocks(changes: Changes) -> str:
    lines: list[str] = []
    for block in dict.fromkeys(block for block, _ in changes.blocks):
        lines.append(f"  {block}:")
        lines += [f"    {key}: {text}" for (home, key), text in changes.blocks.items() if home == block]
    return "\n".join(["blocks:", *lines]) + "\n" if lines else ""


def _section(title: str, entries: dict[str, str]) -> str:
    return "\n".join([f"{title}:", *(f"  {key}: {text}" for key, text in entries.items())]) + "\n" if entries else ""


def _sizes(checkpoint: Checkpoint, drafter: Drafter) -> str:
    """The checkpoint's config as a size, and a tiny one of the same kind where the parent has one."""
    keys = {k: v for k, v in _config_keys(checkpoint).items() if not NO_MATTER.search(k) and v is not None}
    shared = {k: v for k, v in keys.items() if not isinstance(v, list)}
    own = {k: v for k, v in keys.items() if isinstance(v, list)}  # by layer: a smaller model has others
    hub = checkpoint.source.removeprefix("hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not Path(hub).exists():
        own = {"hub": hub, **own}
    lines = ["sizes:", *_wrapped("common", shared)]
    tiny = drafter.parent.sizes.get("tiny")
    if tiny is not None:
        numbers = {k: v for k, v in tiny.config.items() if isinstance(v, int) and not isinstance(v, bool)}
        lines += _wrapped("tiny", numbers)
    return "\n".join([*lines, *_wrapped(size_name(drafter.parameters()), own)]) + "\n"


def _config_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json as published; of a checkpoint without one, the whole config."""
    path = Path(checkpoint.directory) / "config.json" if checkpoint.directory else None
    if path is None or not path.is_file():
        return checkpoint.config
    return json.loads(path.read_text(encoding="utf-8"))


def _checks(drafter: Drafter) -> str:
    lines = [f"  parameters: {{size: {size_name(drafter.parameters())}, equal: {drafter.parameters()}}}"]
    if "tiny" in drafter.parent.sizes:
        lines.append("  kl_ratio: {size: tiny, positions: 256, at_most: 1.10}")
        if any(
            op.op == "rope" and op.parameters == "rope" for b in drafter.parent.blocks.values() for op in b.values()
        ):
            lines.append("  planted: {size: tiny, drop: [values.rope], must_fail: kl_ratio}")
    return "\n".join(["checks:", *lines]) + "\n"


def _wrapped(key: str, entries: dict[str, Any]) -> list[str]:
    """`key: {a: 1, b: 2}` in as many lines as it takes."""
    lines, pad = [f"  {flow(key)}: {{"], " " * (len(flow(key)) + 5)
    for number, (name, value) in enumerate(entries.items()):
        text = f"{flow(name)}: {flow(value)}" + ("," if number + 1 < len(entries) else "")
        if len(lines[-1]) + len(text) + 2 > WIDTH:
            lines[-1] = lines[-1].rstrip()
            lines.append(pad + text)
        else:
            lines[-1] += text
        lines[-1] += " "
    lines[-1] = lines[-1].rstrip() + "}"
    return lines


def flow(value: Any) -> str:
    """YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(v) for v in value) + "]"
    if isinstance(value, str):
        return value if BARE.match(value) and plain_scalar(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
