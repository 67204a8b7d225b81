"""A search that is killed goes on with a candidate's training from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.search.conftest import TINY, Lacer, Start


def evaluation(folder: Path) -> dict[str, Any]:
    study = optuna.load_study(storage=f"sqlite:///{folder}/study.db", study_name=None)
    return dict(study.trials[0].user_attrs["evaluation"])


@pytest.mark.slow
def test_a_killed_search_goes_on_with_a_candidates_checkpoint(start: Start, lacer: Lacer, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    protocol = {**TINY["protocol"], "steps": 8192, "checkpoint_every": 512}
    config.write_text(yaml.safe_dump({**TINY, "protocol": protocol, "candidates": 1, "workers": 1, "wandb": "off"}))
    quiet, folder = tmp_path / "quiet", tmp_path / "run"
    done = lacer("search", "--config", config, "--out", quiet)
    assert done.returncode == 0, done.stderr
    process = start("search", "--config", config, "--out", folder)
    path = folder / "checkpoints" / "0-0.safetensors"
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the run ends with its driver
    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["lacer"])
    assert 0 < about["state"]["rollouts"] < 32
    about["state"]["callbacks"][0]["curve"][0][1] = 12345.0  # so that its use can be seen
    save_file(load_file(path), path, {"lacer": json.dumps(about)})
    done = lacer("search", "--resume", folder)
    assert done.returncode == 0, done.stderr
    want, got = evaluation(quiet), evaluation(folder)
    assert got["curve"][0][1] == 12345.0
    assert got["curve"][1:] == want["curve"][1:]
    assert (got["returns"], got["objective"], got["probes"]) == (want["returns"], want["objective"], want["probes"])
    assert not list((folder / "checkpoints").iterdir())
