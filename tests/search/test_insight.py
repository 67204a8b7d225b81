"""Which decisions mattered, what was foreseen, and prompts that fit into a report."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lacer.search.drawing import clean
from lacer.search.insight import PROMPT_BYTES, decision_importance, pack_prompts, predictions
from lacer.search.llm.shown import exchanges
from lacer.search.report import render_report
from lacer.search.study import Trial
from tests.search.test_report import HOSTILE, evaluation, make_outcome, plain


def with_scores(trials: tuple[Trial, ...], scores: list[float]) -> tuple[Trial, ...]:
    rng = np.random.default_rng(0)
    return tuple(replace(t, evaluation=evaluation(rng, None).model_copy(update={"objective": s}))
                 for t, s in zip(trials, scores, strict=True))


def test_the_decision_that_mattered_is_found() -> None:
    """One block decides the score, the others do nothing."""
    trials = make_outcome(60, failed=0, rejected=0).trials
    blocks = sorted({(t.proposal.point or {})["trend.block"] for t in trials})
    rng = np.random.default_rng(1)
    planted = with_scores(trials, [blocks.index((t.proposal.point or {})["trend.block"]) + rng.normal(0, 0.1)
                                   for t in trials])
    found = decision_importance(planted)
    assert found is not None
    assert found.trials == 60
    assert next(iter(found.shares)) == "trend.block"
    assert found.shares["trend.block"] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.options["trend.block"] == len(blocks)
    assert decision_importance(planted) == found, "the same trials, the same figures"


def test_too_little_to_tell() -> None:
    trials = make_outcome(9, failed=1, rejected=1).trials
    assert decision_importance(trials) is None
    assert "9 results are too few to tell which decisions mattered; 10 are needed" in plain(
        render_report(make_outcome(9, failed=1, rejected=1)))
    many = make_outcome(12, failed=0, rejected=0).trials
    assert decision_importance(with_scores(many, [1.0] * 12)) is None
    assert decision_importance(tuple(replace(t, proposal=many[0].proposal) for t in many)) is None


def test_predictions() -> None:
    trials = make_outcome(4, failed=0, rejected=0).trials
    scored = with_scores(trials, [0.1, 0.2, 0.3, 0.4])
    said = [None, 0.3, 0.2, 0.5]
    told = tuple(replace(t, proposal=replace(t.proposal, meta={"expected": x}))
                 for t, x in zip(scored, said, strict=True))
    found = predictions(told)
    assert found is not None
    assert found.points == ((1, 0.3, 0.2), (2, 0.2, 0.3), (3, 0.5, 0.4))
    assert found.bias == pytest.approx(-1 / 30)
    assert found.error == pytest.approx(0.1)
    assert found.baseline == pytest.approx(np.mean([0.1, 0.15, 0.2]))
    assert found.rank == pytest.approx(0.5)
    assert predictions(scored) is None
    odd = replace(told[0], proposal=replace(told[0].proposal, meta={"expected": float("nan")}))
    assert predictions((odd,)) is None
    page = render_report(replace(make_outcome(4, failed=0, rejected=0), trials=told))
    assert "3 predictions: off by 0.1" in plain(page)


def test_prompts_are_packed_whole_or_left_out() -> None:
    same = [("request: system", f"Rules.\n{HOSTILE}"), ("request: user", "\n".join(map(str, range(500))))]
    text, kept = pack_prompts(dict.fromkeys(range(200), same), range(200))
    assert kept == set(range(200))
    assert len(text) < 30_000, "a line is kept once"
    data = json.loads(gzip.decompress(base64.b64decode(text)))
    title, lines = data["trials"]["7"][0]
    assert title == "request: system"
    assert "\n".join(data["lines"][i] for i in lines) == clean(same[0][1])
    rng = np.random.default_rng(0)
    large = {n: [("request: user", rng.bytes(40_000).hex())] for n in range(60)}
    text, kept = pack_prompts(large, [59, *range(59)])
    assert 0 < len(text) <= PROMPT_BYTES
    assert 59 in kept
    assert len(kept) < 60
    assert pack_prompts({}, []) == ("", set())


def test_exchanges_of_a_run(tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": "hello"}], "reply": "an encoder"},
             {"messages": [{"role": "user", "content": "again"}], "error": "HTTP 500"}, {"messages": 3}]
    (tmp_path / "llm_transcript.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"cut')
    metas = [{}, {"transcript": 1}, {"calls": {"factor": 1, "edit": 2}}, {"transcript": 3}, {"transcript": 4},
             {"transcript": 99}]
    trials = [SimpleNamespace(number=n, proposal=SimpleNamespace(meta=m)) for n, m in enumerate(metas)]
    assert exchanges(tmp_path, trials) == {  # type: ignore[arg-type]
        1: (("request: user", "hello"), ("request: reply", "an encoder")),
        2: (("factor: user", "hello"), ("factor: reply", "an encoder"), ("edit: user", "again"),
            ("edit: error", "HTTP 500"))}
    assert exchanges(tmp_path / "nothing", []) == {}
