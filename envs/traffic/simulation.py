"""One libsumo simulation: start, step, read, steer, close; a guard keeps it to one per process."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import operator
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lacer.envs.errors import LacerError
from lacer.envs.traffic.demand import Incident
from lacer.envs.traffic.network import Motorway, sumo_home

REAPPLY = 2.0
"""Seconds after which a decision is applied again, to the vehicles that have entered since."""
HARD = -3.0
"""A braking below this is a hard one, m/s^2."""
_FREE = 36.0  # maxSpeed of the vehicle types: no cap
_PRESSING = 0b10101010101  # lane-change mode: as by default, but commanded changes only avoid immediate collisions

Client = Literal["libsumo", "traci", "gui"]
_labels = itertools.count()
_holder: tuple[int, weakref.ref[Simulation]] | None = None


@dataclass(frozen=True)
class Command:
    """What connected vehicles are told. Speeds in m/s; ``None`` and infinity mean "drive as you like".

    Attributes:
        segment_caps: highest speed on each controlled segment.
        clear_lane: through lane that they leave in the zone before the incident area.
        ramp_cap: highest speed on the ramp.
    """

    segment_caps: tuple[float, ...]
    clear_lane: int | None = None
    ramp_cap: float = np.inf

    @property
    def capped(self) -> bool:
        return self.ramp_cap < np.inf or min(self.segment_caps, default=np.inf) < np.inf


@dataclass(eq=False)
class Snapshot:
    """All vehicles at one moment, lane by lane as in ``road.places``.

    A road has some fifty vehicles, and between steps of the simulation each operation on arrays takes some
    microseconds, whatever their length: sensors that look at a few vehicles read the lists in plain Python.

    Attributes:
        counts: vehicles on each lane.
        ids: SUMO's names.
        positions: front bumper, m on its edge.
        speeds: m/s.
        stopped: place of the incident's vehicle in the lists.
        cavs: connected and automated.
        xs: front bumper, m from the start of the road.
    """

    road: Motorway
    counts: list[int]
    ids: list[str]
    positions: list[float]
    speeds: list[float]
    stopped: int | None

    def __post_init__(self) -> None:
        self.cavs = [v[0] == "c" for v in self.ids]
        starts = itertools.chain.from_iterable(map(itertools.repeat, self.road.place_starts, self.counts))
        self.xs = list(map(operator.add, self.positions, starts))

    @property
    def speed(self) -> np.ndarray:
        return np.array(self.speeds, float)

    @property
    def place(self) -> np.ndarray:
        """Lane, as in ``road.places``."""
        return np.arange(len(self.counts)).repeat(self.counts)

    @property
    def edge(self) -> np.ndarray:
        """Number of the stretch, -1 for the ramp."""
        return np.array([place.edge for place in self.road.places])[self.place]

    @property
    def lane(self) -> np.ndarray:
        """Through lane from the right, -1 for ramp and acceleration lane."""
        return np.array([place.lane for place in self.road.places])[self.place]

    @property
    def cav(self) -> np.ndarray:
        return np.array(self.cavs, bool)

    @property
    def broken(self) -> np.ndarray:
        """The vehicle of the incident."""
        return np.arange(len(self.ids)) == (-1 if self.stopped is None else self.stopped)


@dataclass
class Tally:
    """Sums over a time: metres driven, vehicle-seconds on the road and waiting to enter, vehicles that left and their
    seconds since they wanted to enter, hard brakings (looked at when the time is over), vehicle-steps of collisions,
    grams of CO2 (rate when the time is over, held for all of it)."""

    metres: float = 0.0
    driving: float = 0.0
    waiting: float = 0.0
    arrived: int = 0
    travelled: float = 0.0
    hard: int = 0
    collisions: int = 0
    co2: float = 0.0

    def add(self, other: Tally) -> None:
        mine = vars(self)
        for name, value in vars(other).items():
            mine[name] += value

    @property
    def speed(self) -> float:
        """Vehicle-kilometres by vehicle-hours, waiting included, in m/s."""
        return self.metres / max(self.driving + self.waiting, 1e-9)


class Simulation:
    """A running simulation. It takes the process's only place until :meth:`close`.

    Args:
        road: the motorway.
        routes: SUMO route file.
        net: SUMO network file of the road.
        seed: SUMO's random seed.
        step_length: s.
        departs: sorted departure times of all vehicles in the route file, s; the number in a vehicle's name is its
            place here.
        incident: the vehicle that breaks down, if any.
        clear_zone: stretches on which a lane is cleared.
        counted: controlled segments that have a counter on every lane, at their end.
        interval: seconds over which counters count.
        client: ``"libsumo"``, in this process, ``"traci"``, over a socket, or ``"gui"``, sumo-gui over a socket.

    Raises:
        LacerError: if another simulation runs in this process, SUMO is missing, or it does not start.
    """

    def __init__(
        self, road: Motorway, routes: Path, *, net: Path, seed: int, step_length: float, departs: list[float],
        incident: Incident | None, clear_zone: tuple[int, ...], counted: tuple[int, ...] = (),
        interval: float = 10.0, client: Client = "libsumo",
    ) -> None:
        self.sumo: Any = None
        self.road, self.step_length, self.clear_zone = road, step_length, clear_zone
        self.now = 0.0
        self._entered, self._left = 0, 0
        self.broken: str | None = None
        """The broken-down vehicle, while the incident lasts."""
        self._departs, self._incident = [*departs, math.inf], incident
        self._due = incident.start if incident else math.inf
        """When :meth:`_break_down` has something to do."""
        self._caps: dict[str, float] = {}
        self._pressing: set[str] = set()
        self._ramp_x, self._road_length = road.places[-1].start, road.length
        self._lanes = [place.name for place in road.places]
        self._edges = [s.name for s in road.stretches] + ["ramp"]
        self.seen = Snapshot(road, [0] * len(self._lanes), [], [], [], None)
        """The vehicles at the end of the last :meth:`run`."""
        self._driven = 0.0  # sum of their places, m
        counters = [f"s{i}_{k + road.stretches[i].offset}" for i in counted for k in range(road.lanes)]
        self._counters = [f"count_{c}" for c in counters]
        command = [
            "--net-file", str(net), "--route-files", str(routes), "--seed", str(seed), "--step-length",
            str(step_length), "--time-to-teleport", "-1", "--collision.action", "warn", "--no-step-log", "true",
            "--no-warnings", "true", "--duration-log.disable", "true", "--xml-validation", "never",
        ]
        if counters:
            extra = routes.with_name("counters.add.xml")
            try:
                extra.write_text("<additional>\n" + "".join(
                    f'<inductionLoop id="count_{c}" lane="{c}" pos="-5" period="{interval}" file="NUL"/>\n'
                    for c in counters) + "</additional>\n")
            except OSError as e:
                raise LacerError(f"cannot write the list of counters: {e}") from e
            command += ["--additional-files", str(extra)]
        self.sumo = self._start(command) if client == "libsumo" else _connect(command, client)
        self._errors = _failures()
        simulation = self.sumo.simulation
        self._calls = (self.sumo.simulationStep, simulation.getDepartedIDList, simulation.getArrivedIDList,
                       simulation.getCollidingVehiclesNumber)  # looked up once: they are called in every step
        self._cars, self._lane_ids, self._fumes, self._passed = (
            self.sumo.vehicle, self.sumo.lane.getLastStepVehicleIDs, self.sumo.edge.getCO2Emission,
            self.sumo.inductionloop.getLastIntervalVehicleNumber)

    def _start(self, options: list[str]) -> Any:
        global _holder
        sumo_home()
        try:
            import libsumo
        except ImportError as e:
            raise LacerError("libsumo is missing; install it with: pip install eclipse-sumo libsumo") from e
        if _holder and _holder[0] == os.getpid() and (other := _holder[1]()) is not None and other.sumo is not None:
            raise LacerError(
                "another traffic environment already runs in this process, and libsumo holds one simulation per "
                "process: close that one, or run each in a process of its own "
                "(stable_baselines3.common.vec_env.SubprocVecEnv)"
            )
        if libsumo.isLoaded():
            if _holder is None:
                raise LacerError("another program part runs a libsumo simulation in this process; close it first, or "
                                 "run this environment in a process of its own (SubprocVecEnv)")
            libsumo.close()  # left over from a collected environment, or inherited by a forked process
        try:
            libsumo.start(["sumo", *options])
        except Exception as e:  # libsumo raises TraCIException and RuntimeError
            raise LacerError(f"SUMO did not start: {e}") from e
        _holder = (os.getpid(), weakref.ref(self))
        return libsumo

    def close(self) -> None:
        """End the simulation and give the process's place back; harmless when done twice."""
        sumo, self.sumo = self.sumo, None
        if sumo is None or (hasattr(sumo, "isLoaded") and not sumo.isLoaded()):
            return
        # A failed simulation may fail again as it is closed; its error was told when it failed.
        with contextlib.suppress(*self._errors):
            sumo.close()

    def run(self, seconds: float, command: Command | None = None) -> Tally:
        """Simulate some time under a command; :attr:`seen` then shows the vehicles.

        Raises:
            LacerError: if SUMO fails; the simulation is closed then.
        """
        if self.sumo is None:
            raise LacerError("the simulation is closed; call reset() first")
        step, departed, arrived, colliding = self._calls
        length, departs, entered, due = self.step_length, self._departs, self._entered, self._entered
        every, steps = max(1, round(REAPPLY / length)), round(seconds / length)
        metres, driving, waiting, travelled, left, collisions = -self._driven, 0.0, 0.0, 0.0, self._left, 0
        try:
            for i in range(steps):
                now = self.now
                if now >= self._due:
                    self._break_down()
                if command is not None and i % every == 0:
                    self._apply(command)
                step()
                if departs[entered] <= now + 1e-3:  # else nobody was due to enter
                    for v in departed():
                        entered += 1
                        if v[1] == "r":
                            metres -= self._ramp_x
                self.now = now = now + length
                if gone := arrived():
                    left += len(gone)
                    metres += len(gone) * self._road_length
                    for v in gone:
                        travelled += now - departs[int(v[2:])]
                while departs[due] <= now:
                    due += 1
                driving += (entered - left) * length
                waiting += max(0, due - entered) * length
                collisions += colliding()
            self._entered = entered
            self.seen = self._read()
            hard = sum([a < HARD for a in map(self._cars.getAcceleration, self.seen.ids)])
            co2 = sum(map(self._fumes, self._edges)) * seconds / 1000
        except self._errors as e:
            self.close()
            raise LacerError(f"the SUMO simulation failed at {self.now:.1f} s: {e}; reset() starts a new one") from e
        arrivals, self._left = left - self._left, left
        # Every vehicle drove from where it was, or entered, to where it is, or to the exit.
        self._driven = float(np.add.reduce(self.seen.xs))
        return Tally(metres + self._driven, driving, waiting, arrivals, travelled, hard, collisions, co2)

    def counts(self) -> list[int]:
        """Vehicles that passed each counter in the last whole interval, place by place from the right lane."""
        return list(map(self._passed, self._counters))

    @property
    def backlog(self) -> int:
        """Vehicles that should have entered and wait for room."""
        return max(0, bisect.bisect_right(self._departs, self.now) - self._entered)

    def _break_down(self) -> None:
        """Stop the next vehicle that drives up on the lane; clear the road when the incident ends."""
        sumo, incident = self.sumo, self._incident
        assert incident is not None
        if self.broken is not None:
            sumo.vehicle.resume(self.broken)
            self.broken, self._due = None, math.inf
            return
        for stretch in (incident.stretch, incident.stretch - 1):
            s = self.road.stretches[stretch]
            far = incident.position + (s.length if stretch != incident.stretch else 0.0)
            ids = sumo.lane.getLastStepVehicleIDs(f"{s.name}_{incident.lane + s.offset}")
            for v in reversed(ids):  # SUMO lists them in driving direction: nearest first
                gap = far - sumo.vehicle.getLanePosition(v)
                if gap < 30 + sumo.vehicle.getSpeed(v) ** 2 / 5:
                    continue
                at = self.road.stretches[incident.stretch]
                try:
                    sumo.vehicle.setStop(v, at.name, incident.position, incident.lane + at.offset, 1e6)
                except self._errors:  # it cannot stop there any more
                    continue
                self.broken, self._due = v, incident.end
                return

    def _apply(self, command: Command) -> None:
        sumo = self.sumo
        if command.capped or self._caps:
            caps = {"in": np.inf, "out": np.inf, "ramp": command.ramp_cap}
            caps |= {f"s{i}": c for i, c in enumerate(command.segment_caps, 1)}
            for edge, cap in caps.items():
                wanted = min(cap, _FREE)
                for v in sumo.edge.getLastStepVehicleIDs(edge):
                    if v[0] == "c" and self._caps.get(v, _FREE) != wanted:
                        sumo.vehicle.setMaxSpeed(v, wanted)
                        if wanted == _FREE:
                            del self._caps[v]
                        else:
                            self._caps[v] = wanted
        if command.clear_lane is None:
            return
        k, last = command.clear_lane, self.road.lanes - 1
        for e in self.clear_zone:
            s = self.road.stretches[e]
            for v in sumo.lane.getLastStepVehicleIDs(f"{s.name}_{k + s.offset}"):
                if v[0] == "c" and v != self.broken:
                    to = 1 if k == 0 else last - 1 if k == last else k + 1 if int(v[2:]) % 2 else k - 1
                    if v not in self._pressing:
                        self._pressing.add(v)
                        sumo.vehicle.setLaneChangeMode(v, _PRESSING)
                    sumo.vehicle.changeLane(v, to + s.offset, REAPPLY)

    def _read(self) -> Snapshot:
        found = list(map(self._lane_ids, self._lanes))
        ids = list(itertools.chain.from_iterable(found))
        return Snapshot(
            self.road, list(map(len, found)), ids, list(map(self._cars.getLanePosition, ids)),
            list(map(self._cars.getSpeed, ids)), ids.index(self.broken) if self.broken in ids else None)


def _failures() -> tuple[type[Exception], ...]:
    """What a failing SUMO raises; the exceptions of libsumo and traci have no common base."""
    clients = [sys.modules[n] for n in ("libsumo", "traci") if n in sys.modules]
    return (*(c.TraCIException for c in clients), *(c.FatalTraCIError for c in clients), RuntimeError, OSError)


def remote_command(options: list[str], client: Client) -> list[str]:
    """The command that starts SUMO in a process of its own; with a window that runs by itself and closes at the end.

    Raises:
        LacerError: if a window is asked for and there is no display.
    """
    name, window = "sumo", []
    if client == "gui":
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise LacerError('render_mode="human" opens sumo-gui, which needs a display, and DISPLAY is not set; '
                             'use render_mode="rgb_array"')
        name, window = "sumo-gui", ["--start", "true", "--quit-on-end", "true", "--delay", "50"]
    return [shutil.which(name, path=str(sumo_home() / "bin")) or name, *options, *window]


def _connect(options: list[str], client: Client) -> Any:
    """Start SUMO in a process of its own and connect to it."""
    command, label = remote_command(options, client), f"lacer-{next(_labels)}"
    try:
        import traci
    except ImportError as e:
        raise LacerError("traci is missing; install it with: pip install eclipse-sumo") from e
    failed: tuple[type[BaseException], ...] = (*_failures(), SystemExit)
    try:
        traci.start(command, label=label, numRetries=20, stdout=subprocess.DEVNULL)
    except failed as e:
        raise LacerError(f"{command[0]} did not start: {e}") from e
    return traci.getConnection(label)
