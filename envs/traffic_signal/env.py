"""A signalised junction on sumo-rl's environment, with a camera and instructions that enter the reward."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lacer.envs.errors import LacerError, UnknownNameError
from lacer.envs.sources import Objective, SourceSpec, TaskCard
from lacer.envs.traffic import simulation
from lacer.envs.traffic.network import sumo_home
from lacer.envs.traffic_signal.episode import APPROACHES, CHARSET, MAX_LENGTH, WORDINGS, Episode, draw_episode
from lacer.envs.traffic_signal.junction import SIZE, Junction, net_file

WEIGHTS = {"nothing": 0.0, "buses": 40.0, "approach": 5.0}
"""What a favoured vehicle counts on top of 1: a bus about as much as its passengers."""
CALM = 25.0
"""Weighted vehicle-seconds of waiting in a step from which on the reward grows slowly: five vehicles for 5 s."""
_HALTING = 0.1  # m/s, as SUMO counts


class TrafficSignalEnv(gym.Env):
    """Switch the lights of a four-armed junction in SUMO, on sumo-rl's environment (Alegre 2019).

    Network: sumo-rl's ``2way-single-intersection``, 300 x 300 m, two lanes per arm, one of them for left turns; the
    demand is drawn per episode and changes once. sumo-rl makes the phases, keeps the yellow (2 s) and the least green
    (5 s), and gives the observation.

    Observation, a Dict of four sources (P = 4 green phases, L = 8 lanes, D = P + 1 + 2 L):
        signal: vector (D,), sumo-rl's own: phase one-hot, whether it may change, density and queue of each lane.
        history: series (T, D), its last values, oldest first.
        camera: image (64, 64, 3) uint8, see :meth:`~lacer.envs.traffic_signal.junction.Junction.picture`; only here
            buses differ from cars.
        instruction: text from the control room: favour the buses of an approach, an approach, or nothing.

    Action, Discrete(4): the green phase of the next 5 s: north and south straight on and right, north and south left,
    east and west straight on and right, east and west left. There is no action that means "do nothing".

    Reward of a step, dimensionless: ``-log(1 + w / 25) / 3``, w the weighted waiting in it, in vehicle-seconds; the
    logarithm keeps a jam, which costs a hundred times as much, from hiding everything else (with w itself PPO did
    not learn in 10,000 steps). A vehicle waits while it stands (< 0.1 m/s) before the junction or has no room to enter;
    one favoured by the instruction counts 41 (a bus) or 6.
    ``info["reward_terms"]`` has the part without instruction and the rest. ``info["metrics"]`` at the end: waiting
    (s; weighted, per vehicle), mean_waiting (s, unweighted), favoured_waiting (s per favoured vehicle), queue
    (vehicles), throughput (veh/h).
    ``info["state"]``: privileged truth, see ``task_card.state_names``.

    Args:
        horizon: seconds of an episode, a multiple of ``control_interval``.
        control_interval: seconds between decisions, sumo-rl's ``delta_time``, at least 3.
        flow: lowest and highest demand of an approach, cars per hour; an episode draws in between.
        bus_flow: buses per hour and approach.
        order_weights: weights of (nothing, buses, approach) among the instructions.
        wordings: ``"train"`` or ``"held_out"`` wordings of the instructions.
        history_length: T.
        render_mode: ``"rgb_array"`` (the camera's picture, eight times as large) or None.

    One simulation runs per process: ``reset`` of a second environment raises; use ``SubprocVecEnv``. The same seed
    gives the same trajectory, in any process.

    Raises:
        LacerError: for impossible arguments or actions, a missing or failing SUMO.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1, "one_per_process": True}  # noqa: RUF012

    def __init__(
        self,
        *,
        horizon: int = 600,
        control_interval: int = 5,
        flow: tuple[float, float] = (100.0, 350.0),
        bus_flow: float = 40.0,
        order_weights: Sequence[float] = (0.2, 0.5, 0.3),
        wordings: Literal["train", "held_out"] = "train",
        history_length: int = 8,
        render_mode: str | None = None,
    ) -> None:
        _check(horizon, control_interval, flow, bus_flow, order_weights, history_length)
        if wordings not in WORDINGS:
            raise UnknownNameError("set of wordings", str(wordings), WORDINGS)
        if render_mode not in (None, "rgb_array"):
            raise UnknownNameError("render mode", str(render_mode), self.metadata["render_modes"])
        self.horizon, self.control_interval, self.wordings = horizon, control_interval, wordings
        self.flow, self.bus_flow, self.order_weights = tuple(flow), float(bus_flow), tuple(order_weights)
        self.history_length, self.render_mode = history_length, render_mode
        self._net = net_file()
        self.junction = Junction(self._net)
        self._world: Any = None
        self._folder: Path | None = None
        self._owner = os.getpid()

        width = self.junction.greens + 1 + 2 * len(self.junction.lanes)
        self.action_space = spaces.Discrete(self.junction.greens)
        sources = [
            SourceSpec("signal", "vector", spaces.Box(0.0, 1.0, (width,), np.float32),
                       "The junction now: green phase one-hot, whether it may change, then density and then queue of "
                       "each incoming lane (north, east, south, west; straight on and right, left)."),
            SourceSpec("history", "series", spaces.Box(0.0, 1.0, (history_length, width), np.float32),
                       "The last values of `signal`, one per decision."),
            SourceSpec("camera", "image", spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                       "Bird's-eye picture of the junction, north on top: occupancy (buses brighter and longer than "
                       "cars), speed, lights at the stop lines."),
            SourceSpec("instruction", "text", spaces.Text(MAX_LENGTH, min_length=1, charset=CHARSET),
                       "The control room's wish in plain English: favour the buses of an approach, favour an approach, "
                       "or nothing in particular."),
        ]
        self.task_card = TaskCard(
            env_id="lacer/TrafficSignal-v0", sources={s.name: s for s in sources}, action_space=self.action_space,
            objective=Objective("waiting", "s", "minimize"),
            description=(
                f"Junction of four two-lane arms with lights. Every {control_interval} s choose the green phase: north "
                "and south straight on, north and south left, east and west straight on, east and west left. Minimise "
                "the mean waiting time, where vehicles that the instruction favours count more: buses of an approach "
                "(only the camera shows where buses are), or all vehicles of an approach."),
            state_names=(*(f"{what}_{a}" for what in ("demand", "halting", "buses", "favoured") for a in APPROACHES),
                         "bus_order"),
        )
        self.observation_space = self.task_card.observation_space

    @property
    def sumo(self) -> Any:
        """The running simulation's interface, or None."""
        return None if self._world is None else self._world.sumo

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._episode: Episode = draw_episode(
            self.np_random, horizon=self.horizon, flow=self.flow,  # type: ignore[arg-type]
            bus_flow=self.bus_flow, order_weights=self.order_weights, wordings=self.wordings)
        if self._folder is None or self._owner != os.getpid() or not self._folder.is_dir():
            self._owner = os.getpid()
            self._folder = Path(tempfile.mkdtemp(prefix="lacer-signal-"))
        routes = self._folder / "routes.xml"
        self._waited = np.zeros(3)  # all, favoured, all in numbers of vehicles standing; vehicle-seconds
        self._step_waited = np.zeros(2)
        self._arrived = 0
        try:
            self._episode.write_routes(routes)
            self._take_place()
            if self._world is None:
                self._world = _world(self, routes)
            signal, _ = self._world.reset(seed=self._episode.sumo_seed)
        except LacerError:
            raise
        except Exception as e:  # TraCIException, FatalTraCIError, RuntimeError; OSError of a full disk
            self._stop()
            raise LacerError(f"SUMO did not start: {e}") from e
        self._history: deque[np.ndarray] = deque([signal] * self.history_length, maxlen=self.history_length)
        return self._observe(), {"state": self._state()}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if self.sumo is None:
            raise LacerError("call reset() before step()")
        a = np.asarray(action)
        if a.shape not in ((), (1,)) or a.dtype.kind not in "iu" or not 0 <= int(a.reshape(())) < self.junction.greens:
            raise LacerError(f"action must be a whole number from 0 to {self.junction.greens - 1}, not {action!r}")
        self._step_waited[:] = 0
        try:
            signal, _, _, done, _ = self._world.step(int(a.reshape(())))
            self._history.append(signal)
            obs = self._observe()
            state = self._state()
        except Exception as e:  # TraCIException, FatalTraCIError, RuntimeError
            self._stop()
            raise LacerError(f"the SUMO simulation failed: {e}; reset() starts a new one") from e
        everyone, favoured = self._step_waited
        waiting, total = -np.log1p(everyone / CALM) / 3, -np.log1p((everyone + favoured) / CALM) / 3
        terms = {"waiting": float(waiting), "favoured": float(total - waiting)}
        info: dict[str, Any] = {"state": state, "reward_terms": terms}
        if done:
            info["metrics"] = self._metrics()
        return obs, float(total), False, bool(done), info

    def second(self) -> None:
        """Counts what waited in the last second of simulation; called by sumo-rl's environment."""
        sumo, order = self.sumo, self._episode.order
        halting = {a: sumo.edge.getLastStepHaltingNumber(f"{a[0]}_t") for a in APPROACHES}
        pending = sumo.simulation.getPendingVehicles()
        favoured = 0
        if order.kind == "approach":
            favoured = halting[order.approach] + sum(self._comes_from(v) == order.approach for v in pending)
        elif order.kind == "buses":
            on_road = sumo.edge.getLastStepVehicleIDs(f"{order.approach[0]}_t")
            favoured = sum(v[0] == "b" and sumo.vehicle.getSpeed(v) < _HALTING for v in on_road)
            favoured += sum(v[0] == "b" and self._comes_from(v) == order.approach for v in pending)
        standing = sum(halting.values())
        everyone = standing + len(pending)
        self._step_waited += (everyone, WEIGHTS[order.kind] * favoured)
        self._waited += (everyone, favoured, standing)
        self._arrived += sumo.simulation.getArrivedNumber()

    def _comes_from(self, vehicle: str) -> str:
        return self._episode.vehicles[int(vehicle[3:])].approach

    def _metrics(self) -> dict[str, float]:
        order, vehicles = self._episode.order, self._episode.vehicles
        n = max(len(vehicles), 1)
        chosen = [v for v in vehicles if v.approach == order.approach and (v.bus or order.kind == "approach")]
        everyone, favoured, standing = self._waited
        return {
            "waiting": (everyone + WEIGHTS[order.kind] * favoured) / (n + WEIGHTS[order.kind] * len(chosen)),
            "mean_waiting": everyone / n, "favoured_waiting": favoured / max(len(chosen), 1),
            "queue": standing / self.horizon, "throughput": self._arrived * 3600 / self.horizon,
        }

    def _observe(self) -> dict[str, Any]:
        return {
            "signal": self._history[-1], "history": np.stack(self._history),
            "camera": self.junction.picture(self.sumo, self._world.ts_ids[0]),
            "instruction": self._episode.order.text,
        }

    def _state(self) -> dict[str, float]:
        sumo, e = self.sumo, self._episode
        half = int(sumo.simulation.getTime() >= self.horizon / 2)
        out: dict[str, float] = {}
        for k, a in enumerate(APPROACHES):
            ids = sumo.edge.getLastStepVehicleIDs(f"{a[0]}_t")
            out |= {f"demand_{a}": float(e.demand[half, k]), f"buses_{a}": float(sum(v[0] == "b" for v in ids)),
                    f"halting_{a}": float(sumo.edge.getLastStepHaltingNumber(f"{a[0]}_t")),
                    f"favoured_{a}": float(e.order.approach == a)}
        out["bus_order"] = float(e.order.kind == "buses")
        return {name: out[name] for name in self.task_card.state_names}

    def render(self) -> np.ndarray | None:
        """The camera's picture (512, 512, 3) uint8, or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="rgb_array"')
            return None
        if self.sumo is None:
            raise LacerError("call reset() before render()")
        picture = self.junction.picture(self.sumo, self._world.ts_ids[0])
        return np.repeat(np.repeat(picture, 8, axis=0), 8, axis=1)

    def close(self) -> None:
        """End the simulation and give the process's place to other environments; ``reset`` starts anew."""
        self._stop()
        if getattr(self, "_folder", None) is not None and self._owner == os.getpid():  # a forked process inherits it
            shutil.rmtree(self._folder, ignore_errors=True)  # type: ignore[arg-type]
            self._folder = None

    def __del__(self) -> None:
        self.close()

    def _stop(self) -> None:
        world = getattr(self, "_world", None)
        self._world = None
        if world is not None and world.sumo is not None:
            if world.sumo.isLoaded() and self._process == os.getpid():  # a forked process only inherits the object
                world.close()
            world.sumo = None  # or sumo-rl's own __del__ would close whatever runs then

    def _take_place(self) -> None:
        """Takes the process's only simulation, or says who has it; the place is shared with the motorway's."""
        import libsumo

        held = simulation._holder
        other: Any = None if held is None or held[0] != os.getpid() else held[1]()
        if other is not None and other is not self and other.sumo is not None:
            raise LacerError(
                "another traffic environment already runs in this process, and libsumo holds one simulation per "
                "process: close that one, or run each in a process of its own "
                "(stable_baselines3.common.vec_env.SubprocVecEnv)")
        if libsumo.isLoaded() and other is not self:
            if held is None:
                raise LacerError("another program part runs a libsumo simulation in this process; close it first, or "
                                 "run this environment in a process of its own (SubprocVecEnv)")
            libsumo.close()  # left over from a collected environment, or inherited by a forked process
        self._process = os.getpid()
        simulation._holder = (os.getpid(), weakref.ref(self))  # type: ignore[arg-type]


def _world(env: TrafficSignalEnv, routes: Path) -> Any:
    """sumo-rl's environment on libsumo, which tells ``env`` of every second."""
    module = _sumo_rl()
    told = weakref.ref(env)

    class World(module.SumoEnvironment):  # type: ignore[name-defined]
        def _sumo_step(self) -> None:
            super()._sumo_step()
            owner = told()
            if owner is not None:
                owner.second()

    return World(
        net_file=str(env._net), route_file=str(routes), single_agent=True, num_seconds=env.horizon,
        delta_time=env.control_interval, yellow_time=2, min_green=5, max_green=env.horizon, time_to_teleport=-1,
        reward_fn=lambda signal: 0.0, add_system_info=False, add_per_agent_info=False, sumo_seed=0,
        sumo_warnings=False,
        additional_sumo_cmd="--no-step-log true --duration-log.disable true --xml-validation never")


@lru_cache(maxsize=1)
def _sumo_rl() -> Any:
    """A copy of sumo-rl's module of environments that runs on libsumo.

    sumo-rl's own switch, the variable LIBSUMO_AS_TRACI, acts when ``traci`` is first imported in a process, which
    libsumo itself does; a user's sumo-rl in the same process keeps what it has.

    Raises:
        LacerError: if sumo-rl or libsumo is missing.
    """
    sumo_home()  # sumo-rl looks for SUMO_HOME
    try:
        import libsumo

        spec = importlib.util.find_spec("sumo_rl.environment.env")
    except ImportError as e:
        raise LacerError(f"lacer/TrafficSignal-v0 needs libsumo and sumo-rl ({e}); install them with: "
                         "pip install eclipse-sumo libsumo sumo-rl") from e
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LIBSUMO, module.traci = True, libsumo
    return module


def _check(horizon: Any, control: Any, flow: Any, bus_flow: Any, order_weights: Any, history_length: Any) -> None:
    """Reject what cannot be simulated, naming the argument and what it may be."""
    def need(ok: Any, name: str, rule: str, value: Any) -> None:
        if not ok:
            raise LacerError(f"{name} must be {rule}, not {value!r}")

    def whole(x: Any) -> bool:
        return isinstance(x, int | np.integer) and not isinstance(x, bool)

    need(whole(control) and 3 <= control <= 60, "control_interval", "a whole number of seconds from 3 to 60", control)
    need(whole(horizon) and horizon >= control and horizon % control == 0, "horizon",
         f"a multiple of control_interval ({control} s)", horizon)
    need(np.shape(flow) == (2,) and 0 <= flow[0] <= flow[1] <= 5000, "flow",
         "(lowest, highest) cars per hour and approach with 0 <= lowest <= highest <= 5000", flow)
    need(np.ndim(bus_flow) == 0 and 0 <= bus_flow <= 1000, "bus_flow", "between 0 and 1000 buses per hour", bus_flow)
    need(np.shape(order_weights) == (3,) and min(order_weights) >= 0 and sum(order_weights) > 0, "order_weights",
         "3 weights, none negative and not all zero", order_weights)
    need(whole(history_length) and history_length >= 1, "history_length", "a whole number of at least 1",
         history_length)
