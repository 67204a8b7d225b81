"""``lacer watch``: follows a search that another process runs, reading only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lacer.envs import LacerError
from lacer.search.export import COMPARISON
from lacer.search.loop import is_driven
from lacer.search.outcome import EXPERT, NOOP, WINNER
from lacer.search.progress import clock
from lacer.search.runs import StoredRun, StoredTrial, StudyReader, read_run, read_study

Say = Callable[[str], None]

IDLE = 15.0
"""Seconds in which no process is working on a comparison, after which it is taken to be left: one may be starting."""


def watch(place: str, say: Say, *, study_name: str | None = None, interval: float = 1.0,
          wait: Callable[[float], None] = time.sleep) -> bool:
    """Says what has happened in a search so far and what happens from now on, until it ends.

    Args:
        place: a run folder, a comparison's folder, or a storage URL.
        say: is given every line.
        study_name: with a URL: the study; not needed where there is one only.
        interval: seconds between two looks.
        wait: waits; for tests.

    Returns:
        Whether the search has finished; False where its process has ended before that.

    Raises:
        LacerError: no such run or study; it cannot be read.
    """
    if "://" in place:
        with StudyReader(place, study_name) as reader:
            config: dict[str, Any] = {}
            return _follow(reader, reader.name, config, lambda: True, say, interval, wait)
    folder = Path(place)
    if (folder / COMPARISON).exists():
        return _watch_comparison(folder, say, interval, wait)
    return _watch_folder(folder, say, interval, wait)


def _watch_folder(folder: Path, say: Say, interval: float, wait: Callable[[float], None], prefix: str = "") -> bool:
    run = _begun(folder, interval, wait)
    if run is None:
        return False
    config = dict(run.config)
    url = str(config.get("storage") or f"sqlite:///{(folder / 'study.db').resolve()}")
    name = str(config["study_name"]) if config.get("storage") else None
    with StudyReader(url, name) as reader:
        return _follow(reader, str(folder), config, lambda: is_driven(folder), lambda text: say(prefix + text),
                       interval, wait)


def _begun(folder: Path, interval: float, wait: Callable[[float], None]) -> StoredRun | None:
    """The run, once its study is there; None if its process ended before that."""
    while True:
        driven = is_driven(folder)
        try:
            return read_run(folder)
        except LacerError:
            if not driven:
                raise
        wait(interval)


def _watch_comparison(folder: Path, say: Say, interval: float, wait: Callable[[float], None]) -> bool:
    from lacer.search.compare import is_compared, is_finished, read_comparison

    searches = read_comparison(folder).searches()
    told, idle = set[str](), 0.0
    while True:
        finished = [s for s in searches if is_finished(s.folder(folder), s.placed(folder))]
        for s in finished:
            if s.name not in told:
                told.add(s.name)
                say(f"[{len(told)}/{len(searches)}] {s.name}: {_result(read_run(s.folder(folder)))}")
        if len(finished) == len(searches):
            say(f"All {len(searches)} searches are finished.")
            return True
        running = next((s for s in searches if s not in finished and is_driven(s.folder(folder))), None)
        if running is not None:
            idle = 0.0
            if _watch_folder(running.folder(folder), say, interval, wait, f"{running.name}: "):
                told.add(running.name)
            continue
        if is_compared(folder):
            idle = 0.0
        elif idle >= IDLE:
            say(f"No process of this machine is working on it; {len(finished)} of {len(searches)} searches are "
                f"finished. To go on: lacer compare --resume {folder}")
            return False
        wait(interval)
        idle += interval


def _follow(reader: StudyReader, place: str, config: dict[str, Any], driven: Callable[[], bool], say: Say,
            interval: float, wait: Callable[[float], None]) -> bool:
    told, finals = set[int](), set[str]()
    objective, best, of = reader.objective, None, config.get("candidates")
    sign = objective.signed(1.0)
    done = 0
    while True:
        alive = driven()  # before reading, so that nothing that it wrote last is missed
        attrs = reader.attrs()
        states = reader.states()
        new = [n for n, state in states.items() if n not in told and state != "RUNNING"]
        for t in reader.trials(new):
            told.add(t.trial.number)
            if t.trial.status != "rejected":
                done += 1
            value = t.trial.objective
            if value is not None and (best is None or sign * value > sign * best[0]):
                best = (value, t.trial.number)
            say(_line(t, objective.metric, done, of)
                + (f"  [best {best[0]:.3f} (#{best[1]})]" if best is not None and value is not None else ""))
        for name in (NOOP, EXPERT, WINNER):
            if attrs.get(name) and name not in finals:
                finals.add(name)
                e = attrs[name]
                say(f"  final: {name}: " + (f"{objective.metric} {e['objective']:.3f}" if e.get("objective") is not None
                                            else f"failed: {e.get('reason')}"))
        if attrs.get("finished") is not None:
            run = read_study(reader, place, config, {})
            say(f"Finished after {clock(run.seconds)}: {_result(run)}" + (f" ({run.ended})" if run.ended else ""))
            return True
        if not alive:
            say(f"No process of this machine is working on it; {done} candidates are done. To go on: lacer search "
                f"--resume {place}")
            return False
        wait(interval)


def _line(t: StoredTrial, metric: str, done: int, of: Any) -> str:
    """One line for a trial that has ended."""
    p, e = t.trial.proposal, t.trial.evaluation
    if t.trial.status == "rejected":
        return f"        #{t.trial.number} rejected ({p.designer}): {t.trial.reason[:160]}"
    count = f"{done:>3}/{of}" if of else f"{done:>3}"
    if t.trial.objective is None or e is None:
        return f"{count} #{t.trial.number} {t.trial.status}: {t.trial.reason[:160]}"
    blocks = "" if t.encoder is None else "  " + ", ".join(
        f"{name} {block.get('block', '?')}" for name, block in [*t.encoder.get("sources", {}).items(),
                                                                ("fusion", t.encoder.get("fusion", {}))])
    return f"{count} #{t.trial.number} {metric} {t.trial.objective:.3f} ({p.designer}){blocks or _point(p.point)}"


def _point(point: Any) -> str:
    return "  " + json.dumps(point)[:120] if point else ""


def _result(run: StoredRun) -> str:
    winner, final = run.winner, run.finals.get(WINNER)
    if winner is None:
        return "no candidate has a result"
    chosen = f"winner #{winner.trial.number}, chosen by {run.objective.metric} {winner.trial.objective:.3f}"
    return chosen + (f", final {final.objective:.3f}" if final is not None and final.objective is not None else "")
