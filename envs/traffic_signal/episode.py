"""What an episode at the junction holds: vehicles, and what the control room asks for."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

import numpy as np

Kind = Literal["nothing", "buses", "approach"]
KINDS: tuple[Kind, ...] = ("nothing", "buses", "approach")
APPROACHES = ("north", "east", "south", "west")
TURNS = {"north": "wse", "east": "nws", "south": "enw", "west": "sen"}
"""Exits of an approach: right, straight on, left."""
_SHARES = (0.2, 0.6, 0.2)
MAX_LENGTH = 120
CHARSET = string.ascii_letters + string.digits + " .,:;-'()"

WORDINGS: dict[str, dict[Kind, tuple[str, ...]]] = {
    "train": {
        "nothing": (
            "Nothing in particular to report.",
            "No special instructions, keep everybody moving.",
            "All quiet, treat all approaches alike.",
        ),
        "buses": (
            "Favour the buses on the {side} approach.",
            "Bus priority: let buses from the {side} through first.",
            "The {side}ern bus line is late, give its buses green.",
            "Please do not keep buses waiting on the {side} side.",
        ),
        "approach": (
            "Give priority to the {side} approach.",
            "A crowd leaves the stadium from the {side}: clear that approach first.",
            "Keep the queue on the {side} side short.",
            "Road works ahead: drain the {side}ern arm.",
        ),
    },
    "held_out": {
        "nothing": ("There is no news at the moment.", "Business as usual at this junction."),
        "buses": (
            "Public transport coming from the {side} must not be held up.",
            "Whenever a bus shows up on the {side}ern arm, switch to it.",
        ),
        "approach": (
            "Traffic arriving from the {side} has to wait as little as possible.",
            "An event lets out in the {side}; its vehicles go first.",
        ),
    },
}
"""Templates by set of wordings and kind of message."""


@dataclass(frozen=True)
class Order:
    """What the control room asks for: ``approach`` is where, "" for nothing in particular."""

    kind: Kind
    approach: str
    text: str


@dataclass(frozen=True)
class Vehicle:
    """A vehicle that enters at ``depart`` (s) from an approach, leaves by the exit n, e, s or w, and may be a bus."""

    depart: float
    approach: str
    exit: str
    bus: bool


@dataclass(frozen=True)
class Episode:
    """An episode: its vehicles by departure, demand (veh/h) by approach in the first and second half, the order."""

    vehicles: tuple[Vehicle, ...]
    demand: np.ndarray
    order: Order
    sumo_seed: int

    def write_routes(self, path: Path) -> None:
        """The route file, sorted by departure, since SUMO drops what comes late."""
        lines = ['<routes>', '<vType id="car" accel="2.6" decel="4.5" sigma="0.5" length="5"/>',
                 '<vType id="bus" vClass="bus" accel="1.2" decel="4.0" sigma="0.5" length="12"/>']
        for a, exits in TURNS.items():
            lines += [f'<route id={quoteattr(f"{a}_{x}")} edges="{a[0]}_t t_{x}"/>' for x in exits]
        for i, v in enumerate(self.vehicles):
            lines.append(f'<vehicle id="{"bus" if v.bus else "car"}{i}" type="{"bus" if v.bus else "car"}" '
                         f'route="{v.approach}_{v.exit}" depart="{v.depart:.2f}" departLane="best" departSpeed="max"/>')
        path.write_text("\n".join([*lines, "</routes>"]))


def draw_episode(
    rng: np.random.Generator, *, horizon: float, flow: tuple[float, float], bus_flow: float,
    order_weights: Sequence[float], wordings: str,
) -> Episode:
    """Draws an episode: the demand of each approach changes once, in the middle.

    Args:
        rng: source of all chance.
        horizon: s.
        flow: lowest and highest demand of an approach, cars per hour.
        bus_flow: buses per hour and approach.
        order_weights: weights of (nothing, buses, approach).
        wordings: ``train`` or ``held_out``.
    """
    demand = rng.uniform(*flow, (2, 4))
    vehicles = []
    for half in range(2):
        for k, a in enumerate(APPROACHES):
            for bus, rate in ((False, demand[half, k]), (True, bus_flow)):
                n = rng.poisson(rate * horizon / 2 / 3600)
                for t in half * horizon / 2 + rng.uniform(0, horizon / 2, n):
                    vehicles.append(Vehicle(float(t), a, TURNS[a][rng.choice(3, p=_SHARES)], bus))
    weights = np.asarray(order_weights, float)
    kind = KINDS[rng.choice(3, p=weights / weights.sum())]
    side = str(rng.choice(APPROACHES))
    choices = WORDINGS[wordings][kind]
    text = choices[int(rng.random() * len(choices))].format(side=side)
    order = Order(kind, "" if kind == "nothing" else side, text)
    return Episode(tuple(sorted(vehicles, key=lambda v: v.depart)), demand, order, int(rng.integers(2**31 - 1)))
