"""`python -m mpk_spec`, the same program as `mpk-spec`, also from a source tree that is not installed."""

from __future__ import annotations

from mpk_spec.cli.main import run

if __name__ == "__main__":
    run()
