"""Tables of measured architectures as something to search: a space, and scores by architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lacer.agents import Evaluation
from lacer.agents.evaluation import Cost
from lacer.envs import LacerError, did_you_mean
from lacer.search.space import Decision, Point, SearchSpace, TableSpace

Array = NDArray[np.float64]

METADATA = b"lacer"
"""Key of a Parquet file's metadata under which `lacer bench make` keeps protocol, search space and versions."""


class ListedSpace(SearchSpace):
    """The listed ones among the points of some decisions. :meth:`sample` is uniform over them.

    Args:
        decisions: the decisions.
        codes: NCodes of the points that are part of the space.
    """

    def __init__(self, decisions: Sequence[Decision], codes: Sequence[str]) -> None:
        super().__init__(decisions)
        self.codes = tuple(dict.fromkeys(codes))
        self._known = {c: i for i, c in enumerate(self.codes)}
        self._indices = np.array([[-1 if p == "_" else int(p) for p in c.split(".")] for c in self.codes])

    def allowed(self, point: Point) -> bool:
        return self.to_ncode(point) in self._known

    def size(self) -> int:
        return len(self.codes)

    def sample(self, rng: np.random.Generator) -> Point:
        return self.from_ncode(self.codes[rng.integers(len(self.codes))])

    sample_uniform = sample

    def points(self, limit: int | None = None) -> Iterator[Point]:
        return (self.from_ncode(c) for c in self.codes[:limit])

    def mutate(self, point: Point, rng: np.random.Generator) -> Point:
        """One of the points that differ in the fewest decisions: in one, where enough of the neighbours are listed. In
        sparse lists those at the distance of the n-th nearest count too, with n the number of decisions."""
        i = self._known[self.to_ncode(point)]
        distance = (self._indices != self._indices[i]).sum(1)
        distance[i] = self._indices.shape[1] + 1
        n = min(len(self.decisions), len(self.codes) - 1)
        if n == 0:
            return dict(point)
        near = np.flatnonzero(distance <= np.partition(distance, n - 1)[n - 1])
        return self.from_ncode(self.codes[rng.choice(near)])


@dataclass(frozen=True)
class Table:
    """Architectures with scores.

    Attributes:
        name: for titles.
        space: the architectures.
        scores: by NCode, the measurements that guide a search: one, or several of which every run draws one.
        reported: by NCode, what is reported of an architecture.
        direction: of both.
        details: by NCode, for each of the measurements what else came of it; empty where the table holds nothing else.
    """

    name: str
    space: SearchSpace
    scores: Mapping[str, Array]
    reported: Mapping[str, float]
    direction: Literal["maximize", "minimize"] = "maximize"
    details: Mapping[str, Sequence[Evaluation]] = field(default_factory=dict, repr=False)
    ordered: Array = field(init=False)
    """All reported scores, best first."""

    def __post_init__(self) -> None:
        values = np.sort(np.array(list(self.reported.values())))
        object.__setattr__(self, "ordered", values[::-1] if self.direction == "maximize" else values)

    def evaluation(self, code: str, number: int) -> Evaluation:
        """One of the measurements of an architecture, as a search gets it: with probes, learning curve and cost, where
        the table holds them."""
        score = float(self.scores[code][number])
        known = self.details.get(code)
        return Evaluation(objective=score) if known is None else known[number].model_copy(update={"objective": score})

    def pruned(self, rng: np.random.Generator, tries: int = 100) -> Table:
        """A random subspace (LM-Searcher, 2509.05657, section 3.2): each decision is fixed to one of its options with
        probability 0.5, each option of the others dropped with probability 0.5 (one stays).

        Raises:
            LacerError: in some tries no subspace with at least two architectures was found.
        """
        decisions = self.space.decisions
        codes = {code: code.split(".") for code in self.scores}
        for _ in range(tries):
            kept = []
            for d in decisions:
                n = len(d.options)
                one = int(rng.integers(n))
                keep = {one} if rng.random() < 0.5 else {i for i in range(n) if rng.random() < 0.5} or {one}
                kept.append({"_", *map(str, keep)})
            left = [c for c, parts in codes.items() if all(p in k for p, k in zip(parts, kept, strict=True))]
            if len(left) >= 2:
                return Table(self.name, ListedSpace(decisions, left), {c: self.scores[c] for c in left},
                             {c: self.reported[c] for c in left}, self.direction,
                             {c: self.details[c] for c in left if c in self.details})
        raise LacerError(f"{self.name}: no subspace of two architectures was found in {tries} tries; leave pruning out")


def read_table(path: str | Path, arch: Sequence[str] = ("arch",), score: str = "score",
               test_score: str | None = None, *, where: Mapping[str, str] | None = None, minimize: bool = False,
               repeated: bool = False, variable_length: bool = False, bins: int | None = None,
               rank: bool = False) -> Table:
    """Reads a CSV (also gzip'd) or Parquet file.

    Args:
        path: the file.
        arch: column that names the architecture: one decision per character, or the NCode of a table that
            ``lacer bench make`` wrote; or several columns, one decision each.
        score: column that guides a search.
        test_score: column that is reported; default: ``score``, its mean where there are several measurements.
        where: values that columns must have; other rows are left out.
        minimize: whether lower scores are better.
        repeated: rows of one architecture are repeated measurements. Every run of a designer draws one of them for
            each architecture, the mean is reported.
        variable_length: architectures may have fewer places than others.
        bins: numbers in the columns of ``arch`` are cut into so many equally frequent bins.
        rank: scores are replaced by their rank among all, from 0 to 1.

    Raises:
        LacerError: no such file or column ("did you mean"), no rows, and with the row: scores that are no finite
            numbers, missing, repeated or ragged architectures.
    """
    data, about = _load(Path(path), arch, bins)
    for column in [*arch, score, *([test_score] if test_score else []), *(where or {})]:
        if column not in data.columns:
            raise LacerError(f"{path} has no column {column!r}{did_you_mean(column, list(data.columns))} Columns: "
                             f"{', '.join(map(str, data.columns))}.")
    for column, value in (where or {}).items():
        kept = data[data[column].astype(str) == value]
        if kept.empty:
            known = sorted(map(str, data[column].unique()))
            raise LacerError(f"{path}: no row with {column}={value}{did_you_mean(value, known)} Values: "
                             f"{', '.join(known[:20])}{', …' if len(known) > 20 else ''}.")
        data = kept
    if data.empty:
        raise LacerError(f"{path} has no rows")
    guide = _numbers(data, score, path)
    test = guide if test_score is None else _numbers(data, test_score, path)
    if rank:
        from scipy.stats import rankdata

        guide, test = ((rankdata(v) - 1) / max(1, len(v) - 1) for v in (guide, test))
    codes, space = _architectures(data, arch, about, path, variable_length, bins)
    rows: dict[str, list[int]] = {}
    for i, code in enumerate(codes):
        rows.setdefault(code, []).append(i)
    twice = next((r for r in rows.values() if len(r) > 1), None)
    if twice and not repeated and bins is None:
        raise LacerError(f"{path}: rows {_line(data, twice[0])} and {_line(data, twice[1])} hold the same architecture "
                         f"({', '.join(str(data[c].iloc[twice[0]]) for c in arch)}). If they are repeated "
                         "measurements, say --repeated; if the table holds several tasks, choose one with --where")
    name = Path(path).name.split(".")[0] + "".join(f" {v}" for v in (where or {}).values())
    return Table(name if score in ("score", "objective") else f"{name} {score}", space,
                 {c: guide[r] for c, r in rows.items()}, {c: float(test[r].mean()) for c, r in rows.items()},
                 "minimize" if minimize else "maximize",
                 {c: [_details(data.iloc[i]) for i in r] for c, r in rows.items()} if "decisions" in about else {})


def _details(row: pd.Series) -> Evaluation:
    """What `lacer bench make` wrote of a run beside its score."""
    probes: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        if str(name).startswith("probe/") and pd.notna(value):
            _, part, probe = str(name).split("/", 2)
            probes.setdefault(part, {})[probe] = float(value)
    return Evaluation(curve=[(int(s), float(r)) for s, r in zip(row["curve_steps"], row["curve_returns"], strict=True)],
                      returns=[float(v) for v in row["returns"]], probes=probes, seed=int(row["seed"]),
                      cost=Cost(parameters=int(row["cost/parameters"]), env_steps=int(row["cost/env_steps"])))


def _load(path: Path, arch: Sequence[str], bins: int | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The file, and what `lacer bench make` wrote about it."""
    try:
        if path.suffix == ".parquet":
            _, parquet = arrow()
            table = parquet.read_table(path)
            about = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
            data = table.to_pandas()
            if "status" in data.columns and about:  # failed trainings have no score
                data = data[data["status"] == "ok"]
            return data, about
        # Text as it stands, so that "010" stays what it is; numbers are read where they are asked for.
        # "None" and "NA" are names like others; only an empty cell is empty.
        return pd.read_csv(path, dtype=str if len(arch) == 1 and bins is None else None, keep_default_na=False,
                           na_values=[""] if len(arch) > 1 or bins is not None else []), {}
    except (OSError, ValueError) as e:  # pandas' and pyarrow's errors of format are ValueErrors
        raise LacerError(f"cannot read the table {path}: {getattr(e, 'strerror', None) or e}") from None


def _line(data: pd.DataFrame, i: int) -> int:
    """Number of a row as a person counts it in the file, the header being row 1."""
    return int(data.index[i]) + 2


def _numbers(data: pd.DataFrame, column: str, path: str | Path) -> Array:
    values = pd.to_numeric(data[column], errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise LacerError(f"{path}, row {_line(data, bad[0])}: {column} is {str(data[column].iloc[bad[0]])[:60]!r}, not "
                         f"a finite number ({len(bad)} such rows)")
    return values


def _architectures(data: pd.DataFrame, arch: Sequence[str], about: Mapping[str, Any], path: str | Path,
                   variable_length: bool, bins: int | None) -> tuple[list[str], SearchSpace]:
    """The NCode of every row, and the space."""
    for column in arch:
        missing = np.flatnonzero(data[column].isna() | (data[column].astype(str) == ""))
        if len(missing):
            raise LacerError(f"{path}, row {_line(data, missing[0])}: {column} is empty")
    if len(arch) == 1 and "decisions" in about:
        codes = list(data[arch[0]])
        return codes, ListedSpace(SearchSpace.from_json(about["decisions"]).decisions, codes)
    if len(arch) == 1 and bins is None:
        strings = list(data[arch[0]].astype(str))
        lengths = np.array([len(s) for s in strings])
        odd = np.flatnonzero(lengths != lengths[0])
        if len(odd) and not variable_length:
            i = int(odd[0])
            raise LacerError(f"{path}, row {_line(data, i)}: the architecture {strings[i][:60]!r} has {lengths[i]} "
                             f"places, those before it have {lengths[0]}. If architectures may differ in length, say "
                             "--variable-length")
        space = TableSpace(strings)
        return [space.to_ncode(space.from_string(s)) for s in strings], space
    columns = {c: _binned(data[c], bins) for c in arch}
    decisions = [Decision(c, tuple(sorted(set(v)))) for c, v in columns.items()]
    codes = [".".join(map(str, row)) for row in zip(*(
        [d.options.index(x) for x in columns[d.name]] for d in decisions), strict=True)]
    return codes, ListedSpace(decisions, codes)


def _binned(column: pd.Series, bins: int | None) -> list[Any]:
    """A column as plain values; numbers in bins, named by their lower ends."""
    if bins is None or not pd.api.types.is_numeric_dtype(column) or column.nunique() <= bins:
        return [v.item() if hasattr(v, "item") else v for v in column]
    cut = pd.qcut(column, bins, duplicates="drop")
    return [float(interval.left) for interval in cut]


def arrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``. Raises LacerError with what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LacerError("Parquet files need pyarrow: pip install 'lacer[parquet]'") from None
    return pyarrow, pyarrow.parquet
