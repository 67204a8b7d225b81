"""Candidates on a real Ray cluster of two nodes on this machine, one of which is killed during the search."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helper_objectives
import pytest

from lacer.agents import load
from lacer.envs import LacerError
from lacer.search import Decision, SearchSpace, search
from tests.search.conftest import TINY, Lacer

pytestmark = pytest.mark.ray
SPACE = SearchSpace([Decision(f"d{i}", (0, 1, 2, 3)) for i in range(6)])
SECRET = "planted-ray-secret-31"


def node(name: str, tmp_path: Path) -> dict[str, Any]:
    return {"num_cpus": 1, "env_vars": {"LACER_NODE": name, "LACER_TRACE": str(tmp_path / "trace")}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=node("first", tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)  # after the cluster has started: that of the driver only
    yield cluster
    cluster.shutdown()


def kill(node: Any) -> None:
    """As a machine that loses its power: the node's daemon and all its workers."""
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    for pid in [*map(int, children), raylet]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_node_is_lost(cluster: Any, tmp_path: Path) -> None:
    other = cluster.add_node(**node("second", tmp_path))
    cluster.wait_for_nodes()
    trace = tmp_path / "trace"
    trace.touch()

    def kill_in_its_third_candidate() -> None:
        while trace.read_text().count("second") < 3:
            time.sleep(0.05)
        kill(other)

    killer = threading.Thread(target=kill_in_its_third_candidate, daemon=True)
    killer.start()
    result = search(space=SPACE, objective=helper_objectives.where, designer="random", candidates=12, quiet=True,
                    executor="ray", ray_address=cluster.address, out=tmp_path / "run")
    killer.join(timeout=1)
    assert not killer.is_alive()
    trials = result.study.trials
    assert [t.status for t in trials] == ["ok"] * 12, [t.reason for t in trials]
    assert len({t.ncode for t in trials}) == 12
    assert all(t.objective == helper_objectives.smooth(t.proposal.point or {}) for t in trials)
    nodes = [t.evaluation.reason.split()[0] for t in trials if t.evaluation]
    assert nodes.count("second") == 2, "what the lost node had finished counts"
    assert trace.read_text().split().count("second") == 3
    assert len(trace.read_text().split()) == 13, "only what it had not finished was evaluated again"
    assert all(t.evaluation is not None and t.evaluation.reason.endswith("[]") for t in trials), "no secret travelled"


def test_a_search_of_encoders(lacer: Lacer, tiny: Path, tmp_path: Path) -> None:
    """PPO runs with progress, the winner's files brought home, no secret in a cluster that is started here."""
    folder = tmp_path / "run"
    done = lacer("search", "--config", tiny, "--executor", "ray", "--out", folder, "--candidates", 3, "--wandb", "off",
                 OPENAI_API_KEY=SECRET, timeout=300)
    assert done.returncode == 0, done.stderr
    agent = load(folder / "best")
    assert agent.evaluation.ok
    here = search(out=tmp_path / "here", quiet=True, **{
        **TINY, "candidates": 3, "executor": "process", "wandb": "off"})
    assert here.outcome.trials[0].objective == pytest.approx(
        float(done.stderr.split("#0 score ")[1].split()[0]), abs=1e-3), "the same result as on this machine's pool"
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_wrong_input(cluster: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": SPACE, "objective": helper_objectives.smooth, "quiet": True, "executor": "ray"}
    with pytest.raises(LacerError, match="no node of the Ray cluster has 64 CPUs"):
        search(**options, ray_address=cluster.address, cpus_per_candidate=64)
    start = time.monotonic()
    with pytest.raises(LacerError, match=r"the Ray cluster 127.0.0.1:1 does not answer"):
        search(**options, ray_address="127.0.0.1:1")
    assert time.monotonic() - start < 15
