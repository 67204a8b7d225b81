"""Environments of other packages join by the entry point group ``lacer.envs``, with no change here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.search.conftest import TINY

PACKAGE = Path(__file__).parent / "plugin_package"

JOINS = """
import gymnasium as gym
from lacer.envs import list_envs, make, task_card

card = task_card("pond/Frogs-v0")  # nobody has imported the package
assert list_envs()["pond/Frogs-v0"] == "jump to the frog that quacks"
assert list_envs()["pond/Lake-v0"] == "a larger pond"
assert {n: (s.modality, s.shape) for n, s in card.sources.items()} == {
    "frogs": ("set", (5, 3)), "water": ("vector", (3,)), "song": ("text", ()), "water_history": ("series", (3, 3))}
assert card.objective.metric == "hits" and card.noop.tolist() == [0, 0]
assert card.sources["frogs"].description.startswith("Present, x, y")
assert make("pond/Lake-v0").unwrapped.horizon == 12
env = gym.make("pond/Frogs-v0")
env.reset(seed=0)
for _ in range(6):
    *_, done, info = env.step(card.noop)
assert done and set(info["metrics"]) == {"hits", "return", "length"}
try:
    make("pond/Frog-v0")
except KeyError as e:
    assert "did you mean 'pond/Frogs-v0'" in str(e)
from lacer.search.cli import main

main(["envs"])
main(["envs", "pond/Frogs-v0"])
"""

CONFORMS = """
from lacer.envs.testing import EnvConformance

class TestFrogs(EnvConformance):
    env_id = "pond/Frogs-v0"
    start_methods = ("fork",)

class TestBroken(EnvConformance):
    env_id = "broken:Broken-v0"
    start_methods = ("fork",)
"""

BROKEN = """
import numpy as np
from lacer.envs import register_env
from lacer_pond import Frogs

class Broken(Frogs):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else np.random.randint(2**31))

    def step(self, action):
        *rest, info = super().step(action)
        return (*rest, {})

register_env("Broken-v0", "broken:Broken", sources={"frogs": "set"}, objective="hits")
"""


def python(path: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python with a folder of packages beside the installed ones."""
    env = {**os.environ, "COLUMNS": "160",
           "PYTHONPATH": os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, "-P", *args], capture_output=True, text=True, timeout=200, env=env, cwd=cwd,
                          check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built and installed by pip into a folder; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("plugin")
    copy = folder / "source"  # the build leaves files beside the sources
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            (copy / file.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(PACKAGE)).write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(folder / "site"), str(copy)],
        capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_an_environment_of_another_package_joins(installed: Path) -> None:
    done = python(installed, "-c", JOINS)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    for text in ("pond/Frogs-v0", "jump to the frog that quacks", "lacer/KnownSources-v0",
                 "Present, x, y of up to five", "maximize hits", "series  (3, 3) float32"):
        assert text in done.stdout


@pytest.mark.parametrize("code", [
    "import gymnasium as gym; env = gym.make('lacer_pond:pond/Frogs-v0')",
    "import gymnasium as gym, lacer_pond; env = gym.make('pond/Frogs-v0')",
    "from lacer.envs import make; env = make('lacer_pond:pond/Frogs-v0', horizon=3)",
], ids=["module and id", "import, then make", "lacer's make"])
def test_ways_to_make_it(installed: Path, code: str) -> None:
    code += "; print(sorted(env.reset(seed=0)[0]), env.get_wrapper_attr('task_card').env_id)"
    done = python(installed, "-c", code)
    assert done.stdout == "['frogs', 'song', 'water', 'water_history'] pond/Frogs-v0\n", done.stderr


@pytest.mark.slow
def test_users_inherit_the_conformance_tests(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test_frogs.py").write_text(CONFORMS)
    (tmp_path / "broken.py").write_text(BROKEN)
    done = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-rA",
                  "-k", "Frogs or same_seed or episodes", "test_frogs.py", cwd=tmp_path)
    assert "FAILED test_frogs.py::TestFrogs" not in done.stdout, done.stdout
    assert done.stdout.count("PASSED test_frogs.py::TestFrogs") >= 9
    for test, says in (("test_same_seed_same_episode", "the same seed gives another episode the second time"),
                       ("test_episodes", "lacks the objective 'hits'")):
        assert f"FAILED test_frogs.py::TestBroken::{test}" in done.stdout
        assert says in done.stdout


def test_packages_that_cannot_be_loaded_are_left_out(tmp_path: Path) -> None:
    for name, code in (("missing", "import not_there"), ("exits", "raise SystemExit(3)"), ("fails", "def go(): 1 / 0")):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text(f"[lacer.envs]\nmine = {name}{':go' if name == 'fails' else ''}\n")
    done = python(tmp_path, "-c", "from lacer.envs import list_envs, task_card; print(*list_envs()); "
                                  "task_card('lacer/KnownSources-v0')")
    assert done.returncode == 0, done.stderr
    assert "lacer/KnownSources-v0" in done.stdout
    for name, error in (("missing", "ModuleNotFoundError: No module named 'not_there'"), ("exits", "SystemExit: 3"),
                        ("fails:go", "ZeroDivisionError")):
        assert (f"the environments of the entry point mine = {name} of the package {name.split(':')[0]} 2.1 are left "
                f"out: {error}") in done.stderr


@pytest.mark.slow
def test_a_search_on_it(installed: Path, tmp_path: Path) -> None:
    """The worker processes know it too."""
    settings = {**TINY, "env": "pond/Frogs-v0", "env_kwargs": {}, "candidates": 3}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    done = python(installed, "-m", "lacer.search.cli", "search", "--config", "tiny.yaml", "--wandb", "off",
                  "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "best" / "policy.safetensors").is_file()
