"""The benchmark of known truth, with one seed; `python benchmarks/probe_truth.py` asks twenty."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_one_seed_of_the_benchmark() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "probe_truth.py"
    spec = importlib.util.spec_from_file_location("probe_truth", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    right = module.judge(seed=100, steps=2048)
    asked = ("linear_probe", "permuted_action", "unique_r2", "redundancy", "effective_rank", "srank")
    assert {k: right[k] for k in asked} == dict.fromkeys(asked, True)
