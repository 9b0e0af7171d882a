"""Drafts a spec for a checkpoint: the nearest spec there is, and how the checkpoint differs from it.

What tensor names and shapes tell is written; what they do not tell is a comment that starts with `check:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.schema.expressions import ExpressionError

if TYPE_CHECKING:
    from mpk_spec.schema.models import WeightDecl
    from mpk_spec.schema.spec import Spec
    from mpk_spec.weights import Checkpoint

Address = tuple[str, str]  # (block, value)
# The bookkeeping of config.json: it does not change what the model computes.
NO_MATTER = re.compile(
    r"^_|_token_id$|dropout|_pdrop$|^(architectures|model_type|transformers_version|torch_dtype|dtype|initializer_range|use_cache)$"
)


@dataclass
class Changes:
    """What the draft says beside its parent. Values are YAML in one line; comments belong to the line of their key."""

    weights: dict[str, str] = field(default_factory=dict)
    layer: dict[str, str] = field(default_factory=dict)
    blocks: dict[Address, str] = field(default_factory=dict)
    fusions: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    """Of the whole file."""
    unread: list[str] = field(default_factory=list)
    """Weights that no operator is known for: written as comments, since a spec declares only what it reads."""


def canonical(tensor: str) -> str:
    """`model.layers.{i}.mlp.experts.{e}.up_proj.weight` of any layer's and expert's tensor."""
    for placeholder in ("{i}", "{e}"):
        tensor = re.sub(r"(?<=\.)\d+(?=\.)", placeholder, tensor, count=1)
    return tensor


def published(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name; of layers that differ, the first one's."""
    found: dict[str, tuple[int, ...]] = {}
    for name in checkpoint.names():
        found.setdefault(canonical(name), tuple(checkpoint.shape(name)))
    return found


def nearest(checkpoint: Checkpoint, specs: Sequence[Spec]) -> Spec:
    """The spec of this architecture, else the one most alike by tensor names. Raises UserError where none is alike."""
    tensors = set(published(checkpoint))
    scores = {spec.name: max(_likeness(tensors, spec, prefix) for prefix in spec.model.prefixes) for spec in specs}
    known = [spec for spec in specs if checkpoint.architecture in spec.model.architectures]
    ranked = sorted(known or specs, key=lambda spec: -scores[spec.name])
    if not ranked or not scores[ranked[0].name]:
        raise UserError(
            f"no spec is near {checkpoint.architecture}: none of its {len(tensors)} tensor names is known",
            "start from a copy of specs/qwen3.yaml, which explains itself",
        )
    return ranked[0]


def _likeness(tensors: set[str], spec: Spec, prefix: str) -> float:
    theirs = {prefix + weight.from_ for weight in spec.weights.values()}
    return len(tensors & theirs) / len(tensors | theirs)


class Drafter:
    """Finds out how a checkpoint differs from a spec."""

    def __init__(self, checkpoint: Checkpoint, parent: Spec):
        from mpk_spec.weights import text_config

        self.checkpoint, self.parent, self.changes = checkpoint, parent, Changes()
        self.config = text_config(checkpoint.config)
        every = published(checkpoint)
        self.prefix = max(parent.model.prefixes, key=lambda p: _likeness(set(every), parent, p))
        self.tensors = {name.removeprefix(self.prefix): shape for name, shape in every.items()}
        self.dims = self._evaluated("dims", {})
        self.values = self._evaluated("values", {**self.dims, "i": 0})

    def draft(self) -> Changes:
        by_source = {weight.from_: name for name, weight in self.parent.weights.items()}
        for name, weight in self.parent.weights.items():
            if weight.from_ in self.tensors:
                self._check_shape(name, weight)
            elif not self._is_tied(weight):
                self._drop(name, weight)
        for source in self.tensors:
            if source not in by_source:
                self._add(source)
        self._ask_about_config()
        return self.changes

    def _ask_about_config(self) -> None:
        """Switches of this class that the parent's has not: a window or a scale shows in no tensor's name."""
        from mpk_spec.weights import normalise_config, text_config

        if self.checkpoint.architecture in self.parent.model.architectures:
            return
        known = text_config(normalise_config(self.parent.model.architectures[0], {}))
        for key, value in sorted(self.config.items()):
            if value not in (None, False) and key not in known and not NO_MATTER.search(key):
                said = (
                    f"config.{key} is {value!r}, which {self.parent.name} knows nothing of: does it change the numbers?"
                )
                self.changes.questions.append(said)

    def parameters(self) -> int:
        return sum(prod(self.checkpoint.shape(name)) for name in self.checkpoint.names())

    def requires(self) -> tuple[list[str], list[str]]:
        """The parent's requirements that hold here; and those that do not, each with why."""
        kept, broken = [], []
        for requirement in self.parent.model.requires:
            try:
                if requirement.evaluate({"config": self.config, **self.dims}) is False:
                    broken.append(f"{requirement.text}, which this config does not meet")
                else:
                    kept.append(requirement.text)
            except ExpressionError as error:
                broken.append(f"{requirement.text}: {error.message}")
        return kept, broken

    # ---- dims and shapes

    def _evaluated(self, section: str, known: dict[str, Any]) -> dict[str, Any]:
        """The parent's dims or values for this config; of values by layer, the first layer's."""
        found: dict[str, Any] = {}
        failed: set[str] = set()
        waiting = dict(getattr(self.parent, section))
        while ready := [name for name, e in waiting.items() if not e.names & waiting.keys()]:
            for name in ready:
                expression = waiting.pop(name)
                try:
                    found[name] = expression.evaluate({"config": self.config, **known, **found})
                except ExpressionError as error:
                    failed.add(name)
                    if expression.names & failed:
                        continue  # a consequence
                    said = f"'{name}' in {section} is {expression.text} in the parent: {error.message}"
                    self.changes.questions.append(said)
        return found

    def _is_tied(self, weight: WeightDecl) -> bool:
        """Whether the checkpoint needs no tensor for it."""
        if weight.tie is None:
            return False
        try:
            return bool(weight.tie.when.evaluate({"config": self.config, **self.dims, **self.values}))
        except ExpressionError:
            return False

    def _check_shape(self, name: str, weight: WeightDecl) -> None:
        try:
            wanted = tuple(e.evaluate({"config": self.config, **self.dims}) for e in weight.shape)
        except ExpressionError:
            wanted = ()
        found = self.tensors[weight.from_]
        if wanted[len(weight.stack or ()) :] != found:
            said = ", ".join(e.text for e in weight.shape)
            self.changes.questions.append(f"weight '{name}' is [{said}] in the parent and {list(found)} here")

    def _shape(self, shape: tuple[int, ...], known: Iterable[str] = ()) -> tuple[str, list[str]]:
        """A shape in dims, and what is unsure about it. known: expressions that are right if their size is."""
        texts, doubts = [], []
        for size in shape:
            sure = [t for t in known if self._value(t) == size]
            fitting = sure or [t for t in self._sizes() if self._value(t) == size]
            texts.append(fitting[0] if fitting else str(size))
            if not fitting:
                doubts.append(f"no dim is {size}")
            elif len(fitting) > 1 and not sure:
                doubts.append(f"{size} is also {' and '.join(fitting[1:])}")
        return f"[{', '.join(texts)}]", doubts

    def _sizes(self) -> list[str]:
        """Expressions that a shape may hold: those of the parent's shapes, and its dims."""
        axes = [e.text for weight in self.parent.weights.values() for e in weight.shape]
        return list(dict.fromkeys([*axes, *self.dims]))

    def _value(self, text: str) -> int | None:
        from mpk_spec.schema.expressions import expression_of

        try:
            return expression_of(text).evaluate({"config": self.config, **self.dims})
        except ExpressionError:
            return None

    # ---- operators of the parent

    def _operators(self) -> Iterable[tuple[Address, Any, dict[str, Any]]]:
        """(address, operator, as written) of every operator."""
        for block, entries in self.parent.blocks.items():
            for key, op in entries.items():
                yield (block, key), op, self.parent.tree.at(("blocks", block, key)).data()

    def _readers(self, weight: str) -> list[tuple[Address, Any, str]]:
        """(address, operator, field) of the operators that read a weight."""
        return [(at, op, f) for at, op, raw in self._operators() for f, value in raw.items() if value == weight]

    def _redirect(self, block: str, old: str, new: str) -> None:
        """Everything in the block that reads `old` reads `new`."""
        for (home, key), _, raw in self._operators():
            if home != block or key == new:
                continue
            for name, value in raw.items():
                if value == old:
                    self._change(block, key, f"{name}: {new}")
                elif isinstance(value, list) and old in value:
                    self._change(block, key, f"{name}: [{', '.join(new if v == old else v for v in value)}]")

    def _change(self, block: str, key: str, text: str) -> None:
        before = self.changes.blocks.get((block, key), "{}")
        self.changes.blocks[block, key] = "{" + ", ".join(filter(None, [before[1:-1], text])) + "}"

    # ---- weights that the checkpoint lacks

    def _drop(self, name: str, weight: WeightDecl) -> None:
        readers = self._readers(name)
        if not readers or any(f != "bias" and op.op != "rmsnorm" for _, op, f in readers):
            self.changes.questions.append(f"the checkpoint has no '{weight.from_}', which weight '{name}' is read from")
            return
        (self.changes.layer if weight.layer else self.changes.weights)[name] = "null"
        for (block, key), op, f in readers:
            if f == "bias":
                self._change(block, key, "bias: null")
                continue
            self.changes.blocks[block, key] = "null"
            self._redirect(block, key, op.operands()[0])
            self._regroup(f"{block}.{key}", None)

    def _regroup(self, member: str, before: str | None) -> None:
        """In fusions: takes `member` out, or puts it before another one."""
        for name, fusion in self.parent.fusions.items():
            of = list(fusion.of)
            written = self.changes.fusions.get(name)
            if written and written != "null":
                of = written.partition("[")[2].rpartition("]")[0].split(", ")
            if before is None and member in of:
                of.remove(member)
            elif before in of:
                of.insert(of.index(before), member)
            else:
                continue
            self.changes.fusions[name] = f"{{of: [{', '.join(of)}]}}" if of else "null"
        if before is None and member in self.parent.tensors:
            self.changes.tensors[member] = "null"

    # ---- tensors that the parent does not know

    def _add(self, source: str) -> None:
        module, _, kind = source.rpartition(".")
        if kind == "bias" and self._add_bias(source, module):
            return
        if kind == "weight" and len(self.tensors[source]) == 1 and self._add_head_norm(source, module):
            return
        shape, doubts = self._shape(self.tensors[source])
        name = self._name(module, kind)
        self.changes.unread.append(f"{name}: {{from: {source}, shape: {shape}}}" + _said(doubts))

    def _add_bias(self, source: str, module: str) -> bool:
        """A bias beside a weight that the parent knows, of the linears that read it."""
        sibling = next((n for n, w in self.parent.weights.items() if w.from_ == f"{module}.weight"), None)
        readers = [(at, op) for at, op, _ in self._readers(sibling) if op.op == "linear"] if sibling else []
        if not readers:
            return False
        name = self._name(module, "bias")
        rows = self.parent.weights[sibling].shape[0].text
        self._declare(name, source, self.tensors[source], [rows])
        for (block, key), _ in readers:
            self._change(block, key, f"bias: {name}")
        return True

    def _add_head_norm(self, source: str, module: str) -> bool:
        """A norm of queries or keys, head by head: `self_attn.q_norm` after what `self_attn.q_proj` makes."""
        sibling = f"{module.removesuffix('_norm')}_proj.weight"
        weight = next((n for n, w in self.parent.weights.items() if w.from_ == sibling), None)
        made = [at for at, op, _ in self._readers(weight) if op.op == "linear"] if weight else []
        if not module.endswith("_norm") or not made or self.tensors[source] != (self.dims.get("head_dim"),):
            return False
        name = self._name(module, "norm")
        self._declare(name, source, self.tensors[source], ["head_dim"])
        for block, key in made:
            normed = f"{key}n"
            self._redirect(block, key, normed)
            eps = next((raw["eps"] for _, op, raw in self._operators() if op.op == "rmsnorm"), "1e-6")
            self.changes.blocks[block, normed] = f"{{rmsnorm: {key}, weight: {name}, eps: {eps}}}"
            readers = [at for at, _, raw in self._operators() if at[0] == block and key in raw.values()]
            for reader in readers[:1]:
                self._regroup(f"{block}.{normed}", ".".join(reader))
        self.changes.questions.append(
            f"'{name}' is taken for a norm of each head before the rope, its gain for w, not 1 + w"
        )
        return True

    def _declare(self, name: str, source: str, shape: tuple[int, ...], known: Iterable[str]) -> None:
        prefix = next((w.from_[: w.from_.index("{i}.") + 4] for w in self.parent.weights.values() if w.layer), "")
        text, doubts = self._shape(shape, known)
        in_layer = bool(prefix) and source.startswith(prefix)
        where = self.changes.layer if in_layer else self.changes.weights
        where[name] = f"{{from: {source.removeprefix(prefix) if in_layer else source}, shape: {text}}}" + _said(doubts)

    def _name(self, module: str, kind: str) -> str:
        """`q_bias` for self_attn.q_proj's bias: the last word of the module, unless that is taken."""
        last = re.sub(r"\W", "_", module.rpartition(".")[2])
        base = {"bias": f"{last.removesuffix('_proj')}_bias"}.get(kind, last)
        taken = {*self.parent.weights, *self.changes.layer, *self.changes.weights}
        return base if base not in taken else re.sub(r"\W+", "_", f"{module}_{kind}").strip("_")


def _said(doubts: list[str]) -> str:
    return f"  # check: {'; '.join(doubts)}" if doubts else ""
