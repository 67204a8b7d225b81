"""What the documentation shows works as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md"))
PYTHON = {p.stem: "\n".join(re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL)) for p in PAGES}


def commands(path: Path) -> list[str]:
    """The lines of a page that call `lacer`, in fenced blocks and indented ones; continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += [m.strip() for m in re.findall(r"^    (lacer .*)$", text, re.MULTILINE)]
    return [re.sub(r"\s+(#|<) .*$", "", line) for line in lines if line.startswith("lacer ")]


COMMANDS = [(p.stem, c) for p in PAGES for c in commands(p)]


def run(args: list[str], cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**{k: v for k, v in os.environ.items()
                                  if not k.startswith(("WANDB_", "OPENAI_", "ANTHROPIC_"))},
                               "WANDB_MODE": "offline", "NETRC": str(cwd / "none")}, check=False)


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if "search(\"" in code else [])
                                  for p, code in PYTHON.items() if code])
def test_python_of_a_page(page: str, tmp_path: Path) -> None:
    """All blocks of a page, one after another in one program."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "page.py").write_text(PYTHON[page])
    done = run(["-P", "page.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c[:60]}" for p, c in COMMANDS])
def test_commands_parse(page: str, command: str) -> None:
    from lacer.search.cli import parse

    parse(shlex.split(command)[1:])


@pytest.mark.slow
def test_start_in_five_minutes(tmp_path: Path) -> None:
    """The commands of the page, as they stand there, one after another."""
    for command in commands(ROOT / "docs" / "start.md"):
        done = run(["-P", "-m", "lacer.search.cli", *shlex.split(command)[1:]], tmp_path, 1800)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "environments.md").read_text()
    [code] = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Thermostat" in c]
    (tmp_path / "thermostat.py").write_text(code)
    [command] = [c for c in commands(ROOT / "docs" / "environments.md") if "thermostat" in c]
    done = run(["-P", "-m", "lacer.search.cli", *shlex.split(command)[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "comfort" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    check = run(["-P", "-m", "lacer.search.cli", "evaluate", f"runs/{folder.name}/best", "--episodes", "2"], tmp_path)
    assert check.returncode == 0, check.stderr


@pytest.mark.slow
def test_commands_of_comparing(tmp_path: Path) -> None:
    """The commands of the page, in their order, with a smaller budget; those that need a model or an account say so."""
    small = ["--base.candidates", "1", "--base.protocol.steps", "256", "--base.final-steps", "256", "--seeds", "0,1"]
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    seen = set()
    for command in commands(ROOT / "docs" / "compare.md"):
        args = shlex.split(command.replace("runs/R", "runs/offline"))[1:]
        if args[1].startswith("runs/random"):
            first = min(tmp_path.glob("comparisons/*"))
            args = ["compare", *(str(first / "runs" / f"{d}-{s}") for d in ("random", "evolution") for s in (0, 1))]
        elif args[:2] == ["compare", "quick"]:
            args += small
        elif args[0] == "search":
            args += ["--candidates", "1", "--protocol.steps", "256", "--final-steps", "256",
                     "--protocol.eval-episodes", "2", "--final-episodes", "2"]
        elif args[:2] == ["bench", "make"]:
            continue  # hundreds of trainings
        elif args[0] == "bench":
            args += ["--seeds", "2"]
        done = run(["-P", "-m", "lacer.search.cli", *args], tmp_path, 400)
        if args[0] == "sync":
            assert "no W&B account" in done.stderr, done.stderr
        elif "--base.llm" in args:
            assert "OPENAI_API_KEY" in done.stderr, done.stderr
        else:
            assert done.returncode == 0, (args, done.stderr[-2000:])
        seen.add(args[0])
    assert seen == {"compare", "bench", "search", "sync", "export", "watch"}
    assert (tmp_path / "trials.csv").stat().st_size > 500


@pytest.mark.slow
def test_site_is_whole() -> None:
    """Every link, anchor and reference of the site leads somewhere."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (ROOT / "site" / "index.html").is_file()
