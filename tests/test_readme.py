"""What the README shows works as written."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from lacer.envs import task_card
from tests.test_docs import ROOT, commands, run

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = commands(ROOT / "README.md")


def test_what_comes_first() -> None:
    """A picture, then `make search` and `make test`, then three uses."""
    places = [README.index(s) for s in ("![", "make search  ", "make test  ", "\n## 1.", "\n## 2.", "\n## 3.")]
    assert places == sorted(places)
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / link).is_file(), link


@pytest.mark.slow
def test_python_in_under_ten_lines(tmp_path: Path) -> None:
    code = PYTHON[0]
    assert "from lacer.search import search" in code
    assert len(code.splitlines()) < 10
    done = run(["-P", "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    report = done.stdout.strip().splitlines()[-1].split(" ", 1)[1]
    assert (tmp_path / report).is_file()


def test_any_environment() -> None:
    assert "describe(gym.make(" in PYTHON[1]
    done = run(["-P", "-c", PYTHON[1]], Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "observation_history  series  (8, 4) float32" in done.stdout
    [command] = [c for c in COMMANDS if c.startswith("lacer envs HalfCheetah")]
    kwargs = json.loads(shlex.split(command)[-1])
    if importlib.util.find_spec("mujoco"):
        del kwargs["describe"]["camera"]  # not every machine can render
        assert task_card("HalfCheetah-v5", **kwargs).sources["position_history"].shape == (8, 8)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_in_commands_exist(command: str) -> None:
    """Long commands are parsed, not run."""
    from lacer.search.cli import parse

    parse(shlex.split(command)[1:])


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path: Path) -> None:
    """What is short of them, in their order, as they stand there; the searches with a smaller budget."""
    small = "--candidates 1 --protocol.steps 256 --final-steps 256 --protocol.eval-episodes 2 --final-episodes 2"
    short = {
        "lacer search --env lacer/MixedTraffic-v0": f"--config quick {small}", "lacer search --env CartPole": small,
        "compare quick": "--base.candidates 1 --base.protocol.steps 256 --base.final-steps 256 --seeds 0,1 --designers "
                         "random,evolution",
        "lacer train": "--steps 256 --episodes 2", "lacer evaluate": "--episodes 2", "lacer bench": "--seeds 2"}
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = []
    for command in COMMANDS:
        if "--space minigrid" in command or "HalfCheetah" in command:  # extras
            continue
        args = shlex.split(command)[1:] + shlex.split(next((v for k, v in short.items() if k in command), ""))
        if "*-random" in command:
            first = min(tmp_path.glob("comparisons/*"))
            args = ["compare", *map(str, sorted(first.glob("runs/*")))]
        result = run(["-P", "-m", "lacer.search.cli", *args], tmp_path, 400)
        if args[0] == "sync":
            assert "no W&B account" in result.stderr, result.stderr
        else:
            assert result.returncode == 0, (args, result.stderr[-2000:])
        done.append(args[0])
    assert {"search", "evaluate", "show", "train", "envs", "compare", "export", "watch", "sync", "bench"} <= set(done)
    assert (tmp_path / "drive.gif").stat().st_size > 10_000
    assert len(list(tmp_path.glob("comparisons/*/comparison.html"))) == 3
