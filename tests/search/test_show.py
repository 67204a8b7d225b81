"""``lacer show`` and ``lacer blocks NAME``, and limits in a search."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lacer.agents import Call, Evaluation
from lacer.encoders import EncoderSpec, list_blocks, predict
from lacer.envs import LacerError, task_card
from lacer.search import show
from lacer.search.config import validate
from lacer.search.designers.base import designer_class
from lacer.search.drawing import encoder_svg
from lacer.search.engine import Budget, Engine
from lacer.search.executors import InProcess
from lacer.search.loop import _Driver, plan, run_search
from lacer.search.show import block_page, encoder_table
from lacer.search.storage import sqlite_url
from lacer.search.study import StoredStudy
from tests.search.conftest import TINY
from tests.search.test_cli import run

ENV = ["--env", "lacer/KnownSources-v0"]
ENCODER = {
    "sources": {"position": {"block": "mlp", "width": 32}, "picture": {"block": "cnn"},
                "words": {"block": "token_gru"}},
    "fusion": {"block": "film", "width": 64}, "routing": {"condition": "words"},
}
CARD = task_card("lacer/KnownSources-v0")
SPEC = EncoderSpec.parse(ENCODER, CARD)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps(ENCODER))
    return path


def test_show(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = encoder.with_name("picture.svg")
    code, out, err = run(["show", str(encoder), *ENV, "--out", str(picture)], capsys)
    assert (code, err) == (0, "")
    cost = predict(SPEC, CARD)
    assert f"hash {SPEC.hash}" in out
    lines = {words[1]: line for line in out.splitlines() if len(words := line.split()) > 2 and "─ " in line}
    for m in cost.modules:
        assert f"{m.parameters:,}" in lines[m.name]
        assert m.kind in lines[m.name]
    assert "not used" in lines["trend"]
    assert "3×16×16" in lines["picture"]
    assert "64 + 16×64" in lines["picture"]
    assert "by words" in lines["fusion"]
    assert "summary" in out  # a module inside a block
    assert re.search(rf"total +{cost.parameters:,}", out)
    assert f"Picture: {picture}" in out
    ElementTree.parse(picture)
    _, brief, _ = run(["show", str(encoder), *ENV, "--depth", "0"], capsys)
    assert "summary" not in brief


def test_every_module_has_its_line() -> None:
    cost = predict(SPEC, CARD)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(encoder_table(SPEC, CARD, cost, depth=9))
    text = console.export_text()
    assert text.count("Linear") >= 6
    assert "GRU" in text
    assert "ReLU" not in text, "what holds and costs nothing is left out"


def test_the_picture_has_all_numbers() -> None:
    cost = predict(SPEC, CARD)
    text = " ".join(t for t in ElementTree.fromstring(encoder_svg(SPEC, CARD, cost=cost, margin=10)).itertext())
    for part in ("by words", "→ 64 + 16×64", f"{cost.parameters:,} trainable parameters", "FLOPs an observation",
                 "not used"):
        assert part in text


def test_an_agents_folder_knows_its_environment(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = {"env": "lacer/KnownSources-v0", "env_kwargs": {"sources": ["position", "picture", "words"]},
               "text_model": "hash"}
    (encoder.parent / "agent.json").write_text(json.dumps({"request": request}))
    code, out, _ = run(["show", str(encoder.parent)], capsys)
    assert code == 0
    assert "trend" not in out
    assert "48×128" in out  # embeddings of the text model `hash`


@pytest.mark.parametrize(("args", "message"), [
    ([], "show needs FILE"),
    (["/does/not/exist.json", *ENV], "cannot read the encoder file /does/not/exist.json"),
    (["ENCODER"], "which lacer/MixedTraffic-v0 does not have"),
    (["ENCODER"], "lacer/KnownSources-v0: add --env ID"),
    (["ENCODER", "--env", "lacer/KnownSource-v0"], "did you mean 'lacer/KnownSources-v0'"),
    (["ENCODER", *ENV, "--out", "picture.gif"], "ends in .svg or .png"),
    (["ENCODER", *ENV, "--out", "/does/not/exist/picture.svg"], "cannot write the picture"),
    (["ENCODER", *ENV, "--depth", "-1"], "--depth must be at least 0"),
])
def test_show_wrong_input(args: list[str], message: str, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["show", *(str(encoder) if a == "ENCODER" else a for a in args)], capsys)
    assert code == 2
    assert message in err
    assert not out
    assert "Traceback" not in err


def test_png(encoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoder.with_name("picture.png")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "resvg_py", None)
        code, _, err = run(["show", str(encoder), *ENV, "--out", str(picture)], capsys)
        assert code == 2
        assert 'pip install "lacer[png]"' in err
    pytest.importorskip("resvg_py")
    show.write_picture(picture, encoder_svg(SPEC, CARD))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", list(list_blocks()))
def test_block_pages(key: tuple[str, str]) -> None:
    cls = list_blocks()[key]
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(block_page(cls))
    text = console.export_text()
    for part in (":".join(key), *cls.choices(), cls.paper, "parameters and", "FLOPs"):
        assert part in " ".join(text.split())
    assert "unknown:" not in text


def test_blocks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["blocks", "attention"], capsys)
    assert code == 0
    assert [line for line in out.splitlines() if line.endswith(":attention")] == [
        "fusion:attention", "series:attention", "set:attention"]
    assert "only with head grid" in " ".join(run(["blocks", "image:cnn"], capsys)[1].split())
    for wrong, right in (("atention", "attention"), ("set:atention", "set:attention")):
        code, _, err = run(["blocks", wrong], capsys)
        assert code == 2
        assert f"did you mean '{right}'" in err


# ------------------------------------------------------------------------------------------------- limits in a search

SMALL = {"position": {"block": "linear", "width": 8}}


@pytest.mark.parametrize("designer", ["random", "evolution"])
def test_proposals_beyond_the_limits_are_rejected(designer: str, tmp_path: Path) -> None:
    expert = tmp_path / "small.json"
    expert.write_text(json.dumps({"sources": SMALL, "fusion": {"block": "concat", "width": 16}}))
    config = {**TINY, "designer": designer, "expert": str(expert), "limits": {"parameters": 20_000}}
    checked = plan(validate(config, "test"))
    study = StoredStudy(sqlite_url(tmp_path / "study.db"), "s", checked.space)
    driver = _Driver(checked, designer_class(designer)(0), study, tmp_path, quiet=True)
    executor = InProcess(lambda point: Evaluation(objective=0.0, mean_return=0.0))
    engine = Engine(study, driver.designer, executor, lambda t, _: Call(function="", point=t.proposal.point or {}),
                    budget=Budget(candidates=16), why_not=driver._why_not, patience=500, listener=driver)
    driver.trackers = []
    assert engine.run() == ""
    trials = study.trials
    driver.display.close()
    assert {t.status for t in trials} == {"ok", "rejected"}
    for t in trials:
        assert t.spec is not None
        size = predict(t.spec, checked.card, "hash").parameters
        assert (size > 20_000) == (t.status == "rejected")
        if t.status == "rejected":
            assert f"too large: {size:,} parameters, and the limit is 20,000" in t.reason
            assert re.search("most of it is (sources|fusion)", t.reason)


def test_limits_in_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = validate({**TINY, "limits": {"parameters": 100}}, "test")
    with pytest.raises(LacerError, match="the expert's encoder, the first candidate, breaks the limits"):
        run_search(config, tmp_path / "run", quiet=True, fresh=True)
    assert not (tmp_path / "run").exists()
    for option, message in (("--limits.flops", "--limits.flops"), ("--limits.parametres", "did you mean")):
        code, _, err = run(["search", *ENV, option, "0"], capsys)
        assert code == 2
        assert message in err
