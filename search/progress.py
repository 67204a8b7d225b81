"""What a person sees in the terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lacer.envs import TaskCard
from lacer.search.outcome import Outcome
from lacer.search.study import Study, Trial


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    s = round(seconds)
    return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


class Display:
    """Live progress in a terminal, plain lines elsewhere, nothing with ``quiet``.

    Args:
        card: the task, for the metric's name and unit.
        total_steps: environment steps of all training runs planned; the time left follows from it.
        live: False: plain lines in a terminal too, because somebody types there.
    """

    def __init__(self, card: TaskCard, total_steps: int, quiet: bool = False, live: bool = True) -> None:
        self.card, self.total, self.quiet = card, max(total_steps, 1), quiet
        self.console = Console(stderr=True, highlight=False)
        self.live_mode = self.console.is_terminal and live and not quiet
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                              TextColumn("{task.fields[note]}"), console=self.console)
        self._overall = self._bars.add_task("search", total=self.total, note="")
        self._tasks: dict[str, TaskID] = {}
        self._done = 0  # steps of finished runs
        self._running: dict[str, int] = {}  # steps so far
        self._start, self._first = time.monotonic(), 0
        self._headline = ""
        self._lock = threading.RLock()  # the designer reports from a thread of its own
        self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)
        if self.live_mode:
            self._live.start()

    def _view(self) -> Group:
        return Group(Text(self._headline), self._bars)

    def skip(self, steps: int) -> None:
        """Steps that an earlier session of a resumed search has done."""
        self._done += steps
        self._first += steps

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def headline(self, text: str) -> None:
        """The line above the bars, e.g. ``candidate 3 of 8, best 18.2 m/s``."""
        with self._lock:
            self._headline = text
            self._refresh()

    def started(self, key: str, label: str, steps: int) -> None:
        """A run has started."""
        with self._lock:
            self._tasks[key] = self._bars.add_task(f"  {label}"[:46].ljust(46), total=steps, note="starting")
            self._refresh()

    def progress(self, key: str, p: Mapping[str, Any]) -> None:
        """News of a run."""
        with self._lock:
            self._running[key] = int(p["steps"])
            if key in self._tasks:
                value = "" if p.get("return") is None else f", return {p['return']:.2f}"
                note = f"{p['steps_per_second']:.0f} steps/s{value}"
                self._bars.update(self._tasks[key], completed=p["steps"], note=note)
            self._refresh()

    def ended(self, key: str, steps: int, text: str) -> None:
        """A run has ended; ``steps`` of training count as done even if it failed early."""
        with self._lock:
            self._done += steps
            self._running.pop(key, None)
            task = self._tasks.pop(key, None)
            if task is not None:
                self._bars.remove_task(task)
            if text:
                self.say(text + ("" if self.live_mode else f"  [{self._note()}]"))
            self._refresh()

    def _note(self) -> str:
        now = self._done + sum(self._running.values())
        elapsed, fresh = time.monotonic() - self._start, now - self._first
        left = f", about {clock(elapsed / fresh * max(0, self.total - now))} left" if fresh > 0 else ""
        return f"{clock(elapsed)} gone{left}, {fresh / elapsed:.0f} steps/s"

    def _refresh(self) -> None:
        now = self._done + sum(self._running.values())
        self._bars.update(self._overall, completed=min(now, self.total), note=self._note())
        if self.live_mode:
            self._live.update(self._view())

    def close(self) -> None:
        """Removes the live part."""
        if self.live_mode:
            self._live.stop()


class PointDisplay:
    """One bar, or where there is no terminal a line for every twentieth, for many short evaluations.

    Args:
        study: the search.
        candidates: how many there will be.
        live: False: no bar, because somebody types in the terminal.
    """

    def __init__(self, study: Study, candidates: int, quiet: bool = False, live: bool = True) -> None:
        console = Console(stderr=True, highlight=False)
        self._study, self._of = study, candidates
        self._console = None if quiet or console.is_terminal else console
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                             TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(), console=console,
                             transient=True, disable=quiet or not live or not console.is_terminal)
        self._task = self._bar.add_task("search", total=candidates, completed=study.count("ok", "failed", "pruned"))
        self._bar.start()

    def finished(self, trial: Trial) -> None:
        """A candidate has ended."""
        best = self._study.best
        name = self._study.objective.metric.replace("_", " ")
        text = "" if best is None else f"best {name} {self._study.best_value:.5g} (#{best.number})"
        if trial.status == "failed" and best is None:
            text = f"#{trial.number} failed: {trial.reason[:160]}"
        self._bar.update(self._task, advance=1, description=text)
        done = self._study.count("ok", "failed", "pruned")
        if self._console is not None and done % max(1, self._of // 20) == 0:
            task = self._bar.tasks[0]
            left = f", about {clock(task.time_remaining)} left" if task.time_remaining else ""
            self._console.print(f"{done}/{self._of} {text}{left}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()


def result_line(trial: Trial, card: TaskCard, of: int, done: int) -> str:
    """One line for a finished trial."""
    o = card.objective
    if trial.objective is None:
        return f"{done:>3}/{of} #{trial.number} {trial.status}: {trial.reason[:160]}"
    assert trial.evaluation is not None
    assert trial.spec is not None
    unit = f" {o.unit}" if o.unit else ""
    also = "" if o.metric == "return" else f"  return {trial.evaluation.mean_return:.2f}"
    return f"{done:>3}/{of} #{trial.number} {o.metric} {trial.objective:.3f}{unit}{also}  {trial.spec.short()}"


def candidate_table(outcome: Outcome, limit: int = 30) -> Table:
    """The candidates, best first, by number: encoder in short, task metric, return, two probes per source, parameters,
    seconds.

    Each source's column shows its block over its normalised effective rank and its linear-probe R2.
    """
    o = outcome.card.objective
    table = Table(title=f"{outcome.card.env_id}: candidates (per source: block, effective rank / linear-probe R2)",
                  title_justify="left", header_style="bold", pad_edge=False)
    twice = o.metric == "return"
    for name in ("#", o.metric.replace("_", " ") + (f" ({o.unit})" if o.unit else ""), *([] if twice else ["return"])):
        table.add_column(name, justify="right")
    for source in [*outcome.card.sources, "fusion"]:
        table.add_column(source, overflow="fold")
    table.add_column("param.", justify="right")
    table.add_column("s", justify="right")
    for t in outcome.ranked()[:limit]:
        e = t.evaluation
        cells: list[str | Text] = []
        for source in outcome.card.sources:
            block = t.spec.sources.get(source) if t.spec else None
            cells.append(Text(f"{block.block}\n{_probes(e, source)}" if block else "–", style="" if block else "dim"))
        cells.append(Text(f"{t.spec.fusion.block}\n{_probes(e, 'fused')}" if t.spec else "–"))
        if t.objective is not None and e is not None:
            table.add_row(str(t.number), f"{t.objective:.3f}", *([] if twice else [f"{e.mean_return:.2f}"]), *cells,
                          f"{e.cost.parameters:,}", f"{e.cost.total_seconds:.0f}",
                          style="bold" if t.number == outcome.winner else "")
        else:
            table.add_row(str(t.number), Text(t.status, style="red"), *([] if twice else [""]), *cells, "", "")
    if len(outcome.trials) > limit:
        table.caption = f"{len(outcome.trials) - limit} more in report.html"
    return table


def _probes(evaluation: Any, source: str) -> str:
    p = evaluation.probes.get(source, {}) if evaluation is not None else {}
    if not p:
        return ""
    return "/".join(f"{p[k]:.2f}" if k in p else "–" for k in ("effective_rank", "linear_probe"))
