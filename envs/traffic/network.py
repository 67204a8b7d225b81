"""The motorway: its stretches, its plain XML, and the SUMO network that netconvert makes of it (cached by content)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lacer.envs.errors import LacerError

MAIN_LIMIT = 27.78
"""Speed limit of the motorway, m/s (100 km/h)."""
RAMP_LIMIT = 16.67
"""Speed limit of the on-ramp, m/s (60 km/h)."""
_INSTALL = "SUMO is missing; install it with: pip install eclipse-sumo libsumo"


@dataclass(frozen=True)
class Stretch:
    """One edge of the main road. ``lanes`` counts through lanes; ``merge`` adds an acceleration lane on the right."""

    name: str
    length: float
    lanes: int
    merge: bool = False

    @property
    def offset(self) -> int:
        """SUMO's index of the rightmost through lane."""
        return int(self.merge)


@dataclass(frozen=True)
class Place:
    """One lane of one edge: SUMO's name, number of the stretch (-1: ramp), through lane from the right (-1: ramp and
    acceleration lane), where the edge begins (m from the start of the road)."""

    name: str
    edge: int
    lane: int
    start: float


@dataclass(frozen=True)
class Motorway:
    """A straight motorway, driven from left to right; through lanes are numbered from the right, starting at 0.

    Stretches: ``in`` (entry), controlled segments ``s1, s2, ...``, of which ``s2`` carries the merge with an
    acceleration lane as long as itself, and ``out`` (exit). At a lane drop the leftmost lane ends.

    Attributes:
        lanes: through lanes of the controlled segments, at least 2.
        drop: where one lane ends: ``"before"`` the segments (the entry has one lane more) or ``"after"`` them (the
            exit has one lane less).
        in_length, segment_lengths, out_length, ramp_length: metres.
    """

    lanes: int
    drop: Literal["before", "after"]
    in_length: float
    segment_lengths: tuple[float, ...]
    out_length: float
    ramp_length: float

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        middle = [Stretch(f"s{i}", x, self.lanes, merge=i == 2) for i, x in enumerate(self.segment_lengths, 1)]
        return (
            Stretch("in", self.in_length, self.lanes + (self.drop == "before")), *middle,
            Stretch("out", self.out_length, self.lanes - (self.drop == "after")),
        )

    @cached_property
    def starts(self) -> tuple[float, ...]:
        """Where each stretch begins, metres from the start of the road."""
        out, x = [], 0.0
        for s in self.stretches:
            out.append(x)
            x += s.length
        return tuple(out)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All lanes: stretch by stretch, from the right, then the ramp."""
        main = [Place(f"{s.name}_{k}", e, k - s.offset, self.starts[e])
                for e, s in enumerate(self.stretches) for k in range(s.lanes + s.offset)]
        return (*main, Place("ramp_0", -1, -1, self.starts[2] - self.ramp_length))

    @cached_property
    def place_starts(self) -> tuple[float, ...]:
        """Where each of :attr:`places` begins, metres from the start of the road."""
        return tuple(place.start for place in self.places)

    @property
    def length(self) -> float:
        """Metres from the entry to the exit."""
        return self.starts[-1] + self.stretches[-1].length

    @property
    def segments(self) -> int:
        """Number of controlled segments."""
        return len(self.segment_lengths)

    @property
    def merge_end(self) -> float:
        """Where the acceleration lane ends, metres from the start of the road."""
        return self.starts[3]

    def route_edges(self, ramp: bool) -> str:
        """The edges of a trip from the ramp, or along the whole main road."""
        names = [s.name for s in self.stretches]
        return " ".join(["ramp", *names[2:]] if ramp else names)

    def _plain(self) -> dict[str, str]:
        xs = [*self.starts, self.length]
        merge_x = self.starts[2]
        nodes = [f'<node id="n{i}" x="{x:.1f}" y="0" type="priority"/>' for i, x in enumerate(xs)]
        nodes.append(f'<node id="r" x="{merge_x - 0.98 * self.ramp_length:.1f}" y="{-0.199 * self.ramp_length:.1f}"/>')
        edges = [
            f'<edge id="{s.name}" from="n{i}" to="n{i + 1}" numLanes="{s.lanes + s.offset}" speed="{MAIN_LIMIT}" '
            f'priority="2" length="{s.length:.1f}"/>' for i, s in enumerate(self.stretches)
        ]
        edges.append(f'<edge id="ramp" from="r" to="n2" numLanes="1" speed="{RAMP_LIMIT}" priority="1" '
                     f'length="{self.ramp_length:.1f}"/>')
        links = [
            f'<connection from="{a.name}" to="{b.name}" fromLane="{k + a.offset}" toLane="{k + b.offset}"/>'
            for a, b in zip(self.stretches[:-1], self.stretches[1:], strict=True) for k in range(min(a.lanes, b.lanes))
        ]
        links.append('<connection from="ramp" to="s2" fromLane="0" toLane="0"/>')

        def wrap(tag: str, rows: list[str]) -> str:
            return f"<{tag}>\n" + "\n".join(rows) + f"\n</{tag}>\n"

        return {"nod": wrap("nodes", nodes), "edg": wrap("edges", edges), "con": wrap("connections", links)}

    def build(self) -> Path:
        """The SUMO network file; made by netconvert once and kept by content hash.

        Raises:
            LacerError: if SUMO is missing or netconvert fails.
        """
        home = sumo_home()
        plain = self._plain()
        key = hashlib.sha256("\n".join([*plain.values(), sumo_version()]).encode()).hexdigest()[:16]
        for folder in _cache_folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                target = folder / f"motorway-{key}.net.xml"
                if not target.exists():
                    _netconvert(home, plain, target)
                return target
            except OSError:
                continue
        raise LacerError("no folder to keep the road network in; set LACER_CACHE to one that can be written")


def sumo_home() -> Path:
    """Folder of the SUMO wheel; also sets ``SUMO_HOME`` where it is not set.

    Raises:
        LacerError: if SUMO is not installed.
    """
    try:
        import sumo
    except ImportError as e:
        raise LacerError(_INSTALL) from e
    home = Path(sumo.__file__).parent
    os.environ.setdefault("SUMO_HOME", str(home))
    return home


def sumo_version() -> str:
    """Version of the installed SUMO wheel."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("eclipse-sumo")
    except PackageNotFoundError as e:
        raise LacerError(_INSTALL) from e


_TEMPORARY = tempfile.gettempdir()  # not a run's own, which goes with it


def _cache_folders() -> Iterator[Path]:
    if chosen := os.environ.get("LACER_CACHE"):
        yield Path(chosen) / "networks"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacer" / "networks"
    yield Path(_TEMPORARY) / f"lacer-{os.getuid() if hasattr(os, 'getuid') else 'user'}" / "networks"


def _netconvert(home: Path, plain: dict[str, str], target: Path) -> None:
    """Write the network beside its target and rename it, so that processes racing here do no harm."""
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for kind, text in plain.items():
            (work / f"road.{kind}.xml").write_text(text)
        program = shutil.which("netconvert", path=str(home / "bin")) or "netconvert"
        command = [
            program, "--node-files", str(work / "road.nod.xml"), "--edge-files", str(work / "road.edg.xml"),
            "--connection-files", str(work / "road.con.xml"), "--output-file", str(work / "road.net.xml"),
            "--no-internal-links", "true", "--no-turnarounds", "true", "--no-warnings", "true",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except FileNotFoundError as e:
            raise LacerError(_INSTALL) from e
        if done.returncode or not (work / "road.net.xml").exists():
            raise LacerError(f"netconvert failed: {(done.stderr or done.stdout).strip()[-400:]}")
        os.replace(work / "road.net.xml", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
