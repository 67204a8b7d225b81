"""What the sources other than camera and text show of a moment of traffic: detectors, counters, vehicle messages."""

from __future__ import annotations

import numpy as np

from lacer.envs.traffic.network import MAIN_LIMIT, RAMP_LIMIT, Motorway
from lacer.envs.traffic.simulation import Snapshot

JAM = 0.08
"""Density that reads 1: vehicles per metre and lane."""
FLOW = 0.5
"""Flow that reads 1: vehicles per second and lane."""
COUNTED = 0.15
"""Flow by lane that reads 1 at a counter: vehicles per second."""
HIGHEST = 2.0
"""Readings end here."""
VEHICLE_COLUMNS = 7


class Detectors:
    """Readings of the road, scaled to about 1, with relative noise.

    Attributes:
        size: length of :meth:`read`'s first array: density, mean speed, spread of speed and CAV share of each segment
            and the exit; density and speed of each lane of each segment; density and speed of the ramp; alarm, 1
            where a vehicle has broken down, for each lane of the segments ``watched``.
        summary: length of the second: speed, density and flow of each segment and the exit.
    """

    def __init__(self, road: Motorway, noise: float, watched: tuple[int, ...] = ()) -> None:
        self._watched = np.array(watched, int) + 1  # rows of the cells
        self._noise, self._ramp_space = noise, road.ramp_length * JAM
        self._m, self._n_lanes, self._segments = len(road.stretches) - 1, road.lanes, road.segments
        self._width = road.lanes + 2  # acceleration lane, through lanes, the entry's extra lane
        self._cells = (self._m + 2) * self._width  # row 0 is the ramp, row 1 the entry
        self._sums = 5 if watched else 4
        self._kinds = np.arange(0, self._sums * self._cells, self._cells)[:, None]
        lengths = np.array([s.length for s in road.stretches[1:]])
        self._space = lengths * [s.lanes for s in road.stretches[1:]] * JAM
        self._lane_space = lengths[:-1, None] * JAM
        self.size = 4 * self._m + 2 * self._segments * self._n_lanes + 2 + len(watched) * road.lanes
        self._ramp = 4 * self._m + 2 * self._segments * self._n_lanes
        self.summary = 3 * self._m

    def read(self, s: Snapshot, rng: np.random.Generator, by_lane: bool) -> tuple[np.ndarray, np.ndarray]:
        """Readings now. With ``by_lane`` False every lane shows the values of its segment."""
        m, n = self._m, len(s.edge)
        weights = np.empty((self._sums, n))
        weights[0], weights[1], weights[3] = 1, s.speed, s.cav
        np.multiply(s.speed, s.speed, out=weights[2])
        if self._sums > 4:
            weights[4] = s.broken
        index = s.edge * self._width + (s.lane + (self._width + 1)) + self._kinds
        cells = np.bincount(index.ravel(), weights.ravel(), self._sums * self._cells)
        cells = cells.reshape(self._sums, m + 2, self._width)
        count, pace, pace2, cav = cells[:4, 2:].sum(2)
        some = np.maximum(count, 1)
        mean = pace / some
        out = np.empty(self.size)
        head = out[:4 * m].reshape(m, 4)
        head[:, 0] = count / self._space
        head[:, 1] = np.where(count > 0, mean / MAIN_LIMIT, 1)
        head[:, 2] = np.sqrt(np.maximum(pace2 / some - mean * mean, 0)) / 10
        head[:, 3] = cav / some
        lanes = out[4 * m:self._ramp].reshape(self._segments, self._n_lanes, 2)
        if by_lane:
            nl, vl = cells[0, 2:-1, 1:-1], cells[1, 2:-1, 1:-1]
            lanes[..., 0] = nl / self._lane_space
            lanes[..., 1] = np.where(nl > 0, vl / np.maximum(nl, 1) / MAIN_LIMIT, 1)
        else:
            lanes[:] = head[:-1, None, :2]
        on_ramp, ramp_pace = cells[:2, 0, 0]
        out[self._ramp] = on_ramp / self._ramp_space
        out[self._ramp + 1] = ramp_pace / on_ramp / RAMP_LIMIT if on_ramp else 1
        if self._sums > 4:
            alarm = cells[4, self._watched, 1:-1]
            out[self._ramp + 2:].reshape(alarm.shape)[:] = alarm if by_lane else alarm.mean(1, keepdims=True)
        out *= rng.normal(1.0, self._noise, self.size)
        now = np.minimum(np.maximum(out, 0, out=out), HIGHEST, out=out).astype(np.float32)
        seen = now[:4 * m].reshape(m, 4)
        past = np.empty((m, 3), np.float32)
        past[:, 0], past[:, 1] = seen[:, 1], seen[:, 0]
        past[:, 2] = np.minimum(seen[:, 0] * JAM * seen[:, 1] * MAIN_LIMIT / FLOW, HIGHEST)
        return now, past.ravel()


def counters(counts: np.ndarray, seconds: float, by_lane: bool) -> np.ndarray:
    """Flow by lane, scaled, flat, from counts (places, L) of an interval; the mean of the lanes where counters fail."""
    flow = counts / (seconds * COUNTED)
    if not by_lane:
        flow = np.broadcast_to(flow.mean(1, keepdims=True), flow.shape)
    return np.minimum(flow.ravel(), HIGHEST).astype(np.float32)


def vehicles(road: Motorway, s: Snapshot, length: int, lanes_known: bool, reports: bool | None) -> np.ndarray:
    """Vehicles before the end of the merge, nearest first: (N, 7), see
    :class:`~lacer.envs.traffic.mixed.MixedTrafficEnv`; all are on lane 0 where lanes are not known.

    ``reports`` not None adds L columns; True: a broken-down vehicle names its lane there, and is listed however far
    downstream it is."""
    out = np.zeros((length, VEHICLE_COLUMNS + (0 if reports is None else road.lanes)), np.float32)
    x, lane = s.x, s.lane
    far = road.merge_end - x
    chosen = np.flatnonzero((far >= 0) | s.broken if reports else far >= 0)
    chosen = chosen[far[chosen].argsort(kind="stable")][:length]
    n = len(chosen)
    if not n:
        return out
    # Sorted by lane, then along the road, the next one in the same lane is the one ahead.
    order = (lane * 1e5 + x).argsort()
    ahead = np.full(len(x), 100.0)
    sorted_lane, sorted_x = lane[order], x[order]
    ahead[order[:-1]] = np.where(sorted_lane[1:] == sorted_lane[:-1], sorted_x[1:] - sorted_x[:-1] - 5.0, 100.0)
    seen = out[:n]
    seen[:, 0] = 1
    seen[:, 1] = far[chosen] / 500
    if lanes_known:
        seen[:, 2] = (lane[chosen] + 1) / road.lanes
    seen[:, 3] = s.speed[chosen] / MAIN_LIMIT
    seen[:, 4] = np.minimum(np.maximum(ahead[chosen], 0), 100) / 100
    seen[:, 5] = s.cav[chosen]
    seen[:, 6] = s.ramp[chosen]
    if reports:
        row = np.flatnonzero(s.broken[chosen])
        seen[row, VEHICLE_COLUMNS + lane[chosen[row]]] = 1
    return np.minimum(np.maximum(out, -2, out=out), 2, out=out)
