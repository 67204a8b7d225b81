"""What the sources other than camera and text show of a moment of traffic: detectors, counters, vehicle messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

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
EMPTY = (0.0, 1.0, 0.0, 0.0)
"""Density, mean speed, spread of speed and CAV share of a segment or lane without vehicles."""
VEHICLE_COLUMNS = 7


class Detectors:
    """Readings of the road, scaled to about 1, with relative noise.

    Attributes:
        size: length of :meth:`read`'s array: density, mean speed, spread of speed and CAV share of each segment
            and the exit; the same four of each lane of each segment; density and speed of the ramp; alarm, 1 where a
            vehicle has broken down, for each lane of the segments ``watched``. Where no vehicle is, see ``EMPTY``.
        summary: length of the row of the history that it fills: speed, density and flow of each segment and the exit.
    """

    def __init__(self, road: Motorway, noise: float, watched: tuple[int, ...] = ()) -> None:
        self._noise, self._watched, self._ramp_space = noise, watched, road.ramp_length * JAM
        self._stretches, self._lanes, self._segments = road.stretches, road.lanes, road.segments
        self._places, self._m = road.places, len(road.stretches) - 1
        self.size = 4 * (self._m + self._segments * self._lanes) + 2 + len(watched) * road.lanes
        self.summary = 3 * self._m

    def read(self, s: Snapshot, rng: np.random.Generator, by_lane: bool, past: np.ndarray) -> np.ndarray:
        """Readings now; ``past`` (summary,) is filled. With ``by_lane`` False every lane shows the values of its
        segment."""
        head: list[float] = []
        lanes: list[float] = []
        counts, speeds, cav = s.counts, s.speeds, s.cavs
        width = self._stretches[0].lanes + self._stretches[0].offset
        i, place = sum(counts[:width]), width  # vehicles and lanes before the one that is looked at
        for e, stretch in enumerate(self._stretches[1:], 1):
            count, total, square, cavs, space = 0, 0.0, 0.0, 0, stretch.length * JAM
            told: list[float] = []
            for k in range(-stretch.offset, stretch.lanes):
                n = counts[place]
                place += 1
                if n:
                    part = speeds[i:i + n]
                    v, u, c = sum(part), sum(map(mul, part, part)), sum(cav[i:i + n])
                    i += n
                    count, total, square, cavs = count + n, total + v, square + u, cavs + c
                    if k >= 0:
                        told += _cell(n, v, u, c, space)
                elif k >= 0:
                    told += EMPTY
            segment = _cell(count, total, square, cavs, space * stretch.lanes) if count else EMPTY
            head += segment
            if e <= self._segments:
                lanes += told if by_lane else segment * stretch.lanes
        on_ramp = counts[-1]
        ramp = (on_ramp / self._ramp_space, sum(speeds[i:]) / on_ramp / RAMP_LIMIT if on_ramp else 1.0)
        out = np.array([*head, *lanes, *ramp, *self._alarm(s, by_lane)])
        out *= rng.normal(1.0, self._noise, self.size)
        now = np.minimum(np.maximum(out, 0, out=out), HIGHEST, out=out).astype(np.float32)
        density, pace = now[:4 * self._m:4], now[1:4 * self._m:4]
        past[::3], past[1::3] = pace, density
        np.minimum(density * JAM * pace * (MAIN_LIMIT / FLOW), HIGHEST, out=past[2::3])
        return now

    def _alarm(self, s: Snapshot, by_lane: bool) -> list[float]:
        """1 for the lane of a broken-down vehicle, on each lane of the segments watched."""
        out = [0.0] * (len(self._watched) * self._lanes)
        if self._watched and s.stopped is not None:
            at = next(p for p, n in zip(self._places, accumulate(s.counts), strict=True) if s.stopped < n)
            if at.edge in self._watched and at.lane >= 0:
                first = self._watched.index(at.edge) * self._lanes
                if by_lane:
                    out[first + at.lane] = 1.0
                else:
                    out[first:first + self._lanes] = [1 / self._lanes] * self._lanes
        return out


def _cell(n: int, pace: float, square: float, cavs: int, space: float) -> tuple[float, float, float, float]:
    """Density, mean speed, spread and CAV share of ``n`` vehicles from the sums of their speeds and squared speeds."""
    mean = pace / n
    variance = square / n - mean * mean
    return n / space, mean / MAIN_LIMIT, math.sqrt(variance) / 10 if variance > 0 else 0.0, cavs / n


def counters(counts: Sequence[int], lanes: int, seconds: float, by_lane: bool) -> list[float]:
    """Flow by lane, scaled, from counts of an interval, place by place; the mean of the lanes where counters fail."""
    flows = [n / (seconds * COUNTED) for n in counts]
    if not by_lane:
        flows = [sum(flows[i:i + lanes]) / lanes for i in range(0, len(flows), lanes) for _ in range(lanes)]
    return [min(flow, HIGHEST) for flow in flows]


def vehicles(road: Motorway, s: Snapshot, length: int, lanes_known: bool, reports: bool | None) -> np.ndarray:
    """Vehicles before the end of the merge, nearest first: (N, 7), see
    :class:`~lacer.envs.traffic.mixed.MixedTrafficEnv`; all are on lane 0 where lanes are not known.

    ``reports`` not None adds L columns; True: a broken-down vehicle names its lane there, and is listed however far
    downstream it is."""
    ids, xs, speeds, cavs, end = s.ids, s.xs, s.speeds, s.cavs, road.merge_end
    chosen: list[tuple[float, int, int, float]] = []  # distance, number, lane, gap
    ahead = [math.inf] * (road.lanes + 2)  # by lane, the next vehicle downstream; -1 is the last
    places, ramp = list(zip(road.places, s.counts, strict=True)), len(ids) - s.counts[-1]
    first = ramp
    for place, n in [*places[-2::-1], places[-1]]:  # from the exit to the entry, then the ramp
        first = first - n if place.edge >= 0 else ramp
        if not n:
            continue
        lane, last = place.lane, first + n - 1
        before = place.edge < 3  # the end of the merge
        if before or (reports and s.stopped is not None and first <= s.stopped <= last):
            x = ahead[lane]
            # Backwards; where vehicles change lanes SUMO's list is not sorted.
            for i in sorted(range(last, first - 1, -1), key=xs.__getitem__, reverse=True):
                if before or i == s.stopped:
                    chosen.append((end - xs[i], i, lane, x - xs[i] - 5.0))
                x = xs[i]
            ahead[lane] = x
        else:
            ahead[lane] = min(xs[first:last + 1])
    chosen.sort()
    del chosen[length:]
    out = np.zeros((length, VEHICLE_COLUMNS + (0 if reports is None else road.lanes)), np.float32)
    shown = [k / road.lanes if lanes_known else 0.0 for k in range(1, road.lanes + 2)] + [0.0]  # by lane, as ahead
    silent = () if reports is None else (0.0,) * road.lanes
    rows: list[float] = []
    for far, i, lane, gap in chosen:
        rows += (
            1.0, far / 500 if -1000 < far < 1000 else math.copysign(2.0, far), shown[lane], speeds[i] / MAIN_LIMIT,
            1.0 if gap > 100 else gap / 100 if gap > 0 else 0.0, cavs[i], ids[i][1] == "r")
        rows += [float(k == lane) for k in range(road.lanes)] if reports and i == s.stopped else silent
    out.ravel()[:len(rows)] = rows
    return out
