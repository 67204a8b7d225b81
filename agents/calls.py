"""Evaluating an architecture by a plain Python function."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

from lacer.agents.evaluation import Call, Cost, Evaluation
from lacer.envs import LacerError, did_you_mean


def call(function: Callable[[dict[str, Any]], Any], point: dict[str, Any], seed: int = 0) -> Evaluation:
    """What ``function(point)`` says of an architecture.

    It returns a number or an Evaluation; ``optuna.TrialPruned`` makes a pruned result, any other exception and numbers
    that are not finite a failed one, with the reason.
    """
    start = time.monotonic()
    try:
        result = function(dict(point))
        if isinstance(result, Evaluation):
            return result
        value = float(result)
    except Exception as e:  # the user's code: whatever it raises is this candidate's result
        if type(e).__name__ == "TrialPruned":
            return Evaluation(status="pruned", reason=str(e), seed=seed, cost=_cost(start))
        return Evaluation.failure(f"{type(e).__name__}: {e}", seed, cost=_cost(start))
    if not math.isfinite(value):
        return Evaluation.failure(f"the objective is {value}", seed, cost=_cost(start))
    return Evaluation(objective=value, seed=seed, cost=_cost(start))


def _cost(start: float) -> Cost:
    return Cost(total_seconds=time.monotonic() - start)


def reference(function: Callable[..., Any]) -> str:
    """``module:name`` by which another process finds a function.

    Raises:
        LacerError: for functions that only this process knows: lambdas, inner functions, those of the main script.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module in (None, "__main__") or name is None or "<" in name or find(f"{module}:{name}") is not function:
        raise LacerError(f"worker processes cannot find the objective {name or function!r}: put it at the top level of "
                         "a module that can be imported, or use executor=\"inprocess\"")
    return f"{module}:{name}"


def find(path: str) -> Any:
    """What ``module:name`` names. Raises LacerError if it cannot be imported or is not there."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise LacerError(f"{path!r} must have the form module:name")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as e:
        raise LacerError(f"cannot import {path}: {e}") from None
    except Exception as e:  # the module's own code runs
        raise LacerError(f"cannot import {path}: {type(e).__name__}: {e}") from e
    for part in name.split("."):
        if not hasattr(found, part):
            raise LacerError(f"{module} has no {name!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def perform(request: Call) -> Evaluation:
    """The evaluation of a call, its function imported by name. Raises LacerError if there is none."""
    return call(find(request.function), request.point, request.seed)
