"""What a comparison over a table shows: files, a summary in words and numbers, and a picture."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lacer.search.files import write_whole

if TYPE_CHECKING:
    from lacer.search.bench import Result

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
"""Okabe and Ito's, which people with colour-blindness can tell apart."""


def write(result: Result) -> None:
    """Writes all files of a comparison. Raises OSError."""
    folder, frame = result.folder, result.frame()
    if importlib.util.find_spec("pyarrow"):
        frame.to_parquet(folder / "results.parquet", index=False)
    else:
        frame.to_csv(folder / "results.csv.gz", index=False)
    result.curve_table.to_csv(folder / "curves.csv", index=False)
    result.quantile_table.to_csv(folder / "quantiles.csv", index=False)
    pairs = [{"evaluation": p, **asdict(c), "better": c.better} for p in result.checkpoints
             for c in result.pairs[p]]
    pd.DataFrame(pairs).to_csv(folder / "pairwise.csv", index=False)
    write_whole(folder / "summary.md", summary(result))
    write_whole(folder / "summary.json", json.dumps(figures(result), indent=1) + "\n")
    picture(result)


def figures(result: Result) -> dict[str, Any]:
    """The comparison's figures as plain data."""
    curves = result.curve_table
    at = curves[curves["evaluation"].isin(result.checkpoints)]
    return {"title": result.title, "seeds": result.config.seeds, "budget": result.config.budget,
            "optimum": result.optimum, "llm": result.config.llm,
            "usage": {n: u for n in result.names if (u := result.usage(n))},
            "designers": {n: {str(r["evaluation"]): {k: _plain(r[k]) for k in ("mean", "low", "high", "iqm")}
                              for _, r in at[at["designer"] == n].iterrows()} for n in result.names},
            "reached": {n: {str(r["quantile"]): {k: _plain(r[k]) for k in ("share", "median", "p80")}
                            for _, r in result.quantile_table.query("designer == @n").iterrows()}
                        for n in result.names},
            "pairwise": {str(p): [{**asdict(c), "better": c.better} for c in result.pairs[p]]
                         for p in result.checkpoints}}


def _plain(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def summary(result: Result) -> str:
    """The comparison in Markdown."""
    c, curves = result.config, result.curve_table
    best = "" if result.optimum is None else f" Best of the table: {_num(result.optimum)}."
    lines = [f"# {result.title}", "",
             f"{len(result.names)} designers, {c.seeds} seeds from {c.seed}, {c.budget} evaluations each; "
             f"{'lower' if result.direction == 'minimize' else 'higher'} is better.{best}", "",
             "What is reported of the best architecture so far: mean [95 % bootstrap interval over seeds].", ""]
    rows = []
    for name in result.names:
        cells = [name]
        for p in result.checkpoints:
            r = curves[(curves["designer"] == name) & (curves["evaluation"] == p)].iloc[0]
            cells.append(f"{_num(r['mean'])} [{_num(r['low'])}, {_num(r['high'])}]")
        rows.append(cells)
    lines += markdown_table(["designer", *(f"after {p}" for p in result.checkpoints)], rows)
    reached = result.quantile_table
    if len(reached):
        lines += ["", "Evaluations needed to reach the best part of the table: median over seeds (share that reached "
                      "it).", ""]
        lines += markdown_table(["designer", *(_part(q) for q in result.quantiles)], [
            [n, *(f"{_times(r['median'])} ({r['share']:.0%})" for _, r in reached[reached["designer"] == n].iterrows())]
            for n in result.names])
    for p in result.checkpoints[-1:]:
        pairs = result.pairs[p]
        if pairs:
            lines += ["", f"After {p} evaluations, pairs of designers (Mann-Whitney test, corrected by Holm):", ""]
            lines += markdown_table(["pair", "difference [95 %]", "P(first is better)", "p", "says"], [
                [f"{x.a} – {x.b}", f"{_num(x.difference)} [{_num(x.low)}, {_num(x.high)}]", f"{x.improvement:.2f}",
                 f"{x.p:.2g}", f"{x.better} is better" if x.better else "cannot be told apart"] for x in pairs])
    early = {n: sum(len(r.ncode) < c.budget for r in result.runs if r.designer == n) for n in result.names}
    if any(early.values()):
        lines += ["", "Ended early, because all was seen or the designer only repeated itself: " + ", ".join(
            f"{n} {k} of {c.seeds} runs" for n, k in early.items() if k) + "."]
    for n in result.names:
        u = result.usage(n)
        if u:
            cost = f", {u['cost']:.4g} US dollars" if u["cost"] else ""
            lines += ["", f"{n} asked {c.llm}, per run: {u['requests']:.4g} requests, {u['tokens_in']:,.0f} tokens in, "
                          f"{u['tokens_out']:,.0f} out, {u['seconds']:.4g} s{cost}; {u['others']:.3g} evaluations were "
                          "proposed by the fallback."]
    return "\n".join(lines) + "\n"


def _part(q: float) -> str:
    return "best one" if q == 1 else f"top {100 * (1 - q):.3g} %"


def _times(x: float) -> str:
    return f"{x:.0f}" if np.isfinite(x) else "–"


def _num(x: float) -> str:
    return "–" if not np.isfinite(x) else f"{x:.5g}" if abs(x) < 1e6 else f"{x:.3e}"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(x.ljust(w) for x, w in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]


def picture(result: Result) -> None:
    """Writes ``curves.png``: the best so far against evaluations, with 95 % bands. Raises OSError."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    curves = result.curve_table
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    with mpl.rc_context({"font.size": 10}):
        for i, name in enumerate(result.names):
            part = curves[curves["designer"] == name]
            colour, style = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
            axes.plot(part["evaluation"], part["mean"], style, color=colour, label=name, linewidth=1.8)
            axes.fill_between(part["evaluation"], part["low"], part["high"], color=colour, alpha=0.2, linewidth=0)
        if result.optimum is not None:
            axes.axhline(result.optimum, color="#555555", linewidth=1, linestyle=":")
            axes.annotate("best of the table", (result.config.budget, result.optimum), xytext=(0, 3), ha="right",
                          textcoords="offset points", color="#555555", fontsize=8)
        # The first evaluations are random draws and would take most of the height.
        start = max(0, min(10, result.config.budget // 5) - 1)
        late = curves[curves["evaluation"] > start]
        values = [*late["low"].dropna(), *late["high"].dropna()]
        values += [] if result.optimum is None else [result.optimum]
        if values:
            margin = 0.05 * (max(values) - min(values) or 1.0)
            axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.set_xlim(1, max(2, result.config.budget))
        axes.set_xlabel("evaluations")
        axes.set_ylabel("best so far")
        axes.set_title(f"{result.title}: mean of {result.config.seeds} seeds, 95 % bands", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(result.folder / "curves.png", dpi=150)
