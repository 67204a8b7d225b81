"""Where candidates are evaluated: in this process, or by a pool of worker processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from lacer.agents import Evaluation, RunRequest, Training
from lacer.agents.evaluation import JOBS, Job
from lacer.agents.worker import kill_group
from lacer.envs import LacerError

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|NETRC", re.IGNORECASE)


class Event(NamedTuple):
    """News of a run: its progress, or its evaluation when it has ended."""

    key: str
    progress: dict[str, Any] | None
    evaluation: Evaluation | None


class Executor(ABC):
    """Evaluates jobs, some at once, and reports by :meth:`poll`. Not for use by several threads, but for `wake`."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Number of jobs that would start at once."""

    @abstractmethod
    def submit(self, key: str, job: Job) -> None:
        """Starts a job; ``key`` names it in the events. Whatever becomes of it, an event with its evaluation comes."""

    @abstractmethod
    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to ``timeout`` seconds for the first."""

    @abstractmethod
    def wake(self) -> None:
        """Ends a waiting :meth:`poll`; may be called by any thread."""

    @abstractmethod
    def close(self) -> None:
        """Ends what is running."""


class InProcess(Executor):
    """One job at a time, in this process: for debugging and for cheap functions. Without limits of time and memory.

    Args:
        function: evaluates the points of :class:`~lacer.agents.Call` jobs in place of the function they name.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self._function = function
        self._job: tuple[str, Job] | None = None
        self._woken = threading.Event()

    @property
    def free(self) -> int:
        return int(self._job is None)

    def submit(self, key: str, job: Job) -> None:
        self._job = key, job

    def poll(self, timeout: float) -> list[Event]:
        """Runs the job."""
        if self._job is None:
            self._woken.wait(timeout)
            self._woken.clear()
            return []
        key, job = self._job
        out: list[Event] = []
        try:
            evaluation = self._evaluate(job, lambda p: out.append(Event(key, p, None)))
        except LacerError as e:
            evaluation = Evaluation.failure(str(e), job.seed)
        self._job = None
        return [*out, Event(key, None, evaluation)]

    def _evaluate(self, job: Job, report: Callable[[dict[str, Any]], None]) -> Evaluation:
        from lacer.agents.calls import call, perform

        if isinstance(job, RunRequest):
            from lacer.agents import run

            return run(job, report)
        if isinstance(job, Training):
            from lacer.agents.training import run_training

            return run_training(job, report)
        return call(self._function, job.point, job.seed) if self._function is not None else perform(job)

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        """Nothing is running between two calls."""


def is_secret(name: str) -> bool:
    """Whether an environment variable looks like a secret by its name."""
    return bool(_SECRET.search(name))


def clean_environment() -> dict[str, str]:
    """This process's environment for a child, without anything that looks like a secret, one thread for each library
    (``LACER_THREADS``, where a candidate may have more cores)."""
    env = {k: v for k, v in os.environ.items() if not is_secret(k)}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # else workers fight for the cores
        env.setdefault(name, env.get("LACER_THREADS", "1"))
    return env


class _Slot:
    def __init__(self, log: Path, events: queue.Queue[tuple[_Slot | None, dict[str, Any] | None]],
                 calls: bool) -> None:
        self.key: str | None = None
        self.seed = 0
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                # -P: a file called random.py in the working folder must not shadow the standard library
                [sys.executable, "-P", "-m", "lacer.agents.worker", *["calls"] * calls], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr, env=clean_environment(), start_new_session=True)
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout, events), daemon=True).start()

    def _read(self, out: IO[bytes], events: queue.Queue[tuple[_Slot | None, dict[str, Any] | None]]) -> None:
        for line in out:
            # Blank lines separate messages; a run that was killed while it wrote leaves half a line.
            with contextlib.suppress(json.JSONDecodeError):
                events.put((self, json.loads(line)))
        events.put((self, None))

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(message) + "\n").encode())
        self.process.stdin.flush()

    def close(self) -> None:
        """Ends the worker; it kills its run when its input ends."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=1.0)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            kill_group(self.process.pid)
            self.process.wait()


class ProcessPool(Executor):
    """Workers on this machine, each running one candidate at a time in a process of its own.

    Secrets do not reach them: see :func:`clean_environment`.

    Args:
        workers: number of candidates evaluated at once.
        log: file for what workers print.
        timeout: seconds that a run may take.
        memory: GB that a run and its environment processes may use; None: no limit.
        calls: only plain functions are evaluated; the workers start without torch.
    """

    def __init__(self, workers: int, log: Path, timeout: float, memory: float | None = None, *,
                 calls: bool = False) -> None:
        self._log, self._timeout, self._memory, self._calls = log, timeout, memory, calls
        self._events: queue.Queue[tuple[_Slot | None, dict[str, Any] | None]] = queue.Queue()
        self._slots = [_Slot(log, self._events, calls) for _ in range(workers)]

    @property
    def free(self) -> int:
        return sum(s.key is None for s in self._slots)

    def submit(self, key: str, job: Job) -> None:
        slot = next(s for s in self._slots if s.key is None)
        if slot.process.poll() is not None:
            slot = self._replace(slot)
        slot.key, slot.seed = key, job.seed
        with contextlib.suppress(BrokenPipeError):  # the end of its output, on its way, reports the run as failed
            kind = next(name for name, cls in JOBS.items() if isinstance(job, cls))
            slot.send({"key": key, kind: job.model_dump(mode="json"), "timeout": self._timeout, "memory": self._memory})

    def wake(self) -> None:
        self._events.put((None, None))

    def poll(self, timeout: float) -> list[Event]:
        out: list[Event] = []
        while True:
            try:
                slot, message = self._events.get(timeout=0 if out else timeout)
            except queue.Empty:
                return out
            if slot is None:
                return out
            if message is None:
                if slot.key is not None:
                    out.append(Event(slot.key, None, Evaluation.failure("the worker process died", slot.seed)))
                if slot in self._slots:
                    self._replace(slot)
            elif message.get("key") != slot.key:
                pass  # a run that was killed after it had sent its result is reported twice
            elif "evaluation" in message:
                slot.key = None
                out.append(Event(message["key"], None, Evaluation.model_validate(message["evaluation"])))
            elif "progress" in message:
                out.append(Event(message["key"], message["progress"], None))

    def _replace(self, slot: _Slot) -> _Slot:
        slot.process.wait()
        new = _Slot(self._log, self._events, self._calls)
        self._slots[self._slots.index(slot)] = new
        return new

    def close(self) -> None:
        """Ends all workers and their runs, within about a second."""
        slots, self._slots = self._slots, []
        threads = [threading.Thread(target=s.close) for s in slots]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
