"""A bird's-eye camera made with NumPy: one strip per stretch, right-hand lanes below, driven from left to right."""

from __future__ import annotations

from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np

from lacer.envs.traffic.network import MAIN_LIMIT, Motorway

if TYPE_CHECKING:
    from lacer.envs.traffic.simulation import Snapshot

SIZE = 64
BODY = 150
"""Brightness of a vehicle in the occupancy channel; a broken-down one flashes its hazard lights at 255."""
_PIXELS = [[bytes((body, level, 200 * cav)) for level in range(256)] for body in (BODY, 255) for cav in (0, 1)]
_ROW = 3 * SIZE


class Camera:
    """Draws the (64, 64, 3) uint8 picture: channel 0 occupancy, 1 speed, 2 CAV.

    The picture has one strip for each stretch but the entry. In a strip the columns run along the stretch and each
    lane is a few rows high, the leftmost on top; the lowest lane is the acceleration lane, or, beside ``s1``, the end
    of the ramp. Speed is ``40 + 215 * v / 27.78``, so a standing vehicle still differs from an empty road.
    """

    def __init__(self, road: Motorway) -> None:
        strips = len(road.stretches) - 1
        self._strip = SIZE // strips
        self._rows = self._strip // (road.lanes + 1)
        self._lanes = road.lanes
        self._lengths = np.array([s.length for s in road.stretches])
        self._lane_rows = strips * (self._lanes + 1) + 1  # the last one stays black, for what is left of the picture
        high = np.arange(SIZE)
        lane_of = high % self._strip // self._rows
        self._row_of = np.where((high < strips * self._strip) & (lane_of <= self._lanes),
                                high // self._strip * (self._lanes + 1) + lane_of, self._lane_rows - 1)
        # By lane shown: metres before the picture, pixels a metre, where its row begins in memory.
        self._shown: list[tuple[float, float, int]] = []
        for place in road.places:
            if place.edge != 0:
                beside = road.stretches[max(place.edge, 1)]  # the ramp is beside s1
                shift = beside.length - road.ramp_length if place.edge < 0 else 0.0
                self._shown.append((shift, SIZE / beside.length, self._row(max(place.edge, 1), place.lane) * _ROW))
        self._hidden = len(road.places) - len(self._shown)

    def _row(self, stretch: int, lane: int) -> int:
        """Row of a lane among all lanes shown."""
        return (stretch - 1) * (self._lanes + 1) + self._lanes - 1 - lane

    def draw(self, s: Snapshot, lit: tuple[int, int] | None = None) -> np.ndarray:
        """The picture of all vehicles. ``lit`` is (stretch, lane) of a lane that overhead lights show as closed:
        occupancy 255 where no vehicle is."""
        lanes = bytearray(self._lane_rows * _ROW)
        if lit:
            start = self._row(*lit) * _ROW
            lanes[start:start + _ROW:3] = b"\xff" * SIZE
        kinds: list[int] = [*s.cavs]
        if s.stopped is not None:
            kinds[s.stopped] += 2
        entry = sum(s.counts[:self._hidden])
        beside = chain.from_iterable(map(repeat, self._shown, s.counts[self._hidden:]))
        for position, speed, kind, (shift, scale, row) in zip(
                s.positions[entry:], s.speeds[entry:], kinds[entry:], beside, strict=True):
            front = (position + shift) * scale
            if front > -1:  # others are on the ramp, before the picture
                rear = front - (5.0 if kind < 2 else 9.0) * scale
                a = int(rear) if rear > 0 else 0
                b = int(front) if front < SIZE else SIZE - 1
                level = int(215 * speed / MAIN_LIMIT + 40)
                lanes[row + 3 * a:row + 3 * b + 3] = _PIXELS[kind][level if level < 255 else 255] * (b - a + 1)
        return np.frombuffer(lanes, np.uint8).reshape(-1, SIZE, 3).take(self._row_of, 0)

    def where(self, stretch: int, lane: int, position: float) -> tuple[int, int]:
        """Row and column of a place on the main road."""
        column = int(position * SIZE / self._lengths[stretch])
        return (stretch - 1) * self._strip + (self._lanes - 1 - lane) * self._rows, min(column, SIZE - 1)


def fog(image: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The picture on a foggy day: a twelfth of its contrast is left, under noise; noise alone without a picture."""
    noise = rng.integers(0, 60, (SIZE, SIZE), dtype=np.uint8)[..., None]
    return np.repeat(noise, 3, axis=2) if image is None else (image // 12 + noise).astype(np.uint8)
