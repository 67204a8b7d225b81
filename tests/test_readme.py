"""What the README shows works as written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lacer.envs import task_card

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    (lacer .*?)(?:  +#.*)?$", README, re.MULTILINE)


def run(args: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "WANDB_MODE": "offline"})


def test_python_in_under_ten_lines(tmp_path: Path) -> None:
    code = PYTHON[0]
    assert "from lacer.search import search" in code
    done = run(["-P", "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    report = done.stdout.strip().splitlines()[-1].split(" ", 1)[1]
    assert (tmp_path / report).is_file()


def test_any_objective(tmp_path: Path) -> None:
    done = run(["-P", "-c", PYTHON[1]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'width': 32, 'depth': 1} 32.0"


def test_any_environment() -> None:
    assert "describe(gym.make(" in PYTHON[2]
    done = run(["-P", "-c", PYTHON[2]], Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "observation_history  series  (8, 4) float32" in done.stdout
    [command] = [c for c in COMMANDS if c.startswith("lacer envs HalfCheetah")]
    kwargs = json.loads(shlex.split(command)[-1])
    if importlib.util.find_spec("mujoco"):
        del kwargs["describe"]["camera"]  # not every machine can render
        assert task_card("HalfCheetah-v5", **kwargs).sources["position_history"].shape == (8, 8)


@pytest.mark.slow
def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "thermostat.py").write_text(PYTHON[3])
    [command] = [c for c in COMMANDS if "thermostat" in c]
    done = run(["-P", "-m", "lacer.search.cli", *shlex.split(command)[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "comfort" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    check = run(["-P", "-m", "lacer.search.cli", "evaluate", f"runs/{folder.name}/best", "--episodes", "2"], tmp_path)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "..." not in c and "|" not in c])
def test_options_in_commands_exist(command: str) -> None:
    """Long commands are parsed, not run."""
    from lacer.search.cli import parse

    args = shlex.split(command)[1:]
    parse([a.replace("$d", "random") for a in args])
