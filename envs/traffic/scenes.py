"""Scenes of the motorway: defaults that belong together, and the check of all arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.traffic.demand import CARRIERS, HUMANS, MODELS
from lacer.envs.traffic.network import Motorway
from lacer.envs.traffic.simulation import REAPPLY

CONTROLS = ("speeds", "lanes", "ramp")
"""Parts of an action, in their order."""

SCENES: dict[str, dict[str, Any]] = {
    "small": {
        "lanes": 3, "drop": "before", "in_length": 100.0, "segment_lengths": (300.0, 150.0, 100.0),
        "out_length": 50.0, "ramp_length": 150.0, "main_flow": (2100.0, 2700.0), "ramp_flow": (200.0, 500.0),
        "step_length": 1.0, "warm_up": 60.0, "horizon": 240.0, "incident_probability": 1.0,
        "incident_delay": (-20.0, -10.0), "incident_segments": (3,), "incident_place": (0.1, 0.4),
        "clear_segments": (1, 2), "news": {"instruction": 0.5, "camera": 0.2, "instruction+camera": 0.3},
        "order_weights": (0.4, 0.2, 0.2, 0.2), "order_weight": 0.03, "safety_weight": 0.0, "controls": CONTROLS,
    },
    "full": {
        "lanes": 3, "drop": "after", "in_length": 250.0, "segment_lengths": (350.0, 300.0, 350.0, 350.0),
        "out_length": 300.0, "ramp_length": 250.0, "main_flow": (2100.0, 2900.0), "ramp_flow": (200.0, 500.0),
        "step_length": 1.0, "warm_up": 100.0, "horizon": 300.0, "incident_probability": 0.8,
        "incident_delay": (0.0, 60.0), "incident_segments": (3, 4), "incident_place": (0.1, 0.4),
        "clear_segments": (1, 2, 3), "news": {"instruction": 0.4, "camera": 0.3, "instruction+camera": 0.3},
        "order_weights": (0.4, 0.2, 0.2, 0.2), "order_weight": 0.03, "safety_weight": 0.0, "controls": CONTROLS,
    },
    "sources": {
        "lanes": 2, "drop": "before", "in_length": 100.0, "segment_lengths": (300.0, 150.0, 120.0),
        "out_length": 50.0, "ramp_length": 150.0, "main_flow": (1200.0, 1500.0), "ramp_flow": (60.0, 200.0),
        "step_length": 1.0, "warm_up": 60.0, "horizon": 120.0, "incident_probability": 1.0,
        "incident_delay": (-35.0, -25.0), "incident_segments": (3,), "incident_place": (0.1, 0.4),
        "clear_segments": (1, 2),
        "news": {"instruction": 0.19, "camera": 0.22, "traffic": 0.17, "history": 0.2, "sequence": 0.22},
        "order_weights": (1.0, 0.0, 0.0, 0.0), "order_weight": 0.0, "safety_weight": 1.0, "controls": ("lanes",),
    },
}
"""Defaults by scene. ``incident_delay`` is in seconds after the warm-up; segments count from 1."""


def motorway(p: Mapping[str, Any]) -> Motorway:
    """The road of a scene, all of it stretched to ``length`` metres where that is given."""
    lengths = [p["in_length"], *p["segment_lengths"], p["out_length"]]
    if p.get("length") is None:
        first, *middle, last = lengths
        return Motorway(p["lanes"], p["drop"], first, tuple(middle), last, p["ramp_length"])
    scale = p["length"] / sum(lengths)
    first, *middle, last = (round(scale * x, 1) for x in lengths)
    return Motorway(p["lanes"], p["drop"], first, tuple(middle), last, round(scale * p["ramp_length"], 1))


def check(p: Mapping[str, Any]) -> None:
    """Reject what cannot be simulated, naming the argument and what it may be.

    Raises:
        LacerError: for the first impossible argument.
    """

    def need(ok: Any, name: str, rule: str) -> None:
        if not ok:
            raise LacerError(f"{name} must be {rule}, not {p[name]!r}")

    def number(x: Any) -> bool:
        return isinstance(x, int | float | np.number)

    need(isinstance(p["lanes"], int | np.integer) and 2 <= p["lanes"] <= 8, "lanes", "a whole number from 2 to 8")
    for name in ("cav_share", "incident_probability"):
        need(number(p[name]) and 0 <= p[name] <= 1, name, "between 0 and 1")
    for name in ("main_flow", "ramp_flow"):
        need(np.shape(p[name]) == (2,) and 0 <= p[name][0] <= p[name][1] <= 20000, name,
             "(lowest, highest) vehicles per hour with 0 <= lowest <= highest")
    need(np.shape(p["order_weights"]) == (4,) and min(p["order_weights"]) >= 0 and sum(p["order_weights"]) > 0,
         "order_weights", "4 weights, none negative and not all zero")
    news = p["news"]
    need(isinstance(news, Mapping) and news and all(number(w) and 0 <= w < np.inf for w in news.values())
         and sum(news.values()) > 0, "news", "a mapping from sources to weights, none negative and not all zero")
    for name in (n for key in news for n in str(key).split("+")):
        if name not in CARRIERS:
            raise UnknownNameError("source in news", name, CARRIERS)
    controls = p["controls"]
    need(not isinstance(controls, str) and len(controls) > 0 and len(set(controls)) == len(controls), "controls",
         f"one or more of {', '.join(CONTROLS)}")
    for name in controls:
        if name not in CONTROLS:
            raise UnknownNameError("control", str(name), CONTROLS)
    for name in ("safety_weight", "order_weight"):
        need(number(p[name]) and 0 <= p[name] < np.inf, name, "0 or more")
    need(p.get("length") is None or (number(p["length"]) and 400 <= p["length"] <= 20000), "length",
         "between 400 and 20000 metres")
    humans = p["humans"]
    need(isinstance(humans, Mapping), "humans", "a mapping from SUMO's attributes of drivers to values")
    for name, value in humans.items():
        if name == "carFollowModel":
            if value not in MODELS:
                raise UnknownNameError("car-following model", str(value), MODELS)
        elif name not in HUMANS:
            raise UnknownNameError("attribute of human drivers", str(name), ["carFollowModel", *HUMANS])
        else:
            low, high = HUMANS[name]
            need(number(value) and low <= value <= high, "humans", f"such that {low:g} <= {name} <= {high:g}")
    for name in ("control_interval", "warm_up", "horizon"):
        need(number(p[name]) and np.isfinite(p[name]), name, "a finite number of seconds")
    step, control = p["step_length"], p["control_interval"]
    need(0.1 <= step <= 1 and abs(REAPPLY / step - round(REAPPLY / step)) < 1e-6, "step_length",
         f"between 0.1 and 1 and a part of {REAPPLY:g} s")
    need(control >= REAPPLY and abs(control / REAPPLY - round(control / REAPPLY)) < 1e-6, "control_interval",
         f"a multiple of {REAPPLY:g} s")
    need(p["warm_up"] >= 0, "warm_up", "0 or more seconds")
    need(p["horizon"] >= control and abs(p["horizon"] / control - round(p["horizon"] / control)) < 1e-6, "horizon",
         f"a multiple of control_interval ({control:g} s)")
    need(0 <= p["detector_noise"] <= 1, "detector_noise", "between 0 and 1")
    for name in ("history_length", "sequence_length"):
        need(isinstance(p[name], int | np.integer) and p[name] >= 1, name, "a whole number of at least 1")
