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
        self._ramp_shift = road.stretches[1].length - road.ramp_length

    def draw(
        self, edge: np.ndarray, lane: np.ndarray, position: np.ndarray, speed: np.ndarray, cav: np.ndarray,
        broken: np.ndarray,
    ) -> np.ndarray:
        """Paint vehicles, all arrays of shape (n,): ``edge`` is the stretch (-1 for the ramp), ``lane`` the through
        lane (-1 for the acceleration lane), ``position`` of the front bumper (m), ``speed`` (m/s)."""
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        ramp = edge < 0
        strip = np.where(ramp, 1, edge) - 1
        position = np.where(ramp, position + self._ramp_shift, position)
        lane = np.where(ramp, -1, lane)
        scale = SIZE / self._lengths[strip + 1]
        x1 = (position * scale).astype(int)
        x0 = np.minimum(((position - 5.0 - 4.0 * broken) * scale).astype(int), x1)
        top = strip * self._strip + (self._lanes - 1 - lane) * self._rows
        light = np.where(broken, 255, BODY)
        pace = np.clip(40 + 215 * speed / MAIN_LIMIT, 0, 255).astype(int)
        auto = np.where(cav, 200, 0)
        seen = (strip >= 0) & (x1 >= 0)
        for i in np.flatnonzero(seen):
            image[top[i]:top[i] + self._rows, max(x0[i], 0):x1[i] + 1] = (light[i], pace[i], auto[i])
        return image

    def where(self, stretch: int, lane: int, position: float) -> tuple[int, int]:
        """Row and column of a place on the main road."""
        column = int(position * SIZE / self._lengths[stretch])
        return (stretch - 1) * self._strip + (self._lanes - 1 - lane) * self._rows, min(column, SIZE - 1)


def fog(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture on a foggy day: a twelfth of its contrast is left, under noise."""
    noise = rng.integers(0, 60, image.shape[:2], dtype=np.uint8)[..., None]
    return (image // 12 + noise).astype(np.uint8)
