"""Dispatcher messages in plain English, with wordings for training and others held out."""

from __future__ import annotations

import string
from typing import Literal

from lacer.envs.traffic.demand import Incident, Order
from lacer.envs.traffic.network import Motorway

MAX_LENGTH = 120
CHARSET = string.ascii_letters + string.digits + " .,:;-/'()"

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "incident": (
            "Incident: {lane} lane blocked at kilometre {km}.",
            "A broken-down vehicle stands on the {lane} lane near km {km}.",
            "Caution, the {lane} lane is closed at kilometre {km} after a breakdown.",
            "Stopped vehicle at km {km}, {lane} lane. Keep that lane clear.",
            "Obstruction reported: {lane} lane not passable at km {km}.",
        ),
        "speed_limit": (
            "Temporary speed limit of {speed} km/h between kilometre {a} and {b}.",
            "Slow down to {speed} km/h from km {a} to km {b}: road works at the roadside.",
            "Fog between km {a} and km {b}, no faster than {speed} km/h there.",
        ),
        "ramp_priority": (
            "Give the on-ramp priority: emergency vehicles are about to join.",
            "Let traffic from the ramp in without holding it back.",
            "Ramp traffic goes first, do not hold it.",
        ),
        "ramp_hold": (
            "Hold the on-ramp: as few vehicles as possible may join.",
            "Please keep vehicles back on the ramp for now.",
            "Ramp closed to joining traffic until further notice, hold it.",
        ),
        "nothing": (
            "Nothing in particular to report.",
            "No special instructions. Drive normally.",
            "All quiet, no messages from the control room.",
        ),
    },
    "held_out": {
        "incident": (
            "A lorry has stalled at kilometre {km} and occupies the {lane} lane.",
            "Nobody can pass on the {lane} lane at km {km}; move over early.",
            "Control room: disabled car in the {lane} lane at kilometre {km}.",
        ),
        "speed_limit": (
            "From kilometre {a} up to {b}, please do not exceed {speed} km/h.",
            "Poor visibility: {speed} km/h at most on the stretch km {a} - km {b}.",
        ),
        "ramp_priority": (
            "An ambulance enters by the slip road; vehicles joining there have right of way.",
            "Do not delay anybody on the slip road.",
        ),
        "ramp_hold": (
            "Meter the slip road strictly; joining vehicles have to wait.",
            "Nobody should enter from the slip road unless it cannot be avoided.",
        ),
        "nothing": (
            "There is no news at the moment.",
            "Business as usual on this road.",
        ),
    },
}
"""Templates by set of wordings and kind of message."""


def lane_name(lane: int, lanes: int) -> str:
    """How a dispatcher calls a through lane, numbered from the right."""
    if lanes <= 3:
        return ("right-hand", "overtaking")[lane] if lanes == 2 else ("right", "middle", "left")[lane]
    if lane in (0, lanes - 1):
        return "rightmost" if lane == 0 else "leftmost"
    return ("", "second", "third", "fourth", "fifth", "sixth", "seventh")[lane] + " from the right"


def _km(metres: float) -> str:
    """Two digits; three beyond ten kilometres."""
    return f"{metres / 1000:.{2 if metres < 9950 else 3}g}"


def message(
    road: Motorway, wordings: Literal["train", "held_out"], pick: float, incident: Incident | None, order: Order
) -> str:
    """The message in force: the incident if one is given, else the order; ``pick`` in [0, 1) chooses the wording."""
    kind = "incident" if incident else order.kind
    choices = WORDINGS[wordings][kind]
    values: dict[str, object] = {}
    if incident:
        km = (road.starts[incident.stretch] + incident.position) / 1000
        values = {"lane": lane_name(incident.lane, road.lanes), "km": f"{km:.1f}"}
    elif kind == "speed_limit":
        a = road.starts[order.segment + 1]
        b = a + road.stretches[order.segment + 1].length
        values = {"speed": round(order.speed * 3.6), "a": _km(a), "b": _km(b)}
    return choices[int(pick * len(choices))].format(**values)
