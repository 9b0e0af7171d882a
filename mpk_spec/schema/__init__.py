"""YAML to a validated spec. Knows positions in the file; knows nothing of GPUs."""

from __future__ import annotations

from mpk_spec.schema.editor import json_schema
from mpk_spec.schema.expressions import Expression, ExpressionError, expression_of
from mpk_spec.schema.load import load_spec, spec_names
from mpk_spec.schema.models import Fusion, Pack, Repeat, Rule, Settings, StateDecl, TensorDecl, WeightDecl
from mpk_spec.schema.spec import Check, Size, Spec

__all__ = [
    "Check",
    "Expression",
    "ExpressionError",
    "Fusion",
    "Pack",
    "Repeat",
    "Rule",
    "Settings",
    "Size",
    "Spec",
    "StateDecl",
    "TensorDecl",
    "WeightDecl",
    "expression_of",
    "json_schema",
    "load_spec",
    "spec_names",
]
