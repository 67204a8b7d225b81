"""The mixed traffic environment when things go wrong, when it runs for long, and where others look at it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import lacer.envs
from lacer.envs import LacerError
from lacer.envs.traffic.mixed import MixedTrafficEnv
from lacer.envs.traffic.simulation import remote_command


def make(**kwargs: object) -> MixedTrafficEnv:
    env = lacer.envs.make("lacer/MixedTraffic-v0", scene="sources", warm_up=40.0, horizon=60.0, **kwargs).unwrapped
    assert isinstance(env, MixedTrafficEnv)
    return env


def test_a_full_disk_is_reported_and_the_next_reset_works() -> None:
    env = make()
    env.reset(seed=1)
    assert env._folder is not None
    for name in ("routes.xml", "counters.add.xml"):
        target = env._folder / name
        target.unlink()
        target.symlink_to("/dev/full")  # every write fails with "no space left on device"
        with pytest.raises(LacerError, match="No space left"):
            env.reset(seed=1)
        with pytest.raises(LacerError, match="reset"):
            env.step(np.zeros(env.action_space.shape))
        target.unlink()
        env.reset(seed=1)
    env.step(np.zeros(env.action_space.shape))
    shutil.rmtree(env._folder)
    env.reset(seed=1)
    env.close()


def test_both_clients_simulate_the_same_and_a_killed_sumo_is_reported() -> None:
    here, there = make(), make(client="traci")
    zero = np.zeros(here.action_space.shape)
    a, _ = here.reset(seed=3)
    a, reward, *_ = here.step(zero)
    here.close()
    b, _ = there.reset(seed=3)
    b, same, *_ = there.step(zero)
    assert reward == same
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert there._sim is not None
    process = there._sim.sumo._process
    process.kill()
    process.wait()
    with pytest.raises(LacerError, match=r"reset\(\) starts a new one"):
        there.step(zero)
    there.reset(seed=3)
    there.step(zero)
    process = there._sim.sumo._process
    there.close()
    assert process.poll() is not None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts in /proc")
def test_a_thousand_resets_leak_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    me = Path("/proc/self")
    env = make()

    def used() -> tuple[int, int, int, int]:
        gc.collect()
        return (int((me / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(me / "fd")),
                sum(len((t / "children").read_text().split()) for t in (me / "task").iterdir()),
                len(list(tmp_path.rglob("*"))))

    before = (0, 0, 0, 0)
    for i in range(1100):
        if i == 100:  # caches are warm by then
            before = used()
        env.reset(seed=i % 7)
        env.step(env.action_space.sample())
    after = used()
    env.close()
    assert after[0] - before[0] < 30e6, "memory"
    assert after[1:] == before[1:], "files, processes, folders"


def test_a_video_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("moviepy", reason="RecordVideo needs moviepy, which wants an older Pillow")
    env = gym.wrappers.RecordVideo(make(render_mode="rgb_array"), str(tmp_path), disable_logger=True)
    env.reset(seed=1)
    done = False
    while not done:
        *_, done, _ = env.step(env.action_space.sample())
    env.close()
    assert [f.stat().st_size > 10_000 for f in tmp_path.glob("*.mp4")] == [True]


def test_pictures_make_a_video(tmp_path: Path) -> None:
    """What RecordVideo needs of an environment: pictures of one even size, an episode long."""
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg", reason="writes mp4")
    env = make(render_mode="rgb_array")
    env.reset(seed=1)
    frames, done = [env.render()], False
    while not done:
        *_, done, _ = env.step(env.action_space.sample())
        frames.append(env.render())
    env.close()
    assert {(f.shape, f.dtype) for f in frames if f is not None} == {(frames[0].shape, np.dtype(np.uint8))}
    assert not any(side % 2 for side in frames[0].shape[:2]), "usual codecs want even sides"
    imageio.imwrite(tmp_path / "episode.mp4", np.stack(frames), fps=env.metadata["render_fps"], macro_block_size=2)
    again = imageio.imread(tmp_path / "episode.mp4")
    assert again.shape == (len(frames), *frames[0].shape)
    assert np.abs(again[-1].astype(int) - frames[-1]).mean() < 10


def test_the_window_is_sumos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":7")
    program, *options = remote_command(["--net-file", "x.net.xml"], "gui")
    assert Path(program).name == "sumo-gui"
    assert options == ["--net-file", "x.net.xml", "--start", "true", "--quit-on-end", "true", "--delay", "50"]
    assert Path(remote_command([], "traci")[0]).name == "sumo"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="a window needs a display; Xvfb makes one")
def test_a_window_opens_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "800x600x24", "-nolisten", "tcp"],
                              pass_fds=[write], stderr=subprocess.DEVNULL)
    try:
        os.close(write)
        monkeypatch.setenv("DISPLAY", ":" + os.read(read, 20).decode().strip())
        env = make(render_mode="human")
        env.reset(seed=1)
        assert env._sim is not None
        process = env._sim.sumo._process
        assert Path(process.args[0]).name == "sumo-gui"
        env.step(np.zeros(env.action_space.shape))
        assert env.render() is None
        env.close()
        assert process.poll() is not None
    finally:
        os.close(read)
        server.terminate()
        server.wait()
