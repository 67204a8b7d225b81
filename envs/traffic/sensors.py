"""What the sources other than camera and text show of a moment of traffic: detectors, counters, vehicle messages."""

from __future__ import annotations

import numpy as np

from lacer.envs.traffic.network import MAIN_LIMIT, RAMP_LIMIT, Motorway
from lacer.envs.traffic.simulation import Snapshot

DENSE = 0.05
"""Density that reads 1: vehicles per metre and lane."""
FLOW = 0.5
"""Flow that reads 1: vehicles per second and lane."""
HIGHEST = 1.5
"""Readings end here."""
VEHICLE_COLUMNS = 7  # then one column per lane


class Detectors:
    """Readings of the road, scaled to about 1, with relative noise.

    Attributes:
        size: length of :meth:`read`'s first array: density, mean speed, spread of speed and CAV share of each segment
            and the exit; density and speed of each lane of each segment; density and speed of the ramp.
        summary: length of the second: speed, density and flow of each segment and the exit.
    """

    def __init__(self, road: Motorway, noise: float) -> None:
        self._road, self._noise = road, noise
        self._m, self._n_lanes, self._segments = len(road.stretches) - 1, road.lanes, road.segments
        self._width = road.lanes + 2  # acceleration lane, through lanes, the entry's extra lane
        lengths = np.array([s.length for s in road.stretches[1:]])
        self._space = lengths * [s.lanes for s in road.stretches[1:]] * DENSE
        self._lane_space = lengths[:-1, None] * DENSE
        self.size = 4 * self._m + 2 * self._segments * self._n_lanes + 2
        self.summary = 3 * self._m

    def read(self, s: Snapshot, rng: np.random.Generator, by_lane: bool) -> tuple[np.ndarray, np.ndarray]:
        """Readings now. With ``by_lane`` False every lane shows the values of its segment."""
        m, width = self._m, self._width
        size = (m + 2) * width
        cell = (s.edge + 1) * width + s.lane + 1  # row 0 is the ramp, row 1 the entry
        index = (cell + np.arange(0, 4 * size, size)[:, None]).ravel()
        weights = np.concatenate([np.ones(len(cell)), s.speed, s.speed * s.speed, s.cav])
        cells = np.bincount(index, weights, 4 * size).reshape(4, m + 2, width)
        n, v = cells[0], cells[1]
        count, pace, v2, cav = cells[:, 2:].sum(2)
        some = np.maximum(count, 1)
        mean = pace / some
        out = np.empty(self.size)
        head = out[:4 * m].reshape(m, 4)
        head[:, 0] = count / self._space
        head[:, 1] = np.where(count > 0, mean / MAIN_LIMIT, 1)
        head[:, 2] = np.sqrt(np.maximum(v2 / some - mean * mean, 0)) / 10
        head[:, 3] = cav / some
        lanes = out[4 * m:-2].reshape(self._segments, self._n_lanes, 2)
        if by_lane:
            nl, vl = n[2:-1, 1:-1], v[2:-1, 1:-1]
            lanes[..., 0] = nl / self._lane_space
            lanes[..., 1] = np.where(nl > 0, vl / np.maximum(nl, 1) / MAIN_LIMIT, 1)
        else:
            lanes[:] = head[:-1, None, :2]
        on_ramp = n[0].sum()
        out[-2] = on_ramp / (self._road.ramp_length * DENSE)
        out[-1] = v[0].sum() / on_ramp / RAMP_LIMIT if on_ramp else 1
        out *= rng.normal(1.0, self._noise, self.size)
        now = np.minimum(np.maximum(out, 0, out=out), HIGHEST, out=out).astype(np.float32)
        seen = now[:4 * m].reshape(m, 4)
        past = np.empty((m, 3), np.float32)
        past[:, 0], past[:, 1] = seen[:, 1], seen[:, 0]
        past[:, 2] = np.minimum(seen[:, 0] * seen[:, 1] * (DENSE * MAIN_LIMIT / FLOW), HIGHEST)
        return now, past.ravel()


def counters(counts: np.ndarray, seconds: float, by_lane: bool) -> np.ndarray:
    """Flow by lane, scaled, flat, from counts (places, L) of an interval; the mean of the lanes where counters fail."""
    flow = counts / (seconds * FLOW)
    if not by_lane:
        flow = np.broadcast_to(flow.mean(1, keepdims=True), flow.shape)
    return flow.ravel().clip(0, 1).astype(np.float32)


def vehicles(road: Motorway, s: Snapshot, length: int, by_lane: bool) -> np.ndarray:
    """Vehicles before the end of the merge, nearest first: (N, 7 + L + 1), see
    :class:`~lacer.envs.traffic.mixed.MixedTrafficEnv`. With ``by_lane`` a broken-down vehicle reports itself, however
    far downstream, and all lanes are known."""
    out = np.zeros((length, VEHICLE_COLUMNS + road.lanes + 1), np.float32)
    x, lane = s.x, s.lane
    far = road.merge_end - x
    chosen = np.flatnonzero((far >= 0) | s.broken if by_lane else far >= 0)
    chosen = chosen[np.argsort(far[chosen], kind="stable")][:length]
    n = len(chosen)
    if not n:
        return out
    # Sorted by lane, then along the road, the next one in the same lane is the one ahead.
    order = np.argsort(lane * 1e5 + x)
    ahead = np.full(len(x), 105.0)
    ahead[order[:-1]] = np.where(np.diff(lane[order]) == 0, np.diff(x[order]), 105.0)
    seen = out[:n]
    seen[:, 0] = 1
    seen[:, 1] = np.maximum(far[chosen] / 500, -2)
    seen[:, 2] = s.speed[chosen] / MAIN_LIMIT
    seen[:, 3] = np.minimum(np.maximum(ahead[chosen] / 100 - 0.05, 0), 1)
    seen[:, 4] = s.cav[chosen]
    seen[:, 5] = s.ramp[chosen]
    np.minimum(seen, 2, out=seen)
    if by_lane:
        seen[:, 6] = s.broken[chosen]
        seen[np.arange(n), VEHICLE_COLUMNS + np.minimum(lane[chosen], road.lanes - 1) + 1] = 1
    return out
