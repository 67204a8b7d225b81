"""Candidates on a Ray cluster (extra ``[ray]``). This process stays the only one that writes to the study."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lacer.agents import Call, Evaluation, RunRequest
from lacer.envs import LacerError
from lacer.search.executors import Event, Executor, Job, ProcessPool, is_secret

PROGRESS_INTERVAL = 1.0
"""Seconds between two reports of progress of a candidate."""


class RayExecutor(Executor):
    """Ray tasks, one per candidate; each node runs them in worker processes with limits, as :class:`ProcessPool` does.

    A candidate whose node is lost starts again on another one, and only its first result counts. Nothing of this
    process's environment travels: tasks get the job as JSON, and a cluster that is started here is started without
    secrets.

    Args:
        workers: candidates at once; None: as many as the cluster has room for.
        timeout, memory: limits of a candidate in seconds and GB; None: no limit of memory.
        address: of a running cluster; None: one is started on this machine, and ended with this executor.
        cpus, gpus: what a candidate takes.

    Raises:
        LacerError: Ray is not installed, the cluster does not answer, or no node has what a candidate takes.
    """

    def __init__(self, workers: int | None, timeout: float, memory: float | None, *, address: str | None = None,
                 cpus: float = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError:
            raise LacerError("--executor ray needs Ray: pip install 'lacer[ray]'") from None
        self._ray, self._workers, self._cpus, self._gpus = ray, workers, cpus, gpus
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._running: dict[str, Any] = {}
        self._seeds: dict[str, int] = {}
        self._saving: dict[str, Path] = {}
        self._looked, self._room = 0.0, 0
        if address is not None:
            _check_address(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            with _without_secrets() if address is None else nullcontext():
                ray.init(address=address or "local", include_dashboard=False, log_to_driver=False,
                         configure_logging=False)
        except Exception as e:  # Ray's own and gRPC's
            raise LacerError(f"the Ray cluster {address or 'here'} does not answer: {str(e)[:300]}") from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets one of its own, which ends the process
        need = {"CPU": cpus, "GPU": gpus}
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        if not any(all(node.get(k, 0) >= v for k, v in need.items()) for node in nodes):
            self.close()
            raise LacerError(f"no node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs for a candidate; nodes: "
                             f"{'; '.join(_shown(n) for n in nodes)}. See --cpus-per-candidate.")
        # Zero CPUs, on this node: where a candidate's node is lost, the news of others go on.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(),
                                                                            soft=False)
        self._mail: Any = ray.remote(_Mail).options(num_cpus=0, scheduling_strategy=here, max_concurrency=4).remote()
        self._task = ray.remote(_evaluate).options(num_cpus=cpus, num_gpus=gpus, max_retries=-1)
        self._limits = timeout, memory
        self._closed = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def free(self) -> int:
        if time.monotonic() - self._looked > 2:  # nodes come and go
            self._looked = time.monotonic()
            have = self._ray.cluster_resources()
            room = [have.get("CPU", 0) // self._cpus] + ([have.get("GPU", 0) // self._gpus] if self._gpus else [])
            self._room = int(min(room))
        return max(0, min(self._room, self._workers or self._room) - len(self._running))

    def submit(self, key: str, job: Job) -> None:
        if isinstance(job, RunRequest):  # other nodes do not see this folder
            if job.save_to is not None:
                self._saving[key] = Path(job.save_to)
            job = job.model_copy(update={"save_to": None, "checkpoint": None})
        kind = "call" if isinstance(job, Call) else "request"
        self._seeds[key] = job.seed
        self._running[key] = self._task.remote(key, kind, job.model_dump(mode="json"), *self._limits, self._mail,
                                               key in self._saving, sys.path)

    def wake(self) -> None:
        self._events.put(None)

    def poll(self, timeout: float) -> list[Event]:
        out: list[Event] = []
        while True:
            try:
                event = self._events.get(timeout=0 if out else timeout)
            except queue.Empty:
                return out
            if event is None:
                return out
            if event.key in self._running:
                if event.evaluation is not None:
                    del self._running[event.key]
                out.append(event)

    def _listen(self) -> None:
        """Waits for results and progress in a thread; ends with the executor."""
        ray, take = self._ray, self._mail.take
        while not self._closed.is_set():
            waiting = {ref: key for key, ref in list(self._running.items())}
            if not waiting:
                self._closed.wait(0.05)
                continue
            done, _ = ray.wait(list(waiting), timeout=0.2)
            for ref in done:
                self._result(waiting[ref], ref)
            try:
                for key, progress in ray.get(take.remote(), timeout=10):
                    self._events.put(Event(key, progress, None))
            except ray.exceptions.RayError:  # the news are lost, results are not
                self._closed.wait(1.0)

    def _result(self, key: str, ref: Any) -> None:
        try:
            answer = self._ray.get(ref)
            evaluation = Evaluation.model_validate(answer["evaluation"])
            for name, content in answer["files"].items():
                folder = self._saving[key]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(name).name).write_bytes(content)
        except Exception as e:  # Ray's errors of many kinds: this candidate's result
            evaluation = Evaluation.failure(f"Ray: {type(e).__name__}: {str(e)[:500]}", self._seeds[key])
        while self._running.get(key) is not ref and not self._closed.is_set():
            time.sleep(0.01)  # submit has not returned yet
        self._events.put(Event(key, None, evaluation))
        while self._running.get(key) is ref and not self._closed.is_set():
            time.sleep(0.01)

    def close(self) -> None:
        """Cancels what is running and leaves the cluster; ends it if it was started here."""
        if hasattr(self, "_closed"):
            self._closed.set()
        for ref in self._running.values():
            self._ray.cancel(ref, force=True)
        self._running = {}
        self._ray.shutdown()


class _Mail:
    """An actor that keeps the last progress of each candidate until it is fetched."""

    def __init__(self) -> None:
        self._news: dict[str, dict[str, Any]] = {}

    def put(self, key: str, progress: dict[str, Any]) -> None:
        self._news[key] = progress

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        news, self._news = self._news, {}
        return list(news.items())


_pool: ProcessPool | None = None
"""The worker process of this Ray worker, kept for its next task: importing torch takes seconds."""


def _evaluate(key: str, kind: str, job: dict[str, Any], timeout: float, memory: float | None, mail: Any,
              save: bool, paths: list[str]) -> dict[str, Any]:
    """A Ray task: the evaluation of a job as JSON, and the files of the agent if it is to be saved. Modules are also
    looked for where the driver does, for nodes that share its file system."""
    global _pool
    sys.path += [p for p in paths if p not in sys.path]
    with tempfile.TemporaryDirectory(prefix="lacer-") as folder:
        if _pool is None:
            _pool = ProcessPool(1, Path(tempfile.gettempdir()) / f"lacer-worker-{os.getpid()}.log", timeout, memory,
                                calls=kind == "call")
        out = Path(folder) / "agent"
        _pool.submit(key, Call.model_validate(job) if kind == "call" else RunRequest.model_validate(
            {**job, "save_to": str(out) if save else None}))
        last = 0.0
        while True:
            for event in _pool.poll(0.5):
                if event.evaluation is not None:
                    files = {f.name: f.read_bytes() for f in out.iterdir()} if out.is_dir() else {}
                    return {"evaluation": event.evaluation.model_dump(mode="json"), "files": files}
                if event.progress is not None and time.monotonic() - last > PROGRESS_INTERVAL:
                    last = time.monotonic()
                    mail.put.remote(key, event.progress)


def _check_address(address: str) -> None:
    """Ray itself waits for minutes where nobody listens. Raises LacerError."""
    host, _, port = address.split("://")[-1].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or a name that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise LacerError(f"the Ray cluster {address} does not answer: {e.strerror or e}") from None


@contextmanager
def _without_secrets() -> Iterator[None]:
    """A cluster that is started here inherits no secret of this process's environment."""
    hidden = {k: v for k, v in os.environ.items() if is_secret(k)}
    for k in hidden:
        del os.environ[k]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _shown(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
