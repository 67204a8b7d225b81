"""A worker process: ``python -m lacer.agents.worker``. Runs one candidate at a time, each in a process of its own.

The worker imports everything once and forks for each run, so a run starts at once, has its own memory (one SUMO per
process) and can be killed without harm. It speaks JSON lines: requests on standard input,
``{"key", "request", "call" or "training", "timeout", "memory"}``; on standard output ``{"ready"}``,
``{"key", "progress"}`` and ``{"key", "evaluation"}``. Nothing but such lines goes out; stray prints go to standard
error. At the end of its input (the driver is gone) it kills what is running and ends. With the argument ``calls`` it
evaluates plain functions only, and starts without torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork

from lacer.agents.calls import perform
from lacer.agents.evaluation import JOBS, Call, Evaluation, Job, RunRequest, Training
from lacer.envs import LacerError, task_card

MEMORY_INTERVAL = 0.5
"""Seconds between two looks at the memory of a run."""


class Channel:
    """JSON lines to the driver; keeps the real standard output for itself."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def send(self, message: dict[str, Any]) -> None:
        # The first line break ends what a run that was killed while it wrote may have left.
        data = ("\n" + json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data):]


def _die_with_parent(yes: bool = True) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL if yes else 0)


def _first_to_be_killed() -> None:
    """If the machine runs out of memory, the kernel takes the candidate, not the driver."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _child(channel: Channel, key: str, request: Job, folder: str) -> None:
    """Runs a request in the forked process, which keeps its temporary files in a folder; never returns."""
    os.setsid()
    _die_with_parent()
    _first_to_be_killed()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the requests are not for it to read
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        if isinstance(request, Call):
            evaluation = perform(request)
        elif isinstance(request, Training):
            from lacer.agents.training import run_training

            evaluation = run_training(request, lambda p: channel.send({"key": key, "progress": p}), start_method="fork")
        else:
            from lacer.agents.ppo import run

            evaluation = run(request, lambda p: channel.send({"key": key, "progress": p}), start_method="fork")
        result = evaluation.model_dump(mode="json")
    except LacerError as e:
        result = Evaluation.failure(str(e), request.seed).model_dump(mode="json")
    except BaseException as e:  # a result too, with its reason; the traceback goes to the log
        sys.excepthook(type(e), e, e.__traceback__)
        result = Evaluation.failure(f"{type(e).__name__}: {e}", request.seed).model_dump(mode="json")
    channel.send({"key": key, "evaluation": result})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _prepare(request: Job) -> None:
    """Loads the text model before the fork, so that runs share it."""
    if not isinstance(request, RunRequest):
        return
    with contextlib.suppress(Exception):  # a wrong request is reported by the run itself
        from lacer.encoders import text_model

        card = task_card(request.env, **request.env_kwargs)
        if request.encoder is not None and any(
                card.sources[s].modality == "text" for s in request.encoder.get("sources", {}) if s in card.sources):
            text_model(request.text_model)


def kill_group(pid: int) -> None:
    """Kills a process, everything in its process group, and its descendants, also those in sessions of their own."""
    family = descendants(pid)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    for other in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(other, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes below a process; none where the system does not say."""
    return [p for child in _children(pid) for p in (child, *descendants(child))]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


def _adopt_orphans() -> None:
    """What a run leaves behind becomes a child of this process, which can then end it."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def _end_orphans() -> None:
    """Ends what a run has left behind, such as a simulator in a session of its own. Only between two runs."""
    end = time.monotonic() + 5  # what hangs in the kernel cannot be ended
    while (family := descendants(os.getpid())) and time.monotonic() < end:
        for pid in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _exit_of(pid: int) -> list[int]:
    """A descriptor that becomes readable when the process ends, so that this is seen at once; none on old systems."""
    try:
        return [os.pidfd_open(pid)]
    except (AttributeError, OSError):
        return []


def memory_of(pid: int) -> float:
    """GB of memory of a process and its descendants, shared pages by their share; 0 where the system does not say."""
    total = 0.0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1e6
    return total + sum(map(memory_of, _children(pid)))


PRELOADED = ("lacer.agents.ppo", "sklearn.linear_model", "scipy.spatial.distance", "lacer.envs.traffic.network")
"""What runs and probes import, loaded before the first run."""


def _import_everything() -> None:
    """What a PPO run needs, so that it starts at once after the fork."""
    import torch

    from lacer.encoders import list_blocks

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(int(os.environ.get("LACER_THREADS", "1")))
    # The first optimiser of a process makes torch import its compiler: 2 s that every run would pay anew.
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    list_blocks()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    _adopt_orphans()
    channel = Channel()
    if sys.argv[1:] != ["calls"]:
        _die_with_parent()  # nobody looks at the input for seconds
        _import_everything()
        _die_with_parent(False)  # from now on what runs is killed first
    channel.send({"ready": os.getpid()})
    buffer = b""
    child, key, deadline, seed, memory, look, folder = 0, "", 0.0, 0, None, 0.0, ""

    def end(reason: str) -> None:
        kill_group(child)
        os.waitpid(child, 0)
        _end_orphans()
        shutil.rmtree(folder, ignore_errors=True)
        channel.send({"key": key, "evaluation": Evaluation.failure(reason, seed).model_dump(mode="json")})

    while True:
        if child:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                kill_group(child)  # environment processes that outlived it
                _end_orphans()
                shutil.rmtree(folder, ignore_errors=True)
                if not os.WIFEXITED(status) or os.WEXITSTATUS(status):
                    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                    failure = Evaluation.failure(f"the run's process was killed ({how})", seed)
                    channel.send({"key": key, "evaluation": failure.model_dump(mode="json")})
                child = 0
            elif time.monotonic() > deadline:
                end("time-out")
                child = 0
            elif memory and time.monotonic() > look:
                look = time.monotonic() + MEMORY_INTERVAL
                # With what the run started and left to this process, in whose care it is.
                if (used := sum(map(memory_of, _children(os.getpid())))) > memory:
                    end(f"out of memory: it used {used:.2f} GB, the limit is {memory:.2f} GB")
                    child = 0
        if not child and b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            message = json.loads(line)
            request = next(kind.model_validate(message[name]) for name, kind in JOBS.items() if name in message)
            _prepare(request)
            gc.collect()
            key, seed, deadline = message["key"], request.seed, time.monotonic() + message["timeout"]
            memory, look = message.get("memory"), 0.0
            folder = tempfile.mkdtemp(prefix="lacer-run-")
            child = os.fork()
            if not child:
                _child(channel, key, request, folder)
            continue
        watched = [0, *_exit_of(child)] if child else [0]
        ready, _, _ = select.select(watched, [], [], 0.05 if child else None)
        for fd in watched[1:]:
            os.close(fd)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            if child:
                kill_group(child)
            _end_orphans()
            shutil.rmtree(folder, ignore_errors=True)
            return
        buffer += data


if __name__ == "__main__":
    main()
