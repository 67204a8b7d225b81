"""The picture that ``render`` gives: the road strip by strip, vehicles coloured by speed, CAVs marked, and text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lacer.envs.errors import LacerError
from lacer.envs.traffic.network import MAIN_LIMIT, Motorway

if TYPE_CHECKING:
    from lacer.envs.traffic.simulation import Snapshot, Tally

WIDTH = 1200
_LANE, _MARGIN, _PER_ROW = 16, 40, 500.0


def draw(
    road: Motorway, seen: Snapshot, instruction: str | None, state: Mapping[str, float], total: Tally,
    action: Mapping[str, Sequence[float]], elapsed: float,
) -> np.ndarray:
    """Picture (height, 1200, 3) uint8. The road is cut into rows of equal length, read like text; ``action`` holds
    the parts by name.

    Raises:
        LacerError: if Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as e:
        raise LacerError("rendering needs Pillow; install it with: pip install pillow") from e
    rows = int(np.ceil(road.length / _PER_ROW))
    scale = (WIDTH - 2 * _MARGIN) / (road.length / rows)
    band = (road.lanes + 1) * _LANE
    top0, pitch = 180, band + 50
    image = Image.new("RGB", (WIDTH, top0 + rows * pitch), (247, 247, 245))
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)

    def place(x: float, lane: float) -> tuple[float, float]:
        """Pixel of a point of the road; ``lane`` counts from the right, -1 for the acceleration lane."""
        row = min(int(x / (road.length / rows)), rows - 1)
        return (_MARGIN + (x - row * road.length / rows) * scale,
                top0 + row * pitch + (road.lanes - 1 - lane) * _LANE)

    def tile(a: float, b: float, lane: int, colour: tuple[int, int, int]) -> None:
        """Fill a lane from a to b, over the ends of rows."""
        per = road.length / rows
        while a < b - 1e-6:
            end = min(b, (np.floor(a / per + 1e-9) + 1) * per)
            (x0, y0), (x1, _) = place(a + 1e-6, lane), place(end - 1e-6, lane)
            pen.rectangle((x0, y0, x1, y0 + _LANE - 2), fill=colour)
            a = float(end)

    grey = (205, 207, 210)
    for s, start in zip(road.stretches, road.starts, strict=True):
        for lane in range(-s.offset, s.lanes):
            tile(start, start + s.length, lane, grey)
        x, y = place(start + 1e-6, s.lanes - 1)
        pen.line((x, y - 6, x, y + (s.lanes + 1) * _LANE), fill=(120, 120, 120))
        pen.text((x + 3, y - 19), f"{s.name}  km {start / 1000:.2f}", fill=(90, 90, 90), font=small)
    merge = road.starts[2]
    tile(max(0.0, merge - road.ramp_length), merge, -1, (222, 215, 200))
    for i in range(len(seen.ids)):
        x, y = place(max(seen.xs[i], 0.5), float(seen.lane[i]))
        back = max(x - (9 if seen.broken[i] else 5) * scale, _MARGIN)
        u = float(np.clip(seen.speeds[i] / MAIN_LIMIT, 0, 1))
        colour = (210, 40, 160) if seen.broken[i] else (int(225 - 185 * u), int(45 + 120 * u), 45)
        pen.rectangle((back, y + 3, x, y + _LANE - 5), fill=colour, outline=(110, 20, 90) if seen.broken[i] else None)
        if seen.cav[i]:
            mid = (back + x) / 2
            pen.ellipse((mid - 2, y + 6, mid + 2, y + 10), fill=(255, 255, 255))
    if instruction is not None:
        said = "\n".join(textwrap.wrap("Dispatcher: " + instruction, 110))
        pen.text((_MARGIN, 14), said, fill=(20, 20, 20), font=font)
    facts = [
        f"time {elapsed:.0f} s    average speed {total.speed:.1f} m/s    arrived {total.arrived}    "
        f"on the road {state['vehicles']:.0f}    queue {state['queue_length']:.0f}    "
        f"waiting to enter {state['backlog']:.0f}    "
        f"demand {state['main_demand']:.0f} + {state['ramp_demand']:.0f} veh/h",
        "action  " + "    ".join(f"{name} " + " ".join(f"{a:+.2f}" for a in part) for name, part in action.items())
        + ("    (lanes from right to left)" if "lanes" in action else ""),
        "red: standing, green: full speed; white dot: connected and automated; magenta: broken down",
    ]
    for i, line in enumerate(facts):
        pen.text((_MARGIN, 62 + 22 * i), line, fill=(50, 50, 50), font=small)
    return np.asarray(image, np.uint8).copy()
