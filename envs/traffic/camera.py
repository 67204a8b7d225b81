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
        self._lane_rows = strips * (self._lanes + 1) + 1  # the last one stays black, for what is left of the picture
        high = np.arange(SIZE)
        lane_of = high % self._strip // self._rows
        self._row_of = np.where((high < strips * self._strip) & (lane_of <= self._lanes),
                                high // self._strip * (self._lanes + 1) + lane_of, self._lane_rows - 1)
        # By stretch; the last one, the ramp, is beside s1. Vehicles of the entry go to a row that is not shown.
        self._scale = SIZE / np.array([*self._lengths, self._lengths[1]])
        self._shift = np.array([*[0.0] * len(self._lengths), self._lengths[1] - road.ramp_length])
        self._shift[0] = -1e4
        self._first_row = np.array([0, *range(strips), 0]) * (self._lanes + 1) + self._lanes - 1

    def draw(
        self, edge: np.ndarray, lane: np.ndarray, position: np.ndarray, speed: np.ndarray, cav: np.ndarray,
        broken: np.ndarray, lit: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Paint vehicles, all arrays of shape (n,): ``edge`` is the stretch (-1 for the ramp), ``lane`` the through
        lane (-1 for the acceleration lane), ``position`` of the front bumper (m), ``speed`` (m/s).
        ``lit`` is (stretch, lane) of a lane that overhead lights show as closed: occupancy 255 where no vehicle is."""
        scale = self._scale[edge]
        front = (position + self._shift[edge]) * scale
        x1 = front.astype(int)[:, None]
        x0 = np.maximum((front - (5.0 + 4.0 * broken) * scale).astype(int), 0)[:, None]
        row = self._first_row[edge] - np.where(edge < 0, -1, lane)
        row[front <= -1] = -1  # not in the picture, like the entry
        colour = np.empty((len(row), 1, 3), np.uint8)
        colour[:, 0, 0] = BODY
        colour[broken, 0, 0] = 255
        colour[:, 0, 1] = np.minimum(40 + 215 * speed / MAIN_LIMIT, 255)
        colour[:, 0, 2] = cav * np.uint8(200)
        back = np.arange((x1 - x0).max(initial=0) + 1)
        lanes = np.zeros((self._lane_rows + 1, SIZE, 3), np.uint8)
        if lit:
            lanes[self._first_row[lit[0]] - lit[1], :, 0] = 255
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
