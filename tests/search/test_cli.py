"""Wrong input gets an answer on standard error and exit code 2, before anything expensive starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lacer.search.cli import main
from lacer.search.config import validate
from lacer.search.loop import plan
from lacer.search.presets import presets, read_yaml
from tests.search.conftest import TINY

ENV = ["--env", "lacer/KnownSources-v0"]


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = 0
    try:
        main(args)
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("args", "message"), [
    ([], "command"),
    (["serch"], "search"),
    (["search", "--candidats", "3"], "did you mean '--candidates'"),
    (["search", "--env", "lacer/KnownSource-v0"], "did you mean 'lacer/KnownSources-v0'"),
    (["search", "--env", "nowhere:Env-v0"], "cannot import 'nowhere'"),
    (["search", *ENV, "--env-kwargs", '{"sorces": ["noise"]}'], "does not take these arguments"),
    (["search", *ENV, "--env-kwargs", '{"sources": ["positon"]}'], "did you mean 'position'"),
    (["search", *ENV, "--designer", "evolutoin"], "did you mean 'evolution'"),
    (["search", *ENV, "--wandb-runs", "both"], "wandb_runs"),
    (["sync", "runs/nothing"], "runs/nothing is no run"),
    (["evaluate", "runs/nothing", "--video", "out.avi"], "the name of a video ends in .gif or .mp4"),
    (["search", *ENV, "--candidates", "0"], "--candidates: Input should be greater than or equal to 1"),
    (["search", *ENV, "--candidates", "-5"], "--candidates"),
    (["search", *ENV, "--candidates", "many"], "candidates"),
    (["search", *ENV, "--protocol.steps", "0"], "--protocol.steps"),
    (["search", *ENV, "--protocol.ppo.gamma", "1.5"], "--protocol.ppo.gamma"),
    (["search", *ENV, "--final-steps", "-1"], "--final-steps"),
    (["search", *ENV, "--space", '{"position.block": ["mlpp"]}'], "did you mean 'mlp'"),
    (["search", *ENV, "--space", '{"position.blok": ["mlp"]}'], "did you mean 'position.block'"),
    (["search", *ENV, "--space", '{"position.block": ["linear"]}'], "the expert's encoder is not part of the search"),
    (["search", *ENV, "--designer", "lacer"], "needs an LLM"),
    (["search", *ENV, "--llm", "openai:some-model"], "OPENAI_API_KEY"),
    (["search", *ENV, "--llm", "anthropic:some-model"], "ANTHROPIC_API_KEY"),
    (["search", *ENV, "--llm", "opnai:some-model"], "openai"),
    (["search", *ENV, "--llm", "replay:/does/not/exist"], "/does/not/exist"),
    (["search", *ENV, "--storage", "study.db"], "storage must be a database URL"),
    (["search", *ENV, "--storage", "sqlite:////does/not/exist/study.db"], "there is no folder /does/not/exist"),
    (["search", *ENV, "--storage", "nosuch://host/db"], "cannot open the study in nosuch://host/db"),
    (["search", *ENV, "--max-env-steps", "100"], "less than one candidate takes"),
    (["search", *ENV, "--repeats", "sometimes"], "repeats"),
    (["search", *ENV, "--executor", "rey"], "executor"),
    (["search", *ENV, "--memory", "0"], "--memory"),
    (["search", "--config", "quik"], "did you mean 'quick'"),
    (["search", "--resume", "/does/not/exist"], "is no run"),
    (["search", "--resume", "."], "is no run"),
    (["search", *ENV, "--dry-run", "--measured-steps", "-1"], "--measured-steps must be at least 0"),
    (["search", "--resume", "/does/not/exist", "--dry-run"], "--dry-run and --resume exclude each other"),
    (["watch", "/does/not/exist"], "there is no such folder"),
    (["watch", "sqlite:////does/not/exist.db"], "there is no study in /does/not/exist.db"),
    (["watch", ".", "--interval", "0"], "--interval must lie between"),
    (["export", "/does/not/exist"], "there is no such folder"),
    (["export", ".", "--out", "x.xlsx"], "must end in .csv, .csv.gz or .parquet"),
    (["evaluate", "/does/not/exist"], "is no agent"),
    (["evaluate", ".", "--episodes", "0"], "--episodes must be at least 1"),
    (["train"], "encoder"),
    (["train", "--encoder", "/does/not/exist.json", *ENV], "cannot read the encoder file"),
    (["train", "--encoder", "/does/not/exist.json", *ENV, "--steps", "0"], "--steps must be at least 1"),
])
def test_wrong_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = run(args, capsys)
    assert code == 2
    assert message in err
    assert not out
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing was left behind"


@pytest.mark.parametrize(("change", "message"), [
    ({"candidats": 3}, "unknown key 'candidats'; did you mean 'candidates'?"),
    ({"protocol": {"stesp": 3}}, "unknown key 'protocol.stesp'; did you mean 'steps'?"),
    ({"protocol": {"ppo": {"gama": 0.9}}}, "unknown key 'protocol.ppo.gama'; did you mean 'gamma'?"),
    ({"candidates": -1}, "candidates: Input should be greater"),
    ({"seed": "abc"}, "seed"),
])
def test_wrong_config_file(change: dict, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}))
    code, _, err = run(["search", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert message in err
    assert "my.yaml" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words", ""])
def test_config_that_is_no_mapping(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    code, _, err = run(["search", "--config", str(path)], capsys)
    assert code == 2
    assert "my.yaml" in err


def test_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(["search", *ENV, "--out", str(tmp_path)], capsys)
    assert code == 2
    assert f"lacer search --resume {tmp_path}" in err
    assert not list(tmp_path.iterdir())


def test_run_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run(["search", *ENV, "--out", str(tmp_path / "file" / "run")], capsys)
    assert code == 2
    assert "cannot write the run folder" in err


def test_encoder_for_other_sources(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps({"sources": {"camera": {"block": "cnn"}}, "fusion": {"block": "concat"}}))
    for args in (["train", "--encoder", str(path), *ENV], ["search", "--expert", str(path), *ENV]):
        code, _, err = run(args, capsys)
        assert code == 2
        assert "encoder.json" in err
        assert "'camera', which lacer/KnownSources-v0 does not have" in err


@pytest.mark.parametrize(("command", "expected"), [
    ("envs", r"^lacer/MixedTraffic-v0 +\S.+"), ("blocks", r"^series:gru +\S.+"),
    ("designers", r"^lacer +\S.+\(needs an LLM\)$"),
])
def test_lists_have_one_line_each(command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([command], capsys)
    assert code == 0
    assert re.search(expected, out, re.MULTILINE)
    assert all(re.match(r"\S+ +\S", line) for line in out.strip().splitlines())


@pytest.mark.parametrize("command", ["search", "compare", "train", "evaluate", "watch", "export", "sync"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([command, "--help"], capsys)
    assert code == 0
    assert f"  lacer {command} " in out
    assert "null" not in out


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_plans(name: str) -> None:
    config = validate(read_yaml(name), name)
    assert plan(config).space.size() > 1e6
