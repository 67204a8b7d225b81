"""Any Gymnasium environment as a multi-source one: what is inferred, what can be declared, history, camera."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import lacer.envs.described
from lacer.envs import LacerError, Objective, SourceSpec, UnknownNameError, describe, make, register_env, task_card
from lacer.envs.described import shrink
from lacer.envs.inference import infer

BYTES = {"low": 0, "high": 255, "dtype": np.uint8}


class Plays(gym.Env):
    """Shows samples of a space; five steps; pays 1."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, space: gym.Space | None = None, action: gym.Space | None = None,
                 render_mode: str | None = None) -> None:
        self.observation_space = space or spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = action or spaces.Discrete(2)
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        self.raw = self.observation_space.sample()
        return self.raw, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        self.raw = self.observation_space.sample()
        return self.raw, 1.0, self.t == 5, False, {"is_success": self.t == 5, "speed": 2.0 * self.t}

    def render(self) -> np.ndarray:
        picture = np.zeros((40, 80, 3), np.uint8)
        picture[:20, :40] = 200
        return picture


def sources(env: gym.Env) -> dict[str, Any]:
    return dict(env.get_wrapper_attr("task_card").sources)


@pytest.mark.parametrize(("space", "modality", "shape", "doubt"), [
    (spaces.Box(-1, 1, (3,), np.float64), "vector", (3,), ""),
    (spaces.Box(-1, 1, (), np.float32), "vector", (1,), ""),
    (spaces.Box(-1, 1, (3, 1)), "vector", (3,), ""),
    (spaces.Box(0, 9, (4,), np.int64), "vector", (4,), ""),
    (spaces.Box(-1, 1, (6, 2)), "series", (6, 2), "declare it 'set'"),
    (spaces.Box(shape=(84, 84, 3), **BYTES), "image", (84, 84, 3), ""),
    (spaces.Box(shape=(3, 84, 84), **BYTES), "image", (84, 84, 3), "channels first"),
    (spaces.Box(shape=(84, 84), **BYTES), "image", (84, 84, 1), "one channel"),
    (spaces.Box(shape=(4, 84, 84, 3), **BYTES), "image", (84, 84, 12), "frames stacked"),
    (spaces.Box(shape=(4, 3, 84, 84), **BYTES), "image", (84, 84, 12), "frames stacked"),
    (spaces.Box(shape=(128,), **BYTES), "vector", (128,), ""),
    (spaces.Box(0, 1, (5, 8, 8)), "vector", (320,), "declare it 'image'"),
    (spaces.Discrete(4), "vector", (4,), ""),
    (spaces.Discrete(4, start=3), "vector", (4,), ""),
    (spaces.MultiDiscrete([3, 2]), "vector", (5,), ""),
    (spaces.MultiBinary(6), "vector", (6,), ""),
    (spaces.Text(12), "text", (), ""),
])
def test_one_space(space: gym.Space, modality: str, shape: tuple[int, ...], doubt: str) -> None:
    env = describe(Plays(space), quiet=True)
    source = sources(env)["observation"]
    assert (source.modality, source.shape) == (modality, shape)
    if modality == "image":
        assert source.space.dtype == np.uint8
    elif modality != "text":
        assert source.space.dtype == np.float32
    notes = env.inferred  # type: ignore[attr-defined]
    assert (doubt in notes[0]) if doubt else not notes
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        assert env.observation_space.contains(obs)
        obs, *_ = env.step(0)


def test_values_arrive_where_they_belong() -> None:
    frames = spaces.Box(shape=(2, 9, 8, 3), **BYTES)
    for space, want in (
        (spaces.Box(shape=(3, 9, 8), **BYTES), lambda x: np.moveaxis(x, 0, 2)),
        (frames, lambda x: np.concatenate(list(x), -1)),
        (spaces.Discrete(4, start=3), lambda x: np.eye(4)[x - 3]),
        (spaces.MultiDiscrete([3, 2]), lambda x: np.concatenate([np.eye(3)[x[0]], np.eye(2)[x[1]]])),
        (spaces.Text(5), lambda x: x),
        (spaces.Box(-1, 1, (2, 3), np.float64), lambda x: x.astype(np.float32)),
    ):
        env = describe(Plays(space), quiet=True)
        obs, _ = env.reset(seed=3)
        np.testing.assert_array_equal(obs["observation"], want(env.unwrapped.raw))  # type: ignore[attr-defined]


def test_dict_and_tuple_are_taken_apart() -> None:
    space = spaces.Dict({
        "robot": spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "hand.left": spaces.Box(-1, 1, (1,))}),
        "pair": spaces.Tuple([spaces.Discrete(2), spaces.Text(4)])})
    env = describe(Plays(space), quiet=True)
    assert {n: s.modality for n, s in sources(env).items()} == {
        "pair_0": "vector", "pair_1": "text", "robot_arm": "vector", "robot_hand_left": "vector"}
    obs, _ = env.reset(seed=1)
    raw = env.unwrapped.raw  # type: ignore[attr-defined]
    np.testing.assert_array_equal(obs["robot_arm"], raw["robot"]["arm"])
    np.testing.assert_array_equal(obs["robot_hand_left"], raw["robot"]["hand.left"])
    np.testing.assert_array_equal(obs["pair_0"], np.eye(2)[raw["pair"][0]])
    assert obs["pair_1"] == raw["pair"][1]
    top = describe(Plays(spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, (2,))])), quiet=True)
    obs, _ = top.reset(seed=1)
    assert list(obs) == ["part_0", "part_1"]
    np.testing.assert_array_equal(obs["part_1"], top.unwrapped.raw[1])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("said", "modality", "shape"), [
    ("set", "set", (6, 2)), ("vector", "vector", (12,)), ({"modality": "set", "mask": False}, "set", (6, 3)),
    ({"modality": "image", "low": -1, "high": 1}, "image", (6, 2, 1)),
])
def test_what_is_declared_wins(said: Any, modality: str, shape: tuple[int, ...]) -> None:
    env = describe(Plays(spaces.Box(-1, 1, (6, 2))), sources={"observation": said}, quiet=True)
    source = sources(env)["observation"]
    assert (source.modality, source.shape) == (modality, shape)
    assert not env.inferred, "nothing is in doubt then"  # type: ignore[attr-defined]
    obs, _ = env.reset(seed=2)
    x, raw = obs["observation"], env.unwrapped.raw  # type: ignore[attr-defined]
    assert env.observation_space.contains(obs)
    if shape == (6, 3):
        assert (x[:, 0] == 1).all()
        np.testing.assert_array_equal(x[:, 1:], raw)
    elif modality == "image":
        np.testing.assert_allclose(x[..., 0] / 127.5 - 1, raw, atol=0.01)
    else:
        np.testing.assert_array_equal(x.ravel(), raw.ravel())


def test_sources_can_be_left_out_and_described() -> None:
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Graph(spaces.Box(0, 1, (1,)), None)})
    with pytest.raises(LacerError, match=r"Plays: the entry 'b' of the observation space, Graph.*leave it out with"):
        describe(Plays(space))
    env = describe(Plays(space), sources={"b": None, "a": {"description": "Two joints."}}, quiet=True, noop=0,
                   description="Stand up.", objective={"metric": "speed", "unit": "m/s", "direction": "minimize"})
    card = env.get_wrapper_attr("task_card")
    assert list(card.sources) == ["a"]
    assert card.sources["a"].description == "Two joints."
    assert card.description == "Stand up."
    assert card.objective == Objective("speed", "m/s", "minimize")
    assert card.noop == 0
    text = str(card)
    for part in ("Plays", "Stand up.", "a  vector  (2,) float32  Two joints.", "Discrete(2); do nothing: 0",
                 "minimize speed (m/s)"):
        assert part in text


def test_metrics_at_the_end() -> None:
    for objective, value in (("return", 5.0), ("length", 5.0), ("is_success", 1.0), ("speed", 10.0)):
        env = describe(Plays(), objective=objective, quiet=True)
        for _ in range(2):
            env.reset(seed=0)
            for _ in range(5):
                *_, info = env.step(0)
            assert info["metrics"][objective] == value
            assert info["metrics"]["return"] == 5


def test_info_of_others_is_kept_apart() -> None:
    """Other people's `state` and `metrics` need not be what ours are; arrays may be used again."""
    class Odd(Plays):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            self.buffer = getattr(self, "buffer", np.zeros(3, np.float32))
            self.buffer += 0.1
            _, reward, done, truncated, info = super().step(action)
            return self.buffer, reward, done, truncated, {**info, "state": np.zeros(4), "metrics": [1, 2], "lap": 3}

    env = describe(Odd(), history={"observation": 2}, quiet=True)
    env.reset(seed=0)
    for i in range(5):
        obs, *_, info = env.step(0)
        assert "state" not in info
        assert info["lap"] == 3
        assert ("metrics" in info) == (i == 4)
    assert info["metrics"] == {"return": 5.0, "length": 5.0}
    np.testing.assert_allclose(obs["observation_history"], np.full((2, 3), [[0.4], [0.5]]), rtol=1e-6)


def test_history_of_every_modality() -> None:
    space = spaces.Dict({
        "joints": spaces.Box(-1, 1, (2,)), "past": spaces.Box(-1, 1, (3, 2)), "words": spaces.Text(4),
        "eye": spaces.Box(shape=(8, 8, 3), **BYTES), "crowd": spaces.Box(0, 1, (4, 2))})
    names = list(space)
    env = describe(Plays(space), sources={"crowd": "set", "past": "series"}, history=dict.fromkeys(names, 3),
                   quiet=True)
    want = {"joints": ("series", (3, 2)), "past": ("series", (9, 2)), "words": ("text", ()),
            "eye": ("image", (8, 8, 9)), "crowd": ("set", (12, 3))}
    got = {n: (s.modality, s.shape) for n, s in sources(env).items()}
    for name in names:
        assert got[f"{name}_history"] == want[name]
    for _ in range(2):  # the second episode starts afresh
        obs, _ = env.reset(seed=4)
        seen = [obs] * 3
        for _ in range(5):
            assert env.observation_space.contains(obs), obs
            past = seen[-3:]
            np.testing.assert_array_equal(obs["joints_history"], [o["joints"] for o in past])
            np.testing.assert_array_equal(obs["past_history"], np.concatenate([o["past"] for o in past]))
            np.testing.assert_array_equal(obs["eye_history"][..., 6:], obs["eye"])
            np.testing.assert_array_equal(obs["eye_history"][..., :3], past[0]["eye"])
            assert obs["words_history"] == "\n".join(o["words"] for o in past)
            np.testing.assert_array_equal(obs["crowd_history"][8:, :2], obs["crowd"])
            assert obs["crowd_history"][:, 2].tolist() == [1.0] * 4 + [0.5] * 4 + [0.0] * 4
            obs, *_ = env.step(0)
            seen.append(obs)


def test_history_of_an_environment_with_a_card() -> None:
    options = {"history": {"position": 4}, "sources": {"noise": None, "trend": {"description": "A slope."}}}
    env = make("lacer/KnownSources-v0", describe=options)
    plain = task_card("lacer/KnownSources-v0")
    card = env.get_wrapper_attr("task_card")
    assert list(card.sources) == ["position", "trend", "picture", "words", "position_history"]
    assert card.sources["trend"].description == "A slope."
    assert (card.objective, card.state_names, card.env_id) == (plain.objective, plain.state_names, plain.env_id)
    np.testing.assert_array_equal(card.noop, plain.noop)
    env.reset(seed=0)
    for _ in range(16):
        obs, *_, info = env.step(card.noop)
    assert obs["position_history"].shape == (4, 4)
    assert {"score", "return", "length"} == set(info["metrics"])
    assert set(info["state"]) == set(card.state_names)


def test_camera() -> None:
    env = describe(Plays(render_mode="rgb_array"), camera=20, quiet=True)
    picture = env.reset(seed=0)[0]["camera"]
    assert picture.shape == (20, 20, 3)
    assert picture[:10, :10].min() == picture[:10, :10].max() == 200
    assert picture[10:].max() == 0
    rng = np.random.default_rng(0)
    big = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    np.testing.assert_allclose(shrink(big, 10), big.reshape(10, 3, 10, 5, 3).mean((1, 3)), atol=0.51)
    assert shrink(big[:, :30], 30) is not None
    odd = shrink(big, 13)
    assert abs(odd.mean() - big.mean()) < 1
    cart = make("CartPole-v1", describe={"camera": 32})
    assert cart.observation_space["camera"].shape == (32, 32, 3)  # type: ignore[index]
    assert cart.reset(seed=0)[0]["camera"].std() > 0
    cart.close()


@pytest.mark.parametrize(("kwargs", "says"), [
    ({"sources": {"observatoin": "set"}}, "did you mean 'observation'"),
    ({"sources": {"observation": "vectro"}}, "did you mean 'vector'"),
    ({"sources": {"observation": {"modalty": "vector"}}}, "did you mean 'modality'"),
    ({"sources": {"observation": "text"}}, "declared text"), ({"sources": {"observation": 3}}, "expected a modality"),
    ({"sources": {"observation": "set"}}, "which needs"), ({"sources": {"observation": None}}, "at least one source"),
    ({"sources": {"observation": "image"}}, "declared image"), ({"sources": ["observation"]}, "must map names"),
    ({"history": {"observatoin": 4}}, "did you mean 'observation'"), ({"history": {"observation": 1}}, "at least 2"),
    ({"history": {"observation": 2.5}}, "at least 2"), ({"camera": 64}, 'render_mode="rgb_array"'),
    ({"camera": 3}, "from 8 to 1024"), ({"noop": 7}, "is no action of"), ({"noop": [0, 1]}, "is no action of"),
    ({"noop": "left"}, "is no action of"), ({"history": ["observation"]}, "history must map"),
    ({"objective": {"metrics": "x"}}, "objective needs metric"),
    ({"objective": {"metric": "x", "direction": "maximise"}}, "did you mean 'maximize'"),
])
def test_wrong_declarations(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(LacerError) as e:
        describe(Plays(), **kwargs)
    assert says in str(e.value)


@pytest.mark.parametrize(("space", "says"), [
    (spaces.Discrete(20_000), "would become a vector of 20000 numbers"),
    (spaces.Sequence(spaces.Discrete(2)), "cannot be a source"),
    (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)}), "a_b": spaces.Discrete(2)}), "the same name"),
])
def test_spaces_that_cannot_be_sources(space: gym.Space, says: str) -> None:
    with pytest.raises(LacerError, match=says):
        describe(Plays(space))


@pytest.mark.parametrize(("action", "says"), [
    (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]), "PPO acts in a Box"),
    (spaces.Box(-np.inf, np.inf, (1,)), "must be finite"), (spaces.Discrete(2, start=1), "count from 0"),
])
def test_actions_that_ppo_cannot_take(action: gym.Space, says: str) -> None:
    with pytest.raises(LacerError, match=says):
        describe(Plays(action=action))


def test_what_was_inferred_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lacer.envs.described, "_told", set())
    with caplog.at_level(logging.WARNING, "lacer.envs"):
        for _ in range(2):
            describe(Plays(spaces.Box(-1, 1, (6, 2))))
        describe(Plays(spaces.Box(-1, 1, (2,))), quiet=True)
    [record] = caplog.records
    for part in ("Plays: sources taken from", "observation  series  (6, 2) float32", "check observation: rows taken as",
                 'sources={"name": "set"}', "--env-kwargs"):
        assert part in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lacer.envs"):
        make("lacer/KnownSources-v0", describe={"history": {"position": 2}})
    assert not caplog.records, "a declared environment needs no such word"


def test_any_gymnasium_environment_in_three_lines() -> None:
    env = describe(gym.make("CartPole-v1"), history={"observation": 8})
    obs, _ = env.reset(seed=0)
    assert obs["observation_history"].shape == (8, 4)
    by_id = describe("CartPole-v1", history={"observation": 8})
    again, _ = by_id.reset(seed=0)
    np.testing.assert_array_equal(obs["observation_history"], again["observation_history"])


def test_gymnasium_makes_what_was_registered_with_sources() -> None:
    register_env("described/Cart-v0", "gymnasium.envs.classic_control:CartPoleEnv", history={"observation": 4},
                 sources={"observation": {"description": "Cart and pole."}}, objective="length", max_episode_steps=12)
    for env in (gym.make("described/Cart-v0"), make("described/Cart-v0"),
                gym.make(pickle.loads(pickle.dumps(gym.spec("described/Cart-v0"))))):
        card = env.get_wrapper_attr("task_card")
        assert card.env_id == "described/Cart-v0"
        assert set(env.observation_space) == {"observation", "observation_history"}  # type: ignore[call-overload]
        assert card.objective.metric == "length"
        env.reset(seed=0)
        for i in range(12):
            *_, terminated, truncated, info = env.step(i % 2)
            if terminated or truncated:
                break
        assert info["metrics"]["length"] == i + 1
    more = make("described/Cart-v0", describe={"history": {"observation_history": 2}})
    assert more.observation_space["observation_history_history"].shape == (8, 4)  # type: ignore[index]
    with pytest.raises(UnknownNameError, match="did you mean 'vector'"):
        register_env("described/Wrong-v0", "x:Y", sources={"a": "vektor"})


def test_an_unknown_option_of_describe() -> None:
    with pytest.raises(LacerError, match="did you mean 'history'"):
        make("CartPole-v1", describe={"histroy": {"observation": 2}})


def test_infer_alone() -> None:
    [part] = infer(spaces.Box(-1, 1, (2,)))
    np.testing.assert_array_equal(part.read(np.array([0.5, 1.0])), np.float32([0.5, 1.0]))


def test_a_source_without_numbers() -> None:
    with pytest.raises(LacerError, match="source 'x' holds nothing"):
        SourceSpec("x", "vector", spaces.Box(0, 1, (0,)), "")


def test_describe_is_not_a_mapping() -> None:
    with pytest.raises(LacerError, match="describe must hold options by name"):
        make("CartPole-v1", describe=3)  # type: ignore[arg-type]
