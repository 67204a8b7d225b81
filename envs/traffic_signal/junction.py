"""The junction: sumo-rl's network, what is on it, its camera."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from lacer.envs.errors import LacerError

LIMIT = 13.9
"""Speed limit, m/s."""
SIZE = 64
VIEW = 140.0
"""Metres in height and width that the camera sees."""
_NET = Path("nets", "2way-single-intersection", "single-intersection.net.xml")  # by sumo-rl's author, MIT like it


def net_file() -> Path:
    """The network in sumo-rl's wheel.

    Raises:
        LacerError: if sumo-rl is missing or has no such network.
    """
    spec = importlib.util.find_spec("sumo_rl")
    if spec is None or spec.origin is None:
        raise LacerError("lacer/TrafficSignal-v0 needs sumo-rl; install it with: pip install sumo-rl")
    path = Path(spec.origin).parent / _NET
    if not path.is_file():
        raise LacerError(f"this sumo-rl has no network {_NET}; install the version that was tested: "
                         "pip install sumo-rl==1.4.5")
    return path


class Junction:
    """Geometry of the network.

    Attributes:
        lanes: incoming lanes under the signal, in sumo-rl's order.
        greens: number of green phases.
        stops: (x, y) of the stop line of each signal link, and its lane.
    """

    def __init__(self, path: Path) -> None:
        root = ElementTree.parse(path).getroot()
        shapes = {lane.get("id", ""): lane.get("shape", "") for lane in root.iter("lane")}
        links = sorted((int(c.get("linkIndex", 0)), f"{c.get('from')}_{c.get('fromLane')}")
                       for c in root.iter("connection") if c.get("tl"))
        self.lanes = tuple(dict.fromkeys(lane for _, lane in links))
        phases = [p.get("state", "") for p in root.iter("phase")]
        self.greens = sum("y" not in p for p in phases)
        ends = {lane: tuple(map(float, shapes[lane].split()[-1].split(","))) for lane in self.lanes}
        self.stops = np.array([ends[lane] for _, lane in links])
        junction = next(j for j in root.iter("junction") if j.get("type") == "traffic_light")
        self.centre = np.array([float(junction.get(k, 0)) for k in "xy"])

    def picture(self, sumo: Any, signal: str) -> np.ndarray:
        """Bird's-eye picture (64, 64, 3) uint8, north on top: channel 0 occupancy (car 150, bus 255), 1 speed
        (40 standing, 255 at the limit), 2 signals at the stop lines (green 255, yellow 150, red 60)."""
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        vehicle = sumo.vehicle
        ids = vehicle.getIDList()
        if ids:
            place = np.array([vehicle.getPosition(v)[:2] for v in ids])
            angle = np.radians([vehicle.getAngle(v) for v in ids])  # 0 is north, clockwise
            speed = np.array([vehicle.getSpeed(v) for v in ids])
            bus = np.array([v[0] == "b" for v in ids])
            back = np.stack([np.sin(angle), np.cos(angle)], 1)
            pace = np.clip(40 + 215 * speed / LIMIT, 0, 255)
            for metres in np.arange(0.0, 12.0, 1.5):  # from the front bumper on
                there = bus | (metres < 5)
                row, column, seen = self._pixel(place[there] - metres * back[there])
                image[row, column, 0] = np.where(bus[there], 255, 150)[seen]
                image[row, column, 1] = pace[there][seen]
        light = {"G": 255, "g": 255, "y": 150}
        row, column, seen = self._pixel(self.stops)
        values = np.array([light.get(c, 60) for c in sumo.trafficlight.getRedYellowGreenState(signal)])[seen]
        np.maximum.at(image[..., 2], (row, column), values.astype(np.uint8))
        return image

    def _pixel(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row and column of the points that the camera sees, and which these are."""
        at = (xy - self.centre) * (SIZE / VIEW) + SIZE / 2
        column, row = np.floor(at[:, 0]).astype(int), SIZE - 1 - np.floor(at[:, 1]).astype(int)
        seen = (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
        return row[seen], column[seen], seen
