"""The wheel holds everything, and works where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("envs", "encoders", "agents", "search", "configs")
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.split("\n")
    for name in filter(None, tracked):  # a copy: building in place would leave files behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
                   check=True, timeout=120)
    return next(out.glob("lacer-*.whl"))


def test_every_package_is_listed() -> None:
    found = {f"lacer.{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
             for f in FOLDERS for p in (ROOT / f).rglob("__init__.py")}
    assert found == set(SETUP["packages"])


def test_wheel_holds_code_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"lacer/{path.relative_to(ROOT).as_posix()}" in names
    assert not [n for n in names if n.startswith(("lacer/tests", "tests/", "lacer/runs"))]


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installs with all dependencies, which takes minutes, and searches from another folder."""
    from tests.search.conftest import TINY

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel], check=True,
                   timeout=900)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    work = tmp_path / "elsewhere"
    work.mkdir()
    for args in (["search", "--config", "../tiny.yaml", "--out", "run"], ["evaluate", "run/best", "--episodes", "2"],
                 ["search", "--config", "../tiny.yaml", "--env", "lacer/MixedTraffic-v0", "--env-kwargs",
                  '{"scene": "small"}', "--out", "traffic", "--candidates", "2", "--protocol.steps", "128",
                  "--protocol.eval-episodes", "2", "--final-steps", "128", "--final-episodes", "2"]):
        done = subprocess.run([tmp_path / "venv" / "bin" / "lacer", *args], cwd=work, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
    assert (work / "run" / "report.html").exists()
    assert (work / "traffic" / "best" / "policy.safetensors").exists()
