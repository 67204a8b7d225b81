"""The junction with lights, on real SUMO simulations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lacer.envs
from lacer.envs import LacerError
from lacer.envs.traffic_signal import env as module
from lacer.envs.traffic_signal.env import CALM, WEIGHTS, TrafficSignalEnv
from lacer.envs.traffic_signal.episode import APPROACHES, TURNS, WORDINGS, draw_episode
from lacer.envs.traffic_signal.junction import VIEW, Junction, net_file

ID = "lacer/TrafficSignal-v0"


def make(**kwargs: Any) -> TrafficSignalEnv:
    env = lacer.envs.make(ID, **{"horizon": 200, **kwargs}).unwrapped
    assert isinstance(env, TrafficSignalEnv)
    return env


@pytest.fixture
def env() -> Iterator[TrafficSignalEnv]:
    made = make()
    yield made
    made.close()


def play(env: TrafficSignalEnv, seed: int, policy: Any) -> tuple[float, dict[str, float]]:
    """Return and metrics of an episode; ``policy(obs, info)``."""
    obs, info = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        obs, reward, terminated, done, info = env.step(policy(obs, info))
        assert not terminated
        total += reward
    return total, info["metrics"]


def longest_queue(obs: dict[str, Any], info: dict[str, Any], favour: float = 0.0) -> int:
    """The phase of the longest queue; a favoured approach counts ``favour`` more while somebody favoured is there."""
    queue = obs["signal"][13:].reshape(4, 2).copy()
    state = info["state"]
    for k, a in enumerate(APPROACHES):
        somebody = state[f"buses_{a}"] > 0 if state["bus_order"] else True
        if state[f"favoured_{a}"] and somebody:
            queue[k] += favour * (queue[k] > 0) if not state["bus_order"] else favour
    north, east, south, west = queue
    by_phase = np.array([north[0] + south[0], north[1] + south[1], east[0] + west[0], east[1] + west[1]])
    by_phase[obs["signal"][:4].argmax()] += 0.03
    return int(by_phase.argmax())


def test_network_is_that_of_the_wheel() -> None:
    path = net_file()
    assert path.is_relative_to(Path(str(sys.modules["sumo_rl"].__file__)).parent if "sumo_rl" in sys.modules
                               else path.parents[2])
    assert "RESCO" not in str(path), "the RESCO maps may not be changed or sold"
    junction = Junction(path)
    assert junction.lanes == tuple(f"{a[0]}_t_{k}" for a in APPROACHES for k in (0, 1))
    assert junction.greens == 4


def test_observation_is_sumo_rls_own_and_history_its_past(env: TrafficSignalEnv) -> None:
    obs, _ = env.reset(seed=1)
    past = [obs["signal"]] * env.history_length
    for action in (0, 2, 2, 1, 3, 0, 0, 0, 2, 2):
        obs, _, _, _, _ = env.step(action)
        own = env._world.traffic_signals[env._world.ts_ids[0]].compute_observation()
        np.testing.assert_array_equal(obs["signal"], own)
        past.append(own)
        np.testing.assert_array_equal(obs["history"], past[-env.history_length:])
    assert obs["signal"][:4].argmax() == 2
    assert obs["signal"][5:].max() > 0, "there are vehicles"


def test_camera_shows_vehicles_buses_and_lights() -> None:
    env = make(bus_flow=300.0)
    try:
        obs, _ = env.reset(seed=2)
        for _ in range(20):
            obs, *_ = env.step(0)
        image, sumo, junction = obs["camera"], env.sumo, env.junction
        near = [v for v in sumo.vehicle.getIDList()
                if np.abs(np.array(sumo.vehicle.getPosition(v)) - junction.centre).max() < VIEW / 2 - 3]
        assert any(v.startswith("bus") for v in near)
        assert any(v.startswith("car") for v in near)
        for v in near:
            row, column, seen = junction._pixel(np.array([sumo.vehicle.getPosition(v)]))
            assert seen.all()
            assert image[row, column, 0] in ((255,) if v.startswith("bus") else (150, 255)), v
        buses = sum(v.startswith("bus") for v in near)
        assert 3 * buses <= (image[..., 0] == 255).sum() <= 8 * buses + 16, "a bus is 12 m long, a pixel 2.2 m"
        lights = image[..., 2]
        assert sorted(set(lights[lights > 0].tolist())) == [60, 255]
        north = lights[:32, 24:32]
        assert north.max() == 255, "phase 0 is green from the north"
        assert lights[26:38, :29].max() == 60, "and red from the west"
        assert not image[:10, :10].any(), "off the road there is nothing"
    finally:
        env.close()


def test_reward_is_waiting_and_the_instruction_enters_it() -> None:
    """Red for the favoured approach costs more than the same red in an episode without a wish."""
    costs = {}
    for kind, weights in (("nothing", (1, 0, 0)), ("approach", (0, 0, 1))):
        env = make(order_weights=weights, flow=(400.0, 400.0))
        obs, _ = env.reset(seed=3)
        side = env._episode.order.approach
        assert (bool(side) and side in obs["instruction"]) == (kind == "approach")
        done, waited = False, np.zeros(2)
        while not done:
            _, reward, _, done, info = env.step(2 if side in ("north", "south", "") else 0)
            terms = info["reward_terms"]
            assert reward == pytest.approx(sum(terms.values()))
            assert terms["waiting"] <= 0
            assert terms["favoured"] <= 0
            assert kind == "approach" or terms["favoured"] == 0
            waited += CALM * np.expm1(-3 * np.array([terms["waiting"], reward]))  # vehicle-seconds, without and with
        m, n = info["metrics"], len(env._episode.vehicles)
        chosen = sum(v.approach == side for v in env._episode.vehicles)
        extra = WEIGHTS[kind] * m["favoured_waiting"] * chosen
        assert waited[0] == pytest.approx(m["mean_waiting"] * n)
        assert waited[1] - waited[0] == pytest.approx(extra, abs=1e-6)
        assert waited[1] == pytest.approx(m["waiting"] * (n + WEIGHTS[kind] * chosen))
        costs[kind] = m
        env.close()
    assert costs["nothing"]["waiting"] == costs["nothing"]["mean_waiting"]
    assert costs["nothing"]["favoured_waiting"] == 0
    assert costs["approach"]["waiting"] > 1.3 * costs["approach"]["mean_waiting"]


@pytest.mark.slow
def test_following_the_instruction_pays() -> None:
    """Paired by episode: a controller that favours whom the text names waits less by the task's measure."""
    env = make(horizon=600, order_weights=(0, 0.6, 0.4))
    gains = []
    for seed in range(5000, 5016):
        told = play(env, seed, lambda o, i: longest_queue(o, i, 0.5))[1]
        ignored = play(env, seed, longest_queue)[1]
        gains.append([ignored["waiting"] - told["waiting"], ignored["favoured_waiting"] - told["favoured_waiting"]])
    env.close()
    mean, error = np.mean(gains, 0), np.std(gains, 0) / np.sqrt(len(gains))
    assert (mean > 2 * error).all(), (mean, error)


def test_same_seed_same_episode_in_another_process(env: TrafficSignalEnv) -> None:
    here = [play(env, 5, lambda o, i: longest_queue(o, i, 0.5)) for _ in range(2)]
    assert here[0] == here[1]
    code = ("import importlib.util, sys; s = importlib.util.spec_from_file_location('t', sys.argv[1]); "
            "t = importlib.util.module_from_spec(s); s.loader.exec_module(t); e = t.make(); "
            "print(t.play(e, 5, lambda o, i: t.longest_queue(o, i, 0.5))); e.close()")
    out = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "7"}).stdout
    assert out.strip().splitlines()[-1] == repr(here[0])


def test_control_beats_chance(env: TrafficSignalEnv) -> None:
    rng = np.random.default_rng(0)
    by_chance = [play(env, s, lambda *_: int(rng.integers(4)))[1]["waiting"] for s in range(4)]
    by_queue = [play(env, s, longest_queue)[1]["waiting"] for s in range(4)]
    assert np.mean(by_queue) < 0.7 * np.mean(by_chance)


def test_wordings_are_held_out_and_name_the_side() -> None:
    for kind in WORDINGS["train"]:
        train, held = (set(WORDINGS[w][kind]) for w in ("train", "held_out"))
        assert train
        assert held
        assert not train & held
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        e = draw_episode(rng, horizon=100, flow=(100, 300), bus_flow=20, order_weights=(1, 1, 1), wordings="held_out")
        assert (e.order.approach in e.order.text) if e.order.approach else e.order.kind == "nothing"
        assert all(e.vehicles[i].depart <= e.vehicles[i + 1].depart for i in range(len(e.vehicles) - 1))
        assert all(v.exit in TURNS[v.approach] for v in e.vehicles)
        seen.add((e.order.kind, e.order.approach))
    assert len(seen) == 9
    texts = []
    for wordings in ("train", "held_out"):
        env = make(wordings=wordings)
        obs, _ = env.reset(seed=9)
        texts.append((obs["instruction"], env._episode.order.kind, env._episode.order.approach))
        env.close()
    assert texts[0][0] != texts[1][0]
    assert texts[0][1:] == texts[1][1:], "only the words differ"


def test_second_simulation_is_refused_both_ways(env: TrafficSignalEnv) -> None:
    motorway = lacer.envs.make("lacer/MixedTraffic-v0", scene="small", warm_up=5.0, horizon=20.0)
    env.reset(seed=0)
    for other in (make(), motorway):
        with pytest.raises(LacerError, match="SubprocVecEnv"):
            other.reset(seed=0)
    env.step(0)  # undisturbed
    env.close()
    motorway.reset(seed=0)
    with pytest.raises(LacerError, match="SubprocVecEnv"):
        env.reset(seed=0)
    motorway.step(np.zeros(motorway.action_space.shape, np.float32))  # type: ignore[arg-type]
    motorway.close()
    env.reset(seed=0)
    env.step(0)


def test_dropped_without_close_gives_the_place_back() -> None:
    import gc

    first = make()
    first.reset(seed=0)
    del first
    gc.collect()
    second = make()
    second.reset(seed=0)
    gc.collect()
    second.step(0)
    second.close()


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"horizon": 0}, "horizon must be a multiple of control_interval"),
    ({"horizon": 101}, "horizon must be a multiple of control_interval"),
    ({"control_interval": 2}, "control_interval must be a whole number of seconds from 3 to 60"),
    ({"flow": (300, 100)}, "flow must be"), ({"flow": 100}, "flow must be"), ({"flow": (-1, 100)}, "flow must be"),
    ({"bus_flow": -1}, "bus_flow must be"), ({"bus_flow": float("nan")}, "bus_flow must be"),
    ({"order_weights": (0, 0, 0)}, "order_weights must be"), ({"order_weights": (1, 1)}, "order_weights must be"),
    ({"history_length": 0}, "history_length must be"), ({"wordings": "heldout"}, "did you mean 'held_out'"),
    ({"render_mode": "rgb"}, "Known: rgb_array"), ({"scene": "small"}, "does not take these arguments"),
])
def test_wrong_arguments(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(LacerError) as e:
        make(**kwargs)
    assert says in str(e.value)


def test_wrong_actions_and_order_of_calls(env: TrafficSignalEnv) -> None:
    with pytest.raises(LacerError, match=r"call reset\(\) before step"):
        env.step(0)
    env.reset(seed=0)
    for action in (4, -1, 0.5, np.nan, np.zeros(2, int), "0", None):
        with pytest.raises(LacerError, match="action must be a whole number from 0 to 3"):
            env.step(action)
    env.step(np.int64(3))
    env.step(np.array(1))


def test_a_crash_ends_the_episode_and_the_next_reset_works(env: TrafficSignalEnv,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(seed=0)
    env.step(0)
    env.sumo.close()  # the simulation dies under the environment
    with pytest.raises(LacerError, match=r"the SUMO simulation failed: .*reset\(\) starts a new one"):
        env.step(0)
    with pytest.raises(LacerError, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    env.step(0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("lacer.envs.traffic_signal.episode.Episode.write_routes", full)
        with pytest.raises(LacerError, match="No space left on device"):
            env.reset(seed=1)
    env.reset(seed=1)
    env.step(0)


def test_missing_sumo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec",
                        lambda name, *a: None if name.startswith("sumo_rl") else real(name, *a))
    with pytest.raises(LacerError, match="pip install sumo-rl"):
        make()


def test_render() -> None:
    env = make(render_mode="rgb_array")
    with pytest.raises(LacerError, match=r"call reset\(\) before render"):
        env.render()
    env.reset(seed=0)
    for _ in range(6):
        env.step(0)
    picture = env.render()
    assert picture is not None
    assert picture.shape == (512, 512, 3)
    assert picture.any()
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize(("env_id", "kwargs"), [
    (ID, {"horizon": 20}), ("lacer/MixedTraffic-v0", {"scene": "small", "warm_up": 10.0, "horizon": 20.0})])
def test_make_vec_gives_each_a_process(env_id: str, kwargs: dict[str, Any], method: Any) -> None:
    from lacer.envs.vec import close_vec, make_vec  # imports torch, for which the other processes need not wait

    runs = []
    for _ in range(2):
        venv = make_vec(env_id, 2, kwargs, seed=4, start_method=method)
        venv.action_space.seed(0)
        venv.reset()
        runs.append([venv.step(np.stack([venv.action_space.sample() for _ in range(2)]))[1] for _ in range(6)])
        close_vec(venv)
    np.testing.assert_array_equal(*runs)
    assert not np.array_equal(np.array(runs[0])[:, 0], np.array(runs[0])[:, 1]), "each copy has its seed"


@pytest.mark.slow
def test_many_resets_leak_nothing() -> None:
    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    env = make(horizon=20)
    files = Path("/proc/self/fd")
    for i in range(1000):
        env.reset(seed=i)
        env.step(0)
        if i == 200:
            before, opened = memory(), len(list(files.iterdir()))
    assert memory() - before < 20_000, "kilobytes in 800 resets"
    assert len(list(files.iterdir())) <= opened
    env.close()
