"""The mixed traffic environment, on real SUMO simulations."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lacer.envs
from lacer.envs import LacerError
from lacer.envs.traffic import network, text
from lacer.envs.traffic.camera import BODY
from lacer.envs.traffic.demand import CARRIERS, Incident, Order, Trip
from lacer.envs.traffic.mixed import SCENES, MixedTrafficEnv

SHORT: dict[str, Any] = {"scene": "small", "warm_up": 50.0, "horizon": 60.0}


def make(**kwargs: Any) -> MixedTrafficEnv:
    env = lacer.envs.make("lacer/MixedTraffic-v0", **{**SHORT, **kwargs}).unwrapped
    assert isinstance(env, MixedTrafficEnv)
    return env


@pytest.fixture
def env() -> Iterator[MixedTrafficEnv]:
    made = make()
    yield made
    made.close()


def play(env: MixedTrafficEnv, seed: int, action: str = "random") -> tuple[int, list[float], dict[str, float]]:
    """Checksum of all observations, rewards, metrics of one episode."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    seen, rewards, done = [obs], [], False
    while not done:
        a = rng.uniform(-1, 1, env.action_space.shape) if action == "random" else np.zeros(env.action_space.shape)
        obs, reward, _, done, info = env.step(a)
        seen.append(obs)
        rewards.append(reward)
    raw = b"".join(v.encode() if isinstance(v, str) else v.tobytes() for o in seen for v in o.values())
    return zlib.crc32(raw), rewards, info["metrics"]


def test_gymnasium_checks(env: MixedTrafficEnv) -> None:
    check_env(env, skip_render_check=True)  # that check would hold two simulations at once


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_all_sources_in_their_spaces_and_names_kept(scene: str) -> None:
    env = make(scene=scene, horizon=40.0)
    card = env.task_card
    assert {n: s.modality for n, s in card.sources.items()} == {
        "traffic": "vector", "history": "series", "sequence": "set", "camera": "image", "instruction": "text"}
    obs, info = env.reset(seed=1)
    assert list(obs) == list(card.sources)
    assert set(env.observation_space.keys()) == set(obs)
    infos, done = [info], False
    while True:
        for name, value in obs.items():
            assert env.observation_space[name].contains(value), name
        assert np.all(np.diff(obs["sequence"][:, 0]) <= 0), "present vehicles come first"
        if done:
            break
        obs, reward, terminated, done, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(sum(info["reward_terms"].values()))
        assert not terminated
        infos.append(info)
    for i in infos:
        assert tuple(i["state"]) == card.state_names
        assert all(isinstance(v, float) and np.isfinite(v) for v in i["state"].values())
    assert "metrics" not in infos[-2]
    metrics = infos[-1]["metrics"]
    assert {card.objective.metric, "throughput", "travel_time", "hard_brakings", "collisions", "co2"} <= set(metrics)
    assert 0 < metrics["average_speed"] < 30
    assert metrics["travel_time"] > 0.9 * env.road.length / 36
    assert 50 < metrics["co2"] < 500
    assert np.array_equal(card.noop, np.zeros(env.action_space.shape))
    env.close()


def test_same_seed_same_episode_here_and_in_another_process(env: MixedTrafficEnv) -> None:
    first, other, again = play(env, 5), play(env, 6), play(env, 5)
    assert first == again
    assert first != other
    code = ("import importlib.util, sys; s = importlib.util.spec_from_file_location('t', sys.argv[1]); "
            "t = importlib.util.module_from_spec(s); s.loader.exec_module(t); "
            "e = t.make(); print(repr(t.play(e, 5))); e.close()")
    out = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True).stdout
    assert out.strip() == repr(first)


def test_zero_action_is_no_control(env: MixedTrafficEnv) -> None:
    env.reset(seed=3)
    assert env._sim is not None
    for _ in range(4):
        env.step(np.zeros(env.action_space.shape))
    acted = env._sim.seen
    env.reset(seed=3)
    for _ in range(4):
        env._sim.run(env.control_interval, None)
    free = env._sim.seen
    assert acted.ids == free.ids
    assert acted.xs == free.xs
    assert np.array_equal(acted.speed, free.speed)


def test_release_of_a_speed_cap(env: MixedTrafficEnv) -> None:
    env.reset(seed=3)
    assert env._sim is not None
    slow = np.zeros(env.action_space.shape)
    slow[: env.road.segments] = -1
    env.step(slow)
    s = env._seen
    inside = s.cav & (s.edge >= 1) & (s.edge <= env.road.segments) & ~s.broken
    assert s.speed[inside].mean() < 18
    assert env._sim._caps
    env.step(np.zeros(env.action_space.shape))
    assert not env._sim._caps


def test_actions_reach_the_vehicles() -> None:
    env = make(incident_probability=0.0, cav_share=1.0, ramp_flow=(800, 800))
    clear, hold = np.zeros(env.action_space.shape), np.zeros(env.action_space.shape)
    lane = 1
    clear[env.road.segments + lane] = 1.0
    hold[-1] = 1.0
    counts = {}
    for name, a in (("none", np.zeros_like(clear)), ("clear", clear), ("hold", hold)):
        env.reset(seed=4)
        for _ in range(3):
            env.step(a)
        s = env._seen
        counts[name] = (int(((s.edge == 2) & (s.lane == lane)).sum()), int((s.edge < 0).sum()))
    assert counts["clear"][0] < counts["none"][0]
    assert counts["hold"][1] > counts["none"][1]
    assert env.command(clear).clear_lane == lane
    assert env.command(0.29 * clear).clear_lane is None
    env.close()


def test_incident_is_seen_by_the_camera_and_told_by_the_text() -> None:
    camera, told = make(news={"camera": 1}), make(news={"instruction": 1})
    obs, _ = camera.reset(seed=2)
    for _ in range(3):
        obs, _, _, _, info = camera.step(np.zeros(camera.action_space.shape))
    incident = camera._episode.incident
    assert incident is not None
    assert info["state"]["incident_active"] == info["state"][f"incident_lane_{incident.lane}"] == 1.0
    row, column = camera._camera.where(incident.stretch, incident.lane, incident.position)
    assert obs["camera"][row, column - 2:column + 1, 0].max() == 255
    assert (obs["camera"][..., 0] > BODY).sum() < 30, "nothing else is as bright"
    assert "lane" not in obs["instruction"]
    camera.close()
    obs, _ = told.reset(seed=2)
    for _ in range(3):
        obs, *_ = told.step(np.zeros(told.action_space.shape))
    incident = told._episode.incident
    assert incident is not None
    assert text.lane_name(incident.lane, told.road.lanes) in obs["instruction"]
    assert obs["camera"].max() < 100, "fog"
    told.close()


@pytest.mark.parametrize("source", CARRIERS)
def test_only_the_source_that_has_the_news_tells_the_lane(source: str) -> None:
    env = make(scene="sources", news=dict.fromkeys(CARRIERS, 0.0) | {source: 1.0}, warm_up=60.0, detector_noise=0.0)
    road, right = env.road, []
    for seed in (2, 3, 4):
        obs, _ = env.reset(seed=seed)
        for _ in range(3):
            obs, _, _, _, info = env.step(np.zeros(env.action_space.shape))
        incident = env._episode.incident
        assert incident is not None
        assert info["state"]["incident_active"] == info["state"][f"incident_lane_{incident.lane}"] == 1.0
        told = {
            "instruction": text.lane_name(incident.lane, road.lanes) in obs["instruction"],
            "camera": bool(obs["camera"].max() == 255),
            "sequence": bool(obs["sequence"][:, 7:].any()),
        }
        assert [k for k, v in told.items() if v] == [source] * (source in told)
        if source == "sequence":
            row = obs["sequence"][:, 7:].any(1).argmax()
            assert obs["sequence"][row, 7 + incident.lane] == 1
            assert obs["sequence"][row, 1] == pytest.approx(
                (road.merge_end - road.starts[incident.stretch] - incident.position) / 500, abs=0.01)
        else:
            assert not obs["sequence"][:, 2].any(), "lanes are unknown"
        by_lane = obs["traffic"][4 * (road.segments + 1):-2 - road.lanes].reshape(road.segments, road.lanes, 4)
        apart = np.ptp(by_lane, axis=1) > 0  # density, speed, spread, CAV share of each segment
        assert apart[incident.stretch - 1].sum() >= 3 if source == "traffic" else not apart.any()
        speeds, alarm = by_lane[incident.stretch - 1, :, 1], obs["traffic"][-road.lanes:]
        counts = obs["history"][-4:, 3 * (road.segments + 1):][:, :road.lanes].sum(0)
        assert (np.ptp(counts) > 0) == (source == "history")
        assert (np.ptp(speeds) > 0.5 * speeds.mean()) == (source == "traffic")
        assert (np.ptp(alarm) > 0.5) == (source == "traffic")
        right.append((speeds.argmin() == incident.lane == alarm.argmax(), counts.argmin() == incident.lane))
    assert all(r[0] for r in right) or source != "traffic"
    assert all(r[1] for r in right) or source != "history"
    env.close()


def test_traffic_shows_four_values_of_every_segment_and_lane() -> None:
    env = make(detector_noise=0.0, cav_share=0.5)
    road = env.road
    obs, _ = env.reset(seed=2)
    cells, empty = road.segments * road.lanes, 0
    assert env.observation_space["traffic"].shape == (4 * (road.segments + 1) + 4 * cells + 2,)
    for _ in range(4):
        s = env._seen
        shown = obs["traffic"][4 * (road.segments + 1):-2].reshape(road.segments, road.lanes, 4)
        means = obs["traffic"][:4 * road.segments].reshape(road.segments, 4)
        for e in range(1, road.segments + 1):
            here = s.edge == e
            for k in (*range(road.lanes), None):
                inside = here if k is None else here & (s.lane == k)
                n, v = inside.sum(), s.speed[inside]
                density = n / (road.stretches[e].length * 0.08 * (road.lanes if k is None else 1))
                wanted = (density, v.mean() / network.MAIN_LIMIT, v.std() / 10, s.cav[inside].mean()) if n else (
                    0, 1, 0, 0)
                assert (means[e - 1] if k is None else shown[e - 1, k]) == pytest.approx(wanted, abs=1e-4)
                empty += n == 0
        obs, *_ = env.step(env.action_space.sample())
    assert empty, "some lane was empty"
    env.close()


def test_several_sources_can_tell_and_counters_remember_the_warm_up() -> None:
    env = make(scene="sources", news={"instruction+camera": 1, "history": 0}, horizon=20.0, warm_up=60.0)
    obs, info = env.reset(seed=2)
    assert info["state"]["incident_active"]
    assert "lane" in obs["instruction"]
    assert obs["camera"].max() == 255
    assert obs["history"][-6:].any(1).all()
    assert not obs["history"][:-6].any()
    env.close()


def test_safety_and_speed_are_rewarded_and_a_known_lane_is_worth_it() -> None:
    """Clearing the blocked lane against doing nothing and against clearing the other one, scene made for it."""
    env = make(scene="sources", warm_up=60.0, horizon=120.0)
    assert env.action_space.shape == (2,)
    metrics: dict[str, list[dict[str, float]]] = {"right": [], "none": [], "wrong": []}
    for name, found in metrics.items():
        for seed in range(100, 104):
            _, info = env.reset(seed=seed)
            done = False
            while not done:
                blocked = np.array([info["state"][f"incident_lane_{k}"] for k in range(2)])
                a = {"right": blocked, "none": 0 * blocked, "wrong": np.roll(blocked, 1)}[name]
                _, _, _, done, info = env.step(a)
                assert -1 <= info["reward_terms"]["safety"] <= 0
            found.append(info["metrics"])
    env.close()
    speed = {k: np.mean([m["average_speed"] for m in v]) for k, v in metrics.items()}
    exposure = {k: np.mean([m["exposure"] for m in v]) for k, v in metrics.items()}
    assert speed["right"] > speed["none"] + 2
    assert speed["right"] > speed["wrong"] + 2
    assert exposure["right"] < exposure["none"] < exposure["wrong"]


def test_controls_are_parts_of_the_action() -> None:
    env = make(controls=("ramp", "lanes"))  # the order is always the same
    assert env.action_space.shape == (env.road.lanes + 1,)
    command = env.command(np.array([0.0, 1.0, 0.0, 0.5]))
    assert command.clear_lane == 1
    assert not np.isfinite(command.segment_caps).any()
    assert command.ramp_cap < 16
    assert "segment speeds" not in env.task_card.description


def test_a_second_simulation_is_refused_and_close_gives_the_place_back(env: MixedTrafficEnv) -> None:
    other = make()  # construction starts nothing
    env.reset(seed=1)
    with pytest.raises(LacerError, match="SubprocVecEnv"):
        other.reset(seed=1)
    env.step(np.zeros(env.action_space.shape))
    env.close()
    env.close()
    with pytest.raises(LacerError, match="reset"):
        env.step(np.zeros(env.action_space.shape))
    other.reset(seed=1)
    other.close()
    env.reset(seed=1)


def test_a_forgotten_environment_holds_nothing() -> None:
    make().reset(seed=1)
    env = make()
    env.reset(seed=1)
    env.close()


def test_a_failed_simulation_is_reported_and_the_next_reset_works(env: MixedTrafficEnv) -> None:
    env.reset(seed=1)
    assert env._sim is not None
    env._sim.sumo.close()
    with pytest.raises(LacerError, match="reset"):
        env.step(np.zeros(env.action_space.shape))
    env.reset(seed=1)


@pytest.mark.parametrize(("kwargs", "word"), [
    ({"cav_share": 1.2}, "cav_share"), ({"lanes": 0}, "lanes"), ({"lanes": 2.5}, "lanes"),
    ({"main_flow": (-1, 100)}, "main_flow"), ({"ramp_flow": (300, 100)}, "ramp_flow"), ({"main_flow": 5}, "main_flow"),
    ({"step_length": 0.3}, "step_length"), ({"step_length": 0}, "step_length"),
    ({"control_interval": 5}, "control_interval"), ({"horizon": 15}, "horizon"), ({"warm_up": -1}, "warm_up"),
    ({"incident_probability": 2}, "incident_probability"), ({"detector_noise": -0.1}, "detector_noise"),
    ({"history_length": 0}, "history_length"), ({"sequence_length": 0}, "sequence_length"),
    ({"news": {"camera": 0}}, "news"), ({"news": {}}, "news"), ({"news": (1, 1)}, "news"),
    ({"news": {"camra": 1}}, "did you mean 'camera'"), ({"safety_weight": -1}, "safety_weight"),
    ({"order_weight": float("nan")}, "order_weight"), ({"client": "traci2"}, "did you mean 'traci'"),
    ({"controls": ()}, "controls"), ({"controls": ("lane",)}, "did you mean 'lanes'"),
    ({"controls": "ramp"}, "controls"), ({"order_weights": (1, 1)}, "order_weights"),
    ({"cav_share": float("nan")}, "cav_share"), ({"cav_share": "all"}, "cav_share"),
    ({"length": 100}, "length"), ({"length": "long"}, "length"), ({"humans": {"sigma": 1.5}}, "0 <= sigma <= 1"),
    ({"humans": {"simga": 0.5}}, "did you mean 'sigma'"), ({"humans": {"carFollowModel": "IDN"}}, "did you mean 'IDM'"),
    ({"humans": "aggressive"}, "humans"), ({"humans": {"tau": '1"/>'}}, "humans"),
    ({"scene": "smal"}, "did you mean 'small'"), ({"wordings": "test"}, "wordings"),
    ({"lane": 3}, "lane"),
])
def test_impossible_arguments_are_named(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(LacerError, match=word):
        make(**kwargs)


def test_a_window_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    env = make(render_mode="human")
    with pytest.raises(LacerError, match="rgb_array"):
        env.reset(seed=1)
    with pytest.raises(LacerError, match="did you mean 'human'"):
        MixedTrafficEnv(render_mode="humann")


@pytest.mark.parametrize("action", [np.zeros(3), np.full(7, np.nan), np.full(7, np.inf), np.full(7, 1.5),
                                    "left"])
def test_impossible_actions_are_refused(env: MixedTrafficEnv, action: Any) -> None:
    env.reset(seed=1)
    with pytest.raises(LacerError, match="finite numbers"):
        env.step(action)


@pytest.mark.parametrize("lanes", [2, 4])
def test_other_numbers_of_lanes(lanes: int) -> None:
    env = make(lanes=lanes, horizon=20.0)
    play(env, 1)
    env.close()


def test_a_longer_road_is_stretched_in_all_its_parts() -> None:
    short, long = make(), make(length=1400.0, horizon=20.0)
    assert long.road.length == pytest.approx(1400)
    for a, b in zip(short.road.stretches, long.road.stretches, strict=True):
        assert b.length == pytest.approx(2 * a.length, abs=0.1)
    assert long.road.ramp_length == pytest.approx(2 * short.road.ramp_length)
    assert "1400 m" in long.task_card.description
    play(long, 1)
    long.close()


@pytest.mark.parametrize("humans", [{"tau": 3.0, "sigma": 0.9}, {"carFollowModel": "IDM", "accel": 0.4}])
def test_human_drivers_can_be_others(humans: dict[str, str | float]) -> None:
    speeds = []
    for chosen in (None, humans):
        env = make(cav_share=0.0, humans=chosen, incident_probability=0.0)
        speeds.append(play(env, 1, "none")[2]["average_speed"])
        env.close()
    assert speeds[1] < speeds[0] - 0.5


def test_held_out_wordings_are_disjoint_and_all_messages_fit() -> None:
    road = make().road
    said: dict[str, set[str]] = {}
    space = make().observation_space["instruction"]
    for name in text.WORDINGS:
        said[name] = {
            text.message(road, name, pick, incident, order)  # type: ignore[arg-type]
            for pick in np.linspace(0, 0.999, 20)
            for incident in [None, *(Incident(k, 3, 50.0, 0.0, 1.0) for k in range(road.lanes))]
            for order in [*map(Order, ("nothing", "ramp_hold", "ramp_priority")), Order("speed_limit", 1, 60 / 3.6)]
        }
        assert all(space.contains(m) and "{" not in m for m in said[name])
    assert not said["train"] & said["held_out"]
    for kind in text.WORDINGS["train"]:
        assert not set(text.WORDINGS["train"][kind]) & set(text.WORDINGS["held_out"][kind])
    env = make(wordings="held_out", horizon=10.0)
    obs, _ = env.reset(seed=1)
    assert obs["instruction"] not in said["train"]
    env.close()


def test_routes_are_sorted_by_departure(env: MixedTrafficEnv, tmp_path: Path) -> None:
    env.reset(seed=1)
    trips = env._episode.trips
    assert all(isinstance(t, Trip) for t in trips)
    assert [t.depart for t in trips] == sorted(t.depart for t in trips)
    assert {t.ramp for t in trips} == {True, False}


def test_render(env: MixedTrafficEnv) -> None:
    shown = make(render_mode="rgb_array")
    with pytest.raises(LacerError, match="reset"):
        shown.render()
    shown.reset(seed=1)
    picture = shown.render()
    assert picture is not None
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.std() > 10
    shown.close()


def test_network_is_cached_once_and_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    road = network.Motorway(2, "after", 50.0, (60.0, 60.0, 60.0), 50.0, 60.0)
    monkeypatch.setenv("LACER_CACHE", str(tmp_path))
    first = road.build()
    stamp = first.stat().st_mtime_ns
    assert road.build() == first
    assert first.stat().st_mtime_ns == stamp
    assert [p.name for p in first.parent.iterdir()] == [first.name], "nothing left behind"
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LACER_CACHE", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (tmp_path / "xdg") in road.build().parents


def test_missing_sumo_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make()
    monkeypatch.setitem(sys.modules, "sumo", None)
    with pytest.raises(LacerError, match="pip install eclipse-sumo libsumo"):
        env.reset(seed=1)


def test_one_per_process_is_announced() -> None:
    assert MixedTrafficEnv.metadata["one_per_process"] is True
    assert gym.spec("lacer/MixedTraffic-v0").entry_point == "lacer.envs.traffic.mixed:MixedTrafficEnv"


@pytest.mark.parametrize("warm_up", [0.0, 6.0, 10.0, 30.0])
def test_the_warm_up_is_as_long_as_it_says(warm_up: float) -> None:
    env = MixedTrafficEnv("sources", warm_up=warm_up)
    env.reset(seed=0)
    assert env._sim is not None
    assert env._sim.now == warm_up
    env.close()
