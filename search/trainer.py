"""Where designers that train on the environment by themselves do so: a worker process of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lacer.agents import Evaluation, Protocol, Training
from lacer.search.executors import Event, Executor, InProcess

KEY = "designer"
"""Names a designer's own training in events."""


@dataclass
class Trainer:
    """What a designer needs to train on the environment, as candidates do.

    Attributes:
        env, env_kwargs, eval_env_kwargs, protocol, text_model: as in a RunRequest.
        steps: environment steps that it may take.
        folder: for its checkpoint; None: none is kept.
        executor: makes what the training runs on.
        listener: is told of its progress and its end.
    """

    env: str
    protocol: Protocol
    steps: int
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eval_env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text_model: str = "all-MiniLM-L6-v2"
    folder: Path | None = None
    executor: Callable[[], Executor] = InProcess
    listener: Callable[[Event], None] = lambda _: None

    def __post_init__(self) -> None:
        self._running: Executor | None = None
        self._closed = False
        self._lock = threading.Lock()

    def train(self, function: str, decisions: Mapping[str, list[Any]], seed: int,
              options: Mapping[str, Any]) -> Evaluation:
        """Runs ``module:name``, a function that takes a :class:`~lacer.agents.training.Session`, to its end.

        Returns:
            What it found, or a failure with its reason and the steps that it had taken.
        """
        job = Training(
            function=function, env=self.env, env_kwargs=dict(self.env_kwargs),
            eval_env_kwargs=dict(self.eval_env_kwargs), decisions=dict(decisions), protocol=self.protocol,
            steps=self.steps, options=dict(options), seed=seed, text_model=self.text_model,
            checkpoint=None if self.folder is None else str((self.folder / "designer.safetensors").resolve()))
        with self._lock:
            if self._closed:
                return Evaluation.failure("the search was ended", seed)
            executor = self._running = self.executor()
        steps = 0
        try:
            executor.submit(KEY, job)
            self.listener(Event(KEY, {"steps": 0, "of": self.steps, "return": None, "steps_per_second": 0.0}, None))
            while True:
                for event in executor.poll(1.0):
                    if event.evaluation is None:
                        assert event.progress is not None
                        steps = int(event.progress["steps"])
                        self.listener(event)
                        continue
                    result = event.evaluation
                    if result.status != "ok" and not result.cost.env_steps:  # it failed, but its steps were spent
                        cost = result.cost.model_copy(update={"env_steps": steps})
                        result = result.model_copy(update={"cost": cost})
                    self.listener(Event(KEY, None, result))
                    return result
        finally:
            with self._lock:
                self._running = None
            executor.close()

    def close(self) -> None:
        """Ends a training that is running; may be called by another thread."""
        with self._lock:
            self._closed, executor = True, self._running
        if executor is not None:
            executor.close()
