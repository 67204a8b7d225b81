"""Tables of composite encoders, made by measuring: what `lacer bench make` does.

Every encoder of a sample (or of a complete small space) is trained and evaluated with several seeds, by the same engine
as a search, so a table is resumable and can be made on any executor. The result is one Parquet file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lacer.agents import RunRequest
from lacer.envs import LacerError, task_card
from lacer.search.config import COMMON, SearchConfig, TableConfig
from lacer.search.designers.base import Designer
from lacer.search.engine import Budget, Engine
from lacer.search.files import read_json, write_whole
from lacer.search.loop import (
    REPEAT_SEEDS,
    make_executor,
    only_driver,
    provenance,
    run_request,
    sigterm_as_interrupt,
    store_config,
    study_place,
)
from lacer.search.plain import Shown
from lacer.search.progress import PointDisplay
from lacer.search.space import EncoderSpace, Point, load_space, read_space
from lacer.search.storage import check_server
from lacer.search.study import Proposal, StoredStudy, Study, Trial
from lacer.search.tables import METADATA, arrow


class Sweep(Designer):
    """Proposes given points in turn, all of them once, then all of them again, and so on.

    Args:
        points: what to propose.
    """

    name: ClassVar[str] = "sweep"

    def __init__(self, points: list[Point]) -> None:
        super().__init__()
        self.points = points

    def propose(self, study: Study, n: int) -> list[Proposal]:
        begun = len(study) - study.count("rejected")
        return [Proposal(self.points[i % len(self.points)], self.name) for i in range(begun, begun + n)]


def encoders_of(space: EncoderSpace, n: int, seed: int) -> list[Point]:
    """``n`` different encoders drawn with a seed, or all of them in order if ``n`` is 0.

    Raises:
        LacerError: the space has fewer, or is too large to be measured as a whole.
    """
    size = space.size()
    if n > size:
        raise LacerError(f"the space holds {size:,} encoders, fewer than encoders={n:,}; 0 takes all")
    if n == 0:
        if size > 20_000:
            raise LacerError(f"the space holds {size:.3g} encoders: say how many to measure, e.g. --encoders 300, or "
                             "narrow it with --space")
        return list(space.points())
    if 2 * n > size:
        every = list(space.points())
        return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:n]]
    rng, out = np.random.default_rng(seed), dict[str, Point]()
    while len(out) < n:
        point = space.sample(rng)
        out.setdefault(space.to_ncode(point), point)
    return list(out.values())


def make_table(config: TableConfig, folder: Path, *, resume: bool = False, quiet: bool = False) -> Path:
    """Measures the encoders of a configuration and writes ``table.parquet`` into a folder.

    Args:
        config: what to measure.
        folder: the run folder; it holds the study until all is measured.
        resume: go on with a folder that is there.
        quiet: print nothing.

    Returns:
        The Parquet file.

    Raises:
        LacerError: wrong configuration, before anything is run; pyarrow is missing.
    """
    arrow()
    if isinstance(config.space, str):
        config = config.model_copy(update={"space": read_space(config.space)})
    card = task_card(config.env, **config.env_kwargs)
    task_card(config.env, **{**config.env_kwargs, **config.eval_env_kwargs})
    space = load_space(config.space, card)
    points = encoders_of(space, config.encoders, config.seed)
    if folder.exists() and not resume:
        raise LacerError(f"{folder} exists already; to go on with it: --resume, or choose another folder with --out")
    if config.storage is not None:
        check_server(config.storage, None if resume else config.study_name or folder.name)
    total = len(points) * config.seeds
    folder.mkdir(parents=True, exist_ok=True)
    with only_driver(folder), sigterm_as_interrupt():
        url, name = study_place(config, folder)
        store_config(config, folder, name, set(SearchConfig.model_fields) - COMMON)
        if not (folder / "versions.json").exists():
            write_whole(folder / "versions.json", json.dumps(provenance(config), indent=1) + "\n")
        study = StoredStudy(url, name, space, create="if missing" if resume else "yes")
        executor = make_executor(config, folder / "workers.log")
        display = PointDisplay(study, total, quiet)

        def job(trial: Trial, repeat: int) -> RunRequest:
            assert trial.spec is not None
            return run_request(config, trial.spec, config.protocol, config.seed + REPEAT_SEEDS * repeat)

        try:
            Engine(study, Sweep(points), executor, job, budget=Budget(total), repeats="add",
                   expected_steps=config.protocol.steps, listener=Shown(display)).run()
            return write_table(study, space, config, read_json(folder / "versions.json"), folder / "table.parquet")
        finally:
            executor.close()
            display.close()
            study.close()


def write_table(study: Study, space: EncoderSpace, config: TableConfig, versions: dict[str, Any], path: Path) -> Path:
    """Writes every finished trial of a study as a row.

    Columns: ``ncode`` and ``encoder`` (JSON), ``seed``, ``status``, ``reason``, ``objective``, ``mean_return``,
    ``returns`` (per evaluation episode), ``curve_steps`` and ``curve_returns``, ``probe/SOURCE/NAME``, ``cost/NAME``.
    """
    pa, parquet = arrow()
    rows = [row(t) for t in study.trials if t.evaluation is not None]
    if not rows:
        raise LacerError("nothing was measured: there is no table to write")
    names = list(dict.fromkeys(k for r in rows for k in r))
    table = pa.Table.from_pydict({n: [r.get(n) for r in rows] for n in names})
    about = {"made_by": "lacer bench make", "task": {"env": config.env, "objective": asdict(study.objective)},
             "config": config.model_dump(mode="json", include=COMMON - {"storage"} | {"encoders", "seeds"}),
             "decisions": space.to_json(), "versions": versions}
    temporary = path.with_suffix(".tmp")
    parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), temporary,
                        compression="zstd")
    temporary.replace(path)
    return path


def row(trial: Trial) -> dict[str, Any]:
    """A trial as a row of a table."""
    e = trial.evaluation
    assert e is not None
    assert trial.spec is not None
    probes = {f"probe/{part}/{k}": v for part, values in e.probes.items() for k, v in values.items()}
    cost = {f"cost/{k}": v for k, v in e.cost.model_dump(exclude={"parameters_by_module"}).items()}
    return {"ncode": trial.ncode, "encoder": json.dumps(trial.spec.to_dict()), "seed": e.seed, "status": trial.status,
            "reason": e.reason, "objective": e.objective, "mean_return": e.mean_return, "returns": e.returns,
            "curve_steps": [s for s, _ in e.curve], "curve_returns": [r for _, r in e.curve], **probes, **cost}
