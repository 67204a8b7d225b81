"""Registration, task cards and sources: what does not fit is refused with the fix."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import helper_envs
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from lacer.envs import (
    MODALITIES,
    LacerError,
    Objective,
    SourceSpec,
    TaskCard,
    UnknownNameError,
    did_you_mean,
    list_envs,
    make,
    register_env,
    task_card,
)

BOX = spaces.Box(-1, 1, (3,), np.float32)
SPACES: dict[str, gym.Space] = {
    "vector": BOX, "series": spaces.Box(-1, 1, (4, 2), np.float32), "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "text": spaces.Text(10), "set": spaces.Box(-1, 1, (4, 2), np.float32),
}
SHIPPED = [e for e in list_envs() if e.startswith("lacer/")]


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_environments_have_sound_cards(env_id: str) -> None:
    assert list_envs()[env_id]
    card = task_card(env_id)
    assert card.env_id == env_id
    assert len(card.description.split()) > 10
    assert card.objective.metric
    for name, source in card.sources.items():
        assert source.name == name
        assert source.description.endswith(".")
        assert source.modality in MODALITIES
    assert card.noop is None or card.action_space.contains(card.noop)
    assert set(card.observation_space) == set(card.sources)
    env = make(env_id)
    assert env.observation_space == card.observation_space
    assert env.action_space == card.action_space
    env.close()


def test_list_is_sorted_and_holds_what_ships() -> None:
    assert list(list_envs()) == sorted(list_envs())
    assert {"lacer/KnownSources-v0", "lacer/MixedTraffic-v0"} <= set(list_envs())


@pytest.mark.parametrize(("wrong", "right"), [
    ("lacer/KnownSource-v0", "lacer/KnownSources-v0"), ("KnownSources", "lacer/KnownSources-v0"),
    ("lacer/MixedTrafic-v0", "lacer/MixedTraffic-v0"), ("mixedtraffic-v0", "lacer/MixedTraffic-v0"),
    ("lacer/MixedTraffic-v1", "lacer/MixedTraffic-v0"),
])
def test_unknown_environment(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNameError) as e:
        make(wrong)
    message = str(e.value)
    assert f"unknown environment {wrong!r}; did you mean {right!r}? Known: " in message
    assert isinstance(e.value, LacerError)
    assert isinstance(e.value, KeyError)


def test_did_you_mean() -> None:
    assert did_you_mean("gru", []) == "."
    assert did_you_mean("zzz", ["gru", "mlp"]) == "."
    assert did_you_mean("grru", ["gru", "mlp"]) == "; did you mean 'gru'?"
    assert str(UnknownNameError("thing", "x", [])) == "unknown thing 'x'. Known: none."
    assert str(UnknownNameError("thing", "x", ["b", "a"])) == "unknown thing 'x'. Known: a, b."


def test_module_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_plugin_of_mine.py").write_text(
        "from lacer.envs import register_env\n"
        "register_env('plugin/Small-v0', 'helper_envs:Tiny', 'A small one.', horizon=9)\n"
        "register_env('plugin/Gone-v0', 'helper_envs:Gone', 'Its class is missing.')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownNameError):
        make("plugin/Small-v0")
    env = make("a_plugin_of_mine:plugin/Small-v0")
    assert isinstance(env.unwrapped, helper_envs.Tiny)
    assert env.unwrapped.horizon == 9
    assert make("plugin/Small-v0", horizon=2).unwrapped.horizon == 2  # type: ignore[attr-defined]
    assert list_envs()["plugin/Small-v0"] == "A small one."
    with pytest.raises(UnknownNameError, match="did you mean 'plugin/Small-v0'"):
        make("a_plugin_of_mine:plugin/Smal-v0")
    with pytest.raises(LacerError, match="cannot load 'helper_envs:Gone', the class of plugin/Gone-v0"):
        make("plugin/Gone-v0")


@pytest.mark.parametrize("env_id", ["no_such_module:a/B-v0", "no.such.module:a/B-v0", ":a/B-v0", "..up:a/B-v0"])
def test_missing_module(env_id: str) -> None:
    with pytest.raises(LacerError, match=r"cannot import .* named in the environment id") as e:
        make(env_id)
    assert env_id in str(e.value)


@pytest.mark.parametrize("env_id", ["", "a:", "with space", "lacer/", "../x"])
def test_odd_ids_are_unknown(env_id: str) -> None:
    with pytest.raises(LacerError):
        make(env_id)


def test_wrong_arguments() -> None:
    with pytest.raises(LacerError, match=r"helper/Tiny-v0 does not take these arguments: .*'speed'"):
        make("helper/Tiny-v0", speed=3)


def test_helper_environment_is_a_sound_one() -> None:
    """What the other tests rest on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*infinity.*|.*unwrapped.*")
        check_env(make("helper/Tiny-v0").unwrapped, skip_render_check=True)


def test_registering_again_replaces() -> None:
    register_env("helper/Again-v0", "helper_envs:Tiny", "one")
    with pytest.warns(UserWarning, match="Overriding environment helper/Again-v0"):
        register_env("helper/Again-v0", "helper_envs:Tiny", "two")
    assert list_envs()["helper/Again-v0"] == "two"


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("space", list(SPACES), ids=lambda s: f"space of {s}")
def test_a_space_must_fit_its_modality(modality: Any, space: str) -> None:
    twins = {modality, space} <= {"series", "set"}
    if modality == space or twins:
        source = SourceSpec("s", modality, SPACES[space], "It says something.")
        assert source.shape == (() if modality == "text" else SPACES[space].shape)
    else:
        with pytest.raises(LacerError, match=f"source 's' is declared {modality}, which needs a"):
            SourceSpec("s", modality, SPACES[space], "It says something.")


@pytest.mark.parametrize(("modality", "space"), [
    ("image", spaces.Box(0, 1, (8, 8, 3), np.float32)), ("image", spaces.Box(0, 255, (8, 8), np.uint8)),
    ("vector", spaces.Box(-1, 1, (), np.float32)), ("vector", spaces.Discrete(3)),
    ("set", spaces.Box(-1, 1, (4, 1), np.float32)), ("text", spaces.MultiBinary(3)),
    ("series", spaces.Dict({"a": BOX})),
])
def test_spaces_that_fit_nothing(modality: Any, space: gym.Space) -> None:
    with pytest.raises(LacerError, match=f"is declared {modality}, which needs"):
        SourceSpec("s", modality, space, "It says something.")


def test_unknown_modality() -> None:
    with pytest.raises(LacerError, match=r"source 's': unknown modality 'sound'; use one of .*'vector'"):
        SourceSpec("s", "sound", BOX, "It says something.")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a.b", "fusion", "fused"])
def test_names_that_cannot_be_used(name: str) -> None:
    with pytest.raises(LacerError, match="a source cannot be called"):
        SourceSpec(name, "vector", BOX, "It says something.")


def test_task_card_is_checked() -> None:
    source = SourceSpec("s", "vector", BOX, "It says something.")
    with pytest.raises(LacerError, match="a task needs at least one source"):
        TaskCard("x", {}, BOX, Objective("m"), "A task.")
    with pytest.raises(LacerError, match="source 's' stands under the key 't'"):
        TaskCard("x", {"t": source}, BOX, Objective("m"), "A task.")


def test_objective() -> None:
    up, down = Objective("m"), Objective("m", "s", "minimize")
    assert (up.better(2, 1), up.better(1, 2), up.better(1, 1)) == (True, False, False)
    assert (down.better(2, 1), down.better(1, 2), down.better(1, 1)) == (False, True, False)
    assert (up.signed(3), down.signed(3)) == (3, -3)
    assert not up.better(float("nan"), 1)
    assert not down.better(float("nan"), 1)
