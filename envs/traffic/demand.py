"""What one episode brings, drawn from its seed: vehicles, incident, dispatcher's order, which sources tell the news."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lacer.envs.traffic.network import Motorway

CARRIERS = ("instruction", "camera", "traffic", "history", "sequence")
"""Sources that can tell the lane of an incident."""
OrderKind = Literal["nothing", "speed_limit", "ramp_priority", "ramp_hold"]
_MIN_HEADWAY = 0.8

# Krauss (1998) drivers. The slow reaction (actionStepLength 1 s) is what makes a blocked lane costly; with an
# immediate one an incident hardly matters. LC2013 (Erdmann 2014) changes lanes; drivers who change less for speed
# alone (lcSpeedGain below SUMO's 1) run into a blocked lane more often, so that telling them early pays.
_DRIVER: dict[str, str | float] = {
    "carFollowModel": "Krauss", "accel": 1.2, "decel": 3.5, "tau": 1.2, "minGap": 2.5, "length": 5,
    "actionStepLength": 1.0, "laneChangeModel": "LC2013", "lcSpeedGain": 0.3, "maxSpeed": 36,
    "speedFactor": "normc(1,0.05,0.85,1.15)", "sigma": 0.5,
}
HUMANS: dict[str, tuple[float, float]] = {
    "sigma": (0, 1), "accel": (0.1, 10), "decel": (0.1, 15), "tau": (0.1, 10), "minGap": (0, 20),
    "actionStepLength": (0.1, 5), "lcSpeedGain": (0, 100), "lcCooperative": (0, 1), "lcKeepRight": (0, 100),
}
"""SUMO's attributes of human drivers that can be set, with their ranges; ``carFollowModel`` besides."""
MODELS = ("Krauss", "IDM", "EIDM", "W99")
"""Car-following models that human drivers can have."""


def vehicle_types(humans: Mapping[str, str | float]) -> str:
    """SUMO's types ``human`` and ``cav``; ``humans`` holds what of the first differs."""
    types = {"human": {**_DRIVER, **humans}, "cav": {**_DRIVER, "sigma": 0.3}}
    return "".join(f'<vType id="{name}" ' + " ".join(f'{k}="{v}"' for k, v in driver.items()) + "/>\n"
                   for name, driver in types.items())


@dataclass(frozen=True)
class Incident:
    """A vehicle that stands on a through lane; times in s of simulation, ``position`` in m on its stretch."""

    lane: int
    stretch: int
    position: float
    start: float
    end: float


@dataclass(frozen=True)
class Order:
    """What the dispatcher asks for while no incident is announced. ``speed`` in m/s, for controlled ``segment``."""

    kind: OrderKind
    segment: int = 0
    speed: float = 0.0


@dataclass(frozen=True)
class Trip:
    """One vehicle: departure time (s), on the ramp or not, connected and automated (CAV) or not."""

    depart: float
    ramp: bool
    cav: bool


@dataclass(frozen=True)
class Episode:
    """Everything that the seed of an episode decides. Flows in vehicles per hour; ``news`` are the sources that can
    tell the lane of an incident in this episode."""

    main_flow: float
    ramp_flow: float
    trips: tuple[Trip, ...]
    incident: Incident | None
    news: frozenset[str]
    order: Order
    sumo_seed: int

    def write_routes(self, path: Path, road: Motorway, humans: Mapping[str, str | float]) -> None:
        """SUMO's route file, sorted by departure (SUMO drops later rows silently where it is not); for ``humans`` see
        :func:`vehicle_types`."""
        rows = [
            f'<vehicle id="{"c" if t.cav else "h"}{"r" if t.ramp else "m"}{i}" type="{"cav" if t.cav else "human"}" '
            f'route="{"ramp" if t.ramp else "main"}" depart="{t.depart:.2f}" departLane="free" departSpeed="max"/>'
            for i, t in enumerate(self.trips)
        ]
        routes = "".join(f'<route id="{n}" edges="{road.route_edges(n == "ramp")}"/>\n' for n in ("main", "ramp"))
        path.write_text(f"<routes>\n{vehicle_types(humans)}{routes}" + "\n".join(rows) + "\n</routes>\n")


def arrivals(rng: np.random.Generator, flow: float, end: float) -> np.ndarray:
    """Departure times in [0, end): a Poisson stream with a minimum headway, ``flow`` vehicles per hour on average."""
    if flow <= 0:
        return np.zeros(0)
    mean = 3600 / flow
    least = min(_MIN_HEADWAY, 0.5 * mean)
    gaps = least + rng.exponential(mean - least, int(1.5 * end / mean) + 20)
    times = np.cumsum(gaps)
    return times[times < end]


def draw_episode(
    rng: np.random.Generator,
    road: Motorway,
    *,
    cav_share: float,
    main_flow: tuple[float, float],
    ramp_flow: tuple[float, float],
    incident_probability: float,
    incident_start: tuple[float, float],
    incident_segments: tuple[int, ...],
    incident_place: tuple[float, float],
    news: Mapping[str, float],
    order_weights: tuple[float, float, float, float],
    end: float,
) -> Episode:
    """Draw an episode that ends at ``end`` seconds. ``incident_segments`` counts controlled segments from 1;
    ``incident_place`` is the range of the position on the segment, as a share of its length; ``news`` are weights of
    sources, or of several joined by ``+``."""
    flow, ramp = float(rng.uniform(*main_flow)), float(rng.uniform(*ramp_flow))
    trips = [
        Trip(round(float(t), 2), on_ramp, bool(rng.random() < cav_share))
        for on_ramp, q in ((False, flow), (True, ramp)) for t in arrivals(rng, q, end)
    ]
    trips.sort(key=lambda t: t.depart)
    happens = rng.random() < incident_probability
    stretch = int(rng.choice(incident_segments))
    length = road.stretches[stretch].length
    incident = Incident(
        lane=int(rng.integers(road.lanes)), stretch=stretch, position=float(rng.uniform(*incident_place) * length),
        start=float(rng.uniform(*incident_start)), end=end,
    )
    tellers = list(news)[rng.choice(len(news), p=np.array(list(news.values())) / sum(news.values()))]
    kinds: tuple[OrderKind, ...] = ("nothing", "speed_limit", "ramp_priority", "ramp_hold")
    order = Order(
        kind=kinds[rng.choice(4, p=np.array(order_weights) / sum(order_weights))],
        segment=int(rng.integers(road.segments)),
        speed=float(rng.choice([60, 80])) / 3.6,
    )
    return Episode(flow, ramp, tuple(trips), incident if happens else None, frozenset(tellers.split("+")), order,
                   int(rng.integers(2**31 - 1)))
