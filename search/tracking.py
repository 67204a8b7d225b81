"""TensorBoard and Weights & Biases mirror the study; they are never the source of truth and never stop a search.

Both use the same names: :func:`scalars` of a candidate, ``train/return`` for its learning curve over environment steps,
``best``, ``search/env_steps`` and ``search/seconds`` for the search as a whole. Names are grouped by what stands before
the first slash, so every source has a panel of its own (``probes_SOURCE/...``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lacer.agents import Evaluation
from lacer.search.drawing import clean
from lacer.search.outcome import Outcome
from lacer.search.study import Trial


@dataclass(frozen=True)
class Totals:
    """Where a search stands when one of its trials has ended."""

    best: float | None
    env_steps: int
    seconds: float | None = None

    @property
    def scalars(self) -> dict[str, float]:
        """The same under the names of the trackers."""
        out = {"search/env_steps": self.env_steps, "search/seconds": self.seconds, "best": self.best}
        return {k: float(v) for k, v in out.items() if v is not None}


@dataclass(frozen=True)
class Media:
    """Pictures of the trained winner.

    Attributes:
        video: of an episode; None if there is none.
        frames: PNG files of what its cameras saw, by source.
    """

    video: Path | None = None
    frames: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


class Tracker(Protocol):
    """What the driver of a search asks of a tracker. Whatever a call raises ends the tracker, not the search."""

    def trial(self, trial: Trial, totals: Totals) -> None:
        """A trial has ended. A resumed search tells all that have; those that are logged already are left out."""

    def finish(self, outcome: Outcome, folder: Path, media: Media) -> None:
        """The search is at its end; its winner's agent, if any, is in ``folder / "best"``."""

    def close(self, exit_code: int, timeout: float) -> None:
        """Flushes and closes, after ``timeout`` seconds at the latest."""


def key(*parts: str) -> str:
    """A name for trackers: parts joined by slashes, each of letters, digits, ``_`` and ``-`` only."""
    return "/".join(re.sub(r"[^\w-]+", "_", p).strip("_") or "_" for p in parts)


def scalars(evaluation: Evaluation, metric: str) -> dict[str, float]:
    """What both trackers show of an evaluation, under the same names."""
    out = {key(metric): evaluation.objective, "return": evaluation.mean_return,
           "parameters": evaluation.cost.parameters, "seconds": evaluation.cost.total_seconds,
           "env_steps": evaluation.cost.env_steps, "steps_per_second": evaluation.cost.steps_per_second}
    for source, probes in evaluation.probes.items():
        out |= {key(f"probes_{source}", name): value for name, value in probes.items() if "/" not in name}
    return {k: float(v) for k, v in out.items() if v is not None}


def decisions(trial: Trial) -> dict[str, Any]:
    """The encoder's decisions, for filters and parallel coordinates."""
    return {key(name): option for name, option in (trial.proposal.point or {}).items()}


class TensorBoard:
    """One event folder per trial (learning curve over environment steps, decisions as hyper-parameters) and one for the
    search (over trials)."""

    def __init__(self, folder: Path, metric: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._new: Callable[[str], Any] = lambda name: SummaryWriter(str(folder / name), flush_secs=10)
        self._search, self._metric = self._new("search"), metric

    def trial(self, trial: Trial, totals: Totals) -> None:
        """Writes a finished trial, unless an earlier session has."""
        e, name = trial.evaluation, f"trial-{trial.number:04d}"
        if e is None or (self._folder / name).exists():
            return
        writer = self._new(name)
        for step, value in e.curve:
            writer.add_scalar("train/return", value, step)
        writer.add_text("encoder", trial.spec.short() if trial.spec else "", 0)
        values = scalars(e, self._metric)
        for name, value in values.items():
            writer.add_scalar(name, value, e.cost.env_steps)
            self._search.add_scalar(name, value, trial.number)
        if trial.objective is not None:
            self._hyper_parameters(writer, trial)
        writer.close()
        for name, value in {**totals.scalars, **{key("llm", k): v for k, v in trial.usage.items()}}.items():
            self._search.add_scalar(name, value, trial.number)
        self._search.flush()

    def _hyper_parameters(self, writer: Any, trial: Trial) -> None:
        # SummaryWriter.add_hparams does this in a further event file, in a folder named after the time.
        from torch.utils.tensorboard.summary import hparams

        given = {"designer": clean(trial.proposal.designer)} | {
            f"decisions.{k}": v if isinstance(v, str | bool | int | float) else str(v)
            for k, v in decisions(trial).items()}
        for summary in hparams(given, {key(self._metric): trial.objective}):
            writer.file_writer.add_summary(summary)

    def finish(self, outcome: Outcome, folder: Path, media: Media) -> None:
        """Writes the final runs and what the cameras saw."""
        for name, e in outcome.finals.items():
            for step, value in e.curve:
                self._search.add_scalar(key(f"final_{name}", "return"), value, step)
            if e.objective is not None:
                self._search.add_scalar(key(f"final_{name}", self._metric), e.objective, len(outcome.trials))
        for source, paths in media.frames.items():
            import numpy as np
            from PIL import Image

            for i, path in enumerate(paths):
                with Image.open(path) as picture:
                    self._search.add_image(key("media", source), np.asarray(picture.convert("RGB")), i,
                                           dataformats="HWC")

    def close(self, exit_code: int = 0, timeout: float = 0.0) -> None:
        """Flushes and closes the files."""
        self._search.close()
