"""Designers over a table of measured architectures, or over a function: many seeds, in seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lacer.agents import Call
from lacer.agents.calls import call, find
from lacer.agents.stats import Array, Comparison, bootstrap, compare, hitting_times, iqm
from lacer.envs import LacerError, Objective
from lacer.search.config import BenchConfig, LLMFields, SearchConfig, memory_share, worker_count
from lacer.search.designers.base import designer_class, make_plain
from lacer.search.engine import MAX_REJECTIONS
from lacer.search.executors import Executor, InProcess, ProcessPool
from lacer.search.files import read_json, write_whole
from lacer.search.llm.transcript import TRANSCRIPT
from lacer.search.space import SearchSpace
from lacer.search.study import USAGE, Study
from lacer.search.tables import Table, read_table

if TYPE_CHECKING:
    from lacer.search.designers.base import Designer

QUANTILES = (0.9, 0.99, 0.999, 1.0)
"""Shares of a table's architectures that are to be reached; 1: its best one."""


@dataclass(frozen=True)
class Function:
    """A function instead of a table.

    Attributes:
        name: ``module:name``.
        space: what it takes.
        direction: of its scores.
    """

    name: str
    space: SearchSpace
    direction: str


def names_of(config: BenchConfig) -> list[str]:
    """The designers to compare, each checked. Raises LacerError."""
    names = [n.strip() for n in config.designers.split(",") if n.strip()]
    if not names or len(set(names)) < len(names):
        raise LacerError(f"--designers {config.designers!r}: give at least one, and none twice")
    for name in names:
        cls = designer_class(name)
        if cls.trains or not cls.any_space:
            raise LacerError(f"the designer {name!r} searches encoders for an environment, not tables or functions; "
                             "see `lacer designers` for others")
        if cls.needs_llm and not config.llm:
            raise LacerError(f"the designer {name!r} needs an LLM: add e.g. --llm openai:MODEL or --llm replay:FILE")
    return names


def _check_models(config: BenchConfig, names: list[str]) -> None:
    """Raises LacerError for a model that cannot be asked, before anything is run."""
    asking = [n for n in names if designer_class(n).needs_llm]
    llm = config.llm or ""
    if asking and llm.startswith("replay:") and ((config.seeds > 1 and "{seed}" not in llm)
                                                 or (len(asking) > 1 and "{designer}" not in llm)):
        raise LacerError(f"--llm {llm}: a transcript is that of one run; name all with {{designer}} and {{seed}}, e.g. "
                         f"replay:OTHER/llm/{{designer}}-{{seed}}/{TRANSCRIPT}")
    for name in asking:
        for seed in range(config.seed, config.seed + config.seeds):
            _designer(config, name, seed, None)


def checkpoints_of(config: BenchConfig) -> list[int]:
    """Numbers of evaluations at which designers are compared. Raises LacerError."""
    try:
        given = sorted({int(p) for p in config.checkpoints.split(",") if p.strip()})
    except ValueError:
        raise LacerError(f"--checkpoints {config.checkpoints!r}: numbers of evaluations, e.g. 24,48,100") from None
    if any(not 1 <= p <= config.budget for p in given):
        raise LacerError(f"--checkpoints {config.checkpoints!r} must lie between 1 and the budget, {config.budget}")
    return given or sorted({max(1, config.budget // 4), max(1, config.budget // 2), config.budget})


def source_of(config: BenchConfig) -> Table | Function:
    """What is searched. Raises LacerError if it cannot be read."""
    if (config.table is None) == (config.function is None):
        raise LacerError("give either --table FILE, or --function module:name with --space module:name")
    if config.function is not None:
        if config.space is None:
            raise LacerError("--function needs --space module:name, a SearchSpace")
        space = find(config.space)
        if not isinstance(space, SearchSpace):
            raise LacerError(f"{config.space} is no SearchSpace but {type(space).__name__}")
        find(config.function)
        return Function(config.function, space, "minimize" if config.minimize else "maximize")
    assert config.table is not None
    return read_table(config.table, [c.strip() for c in config.arch.split(",")], config.score, config.test_score,
                      where=config.where, minimize=config.minimize, repeated=config.repeated,
                      variable_length=config.variable_length, bins=config.bins, rank=config.rank)


@dataclass(frozen=True)
class Run:
    """One designer with one seed; every list has one entry per evaluation.

    Attributes:
        ncode: architectures, in the order of their evaluation.
        score: what guided the search; None for a failed evaluation.
        reported: what is reported of them.
        best: what is reported of the one with the best guiding score so far; None as long as all failed.
        usage: what a language model took for the run: the fields of ``Trial.usage``, and ``others``, evaluations that
            its fallback proposed. Empty without a model.
    """

    designer: str
    seed: int
    ncode: list[str]
    score: list[float | None]
    reported: list[float | None]
    best: list[float | None]
    usage: dict[str, float] = field(default_factory=dict)


def play(designer: Designer, source: Table | Function, budget: int, seed: int, name: str) -> Run:
    """Lets a designer search: ask, look up, tell.

    Repeated and invalid proposals cost nothing and are not counted; after ``MAX_REJECTIONS`` of them in a row, or when
    all has been seen, the run ends early.
    """
    study = Study(source.space, Objective("score", "", source.direction))  # type: ignore[arg-type]
    function = find(source.name) if isinstance(source, Function) else None
    rng = np.random.default_rng([seed, 77])
    run = Run(name, seed, [], [], [], [])
    rejections = 0
    while len(run.ncode) < budget and rejections < MAX_REJECTIONS and len(run.ncode) < source.space.size():
        for proposal in designer.propose(study, 1):
            point = proposal.point
            if proposal.rejected or point is None or study.evaluated(study.space.to_ncode(point)) is not None:
                rejections += 1
                if proposal.rejected:
                    study.reject(proposal)
                continue
            rejections = 0
            trial = study.start(proposal)
            if isinstance(source, Table):
                measured = source.scores[trial.ncode]
                result = source.evaluation(trial.ncode, int(rng.integers(len(measured))) if len(measured) > 1 else 0)
                score: float | None = result.objective
                shown: float | None = source.reported[trial.ncode]
            else:
                assert function is not None
                result = call(function, point, seed)
                score = shown = result.objective
            designer.observe(study.finish(trial.number, result))
            run.ncode.append(trial.ncode)
            run.score.append(score)
            run.reported.append(shown)
            best = study.best
            if best is None:
                run.best.append(None)
            else:
                run.best.append(source.reported[best.ncode] if isinstance(source, Table) else best.objective)
    if designer.needs_llm:
        for key in USAGE:
            run.usage[key] = sum(t.usage.get(key, 0.0) for t in study.trials)
        run.usage["others"] = sum(t.status != "rejected" and t.proposal.designer != designer.name for t in study.trials)
    return run


def normalised(run: Run, table: Table) -> Run:
    """A run's reported scores, with 0 the mean of the table's architectures and 1 its best."""
    zero, one = float(table.ordered.mean()), float(table.ordered[0])
    scale = one - zero or 1.0
    move = [[None if v is None else (v - zero) / scale for v in values] for values in (run.reported, run.best)]
    return replace(run, reported=move[0], best=move[1])


def play_part(point: dict[str, Any]) -> float:
    """Plays some seeds of one designer and writes them into a file; what a worker process is called for.

    Args:
        point: ``config``, a BenchConfig as JSON; ``designer``; ``seeds``; ``file``.
    """
    config = BenchConfig.model_validate_json(point["config"])
    source = _source(point["config"])
    runs = []
    for seed in point["seeds"]:
        runs.append(_run(config, source, point["designer"], seed, Path(point["file"]).parent.parent))
    write_whole(Path(point["file"]), json.dumps({"runs": [asdict(r) for r in runs]}))
    return 1.0


def _run(config: BenchConfig, source: Table | Function, name: str, seed: int, folder: Path) -> Run:
    searched = source
    if config.prune_seeds:
        assert isinstance(source, Table)
        searched = source.pruned(np.random.default_rng([seed, 78]))
    run = play(_designer(config, name, seed, folder), searched, config.budget, seed, name)
    return normalised(run, searched) if config.prune_seeds and isinstance(searched, Table) else run


@cache
def _source(config: str) -> Table | Function:
    return source_of(BenchConfig.model_validate_json(config))


def _designer(config: BenchConfig, name: str, seed: int, folder: Path | None) -> Designer:
    if not designer_class(name).needs_llm:
        return make_plain(name, seed)
    from lacer.search.loop import make_designer

    given = config.model_dump(include=set(LLMFields.model_fields))
    given["llm"] = given["llm"].replace("{designer}", name).replace("{seed}", str(seed))
    if folder is not None:
        folder = folder / "llm" / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRANSCRIPT).unlink(missing_ok=True)  # a run that was interrupted begins anew
    return make_designer(name, SearchConfig(designer=name, seed=seed, **given), folder)


@dataclass(frozen=True)
class Result:
    """What :func:`bench` returns.

    Attributes:
        config: what was run.
        folder: where it is.
        title: of the table or function.
        runs: all of them.
        optimum: the best reported score of the table; None if it is not known.
        quantiles: reported scores that the best 10 %, 1 %, 0.1 % and the best architecture of a table have.
        direction: of the scores.
    """

    config: BenchConfig
    folder: Path
    title: str
    runs: list[Run]
    optimum: float | None
    quantiles: dict[float, float]
    direction: str

    @property
    def names(self) -> list[str]:
        """The designers."""
        return names_of(self.config)

    @property
    def checkpoints(self) -> list[int]:
        """Evaluations at which they are compared."""
        return checkpoints_of(self.config)

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.direction == "maximize" else -1.0

    def curves(self, designer: str) -> Array:
        """What is reported of the best architecture so far, shape (seeds, budget). A run that ended early keeps its
        last value; NaN as long as all evaluations of a run have failed."""
        rows = [r.best for r in self.runs if r.designer == designer]
        return np.array([[np.nan if v is None else v for v in row] + [np.nan if row[-1] is None else row[-1]]
                         * (self.config.budget - len(row)) for row in rows], float)

    def frame(self) -> pd.DataFrame:
        """All evaluations, tidy: designer, seed, evaluation, ncode, score, reported, best."""
        return pd.concat([pd.DataFrame({"designer": r.designer, "seed": r.seed,
                                        "evaluation": np.arange(1, len(r.ncode) + 1), "ncode": r.ncode,
                                        "score": np.array(r.score, float), "reported": np.array(r.reported, float),
                                        "best": np.array(r.best, float)}) for r in self.runs], ignore_index=True)

    @cached_property
    def curve_table(self) -> pd.DataFrame:
        """Per designer and evaluation: mean of the best so far, its 95 % bootstrap interval, interquartile mean, and
        the regret where the optimum is known."""
        parts = []
        for name in self.names:
            curves = self.curves(name)
            whole = np.isfinite(curves).all(0)
            columns = {k: np.full(curves.shape[1], np.nan) for k in ("mean", "low", "high", "iqm")}
            columns["mean"][whole], columns["iqm"][whole] = curves[:, whole].mean(0), iqm(curves[:, whole])
            columns["low"][whole], columns["high"][whole] = bootstrap(curves[:, whole], draws=2000)
            part = pd.DataFrame({"designer": name, "evaluation": np.arange(1, curves.shape[1] + 1), **columns})
            if self.optimum is not None:
                part["regret"] = np.abs(self.optimum - part["mean"])
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def quantile_table(self) -> pd.DataFrame:
        """Per designer and quantile of the table: the share of runs that reach it, and the median and 80th percentile
        of the evaluations that they need (infinite where fewer runs reach it)."""
        rows = []
        for name in self.names:
            for q, level in self.quantiles.items():
                needed = hitting_times(self.sign * np.nan_to_num(self.curves(name), nan=-self.sign * np.inf),
                                       self.sign * level)
                rows.append({"designer": name, "quantile": q, "level": level,
                             "share": float(np.isfinite(needed).mean()),
                             "median": float(np.quantile(needed, 0.5, method="higher")),
                             "p80": float(np.quantile(needed, 0.8, method="higher"))})
        return pd.DataFrame(rows, columns=["designer", "quantile", "level", "share", "median", "p80"])

    @cached_property
    def pairs(self) -> dict[int, list[Comparison]]:
        """All pairs of designers at every checkpoint; p-values corrected for the number of pairs (Holm)."""
        return {p: self._compare(p) for p in self.checkpoints}

    def usage(self, designer: str) -> dict[str, float]:
        """What a language model took, mean over the runs; see :class:`Run`. Empty without one."""
        used = [r.usage for r in self.runs if r.designer == designer and r.usage]
        return {key: float(np.mean([u[key] for u in used])) for key in used[0]} if used else {}

    def _compare(self, evaluation: int) -> list[Comparison]:
        finals = {n: self.curves(n)[:, evaluation - 1] for n in self.names}
        if len(finals) < 2 or self.config.seeds < 2 or not all(np.isfinite(v).all() for v in finals.values()):
            return []
        return compare(finals, higher_is_better=self.direction == "maximize")


def bench(config: BenchConfig, folder: str | Path, *, quiet: bool = False) -> Result:
    """Runs designers over a table or a function, or goes on with a folder that holds a part of it.

    Every run is kept in ``parts/``; more seeds or designers may be asked for later. Writes ``results`` (Parquet, or
    gzip'd CSV where pyarrow is missing), ``curves.csv``, ``quantiles.csv``, ``pairwise.csv``, ``summary.md``,
    ``summary.json``, ``curves.png``, and ``llm/DESIGNER-SEED/`` with the transcript of every run that asked a language
    model.

    Raises:
        LacerError: wrong input, before anything is run; the folder holds another comparison.
    """
    folder = Path(folder)
    source = source_of(config)
    names = names_of(config)
    checkpoints_of(config)
    for name in names:
        if not designer_class(name).needs_llm:
            make_plain(name, 0).check_space(source.space)
    _check_models(config, names)
    if config.prune_seeds:
        if not isinstance(source, Table):
            raise LacerError("--prune-seeds needs a table")
        source.pruned(np.random.default_rng([config.seed, 78]))
    try:
        _check_folder(folder, config)
        (folder / "parts").mkdir(exist_ok=True)
        runs = _all_runs(config, folder, quiet)
    except OSError as e:
        raise LacerError(f"cannot write {folder}: {e.strerror or e}") from None
    order = {n: i for i, n in enumerate(names)}
    seeds = range(config.seed, config.seed + config.seeds)
    kept = sorted((r for r in runs if r.designer in order and r.seed in seeds),
                  key=lambda r: (order[r.designer], r.seed))
    table = isinstance(source, Table)
    quantiles = {} if not isinstance(source, Table) or config.prune_seeds else {
        q: float(source.ordered[max(0, round((1 - q) * len(source.ordered)) - 1)]) for q in QUANTILES}
    optimum = 1.0 if config.prune_seeds else float(source.ordered[0]) if isinstance(source, Table) else None
    result = Result(config, folder, source.name if table else str(config.function), kept, optimum, quantiles,
                    "maximize" if config.prune_seeds else source.direction)
    from lacer.search.bench_report import write

    write(result)
    return result


_FREE = {"designers", "seeds", "checkpoints", "workers", *LLMFields.model_fields} - {"llm", "llm_temperature"}
"""What may differ when a folder is gone on with."""


def _check_folder(folder: Path, config: BenchConfig) -> None:
    now: dict[str, Any] = config.model_dump(mode="json", exclude=_FREE)
    if config.table is not None:
        now["sha256"] = hashlib.sha256(Path(config.table).read_bytes()).hexdigest()
    path = folder / "bench.json"
    if path.exists():
        before = read_json(path)
        for key in now:
            if key.startswith("llm") and before.get("llm") is None:
                continue  # no designer with a model was there yet
            if now[key] != before.get(key) and key != "table":
                raise LacerError(f"{folder} holds another comparison: {key} was {before.get(key)!r}, now it is "
                                 f"{now[key]!r}. Choose another folder with --out.")
    elif folder.exists() and any(folder.iterdir()):
        raise LacerError(f"{folder} holds something else, no comparison of `lacer bench`; choose another folder "
                         "with --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or (config.llm is not None and before.get("llm") is None):
        write_whole(path, json.dumps(now, indent=1) + "\n")


def _read_parts(folder: Path) -> Iterator[Run]:
    for path in sorted((folder / "parts").glob("*.json")):
        for run in read_json(path)["runs"]:
            yield Run(**run)


def _all_runs(config: BenchConfig, folder: Path, quiet: bool) -> list[Run]:
    done = {(r.designer, r.seed) for r in _read_parts(folder)}
    jobs = []
    for name in names_of(config):
        missing = [s for s in range(config.seed, config.seed + config.seeds) if (name, s) not in done]
        chunk = max(1, len(missing) // 10)
        jobs += [(name, missing[i:i + chunk]) for i in range(0, len(missing), chunk)]
    # An LLM's key stays in this process, so its designer plays here.
    here = [j for j in jobs if designer_class(j[0]).needs_llm]
    elsewhere = [j for j in jobs if j not in here]
    console = Console(stderr=True, highlight=False)
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                   TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(), console=console, transient=True,
                   disable=quiet or not console.is_terminal)
    total = len(names_of(config)) * config.seeds
    with bar:
        task = bar.add_task("runs", total=total, completed=total - sum(len(s) for _, s in jobs))
        for work, inside in ((elsewhere, False), (here, True)):
            if work:
                workers = 1 if inside else min(len(work), worker_count(
                    SearchConfig(workers=config.workers, candidates=len(work))))
                executor: Executor = InProcess() if inside or workers == 1 else ProcessPool(
                    workers, folder / "workers.log", 7 * 86_400, memory_share(workers), calls=True)
                try:
                    for seeds in _parts(config, folder, work, executor):
                        bar.advance(task, len(seeds))
                finally:
                    executor.close()
    return list(_read_parts(folder))


def _parts(config: BenchConfig, folder: Path, jobs: Sequence[tuple[str, list[int]]],
           executor: Executor) -> Iterator[list[int]]:
    waiting, busy = list(jobs), dict[str, list[int]]()
    while waiting or busy:
        while waiting and executor.free:
            name, seeds = waiting.pop(0)
            file = f"{name.replace(':', '_')}-{seeds[0]:05}-{seeds[-1]:05}.json"
            busy[file] = seeds
            executor.submit(file, Call(function="lacer.search.bench:play_part", point={
                "config": config.model_dump_json(), "designer": name, "seeds": seeds,
                "file": str((folder / "parts" / file).resolve())}))
        for event in executor.poll(0.2):
            if event.evaluation is not None:
                if not event.evaluation.ok:
                    raise LacerError(f"{event.key.split('-')[0]}: {event.evaluation.reason}; what is finished is "
                                     f"kept in {folder}")
                yield busy.pop(event.key)
