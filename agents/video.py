"""A video of a trained agent: the environment's pictures, the texts that it reads, and what its action depends on.

Importance of a source at a moment is its permutation importance (Breiman 2001; Fisher et al. 2019): the source's
observation is replaced by one of another moment, drawn from this and further episodes, and the Kullback-Leibler
divergence from the action distribution to the one that results is taken, in nats, mean over the draws. It says what the
policy reacts to, not what would be best to react to; sources that tell the same can hide each other.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
import torch
from torch.distributions import kl_divergence

from lacer.agents.checkpoint import Agent, load
from lacer.agents.vec import encode_batch
from lacer.envs import LacerError, make

if TYPE_CHECKING:
    from PIL import Image

FORMATS = (".gif", ".mp4")
COLOURS = {"vector": (106, 79, 196), "series": (14, 133, 119), "image": (187, 54, 112), "text": (181, 106, 11),
           "set": (76, 138, 43)}
FRAMES = 8
"""Pictures of each camera that :func:`save_frames` keeps."""


@dataclass
class Episode:
    """One episode of an agent.

    Attributes:
        observations: per step, as the environment gives them.
        pictures: per step, ``render()``'s (H, W, 3) uint8; empty without rendering.
        rewards: per step.
        metrics: ``info["metrics"]`` at the end.
        importance: per source that the encoder uses, (T,) nats; see :func:`importance`.
    """

    observations: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)


def check_video(path: Path) -> None:
    """Whether a video of that name can be written.

    Raises:
        LacerError: neither .gif nor .mp4, or a package is missing; names the extra that brings it.
    """
    if path.suffix not in FORMATS:
        raise LacerError(f"--video {path}: the name of a video ends in {' or '.join(FORMATS)}")
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise LacerError('a video needs Pillow: pip install "lacer[video]"') from None
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise LacerError('an .mp4 needs the package imageio-ffmpeg: pip install "lacer[video]"; or write a .gif'
                             ) from None


def can_render(env_id: str, env_kwargs: dict[str, Any]) -> bool:
    """Whether an environment knows rgb_array rendering. Raises LacerError if it cannot be made."""
    env = make(env_id, **env_kwargs)
    try:
        return "rgb_array" in (env.metadata.get("render_modes") or ())
    finally:
        env.close()


@contextmanager
def _environment(agent: Agent, env_kwargs: dict[str, Any], render: bool) -> Iterator[gym.Env]:
    r = agent.request
    kwargs = {**r.env_kwargs, **r.eval_env_kwargs, **env_kwargs}
    if render and not can_render(r.env, kwargs):
        raise LacerError(f"{r.env} cannot be rendered: it has no render mode rgb_array, so there is no video of it")
    env = make(r.env, **({**kwargs, "render_mode": "rgb_array"} if render else kwargs))
    try:
        yield env
    finally:
        env.close()


def _picture(env: gym.Env) -> np.ndarray:
    picture = env.render()
    if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != 3:
        raise LacerError(f"render() gave {type(picture).__name__} instead of a picture (H, W, 3), so there is no video")
    return picture.astype(np.uint8)


def _play(agent: Agent, env: gym.Env, seed: int, limit: int, render: bool) -> Episode:
    out = Episode()
    obs, _ = env.reset(seed=seed)
    for _ in range(limit):
        out.observations.append({k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in obs.items()})
        if render:
            out.pictures.append(_picture(env))
        obs, reward, terminated, truncated, info = env.step(agent.predict(obs))
        out.rewards.append(float(reward))
        if terminated or truncated:
            out.metrics = {k: float(v) for k, v in info.get("metrics", {}).items()}
            break
    return out


def importance(agent: Agent, observations: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], draws: int = 8,
               seed: int = 0) -> dict[str, np.ndarray]:
    """How much the action depends on each source, moment by moment.

    Args:
        agent: a trained agent.
        observations: T observations of an episode.
        others: observations that replacements are drawn from.
        draws: replacements per moment and source.
        seed: of the draws.

    Returns:
        Per source that the encoder uses (T,): the mean divergence KL(pi(. | o) || pi(. | o with another value of the
        source)) in nats.
    """
    rng = np.random.default_rng(seed)
    n = len(observations)
    encoded = encode_batch(_columns(observations), agent.card, agent.table)
    pool = encode_batch(_columns(others), agent.card, agent.table)
    out = {}
    for name in agent.spec.sources:
        total = np.zeros(n)
        for _ in range(draws):
            changed = {**encoded, name: pool[name][rng.integers(len(others), size=n)]}
            for i in range(0, n, 256):
                part = slice(i, i + 256)
                total[part] += _divergence(agent, {k: v[part] for k, v in encoded.items()},
                                           {k: v[part] for k, v in changed.items()})
        out[name] = total / draws
    return out


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {k: [r[k] for r in rows] if isinstance(rows[0][k], str) else np.stack([r[k] for r in rows])
            for k in rows[0]}


@torch.no_grad()
def _divergence(agent: Agent, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
    p, q = (cast(Any, agent.policy.get_distribution(agent.policy.obs_to_tensor(o)[0]).distribution) for o in (a, b))
    pairs = zip(p, q, strict=True) if isinstance(p, list) else [(p, q)]  # a list for MultiDiscrete
    parts = [kl_divergence(x, y) for x, y in pairs]
    return torch.stack([k.flatten(1).sum(1) if k.ndim > 1 else k for k in parts]).sum(0).cpu().numpy()


def play(agent: Agent, *, seed: int, env_kwargs: dict[str, Any] | None = None, others: int = 2, limit: int = 2000,
         render: bool = True) -> Episode:
    """Plays an episode with greedy actions and looks at what they depend on.

    Args:
        agent: the agent.
        seed: of the episode; those of the further episodes follow it.
        env_kwargs: environment arguments that differ from those of the evaluation in the training.
        others: further episodes that replacements are drawn from, without pictures.
        limit: steps after which an episode is cut.
        render: whether to keep pictures.

    Raises:
        LacerError: the environment cannot be rendered.
    """
    with _environment(agent, env_kwargs or {}, render) as env:
        out = _play(agent, env, seed, limit, render)
    pool = list(out.observations)
    with _environment(agent, env_kwargs or {}, render=False) as env:
        for i in range(1, others + 1):
            pool += _play(agent, env, seed + i, limit, False).observations
    out.importance = importance(agent, out.observations, pool)
    return out


# ------------------------------------------------------------------------------------------------------- the pictures

def write_video(path: Path, agent: Agent, episode: Episode, fps: float | None = None) -> None:
    """Writes an episode as .gif or .mp4.

    Args:
        path: the file.
        agent: who plays.
        episode: with pictures.
        fps: pictures a second; default: 4 to 30, so that the video takes 20 seconds if it can.

    Raises:
        LacerError: no pictures, a missing package, or the file cannot be written.
    """
    check_video(path)
    if not episode.pictures:
        raise LacerError("the episode has no pictures")
    rate = fps or float(np.clip(len(episode.pictures) / 20, 4, 30))
    draw = _painter(agent, episode)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (_write_gif if path.suffix == ".gif" else _write_mp4)(path, draw, len(episode.pictures), rate)
    except OSError as e:
        raise LacerError(f"cannot write the video {path}: {e.strerror or e}") from None


def _write_gif(path: Path, draw: Callable[[int], Image.Image], n: int, fps: float) -> None:
    from PIL import Image

    # One palette for all, from five of them: palettes of their own would flicker, and make a larger file.
    some = [draw(i) for i in sorted({0, n // 4, n // 2, 3 * n // 4, n - 1})]
    sheet = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for k, picture in enumerate(some):
        sheet.paste(picture, (0, k * picture.height))
    palette = sheet.quantize(192)
    frames = (draw(i).quantize(palette=palette, dither=Image.Dither.NONE) for i in range(n))
    next(frames).save(path, save_all=True, append_images=frames, duration=round(1000 / fps), loop=0, optimize=False)


def _write_mp4(path: Path, draw: Callable[[int], Image.Image], n: int, fps: float) -> None:
    import imageio_ffmpeg

    size = draw(0).size
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, quality=7, macro_block_size=2,
                                         ffmpeg_log_level="error")
    writer.send(None)
    try:
        for i in range(n):
            writer.send(draw(i).tobytes())
    finally:
        writer.close()


def _painter(agent: Agent, episode: Episode) -> Callable[[int], Image.Image]:
    """A function that draws the i-th picture of a video: the environment's, below it a panel."""
    from PIL import Image, ImageDraw, ImageFont

    card, n = agent.card, len(episode.pictures)
    height, width = episode.pictures[0].shape[:2]
    zoom = max(1, round(640 / width)) if width < 480 else 1
    wide, high = max(640, width * zoom), height * zoom
    names = list(episode.importance)
    texts = [s for s, spec in card.sources.items() if spec.modality == "text"]
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    ink, soft, paper, line = (28, 31, 36), (93, 100, 110), (255, 255, 255), (226, 224, 219)
    columns = int((wide - 40) / font.getlength("n") * 0.98)
    rows = [{t: _wrap(f"{t}: {o[t]}", columns) for t in texts} for o in episode.observations]
    most = {t: max(len(r[t]) for r in rows) for t in texts}
    top = 34 + 21 * sum(most.values())
    row, left = 24, 130
    panel = top + 26 + row * len(names) + 14
    total_high = high + panel + (high + panel) % 2
    wide += wide % 2
    split = left + (wide - left - 20) // 3
    peak = max((float(v.max()) for v in episode.importance.values()), default=0.0) or 1.0

    def draw(i: int) -> Image.Image:
        image = Image.new("RGB", (wide, total_high), paper)
        frame = Image.fromarray(episode.pictures[i])
        if zoom > 1:
            frame = frame.resize((width * zoom, high), Image.Resampling.NEAREST)
        image.paste(frame, ((wide - width * zoom) // 2, 0))
        pen = ImageDraw.Draw(image)
        pen.line((0, high, wide, high), fill=line)
        so_far = sum(episode.rewards[:i + 1])
        pen.text((20, high + 10), f"step {i + 1} of {n}    return so far {so_far:.2f}", soft, small)
        y = high + 32
        for t in texts:
            for k, words in enumerate(rows[i][t]):
                pen.text((20, y + 21 * k), words, ink, font)
            y += 21 * most[t]
        pen.text((20, y + 4), "the action depends on (nats)", soft, small)
        pen.text((split + 16, y + 4), "over time", soft, small)
        y += 26
        for name in names:
            values, colour = episode.importance[name], COLOURS[card.sources[name].modality]
            base = y + row - 5
            pen.text((20, y + 2), name if len(name) < 15 else name[:14] + "…", ink, small)
            pen.rectangle((left, y + 4, left + max(1, (split - left - 60) * values[i] / peak), base), fill=colour)
            pen.text((split - 52, y + 2), f"{values[i]:.2f}", soft, small)
            x0, w = split + 16, wide - 20 - split - 16
            pen.line((x0, base, x0 + w, base), fill=line)
            points = [(x0 + w * (k + 0.5) / n, base - (row - 8) * float(v) / peak) for k, v in enumerate(values)]
            pale = tuple(round(255 - (255 - c) * 0.35) for c in colour)
            if n > 1:
                pen.line(points, fill=pale, width=1)
                if i:
                    pen.line(points[:i + 1], fill=colour, width=2)
            x, at = points[i]
            pen.ellipse((x - 2.5, at - 2.5, x + 2.5, at + 2.5), fill=colour)
            y += row
        return image

    return draw


def _wrap(text: str, columns: int) -> list[str]:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(shown, columns, max_lines=4, placeholder=" …") or [""]


def save_frames(folder: Path, agent: Agent, episode: Episode) -> dict[str, list[Path]]:
    """Writes what the agent's cameras saw, spread over the episode, as PNG; the files by source."""
    from PIL import Image

    out: dict[str, list[Path]] = {}
    steps = np.unique(np.linspace(0, len(episode.observations) - 1, FRAMES).round().astype(int))
    for k, name in enumerate(n for n, s in agent.card.sources.items() if s.modality == "image"):
        for step in steps:
            x = episode.observations[step][name]
            x = x[..., -3:] if x.shape[2] >= 3 else np.repeat(x[..., -1:], 3, 2)  # the latest of a stack
            zoom = max(1, 256 // max(x.shape[:2]))
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"camera{k}-step{step:04d}.png"
            Image.fromarray(x).resize((x.shape[1] * zoom, x.shape[0] * zoom), Image.Resampling.NEAREST).save(path)
            out.setdefault(name, []).append(path)
    return out


def main(argument: str) -> None:
    """Records an agent, in a process of its own: a search's driver holds no simulation. The argument is JSON with
    ``agent``, ``video``, ``frames``, ``seed``; prints ``{"frames": {source: [file, ...]}}``."""
    job = json.loads(argument)
    agent = load(job["agent"])
    episode = play(agent, seed=int(job["seed"]))
    write_video(Path(job["video"]), agent, episode)
    frames = save_frames(Path(job["frames"]), agent, episode)
    print(json.dumps({"frames": {k: list(map(str, v)) for k, v in frames.items()}}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except LacerError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
