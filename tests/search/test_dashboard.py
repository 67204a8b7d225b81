"""``optuna-dashboard`` on a run, as a user opens it. Needs the extra [dashboard]."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.search.conftest import Lacer

pytestmark = pytest.mark.slow


def test_dashboard(tiny: Path, lacer: Lacer, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.exists():
        pytest.skip("pip install 'lacer[dashboard]'")
    folder = tmp_path / "a run"
    assert lacer("search", "--config", tiny, "--candidates", 3, "--out", folder, "--wandb", "off").returncode == 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([program, f"sqlite:///{folder}/study.db", "--port", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=20) as f:
            return dict(json.load(f))

    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                [study] = get("studies")["study_summaries"]  # type: ignore[misc]
                break
            except OSError:
                time.sleep(0.2)
        assert study["study_name"] == "a run"
        detail = get(f"studies/{study['study_id']}?after=0")
        assert detail["name"] == "a run"
        assert "score" in json.dumps(detail)
        trials = detail["trials"]
        assert isinstance(trials, list)
        assert [t["state"] for t in trials] == ["Complete"] * 3
        assert {p["name"] for p in trials[0]["params"]} >= {"position.block", "fusion.block"}
        assert {a["key"] for a in trials[0]["user_attrs"]} >= {"designer", "encoder", "evaluation", "ncode"}
        assert trials[0]["intermediate_values"]
    finally:
        server.terminate()
        server.wait(timeout=20)
    shutil.rmtree(folder)
