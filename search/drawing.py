"""Pictures as SVG text: an encoder, and the small plots of the report.

The plots take their colours from CSS classes of the report's page; :func:`encoder_svg` brings its own style and is a
file of its own too. All text goes through :func:`esc`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from lacer.encoders import FUSION, BlockConfig, EncoderSpec
from lacer.envs import SourceSpec, TaskCard

if TYPE_CHECKING:
    from lacer.encoders import EncoderCost, ModuleCost

# Not allowed in XML, or able to reorder the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff"
                     "\ufffe\uffff]")

MODALITY_COLOURS = {"vector": ("#6a4fc4", "#a893f0"), "series": ("#0e8577", "#45c4b4"), "image": ("#bb3670", "#f07fab"),
                    "text": ("#b56a0b", "#e8a64c"), "set": ("#4c8a2b", "#93c971")}
"""Colour of each modality on a light and on a dark page."""

ENCODER_STYLE = """\
.lacer-enc{color-scheme:light dark}
.lacer-enc{font:12px Inter,-apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.lacer-enc text{fill:#1c1f24}.lacer-enc .b{font-weight:600}.lacer-enc .s{font-size:10.5px;fill:#5d646e}
.lacer-enc .box{fill:#fff;stroke:#cfd3d9}.lacer-enc .off{fill:none;stroke:#b9bec6;stroke-dasharray:3 3}
.lacer-enc .wire{fill:none;stroke:#8d949e;stroke-width:1.4}.lacer-enc .tip{fill:#8d949e}
.lacer-enc .tone{stroke:#5d646e}.lacer-enc .faded{opacity:.5}.lacer-enc .diff{stroke:#1f5fd0;stroke-width:1.6}
.lacer-enc .mark,.lacer-enc text.mark{fill:#1f5fd0}.lacer-enc tspan.mark{fill:#1f5fd0;font-weight:600}
""" + "".join(f".lacer-enc .{m}{{stroke:{a};color:{a}}}" for m, (a, _) in MODALITY_COLOURS.items()) + """
@media (prefers-color-scheme:dark){.lacer-enc text{fill:#e7e9ec}.lacer-enc .s{fill:#9aa2ad}
.lacer-enc .box{fill:#1d2126;stroke:#3b424b}.lacer-enc .off{stroke:#4b535d}.lacer-enc .tone{stroke:#9aa2ad}
.lacer-enc .wire{stroke:#79818c}.lacer-enc .tip{fill:#79818c}.lacer-enc .diff{stroke:#7fa9ff}
.lacer-enc .mark,.lacer-enc text.mark,.lacer-enc tspan.mark{fill:#7fa9ff}
""" + "".join(f".lacer-enc .{m}{{stroke:{b};color:{b}}}" for m, (_, b) in MODALITY_COLOURS.items()) + "}\n"

_ICONS = {
    "vector": '<path d="M4 1.5h8v4H4zM4 6h8v4H4zM4 10.5h8v4H4z"/>',
    "series": '<path d="M1 10c2-8 4-8 6-2s4 6 8-4"/>',
    "image": '<path d="M1.5 2.5h13v11h-13zM2 12l4-4.5 3 3 2-2 3.5 3.5M10 5.2h1.6v1.4H10z"/>',
    "text": '<path d="M2 4h12M2 8h12M2 12h7"/>',
    "set": '<path d="M3 5a1.8 1.8 0 1 0 3.6 0a1.8 1.8 0 1 0-3.6 0M9.5 4a1.8 1.8 0 1 0 3.6 0a1.8 1.8 0 1 0-3.6 0'
           'M6.5 11.5a1.8 1.8 0 1 0 3.6 0a1.8 1.8 0 1 0-3.6 0"/>',
}


def clean(text: object) -> str:
    """Text without characters that XML forbids or that reorder their surroundings."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def esc(text: object) -> str:
    """:func:`clean` text for XML content and attributes."""
    return (clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
            .replace("'", "&#39;"))


def count(n: float) -> str:
    """A count in a few characters: 950, 4.42k, 1.3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}" if abs(n) < 999.5 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


def _width(text: str, size: float) -> float:
    """About the width of a text in pixels."""
    return size * sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.57 for c in text)


def _fit(text: object, width: float, size: float = 12) -> str:
    """Text cut to a width."""
    out = " ".join(clean(text).split())
    if _width(out, size) <= width:
        return out
    while out and _width(out + "…", size) > width:
        out = out[:-1]
    return out + "…"


# ---------------------------------------------------------------------------------------------------- the encoder

@dataclass(frozen=True)
class _Word:
    text: str
    marked: bool


def effective(block: BlockConfig) -> dict[str, Any]:
    """Hyper-parameters of a block, without those that have no effect beside the others."""
    conditions = block.conditions()
    return {name: value for name, value in block.model_dump(exclude={"block"}).items()
            if name not in conditions or getattr(block, conditions[name][0]) in conditions[name][1]}


def _fields(block: BlockConfig, other: BlockConfig | None, compared: bool) -> list[_Word]:
    """Hyper-parameters in words; those that differ from the same block elsewhere are marked."""
    same = other is not None and other.block == block.block
    theirs = other.model_dump() if same and other is not None else {}
    words = []
    for name, value in effective(block).items():
        text = f"{'' if value else 'no '}{name}" if isinstance(value, bool) else (
            value if isinstance(value, str) else f"{name} {value}")
        words.append(_Word(str(text).replace("_", " "), compared and same and theirs.get(name) != value))
    return words


def _lines(words: Sequence[_Word], width: float) -> list[list[_Word]]:
    """Words in lines of a width."""
    lines: list[list[_Word]] = []
    for w in words:
        w = _Word(_fit(w.text, width, 10.5), w.marked)
        if lines and _width(" · ".join(x.text for x in [*lines[-1], w]), 10.5) <= width:
            lines[-1].append(w)
        else:
            lines.append([w])
    return lines


def _line(words: Sequence[_Word], x: float, y: float) -> str:
    body = " · ".join(f'<tspan class="mark">{esc(w.text)}</tspan>' if w.marked else esc(w.text) for w in words)
    return f'<text class="s" x="{x:g}" y="{y:g}">{body}</text>'


def _text(x: float, y: float, text: object, cls: str = "", anchor: str = "") -> str:
    extra = (f' class="{cls}"' if cls else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:g}" y="{y:g}"{extra}>{esc(text)}</text>'


def _tip(x: float, y: float) -> str:
    return f'<path class="tip" d="M{x:g} {y:g}l-6-3.2v6.4z"/>'


def _box(x: float, y: float, w: float, h: float, cls: str = "box") -> str:
    return f'<rect class="{cls}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"/>'


def _shape(source: SourceSpec) -> str:
    return f"{source.modality} " + "×".join(map(str, source.shape))


def _actions(space: spaces.Space) -> str:
    if isinstance(space, spaces.Discrete):
        return f"{space.n} choices"
    n = int(np.prod(space.shape or (1,)))
    return f"{n} value{'s' if n != 1 else ''}"


def _describe(block: BlockConfig) -> str:
    """Tooltip of a block: its summary and what each hyper-parameter does."""
    lines = [f"{block.block}: {type(block).summary()}"]
    for name, value in effective(block).items():
        lines.append(f"{name} = {value}: {type(block).model_fields[name].description or ''}")
    return "\n".join(lines)


def _route(spec: EncoderSpec, compare: EncoderSpec | None) -> list[_Word]:
    """The source that conditions the fusion."""
    if spec.condition is None:
        return []
    same = compare is None or compare.fusion.block != spec.fusion.block or compare.condition == spec.condition
    return [_Word(f"by {spec.condition}", not same)]


def shape_text(shapes: Sequence[tuple[int, ...]]) -> str:
    """Shapes in a few characters: a vector of 64 and 16 tokens of 64 are ``64 + 16×64``."""
    return " + ".join("×".join(map(str, s)) or "1" for s in shapes)


def _cost_words(cost: ModuleCost) -> list[_Word]:
    return [_Word(f"→ {shape_text(cost.outputs)}", False), _Word(f"{count(cost.flops)} FLOPs", False)]


def encoder_svg(spec: EncoderSpec, card: TaskCard, *, parameters: Mapping[str, int] | None = None,
                compare: EncoderSpec | None = None, cost: EncoderCost | None = None, margin: int = 0) -> str:
    """An encoder from its sources to the actor and the critic, as a self-contained SVG.

    Args:
        spec: the encoder.
        card: its task; sources that the encoder leaves out are drawn faded.
        parameters: trainable parameters by source and of ``fusion``
            (:attr:`lacer.agents.evaluation.Cost.parameters_by_module`).
        compare: another encoder for the same task; what differs from it is marked.
        cost: predicted cost (:func:`lacer.encoders.predict`); adds shapes and FLOPs, and parameters if not given.
        margin: room around the picture, for files of their own.

    Returns:
        ``<svg>…</svg>``, to be put into a page or saved as a file; follows the reader's light or dark scheme.
    """
    return draw_encoder(spec, card, parameters, compare, style=True, tooltips=True, cost=cost, margin=margin)


def draw_encoder(spec: EncoderSpec, card: TaskCard, parameters: Mapping[str, int] | None = None,
                 compare: EncoderSpec | None = None, *, style: bool, tooltips: bool,
                 cost: EncoderCost | None = None, margin: int = 0) -> str:
    """:func:`encoder_svg`, for pages that hold :data:`ENCODER_STYLE` already."""
    compared = compare is not None
    costs = cost.by_name if cost is not None else {}
    known = dict(parameters or {name: c.parameters for name, c in costs.items()})
    total = max(1, sum(known.values()))
    back: list[str] = []
    out: list[str] = []
    ends: list[tuple[float, str]] = []

    def tooltip(text: str) -> str:
        return f"<title>{esc(text)}</title>" if tooltips else ""

    def amount(name: str, right: float, y: float) -> str:
        return _text(right, y, count(known[name]), "s", "end") if name in known else ""

    def share(name: str, x: float, y: float, width: float, cls: str) -> str:
        if name not in known:
            return ""
        return f'<path class="{cls}" stroke-width="3" d="M{x:g} {y:g}h{max(1.0, width * known[name] / total):.1f}"/>'

    y = 6.0
    for name, source in card.sources.items():
        block, other = spec.sources.get(name), compare.sources.get(name) if compare else None
        lines = _lines(_fields(block, other, compared), 162) if block is not None else []
        if name in costs:
            lines += _lines(_cost_words(costs[name]), 162)
        height = max(46.0, 27 + 14 * len(lines) + 9)
        mid = y + height / 2
        switched = compared and (block is None) != (other is None)
        renamed = compared and block is not None and other is not None and block.block != other.block
        faded = "" if block is not None else ' class="faded"'
        out.append(f"<g{faded}>" + tooltip(f"{name} ({_shape(source)}): {source.description}")
                   + _box(2, y, 128, height, "box" if block is not None else "off")
                   + f'<g class="{source.modality}" fill="none" stroke-width="1.5" stroke-linejoin="round" '
                   f'stroke-linecap="round" transform="translate(11 {mid - 8:g})">{_ICONS[source.modality]}</g>'
                   + _text(35, mid - 2, _fit(name, 90), "b")
                   + _text(35, mid + 13, _fit(_shape(source), 92, 10.5), "s") + "</g>")
        if block is None:
            out.append(f"<g{'' if switched else faded}>"
                       + _box(152, y, 184, height, "off diff" if switched else "off")
                       + _text(163, mid + 4, "not used", "s mark" if switched else "s") + "</g>")
        else:
            back.append(f'<path class="wire" d="M130 {mid:g}H150"/>' + _tip(152, mid))
            new = switched or renamed
            out.append("<g>" + tooltip(_describe(block)) + _box(152, y, 184, height, "box diff" if new else "box")
                       + _text(163, y + 19, _fit(block.block, 120), "b mark" if new else "b")
                       + amount(name, 326, y + 19)
                       + "".join(_line(line, 163, y + 35 + 14 * i) for i, line in enumerate(lines))
                       + share(name, 163, y + height - 5, 162, source.modality) + "</g>")
            ends.append((mid, source.modality))
        y += height + 10
    bottom = y - 10

    words = [*_route(spec, compare), *_fields(spec.fusion, compare.fusion if compare else None, compared),
             *(_cost_words(costs[FUSION]) if FUSION in costs else [])]
    lines = [line for w in words for line in _lines([w], 120)]
    renamed = compare is not None and compare.fusion.block != spec.fusion.block
    height = max(64.0, 54 + 14 * len(lines), 13.0 * len(ends) + 8)
    top = max(6.0, (6 + bottom) / 2 - height / 2)
    bottom = max(bottom, top + height, 110)
    middle = top + height / 2
    text_top = middle - (36 + 14 * len(lines)) / 2
    for i, (mid, modality) in enumerate(ends):
        end = middle + (i - (len(ends) - 1) / 2) * min(18.0, (height - 20) / max(1, len(ends) - 1))
        back.append(f'<path class="{modality}" fill="none" stroke-width="1.6" stroke-opacity=".75" '
                    f'd="M336 {mid:g}C364 {mid:g} 358 {end:g} 384 {end:g}"/>'
                    f'<path class="{modality}" fill="none" stroke-width="1.6" d="M380 {end - 3:g}l4 3l-4 3"/>')
    out.append("<g>" + tooltip(_describe(spec.fusion)) + _box(386, top, 140, height, "box diff" if renamed else "box")
               + _text(396, text_top + 12, "fusion", "s") + amount(FUSION, 516, text_top + 12)
               + _text(396, text_top + 27, _fit(spec.fusion.block, 122), "b mark" if renamed else "b")
               + "".join(_line(line, 396, text_top + 43 + 14 * i) for i, line in enumerate(lines))
               + share(FUSION, 396, top + height - 5, 120, "tone") + "</g>")
    for dy, head, what in ((-28, "actor", _actions(card.action_space)), (28, "critic", "1 value")):
        at = middle + dy
        start = middle + dy / 4
        back.append(f'<path class="wire" d="M526 {start:g}C540 {start:g} 534 {at:g} 548 {at:g}"/>' + _tip(550, at))
        out.append(_box(550, at - 21, 64, 42) + _text(582, at - 3, head, "b", "middle")
                   + _text(582, at + 12, _fit(what, 60, 10.5), "s", "middle"))
    bottom = max(bottom, middle + 50)
    if known:
        bottom += 22
        work = "" if cost is None else f"; {count(cost.flops)} FLOPs an observation"
        out.append(_text(2, bottom - 2, f"{sum(known.values()):,} trainable parameters before the heads (bars: each "
                         f"block’s share){work}", "s"))
    label = f"Encoder of {card.env_id}: " + "; ".join(
        [*(f"{n}: {b.short()}" for n, b in spec.sources.items()), f"fusion: {spec.fusion.short()}"])
    box = f"{-margin} {-margin} {616 + 2 * margin} {bottom + 8 + 2 * margin:g}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="lacer-enc" viewBox="{box}" role="img" '
            f'aria-label="{esc(label)}">' + (f"<style>{ENCODER_STYLE}</style>" if style else "")
            + "".join(back) + "".join(out) + "</svg>")


# ------------------------------------------------------------------------------------------------------ the plots

def decimals(*spreads: float) -> int:
    """Decimals that show the smallest positive spread with two digits."""
    sizes = [abs(s) for s in spreads if math.isfinite(s) and abs(s) > 1e-12]
    return max(0, min(6, 1 - math.floor(math.log10(min(sizes))))) if sizes else 2


def number(x: float | None, places: int = 3) -> str:
    """A number with a true minus sign; a dash for None and non-finite ones."""
    if x is None or not math.isfinite(x):
        return "–"
    if abs(x) >= 1e7 or 0 < abs(x) < 10 ** -(places + 2):
        return f"{x:.3g}".replace("-", "−")
    text = f"{x:,.{places}f}"
    return (text[1:] if text.startswith("-") and not text.strip("-0.,") else text).replace("-", "−")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two limits."""
    unit = 10.0 ** math.floor(math.log10((high - low) / about))
    step = min((s * unit for s in (1, 2, 2.5, 5, 10)), key=lambda s: abs((high - low) / s - about))
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def limits(values: Sequence[float], *, whole: bool = True) -> tuple[float, float]:
    """Ends of an axis with a margin; ``whole=False`` lets far outliers lie outside."""
    v = np.array([x for x in values if math.isfinite(x)], float)
    if not len(v):
        return 0.0, 1.0
    low, high = float(v.min()), float(v.max())
    if not whole and len(v) >= 5:
        q1, q3 = np.percentile(v, [25, 75])
        reach = 3 * max(q3 - q1, 1e-9 + 0.02 * abs(q3))
        low, high = max(low, float(q1 - reach)), min(high, float(q3 + reach))
    margin = 0.06 * (high - low) or max(0.5, 0.1 * abs(high))
    return low - margin, high + margin


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with as many decimals as the step needs."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if places and any(abs(v * 10**places - round(v * 10**places)) > 1e-6 for v in values):
        places += 1
    return [count(v) if abs(v) >= 10_000 else number(v, places) for v in values]


class Frame:
    """Axes of a small plot."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int, left: int = 46,
                 width: int = 480) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right, self.top, self.bottom = left, width - 14, 12, height - 40
        self.parts: list[str] = []

    def px(self, x: float) -> float:
        """Horizontal place of a value."""
        return round(self.left + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (self.right - self.left), 1)

    def py(self, y: float) -> float:
        """Vertical place of a value."""
        return round(self.bottom - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (self.bottom - self.top), 1)

    def clip(self, *parts: str) -> None:
        """Appends SVG of which only what lies inside the frame is seen."""
        box = f"{self.left} {self.top} {self.right - self.left} {self.bottom - self.top}"
        x, y, width, height = box.split()
        self.add(f'<svg class="clip" x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">', *parts,
                 "</svg>")

    def add(self, *parts: str) -> None:
        """Appends SVG."""
        self.parts += parts

    def grid_x(self, label: str, about: int = 5, whole: bool = False) -> None:
        """Vertical grid lines, their labels and the name of the axis."""
        values = [v for v in ticks(*self.x, about) if not whole or v == int(v)]
        for v, text in zip(values, tick_labels(values), strict=True):
            self.add(f'<path class="grid" d="M{self.px(v)} {self.top}V{self.bottom}"/>',
                     f'<text x="{self.px(v)}" y="{self.bottom + 16}" text-anchor="middle">{text}</text>')
        self.add(f'<text class="axis" x="{(self.left + self.right) / 2:g}" y="{self.bottom + 35}" '
                 f'text-anchor="middle">{esc(_fit(label, 400))}</text>')

    def grid_y(self, about: int = 4) -> None:
        """Horizontal grid lines and their labels."""
        values = ticks(*self.y, about)
        for v, text in zip(values, tick_labels(values), strict=True):
            self.add(f'<path class="grid" d="M{self.left} {self.py(v)}H{self.right}"/>',
                     f'<text x="{self.left - 7}" y="{self.py(v) + 4:g}" text-anchor="end">{text}</text>')

    def svg(self, label: str) -> str:
        """The picture."""
        return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot{" wide" if self.width > 480 else ""}" '
                f'viewBox="0 0 {self.width} {self.height}" role="img" '
                f'aria-label="{esc(label)}">{"".join(self.parts)}</svg>')


@dataclass(frozen=True)
class Row:
    """One row of :func:`dot_rows`: a name, a CSS class, the values of the episodes, their mean and its interval."""

    name: str
    cls: str
    values: Sequence[float]
    mean: float
    low: float
    high: float


def dot_rows(rows: Sequence[Row], label: str, *, zero: bool = False) -> str:
    """Values of the episodes as dots, with their mean and 95 % interval; ``zero`` draws the line of no difference."""
    everything = [v for r in rows for v in [*r.values, r.low, r.high]] + ([0.0] if zero else [])
    f = Frame(limits(everything), (0, 1), 26 + 62 * len(rows) + 44, left=4)
    f.grid_x(label)
    if zero:
        f.add(f'<path class="zero" d="M{f.px(0)} {f.top}V{f.bottom}"/>')
    rng = np.random.default_rng(0)
    for i, r in enumerate(rows):
        y = 22 + 62 * i
        mid = y + 28
        places = decimals(r.high - r.low)
        f.add(f'<text class="name" x="{f.left}" y="{y:g}">{esc(_fit(r.name, 230))}</text>'
              f'<text class="value" x="{f.right}" y="{y:g}" text-anchor="end"><tspan class="name">'
              f'{number(r.mean, places)}</tspan> [{number(r.low, places)}, {number(r.high, places)}]</text>')
        shown = list(r.values)[:400]
        jitter = rng.uniform(-9, 9, len(shown))
        f.add("".join(f'<circle class="{r.cls} dot" cx="{f.px(v)}" cy="{mid + j:.1f}" r="3"/>'
                      for v, j in zip(shown, jitter, strict=True)))
        f.add(f'<path class="{r.cls} whisker" d="M{f.px(r.low)} {mid:g}H{f.px(r.high)}M{f.px(r.low)} {mid - 8:g}v16'
              f'M{f.px(r.high)} {mid - 8:g}v16"/>'
              f'<circle class="{r.cls} mean" cx="{f.px(r.mean)}" cy="{mid:g}" r="5"><title>{esc(r.name)}: '
              f'{number(r.mean, places)} [{number(r.low, places)}, {number(r.high, places)}]</title></circle>')
    return f.svg(label)


@dataclass(frozen=True)
class Dot:
    """A candidate in :func:`progress_plot`; ``value`` is None where there is no result."""

    number: int
    value: float | None
    status: str
    title: str


def progress_plot(dots: Sequence[Dot], winner: int | None, minimize: bool, label: str, *, wide: bool = False) -> str:
    """Every candidate's objective against its number, and the best so far as a step line."""
    values = [d.value for d in dots if d.value is not None]
    last = max((d.number for d in dots), default=0)
    f = Frame((-0.6, last + 0.6), limits(values, whole=False), 300, width=1000 if wide else 480)
    f.grid_y()
    f.grid_x("candidate", 10 if wide else 5, whole=True)
    best: float | None = None
    firsts: set[int] = set()
    path = ""
    for d in sorted(dots, key=lambda d: d.number):
        if d.value is not None and (best is None or (d.value < best if minimize else d.value > best)):
            path += (f"M{f.px(d.number)} {f.py(d.value)}" if best is None else f"H{f.px(d.number)}V{f.py(d.value)}")
            best = d.value
            firsts.add(d.number)
    if path:
        f.clip(f'<path class="best" d="{path}H{f.right}"/>')
    for d in sorted(dots, key=lambda d: d.number == winner):
        x = f.px(d.number)
        if d.value is None:
            mark = f'<path class="{d.status} cross" d="M{x - 3} {f.bottom - 9}l6 6m0-6l-6 6"/>'
        elif d.value < f.y[0]:
            mark = f'<path class="other mean" d="M{x - 4} {f.bottom - 8}h8l-4 7z"/>'
        elif d.value > f.y[1]:
            mark = f'<path class="other mean" d="M{x - 4} {f.top + 8}h8l-4-7z"/>'
        else:
            big = d.number == winner
            cls = "winner" if big else "better" if d.number in firsts else "other"
            mark = (f'<circle class="{cls} mean" cx="{x}" cy="{f.py(d.value)}" '
                    f'r="{6 if big else 4 if len(dots) <= 60 else 2.6}"/>')
        f.add(f'<a href="#trial-{d.number}">{mark}<title>{esc(d.title)}</title></a>')
    return f.svg(label)


def scatter_plot(points: Sequence[tuple[int, float, float]], x_label: str, y_label: str, winner: int | None) -> str:
    """Candidates (number, x, y) with the diagonal, on which x and y are equal."""
    both = limits([v for _, x, y in points for v in (x, y)])
    f = Frame(both, both, 360)
    f.grid_y()
    f.grid_x(x_label)
    f.add(f'<text x="{f.left + 6}" y="{f.top + 4}">{esc(_fit(y_label, 200))} that came out</text>')
    f.add(f'<path class="zero" d="M{f.px(both[0])} {f.py(both[0])}L{f.px(both[1])} {f.py(both[1])}"/>')
    for n, x, y in points:
        f.add(f'<a href="#trial-{n}"><circle class="{"winner" if n == winner else "other"} mean" cx="{f.px(x)}" '
              f'cy="{f.py(y)}" r="{5 if n == winner else 3.5}"/><title>#{n}: {esc(x_label)} {number(x)}, '
              f"{esc(y_label)} {number(y)}</title></a>")
    return f.svg(f"{y_label} against {x_label}")


def bars_plot(values: Mapping[str, float], label: str) -> str:
    """Shares from 0 to 1 as horizontal bars with their names."""
    left, row, width = 150, 26, 480
    top = max([*values.values(), 1e-9])
    out = []
    for i, (name, v) in enumerate(values.items()):
        y = 8 + row * i
        w = (width - left - 56) * max(0.0, v) / top
        out.append(f'<text class="value" x="{left - 10}" y="{y + 14}" text-anchor="end">'
                   f"{esc(_fit(name, left - 14))}</text>"
                   f'<rect class="bar-mark" x="{left}" y="{y + 3}" width="{max(1.0, w):.1f}" height="15" rx="3"/>'
                   f'<text class="value" x="{left + w + 8:.1f}" y="{y + 14}">{v:.0%}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width} {16 + row * len(values)}" '
            f'role="img" aria-label="{esc(label)}">{"".join(out)}</svg>')


def curves_plot(curves: Mapping[str, Sequence[tuple[float, float]]], highlight: Mapping[str, str],
                label: str, *, height: int = 300, links: bool = True) -> str:
    """Learning curves by name; ``highlight`` gives a CSS class to those that are drawn on top, in colour."""
    shown = {k: _thin([(x, y) for x, y in c if math.isfinite(x) and math.isfinite(y)]) for k, c in curves.items()}
    shown = {k: c for k, c in shown.items() if c}
    xs = [x for c in shown.values() for x, _ in c]
    f = Frame((0, max(xs, default=1.0) or 1.0), limits([y for c in shown.values() for _, y in c], whole=False), height)
    f.grid_y()
    f.grid_x(label)
    lines = []
    for name in sorted(shown, key=lambda k: k in highlight):
        points = " ".join(f"{f.px(x):g},{f.py(y):g}" for x, y in shown[name])
        cls = highlight.get(name, "other many" if len(shown) > 40 else "other")
        line = (f'<polyline class="curve {cls}" points="{points}">'
                f"<title>{esc(name)}</title></polyline>")
        if len(shown[name]) == 1:
            x, y = shown[name][0]
            line = f'<circle class="{cls} mean" cx="{f.px(x)}" cy="{f.py(y)}" r="3"/>'
        lines.append(f'<a href="#trial-{esc(name.lstrip("#"))}">{line}</a>' if links else line)
    f.clip(*lines)
    return f.svg(label)


def _thin(curve: Sequence[tuple[float, float]], most: int = 80) -> list[tuple[float, float]]:
    """A curve of at most ``most`` points: neighbours are averaged."""
    if len(curve) <= most:
        return list(curve)
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in np.array_split(np.array(curve), most)]


@dataclass(frozen=True)
class Column:
    """A candidate in :func:`heat_map`: what it is and its values by row."""

    number: int
    title: str
    values: Mapping[str, float]
    winner: bool = False


def heat_map(columns: Sequence[Column], rows: Mapping[str, str], label: str) -> str:
    """Values from 0 to 1, or to the largest above that, by row and candidate; ``rows`` maps names to a CSS class.
    Blank: no value."""
    top = max([1.0, *(v for c in columns for v in c.values.values() if v is not None and math.isfinite(v))])
    left, size = 88, 24
    step = max(6.0, min(46.0, 1000 / max(1, len(columns))))
    width, bottom = left + step * len(columns) + 4, size * len(rows) + 6
    out = []
    for i, (name, cls) in enumerate(rows.items()):
        out.append(f'<text class="rowname {cls}" x="{left - 10}" y="{i * size + 16}" text-anchor="end">'
                   f"{esc(_fit(name, left - 14))}</text>")
    for j, c in enumerate(columns):
        x = left + j * step
        cells = []
        for i, name in enumerate(rows):
            v = c.values.get(name)
            if v is None or not math.isfinite(v):
                cells.append(f'<path class="blank" d="M{x + step / 2 - 1.5:.1f} {i * size + 12}h3"/>')
                continue
            level = max(0.0, v) / top
            tooltip = esc(_fit(f"{c.title}, {name}", 900))
            cells.append(f'<rect class="cell" x="{x:.1f}" y="{i * size + 1}" width="{step - 1:.1f}" '
                         f'height="{size - 2}" fill-opacity="{0.05 + 0.95 * level:.2f}"><title>{tooltip}: '
                         f"{v:.2f}</title></rect>")
            if step >= 30:
                ink = "over" if level > 0.72 else "between" if level > 0.5 else "under"
                cells.append(f'<text class="{ink}" x="{x + step / 2 - 0.5:.1f}" '
                             f'y="{i * size + 16}" text-anchor="middle">{v:.2f}</text>')
        out.append(f'<a href="#trial-{c.number}">{"".join(cells)}</a>')
        if c.winner:
            out.append(f'<rect class="frame" x="{x - 1:.1f}" y="0" width="{step + 1:.1f}" height="{size * len(rows)}" '
                       'rx="2"/>')
        every = math.ceil(34 / step)
        if j % every == 0:
            out.append(f'<text x="{x + step / 2:.1f}" y="{bottom + 10}" text-anchor="middle">#{c.number}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="plot heat" viewBox="0 0 {width:.0f} {bottom + 18}" '
            f'style="width:{width:.0f}px" role="img" aria-label="{esc(label)}">{"".join(out)}</svg>')
