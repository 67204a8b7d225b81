"""A bird's-eye camera made with NumPy: one strip per stretch, right-hand lanes below, driven from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lacer.envs.traffic.network import MAIN_LIMIT, Motorway

if TYPE_CHECKING:
    from lacer.envs.traffic.simulation import Snapshot

SIZE = 64
_ROW = 3 * SIZE
BODY = 150
"""Brightness of a vehicle in the occupancy channel; a broken-down one flashes its hazard lights at 255."""


_PIXELS = [[bytes((BODY, level, 200 * cav)) for level in range(256)] for cav in (False, True)]


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
        # By lane: where its row begins in memory, pixels a metre, metres before the picture; none for the entry.
        self._places: list[tuple[int, float, float] | None] = []
        for place in road.places:
            beside = road.stretches[max(place.edge, 1)]  # the ramp is beside s1
            shift = beside.length - road.ramp_length if place.edge < 0 else 0.0
            row = self._row(max(place.edge, 1), place.lane)
            self._places.append(None if place.edge == 0 else (row * _ROW, SIZE / beside.length, shift))

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
        broken = None if s.stopped is None else s.ids[s.stopped]
        first = 0
        for place, n in zip(self._places, s.counts, strict=True):
            if place is not None and n:
                start, scale, shift = place
                end = first + n
                for x, v, cav, name in zip(s.positions[first:end], s.speeds[first:end], s.cavs[first:end],
                                           s.ids[first:end], strict=True):
                    front = (x + shift) * scale
                    if front <= -1:  # on the ramp, before the picture
                        continue
                    b = int(front) if front < SIZE else SIZE - 1
                    level = min(int(40 + 215 * v / MAIN_LIMIT), 255)
                    if name == broken:
                        a, pixel = int(front - 9.0 * scale), bytes((255, level, 200 * cav))
                    else:
                        a, pixel = int(front - 5.0 * scale), _PIXELS[cav][level]
                    a = 0 if a < 0 else a if a < SIZE else SIZE - 1
                    lanes[start + 3 * a:start + 3 * b + 3] = pixel * (b - a + 1)
            first += n
        return np.frombuffer(lanes, np.uint8).reshape(-1, SIZE, 3)[self._row_of]

    def where(self, stretch: int, lane: int, position: float) -> tuple[int, int]:
        """Row and column of a place on the main road."""
        column = int(position * SIZE / self._lengths[stretch])
        return (stretch - 1) * self._strip + (self._lanes - 1 - lane) * self._rows, min(column, SIZE - 1)


def fog(image: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The picture on a foggy day: a twelfth of its contrast is left, under noise; noise alone without a picture."""
    noise = rng.integers(0, 60, (SIZE, SIZE), dtype=np.uint8)[..., None]
    return np.repeat(noise, 3, axis=2) if image is None else (image // 12 + noise).astype(np.uint8)
