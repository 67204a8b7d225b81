"""A real worker process: its results are those of a run here, and whatever is killed, nothing hangs or stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lacer.agents import Evaluation, PPOConfig, Protocol, RunRequest, run
from lacer.search.executors import Event, ProcessPool, clean_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ENCODER = {"sources": {"position": {"block": "linear"}, "words": {"block": "sentence_mlp"}},
           "fusion": {"block": "concat", "width": 16}}
PPO = PPOConfig(n_envs=2, n_steps=32, batch_size=32, n_epochs=2, head=(8,))
QUICK = RunRequest(env="lacer/KnownSources-v0", env_kwargs={"sources": ["position", "words"]}, encoder=ENCODER,
                   protocol=Protocol(steps=256, eval_episodes=3, ppo=PPO), seed=5, text_model="hash")
ENDLESS = QUICK.model_copy(update={"env": "helper_envs:helper/Slow-v0",
                                   "protocol": Protocol(steps=1_000_000, eval_episodes=1, ppo=PPO)})
TINY = {"sources": {"numbers": {"block": "linear"}}, "fusion": {"block": "concat", "width": 16}}
SECRET = "do-not-leak-3f7a"


def stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: state, parent, group, session, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    now = stat(pid)  # once: it may be gone the next moment
    return bool(now) and now[0] not in "ZX"


def children(pid: int) -> list[int]:
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [p for p in found if stat(p)[1:2] == [str(pid)] and alive(p)]


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(d for c in children(pid) for d in family(c))]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def gone(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(p) for p in pids)


def events_until_end(pool: ProcessPool, key: str, seconds: float = 60) -> tuple[list[dict[str, Any]], Evaluation]:
    """Progress reports and evaluation of a run."""
    progress: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for event in pool.poll(0.5):
            assert isinstance(event, Event)
            assert event.key == key
            if event.evaluation is not None:
                return progress, event.evaluation
            assert event.progress is not None
            progress.append(event.progress)
    raise AssertionError("no evaluation came")


def first_progress(pool: ProcessPool) -> None:
    """Waits until a run is under way."""
    assert wait_for(lambda: pool.poll(0.5))[0].progress is not None


def numbers(e: Evaluation) -> dict[str, Any]:
    """All of an evaluation but times."""
    return e.model_dump(exclude={"cost": {"train_seconds", "eval_seconds", "probe_seconds", "total_seconds",
                                          "steps_per_second"}})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    """One worker, started while secrets stand in the environment."""
    with pytest.MonkeyPatch.context() as m:
        for name in ("MY_API_KEY", "HF_TOKEN", "db_password", "Client_Secret"):
            m.setenv(name, SECRET)
        m.setenv("HARMLESS", "stays")
        pool = ProcessPool(1, tmp_path_factory.mktemp("pool") / "worker.log", timeout=120)
    yield pool
    pool.close()


def worker(pool: ProcessPool) -> int:
    return pool._slots[0].process.pid


def log(pool: ProcessPool) -> str:
    return pool._log.read_text()


def test_same_result_as_a_run_in_this_process(pool: ProcessPool) -> None:
    assert pool.free == 1
    pool.submit("a", QUICK)
    assert pool.free == 0
    progress, there = events_until_end(pool, "a")
    assert pool.free == 1
    assert torch.get_num_threads() == 1
    reports: list[dict[str, Any]] = []
    here = run(QUICK, reports.append)
    assert here.ok
    assert numbers(there) == numbers(here)
    assert [(p["steps"], p["return"]) for p in progress] == [(p["steps"], p["return"]) for p in reports]


def test_one_run_after_another_on_one_worker(pool: ProcessPool) -> None:
    before = worker(pool)
    results = []
    for key, seed in (("b", 6), ("c", 5), ("d", 6)):
        pool.submit(key, QUICK.model_copy(update={"seed": seed}))
        results.append(numbers(events_until_end(pool, key)[1]))
    assert worker(pool) == before
    assert results[0] == results[2]
    assert results[0] != results[1]
    assert gone([p for p in family(before) if p != before]), "a run's process ends with its run"


def test_environments_in_processes_of_their_own(pool: ProcessPool) -> None:
    request = QUICK.model_copy(update={"env": "helper_envs:helper/OnePerProcess-v0", "env_kwargs": {}, "encoder": TINY})
    pool.submit("e", request)
    e = events_until_end(pool, "e")[1]
    assert e.ok, e.reason
    assert numbers(e) == numbers(run(request, start_method="fork"))
    assert gone([p for p in family(worker(pool)) if p != worker(pool)])


@pytest.mark.parametrize(("env", "kwargs", "says"), [
    ("lacer/KnownSource-v0", {}, "did you mean 'lacer/KnownSources-v0'?"),
    ("helper_envs:helper/Raises-v0", {}, "KeyError: 'broken sensor'"),
    ("helper_envs:helper/RaisesInItsProcess-v0", {}, "an environment's process died"),
    ("helper_envs:helper/BadConstructor-v0", {}, "no licence for the simulator"),
    ("helper_envs:helper/NoMetrics-v0", {}, "must hold the objective"),
    ("no_such_module:x/Y-v0", {}, "cannot import 'no_such_module'"),
])
def test_whatever_goes_wrong_is_a_failed_evaluation(pool: ProcessPool, env: str, kwargs: dict[str, Any],
                                                    says: str) -> None:
    before = worker(pool)
    pool.submit("f", QUICK.model_copy(update={"env": env, "env_kwargs": kwargs, "encoder": TINY}))
    e = events_until_end(pool, "f")[1]
    assert e.status == "failed"
    assert says in e.reason
    assert e.seed == QUICK.seed
    assert worker(pool) == before, "the worker lives on"
    assert gone([p for p in family(before) if p != before])
    if "KeyError" in says:
        assert "broken sensor" in log(pool)
        assert "Traceback" in log(pool)


def test_secrets_do_not_reach_workers_or_runs(pool: ProcessPool) -> None:
    pool.submit("g", ENDLESS)
    first_progress(pool)
    pids = family(worker(pool))
    assert len(pids) >= 2
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"HARMLESS=stays" in environment
        assert b"MY_API_KEY" not in environment
        assert SECRET.encode() not in environment
    os.kill(pids[1], signal.SIGKILL)
    events_until_end(pool, "g")


def test_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "aws_secret_access_key", "GITHUB_TOKEN", "PGPASSWORD", "GOOGLE_CREDENTIALS",
                 "NETRC"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env = clean_environment()
    assert SECRET not in env.values()
    assert env["OMP_NUM_THREADS"] == "3"
    assert str(Path(__file__).parents[1]) in env["PYTHONPATH"].split(os.pathsep)


def test_a_run_that_takes_too_long_is_killed(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_timeout", 2.0)
    before = worker(pool)
    start = time.monotonic()
    pool.submit("h", ENDLESS)
    run_pids = wait_for(lambda: children(before))
    _, e = events_until_end(pool, "h")
    assert (e.status, e.reason, e.seed) == ("failed", "time-out", 5)
    assert 2.0 <= time.monotonic() - start < 20
    assert gone(run_pids)
    assert worker(pool) == before


def test_a_killed_run_is_a_failed_evaluation(pool: ProcessPool) -> None:
    before = worker(pool)
    pool.submit("i", ENDLESS)
    first_progress(pool)
    os.kill(children(before)[0], signal.SIGKILL)
    _, e = events_until_end(pool, "i")
    assert e.status == "failed"
    assert e.reason == "the run's process was killed (signal 9)"
    assert e.seed == 5
    pool.submit("j", QUICK)
    assert events_until_end(pool, "j")[1].ok
    assert worker(pool) == before


def bad(env: str, **kwargs: Any) -> RunRequest:
    return QUICK.model_copy(update={"env": f"helper_envs:helper/{env}-v0", "env_kwargs": kwargs, "encoder": TINY})


def failed(pool: ProcessPool, key: str) -> str:
    """The reason why a run failed; the worker lives on, and all of the run's processes are gone."""
    before = worker(pool)
    e = events_until_end(pool, key)[1]
    assert e.status == "failed"
    assert e.seed == 5
    assert e.objective is None
    assert worker(pool) == before
    assert gone([p for p in family(before) if p != before], 2)
    return e.reason


def test_a_run_that_takes_too_much_memory_is_killed(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_memory", 1.0)
    pool.submit("leak", bad("Leaks"))
    reason = failed(pool, "leak")
    used = float(reason.split("it used ")[1].split()[0])
    assert reason == f"out of memory: it used {used:.2f} GB, the limit is 1.00 GB"
    assert 1 <= used < 3, "seen soon"


def test_a_run_whose_environment_hangs_is_killed(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_timeout", 3.0)
    start = time.monotonic()
    pool.submit("hang", bad("Hangs"))
    assert failed(pool, "hang") == "time-out"
    assert 3 <= time.monotonic() - start < 20


def test_kill_9_of_an_environments_process(pool: ProcessPool) -> None:
    pool.submit("env", bad("Hangs"))
    processes = wait_for(lambda: [p for run_ in children(worker(pool)) for p in children(run_)])
    os.kill(processes[0], signal.SIGKILL)
    assert failed(pool, "env") == "an environment's process died; its error is in the log"


def test_a_reward_that_is_not_finite_ends_the_run(pool: ProcessPool) -> None:
    pool.submit("nan", bad("NotFinite"))
    assert failed(pool, "nan") == "the environment gave the reward nan (after 0 steps)"


def sleepers(seconds: int) -> list[int]:
    wanted = f"sleep\0{seconds}\0".encode()
    out = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                out.append(int(path.parent.name))
        except OSError:
            continue
    return out


def test_what_an_environment_started_and_left_is_gone_too(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a session of its own, whether the run ends by itself or is killed."""
    pool.submit("left", bad("LeavesProcess", seconds=360123))
    assert events_until_end(pool, "left")[1].ok
    assert gone(sleepers(360123), 5)
    monkeypatch.setattr(pool, "_timeout", 2.0)
    endless = ENDLESS.protocol
    pool.submit("left2", bad("LeavesProcess", seconds=360124).model_copy(update={"protocol": endless}))
    assert failed(pool, "left2") == "time-out"
    assert not [p for p in sleepers(360124) if alive(p)]


def test_a_run_has_no_input_and_its_prints_are_kept(pool: ProcessPool) -> None:
    pool.submit("prints", bad("Prints"))
    assert "its error is in the log" in failed(pool, "prints"), "it is told that there is no more input"
    assert "seen in the log" in log(pool)


def test_a_killed_worker_is_replaced(pool: ProcessPool) -> None:
    before = worker(pool)
    pool.submit("k", ENDLESS)
    first_progress(pool)
    pids = family(before)
    os.kill(before, signal.SIGKILL)
    _, e = events_until_end(pool, "k")
    assert (e.status, e.reason, e.seed) == ("failed", "the worker process died", 5)
    assert gone(pids), "its run dies with it"
    assert pool.free == 1
    pool.submit("l", QUICK)
    assert events_until_end(pool, "l")[1].ok
    assert worker(pool) != before


def test_close_leaves_no_process(pool: ProcessPool) -> None:
    """Stands last: it ends the worker of this module, in the midst of a run."""
    pool.submit("m", ENDLESS)
    first_progress(pool)
    pids = family(worker(pool))
    assert len(pids) >= 2
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5
    assert gone(pids, 5)
    assert not [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if stat(p)[3:4] == [str(pids[0])]]
    pool.close()  # once more does no harm


def test_a_worker_ends_when_its_driver_is_gone(tmp_path: Path) -> None:
    """The end of its input is all it is told; the run that it was at ends too. And its output is JSON lines only."""
    with (tmp_path / "log").open("wb") as err:
        process = subprocess.Popen([sys.executable, "-P", "-m", "lacer.agents.worker"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=err, env=clean_environment(), start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    messages = (json.loads(line) for line in process.stdout if line.strip())
    try:
        assert next(messages) == {"ready": process.pid}
        line = json.dumps({"key": "x", "request": ENDLESS.model_dump(mode="json"), "timeout": 100}) + "\n"
        process.stdin.write(line[:50].encode())  # lines may come in pieces
        process.stdin.flush()
        time.sleep(0.1)
        process.stdin.write(line[50:].encode())
        process.stdin.flush()
        message = next(messages)
        assert message["key"] == "x"
        assert message["progress"]["steps"] == 64
        pids = family(process.pid)
        assert len(pids) >= 2
        process.send_signal(signal.SIGINT)  # Ctrl-C goes to the whole group; what to do is the driver's decision
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=10) == 0
        assert gone(pids)
    finally:
        process.kill()
        process.wait()


def test_half_a_line_of_a_killed_run_does_no_harm() -> None:
    """The reader thread must outlive it: otherwise the slot would wait for ever."""
    import io
    import queue

    from lacer.search.executors import _Slot

    events: queue.Queue[tuple[_Slot, dict[str, Any] | None]] = queue.Queue()
    slot = _Slot.__new__(_Slot)
    slot._read(io.BytesIO(b'\n{"key": "a", "progress": {"ste\n{"key": "a", "evaluation": {}}\n'), events)
    assert [m for _, m in list(events.queue)] == [{"key": "a", "evaluation": {}}, None]


def test_environments_die_with_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes, though all of them hold the ends of all pipes; and a run that ends leaves no temporary file."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    pool = ProcessPool(1, tmp_path / "worker.log", timeout=4)
    try:
        request = RunRequest(env="lacer/MixedTraffic-v0", env_kwargs={"scene": "sources"}, text_model="hash",
                             seed=5,
                             encoder={"sources": {"traffic": {"block": "linear"}}, "fusion": {"block": "concat"}},
                             protocol=Protocol(steps=1_000_000, eval_episodes=2, ppo=PPO))
        pool.submit("time", request)
        assert failed(pool, "time") == "time-out"
        assert not list(temporary.iterdir())
        pool.submit("kill", request)
        first = worker(pool)
        pids = wait_for(lambda: found if len(found := family(first)) == 4 else None)
        os.kill(first, signal.SIGKILL)
        assert events_until_end(pool, "kill")[1].reason == "the worker process died"
        assert gone(pids)
    finally:
        pool.close()
