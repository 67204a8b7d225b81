"""MiniGrid, BabyAI, highway-env and MuJoCo: their own observation types as sources."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from lacer.encoders import EncoderSpec, TextTable, build
from lacer.envs import LacerError, UnknownNameError, describe, make, task_card
from lacer.envs.testing import EnvConformance
from lacer.search.space import load_space


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where an extra is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def play(env: gym.Env, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Observations of random steps; every one lies in its space."""
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    out = [obs]
    for _ in range(steps):
        assert env.observation_space.contains(obs), obs
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        out.append(obs)
        if terminated or truncated:
            obs, _ = env.reset()
    return out


# ------------------------------------------------------------------------------------------------------- MiniGrid

@needs("minigrid")
class TestMiniGrid(EnvConformance):
    env_id = "MiniGrid-GoToDoor-5x5-v0"
    start_methods = ("fork",)


@needs("minigrid")
class TestBabyAI(EnvConformance):
    env_id = "BabyAI-GoToObj-v0"
    start_methods = ("fork",)


@needs("minigrid")
def test_minigrid_sources() -> None:
    env = make("MiniGrid-DoorKey-5x5-v0")
    card = env.get_wrapper_attr("task_card")
    assert {n: (s.modality, s.shape) for n, s in card.sources.items()} == {
        "image": ("image", (7, 7, 3)), "direction": ("vector", (4,)), "mission": ("text", ())}
    seen = play(env, 100)
    colours = {int(v) for o in seen for v in o["image"][..., 1].ravel()}
    assert len(colours) > 1
    assert colours <= {0, 51, 102, 153, 204, 255}
    assert {o["mission"] for o in seen} == {"use the key to open the door and then get to the goal"}
    assert {o["direction"].sum() for o in seen} == {1.0}
    obs, info = env.reset(seed=1)
    raw = env.unwrapped.gen_obs()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(obs["image"], raw["image"] * np.uint8([25, 51, 85]))
    assert obs["direction"].argmax() == raw["direction"]
    x, y = env.unwrapped.agent_pos  # type: ignore[attr-defined]
    assert info["state"] == {"agent_x": x, "agent_y": y, "carrying": 0.0}


@needs("minigrid")
def test_minigrid_success_is_a_metric() -> None:
    env = make("MiniGrid-Empty-5x5-v0")
    env.reset(seed=0)
    for action in (2, 2, 1, 2, 2):
        *_, reward, terminated, _, info = env.step(action)
    assert terminated
    assert reward > 0.9
    assert info["metrics"] == {"return": pytest.approx(reward), "length": 5.0, "success": 1.0}
    env.reset(seed=0)
    for _ in range(100):
        *_, truncated, info = env.step(0)
    assert truncated
    assert info["metrics"]["success"] == 0.0


@needs("minigrid")
def test_every_minigrid_id_can_be_described() -> None:
    import minigrid

    gym.register_envs(minigrid)
    ids = [i for i in gym.registry if i.startswith(("MiniGrid-", "BabyAI-")) and "WFC" not in i]  # WFC needs networkx
    assert len(ids) > 150
    for env_id in ids[::7]:
        assert set(task_card(env_id).sources) == {"image", "direction", "mission"}, env_id


@needs("minigrid")
def test_the_preset_space_fits_minigrid() -> None:
    """The space of the paper's appendix gives encoders that can be built."""
    card = task_card("MiniGrid-GoToDoor-5x5-v0")
    space = load_space("minigrid", card)
    rng = np.random.default_rng(0)
    deepest = 0
    for _ in range(12):
        spec = space.to_spec(space.sample(rng))
        assert (spec.sources["image"].block, spec.sources["mission"].block) == ("stages", "token_gru")
        deepest = max(deepest, spec.sources["image"].depth)  # type: ignore[attr-defined]
        build(spec, card, TextTable("hash"))
    assert deepest == 5
    assert space.expert is not None
    build(EncoderSpec.parse(space.expert.to_dict(), card), card, TextTable("hash"))


@needs("minigrid")
def test_minigrid_behind_a_wrapper_of_pixels() -> None:
    from minigrid.wrappers import RGBImgPartialObsWrapper

    env = describe(RGBImgPartialObsWrapper(gym.make("MiniGrid-Empty-5x5-v0")), quiet=True)
    obs, _ = env.reset(seed=0)
    assert obs["image"].shape == (56, 56, 3)
    np.testing.assert_array_equal(obs["image"], env.env.observation(env.unwrapped.gen_obs())["image"])  # type: ignore


@needs("minigrid")
@pytest.mark.parametrize(("env_id", "says"), [
    ("MiniGrid-Empty-5x5-v1", "did you mean 'MiniGrid-Empty-5x5-v0'"), ("BabyAI-GoToBall-v0", "did you mean 'BabyAI-")])
def test_unknown_minigrid(env_id: str, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        make(env_id)
    with pytest.raises(UnknownNameError, match="did you mean 'mission'"):
        make("MiniGrid-Empty-5x5-v0", describe={"sources": {"missoin": None}})


# ---------------------------------------------------------------------------------------------------- highway-env

@needs("highway_env")
class TestHighway(EnvConformance):
    env_id = "highway-fast-v0"
    kwargs: ClassVar[dict[str, Any]] = {"config": {"duration": 4, "vehicles_count": 6}}
    start_methods = ("fork",)


@needs("highway_env")
def test_highway_sources() -> None:
    small = {"duration": 4, "vehicles_count": 6}
    env = make("highway-fast-v0", config=small)
    card = env.get_wrapper_attr("task_card")
    assert {n: (s.modality, s.shape) for n, s in card.sources.items()} == {
        "ego": ("vector", (5,)), "vehicles": ("set", (4, 5)), "grid": ("image", (11, 11, 4)),
        "view": ("image", (64, 128, 4))}
    assert card.noop == 1
    obs, info = env.reset(seed=0)
    kinematics, grid, view = env.unwrapped.observation_type.observation_types  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.vstack([obs["ego"], obs["vehicles"]]), kinematics.observe())
    np.testing.assert_allclose(obs["grid"].transpose(2, 0, 1) / 127.5 - 1, grid.observe(), atol=0.005)
    np.testing.assert_array_equal(obs["view"][..., -1].T, view.obs[-1])
    assert obs["view"][..., -1].std() > 0, "the road is drawn"
    assert info["state"]["speed"] == env.unwrapped.vehicle.speed  # type: ignore[attr-defined]
    *_, info = env.step(1)
    *_, info = env.step(3)
    assert info["state"]["speed"] > 20
    env.close()
    env = make("highway-fast-v0", observations=["LidarObservation", "TimeToCollision"], config=small)
    assert {n: (s.modality, s.shape) for n, s in env.get_wrapper_attr("task_card").sources.items()} == {
        "lidar": ("series", (32, 2)), "collisions": ("vector", (90,))}
    play(env, 3)
    env.close()
    own = {"type": "Kinematics", "vehicles_count": 3, "features": ["x", "vx"]}
    card = task_card("highway-fast-v0", config={"observation": own})
    assert {n: (s.modality, s.shape) for n, s in card.sources.items()} == {"observation": ("series", (3, 2))}
    camera = task_card("highway-fast-v0", describe={"camera": 48})
    assert list(camera.sources) == ["ego", "vehicles", "grid", "camera"]


@needs("highway_env")
def test_highway_without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    for kwargs in ({}, {"describe": {"camera": 32}}):
        with pytest.raises(LacerError, match="black pictures with SDL_VIDEODRIVER=dummy"):
            make("highway-fast-v0", **kwargs)
    assert set(task_card("highway-fast-v0", observations=["Kinematics"]).sources) == {"ego", "vehicles"}


@needs("highway_env")
@pytest.mark.parametrize(("env_id", "sources"), [
    ("merge-v1", {"ego", "vehicles", "grid", "view"}),
    ("racetrack-v1", {"ego", "vehicles", "grid", "view"}), ("exit-v1", {"ego", "vehicles", "grid", "view"}),
    ("parking-v0", {"achieved_goal", "desired_goal", "observation"}),
    ("lane-keeping-v0", {"derivative", "reference_state", "state"}),
])
def test_other_highway_environments(env_id: str, sources: set[str]) -> None:
    env = make(env_id)
    assert set(env.get_wrapper_attr("task_card").sources) == sources
    play(env, 2)
    env.close()


@needs("highway_env")
@pytest.mark.parametrize(("env_id", "kwargs", "says"), [
    ("highway-fast-v0", {"observations": ["Kinematic"]}, "did you mean 'Kinematics'"),
    ("highway-fast-v0", {"observations": "Kinematics"}, "must be a list"),
    ("highway-fast-v0", {"observations": []}, "must be a list"),
    ("parking-v0", {"observations": ["Kinematics"]}, "must keep its own observation"),
    ("highway-fast-v0", {"describe": {"sources": {"vehicle": None}}}, "did you mean 'vehicles'"),
    ("highway-fast-v0", {"describe": {"sources": {"vehicles": "vector"}}}, "only its description can be changed"),
    ("intersection-multi-agent-v2", {}, "PPO acts in a Box"), ("highway-slow-v0", {}, "did you mean 'highway"),
])
def test_wrong_highway(env_id: str, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(LacerError, match=says):
        make(env_id, **kwargs)


# --------------------------------------------------------------------------------------------------------- MuJoCo

@needs("mujoco")
class TestMuJoCo(EnvConformance):
    env_id = "Hopper-v5"
    start_methods = ("fork",)


@needs("mujoco")
def test_mujoco_sources() -> None:
    for env_id, want in (
        ("HalfCheetah-v5", {"position": 8, "velocity": 9}), ("Reacher-v5", {"observation": 10}),
        ("Ant-v5", {"position": 13, "velocity": 14, "contact_force": 78}),
        ("Humanoid-v5", {"position": 22, "velocity": 23, "inertia": 130, "body_velocity": 78, "actuator_force": 17,
                         "contact_force": 78}),
    ):
        env = make(env_id)
        card = env.get_wrapper_attr("task_card")
        assert {n: s.shape[0] for n, s in card.sources.items()} == want
        obs, _ = env.reset(seed=0)
        raw = env.env.reset(seed=0)[0]  # type: ignore[attr-defined]
        np.testing.assert_allclose(np.concatenate([obs[n] for n in want]), raw, rtol=1e-6)
        np.testing.assert_array_equal(card.noop, np.zeros(env.action_space.shape or ()))
    some = task_card("HalfCheetah-v5", describe={"sources": {"velocity": None}, "history": {"position": 4}})
    assert {n: s.shape for n, s in some.sources.items()} == {"position": (8,), "position_history": (4, 8)}
    with pytest.raises(UnknownNameError, match="did you mean 'velocity'"):
        make("HalfCheetah-v5", describe={"sources": {"velocities": None}})


CAMERA = """
import json, os, sys, numpy as np
from lacer.envs import LacerError, make, task_card
options = {"camera": 64}
try:
    task_card("HalfCheetah-v5", describe=options)
except LacerError as e:
    print(json.dumps({"error": str(e)}))
    sys.exit()
# A worker reads the card and forks; if the card had rendered, the child would wait for ever.
child = os.fork()
if child:
    sys.exit(os.waitpid(child, 0)[1])
env = make("HalfCheetah-v5", describe=options)
first, _ = env.reset(seed=0)
for _ in range(20):
    last, *_ = env.step(np.ones(6))
again, _ = env.reset(seed=0)
print(json.dumps({"shape": first["camera"].shape, "std": float(first["camera"].std()),
                  "moved": int((first["camera"] != last["camera"]).sum()),
                  "same": bool((first["camera"] == again["camera"]).all()), "sources": list(first)}))
sys.stdout.flush()
os._exit(0)
"""


def camera(**env: str) -> dict[str, Any]:
    """The camera in a process of its own, since the way to render is chosen once per process."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-P", "-c", CAMERA], capture_output=True, text=True, timeout=120,
                          env={**clean, **env}, check=False)
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return out


@needs("mujoco")
def test_mujoco_camera_or_a_word_on_what_is_missing() -> None:
    got = camera()
    if "error" in got:  # no EGL on this machine
        assert "apt install" in got["error"]
        assert "libegl1" in got["error"]
        return
    assert got["shape"] == [64, 64, 3]
    assert got["std"] > 5
    assert got["moved"] > 500
    assert got["same"]
    assert got["sources"] == ["position", "velocity", "camera"]


@pytest.mark.slow
@needs("mujoco")
def test_mujoco_without_a_way_to_render() -> None:
    assert "MuJoCo cannot render here" in camera(MUJOCO_GL="glfw")["error"]


# ------------------------------------------------------------------------------------------------ not installed

@pytest.mark.parametrize(("env_id", "package", "extra"), [
    ("BabyAI-GoToObj-v0", "minigrid", "minigrid"), ("HalfCheetah-v5", "mujoco", "mujoco"),
])
def test_a_missing_package_names_its_extra(env_id: str, package: str, extra: str) -> None:
    code = (f"import sys; sys.modules[{package!r}] = None\n"
            "import importlib.util as u; real = u.find_spec\n"
            f"u.find_spec = lambda n, *a: None if n == {package!r} else real(n, *a)\n"
            f"from lacer.envs import LacerError, make\n"
            f"try: make({env_id!r})\nexcept LacerError as e: print(e)")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == (f"{env_id} needs the package {package}; install it with: pip install 'lacer[{extra}]'\n"), (
        done.stderr)
