"""The names that a spec's expressions see: config, dims, values and the layer index, evaluated on demand."""

from __future__ import annotations

from typing import Any

from mpk_spec.errors import Problem, SpecError
from mpk_spec.schema import Expression, ExpressionError, Spec


class Environment:
    """Evaluates expressions of one spec for one config; `problems` collects what goes wrong, each cause once."""

    def __init__(self, spec: Spec, config: dict[str, Any], tp: int, batch: int = 1, context: int = 1):
        self.spec, self.tp = spec, tp
        self.built_in = {"batch": batch, "context": context}
        self.problems: list[Problem] = []
        self.config = self._text_config(config)
        self.dims: dict[str, int] = {}
        self._broken: set[str] = set()
        for name in spec.dims:
            self._dim(name)
        self._check_degree()
        self.local = {**self.dims, **{d: self._share(d) for d in self.split_dims()}}

    def _text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        for place in self.spec.model.config:
            try:
                found = place.evaluate({"config": config})
            except ExpressionError:
                continue
            if isinstance(found, dict) and "num_hidden_layers" in found:
                return found
        raise SpecError(
            self.spec.problem(("model", "config"), "the checkpoint's config has no 'num_hidden_layers' there")
        )

    def split_dims(self) -> dict[str, str]:
        """Dims that tensor parallelism divides, with the rule that says so."""
        rules = self.spec.shard.get("tp", {})
        return {d: rule for d, rule in rules.items() if rule != "replicate" and d in self.dims}

    def parts(self, dim: str) -> int:
        """Into how many different parts the ranks divide `dim`."""
        rule = self.split_dims().get(dim)
        if rule is None:
            return 1
        return min(self.tp, self.dims[dim]) if rule == "split_or_replicate" else self.tp

    def _share(self, dim: str) -> int:
        """A rank's part of a dim; the last rank's may be smaller where the rule pads."""
        return -(-self.dims[dim] // self.parts(dim))

    def _check_degree(self) -> None:
        """Notes the first dim that the degree does not divide, with the degrees that all dims allow."""
        wrong = next((d for d in self.split_dims() if not self._divides(d, self.tp)), None)
        if wrong is not None:
            works = [str(n) for n in range(1, 9) if all(self._divides(d, n) for d in self.split_dims())]
            self.problems.append(
                self.spec.problem(
                    ("shard", "tp", wrong),
                    f"{self.dims[wrong]} {wrong} do not divide over {self.tp} ranks",
                    f"degrees that work: {', '.join(works)}",
                )
            )

    def _divides(self, dim: str, degree: int) -> bool:
        size, rule = self.dims[dim], self.split_dims()[dim]
        replicates = rule == "split_or_replicate" and degree % size == 0
        return rule == "split_padded" or size % degree == 0 or replicates

    def _dim(self, name: str) -> int:
        if name not in self.dims and name not in self._broken:
            expression = self.spec.dims[name]
            value = self.evaluate(
                expression, ("dims", name), {n: self._dim(n) for n in expression.names if n in self.spec.dims}
            )
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                if name not in self._broken:
                    shown = "none" if value is None else repr(value)
                    self.problems.append(
                        self.spec.problem(("dims", name), f"a dim is a positive whole number, '{name}' is {shown}")
                    )
                self._broken.add(name)
                return 1
            self.dims[name] = value
        return self.dims.get(name, 1)

    def value(self, name: str, layer: int | None) -> Any:
        expression = self.spec.values[name]
        return self.evaluate(expression, ("values", name), self.names(expression, layer), layer)

    def names(self, expression: Expression, layer: int | None, local: bool = False) -> dict[str, Any]:
        """The names that an expression uses; dims are a rank's share where `local`."""
        dims = self.local if local else self.dims
        found: dict[str, Any] = {n: dims[n] for n in expression.names if n in dims}
        found |= {n: self.built_in[n] for n in expression.names if n in self.built_in}
        found |= {n: self.value(n, layer) for n in expression.names if n in self.spec.values}
        return found

    def mentions_layer(self, expression: Expression) -> bool:
        """Whether its value may differ from layer to layer."""
        return "i" in expression.names or any(
            self.mentions_layer(self.spec.values[n]) for n in expression.names if n in self.spec.values
        )

    def evaluate(self, expression: Expression, path: tuple, names: dict[str, Any], layer: int | None = None) -> Any:
        """The value, or None after noting the problem at `path`."""
        env = {"config": self.config, **names}
        if layer is not None:
            env["i"] = layer
        try:
            return expression.evaluate(env)
        except ExpressionError as error:
            if path[0] == "dims":
                self._broken.add(path[1])
            self.problems.append(
                self.spec.problem(path, error.message, error.hint, inside=(error.offset, error.length))
            )
            return None

    def check(self) -> None:
        """Raises SpecError where anything was noted."""
        if self.problems:
            raise SpecError(self.problems)
