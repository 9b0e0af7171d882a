"""From a file to a Spec, with everything that is wrong in it reported at once.

Three passes: read and merge (`merge`), shapes of sections (`models`, by pydantic), names (`names`). A pass works on
what the ones before could make sense of, so that one cause gives one problem.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpk_spec.errors import Problem, SpecError, UserError, did_you_mean
from mpk_spec.ops import Op, public_ops
from mpk_spec.paths import specs_dir
from mpk_spec.schema import merge, names
from mpk_spec.schema.draft import Draft
from mpk_spec.schema.expressions import Expression, ExpressionError, expression_of
from mpk_spec.schema.models import Repeat, SpecFile, WeightDecl, WeightFields
from mpk_spec.schema.nodes import Node
from mpk_spec.schema.spec import Check, Size, Spec
from mpk_spec.schema.translate import translated

# What stands in for a required part that is missing or broken, so that the rest can still be checked.
_STAND_INS: dict[str, Any] = {
    "spec": "v1",
    "name": "unnamed",
    "model": {"architectures": ["none"]},
    "weights": {},
    "blocks": {},
    "layers": {},
}
_SHALLOW = ("spec", "name", "extends", "model", "shard")  # replaced as a whole when something in them is wrong


def load_spec(path_or_name: str | Path, *, text: str | None = None) -> Spec:
    """The spec in a file, or the one of that name that comes with mpk-spec.

    text: read instead of the file, as if it stood there. Raises SpecError with every problem found, UserError where
    there is no such file.
    """
    path = _find(path_or_name, text is not None)
    ops = public_ops()
    try:
        tree, problems = merge.resolve(path, text, frozenset(ops))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return _Loader(path, tree, ops, problems).spec()


def spec_names() -> list[str]:
    """The bare names of the specs that come with mpk-spec."""
    return sorted(p.stem for p in specs_dir().glob("*.yaml"))


def _find(path_or_name: str | Path, has_text: bool) -> Path:
    path = Path(path_or_name).expanduser()
    if has_text or path.is_file():
        return path
    name = str(path_or_name)
    is_bare = isinstance(path_or_name, str) and path.name == name and path.suffix not in (".yaml", ".yml")
    if is_bare:
        named = specs_dir() / f"{name}.yaml"
        if named.is_file():
            return named
        raise UserError(f"there is no spec named '{name}'", did_you_mean(name, spec_names(), "specs"))
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a spec file")
    beside = [p.name for p in path.parent.glob("*.y*ml")]
    raise UserError(f"there is no file {path}", did_you_mean(path.name, beside, "files there") if beside else None)


class _Loader:
    def __init__(self, path: Path, tree: Node, ops: dict[str, type[Op]], problems: list[Problem]):
        self.path, self.tree, self.ops, self.problems = path, tree, ops, problems
        self.broken: set[tuple] = set()

    def spec(self) -> Spec:
        file = self._sections()
        blocks = {
            name: {key: self._op(("blocks", name, key), raw) for key, raw in block.items()}
            for name, block in file.blocks.items()
        }
        layers = {key: self._layer(("layers", key), raw) for key, raw in file.layers.items()}
        weights = _weights(file)
        whens = {at: w for at, w in self._whens(file)}
        found = Draft(self.tree, file, self.ops, blocks, layers, weights, whens, frozenset(self.broken))
        if not any(_hides_names(path) for path in self.broken):
            self.problems += names.check(found)
        if self.problems:
            raise SpecError(self.problems)
        return Spec(
            path=self.path,
            spec=file.spec,
            name=file.name,
            model=file.model,
            dims=file.dims,
            values=file.values,
            shard=file.shard,
            weights=weights,
            state=file.state,
            tensor_default=file.tensors.default,
            tensors=dict(file.tensors.__pydantic_extra__),
            blocks={name: names.in_order(block) for name, block in blocks.items()},
            layers=names.in_order(layers),
            op_when=whens,
            fusions=file.fusions,
            schedule=file.schedule,
            sizes=_sizes(file),
            checks={k: Check(c.check or k, dict(c.__pydantic_extra__)) for k, c in file.checks.items()},
            per_layer=names.per_layer(file),
            tree=self.tree,
        )

    def _sections(self) -> SpecFile:
        """The file as models; what is wrong is noted, and left out until the rest is right."""
        data = self.tree.data()
        for _ in range(8):  # each round can uncover mistakes behind those of the round before
            try:
                return SpecFile.model_validate(data)
            except ValidationError as error:
                for path, problem in translated(error, SpecFile, self.tree):
                    if path != ("spec",):  # judged in every file of the chain already
                        self._note(path, problem)
                    _leave_out(data, path)
        raise SpecError(self.problems)

    def _note(self, path: tuple, problem: Problem) -> None:
        self.broken.add(path)
        self.problems.append(problem)

    def _op(self, path: tuple, raw: dict[str, Any]) -> Op | None:
        """The operator written at `path`; None, with the problem noted, where there is none."""
        node = self.tree.at(path)
        given = [key for key in raw if key in self.ops]
        if len(given) == 1:
            return self._validated(path, self.ops[given[0]], {k: v for k, v in raw.items() if k != "when"})
        if given:
            second = node.keys[given[1]]
            self._note(path, second.problem(f"'{path[-1]}' is two operators: '{given[0]}' and '{given[1]}'"))
        elif not raw:
            self._note(path, node.problem(f"'{path[-1]}' has no operator", did_you_mean("", self.ops, "operators")))
        else:
            first = next(iter(raw))
            self._note(path, node.keys[first].problem(*_no_operator(path[-1], list(raw), self.ops)))
        return None

    def _layer(self, path: tuple, raw: dict[str, Any]) -> Op | Repeat | None:
        if "repeat" in raw:
            return self._validated(path, Repeat, raw)
        return self._op(path, raw)

    def _validated(self, path: tuple, model: type, raw: dict[str, Any]) -> Any:
        pythons = {name for name, field in model.model_fields.items() if field.alias not in (None, name)}
        for name in pythons & raw.keys():  # `input`, by which Python calls the operand, is no key of the language
            known = [field.alias or n for n, field in model.model_fields.items()]
            hint = did_you_mean(name, known, "keys")
            self._note((*path, name), self.tree.key_at((*path, name)).problem(f"unknown key '{name}'", hint))
        raw = {key: value for key, value in raw.items() if key not in pythons}
        try:
            made = model.model_validate(raw)
        except ValidationError as error:
            wrong = set()
            for at, problem in translated(error, model, self.tree, path):
                self._note(at, problem)
                wrong.add(at[len(path)])
            fields = {name: field.alias or name for name, field in model.model_fields.items()}
            right = {name: raw[key] for name, key in fields.items() if key in raw and key not in wrong}
            return model.model_construct(set(right), **right)  # enough to check the names in the rest
        return made

    def _whens(self, file: SpecFile):
        entries = [(b, k, raw) for b, block in file.blocks.items() for k, raw in block.items()]
        entries += [("layers", key, raw) for key, raw in file.layers.items()]
        for block, key, raw in entries:
            if "when" not in raw:
                continue
            path = ("layers", key, "when") if block == "layers" else ("blocks", block, key, "when")
            try:
                yield (block, key), checked(raw["when"])
            except ExpressionError as error:
                inside = (error.offset, error.length)
                self._note(path, self.tree.at(path).problem(error.message, error.hint, inside))


_NAMING = ("dims", "values", "weights", "state", "blocks", "layers", "fusions")


def _hides_names(path: tuple) -> bool:
    """Whether a mistake at `path` leaves so many names unknown that complaints about names would be consequences."""
    is_section = len(path) == 1 and path[0] in _NAMING
    return is_section or path == ("weights", "layer") or (len(path) == 2 and path[0] == "blocks")


def checked(raw: Any) -> Expression:
    """`expression_of`, for a scalar that may be no scalar."""
    if isinstance(raw, (dict, list)):
        raise ExpressionError("a condition must be an expression")
    return expression_of(raw)


def _no_operator(name: str, keys: list[str], ops: dict[str, type[Op]]) -> tuple[str, str]:
    """Message and hint for an entry without an operator: perhaps one of its keys was meant to be one."""
    fields = {field.alias or n for op in ops.values() for n, field in op.model_fields.items()} | {"when"}
    strange = [key for key in keys if key not in fields]
    word = strange[0] if strange else ""
    if strange:
        return f"unknown operator '{word}'", did_you_mean(word, ops, "operators")
    return f"'{name}' has no operator", did_you_mean("", ops, "operators")


def _leave_out(data: dict[str, Any], path: tuple) -> None:
    """Takes the entry around `path` out of the data, so that validation can go on with the rest."""
    top = path[0] if path else ""
    entry = 3 if path[:2] == ("weights", "layer") and len(path) > 2 and path[2] != "prefix" else 2
    if len(path) < 2 or top in _SHALLOW:
        data.pop(top, None)
        if top in _STAND_INS:
            data[top] = _STAND_INS[top]
        return
    *way, last = path[:entry]
    holder = data
    for key in way:
        holder = holder[key]
    if path[:3] == ("weights", "layer", "prefix"):
        holder["layer"]["prefix"] = "{i}."
    elif isinstance(holder, list):
        holder[last] = {"set": {}}
    elif top == "blocks" and len(path) > 2 and isinstance(holder[last], dict):
        holder[last].pop(path[2], None)
    else:
        holder.pop(last, None)


def _weights(file: SpecFile) -> dict[str, WeightDecl]:
    """All weights, the layers' ones with their prefix."""
    found = {name: _declared(w, "", False) for name, w in file.weights.__pydantic_extra__.items()}
    layer = file.weights.layer
    if layer is not None:
        found |= {name: _declared(w, layer.prefix, True) for name, w in layer.__pydantic_extra__.items()}
    return found


def _declared(weight: WeightFields, prefix: str, layer: bool) -> WeightDecl:
    fields = {field.alias or name: getattr(weight, name) for name, field in WeightFields.model_fields.items()}
    return WeightDecl.model_validate({**fields, "from": prefix + weight.from_, "layer": layer})


def _sizes(file: SpecFile) -> dict[str, Size]:
    common = file.sizes.get("common")
    shared = dict(common.__pydantic_extra__) if common else {}
    sizes = {}
    for name, given in file.sizes.items():
        if name == "common":
            continue
        written = given.weights if isinstance(given.weights, list) else [given.weights] if given.weights else []
        sources = (*written, *([f"hub:{given.hub}"] if given.hub else []))
        sizes[name] = Size({**shared, **given.__pydantic_extra__}, sources)
    return sizes
