"""The LACER designer over real HTTP: every way in which a language model can fail."""

from __future__ import annotations

import json
import logging
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacer.agents import Evaluation
from lacer.envs import LacerError, task_card
from lacer.search.designers.base import DesignerStopped, designer_class
from lacer.search.designers.lacer import Lacer
from lacer.search.designers.llm_base import Turn
from lacer.search.llm import LLMClient, LLMConfig, client, parse_reply
from lacer.search.llm.reply import find_json, to_point
from lacer.search.llm.words import quoted
from lacer.search.space import EncoderSpace
from lacer.search.storage import sqlite_url
from lacer.search.study import Proposal, StoredStudy, Study
from tests.search.conftest import KEY
from tests.search.llm_server import Served

pytestmark = pytest.mark.usefixtures("llm_environment")
CARD = task_card("lacer/KnownSources-v0")
SPACE = EncoderSpace(CARD)
POSITION = {"block": "linear", "width": 16}


def spec(width: int = 64, **sources: Any) -> dict[str, Any]:
    return {"sources": {"position": POSITION, **sources}, "fusion": {"block": "gated_sum", "width": width}}


def answer(*encoders: dict[str, Any], **more: Any) -> dict[str, Any]:
    items = [{"rationale": "because", "expected": 0.5, "encoder": e, **more} for e in encoders]
    return {"text": json.dumps({"encoders": items})}


def evaluation(score: float) -> Evaluation:
    probes = {part: {"effective_rank": 0.5, "linear_probe": 0.25, "linear_probe/target_words": 0.123}
              for part in [*CARD.sources, "fused"]}
    return Evaluation(objective=score, mean_return=16 * score, metrics={"score": [score - 0.1, score + 0.1]},
                      curve=[(512 * i, i / 20) for i in range(20)], probes=probes)


def new_study(storage: str | None = None, space: EncoderSpace = SPACE) -> Study:
    """In memory without a storage."""
    return Study(space) if storage is None else StoredStudy(storage, "s", space)


@pytest.fixture
def study() -> Study:
    """An expert with a score."""
    return with_expert(new_study())


def with_expert(s: Study) -> Study:
    expert = s.start(Proposal(to_point(spec(32), SPACE), "expert"))
    s.finish(expert.number, evaluation(0.4))
    return s


def designer(server: Served, run_dir: Path | None = None, batch: int = 1, **config: Any) -> Lacer:
    config = {"model": "openai:scripted", "base_url": server.url, "timeout": 5.0, "retries": 2, **config}
    return Lacer(0, llm=LLMConfig(**config), run_dir=run_dir, batch=batch)


def record(study: Study, proposals: list[Proposal]) -> None:
    for p in proposals:
        study.reject(p) if p.rejected else study.start(p)


def test_valid_proposal(serve: Any, tmp_path: Path) -> None:
    study = with_expert(new_study(sqlite_url(tmp_path / "study.db")))
    server = serve(answer(spec(128), based_on=[0, 99]))
    made = designer(server, tmp_path, temperature=0.3, seed=7).propose(study, 4)
    assert [(p.designer, p.rejected, p.rationale, p.parents) for p in made] == [("lacer", "", "because", (0,))]
    assert made[0].point == to_point(spec(128), SPACE)
    assert {**made[0].meta, "seconds": 0} == {"tokens_in": 1000, "tokens_out": 100, "seconds": 0, "requests": 1,
                                             "expected": 0.5, "attempt": 0, "transcript": 1}
    record(study, made)
    body = server.requests[0]["body"]
    assert (body["model"], body["temperature"], body["seed"]) == ("scripted", 0.3, 7)
    assert body["response_format"]["type"] == "json_schema"
    line = json.loads((tmp_path / "llm_transcript.jsonl").read_text())
    assert line["messages"][1]["content"] == body["messages"][1]["content"]
    assert line["final"]
    assert line["reply"] == answer(spec(128), based_on=[0, 99])["text"]


def test_batch_of_several_counts_tokens_once(serve: Any, study: Study) -> None:
    server = serve(answer(spec(128), spec(128), spec(100)), answer(spec(16), spec(64)))
    made = designer(server, batch=5).propose(study, 3)
    assert [p.rejected[:14] for p in made] == ["this encoder i", "fusion.gated_s", "", "", ""]
    assert "another one of your reply" in made[0].rejected
    assert [p.meta["tokens_in"] for p in made] == [0, 0, 1000, 1000, 0]
    assert "exactly 2 new entries" in server.requests[1]["body"]["messages"][-1]["content"]


@pytest.mark.parametrize(("bad", "reason"), [
    ("I would rather talk about the weather.", "no JSON object"),
    ('{"encoders": [{"rationale": "x", "encoder": {"sources"', "not valid JSON"),
    ("", "no JSON object"),
    (answer(spec(100))["text"], "fusion.gated_sum.width = 100 is not in this search space; options: 16, 32, 64, 128"),
    (answer(spec(position={"block": "mpl"}))["text"], "did you mean 'mlp'"),
    (answer(spec(32))["text"], "the same as #0, which scored 0.4"),
])
def test_invalid_replies_go_back_with_their_error_and_are_recorded(serve: Any, study: Study, bad: str,
                                                                  reason: str) -> None:
    server = serve({"text": bad}, answer(spec(128)))
    made = designer(server).propose(study, 1)
    assert [bool(p.rejected) for p in made] == [True, False]
    assert reason in made[0].rejected
    assert [p.designer for p in made] == ["lacer", "lacer"]
    assert made[0].meta["reply"] == bad
    assert [p.meta["attempt"] for p in made] == [0, 1]
    messages = server.requests[1]["body"]["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert quoted(made[0].rejected) in messages[-1]["content"]
    record(study, made)
    assert [t.status for t in study.trials[1:]] == ["rejected", "running"]
    assert quoted(made[0].rejected, 200) in designer(server).prompt(study, 1)


@pytest.mark.parametrize(("bad", "reason"), [
    ("{" * 5000, "not valid JSON"),
    ("[" * 100_000, "no JSON object"),
    ('{"a":' * 30_000, "not valid JSON"),
    ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
    ('{"encoders": []}', "at least one"),
    ('{"encoders": [null]}', "must be an object"),
    ('{"encoders": [{"encoder": 7}]}', "expected an object"),
    (answer(spec(10**9))["text"], "fusion.width"),
    (answer(spec(position={"block": "linear", "wdith": 8}))["text"], "did you mean 'width'"),
    (answer(spec(positions=POSITION))["text"], "did you mean 'position'"),
    (answer({"sources": {"position": "unused"}, "fusion": {"block": "concat"}})["text"], "at least one of"),
    (answer({"sources": {"position": POSITION}})["text"], "fusion"),
    (answer({"sources": {"position": POSITION}, "fusion": {"block": "x" * 10_000}})["text"], "fusion"),
])
def test_errors_name_the_mistake(bad: str, reason: str) -> None:
    (got,) = parse_reply(bad, SPACE, 1)
    assert got.point is None
    assert reason in got.error
    assert len(got.error) <= 500


@pytest.mark.parametrize("expected", [float("nan"), float("inf"), 10**400, "0.5", None, True, [1]])
def test_odd_expectations_do_no_harm(expected: Any) -> None:
    text = answer(spec(), expected=expected, based_on=["x", True, 1.5], rationale=["r"])["text"]
    (got,) = parse_reply(text, SPACE, 1)
    assert got.point is not None
    assert got.expected is None
    assert got.based_on == ()


def test_garbage_for_ever_ends_in_evolution(serve: Any, study: Study) -> None:
    server = serve({"text": "no"})
    made = designer(server, repairs=2).propose(study, 1)
    assert [bool(p.rejected) for p in made] == [True, True, True, False]
    assert made[-1].designer == "evolution"
    assert "LLM, which failed: 3 invalid" in made[-1].rationale
    assert made[-1].point is not None
    assert len(server.requests) == 3
    record(study, made)


def test_a_long_reply_does_not_go_back_whole(serve: Any, study: Study) -> None:
    server = serve({"text": "no ", "times": 30_000}, answer(spec(128)))
    made = designer(server).propose(study, 1)
    assert [bool(p.rejected) for p in made] == [True, False]
    back = server.requests[1]["body"]["messages"][2]["content"]
    assert back == "no " * 4000 + " ..."


def test_reply_with_fences_thoughts_and_prose(serve: Any, study: Study) -> None:
    text = ("<think>{maybe} {\"encoders\": []}</think>Sure!\n```json\n" + answer(spec(128))["text"] + "\n```\nBye {x}")
    made = designer(serve({"text": text})).propose(study, 1)
    assert [(p.designer, p.rejected) for p in made] == [("lacer", "")]


def test_truncated_reply_says_so(serve: Any, study: Study) -> None:
    server = serve({"text": answer(spec(128))["text"][:60], "finish": "length"}, answer(spec(128)))
    made = designer(server).propose(study, 1)
    assert "max_output_tokens=8192" in made[0].rejected
    assert "cut off" in server.requests[1]["body"]["messages"][-1]["content"]


def test_429_waits_as_long_as_the_server_asks(serve: Any, study: Study, tmp_path: Path) -> None:
    server = serve({"status": 429, "headers": {"Retry-After": "1"}}, answer(spec(128)))
    made = designer(server, tmp_path).propose(study, 1)
    assert [(p.designer, p.rejected) for p in made] == [("lacer", "")]
    first, second = server.requests
    assert 1.0 <= second["at"] - first["at"] < 2.0
    assert made[0].meta["requests"] == 2
    lines = [json.loads(x) for x in (tmp_path / "llm_transcript.jsonl").read_text().splitlines()]
    assert [(x["status"], x["final"]) for x in lines] == [(429, False), (200, True)]
    assert made[0].meta["transcript"] == 2


def test_retry_after_is_capped(serve: Any, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_WAIT", 0.1)
    start = time.monotonic()
    made = designer(serve({"status": 429, "headers": {"Retry-After": "86400"}}, answer(spec(128)))).propose(study, 1)
    assert made[0].designer == "lacer"
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("bad", [{"status": 500}, {"status": 503}, {"cut": True}, {"raw": "<html>"}, {"raw": "{}"},
                                 {"raw": '{"choices": []}'}])
def test_passing_server_errors_are_retried(serve: Any, study: Study, bad: dict[str, Any]) -> None:
    server = serve(bad, bad, answer(spec(128)))
    made = designer(server).propose(study, 1)
    assert [(p.designer, p.rejected) for p in made] == [("lacer", "")]
    assert made[0].meta["requests"] == len(server.requests) == 3


@pytest.mark.parametrize("bad", [{"hang": True}, {"trickle": True}])
def test_a_reply_that_never_comes(serve: Any, study: Study, bad: dict[str, Any], tmp_path: Path) -> None:
    d = designer(serve(bad), tmp_path, timeout=0.3, retries=1)
    start = time.monotonic()
    made = d.propose(study, 1)
    assert 0.6 <= time.monotonic() - start < 3
    assert made[0].designer == "evolution"
    assert "within 0.3 s" in made[0].rationale
    assert made[0].meta["requests"] == 2
    record(study, made)
    record(study, d.propose(study, 1))
    made = d.propose(study, 1)  # after two such failures it is asked once, without retries
    assert made[0].meta["requests"] == 1


def test_dead_server_and_exhausted_quota(serve: Any, study: Study) -> None:
    made = designer(Served("http://127.0.0.1:9")).propose(study, 2)
    assert made[0].designer == "evolution"
    assert "cannot reach openai:scripted at http://127.0.0.1" in made[0].rationale
    server = serve({"status": 429, "body": {"error": {"message": "pay", "code": "insufficient_quota",
                                                      "type": "insufficient_quota"}}})
    assert designer(server).propose(study, 1)[0].designer == "evolution"
    assert len(server.requests) == 1  # waiting would not help


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_model_stops_at_the_first_request_only(serve: Any, study: Study, status: int,
                                                           tmp_path: Path) -> None:
    bad = {"status": status, "body": {"error": {"message": f"no: {KEY}, key sk-ab***yz"}}}
    with pytest.raises(LacerError, match="OPENAI_API_KEY" if status < 404 else "no model 'scripted'") as e:
        designer(serve(bad), tmp_path).propose(study, 1)
    assert KEY not in "".join(traceback.format_exception(e.value))
    assert "sk-ab" not in str(e.value)
    assert KEY not in (tmp_path / "llm_transcript.jsonl").read_text()
    d = designer(serve(answer(spec(128)), bad))
    record(study, d.propose(study, 1))
    assert d.propose(study, 1)[0].designer == "evolution"


def test_key_goes_to_the_server_and_nowhere_else(serve: Any, tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    study = with_expert(new_study(sqlite_url(tmp_path / "study.db")))
    caplog.set_level(logging.DEBUG)
    other = serve(answer(spec(128)))
    server = serve({"status": 307, "headers": {"Location": other.url + "/chat/completions"}},
                   {"text": f"your key is {KEY}"}, answer(spec(128), rationale=f"key {KEY}"))
    d = designer(server, tmp_path)
    made = d.propose(study, 1)
    assert other.requests == []
    assert all(r["headers"]["authorization"] == f"Bearer {KEY}" for r in server.requests)
    assert made[-1].rationale == "key [API key]"
    record(study, made)
    left = "".join(p.read_bytes().decode(errors="replace") for p in tmp_path.iterdir())
    assert KEY not in left + caplog.text + repr(made) + repr(d.llm) + repr(vars(d.client))


def test_formats_fall_back_and_are_remembered(serve: Any, study: Study) -> None:
    server = serve(answer(spec(128)), answer(spec(16)), formats=["plain"])
    d = designer(server)
    record(study, d.propose(study, 1))
    record(study, d.propose(study, 1))
    sent = [r["body"].get("response_format", {}).get("type") for r in server.requests]
    assert sent == ["json_schema", None, "json_object", None, None]
    assert ["tools" in r["body"] for r in server.requests] == [False, True, False, False, False]
    assert [t.status for t in study.trials[1:]] == ["running", "running"]


def test_anthropic(serve: Any, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    server = serve({"status": 529}, answer(spec(128)))
    made = designer(server, model="anthropic:claude-x").propose(study, 1)
    assert [(p.designer, p.rejected) for p in made] == [("lacer", "")]
    assert KEY in json.dumps(server.requests[1]["headers"])
    assert server.requests[1]["body"]["max_tokens"] == 8192


def test_replay_gives_the_same_proposals(serve: Any, study: Study, tmp_path: Path) -> None:
    server = serve({"text": "no \udcff"}, {"status": 500}, answer(spec(128), rationale="ünï\u2028"), {"status": 400},
                   {"status": 400}, answer(spec(16)))
    copy = with_expert(new_study())
    d = designer(server, tmp_path / "a")
    recorded = []
    for _ in range(3):
        recorded.append(d.propose(study, 1))
        record(study, recorded[-1])
    transcript = tmp_path / "a" / "llm_transcript.jsonl"
    with transcript.open("a") as f:
        f.write('{"cut by a crash')
    asked = len(server.requests)

    def bare(proposals: list[Proposal]) -> list[Any]:
        return [(p.point, p.designer, p.rationale, p.rejected, p.meta.get("reply"), p.meta.get("tokens_in"))
                for p in proposals]

    for i in range(3):  # a new designer each time: a resumed run goes on in the transcript
        again = Lacer(0, llm=LLMConfig(model=f"replay:{transcript}"), run_dir=tmp_path / "b")
        again.check()
        made = again.propose(copy, 1)
        assert bare(made) == bare(recorded[i])
        if i == 1:  # it died before the proposals were stored
            made = Lacer(0, llm=again.llm, run_dir=tmp_path / "b").propose(copy, 1)
            assert bare(made) == bare(recorded[i])
        record(copy, made)
    assert len(server.requests) == asked
    assert recorded[1][0].designer == "evolution"
    made = again.propose(copy, 1)
    assert made[0].designer == "evolution"
    assert "no more replies" in made[0].rationale
    with pytest.raises(LacerError, match="this very run"):
        Lacer(llm=LLMConfig(model=f"replay:{transcript}"), run_dir=transcript.parent).check()


@pytest.mark.parametrize(("model", "message"), [
    ("gpt-x", "did you mean 'openai:gpt-x'"), ("opnai:gpt-x", "did you mean 'openai'"),
    ("openai:", "needs a model name"), ("", "openai:NAME"), ("replay:", "needs a file"),
    ("llama:7b", "openai:NAME with --llm-base-url"),
])
def test_bad_model_strings(model: str, message: str) -> None:
    with pytest.raises(LacerError, match=message):
        LLMClient(LLMConfig(model=model))


def test_check_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(LacerError, match=r"OPENAI_API_KEY.*--llm-base-url"):
        Lacer(llm=LLMConfig(model="openai:x")).check()
    with pytest.raises(LacerError, match="ANTHROPIC_API_KEY"):
        Lacer(llm=LLMConfig(model="anthropic:x", base_url="http://localhost:1")).check()
    Lacer(llm=LLMConfig(model="openai:x", base_url="http://localhost:1/v1")).check()
    for url in ("localhost:1", "http://me:secret@localhost"):
        with pytest.raises(LacerError, match="--llm-base-url") as e:
            LLMClient(LLMConfig(model="openai:x", base_url=url))
        assert "secret" not in str(e.value)
    with pytest.raises(LacerError, match="cannot read the transcript"):
        Lacer(llm=LLMConfig(model=f"replay:{tmp_path / 'none'}")).check()
    (tmp_path / "empty").write_text("\n{}\n[]\n")
    with pytest.raises(LacerError, match="holds no replies"):
        Lacer(llm=LLMConfig(model=f"replay:{tmp_path / 'empty'}")).check()
    with pytest.raises(LacerError, match="did you mean 'probes'"):
        Lacer(llm=LLMConfig(model="openai:x"), feedback=("probe",))


def test_without_key_a_local_server_works(serve: Any, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert designer(serve(answer(spec(128)))).propose(study, 1)[0].designer == "lacer"


def test_designer_is_registered() -> None:
    assert designer_class("lacer") is Lacer
    assert Lacer.needs_llm


def test_find_json_takes_the_reply_and_not_a_part_of_it() -> None:
    assert find_json('{"a": 1} {"encoders": [1]} {"b": 2}') == {"encoders": [1]}
    with pytest.raises(LacerError, match="not valid JSON"):
        find_json('{"encoders": [{"encoder": {"sources": {}}}, {"encoder": ')
    with pytest.raises(LacerError, match='no "encoders"'):
        find_json('{"a": 1}')


def test_exhausted_space_needs_no_model() -> None:
    narrow = {f"{n}.block": ["unused"] for n in CARD.sources if n != "position"}
    narrow |= {"position.block": ["linear"], "position.linear.width": [8], "fusion.block": ["gated_sum"],
               "fusion.gated_sum.width": [16], "fusion.*.modality_dropout": [0.0]}
    study = new_study(None, EncoderSpace(CARD, narrow))
    study.start(Proposal(study.space.sample(np.random.default_rng(0)), "expert"))
    made = Lacer(llm=LLMConfig(model="openai:x", base_url="http://127.0.0.1:9/v1")).propose(study, 1)
    assert made[0].designer == "evolution"
    assert "every encoder" in made[0].rationale


def test_dollars_are_those_of_the_time(serve: Any, study: Study, tmp_path: Path) -> None:
    """A run that goes on with another model has spent what the earlier one took."""
    dear = designer(serve(answer(spec(128))), tmp_path, price_in=1000.0, price_out=4000.0)  # 1.40 dollars
    record(study, dear.propose(study, 1))
    for price, limit, goes_on in ((0.1, 1.5, True), (0.1, 1.3, False), (100_000.0, 1.5, True)):
        server = serve(answer(spec(16)))
        d = designer(server, tmp_path / "x", price_in=price, price_out=price, cost_limit=limit, fallback="random")
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        (tmp_path / "x").mkdir()
        shutil.copy(tmp_path / "llm_transcript.jsonl", tmp_path / "x")
        [made] = d.propose(study, 1)
        assert len(server.requests) == goes_on, (price, limit)
        assert ("1.40 of 1.30 US dollars" in made.rationale) != goes_on


def test_stopping_loses_no_tokens(serve: Any, study: Study) -> None:
    """An answer that was paid for before the model failed is charged to a rejected proposal."""
    class TwoSteps(Lacer):
        name = "two-steps"

        def design(self, turn: Turn, k: int) -> None:
            for step in ("think", "write"):
                turn.ask(step, "go on", dict, lambda reply: ())

    server = serve({"text": "thoughts"}, {"status": 401})
    d = TwoSteps(0, llm=LLMConfig(model="openai:scripted", base_url=server.url, fallback="stop"))
    with pytest.raises(DesignerStopped) as stopped:
        d.propose(study, 1)
    [paid] = stopped.value.proposals
    assert (paid.point, paid.designer, paid.meta["tokens_in"], paid.meta["requests"]) == (None, "two-steps", 1000, 2)
    record(study, [paid])
    assert study.trials[-1].tokens == 1100
