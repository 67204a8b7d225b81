"""Mixed traffic on a motorway with an on-ramp merge, a lane drop, incidents and dispatcher messages."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.sources import Objective, SourceSpec, TaskCard
from lacer.envs.traffic import text
from lacer.envs.traffic.camera import SIZE, Camera, fog
from lacer.envs.traffic.demand import Episode, draw_episode
from lacer.envs.traffic.network import MAIN_LIMIT, RAMP_LIMIT, Motorway
from lacer.envs.traffic.simulation import REAPPLY, Command, Simulation, Snapshot, Tally

SLOWEST = 15.0
"""Speed (m/s) that a segment action of -1 asks for."""
SLOWEST_RAMP = 2.0
"""Speed (m/s) that a ramp action of 1 asks for."""
CLEAR_ABOVE = 0.3
"""The largest lane weight has to exceed this for its lane to be cleared."""
ORDER_WEIGHT = 0.03
"""Reward lost by one step that fully disobeys the dispatcher."""
_JAM = 0.08  # vehicles per metre and lane that count as 1

SCENES: dict[str, dict[str, Any]] = {
    "small": {
        "lanes": 3, "drop": "before", "in_length": 100.0, "segment_lengths": (300.0, 150.0, 100.0),
        "out_length": 50.0, "ramp_length": 150.0, "main_flow": (2100.0, 2700.0), "ramp_flow": (200.0, 500.0),
        "step_length": 1.0, "warm_up": 60.0, "horizon": 240.0, "incident_probability": 1.0,
        "incident_delay": (-20.0, -10.0), "incident_segments": (3,), "incident_place": (0.1, 0.4),
        "clear_segments": (1, 2), "news_weights": (0.5, 0.2, 0.3),
    },
    "full": {
        "lanes": 3, "drop": "after", "in_length": 250.0, "segment_lengths": (350.0, 300.0, 350.0, 350.0),
        "out_length": 300.0, "ramp_length": 250.0, "main_flow": (2100.0, 2900.0), "ramp_flow": (200.0, 500.0),
        "step_length": 1.0, "warm_up": 100.0, "horizon": 300.0, "incident_probability": 0.8,
        "incident_delay": (0.0, 60.0), "incident_segments": (3, 4), "incident_place": (0.1, 0.4),
        "clear_segments": (1, 2, 3), "news_weights": (0.4, 0.3, 0.3),
    },
}
"""Defaults by scene. ``incident_delay`` is in seconds after the warm-up; segments count from 1."""


class MixedTrafficEnv(gym.Env):
    """Guide the connected and automated vehicles (CAVs) of a motorway in SUMO (Lopez et al. 2018).

    Road: ``lanes`` through lanes; an on-ramp joins over an acceleration lane on segment 2; a leftmost lane ends before
    the segments (small) or after them (full). Drivers follow Krauss (1998) and change lanes by LC2013 (Erdmann 2014).
    The CAV share of 0.9 is that of arXiv 2512.06982. A vehicle may break down on a lane; the dispatcher sends plain
    English.

    Observation, a Dict of five sources (S controlled segments, L lanes, A = S + L + 1 actions):
        traffic: vector (4 (S + 1) + 2 S L + 2,): density (1 = 80 veh/km/lane), mean speed (1 = 27.78 m/s), spread of
            speed (1 = 10 m/s), CAV share, of each segment and the exit; density and speed of each lane of each
            segment; density and speed of the ramp. With relative detector noise.
        history: series (T, 3 (S + 1) + A), oldest first: speed, density, flow (1 = 0.5 veh/s/lane), then the action.
        sequence: set (N, 7), the vehicles before the end of the acceleration lane, nearest first: 1 if present,
            distance to that end (1 = 500 m), lane (0 acceleration lane or ramp, 1 leftmost), speed, gap ahead
            (1 = 100 m), is a CAV, came by the ramp.
        camera: image (64, 64, 3) uint8, see :class:`~lacer.envs.traffic.camera.Camera`.
        instruction: text, the dispatcher's message in force.
    In some episodes the message tells of the incident and fog blinds the camera, in some only the camera shows it, in
    some both tell.

    Action, Box(-1, 1) of shape (S + L + 1,); all zero means "do nothing", exactly:
        [0, S): speed of each segment; a >= 0 full speed, below it CAVs drive at most ``27.78 - 12.78 a^2`` m/s.
        [S, S + L): lane weights from the right; the largest, if above 0.3, is the lane that CAVs leave and avoid on
            the segments before the incident area.
        [S + L]: ramp; a > 0 limits CAVs there to ``16.67 - 14.67 a`` m/s.
    It is applied every 2 s to the vehicles present.

    Reward of a step, dimensionless: ``0.5 (v / 27.78 - 0.6)`` with v = vehicle-km by vehicle-hours in the step, those
    who wait to enter counted, less up to 0.03 for disobeying the dispatcher (share of CAVs above an instructed speed
    limit; ramp action against a ramp order). ``info["reward_terms"]`` has the parts.
    ``info["metrics"]`` at the end: average_speed (m/s; v over the episode), throughput (veh/h), hard_brakings
    (vehicles braking harder than 3 m/s^2 at the end of a step), collisions (vehicle-steps), mean_backlog (veh),
    disobedience (mean share, 0 to 1). ``info["state"]``: privileged truth, see ``task_card.state_names``.

    Args:
        scene: ``"full"``, 1.9 km, or ``"small"``, 0.7 km with an incident in every episode, for short searches.
            Arguments left None take the scene's value (``SCENES``).
        lanes: through lanes, 2 to 8.
        cav_share: share of CAVs in the demand, 0 to 1.
        main_flow, ramp_flow: (lowest, highest) demand in veh/h; an episode draws one in between.
        step_length: of the simulation, s, 0.1 to 1.
        control_interval: seconds of an env step, a multiple of 2.
        warm_up: seconds simulated in ``reset`` without control.
        horizon: seconds of an episode, a multiple of ``control_interval``.
        incident_probability: 0 to 1.
        detector_noise: relative standard deviation of detector readings.
        history_length: T.
        sequence_length: N.
        news_weights: weights of episodes whose incident is told by (text, camera, both).
        order_weights: weights of what the message says when it does not tell of an incident: (nothing, a speed
            limit, ramp priority, ramp hold).
        wordings: ``"train"`` or ``"held_out"`` wordings of the messages.
        render_mode: ``"rgb_array"`` or None.

    One simulation runs per process: ``reset`` of a second environment raises; use ``SubprocVecEnv``. The same seed
    gives the same trajectory, in any process.

    Raises:
        LacerError: for impossible arguments or actions, a missing or failing SUMO.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1, "one_per_process": True}  # noqa: RUF012

    def __init__(
        self,
        scene: Literal["full", "small"] = "full",
        *,
        lanes: int | None = None,
        cav_share: float = 0.9,
        main_flow: tuple[float, float] | None = None,
        ramp_flow: tuple[float, float] | None = None,
        step_length: float | None = None,
        control_interval: float = 10.0,
        warm_up: float | None = None,
        horizon: float | None = None,
        incident_probability: float | None = None,
        detector_noise: float = 0.05,
        history_length: int = 8,
        sequence_length: int = 24,
        news_weights: Sequence[float] | None = None,
        order_weights: Sequence[float] = (0.4, 0.2, 0.2, 0.2),
        wordings: Literal["train", "held_out"] = "train",
        render_mode: str | None = None,
    ) -> None:
        if scene not in SCENES:
            raise UnknownNameError("scene", str(scene), SCENES)
        given = {
            "lanes": lanes, "main_flow": main_flow, "ramp_flow": ramp_flow, "step_length": step_length,
            "warm_up": warm_up, "horizon": horizon, "incident_probability": incident_probability,
            "news_weights": news_weights,
        }
        p = SCENES[scene] | {k: v for k, v in given.items() if v is not None}
        _check(p, cav_share=cav_share, control_interval=control_interval, detector_noise=detector_noise,
               history_length=history_length, sequence_length=sequence_length, order_weights=order_weights)
        if wordings not in text.WORDINGS:
            raise UnknownNameError("set of wordings", str(wordings), text.WORDINGS)
        if render_mode == "human":
            raise LacerError('render_mode="human" is not supported; use "rgb_array" and show the pictures yourself')
        if render_mode not in (None, "rgb_array"):
            raise UnknownNameError("render mode", str(render_mode), self.metadata["render_modes"])
        self.scene, self.cav_share, self.wordings, self.render_mode = scene, cav_share, wordings, render_mode
        self.control_interval, self.detector_noise = float(control_interval), float(detector_noise)
        self.order_weights = tuple(map(float, order_weights))
        self.history_length, self.sequence_length = history_length, sequence_length
        self._p = p
        self.horizon, self.warm_up = float(p["horizon"]), float(p["warm_up"])
        self.road = Motorway(
            p["lanes"], p["drop"], p["in_length"], p["segment_lengths"], p["out_length"], p["ramp_length"])
        self._camera = Camera(self.road)
        self._sim: Simulation | None = None
        self._folder: Path | None = None
        self._net: Path | None = None

        n_seg, n_lanes = self.road.segments, self.road.lanes
        n_act = n_seg + n_lanes + 1
        self.action_space = spaces.Box(-1.0, 1.0, (n_act,), np.float32)
        self.task_card = TaskCard(
            env_id="lacer/MixedTraffic-v0",
            sources={s.name: s for s in self._sources(n_seg, n_lanes, n_act)},
            action_space=self.action_space,
            objective=Objective("average_speed", "m/s"),
            description=(
                f"Motorway of {self.road.length:.0f} m with {n_lanes} lanes, an on-ramp and a lane drop, "
                f"{cav_share:.0%} of the vehicles connected and automated (CAVs). Every {control_interval:g} s set "
                f"{n_seg} segment speeds, {n_lanes} lane weights (the largest above 0.3 is the lane that CAVs clear "
                "before the incident area) and the holding of the ramp. A vehicle may break down on a lane: clearing "
                "that lane early gains most, clearing another one costs most. The lane is told by the text in some "
                "episodes, only visible to the camera in others. Segment averages hardly show it. Maximise the "
                "average speed over an episode, waiting vehicles counted."
            ),
            state_names=(
                "incident_active", *(f"incident_lane_{k}" for k in range(n_lanes)), "incident_km", "queue_length",
                "ramp_queue", "backlog", "vehicles", "mean_speed", "actual_cav_share", "main_demand", "ramp_demand",
                "speed_limit_order", "ramp_order",
            ),
            noop=np.zeros(n_act, np.float32),
        )
        self.observation_space = self.task_card.observation_space

    def _sources(self, n_seg: int, n_lanes: int, n_act: int) -> list[SourceSpec]:
        def box(*shape: int) -> spaces.Box:
            return spaces.Box(-2.0, 2.0, shape, np.float32)

        return [
            SourceSpec("traffic", "vector", box(4 * (n_seg + 1) + 2 * n_seg * n_lanes + 2),
                       "Detectors now, noisy: density, mean speed, spread of speed and CAV share of each road segment, "
                       "then density and speed of each lane of each segment, then density and speed of the ramp."),
            SourceSpec("history", "series", box(self.history_length, 3 * (n_seg + 1) + n_act),
                       "The last control intervals: speed, density and flow of each segment, and the actions taken."),
            SourceSpec("sequence", "set", box(self.sequence_length, 7),
                       "Vehicles before the end of the on-ramp merge, nearest first: present, distance to the end of "
                       "the merge, lane, speed, gap ahead, is a CAV, came by the ramp."),
            SourceSpec("camera", "image", spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                       "Bird's-eye picture, one strip per segment with its lanes as rows: occupancy, speed, CAV; a "
                       "broken-down vehicle is brighter; on foggy days it is nearly blind."),
            SourceSpec("instruction", "text", spaces.Text(text.MAX_LENGTH, min_length=1, charset=text.CHARSET),
                       "Dispatcher's message in plain English: an incident with its lane and kilometre, a temporary "
                       "speed limit, ramp priority, ramp holding, or nothing in particular."),
        ]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if self._sim is not None:
            self._sim.close()
        p, road, rng = self._p, self.road, self.np_random
        low, high = p["incident_delay"]
        self._episode: Episode = draw_episode(
            rng, road, cav_share=self.cav_share, main_flow=p["main_flow"], ramp_flow=p["ramp_flow"],
            incident_probability=p["incident_probability"], incident_start=(self.warm_up + low, self.warm_up + high),
            incident_segments=p["incident_segments"], incident_place=p["incident_place"],
            news_weights=tuple(p["news_weights"]),
            order_weights=self.order_weights,  # type: ignore[arg-type]
            end=self.warm_up + self.horizon,
        )
        self._wording = float(rng.random())
        self._net = self._net or road.build()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lacer-traffic-"))
        routes = self._folder / "routes.xml"
        self._episode.write_routes(routes, road)
        self._sim = Simulation(
            road, routes, net=self._net, seed=self._episode.sumo_seed, step_length=p["step_length"],
            departs=np.array([t.depart for t in self._episode.trips]), incident=self._episode.incident,
            clear_zone=p["clear_segments"],
        )
        self._sim.run(self.warm_up)
        self._elapsed, self._total, self._disobeyed = 0.0, Tally(), 0.0
        n_act = self.action_space.shape[0]  # type: ignore[index]
        width = self.task_card.sources["history"].shape[1]
        self._history: deque[np.ndarray] = deque(
            [np.zeros(width, np.float32)] * self.history_length, maxlen=self.history_length)
        self._action = np.zeros(n_act, np.float32)
        obs = self._observe()
        return obs, {"state": self._state()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        if self._sim is None or self._sim.sumo is None:
            raise LacerError("call reset() before step()")
        try:
            a = np.asarray(action, np.float64)
        except (TypeError, ValueError):
            a = np.zeros(0)
        if a.shape != self.action_space.shape or not np.isfinite(a).all():
            raise LacerError(f"action must be {self.action_space.shape} finite numbers, not {action!r}")
        a = np.clip(a, -1, 1)
        order = self._order_in_force()
        tally = self._sim.run(self.control_interval, self.command(a))
        self._total.add(tally)
        self._elapsed += self.control_interval
        self._action = a.astype(np.float32)
        obs = self._observe()
        limit, ramp = self._disobedience(order, a)
        terms = {"speed": 0.5 * (tally.speed / MAIN_LIMIT - 0.6), "speed_limit": -ORDER_WEIGHT * limit,
                 "ramp_order": -ORDER_WEIGHT * ramp}
        self._disobeyed += (limit + ramp) * self.control_interval
        info: dict[str, Any] = {"state": self._state(), "reward_terms": terms}
        done = self._elapsed >= self.horizon - 1e-6
        if done:
            t = self._total
            info["metrics"] = {
                "average_speed": t.speed, "throughput": t.arrived * 3600 / self.horizon,
                "hard_brakings": float(t.hard), "collisions": float(t.collisions),
                "mean_backlog": t.waiting / self.horizon, "disobedience": self._disobeyed / self.horizon,
            }
        return obs, float(sum(terms.values())), False, done, info

    def command(self, action: np.ndarray) -> Command:
        """What an action (A,) in [-1, 1] tells the vehicles."""
        n_seg, n_lanes = self.road.segments, self.road.lanes
        speeds, lanes, ramp = action[:n_seg], action[n_seg:n_seg + n_lanes], float(action[-1])
        return Command(
            tuple(MAIN_LIMIT - (MAIN_LIMIT - SLOWEST) * float(s) ** 2 if s < 0 else np.inf for s in speeds),
            int(np.argmax(lanes)) if lanes.max() > CLEAR_ABOVE else None,
            RAMP_LIMIT - (RAMP_LIMIT - SLOWEST_RAMP) * ramp if ramp > 0 else np.inf,
        )

    def close(self) -> None:
        """End the simulation and give the process's place to other environments; ``reset`` starts anew."""
        if getattr(self, "_sim", None) is not None:
            self._sim.close()  # type: ignore[union-attr]
            self._sim = None
        if getattr(self, "_folder", None) is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # type: ignore[arg-type]
            self._folder = None

    def __del__(self) -> None:
        self.close()

    def render(self) -> np.ndarray | None:
        """The road as an RGB picture (H, W, 3) uint8, or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="rgb_array"')
            return None
        if self._sim is None or self._sim.sumo is None:
            raise LacerError("call reset() before render()")
        from lacer.envs.traffic.drawing import draw

        return draw(self.road, self._seen, self._message(), self._state(), self._total, self._action, self._elapsed)

    # What is going on

    @property
    def _incident_active(self) -> bool:
        return self._sim is not None and self._sim.broken is not None

    @property
    def _told(self) -> bool:
        """Whether the message in force is about the incident."""
        return self._incident_active and self._episode.news != "camera"

    def _order_in_force(self) -> str | None:
        return None if self._told else self._episode.order.kind

    def _message(self) -> str:
        e = self._episode
        return text.message(self.road, self.wordings, self._wording, e.incident if self._told else None, e.order)

    def _disobedience(self, order: str | None, a: np.ndarray) -> tuple[float, float]:
        """(share of CAVs over an instructed limit, opposition to a ramp order), each 0 to 1."""
        if order == "speed_limit":
            o, s = self._episode.order, self._seen
            there = (s.edge == o.segment + 1) & s.cav & ~s.broken
            over = there & (s.speed > o.speed + 1.0)
            return float(over.sum() / max(there.sum(), 1)), 0.0
        if order == "ramp_priority":
            return 0.0, float(max(a[-1], 0.0))
        if order == "ramp_hold":
            return 0.0, float(1.0 - max(a[-1], 0.0))
        return 0.0, 0.0

    def _state(self) -> dict[str, float]:
        e, s, active = self._episode, self._seen, self._incident_active
        i = e.incident if active else None
        ramp, order = s.edge < 0, self._order_in_force()
        lanes = {f"incident_lane_{k}": float(i is not None and i.lane == k) for k in range(self.road.lanes)}
        n = len(s.ids)
        return {
            "incident_active": float(active), **lanes,
            "incident_km": (self.road.starts[i.stretch] + i.position) / 1000 if i else 0.0,
            "queue_length": float((~ramp & (s.speed < 5)).sum()), "ramp_queue": float((ramp & (s.speed < 5)).sum()),
            "backlog": float(self._sim.backlog) if self._sim else 0.0,
            "vehicles": float(n), "mean_speed": float(s.speed.mean()) if n else MAIN_LIMIT,
            "actual_cav_share": float(s.cav.mean()) if n else 0.0,
            "main_demand": e.main_flow, "ramp_demand": e.ramp_flow,
            "speed_limit_order": e.order.speed if order == "speed_limit" else 0.0,
            "ramp_order": {"ramp_priority": 1.0, "ramp_hold": -1.0}.get(order or "", 0.0),
        }

    # Observation

    def _observe(self) -> dict[str, Any]:
        assert self._sim is not None
        s = self._seen = self._sim.seen
        traffic, past = self._detectors(s)
        self._history.append(np.concatenate([past, self._action]).clip(-2, 2).astype(np.float32))
        image = self._camera.draw(s.edge, s.lane, s.position, s.speed, s.cav, s.broken)
        if self._episode.incident and self._episode.news == "text":
            image = fog(image, self.np_random)
        return {
            "traffic": traffic, "history": np.stack(self._history), "sequence": self._vehicles(s), "camera": image,
            "instruction": self._message(),
        }

    def _detectors(self, s: Snapshot) -> tuple[np.ndarray, np.ndarray]:
        """Now, as in ``traffic``; and (speed, density, flow) of each segment, as in ``history``."""
        road = self.road
        stretches, lanes, m = road.stretches[1:], road.lanes, len(road.stretches) - 1

        def by(index: np.ndarray, size: int, weight: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(index, weight, size)[:size].astype(float)

        on = s.edge >= 1
        k, v = s.edge[on] - 1, s.speed[on]
        n = by(k, m)
        some = np.maximum(n, 1)
        speed = np.where(n > 0, by(k, m, v) / some, MAIN_LIMIT)
        spread = np.sqrt(np.maximum(by(k, m, v * v) / some - (by(k, m, v) / some) ** 2, 0))
        share = by(k, m, s.cav[on].astype(float)) / some
        space = np.array([t.length * t.lanes for t in stretches])
        density = n / space
        cell = (s.edge >= 1) & (s.edge <= road.segments) & (s.lane >= 0)
        at = (s.edge[cell] - 1) * lanes + s.lane[cell]
        size = road.segments * lanes
        nl = by(at, size)
        vl = np.where(nl > 0, by(at, size, s.speed[cell]) / np.maximum(nl, 1), MAIN_LIMIT)
        dl = nl / np.repeat([t.length for t in stretches[:-1]], lanes)
        ramp = s.edge < 0
        nr = ramp.sum()
        vr = s.speed[ramp].mean() if nr else RAMP_LIMIT
        noise = self.np_random.normal(1.0, self.detector_noise, 4 * m + 2 * size + 2)
        clean = np.concatenate([
            np.stack([density / _JAM, speed / MAIN_LIMIT, spread / 10, share], 1).ravel(),
            np.stack([dl / _JAM, vl / MAIN_LIMIT], 1).ravel(),
            [nr / road.ramp_length / _JAM, vr / RAMP_LIMIT],
        ])
        now = (clean * noise).clip(0, 2).astype(np.float32)
        head = now[:4 * m].reshape(m, 4)
        flow = head[:, 0] * _JAM * head[:, 1] * MAIN_LIMIT / 0.5
        return now, np.stack([head[:, 1], head[:, 0], flow], 1).ravel()

    def _vehicles(self, s: Snapshot) -> np.ndarray:
        out = np.zeros((self.sequence_length, 7), np.float32)
        x, lane = s.x, s.lane
        order = np.lexsort((x, lane))  # by lane, then along the road
        gap = np.full(len(x), 100.0)
        if len(x) > 1:
            a, b = order[:-1], order[1:]
            gap[a] = np.where(lane[a] == lane[b], x[b] - x[a] - 5.0, 100.0)
        before = np.flatnonzero(x <= self.road.merge_end)
        chosen = before[np.argsort(self.road.merge_end - x[before], kind="stable")][: self.sequence_length]
        n = len(chosen)
        out[:n, 0] = 1
        out[:n, 1] = (self.road.merge_end - x[chosen]) / 500
        out[:n, 2] = (lane[chosen] + 1) / self.road.lanes
        out[:n, 3] = s.speed[chosen] / MAIN_LIMIT
        out[:n, 4] = gap[chosen].clip(0, 100) / 100
        out[:n, 5] = s.cav[chosen]
        out[:n, 6] = [s.ids[i][1] == "r" for i in chosen]
        return out.clip(-2, 2)


def _check(p: Mapping[str, Any], **more: Any) -> None:
    """Reject what cannot be simulated, naming the argument and what it may be."""
    v = {**p, **more}

    def need(ok: Any, name: str, rule: str) -> None:
        if not ok:
            raise LacerError(f"{name} must be {rule}, not {v[name]!r}")

    need(isinstance(v["lanes"], int | np.integer) and 2 <= v["lanes"] <= 8, "lanes", "a whole number from 2 to 8")
    for name in ("cav_share", "incident_probability"):
        need(0 <= v[name] <= 1, name, "between 0 and 1")
    for name in ("main_flow", "ramp_flow"):
        need(np.shape(v[name]) == (2,) and 0 <= v[name][0] <= v[name][1] <= 20000, name,
             "(lowest, highest) vehicles per hour with 0 <= lowest <= highest")
    for name in ("news_weights", "order_weights"):
        size = 3 if name == "news_weights" else 4
        need(np.shape(v[name]) == (size,) and min(v[name]) >= 0 and sum(v[name]) > 0, name,
             f"{size} weights, none negative and not all zero")
    step, control = v["step_length"], v["control_interval"]
    need(0.1 <= step <= 1 and abs(REAPPLY / step - round(REAPPLY / step)) < 1e-6, "step_length",
         f"between 0.1 and 1 and a part of {REAPPLY:g} s")
    need(control >= REAPPLY and abs(control / REAPPLY - round(control / REAPPLY)) < 1e-6, "control_interval",
         f"a multiple of {REAPPLY:g} s")
    need(v["warm_up"] >= 0, "warm_up", "0 or more seconds")
    need(v["horizon"] >= control and abs(v["horizon"] / control - round(v["horizon"] / control)) < 1e-6, "horizon",
         f"a multiple of control_interval ({control:g} s)")
    need(0 <= v["detector_noise"] <= 1, "detector_noise", "between 0 and 1")
    for name in ("history_length", "sequence_length"):
        need(isinstance(v[name], int | np.integer) and v[name] >= 1, name, "a whole number of at least 1")
