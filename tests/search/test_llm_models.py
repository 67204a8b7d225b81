"""Language models that are no well-behaved server: forms of a reply, limits, fallbacks, people, replays, keys."""

from __future__ import annotations

import email.utils
import io
import json
import logging
import os
import pty
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacer.envs import LacerError, task_card
from lacer.search import search
from lacer.search.config import RESUMABLE, SearchConfig
from lacer.search.designers.base import DesignerStopped
from lacer.search.designers.lacer import Lacer
from lacer.search.engine import Budget, Engine
from lacer.search.executors import InProcess
from lacer.search.llm import Fallback, LLMClient, LLMConfig, LLMError, parse_reply, reply_schema, server
from lacer.search.llm.base import llm_config
from lacer.search.llm.human import Human
from lacer.search.llm.reply import to_point
from lacer.search.loop import SearchResult, asks_a_person, make_designer, summary
from lacer.search.outcome import Outcome, describe_usage, total_usage
from lacer.search.progress import Display
from lacer.search.report import write_report
from lacer.search.space import EncoderSpace
from lacer.search.study import Proposal, Study
from tests.search.llm_server import Served
from tests.search.test_llm import CARD, SPACE, answer, new_study, record, spec, with_expert

pytestmark = pytest.mark.usefixtures("llm_environment")
SYSTEM = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
SCHEMA = reply_schema(SPACE, 1)


@pytest.fixture
def study() -> Study:
    return with_expert(new_study())


def config(server: Served, provider: str = "openai", **fields: Any) -> LLMConfig:
    return LLMConfig(**{"model": f"{provider}:scripted", "base_url": server.url, "timeout": 20.0, "retries": 2,
                        **fields})


def asked(server: Served) -> list[str]:
    """The form of every request."""
    return [r["body"].get("response_format", {}).get("type", "tool" if "tools" in r["body"] else "plain")
            for r in server.requests]


# -- forms of a reply ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("provider", "formats", "tools", "refuse", "first", "then"), [
    ("openai", ["tool", "plain"], True, 400, ["json_schema", "tool"], "tool"),
    ("openai", ["json_object", "plain"], True, 500, ["json_schema", "tool", "json_object"], "json_object"),
    ("openai", ["tool", "json_object"], False, 422, ["json_schema", "tool"], "json_object"),  # text, not a call
    ("anthropic", ["tool", "plain"], True, 400, ["tool"], "tool"),
    ("anthropic", ["plain"], True, 400, ["tool", "plain"], "plain"),
    ("anthropic", ["tool", "plain"], False, 400, ["tool"], "plain"),
])
def test_the_form_is_found_by_trying_and_remembered_in_the_run_folder(
        serve: Any, tmp_path: Path, provider: str, formats: list[str], tools: bool, refuse: int, first: list[str],
        then: str) -> None:
    s = serve(answer(spec(128)), formats=formats, tools=tools, refuse=refuse)
    c = LLMClient(config(s, provider), tmp_path)
    assert json.loads(c.complete(SYSTEM, SCHEMA).text) == json.loads(answer(spec(128))["text"])
    assert asked(s) == first
    c.complete(SYSTEM, SCHEMA)
    LLMClient(config(s, provider), tmp_path).complete(SYSTEM, SCHEMA)  # another session
    assert asked(s) == [*first, then, then]
    other = s.url.replace("127.0.0.1", "localhost")  # another server, for all that is known
    LLMClient(config(s, provider, base_url=other), tmp_path).complete(SYSTEM, SCHEMA)
    assert asked(s)[len(first) + 2] == first[0]


def test_a_tool_is_called_with_the_schema(serve: Any, study: Study) -> None:
    s = serve({"text": "no"}, answer(spec(128)), formats=["tool"])
    made = Lacer(llm=config(s)).propose(study, 1)
    assert [p.rejected[:14] for p in made] == ["the reply hold", ""]
    body = s.requests[-1]["body"]
    assert body["tools"][0]["function"]["parameters"] == reply_schema(
        SPACE, 1, ("problem", "rationale", "based_on", "expected"))
    assert body["tool_choice"] == {"type": "function", "function": {"name": "reply"}}
    s = serve(answer(spec(64)))
    assert [p.rejected for p in Lacer(llm=config(s, "anthropic")).propose(study, 1)] == [""]
    body = s.requests[-1]["body"]
    assert body["tools"][0]["input_schema"] == reply_schema(
        SPACE, 1, ("problem", "rationale", "based_on", "expected"))
    assert body["tool_choice"] == {"type": "tool", "name": "reply"}
    assert (body["temperature"], body["system"]) != (None, None)


def test_a_server_that_breaks_without_saying_why_is_asked_again_before_it_is_asked_for_less(serve: Any) -> None:
    s = serve(*[{"status": 500}] * 3, answer(spec()))
    LLMClient(config(s)).complete(SYSTEM, SCHEMA)
    assert asked(s) == ["json_schema"] * 3 + ["tool"]


def test_a_model_without_sampling_settings_keeps_the_schema(serve: Any, tmp_path: Path) -> None:
    s = serve(answer(spec()), sampling=False)
    for _ in range(2):  # the second session knows
        LLMClient(config(s, temperature=0.5, seed=1), tmp_path).complete(SYSTEM, SCHEMA)
    assert asked(s) == ["json_schema"] * 3
    assert [("temperature" in r["body"], "seed" in r["body"]) for r in s.requests] == [
        (True, True), (False, False), (False, False)]


def test_a_form_can_be_chosen(serve: Any) -> None:
    s = serve(answer(spec()), formats=["json_object"])
    LLMClient(config(s, format="json_object")).complete(SYSTEM, SCHEMA)
    with pytest.raises(LLMError, match="HTTP 400"):
        LLMClient(config(s, format="tool")).complete(SYSTEM, SCHEMA)
    assert asked(s) == ["json_object", "tool"]
    assert s.requests[0]["body"]["response_format"] == {"type": "json_object", "schema": SCHEMA}
    with pytest.raises(LacerError, match="--llm-format"):
        LLMClient(config(s, "anthropic", format="json_schema"))


def test_long_replies_of_anthropic_need_no_streaming(serve: Any) -> None:
    s = serve(answer(spec()))
    LLMClient(config(s, "anthropic", max_output_tokens=128_000)).complete(SYSTEM, SCHEMA)
    assert s.requests[0]["body"]["max_tokens"] == 128_000


def test_a_server_that_could_and_refuses_is_asked_for_text_once(serve: Any) -> None:
    s = serve(answer(spec()), {"status": 400}, {"status": 400}, answer(spec()))
    c = LLMClient(config(s))
    c.complete(SYSTEM, SCHEMA)
    with pytest.raises(LLMError, match="HTTP 400"):  # the prompt is too long, say
        c.complete(SYSTEM, SCHEMA)
    c.complete(SYSTEM, SCHEMA)
    assert asked(s) == ["json_schema", "json_schema", "plain", "json_schema"]


def sample(schema: dict[str, Any], rng: random.Random, root: dict[str, Any]) -> Any:
    """Something that a JSON schema allows."""
    if "$ref" in schema:
        return sample(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], rng, root)
    if "anyOf" in schema:
        return sample(rng.choice(schema["anyOf"]), rng, root)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "object":
        return {k: sample(v, rng, root) for k, v in schema["properties"].items()
                if k in schema["required"] or rng.random() < 0.5}
    if schema["type"] == "array":
        n = rng.randint(schema.get("minItems", 0), schema["maxItems"])
        return [sample(schema["items"], rng, root) for _ in range(n)]
    return {"string": "why", "integer": rng.randint(-9, 9), "number": rng.random()}[schema["type"]]


@pytest.mark.parametrize("narrow", [{}, {"fusion.block": ["film"]}])
@pytest.mark.parametrize("optional", [True, False])
def test_the_schema_allows_all_encoders_of_the_space_and_no_others(narrow: dict[str, Any], optional: bool) -> None:
    for env in ("lacer/KnownSources-v0", "lacer/MixedTraffic-v0"):
        space = EncoderSpace(task_card(env), narrow, optional_sources=optional)
        schema, rng, seen = reply_schema(space, 2), random.Random(0), set()
        for _ in range(100):
            for a in parse_reply(json.dumps(sample(schema, rng, schema)), space, 2):
                assert a.point is not None, a.error
                seen.update(a.point.items())
        options = {(d.name, o) for d in space.decisions for o in d.options}
        assert len(options - seen) <= 0.05 * len(options)  # the rarest may not have been drawn


# -- servers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("replies", "fields", "designers", "reason"), [
    ([answer(spec(128))], {}, ["lacer"], ""),
    ([answer(spec(32))], {}, ["lacer", "lacer", "lacer", "evolution"], "the same as #0"),  # repeats itself
    ([{"text": "\ufffd\u0000<html>"}], {}, ["lacer", "lacer", "lacer", "evolution"], "send {"),
    ([{"hang": True}], {"timeout": 0.3, "retries": 0}, ["evolution"], "within 0.3 s"),
    ([{"cut": True}, {"trickle": True}], {"timeout": 0.3, "retries": 1}, ["evolution"], "within 0.3 s"),
    ([{"cut": True}, answer(spec(64))], {"retries": 1}, ["lacer"], ""),
    ([{"status": 429, "headers": {"Retry-After": "1"}}, answer(spec(64))], {}, ["lacer"], ""),
    ([{"endless": True}], {}, ["evolution"], "sent more than 1,000,000 bytes"),
    ([{"text": answer(spec(16))["text"][:80], "finish": "length"}], {"repairs": 0}, ["lacer", "evolution"], "cut off"),
])
def test_every_kind_of_server_in_the_format_of_anthropic(
        serve: Any, study: Study, replies: list[dict[str, Any]], fields: dict[str, Any], designers: list[str],
        reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_llm.py checks in OpenAI's."""
    monkeypatch.setattr(server, "MAX_BODY", 1_000_000)
    s = serve(*replies)
    made = Lacer(llm=config(s, "anthropic", **fields)).propose(study, 1)
    assert {r["path"] for r in s.requests} == {"/v1/messages"}
    assert [p.designer for p in made] == designers
    assert reason in "".join(p.rejected for p in made) + made[-1].rationale
    if "Retry-After" in json.dumps(replies):
        first, second = s.requests
        assert 1.0 <= second["at"] - first["at"] < 2.0
    record(study, made)


def test_an_answer_without_end_is_not_read_to_it(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_BODY", 1_000_000)
    with pytest.raises(LLMError, match="sent more than 1,000,000 bytes"):
        LLMClient(config(serve({"endless": True}))).complete(SYSTEM, SCHEMA)


def test_retry_after_as_a_date(serve: Any) -> None:
    at = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: between one and two from now
    s = serve({"status": 503, "headers": {"Retry-After": at}}, answer(spec()))
    LLMClient(config(s)).complete(SYSTEM, SCHEMA)
    first, second = s.requests
    assert 0.5 <= second["at"] - first["at"] <= 2.5


# -- limits ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "replies", "reason"), [
    ({"request_limit": 2}, 2, r"2 of 2 requests \(--llm-request-limit\)"),
    ({"token_limit": 1500}, 2, r"2,200 of 1,500 tokens \(--llm-token-limit\)"),
    ({"cost_limit": 0.01, "price_in": 3.0, "price_out": 15.0}, 3, r"0.01 of 0.01 US dollars \(--llm-cost-limit\)"),
])
def test_limits_hold_over_sessions(serve: Any, tmp_path: Path, fields: dict[str, Any], replies: int,
                                   reason: str) -> None:
    s = serve(answer(spec(128)))
    for _ in range(replies):
        reply = LLMClient(config(s, **fields), tmp_path).complete(SYSTEM, SCHEMA)
    assert reply.cost == (None if "price_in" not in fields else pytest.approx((1000 * 3 + 100 * 15) / 1e6))
    with pytest.raises(LLMError, match=reason) as e:
        LLMClient(config(s, **fields), tmp_path).complete(SYSTEM, SCHEMA)
    assert e.value.limit
    assert len(s.requests) == replies


def test_failed_requests_count_too(serve: Any, study: Study) -> None:
    s = serve({"status": 500})
    made = Lacer(llm=config(s, request_limit=2, retries=9)).propose(study, 1)
    assert len(s.requests) == 2
    assert made[0].designer == "evolution"
    assert "2 of 2 requests (--llm-request-limit); before: openai:scripted" in made[0].rationale
    assert made[0].meta["requests"] == 2
    assert not made[0].meta["unreachable"]


def test_a_limit_that_cannot_hold_is_told(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LacerError, match="--llm-price-in"):
        LLMClient(LLMConfig(model="openai:x", cost_limit=1.0, price_in=1.0))
    c = LLMClient(config(serve(answer(spec()), usage=False), token_limit=10))
    c.complete(SYSTEM, SCHEMA)
    c.complete(SYSTEM, SCHEMA)
    assert caplog.text.count("counts no tokens") == 1


# -- fallbacks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["evolution", "bo", "random"])
def test_fallbacks_propose_under_their_own_name(serve: Any, study: Study, name: Any) -> None:
    s = serve({"text": "no"})
    made = Lacer(llm=config(s, fallback=name, repairs=1)).propose(study, 2)
    assert [p.designer for p in made[:3]] == ["lacer", "lacer", name]
    assert made[2].point is not None
    assert made[2].meta["llm_failed"] == "2 invalid or repeated encoders, the last: " + made[1].rejected
    record(study, made)
    assert total_usage(study.trials) == {"tokens_in": 2000, "tokens_out": 200, "requests": 2,
                                         "seconds": pytest.approx(sum(p.meta["seconds"] for p in made[:2]))}


def test_a_model_that_gave_up_is_asked_without_retries_whatever_the_fallback(study: Study) -> None:
    fallback = Fallback("random")
    for _ in range(2):
        assert not fallback.gave_up(study, "lacer")
        record(study, fallback.propose(study, 1, "no route", unreachable=True, spent={"requests": 3}))
    assert fallback.gave_up(study, "lacer")
    record(study, [Proposal(SPACE.sample(np.random.default_rng(9)), "lacer")])
    assert not fallback.gave_up(study, "lacer")


def test_stop_finishes_what_runs_and_can_be_resumed(serve: Any, study: Study) -> None:
    s = serve(answer(spec(128)), {"text": "no"})
    designer = Lacer(llm=config(s, fallback="stop", repairs=1))

    def engine(designer: Lacer) -> Engine:
        return Engine(study, designer, InProcess(lambda point: 0.5), lambda trial, _: call(trial),
                      budget=Budget(candidates=4), ahead=1)

    def call(trial: Any) -> Any:
        from lacer.agents import Call

        return Call(function="", point=trial.proposal.point, seed=0)

    with pytest.raises(DesignerStopped, match="--llm-fallback is stop: 2 invalid"):
        engine(designer).run()
    assert [t.status for t in study.trials] == ["ok", "ok", "rejected", "rejected"]
    again = Lacer(llm=config(serve(answer(spec(16)), answer(spec(64))), fallback="stop"))
    assert engine(again).run() == ""
    assert [t.proposal.designer for t in study.trials] == ["expert"] + 5 * ["lacer"]
    assert study.count("ok") == 4


# -- replay ----------------------------------------------------------------------------------------------------------

def test_a_replay_tells_where_its_prompts_differ(serve: Any, study: Study, tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    text = answer(spec(128))["text"].replace('"because"', r'"\u0000\ud800 \"}{\" ünï"') + "\r\n\x00 \t"
    d = Lacer(llm=config(serve({"text": text})), run_dir=tmp_path / "a")
    made = d.propose(study, 1)
    path = tmp_path / "a" / "llm_transcript.jsonl"
    # strict: the same prompts, and so the very same reply
    c = LLMClient(LLMConfig(model=f"replay:{path}", replay_strict=True), tmp_path / "b")
    messages = json.loads(path.read_text())["messages"]
    assert c.complete(messages).text == text
    again = Lacer(llm=LLMConfig(model=f"replay:{path}", replay_strict=True)).propose(study, 1)
    assert [(p.point, p.rationale) for p in again] == [(p.point, p.rationale) for p in made]
    # another history
    study.reject(Proposal(None, "lacer", rejected="too wide"))
    with pytest.raises(LacerError, match=r"request 1 differs .*: message 2, line \d+ was '.*', is '.*'"):
        Lacer(llm=LLMConfig(model=f"replay:{path}", replay_strict=True)).propose(study, 1)
    made = Lacer(llm=LLMConfig(model=f"replay:{path}"), run_dir=tmp_path / "c").propose(study, 1)
    assert made[0].point == again[0].point
    assert "request 1 differs" in caplog.text
    assert "message 2" in json.loads((tmp_path / "c" / "llm_transcript.jsonl").read_text())["differs"]


# -- a person --------------------------------------------------------------------------------------------------------

def test_a_person_answers_through_a_pipe(study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    pasted = f"Sure!\n```json\n{json.dumps(json.loads(answer(spec(128))['text']), indent=1)}\n```\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"I like\n..\n.\n{pasted}.\r\n{answer(spec(16))['text']}"))
    d = Lacer(llm=LLMConfig(model="human:-"), run_dir=tmp_path)
    d.check()
    made = d.propose(study, 1)
    assert [(p.designer, p.rejected[:21]) for p in made] == [("lacer", "the reply holds no JS"), ("lacer", "")]
    assert made[0].meta["reply"] == "I like\n..\n"
    shown = capsys.readouterr().err
    assert shown.count("# Search space") == 1  # what is said after it is the error only
    assert "To be said in the same chat" in shown
    assert "holds no JSON object" in (tmp_path / "llm_prompt.md").read_text()
    record(study, made)
    assert d.propose(study, 1)[0].point == to_point(spec(16), SPACE)
    made = d.propose(study, 1)
    assert made[0].designer == "evolution"
    assert "no more answers" in made[0].rationale
    lines = [json.loads(x) for x in (tmp_path / "llm_transcript.jsonl").read_text().splitlines()]
    assert [x["format"] for x in lines] == ["human"] * 3
    assert lines[1]["reply"] == pasted


def test_a_person_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n.\n"))
    with pytest.raises(LacerError, match="--llm human:-"):
        LLMClient(LLMConfig(model="human")).check()
    driver, terminal = pty.openpty()
    with os.fdopen(terminal, encoding="utf-8") as f:
        monkeypatch.setattr(sys, "stdin", f)
        os.write(driver, b"[" + b"1, " * 3000 + b"\n")  # the terminal drops what is more than 4,095 bytes
        os.write(driver, b"once\xff more\n.\n")
        person = Human(False, None)
        person.check()
        assert person.ask(SYSTEM).text == "once\ufffd more\n"
        os.write(driver, b"again\n.\n")
        assert person.ask(SYSTEM).text == "again\n"
    os.close(driver)
    assert "cuts lines" in capsys.readouterr().err
    for wrong in ("human:", "human:me", "humna"):
        with pytest.raises(LacerError, match="unknown language model"):
            LLMClient(LLMConfig(model=wrong))


def test_the_progress_stays_out_of_the_way_of_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for Rich
    assert asks_a_person(SearchConfig(llm="human"))
    assert asks_a_person(SearchConfig(llm="human:-"))
    assert not asks_a_person(SearchConfig(llm="openai:human"))
    for live in (True, False):
        display = Display(CARD, 1, live=live)
        assert display.live_mode == live
        display.close()


# -- keys ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_no_key_in_what_is_left_behind(serve: Any, tmp_path: Path, provider: str, caplog: pytest.LogCaptureFixture,
                                       capsys: pytest.CaptureFixture[str], study: Study) -> None:
    caplog.set_level(logging.DEBUG)
    key = os.environ["OPENAI_API_KEY" if provider == "openai" else "ANTHROPIC_API_KEY"]
    masked = [f"{key[:6]}***{key[-4:]}", f"{key[:8]}...{key[-4:]}", f"{key[:5]}**********"]
    said = f"Incorrect API key provided: {key}, {', '.join(masked)}."
    s = serve({"status": 429, "body": {"error": {"message": said}}}, {"status": 500, "body": said},
              {"raw": said}, {"text": f"key {key}"}, answer(spec(128), rationale=f"key {key}"))
    d = Lacer(llm=config(s, provider, retries=3), run_dir=tmp_path)
    made = d.propose(study, 1)
    assert [p.designer for p in made] == ["lacer", "lacer"]
    assert key in json.dumps(s.requests[0]["headers"])
    with pytest.raises(LacerError) as e:
        Lacer(llm=config(serve({"status": 401, "body": {"error": {"message": said}}}), provider)).propose(study, 1)
    left = "".join(p.read_text() for p in tmp_path.iterdir()) + "".join(capsys.readouterr()) + str(e.value)
    left += caplog.text + repr(made) + repr(vars(d.client)) + repr(vars(d.client._server))
    for secret in (key, *masked):
        assert secret not in left
    assert "[API key]" in left


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_addresses_and_keys_that_could_not_be_sent(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://me:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(LacerError, match="--llm-base-url") as e:
            LLMClient(LLMConfig(model=f"{provider}:x", base_url=url))
        assert "secret" not in str(e.value)
        monkeypatch.setenv(f"{provider.upper()}_BASE_URL", url)
        with pytest.raises(LacerError, match=f"{provider.upper()}_BASE_URL") as e:
            LLMClient(LLMConfig(model=f"{provider}:x")).check()
        assert "secret" not in str(e.value)
    monkeypatch.delenv(f"{provider.upper()}_BASE_URL")
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", 'sk-"quoted"-key')
    with pytest.raises(LacerError, match="characters") as e:
        LLMClient(LLMConfig(model=f"{provider}:x")).check()
    assert "quoted" not in str(e.value)


# -- configuration and reports ---------------------------------------------------------------------------------------

def test_every_setting_of_the_model_is_on_the_command_line_and_can_change_on_resume() -> None:
    for name, field in LLMConfig.model_fields.items():
        outer = SearchConfig.model_fields["llm" if name == "model" else f"llm_{name}"]
        assert outer.description
        assert outer.metadata == field.metadata, name
        # Without a temperature the designer's own counts.
        assert name in ("model", "temperature") or outer.default == field.default, name
    assert {f for f in SearchConfig.model_fields if f.startswith("llm")} <= RESUMABLE
    c = SearchConfig(llm="openai:x", seed=7, llm_price_in=1.0, llm_price_out=2.0, llm_fallback="stop")
    assert llm_config(c).seed == 7
    assert llm_config(c).cost(10**6, 10**6) == 3.0
    assert llm_config(SearchConfig(llm="openai:x", llm_seed=1)).seed == 1
    with pytest.raises(LacerError, match="prices"):
        make_designer("lacer", SearchConfig(llm="openai:x", llm_base_url="http://h/v1", llm_cost_limit=1), Path())


def test_costs_are_told_per_trial_and_per_study(serve: Any, tmp_path: Path) -> None:
    s = serve(answer(spec(128)), {"text": "no"})
    found = search(space=SPACE, objective=lambda point: 0.5, out=tmp_path / "run", quiet=True, designer="lacer",
                   candidates=2, llm="anthropic:scripted", llm_base_url=s.url, llm_price_in=3.0, llm_price_out=15.0,
                   llm_repairs=0, llm_fallback="random")
    trials = found.study.trials
    assert [t.proposal.designer for t in trials] == ["lacer", "lacer", "random"]
    assert {**trials[0].usage, "seconds": 0} == {"tokens_in": 1000, "tokens_out": 100, "requests": 1, "seconds": 0,
                                                 "cost": 0.0045}
    usage = total_usage(trials)
    assert {**usage, "seconds": 0} == {"tokens_in": 2000, "tokens_out": 200, "requests": 2, "seconds": 0,
                                       "cost": pytest.approx(0.009)}
    outcome = Outcome(card=CARD, trials=trials, finals={}, winner=0, config={"env": CARD.env_id}, versions={},
                      command="", seconds=1.0, usage=usage)
    line = next(x for x in summary(SearchResult(tmp_path, outcome)).splitlines() if x.startswith("LLM: "))
    assert line.startswith("LLM: 2 requests, 2,000 tokens in, 200 out, ")
    assert line.endswith("0.009 US dollars; 1 encoder proposed in its place")
    page = write_report(outcome, tmp_path / "report.html").read_text()
    assert describe_usage(usage) in page
    assert describe_usage(trials[0].usage) in page


def test_a_person_must_be_there_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(LacerError, match="--llm human:-"):
        search("lacer/KnownSources-v0", out=tmp_path / "run", designer="lacer", llm="human")
    assert not (tmp_path / "run").exists()
