"""What a comparison shows: tables as files, pictures, and one page as HTML and Markdown."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lacer.search.bench_report import COLOURS, markdown_table
from lacer.search.compare import FILE, SAME
from lacer.search.compare_tables import AXES, Compared
from lacer.search.drawing import clean
from lacer.search.export import frame, write_table
from lacer.search.files import write_whole
from lacer.search.outcome import dollars

PAGE, SUMMARY = "comparison.html", "summary.md"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: heading.
        text: paragraphs.
        head, rows: a table; empty: none. The first column and those in ``words`` are text, the others numbers.
        words: see above.
        pictures: names of SVG files without suffix, with what they show.
    """

    title: str
    text: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    words: frozenset[int] = frozenset({0})
    pictures: dict[str, str] = field(default_factory=dict)


def write(compared: Compared) -> None:
    """Writes all files of a comparison. Raises OSError."""
    folder = compared.folder
    tables = {"searches": compared.searches, "curves": compared.curves, "ranking": compared.ranking,
              "levels": compared.reached, "profiles": compared.profiles, "costs": compared.costs,
              "rates": compared.rates, "overall": compared.overall,
              "pairwise": pd.DataFrame([{"environment": env, **asdict(c), "better": c.better}
                                        for env, pairs in compared.pairs.items() for c in pairs])}
    for name, table in tables.items():
        if len(table):
            write_table(table, folder / f"{name}.csv")
    write_table(frame(({"environment": e.env, "designer_label": e.label, "search_seed": e.run.config.get("seed", 0)},
                       e.run) for e in compared.entries), folder / "candidates.csv")
    pictures(compared)
    parts = sections(compared)
    write_whole(folder / "summary.json", json.dumps(figures(compared), indent=1, allow_nan=False) + "\n")
    write_whole(folder / SUMMARY, markdown(compared.title, parts))
    write_whole(folder / PAGE, html(compared.title, parts, folder))


# -- words ------------------------------------------------------------------------------------------------------------


def statements(compared: Compared) -> list[str]:
    """What the comparison says, and no more: one sentence or more for each environment."""
    out = []
    for env in compared.envs:
        where = f"{env}: " if env else ""
        scores = compared.scores(env)
        if len(scores) < 2:
            out.append(f"{where}There is one designer with a result, so nothing is compared.")
            continue
        if not compared.pairs[env]:
            out.append(f"{where}A designer with a single search cannot be told from another.")
            continue
        if single := [n for n in scores if n not in compared.tested(env)]:
            out.append(f"{where}With a single search each, {', '.join(single)} cannot be told from another.")
        better = [(c, c.better, c.b if c.better == c.a else c.a) for c in compared.pairs[env] if c.better]
        for c, winner, loser in better:
            low, high = sorted((abs(c.low), abs(c.high)))
            share = c.improvement if winner == c.a else 1 - c.improvement
            out.append(f"{where}{winner} is better than {loser}, by {_num(abs(c.difference))} [{_num(low)}, "
                       f"{_num(high)}]; a search with it ends better in {share:.0%} of cases (p = {c.p:.2g}).")
        if not better:
            seeds = sorted({len(v) for v in compared.tested(env).values()})
            least = compared.least_p(env)
            out.append(f"{where}No designer can be told from another with {'–'.join(map(str, seeds))} seeds." + (
                f" So few seeds could not have told anything apart: the smallest p that they can give is {least:.2g}. "
                f"{compared.seeds_needed(env)} seeds can." if least >= 0.05 else ""))
        elif len(better) < len(compared.pairs[env]):
            out.append(f"{where}The other pairs cannot be told apart.")
    return out


def figures(compared: Compared) -> dict[str, Any]:
    """The comparison's figures as plain data."""
    def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
        return [{str(k): _plain(v) for k, v in r.items()} for r in table.to_dict("records")]

    return {"title": compared.title, "says": statements(compared), "notes": list(compared.notes),
            "environments": compared.envs, "designers": compared.labels,
            "pairwise": {env: [{**{k: _plain(v) for k, v in asdict(c).items()}, "better": c.better} for c in pairs]
                         for env, pairs in compared.pairs.items()},
            "ranking": rows(compared.ranking), "levels": rows(compared.reached), "costs": rows(compared.costs),
            "rates": rows(compared.rates), "overall": rows(compared.overall), "searches": rows(compared.searches)}


def _plain(v: Any) -> Any:
    v = v.item() if isinstance(v, np.generic) else v
    return None if isinstance(v, float) and not math.isfinite(v) else v


def sections(compared: Compared) -> list[Section]:
    """The page."""
    many = len(compared.envs) > 1
    out = [Section("What it says", (*statements(compared), *compared.notes, *_problems(compared)))]
    if many:
        o = compared.overall
        out.append(Section(
            "All environments together", (
                "Interquartile mean of the normalised final scores with its 95 % stratified bootstrap interval. No "
                "test is made across environments; tests are corrected within each environment, not across them.",
                *(f"{env}: {compared.normalised(env)[1]}." for env in compared.envs)),
            ("designer", "interquartile mean [95 %]", "searches"),
            [(r.designer, _interval(r.iqm, r.low, r.high), str(r.searches)) for r in o.itertuples()]))
    for env in compared.envs:
        out += _env_sections(compared, env, f" – {env}" if many else "")
    if len(compared.profiles):
        how = "of normalised scores, all environments weighing the same" if many else "of the final scores"
        more = many or compared.sign(compared.envs[0]) > 0
        out.append(Section("Performance profiles", (
            f"Share of searches whose winner scores {'more' if more else 'less'} than x, {how}, with 95 % "
            "bands. A curve that lies above another everywhere is better everywhere.",),
            pictures={"profiles": "Performance profiles"}))
    out += [_cost_section(compared, many), _rate_section(compared, many), _searches_section(compared, many),
            _how(compared)]
    return out


def _env_sections(compared: Compared, env: str, suffix: str) -> list[Section]:
    o = compared.objectives[env]
    name = o.metric.replace("_", " ") + (f" ({o.unit})" if o.unit else "")
    direction = "higher" if o.direction == "maximize" else "lower"
    ranking = compared.ranking[compared.ranking["environment"] == env]
    s = compared.searches[compared.searches["environment"] == env]
    if compared.plain:
        what = (f"The best {name} that each search found; {direction} is better. The objective is a function, so there "
                "is no separate final evaluation.")
    else:
        what = (f"Final {name} of each search’s winner, trained anew with another seed and evaluated on episodes that "
                f"took no part in choosing it; {direction} is better. Not the scores that the search chose by.")
    few = min((len(v) for v in compared.scores(env).values()), default=0)
    # From benchmarks/coverage.py, as in docs/benchmarks.md.
    narrow = () if few > 8 or few < 2 else (
        "Bootstrap intervals of few seeds are too narrow: one of 95 % in name covers the truth in about 73 % of cases "
        "with three seeds, 90 % with five and 93 % with eight. The tests do not have this fault.",)
    also = [f"{k}: {_num(float(v))}" for k, v in (
        ("doing nothing (or random actions)", s["final_doing_nothing"].astype(float).mean()),
        ("the expert’s encoder, trained the same way", s["final_expert"].astype(float).mean())) if np.isfinite(v)]
    out = [Section(
        f"Final ranking{suffix}", (what, *(["For comparison, mean over all searches: " + "; ".join(also) + "."]
                                           if also else []), *narrow),
        ("designer", "interquartile mean [95 %]", "mean", "seeds", "better than"),
        [(r.designer, _interval(r.iqm, r.low, r.high), _num(r.mean), str(r.seeds), r.better_than or "–")
         for r in ranking.itertuples()], frozenset({0, 4}),
        {_file(compared, env, "final"): f"Final {name} by designer"})]
    if compared.pairs[env]:
        least = compared.least_p(env)
        out.append(Section(
            f"Pairs{suffix}", (
                "Difference of the means, probability that a search with the first ends better than one with the "
                "second (both with 95 % bootstrap intervals), and p of the two-sided Mann–Whitney test, corrected for "
                "the number of pairs (Holm). One is called better where the corrected test and the interval of the "
                "difference agree at 5 %." + (
                    f" With so few seeds p cannot be below {least:.2g}: at least {compared.seeds_needed(env)} seeds "
                    "per designer are needed to tell anything apart." if least >= 0.05 else ""),),
            ("pair", "difference [95 %]", "P(first is better) [95 %]", "p", "says"),
            [(f"{c.a} – {c.b}", _interval(c.difference, c.low, c.high),
              f"{c.improvement:.2f} [{c.improvement_low:.2f}, {c.improvement_high:.2f}]", f"{c.p:.2g}",
              f"{c.better} is better" if c.better else "cannot be told apart") for c in compared.pairs[env]],
            frozenset({0, 4})))
    out.append(Section(
        f"Best so far{suffix}", (
            f"Best {name} so far by the scores that the searches chose by: interquartile mean over seeds, 95 % "
            "bootstrap bands. The best of many noisy scores is too good to be true; what it is worth is in the final "
            "ranking.",),
        pictures={_file(compared, env, "best_so_far"): "Best so far against candidates, environment steps and time"}))
    reached = compared.reached[compared.reached["environment"] == env]
    if len(reached):
        levels = list(dict.fromkeys(zip(reached["level"], reached["score"], strict=True)))
        rows = []
        for label in dict.fromkeys(reached["designer"]):
            part = {r.level: r for r in reached[reached["designer"] == label].itertuples()}
            rows.append((label, *(f"{_count(part[n].median)} ({part[n].share:.0%})" for n, _ in levels)))
        out.append(Section(
            f"Candidates needed{suffix}", (
                "Median over seeds of the candidates until the best score that the search chose by has reached a level "
                "(share of seeds that reach it); – where half or fewer do.",),
            ("designer", *(n if n == f"{v:g}" else f"{n}, {_num(v)}" for n, v in levels)), rows))
    return out


def _cost_section(compared: Compared, many: bool) -> Section:
    c = compared.costs
    llm = bool(c["requests"].any())
    head = ["designer", "environment steps", "of these its own training", "final trainings’ steps", "wall time"]
    head += ["LLM requests", "tokens in", "tokens out", "LLM time", "money"] if llm else []
    rows = []
    for r in c.to_dict("records"):
        row = [_who(r, many), f"{r['env_steps']:,.0f}", f"{r['env_steps_of_designer']:,.0f}",
               f"{r['env_steps_of_finals']:,.0f}", f"{r['seconds']:,.0f} s"]
        if llm:
            row += [f"{r[k]:,.0f}" for k in ("requests", "tokens_in", "tokens_out")]
            row += [f"{r['llm_seconds']:,.0f} s", "unknown" if np.isnan(r["us_dollars"]) else dollars(r["us_dollars"])]
        rows.append(row)
    return Section("What a search cost", ("Mean over seeds. Environment steps are those of candidates’ trainings and "
                                          "evaluations and of the designer’s own training; the final trainings come on "
                                          "top." + ("" if llm else " No language model was asked."),),
                   tuple(head), rows)


def _rate_section(compared: Compared, many: bool) -> Section:
    rows = [(_who(r, many), f"{r['proposals']:,}", f"{r['evaluated_rate']:.0%}", f"{r['duplicates_rate']:.0%}",
             f"{r['invalid_rate']:.0%}", f"{r['failed_rate']:.0%}") for r in compared.rates.to_dict("records")]
    return Section("Proposals", ("Over all seeds: proposals that were valid, that repeated an encoder, that were no "
                                 "encoder of the space or broke its limits; and of the valid ones, those whose "
                                 "training failed.",),
                   ("designer", "proposals", "valid", "duplicates", "invalid", "failed"), rows)


def _searches_section(compared: Compared, many: bool) -> Section:
    rows = []
    for r in compared.searches.to_dict("records"):
        gain = "–" if not np.isfinite(r["gain_over_expert"]) else _interval(
            r["gain_over_expert"], r["gain_low"], r["gain_high"])
        rows.append((_who(r, many), str(r["seed"]), "–" if r["winner"] is None else f"#{r['winner']:.0f}",
                     _num(r["winner_selection_score"]), _num(r["final_score"]), gain, str(r["run"])))
    return Section("All searches", ("Score that the winner was chosen by, and its final score; gain over the expert’s "
                                    "encoder on the same episodes, with a 95 % interval over the episodes.",),
                   ("designer", "seed", "winner", "chosen by", "final", "gain over the expert [95 %]", "folder"), rows,
                   frozenset({0, 6}))


def _how(compared: Compared) -> Section:
    config = dict(compared.entries[0].run.config)
    shown = _without_nothing({k: config.get(k) for keys in SAME.values() for k in keys})
    seeds = sorted({int(e.run.config.get("seed", 0)) for e in compared.entries})
    text = [f"Seeds of the searches: {', '.join(map(str, seeds))}."]
    if not compared.plain:
        about = compared.entries[0].run.versions
        text.append(f"A search with seed s trains its candidates with s and the final ones with s + 1. Episodes that "
                    f"choose begin at seed {about.get('eval_seed', '?')}, those that are reported at "
                    f"{about.get('final_eval_seed', '?')}.")
    packages = compared.entries[0].run.versions.get("packages") or {}
    text.append("Versions: " + ", ".join(f"{k} {v}" for k, v in packages.items()) + "; "
                f"{compared.entries[0].run.versions.get('platform', '')}, git "
                f"{compared.entries[0].run.versions.get('git') or 'unknown'}.")
    if (compared.folder / FILE).exists():
        text.append(f"To repeat it: lacer compare {shlex.quote(str(compared.folder / FILE))} --out NEW_FOLDER")
    text.append("What all searches share" + (f" ({compared.envs[0]})" if compared.envs[0] else "") + ":\n" + str(
        yaml.safe_dump(json.loads(json.dumps(shown, default=str)), sort_keys=False, width=100,
                       default_flow_style=None)).rstrip())
    return Section("How it was made", tuple(text))


def _without_nothing(data: Any) -> Any:
    """Plain data without fields that are not set."""
    if not isinstance(data, dict):
        return data
    return {k: v for k, v in ((k, _without_nothing(v)) for k, v in data.items()) if v not in (None, {}, [])}


def _problems(compared: Compared) -> list[str]:
    out = []
    for r in compared.searches.to_dict("records"):
        if r["final_problem"]:
            out.append(f"{r['run']} has no final score and is missing from the ranking: "
                       f"{str(r['final_problem'])[:200]}")
        if r["ended"]:
            out.append(f"{r['run']} ended early: {r['ended']}.")
    return out[:20] + ([f"and {len(out) - 20} more such searches, see searches.csv"] if len(out) > 20 else [])


def _who(r: dict[str, Any], many: bool) -> str:
    return f"{r['designer']} ({r['environment']})" if many else str(r["designer"])


def _num(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return "–"
    return f"{x:,.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def _count(x: float) -> str:
    return f"{x:.0f}" if math.isfinite(x) else "–"


def _interval(x: float, low: float, high: float) -> str:
    return f"{_num(x)} [{_num(low)}, {_num(high)}]"


# -- pages ------------------------------------------------------------------------------------------------------------


def markdown(title: str, parts: Sequence[Section]) -> str:
    """The page as Markdown, with the pictures as links."""
    lines = [f"# {_cell(title)}"]
    for p in parts:
        lines += ["", f"## {_cell(p.title)}"]
        for text in p.text:
            first, _, rest = text.partition("\n")
            lines += ["", _cell(first), *(["", *("    " + line for line in rest.splitlines())] if rest else [])]
        if p.rows:
            lines += ["", *markdown_table([_cell(h) for h in p.head], [[_cell(c) for c in r] for r in p.rows])]
        for name, what in p.pictures.items():
            lines += ["", f"![{_cell(what)}]({name}.svg)"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    plain = " ".join(clean(text).split())
    return "".join("\\" + c if c in "|<>[]`" else c for c in plain)


def html(title: str, parts: Sequence[Section], folder: Path) -> str:
    """The page as one self-contained HTML file without scripts; pictures are in it."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                             undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    images = {n: base64.b64encode((folder / f"{n}.svg").read_bytes()).decode() for p in parts for n in p.pictures}
    return clean(env.get_template("comparison.html").render(title=title, parts=parts, images=images))


# -- pictures ---------------------------------------------------------------------------------------------------------


def _file(compared: Compared, env: str, name: str) -> str:
    """Name of a picture's file without its suffix."""
    if len(compared.envs) == 1:
        return name
    return f"{compared.envs.index(env) + 1:02}-{name}"


def pictures(compared: Compared) -> None:
    """Writes all pictures as SVG and PNG. Raises OSError."""
    colours = {n: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--") for i, n in enumerate(compared.labels)}
    style: Any = {"font.size": 9.5, "svg.hashsalt": "lacer", "axes.spines.top": False, "axes.spines.right": False,
             "legend.frameon": False, "text.parse_math": False}
    with mpl.rc_context(style):
        for env in compared.envs:
            _best_so_far(compared, env, colours)
            _final(compared, env, colours)
        if len(compared.profiles):
            _profiles(compared, colours)


def _save(figure: Figure, compared: Compared, name: str) -> None:
    figure.savefig(compared.folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(compared.folder / f"{name}.png", dpi=150)


def _band(axes: Axes, x: Any, y: Any, low: Any, high: Any, label: str, colour: tuple[str, str]) -> None:
    axes.plot(x, y, colour[1], color=colour[0], label=label, linewidth=1.8)
    axes.fill_between(x, low, high, color=colour[0], alpha=0.16, linewidth=0)


def _best_so_far(compared: Compared, env: str, colours: dict[str, tuple[str, str]]) -> None:
    curves, o = compared.curves, compared.objectives[env]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, what) in zip(panels, AXES.items(), strict=True):
        for label in compared.labels:
            c = curves[(curves["environment"] == env) & (curves["designer"] == label) & (curves["axis"] == axis)]
            if len(c):
                _band(axes, c["x"], c["iqm"], c["low"], c["high"], label, colours[label])
        axes.set_xlabel(what.replace(", ", ",\n"))
        axes.set_xlim(left=1 if axis == "candidates" else 0)
        if axis == "candidates":
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep="") if axis == "env_steps" else
                                           mpl.ticker.ScalarFormatter())
    panels[0].set_ylabel(f"best {o.metric.replace('_', ' ')} so far" + (f" ({o.unit})" if o.unit else "")
                         + "\n(scores that choose)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6) or 1)
    _save(figure, compared, _file(compared, env, "best_so_far"))


def _final(compared: Compared, env: str, colours: dict[str, tuple[str, str]]) -> None:
    """A row a designer: every search a dot, interquartile mean and interval as a bar."""
    ranking = compared.ranking[compared.ranking["environment"] == env].reset_index(drop=True)
    scores, o = compared.scores(env), compared.objectives[env]
    s = compared.searches[compared.searches["environment"] == env]
    figure = Figure(figsize=(7.5, 1.3 + 0.5 * max(1, len(ranking))), layout="constrained")
    axes = figure.subplots()
    for y, r in enumerate(ranking.itertuples()):
        v, colour = np.sort(scores[r.designer]), colours[r.designer][0]
        axes.plot(v, y + 0.18 * np.where(np.arange(len(v)) % 2, 1, -1) * (len(v) > 1), "o", color=colour, alpha=0.45,
                  markersize=4.5, markeredgewidth=0)
        if math.isfinite(r.low):
            axes.plot([r.low, r.high], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(r.iqm, y, "D", color=colour, markersize=6.5, markeredgecolor="white")
    for column, name, dash in (("final_doing_nothing", "doing nothing", ":"), ("final_expert", "expert", "--")):
        mean = s[column].astype(float).mean()
        if np.isfinite(mean):
            axes.axvline(mean, color="#555555", linewidth=1, linestyle=dash, label=name)
    axes.set_yticks(range(len(ranking)), list(ranking["designer"]))
    axes.set_ylim(len(ranking) - 0.5, -0.5)
    axes.set_xlabel(("final " if not compared.plain else "best ") + o.metric.replace("_", " ")
                    + (f" ({o.unit})" if o.unit else "") + ": searches, interquartile mean, 95 % interval")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    _save(figure, compared, _file(compared, env, "final"))


def _profiles(compared: Compared, colours: dict[str, tuple[str, str]]) -> None:
    many, o = len(compared.envs) > 1, compared.objectives[compared.envs[0]]
    more = many or compared.sign(compared.envs[0]) > 0
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(compared.profiles["designer"]):
        p = compared.profiles[compared.profiles["designer"] == label]
        _band(axes, p["score"], p["share"], p["low"], p["high"], label, colours[label])
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    unit = f" ({o.unit})" if o.unit else ""
    what = "normalised final score" if many else (
        f"{'best' if compared.plain else 'final'} {o.metric.replace('_', ' ')}{unit}")
    axes.set_xlabel(f"x: {what}")
    axes.set_ylabel(f"searches whose winner\nscores {'more' if more else 'less'} than x")
    axes.legend()
    _save(figure, compared, "profiles")
