"""A tiny configuration of a search, the command line as a process, and scripted language models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lacer.search.cli import main
from tests.search.llm_server import LLMServer, Served

KEY = "sk-very-secret-0123456789"
TINY: dict[str, Any] = {
    "env": "lacer/KnownSources-v0",
    "env_kwargs": {"sources": ["position", "words", "noise"]},
    "designer": "evolution", "candidates": 5, "text_model": "hash", "workers": 2,
    "protocol": {"steps": 512, "eval_episodes": 4, "ppo": {"n_envs": 4, "n_steps": 64, "gamma": 0.5}},
    "final_steps": 512, "final_episodes": 4,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML file of a search that takes seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """``lacer ARGS`` in this process: exit code, standard output, standard error."""
    code = 0
    try:
        main(args)
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def start() -> Start:
    """Starts ``lacer ARGS`` as a process of its own group."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(*args: object, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lacer.search.cli", *map(str, args)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True,
            env={**{k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "OPENAI_", "ANTHROPIC_"))},
                 "COLUMNS": "160", **env})

    return start


Lacer = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def lacer(start: Start) -> Lacer:
    """Runs ``lacer ARGS`` to its end."""
    def run(*args: object, timeout: float = 120, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        process = start(*args, **kwargs)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def llm_server() -> Iterator[LLMServer]:
    """One process for all scripts."""
    server = LLMServer()
    yield server
    server.close()


@pytest.fixture
def serve(llm_server: LLMServer, llm_environment: None) -> Callable[..., Served]:
    """Scripted language models: ``serve(reply, reply, ...)``, see ``llm_server.py``."""
    return llm_server.serve


@pytest.fixture
def llm_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, no addresses, and hardly a wait between tries."""
    from lacer.search.llm import client

    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "ant-" + KEY[3:])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "BACKOFF", 0.02)
