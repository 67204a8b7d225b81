"""The report is honest, inert, small and works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lacer.agents import Cost, Evaluation
from lacer.agents.probes import MEANING
from lacer.encoders import EncoderSpec
from lacer.envs import Objective, TaskCard, task_card
from lacer.search.drawing import clean, count, encoder_svg, limits, number, tick_labels, ticks
from lacer.search.outcome import EXPERT, NOOP, WINNER, Outcome
from lacer.search.report import duration, headline, render_report, write_report
from lacer.search.space import EncoderSpace
from lacer.search.study import Proposal, Trial

CARD = task_card("lacer/KnownSources-v0")
HOSTILE = ("<script>boom()</script> </script><img src=x onerror=boom()> \"'` {{ 7*7 }} ]]> &amp; "
           "\u202egnp\x00\x1b \ud800 \u05e9\u05dc\u05d5\u05dd")
RELEVANT = ("position", "trend", "picture", "words")


def evaluation(rng: np.random.Generator, spec: EncoderSpec | None, card: TaskCard = CARD, *, level: float | None = None,
               episodes: int = 10, first: int = 1_000_000, steps: int = 10_000) -> Evaluation:
    """A made-up evaluation whose level follows the relevant sources that an encoder reads."""
    used = list(spec.sources) if spec else []
    good = {n: float(rng.uniform(0.75, 1.0)) for n in used if n in RELEVANT}
    at = sum(good.values()) / 4 - 0.02 * ("noise" in used) if level is None else level
    hard = np.random.default_rng(first).normal(0, 0.05, episodes)  # the same episodes are hard for everyone
    scores = at + hard * 0.6 + rng.normal(0, 0.025, episodes)
    if card.objective.direction == "minimize":
        scores = 2 - scores
    probes: dict[str, dict[str, float]] = {}
    for name in [*used, "fused"] if spec else []:
        r2 = {f"linear_probe/target_{r}": good.get(r, 0.01) * float(rng.uniform(0.92, 1)) if name in (r, "fused")
              else float(rng.uniform(0, 0.03)) for r in RELEVANT}
        mean = float(np.mean(list(r2.values())))
        probes[name] = {"effective_rank": float(rng.uniform(0.15, 0.75)), "linear_probe": mean, **r2}
        if name != "fused":
            probes[name]["redundancy"] = float(rng.uniform(0, 0.6))
    modules = {n: int(rng.integers(500, 9_000)) for n in used} | ({"fusion": int(rng.integers(4_000, 20_000))} if spec
                                                                  else {})
    x = np.arange(256, steps + 1, 256)
    y = 16 * (at - (at + 2.2) * np.exp(-x / (steps / rng.uniform(5, 9)))) + rng.normal(0, 0.5, len(x))
    seconds = float(rng.uniform(14, 32)) * steps / 10_000 if spec else 0.0
    return Evaluation(
        objective=float(scores.mean()), mean_return=float(16 * scores.mean()), returns=(16 * scores).tolist(),
        metrics={card.objective.metric: scores.tolist()}, episode_seeds=list(range(first, first + episodes)),
        curve=[(int(a), float(b)) for a, b in zip(x, y, strict=True)] if spec else [], probes=probes,
        cost=Cost(parameters=sum(modules.values()) + 8_900 if spec else 0, parameters_by_module=modules,
                  env_steps=(steps if spec else 0) + 16 * episodes, train_seconds=seconds, eval_seconds=1.2,
                  probe_seconds=0.3, total_seconds=seconds + 1.5, steps_per_second=steps / seconds if spec else 0.0))


def make_outcome(n: int = 8, seed: int = 0, *, minimize: bool = False, finals: bool = True, failed: int = 1,
                 rejected: int = 1, text: str = "The slope of the series matters, so a recurrent block reads it.",
                 winner_level: float = 0.86, expert_level: float = 0.8, **changes: Any) -> Outcome:
    """A made-up search: ``n`` finished candidates and some without a result."""
    rng = np.random.default_rng(seed)
    card = replace(CARD, objective=Objective("delay", "s", "minimize")) if minimize else CARD
    space = EncoderSpace(card)
    trials: list[Trial] = []
    for i in range(n + failed + rejected):
        point = space.sample(rng)
        if trials and trials[-1].spec and i % 2:
            point = space.mutate(space.from_spec(trials[-1].spec), rng)
        spec = space.to_spec(point)
        parents = (trials[-1].number,) if i % 2 and trials and trials[-1].spec else ()
        proposal = Proposal(point, ("llm", "evolution")[i % 4 == 3], text, parents, meta={"expected effect": text[:80]})
        if 2 <= i < 2 + rejected:
            trials.append(Trial(i, "rejected", Proposal(None, "llm", text, rejected=f"not JSON: {text}"), None, ""))
        elif 2 + rejected <= i < 2 + rejected + failed:
            trials.append(Trial(i, "failed", proposal, spec, space.to_ncode(point),
                                Evaluation.failure(f"diverged: NaN in fusion. {text}")))
        else:
            trials.append(Trial(i, "ok", proposal, spec, space.to_ncode(point), evaluation(rng, spec, card)))
    expert = space.to_spec(space.sample(np.random.default_rng(5)))
    out = Outcome(
        card=card, trials=tuple(trials), finals={}, winner=None,
        config={"env": card.env_id, "designer": "llm", "budget": n, "expert": expert.to_dict(), "note": text},
        versions={"lacer": "0.1.0", "python": "3.11"}, command=f"lacer search --env {card.env_id}", seconds=412.0,
        usage={"requests": 9, "tokens_in": 51_200, "tokens_out": 9_310, "seconds": 41.2, "cost": 0.41})
    best = next(iter(out.ranked()), None)
    done = {}
    if best is not None and best.objective is not None and finals:
        done = {NOOP: evaluation(rng, None, card, level=0.0, episodes=20, first=2_000_000),
                EXPERT: evaluation(rng, expert, card, level=expert_level, episodes=20, first=2_000_000, steps=40_000),
                WINNER: evaluation(rng, best.spec, card, level=winner_level, episodes=20, first=2_000_000,
                                   steps=40_000)}
    winner = best.number if best is not None and best.objective is not None else None
    return replace(out, winner=winner, finals=done, **changes)


def svgs(page: str) -> list[str]:
    """Pictures of a page, each with the SVG inside it."""
    out, depth, start = [], 0, 0
    for m in re.finditer(r"<(/?)svg[ >]", page):
        if not m[1]:
            start = m.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                out.append(page[start:m.end()])
    return out


def plain(page: str) -> str:
    """Visible text."""
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S)))


def test_page_shows_everything(tmp_path: Path) -> None:
    outcome = make_outcome()
    path = write_report(outcome, tmp_path / "deep" / "report.html")
    page = path.read_text(encoding="utf-8")
    text = plain(page)
    best = next(t for t in outcome.trials if t.number == outcome.winner)
    assert best.spec is not None
    for expected in (headline(outcome), CARD.env_id, "Final comparison", "The expert’s encoder", "Learning curves",
                     "diverged: NaN in fusion", "not JSON", "lacer search --env", best.spec.hash, "51,200",
                     "2000000–2000019", *(t.ncode for t in outcome.trials),
                     *(MEANING[p] for p in ("effective_rank", "linear_probe", "redundancy"))):
        assert expected in text, expected
    for t in outcome.trials:
        assert f'id="trial-{t.number}"' in page
    assert page.count("<tbody id=") == len(outcome.trials)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page), "the page must not load anything"
    assert "{{" not in text
    assert "StrictUndefined" not in text


def test_pictures_are_well_formed() -> None:
    pictures = svgs(render_report(make_outcome(text=HOSTILE)))
    assert len(pictures) > 20
    for picture in pictures:
        assert "NaN" not in picture
        assert "nan" not in re.sub(r"<text.*?</text>|<title.*?</title>|aria-label=\"[^\"]*\"", "", picture, flags=re.S)
        ElementTree.fromstring(picture)


def test_headline_says_what_the_intervals_say() -> None:
    clear = headline(make_outcome(winner_level=0.9, expert_level=0.7))
    assert re.search(r"^The best of 8 encoders reaches a mean score of 0\.\d+ on 20 episodes that took no part in "
                     r"the search: 0\.\d+ \[0\.\d+, 0\.\d+\] above doing nothing "
                     r"and 0\.\d+ \[0\.\d+, 0\.\d+\] above the expert’s\.$", clear)
    equal = headline(make_outcome(winner_level=0.8, expert_level=0.8))
    assert "not distinguishable from the expert’s (0.0" in equal
    assert "[−0.0" in equal
    worse = headline(make_outcome(winner_level=0.6, expert_level=0.8))
    assert re.search(r"0\.\d+ \[0\.1\d+, 0\.2\d+\] below the expert’s", worse)
    less = headline(make_outcome(minimize=True, winner_level=0.9, expert_level=0.7))
    assert re.search(r"mean delay of 1\.\d+ s on 20 .* search: 0\.\d+ s \[0\.\d+, 0\.\d+\] below doing nothing", less)
    assert less.endswith("Less is better.")


def test_headline_without_a_final() -> None:
    assert "on 10 episodes that also chose it. It has not been checked" in headline(make_outcome(finals=False))
    broken = make_outcome()
    broken = replace(broken, finals={**broken.finals, WINNER: Evaluation.failure("out of memory")})
    assert "Its final run failed" in headline(broken)
    assert "out of memory" in plain(render_report(broken))


def test_no_result_at_all() -> None:
    empty = make_outcome(0, failed=0, rejected=0)
    assert headline(empty) == "The search has not proposed an encoder yet."
    assert "Candidates" in plain(render_report(empty))
    rejected = make_outcome(0, failed=0, rejected=4)
    rejected = replace(rejected, trials=tuple(
        Trial(i, "rejected", Proposal(None, "llm", "r", rejected="no JSON"), None, "") for i in range(4)))
    assert headline(rejected) == "None of the 4 proposed encoders has a result: 4 rejected."
    assert "no valid encoder" in plain(render_report(rejected))
    running = replace(rejected, trials=tuple(replace(t, status="running") for t in make_outcome(2).trials[:1]))
    running = replace(running, trials=tuple(replace(t, evaluation=None) for t in running.trials))
    assert "1 running" in headline(running)
    render_report(running)


def test_other_final_runs() -> None:
    outcome = make_outcome()
    rng = np.random.default_rng(1)
    elsewhere = evaluation(rng, None, level=0.1, episodes=20, first=3_000_000)
    odd = replace(outcome, finals={"random search": outcome.finals[EXPERT], NOOP: elsewhere,
                                   EXPERT: Evaluation.failure("killed"), WINNER: outcome.finals[WINNER]})
    text = plain(render_report(odd))
    assert "on other episodes" in headline(odd)
    assert "while the expert’s encoder gave no result" in headline(odd)
    assert "random search" in text
    assert "expert: no result. killed" in text
    no_metric = outcome.finals[WINNER].model_copy(update={"metrics": {}, "episode_seeds": []})
    render_report(replace(outcome, finals={WINNER: no_metric, NOOP: elsewhere}))
    one = evaluation(rng, None, level=0.1, episodes=1)
    render_report(replace(outcome, finals={WINNER: one, NOOP: one}))
    unknown = replace(outcome, config={"expert": {"sources": {"nothing": 1}}})
    assert "The expert’s encoder" not in render_report(unknown)


def test_the_expert_wins() -> None:
    outcome = make_outcome(failed=0, rejected=0)
    first = outcome.ranked()[0]
    won = replace(first, proposal=replace(first.proposal, designer="expert"))
    outcome = replace(outcome, trials=tuple(won if t is first else t for t in outcome.trials), config={},
                      finals={**outcome.finals, EXPERT: outcome.finals[WINNER]})
    assert headline(outcome).startswith("The best of 8 encoders is the expert’s own; it reaches a mean score of")
    assert "above the expert" not in headline(outcome)
    text = plain(render_report(outcome))
    assert "Best encoder: the expert’s own" in text
    assert "winner − expert" not in text
    steps = sum(t.evaluation.cost.env_steps for t in outcome.trials if t.evaluation)
    assert f"{steps + 40_320 + 320:,}" in text


def test_no_noop_action_means_random_actions() -> None:
    outcome = make_outcome()
    outcome = replace(outcome, card=replace(outcome.card, noop=None))
    assert "acting at random" in headline(outcome)
    assert "random actions" in plain(render_report(outcome))


def test_minimize_ranks_and_meters_the_other_way() -> None:
    outcome = make_outcome(minimize=True, failed=0, rejected=0)
    page = render_report(outcome)
    values = [float(v) for v in re.findall(r'<td class="n" data-v="([\d.]+)">', page)]
    assert values == sorted(values)
    assert page.index('style="width:100%"') < page.index('style="width:0%"')
    assert "Less is better" in page


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    outcome = make_outcome(text=HOSTILE)
    sources = {HOSTILE: replace(CARD.sources["noise"], name=HOSTILE, description=HOSTILE), **CARD.sources}
    trials = tuple(replace(t, proposal=replace(t.proposal, designer=HOSTILE, meta={HOSTILE: HOSTILE}))
                   for t in outcome.trials)
    spec = trials[0].spec
    assert spec is not None
    named = EncoderSpec({HOSTILE: next(iter(spec.sources.values())), **spec.sources}, spec.fusion)
    evil = evaluation(np.random.default_rng(0), named).model_copy(update={
        "probes": {HOSTILE: {HOSTILE: 0.5, "effective_rank": float("nan")}, "fused": {"linear_probe": 0.5}},
        "metrics": {HOSTILE: [1.0], "score": [0.1]}})
    trials = (replace(trials[0], spec=named, evaluation=evil), *trials[1:])
    outcome = replace(
        outcome, trials=trials, command=HOSTILE, config={HOSTILE: [HOSTILE]}, versions={HOSTILE: HOSTILE},
        usage={HOSTILE: 3}, finals={**outcome.finals, HOSTILE: Evaluation.failure(HOSTILE)},
        card=replace(CARD, sources=sources, env_id=HOSTILE, description=HOSTILE, objective=Objective("score", HOSTILE)))
    path = write_report(outcome, tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 1
    assert "<img" not in page
    assert "\u202e" not in page
    assert "\x00" not in page
    assert "\u05e9\u05dc\u05d5\u05dd" in page
    assert "&lt;script&gt;boom()" in page
    for picture in svgs(page):
        ElementTree.fromstring(picture)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script
    assert "boom" not in script[1]


@pytest.mark.slow
def test_two_hundred_candidates_stay_small(tmp_path: Path) -> None:
    outcome = make_outcome(200, failed=6, rejected=6, text="A long story. <\"'&> " * 5000)
    rng = np.random.default_rng(0)
    prompts = {t.number: (("request: user", "\n".join(
        " ".join(f"{word} {rng.random():.4f}" for word in ("attention", "width", "score")) for _ in range(400))),
        ("request: reply", t.ncode)) for t in outcome.trials}
    trials = tuple(replace(t, proposal=replace(t.proposal, meta={"expected": rng.random()})) for t in outcome.trials)
    path = write_report(replace(outcome, trials=trials, prompts=prompts), tmp_path / "report.html")
    assert path.stat().st_size < 5e6
    assert "Prompt and reply" in path.read_text(encoding="utf-8")
    assert "left out to keep this page small" in path.read_text(encoding="utf-8"), "these do not repeat themselves"
    assert "more characters in the study" in path.read_text(encoding="utf-8")


def test_encoder_svg_stands_alone() -> None:
    space = EncoderSpace(CARD)
    rng = np.random.default_rng(0)
    specs = [space.to_spec(space.sample(rng)) for _ in range(40)]
    for a, b in pairwise(specs):
        parts = dict.fromkeys([*a.sources, "fusion"], 1200)
        root = ElementTree.fromstring(encoder_svg(a, CARD, parameters=parts, compare=b))
        text = " ".join("".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text"))
        for block in (*a.sources.values(), a.fusion):
            assert block.block in text
        for part in ("actor", "critic", "4 values", f"{1200 * len(parts):,} trainable", *CARD.sources):
            assert part in text
        assert text.count("not used") == len(CARD.sources) - len(a.sources)
        assert "var(" not in encoder_svg(a, CARD)


def test_encoder_svg_marks_differences() -> None:
    def spec(width: int, **sources: Any) -> EncoderSpec:
        return EncoderSpec.parse({"sources": {"position": {"block": "mlp", "width": width}, **sources},
                                  "fusion": {"block": "concat"}}, CARD)

    def marks(a: EncoderSpec, b: EncoderSpec | None) -> str:
        root = ElementTree.fromstring(encoder_svg(a, CARD, compare=b))
        return " ".join(e.text or "" for e in root.iter() if "mark" in e.get("class", "").split())

    assert marks(spec(64), None) == marks(spec(64), spec(64)) == ""
    assert marks(spec(64), spec(32)) == "width 64"
    assert marks(spec(64, trend={"block": "gru"}), spec(64)) == "gru"
    assert marks(spec(64), spec(64, trend={"block": "gru"})) == "not used"


def test_numbers() -> None:
    assert [count(n) for n in (0, 950, 4416, 12_345, 999_999, 1_300_000)] == ["0", "950", "4.42k", "12.3k", "1000k",
                                                                             "1.3M"]
    assert [number(x, 2) for x in (-0.5, -0.001, None, float("nan"))] == ["−0.50", "0.00", "–", "–"]
    assert [duration(s) for s in (3.21, 245, 7800)] == ["3.2 s", "4 min 05 s", "2 h 10 min"]
    assert tick_labels(ticks(0, 1)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    for low, high in ((0, 1e-9), (-1e12, 1e12), (5, 5.0001)):
        assert 2 <= len(ticks(low, high)) <= 12
    assert limits([]) == (0.0, 1.0)
    assert limits([3.0])[0] < 3 < limits([3.0])[1]
    assert limits([1, 2, 3, 2, 1, 2, 1e6], whole=False)[1] < 100


def browse(url: str, profile: Path, *options: str) -> tuple[str, str]:
    """The DOM of an address after loading it in headless Chromium, and what the browser's console said."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert chromium, "this test needs Chromium: apt-get install chromium"
    out = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={profile}", *options, "--enable-logging=stderr", "--v=0", "--dump-dom", url],
        capture_output=True, timeout=120, check=True)
    console = [line for line in out.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return out.stdout.decode(), "\n".join(console)


OPENS = """<script>addEventListener("load", async () => {
  const place = document.querySelector("#trial-0 [data-prompt]");
  document.querySelector("#trial-0 tr.row").click();
  place.closest("details").open = true;
  for (let i = 0; i < 100 && place.children.length < 4; i++) await new Promise((done) => setTimeout(done, 20));
  document.documentElement.dataset.out = JSON.stringify([[...place.children].map((e) => e.textContent),
    place.querySelectorAll("img, script").length, performance.getEntriesByType("resource").length]); });</script>"""


@pytest.mark.slow
def test_prompts_in_a_browser(tmp_path: Path) -> None:
    """They unpack to what was sent, hostile or not, and nothing is loaded."""
    outcome = make_outcome(4, text=HOSTILE)
    said = (("request: system", f"Design.\n{HOSTILE}\n"), (HOSTILE, "</template><script>boom()</script>"))
    page = render_report(replace(outcome, prompts={t.number: said for t in outcome.trials}))
    assert page.count("<script") == 1
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page) + OPENS
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    dom, console = browse(path.as_uri(), tmp_path / "profile", "--virtual-time-budget=5000")
    assert console == ""
    found = re.search(r'data-out="([^"]*)"', dom)
    assert found
    texts, elements, loaded = json.loads(html.unescape(found[1]))
    assert texts == [clean(x) for pair in said for x in pair]
    assert (elements, loaded) == (0, 0)


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    path = write_report(make_outcome(30, text=HOSTILE, command=HOSTILE), tmp_path / "report.html")
    shown = 7
    page, console = browse(f"{path.as_uri()}#trial-{shown}", tmp_path / "profile")
    assert console == ""
    opened = re.findall(r'<tbody id="trial-(\d+)"[^>]*class="[^"]*open', page)
    assert opened == [str(shown)], "a link to a candidate opens it"
    assert "collapsed" not in page.split('id="candidates"')[1][:40]
    assert page.count("<script") == 1


CLICKS = """<script>addEventListener("load", () => {
  const bodies = () => [...document.querySelectorAll("#candidates > tbody:not([hidden])")];
  const ids = () => bodies().map((body) => body.id.slice(6)).join();
  const headers = [...document.querySelectorAll("#candidates th")], out = {rank: ids()};
  for (const i of [1, 3, 3, 7, 10]) { headers[i].querySelector("button").click(); (out[i] ??= []).push(ids()); }
  const filter = document.getElementById("filter");
  filter.value = "FAILED"; filter.dispatchEvent(new Event("input")); out.filter = ids();
  document.querySelector("tr.row:not(tbody[hidden] *)").click(); out.open = document.querySelectorAll(".open").length;
  document.documentElement.dataset.out = JSON.stringify(out); });</script>"""


@pytest.mark.slow
def test_sorting_in_a_browser(tmp_path: Path) -> None:
    outcome = make_outcome(12, failed=2, rejected=1)
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_report(outcome)) + CLICKS
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    dom, console = browse(path.as_uri(), tmp_path / "profile")
    assert console == ""
    found = re.search(r'data-out="([^"]*)"', dom)
    assert found
    out = json.loads(html.unescape(found[1]))
    ranked = [str(t.number) for t in outcome.ranked()]
    with_result, without = ranked[:12], ranked[12:]
    assert out["rank"].split(",") == ranked
    assert out["1"][0].split(",") == [str(i) for i in range(15)]
    best_first, worst_first = (order.split(",") for order in out["3"])
    assert best_first[:12] == with_result
    assert worst_first[:12] == with_result[::-1]
    assert set(best_first[12:]) == set(worst_first[12:]) == set(without), "those without a result are last both ways"
    sizes = {str(t.number): t.evaluation.cost.parameters for t in outcome.trials if t.evaluation}
    assert [sizes[i] for i in out["7"][0].split(",")[:12]] == sorted(sizes[i] for i in with_result)
    assert set(out["filter"].split(",")) == {str(t.number) for t in outcome.trials if t.status == "failed"}
    assert out["open"] == 1
