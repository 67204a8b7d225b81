"""A bird's-eye camera made with NumPy: one strip per stretch, right-hand lanes below, driven from left to right."""

from __future__ import annotations

import numpy as np

from lacer.envs.traffic.network import MAIN_LIMIT, Motorway

SIZE = 64
BODY = 150
"""Brightness of a vehicle in the occupancy channel; a broken-down one flashes its hazard lights at 255."""


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
        self._scale = SIZE / self._lengths[1:]
        self._lane_rows = strips * (self._lanes + 1) + 1  # the last one stays black, for what is left of the picture
        high = np.arange(SIZE)
        lane_of = high % self._strip // self._rows
        self._row_of = np.where((high < strips * self._strip) & (lane_of <= self._lanes),
                                high // self._strip * (self._lanes + 1) + lane_of, self._lane_rows - 1)
        self._ramp_shift = road.stretches[1].length - road.ramp_length

    def draw(
        self, edge: np.ndarray, lane: np.ndarray, position: np.ndarray, speed: np.ndarray, cav: np.ndarray,
        broken: np.ndarray,
    ) -> np.ndarray:
        """Paint vehicles, all arrays of shape (n,): ``edge`` is the stretch (-1 for the ramp), ``lane`` the through
        lane (-1 for the acceleration lane), ``position`` of the front bumper (m), ``speed`` (m/s)."""
        ramp = edge < 0
        strip = np.where(ramp, 0, edge - 1)
        front = position + ramp * self._ramp_shift
        seen = np.flatnonzero((strip >= 0) & (front * self._scale[strip] > -1))
        strip, front, broken = strip[seen], front[seen], broken[seen]
        scale = self._scale[strip]
        x1 = (front * scale).astype(int)[:, None]
        x0 = np.maximum(((front - 5.0 - 4.0 * broken) * scale).astype(int), 0)[:, None]
        row = strip * (self._lanes + 1) + self._lanes - 1 - np.where(ramp, -1, lane)[seen]
        colour = np.empty((len(seen), 1, 3), np.uint8)
        colour[:, 0, 0] = np.where(broken, 255, BODY)
        colour[:, 0, 1] = np.minimum(40 + 215 * speed[seen] / MAIN_LIMIT, 255)
        colour[:, 0, 2] = cav[seen] * np.uint8(200)
        back = np.arange((x1 - x0).max(initial=0) + 1)
        lanes = np.zeros((self._lane_rows, SIZE, 3), np.uint8)
        lanes[row[:, None], np.minimum(np.maximum(x1 - back, x0), SIZE - 1)] = colour
        return lanes[self._row_of]

    def where(self, stretch: int, lane: int, position: float) -> tuple[int, int]:
        """Row and column of a place on the main road."""
        column = int(position * SIZE / self._lengths[stretch])
        return (stretch - 1) * self._strip + (self._lanes - 1 - lane) * self._rows, min(column, SIZE - 1)


def fog(image: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """The picture on a foggy day: a twelfth of its contrast is left, under noise; noise alone without a picture."""
    noise = rng.integers(0, 60, (SIZE, SIZE), dtype=np.uint8)[..., None]
    return np.repeat(noise, 3, axis=2) if image is None else (image // 12 + noise).astype(np.uint8)
