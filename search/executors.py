"""Where candidates are evaluated: a pool of worker processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, NamedTuple

from lacer.agents import Evaluation, RunRequest
from lacer.agents.worker import kill_group

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|NETRC", re.IGNORECASE)


class Event(NamedTuple):
    """News of a run: its progress, or its evaluation when it has ended."""

    key: str
    progress: dict[str, Any] | None
    evaluation: Evaluation | None


def clean_environment() -> dict[str, str]:
    """This process's environment for a child, without anything that looks like a secret."""
    env = {k: v for k, v in os.environ.items() if not _SECRET.search(k)}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return env


class _Slot:
    def __init__(self, log: Path, events: queue.Queue[tuple[_Slot, dict[str, Any] | None]]) -> None:
        self.key: str | None = None
        self.seed = 0
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                # -P: a file called random.py in the working folder must not shadow the standard library
                [sys.executable, "-P", "-m", "lacer.agents.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, env=clean_environment(), start_new_session=True)
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout, events), daemon=True).start()

    def _read(self, out: IO[bytes], events: queue.Queue[tuple[_Slot, dict[str, Any] | None]]) -> None:
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


class ProcessPool:
    """Workers on this machine, each running one candidate at a time in a process of its own.

    Secrets do not reach them: see :func:`clean_environment`.

    Args:
        workers: number of candidates evaluated at once.
        log: file for what workers print.
        timeout: seconds that a run may take.
    """

    def __init__(self, workers: int, log: Path, timeout: float) -> None:
        self._log, self._timeout = log, timeout
        self._events: queue.Queue[tuple[_Slot, dict[str, Any] | None]] = queue.Queue()
        self._slots = [_Slot(log, self._events) for _ in range(workers)]

    @property
    def free(self) -> int:
        """Number of workers without a run."""
        return sum(s.key is None for s in self._slots)

    def submit(self, key: str, request: RunRequest) -> None:
        """Starts a run on a free worker; ``key`` names it in the events."""
        slot = next(s for s in self._slots if s.key is None)
        if slot.process.poll() is not None:
            slot = self._replace(slot)
        slot.key, slot.seed = key, request.seed
        with contextlib.suppress(BrokenPipeError):  # the end of its output, on its way, reports the run as failed
            slot.send({"key": key, "request": request.model_dump(mode="json"), "timeout": self._timeout})

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to ``timeout`` seconds for the first."""
        out: list[Event] = []
        while True:
            try:
                slot, message = self._events.get(timeout=0 if out else timeout)
            except queue.Empty:
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
        new = _Slot(self._log, self._events)
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
