"""Videos of agents: what they depend on is found, pictures are what they should be, errors come early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image, ImageSequence

from lacer.agents import Agent, PPOConfig, Protocol, RunRequest, load, run, video
from lacer.agents.video import FRAMES, check_video, importance, main, play, save_frames, write_video
from lacer.encoders import EncoderSpec, list_blocks
from lacer.envs import LacerError, make, task_card
from lacer.search.cli import main as cli

ENV = "tests.agents.test_video:Lamp-v0"


class Lamp(gym.Env):
    """A vector that says what to do, a picture, and words; 12 steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(2)
        self.observation_space = spaces.Dict({
            "told": spaces.Box(-1, 1, (2,), np.float32), "view": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "words": spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz ")})

    def _observe(self) -> dict[str, Any]:
        return {"told": self.np_random.uniform(-1, 1, 2).astype(np.float32),
                "view": self.np_random.integers(0, 255, (16, 16, 3), np.uint8), "words": self._words}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n, self._words = 0, ("keep it on", "switch it off")[int(self.np_random.integers(2))]
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return self._observe(), float(action), False, self._n == 12, {}

    def render(self) -> np.ndarray:
        return np.full((100, 161, 3), 20 * self._n, np.uint8)


gym.register("Lamp-v0", Lamp)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    """A barely trained agent."""
    folder = tmp_path_factory.mktemp("agent")
    card = task_card(ENV)
    blocks = list_blocks()
    first = {m: next(name for modality, name in blocks if modality == m) for m in ("vector", "image", "text")}
    spec = EncoderSpec.parse({"sources": {n: {"block": first[s.modality]} for n, s in card.sources.items()},
                              "fusion": {"block": "concat"}}, card)
    result = run(RunRequest(env=ENV, encoder=spec.to_dict(), text_model="hash", save_to=str(folder),
                            protocol=Protocol(steps=16, eval_episodes=2, ppo=PPOConfig(n_envs=1, n_steps=16))))
    assert result.ok, result.reason
    return load(folder)


def test_importance_finds_the_source_that_decides(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all but one source's features cut off, that one has all the importance."""
    env = make(ENV)
    observations = [env.reset(seed=i)[0] for i in range(20)]
    encoder: Any = agent.policy.features_extractor.encoder  # type: ignore[union-attr]
    whole = encoder.encode

    def only_told(obs: Any) -> Any:
        return whole({k: v if k == "told" else v * 0 for k, v in obs.items()})

    monkeypatch.setattr(encoder, "encode", only_told)
    weight = agent.policy.action_net.weight
    torch.manual_seed(0)
    monkeypatch.setattr(weight, "data", torch.randn_like(weight))  # an untrained policy hardly reacts to anything
    found = importance(agent, observations, observations, draws=4)
    assert set(found) == set(agent.spec.sources)
    assert found["told"].shape == (20,)
    assert found["told"].mean() > 1e-4
    assert found["view"].max() == found["words"].max() == pytest.approx(0, abs=1e-9)


def test_a_gif_and_an_mp4(agent: Agent, tmp_path: Path) -> None:
    episode = play(agent, seed=3)
    assert len(episode.pictures) == len(episode.rewards) == 12
    assert episode.metrics["return"] == sum(episode.rewards)
    assert all(v.shape == (12,) and (v >= 0).all() for v in episode.importance.values())
    again = play(agent, seed=3)
    assert all((again.importance[k] == v).all() for k, v in episode.importance.items())
    gif = tmp_path / "deep" / "out.gif"
    write_video(gif, agent, episode)
    with Image.open(gif) as picture:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(picture)]
    assert len(frames) == 12
    assert all(f.shape == frames[0].shape for f in frames)
    assert frames[0].shape[1] == 644, "four times as large, to hold the text"
    assert frames[0][50, 322].max() < 20 < frames[11][50, 322].min(), "the environment's picture changes"
    assert (frames[0][420:] != frames[11][420:]).any(), "and what is below it"
    mp4 = tmp_path / "out.mp4"
    write_video(mp4, agent, episode)
    import imageio_ffmpeg

    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(mp4))
    assert count == 12
    assert seconds == pytest.approx(3, abs=0.3)
    saved = save_frames(tmp_path / "frames", agent, episode)
    assert list(saved) == ["view"]
    assert len(saved["view"]) == FRAMES
    with Image.open(saved["view"][0]) as picture:
        assert (np.asarray(picture)[::16, ::16] == episode.observations[0]["view"]).all()


def test_what_gives_no_video(agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LacerError, match=r"ends in \.gif or \.mp4"):
        check_video(tmp_path / "out.avi")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(LacerError, match=r'pip install "lacer\[video\]"; or write a \.gif'):
        check_video(tmp_path / "out.mp4")
    check_video(tmp_path / "out.gif")
    monkeypatch.setattr(Lamp, "metadata", {"render_modes": []})
    with pytest.raises(LacerError, match="Lamp-v0 cannot be rendered"):
        play(agent, seed=0)


def test_on_the_command_line(agent: Agent, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacer.agents.load", lambda folder, env_kwargs=None: agent, raising=False)
    gif = tmp_path / "v.gif"
    cli(["evaluate", "any", "--episodes", "2", "--seed", "5", "--video", str(gif), "--json"])
    out = json.loads(capsys.readouterr().out)
    assert out["video"] == str(gif)
    assert set(out["importance"]) == set(agent.spec.sources)
    with Image.open(gif) as picture:
        assert picture.n_frames == 12  # type: ignore[attr-defined]
    monkeypatch.setattr(Lamp, "metadata", {"render_modes": []})
    with pytest.raises(SystemExit):
        cli(["evaluate", "any", "--video", str(gif)])
    assert "it has no render mode rgb_array" in capsys.readouterr().err


def test_in_a_process_of_its_own(agent: Agent, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "load", lambda folder: agent)
    main(json.dumps({"agent": "a", "video": str(tmp_path / "v.gif"), "frames": str(tmp_path / "f"), "seed": 0}))
    frames = json.loads(capsys.readouterr().out)["frames"]
    assert (tmp_path / "v.gif").stat().st_size > 1000
    assert all(Path(p).is_file() for p in frames["view"])
    done = subprocess.run([sys.executable, "-m", "lacer.agents.video", json.dumps({"agent": str(tmp_path), "video": "v",
                                                                                   "frames": "f", "seed": 0})],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is no agent" in done.stderr
