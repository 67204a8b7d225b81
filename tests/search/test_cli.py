"""Wrong input gets an answer on standard error and exit code 2, before anything expensive starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lacer.search.config import validate
from lacer.search.loop import plan
from lacer.search.presets import presets, read_yaml
from tests.search.conftest import TINY, run

ENV = ["--env", "lacer/KnownSources-v0"]


@pytest.mark.parametrize(("args", "message"), [
    ([], "command"),
    (["serch"], "search"),
    (["search", "--candidats", "3"], "did you mean '--candidates'"),
    (["search", "--env", "lacer/KnownSource-v0"], "did you mean 'lacer/KnownSources-v0'"),
    (["search", "--env", "nowhere:Env-v0"], "cannot import 'nowhere'"),
    (["search", *ENV, "--env-kwargs", '{"sorces": ["noise"]}'], "does not take these arguments"),
    (["search", *ENV, "--env-kwargs", '{"sources": ["positon"]}'], "did you mean 'position'"),
    (["search", *ENV, "--designer", "evolutoin"], "did you mean 'evolution'"),
    (["search", *ENV, "--wandb-runs", "both"], "--wandb-runs must be one of search, candidate, not 'both'"),
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
    (["search", *ENV, "--designer", "evolution", "--designer-kwargs", '{"population": -3}', "--dry-run"],
     "population and tournament must be at least 1"),
    (["watch", "/does/not/exist"], "there is no such folder"),
    (["watch", "sqlite:////does/not/exist.db"], "there is no study in /does/not/exist.db"),
    (["watch", ".", "--interval", "0"], "--interval must lie between"),
    (["export", "/does/not/exist"], "there is no such folder"),
    (["export", ".", "--out", "x.xlsx"], "must end in .csv, .csv.gz or .parquet"),
    (["evaluate", "/does/not/exist"], "is no agent"),
    (["evaluate", ".", "--episodes", "0"], "--episodes must be at least 1"),
    (["train"], "train needs --encoder\nSee `lacer train --help`."),
    (["train", "--encoder", "/does/not/exist.json", *ENV], "cannot read the encoder file"),
    (["train", "--encoder", "/does/not/exist.json", *ENV, "--steps", "0"], "--steps must be at least 1"),
    (["train", "--encoder", "x.json", *ENV, "--seed", "-1"], "--seed must lie between 0 and 2147483647, not -1"),
    (["evaluate", ".", "--seed", "2147483648"], "--seed must lie between 0 and 2147483647"),
    (["search", *ENV, "--seed", "2147483648"], "--seed: Input should be less than or equal to 2147483647"),
    (["search", *ENV, "--seed", "1.5"], "--seed must be a whole number, not '1.5'\nSee `lacer search --help`."),
    (["search", *ENV, "--candidates", "1e3"], "--candidates must be a whole number, not '1e3'"),
    (["search", *ENV, "--timeout", "nan"], "--timeout must be a finite number, not 'nan'"),
    (["search", *ENV, "--protocol.ppo.learning-rate", "inf"], "--protocol.ppo.learning-rate must be a finite number"),
    (["search", *ENV, "--llm-format", "xml"], "must be one of auto, json_schema, tool, json_object, plain, not 'xml'"),
    (["search", *ENV, "--env-kwargs", "{sources"], "must be JSON, such as '{\"name\": 1}', not '{sources'"),
    (["search", *ENV, "--protocol.ppo.shortcuts", "fast"], "must be a list of fused_adam, channels_last, batched_ends"),
    (["search", *ENV, "--protocol.ppo.head", "wide"], "ppo.head must be a list, such as '[1, 2]', not 'wide'"),
    (["search", *ENV, "--protocol", "5"], "--protocol could match --protocol.steps, --protocol.eval-episodes, "),
    (["search", *ENV, "--designer", "optuna:"], "unknown designer 'optuna:'; did you mean 'optuna:"),
    (["search", *ENV, "--out", "x" * 300], "File name too long: xxx"),
    (["search", "--env", "tests.search.broken:Env-v0"], "cannot import 'tests.search.broken'"),
    (["bench", "--function", "tests.search.broken:f", "--space", "a:b"], "cannot import"),
    (["bench", "make", "--seeds", "few"], "--seeds must be a whole number, not 'few'\nSee `lacer bench make --help`."),
    (["prompt", "runs/R"], "prompt needs N\nSee `lacer prompt --help`."),
    (["prompt"], "prompt needs RUN and N\nSee `lacer prompt --help`."),
    (["prompt", "runs/R", "x"], "number must be a whole number, not 'x'\nSee `lacer prompt --help`."),
    (["prompt", "runs/R", "1"], "runs/R is no run"),
    (["watch", "/dev/null"], "/dev/null is no run"),
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
    assert len([line for line in err.splitlines() if not line.startswith("See `lacer")]) == 1
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


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n- b", "expected keys and values"), ("just words", "expected keys and values"), ("", "expected keys and val"),
    ("a: [", "is not YAML, line 1, column 5: "), ("a: !!python/object/apply:os.system [id]", "could not"),
    ("seed: 1\nprotocol:\n  steps: 2\n  steps: 3\n", "line 4, column 3: the key 'steps' is given twice"),
    ("a: 2026-13-99", "is not YAML: month must be in 1..12"),
])
def test_config_that_is_no_mapping(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    code, _, err = run(["search", "--config", str(path)], capsys)
    assert code == 2
    assert "my.yaml" in err
    assert message in err
    assert err.count("\n") == 1


def test_a_module_that_breaks_when_it_is_imported(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for args in (["envs", "breaks:Env-v0"], ["bench", "--function", "breaks:f", "--space", "breaks:s"]):
        code, _, err = run(args, capsys)
        assert code == 2
        assert "cannot import" in err
        assert err.endswith("RuntimeError: no licence\n")


def test_an_agent_that_could_not_be_saved_is_not_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    encoder = tmp_path / "encoder.json"
    encoder.write_text(json.dumps({"sources": {"position": {"block": "linear"}}, "fusion": {"block": "concat"}}))
    code, _, err = run(["train", "--encoder", str(encoder), *ENV, "--out", str(tmp_path / "file" / "agent")], capsys)
    assert code == 2
    assert "cannot write the agent folder" in err


def test_a_bench_does_not_write_into_a_folder_of_something_else(capsys: pytest.CaptureFixture[str],
                                                                tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("arch,score\n00,1\n01,2\n")
    code, _, err = run(["bench", "--table", str(table), "--out", str(tmp_path)], capsys)
    assert code == 2
    assert "holds something else, no comparison of `lacer bench`" in err
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(("output", "code", "message"), [
    ("> /dev/full", 2, "lacer: error: No space left on device\n"), (">&-", 0, ""), ("| true", 0, "")])
def test_output_that_nobody_can_have(output: str, code: int, message: str) -> None:
    done = subprocess.run(f"{sys.executable} -P -m lacer.search.cli envs {output}", shell=True, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize(("args", "modules"), [
    (["search", "--candidates", "-1"], ("torch", "optuna")),
    (["prompt", "runs/R", "1"], ("sklearn", "stable_baselines3"))])
def test_what_an_answer_does_not_need_is_not_imported(args: list[str], modules: tuple[str, ...]) -> None:
    code = (f"import sys; from lacer.search.cli import main\ntry: main({args})\nexcept SystemExit: pass\n"
            f"print([m for m in {modules} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    assert "lacer: error" in done.stderr


def test_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(["search", *ENV, "--out", str(tmp_path)], capsys)
    assert code == 2
    assert "It is no run: choose another folder" in err
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text("")
    assert f"lacer search --resume {tmp_path}" in run(["search", *ENV, "--out", str(tmp_path)], capsys)[2]


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
