"""Mixed traffic on a motorway with an on-ramp merge, a lane drop, incidents and dispatcher messages."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.sources import Objective, SourceSpec, TaskCard
from lacer.envs.traffic import sensors, text
from lacer.envs.traffic.camera import SIZE, Camera, fog
from lacer.envs.traffic.demand import Episode, draw_episode
from lacer.envs.traffic.network import MAIN_LIMIT, RAMP_LIMIT
from lacer.envs.traffic.scenes import CONTROLS, SCENES, check, motorway
from lacer.envs.traffic.simulation import Client, Command, Simulation, Tally

SLOWEST = 15.0
"""Speed (m/s) that a segment action of -1 asks for."""
SLOWEST_RAMP = 2.0
"""Speed (m/s) that a ramp action of 1 asks for."""
CLEAR_ABOVE = 0.3
"""The largest lane weight has to exceed this for its lane to be cleared."""


class MixedTrafficEnv(gym.Env):
    """Guide the connected and automated vehicles (CAVs) of a motorway in SUMO (Lopez et al. 2018).

    Road: ``lanes`` through lanes; an on-ramp joins over an acceleration lane on segment 2; a leftmost lane ends before
    the segments (small, sources) or after them (full). Drivers follow Krauss (1998) and change lanes by LC2013 (Erdmann
    2014). The CAV share of 0.9 is that of arXiv 2512.06982. A vehicle may break down on a lane; the dispatcher sends
    plain English.

    Observation, a Dict of five sources (S controlled segments, L lanes, K segments where incidents may happen, A
    actions); columns in brackets are there if the source can carry the news, see below:
        traffic: vector (4 (S + 1) + 4 S L + 2 [+ K L],): density (1 = 80 veh/km/lane), mean speed (1 = 27.78 m/s),
            spread of speed (standard deviation, 1 = 10 m/s), CAV share, of each segment and the exit; the same four of
            each lane of each segment; density and speed of the ramp; [alarm of automatic incident detection on each
            lane where incidents may happen, 1 for a broken-down vehicle]. Without vehicles speed is 1, the others are
            0. With relative detector noise.
        history: series (T, 3 (S + 1) [+ K L] + A), oldest first: speed, density, flow (1 = 0.5 veh/s/lane) of each
            segment and the exit, [flow (1 = 0.15 veh/s) of each lane at the end of the segments where incidents may
            happen, the last intervals of the warm-up too], then the action.
        sequence: set (N, 7 [+ L]), the vehicles before the end of the acceleration lane, nearest first: 1 if present,
            distance to that end (1 = 500 m), lane (0 acceleration lane or ramp, 1 leftmost), speed, gap ahead
            (1 = 100 m), is a CAV, came by the ramp, [lane on which it reports itself broken down, one-hot; such a
            vehicle is listed however far downstream].
        camera: image (64, 64, 3) uint8, see :class:`~lacer.envs.traffic.camera.Camera`. [If any of the three above can
            carry the news: overhead lights show the blocked lane of the segment as closed.]
        instruction: text, the dispatcher's message in force.
    ``news`` says which sources can carry the news of the incident's lane and how often each does; an episode draws.
    Message and camera always can. Where another source does not carry it: the message is an order or nothing in
    particular; fog blinds the camera. ``traffic``, ``history`` and ``sequence``, if ``news`` names them, then show the
    mean of all lanes in place of each, and no vehicle's lane or report; if it does not, they show what they see in
    every episode, which tells lanes less clearly.

    Action, Box(-1, 1) of shape (A,), those of ``controls``, in this order; all zero means "do nothing", exactly:
        speeds, S numbers: speed of each segment; a >= 0 full speed, below it CAVs drive at most
            ``27.78 - 12.78 a^2`` m/s.
        lanes, L numbers: lane weights from the right; the largest, if above 0.3, is the lane that CAVs leave and avoid
            on the segments before the incident area.
        ramp, 1 number: a > 0 limits CAVs there to ``16.67 - 14.67 a`` m/s.
    It is applied every 2 s to the vehicles present.

    Reward of a step, dimensionless, the sum of ``info["reward_terms"]``:
        speed: ``0.5 (v / 27.78 - 0.6)``, v = vehicle-km by vehicle-hours in the step, those who wait to enter counted.
        safety: ``-safety_weight`` times the share (0 to 1) of the vehicles approaching a broken-down one that do so on
            its lane, which is what ends in secondary collisions and hard braking.
        speed_limit: ``-order_weight`` times the share (0 to 1) of CAVs above an instructed speed limit.
        ramp_order: ``-order_weight`` times the holding of the ramp (0 to 1) against an order for its priority, or the
            lack of it against an order to hold it.
    ``info["metrics"]`` at the end of an episode: average_speed (m/s; v over the episode), throughput (veh/h),
    travel_time (s, of the vehicles that arrived, waiting to enter included), hard_brakings (vehicles braking harder
    than 3 m/s^2 at the ends of steps), collisions (vehicle-steps of the simulation), co2 (g per vehicle-km, SUMO's
    HBEFA rate at the ends of steps), mean_backlog (vehicles waiting to enter), exposure (mean share, as in safety),
    disobedience (mean share, as in the order terms, 0 to 1). ``info["state"]``: privileged truth, see
    ``task_card.state_names``.

    Args:
        scene: ``"full"``, 1.9 km; ``"small"``, 0.7 km with an incident in every episode, for short searches; or
            ``"sources"``, two lanes and short episodes, in which any one of the five sources alone carries the news,
            lanes are the only control and safety counts. Arguments left None take the scene's value (``SCENES``).
        lanes: through lanes, 2 to 8.
        length: of the road, m, 400 to 20,000; all its parts are stretched alike. Vehicles need time to fill a longer
            one: see ``warm_up``.
        humans: SUMO's attributes of the human drivers that differ from Krauss's model with an imperfection ``sigma``
            of 0.5 (CAVs: 0.3), e.g. ``{"sigma": 0.9, "tau": 1.5}`` or ``{"carFollowModel": "EIDM"}``.
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
        news: weights of the sources that tell of the incident, e.g. ``{"camera": 1, "instruction+traffic": 2}``: in two
            of three episodes the message and the detectors by lane tell, in the third the camera alone.
        order_weights: weights of what the message says when it does not tell of an incident: (nothing, a speed
            limit, ramp priority, ramp hold).
        safety_weight, order_weight: of the reward's terms.
        controls: what the action holds, some of ``"speeds"``, ``"lanes"`` and ``"ramp"``.
        wordings: ``"train"`` or ``"held_out"`` wordings of the messages.
        client: ``"libsumo"``, or ``"traci"``: SUMO in a process of its own, over a socket, slower.
        render_mode: ``"rgb_array"``, ``"human"`` (sumo-gui, over a socket) or None.

    One simulation runs per process: ``reset`` of a second environment raises; use ``SubprocVecEnv``. The same seed
    gives the same trajectory, in any process.

    Raises:
        LacerError: for impossible arguments or actions, a missing or failing SUMO, a full disk.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 1, "one_per_process": True}  # noqa: RUF012

    def __init__(
        self,
        scene: Literal["full", "small", "sources"] = "full",
        *,
        lanes: int | None = None,
        length: float | None = None,
        humans: Mapping[str, str | float] | None = None,
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
        news: Mapping[str, float] | None = None,
        order_weights: Sequence[float] | None = None,
        safety_weight: float | None = None,
        order_weight: float | None = None,
        controls: Sequence[str] | None = None,
        wordings: Literal["train", "held_out"] = "train",
        client: Literal["libsumo", "traci"] = "libsumo",
        render_mode: str | None = None,
    ) -> None:
        if scene not in SCENES:
            raise UnknownNameError("scene", str(scene), SCENES)
        given = {
            "lanes": lanes, "length": length, "humans": humans, "cav_share": cav_share, "main_flow": main_flow,
            "ramp_flow": ramp_flow, "step_length": step_length, "control_interval": control_interval,
            "warm_up": warm_up, "horizon": horizon, "incident_probability": incident_probability,
            "detector_noise": detector_noise, "history_length": history_length, "sequence_length": sequence_length,
            "news": news, "order_weights": order_weights, "safety_weight": safety_weight,
            "order_weight": order_weight, "controls": controls,
        }
        p = self._p = {"humans": {}, **SCENES[scene]} | {k: v for k, v in given.items() if v is not None}
        check(p)
        if wordings not in text.WORDINGS:
            raise UnknownNameError("set of wordings", str(wordings), text.WORDINGS)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnknownNameError("render mode", str(render_mode), self.metadata["render_modes"])
        if client not in ("libsumo", "traci"):
            raise UnknownNameError("client", str(client), ("libsumo", "traci"))
        self.scene, self.wordings, self.render_mode = scene, wordings, render_mode
        self.control_interval = float(p["control_interval"])
        self.horizon, self.warm_up = float(p["horizon"]), float(p["warm_up"])
        self.history_length, self.sequence_length = history_length, sequence_length
        self.safety_weight, self.order_weight = float(p["safety_weight"]), float(p["order_weight"])
        self.road = motorway(p)
        self._carriers = {"instruction", "camera", *(n for key in p["news"] for n in key.split("+"))}
        self._counted: tuple[int, ...] = p["incident_segments"] if "history" in self._carriers else ()
        self._camera = Camera(self.road)
        self._detectors = sensors.Detectors(
            self.road, detector_noise, p["incident_segments"] if "traffic" in self._carriers else ())
        self._client: Client = "gui" if render_mode == "human" else client
        self._process = os.getpid()
        self._sim: Simulation | None = None
        self._folder: Path | None = None
        self._net: Path | None = None

        n_lanes = self.road.lanes
        self._lane_names = [f"incident_lane_{k}" for k in range(n_lanes)]
        sizes = {"speeds": self.road.segments, "lanes": n_lanes, "ramp": 1}
        self._slices: dict[str, slice] = {}
        n_act = 0
        for name in CONTROLS:
            size = sizes[name] if name in p["controls"] else 0
            self._slices[name] = slice(n_act, n_act + size)
            n_act += size
        self.action_space = spaces.Box(-1.0, 1.0, (n_act,), np.float32)
        self.task_card = TaskCard(
            env_id="lacer/MixedTraffic-v0",
            sources={s.name: s for s in self._sources(n_act)},
            action_space=self.action_space,
            objective=Objective("average_speed", "m/s"),
            description=self._description(),
            state_names=(
                "incident_active", *self._lane_names, "incident_km", "queue_length",
                "ramp_queue", "backlog", "vehicles", "mean_speed", "actual_cav_share", "main_demand", "ramp_demand",
                "speed_limit_order", "ramp_order",
            ),
            noop=np.zeros(n_act, np.float32),
        )
        self.observation_space = self.task_card.observation_space

    def _description(self) -> str:
        p, n_seg, n_lanes = self._p, self.road.segments, self.road.lanes
        sets = {
            "speeds": f"{n_seg} segment speeds",
            "lanes": f"{n_lanes} lane weights (the largest above 0.3 is the lane that CAVs clear before the incident "
                     "area)",
            "ramp": "the holding of the ramp",
        }
        parts = [sets[c] for c in CONTROLS if c in p["controls"]]
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        if self._carriers == {"instruction", "camera"}:
            told = ("The lane is told by the text in some episodes, only visible to the camera in others. Segment "
                    "averages hardly show it.")
        else:
            total = sum(p["news"].values())
            told = "Which source tells the lane differs between episodes: " + ", ".join(
                f"{name} {w / total:.0%}" for name, w in p["news"].items()) + "."
        return (
            f"Motorway of {self.road.length:.0f} m with {n_lanes} lanes, an on-ramp and a lane drop, "
            f"{p['cav_share']:.0%} of the vehicles connected and automated (CAVs). Every {self.control_interval:g} s "
            f"set {listed}. A vehicle may break down on a lane: clearing that lane early gains most, clearing another "
            f"one costs most. {told} Maximise the average speed over an episode, waiting vehicles counted."
            + (" The reward also falls with the share of vehicles that approach a broken-down one on its lane."
               if self.safety_weight else "")
        )

    def _sources(self, n_act: int) -> list[SourceSpec]:
        def box(*shape: int) -> spaces.Box:
            return spaces.Box(-2.0, 2.0, shape, np.float32)

        lanes, carry = self.road.lanes, self._carriers
        silent = " On some days lanes are not told apart."
        return [
            SourceSpec("traffic", "vector", box(self._detectors.size),
                       "Detectors now, noisy: density, mean speed, spread of speed and CAV share of each road segment, "
                       "then the same four of each lane of each segment, then density and speed of the ramp."
                       + (" Last: alarm for a standing vehicle, by lane, where breakdowns happen." + silent
                          if "traffic" in carry else "")),
            SourceSpec("history", "series",
                       box(self.history_length, self._detectors.summary + len(self._counted) * lanes + n_act),
                       "The last control intervals: speed, density and flow of each segment, "
                       + ("vehicles counted on each lane where breakdowns happen, " if "history" in carry else "")
                       + "and the actions taken." + (silent if "history" in carry else "")),
            SourceSpec("sequence", "set",
                       box(self.sequence_length, sensors.VEHICLE_COLUMNS + ("sequence" in carry) * lanes),
                       "Vehicles before the end of the on-ramp merge, nearest first: present, distance to the end of "
                       "the merge, lane, speed, gap ahead, is a CAV, came by the ramp"
                       + (", lane on which it reports itself broken down." + silent if "sequence" in carry else ".")),
            SourceSpec("camera", "image", spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                       "Bird's-eye picture, one strip per segment with its lanes as rows: occupancy, speed, CAV; a "
                       "broken-down vehicle is brighter; on foggy days it is nearly blind."
                       + (" Lights show a blocked lane as closed." if len(carry) > 2 else "")),
            SourceSpec("instruction", "text", spaces.Text(text.MAX_LENGTH, min_length=1, charset=text.CHARSET),
                       "Dispatcher's message in plain English: an incident with its lane and kilometre, a temporary "
                       "speed limit, ramp priority, ramp holding, or nothing in particular."),
        ]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._disown()
        if self._sim is not None:
            self._sim.close()
            self._sim = None
        p, road, rng = self._p, self.road, self.np_random
        low, high = p["incident_delay"]
        self._episode: Episode = draw_episode(
            rng, road, cav_share=p["cav_share"], main_flow=p["main_flow"], ramp_flow=p["ramp_flow"],
            incident_probability=p["incident_probability"], incident_start=(self.warm_up + low, self.warm_up + high),
            incident_segments=p["incident_segments"], incident_place=p["incident_place"], news=p["news"],
            order_weights=tuple(p["order_weights"]), end=self.warm_up + self.horizon,
        )
        self._wording, self._said = float(rng.random()), dict[bool, str]()
        self._net = self._net or road.build()
        try:
            if self._folder is None or not self._folder.is_dir():
                self._folder = Path(tempfile.mkdtemp(prefix="lacer-traffic-"))
            routes = self._folder / "routes.xml"
            self._episode.write_routes(routes, road, p["humans"])
        except OSError as e:
            raise LacerError(f"cannot write the episode's vehicles: {e}; free some space or set TMPDIR to another "
                             "folder, then reset() again") from e
        self._sim = Simulation(
            road, routes, net=self._net, seed=self._episode.sumo_seed, step_length=p["step_length"],
            departs=[t.depart for t in self._episode.trips], incident=self._episode.incident,
            clear_zone=p["clear_segments"], counted=self._counted, interval=self.control_interval, client=self._client,
        )
        self._elapsed, self._total, self._disobeyed, self._exposed = 0.0, Tally(), 0.0, 0.0
        n_act = self.action_space.shape[0]  # type: ignore[index]
        width = self._detectors.summary + len(self._counted) * road.lanes + n_act
        self._history = np.zeros((self.history_length, width), np.float32)
        self._action = [0.0] * n_act
        intervals = min(self.history_length, int(self.warm_up / self.control_interval))
        remembered = max(0, intervals - 1) if self._counted else 0
        self._sim.run(self.warm_up - remembered * self.control_interval)
        for _ in range(remembered):
            self._read_detectors()
            self._sim.run(self.control_interval)
        return self._observe(), {"state": self._state()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        if self._sim is None or self._sim.sumo is None:
            raise LacerError("call reset() before step()")
        try:
            a = np.asarray(action, np.float64)
        except (TypeError, ValueError):
            a = np.zeros(0)
        values = a.ravel().tolist()
        if a.shape != self.action_space.shape or not all(abs(x) <= 1 + 1e-6 for x in values):  # NaN is not either
            raise LacerError(f"action must be {self.action_space.shape} finite numbers from -1 to 1, not {action!r}")
        values = [-1.0 if x < -1 else 1.0 if x > 1 else x for x in values]
        order = self._order_in_force()
        tally = self._sim.run(self.control_interval, self.command(values))
        self._total.add(tally)
        self._elapsed += self.control_interval
        self._action = values
        obs = self._observe()
        exposure = self._exposure()
        limit, ramp = self._disobedience(order, values)
        terms = {"speed": 0.5 * (tally.speed / MAIN_LIMIT - 0.6), "safety": -self.safety_weight * exposure,
                 "speed_limit": -self.order_weight * limit, "ramp_order": -self.order_weight * ramp}
        self._disobeyed += (limit + ramp) * self.control_interval
        self._exposed += exposure * self.control_interval
        info: dict[str, Any] = {"state": self._state(), "reward_terms": terms}
        done = self._elapsed >= self.horizon - 1e-6
        if done:
            t = self._total
            info["metrics"] = {
                "average_speed": t.speed, "throughput": t.arrived * 3600 / self.horizon,
                "travel_time": t.travelled / max(t.arrived, 1), "hard_brakings": float(t.hard),
                "collisions": float(t.collisions), "co2": t.co2 / max(t.metres / 1000, 1e-9),
                "mean_backlog": t.waiting / self.horizon, "exposure": self._exposed / self.horizon,
                "disobedience": self._disobeyed / self.horizon,
            }
        return obs, float(sum(terms.values())), False, done, info

    def command(self, action: Sequence[float] | np.ndarray) -> Command:
        """What an action (A,) in [-1, 1] tells the vehicles."""
        speeds, lanes = action[self._slices["speeds"]], list(action[self._slices["lanes"]])
        hold = self._hold(action)
        return Command(
            tuple([MAIN_LIMIT - (MAIN_LIMIT - SLOWEST) * s ** 2 if s < 0 else np.inf for s in speeds]),
            lanes.index(max(lanes)) if max(lanes, default=-1.0) > CLEAR_ABOVE else None,
            RAMP_LIMIT - (RAMP_LIMIT - SLOWEST_RAMP) * hold if hold > 0 else np.inf,
        )

    def _hold(self, action: Sequence[float] | np.ndarray) -> float:
        """How much the ramp is held, 0 to 1."""
        return max(0.0, *action[self._slices["ramp"]], 0.0)

    def close(self) -> None:
        """End the simulation and give the process's place to other environments; ``reset`` starts anew."""
        self._disown()
        if getattr(self, "_sim", None) is not None:
            self._sim.close()  # type: ignore[union-attr]
            self._sim = None
        if getattr(self, "_folder", None) is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # type: ignore[arg-type]
            self._folder = None

    def _disown(self) -> None:
        """A forked process only inherits the object: simulation and files are its parent's."""
        if getattr(self, "_process", None) != os.getpid():
            self._sim = self._folder = None
            self._process = os.getpid()

    def __del__(self) -> None:
        self.close()

    def render(self) -> np.ndarray | None:
        """The road as an RGB picture (H, W, 3) uint8 in mode ``rgb_array``; None in mode ``human``, whose window shows
        every step by itself, and without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="rgb_array"')
            return None
        if self._sim is None or self._sim.sumo is None:
            raise LacerError("call reset() before render()")
        if self.render_mode == "human":
            return None
        from lacer.envs.traffic.drawing import draw

        parts = {name: self._action[part] for name, part in self._slices.items() if part.stop > part.start}
        said = self._message() if "instruction" in self.task_card.sources else None
        return draw(self.road, self._seen, said, self._state(), self._total, parts, self._elapsed)

    # What is going on

    @property
    def _incident_active(self) -> bool:
        return self._sim is not None and self._sim.broken is not None

    @property
    def _told(self) -> bool:
        """Whether the message in force is about the incident."""
        return self._incident_active and "instruction" in self._episode.news

    def _order_in_force(self) -> str | None:
        return None if self._told else self._episode.order.kind

    def _message(self) -> str:
        e, told = self._episode, self._told
        if told not in self._said:
            self._said[told] = text.message(
                self.road, self.wordings, self._wording, e.incident if told else None, e.order)
        return self._said[told]

    def _exposure(self) -> float:
        """Share of the vehicles approaching a broken-down one that do so on its lane."""
        incident = self._episode.incident
        if not self._incident_active or incident is None:
            return 0.0
        s, i, near, on_lane = self._seen, 0, 0, 0
        first, last = self._p["clear_segments"][0], incident.stretch
        for place, n in zip(self.road.places, s.counts, strict=True):
            if first <= place.edge <= last and place.lane >= 0:
                here = n if place.edge < last else sum([x < incident.position for x in s.positions[i:i + n]])
                if s.stopped is not None and i <= s.stopped < i + n and (
                        place.edge < last or s.positions[s.stopped] < incident.position):
                    here -= 1
                near += here
                if place.lane == incident.lane:
                    on_lane += here
            i += n
        return on_lane / near if near else 0.0

    def _disobedience(self, order: str | None, a: list[float]) -> tuple[float, float]:
        """(share of CAVs over an instructed limit, opposition to a ramp order), each 0 to 1."""
        if order == "speed_limit":
            o, s, there, end = self._episode.order, self._seen, [], 0
            for place, n in zip(self.road.places, s.counts, strict=True):
                begin, end = end, end + n
                if place.edge == o.segment + 1:
                    there += [s.speeds[i] for i in range(begin, end) if s.cavs[i] and i != s.stopped]
            return sum([v > o.speed + 1.0 for v in there]) / max(len(there), 1), 0.0
        if order == "ramp_priority":
            return 0.0, self._hold(a)
        if order == "ramp_hold":
            return 0.0, 1.0 - self._hold(a)
        return 0.0, 0.0

    def _state(self) -> dict[str, float]:
        e, s, active = self._episode, self._seen, self._incident_active
        i = e.incident if active else None
        order = self._order_in_force()
        lanes = dict.fromkeys(self._lane_names, 0.0)
        if i:
            lanes[self._lane_names[i.lane]] = 1.0
        n = len(s.ids)
        standing = [v < 5 for v in s.speeds]
        queue, on_ramp = sum(standing), sum(standing[n - s.counts[-1]:])
        return {
            "incident_active": float(active), **lanes,
            "incident_km": (self.road.starts[i.stretch] + i.position) / 1000 if i else 0.0,
            "queue_length": float(queue - on_ramp), "ramp_queue": float(on_ramp),
            "backlog": float(self._sim.backlog) if self._sim else 0.0,
            "vehicles": float(n), "mean_speed": sum(s.speeds) / n if n else MAIN_LIMIT,
            "actual_cav_share": sum(s.cavs) / n if n else 0.0,
            "main_demand": e.main_flow, "ramp_demand": e.ramp_flow,
            "speed_limit_order": e.order.speed if order == "speed_limit" else 0.0,
            "ramp_order": {"ramp_priority": 1.0, "ramp_hold": -1.0}.get(order or "", 0.0),
        }

    # Observation

    def _read_detectors(self) -> np.ndarray:
        """Append to the history; what ``traffic`` shows."""
        assert self._sim is not None
        news, history, n = self._episode.news, self._history, self._detectors.summary
        history[:-1] = history[1:]
        last = history[-1]
        traffic = self._detectors.read(
            self._sim.seen, self.np_random, "traffic" in news or "traffic" not in self._carriers, last[:n])
        counted = sensors.counters(self._sim.counts(), self.road.lanes, self.control_interval, "history" in news)
        last[n:] = counted + self._action
        return traffic

    def _observe(self) -> dict[str, Any]:
        assert self._sim is not None
        s = self._seen = self._sim.seen
        news, carry = self._episode.news, self._carriers
        traffic = self._read_detectors()
        incident, any_source = self._episode.incident, len(carry) > 2
        if any_source and incident and "camera" not in news:
            image = fog(None, self.np_random)
        else:
            lit = (incident.stretch, incident.lane) if any_source and incident and self._incident_active else None
            image = self._camera.draw(s, lit)
            if incident and "camera" not in news:
                image = fog(image, self.np_random)
        reports = "sequence" in news if "sequence" in carry else None
        return {
            "traffic": traffic, "history": self._history.copy(),
            "sequence": sensors.vehicles(self.road, s, self.sequence_length, reports is not False, reports),
            "camera": image, "instruction": self._message(),
        }
