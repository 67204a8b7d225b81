"""Runs as tables: every trial a row, or every point of a learning curve."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lacer.envs import LacerError
from lacer.search.runs import StoredRun, read_run
from lacer.search.study import USAGE

COMPARISON = "comparison.yaml"
"""Marks the folder of a comparison."""


def trial_rows(run: StoredRun) -> list[dict[str, Any]]:
    """Every trial as a row of plain values.

    Columns: ``number``, ``status``, ``reason``, ``designer``, ``ncode``, ``encoder`` (JSON), ``objective``,
    ``mean_return``, ``returns`` (JSON, per evaluation episode), ``metric/NAME`` (mean over the episodes), ``seed``,
    ``parents`` (JSON), ``rationale``, ``expected`` (what the designer predicted of the objective, if it did),
    ``started`` and ``ended`` (ISO 8601, local time), ``clock`` (s of the search at its end), ``env_steps`` (a
    designer's own training included), ``decision/NAME``, ``probe/SOURCE/NAME``, ``cost/NAME``, ``llm/NAME``, and
    ``winner``.
    """
    winner = run.winner
    out = []
    for s in run.trials:
        t, e, meta = s.trial, s.trial.evaluation, s.trial.proposal.meta
        row: dict[str, Any] = {
            "number": t.number, "status": t.status, "reason": t.reason, "designer": t.proposal.designer,
            "ncode": t.ncode, "encoder": "" if s.encoder is None else json.dumps(s.encoder), "objective": t.objective,
            "mean_return": e.mean_return if e else None, "returns": json.dumps(e.returns) if e else "",
            "seed": e.seed if e else None, "parents": json.dumps(t.proposal.parents),
            "rationale": t.proposal.rationale,
            "expected": meta.get("expected") if isinstance(meta.get("expected"), int | float) else None,
            "started": s.started.isoformat(), "ended": s.ended.isoformat() if s.ended else "",
            "clock": round(run.clock(s.ended), 3) if s.ended else None, "env_steps": t.env_steps,
            "winner": winner is not None and winner.trial.number == t.number}
        row |= {f"decision/{k}": v for k, v in (t.proposal.point or {}).items()}
        if e is not None:
            row |= {f"metric/{k}": float(np.mean(v)) for k, v in e.metrics.items() if v}
            row |= {f"probe/{part}/{k}": v for part, values in e.probes.items() for k, v in values.items()}
            row |= {f"cost/{k}": v for k, v in e.cost.model_dump(exclude={"parameters_by_module"}).items()}
        row |= {f"llm/{k}": v for k, v in t.usage.items() if k in USAGE}
        out.append(row)
    return out


def curve_rows(run: StoredRun) -> list[dict[str, Any]]:
    """Every point of every learning curve: ``number`` (``winner`` and ``expert`` for the final trainings),
    ``env_steps`` and ``return``, the mean return of the training episodes that ended since the point before."""
    curves = {str(t.trial.number): t.trial.evaluation.curve for t in run.trials if t.trial.evaluation is not None}
    curves |= {name: e.curve for name, e in run.finals.items()}
    return [{"number": number, "env_steps": int(step), "return": float(value)}
            for number, curve in curves.items() for step, value in curve]


def frame(runs: Iterable[tuple[Mapping[str, Any], StoredRun]], curves: bool = False) -> pd.DataFrame:
    """One table of several runs; the columns that tell them apart come first. Columns of a kind stand together."""
    rows = [{**about, **row} for about, run in runs for row in (curve_rows(run) if curves else trial_rows(run))]
    names = list(dict.fromkeys(k for r in rows for k in r))
    groups = list(dict.fromkeys(n.split("/")[0] if "/" in n else "" for n in names))
    table = pd.DataFrame(rows, columns=sorted(names, key=lambda n: groups.index(n.split("/")[0] if "/" in n else "")))
    mixed = [c for c in table.columns if c.startswith("decision/") and table[c].map(type).nunique() > 1]
    table[mixed] = table[mixed].map(lambda v: None if v is None or v != v else str(v))  # one type per column
    return table


def check_file(path: str | None) -> None:
    """Whether a table can be written under a name. Raises LacerError."""
    if path is None:
        return
    if not path.endswith((".csv", ".csv.gz", ".parquet")):
        raise LacerError(f"--out {path}: the name must end in .csv, .csv.gz or .parquet")
    if path.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise LacerError("Parquet needs pyarrow: pip install 'lacer[parquet]', or write .csv")
    if not Path(path).resolve().parent.is_dir():
        raise LacerError(f"--out {path}: there is no folder {Path(path).resolve().parent}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a table as CSV or Parquet, by its name. Raises OSError."""
    new = path.with_name(f".new-{path.name}")  # the old content or the new
    if path.suffix == ".parquet":
        table.to_parquet(new, index=False)
    else:
        table.to_csv(new, index=False)
    new.replace(path)


def comparison_runs(folder: Path) -> list[tuple[dict[str, Any], StoredRun]]:
    """The runs of a comparison's folder with their environment's and designer's labels. Raises LacerError."""
    from lacer.search.compare import read_comparison

    return [({"environment": s.env, "designer_label": s.label, "search_seed": s.seed}, read_run(s.folder(folder)))
            for s in read_comparison(folder).searches() if (s.folder(folder) / "config.yaml").exists()]


def export(folder: Path, out: Path | None, *, curves: bool = False) -> pd.DataFrame:
    """The trials (or the learning curves) of a run's or a comparison's folder; written into a file if one is given.

    Raises:
        LacerError: no run there, a damaged one, or the file cannot be written.
    """
    check_file(None if out is None else str(out))
    runs = comparison_runs(folder) if (folder / COMPARISON).exists() else [({}, read_run(folder))]
    table = frame(runs, curves)
    if out is not None:
        try:
            write_table(table, out)
        except OSError as e:
            raise LacerError(f"cannot write {out}: {e.strerror or e}") from None
    return table
