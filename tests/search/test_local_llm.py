"""A real inference server on this machine, llama.cpp behind OpenAI's interface, with a tiny model of random weights.

Needs llama-cpp-python[server] and gguf: the extra [local-llm] (`make test-local-llm`), or any other Python that has
them, named in LACER_LLAMA_PYTHON. Random weights know nothing: whatever is valid is so because of the schema.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lacer.envs import task_card
from lacer.search import search
from lacer.search.designers.base import designers
from lacer.search.llm import LLMClient, LLMConfig, parse_reply, prompts, reply_schema
from lacer.search.space import EncoderSpace
from tests.search.conftest import TINY

pytestmark = pytest.mark.local_llm
REPLIES = 300
LLM_DESIGNERS = [name for name, cls in designers().items() if cls.needs_llm]


def python() -> str:
    """A Python that has the server."""
    found = os.environ.get("LACER_LLAMA_PYTHON", sys.executable)
    has = subprocess.run([found, "-c", "import llama_cpp.server, gguf"], capture_output=True, text=True, check=False)
    assert has.returncode == 0, (f"{found} has no llama-cpp-python[server] and gguf: `make test-local-llm` installs "
                                 f"them (built from source, about five minutes). {has.stderr[-300:]}")
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server."""
    folder = tmp_path_factory.mktemp("llama")
    space = EncoderSpace(task_card(TINY["env"], **TINY["env_kwargs"]))
    words = [p.read_text() for p in sorted(Path(prompts.__path__[0]).rglob("*.md"))]
    (folder / "words").write_text("\n".join([*words, json.dumps(reply_schema(space, 1))]))
    subprocess.run([python(), str(Path(__file__).with_name("tiny_llama.py")), folder / "tiny.gguf", folder / "words"],
                   check=True)
    assert (folder / "tiny.gguf").stat().st_size < 1_000_000
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["NO_PROXY"] = "127.0.0.1"
    with (folder / "log").open("w") as log, subprocess.Popen(
            [python(), "-m", "llama_cpp.server", "--model", str(folder / "tiny.gguf"), "--n_ctx", "32768",
             "--n_threads", "1", "--n_threads_batch", "1", "--port", str(port)], stdout=log, stderr=log) as process:
        try:
            address = f"http://127.0.0.1:{port}/v1"
            for _ in range(240):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(address + "/models", timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            process.kill()


def test_what_the_server_can_is_found_out(url: str, tmp_path: Path) -> None:
    space = EncoderSpace(task_card("lacer/KnownSources-v0"))
    for _ in range(2):
        c = LLMClient(LLMConfig(model="openai:tiny", base_url=url), tmp_path)
        c.complete([{"role": "user", "content": "An encoder!"}], reply_schema(space, 1))
    formats = [json.loads(x)["format"] for x in (tmp_path / "llm_transcript.jsonl").read_text().splitlines()]
    assert formats == ["json_schema", "tool", "tool"]  # it knows schemas in another field only


@pytest.mark.parametrize("env", ["lacer/KnownSources-v0", "lacer/MixedTraffic-v0"])
@pytest.mark.parametrize("form", ["json_object", "tool"])
def test_schema_constrained_random_replies_are_valid(url: str, form: Any, env: str,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    space = EncoderSpace(task_card(env))
    schema = reply_schema(space, 1)
    errors: list[str] = []
    points = set()
    for seed in range(REPLIES // 4):
        c = LLMClient(LLMConfig(model="openai:tiny", base_url=url, format=form, seed=seed, max_output_tokens=4096))
        reply = c.complete([{"role": "user", "content": "An encoder!"}], schema)
        (got,) = parse_reply(reply.text, space, 1)
        if got.point is None:
            errors.append(got.error)
        else:
            points.add(space.to_ncode(got.point))
    with capsys.disabled():
        print(f"\n{env}, {form}: {REPLIES // 4 - len(errors)} of {REPLIES // 4} random replies are valid encoders, "
              f"{len(points)} different ones")
    assert len(errors) <= 0.01 * REPLIES / 4, errors
    assert len(points) > 0.9 * REPLIES / 4


@pytest.mark.parametrize("name", LLM_DESIGNERS)
def test_a_search_completes(url: str, name: str, tmp_path: Path) -> None:
    config = {**TINY, "candidates": 4, "designer": name,
              "designer_kwargs": {"start": 1} if name == "lm-searcher" else {}}
    result = search(out=tmp_path / "run", quiet=True, **config, wandb="off", llm="openai:tiny", llm_base_url=url,
                    llm_max_output_tokens=4096)
    trials = [t for t in result.outcome.trials if t.status != "rejected"]
    assert [t.status for t in trials] == ["ok"] * 4
    assert result.outcome.usage["tokens_out"] > 0
    assert result.report.stat().st_size > 10_000
    assert result.best.request.env == TINY["env"]
    if name == "lacer":
        assert [t.proposal.designer for t in trials] == ["expert", "lacer", "lacer", "lacer"]
