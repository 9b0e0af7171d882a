"""mpk-spec: an LLM described in YAML becomes one persistent CUDA kernel.

The Python interface is four names: `load_spec`, `plan`, `Engine` and `SpecError`. They are imported on first use,
so that `import mpk_spec` (and with it `mpk-spec --help`) stays instant.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["Engine", "SpecError", "load_spec", "plan"]

_HOMES = {
    "Engine": ("mpk_spec.runtime.engine", "Engine"),
    "SpecError": ("mpk_spec.errors", "SpecError"),
    "load_spec": ("mpk_spec.schema", "load_spec"),
    "plan": ("mpk_spec.planner", "plan"),
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
