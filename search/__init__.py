"""Searching: spaces, designers, study, executors, tracking, reports and the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacer.search.config import SearchConfig
    from lacer.search.loop import SearchResult, search
    from lacer.search.outcome import Outcome
    from lacer.search.plain import PointResult
    from lacer.search.space import Decision, EncoderSpace, SearchSpace
    from lacer.search.study import Proposal, StoredStudy, Study, Trial

_HOME = {"SearchConfig": "config", "SearchResult": "loop", "search": "loop", "Outcome": "outcome",
         "PointResult": "plain", "Decision": "space", "EncoderSpace": "space", "SearchSpace": "space",
         "Proposal": "study", "StoredStudy": "study", "Study": "study", "Trial": "study"}

__all__ = ["Decision", "EncoderSpace", "Outcome", "PointResult", "Proposal", "SearchConfig", "SearchResult",
           "SearchSpace", "StoredStudy", "Study", "Trial", "search"]


def __getattr__(name: str) -> Any:
    # On demand: torch and Optuna take seconds to import, and the command line answers many questions without them.
    if name in _HOME:
        return getattr(importlib.import_module(f"lacer.search.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lacer.search' has no attribute {name!r}")
