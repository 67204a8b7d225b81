"""``lacer show`` and ``lacer blocks NAME``: an encoder and a block, shown to a person."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lacer.encoders import (
    FUSION,
    MINILM,
    BlockConfig,
    EncoderCost,
    EncoderSpec,
    ModuleCost,
    list_blocks,
    predict,
)
from lacer.envs import LacerError, Objective, SourceSpec, TaskCard, UnknownNameError, list_envs, task_card
from lacer.search.drawing import count, effective, encoder_svg, shape_text

PICTURES = (".svg", ".png")

# ------------------------------------------------------------------------------------------------------- a block

_EXAMPLES: dict[str, tuple[spaces.Space, str]] = {
    "vector": (spaces.Box(-1, 1, (16,)), "a vector of 16 numbers"),
    "series": (spaces.Box(-1, 1, (16, 8)), "a series of 16 steps with 8 features"),
    "image": (spaces.Box(0, 255, (64, 64, 3), np.uint8), "an image of 64×64 pixels with 3 channels"),
    "text": (spaces.Text(64), "a text, embedded in 384 numbers a sentence or word (at most 48 words)"),
    "set": (spaces.Box(-1, 1, (16, 8)), "a set of up to 16 elements with 8 features"),
}


def find_blocks(name: str) -> list[type[BlockConfig]]:
    """Blocks of that name, ``gru`` or ``series:gru``; the same name may stand for several modalities.

    Raises:
        UnknownNameError: there is none; names the nearest one.
    """
    known = list_blocks()
    found = [cls for (modality, block), cls in known.items() if name in (block, f"{modality}:{block}")]
    if not found:
        raise UnknownNameError("block", name, {f"{m}:{b}" if ":" in name else b for m, b in known})
    return found


def block_page(cls: type[BlockConfig]) -> RenderableType:
    """Everything about a block: what it does, its fields, its source and its size."""
    name = str(cls.model_fields["block"].default)
    head = Text(f"{cls.modality}:{name}", style="bold")
    lines = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()]
    parts: list[RenderableType] = [head, Text(" ".join(lines)), Text()]
    conditions = cls.conditions()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("field", "default", "choices", "what it does"):
        table.add_column(column, no_wrap=column in ("field", "default"))
    for field, options in cls.choices().items():
        about = cls.model_fields[field].description or ""
        if field in conditions:
            other, values = conditions[field]
            about += f" (only with {other} {' or '.join(map(str, values))})"
        table.add_row(field, _value(cls.model_fields[field].default), ", ".join(map(_value, options)), about)
    parts.append(table if table.row_count else Text("It has no fields."))
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row("paper", cls.paper or "–")
    facts.add_row("size", _example_size(cls))
    facts.add_row("JSON", json.dumps(cls.model_validate({}).model_dump()))
    facts.add_row("from", cls.__module__)
    return Group(*parts, Text(), facts)


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _example_size(cls: type[BlockConfig]) -> str:
    """Size of a block as it is by default, for a stated input."""
    def source(name: str, modality: str) -> SourceSpec:
        return SourceSpec(name, modality, _EXAMPLES[modality][0], "")  # type: ignore[arg-type]

    if cls.modality == FUSION:
        sources = {n: source(n, n) for n in ("vector", "set")}
        spec = {"sources": {"vector": {"block": "linear"}, "set": {"block": "deepsets"}},
                "fusion": cls.model_validate({}).model_dump()}
        if getattr(cls, "conditioned", False):
            spec["routing"] = {"condition": "vector"}
        part = FUSION
    else:
        part = "source"
        sources = {part: source(part, cls.modality)}
        spec = {"sources": {part: cls.model_validate({}).model_dump()}, "fusion": {"block": "concat"}}
    card = TaskCard("example", sources, spaces.Discrete(2), Objective("score"), "")
    try:
        cost = predict(EncoderSpec.parse(spec, card), card, 384).by_name[part]
    except LacerError as e:
        return f"unknown: {e}"
    given = _EXAMPLES[cls.modality][1] if part != FUSION else (
        "two sources, a vector of 32 numbers and a set with one of 32 and 16 tokens of 32")
    return (f"{cost.parameters:,} parameters and {count(cost.flops)} FLOPs as it is by default, for {given}; gives "
            f"{shape_text(cost.outputs)}")


# ---------------------------------------------------------------------------------------------------- an encoder

def encoder_and_task(path: str | Path, env: str | None, env_kwargs: dict[str, Any] | None,
                     default_env: str) -> tuple[EncoderSpec, TaskCard, str]:
    """Reads an encoder file, or that of an agent's folder.

    Without ``env`` the environment is that of the agent (``agent.json`` beside the file), else the default one.

    Returns:
        encoder, task, and the name of the text model.

    Raises:
        LacerError: the file cannot be read or does not fit the task; names environments that it does fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.json"
    text = MINILM
    request: dict[str, Any] = {}
    try:
        request = json.loads((path.parent / "agent.json").read_text(encoding="utf-8"))["request"]
        text = str(request["text_model"])
    except (OSError, ValueError, KeyError, TypeError):
        request = {}
    if env is None:
        env = str(request.get("env", default_env))
    if env_kwargs is None:
        env_kwargs = request.get("env_kwargs", {}) if env == request.get("env") else {}
    card = task_card(env, **env_kwargs)
    try:
        return EncoderSpec.load(path, card), card, text
    except LacerError as e:
        fits = [name for name in list_envs() if name != env and _fits(path, name)]
        hint = f" It fits {', '.join(fits)}: add --env ID" if fits else ""
        raise LacerError(f"{e}{hint}") from None


def _fits(path: Path, env: str) -> bool:
    try:
        EncoderSpec.load(path, task_card(env))
    except Exception:  # an environment may need packages that are not there
        return False
    return True


def encoder_table(spec: EncoderSpec, card: TaskCard, cost: EncoderCost, depth: int = 1) -> Table:
    """An encoder as a tree, a line per module: shapes in and out, parameters, FLOPs.

    Args:
        spec: the encoder.
        card: its task; sources that are not used are named.
        cost: :func:`lacer.encoders.predict` of it.
        depth: levels of torch modules shown below each block.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("encoder", "block", "in", "out"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    costs = cost.by_name

    def row(guide: str, name: str, what: Text, c: ModuleCost, style: str = "") -> None:
        share = "     " if style else f" {c.parameters / max(1, cost.parameters):4.0%}"
        table.add_row(Text(guide, "dim").append(name, style or "bold"), what, shape_text(c.inputs),
                      shape_text(c.outputs), f"{c.parameters:,}{share}", count(c.flops), style=style)

    names = [*card.sources, FUSION]
    for i, name in enumerate(names):
        last = i == len(names) - 1
        guide, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        block = spec.fusion if name == FUSION else spec.sources.get(name)
        if block is None:
            table.add_row(Text(guide, "dim").append(name, "dim"), Text("not used", "dim"))
            continue
        fields = [f"{k} {_value(v)}" for k, v in effective(block).items()]
        if name == FUSION and spec.condition is not None:
            fields.insert(0, f"by {spec.condition}")
        what = Text(block.block, "bold").append("  " + ", ".join(fields), "not bold dim")
        row(guide, name, what, costs[name])
        for prefix, c in _inside(costs[name], below, depth):
            row(prefix, c.name, Text(c.kind, "dim"), c, "dim")
    total = [f"{cost.parameters:,} {1:4.0%}", count(cost.flops)]
    table.add_row(Text("total", "bold"), "", "", "", *(Text(t, "bold") for t in total))
    return table


def _inside(cost: ModuleCost, guide: str, depth: int) -> Iterator[tuple[str, ModuleCost]]:
    """The modules inside one, with the lines of the tree before them; those that do and hold nothing are left out."""
    shown = [c for c in cost.children if c.parameters or c.flops] if depth > 0 else []
    for i, c in enumerate(shown):
        last = i == len(shown) - 1
        yield guide + ("└─ " if last else "├─ "), c
        yield from _inside(c, guide + ("   " if last else "│  "), depth - 1)


def show(spec: EncoderSpec, card: TaskCard, text: str, depth: int, out: str | None, path: Path | None = None) -> None:
    """Prints an encoder and writes its picture; says how to get one, and for an agent's folder (``path``) a video."""
    cost = predict(spec, card, text)
    if out is not None:
        write_picture(Path(out), encoder_svg(spec, card, cost=cost, margin=14))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False)
    console.print(Text(f"Encoder for {card.env_id}, hash {spec.hash}; shapes and FLOPs are those of one observation\n"))
    console.print(encoder_table(spec, card, cost, depth))
    if out is not None:
        print(f"\nPicture: {out}")
    agent = path is not None and (path / "agent.json").is_file()
    if path is not None and (out is None or agent):
        place = shlex.quote(str(path))
        print()
        if out is None:
            print(f"As a picture:  lacer show {place} --out encoder.svg")
        if agent:
            videos = [p for p in (path / "video.mp4", path / "video.gif") if p.is_file()]
            print(f"Its video:     {videos[0]}" if videos else
                  f"As a video:    lacer evaluate {place} --episodes 1 --video agent.gif")


def check_picture(out: str | None) -> None:
    """Whether a picture of that name can be written. Raises LacerError."""
    if out is None:
        return
    if Path(out).suffix not in PICTURES:
        raise LacerError(f"--out {out}: the name of a picture ends in {' or '.join(PICTURES)}")
    if Path(out).suffix == ".png":
        _renderer()


def write_picture(path: Path, svg: str) -> None:
    """Writes an SVG as it is, or as a PNG of twice its size.

    Raises:
        LacerError: no renderer for PNG (says how to get it), or the file cannot be written.
    """
    data = svg.encode()
    if path.suffix == ".png":
        data = _png(svg)
    try:
        path.write_bytes(data)
    except OSError as e:
        raise LacerError(f"cannot write the picture {path}: {e.strerror}") from None


def _renderer() -> tuple[Any, Path]:
    """The PNG renderer and a folder with a font, for machines that have none."""
    try:
        import matplotlib
        import resvg_py
    except ImportError:
        raise LacerError("a PNG needs the packages resvg-py and matplotlib: pip install \"lacer[png]\"; or write an "
                         ".svg, which every browser shows") from None
    return resvg_py, Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _png(svg: str) -> bytes:
    renderer, fonts = _renderer()
    return bytes(renderer.svg_to_bytes(
        svg_string=svg, zoom=2.0, background="white", sans_serif_family="DejaVu Sans",
        font_files=[str(fonts / "DejaVuSans.ttf"), str(fonts / "DejaVuSans-Bold.ttf")]))
