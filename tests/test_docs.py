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
                          env={**os.environ, "WANDB_MODE": "offline"}, check=False)


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
        done = run(["-P", "-m", "lacer.search.cli", *shlex.split(command)[1:]], tmp_path, 600)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_site_is_whole() -> None:
    """Every link, anchor and reference of the site leads somewhere."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (ROOT / "site" / "index.html").is_file()
