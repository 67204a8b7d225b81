"""All designers with a language model, over real HTTP, in OpenAI's and in Anthropic's format, against scripted ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lacer import configs
from lacer.agents import Evaluation, Protocol, RunRequest, run
from lacer.encoders import EncoderSpec
from lacer.envs import LacerError, task_card
from lacer.search import Decision, SearchSpace, search
from lacer.search.bench import bench
from lacer.search.config import BenchConfig, SearchConfig, expert_spec, validate
from lacer.search.designers.base import check_options, designer_class
from lacer.search.designers.feedback_memory import dummy_forward
from lacer.search.designers.llm_base import LLMDesigner
from lacer.search.designers.lm_searcher import LMSearcher, scores
from lacer.search.designers.spark import factors_changed, factors_of, rates
from lacer.search.llm import LLMClient, LLMConfig, client
from lacer.search.llm.prompt import SETS
from lacer.search.loop import make_designer
from lacer.search.space import EncoderSpace, Point
from lacer.search.study import Proposal, Study
from tests.search.conftest import TINY
from tests.search.test_llm import KEY, Server

ALL = ("lacer", "genius", "feedback-memory", "spark", "lm-searcher")
CARD = task_card("lacer/KnownSources-v0")
SPACE = EncoderSpace(CARD)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serves every scripted designer, by the first part of the path."""
    s = Server({"designer": "good"})
    yield s
    s.process.kill()
    s.process.wait()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "BACKOFF", 0.01)


def url(server: Server, kind: str) -> str:
    return server.url.replace("/v1", f"/{kind}/v1")


def score(point: Point) -> float:
    return float(sum(v == "unused" for v in point.values())) + 0.01 * len(point)


def play(designer: LLMDesigner, study: Study, n: int) -> list[Proposal]:
    """A search of ``n`` proposals, with an objective that is known."""
    made: list[Proposal] = []
    for _ in range(n):
        for p in designer.propose(study, 1):
            made.append(p)
            if p.rejected:
                study.reject(p)
            else:
                assert p.point is not None
                study.finish(study.start(p).number, Evaluation(objective=score(p.point), mean_return=0.0))
    return made


def begun(name: str, space: EncoderSpace = SPACE) -> Study:
    """The expert's trial, and for lm-searcher its random start."""
    study, rng = Study(space), np.random.default_rng(0)
    for i in range(6 if name == "lm-searcher" else 1):
        t = study.start(Proposal(space.sample(rng), name if i else "expert"))
        study.finish(t.number, Evaluation(objective=score(t.proposal.point or {}), mean_return=0.0))
    return study


def make(name: str, server: Server, kind: str, provider: str = "openai", folder: Path | None = None,
         timeout: float = 30, **options: Any) -> LLMDesigner:
    llm = LLMConfig(model=f"{provider}:scripted", base_url=url(server, kind), timeout=timeout, retries=1, repairs=2)
    return designer_class(name)(0, llm=llm, run_dir=folder, **options)  # type: ignore[call-arg, return-value]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("name", ALL)
def test_a_good_model_proposes(name: str, provider: str, server: Server, tmp_path: Path) -> None:
    study = begun(name)
    made = play(make(name, server, "good", provider, tmp_path), study, 3)
    accepted = [p for p in made if not p.rejected]
    assert [p.designer for p in accepted] == [name] * 3
    assert len({SPACE.to_ncode(p.point or {}) for p in accepted}) == 3
    assert all(p.rationale for p in accepted)
    steps = {"feedback-memory": {"improver", "generator"}, "spark": {"router", "directive", "edit"}}.get(name)
    lines = (tmp_path / "llm_transcript.jsonl").read_text().splitlines()
    assert steps is None or all(set(p.meta["calls"]) == steps for p in accepted)
    assert sum(p.meta["tokens_in"] for p in made) == 1000 * len(lines)
    assert sum(p.meta["requests"] for p in made) == len(lines)
    for p in accepted:
        record = json.loads(lines[p.meta["transcript"] - 1])
        assert record["reply"]
        assert record["messages"][0]["role"] == "system"


@pytest.mark.parametrize(("name", "provider"), [*((n, "openai") for n in ALL), ("spark", "anthropic")])
def test_a_stubborn_repeater_is_told_and_replaced(name: str, provider: str, server: Server) -> None:
    study = begun(name)
    made = play(make(name, server, "stubborn", provider), study, 1)
    assert [bool(p.rejected) for p in made] == [True] * (len(made) - 1) + [False]
    assert len(made) == (9 if name == "spark" else 4)  # spark: 4 tries of the edit, 4 in the fallback factor
    assert made[-1].designer == "evolution"
    assert "LLM, which failed" in made[-1].rationale
    what = '"best" must be one of the 10 candidates' if name == "lm-searcher" else "is the same as #0, which scored"
    assert all(what in p.rejected for p in made[:-1])
    if name == "spark":
        assert {p.meta["factor"] for p in made[:4]} != {p.meta["factor"] for p in made[4:8]}
        assert made[7].meta["fallback_from"] == made[0].meta["factor"]
        assert rates(study) == {"valid_rate": 0.0, "entanglement_rate": 0.0, "edits": 8}


@pytest.mark.parametrize(("name", "provider"), [*((n, "openai") for n in ALL), ("feedback-memory", "anthropic")])
def test_garbage_is_rejected_with_reasons(name: str, provider: str, server: Server) -> None:
    study = begun(name)
    made = play(make(name, server, "garbage", provider), study, 2)
    assert [p.designer for p in made if not p.rejected] == ["evolution"] * 2
    assert all(p.rejected for p in made if p.designer == name)
    assert len([p for p in made if p.rejected]) == 6
    assert all(p.meta["requests"] == 1 for p in made if p.rejected)


@pytest.mark.parametrize("kind", ["slow", "cut"])
@pytest.mark.parametrize(("name", "provider"), [*((n, "openai") for n in ALL), ("lacer", "anthropic")])
def test_a_model_that_does_not_come_to_an_end(name: str, provider: str, kind: str, server: Server) -> None:
    made = play(make(name, server, kind, provider, timeout=0.3), begun(name), 1)
    assert [p.designer for p in made] == ["evolution"]
    assert made[0].meta["unreachable"]
    assert made[0].meta["requests"] == 2


def test_costs_of_all_steps_are_counted_when_a_later_one_fails(server: Server) -> None:
    designer = make("spark", server, "good")
    whole = designer.client.complete

    def complete(messages: Any, schema: Any = None, retries: Any = None) -> Any:
        if "# The edit" in messages[1]["content"]:
            return LLMClient(designer.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})).complete(
                messages, schema, retries)
        return whole(messages, schema, retries)

    designer.client.complete = complete  # type: ignore[method-assign]
    (p,) = designer.propose(begun("spark"), 1)
    assert (p.designer, p.meta["tokens_in"], p.meta["requests"]) == ("evolution", 2000, 4)
    assert p.meta["factor"]


def test_a_failed_request_after_an_accepted_encoder_is_counted() -> None:
    study = begun("lacer")
    spec = SPACE.to_spec(next(SPACE.neighbours(study[0].proposal.point or {}))).to_dict()
    text = json.dumps({"encoders": [{"rationale": "x", "encoder": spec}, {"rationale": "y", "encoder": 7}]})
    own = Server({"replies": [{"text": text}, {"status": 400}]})
    try:
        made = make("lacer", own, "", batch=2).propose(study, 2)
        asked = len(own.requests)
    finally:
        own.process.kill()
        own.process.wait()
    assert [bool(p.rejected) for p in made] == [True, False]
    assert sum(p.meta["requests"] for p in made) == asked > 1
    assert sum(p.meta["tokens_in"] for p in made) == 1000


def test_batches_are_lacers_alone(server: Server) -> None:
    made = make("lacer", server, "good", batch=5).propose(begun("lacer"), 5)
    assert [p.rejected for p in made] == [""] * 5
    for name in ALL[1:]:
        with pytest.raises(LacerError, match="one encoder at a time, not for batch=5"):
            make(name, server, "good", batch=5)


# -- the scope of an edit -------------------


def spec_diff(a: EncoderSpec, b: EncoderSpec) -> set[str]:
    """Paths that differ between two encoders as JSON."""
    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for key, x in value.items() for k, v in flat(x, f"{path}/{key}").items()}

    x, y = flat(a.to_dict()), flat(b.to_dict())
    return {k for k in x.keys() | y.keys() if x.get(k) != y.get(k)}


def expected_factors(a: EncoderSpec, b: EncoderSpec) -> set[str]:
    """The factors of a change, from nothing but the paths that differ."""
    paths = spec_diff(a, b)
    out = set()
    for n in CARD.sources:
        own = [p for p in paths if p.startswith(f"/sources/{n}/")]
        if own:
            out.add(f"{n}.operator" if n in a.sources and n in b.sources else f"{n}.wiring")
    if "/fusion/block" in paths:
        out.add("fusion.wiring")
    elif any(p.startswith("/fusion/") for p in paths):
        out.add("fusion.operator")
    both = a.condition is not None and b.condition is not None
    if "/routing/condition" in paths and both and a.condition in b.sources:
        out.add("fusion.wiring")
    return out


def test_a_thousand_random_edits_are_classified_exactly() -> None:
    rng = np.random.default_rng(0)
    film = [SPACE.by_name["fusion.block"].index("film")]
    seen: set[frozenset[str]] = set()
    for i in range(1000):
        before = SPACE.sample(rng)
        if i % 3 == 0 and film:  # with a routing
            before = SPACE._fill({**before, "fusion.block": "film"}, rng)
            before = before if SPACE.allowed(before) else SPACE.sample(rng)
        after = before
        for _ in range(int(rng.integers(0, 4))):
            after = SPACE.mutate(after, rng)
        if i % 10 == 9:
            after = SPACE.sample(rng)
        changed = factors_changed(SPACE, before, after)
        assert changed == expected_factors(SPACE.to_spec(before), SPACE.to_spec(after))
        seen.add(changed)
    assert {frozenset({f"{n}.{kind}"}) for n in (*CARD.sources, "fusion") for kind in ("operator", "wiring")} <= seen
    assert frozenset() in seen


def test_factors_that_are_offered_can_be_edited_alone() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        point = SPACE.sample(rng)
        offered = set(factors_of(SPACE, point))
        reached: set[str] = set()
        for near in SPACE.neighbours(point):
            changed = factors_changed(SPACE, point, near)
            assert len(changed) == 1
            reached |= changed
        # Where the conditioning source is left out, another decision has to change with it.
        assert offered - reached <= {f"{point.get('routing.condition')}.wiring"}
        assert reached <= offered


def test_an_edit_outside_its_factor_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    study = begun("spark")
    base = study[0].proposal.point
    assert base is not None
    part = next(n for n in CARD.sources if base[f"{n}.block"] != "unused")
    inside = next(p for p in SPACE.neighbours(base) if factors_changed(SPACE, base, p) == {f"{part}.operator"})
    both = next(p for p in SPACE.neighbours(inside) if factors_changed(SPACE, base, p) == {
        f"{part}.operator", "fusion.operator"})
    replies = [{"factor": f"{part}.operator", "reason": "r"}, {"directive": "d"},
               *({"encoders": [{"rationale": "x", "encoder": SPACE.to_spec(p).to_dict()}]} for p in (both, inside))]
    own = Server({"replies": [{"text": json.dumps(r)} for r in replies]})
    try:
        made = play(make("spark", own, ""), study, 1)
    finally:
        own.process.kill()
        own.process.wait()
    assert "changes fusion.operator, outside the factor" in made[0].rejected
    assert made[0].meta["fault"] == "entangled"
    assert made[1].point == inside
    assert made[1].parents == (0,)
    assert rates(study) == {"valid_rate": 0.5, "entanglement_rate": 0.5, "edits": 2}


# -- feedback memory, LM-Searcher -----------


def test_dummy_forward_runs_every_block_and_finds_what_cannot_run() -> None:
    rng = np.random.default_rng(0)
    card = task_card("lacer/KnownSources-v0", sources=["position", "trend", "picture", "words", "crowd"])
    space = EncoderSpace(card)
    for _ in range(12):
        assert dummy_forward(space.to_spec(space.sample(rng)), card) == ""
    small = {"sources": {"picture": {"block": "stages", "depth": 5}}, "fusion": {"block": "concat"}}
    bad = {"sources": {"position": {"block": "feature_tokens", "width": 8, "heads": 4}, "picture": {
        "block": "patch_transformer", "grid": 4}}, "fusion": {"block": "attention", "width": 16, "heads": 4}}
    for spec in (small, bad):
        assert isinstance(dummy_forward(EncoderSpec.parse(spec, card), card), str)


def test_an_encoder_that_cannot_run_goes_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from lacer.search.designers import feedback_memory

    tried: list[EncoderSpec] = []

    def build(spec: EncoderSpec, *args: Any) -> Any:
        tried.append(spec)
        if len(tried) == 1:
            raise RuntimeError("heads do not divide the width")
        return feedback_memory_build(spec, *args)

    feedback_memory_build = feedback_memory.build
    monkeypatch.setattr(feedback_memory, "build", build)
    made = play(make("feedback-memory", server, "good"), begun("feedback-memory"), 1)
    assert "cannot be run: heads do not divide" in made[0].rejected
    assert made[0].meta["fault"] == "forward"
    assert not made[1].rejected
    assert len(tried) == 2


def test_lm_searcher_pool_and_scores() -> None:
    study = begun("lm-searcher")
    designer = LMSearcher(llm=LLMConfig(model="openai:x", base_url="http://127.0.0.1:9/v1"))
    pool = designer.candidates(study, np.random.default_rng(0))
    assert sorted(p.designer for p in pool) == ["evolution"] * 5 + ["random"] * 5
    codes = {SPACE.to_ncode(p.point or {}) for p in pool}
    assert len(codes) == 10
    assert not codes & {t.ncode for t in study.trials}
    values = [v for _, v in scores(study)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (1.0, 0.0)


def test_lm_searcher_on_tables_with_a_server_and_with_replay(server: Server, tmp_path: Path) -> None:
    strings = [f"{a}{b}{c}" for a in "xyz" for b in "0123" for c in "pq"]
    space = SearchSpace.from_table(strings)

    def objective(point: Point) -> float:
        return strings.index(space.to_string(point)) / 24

    def go(out: str, **options: Any) -> Any:
        return search(space=space, objective=objective, designer="lm-searcher", candidates=11, out=tmp_path / out,
                      quiet=True, ahead=0, **options)

    first = go("a", llm="openai:scripted", llm_base_url=url(server, "good"))
    trials = first.study.trials
    assert [t.proposal.meta["source"] for t in trials[:5]] == ["random"] * 5
    assert {t.proposal.designer for t in trials} == {"lm-searcher"}
    assert {t.proposal.meta["source"] for t in trials[5:]} == {"random", "evolution"}
    assert len({t.ncode for t in trials}) == 11
    again = go("b", llm=f"replay:{tmp_path / 'a' / 'llm_transcript.jsonl'}")
    assert [t.ncode for t in again.study.trials] == [t.ncode for t in trials]


def test_lm_searcher_in_a_bench(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Path(__file__).parents[2] / "benchmarks" / "data" / "nasbench_macro.csv.gz"
    config = BenchConfig(table=str(table), score="mean_acc", designers="random,lm-searcher", budget=9, seeds=2,
                         workers=1, llm="openai:scripted", llm_base_url=url(server, "good"), llm_price_in=1,
                         llm_price_out=10)
    first = bench(config, tmp_path / "a", quiet=True)
    assert {k: v for k, v in first.usage("lm-searcher").items() if k != "seconds"} == {
        "tokens_in": 4000, "tokens_out": 400, "requests": 4, "cost": pytest.approx(0.008), "others": 0}
    assert first.usage("random") == {}
    text = (tmp_path / "a" / "summary.md").read_text()
    assert "lm-searcher asked openai:scripted, per run: 4 requests, 4,000 tokens in" in text
    monkeypatch.delenv("OPENAI_API_KEY")
    recorded = f"replay:{tmp_path}/a/llm/{{designer}}-{{seed}}/llm_transcript.jsonl"
    again = bench(config.model_copy(update={"llm": recorded}), tmp_path / "b", quiet=True)
    assert [r.ncode for r in again.runs] == [r.ncode for r in first.runs]
    assert again.runs[-1].usage == pytest.approx(first.runs[-1].usage, rel=0.02)
    (tmp_path / "a" / "parts" / "lm-searcher-00001-00001.json").unlink()  # as if it had been killed then
    with pytest.raises(LacerError, match="llm was 'openai:scripted'"):
        bench(config.model_copy(update={"llm": recorded}), tmp_path / "a", quiet=True)
    with pytest.raises(LacerError, match="OPENAI_API_KEY"):
        bench(config.model_copy(update={"llm_base_url": None}), tmp_path / "c", quiet=True)
    with pytest.raises(LacerError, match="name all with"):
        bench(config.model_copy(update={"llm": "replay:x"}), tmp_path / "c", quiet=True)
    with pytest.raises(LacerError, match="no-such-1"):
        bench(config.model_copy(update={"llm": "replay:no-such-{seed}", "seed": 1}), tmp_path / "c", quiet=True)
    assert not (tmp_path / "c").exists()
    resumed = bench(config, tmp_path / "a", quiet=True)
    assert [r.ncode for r in resumed.runs[:3]] == [r.ncode for r in first.runs[:3]]
    assert len(resumed.runs[3].ncode) == 9
    transcript = tmp_path / "a" / "llm" / "lm-searcher-1" / "llm_transcript.jsonl"
    assert len(transcript.read_text().splitlines()) == 4, "the run that was cut off began anew"


def test_only_lm_searcher_searches_other_spaces(server: Server) -> None:
    for name in ALL[:-1]:
        with pytest.raises(LacerError, match="choose lm-searcher"):
            search(space=SearchSpace([Decision("a", (1, 2))]), objective=lambda p: 0.0, designer=name, quiet=True,
                   llm="openai:x", llm_base_url=url(server, "good"))


# -- configuration --------------------------


def test_options_of_designers() -> None:
    config = SearchConfig(llm="openai:x", llm_base_url="http://127.0.0.1:9/v1", designer_kwargs={"window": 3})
    assert make_designer("feedback-memory", config, None).window == 3  # type: ignore[attr-defined]
    plain: Any = make_designer("evolution", SearchConfig(designer_kwargs={"population": 16}), None)
    assert plain.population == 16
    for name, key, message in (("lacer", "feedbck", "did you mean 'feedback'"),
                               ("spark", "llm", "Options: prompts, retries"), ("random", "x", "Options: none")):
        with pytest.raises(LacerError, match=message):
            check_options(name, {key: 1})
    with pytest.raises(LacerError, match="window: Input should be a valid integer"):
        make_designer("feedback-memory", config.model_copy(update={"designer_kwargs": {"window": "five"}}), None)

    def temperature(name: str, **update: Any) -> float:
        made: Any = make_designer(name, config.model_copy(update={"designer_kwargs": {}, **update}), None)
        return made.llm.temperature

    assert [temperature(n) for n in ALL] == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert temperature("genius", llm_temperature=0.3) == 0.3
    with pytest.raises(LacerError, match="did you mean 'window'"):
        search("lacer/KnownSources-v0", designer="lacer", llm="openai:x", designer_kwargs={"windw": 1})


FILES = sorted(p for folder in ("comparisons", "ablations") for p in Path(configs.__file__).parent.joinpath(
    folder).glob("*.yaml") if folder == "ablations" or p.stem == "llm")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_comparisons_and_ablations_are_whole(path: Path) -> None:
    """Every entry is a configuration that a search would start with."""
    data = yaml.safe_load(path.read_text())
    assert data.keys() == {"base", "seeds", "designers"}
    assert data["seeds"] == list(range(8))
    assert data["base"]["candidates"] == 50
    seen = set()
    for label, entry in data["designers"].items():
        assert entry.keys() <= {"designer", "batch", "designer_kwargs"}, label
        config = validate({**data["base"], **entry, "llm": "openai:x", "llm_base_url": "http://127.0.0.1:9/v1"},
                          f"{path.name}: {label}")
        made: Any = make_designer(config.designer, config, None)
        options = {k: v for k, v in vars(made).items() if k != "client"}
        seen.add(json.dumps([config.designer, options], default=str, sort_keys=True))
    assert len(seen) == len(data["designers"])


def test_nested_ablation_adds_one_part_at_a_time() -> None:
    from lacer.search.llm.facts import FEEDBACK

    path = next(p for p in FILES if p.stem == "nested")
    before: set[str] = set()
    for i, entry in enumerate(yaml.safe_load(path.read_text())["designers"].values()):
        config = SearchConfig(llm="openai:x", llm_base_url="http://127.0.0.1:9/v1", **entry)
        parts = set(make_designer("lacer", config, None).feedback)  # type: ignore[attr-defined]
        assert len(parts) == i
        assert before < parts or not i
        before = parts
    assert before == set(FEEDBACK)


# -- the feedback really is in the prompt ---

STEERED = {**TINY, "env_kwargs": {"sources": ["position", "trend", "noise"]}, "wandb": "off", "executor": "inprocess",
           "candidates": 5, "ahead": 0, "limits": {}}


def reasoned(name: str, server: Server, out: Path) -> list[set[str]]:
    """The sources that each encoder of a real search uses, with a model that reasons over the probes in the prompt."""
    result = search(out=out, quiet=True, **{**STEERED, "designer": name, "llm": "openai:scripted",
                                            "llm_base_url": url(server, "reasoner")})
    return [set(t.spec.sources) for t in result.outcome.trials if t.spec is not None and t.status == "ok"]


@pytest.mark.slow
def test_a_reasoner_over_probes_drops_the_useless_source_of_real_runs(server: Server, tmp_path: Path) -> None:
    """With PPO runs. Optimal routing: all sources that the reward depends on, and not the noise."""
    assert {"position", "trend"} in reasoned("lacer", server, tmp_path / "lacer")[:5]
    assert {"position", "trend"} not in reasoned("genius", server, tmp_path / "genius")


@pytest.fixture(scope="module")
def real_evaluation() -> Evaluation:
    """Probes of the expert's encoder after one short PPO run."""
    spec = {"sources": {"position": {"block": "mlp"}, "trend": {"block": "gru"}, "noise": {"block": "mlp"}},
            "fusion": {"block": "concat"}}
    protocol = Protocol.model_validate({**STEERED["protocol"], "steps": 256, "eval_episodes": 8})
    return run(RunRequest(env="lacer/KnownSources-v0", env_kwargs=STEERED["env_kwargs"], encoder=spec,
                          protocol=protocol, text_model="hash"))


def test_a_reasoner_over_probes_drops_the_useless_source(server: Server, real_evaluation: Evaluation) -> None:
    """Every encoder gets the probes that one real run measured for the sources that it uses; the scores are made up,
    and the same for all, so nothing but the probes tells which source is useless."""
    assert real_evaluation.ok
    space = EncoderSpace(task_card("lacer/KnownSources-v0", **STEERED["env_kwargs"]))
    used: dict[str, list[set[str]]] = {}
    for name in ("lacer", "genius"):
        study, designer = Study(space), make(name, server, "reasoner")
        proposals = [Proposal(space.from_spec(EncoderSpec.parse(
            {"sources": {"position": {"block": "mlp"}, "trend": {"block": "gru"}, "noise": {"block": "mlp"}},
             "fusion": {"block": "concat"}}, space.card)), "expert")]
        used[name] = []
        for _ in range(5):
            p = next(p for p in proposals if not p.rejected)
            t = study.start(p)
            assert t.spec is not None
            used[name].append(set(t.spec.sources))
            probes = {k: v for k, v in real_evaluation.probes.items() if k in (*t.spec.sources, "fused")}
            study.finish(t.number, Evaluation(objective=0.5, mean_return=8.0, probes=probes))
            proposals = designer.propose(study, 1)
            for r in proposals:
                if r.rejected:
                    study.reject(r)
    assert used["lacer"][1] == {"position", "trend"}
    assert {"position", "trend"} not in used["genius"]


# -- transcripts of searches that were answered by hand

BY_HAND = Path(__file__).with_name("transcripts")


def by_hand(name: str, sources: list[str], scores: list[float]) -> Study:
    """A study as in the recorded search: its first encoder, the recorded replies, the scores that came out."""
    card = task_card("lacer/KnownSources-v0", sources=sources)
    study = Study(EncoderSpace(card))
    llm = LLMConfig(model=f"replay:{BY_HAND / f'{name}_by_hand.jsonl'}")
    designer: Any = designer_class(name)(0, llm=llm)  # type: ignore[call-arg]
    designer.check()
    made = [Proposal(study.encoders.from_spec(expert_spec(card, None)), "expert")]
    for value in scores:
        assert [p.rejected for p in made] == [""]
        study.finish(study.start(made[0]).number, Evaluation(objective=value, mean_return=16 * value))
        made = designer.propose(study, 1) if value is not scores[-1] else []
    return study


def test_what_was_answered_by_hand_is_still_read() -> None:
    study = by_hand("lacer", ["position", "trend", "picture", "words", "noise"],
                    [0.626, 0.618, 0.792, 0.888, 0.823, 0.89])
    assert {t.proposal.designer for t in study.trials[1:]} == {"lacer"}
    assert all("noise" not in t.spec.sources for t in study.trials[1:] if t.spec is not None)
    assert [t.proposal.meta["expected"] for t in study.trials[1:]] == [0.75, 0.74, 0.83, 0.9, 0.895]
    assert study.trials[5].proposal.parents == (3, 4)
    study = by_hand("spark", ["position", "trend", "noise"], [0.563, 0.631, 0.884, 0.85])
    assert [t.proposal.meta["factor"] for t in study.trials[1:]] == [
        "noise.wiring", "fusion.operator", "trend.operator"]
    assert rates(study) == {"valid_rate": 1.0, "entanglement_rate": 0.0, "edits": 3}


# -- lacer prompt ---------------------------


def test_lacer_prompt_shows_what_the_model_saw_and_said(server: Server, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    from lacer.search.cli import main

    space = SearchSpace([Decision("a", tuple(range(9))), Decision("b", (1, 2, 3))])
    run = tmp_path / "run"
    search(space=space, objective=lambda p: p["a"], designer="lm-searcher", candidates=7, out=run, quiet=True, ahead=0,
           llm="openai:scripted", llm_base_url=url(server, "good"))
    main(["prompt", str(run), "6"])
    out = capsys.readouterr().out
    assert "#6, proposed by lm-searcher" in out
    assert "1,000 tokens in, 100 out" in out
    assert out.index("--- system") < out.index("--- user") < out.index("# Candidates") < out.index("--- reply")
    assert '{"best": ' in out

    def error(*args: str) -> str:
        with pytest.raises(SystemExit):
            main(["prompt", *args])
        return capsys.readouterr().err

    assert "has no trial #7; its trials are #0 to #6" in error(str(run), "7")
    assert "has no trial #-1" in error(str(run), "-1")
    assert "no language model was asked" in error(str(run), "0")
    assert "is no run" in error(str(tmp_path), "0")
    transcript = run / "llm_transcript.jsonl"
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join([lines[0], '{"cut']))
    assert "line 2 of" in error(str(run), "6")
    assert "damaged" in error(str(run), "6")
    transcript.unlink()
    assert "cannot read the transcript" in error(str(run), "6")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_whole_search(name: str, server: Server, tmp_path: Path) -> None:
    result = search(out=tmp_path / "r", quiet=True, **{**STEERED, "designer": name, "candidates": 8, "protocol": {
        **STEERED["protocol"], "steps": 256}, "llm": "openai:scripted", "llm_base_url": url(server, "good")})
    made = [t for t in result.outcome.trials if t.status != "rejected"][1:]
    assert {t.proposal.designer for t in made} == {name}
    assert result.outcome.usage["requests"] > 0
    if name == "spark":
        assert 0 < result.outcome.usage["valid_rate"] <= 1
        assert "LLM entanglement rate" in result.report.read_text()


@pytest.mark.slow
def test_benchmark_of_prompt_sets(server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "benchmarks" / "prompt_sets.py", "llm=openai:x", "seeds=2",
         f"llm_base_url={url(server, 'good')}", "candidates=3", "steps=256", "episodes=2", f"out={tmp_path}"],
        capture_output=True, text=True, check=True, timeout=1800)
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["proposed_by_model"] == 1
    assert {len(s) for s in got["scores"].values()} == {2}
    prompts = [json.loads((tmp_path / f"{s}-0" / "llm_transcript.jsonl").read_text().splitlines()[0])["messages"][1]
               for s in SETS]
    assert len({p["content"][:40] for p in prompts}) == 3


def test_spreads_of_prompt_sets() -> None:
    from benchmarks.prompt_sets import spreads

    rng = np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=(3, 300))
    got = spreads(noise + np.array([[0.0], [1.0], [2.0]]))
    assert got["between_sets"] == pytest.approx(1, rel=0.03)
    assert got["between_seeds"] == pytest.approx(0.1, rel=0.1)
    assert got["share"] == pytest.approx(1 / 1.01, rel=0.01)
    assert spreads(noise)["between_sets"] < 0.02
    assert spreads(np.array([[1.0], [2.0], [3.0]]))["between_seeds"] == 0
