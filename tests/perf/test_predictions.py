"""What the simulation says of the runs that were measured. A change of plan, simulation or constants must stay near."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "predictions.py"
found = importlib.util.spec_from_file_location("predictions_script", SCRIPT)
predictions = importlib.util.module_from_spec(found)
sys.modules["predictions_script"] = predictions  # dataclasses look their module up
found.loader.exec_module(predictions)


@pytest.mark.parametrize("run", predictions.RUNS, ids=lambda run: run.name)
def test_a_measured_run_is_predicted(run):
    """Those that the constants were fitted to within 2 %, all others within 7 %."""
    assert predictions.predicted_ms(run) == pytest.approx(run.ms, rel=0.02 if run.fitted else 0.07)


def test_a_factor_for_all_hops_and_one_for_each_other_constant():
    model = predictions.cost_model("h200")
    made = predictions.constants_of(np.log([2.0, *[1.5] * len(predictions.FITTED)]), model)
    assert made["norm_hop_us"] == pytest.approx(2 * model.norm_hop_us)
    assert made["pair_us"] == pytest.approx(1.5 * model.pair_us) and len(made) == 10
